"""A stage knows which of its tokens are patches; an unusable one is refused only if tapped."""

import pytest
import torch
from torch import Tensor, nn

from kdhooks import Distiller, FeatureTap, KDHooksError, Model, Stage, hookimpl
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from kdhooks_plugins._maps import Grid


class Tokens(nn.Module):
    """Holds blocks, with the number of tokens before the patches, or with these tokens."""

    def __init__(self, **said: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(2))
        for name, count in said.items():
            if "token" in name and name.startswith("num"):
                setattr(self, name, count)
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros(1, count, 4)))


@pytest.mark.parametrize(
    ("said", "n", "prefix"),
    [
        ({}, 16, 0),
        ({"cls_token": 1}, 17, 1),
        ({"cls_token": 1, "reg_token": 4}, 21, 5),
        ({"cls_token": 1, "dist_token": 1}, 18, 2),
        ({"num_extra_tokens": 1}, 17, 1),
        ({"num_prefix_tokens": 5}, 9, 5),  # 9 is a square as well
        ({"num_extra_tokens": 0, "cls_token": 1}, 17, 0),  # removed before this stage
        ({"cls_token": 1}, 16, 0),  # added after this stage
        ({"num_extra_tokens": 1}, 1, 0),
    ],
)
def test_tokens_before_the_patches_are_counted(said: dict[str, int], n: int, prefix: int) -> None:
    model = nn.Module()
    model.backbone = Tokens(**said)
    for owner, path in ((model, "backbone.blocks.1"), (model.backbone, "blocks.1")):
        stage = Stage.of(owner, path, torch.zeros(2, n, 4))
        assert (stage.shape, stage.prefix) == ((n, 4), prefix)


def test_a_map_has_no_tokens_before_the_patches() -> None:
    assert Stage.of(Tokens(cls_token=1), "blocks.1", torch.zeros(2, 4, 4, 4)).prefix == 0


def test_a_grid_has_only_the_patches() -> None:
    x = torch.randn(2, 21, 4)
    grid = Grid.of(Stage.of(Tokens(num_prefix_tokens=5), "blocks.1", x), "method")
    assert grid.size == (4, 4)
    assert torch.equal(grid(x), x[:, 5:].mT.unflatten(2, (4, 4)))
    with pytest.raises(KDHooksError, match="returns 13 tokens in training and 16 when probed"):
        grid(x[:, :18])
    with pytest.raises(
        KDHooksError, match=r"square grid; found 22 of them; name .* set num_prefix_tokens"
    ):
        Grid.of(Stage.of(Tokens(cls_token=1), "blocks.1", torch.zeros(1, 22, 4)), "method")


# --- a stage that can't be tapped ------------------------------------------------------------


class Pairs(TinyFaceNet):
    """Returns a pair from its third layer, as some backbones do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer3.register_forward_hook(lambda module, args, output: (output, 1))
        self.layer4.register_forward_pre_hook(lambda module, args: args[0][:1])


class Last:
    """Taps one stage."""

    def __init__(self, number: int) -> None:
        self.number = number

    @hookimpl
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
        class Mean(nn.Module):
            def forward(self, ours: list[Tensor], theirs: list[Tensor], labels: object) -> Tensor:
                return ours[0].square().mean() * theirs[0].square().mean()

        ours, theirs = student.stages[self.number].path, teacher.stages[self.number].path
        return FeatureTap("last", Mean(), student=(ours,), teacher=(theirs,), needs_labels=False)


def test_a_stage_that_cannot_be_tapped_is_refused_only_if_tapped() -> None:
    stages = ["layer1", "layer2", "layer3", "layer4"]
    student, (images, labels) = Pairs(), tiny_batch()
    options = {"student_stages": stages, "teacher_stages": stages, "input_shape": (3, 32, 32)}
    with Distiller(student, tiny_teacher(), [Last(3)], **options) as kd:  # type: ignore[arg-type]
        student(images)
        kd(images, labels)["last"].backward()
    with pytest.raises(
        KDHooksError, match=r"'layer3' must return a tensor; found tuple of 2.*shallow to deep, as"
    ):
        Distiller(student, tiny_teacher(), [Last(2)], **options)  # type: ignore[arg-type]
    assert not student.layer4._forward_hooks
    with pytest.raises(KDHooksError, match="student has no submodule 'layer5'; did you mean"):
        Distiller(
            student,
            tiny_teacher(),
            [Last(3)],
            student_stages=[*stages, "layer5"],
            input_shape=(3, 32, 32),
        )
