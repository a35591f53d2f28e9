"""`kdhooks cache` builds, describes or verifies a cache of the teacher's embeddings.

    kdhooks cache build --recipe kd.toml --data ms1m-retinaface-t1
    kdhooks cache info cache
    kdhooks cache verify cache
    kdhooks cache verify cache --recipe kd.toml --data ms1m-retinaface-t1 --sample 1000

build embeds each picture and its mirror image, and writes the embeddings to the recipe's
teacher.cache. If it is interrupted and started again, it continues from there. A training also
fills the cache, so build only saves time in the first epoch. verify compares each record with its
checksum and, with a recipe and data, some records with embeddings that the teacher computes now.
The exit status is 1 if a full disk or max_gb ended a build, or if a record is damaged or lost, and
2 if the command itself is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdhooks.arguments import at_least
from kdhooks.errors import KDHooksError
from kdhooks.recipe import Recipe, build_teacher, build_teachers
from kdhooks.teacher.cache import CacheOptions, TeacherCache
from kdhooks.teacher.cache_files import Keys, Parts
from kdhooks.teacher.fingerprints import IDENTITY, check_same, read_header
from kdhooks.teacher.session import TeacherSession
from kdhooks.teacher.table import TeacherTable
from kdhooks.teacher.teacher import Teacher
from kdhooks_integrations.arcface_torch.commands.networks import add_trainer, enter_trainer
from kdhooks_integrations.arcface_torch.commands.parsing import (
    add_device,
    add_json,
    make_parser,
    path,
    print_json,
)
from kdhooks_integrations.arcface_torch.commands.pictures import Pictures
from kdhooks_integrations.arcface_torch.networks import teacher_factories

_SAMPLE = 100  # pictures
_AT_ONCE = 65536  # records


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    commands = {"build": build, "info": info, "verify": verify}
    return commands[options.command](options)


def build(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    if all(teacher.cache is None for teacher in recipe.teachers):
        raise KDHooksError(
            f"cache build: the recipe must name a cache folder; '{options.recipe}' has no "
            'teacher.cache; add cache = "cache" below [teacher]'
        )
    teachers = build_teachers(recipe, teacher_factories(None, recipe))
    pictures = Pictures(options.data)
    done = 0
    like = torch.zeros(1, *recipe.input_shape, device=options.device)
    with ExitStack() as opened:
        caches: list[tuple[TeacherSession, TeacherCache]] = []
        for number, teacher in enumerate(teachers):
            if teacher.cache is None:
                print(f"teacher {number} has no cache and is skipped", file=sys.stderr)
                continue
            session = opened.enter_context(TeacherSession(teacher, like=like))
            assert session.cache is not None
            caches.append((session, session.cache))
        try:
            for images in pictures.batches(pictures.names, options.batch_size, recipe.input_shape):
                images = images.to(options.device)
                for session, cache in caches:
                    if cache.writing:
                        session(images)
                        session(images.flip(-1))
                done += len(images)
                text = f"\r{done} of {len(pictures.names)} pictures"
                print(text, end="", file=sys.stderr, flush=True)
                if not any(cache.writing for _, cache in caches):
                    break
        finally:
            if done:  # an error message must start on a new line
                print(file=sys.stderr)
    for _, cache in caches:
        print(
            f"{cache.folder}: {cache.asked} views of {done} pictures, of which {cache.hits} were "
            "already in the cache"
        )
    return 0 if all(cache.writing for _, cache in caches) else 1


def info(options: argparse.Namespace) -> int:
    header, parts, keys = _opened(options.folder)
    distinct = len(np.unique(np.concatenate([np.empty(0, np.int64), *keys])))
    records, size = sum(map(len, keys)), parts.size()
    identity = {name: header[name] for name in IDENTITY}
    if options.json:
        print_json(
            {
                "folder": str(options.folder),
                "views": distinct,
                "records": records,
                "files": len(keys),
                "bytes": size,
                "embedding_dim": parts.dim,
                **identity,
            }
        )
        return 0
    print(f"views      {distinct}, in {len(keys)} files with {records} records")
    print(f"size       {size / 1e9:.3g} GB")
    print(f"embedding  {parts.dim} numbers in float16")
    for name, value in identity.items():
        print(f"{name:9}  {value}")
    return 0


def verify(options: argparse.Namespace) -> int:
    if bool(options.recipe) != bool(options.data):
        raise KDHooksError(
            "cache verify: --recipe and --data must be given together; found only one of them"
        )
    if options.sample is not None and not options.recipe:
        raise KDHooksError(
            "cache verify: --sample, the number of pictures to compare with the teacher, needs "
            "--recipe and --data; found neither"
        )
    _, parts, keys = _opened(options.folder)
    damaged = sum(_damaged(parts, number, len(part)) for number, part in enumerate(keys))
    print(f"{sum(map(len, keys))} records in {len(keys)} files, {damaged} damaged")
    incomplete = list(parts.incomplete())
    for text, _ in incomplete:
        print(text)
    lost = any(is_lost for _, is_lost in incomplete)
    if damaged or lost:
        print("a training embeds the views of damaged and lost records again, and stores them")
    if options.recipe:
        _compare(options)
    return 1 if damaged or lost else 0


def _damaged(parts: Parts, number: int, count: int) -> int:
    rows = (
        np.arange(start, min(start + _AT_ONCE, count), dtype=np.int64)
        for start in range(0, count, _AT_ONCE)
    )
    return sum(int((~parts[number].take(some)[1]).sum()) for some in rows)


def _compare(options: argparse.Namespace) -> None:
    """Raise if the teacher now computes other embeddings than the cache holds."""
    recipe = _recipe(options)
    teacher = _teacher_of(recipe, options.folder)
    pictures = Pictures(options.data)
    count = len(pictures.names)
    sample = _SAMPLE if options.sample is None else options.sample
    names = [pictures.names[i * count // sample] for i in range(sample)]
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
    asked = sum(map(len, batches))
    print(f"{hits} of {asked} pictures are in the cache, with the teacher's present embeddings")


def _teacher_of(recipe: Recipe, folder: Path) -> Teacher:
    """Return the recipe's teacher with this cache; of several, the one that names this folder."""
    chosen = list(range(len(recipe.teachers)))
    if len(chosen) > 1:
        chosen = [n for n in chosen if _has_cache(recipe.teachers[n], folder)]
    if not chosen:
        raise KDHooksError(
            f"cache verify: the folder must be the cache of one of the recipe's "
            f"{len(recipe.teachers)} teachers; found '{folder}', which is none of them"
        )
    number = chosen[0]
    table = replace(recipe.teachers[number], cache=CacheOptions(path=folder))
    factory = teacher_factories(None, recipe)[number]
    return build_teacher(replace(recipe, teacher=table), factory)


