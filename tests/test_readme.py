"""The code of README.md and of the pages behind it runs, and the tables of README.md are complete.

A code block is named by the word after its language. Each name has its test here.
"""

import re
import sys
import tomllib
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR

from kdhooks import Distiller, build, methods
from kdhooks.cli import main
from kdhooks.discovery import create, load
from kdhooks.hookspecs import Specs
from kdhooks.recipe import Recipe, build_teacher
from kdhooks.schedules import number_at
from kdhooks.testing import check_method
from kdhooks_integrations.arcface_torch import Attachment, Installation
from kdhooks_plugins.fcd import FCD
from kdhooks_plugins.kd import KD

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLASSES, DIM = 120, 12  # coupleface's k = 100 wants more classes than that

HOOKS = [name for name in vars(Specs) if not name.startswith("_")]
FENCED = re.compile(r"^```(\w+)(?: ([\w-]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, *chosen: str) -> dict[str, tuple[str, str]]:
    """Name -> language and text, of the chosen blocks of a page, or of all."""
    found = FENCED.findall((ROOT / page).read_text(encoding="utf-8"))
    every = {name or language: (language, text) for language, name, text in found}
    return {name: every[name] for name in chosen or every}


BLOCKS = {
    **blocks("README.md"),
    **blocks("docs/teacher.md"),
    **blocks("docs/arcface_torch.md", "install-line", "attach"),
    **blocks("docs/own_loop.md", "build"),
    **blocks("docs/recipe.md", "schedules"),
}


class Network(nn.Module):
    """(b 3 112 112) -> (b d)."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 16, stride=16), nn.Linear(4 * 7 * 7, dim)
        self.features = nn.BatchNorm1d(dim)

    def forward(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.features(self.fc(self.conv(images).flatten(1)))
        return embedding


class PartialFC(nn.Module):
    """arcface_torch's head, as its trainer calls it, without its margin."""

    def __init__(self, margin: object, width: int, num_classes: int, *rest: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, width) / 100)

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(embedding @ self.weight.T, labels)


def get_model(name: str, **options: Any) -> nn.Module:
    return Network(options.get("num_features", DIM))


