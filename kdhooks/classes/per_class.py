"""Tables with a row for each class: this rank's part of them, and their form in checkpoints."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdhooks.classes.ranks import answers
from kdhooks.classes.splits import ClassSplit
from kdhooks.errors import KDHooksError, listed
from kdhooks.names import full_name

_LARGEST = 2**63  # an int64 is less


class PerClass(nn.Module):
    """A loss, or another module, with tables that have a row for each class of `split`.

    Training changes the learnt tables; a checkpoint holds this rank's rows of them. Frozen tables
    stay as they are; a checkpoint holds a digest of them, which is compared when it is loaded.
    Frozen tables are not buffers, because DistributedDataParallel would make buffers equal on all
    ranks.
    """

    def __init__(self, split: ClassSplit, owner: str) -> None:
        """owner: the first word of each error."""
        super().__init__()
        self.split, self._owner = split, owner
        self._learnt: list[str] = []
        self._frozen: list[str] = []
        self._digests: dict[str, int] = {}  # by name; see `share_digests`
        self.register_load_state_dict_pre_hook(_fit)  # type: ignore[no-untyped-call]

    def keep(self, name: str, rows: Tensor) -> None:
        """Add a learnt table (c …) of this rank's classes."""
        self._learnt.append(name)
        self.register_buffer(name, rows)

    def keep_rows(self, name: str, rows: Tensor, dtype: torch.dtype, *, unit: bool = False) -> None:
        """Add class rows (c e) as a frozen table, in this dtype, and a digest of them.

        unit: normalise the rows in place first.
        """
        self.recognise(name, rows)
        if unit:
            rows = rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(1e-12))
        self.keep_frozen(name, rows.to(dtype))

    def recognise(self, name: str, rows: Tensor) -> None:
        """Keep a digest of rows (c e) from which tables follow: a resumed run must have the same.

        The digest is of the rows as they were read, since rounding depends on the processor.
        """
        self._digests[name] = digest(rows, self.split.start)

    def keep_frozen(self, name: str, table: Tensor) -> None:
        """Add a frozen table (c …), which follows from rows with a digest."""
        self._frozen.append(name)
        setattr(self, name, table)

    def buffers_by_rank(self) -> set[str]:
        """The learnt tables, which each rank updates from the batches of all ranks, so that nobody
        has to average them.
        """
        return {*self._learnt}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PerClass":
        """Apply `fn` to the frozen tables as well; those in float16 keep their dtype.

        Learnt tables are not converted to less than float32, because the change of a row in one
        step can be too small for bfloat16.
        """
        learnt = {name: getattr(self, name) for name in self._learnt}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in learnt.items():
            now = getattr(self, name)
            if now.is_floating_point() and now.dtype.itemsize < 4:
                setattr(self, name, before.to(now.device))
        for name in self._frozen:
            table: Tensor = getattr(self, name)
            moved = fn(table)
            setattr(self, name, moved.half() if table.dtype == torch.float16 else moved)
        return self

    def tables(self) -> Iterator[Tensor]:
        """The learnt and the frozen tables."""
        for name in (*self._learnt, *self._frozen):
            yield getattr(self, name)

    def get_extra_state(self) -> Tensor:
        """The bounds of the classes in the state, the number of all classes, and the digests."""
        split = self.split if self._learnt else ClassSplit.whole(self.split.total)
        return torch.tensor([split.start, split.stop, split.total, *self._digests.values()])

    def set_extra_state(self, state: Tensor) -> None:
        """`_fit` has already compared the state with this module."""


def digest(rows: Tensor, start: int) -> int:
    """(c e), the class of the first row -> the digest: a sum, so that those of parts add up."""
    found = 0
    for number, row in enumerate(rows.contiguous().numpy(), start):
        hashed = hashlib.blake2b(row.data, digest_size=8, salt=number.to_bytes(8, "little"))
        found += int.from_bytes(hashed.digest(), "little")
    return found % _LARGEST


def share_digests(module: nn.Module) -> None:
    """Replace the digest of each split table by that of all ranks' rows.

    All ranks call this together. Raises KDHooksError unless each class is on exactly one rank.
    """
    split = [one for _, one in _split_inside(module)]
    of_ranks = answers([(one.split, one._digests) for one in split])
    for one, parts in zip(split, zip(*of_ranks, strict=True), strict=True):
        assert one.split.group is not None
        sharing = [parts[rank] for rank in dist.get_process_group_ranks(one.split.group)]
        _check_splits(one._owner, [split for split, _ in sharing])
        one._digests = {
            name: sum(digests[name] for _, digests in sharing) % _LARGEST for name in one._digests
        }


