"""The views' random numbers are those of SplitMix64 by position, without a state."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kdhooks import KDHooksError, StudentView, viewed
from kdhooks.views.draws import Draws


def draws(seed: int = 0, step: int = 0, first: int = 0, count: int = 8) -> Draws:
    return Draws(seed, step, first, count, torch.device("cpu"))


def splitmix(state: int) -> int:
    """Return one number of the generator, in Python integers; state: after its increment."""
    whole = 2**64 - 1
    z = state & whole
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & whole
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & whole
    return z ^ (z >> 31)


def test_draws_are_those_of_splitmix64() -> None:
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # its first number for the seed 0
    found = draws(seed=2**62, step=9, first=10**6, count=3).uniform(5)
    key = Draws._key(2**62, 9)
    expected = [
        [
            (splitmix(key + ((10**6 + row) * 2**16 + column) * 0x9E3779B97F4A7C15) >> 40) / 2**24
            for column in range(1, 6)
        ]
        for row in range(3)
    ]
    assert torch.equal(found, torch.tensor(expected))


def test_draws_are_uniform_and_independent() -> None:
    found = draws(count=4096).uniform(4).double()
    assert (found >= 0).all()
    assert (found < 1).all()
    assert_close(found.mean(0), torch.full((4,), 0.5).double(), rtol=0, atol=0.02)
    assert_close(found.var(0), torch.full((4,), 1 / 12).double(), rtol=0, atol=0.004)
    assert (torch.corrcoef(found.T) - torch.eye(4)).abs().max() < 0.06
    assert abs(float(torch.corrcoef(torch.stack([found[1:, 0], found[:-1, 0]]))[0, 1])) < 0.06


def test_a_samples_draws_depend_only_on_its_position() -> None:
    whole = draws().uniform(3)
    assert torch.equal(draws(first=4, count=4).uniform(3), whole[4:])
    assert torch.equal(draws().uniform(7)[:, :3], whole)
    for other in (draws(seed=1), draws(step=1), draws(first=8)):
        assert not torch.equal(other.uniform(3), whole)
    assert draws(first=0).generator_seed() != draws(first=8).generator_seed()


@pytest.mark.parametrize("numbers", [0, 2**16 + 1])
def test_too_many_draws_are_refused(numbers: int) -> None:
    with pytest.raises(KDHooksError, match=f"1 to 65536 numbers for each sample; found {numbers}"):
        draws().uniform(numbers)


def test_another_view_does_not_change_the_draws_of_the_first() -> None:
    images = torch.rand(64, 3, 32, 32) * 2 - 1
    grey = viewed(StudentView(grey={"p": 0.5}), images)
    both = viewed(StudentView(grey={"p": 0.5}, blur={"p": 0.5, "sigma": [2, 2]}), images)

    def is_grey(x: Tensor) -> Tensor:
        return (x[:, 0] - x[:, 1]).abs().amax((1, 2)) < 1e-6

    assert torch.equal(is_grey(grey), is_grey(both))
    assert 20 < int(is_grey(grey).sum()) < 44
    assert not torch.equal(grey, both)
