"""Each difficulty of recording module outputs is handled, or refused with a fix."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdhooks import KDHooksError
from kdhooks.modes import evaluating
from kdhooks.paths import find, unwrap
from kdhooks.student_taps import StudentTaps
from kdhooks.taps import Taps
from kdhooks.testing import TinyFaceNet

# torch's tracer reads the .grad of every tensor that is an attribute
_dynamo_reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    """Reset dynamo, which shares code between instances with and without hooks."""
    torch._dynamo.reset()


class InPlace(nn.Module):
    """Overwrites the output of bn: conv -> bn -> ReLU(inplace)."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        if self.reentrant is None:
            return self.block(x)  # type: ignore[no-any-return]
        return checkpoint(self.block, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def compiled(module: nn.Module, backend: str = "eager") -> nn.Module:
    optimized = torch.compile(module, backend=backend)
    assert isinstance(optimized, nn.Module)
    return optimized


def images(n: int = 2) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_takes_the_output_of_a_module() -> None:
    net = InPlace()
    taps = StudentTaps(net, ["conv", "block"])
    out = net(images())
    taken = taps.take()
    assert list(taken) == ["conv", "block"]
    assert taken["block"] is out


def test_the_empty_path_is_the_models_output() -> None:
    net = InPlace()
    taps = StudentTaps(net, [""])
    assert net(images()) is taps.take()[""]


def test_take_releases_tensors_and_images() -> None:
    net = InPlace()
    taps = StudentTaps(net, ["block"])
    net(images())
    assert taps.images is not None
    taps.take()
    assert taps.images is None
    with pytest.raises(KDHooksError, match="student tap 'block' recorded nothing"):
        taps.take()


def test_a_tensor_overwritten_in_place_is_refused() -> None:
    net = InPlace()
    taps = StudentTaps(net, ["bn"])
    net(images())
    with pytest.raises(KDHooksError, match="student tap 'bn' was overwritten in place"):
        taps.take()


def test_evaluation_records_nothing() -> None:
    net = InPlace()
    taps = StudentTaps(net, ["block"])
    with evaluating(net):
        net(images())
    with torch.no_grad():
        net(images())
    assert taps.images is None
    assert not taps.fired


def test_evaluation_between_forward_and_take_changes_nothing() -> None:
    net = InPlace()
    taps = StudentTaps(net, ["block"])
    out = net(images())
    with evaluating(net), torch.no_grad():
        net(images(5))
    assert taps.take()["block"] is out


def test_a_model_that_returns_nothing_is_tapped_and_one_that_raises_is_not() -> None:
    class Ends(InPlace):
        raises = False

        def forward(self, x: Tensor) -> None:  # type: ignore[override]  # some models store it
            super().forward(x)
            if self.raises:
                raise ValueError("here")

    net = Ends()
    taps = StudentTaps(net, ["conv"])
    net(images())
    assert list(taps.take()) == ["conv"]
    net.raises = True
    with pytest.raises(ValueError, match="here"):
        net(images())
    assert taps.images is None
    with pytest.raises(KDHooksError, match="recorded nothing"):
        taps.take()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_tap_inside_a_reentrant_checkpoint_carries_no_gradient() -> None:
    net = InPlace(reentrant=True)
    taps = StudentTaps(net, ["block.0"])
    net(images())
    with pytest.raises(KDHooksError, match=r"student tap 'block\.0' carries no gradient"):
        taps.take()


def test_recomputation_in_backward_is_not_recorded() -> None:
    net = InPlace(reentrant=False)
    calls: list[int] = []
    net.block[0].register_forward_hook(lambda *_: calls.append(1))
    taps = StudentTaps(net, ["block.0"])
    out = net(images())
    first = taps.take()["block.0"]
    (out.sum() + first.sum()).backward()
    assert len(calls) == 2, "the test is void unless the checkpoint recomputes"
    with pytest.raises(KDHooksError, match="recorded nothing"):
        taps.take()


def test_a_frozen_students_tap_is_refused() -> None:
    net = InPlace().requires_grad_(False)
    taps = StudentTaps(net, ["block"])
    net(images())
    with pytest.raises(KDHooksError, match="carries no gradient"):
        taps.take()


def test_a_module_that_does_not_run_is_named() -> None:
    net = InPlace()
    net.idle = nn.Linear(1, 1)
    taps = StudentTaps(net, ["block", "idle"])
    net(images())
    with pytest.raises(KDHooksError, match="student tap 'idle' did not run in this forward"):
        taps.take()


def test_a_module_that_returns_no_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    net = nn.Sequential(nn.Identity(), Pair())
    StudentTaps(net, ["1"])
    with pytest.raises(KDHooksError, match="student tap '1' must return a tensor; found tuple"):
        net(images())


class Three(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, x + 1, x + 2


def test_one_of_several_outputs_is_named_by_its_index() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Three())
    taps = StudentTaps(net, ["0", "1[0]", "1[-1]", "1[1]@1"])
    net(images())
    taken = taps.take()
    assert taken["1[0]"] is taken["0"]
    assert torch.equal(taken["1[-1]"], taken["0"] + 2)
    assert torch.equal(taken["1[1]@1"], taken["0"] + 1)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("1[3]", r"'1\[3\]' must name one of several outputs; found tuple of 3"),
        ("1[-4]", r"'1\[-4\]' must name one of several outputs; found tuple of 3"),
        ("0[0]", r"'0\[0\]' must name one of several outputs; found Tensor; leave out '\[0\]'"),
        ("1", r"must return a tensor; found tuple of 3; .*or one of these: 1\[-1\] is the last"),
    ],
)
def test_a_missing_index_is_refused(path: str, match: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Three())
    StudentTaps(net, [path])
    with pytest.raises(KDHooksError, match=match):
        net(images())


