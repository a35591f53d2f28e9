"""Each repair of `kdhooks run --compat` fixes what was broken, and is skipped if not needed."""

import builtins
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from kdhooks import KDHooksError
from kdhooks_integrations.arcface_torch.commands import compat, recordio

pytest.importorskip("PIL")

from benchmarks.recordio_files import MAGIC, labelled, people, record, write_pairs, write_records

Schedule = torch.optim.lr_scheduler.LRScheduler


@pytest.fixture(autouse=True)
def _modules() -> Iterator[None]:
    """Restore mxnet and scipy after each test."""
    before = {name: module for name, module in sys.modules.items() if _ours(name)}
    yield
    for name in [name for name in sys.modules if _ours(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def _ours(name: str) -> bool:
    return name.split(".")[0] in ("mxnet", "scipy")


def warmup(optimizer: torch.optim.Optimizer) -> Any:
    """Return a schedule that is created like the trainer's PolynomialLRWarmup."""

    class Warmup(Schedule):
        def __init__(self) -> None:
            super().__init__(optimizer, last_epoch=-1, verbose=False)  # type: ignore[call-arg]

        def get_lr(self) -> list[float | torch.Tensor]:
            return [0.5 * self.last_epoch for _ in self.optimizer.param_groups]

    return Warmup()


# --- the repairs ---------------------------------------------------------------------------------


def test_schedules_take_verbose(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(TypeError, match="verbose"):
        warmup(optimizer)
    monkeypatch.setattr(Schedule, "__init__", Schedule.__init__)  # restored afterwards
    assert "verbose" in (compat.scheduler_verbose("") or "")
    schedule = warmup(optimizer)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert compat.scheduler_verbose("") is None


def strict_scipy(broken: bool) -> ModuleType:
    """Return the part of scipy.interpolate that is used, with or without the defect."""

    class interp1d:
        def __init__(self, x: Any, y: Any, kind: str = "linear", fill: float = 0.0) -> None:
            if broken and kind == "slinear" and len(set(x)) < len(x):
                raise ValueError("Expect x to not have duplicates")
            self.x, self.y, self.kind, self.fill = x, y, kind, fill

        def __call__(self, value: float) -> float:
            return float(np.interp(value, self.x, self.y))

    module = ModuleType("scipy.interpolate")
    vars(module)["interp1d"] = interp1d
    return module


@pytest.fixture
def scipy(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    module = strict_scipy(request.param)
    monkeypatch.setitem(sys.modules, "scipy", ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.interpolate", module)
    return module


@pytest.mark.parametrize("scipy", [True], indirect=True)
def test_far_curves_may_have_steps(scipy: Any) -> None:
    steps = ([0.0, 0.0, 0.5, 0.5, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match="duplicates"):
        scipy.interp1d(*steps, kind="slinear")
    assert "repeated abscissae" in (compat.repeated_abscissae("") or "")
    assert scipy.interp1d(*steps, kind="slinear")(0.25) == 1.5
    other = scipy.interp1d(*steps, "nearest", fill=2.0)
    assert (other.kind, other.fill) == ("nearest", 2.0)
    assert compat.repeated_abscissae("") is None


@pytest.mark.parametrize("scipy", [False], indirect=True)
def test_a_scipy_that_takes_steps_stays_as_it_is(scipy: Any) -> None:
    plain = scipy.interp1d
    assert compat.repeated_abscissae("") is None
    assert scipy.interp1d is plain


def test_the_real_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    interpolate = pytest.importorskip("scipy.interpolate")
    monkeypatch.setattr(interpolate, "interp1d", interpolate.interp1d)
    far, thresholds = np.array([0.0, 0.0, 0.1, 0.1, 1.0]), np.arange(5.0)
    compat.repeated_abscissae("")
    assert interpolate.interp1d(far, thresholds, kind="slinear")(0.05) == pytest.approx(1.5)


def test_without_scipy_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.interpolate", None)
    assert compat.repeated_abscissae("") is None


def test_numpy_has_the_names_that_a_script_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttributeError):
        np.float  # type: ignore[attr-defined]  # noqa: B018
    monkeypatch.setitem(vars(np), "float", builtins.float)
    monkeypatch.delitem(vars(np), "float")  # so that it is removed afterwards
    assert compat.numpy_aliases("img.astype(np.float32)") is None
    said = compat.numpy_aliases("img = img.astype(np.float)")
    assert said == "numpy again has the names that the script uses: float"
    assert np.ones(1, np.int32).astype(vars(np)["float"]).dtype == np.float64
    assert "int" not in vars(np)


def test_only_necessary_repairs_are_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = (lambda source: f"mended {source}", lambda source: None)
    monkeypatch.setattr(compat, "REPAIRS", steps)
    assert compat.repair("x") == ["mended x"]
    assert [entry.getMessage() for entry in caplog.records] == ["compat: mended x"]


# --- in place of mxnet ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ImportError("absent"), AttributeError("np.PZERO was removed")])
def test_an_mxnet_that_fails_is_replaced(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mxnet"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {type(error).__name__}({str(error)!r})")
    monkeypatch.syspath_prepend(tmp_path)
    assert "mxnet can't be imported" in (compat.mxnet("") or "")
    import mxnet as mx  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]
    from mxnet import ndarray as nd  # pyright: ignore[reportMissingImports]

    assert nd.transpose is mx.nd.transpose
    with pytest.raises(AttributeError, match=r"stand-in for mxnet has no mxnet\.io; install mxnet"):
        mx.io  # noqa: B018


def test_an_mxnet_that_works_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mxnet.py").write_text("own = True")
    monkeypatch.syspath_prepend(tmp_path)
    assert compat.mxnet("") is None
    assert vars(sys.modules["mxnet"])["own"]


def test_records_are_read_as_the_trainer_reads_them(tmp_path: Path) -> None:
    samples = people(3, 2)
    write_records(tmp_path, samples)
    records = recordio.MXIndexedRecordIO(f"{tmp_path}/train.idx", f"{tmp_path}/train.rec", "r")
    header, rest = recordio.unpack(records.read_idx(0))
    assert (header.flag, [int(n) for n in header.label], rest) == (2, [7, 7], b"")
    for index in (5, 1, 6):
        header, content = recordio.unpack(records.read_idx(index))
        pixels, who = samples[index - 1]
        assert torch.tensor(header.label[0], dtype=torch.long) == who
        assert (recordio.imdecode(content).asnumpy() == pixels).all()
    assert records.keys == list(range(7))


def test_a_record_may_hold_the_magic_number_itself(tmp_path: Path) -> None:
    """The record is split at the number, which is restored when the record is read."""
    content = b"a" + MAGIC + b"bcd" + MAGIC
    entry = labelled(2.0, 9, content)
    written = record(b"first") + record(entry)
    assert written.count(MAGIC) == 4
    (tmp_path / "t.rec").write_bytes(written)
    (tmp_path / "t.idx").write_text(f"0\t0\n9\t{len(record(b'first'))}\n")
    records = recordio.MXIndexedRecordIO(f"{tmp_path}/t.idx", f"{tmp_path}/t.rec", "r")
    assert records.read_idx(9) == entry
    assert recordio.unpack(entry) == (recordio.Header(0, 2.0, 9, 0), content)


def test_a_picture_and_its_mirror(tmp_path: Path) -> None:
    """Read a verification file as the trainer's load_bin does."""
    write_pairs(tmp_path / "x.bin", 3, 4)
    images, same = pickle.loads((tmp_path / "x.bin").read_bytes())
    assert (len(images), same) == (8, [True, False, True, False])
    picture = recordio.transpose(recordio.imdecode(images[0]), axes=(2, 0, 1))
    mirrored = torch.from_numpy(recordio.flip(data=picture, axis=2).asnumpy())
    assert picture.shape == (3, 112, 112)
    torch.testing.assert_close(mirrored.flip(2), torch.from_numpy(picture.asnumpy()))


def test_an_unreadable_picture_is_named() -> None:
    with pytest.raises(KDHooksError, match="records: a picture can't be read as an image of the"):
        recordio.imdecode(b"no picture")


def test_pictures_need_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        KDHooksError, match="can't be decoded or written without Pillow; pip install pillow"
    ):
        recordio.imdecode(b"")
