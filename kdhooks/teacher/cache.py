"""Embeddings of views that the teacher has seen, kept in a folder by the views' content."""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks.later import Later, Sent
from kdhooks.options import REQUIRED, Options, option
from kdhooks.teacher.cache_files import Embeddings, Index, Keys, Parts
from kdhooks.teacher.fingerprints import Identity, ViewKeys, check_header, check_same, read_header

log = logging.getLogger("kdhooks")

READ_ON_EVERY = 10.0  # seconds between two looks at what other processes wrote
RESERVE_GB = 2.0  # of the disk, left to the checkpoints of the training
_ROW_BITS = 40  # of a place: the row; above them the part


class CacheOptions(Options, subject="teacher.cache"):
    """A folder of the teacher's embeddings."""

    path: Path = option(REQUIRED, "The folder; it is created if it does not exist.")
    max_gb: float | None = option(
        None, "The most that all its files may take; by default no limit.", above=0, unit="GB"
    )

    def check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise self.refused("path", f"must be a folder; '{self.path}' is a file")


class CachedEmbeddings:
    """A folder of embeddings in place of a teacher, as `kdhooks cache build` fills it.

    Give it to `Teacher` as the model. No network is loaded, so that nothing but the embedding is
    known, and a view that is not in the folder is refused.
    """

    def __init__(self, folder: str | Path) -> None:
        self.options = CacheOptions.read({"path": folder}, "teacher.embeddings")
        header = read_header(self.options.path)
        self.dim: int = header["dim"]
        self.images = tuple(header["images"])  # (3, h, w)
        self.sha256: str | None = header["weights"]  # of the teacher that filled the folder
        self.probe = torch.tensor(header["probe"])[:1]
        """(1 e), the teacher's embedding of a fixed image."""

    def check_shape(self, images: tuple[int, ...]) -> None:
        """Refuse a training on images of another shape, (3, h, w)."""
        if images != self.images:
            raise KDHooksError(
                f"teacher.embeddings: '{self.options.path}' was filled with images of the shape "
                f"{self.images}; found a training on {images}; set input_shape, or fill another "
                "folder by kdhooks cache build"
            )

    def open(self) -> "TeacherCache":
        """A reader for one run."""
        return TeacherCache(self.options)

    def __call__(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b e)."""
        return self.open().start(images, self).get()[0]


class TeacherCache:
    """Looks each view up, and runs the teacher on those alone that are not there.

    Embeddings are rounded to float16 (by 0.05 % of a number at most), those of a first epoch too,
    so that on one rank later epochs repeat it to the bit. Rows that float16 can't hold are not
    kept. At max_gb, or when the disk has 2 GB left, what is there stays and nothing is added; each
    other rank may pass the bound by one batch. In memory: 16 bytes a view.

    `start` computes the keys and returns a `Later`, which waits for them and looks them up, so that
    the device can work meanwhile. New embeddings are written in the call after that.
    """

    def __init__(
        self, options: CacheOptions, teacher: Identity | None = None, probe: Tensor | None = None
    ) -> None:
        """
        teacher, probe (2 e): what the folder must have been filled with. Without them there is no
            teacher to embed what is missing, which is then refused.
        """
        self.folder, self._max_gb = options.path, options.max_gb
        self._alone = teacher is None or probe is None
        if teacher is None or probe is None:
            dim: int = read_header(self.folder)["dim"]
        else:
            check_header(self.folder, teacher, probe)
            dim = probe.shape[1]
        self._hash = ViewKeys()
        self._index = Index()
        self._parts = Parts(self.folder, dim)
        self._pending: tuple[Keys, Sent] | None = None
        self.writing = not self._alone
        self._proved = self._alone
        self._read_at = 0.0
        self.asked = self.hits = 0  # views
        self._read_on()
        log.info("teacher cache %s: %d views", self.folder, len(self._index))

    def start(
        self, images: Tensor, embed: Callable[[Tensor], Tensor]
    ) -> Later[tuple[Tensor, bool]]:
        """(b 3 h w) -> (b e), without gradient, and whether all of it is known to be finite.

        embed: the teacher itself, for the views that are not there.
        """
        return _LookUp(self, Sent(self._hash(images)), images, embed)

    def keys(self, images: Tensor) -> Keys:
        """(b 3 h w) -> (b), on the host."""
        keys: Keys = self._hash(images).cpu().numpy()
        return keys

    def finish(
        self, sent: Sent, images: Tensor, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, bool]:
        """The embeddings of the views whose keys were sent; every row was finite when written."""
        keys: Keys = sent.get().numpy()
        self.flush()
        # Pinned memory from the start, so that the device can fetch it without another copy.
        pinned = images.device.type == "cuda"
        rows = torch.empty(len(keys), self._parts.dim, dtype=torch.float16, pin_memory=pinned)
        found, _ = self.look_up(keys, rows.numpy())
        if not found.all() and self._read_on():
            found, _ = self.look_up(keys, rows.numpy())
        hits = int(np.count_nonzero(found))
        self.asked, self.hits = self.asked + len(keys), self.hits + hits
        if self._alone and hits < len(keys):
            raise KDHooksError(
                f"teacher.embeddings: '{self.folder}' must hold every view, since no network is "
                f"loaded; {len(keys) - hits} of {len(keys)} images of this batch are missing; fill "
                "it by kdhooks cache build, which embeds each picture and its mirror image, and "
                "train without other augmentations; or give the network, with this folder as its "
                "cache"
            )
        result = rows.to(images.device, non_blocking=True)
        if hits and not self._proved:
            self._prove(result, images, found, embed)
        if hits < len(keys):
            missing = np.flatnonzero(~found)
            result[_on(images.device, missing)] = self._run(images, keys, missing, embed)
        return result.float(), hits == len(keys)

    def flush(self) -> None:
        """Write what the last call added."""
        if self._pending is None:
            return
        keys, sent = self._pending
        self._pending = None
        rows: Embeddings = sent.get().numpy()
        finite = np.isfinite(rows).all(axis=1)
        if self.writing and finite.any():
            self._write(keys[finite], rows[finite])

    def look_up(
        self, keys: Keys, rows: Embeddings | None = None
    ) -> tuple[NDArray[np.bool_], Embeddings]:
        """Which are there, (b), and their rows, (b e), written into `rows` if that is given."""
        places = self._index.find(keys)
        found = places >= 0
        if rows is None:
            rows = np.zeros((len(keys), self._parts.dim), np.float16)
        parts = places >> _ROW_BITS
        for number in set(parts.tolist()) - {-1}:
            of_part = parts == number
            row = places[of_part] & (1 << _ROW_BITS) - 1
            rows[of_part], found[of_part] = self._parts[number].take(row)
        return found, rows

    def _run(
        self,
        images: Tensor,
        keys: Keys,
        missing: NDArray[np.int64],
        embed: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The missing rows, (m e) in float16, each view embedded once."""
        unique, first, back = np.unique(keys[missing], return_index=True, return_inverse=True)
        views = missing[first]
        # A power of two, so that cuDNN and torch.compile meet few sizes.
        size = min(1 << (len(views) - 1).bit_length(), len(keys))
        padded = np.resize(views, size)
        embeddings = embed(images[_on(images.device, padded)])[: len(views)].detach().half()
        self._pending = unique, Sent(embeddings)
        return embeddings[_on(images.device, back.reshape(-1))]

    def _prove(
        self,
        rows: Tensor,
        images: Tensor,
        found: NDArray[np.bool_],
        embed: Callable[[Tensor], Tensor],
    ) -> None:
        """The first batch that hits goes through the teacher all the same."""
        here = _on(images.device, np.flatnonzero(found))
        check_same(self.folder, rows[here], embed(images[here]), "its rows for the first batch")
        self._proved = True

    def _write(self, keys: Keys, rows: Embeddings) -> None:
        try:
            if self._max_gb is not None and self._parts.size(len(keys)) > self._max_gb * 1e9:
                self._stop_writing(f"holds max_gb = {self._max_gb}")
            elif shutil.disk_usage(self.folder).free < RESERVE_GB * 1e9:
                self._stop_writing(f"leaves the disk its last {RESERVE_GB} GB")
            else:
                self._add(*self._parts.append(keys, rows))
        except OSError as error:
            self._stop_writing(f"can't be written ({error.strerror})")

    def _stop_writing(self, why: str) -> None:
        self.writing = False
        log.warning(
            "teacher cache %s %s; what it holds is used on, and nothing more is added: the teacher "
            "runs on all other views in each epoch (%d of %d were found so far)",
            self.folder,
            why,
            self.hits,
            self.asked,
        )

    def _read_on(self) -> bool:
        """Whether anything came from other processes, or from earlier runs."""
        if self._read_at and time.monotonic() - self._read_at < READ_ON_EVERY:
            return False
        self._read_at = time.monotonic()
        before = len(self._index)
        for number, first, keys in self._parts.read_on():
            self._add(number, first, keys)
        return len(self._index) > before

    def _add(self, number: int, first: int, keys: Keys) -> None:
        self._index.add(keys, (number << _ROW_BITS) + first + np.arange(len(keys)))


@dataclass(frozen=True)
class _LookUp:
    cache: TeacherCache
    keys: Sent
    images: Tensor
    embed: Callable[[Tensor], Tensor]

    def get(self) -> tuple[Tensor, bool]:
        return self.cache.finish(self.keys, self.images, self.embed)


def _on(device: torch.device, array: NDArray[Any]) -> Tensor:
    """Without waiting for the device."""
    found = torch.from_numpy(array)
    if device.type == "cuda":
        found = found.pin_memory()
    return found.to(device, non_blocking=True)
