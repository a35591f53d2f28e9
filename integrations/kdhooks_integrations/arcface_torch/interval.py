"""Averages the terms between two lines of the log; sums stay on the device until then."""

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class ScalarWriter(Protocol):
    """The part of TensorBoard's SummaryWriter that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


class Interval:
    """Sums of named scalars; the host waits for the device only when means are requested."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()  # sums over all earlier intervals
        self._seen: Counter[str] = Counter()

    def add(self, metrics: Mapping[str, Tensor], terms: Mapping[str, Tensor]) -> None:
        """Add the values of one step.

        metrics: the terms before they are multiplied by their weights, and diagnostics.
        terms: the terms times their weights.
        """
        weighted = {f"{name}/weighted": term.detach() for name, term in terms.items()}
        for name, value in {**metrics, **weighted}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] += 1

    def means(self) -> dict[str, float]:
        """Return the means since the last call."""
        sums, counts = self._sums, self._counts
        self._sums, self._counts = {}, Counter()
        if not sums:
            return {}
        values = torch.stack([value.float() for value in sums.values()]).tolist()
        found = dict(zip(sums, values, strict=True))
        self._totals.update(found)
        self._seen.update(counts)
        return {name: value / counts[name] for name, value in found.items()}

    def overall(self) -> dict[str, float]:
        """Return the means since the start of the run."""
        self.means()
        return {name: total / self._seen[name] for name, total in self._totals.items()}
