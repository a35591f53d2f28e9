"""Checks whether each step's numbers were finite, without waiting for the device."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdhooks.classes.ranks import world
from kdhooks.errors import KDHooksError
from kdhooks.later import Sent

log = logging.getLogger("kdhooks")


class Question(NamedTuple):
    """Numbers of one step that must be finite, still on the device."""

    numbers: tuple[Tensor, ...]  # each (n)
    fault: Callable[[Sequence[bool]], str]  # the message, from whether each number is finite
    fatal: bool = False  # whether "skip" must raise an error too


def of_terms(values: Mapping[str, Tensor]) -> Question:
    """Ask whether each term () is finite."""

    def fault(finite: Sequence[bool]) -> str:
        bad = [name for name, fine in zip(values, finite, strict=True) if not fine]
        return f"{', '.join(bad)} not finite"

    return Question(tuple([value.detach().reshape(1) for value in values.values()]), fault)


def of_embedding(embedding: Tensor, labels: Tensor | None) -> Question:
    """Ask whether the teacher's embedding (b e) is finite, by the sum of each sample."""
    return Question((embedding.sum(dim=1),), partial(_lost_samples, labels))


def _lost_samples(labels: Tensor | None, finite: Sequence[bool]) -> str:
    kind = "positions in the batch" if labels is None else "labels"
    names = range(len(finite)) if labels is None else labels.cpu().tolist()
    lost = [name for name, fine in zip(names, finite, strict=True) if not fine]
    return (
        f"the teacher's embedding not finite for {len(lost)} of {len(finite)} samples "
        f"({kind} {lost[:8]})"
    )


def refuse(wrong: Tensor, words: Callable[[], str]) -> Question | None:
    """Raise an error if `wrong` () is true on the CPU; ask about it later on another device."""
    if wrong.device.type != "cpu":
        number = torch.where(wrong, torch.nan, 0.0).reshape(1)
        return Question((number,), lambda finite: words(), fatal=True)
    if wrong:
        raise KDHooksError(words())
    return None


class Finite:
    """Collects the questions of each step, and reads their answer in the next step.

    With "skip", the host waits for the answer in the same step, since that step continues without
    its terms, on all ranks, if a number is not finite.
    """

    def __init__(self, nonfinite: Literal["raise", "skip"]) -> None:
        self.skips = nonfinite == "skip"
        self.skipped = 0  # number of steps that continued without their terms
        self._last: _Answer | None = None

    def usable(self, step: int, tapped: Iterable[Tensor], questions: Sequence[Question]) -> bool:
        """With "skip", return whether the losses may see these tensors.

        A memory bank of past embeddings would keep a number that is not finite.
        """
        answer = _Answer(step, questions)
        # A number times 0 is 0 if it is finite, and nan otherwise.
        zeros = [(tensor.detach() * 0).sum() for tensor in (*tapped, *answer.pieces)]
        return self._all_ranks(torch.stack(zeros).sum() == 0, answer)

    def note(self, step: int, questions: Sequence[Question]) -> bool:
        """Ask about a computed step. Return False if it must continue without its terms."""
        answer = _Answer(step, questions)
        if self.skips:
            return self._all_ranks(torch.isfinite(answer.numbers).all(), answer)
        known = not answer.numbers.is_cuda and not answer.get()
        self._last = None if known else answer.sent()
        return True

    def check(self) -> None:
        """Raise an error if a number of the last step was not finite."""
        if self._last is None:
            return
        if fault := self._last.get():  # kept, so that a later save raises too
            raise KDHooksError(
                f"{fault}; lower the weight or the learning rate, or look at these samples; "
                "nonfinite = 'skip' continues without the terms of such a step"
            )
        self._last = None

    def _all_ranks(self, fine: Tensor, answer: "_Answer") -> bool:
        if world() is not None:
            fine = fine.float()
            dist.all_reduce(fine, dist.ReduceOp.MIN)
        if fine:
            return True
        self.skipped += 1
        found = answer.get() or f"step {answer.step}: a tap, or another rank, is not finite"
        log.warning("%s; the step continues without its terms", found)
        return False


class _Answer:
    """A `Later` of one step: its result is an error message, or "" if all numbers are finite."""

    def __init__(self, step: int, questions: Sequence[Question]) -> None:
        self.step = step
        self._questions = questions
        self.pieces = [piece for question in questions for piece in question.numbers]
        # One tensor needs no concatenation, and torch cannot concatenate an empty list.
        pieces = self.pieces or [torch.zeros(0)]
        self.numbers = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        self._sent: Sent | None = None

    def sent(self) -> "_Answer":
        """Start copying the numbers to the host."""
        self._sent = Sent(self.numbers)
        return self

    def get(self) -> str:
        """Wait for the fault and return it; raise KDHooksError if it is fatal."""
        numbers = self.numbers.cpu() if self._sent is None else self._sent.get()
        finite = list(map(math.isfinite, numbers.tolist()))
        if all(finite):
            return ""
        faults: list[str] = []
        for question in self._questions:
            count = sum(len(piece) for piece in question.numbers)
            answers, finite = finite[:count], finite[count:]
            if not all(answers):
                fault = question.fault(answers)
                if question.fatal:
                    raise KDHooksError(f"step {self.step}: {fault}")
                faults.append(fault)
        return f"step {self.step}: {' and '.join(faults)}"
