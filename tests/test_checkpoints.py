"""Checkpoints of any structure are read into their network; those of another one are refused."""

import logging
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import KDHooksError
from kdhooks.teacher.checkpoints import load_checkpoint, load_strictly
from kdhooks.tensors_only import main as tensors_only
from kdhooks.testing import TinyFaceNet, tiny_batch
from tests.small_distiller import teacher_network

State = dict[str, Tensor]
Log = pytest.LogCaptureFixture


def state_of(prefix: str = "", seed: int | None = None) -> State:
    """Return the weights of the tiny teacher or, with a seed, those of another one."""
    state = teacher_network().state_dict()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        state = {
            key: torch.rand(value.shape, generator=generator).to(value.dtype)
            for key, value in state.items()
        }
    return {f"{prefix}{key}": value for key, value in state.items()}


def loaded(path: Path, weights: str = "") -> nn.Module:
    return load_strictly(TinyFaceNet(width=6), load_checkpoint(path), weights).eval()


def assert_is_the_teacher(module: nn.Module) -> None:
    images = tiny_batch()[0]
    assert_close(module(images), teacher_network()(images), rtol=0, atol=0)


WRAPPERS: list[Callable[[Any], object]] = [
    lambda state: state,
    lambda state: {"state_dict_backbone": state, "epoch": 1, "global_step": 7},
    lambda state: {"state_dict": state, "optimizer": {"state": {0: {"step": torch.ones(3)}}}},
    lambda state: {"model": state, "args": {"lr": 0.1}},
    lambda state: {"model_state_dict": state},
    lambda state: {"net": state, "acc": 0.9},
    lambda state: {"some_wrapper_of_ours": {"inside": state}},
    lambda state: [1, state],
]
PREFIXES = [
    "", "module.", "_orig_mod.", "module._orig_mod.", "model.", "net.", "backbone.",
    "architecture.", "teacher.", "student.", "module.model.backbone.", "never_heard.of.",
]  # fmt: skip


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [*((wrap, "module.") for wrap in WRAPPERS), *((WRAPPERS[2], prefix) for prefix in PREFIXES)],
)
def test_weights_are_found_in_any_dictionary_and_behind_any_prefix(
    wrap: Callable[[Any], object], prefix: str, tmp_path: Path, caplog: Log
) -> None:
    state = state_of(prefix)
    state["kdhooks.distiller.losses.fcd.projector.weight"] = torch.ones(1)  # of a past student
    torch.save(wrap(state), tmp_path / "model.pt")
    with caplog.at_level(logging.INFO, "kdhooks"):
        assert_is_the_teacher(loaded(tmp_path / "model.pt"))
    assert "sha256" in caplog.text
    if prefix:
        assert f"{prefix.rstrip('.')}';" in caplog.text


def test_tensors_without_the_prefix_are_ignored(tmp_path: Path, caplog: Log) -> None:
    besides = {"n_averaged": torch.tensor(3), "head.weight": torch.ones(5, 12)}
    torch.save({**state_of("module."), **besides}, tmp_path / "averaged.pt")
    with caplog.at_level(logging.INFO, "kdhooks"):
        assert_is_the_teacher(loaded(tmp_path / "averaged.pt"))
    assert "weights taken from 'module'; 2 other tensors unused" in caplog.text


def test_a_file_without_counters_of_batches_is_read(tmp_path: Path) -> None:
    """torch before 0.4.1 wrote such files."""
    state = {k: v for k, v in state_of().items() if not k.endswith("num_batches_tracked")}
    assert len(state) < len(state_of())
    torch.save(state, tmp_path / "old.pt")
    assert_is_the_teacher(loaded(tmp_path / "old.pt"))
    scalars = {k: v[None] if v.ndim == 0 else v for k, v in state_of().items()}
    torch.save(scalars, tmp_path / "older.pt")
    assert_is_the_teacher(loaded(tmp_path / "older.pt"))