@cache
def batch() -> tuple[Tensor, Tensor]:
    """One image of each class."""
    images = torch.rand(CLASSES, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images, torch.arange(CLASSES)


def trained(dim: int = DIM) -> Network:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        network = Network(dim)
    network.features.momentum = None  # the statistics of all batches, here of one
    with torch.no_grad():
        network(batch()[0])
    return network.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: the recipe of README, and the teacher's files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kd.toml").write_text(BLOCKS["recipe"][1])
    (tmp_path / "teacher").mkdir()
    teacher = trained()
    torch.save(teacher.state_dict(), "teacher/model.pt")
    rows = F.normalize(teacher(batch()[0]).detach())
    for rank, part in enumerate(rows.split(CLASSES // 2)):
        content = {"state_dict_softmax_fc": {"weight": part.clone()}}
        torch.save(content, f"teacher/checkpoint_gpu_{rank}.pt")
    return tmp_path


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The main program, with what train_v2.py imports; and arcface_torch's own package."""
    script = ModuleType("__main__")
    vars(script).update(get_model=get_model, PartialFC_V2=PartialFC, PolynomialLRWarmup=ConstantLR)
    backbones = ModuleType("backbones")
    vars(backbones).update(get_model=get_model)
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setitem(sys.modules, "backbones", backbones)
    yield script
    earlier = getattr(vars(script)["get_model"], "__self__", None)
    if isinstance(earlier, Installation):
        earlier.remove()


def run(block: str, **names: object) -> dict[str, Any]:
    """The names that a block leaves behind, run with the names given."""
    namespace: dict[str, Any] = {"torch": torch, **names}
    exec(compile(BLOCKS[block][1], f"block {block}", "exec"), namespace)
    return namespace


def terms_of(attachment: Attachment | None) -> list[str]:
    assert attachment is not None
    return terms_of_distiller(attachment.distiller)


def scheduled(
    schedule: type[ConstantLR], *models: nn.Module
) -> tuple[torch.optim.Optimizer, ConstantLR]:
    optimizer = torch.optim.SGD([{"params": model.parameters()} for model in models], lr=0.1)
    return optimizer, schedule(optimizer)


def terms_of_distiller(distiller: Distiller) -> list[str]:
    return [tap.name for tap in distiller.taps]


# --- the blocks ------------------------------------------------------------------------------


def test_block_recipe(folder: Path) -> None:
    recipe = Recipe.read(folder / "kd.toml")
    assert recipe.teachers[0].checkpoint == folder / "teacher" / "model.pt"
    assert len(recipe.methods) == 1


def test_block_schedules() -> None:
    fcd, kd = (create(method) for method in tomllib.loads(BLOCKS["schedules"][1])["methods"])
    assert isinstance(fcd, FCD)
    assert isinstance(kd, KD)
    assert [number_at(fcd.weight, step, None) for step in (0, 250, 1000)] == [0, 8, 32]
    expected = [8, 8, 6, 4, 4]
    assert [number_at(kd.temperature, step, 2) for step in (0, 4, 5, 6, 9)] == expected


def test_block_arcface_install(folder: Path, trainer: ModuleType) -> None:
    run("arcface-install")
    script = vars(trainer)
    installed = script["get_model"].__self__
    backbone = script["get_model"]("r18", dropout=0.0, fp16=False, num_features=DIM).train()
    head = script["PartialFC_V2"](None, DIM, CLASSES, 1.0, False)
    scheduled(script["PolynomialLRWarmup"], backbone, head)
    images, labels = batch()
    embedding = backbone(images)
    plain = F.cross_entropy(embedding @ head.weight.T, labels)
    loss = head.train()(embedding, labels)
    assert terms_of(installed.attachment) == ["fcd"]
    assert loss > plain + 1
    loss.backward()


def test_block_install_line() -> None:
    assert BLOCKS["install-line"] == BLOCKS["arcface-install"]


def test_block_attach(folder: Path, trainer: ModuleType) -> None:
    backbone, head = Network().train(), PartialFC(None, DIM, CLASSES)
    opt, lr_scheduler = scheduled(ConstantLR, backbone, head)
    names = run(
        "attach",
        backbone=backbone,
        module_partial_fc=head,
        opt=opt,
        lr_scheduler=lr_scheduler,
    )
    images, labels = batch()
    head(backbone(images), labels).backward()
    assert terms_of(names["attachment"]) == ["fcd"]


def test_block_mmengine() -> None:
    pytest.importorskip("mmengine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns, on new torch
        from mmengine.registry import HOOKS, MODELS

        from tests.mmengine_runs import Recogniser
    student = Recogniser()
    student.backbone = Network()
    names = run("mmengine", model=student, teacher=trained())
    model = MODELS.build(names["model"])
    assert terms_of_distiller(model.kdhooks.distiller) == ["fcd"]
    (line,) = names["custom_hooks"]
    assert HOOKS.build(line)._options.recipe.teacher.module is not None


@pytest.mark.filterwarnings("ignore::UserWarning:lightning.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # it meets a newer torch
def test_block_lightning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    from tests.lightning_runs import Batches, Faces

    monkeypatch.syspath_prepend(folder)
    (folder / "mine.py").write_text("from tests.test_readme import Network as teacher\n")
    (folder / "kd.toml").write_text(
        'methods = ["fcd"]\nteacher = { network = "mine:teacher", checkpoint = "teacher/model.pt" }'
    )
    module = Faces()
    module.model, module.head = Network(), nn.Linear(DIM, CLASSES)  # type: ignore[assignment]
    before = module.model.fc.weight.detach().clone()
    block = BLOCKS["lightning"][1].replace("max_epochs=20", "max_epochs=1")
    loader = Batches([batch()] * 2)
    exec(block, {"module": module, "loader": loader})
    assert not torch.equal(module.model.fc.weight, before)


def test_block_plain() -> None:
    student, teacher, weights = Network().train(), trained(), torch.randn(CLASSES, DIM) / 100
    names = run(
        "plain",
        student=student,
        teacher=teacher,
        loader=[batch()] * 8,
        criterion=lambda embedding, labels: F.cross_entropy(embedding @ weights.T, labels),
    )
    assert list(names["terms"]) == ["fcd"]
    assert names["kd"].step == 8
    assert names["kd"].metrics["fcd"] < 0.9
    assert not student._forward_hooks


def export(network: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's exporter warns of itself
        torch.onnx.export(
            network.eval(),
            (batch()[0][:1],),
            str(path),
            dynamo=False,
            input_names=["data"],
            dynamic_axes={"data": {0: "b"}},
        )


@pytest.fixture
def onnx_file(folder: Path) -> Path:
    pytest.importorskip("onnxruntime")
    export(trained(), folder / "w600k_r50.onnx")
    return folder / "w600k_r50.onnx"


def test_block_build(onnx_file: Path) -> None:
    kd = run("build", student=Network().train())["kd"]
    assert [(tap.name, tap.weight) for tap in kd.taps] == [("fcd", 8.0)]


def test_block_onnx_teacher(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pack is looked up in the folder of insightface, here below a home of our own."""
    home = onnx_file.parent
    pack = home / ".insightface" / "models" / "buffalo_l"
    pack.mkdir(parents=True)
    export(trained(128), pack / "w600k_r50.onnx")  # told from other models by its width
    monkeypatch.setenv("HOME", str(home))
    (home / "kd.toml").write_text(BLOCKS["onnx-teacher"][1])
    recipe = Recipe.read(home / "kd.toml")
    assert build_teacher(recipe).module is not None


def test_block_teacher_cache(folder: Path) -> None:
    """The second time that the batch comes, the teacher does without."""
    (folder / "kd.toml").write_text(BLOCKS["teacher-cache"][1])
    student = Network().train()
    kd = build("kd.toml", student, network=lambda name, state: get_model(name))
    images, labels = batch()
    for _ in range(2):
        student(images)
        kd(images, labels)
    (cache,) = kd._session.caches
    assert (cache.folder, cache.hits) == (Path("teacher/cache"), CLASSES)


def test_block_class_means(onnx_file: Path) -> None:
    Path("kd.toml").write_text('methods = ["fcd"]\nteacher = { onnx = "w600k_r50.onnx" }')
    run("class-means", loader=[batch()], num_classes=CLASSES)
    assert torch.load("rows.pt").shape == (CLASSES, DIM)
    Recipe.read({"teacher": {"onnx": onnx_file, "classifier": "rows.pt"}, "methods": ["kd"]})


def test_block_method() -> None:
    student = Network().train()
    kd = run("method", student=student, teacher=trained())["kd"]
    images, labels = batch()
    student(images)
    assert list(kd(images, labels)) == ["align"]


def test_the_method_of_the_block_conforms() -> None:
    names = run("method", student=Network().train(), teacher=trained())
    check_method(names["Align"])


def test_block_sh() -> None:
    """The two commands are goals of the Makefile."""
    assert re.findall(r"^make (\w+)", README, re.MULTILINE) == ["demo", "test"]


def test_every_block_has_its_test() -> None:
    names = {f"test_block_{name.replace('-', '_')}" for name in BLOCKS}
    assert names == {name for name in globals() if name.startswith("test_block_")}


# --- the tables ------------------------------------------------------------------------------


GAINS = re.findall(
    r"^\| ([A-Z]): .*? \| `(\w+)` \| (.*?) \| (.*?) \| (\d+) % \|$", README, re.MULTILINE
)


def test_the_gains_are_of_five_settings() -> None:
    assert [(setting, method) for setting, method, *_ in GAINS] == [
        ("A", "proxylesskd"),
        ("C", "acsr"),
        ("D", "cakd"),
        ("E", "proxylesskd"),
        ("M", "coupleface"),
    ]


@pytest.mark.parametrize(("setting", "method", "labels", "taught", "share"), GAINS)
def test_a_gain_is_that_of_the_results(
    setting: str, method: str, labels: str, taught: str, share: str
) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.papers.report import by_row, cells
    from benchmarks.papers.results import read

    records = read(ROOT / "docs/results/papers.jsonl")
    head, *rows = cells(by_row(record for record in records if record["setting"] == setting))
    (row,) = (row for row in rows if row[0].split(" ")[0] == method)
    (alone,) = (row for row in rows if row[0] == "labels alone")
    column = head.index("TAR at FAR 0.01")
    assert (alone[column], row[column], row[head.index("gap")]) == (labels, taught, share)


def table() -> dict[str, tuple[str, str]]:
    """The table of methods: name -> its hooks and its status."""
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(docs/methods/\1\.md\) \|[^|]*\| ([^|]*) \| ([^|]+) \|$",
        README,
        re.MULTILINE,
    )
    return {name: (hooks, status) for name, hooks, status in rows}


def test_every_method_has_its_row() -> None:
    ours = {info.name for info in methods() if info.package.split()[0] == "kdhooks"}
    assert set(table()) == ours


@pytest.mark.parametrize("name", table())
def test_the_row_of_a_method_is_true(name: str) -> None:
    """Its hooks are those that it answers; a reconstruction is called one, and nothing else is."""
    method = load(name)
    answered = [hook for hook in HOOKS if hasattr(getattr(method, hook, None), "kdhooks_impl")]
    hooks, status = table()[name]
    assert hooks.split() == [f"`{hook}`" for hook in answered]
    docstring = sys.modules[method.__module__].__doc__ or ""
    assert status.startswith("reconstruction") == ("\nReconstruction" in docstring)


def test_the_list_of_methods_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", printed, re.MULTILINE) for name in table())