def _has_cache(teacher: TeacherTable, folder: Path) -> bool:
    cache = teacher.cache
    return isinstance(cache, CacheOptions) and cache.path.resolve() == folder.resolve()


def _recipe(options: argparse.Namespace) -> Recipe:
    enter_trainer(options.trainer)
    return Recipe.read(options.recipe)


def _opened(folder: Path) -> tuple[dict[str, Any], Parts, list[Keys]]:
    """Return the header of a cache, its parts, and the keys of each part."""
    header = read_header(folder)
    parts = Parts(folder, header["dim"])
    return header, parts, [keys for _, _, keys in parts.read_on()]


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("cache", __doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="command")
    build_text = "embed all pictures and their mirror images into the recipe's cache"
    filling = commands.add_parser("build", help=build_text, description=_sentence(build_text))
    _add_teacher(filling, required=True)
    info_text = "print the number of views in a cache, its size, and the identity of its teacher"
    describing = commands.add_parser("info", help=info_text, description=_sentence(info_text))
    add_json(describing)
    verify_text = "compare records with their checksums, and some with the teacher's embeddings"
    checking = commands.add_parser("verify", help=verify_text, description=_sentence(verify_text))
    _add_teacher(checking, required=False)
    checking.add_argument(
        "--sample",
        type=at_least(1),
        metavar="N",
        help=f"number of pictures to compare with the teacher (default: {_SAMPLE})",
    )
    for one in (describing, checking):
        one.add_argument("folder", type=path, help="folder of the cache (required)")
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _add_teacher(parser: argparse.ArgumentParser, required: bool) -> None:
    add = parser.add_argument
    need = "required" if required else "default: none; only checksums are compared"
    add(
        "--recipe",
        required=required,
        metavar="FILE",
        help=f"TOML file with the teacher and its cache ({need})",
    )
    add(
        "--data",
        required=required,
        metavar="PATH",
        help=f"folder or zip of pictures, or folder with train.rec ({need})",
    )
    add(
        "--batch-size",
        type=at_least(1),
        default=128,
        metavar="N",
        help="images that the teacher embeds at a time (default: 128)",
    )
    add_trainer(parser)
    add_device(parser)
