"""arcface_torch's teachers are read from checkpoints of any structure, and built by other code."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdhooks.recipe import Recipe, build_teacher
from kdhooks_integrations.arcface_torch.commands.networks import enter_trainer
from kdhooks_integrations.arcface_torch.networks import embedding_width, teacher_factories
from tests.trainer_folder import WIDTH, imports_undone, settled, write_trainer


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    write_trainer(tmp_path)
    with imports_undone():
        enter_trainer(str(tmp_path))
        yield tmp_path


def loaded(folder: Path, content: Any, network: str = "tiny") -> dict[str, Tensor]:
    torch.save(content, folder / "model.pt")
    spec = {"network": network, "checkpoint": folder / "model.pt"}
    recipe = Recipe.read({"teacher": spec, "methods": ["fcd"]})
    module = build_teacher(recipe, teacher_factories(None, recipe)).module
    assert module is not None
    return module.state_dict()


@pytest.mark.parametrize("network", ["tiny", "backbones:teacher"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.model."])
def test_a_head_beside_the_backbone_does_not_determine_the_width(
    prefix: str, network: str, folder: Path
) -> None:
    state = settled().state_dict()
    content = {f"{prefix}{key}": value for key, value in state.items()}
    if prefix:
        content |= {"head.weight": torch.ones(99, WIDTH), "head.bias": torch.ones(99)}
    found = loaded(folder, {"epoch": 3, "whatever": {"net": content}}, network)
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_the_width_is_that_of_the_last_features() -> None:
    assert embedding_width({"features.bias": torch.ones(8), "z.bias": torch.ones(9)}) == 8
    assert embedding_width({"5.bias": torch.ones(7), "5.weight": torch.ones(7, 7)}) == 7
    assert embedding_width({}) is None
