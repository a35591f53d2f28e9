"""Runs train.py as the main program, once for each line on standard input."""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

_SCRIPT = str(Path(__file__).with_name("train.py"))


def serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        sys.argv = [_SCRIPT, request.pop("path")]
        os.environ.update(request)
        answer = {}
        try:
            runpy.run_path(_SCRIPT, run_name="__main__")
        except Exception as error:
            traceback.print_exc()
            answer = {"error": type(error).__name__, "message": str(error)}
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.compiler.reset()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
