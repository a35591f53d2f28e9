"""CAKD trains prompts in teachers with transformer blocks, and refuses them for other teachers."""

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import ClassShard, Distiller, KDHooksError, Model, Stage, Teacher
from kdhooks.classes.rows import Rows
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import TinyFaceNet, check_method, tiny_batch
from kdhooks_plugins._blocks import transformer_blocks
from kdhooks_plugins._cakd_options import PromptTokens
from kdhooks_plugins._prompts import Prompts
from kdhooks_plugins.at import AT
from kdhooks_plugins.cakd import CAKD
from tests.maps import normal
from tests.prompted import SMALL, TEACHERS, Maker, distiller_of, prompts_of, total
from tests.references.proxylesskd import Margin, margin_softmax
from tests.transformers import Block, TinySwin, TinyViT, WindowAttention, teacher_of, trained

# --- the method with prompts -----------------------------------------------------------------


@TEACHERS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompts": {"number": 0}},
        {"prompts": {"in_features": False}},
        {"prompts": {"checkpointing": True}},
    ],
)
def test_conforms_with_a_transformer_teacher(
    make: Maker, stage: str, last: str, options: dict[str, Any]
) -> None:
    check_method(
        CAKD, teacher=partial(teacher_of, make), teacher_stages=[stage], **{**SMALL, **options}
    )


@pytest.mark.parametrize(("asked", "expected"), [(None, 8), (2, 2), (0, None)])
def test_a_transformer_gets_eight_prompts_per_block_by_default(
    asked: int | None, expected: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "kdhooks")
    distiller = distiller_of(TinyViT, "blocks.2", prompts={"number": asked})
    adapter = distiller.adapter
    counts = [len(p) for p in adapter.prompts] if isinstance(adapter, Prompts) else None
    assert counts == (None if expected is None else [expected] * 3)
    assert not caplog.messages


@pytest.mark.parametrize(("asked", "tokens"), [(None, 19), (True, 19), (False, 16)])
def test_prompts_are_pixel_features_by_default(asked: bool | None, tokens: int) -> None:
    student = TinyFaceNet().train()
    distiller = distiller_of(
        TinyViT, "blocks.2", student, prompts={"number": 3, "in_features": asked}
    )
    seen: list[Tensor] = []
    distiller.losses["cakd"].register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[1][0])
    )
    images, labels = tiny_batch()
    student(images)
    distiller(images, labels)
    assert seen[0].shape == (len(images), tokens, 8)


@TEACHERS
def test_another_method_cannot_tap_a_stage_with_prompts(make: Maker, stage: str, last: str) -> None:
    """It would treat the prompts as pixels; both methods run if no prompts are in the features."""
    images, labels = tiny_batch()
    for in_features in (False, None):
        student = TinyFaceNet().train()
        distiller = Distiller(
            student,
            teacher_of(make),
            [CAKD(**SMALL, prompts=PromptTokens(number=3, in_features=in_features)), AT()],
            student_stages=["layer4"],
            teacher_stages=[stage],
            head=ClassShard(torch.zeros(6, 12), 0, 6),
            input_shape=(3, 32, 32),
        )
        student(images)
        if in_features is None:
            with pytest.raises(KDHooksError, match=r"19 tokens .* 16 when probed; if cakd's prom"):
                distiller(images, labels)
        else:
            assert distiller(images, labels)["at"].isfinite()


def test_without_prompts_the_teacher_runs_without_grad() -> None:
    student = TinyFaceNet().train()
    images, labels = tiny_batch()
    for prompts, grad in ((0, False), (2, True)):
        distiller = distiller_of(TinyViT, "blocks.2", student, prompts={"number": prompts})
        seen: list[bool] = []
        distiller.losses["cakd"].register_forward_pre_hook(
            lambda module, arguments: seen.append(arguments[1][0].requires_grad)  # noqa: B023
        )
        student(images)
        distiller(images, labels)
        distiller.remove()
        assert seen == [grad]


def test_prompts_without_a_gradient_are_left_out() -> None:
    detached: dict[str, Any] = {"matching": {"teacher_side": "detached"}}
    assert distiller_of(TinyViT, "blocks.2", **detached).adapter is None
    assert distiller_of(TinyViT, "blocks.2", **detached, teacher_cls_weight=1.0).adapter is not None


@TEACHERS
def test_the_state_dict_restores_the_prompts_and_the_next_step(
    make: Maker, stage: str, last: str
) -> None:
    student = TinyFaceNet().train()
    images, labels = tiny_batch()
    first = distiller_of(make, stage, student)
    assert first.adapter is not None
    with torch.no_grad():
        for place, parameter in enumerate(first.parameters()):
            parameter.add_(0.1 * normal(place, *parameter.shape))
    student(images)
    expected = first(images, labels)
    first.remove()
    second = distiller_of(make, stage, student)
    second.load_state_dict(first.state_dict())
    assert second.adapter is not None
    assert_close(second.adapter.state_dict(), first.adapter.state_dict(), rtol=0, atol=0)
    student(images)
    assert_close(second(images, labels), expected, rtol=0, atol=0)


@TEACHERS
def test_prompts_work_under_the_teachers_autocast(make: Maker, stage: str, last: str) -> None:
    network = trained(make)
    adapter = prompts_of(network)
    session = TeacherSession(Teacher(network, dtype=torch.bfloat16), adapter=adapter)
    images, _ = tiny_batch()
    found = session(images).embedding
    assert found.dtype == torch.float32
    assert_close(found, adapter(network, images), rtol=0.1, atol=0.1)
    found.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


