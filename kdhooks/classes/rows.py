"""The classifier rows of a teacher, read from tensors or files."""

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks.errors import KDHooksError


class Rows:
    """The rows (c e) of a teacher's classifier, or its class means; read by slice.

    Files are memory-mapped, so a rank that needs only its own classes never holds the others.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = list(parts)
        self.total = sum(len(part) for part in self._parts)
        self.dim = int(self._parts[0].shape[1])

    @classmethod
    def open(cls, source: "Tensor | str | Path | Rows") -> "Rows":
        """From a tensor (c e), a file, or a glob of `checkpoint_gpu_{rank}.pt` shards."""
        if isinstance(source, Rows):
            return source
        if isinstance(source, Tensor):
            return cls([_checked(source, "the tensor given")])
        paths = _in_rank_order(str(source))
        parts = [_read(path) for path in paths]
        _check_one_run(parts, paths)
        return cls(parts)

    def slice(self, start: int, stop: int) -> Tensor:
        """(stop-start e) in float32, a copy."""
        pieces, offset = [], 0
        for part in self._parts:
            low, high = max(start - offset, 0), min(stop - offset, len(part))
            if low < high:
                pieces.append(part[low:high].float())
            offset += len(part)
        return torch.cat(pieces) if pieces else torch.empty(0, self.dim)

    def chunks(self, size: int = 65536) -> Iterator[tuple[int, Tensor]]:
        """(offset, (<=size e)) over all rows, unit length."""
        for start in range(0, self.total, size):
            yield start, F.normalize(self.slice(start, min(start + size, self.total)))

    def nearest(self, embedding: Tensor) -> Tensor:
        """(b e) -> (b): the class whose row has the largest cosine with each embedding."""
        best = embedding.new_full((len(embedding),), -2.0)
        winner = torch.zeros(len(embedding), dtype=torch.long, device=embedding.device)
        unit = F.normalize(embedding)
        for start, rows in self.chunks():
            value, index = (unit @ rows.to(unit).T).max(dim=1)
            winner = torch.where(value > best, index + start, winner)
            best = torch.maximum(best, value)
        return winner


def _in_rank_order(pattern: str) -> list[Path]:
    literal = Path(pattern).expanduser()
    if literal.is_file():  # whatever its name means as a glob
        return [literal]
    paths = [Path(p) for p in glob.glob(str(literal))]
    if not paths:
        raise KDHooksError(
            f"teacher classifier: no file matches '{pattern}'; name a tensor file (c e), or the "
            "trainer's shards as …/checkpoint_gpu_*.pt (config.save_all_states writes them)"
        )
    if len(paths) == 1:
        return paths
    ranks = {_rank(path): path for path in paths}
    if sorted(ranks) != list(range(len(paths))):
        found = ", ".join(path.name for path in sorted(paths))
        raise KDHooksError(
            f"teacher classifier: shards must be numbered 0 to {len(paths) - 1} without a gap; "
            f"found {found}"
        )
    return [ranks[rank] for rank in range(len(paths))]


def _rank(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1


def _read(path: Path) -> Tensor:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise KDHooksError(
            f"teacher classifier: '{path}' is not a file that torch.save wrote ({error})"
        ) from error
    for key in ("state_dict_softmax_fc", "weight"):
        if isinstance(content, dict):
            content = content.get(key, content)
    if not isinstance(content, Tensor):
        raise KDHooksError(
            f"teacher classifier: '{path}' holds no rows; expected a tensor (c e), a state dict "
            "with 'weight', or arcface_torch's checkpoint_gpu_{rank}.pt"
        )
    return _checked(content, f"'{path}'")


def _checked(rows: Tensor, where: str) -> Tensor:
    if rows.ndim != 2 or not rows.is_floating_point() or not len(rows):
        raise KDHooksError(
            f"teacher classifier: rows must be a floating point matrix (c e); {where} has shape "
            f"{tuple(rows.shape)} and dtype {rows.dtype}"
        )
    return rows.detach()


def _check_one_run(parts: Sequence[Tensor], paths: Sequence[Path]) -> None:
    """Contiguous splits of one classifier: the first ranks own one row more, widths agree."""
    sizes = [len(part) for part in parts]
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1 or sizes != sorted(sizes, reverse=True) or sizes[0] - sizes[-1] > 1:
        shapes = ", ".join(
            f"{path.name} {tuple(part.shape)}" for path, part in zip(paths, parts, strict=True)
        )
        raise KDHooksError(
            f"teacher classifier: shards of one run differ by one row at most; found {shapes}"
        )
