"""`kdhooks run` runs a training script with distillation, without editing it or its config.

    kdhooks run train_v2.py configs/ms1mv3_r50 --recipe kd.toml
    torchrun --nproc_per_node=8 -m kdhooks run train_v2.py configs/ms1mv3_r50 --recipe kd.toml

The script runs as with `python SCRIPT ARGUMENTS`. The recipe is installed after the script's
imports; the script's own statements are unchanged.
"""

import argparse
import ast
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from kdhooks.errors import KDHooksError, near_miss
from kdhooks.recipe import Recipe
from kdhooks_integrations import arcface_torch
from kdhooks_integrations.arcface_torch.commands.compat import repair
from kdhooks_integrations.arcface_torch.commands.parsing import make_parser
from kdhooks_integrations.arcface_torch.installation import HEADS

Install: TypeAlias = Callable[[dict[str, Any]], object]
"""Called once with the script's globals."""

_HOOK = "__kdhooks_install__"


def main(argv: Sequence[str]) -> int:
    options, arguments = _options(argv)
    script = Path(options.script)
    if options.recipe is None and not options.compat:
        raise KDHooksError(
            "run needs --recipe FILE; found none (to run without distillation, use only --compat)"
        )
    if not script.is_file():
        raise KDHooksError(f"run: there is no script '{script}' in {Path.cwd()}")
    try:
        with tokenize.open(script) as file:  # uses the encoding that the script declares
            source = file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise KDHooksError(f"run: '{script}' can't be read as Python: {error}") from error
    install: Install | None = None
    if options.recipe is not None:
        install = partial(arcface_torch.install, Recipe.read(options.recipe))
    program = prepared(source, options.script, install is not None)
    if options.compat:
        repair(source)
    names = execute(program, options.script, arguments, install)
    if install is not None:
        _check_distilled(names, options.script)
    return 0


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return our options, from anywhere before a `--`, and the script's own arguments."""
    usage = "kdhooks run SCRIPT [ARGUMENTS …] --recipe FILE [--compat] [-- ARGUMENTS …]"
    first = make_parser("run", __doc__, usage)
    ours = type(first)(prog="kdhooks run", add_help=False, allow_abbrev=False)
    for parser in (first, ours):
        parser.add_argument(
            "--recipe",
            metavar="FILE",
            help="TOML file with the teacher and the methods (default: none; with --compat, the "
            "script then trains without distillation)",
        )
        parser.add_argument(
            "--compat",
            action="store_true",
            help="repair incompatibilities of the trainer with current packages, and log each "
            "repair (default: off)",
        )
    first.add_argument(
        "script", help="train_v2.py, or a fork of it, followed by its own arguments (required)"
    )
    first.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    options = first.parse_args(argv[:end])
    _, arguments = ours.parse_known_args(options.arguments, options)
    return options, [*arguments, *argv[end + 1 :]]


def prepared(source: str, name: str, hooked: bool) -> ast.Module:
    """Parse the script; if hooked, insert a call of the hook after its imports.

    The hook also comes after the last statement that binds one of the names that `install` wraps.
    """
    try:
        tree = ast.parse(source, name)
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte
        raise KDHooksError(f"run: '{name}' is not valid in this Python: {error}") from error
    if not hooked:
        return tree
    bound = [(index, node, {*_bound(node)}) for index, node in enumerate(tree.body)]
    found = {name for _, _, names in bound for name in names}
    missing = [] if "get_model" in found else ["get_model"]
    missing += [] if found & {*HEADS} else [HEADS[0]]
    if missing and "*" not in found:
        close = "".join(near_miss(name, found) for name in missing)
        raise KDHooksError(
            f"run: '{name}' must import or define get_model, for the backbone, and PartialFC_V2, "
            f"for the head, at its top level; found no {' and no '.join(missing)}; {close}if the "
            "script is a fork, import its own functions under these names, or call "
            "kdhooks_integrations.arcface_torch.attach in it"
        )
    needed = {"get_model", *HEADS, "*"}
    below = max(
        index
        for index, node, names in bound
        if names & needed or isinstance(node, ast.Import | ast.ImportFrom)
    )
    call = ast.parse(f"{_HOOK}()").body[0]
    tree.body.insert(below + 1, ast.copy_location(call, tree.body[below]))
    return ast.fix_missing_locations(tree)


def _bound(node: ast.AST) -> Iterator[str]:
    """Yield the names that a statement binds in its own scope; '*' for a star import."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
        return
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return  # the training runs inside this block, so after it is too late
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _bound(child)


def execute(
    program: ast.Module, name: str, arguments: Sequence[str], install: Install | None
) -> dict[str, Any]:
    """Run the script as the main program, and return its globals.

    It has the same arguments and the same import path as without kdhooks.
    """
    script = ModuleType("__main__")
    names = vars(script)
    path = Path(name).absolute()
    names.update(__file__=str(path), __cached__=None)
    if install is not None:

        def hook() -> None:
            del names[_HOOK]
            install(names)

        names[_HOOK] = hook
    ours = sys.modules["__main__"], sys.argv, sys.path
    sys.modules["__main__"], sys.argv = script, [name, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # python -P does not add the script's folder
        sys.path = [str(path.resolve().parent), *sys.path[1:]]
    try:
        exec(compile(program, str(path), "exec", dont_inherit=True), names)
    finally:
        sys.modules["__main__"], sys.argv, sys.path = ours
    return names


def _check_distilled(names: dict[str, Any], name: str) -> None:
    installed = getattr(names["get_model"], "__self__", None)
    if getattr(installed, "attachment", None) is None:
        raise KDHooksError(
            f"run: '{name}' ended, but distillation was not attached: the script must create a "
            "backbone by get_model, then a head by PartialFC_V2, then an LR schedule by a class "
            "that it imports; in another script, call arcface_torch.attach"
        )
