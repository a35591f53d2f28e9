"""`Distill` in a Trainer of either package, lightning.pytorch or pytorch_lightning."""

import sys
from importlib import import_module
from typing import Any

import pytest

pytest.importorskip("lightning")
pytest.importorskip("pytorch_lightning")

import torch
from torch.testing import assert_close

from kdhooks import KDHooksError
from kdhooks_integrations.lightning import packages
from tests.lightning_runs import SILENT, Faces, distil, loader, weights

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:(pytorch_)?lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def faces(package: Any, hook: str | None = None) -> Any:
    """Return Faces as a LightningModule of this package; `hook` creates the layers, if given."""
    late = hook is not None

    class Module(package.LightningModule):  # type: ignore[misc]
        training_step = Faces.training_step
        configure_optimizers = Faces.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            if not late:
                self.make()

        def make(self, stage: str = "") -> None:
            made = Faces()
            self.model, self.head = made.model, made.head

    if hook is not None:
        setattr(Module, hook, Module.make)
    return Module()


def trained(package: Any, *callbacks: Any, module: Any = None, **options: Any) -> Any:
    module = faces(package) if module is None else module
    ckpt = options.pop("ckpt", None)
    torch.manual_seed(3)
    trainer = package.Trainer(callbacks=list(callbacks), **{**SILENT, "max_epochs": 2, **options})
    trainer.fit(module, loader(), ckpt_path=ckpt)
    return trainer


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> Any:
    return import_module(request.param)


def test_a_trainer_of_either_package_trains_the_same(package: Any) -> None:
    callback = distil()
    assert isinstance(callback, package.Callback)
    trainer = trained(package, callback)
    reference = trained(import_module(PACKAGES[0]), distil())
    assert_close(weights(trainer.model), weights(reference.model), rtol=0, atol=0)
    assert callback.distiller is not None
    assert callback.distiller.step == 4


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_a_hook_may_create_the_layers_in_either_package(package: Any, hook: str) -> None:
    late = trained(package, distil(), module=faces(package, hook))
    early = trained(package, distil())
    assert_close(weights(late.model), weights(early.model), rtol=0, atol=0)


def test_a_run_resumes_in_the_other_package(package: Any, tmp_path: Any) -> None:
    (other,) = (import_module(name) for name in PACKAGES if name != package.__name__)
    trained(package, distil()).save_checkpoint(tmp_path / "half.ckpt")
    callback = distil()
    end = trained(other, callback, max_epochs=4, ckpt=tmp_path / "half.ckpt")
    straight = trained(package, distil(), max_epochs=4)
    assert_close(weights(end.model), weights(straight.model), rtol=0, atol=0)
    assert callback.distiller is not None
    assert callback.distiller.step == 8


def test_a_trainer_of_either_package_is_checked(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hasattr(package.callbacks, "EMAWeightAveraging"):  # since Lightning 2.6
        with pytest.raises(KDHooksError, match="must stand before EMAWeightAveraging"):
            trained(package, package.callbacks.EMAWeightAveraging(), distil())
    monkeypatch.setattr(package.strategies, "SingleDeviceStrategy", int)
    with pytest.raises(KDHooksError, match=r"strategy must keep .* found SingleDeviceStrategy"):
        trained(package, distil())


def test_an_old_version_is_refused(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "__version__", "2.3.3")
    with pytest.raises(KDHooksError, match=f"{package.__name__} must be version 2.4 .* 2.3.3"):
        trained(package, distil())


@pytest.mark.parametrize("missing", PACKAGES)
def test_either_package_may_be_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert [one.__name__ for one in packages._installed()] == [p for p in PACKAGES if p != missing]
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="lightning"):
        packages._installed()