@pytest.mark.parametrize("path", ["1[a]", "1[]", "1[0", "9[0]"])
def test_a_malformed_index_is_refused(path: str) -> None:
    with pytest.raises(KDHooksError, match="student has no submodule"):
        StudentTaps(nn.Sequential(nn.Identity(), Three()), [path])


def test_a_tuple_of_one_tensor_is_that_tensor() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x,)

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Single())
    taps = StudentTaps(net, ["0", "1"])
    net(images())
    taken = taps.take()
    assert taken["1"] is taken["0"]


@_dynamo_reads_grad
def test_hooks_added_after_the_first_compiled_call_are_noticed() -> None:
    net = InPlace()
    fast = compiled(net)
    fast(images())
    taps = StudentTaps(unwrap(fast), ["block"])
    fast(images())
    assert not taps.fired
    with pytest.raises(KDHooksError, match="attach before the first call of a compiled model"):
        taps.take()


@_dynamo_reads_grad
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_hooks_added_before_the_first_compiled_call_fire(backend: str) -> None:
    net = InPlace()
    fast = compiled(net, backend)
    taps = StudentTaps(unwrap(fast), ["block"])
    out = fast(images())
    torch.testing.assert_close(taps.take()["block"], out)


class Twice(nn.Module):
    """Runs one convolution on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))  # type: ignore[no-any-return]


def test_a_module_that_runs_twice_needs_the_number_of_the_call() -> None:
    net = Twice()
    StudentTaps(net, ["conv"])
    with pytest.raises(KDHooksError, match=r"'conv' ran twice in one forward; .*'conv@1' or"):
        net(images())


def test_a_call_is_named_by_its_number() -> None:
    net = Twice()
    taps = StudentTaps(net, ["conv@1", "conv@2"])
    for _ in range(2):  # calls are counted from 1 in each forward
        out = net(images())
        taken = taps.take()
        assert taken["conv@2"] is out
        torch.testing.assert_close(net.conv(taken["conv@1"]), out, rtol=0, atol=0)


@pytest.mark.parametrize("path", ["conv@", "conv@0", "conv@x", "conv@-1"])
def test_a_call_is_a_number_from_1(path: str) -> None:
    with pytest.raises(KDHooksError, match=f"tap '{path}' must name a call by its number, as in"):
        find(Twice(), path, "student")


@pytest.mark.parametrize("others", [[], [""]], ids=["alone", "with another"])
def test_a_call_that_does_not_happen_is_named(others: list[str]) -> None:
    net = Twice()
    taps = StudentTaps(net, [*others, "conv@3"])
    net(images())
    with pytest.raises(KDHooksError, match=r"student tap 'conv@3' must name a call .*ran 2 times"):
        taps.take()


def test_a_second_forward_before_take_is_refused() -> None:
    net = InPlace()
    taps = StudentTaps(net, ["block"])
    net(images())
    with pytest.raises(KDHooksError, match="ran again in training before kd computed the terms"):
        net(images())
    out = net(images())  # the error has discarded the first forward
    assert taps.take()["block"] is out


def test_a_paused_or_discarded_forward_records_nothing() -> None:
    net = InPlace()
    taps = StudentTaps(net, ["block"])
    out = net(images())
    taps.paused = True
    net(images())
    taps.paused = False
    assert taps.take()["block"] is out
    net(images())
    taps.discard()
    net(images())


def test_removed_hooks_record_nothing() -> None:
    net = InPlace()
    taps = StudentTaps(net, ["block"])
    taps.remove()
    net(images())
    assert taps.images is None
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
    assert not net.block._forward_hooks


def test_a_copy_of_the_model_records_nothing_and_the_original_still_does() -> None:
    net = TinyFaceNet()
    taps = StudentTaps(net, ["layer2"])
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        copied.train()(torch.rand(2, 3, 32, 32))
        assert taps.images is None
        assert not taps.fired
        for hook in copied._forward_pre_hooks.values():
            assert getattr(hook, "__self__").images is None  # noqa: B009
    net(torch.rand(2, 3, 32, 32))
    assert taps.take()["layer2"].shape == (2, 8, 8, 8)


def test_a_deepcopy_between_forward_and_take_works() -> None:
    net = TinyFaceNet()
    taps = StudentTaps(net, ["layer2"])
    out = net(torch.rand(2, 3, 32, 32))
    copy.deepcopy(net)
    assert taps.take()["layer2"].shape[0] == len(out)


def test_finds_through_wrappers_in_any_nesting() -> None:
    net = TinyFaceNet()
    expected = net.get_submodule("layer3.0")
    inner = nn.Sequential()
    inner.add_module("module", compiled(net))
    assert find(inner, "layer3.0", "student") is expected
    assert find(inner, "module._orig_mod.layer3.0", "student") is expected
    assert unwrap(nn.DataParallel(compiled(net))) is net


def test_an_unknown_path_names_the_near_miss_and_the_children() -> None:
    with pytest.raises(
        KDHooksError,
        match=r"student has no submodule 'layer9'; did you mean .*'layer[1-4]'.* its children are: "
        r"layer1, layer2, layer3, layer4, fc, features",
    ):
        find(TinyFaceNet(), "layer9", "student")


def test_teacher_side_taps_record_without_grad() -> None:
    net = TinyFaceNet()
    taps = Taps(net, ["layer1"], "teacher")
    taps.open()
    with torch.no_grad():
        net(torch.rand(2, 3, 32, 32))
    taps.close()
    assert taps.take()["layer1"].shape == (2, 4, 16, 16)


def test_evaluating_restores_the_mode_of_every_submodule() -> None:
    net = TinyFaceNet().train()
    net.layer2.eval()
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    assert net.training
    assert not net.layer2.training


# --- inputs --------------------------------------------------------------------------------------


def test_the_input_of_a_module_is_tapped() -> None:
    net = InPlace()
    taps = StudentTaps(net, ["conv", "bn:in", "block:in"])
    net(images())
    taken = taps.take()
    assert taken["bn:in"] is taken["conv"]
    assert taken["block:in"].requires_grad
    assert (taken["block:in"] >= 0).all(), "after the ReLU"
    taps.remove()
    assert not net.bn._forward_pre_hooks


def test_the_input_of_a_call_is_named_in_either_order() -> None:
    net = Twice()
    taps = StudentTaps(net, ["conv@1", "conv:in@2", "conv@2:in"])
    for _ in range(2):
        net(images())
        taken = taps.take()
        assert taken["conv:in@2"] is taken["conv@2:in"] is taken["conv@1"]


class Several(nn.Module):
    """Takes two tensors, or a tuple of them, and an argument by keyword."""

    def forward(
        self, x: Tensor | tuple[Tensor, ...], other: Tensor | None = None, *, third: object = None
    ) -> Tensor:
        first = x if isinstance(x, Tensor) else x[0]
        return first if other is None else first + other


class Caller(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.inner, self.way = nn.Conv2d(3, 4, 1), Several(), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.way == "alone":
            return self.inner(x, None)  # type: ignore[no-any-return]
        if self.way == "keyword":
            return self.inner(x, third=x + 2)  # type: ignore[no-any-return]
        if self.way == "tuple":
            return self.inner((x, x + 1, x + 2))  # type: ignore[no-any-return]
        return self.inner(x, x + 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "path", "added"),
    [
        ("alone", "inner:in", 0),
        ("alone", "inner:in[0]", 0),
        ("two", "inner:in[1]", 1),
        ("two", "inner[-1]:in@1", 1),
        ("tuple", "inner:in[-1]", 2),
        ("keyword", "inner:in[1]", 2),
    ],
)
def test_one_of_several_inputs_is_named_by_its_index(way: str, path: str, added: int) -> None:
    net = Caller(way)
    taps = StudentTaps(net, ["conv", path])
    net(images())
    taken = taps.take()
    assert torch.equal(taken[path], taken["conv"] + added)


@pytest.mark.parametrize(
    ("way", "path", "match"),
    [
        ("two", "inner:in", r"'inner:in' must get a tensor; found tuple of 2; name a submodule tha"
         r"t gets one tensor, or one of these: inner:in\[-1\] is the last"),
        ("two", "inner:in[2]", r"'inner:in\[2\]' must name one of several inputs; found tuple of"),
        ("alone", "conv:in[0]", r"'conv:in\[0\]' must name one of several inputs; found Tensor; "
         r"leave out '\[0\]'"),
        ("alone", "inner:in[1]", r"'inner:in\[1\]' must get a tensor; found tuple of 2"),
    ],
)  # fmt: skip
def test_an_input_that_is_no_tensor_is_refused(way: str, path: str, match: str) -> None:
    net = Caller(way)
    StudentTaps(net, [path])
    with pytest.raises(KDHooksError, match=match):
        net(images())


def test_an_input_without_a_gradient_is_refused() -> None:
    net = InPlace()
    taps = StudentTaps(net, ["conv:in"])
    net(images())
    with pytest.raises(KDHooksError, match="student tap 'conv:in' carries no gradient"):
        taps.take()


def test_an_input_that_its_module_overwrites_is_refused() -> None:
    net = InPlace()
    taps = StudentTaps(net, ["relu:in"])
    net(images())
    with pytest.raises(KDHooksError, match="student tap 'relu:in' was overwritten in place"):
        taps.take()


def test_the_input_of_a_module_that_runs_twice_needs_the_number_of_the_call() -> None:
    net = Twice()
    StudentTaps(net, ["conv:in"])
    with pytest.raises(KDHooksError, match=r"'conv:in' ran twice in one forward; .*'conv:in@1' or"):
        net(images())


def test_the_networks_own_input_cannot_be_tapped() -> None:
    with pytest.raises(
        KDHooksError, match="tap ':in' must name a submodule in front of ':in', sin"
    ):
        StudentTaps(InPlace(), [":in"])


@_dynamo_reads_grad
def test_inputs_are_tapped_in_a_compiled_model() -> None:
    net = InPlace()
    fast = compiled(net)
    taps = StudentTaps(unwrap(fast), ["conv", "bn:in"])
    fast(images())
    taken = taps.take()
    torch.testing.assert_close(taken["bn:in"], taken["conv"])


def test_recomputation_in_backward_records_no_input() -> None:
    net = InPlace(reentrant=False)
    taps = StudentTaps(net, ["block.1:in"])
    out = net(images())
    (out.sum() + taps.take()["block.1:in"].sum()).backward()
    with pytest.raises(KDHooksError, match="recorded nothing"):
        taps.take()


@pytest.mark.parametrize("path", ["conv@1@2", "conv:in:in", "conv[0][1]"])
def test_a_repeated_suffix_is_refused(path: str) -> None:
    with pytest.raises(KDHooksError, match="student has no submodule 'conv"):
        find(Twice(), path, "student")