def _check_splits(owner: str, splits: Sequence[ClassSplit]) -> None:
    """Raise unless these splits, one for each rank, cover all classes once."""
    totals = {split.total for split in splits}
    bounds = sorted((split.start, split.stop) for split in splits)
    starts, stops = [start for start, _ in bounds], [stop for _, stop in bounds]
    contiguous = [0, *stops] == [*starts, splits[0].total]
    if len(totals) > 1 or not contiguous or not all(map(len, splits)):
        found = listed(
            f"{split.start} to {split.stop - 1} of {split.total}" if len(split) else "none"
            for split in splits
        )
        raise KDHooksError(
            f"{owner}: the ranks must share the same classes, each rank at least one, and each "
            f"class must be on one rank; found {found}, by rank; give each rank's ClassShard its "
            "own rows and the number of their first class, and use no more ranks than classes"
        )


def described_tables(module: nn.Module) -> list[str]:
    """Lines that are the same on ranks with the same classes."""
    return [
        f"{one._owner}: {one.split.total} classes"
        + "".join(f", {name} with the digest {found:016x}" for name, found in one._digests.items())
        for one in module.modules()
        if isinstance(one, PerClass)
    ]


def is_split(module: nn.Module) -> bool:
    """Whether the module has tables that are split over ranks."""
    return any(True for _ in _split_inside(module))


def _split_inside(module: nn.Module) -> Iterator[tuple[str, PerClass]]:
    """The names and modules whose classes are split over ranks."""
    for prefix, one in module.named_modules():
        if isinstance(one, PerClass) and one.split.group is not None:
            yield prefix, one


def whole_tables(module: nn.Module) -> dict[str, Tensor]:
    """The entries of a state dict for split tables, with all classes.

    All ranks call this together.
    """
    for one in module.modules():
        if isinstance(one, PerClass) and one._learnt and one.split.is_part_alone:
            raise KDHooksError(
                f"{one._owner}: a copy has the classes {one.split.start} to {one.split.stop - 1} "
                "alone, and does not know the ranks that have the others; ask the Distiller that "
                "it was copied from"
            )
    found: dict[str, Tensor] = {}
    for prefix, one in _split_inside(module):
        for name in one._learnt:
            found[full_name(prefix, name)] = _whole(getattr(one, name), one.split)
        state = one.get_extra_state()
        state[:2] = torch.tensor([0, one.split.total])
        found[full_name(prefix, "_extra_state")] = state
    return found


def _whole(rows: Tensor, split: ClassSplit) -> Tensor:
    """(c …) of this rank -> (c …) of all classes, on the CPU; sends one rank's rows at a time."""
    group = split.group
    assert group is not None
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([len(split)], device=rows.device), group)
    parts = []
    for rank, size in enumerate(sizes):
        part = (
            rows.contiguous()
            if rank == group.rank()
            else rows.new_empty(int(size), *rows.shape[1:])
        )
        dist.broadcast(part, dist.get_global_rank(group, rank), group)
        parts.append(part.cpu())
    return torch.cat(parts)


def _fit(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """A hook: compare the digests, and cut this rank's classes out of the state."""
    assert isinstance(module, PerClass)
    saved = state.get(f"{prefix}_extra_state")
    if saved is None:
        return  # load_state_dict says so, if it is strict
    own, owner = module.split, module._owner
    start, stop, total, *digests = (int(number) for number in saved)
    if total != own.total:
        raise KDHooksError(
            f"{owner}: this state was saved with {total} classes, and there are {own.total}; "
            "resume with the classes that it was trained on"
        )
    ours = list(module._digests.values())
    if digests != ours:
        raise KDHooksError(
            f"{owner}: the teacher's class rows must be those of the run that is resumed; found "
            "others; name the same file, or start a new run"
        )
    if not start <= own.start <= own.stop <= stop:
        raise KDHooksError(
            f"{owner}: this state holds the classes {start} to {stop - 1}, and this rank has those "
            f"from {own.start} to {own.stop - 1}; resume with as many ranks as before, each from "
            "its own state, or save kd.whole_state_dict(), which any number of ranks can load"
        )
    for name in module._learnt:
        if (rows := state.get(f"{prefix}{name}")) is not None:
            state[f"{prefix}{name}"] = rows[own.start - start : own.stop - start]
