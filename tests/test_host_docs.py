"""The code on the pages about Lightning, Fabric and accelerate runs, also on two ranks."""

import os
import re
import warnings
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from kdhooks import Distiller
from kdhooks.recipe import Recipe
from kdhooks.testing import tiny_batch
from tests.ranks import Results, as_torchrun, here, mine, on_two_ranks
from tests.small_distiller import teacher_network

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def blocks(page: str) -> dict[str, str]:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^```\w+ ([\w-]+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


class Student(nn.Module):
    """(b 3 h w) -> (b 12), without BatchNorm, so that two ranks can equal one process."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(8), nn.Linear(3 * 64, 12)

    def forward(self, images: Any) -> Any:
        return self.fc(self.pool(images).flatten(1))


def small() -> nn.Module:
    """Return the tiny teacher, for images of any size."""
    module = teacher_network()
    return nn.Sequential(nn.AdaptiveAvgPool2d(32), module)


# --- own loops: Fabric and accelerate --------------------------------------------------------

PACKAGES = {"fabric": "lightning_fabric", "accelerate": "accelerate"}


def train(page: str, text: str = "") -> dict[str, Any]:
    """Run the page's loop; return the names it defines."""
    size = here()[1]
    if page == "accelerate":  # it has one state for each process
        import_module("accelerate.state").AcceleratorState._reset_state(True)
    images, labels = tiny_batch()
    pairs = [(mine(images), mine(labels))] * 4
    head = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {
        "torch": torch,
        "student": Student(),
        "teacher": small(),
        "loader": pairs,
        "criterion": lambda embedding, labels: F.cross_entropy(embedding @ head.T, labels),
        "devices": size,
        "cpu": True,
    }
    exec(text or blocks(page)["train"], names)
    return names


def outcome(page: str) -> dict[str, Results]:
    as_torchrun()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = train(page)
    kd = names["kd"]
    kd.remove()
    trained = {name: p.detach() for name, p in names["student"].named_parameters()}
    return {"trained": trained, "losses": {n: p.detach() for n, p in kd.named_parameters()}}


@pytest.fixture(params=PACKAGES)
def page(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    pytest.importorskip(PACKAGES[name])
    with mock.patch.dict(os.environ):
        yield name


def test_a_loop_trains_on_two_ranks_as_on_one(page: str, tmp_path: Path) -> None:
    first, second = on_two_ranks(partial(outcome, page), tmp_path)
    assert_close(first, second, rtol=0, atol=0)
    names = train(page)
    names["kd"].remove()
    alone = {name: p.detach() for name, p in names["student"].named_parameters()}
    assert names["kd"].step == 4
    assert_close(first["trained"], alone, rtol=1e-4, atol=1e-5)
    assert not torch.equal(alone["fc.weight"], Student().fc.weight)


def test_a_checkpoint_brings_the_losses_back(page: str, tmp_path: Path) -> None:
    names = train(page)
    kd: Distiller = names["kd"]
    kept = [p.detach().clone() for p in kd.parameters()]
    saves, loads = blocks(page)["save"].strip().rsplit("\n", 1)
    names["path"] = str(tmp_path / "state")
    exec(saves, names)
    for p in kd.parameters():
        p.data.zero_()
    kd.set_extra_state(torch.tensor(0))
    exec(loads, names)
    assert kd.step == 4
    assert_close([*kd.parameters()], kept, rtol=0, atol=0)
    kd.remove()


def test_a_loop_that_forgets_the_parameters_of_kd_is_refused(page: str) -> None:
    """This proves that the loops above pass them to the optimizer."""
    text = blocks(page)["train"].replace(
        "parameter_groups(weight_decay=0.0)", "parameter_groups(0)[:0]"
    )
    with pytest.raises(Exception, match=r"in no optimizer: losses\.fcd"):
        train(page, text)


# --- Lightning -----------------------------------------------------------------------------------


def module_of(**methods: Any) -> Any:
    from lightning.pytorch import LightningModule

    class Faces(LightningModule):  # type: ignore[misc]  # lightning may not be installed
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = Student(), nn.Linear(12, 6)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.head(self.model(batch[0])), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    for name, method in methods.items():
        setattr(Faces, name, method)
    return Faces()


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Enter a folder with the page's recipe and its files; return the names its code needs."""
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_networks.py").write_text("from tests.test_host_docs import small as teacher\n")
    (tmp_path / "kd.toml").write_text(blocks("lightning")["recipe"])
    torch.save(small().state_dict(), "teacher.pt")
    from tests.lightning_runs import Batches

    return {"torch": torch, "F": F, "loader": Batches([tiny_batch()] * 2), "teacher": small()}


def fit(names: dict[str, Any], **methods: Any) -> Any:
    names["module"] = module_of(**methods)
    exec(blocks("lightning")["fit"], names)
    (distill,) = [one for one in names["trainer"].callbacks if type(one).__name__ == "Distill"]
    return distill.distiller


def test_one_callback_distils(names: dict[str, Any]) -> None:
    kd = fit(names)
    assert kd.step == 4
    assert list(kd.losses) == ["fcd", "rkd"]
    assert not torch.equal(names["module"].model.fc.weight, Student().fc.weight)


def test_gradients_are_compared_before_the_training(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    names["module"] = module_of()
    exec(blocks("lightning")["gradients"], names)
    assert re.match(r"task \S+, fcd \S+, rkd \S+, all together", capsys.readouterr().out)


def test_manual_optimization_runs(names: dict[str, Any]) -> None:
    exec(blocks("lightning")["manual"], names)
    kd = fit(names, automatic_optimization=False, training_step=names["training_step"])
    assert kd.step == 4


def test_own_parameter_groups_are_kept(names: dict[str, Any]) -> None:
    exec(blocks("lightning")["groups"], names)
    text = '{ name = "fcd", projector = true }'
    Path("kd.toml").write_text(Path("kd.toml").read_text().replace('"fcd"', text))
    kd = fit(names, configure_optimizers=names["configure_optimizers"])
    groups = names["trainer"].optimizers[0].param_groups
    assert [len(group["params"]) for group in groups] == [2, 2, len(list(kd.parameters()))]
    assert groups[-1]["weight_decay"] == 0.0


def test_a_dict_is_a_recipe(names: dict[str, Any]) -> None:
    exec(blocks("lightning")["dict"], names)
    assert isinstance(names["distill"]._settings.recipe, Recipe)


def test_a_configuration_file_holds_the_callback(names: dict[str, Any]) -> None:
    yaml = pytest.importorskip("yaml")
    (one,) = yaml.safe_load(blocks("lightning")["cli"])["trainer"]["callbacks"]
    package, name = one["class_path"].rsplit(".", 1)
    distill = getattr(import_module(package), name)(**one["init_args"])
    assert isinstance(distill._settings.recipe, Recipe)
    assert distill._settings.student == "model"


def test_a_module_like_that_of_adaface_is_distilled(names: dict[str, Any]) -> None:
    """As AdaFace's, the module has two parameter groups and a head that also takes the length."""
    from lightning.pytorch import LightningModule

    from kdhooks_integrations.lightning import Distill
    from tests.lightning_runs import SILENT

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.bn = Student(), nn.BatchNorm1d(12)

        def forward(self, images: Any) -> Any:
            embedding = self.bn(self.body(images))
            length = embedding.norm(dim=1, keepdim=True)
            return embedding / length, length

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(12, 6))

        def forward(self, embedding: Any, length: Any, labels: Any) -> Any:
            return 8 * embedding @ F.normalize(self.kernel, dim=0) + length.detach().clamp(max=1)

    class Recogniser(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = Net(), Head()

        def forward(self, images: Any, labels: Any) -> Any:
            embedding, length = self.model(images)
            return self.head(embedding, length, labels), length, embedding, labels

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            cosines, _, _, labels = self.forward(*batch)
            return F.cross_entropy(cosines, labels)

        def configure_optimizers(self) -> Any:
            decayed = [*self.model.body.parameters(), self.head.kernel]
            groups: list[Any] = [
                {"params": decayed, "weight_decay": 5e-4},
                {"params": self.model.bn.parameters()},
            ]
            optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.1)]

    text = blocks("lightning")["adaface"].replace('"fcd"', '{ name = "fcd", projector = true }')
    Path("kd.toml").write_text(text)
    distill = Distill("kd.toml", student="model")
    trainer = import_module("lightning.pytorch").Trainer(
        max_epochs=2, callbacks=[distill], **SILENT
    )
    trainer.fit(Recogniser(), names["loader"])
    assert distill.distiller is not None
    assert distill.distiller.step == 4
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([0.005] * 3)


def test_every_block_is_one_of_these() -> None:
    assert blocks("lightning").keys() == {
        "install", "recipe", "fit", "dict", "cli", "manual", "groups", "adaface", "example",
        "gradients",
    }  # fmt: skip
    for page in PACKAGES:
        assert blocks(page).keys() == {"train", "save"}
