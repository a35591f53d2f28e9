"""The script's torch.save is torch's own, except that the file is complete at any moment."""

import io
from pathlib import Path

import pytest
import torch

from kdhooks_integrations.arcface_torch.saving import SafeTorch


def test_everything_else_is_torchs_own() -> None:
    safe = SafeTorch(lambda: None)
    assert safe.nn is torch.nn
    assert safe.__name__ == "torch"


def test_attributes_are_set_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "kdhooks_mark", 0, raising=False)
    SafeTorch(lambda: None).kdhooks_mark = 1
    assert vars(torch)["kdhooks_mark"] == 1


def test_takes_files_and_the_names_of_torchs_arguments(tmp_path: Path) -> None:
    safe, buffer = SafeTorch(lambda: None), io.BytesIO()
    safe.save(obj=torch.ones(2), f=tmp_path / "a.pt")
    safe.save(torch.ones(2), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(tmp_path / "a.pt"), torch.load(buffer))


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "model.pt").symlink_to(tmp_path / "there" / "model.pt")
    SafeTorch(lambda: None).save(torch.ones(2), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").is_symlink()
    assert torch.equal(torch.load(tmp_path / "there" / "model.pt"), torch.ones(2))


def test_nothing_is_written_if_the_check_fails(tmp_path: Path) -> None:
    def check() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        SafeTorch(check).save(torch.ones(2), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
