"""doctor's conclusions from the gradients, and the head that it computes them with."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.checkpoint import checkpoint

from kdhooks import EmbeddingTap, hookimpl
from kdhooks.balance import DWARFS, NEGLIGIBLE, Balance, Pull
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from kdhooks_integrations.arcface_torch import attach
from kdhooks_integrations.arcface_torch.commands.settings import settle
from kdhooks_integrations.arcface_torch.commands.trial import CLIP, Head, Trial

DOCS = Path(__file__).parents[1] / "docs" / "arcface_torch.md"


def of(task: float, accumulation: int = 1, schedule: bool = False, **terms: float) -> Balance:
    pulls = {name: Pull(1.0, length, 1.0, schedule) for name, length in terms.items()}
    return Balance(Pull(1.0, task, 1.0), pulls, task + sum(terms.values()), accumulation, CLIP)


# --- conclusions ---------------------------------------------------------------------------------


def test_a_term_that_dwarfs_the_task_is_named_with_its_balancing_weight() -> None:
    (said,) = of(457, gkd=13900).conclusions()
    assert said == (
        "gkd: its gradient is 30.4 times the task's (13,900 to 457); with clipping at 5 the task "
        "keeps 3 % of the step; weight = 0.033 would balance them"
    )


def test_without_clipping_the_conclusion_does_not_mention_it() -> None:
    (said,) = of(0.1, gkd=4).conclusions()
    assert "; the task keeps 2 % of the step; weight = 0.025 would balance them" in said
    assert "clipping at 5" in of(0.1, 4, gkd=4).conclusions()[0], "batches are summed first"


def test_a_term_that_changes_nothing_is_named_with_its_balancing_weight() -> None:
    (said,) = of(400, fcd=0.1).conclusions()
    assert said == (
        "fcd: its gradient is 1/4,000 of the task's (0.1 to 400), so it changes almost "
        "nothing; weight = 4e+03 would balance them"
    )


def test_a_weight_by_schedule_is_named_by_its_key() -> None:
    assert "weight.value = 0.01" in of(1, schedule=True, gkd=100).conclusions()[0]


@pytest.mark.parametrize(
    ("length", "count"),
    [(0.0, 0), (0.009, 1), (0.011, 0), (1.0, 0), (29.9, 0), (30.0, 1), (1e6, 1)],
)
def test_the_thresholds(length: float, count: int) -> None:
    assert len(of(1, fcd=length).conclusions()) == count


def test_several_terms_may_dwarf_the_task_together() -> None:
    (said,) = of(1, fcd=16, at=16).conclusions()
    assert "fcd and at: their gradients together are 32 times the task's" in said
    assert of(1, fcd=4, at=4).conclusions() == []


def test_a_task_without_a_gradient_gives_no_ratio() -> None:
    found = of(0, fcd=3)
    assert found.conclusions() == []
    assert found.ratio("fcd") is None
    assert found.balancing_weight("fcd") == 0


def test_the_documentation_names_the_thresholds() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name, value in (("CLIP", CLIP), ("DWARFS", DWARFS), ("NEGLIGIBLE", NEGLIGIBLE)):
        shown = f"1/{1 / value:,.0f}" if value < 1 else f"{value:g}"
        assert f"`{name}` ({shown})" in text


# --- the gradients of a step ---------------------------------------------------------------------


class Pulling(nn.Module):
    """A loss whose gradient at the embedding is known."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.factor * (student - teacher.mean()).square().mean()


class Pull2:
    def __init__(self, factor: float, weight: Any = 1.0) -> None:
        self.factor, self.weight = factor, weight

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("pull", Pulling(self.factor), weight=self.weight)


class Checkpointed(TinyFaceNet):
    """Like arcface_torch's vit_b, it does not support autograd.grad."""

    def forward(self, images: Tensor) -> Tensor:
        run = super().forward
        if not self.training:
            return run(images)
        embedding: Tensor = checkpoint(run, images.requires_grad_(), use_reentrant=True)
        return embedding


def trial(method: object, student: type[nn.Module] = TinyFaceNet) -> Trial:
    torch.manual_seed(0)
    backbone = student().train()
    head = Head(6, 12, settle({}, None, {"network": "x"})).train()
    optimizer = SGD([{"params": m.parameters()} for m in (backbone, head)], lr=0.1)
    recipe = {"teacher": tiny_teacher().module, "methods": [method], "input_shape": [3, 32, 32]}
    attachment = attach(backbone, head, optimizer, ConstantLR(optimizer), recipe)
    images, labels = tiny_batch()
    return Trial(backbone, head, attachment, images, labels % 6)


def test_the_tasks_gradient_is_that_of_the_plain_step() -> None:
    tried = trial(Pull2(3.0))
    found = tried.balance()
    assert all(parameter.grad is None for parameter in tried.backbone.parameters())
    tried.attachment.remove()
    tried.head(tried.backbone(tried.images), tried.labels).backward()
    assert found.task.gradient == pytest.approx(clipped_norm(tried.backbone))


def clipped_norm(backbone: nn.Module) -> float:
    return float(torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5))


def test_the_whole_gradient_is_that_of_the_step() -> None:
    tried = trial(Pull2(3.0))
    found = tried.balance()
    tried.step()
    assert found.whole == pytest.approx(clipped_norm(tried.backbone))