def test_counters_in_floating_point_are_read(
    tmp_path: Path,
) -> None:
    torch.save({key: value.double() for key, value in state_of().items()}, tmp_path / "mean.pt")
    assert_is_the_teacher(loaded(tmp_path / "mean.pt"))


def test_several_sets_of_weights_are_refused_and_one_can_be_named(tmp_path: Path) -> None:
    content = {"model": state_of(), "ema": {"shadow": state_of("module.", seed=1)}}
    torch.save(content, tmp_path / "both.pt")
    with pytest.raises(KDHooksError) as error:
        loaded(tmp_path / "both.pt")
    assert "that fit the network, at 'model', 'ema.shadow.module'; specify" in str(error.value)
    assert "weights = 'model'" in str(error.value)
    assert_is_the_teacher(loaded(tmp_path / "both.pt", "model"))
    other = loaded(tmp_path / "both.pt", "ema").state_dict()["fc.weight"]
    assert torch.equal(other, state_of(seed=1)["fc.weight"])
    with pytest.raises(KDHooksError, match="no weights at 'emma'; it has some at: 'model', 'ema"):
        loaded(tmp_path / "both.pt", "emma")


def test_two_networks_in_one_dictionary_are_refused(tmp_path: Path) -> None:
    torch.save({**state_of("teacher."), **state_of("student.", seed=1)}, tmp_path / "both.pt")
    with pytest.raises(KDHooksError, match="network, at 'teacher', 'student'; specify one"):
        loaded(tmp_path / "both.pt")
    for name in ("teacher", "teacher."):
        assert_is_the_teacher(loaded(tmp_path / "both.pt", name))


def test_the_outermost_weights_can_be_named_too(tmp_path: Path) -> None:
    torch.save({**state_of(), "ema": state_of(seed=1)}, tmp_path / "both.pt")
    with pytest.raises(KDHooksError, match=r"network, at '\.', 'ema'; specify one"):
        loaded(tmp_path / "both.pt")
    assert_is_the_teacher(loaded(tmp_path / "both.pt", "."))


def test_two_equal_sets_of_weights_are_one(tmp_path: Path) -> None:
    torch.save({"model": state_of(), "best": state_of()}, tmp_path / "both.pt")
    assert_is_the_teacher(loaded(tmp_path / "both.pt"))


