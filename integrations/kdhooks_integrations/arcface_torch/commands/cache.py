"""`kdhooks cache`: the teacher's embeddings, ahead of a training; what a cache holds; is it whole.

    kdhooks cache build --recipe kd.toml --data ms1m-retinaface-t1
    kdhooks cache info cache
    kdhooks cache verify cache
    kdhooks cache verify cache --recipe kd.toml --data ms1m-retinaface-t1 --sample 1000

build embeds each picture and its mirror image into the recipe's teacher.cache; started again, it
goes on where it was stopped. A training fills the cache by itself; build only spares it the first
epoch. verify compares each record with its checksum and, with a recipe and data, some records with
what the teacher gives today. The exit status is 1 where the disk or the bound ends a build, or
where a record is wrong or was lost.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdhooks.arguments import usable_device
from kdhooks.errors import KDHooksError
from kdhooks.recipe import Recipe, build_teacher
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.cache_files import Keys, Parts
from kdhooks.teacher.fingerprints import check_same, read_header
from kdhooks.teacher.session import TeacherSession
from kdhooks.tensor_files import user_path
from kdhooks_integrations.arcface_torch.commands.networks import enter_trainer
from kdhooks_integrations.arcface_torch.commands.parsing import make_parser
from kdhooks_integrations.arcface_torch.commands.pictures import Pictures
from kdhooks_integrations.arcface_torch.networks import teacher_factory


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    commands = {"build": build, "info": info, "verify": verify}
    return commands[options.command](options)


def build(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    if "cache" not in recipe.teacher:
        raise KDHooksError(
            f"cache build: the recipe must name a folder; '{options.recipe}' has no teacher.cache; "
            'add cache = "cache" below [teacher]'
        )
    teacher = build_teacher(recipe, teacher_factory(None, recipe))
    pictures = Pictures(options.data)
    done = 0
    like = torch.zeros(1, *recipe.input_shape, device=options.device)
    with TeacherSession(teacher, like=like) as session:
        cache = session.cache
        assert cache is not None
        for images in pictures.batches(pictures.names, options.batch_size, recipe.input_shape):
            images = images.to(options.device)
            session(images)
            session(images.flip(-1))
            done += len(images)
            text = f"\r{done} of {len(pictures.names)} pictures"
            print(text, end="", file=sys.stderr, flush=True)
            if not cache.writing:
                break
    print(file=sys.stderr)
    print(
        f"{cache.folder}: {cache.asked} views of {done} pictures, of which {cache.hits} were there"
    )
    return 0 if cache.writing else 1


def info(options: argparse.Namespace) -> int:
    header, parts, keys = _opened(options.folder)
    distinct = len(np.unique(np.concatenate([np.empty(0, np.int64), *keys])))
    print(f"views      {distinct}, in {len(keys)} files with {sum(map(len, keys))} records")
    print(f"size       {parts.size() / 1e9:.3g} GB")
    print(f"embedding  {header['dim']} numbers in float16")
    for name in ("images", "weights", "input", "dtype"):
        print(f"{name:9}  {header[name]}")
    return 0


def verify(options: argparse.Namespace) -> int:
    _, parts, keys = _opened(options.folder)
    damaged = sum(_damaged(parts, number, len(part)) for number, part in enumerate(keys))
    print(f"{sum(map(len, keys))} records in {len(keys)} files, {damaged} damaged")
    incomplete = list(parts.incomplete())
    for text, _ in incomplete:
        print(text)
    lost = any(is_lost for _, is_lost in incomplete)
    if damaged or lost:
        print("a training embeds the views of damaged and lost records again, and keeps them")
    if options.recipe and options.data:
        _compare(options)
    elif options.recipe or options.data:
        raise KDHooksError("cache verify: --recipe and --data go together; found one of them")
    return 1 if damaged or lost else 0


def _damaged(parts: Parts, number: int, count: int, chunk: int = 65536) -> int:
    rows = (
        np.arange(start, min(start + chunk, count), dtype=np.int64)
        for start in range(0, count, chunk)
    )
    return sum(int((~parts[number].take(some)[1]).sum()) for some in rows)


def _compare(options: argparse.Namespace) -> None:
    """Raises where the teacher gives something else today."""
    recipe = _recipe(options)
    recipe = replace(
        recipe, teacher={**recipe.teacher, "cache": CacheOptions(Path(options.folder).expanduser())}
    )
    teacher = build_teacher(recipe, teacher_factory(None, recipe))
    pictures = Pictures(options.data)
    count = len(pictures.names)
    names = [pictures.names[i * count // options.sample] for i in range(options.sample)]
    batches = [
        images.to(options.device)
        for images in pictures.batches(
            list(dict.fromkeys(names)), options.batch_size, recipe.input_shape
        )
    ]
    with TeacherSession(teacher) as session:
        wanted = [session(images).embedding for images in batches]
    with TeacherSession(teacher, like=batches[0]) as session:
        cache = session.cache
    assert cache is not None
    hits = 0
    for images, embedding in zip(batches, wanted, strict=True):
        found, rows = cache.look_up(cache.keys(images))
        here = torch.from_numpy(np.flatnonzero(found))
        if len(here):
            kept = torch.from_numpy(rows)[here].to(embedding)
            check_same(cache.folder, kept, embedding[here], "the rows of these pictures")
        hits += len(here)
    print(f"{hits} of {sum(map(len, batches))} pictures are there, as the teacher embeds them")


def _recipe(options: argparse.Namespace) -> Recipe:
    for name in ("batch_size", "sample"):
        if getattr(options, name, 1) < 1:
            raise KDHooksError(
                f"cache {options.command}: --{name.replace('_', '-')} must be at least 1; found "
                f"{getattr(options, name)}"
            )
    enter_trainer(options.trainer)
    return Recipe.read(options.recipe)


def _opened(folder: str) -> tuple[dict[str, Any], Parts, list[Keys]]:
    """The header, the parts, and the keys of each part."""
    path = user_path(folder, "teacher cache")
    header = read_header(path)
    parts = Parts(path, int(header["dim"]))
    return header, parts, [keys for _, _, keys in parts.read_on()]


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("cache", __doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="command")
    filling = commands.add_parser("build", help="embed all pictures and their mirror images")
    _add_teacher(filling, required=True)
    describing = commands.add_parser("info", help="how many views, how large, of which teacher")
    describing.add_argument("folder")
    checking = commands.add_parser("verify", help="compare records with checksums and the teacher")
    checking.add_argument("folder")
    _add_teacher(checking, required=False)
    checking.add_argument("--sample", type=int, default=100, help="pictures to compare")
    return parser


def _add_teacher(parser: argparse.ArgumentParser, required: bool) -> None:
    add = parser.add_argument
    add("--recipe", required=required, help="TOML file with teacher.cache")
    add("--data", required=required, help="folder or zip of pictures, or folder with train.rec")
    add("--trainer", default=".", help="folder of arcface_torch; by default here")
    add("--batch-size", type=int, default=128)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=usable_device, default=device)
