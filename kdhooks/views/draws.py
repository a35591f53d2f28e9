"""Random numbers that depend only on a seed, a step and a sample's position."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from kdhooks.errors import KDHooksError

_MOST = 2**16  # the most numbers for one sample
_GAMMA, _FIRST, _SECOND = (  # constants of the generator SplitMix64, as signed 64-bit integers
    number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch.

    They are computed from a counter, on the device, so there is no state to save. A sample's
    numbers depend neither on the other samples nor on the number of ranks.
    """

    seed: int
    step: int  # of the optimizer
    first: int  # the position of the first sample in the step's batch of all ranks
    count: int  # samples
    device: torch.device

    def uniform(self, numbers: int) -> Tensor:
        """(b numbers) float32 in [0, 1), the same in each call."""
        if not 1 <= numbers <= _MOST:
            raise KDHooksError(
                f"uniform must be asked for 1 to {_MOST} numbers for each sample; found {numbers}"
            )
        ours = torch.arange(self.first, self.first + self.count, device=self.device)
        place = ours[:, None] * _MOST + torch.arange(1, numbers + 1, device=self.device)
        bits = place * _GAMMA + self._key(self.seed, self.step)
        bits = (bits ^ _shifted(bits, 30)) * _FIRST
        bits = (bits ^ _shifted(bits, 27)) * _SECOND
        bits = bits ^ _shifted(bits, 31)
        return _shifted(bits, 40).float() * 2.0**-24  # as many bits as float32 has

    def generator_seed(self) -> int:
        """Return a seed for torch's generators, which differs between ranks."""
        return self._key(self.seed, self.step, self.first) & (2**63 - 1)

    @staticmethod
    def _key(*numbers: int) -> int:
        digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift to the right and fill with zeros, as for unsigned integers."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
