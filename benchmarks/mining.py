"""What mining the nearest classes costs, beside the matrix products that it can't do without.

    python -m benchmarks.mining > mining.json

The two take turns on some rows of the index against all classes.
"""

import argparse
import json
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Work, in_turns, peak_bytes, setting
from kdhooks.shards import Rows
from kdhooks_plugins.neighbours import COLUMNS, ROWS, nearest_of


def products(unit: Tensor, own: slice) -> None:
    for others in unit.split(COLUMNS):
        torch.mm(unit[own], others.T)


def measure(options: argparse.Namespace, classes: int) -> dict[str, Any]:
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(classes, options.dim, generator=generator, device=device)
    unit = torch.cat([part for _, part in Rows.open(rows).chunks()])
    own = slice(0, ROWS)
    works: dict[str, Work] = {
        "products": partial(products, unit, own),
        "mining": partial(nearest_of, unit, own, options.k),
        "mining, max_sim": partial(nearest_of, unit, own, options.k, 0.8),
    }
    for work in works.values():
        work()
    return {
        "classes": classes,
        "times": in_turns(works, options.turns, device),
        "bytes": {name: peak_bytes(work, device) for name, work in works.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mining", description=__doc__)
    add = parser.add_argument
    add("--classes", type=int, nargs="+", default=[20_000, 100_000, 500_000])
    add("--dim", type=int, default=512)
    add("--k", type=int, default=100)
    add("--turns", type=int, default=7)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = [measure(options, classes) for classes in options.classes]
    print(json.dumps({"setting": setting(vars(options)), "measured": measured}, indent=1))


if __name__ == "__main__":
    main()
