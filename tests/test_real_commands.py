"""The commands run in InsightFace's unedited recognition/arcface_torch, on a CPU.

KDHOOKS_ARCFACE_TORCH names a checkout of it. Its requirements must be installed, except mxnet:
kdhooks reads records and verification files in its place.
"""

import os
import pickle
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from benchmarks.recordio_files import people, write_pairs, write_records
from kdhooks.pictures import encode

NEEDED = ("easydict", "scipy", "sklearn", "torchvision", "tensorboard", "onnx", "onnxruntime")

CHECKOUT = os.environ.get("KDHOOKS_ARCFACE_TORCH", "")
ROOT = Path(__file__).parents[1]
CONFIG = """
from easydict import EasyDict
config = EasyDict(
    margin_list=(1.0, 0.5, 0.0), network="mbf", resume=False, output={output!r}, embedding_size=64,
    sample_rate=1.0, fp16=False, weight_decay=5e-4, batch_size=8, lr=0.02, verbose=2, frequent=1,
    dali=False, rec="faces", num_classes=6, num_image=24, num_epoch=1, warmup_epoch=0,
    val_targets=["pairs"], num_workers=0, save_all_states=True,
)
"""
FCD, AT = 'methods = ["fcd", "at"]', 'methods = [{name="fcd", weight=0.0}, {name="at", weight=0.0}]'
SETTLED = """
import backbones, torch
torch.manual_seed(0)
model = backbones.get_model("mbf", dropout=0.0, fp16=False, num_features=64).train()
for module in model.modules():
    if hasattr(module, "momentum"):
        module.momentum = None  # statistics of all batches
for _ in range(2):
    model(torch.nn.functional.interpolate(torch.rand(16, 3, 8, 8) * 2 - 1, 112))
torch.save(model.state_dict(), "teacher.pt")
"""
TEACHER = '[teacher]\nnetwork = "mbf"\ncheckpoint = "teacher.pt"\n'


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHECKOUT or any(find_spec(package) is None for package in NEEDED),
        reason=f"KDHOOKS_ARCFACE_TORCH names no checkout, or one of {', '.join(NEEDED)} is missing",
    ),
]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the trainer's folder; add faces for three steps, and a teacher."""
    (script,) = Path(CHECKOUT).rglob("arcface_torch/train_v2.py")
    folder = tmp_path_factory.mktemp("checkout") / "arcface_torch"
    shutil.copytree(script.parent, folder, ignore=shutil.ignore_patterns("docs", "__pycache__"))
    write_records(folder / "faces", people(6, 4))
    write_pairs(folder / "faces" / "pairs.bin", 4, 20)
    (folder / "kd.toml").write_text(f"{FCD}\n{TEACHER}")
    (folder / "zero.toml").write_text(f"{AT}\n{TEACHER}")
    done = python(folder, "-c", SETTLED)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def plain(trainer: Path) -> tuple[dict[str, torch.Tensor], str]:
    return launched(trainer, "plain")


def write_config(folder: Path, name: str) -> None:
    (folder / "configs" / f"{name}.py").write_text(CONFIG.format(output=name))


def python(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python in the trainer's folder, as users do, without the trainer's warnings."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "tests" / "on_cpu"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )


def kdhooks(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return python(folder, "-m", "kdhooks", *arguments)


def launched(folder: Path, name: str, *options: str) -> tuple[dict[str, torch.Tensor], str]:
    """Return the weights at the end of a run, and its stderr."""
    write_config(folder, name)
    done = kdhooks(folder, "run", "train_v2.py", f"configs/{name}", "--compat", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / name / "model.pt"), done.stderr


def test_upstream_does_not_run_without_repairs(trainer: Path) -> None:
    """Otherwise --compat would have nothing to repair, and its tests would prove nothing."""
    write_config(trainer, "broken")
    done = python(trainer, "train_v2.py", "configs/broken")
    assert done.returncode == 1
    assert "No module named 'mxnet'" in done.stderr


def test_weight_zero_is_the_plain_run_and_another_weight_is_not(
    trainer: Path, plain: tuple[dict[str, torch.Tensor], str]
) -> None:
    weights, said = plain
    zero, _ = launched(trainer, "zero", "--recipe", "zero.toml")
    distilled, _ = launched(trainer, "distilled", "--recipe", "kd.toml")
    assert list(zero) == list(weights) == list(distilled)
    assert all(torch.equal(zero[key], weights[key]) for key in weights)
    assert not all(torch.equal(distilled[key], weights[key]) for key in weights)
    assert said.count("compat: ") == 3
    assert "Accuracy-Flip" in (trainer / "plain" / "training.log").read_text()


def test_two_ranks_by_torchrun(trainer: Path) -> None:
    write_config(trainer, "ranks")
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "kdhooks"]
    script = ["run", "train_v2.py", "configs/ranks", "--recipe", "kd.toml", "--compat"]
    done = python(trainer, *ranks, *script)
    assert done.returncode == 0, done.stderr[-3000:]
    shards = [torch.load(trainer / "ranks" / f"checkpoint_gpu_{rank}.pt") for rank in range(2)]
    ours, theirs = (dict(shard["state_dict_backbone"]) for shard in shards)
    trained = [key for key in ours if key.endswith((".weight", ".bias"))]
    assert len(trained) > 100
    assert all(torch.equal(ours[key], theirs[key]) for key in trained)
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)  # each rank's statistics


