"""The common parts of the commands: options, a JSON file and a picture."""

import argparse
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measuring import Spread
from kdhooks.arguments import at_least, make_folder, usable_device
from kdhooks.errors import KDHooksError


def command(name: str, about: str | None, turns: int) -> argparse.ArgumentParser:
    """Create a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    add = parser.add_argument
    add(
        "--turns",
        type=at_least(1),
        default=turns,
        help="number of measurements of each; default: %(default)s",
    )
    add_device(parser)
    add(
        "--threads",
        type=at_least(1),
        default=torch.get_num_threads(),
        help="threads of torch on the CPU; default: %(default)s",
    )
    add("--out", type=Path, default=Path("bench-out"), help="folder for the results")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N; default: %(default)s",
    )


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and apply the options that all benchmarks have."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        make_folder(options.out)
    except KDHooksError as error:
        parser.error(str(error))
    return options


def write(
    options: argparse.Namespace, name: str, record: Mapping[str, Any], figure: Figure | None = None
) -> None:
    """Write the record and the setting to name.json, and the figure to name.png."""
    content = {"setting": setting(options), **record}
    text = json.dumps(content, indent=1, default=str) + "\n"
    (options.out / f"{name}.json").write_text(text, encoding="utf-8")
    if figure:
        figure.savefig(options.out / f"{name}.png", dpi=110)


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options, versions and hardware that a result depends on."""
    return {
        **{name: value for name, value in vars(options).items() if name != "out"},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
    }


def bars(axes: Axes, groups: Mapping[str, Mapping[str, Spread]]) -> None:
    """Draw medians with quartiles: a row for each name, with one bar for each group."""
    names = list(next(iter(groups.values())))
    height = 0.8 / len(groups)
    for number, (label, spreads) in enumerate(groups.items()):
        middles = np.array([spreads[name]["median"] for name in names])
        quartiles = np.array([spreads[name]["quartiles"] for name in names])
        places = np.arange(len(names)) + (number - (len(groups) - 1) / 2) * height
        axes.barh(places, middles, height, xerr=abs(quartiles.T - middles), label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first one at the top