def test_the_balancing_weight_balances() -> None:
    first = trial(Pull2(1000.0)).balance()
    assert first.ratio("pull") != pytest.approx(1.0, rel=0.1)
    second = trial(Pull2(1000.0, first.balancing_weight("pull"))).balance()
    assert second.ratio("pull") == pytest.approx(1.0, rel=1e-4)


def test_a_checkpointed_backbone_is_measured_as_any_other() -> None:
    plain, found = trial(Pull2(3.0)).balance(), trial(Pull2(3.0), Checkpointed).balance()
    assert found.whole == pytest.approx(plain.whole)
    assert found.terms["pull"].gradient == pytest.approx(plain.terms["pull"].gradient)


def test_a_schedule_counts_with_its_value_and_stays_as_it_is() -> None:
    schedule = {"value": 2.0, "start": 10, "warmup": 5}
    tried = trial({"name": "fcd", "weight": schedule})
    found = tried.balance()
    flat = trial({"name": "fcd", "weight": 2.0}).balance()
    assert found.terms["fcd"].gradient == pytest.approx(flat.terms["fcd"].gradient)
    assert (found.terms["fcd"].weight, found.terms["fcd"].by_schedule) == (2.0, True)
    (tap,) = tried.attachment.distiller.taps
    assert tried.attachment.distiller.weight(tap) == 0


def test_a_term_of_weight_zero_is_not_judged() -> None:
    assert trial({"name": "fcd", "weight": 0.0}).balance().terms == {}


class Narrow(nn.Module):
    """Has gradients of limited range, as in float16."""

    least, most = 1e-4, 300.0

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyFaceNet()

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.inner(x)
        if embedding.requires_grad:
            embedding.register_hook(self._rounded)
        return embedding

    def _rounded(self, grad: Tensor) -> Tensor:
        grad = torch.where(grad.abs() > self.most, torch.inf, grad)
        return torch.where(grad.abs() < self.least, 0.0, grad)


def test_small_gradients_in_half_precision_are_measured() -> None:
    plain = trial(Pull2(1e-5)).balance().terms["pull"].gradient
    found = trial(Pull2(1e-5), Narrow).balance().terms["pull"].gradient
    assert found == pytest.approx(plain, rel=1e-2)


def test_a_scale_that_overflows_is_halved() -> None:
    plain = trial(Pull2(3.0)).balance()
    found = trial(Pull2(3.0), Narrow).balance()
    assert found.terms["pull"].gradient == pytest.approx(plain.terms["pull"].gradient, rel=1e-2)


# --- the head ------------------------------------------------------------------------------------


def head(**config: object) -> Head:
    torch.manual_seed(1)
    return Head(8, 4, settle({"network": "x", "num_classes": 8, **config}, "configs/x", {}))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    embedding = torch.randn(5, 4, generator=generator)
    return embedding.requires_grad_(), torch.tensor([1, 3, 3, 7, 0])


def cosines(one: Head, embedding: Tensor) -> Tensor:
    return F.normalize(embedding) @ F.normalize(one.weight).T


@pytest.mark.parametrize(
    "margins", [(1.0, 0.5, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.4), (0.9, 0.4, 0.15)]
)
def test_the_margins_are_the_trainers(margins: tuple[float, float, float]) -> None:
    one, (embedding, labels) = head(margin_list=margins), batch()
    scores = cosines(one, embedding).detach().clone()
    for row, label in enumerate(labels.tolist()):
        cosine = float(scores[row, label])
        m2, m3 = margins[1:]
        scores[row, label] = cosine - m3 if m3 > 0 else math.cos(math.acos(cosine) + m2)
    loss = one(embedding, labels)
    torch.testing.assert_close(loss, F.cross_entropy(64 * scores, labels), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_angular_margin_is_that_of_the_cosine() -> None:
    """The trainer adds the angle under no_grad."""
    one, (embedding, labels) = head(), batch()
    (found,) = torch.autograd.grad(one(embedding, labels), embedding)
    cosine = cosines(one, embedding)
    shifted = cosine.detach().clone()
    rows = torch.arange(5)
    shifted[rows, labels] = (shifted[rows, labels].acos() + 0.5).cos()
    slope = (64 * shifted).softmax(1)
    slope[rows, labels] -= 1
    (wanted,) = torch.autograd.grad(cosine, embedding, 64 * slope / 5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_other_classes_that_are_too_near_are_filtered() -> None:
    one, (embedding, labels) = head(interclass_filtering_threshold=0.2), batch()
    scores = cosines(one, embedding).detach()
    own = F.one_hot(labels, 8).bool()
    assert ((scores > 0.2) & ~own).any()
    scores[(scores > 0.2) & ~own] = 0
    scores[own] = (scores[own].acos() + 0.5).cos()
    wanted = F.cross_entropy(64 * scores, labels)
    torch.testing.assert_close(one(embedding, labels), wanted, rtol=1e-5, atol=1e-6)


def test_sampling_takes_the_own_classes_and_fills_up() -> None:
    one, (_, labels) = head(sample_rate=0.75), batch()
    rows, own = one._sampled(labels)
    assert len(rows) == 6
    torch.testing.assert_close(rows[own], one.weight[labels])
    for rate in (0.25, 0):
        rows, own = head(sample_rate=rate)._sampled(labels)
        assert len(rows) == 4, "all classes of the batch, though they are more than the share"
        torch.testing.assert_close(rows[own], one.weight[labels])
    assert head()._sampled(labels)[0].shape == (8, 4)
