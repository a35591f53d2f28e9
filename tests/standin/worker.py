"""Runs train.py as the main program, once for each line on standard input."""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from kdhooks import KDHooksError
from kdhooks_integrations.arcface_torch.commands import run

_SCRIPT = str(Path(__file__).with_name("train.py"))


def serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        path, options = request.pop("path"), request.pop("launch")
        sys.argv = [_SCRIPT, path]
        os.environ.update(request)
        answer = {}
        try:
            if options:
                run.main([_SCRIPT, path, *options])
            else:
                runpy.run_path(_SCRIPT, run_name="__main__")
        except Exception as error:
            traceback.print_exc()
            kind = KDHooksError if isinstance(error, KDHooksError) else type(error)
            answer = {"error": kind.__name__, "message": str(error)}
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.compiler.reset()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
