"""Rules for the steps of the student's optimizers, whatever the training loop is."""

import gc
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from weakref import WeakSet, finalize, ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kdhooks.copies import NotCopied
from kdhooks.errors import KDHooksError, listed
from kdhooks.taps import StudentTaps


class OptimizerGuard(NotCopied):
    """Looks at each step of the optimizers that train the student.

    Always: a step after a forward of the student whose terms nobody computed is refused. Before an
    optimizer's second step, once: the losses' parameters must be in an optimizer, and every term
    must have taken part in a backward pass. By then, a loop that steps several optimizers in turn
    has stepped each. An optimizer without any of the student's own parameters, as with FSDP, is not
    looked at.
    """

    def __init__(
        self, student: nn.Module, distiller: nn.Module, taps: StudentTaps, head: Tensor | None
    ) -> None:
        """head: the student's classifier rows, if a term trains them as well."""
        self.noting = True  # until a backward pass has reached every term
        self.host_advice = ""  # added to errors about terms that are not trained
        self.more: Callable[[], None] | None = None  # one more rule, looked at once
        self._computed = False  # whether kd has ever computed the terms
        self._student, self._distiller, self._taps = ref(student), ref(distiller), ref(taps)
        self._head = head
        self._reached: dict[str, bool] = {}  # terms, and whether each got a gradient
        self._stepped: WeakSet[Optimizer] = WeakSet()
        self._judged: WeakSet[Optimizer] = WeakSet()
        self._handle = register_optimizer_step_pre_hook(self._before_step)
        finalize(distiller, self._handle.remove)  # if nobody calls `remove`

    def note(self, terms: Mapping[str, Tensor]) -> None:
        """The weighted terms of a step, before they are trained."""
        self._computed = True
        for name, term in terms.items():
            self._reached.setdefault(name, False)
            term.register_hook(partial(self._reach, name))

    def _reach(self, name: str, gradient: Tensor) -> None:
        self._reached[name] = True
        self.noting = not all(self._reached.values())

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
                "student.forward(images)), make the Distiller before the first call of a compiled "
                "student, and call kd(images, labels) after each forward; steps without terms "
                "belong inside `with kd.paused():`" + self.host_advice
            )
        if dropped := [name for name, reached in self._reached.items() if not reached]:
            raise KDHooksError(
                f"the student's optimizer stepped without {listed(dropped)}: no backward pass "
                "reached these terms; add every term that kd returns to the loss that is trained "
                "(for a later start, give its weight a schedule), or leave its method out"
                + self.host_advice
            )
        if left := self._in_no_optimizer():
            raise KDHooksError(
                f"these parameters of the losses are in no optimizer: {listed(left)}; give the "
                "student's optimizer those of kd, or of the model that holds it, too, as "
                "kd.parameter_groups(weight_decay) returns them; requires_grad_(False) keeps one "
                "as it is"
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

        # An optimizer that has not stepped yet is found by a search, which takes longer.
        if not without(self._stepped):
            return []
        return without(o for o in gc.get_objects() if issubclass(type(o), Optimizer))

    def remove(self) -> None:
        self._handle.remove()


def _ids(optimizer: Optimizer) -> set[int]:
    """Of the optimizer's parameters."""
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    return {id(parameter) for group in groups for parameter in group["params"]}


def _check_static_graph(taps: StudentTaps) -> None:
    """A DDP with a static graph averages gradients only after a backward through its output."""
    wrapper = None if taps.wrapper is None else taps.wrapper()
    if wrapper is None or not wrapper.static_graph:
        return
    if not getattr(wrapper, "_static_graph_delay_allreduce_enqueued", True):
        raise KDHooksError(
            "DistributedDataParallel(static_graph=True) averaged no gradient of the student, since "
            "the loss does not depend on its output; train the terms together with a loss of that "
            "output, or leave static_graph out"
        )
