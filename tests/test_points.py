"""Names and patterns in a recipe select the right submodules."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdhooks
from kdhooks import Distiller, FeatureTap, KDHooksError, Model, Teacher, hookimpl
from kdhooks.backbones import known_stages
from kdhooks.paths import unwrap
from kdhooks.points import Points
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.small_distiller import SMALL, Method, distil, student


class IResNet(TinyFaceNet):
    """Known by its name."""


class Blocks(nn.Module):
    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, stride=8)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()) for _ in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return x.flatten(1)[:, :12]


def points(model: nn.Module | None = None, embedding: str = "") -> Points:
    return Points.of(model or IResNet(), None, embedding)


def tables(*described: tuple[str, int]) -> list[dict[str, Any]]:
    return [{"module": m, "reduction": r, "num_chs": 4} for m, r in described]


RESNET = tables(("act1", 2), ("layer1", 4), ("layer2", 8), ("layer3", 16), ("layer4", 32))


@pytest.mark.parametrize(
    ("info", "stages"),
    [
        (RESNET, ["layer1", "layer2", "layer3", "layer4"]),
        (RESNET[1:3], ["layer1", "layer2"]),
        (SimpleNamespace(info=RESNET), ["layer1", "layer2", "layer3", "layer4"]),
        (tables(*((f"blocks.{n}", 16) for n in range(12))),
         ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]),
        (tables(("blocks.0", 16), ("blocks.1", 16)), ["blocks.0", "blocks.1"]),
        (tables(("a", 4), ("b", 4), ("c", 8), ("d", 8)), ["b", "d"]),
        ([], None),
        ([{"num_chs": 3}], None),
        ("layer1", None),
        (None, None),
    ],
)  # fmt: skip
def test_networks_of_timm_describe_themselves(info: Any, stages: list[str] | None) -> None:
    model = nn.Module()
    model.feature_info = info
    assert known_stages(model) == stages


def test_stages_and_the_embedding_have_names() -> None:
    named = points(embedding="features")
    assert named.several(["stage1", "stage4", "embedding", "layer2", ""], "student") == (
        "layer1", "layer4", "features", "layer2", "",
    )  # fmt: skip
    assert named.one("stage3:in@2[-1]", "student") == "layer3:in@2[-1]"
    assert points().one("embedding", "student") == ""


def test_a_submodule_with_the_exact_name_takes_precedence() -> None:
    model = IResNet()
    model.stage1, model.embedding = nn.Identity(), nn.Identity()
    model.add_module("layer[1-4]", nn.Identity())
    paths = ["stage1", "stage2", "embedding", "layer[1-4]"]
    assert points(model).several(paths, "") == ("stage1", "layer2", "embedding", "layer[1-4]")


def test_patterns_match_in_natural_order() -> None:
    named = points(Blocks())
    assert named.several(["blocks.*"], "") == tuple(f"blocks.{n}" for n in range(12))
    assert named.several(["blocks.1?", "stem"], "") == ("blocks.10", "blocks.11", "stem")
    assert named.several(["blocks.[1-2].1:in"], "") == ("blocks.1.1:in", "blocks.2.1:in")
    assert points().several(["layer[1-4]"], "") == ("layer1", "layer2", "layer3", "layer4")
    assert points().several(["layer[!1]@2"], "") == ("layer2@2", "layer3@2", "layer4@2")
    assert points().several(["*[-1]"], "") == tuple(
        f"{name}[-1]" for name in ("fc", "features", "layer1", "layer2", "layer3", "layer4")
    )


def test_an_index_is_not_a_pattern() -> None:
    assert points().several(["layer1[2]", "layer1[-1]"], "") == ("layer1[2]", "layer1[-1]")


def test_wrappers_are_unwrapped() -> None:
    model = IResNet()
    model.add_module("layer2", torch.compile(model.layer2, backend="eager"))  # type: ignore[arg-type]
    named = points(unwrap(nn.DataParallel(model)))
    assert named.several(["layer[2-3]", "stage2"], "") == ("layer2", "layer3", "layer2")


@pytest.mark.parametrize(
    ("model", "path", "said"),
    [
        (IResNet, "stage5", "student has no submodule 'stage5'; the known stages of its backbone "
         "are: stage1 (layer1), stage2 (layer2), stage3 (layer3), stage4 (layer4); its children "
         "are: layer1, layer2, layer3, layer4, fc, features"),
        (Blocks, "stage1", "student has no submodule 'stage1'; the stages of a Blocks are not "
         "known; its children are: stem, blocks"),
        (Blocks, "blocks.*.2", "student has no submodule that 'blocks.*.2' matches (* stands for a "
         "part between two dots); its children are: stem, blocks"),
        (IResNet, "layer[1-2]", "student must name one submodule; 'layer[1-2]' matches 2: layer1, "
         "layer2; name one of them"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused(model: type[nn.Module], path: str, said: str) -> None:
    with pytest.raises(KDHooksError) as error:
        points(model()).one(path, "student")
    assert str(error.value) == said


def test_another_class_with_a_known_name_has_no_stages() -> None:
    class MobileFaceNet(Blocks):
        pass

    assert points(MobileFaceNet()).stages == ()


# --- in a run ------------------------------------------------------------------------------------


class Means(nn.Module):
    def forward(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        return torch.stack([s.square().mean() for s in student]).sum()


class Features:
    """A third-party method that names submodules."""

    def __init__(self, student: Sequence[str], teacher: Sequence[str]) -> None:
        self.paths = tuple(student), tuple(teacher)

    @hookimpl
    def feature_tap(self) -> FeatureTap:
        return FeatureTap("means", Means(), student=self.paths[0], teacher=self.paths[1])


def run(kd: Distiller, net: nn.Module) -> dict[str, Tensor]:
    images, labels = tiny_batch()
    net.train()(images)
    terms: dict[str, Tensor] = kd(images, labels)
    return terms


def of(kd: Distiller) -> tuple[tuple[str, ...], tuple[str, ...]]:
    (tap,) = kd.taps
    return tap.student_paths, tap.teacher_paths


def named_teacher() -> Teacher:
    teacher = tiny_teacher()
    assert teacher.module is not None
    teacher.module.__class__ = IResNet
    return teacher


def network() -> nn.Module:
    net = student()
    net.__class__ = IResNet
    return net


def test_a_methods_own_taps_may_use_names() -> None:
    net = network()
    kd = distil(Features(["stage2", "fc:in"], ["stage3:in"]), net=net, teacher=named_teacher())
    assert of(kd) == (("layer2", "fc:in"), ("layer3:in",))
    assert run(kd, net)["means"] > 0
    with pytest.raises(KDHooksError, match="means: teacher must name one submodule; 'layer"):
        distil(Features(["stage2"], ["layer[1-2]"]), net=network(), teacher=named_teacher())


@pytest.mark.parametrize("given", [["stage2", "stage3"], ["layer[2-3]"], ["layer2", "stage3"]])
def test_stages_may_be_named_or_matched(given: list[str]) -> None:
    outcomes = []
    for stages in (["layer2", "layer3"], given):
        net = network()
        more = {"student_stages": stages, "teacher_stages": stages, "teacher": named_teacher()}
        kd = distil("at", net=net, **more)
        assert of(kd) == (("layer2", "layer3"),) * 2
        outcomes.append(run(kd, net)["at"])
    assert torch.equal(*outcomes)


def test_a_known_backbones_stages_are_the_default_in_any_loop() -> None:
    kd = distil("at", net=network(), teacher=named_teacher())
    assert of(kd) == (tuple(f"layer{n}" for n in (1, 2, 3, 4)),) * 2
    with pytest.raises(KDHooksError, match="at needs at least 1 of the student's stages; found 0"):
        distil("at", net=student(), teacher=named_teacher())


def test_a_recipe_may_use_them() -> None:
    teacher = named_teacher()
    taps = {"student": {"stages": ["stage[1-4]"]}, "teacher": {"stages": ["stage4"]}}
    recipe: dict[str, Any] = {
        "teacher": teacher.module,
        "methods": [{"name": "fitnet", "student": "embedding", "teacher": "embedding"}],
        "input_shape": list(SMALL),
    }
    net = network()
    assert of(kd := kdhooks.build(recipe, net)) == (("",), ("",))
    assert run(kd, net)["fitnet"] > 0
    with pytest.raises(KDHooksError, match=r"student has no submodule that 'stage\[1-4\]' matches"):
        kdhooks.build({**recipe, "taps": taps}, network())


def test_fitnet_pairs_the_matches_of_patterns() -> None:
    def paths(student: Any, teacher: Any) -> Any:
        method = {"name": "fitnet", "student": student, "teacher": teacher}
        return of(distil(method, net=network(), teacher=named_teacher()))

    assert paths(["layer[1-2]", "fc:in"], ["stage1", "layer2", "fc:in"]) == (
        ("layer1", "layer2", "fc:in"), ("layer1", "layer2", "fc:in"),
    )  # fmt: skip
    assert paths("stage2", "layer2:in") == (("layer2",), ("layer2:in",))
    with pytest.raises(
        KDHooksError, match=r"fitnet: student must name one submodule; 'layer\[1-2\]' matches 2"
    ):
        paths("layer[1-2]", ["layer1", "layer2"])
    with pytest.raises(KDHooksError, match=r"equally many submodules, .* found 4 and 1"):
        paths(["layer?"], ["stage4"])


def test_the_probe_of_an_input_has_its_shape() -> None:
    seen = []

    class Asking(Method):
        @hookimpl
        def embedding_tap(self, student: Model) -> Any:  # type: ignore[override]
            for path in ("stage2", "stage2:in", "embedding"):
                stage = student.stage(path, "asking: student")
                seen.append((stage.path, stage.shape))
            return self.tap

    distil(Asking(), net=network())
    assert seen == [("layer2", (8, 8, 8)), ("layer2:in", (4, 16, 16)), ("", (12,))]
