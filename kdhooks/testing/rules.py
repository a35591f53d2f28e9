"""The rules for a loss, which `kdhooks.testing.check_method` checks for each loss of a method."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kdhooks.declarations import ParameterTap
from kdhooks.errors import KDHooksError
from kdhooks.testing.loss_calls import Arguments, Case, call, differentiate, mapped, tensors

_PARTS = (
    "student's tensors",
    "teacher's tensors",
    "labels",
    "teacher's classifier rows",
    "student's classifier rows",
)
_STEPS = 6  # before a checkpoint, and after it; some state has an effect only after several calls
_CLOSE = 1e-5  # relative difference of values; float32 alone causes less than 1e-6
_CLOSE_GRADIENTS = 1e-4  # of gradients; float32 alone causes 2e-6, bfloat16 more than 1e-3
_GROWTH = 1.25  # limit for the gradient's growth if the batch is repeated; a mean 1, a sum 2
_HALF = frozenset({torch.bfloat16, torch.float16})


def check_loss(case: Case) -> None:
    """Raise AssertionError with the first rule that the loss breaks, if any."""
    rules: list[Callable[[Case], None]]
    rules = [_contract, _inputs_unchanged, _repeatable, _gradients, _precision, _resume]
    if not isinstance(case.tap, ParameterTap):
        rules += [_order, _batch_size, _one_sample]
        rules += [_labels_left_out, _unknown_classes, _equal_sides]
    for rule in rules:
        rule(case)


def _contract(case: Case) -> None:
    """Check the first docstring line of the loss's forward, which states its arguments."""
    expected = case.tap.contract
    found = (case.tap.loss.forward.__doc__ or "").strip().split("\n")[0]
    case.require(found == expected, f"documents its forward as {expected!r}; found {found!r}")
    value = case.value(case.arguments)
    case.require(value.ndim == 0 and _finite([value]), "returns a finite scalar")


def _inputs_unchanged(case: Case) -> None:
    _require_unchanged(case, case.arguments)


def _require_unchanged(case: Case, arguments: Arguments) -> None:
    """Compare values, since a change through `.data` does not raise the version counter."""
    given = mapped(arguments, torch.clone)
    case.loss()(*given)
    for part, after, before in zip(_PARTS, given, arguments, strict=False):
        now, then = list(tensors([after])), list(tensors([before]))
        same = len(now) == len(then) and all(map(torch.equal, now, then))
        case.require(same, f"leaves the {part} unchanged")


def _repeatable(case: Case) -> None:
    values = []
    for seed in (17, 18):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            values.append(case.value(case.arguments))
            drawn = not torch.equal(before, torch.get_rng_state())
        case.require(not drawn, "draws nothing from torch's global generator in a step")
    case.require(torch.equal(*values), "returns the same value for the same call")


def _gradients(case: Case) -> None:
    """Check that gradients reach the student and the loss's own parameters, but not the teacher."""
    loss = case.loss()
    sides = mapped(case.arguments[:2], lambda x: x.clone().requires_grad_())
    call(loss, (*sides, *case.arguments[2:])).backward()
    for tensor in tensors(sides[:1]):
        reached = tensor.grad is not None and _finite([tensor.grad])
        case.require(reached, "gives every tapped tensor of the student a finite gradient")
    for name, parameter in loss.named_parameters():
        case.require(parameter.grad is not None, f"trains its own parameter {name}")
    if not case.adapted:
        leaks = [x for x in tensors(sides[1:]) if x.grad is not None]
        case.require(not leaks, "gives the teacher no gradient")
    _, warm = differentiate(case.warmed_loss(_STEPS), case.arguments)
    trained = all(gradient.any() for gradient in warm)
    case.require(trained, "gives every tapped tensor of the student a gradient other than zero")


def _precision(case: Case) -> None:
    with _HalfPrecision() as half:
        value, gradients = differentiate(case.loss(), case.arguments)
    case.require(not half.found, f"computes in float32 or better; found {half.found}")
    double = mapped(case.arguments, lambda x: x.double() if x.is_floating_point() else x)
    exact, exact_gradients = differentiate(case.loss().double(), double)
    _require_close(case, value, exact, "agrees in float32 and float64")
    for found, expected in zip(gradients, exact_gradients, strict=True):
        gap, size = float((found.double() - expected).norm()), float(expected.norm())
        same = gap <= _CLOSE_GRADIENTS * size + 1e-7
        case.require(same, f"has the same gradient in float32 and float64; they differ by {gap}")
    rounded = mapped(case.arguments, lambda x: x.bfloat16().float() if x.is_floating_point() else x)
    finite = _finite([case.value(rounded)])
    case.require(finite, "stays finite on inputs that were rounded to bfloat16")


def _resume(case: Case) -> None:
    """Check that the state dict holds everything that a loss keeps from its past steps."""
    straight, resumed = case.warmed_loss(_STEPS), case.again()
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for step in range(_STEPS, 2 * _STEPS):
        arguments = case.at(step)
        same = torch.equal(call(straight, arguments), call(resumed, arguments))
        case.require(same, "resumes exactly from its state dict")
    graphs = [name for name, buffer in straight.named_buffers() if buffer.requires_grad]
    case.require(not graphs, f"keeps no graph in its buffers; found {graphs}")


