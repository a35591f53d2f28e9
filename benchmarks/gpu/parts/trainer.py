"""InsightFace's real, unmodified train_v2.py, without kdhooks and with every method."""

import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from benchmarks.gpu.part import Absent, Goal, Options, Result, Table
from benchmarks.recordio_files import crowd, write_records

ABOUT = """
`kdhooks run train_v2.py CONFIG --recipe FILE --compat` on made-up people in InsightFace's record
format: one rank, NCCL, fp16 with an active GradScaler, `mbf` with a teacher `r50` in float16 that
the same script has trained. The script is an exact copy of the checkout's. A step's time is the
median over the second half of a run; the ratio is to the mean of the two plain runs, one before and
one after all others. "Weight 0" is a run with all methods at weight 0 under torch's deterministic
algorithms, compared with the plain run bit for bit. On a CPU, the script runs with gloo and without
fp16; without a checkout, a small trainer of the same structure replaces it.
"""

ROOT = Path(__file__).parents[3]
PACKAGES = ("easydict", "torchvision", "tensorboard", "sklearn", "scipy")  # its imports
PLAIN, AGAIN, ZERO = "plain", "plain, again", "weight 0"
METHODS: Mapping[str, Mapping[str, object]] = {
    "acsr": {},
    "adadistill": {},
    "aird": {},
    "at": {},
    "cakd": {"prompts": {"number": 0}},
    "cc": {},
    "coupleface": {"k": 10},
    "eckd": {},
    "ekd": {},
    "fcd": {"weight": 8.0},
    "fitnet": {},
    "fskd": {},
    "gkd": {"largest": 10},
    "icdface": {},
    "kd": {},
    "margindistillation": {},
    "proxylesskd": {},
    "reviewkd": {},
    "rkd": {},
    "sp": {},
    "thkd": {},
}
CONFIG = """
from benchmarks.gpu import observer
from easydict import EasyDict

observer.watch({report!r}, deterministic={deterministic})
config = EasyDict(
    margin_list=(1.0, 0.5, 0.0), network={network!r}, resume=False, output={output!r},
    embedding_size=512, sample_rate=1.0, fp16={fp16}, weight_decay=1e-4, batch_size={batch},
    lr={lr}, verbose=10**9, frequent=50, dali=False, rec={data!r}, num_classes={classes},
    num_image={images}, num_epoch={epochs}, warmup_epoch=0, val_targets=[], num_workers={workers},
    save_all_states=True,
)
"""
STAND_IN = """
from benchmarks.gpu import observer

observer.watch({report!r}, deterministic={deterministic})
config = dict(
    network="tiny", embedding_size=16, num_classes={classes}, sample_rate=1.0, heads=1,
    old_head=False, batch_size={batch}, gradient_acc=1, lr={lr}, steps={steps}, num_epoch={epochs},
    verbose=10**9, frequent=2, seed=2048, compile="", compiled="before DDP", compress=True,
    resume="", ask={{}}, output={output!r},
)
"""


class Size(NamedTuple):
    batch: int
    steps: int  # in an epoch
    epochs: int
    classes: int
    teacher_epochs: int
    zero_epochs: int
    workers: int


FULL = Size(128, 100, 2, 100, 2, 1, 12)
TINY = Size(8, 3, 1, 4, 25, 1, 0)


def cases(options: Options) -> Mapping[str, float]:
    if options.tiny:
        return dict.fromkeys((PLAIN, ZERO, "kd"), 75.0)
    return {PLAIN: 75.0, ZERO: 60.0, **dict.fromkeys(METHODS, 30.0), AGAIN: 25.0}


def run(case: str, options: Options) -> Result:
    trainer = Trainer(options)
    if case == ZERO:
        return _weight_zero(trainer)
    methods = [] if case in (PLAIN, AGAIN) else [{"name": case, **METHODS[case]}]
    return trainer.run(case, methods, trainer.size.epochs)


def _weight_zero(trainer: "Trainer") -> Result:
    """Compare losses, backbone and head of two runs bit for bit."""
    epochs = trainer.size.zero_epochs
    methods = [{"name": name, **more, "weight": 0.0} for name, more in METHODS.items()]
    plain = trainer.run("plain, deterministic", [], epochs, deterministic=True)
    zero = trainer.run(ZERO, methods, epochs, deterministic=True)
    ours, theirs = (trainer.saved(name) for name in (ZERO, "plain, deterministic"))
    differ = [key for key, tensor in theirs.items() if not torch.equal(tensor, ours[key])]
    return {
        "methods": len(methods),
        "steps": len(plain["losses"]),
        "losses_equal": plain["losses"] == zero["losses"],
        "tensors": len(theirs),
        "tensors_that_differ": differ,
    }