def test_a_fork_with_another_head_is_refused(trainer: Path) -> None:
    source = (trainer / "train_v2.py").read_text().replace("PartialFC_V2", "PartialFC_V3")
    (trainer / "train.py").write_text(source)
    done = kdhooks(trainer, "run", "train.py", "configs/plain", "--recipe", "kd.toml")
    assert done.returncode == 2
    assert "found no PartialFC_V2; did you mean 'PartialFC_V3'?" in done.stderr


def test_taps_of_a_network(trainer: Path) -> None:
    done = kdhooks(trainer, "taps", "mbf")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "layers.5  (256, 14, 14)  stage3\n" in done.stdout
    assert done.stdout.endswith("(output)  (512,)         embedding\n")


def test_doctor_accepts_the_recipe(trainer: Path) -> None:
    write_config(trainer, "examined")
    options = ["--config", "configs/examined", "--data", "faces"]
    done = kdhooks(trainer, "doctor", "--recipe", "kd.toml", *options)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "from configs/examined: network mbf, embedding_size 64, num_classes 6" in done.stdout
    assert "at on layers.1, layers.3, layers.5, conv_sep <- layers.1" in done.stdout


def test_export_writes_the_student(
    trainer: Path, plain: tuple[dict[str, torch.Tensor], str]
) -> None:
    options = ["--network", "mbf", "--out", "student"]
    done = kdhooks(trainer, "export", "plain/checkpoint_gpu_0.pt", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = torch.load(trainer / "student" / "model.pt")
    weights, _ = plain
    assert list(ours) == list(weights)
    assert all(torch.equal(ours[key], weights[key]) for key in weights)
    assert "insightface accepts it for recognition" in done.stdout


# Prints the figures in the format of the trainer's callback.
VERIFIED = """
import sys
sys.path.insert(0, ".")
from kdhooks_integrations.arcface_torch.commands import compat
compat.repair("")
import backbones, torch
from eval import verification
network = backbones.get_model("mbf", dropout=0.0, fp16=False, num_features=64)
network.load_state_dict(torch.load("teacher.pt"))
pairs = verification.load_bin("hard.bin", (112, 112))
_, _, accuracy, deviation, xnorm, _ = verification.test(pairs, network.eval(), 10, 10)
print("LINE %f %1.5f+-%1.5f" % (xnorm, accuracy, deviation))
"""


@pytest.mark.parametrize("count", [60, 47])
def test_evaluate_prints_the_figures_that_the_trainer_prints(trainer: Path, count: int) -> None:
    """47 pairs are no multiple of the folds, and their 94 images none of the batch size."""
    generator = np.random.default_rng(count)
    pictures, same = [], []
    for place in range(count):
        patterns = generator.integers(60, 200, (2, 7, 7, 3))
        noisy = patterns[[0, place % 2]] + generator.integers(-60, 55, (2, 7, 7, 3))
        pictures += [encode(np.kron(one, np.ones((16, 16, 1))).astype(np.uint8)) for one in noisy]
        same.append(place % 2 == 0)
    (trainer / "hard.bin").write_bytes(pickle.dumps((pictures, same)))
    theirs = python(trainer, "-c", VERIFIED)
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    (line,) = (line for line in theirs.stdout.splitlines() if line.startswith("LINE"))
    _, xnorm, accuracy = line.split()
    options = ["--network", "mbf", "--data", "hard.bin", "--protocol", "insightface"]
    done = kdhooks(trainer, "evaluate", "teacher.pt", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = done.stdout.splitlines()[2].split()
    assert (cells[7], cells[-2]) == (accuracy, xnorm)
    assert 0.5 < float(accuracy.partition("+")[0]) < 1
