"""Fixtures shared by several test files."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib import import_module

import pytest
import torch

from tests.arcface_runs import described, trained
from tests.second_device import CUDA, FAR, in_a_process
from tests.standin import Trainer


def pytest_configure(config: pytest.Config) -> None:
    """Import yapf, as MMEngine does, before the processes of the tests start.

    The first import writes a file, and fails if another process has written half of that file.
    """
    if not hasattr(config, "workerinput"):
        with suppress(ImportError):
            import_module("yapf")


@pytest.fixture(autouse=True)
def algorithms() -> Iterator[None]:
    """Reset deterministic algorithms after each test, so that no test affects another."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def safe_globals() -> Iterator[None]:
    """Restore the list of classes that may be read from checkpoints."""
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """A stand-in for arcface_torch's trainer on one rank; it does not repeat equal runs."""
    trainer = Trainer(1, tmp_path_factory.mktemp("one"))
    yield trainer
    trainer.close()


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """The same trainer on two ranks."""
    trainer = Trainer(2, tmp_path_factory.mktemp("two"))
    yield trainer
    trainer.close()


@pytest.fixture(scope="session")
def teacher(one: Trainer) -> dict[str, str]:
    """The teacher table of a recipe, for a network that the trainer has trained."""
    return described(trained(one))


@pytest.fixture(scope="session")
def wide(one: Trainer) -> dict[str, str]:
    """A teacher with another network and another embedding width."""
    return described(trained(one, network="wide", embedding_size=24), "wide")


@pytest.fixture(scope="module", params=[FAR, CUDA])
def place(request: pytest.FixtureRequest) -> str:
    """The device that is compared with the CPU."""
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def process(place: str) -> Iterator[ProcessPoolExecutor]:
    """A process that can use this device, shared by the tests of one file."""
    with in_a_process(place) as pool:
        yield pool
