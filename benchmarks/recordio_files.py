"""Writes made-up faces to train.rec, train.idx and verification files, as mxnet's tools do."""

import pickle
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kdhooks.pictures import Pixels, encode

MAGIC = struct.pack("<I", 0xCED7230A)


def people(classes: int, each: int, seed: int = 0) -> list[tuple[Pixels, int]]:
    """Return pictures (112 112 3) with their person's number; each person has a noisy pattern."""
    return list(crowd(classes, each, seed))


def crowd(classes: int, each: int, seed: int = 0) -> Iterator[tuple[Pixels, int]]:
    """Yield the pictures of `people` one at a time."""
    generator = np.random.default_rng(seed)
    patterns = np.random.default_rng(7).integers(30, 225, (classes, 7, 7, 3))
    for index in range(classes * each):
        noisy = patterns[index % classes] + generator.integers(-30, 30, (7, 7, 3))
        pixels = np.kron(noisy, np.ones((16, 16, 1))).astype(np.uint8)
        yield pixels, index % classes


def record(content: bytes) -> bytes:
    """Return one entry of a .rec: split at each magic number, with parts padded to 4 bytes."""
    parts = content.split(MAGIC)
    written = []
    for index, part in enumerate(parts):
        kind = 0 if len(parts) == 1 else 1 if index == 0 else 3 if index == len(parts) - 1 else 2
        head = MAGIC + struct.pack("<I", kind << 29 | len(part))
        written.append(head + part + b"\0" * (-len(part) % 4))
    return b"".join(written)


def labelled(label: float | Sequence[float], number: int, content: bytes) -> bytes:
    if isinstance(label, int | float):
        return struct.pack("<IfQQ", 0, label, number, 0) + content
    numbers = np.asarray(label, np.float32).tobytes()
    return struct.pack("<IfQQ", len(label), 0.0, number, 0) + numbers + content


def write_records(folder: Path, samples: Iterable[tuple[Pixels, int]]) -> None:
    """Write records like InsightFace's: record 0 holds the end of the images; labels are pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [(encode(pixels), who) for pixels, who in samples]
    offset, lines = 0, []
    with (folder / "train.rec").open("wb") as file:
        entries = [labelled([len(pictures) + 1.0, len(pictures) + 1.0], 0, b"")]
        entries += [labelled([float(who), 0.0], i, p) for i, (p, who) in enumerate(pictures, 1)]
        for key, entry in enumerate(entries):
            lines.append(f"{key}\t{offset}\n")
            offset += file.write(record(entry))
    (folder / "train.idx").write_text("".join(lines))


def write_pairs(path: Path, classes: int, pairs: int) -> None:
    """Write a verification .bin: encoded images, two for each pair, and whether they match."""
    pictures = [
        [p for p, who in people(classes, pairs, seed=1) if who == c] for c in range(classes)
    ]
    images, same = [], []
    for index in range(pairs):
        other = index % 2
        images += [encode(pictures[0][index]), encode(pictures[other][-1 - index])]
        same.append(not other)
    path.write_bytes(pickle.dumps((images, same)))