def changed(**changes: Tensor | None) -> State:
    state = state_of() | {key.replace("__", "."): v for key, v in changes.items() if v is not None}
    return {k: v for k, v in state.items() if changes.get(k.replace(".", "__"), v) is not None}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (changed(fc__weight=None), r"1 are missing \(fc\.weight\)"),
        (changed(extra=torch.ones(1)), r"1 are not the network's \(extra\)"),
        (changed(fc__weight=torch.ones(3, 3)), r"1 have other shapes \(fc\.weight \(3, 3\) for"),
        (changed(fc__bias=torch.ones(12).int()), "have other dtypes.*int32 for torch.float32"),
        (changed(fc__weight=torch.ones(12, 96).to_sparse()), r"1 are sparse.*\(fc\.weight\)"),
        ({"x": torch.ones(2)}, r"none of its 1 tensors \(x, …\) is named like one of the network"),
        ({"model": changed(fc__weight=None)}, "of its weights at 'model' 1 are missing"),
    ],
)
def test_a_file_of_another_network_is_refused(content: object, found: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(KDHooksError, match=rf"m\.pt' does not fit the network.*{found}"):
        loaded(tmp_path / "m.pt")


def test_a_deeper_network_with_the_same_names_is_refused(tmp_path: Path) -> None:
    """The file has all weights of the smaller network, with the same shapes."""
    torch.save({"backbone": {**state_of(), "stage9.weight": torch.ones(1)}}, tmp_path / "m.pt")
    with pytest.raises(KDHooksError, match=r"1 are not the network's \(stage9\.weight\)"):
        loaded(tmp_path / "m.pt")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    state = {key: tensor.clone() for key, tensor in state_of().items()}
    state["fc.weight"][0, 0] = value
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(KDHooksError, match=r"m\.pt' holds weights that are not finite, in 'fc\.we"):
        loaded(tmp_path / "m.pt")


def test_a_module_may_know_its_weights_by_older_names(tmp_path: Path) -> None:
    torch.save({f"old_{key}": value for key, value in state_of().items()}, tmp_path / "m.pt")
    module = TinyFaceNet(width=6)

    def rename(module: nn.Module, state: dict[str, Any], *rest: object) -> None:
        for key in list(state):
            state[key.removeprefix("old_")] = state.pop(key)

    module.register_load_state_dict_pre_hook(rename)  # type: ignore[no-untyped-call]
    assert_is_the_teacher(load_strictly(module, load_checkpoint(tmp_path / "m.pt")).eval())


@pytest.mark.parametrize("content", [[1, 2], 3, {}, {"epoch": 1}, {"model": {}}])
def test_a_file_without_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(KDHooksError, match=r"m\.pt' holds no state dict; save model"):
        load_checkpoint(tmp_path / "m.pt")


# --- objects beside the tensors --------------------------------------------------------------


@pytest.mark.parametrize(
    ("beside", "named"),
    [(Namespace(lr=0.1), "argparse.Namespace"), (np.float64(0.9), "numpy"), (Path("x"), "Path")],
)
def test_objects_beside_the_tensors_are_refused_until_they_are_left_out(
    beside: object, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save({"model": state_of(), "args": beside, "epoch": 3}, old)
    with pytest.raises(KDHooksError) as error:
        load_checkpoint(old)
    assert named in str(error.value)
    assert "if you trust whoever made it" in str(error.value)
    assert f"python -m kdhooks.tensors_only {old} NEW.pt" in str(error.value)
    assert tensors_only([str(old), str(new)]) == 0
    assert_is_the_teacher(loaded(new))
    assert torch.load(new)["epoch"] == 3
    assert f"{new}: {len(state_of())} tensors" in capsys.readouterr().out


def test_a_whole_module_becomes_its_state_dict(tmp_path: Path) -> None:
    torch.save(teacher_network(), tmp_path / "old.pt")
    with pytest.raises(KDHooksError, match=r"holds other objects than tensors.*tensors_only"):
        load_checkpoint(tmp_path / "old.pt")
    assert tensors_only([str(tmp_path / "old.pt"), str(tmp_path / "new.pt")]) == 0
    assert_is_the_teacher(loaded(tmp_path / "new.pt"))


def test_arrays_become_tensors(tmp_path: Path) -> None:
    torch.save({key: value.numpy() for key, value in state_of().items()}, tmp_path / "old.pt")
    assert tensors_only([str(tmp_path / "old.pt"), str(tmp_path / "new.pt")]) == 0
    assert_is_the_teacher(loaded(tmp_path / "new.pt"))


def test_files_that_cannot_be_converted_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    (tmp_path / "notes.pt").write_text("notes")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "empty.pt").read_bytes()[:-9])
    for old, new, said in (
        ("absent.pt", "new.pt", "there is no file"),
        ("notes.pt", "new.pt", "notes.pt' can't be read (UnpicklingError"),
        ("cut.pt", "new.pt", "cut.pt' is cut short: its end is missing; copy or download it"),
        ("empty.pt", "empty.pt", "empty.pt' is the file to read, whose other objects would be"),
        ("empty.pt", "new.pt", "empty.pt' holds no tensors"),
        ("empty.pt", "no/new.pt", "there is no folder"),
        ("empty.pt", ".", "is a folder; name a file in it"),
    ):
        assert tensors_only([str(tmp_path / old), str(tmp_path / new)]) == 2
        assert said in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["cut.pt", "empty.pt", "notes.pt"]
