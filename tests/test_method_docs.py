"""Each method of docs/writing-a-method.md runs as printed, and the page describes every hook."""

import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdhooks import KDHooksError
from kdhooks.hookspecs import Specs
from kdhooks.testing import check_method, tiny_batch
from tests.small_distiller import distil, student

TEXT = (Path(__file__).parents[1] / "docs" / "writing-a-method.md").read_text(encoding="utf-8")
BLOCKS: dict[str, str] = dict(
    re.findall(r"^```\w+ ([\w-]+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
)
HOOKS = [name for name in vars(Specs) if not name.startswith("_")]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Run all blocks of the page in their order, as one module."""
    found: dict[str, Any] = {"__name__": "writing_a_method"}
    for name, text in BLOCKS.items():
        if name != "package":
            exec(compile(text, f"writing-a-method.md, {name}", "exec"), found)
    return found


def test_every_hook_has_its_heading_and_an_example() -> None:
    headings = re.findall(r"^### `(\w+)\(([^)]*)\)`$", TEXT, re.MULTILINE)
    expected = {
        hook: ", ".join(list(inspect.signature(getattr(Specs, hook)).parameters)[1:])
        for hook in HOOKS
    }
    assert dict(headings) == expected
    for hook in HOOKS:
        assert f"def {hook}(" in BLOCKS[hook.replace("_", "-")]


@pytest.mark.parametrize("method", ["Near", "Bounded", "NearMapped", "Channels", "OnTheirRows"])
def test_a_method_of_the_page_conforms(method: str, names: dict[str, Any]) -> None:
    check_method(names[method])


@pytest.mark.parametrize("method", ["ShortFilters", "Adapted"])
def test_methods_without_a_batch_or_with_weights_on_the_teachers_side_run(
    method: str, names: dict[str, Any]
) -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(names[method](), net=net)
    net(images)
    (term,) = kd(images, labels).values()
    term.backward()
    assert term > 0
    weight = net.get_parameter("layer1.0.weight")
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in kd.parameters())


def test_options_are_compared(names: dict[str, Any]) -> None:
    with pytest.raises(KDHooksError, match=r"low must be below `high`; found 0\.5 and 0\.25"):
        names["Bounded"](low=0.5, high=0.25)


def test_the_stages_of_the_plugin_are_tapped(names: dict[str, Any]) -> None:
    kd = distil(names["Channels"](), plugins=[names["MyNets"]()])
    assert kd.taps[0].student_paths == ("layer2", "layer4")


def test_only_the_student_sees_the_view(names: dict[str, Any]) -> None:
    net, (images, labels) = student(), tiny_batch()
    seen: list[torch.Tensor] = []
    kd = distil(names["Near"](), names["Noisy"](amount=0.2), net=net)

    def see(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen.append(arguments[0])

    net.layer1.register_forward_pre_hook(see)
    net(images)
    kd(images, labels)
    change = (seen[0] - images.clamp(-1, 1)).abs()
    assert 0 < change.max() <= 0.2 + 1e-6


def test_the_test_of_the_page_passes(names: dict[str, Any]) -> None:
    names["test_near_conforms"]()


def test_the_package_names_the_method() -> None:
    project = tomllib.loads(BLOCKS["package"])["project"]
    assert project["entry-points"]["kdhooks"] == {"near": "kdhooks_near:Near"}