def _order(case: Case) -> None:
    flipped = case.with_batch(lambda x: x.flip(0))
    _require_close(case, case.value(flipped), case.value(case.arguments), "ignores batch order")


def _batch_size(case: Case) -> None:
    """Compare gradients, since a value may be near 0, or grow by a constant."""
    repeated = case.with_batch(lambda x: torch.cat([x, x]))
    once, twice = (
        sum(float(gradient.abs().sum()) for gradient in gradients)
        for _, gradients in (
            differentiate(case.warmed_loss(_STEPS), arguments)
            for arguments in (case.arguments, repeated)
        )
    )
    case.require(
        twice < _GROWTH * once,
        "takes the mean over the batch and not the sum; found a gradient that is "
        f"{twice / once:.2f} times as large if the batch is repeated",
    )


def _one_sample(case: Case) -> None:
    """Check a batch of one sample, as the last batch of an epoch may be.

    A loss that cannot compute it, as one with a batch norm, may refuse it by a KDHooksError.
    """
    loss = case.warmed_loss(_STEPS)
    try:
        value, gradients = differentiate(loss, case.with_batch(lambda x: x[:1]))
    except KDHooksError:
        return
    except Exception as error:
        rule = f"{case.tap.name}: a method accepts a batch of one sample, or raises KDHooksError"
        raise AssertionError(f"{rule}; found {error!r}") from error
    case.require(_finite([value, *gradients]), "stays finite on a batch of one sample")


def _labels_left_out(case: Case) -> None:
    """Check that a tap with needs_labels=False has the same loss without labels."""
    if case.tap.needs_labels:
        return
    student, teacher, _, *rest = case.arguments
    try:
        value = case.value((student, teacher, None, *rest))
    except Exception as error:
        rule = f"{case.tap.name}: a method that declares needs_labels=False accepts labels of None"
        raise AssertionError(f"{rule}; found {error!r}") from error
    same = torch.equal(value, case.value(case.arguments))
    case.require(same, "ignores the labels if it declares needs_labels=False")


def _unknown_classes(case: Case) -> None:
    """Check labels of -1, which mark samples without a class."""
    labels = case.arguments[2]
    some = case.with_labels(_every_third(labels, -1))
    for arguments in (some, case.with_labels(torch.full_like(labels, -1))):
        try:
            value, gradients = differentiate(case.loss(), arguments)
        except Exception as error:
            rule = f"{case.tap.name}: a method accepts a label of -1, a sample without a class"
            raise AssertionError(f"{rule}; found {error!r}") from error
        finite = _finite([value, *gradients])
        case.require(finite, "stays finite on a label of -1, a sample without a class")
        _require_unchanged(case, arguments)
    _require_no_class(case, case.value(some))


def _require_no_class(case: Case, unknown: Tensor) -> None:
    """Check that -1 is not used as an index, which would read the last class without an error.

    Clamped to 0, it would read the first class.
    """
    labels = case.arguments[2]
    classes = int(labels.min()), int(labels.max())
    first, last = (case.value(case.with_labels(_every_third(labels, c))) for c in classes)
    for label, value in zip(classes, (first, last), strict=True):
        mistaken = torch.equal(unknown, value) and not torch.equal(first, last)
        case.require(not mistaken, f"counts a label of -1 as no class, not as class {label}")


def _equal_sides(case: Case) -> None:
    """Check a student that equals the teacher, for which roots and angles may have no gradient.

    Both sides must have the same shapes.
    """
    student, teacher, *rest = case.arguments
    ours, theirs = ([x.shape for x in tensors([side])] for side in (student, teacher))
    if ours != theirs:
        return
    value, gradients = differentiate(case.loss(), (student, student, *rest))
    finite = _finite([value, *gradients])
    case.require(finite, "has a finite value and gradient if the student equals the teacher")


# --- helpers ---------------------------------------------------------------------------------


class _HalfPrecision(TorchFunctionMode):
    """Collects the half-precision dtypes of the tensors that are created inside it.

    A comparison of values does not find them: a loss that casts its inputs to half precision makes
    the same error with float32 and float64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        created = result if isinstance(result, tuple | list) else [result]
        self.found |= _HALF & {x.dtype for x in created if isinstance(x, Tensor)}
        return result


def _every_third(labels: Tensor, label: int) -> Tensor:
    """(b) -> (b): every third label is replaced."""
    changed = labels.clone()
    changed[::3] = label
    return changed


def _finite(found: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in found)


def _require_close(case: Case, found: Tensor, expected: Tensor, rule: str) -> None:
    x, y = found.item(), expected.item()
    close = math.isclose(x, y, rel_tol=_CLOSE, abs_tol=1e-6)
    case.require(close, f"{rule}; found {x} and {y}")