class Trainer:
    """A copy of the trainer's folder, with data and a teacher, which the first use creates."""

    def __init__(self, options: Options) -> None:
        self.size = TINY if options.tiny else FULL
        self._cuda = options.cuda
        self._stand_in = options.arcface_torch is None
        if self._stand_in and options.cuda and not options.tiny:
            raise Absent("no --arcface-torch names InsightFace's folder recognition/arcface_torch")
        for package in () if self._stand_in else PACKAGES:
            if importlib.util.find_spec(package) is None:
                raise Absent(f"train_v2.py needs the package {package}, which is not installed")
        self._folder = options.work / "trainer"
        if not self._folder.is_dir():
            self._make(options.arcface_torch)
        if not (self._folder / "teacher" / "model.pt").is_file():
            network = "tiny" if self._stand_in else "mbf" if options.tiny else "r50"
            self.run("teacher", [], self.size.teacher_epochs, network=network)
            (self._folder / "teacher" / "network").write_text(network)

    def _make(self, checkout: Path | None) -> None:
        draft = self._folder.with_name("trainer.part")
        shutil.rmtree(draft, ignore_errors=True)
        if checkout is None:
            draft.mkdir()
        else:
            ignored = shutil.ignore_patterns("docs", "__pycache__", ".git")
            shutil.copytree(checkout, draft, ignore=ignored)
            images = self.size.batch * self.size.steps
            classes = self.size.classes
            write_records(draft / "faces", crowd(classes, math.ceil(images / classes)))
        draft.rename(self._folder)

    def run(
        self,
        name: str,
        methods: Sequence[Mapping[str, object]],
        epochs: int,
        network: str = "mbf",
        deterministic: bool = False,
    ) -> dict[str, Any]:
        """Run a training, which must succeed; return the observer's report."""
        stem = name.replace(", ", "_").replace(" ", "_")
        report = self._folder / f"{stem}.json"
        config = (STAND_IN if self._stand_in else CONFIG).format(
            report=str(report),
            deterministic=deterministic,
            network=network,
            output=stem,
            fp16=self._cuda,
            lr=0.05 if name == "teacher" else 0.02,
            data="faces",
            classes=self.size.classes,
            images=self.size.batch * self.size.steps,
            steps=self.size.steps,
            batch=self.size.batch,
            epochs=epochs,
            workers=self.size.workers,
        )
        folder = self._folder if self._stand_in else self._folder / "configs"
        (folder / f"{stem}.py").write_text(config)
        command = [sys.executable, "-W", "ignore", "-m", "kdhooks", "run", *self._script(stem)]
        command += ["--compat"]
        if methods:
            recipe = self._folder / f"{stem}.toml"
            recipe.write_text(self._recipe(methods))
            command += ["--recipe", str(recipe)]
        done = subprocess.run(
            command, cwd=self._folder, env=self._environment(), capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-6000:]}")
        log = self._folder / stem / "training.log"
        said = log.read_text() if log.is_file() else done.stderr
        return self._checked(name, json.loads(report.read_text()), said)

    def _checked(self, name: str, seen: dict[str, Any], said: str) -> dict[str, Any]:
        bad = [loss for loss in seen["losses"] if not math.isfinite(loss)]
        if bad or not seen["losses"]:
            raise RuntimeError(f"{name}: {len(bad)} losses are not finite, of {seen['losses']}")
        times = seen.pop("step_times")
        steps = [later - sooner for sooner, later in pairwise(times)]
        steps = steps[len(steps) // 2 :]
        terms = [line for line in said.splitlines() if "kdhooks, all " in line]
        return {
            **seen,
            "step_seconds": median(steps),
            "images_a_second": self.size.batch / median(steps),
            "terms": terms[-1].partition("kdhooks, all ")[2] if terms else "",
        }

    def _script(self, stem: str) -> list[str]:
        if self._stand_in:
            return [str(ROOT / "tests" / "standin" / "train.py"), f"{stem}.py"]
        return ["train_v2.py", f"configs/{stem}"]

    def _recipe(self, methods: Sequence[Mapping[str, object]]) -> str:
        """Return a recipe in TOML, whose values are valid JSON too."""
        tables = [_inline(method) for method in methods]
        network = (self._folder / "teacher" / "network").read_text()
        teacher = {
            "network": network,
            "checkpoint": "teacher/model.pt",
            "classifier": "teacher/checkpoint_gpu_*.pt",
            "dtype": "float16" if self._cuda else "float32",
        }
        lines = [f"methods = [{', '.join(tables)}]"]
        if self._stand_in:
            lines.append("input_shape = [3, 32, 32]")
        lines += ["[teacher]", *(f"{key} = {json.dumps(value)}" for key, value in teacher.items())]
        return "\n".join(lines) + "\n"

    def _environment(self) -> dict[str, str]:
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        found = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        found["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for deterministic matrix products
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        found |= {**ranks, "MASTER_PORT": str(_free_port())}  # as torchrun sets them
        if self._stand_in:
            found["STORE"] = str(self._folder / "store")
            Path(found["STORE"]).unlink(missing_ok=True)  # the rendezvous of the previous run
            found |= {"BELOW_IMPORTS": "", "AFTER_SCHEDULE": "", "BEFORE_LOOP": ""}
        elif not self._cuda:
            path.insert(0, str(ROOT / "tests" / "on_cpu"))
        if not self._cuda:
            found |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        found["PYTHONPATH"] = os.pathsep.join(path)
        return found

    def saved(self, name: str) -> dict[str, torch.Tensor]:
        """Return backbone and head at the end of a run."""
        stem = name.replace(", ", "_").replace(" ", "_")
        content = torch.load(self._folder / stem / "checkpoint_gpu_0.pt", map_location="cpu")
        head = content["state_dict_softmax_fc"]
        return {**content["state_dict_backbone"], "head.weight": head["weight"]}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def tables(found: Mapping[str, Result]) -> Sequence[Table]:
    plains = [found[name]["step_seconds"] for name in (PLAIN, AGAIN) if name in found]
    rows = [
        [
            "run",
            "images/s",
            "step, of plain",
            "peak, MB",
            "first loss",
            "last loss",
            "mean of the term",
        ]
    ]
    for name, one in found.items():
        if name != ZERO:
            ratio = len(plains) * one["step_seconds"] / sum(plains) if plains else math.nan
            peak = one.get("peak_bytes")
            rows.append(
                [
                    name,
                    f"{one['images_a_second']:.0f}",
                    f"{ratio:.2f}",
                    f"{peak / 1e6:.0f}" if peak else "",
                    f"{one['losses'][0]:.2f}",
                    f"{one['losses'][-1]:.2f}",
                    _first_term(one["terms"]),
                ]
            )
    return [rows]


def _first_term(said: str) -> str:
    """Return the mean of the first term in the last log line, and the number of skipped steps."""
    parts = said.partition(": ")[2].split(", ")
    skipped = [part for part in parts if part.endswith("steps skipped")]
    return ", ".join([parts[0], *skipped])


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    goals = []
    if ZERO in found:
        zero = found[ZERO]
        text = f"weight 0 of {zero['methods']} methods is the plain run bit for bit"
        differ = len(zero["tensors_that_differ"])
        seen = f"{differ} of {zero['tensors']} tensors differ after {zero['steps']} steps"
        goals.append(Goal(text, seen, not differ and zero["losses_equal"]))
    scales = [one["scale"] for name, one in found.items() if "scale" in one]
    if scales:
        goals.append(
            Goal("every run has an active GradScaler", f"scales {min(scales):g} to {max(scales):g}",
                 min(scales) > 0)
        )  # fmt: skip
    return goals


def picture(found: Mapping[str, Result]) -> Figure | None:
    names = [name for name in found if name != ZERO]
    figure = Figure(figsize=(8, 1.5 + 0.25 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].barh(names, [found[name]["images_a_second"] for name in names])
    panels[0].set_xlabel("images a second")
    panels[1].barh(names, [found[name].get("peak_bytes", 0) / 1e9 for name in names])
    panels[1].set_xlabel("memory at its peak, GB")
    panels[0].invert_yaxis()
    return figure


def _inline(table: Mapping[str, object]) -> str:
    """Return an inline table of TOML."""
    values = {
        key: _inline(value) if isinstance(value, Mapping) else json.dumps(value)
        for key, value in table.items()
    }
    return "{" + ", ".join(f"{key} = {value}" for key, value in values.items()) + "}"
