"""Class rows are read from tensors and from the files of all ranks; other content is refused."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import KDHooksError
from kdhooks.classes.rows import Rows
from tests.maps import normal


def saved(folder: Path, *sizes: int, name: str = "checkpoint_gpu_{}.pt", dim: int = 3) -> Tensor:
    """Write shards of these sizes as arcface_torch does; return all their rows."""
    rows = normal(sum(sizes), sum(sizes), dim).float()
    for rank, part in enumerate(rows.split(sizes)):
        content = {"epoch": 1, "state_dict_softmax_fc": {"weight": part.clone()}}
        torch.save(content, folder / name.format(rank))
    return rows


def opened(parts: Sequence[Tensor]) -> Rows:
    return Rows(parts, [str(number) for number in range(len(parts))])


def everything(rows: Rows) -> Tensor:
    return rows.slice(0, rows.total)


def test_rows_come_from_a_tensor() -> None:
    weight = nn.Parameter(torch.arange(6.0).reshape(3, 2))
    rows = Rows.open(weight)
    assert (rows.total, rows.dim) == (3, 2)
    assert torch.equal(everything(rows), weight)
    assert not everything(rows).requires_grad
    assert Rows.open(rows) is rows


@pytest.mark.parametrize("wrap", ["plain", "weight", "softmax_fc", "both"])
def test_rows_come_from_a_file(wrap: str, tmp_path: Path) -> None:
    rows = normal(1, 4, 3).float()
    contents: dict[str, object] = {
        "plain": rows,
        "weight": {"weight": rows},
        "softmax_fc": {"state_dict_softmax_fc": rows},
        "both": {"state_dict_softmax_fc": {"weight": rows}},
    }
    path = tmp_path / "rows.pt"
    torch.save(contents[wrap], path)
    for source in (path, str(path)):
        assert torch.equal(everything(Rows.open(source)), rows)


@pytest.mark.parametrize("sizes", [(3,), (4, 3), (2, 2, 1), (3,) * 4 + (2,) * 8, (1,) * 11])
def test_shards_come_in_the_order_of_their_ranks(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """With 11 or 12 shards, rank 10 would come before rank 2 if sorted by name."""
    expected = saved(tmp_path, *sizes)
    rows = Rows.open(tmp_path / "checkpoint_gpu_*.pt")
    assert rows.total == sum(sizes)
    assert torch.equal(everything(rows), expected)


def test_the_rank_is_the_last_number_of_a_files_name(tmp_path: Path) -> None:
    expected = saved(tmp_path, *[2] * 11, name="ms1mv3_r50_{}.pt")
    assert torch.equal(everything(Rows.open(tmp_path / "ms1mv3_r50_*.pt")), expected)


@pytest.mark.parametrize("folder", ["run[1]", "a run", "50%"])
def test_an_existing_path_is_not_a_pattern(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    expected = saved(tmp_path / folder, 3)
    found = Rows.open(tmp_path / folder / "checkpoint_gpu_0.pt")
    assert torch.equal(everything(found), expected)


def test_half_precision_rows_are_read_as_float32(tmp_path: Path) -> None:
    rows = normal(1, 4, 3).half()
    torch.save(rows, tmp_path / "rows.pt")
    found = everything(Rows.open(tmp_path / "rows.pt"))
    assert found.dtype == torch.float32
    assert torch.equal(found, rows.float())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_a_slice_runs_across_parts(sizes: list[int], data: st.DataObject) -> None:
    matrix = torch.arange(2.0 * sum(sizes)).reshape(-1, 2)
    rows = opened(matrix.split(sizes))
    start = data.draw(st.integers(0, rows.total))
    stop = data.draw(st.integers(start, rows.total))
    found = rows.slice(start, stop)
    assert found.shape == (stop - start, 2)
    assert torch.equal(found, matrix[start:stop])


def test_a_slice_is_a_copy() -> None:
    matrix = torch.ones(4, 2)
    opened([matrix]).slice(0, 4).fill_(0)
    opened([matrix]).slice(1, 2).fill_(0)
    assert matrix.all()


def test_rows_are_described_by_a_few_rows_of_all_classes(tmp_path: Path) -> None:
    rows = saved(tmp_path, 500, 499)
    found = Rows.open(tmp_path / "checkpoint_gpu_*.pt").described()
    assert found.startswith("999 class rows of width 3, 250 of them with the digest ")
    assert Rows.open(rows).described() == found
    end = torch.cat([rows[:-9], rows[-9:] + 1])
    for other in (rows.flip(0), rows[:-1], rows[:, :2], rows.half(), end):
        assert Rows.open(other).described() != found


@pytest.mark.parametrize("size", [1, 2, 3, 65536])
def test_chunks_cover_all_rows_at_unit_length(size: int) -> None:
    matrix = normal(1, 7, 3).float()
    chunks = list(opened(matrix.split([4, 3])).chunks(size))
    assert [offset for offset, _ in chunks] == list(range(0, 7, size))
    assert_close(torch.cat([rows for _, rows in chunks]), F.normalize(matrix))


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 9), st.floats(0.01, 100))
def test_nearest_is_the_row_of_largest_cosine(seed: int, c: int, length: float) -> None:
    matrix, embedding = 3 * normal(seed, c, 4).float(), length * normal(seed + 1, 6, 4).float()
    cosines = F.cosine_similarity(embedding[:, None], matrix[None], dim=2)
    found = opened(matrix.split(2)).nearest(embedding)[1]
    assert_close(cosines.gather(1, found[:, None])[:, 0], cosines.amax(dim=1))
    own = opened(matrix.split(2)).nearest(matrix)[1]
    assert torch.equal(own, torch.arange(c))


def test_nearest_searches_beyond_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = normal(3, 9, 4).float()
    rows = opened(matrix.split([5, 4]))
    few = rows.chunks(2)
    monkeypatch.setattr(rows, "chunks", lambda: few)
    assert torch.equal(rows.nearest(matrix.flip(0))[1], torch.arange(8, -1, -1))


def test_no_matching_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=r"no file matches '.*gone_\*\.pt'; name a tensor file"):
        Rows.open(tmp_path / "gone_*.pt")


@pytest.mark.parametrize("missing", [0, 1, 9])
def test_a_gap_in_the_ranks_is_refused(missing: int, tmp_path: Path) -> None:
    saved(tmp_path, *[1] * 11)
    (tmp_path / f"checkpoint_gpu_{missing}.pt").unlink()
    with pytest.raises(KDHooksError, match=r"numbered 0 to 9 without a gap; found checkpoint_gpu_"):
        Rows.open(tmp_path / "checkpoint_gpu_*.pt")


def test_the_same_rank_of_two_runs_is_refused(tmp_path: Path) -> None:
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        saved(tmp_path / run, 2)
    with pytest.raises(KDHooksError, match="numbered 0 to 1 without a gap"):
        Rows.open(tmp_path / "*" / "checkpoint_gpu_*.pt")


def test_files_without_a_number_are_no_shards(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(torch.ones(2, 3), tmp_path / name)
    with pytest.raises(KDHooksError, match=r"numbered 0 to 1 without a gap; found a\.pt, b\.pt"):
        Rows.open(tmp_path / "*.pt")


@pytest.mark.parametrize("sizes", [(3, 4), (4, 2), (3, 3, 1), (2, 3, 2)])
def test_sizes_that_no_run_writes_are_refused(sizes: tuple[int, ...], tmp_path: Path) -> None:
    saved(tmp_path, *sizes)
    with pytest.raises(KDHooksError, match=rf"differ by one row.*_0\.pt \({sizes[0]}, 3\), "):
        Rows.open(tmp_path / "checkpoint_gpu_*.pt")


def test_widths_of_two_runs_are_refused(tmp_path: Path) -> None:
    torch.save(torch.ones(2, 3), tmp_path / "rows_0.pt")
    torch.save(torch.ones(2, 4), tmp_path / "rows_1.pt")
    with pytest.raises(KDHooksError, match=r"found rows_0\.pt \(2, 3\), rows_1\.pt \(2, 4\)"):
        Rows.open(tmp_path / "rows_*.pt")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.pt").write_text("not a tensor")
    with pytest.raises(KDHooksError, match=r"notes\.pt' is a text file; name a file of tensors"):
        Rows.open(tmp_path / "notes.pt")


@pytest.mark.parametrize("content", [{"fc": torch.ones(2, 3)}, [1, 2], {"weight": 3}])
def test_a_file_without_rows_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(KDHooksError, match=r"model\.pt' holds no rows; expected a tensor \(c e\)"):
        Rows.open(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (torch.ones(3), r"shape \(3,\) and dtype torch\.float32"),
        (torch.ones(2, 3, 1), r"shape \(2, 3, 1\)"),
        (torch.ones(2, 3, dtype=torch.long), r"dtype torch\.int64"),
        (torch.ones(0, 3), r"shape \(0, 3\)"),
    ],
)
def test_rows_must_be_a_floating_point_matrix(rows: Tensor, found: str, tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=rf"matrix \(c e\); the tensor given has .*{found}"):
        Rows.open(rows)
    torch.save(rows, tmp_path / "rows.pt")
    with pytest.raises(KDHooksError, match=rf"rows\.pt' has .*{found}"):
        Rows.open(tmp_path / "rows.pt")
