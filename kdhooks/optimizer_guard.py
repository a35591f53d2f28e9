"""Checks of the student's optimizer steps, in any training loop."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet, finalize, ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kdhooks.copies import NotCopied
from kdhooks.errors import KDHooksError, listed
from kdhooks.student_taps import StudentTaps

_QUEUED = "_static_graph_delay_allreduce_enqueued"
"""Whether a static-graph DistributedDataParallel has queued its first averaging."""


class OptimizerGuard(NotCopied):
    """Checks each step of the optimizers that train the student.

    A step is refused if the terms of the student's last forward were not computed. Two more rules
    are checked once, before an optimizer's second step: the losses' parameters must be in an
    optimizer, and a backward pass must have reached every term. By then, a loop that steps several
    optimizers in turn has stepped each of them. An optimizer without any of the student's own
    parameters, as with FSDP, is not checked.
    """

    def __init__(
        self, student: nn.Module, distiller: nn.Module, taps: StudentTaps, head: Tensor | None
    ) -> None:
        """head: the student's classifier rows, if a term also trains them."""
        self.noting = True  # until a backward pass has reached every term
        self.host_advice = ""  # added to errors about terms that are not trained
        self.more: Callable[[], None] | None = None  # one more rule, checked once
        self._computed = False  # whether kd has ever computed the terms
        self._student, self._distiller, self._taps = ref(student), ref(distiller), ref(taps)
        self._head = head
        self._reached: dict[str, bool] = {}  # terms, and whether each got a gradient
        self._stepped: WeakSet[Optimizer] = WeakSet()
        self._judged: WeakSet[Optimizer] = WeakSet()
        self._handle = register_optimizer_step_pre_hook(self._before_step)
        finalize(distiller, self._handle.remove)  # if nobody calls `remove`

    def note(self, terms: Mapping[str, Tensor]) -> None:
        """Note the weighted terms of a step, before the backward pass."""
        self._computed = True
        for name, term in terms.items():
            self._reached.setdefault(name, False)
            term.register_hook(partial(self._reach, name))

    def _reach(self, name: str, gradient: Tensor) -> None:
        self._reached[name] = True
        self.noting = not all(self._reached.values())

    @contextmanager
    def measuring(self) -> Iterator[list[nn.Parameter]]:
        """Give the student's trained parameters; backward passes in this block train nothing."""
        student = self._student()
        reached, noting = dict(self._reached), self.noting
        # Checkpointed blocks run again in each backward pass, and change BatchNorm's statistics.
        buffers = [] if student is None else [(b, b.clone()) for b in student.buffers()]
        try:
            with _unqueued(self._taps()):
                yield (
                    [] if student is None else [p for p in student.parameters() if p.requires_grad]
                )
        finally:
            self._reached, self.noting = reached, noting
            for buffer, before in buffers:
                buffer.data.copy_(before)  # `data`: autograd must not see a change in place

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        taps, student = self._taps(), self._student()
        if taps is None or student is None or taps.paused:
            return
        if optimizer in self._judged and not taps.waiting:
            return
        first = not self._stepped
        again = optimizer in self._stepped
        self._stepped.add(optimizer)
        if _ids(optimizer).isdisjoint(map(id, student.parameters())):
            return
        if taps.waiting:
            taps.discard()
            raise KDHooksError(
                "the student ran in training, and its optimizer steps before kd computed the terms "
                "of that forward; call kd(images, labels) after each forward and train the sum of "
                "its terms, or do both inside `with kd.paused():`" + self.host_advice
            )
        if first:
            _check_static_graph(taps)
        if again:
            self._judged.add(optimizer)
            self._judge()

    def _judge(self) -> None:
        if not self._computed:
            raise KDHooksError(
                "the student's optimizer stepped, and kd has computed no term; run the student by "
                "calling it in training mode with gradients (student(images), not "
                "student.forward(images)), create the Distiller before the first call of a "
                "compiled student, and call kd(images, labels) after each forward; steps without "
                "terms "
                "belong inside `with kd.paused():`" + self.host_advice
            )
        if dropped := [name for name, reached in self._reached.items() if not reached]:
            raise KDHooksError(
                f"the student's optimizer stepped without {listed(dropped)}: no backward pass "
                "reached these terms; add every term that kd returns to the loss that is trained "
                "(a schedule as its weight can start a term later), or leave out its method"
                + self.host_advice
            )
        if left := self._in_no_optimizer():
            raise KDHooksError(
                f"these parameters of the losses are in no optimizer: {listed(left)}; add "
                "kd.parameter_groups(weight_decay), or the parameters of the model that holds kd, "
                "to the student's optimizer; a parameter that should stay as it is needs "
                "requires_grad_(False)"
            )
        if self.more is not None:
            self.more()

    def _in_no_optimizer(self) -> list[str]:
        distiller = self._distiller()
        named = {} if distiller is None else dict(distiller.named_parameters())
        if isinstance(self._head, nn.Parameter):
            named["the student's classifier (head)"] = self._head
        wanted = {name: p for name, p in named.items() if p.requires_grad}

        def without(optimizers: Iterable[Optimizer]) -> list[str]:
            known = set[int]().union(*map(_ids, optimizers))
            return [name for name, parameter in wanted.items() if id(parameter) not in known]

        # Optimizers that have not stepped yet are found by a search, which takes longer.
        if not without(self._stepped):
            return []
        return without(o for o in gc.get_objects() if issubclass(type(o), Optimizer))

    def remove(self) -> None:
        self._handle.remove()


def _ids(optimizer: Optimizer) -> set[int]:
    """Return the ids of the optimizer's parameters."""
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    return {id(parameter) for group in groups for parameter in group["params"]}


@contextmanager
def _unqueued(taps: StudentTaps | None) -> Iterator[None]:
    """Keep a static-graph DDP from averaging its gradients in the first backward pass so far."""
    wrapper = None if taps is None or taps.wrapper is None else taps.wrapper()
    queued = getattr(wrapper, _QUEUED, None)
    if queued is None:
        yield
        return
    setattr(wrapper, _QUEUED, True)
    try:
        yield
    finally:
        setattr(wrapper, _QUEUED, queued)


def _check_static_graph(taps: StudentTaps) -> None:
    """Refuse a static-graph DDP without a backward through its output: it averages nothing."""
    wrapper = None if taps.wrapper is None else taps.wrapper()
    if wrapper is None or not wrapper.static_graph:
        return
    if not getattr(wrapper, _QUEUED, True):
        raise KDHooksError(
            "DistributedDataParallel(static_graph=True) averaged no gradient of the student, since "
            "the loss does not depend on its output; train the terms together with a loss of that "
            "output, or leave out static_graph"
        )
