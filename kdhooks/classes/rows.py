"""The classifier rows of a teacher, read from tensors or files."""

import glob
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks.classes.one_run import alike, backbone_of, check_one_run, same
from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks.progress import progress
from kdhooks.tensor_files import named_tensors, read_tensors, user_path

log = logging.getLogger("kdhooks")

_SUBJECT = "teacher classifier"
_CHUNK = 8192  # rows to read at a time
_COMPARED = 256  # rows, at most, that ranks compare
_LATER_SHARD = re.compile(r"checkpoint_gpu_[1-9]\d*\.pt")


class Rows:
    """The rows (c e) of a teacher's classifier, or its class means; read by slice.

    Files are memory-mapped, so that a rank reads only the classes that it needs.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        names: Sequence[str],
        backbone: Mapping[str, Tensor] | None = None,
    ) -> None:
        """
        names: the names of the parts, for errors.
        backbone: the weights that were trained with these rows, if their file contains them.
        """
        self._parts, self._names = list(parts), list(names)
        self.backbone = backbone or {}
        self.total = sum(len(part) for part in self._parts)
        self.dim = int(self._parts[0].shape[1])

    @classmethod
    def open(
        cls, source: "Tensor | str | Path | Rows", inside: Mapping[str, Tensor] | None = None
    ) -> "Rows":
        """Rows from a tensor (c e), a file, or a glob of `checkpoint_gpu_{rank}.pt` shards.

        inside: the tensors of the teacher, one of which `source` may name.
        """
        if isinstance(source, Rows):
            return source
        if isinstance(source, Tensor):
            return cls([_checked(source, "the tensor given")], ["the tensor given"])
        if not isinstance(source, str | Path):
            raise KDHooksError(
                f"{_SUBJECT} must be a tensor (c e), a path, or a pattern like "
                f"checkpoint_gpu_*.pt; found {type(source).__name__}"
            )
        paths = _in_rank_order(str(source))
        if not paths:
            name, rows = _inside(str(source), inside or {})
            return cls([_checked(rows, f"'{name}'")], [f"'{name}'"])
        contents = [read_tensors(path, _SUBJECT, mmap=True) for path in paths]
        names = [f"'{path}'" for path in paths]
        parts = [_checked(_rows_of(*pair), pair[1]) for pair in zip(contents, names, strict=True)]
        check_one_run(parts, contents, paths)
        return cls(parts, names, backbone_of(contents[0]))

    def trained_with(self, network: Mapping[str, Tensor]) -> bool | None:
        """Whether the backbone in the rows' own file has these weights; None without a backbone."""
        return alike(self.backbone, network) if self.backbone else None

    def slice(self, start: int, stop: int) -> Tensor:
        """(stop-start e): a copy in float32. Raises KDHooksError for rows that can't be used."""
        found, offset = torch.empty(max(stop - start, 0), self.dim), 0
        for part, name in zip(self._parts, self._names, strict=True):
            low, high = max(start, offset), min(stop, offset + len(part))
            for first in progress(range(low, high, _CHUNK), "reading class rows"):
                last = min(first + _CHUNK, high)
                read = part[first - offset : last - offset].float()
                _check_numbers(read, first, name)
                found[first - start : last - start] = read
            offset += len(part)
        return found

    def described(self) -> str:
        """A line that is the same on ranks with the same rows.

        It holds a digest of a few rows, spread evenly over all classes, so that each rank can read
        them from its own files.
        """
        numbers = range(0, self.total, -(-self.total // _COMPARED))
        hashed = hashlib.blake2b(digest_size=8)
        for number in numbers:
            hashed.update(self.slice(number, number + 1).numpy().data)
        return (
            f"{self.total} class rows of width {self.dim}, {len(numbers)} of them with the digest "
            f"{hashed.hexdigest()}"
        )

    def chunks(self, size: int = _CHUNK) -> Iterator[tuple[int, Tensor]]:
        """(offset, (<=size e)) over all rows, at unit length."""
        for start in range(0, self.total, size):
            yield start, F.normalize(self.slice(start, min(start + size, self.total)))

    def nearest(
        self, embedding: Tensor, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(b e) -> (b), (b): the largest cosine with the row of a class, and that class.

        start, stop: the range of the classes that are compared; by default all.
        """
        best = embedding.new_full((len(embedding),), -2.0)
        winner = torch.zeros(len(embedding), dtype=torch.long, device=embedding.device)
        unit, stop = F.normalize(embedding), self.total if stop is None else stop
        for first in range(start, stop, _CHUNK):
            rows = F.normalize(self.slice(first, min(first + _CHUNK, stop)))
            value, index = (unit @ rows.to(unit).T).max(dim=1)
            winner = torch.where(value > best, index + first, winner)
            best = torch.maximum(best, value)
        return best, winner


def _check_numbers(rows: Tensor, first: int, name: str) -> None:
    """Raise unless all rows are finite and not zero. first: the class of the first row."""
    lengths = rows.abs().amax(dim=1)
    wrong = ~torch.isfinite(rows).all(dim=1) | (lengths == 0)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        found = "zero" if lengths[place] == 0 else "not finite (nan or inf)"
        raise KDHooksError(
            f"{_SUBJECT}: rows must be finite and not zero; that of class {first + place} in "
            f"{name} is {found}; take an earlier checkpoint, or class means made with "
            "kdhooks.class_means"
        )


def _in_rank_order(pattern: str) -> list[Path]:
    literal = user_path(pattern, _SUBJECT)
    if literal.is_file():  # whatever its name means as a glob
        _warn_of_others(literal)
        return [literal]
    paths = [Path(p) for p in glob.glob(str(literal))]
    if len(paths) <= 1 and not any(_LATER_SHARD.fullmatch(path.name) for path in paths):
        return paths
    ranks = {_rank(path): path for path in paths}
    forms = {re.sub(r"\d+(?=\D*$)", "0", path.name) for path in paths}
    if sorted(ranks) != list(range(len(paths))) or len(forms) > 1:
        found = ", ".join(path.name for path in sorted(paths))
        raise KDHooksError(
            f"{_SUBJECT}: shards must be named alike and numbered 0 to {len(paths) - 1} without a "
            f"gap; found {found}"
        )
    return [ranks[rank] for rank in range(len(paths))]


def _rank(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1


def _warn_of_others(path: Path) -> None:
    """Warn if a file is one of several shards, which holds only a part of the classes."""
    if path.name == "checkpoint_gpu_0.pt" and path.with_name("checkpoint_gpu_1.pt").exists():
        log.warning(
            "%s: '%s' is one of several shards in its folder, and only its classes are read; name "
            "checkpoint_gpu_*.pt for all of them",
            _SUBJECT,
            path,
        )


def _inside(source: str, tensors: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """The teacher's tensor of that name; the names of outer dictionaries may be left out."""
    key = Path(source).name
    ending = [name for name in tensors if name.endswith(f".{key}")]
    found = [key] if key in tensors else ending
    if len(found) == 1 or (found and all(same(tensors[found[0]], tensors[n]) for n in found)):
        return found[0], tensors[found[0]]
    if found:
        raise KDHooksError(
            f"{_SUBJECT}: the teacher holds several tensors named '{key}', like "
            f"{listed(found[:4])}; write out the name of the one that is meant"
        )
    matrices = [name for name, tensor in tensors.items() if tensor.ndim == 2]
    folder = user_path(source, _SUBJECT).parent
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    no_weight = f", and the teacher has no weight '{key}'" if matrices else ""
    or_weight = f", or a weight of the teacher, as one of {listed(matrices[-6:])}"
    raise KDHooksError(
        f"{_SUBJECT}: no file matches '{source}'{no_weight}; {near_miss(key, [*files, *matrices])}"
        "name a tensor file (c e), or the trainer's shards as …/checkpoint_gpu_*.pt "
        f"(config.save_all_states writes them){or_weight if matrices else ''}"
    )


def _rows_of(content: object, where: str) -> Tensor:
    found = content
    for key in ("state_dict_softmax_fc", "weight"):
        if isinstance(found, Mapping):
            found = found.get(key, found)
    if not isinstance(found, Tensor):
        names = [name for name, tensor in named_tensors(content) if tensor.ndim == 2]
        hint = (
            f"; it has the matrices {listed(names[-6:])}: if it is the teacher's own checkpoint, "
            "name one of them as teacher.classifier"
            if names
            else ""
        )
        raise KDHooksError(
            f"{_SUBJECT}: {where} holds no rows; expected a tensor (c e), a state dict with "
            f"'weight', or arcface_torch's checkpoint_gpu_{{rank}}.pt{hint}"
        )
    return found


def _checked(rows: Tensor, where: str) -> Tensor:
    if rows.is_nested or rows.is_meta or rows.layout is not torch.strided:
        raise KDHooksError(
            f"{_SUBJECT}: rows must be a plain tensor (c e); {where} is nested, sparse or without "
            "numbers (meta); save its dense form"
        )
    if rows.ndim != 2 or not rows.is_floating_point() or not rows.numel():
        raise KDHooksError(
            f"{_SUBJECT}: rows must be a floating point matrix (c e); {where} has shape "
            f"{tuple(rows.shape)} and dtype {rows.dtype}"
        )
    return rows.detach()
