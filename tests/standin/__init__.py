"""A stand-in trainer built like arcface_torch's, and processes that run it on request.

Each run executes train.py as the main program, so kdhooks does everything that it does in a user's
script; the runs of one process share only the imports of torch and kdhooks.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

Report: TypeAlias = dict[str, Any]
"""train.py's report, or {"error": its type, "message": its text}; and the run's two paths."""

_ROOT = Path(__file__).parents[2]
_DEFAULTS = {
    "network": "tiny",
    "embedding_size": 16,
    "num_classes": 6,
    "sample_rate": 0.5,
    "heads": 1,
    "old_head": False,
    "batch_size": 12,
    "gradient_acc": 1,
    "lr": 0.05,
    "steps": 3,
    "num_epoch": 1,
    "verbose": 2,
    "frequent": 2,
    "num_image": 0,
    "seed": 2048,
    "compile": "",
    "compiled": "before DDP",
    "compress": True,
    "resume": "",
    "ask": {},
}


class Trainer:
    """Trains in `ranks` processes; does not repeat a run with the arguments of an earlier one."""

    def __init__(self, ranks: int, folder: Path) -> None:
        self.folder = folder
        self._ranks = ranks
        self._runs = 0
        self._workers: list[subprocess.Popen[str]] = []
        self._reports: dict[str, list[Report]] = {}

    def run(
        self,
        config_line: str = "",
        *,
        below_imports: str = "",
        after_schedule: str = "",
        before_loop: str = "",
        launch: Sequence[str] = (),
        fresh: bool = False,
        **config: object,
    ) -> list[Report]:
        """Return each rank's report. The lines are inserted at the place that their name states.

        launch: options of `kdhooks run`, which then starts the script. fresh: repeat the run.
        """
        job = {
            "config_line": config_line,
            "BELOW_IMPORTS": below_imports,
            "AFTER_SCHEDULE": after_schedule,
            "BEFORE_LOOP": before_loop,
            "launch": list(launch),
            "config": {**_DEFAULTS, **config},
        }
        key = json.dumps(job)
        if fresh or key not in self._reports:
            self._runs += 1
            self._reports[key] = self._run(job, self._runs)
        return self._reports[key]

    def _run(self, job: dict[str, Any], number: int) -> list[Report]:
        run = self.folder / f"run{number}"
        config = {"output": str(run), **job.pop("config")}
        path = self.folder / f"job{number}.py"
        path.write_text(f"config = {config!r}\n{job.pop('config_line')}\n")
        while len(self._workers) < self._ranks:
            self._workers.append(self._start(len(self._workers)))
        request = json.dumps({**job, "STORE": str(path.with_suffix(".store")), "path": str(path)})
        for worker in self._workers:
            print(request, file=_pipe(worker.stdin), flush=True)
        answers: list[Report] = []
        for worker in self._workers:
            line = _pipe(worker.stdout).readline()
            assert line, f"the stand-in exited; its log is {self.folder}/log{len(answers)}"
            answers.append(json.loads(line))
        for rank, answer in enumerate(answers):
            if not answer:
                answers[rank] = json.loads(
                    Path(config["output"], f"report_{rank}.json").read_text()
                )
            answers[rank].update(output=config["output"], config=str(path))
        return answers

    def _start(self, rank: int) -> "subprocess.Popen[str]":
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(self._ranks),
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # avoids a pool of compiler processes
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(_ROOT)]),
        }
        with (self.folder / f"log{rank}").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.standin.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                cwd=self.folder,
            )

    def close(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):
                _pipe(worker.stdin).close()
            worker.kill()
            worker.wait()
            _pipe(worker.stdout).close()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
