"""The terms of a run: each is the loss of one tap, times its weight in the current step."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdhooks.balance import Weighted
from kdhooks.declarations import Model, ParameterTap, Step, Tap, check_weight
from kdhooks.errors import KDHooksError
from kdhooks.names import full_name
from kdhooks.schedules import Schedule, Varying, counts_epochs, number_at


def value_of(tap: Tap, loss: nn.Module, inputs: Step) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the value () of a tap's loss, and the numbers () for the log, by name."""
    result = loss(*tap.arguments(inputs))
    value: Tensor = result[0] if isinstance(result, tuple) else result
    notes: dict[str, Tensor] = result[1] if isinstance(result, tuple) else {}
    if value.ndim or not value.requires_grad:
        raise KDHooksError(
            f"{tap.name}: a loss must be a scalar with a gradient; found shape "
            f"{tuple(value.shape)}, requires_grad {value.requires_grad}"
        )
    logged = {tap.name: value.detach()}
    for key, note in notes.items():
        # Hosts average the number for the log.
        number = note if note.is_floating_point() else note.float()
        logged[f"{tap.name}/{key}"] = number.detach()
    return value, logged


def weight_at(
    name: str, weight: Callable[[int], float], step: int, steps_per_epoch: int | None
) -> float:
    """Return the weight of a term that follows a schedule or a function."""
    found = number_at(weight, step, steps_per_epoch)
    check_weight(f"{name}, step {step}", found)
    return float(found)


def full_weight(tap: Tap, step: int) -> float:
    """Return the weight; for a schedule, its value after the warm-up, at any step."""
    if isinstance(tap.weight, Schedule):
        return tap.weight.value
    return float(tap.weight(step) if callable(tap.weight) else tap.weight)


def comparable(tap: Tap, term: Tensor, step: int) -> Weighted:
    """Return a term with its full weight, to compare its gradient."""
    return Weighted(term, full_weight(tap, step), isinstance(tap.weight, Schedule))


def zeros(taps: Sequence[Tap], features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a zero with zero gradients for each term of a step that is skipped."""
    # `tensor * 0` would be nan if the tensor is infinite.
    finite = [tensor.nan_to_num(0, 0, 0) for tensor in features.values()]
    zero = torch.stack([tensor.sum() * 0 for tensor in finite]).sum()
    return {tap.name: zero for tap in taps}


def tapped_parameters(taps: Sequence[Tap], student: Model) -> dict[str, list[nn.Parameter]]:
    """Return the student's parameters that each `ParameterTap` names, by the tap's name."""
    return {tap.name: tap.of(student) for tap in taps if isinstance(tap, ParameterTap)}


def varying_numbers(losses: nn.Module) -> list[Varying]:
    """Return the numbers inside the losses that follow a schedule or a function."""
    found = (inner for inner in losses.modules() if isinstance(inner, Varying))
    return [number for number in found if number.changes]


def named_in_epochs(taps: Sequence[Tap], losses: nn.ModuleDict) -> list[str]:
    """Return the names of the terms of which a schedule counts epochs."""
    return [
        tap.name
        for tap, loss in zip(taps, losses.values(), strict=True)
        if counts_epochs(tap.weight)
        or any(counts_epochs(number.value) for number in varying_numbers(loss))
    ]


def described(taps: Sequence[Tap]) -> list[str]:
    """Return one line for each term, the same on ranks with the same terms."""
    return [
        f"{type(tap).__name__} {tap.name} {type(tap.loss).__qualname__} "
        f"{tap.student_paths} {tap.teacher_paths} "
        f"{shown_number(tap.weight)} {_options_of(tap.loss)}"
        for tap in taps
    ]


def _options_of(loss: nn.Module) -> str:
    """List the numbers and strings that a loss and its submodules hold, as its options set them."""
    return ", ".join(
        f"{full_name(prefix, name)}={shown_number(value)}"
        for prefix, inner in loss.named_modules()
        for name, value in vars(inner).items()
        if isinstance(value, bool | int | float | str | Schedule)
        and not name.startswith("_")
        and name != "training"
    )


def shown_number(value: object) -> str:
    """Format a number or a schedule to compare ranks; a function cannot be compared."""
    function = callable(value) and not isinstance(value, Schedule)
    return "by a function" if function else str(value)
