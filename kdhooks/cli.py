"""Command-line tools for distilled trainings: run, check, inspect, export and evaluate."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.metadata import version

from kdhooks.described import as_table, as_text
from kdhooks.discovery import methods
from kdhooks.errors import KDHooksError
from kdhooks.exit_status import exit_status
from kdhooks.schema import recipe_schema

_DEMO_EXTRA = ("PIL", "matplotlib", "onnx", "onnxruntime", "tqdm")
_TOOLS = {  # command -> its module, and its line in --help
    "run": ("run", "run a training script of arcface_torch with distillation"),
    "doctor": ("doctor", "check a recipe by trying one training step"),
    "taps": ("taps", "list the submodules of a network that a recipe can tap"),
    "cache": ("cache", "build, describe or check a cache of the teacher's embeddings"),
    "export": ("export", "write a trained student to model.pt and to ONNX files"),
    "evaluate": (
        "evaluate",
        "measure face verification with each model, and across two models",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The exit status is 2 if the caller can fix the error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv[:1])  # the rest belongs to the command
    command: Callable[[list[str]], int] = arguments.command
    return exit_status(partial(command, list(argv[1:])))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kdhooks",
        usage="kdhooks [-h] [--version] command …",
        description=__doc__,
        epilog="For the options of a command, run kdhooks COMMAND --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kdhooks {version('kdhooks')}")
    commands = parser.add_subparsers(required=True, metavar="command")
    listing = commands.add_parser("methods", help="list the installed methods, or describe one")
    listing.set_defaults(command=_methods)
    schema = commands.add_parser("schema", help="print the JSON Schema of recipes, for editors")
    schema.set_defaults(command=_schema)
    for name, (module, text) in _TOOLS.items():
        commands.add_parser(name, help=text).set_defaults(command=_tool(module))
    demo = commands.add_parser("demo", help="distil a small network on real faces")
    demo.set_defaults(command=_demo)
    return parser


def _tool(module: str) -> Callable[[list[str]], int]:
    def run(rest: list[str]) -> int:
        tool = import_module(f"kdhooks_integrations.arcface_torch.commands.{module}")
        status: int = tool.main(rest)
        return status

    return run


def _methods(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="kdhooks methods",
        description="List the installed methods without importing them, or describe one of them.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", help="describe this method: hooks, needs and options")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)
    if options.name is None:
        infos = [asdict(info) for info in methods()]
        print(json.dumps(infos, indent=2, ensure_ascii=False) if options.json else _listed(infos))
    else:
        table = as_table(options.name)
        print(json.dumps(table, indent=2, ensure_ascii=False) if options.json else as_text(table))
    return 0


def _listed(infos: Sequence[Mapping[str, str]]) -> str:
    rows = [("name", "package", "paper")]
    rows += [(info["name"], info["package"], info["paper"]) for info in infos]
    name, package = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{r[0]:{name}}  {r[1]:{package}}  {r[2]}".rstrip() for r in rows)


def _schema(arguments: list[str]) -> int:
    argparse.ArgumentParser(
        prog="kdhooks schema",
        description="Print the JSON Schema (draft 2020-12) of recipes, with all installed methods.",
        epilog="Save it as kd.schema.json, and start a recipe with '#:schema kd.schema.json'.",
        allow_abbrev=False,
    ).parse_args(arguments)
    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
    return 0


def _demo(rest: list[str]) -> int:
    try:
        demo = import_module("kdhooks_demo.main")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _DEMO_EXTRA:
            raise
        raise KDHooksError(
            f"demo needs the package {error.name}; run pip install '.[demo]' in a clone of kdhooks"
        ) from error
    status: int = demo.main(rest)
    return status
