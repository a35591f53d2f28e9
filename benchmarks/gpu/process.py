"""Run each part in its own process, so that a crash or an exhausted budget costs only one case."""

import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch

from benchmarks.gpu.part import Absent, Failed, Options, Part
from benchmarks.gpu.records import Record

_CPU_FACTOR = 40  # roughly how many times longer a case takes on a CPU than on a GPU
_TINY_SECONDS = 5.0


def load(module: str) -> Part:
    return cast(Part, import_module(module))


def needed(part: Part, options: Options) -> Mapping[str, float]:
    """Return the seconds that each case needs on this device and at this size."""
    if options.tiny:
        return {case: min(seconds, _TINY_SECONDS) for case, seconds in part.cases(options).items()}
    factor = 1 if options.cuda else _CPU_FACTOR
    return {case: factor * seconds for case, seconds in part.cases(options).items()}


def run_part(
    name: str,
    module: str,
    options: Options,
    deadline: float,
    only: Sequence[str] | None,
) -> None:
    """Run the cases that are not yet recorded as done, in processes of their own.

    deadline: in the unit of time.time(). only: run only these cases.
    """
    part, record = load(module), Record(name, options)
    wanted = [case for case in part.cases(options) if only is None or case in only]
    pending = [case for case in wanted if options.again or not record.settled(case)]
    for case, entry in list(record.cases.items()):
        if entry["status"] == "running":
            record.put(case, "stopped", reason="the command was killed while it ran")
    while pending := _affordable(name, part, pending, options, deadline):
        before = Record(name, options).cases
        process = _started(name, module, options, deadline, pending)
        try:
            process.join(max(0.0, deadline - time.time()))
        finally:
            late = process.is_alive()
            if late:
                _kill(process)
            process.join()
        record = Record(name, options)
        reached = [case for case in pending if record.cases.get(case) != before.get(case)]
        ended = f"its process ended with exit code {process.exitcode}"
        for case in reached:
            if record.cases[case]["status"] == "running":
                if late:
                    record.put(case, "stopped", reason="it still ran when the budget ended")
                else:
                    record.put(case, "failed", traceback=ended)
        if not reached and not late:  # it ended before the first case
            for case in pending:
                record.put(case, "failed", traceback=ended)
            return
        pending = [case for case in pending if case not in reached]


def _started(*given: Any) -> BaseProcess:
    """Start a process from a fork server, which has imported torch and has not used CUDA."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "matplotlib.figure"])
    process = context.Process(target=_run_cases, args=given)
    process.start()
    return process


def _affordable(
    name: str, part: Part, pending: Sequence[str], options: Options, deadline: float
) -> list[str]:
    """Return the cases for which enough time is left; record the others as skipped."""
    record, seconds, left = Record(name, options), needed(part, options), deadline - time.time()
    for case in pending:
        if seconds[case] > left:
            reason = f"it needs {seconds[case]:.0f} s, and {max(left, 0):.0f} s were left"
            if not record.settled(case):
                record.put(case, "skipped", reason=reason)
            print(f"{name}, {case}: skipped: {reason}", flush=True)
    return [case for case in pending if seconds[case] <= left]


def _kill(process: BaseProcess) -> None:
    """Kill the process and all processes that it has started."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # raised if it does not lead a process group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _run_cases(
    name: str, module: str, options: Options, deadline: float, pending: list[str]
) -> None:
    os.setsid()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    record, part = Record(name, options), load(module)
    for case in pending:
        if not _affordable(name, part, [case], options, deadline):
            continue
        record.put(case, "running")
        started = time.perf_counter()
        try:
            result = part.run(case, options)
        except Absent as absent:
            record.put(case, "absent", reason=str(absent))
            print(f"{name}, {case}: absent: {absent}", flush=True)
            continue
        except Exception as error:
            text = traceback.format_exc()
            result = {"result": error.result} if isinstance(error, Failed) else {}
            spent = round(time.perf_counter() - started, 1)
            record.put(case, "failed", traceback=text, seconds=spent, **result)
            print(f"{name}, {case}: failed\n{text}", flush=True)
            continue
        spent = round(time.perf_counter() - started, 1)
        record.put(case, "done", seconds=spent, result=result)
        print(f"{name}, {case}: done in {spent} s", flush=True)
        if options.cuda:
            torch.cuda.empty_cache()


def _die_with_parent() -> None:
    """Kill this process group when the parent ends, so that nothing keeps running on the device."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
