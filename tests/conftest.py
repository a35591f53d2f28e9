"""What tests of several files need."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def safe_globals() -> Iterator[None]:
    """What a test allows to be read from checkpoints is forbidden again."""
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)
