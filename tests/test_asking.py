"""A method's declarations are checked before the first step."""

import pytest
import torch
from torch import Tensor, nn

from kdhooks import (
    ClassifierShare,
    EmbeddingTap,
    FeatureTap,
    KDHooksError,
    Model,
    ParameterTap,
    hookimpl,
)
from kdhooks.asking import Declarations
from kdhooks.testing import TinyFaceNet
from tests.small_distiller import Gap, Method, distil


def test_methods_must_be_a_list() -> None:
    with pytest.raises(KDHooksError, match="list of at least one method; found 'fcd'"):
        Declarations("fcd", [])
    with pytest.raises(KDHooksError, match="list of at least one method"):
        distil()


def test_two_terms_of_one_name_are_refused() -> None:
    with pytest.raises(KDHooksError, match="two terms are named 'gap'; each method may run once"):
        distil(Method(), Method())


def test_a_plugin_without_hooks_is_refused() -> None:
    class Forgetful:
        def embedding_tap(self) -> EmbeddingTap:
            return EmbeddingTap("gap", Gap())

    with pytest.raises(KDHooksError, match="Forgetful declares nothing: mark at least one of"):
        distil(Forgetful())


def test_a_plugin_that_returns_none_everywhere_is_refused() -> None:
    class Shy:
        @hookimpl
        def embedding_tap(self) -> None:
            return None

    with pytest.raises(KDHooksError, match="Shy declares nothing for these models"):
        distil(Shy())


def test_a_hook_with_an_unknown_argument_is_refused() -> None:
    class Wrong:
        @hookimpl
        def embedding_tap(self, pupil: Model) -> EmbeddingTap:
            return EmbeddingTap("gap", Gap())

    with pytest.raises(
        KDHooksError, match=r"Wrong does not fit the hook specifications(?s:.)*pupil"
    ):
        distil(Wrong())


def test_a_misspelt_hook_is_refused() -> None:
    class Wrong:
        @hookimpl
        def embeding_tap(self) -> EmbeddingTap:
            return EmbeddingTap("gap", Gap())

    with pytest.raises(KDHooksError, match="Wrong does not fit the hook specifications"):
        distil(Wrong())


def test_a_hook_must_return_a_declaration() -> None:
    class Wrong:
        @hookimpl
        def embedding_tap(self) -> nn.Module:
            return Gap()

    with pytest.raises(KDHooksError, match=r"Wrong\.embedding_tap must return a declaration"):
        distil(Wrong())


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_misspelt_tap_names_the_near_miss(side: str) -> None:
    paths = {"student": ("layer1",), "teacher": ("layer1",), side: ("layer5",)}

    class Features:
        @hookimpl
        def feature_tap(self) -> FeatureTap:
            return FeatureTap("stages", Gap(), student=paths["student"], teacher=paths["teacher"])

    with pytest.raises(KDHooksError, match=f"stages: {side} has no submodule 'layer5'; did you"):
        distil(Features())


def test_misspelt_stages_are_refused() -> None:
    with pytest.raises(KDHooksError, match="student has no submodule 'layr1'; did you mean"):
        distil(Method(), student_stages=["layr1"])
    with pytest.raises(KDHooksError, match="teacher has no submodule 'layr1'; did you mean"):
        distil(Method(), teacher_stages=["layr1"])


def test_parameter_taps_name_trained_parameters() -> None:
    class Decay:
        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl
        def parameter_tap(self) -> ParameterTap:
            return ParameterTap("decay", Gap(), parameters=(self.name,))

    with pytest.raises(KDHooksError, match=r"no parameter 'fc.wight'; did you mean 'fc.weight'"):
        distil(Decay("fc.wight"))
    net = TinyFaceNet()
    net.fc.weight.requires_grad_(False)
    with pytest.raises(KDHooksError, match=r"student parameter 'fc.weight' is frozen"):
        distil(Decay("fc.weight"), net=net)


def test_a_share_without_a_classifier_names_the_way_out() -> None:
    class Sharing:
        @hookimpl
        def classifier_share(self) -> ClassifierShare:
            return ClassifierShare("share", Gap())

    with pytest.raises(KDHooksError, match="share needs the teacher's classifier, and none is"):
        distil(Sharing(), teacher=lambda images: images.flatten(1)[:, :12])


def test_an_adapter_must_not_hold_the_teacher() -> None:
    class Adapting(Method):
        @hookimpl
        def adapt_teacher(self, teacher: Model) -> nn.Module:
            assert teacher.module is not None
            return nn.Sequential(teacher.module)

    with pytest.raises(KDHooksError, match="Sequential holds the teacher as a child"):
        distil(Adapting())


def test_one_method_at_most_adapts_the_teacher() -> None:
    class Adapting(Method):
        @hookimpl
        def adapt_teacher(self) -> nn.Module:
            return nn.Identity()

    with pytest.raises(KDHooksError, match="one method at most may adapt the teacher; found"):
        distil(Adapting("one"), Adapting("two"))


@pytest.mark.parametrize(
    ("name", "weight", "match"),
    [
        ("Gap", 1.0, "a name must consist of lower case letters.*found 'Gap'"),
        ("gap.x", 1.0, "found 'gap.x'"),
        ("forward", 1.0, "EmbeddingTap: a name must not be that of an attribute .*'forward_term'"),
        ("training", 1.0, "found 'training'"),
        ("gap", -1.0, "gap: weight must be finite and at least 0; found -1"),
        ("gap", float("nan"), "found nan"),
        ("gap", "heavy", "a function of the step, or in a recipe a table; found 'heavy'"),
        ("gap", True, "found True"),
    ],
)
def test_names_and_weights_are_checked(name: str, weight: object, match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        EmbeddingTap(name, Gap(), weight)  # type: ignore[arg-type]


def test_a_loss_must_be_a_module() -> None:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros(())

    with pytest.raises(KDHooksError, match=r"gap: loss must be an nn\.Module.*found function"):
        EmbeddingTap("gap", loss)  # type: ignore[arg-type]