# --- the teacher's own classes ---------------------------------------------------------------


def test_the_teachers_classification_trains_only_prompts() -> None:
    teacher = Model(trained(TinyViT), 12, (Stage("blocks.2", (16, 8)),))
    tap = CAKD(teacher_cls_weight=2.0, weight=0.5).classifier_share(teacher)
    assert tap is not None
    assert tap.weight == 0.5
    assert not tap.inherits_classifier
    student, labels = normal(1, 4, 12).requires_grad_(), torch.tensor([0, 2, 1, 2])
    embedding, rows = normal(2, 4, 12).requires_grad_(), normal(3, 3, 12)
    loss, notes = tap.loss(student, embedding, labels, ClassShard(rows, 0, 3))
    expected = margin_softmax(
        embedding.detach().numpy(), labels.numpy(), rows.numpy(), Margin(), scale=64.0
    )
    assert_close(loss.item(), 2.0 * expected)
    assert set(notes) == {"cosine"}
    loss.backward()
    assert student.grad is None
    assert embedding.grad is not None
    assert CAKD().classifier_share(teacher) is None


def test_the_teachers_classification_reaches_the_prompts_in_a_step() -> None:
    student = TinyFaceNet().train()
    distiller = distiller_of(
        TinyViT, "blocks.2", student, teacher_cls_weight=1.0, matching={"teacher_side": "detached"}
    )
    images, labels = tiny_batch()
    student(images)
    terms = distiller(images, labels)
    assert set(terms) == {"cakd", "cakd_teacher"}
    total(terms).backward()
    assert isinstance(distiller.adapter, Prompts)
    assert all(p.grad is not None and p.grad.any() for p in distiller.adapter.prompts)


# --- teachers that can't be prompted ---------------------------------------------------------


class OwnBias(WindowAttention):
    """Computes something else, like BEiT with its bias of queries and values outside of qkv."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + 1.0, mask)


class Unscaled(WindowAttention):
    """Lacks some of the attributes that are read, like torchvision's shifted windows."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__(width, heads, side)
        del self.scale, self.proj


class FixedTokens(nn.Module):
    """A BatchNorm over a fixed number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out


def block_with(attn: nn.Module | None = None, norm: nn.Module | None = None) -> nn.Module:
    block = Block(4, 2, attn).eval()
    if norm is not None:
        block.norm1 = norm  # type: ignore[assignment]  # of the same use
    return nn.Sequential(block)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (block_with(OwnBias(4, 2, 2)), "its attention does not compute that of a Swin"),
        (block_with(Unscaled(4, 2, 2)), "its attention has no proj, scale"),
        (block_with(norm=FixedTokens()), "running_mean"),
        (block_with(nn.Linear(4, 4)), "has no attribute `qkv`"),
    ],
)
def test_blocks_that_prompts_cannot_join_are_refused(network: nn.Module, reason: str) -> None:
    with pytest.raises(
        KDHooksError, match=rf"the teacher's block '0' \(.*{reason}.*set prompts = "
    ):
        transformer_blocks(network)


def test_prompts_are_refused_for_a_teacher_without_blocks() -> None:
    teacher = Model(TinyFaceNet(), 12, (Stage("layer4", (16, 2, 2)),))
    with pytest.raises(
        KDHooksError, match=r"the teacher TinyFaceNet has none of a kind .*; supported are blocks"
    ):
        CAKD(prompts=PromptTokens(number=2)).adapt_teacher(teacher)
    with pytest.raises(KDHooksError, match=r"prompts\.in_features needs prompts, and the teacher"):
        CAKD(prompts=PromptTokens(in_features=True)).adapt_teacher(teacher)
    with pytest.raises(KDHooksError, match="teacher_cls_weight trains the teacher's prompts, and"):
        CAKD(teacher_cls_weight=1.0).classifier_share(teacher)


@pytest.mark.parametrize(
    ("make", "stage"),
    [
        (TinySwin, Stage("layers.1", (4, 4, 16))),
        (TinyViT, Stage("patch_embed", (8, 4, 4))),
        (TinySwin, Stage("layers", (4, 4, 8))),
    ],
)
def test_prompts_among_the_features_need_a_stage_that_ends_in_a_block(
    make: Maker, stage: Stage
) -> None:
    teacher = Model(trained(make), 12, (stage,), Rows.open(torch.rand(3, 12)))
    with pytest.raises(KDHooksError, match="of a stage that ends in a transformer block; found"):
        CAKD(prompts=PromptTokens(number=2, in_features=True)).adapt_teacher(teacher)


def test_a_teacher_that_is_a_function_gets_no_prompts() -> None:
    rows = Rows.open(torch.rand(3, 12))
    assert CAKD().adapt_teacher(Model(None, 12, classifier=rows)) is None


def test_centres_tables_and_prompts_have_no_weight_decay() -> None:
    kd = distiller_of(TinyViT, "blocks.2", matching={"teacher_side": "shared"})
    spared = {id(p) for group in kd.parameter_groups(1.0)[1:] for p in group["params"]}
    names = {name for name, parameter in kd.named_parameters() if id(parameter) in spared}
    assert names == {
        "losses.cakd.urfm.centres",
        "losses.cakd.urfm.table",
        "losses.cakd.theirs.prompt_positions",
        *(f"adapter.prompts.{block}" for block in range(3)),
    }
