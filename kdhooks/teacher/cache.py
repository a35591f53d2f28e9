"""A folder of teacher embeddings, which are looked up by the content of the images."""

import atexit
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

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

READ_ON_EVERY = 10.0  # seconds between two reads of the records that other processes wrote
RESERVE_GB = 2.0  # disk space that is left for the checkpoints of the training
_ROW_BITS = 40  # the low bits of a place are the row's number, the others the part's number


class CacheOptions(Options, subject="teacher.cache"):
    """A folder of the teacher's embeddings."""

    path: Path = option(REQUIRED, "The folder; it is created if it does not exist.")
    max_gb: float | None = option(
        None, "The largest total size of its files; by default no limit.", above=0, unit="GB"
    )

    def check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise self.refused("path", f"must be a folder; '{self.path}' is a file")


class CachedEmbeddings:
    """A folder of embeddings, filled by `kdhooks cache build`, that replaces the teacher's network.

    Pass it to `Teacher` as the model. No network is loaded, so only the embedding is available, and
    a view that is not in the folder raises an error.
    """

    def __init__(self, folder: str | Path) -> None:
        self.options = CacheOptions.read({"path": folder}, "teacher.embeddings")
        header = read_header(self.options.path)
        self.dim: int = header["dim"]
        self.images = tuple(header["images"])  # (3, h, w)
        self.sha256: str | None = header["weights"]  # those of the teacher that filled the folder
        self.probe = torch.tensor(header["probe"])[:1]
        """(1 e), the teacher's embedding of a fixed image."""

    def check_shape(self, images: tuple[int, ...]) -> None:
        """Check that the shape of the training images, (3, h, w), is that of the folder's."""
        if images != self.images:
            raise KDHooksError(
                f"teacher.embeddings: '{self.options.path}' was filled with images of the shape "
                f"{self.images}; found training images of {images}; set input_shape, or fill "
                "another folder with kdhooks cache build"
            )

    def open(self) -> "TeacherCache":
        """Return a reader for one run."""
        return TeacherCache(self.options)

    def __call__(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b e)."""
        return self.open().start(images, self).get()[0]


class TeacherCache:
    """Looks up the embedding of each view, and runs the teacher only on the views that are missing.

    Embeddings are rounded to float16, which changes a number by at most 0.05 %. The first epoch
    uses the rounded numbers too, so that on one rank later epochs repeat it bit for bit. Rows that
    float16 cannot hold are not stored. When the files reach max_gb, or the disk has only 2 GB free,
    the cache keeps its content and adds nothing; each other rank may exceed the limit by one batch.
    The index takes 16 bytes of memory per view.

    `start` computes the keys and returns a `Later`, which waits for the keys and looks them up, so
    that the device can work in the meantime. The next call writes the new embeddings. Those of the
    last call are written by `flush`, when the folder is opened again, or at the program's end.
    """

    _pending: tuple[Keys, Sent] | None = None

    def __init__(
        self, options: CacheOptions, teacher: Identity | None = None, probe: Tensor | None = None
    ) -> None:
        """
        teacher, probe (2 e): identity of the teacher that must have filled the folder, and its
            embeddings of two fixed images. Without them no teacher is available, and a missing
            view raises an error.
        """
        self.folder, self._max_gb = options.path, options.max_gb
        self._process = os.getpid()
        self._alone = teacher is None or probe is None
        if teacher is None or probe is None:
            dim: int = read_header(self.folder)["dim"]
        else:
            check_header(self.folder, teacher, probe)
            dim = probe.shape[1]
        self._hash = ViewKeys()
        self._index = Index()
        self._parts = Parts(self.folder, dim)
        self.writing = not self._alone
        self._proved = self._alone
        self._read_at = 0.0
        self.asked = self.hits = 0  # views
        _flush_all()
        self._read_on()
        _open.add(self)
        log.info("teacher cache %s: %d views", self.folder, len(self._index))

    def __del__(self) -> None:
        self.flush()

    def start(
        self, images: Tensor, embed: Callable[[Tensor], Tensor]
    ) -> Later[tuple[Tensor, bool]]:
        """(b 3 h w) -> (b e), without gradient, and whether all of it is known to be finite.

        embed: runs the teacher, for the views that are missing.
        """
        return _LookUp(self, Sent(self._hash(images)), images, embed)

    def keys(self, images: Tensor) -> Keys:
        """(b 3 h w) -> (b), on the host."""
        keys: Keys = self._hash(images).cpu().numpy()
        return keys

    def finish(
        self, sent: Sent, images: Tensor, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, bool]:
        """Return the embeddings of the views whose keys were sent, as `start` describes them.

        Every stored row was finite when it was written.
        """
        keys: Keys = sent.get().numpy()
        self.flush()
        # The rows are read into pinned memory, from which the device copies them directly.
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
                "it with kdhooks cache build, which embeds each picture and its mirror image, and "
                "train without other augmentations; or specify the network, with this folder as "
                "its cache"
            )
        result = rows.to(images.device, non_blocking=True)
        if hits and not self._proved:
            self._prove(result, images, found, embed)
        if hits < len(keys):
            missing = np.flatnonzero(~found)
            result[_on(images.device, missing)] = self._run(images, keys, missing, embed)
        return result.float(), hits == len(keys)

    def flush(self) -> None:
        """Write the embeddings that the last call computed."""
        if self._pending is None or self._process != os.getpid():  # a fork has a copy of them
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
        """Return which keys are in the cache, (b), and their embeddings, (b e).

        rows: where to write the embeddings; by default a new array.
        """
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
        """Return the missing embeddings, (m e) in float16; equal views are embedded once."""
        unique, first, back = np.unique(keys[missing], return_index=True, return_inverse=True)
        views = missing[first]
        # A power of two, so that cuDNN and torch.compile see few batch sizes.
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
        """Compare the first stored rows with the teacher's output, to detect another teacher."""
        here = _on(images.device, np.flatnonzero(found))
        check_same(self.folder, rows[here], embed(images[here]), "its rows for the first batch")
        self._proved = True

    def _write(self, keys: Keys, rows: Embeddings) -> None:
        try:
            if self._max_gb is not None and self._parts.size(len(keys)) > self._max_gb * 1e9:
                self._stop_writing(f"has reached max_gb = {self._max_gb}")
            elif shutil.disk_usage(self.folder).free < RESERVE_GB * 1e9:
                self._stop_writing(f"is on a disk with less than {RESERVE_GB} GB free")
            else:
                self._add(*self._parts.append(keys, rows))
        except OSError as error:
            self._stop_writing(f"can't be written ({error.strerror})")

    def _stop_writing(self, why: str) -> None:
        self.writing = False
        log.warning(
            "teacher cache %s %s; its content is still used, but nothing more is added: the "
            "teacher runs on all other views in each epoch (%d of %d views were found so far)",
            self.folder,
            why,
            self.hits,
            self.asked,
        )

    def _read_on(self) -> bool:
        """Read the records of other processes and earlier runs; return whether there are new ones.

        READ_ON_EVERY limits how often the folder is read.
        """
        if self._read_at and time.monotonic() - self._read_at < READ_ON_EVERY:
            return False
        self._read_at = time.monotonic()
        before = len(self._index)
        for number, first, keys in self._parts.read_on():
            self._add(number, first, keys)
        return len(self._index) > before

    def _add(self, number: int, first: int, keys: Keys) -> None:
        self._index.add(keys, (number << _ROW_BITS) + first + np.arange(len(keys)))


_open: "WeakSet[TeacherCache]" = WeakSet()


@atexit.register
def _flush_all() -> None:
    """Write what the caches of this process still hold; many trainings end without a last call."""
    for cache in list(_open):
        cache.flush()


@dataclass(frozen=True)
class _LookUp:
    cache: TeacherCache
    keys: Sent
    images: Tensor
    embed: Callable[[Tensor], Tensor]

    def get(self) -> tuple[Tensor, bool]:
        return self.cache.finish(self.keys, self.images, self.embed)


def _on(device: torch.device, array: NDArray[Any]) -> Tensor:
    """Copy an array to the device without waiting for it."""
    found = torch.from_numpy(array)
    if device.type == "cuda":
        found = found.pin_memory()
    return found.to(device, non_blocking=True)
