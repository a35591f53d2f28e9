"""Class rows are read from shards, from other files, and from the teacher's own checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import KDHooksError, Teacher, build
from kdhooks.classes.rows import Rows
from kdhooks.first_step import check_class_order
from kdhooks.probing import probe_teacher
from kdhooks.recipe import Recipe, build_teacher
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.maps import normal
from tests.small_distiller import teacher_network

Log = pytest.LogCaptureFixture
Content = dict[str, Any]


def shards(folder: Path, count: int = 3, **changes: Callable[[int], Any]) -> str:
    """Write shards of one run like arcface_torch, with two classes each; return their pattern."""
    rows = normal(5, 2 * count, 12).float()
    for rank in range(count):
        content: Content = {
            "epoch": 3,
            "global_step": 70,
            "state_dict_backbone": dict(teacher_network().state_dict()),
            "state_dict_softmax_fc": {"weight": rows[2 * rank : 2 * rank + 2].clone()},
        }
        content |= {key: change(rank) for key, change in changes.items()}
        torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
    return str(folder / "checkpoint_gpu_*.pt")


def other_weights(rank: int) -> dict[str, Tensor]:
    state = {key: value.clone() for key, value in teacher_network().state_dict().items()}
    if rank == 2:
        state["fc.weight"] += 0.01
    return state


def other_shapes(rank: int) -> dict[str, Tensor]:
    state = dict(teacher_network().state_dict())
    if rank == 2:
        state["fc.bias"] = torch.cat([state["fc.bias"], state["fc.bias"]])
    return state


def other_names(rank: int) -> dict[str, Tensor]:
    return {**teacher_network().state_dict(), **({"fc.scale": torch.ones(1)} if rank == 2 else {})}


def compiled(rank: int) -> dict[str, Tensor]:
    """Only the later ranks compiled their backbone; each one stored a number of its own."""
    prefix = "_orig_mod." if rank else ""
    state = {f"{prefix}{key}": value for key, value in teacher_network().state_dict().items()}
    return {**state, "kdhooks.number": torch.tensor(rank)}


def own_statistics(rank: int) -> dict[str, Tensor]:
    """With DistributedDataParallel(broadcast_buffers=False), each rank has its own statistics."""
    state = {key: value.clone() for key, value in teacher_network().state_dict().items()}
    state["features.running_mean"] += rank
    return {f"module.{key}": value for key, value in state.items()}


# --- shards ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"state_dict_backbone": own_statistics},
        {"state_dict_backbone": compiled},
        {"global_step": lambda rank: torch.tensor([70, 71])},
    ],
)
def test_shards_of_one_run_are_read(changes: Content, tmp_path: Path) -> None:
    rows = Rows.open(shards(tmp_path, **changes))
    assert torch.equal(rows.slice(0, 6), normal(5, 6, 12).float())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"global_step": lambda rank: 70 - (rank == 2)}, "their global_step differs: .*_2.pt 69"),
        ({"global_step": lambda rank: torch.tensor([70, rank])}, "their global_step differs"),
        ({"global_step": lambda rank: torch.tensor(70) if rank else 70}, "their global_step dif"),
        ({"epoch": lambda rank: rank}, "their epoch differs: checkpoint_gpu_0.pt 0, check"),
        ({"state_dict_backbone": other_weights}, "checkpoint_gpu_2.pt' hold different backbones"),
        ({"state_dict_backbone": other_shapes}, "checkpoint_gpu_2.pt' hold different backbones"),
        ({"state_dict_backbone": other_names}, "checkpoint_gpu_2.pt' hold different backbones"),
        (
            {"state_dict_softmax_fc": lambda rank: {"weight": torch.ones(2, 12) + rank // 2}},
            "_0.pt, .*_1.pt hold the same rows; copy the missing shard again",
        ),
    ],
)
def test_shards_of_two_runs_are_refused(changes: Content, said: str, tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=said):
        Rows.open(shards(tmp_path, **changes))


@pytest.mark.parametrize("name", ["checkpoint_gpu_0 (1).pt", "old_checkpoint_gpu_1.pt"])
def test_a_copy_beside_the_shards_is_refused(name: str, tmp_path: Path) -> None:
    shards(tmp_path, 1)
    (tmp_path / name).write_bytes((tmp_path / "checkpoint_gpu_0.pt").read_bytes())
    with pytest.raises(KDHooksError, match="shards must be named alike and numbered 0 to 1"):
        Rows.open(tmp_path / "*checkpoint_gpu_*.pt")


def test_shards_without_the_first_are_refused(tmp_path: Path) -> None:
    pattern = shards(tmp_path, 2)
    (tmp_path / "checkpoint_gpu_0.pt").unlink()
    with pytest.raises(KDHooksError, match="numbered 0 to 0 without a gap; found checkpoint_gpu_1"):
        Rows.open(pattern)
    torch.save(normal(1, 3, 12), tmp_path / "rows_512.pt")  # 512 is not the number of a rank
    assert Rows.open(tmp_path / "rows_*.pt").total == 3


def test_one_shard_of_several_is_read_with_a_warning(tmp_path: Path, caplog: Log) -> None:
    shards(tmp_path)
    assert Rows.open(tmp_path / "checkpoint_gpu_0.pt").total == 2
    assert "checkpoint_gpu_0.pt' is one of several shards in its folder" in caplog.text
    caplog.clear()
    Rows.open(tmp_path / "checkpoint_gpu_1.pt")  # a later shard is not mistaken for all classes
    assert not caplog.text


def test_rows_of_another_backbone_than_the_teacher_cause_a_warning(
    tmp_path: Path, caplog: Log
) -> None:
    pattern = shards(tmp_path, state_dict_backbone=own_statistics)
    Teacher(teacher_network(), classifier=pattern)
    assert not caplog.text
    changed = teacher_network()
    with torch.no_grad():
        changed.get_parameter("fc.weight").add_(0.01)
    Teacher(changed, classifier=pattern)
    assert "the backbone in its file has other weights than the teacher" in caplog.text


# --- what rows hold --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_without_a_direction_are_named(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    rows = normal(1, 5, 3).to(dtype)
    rows[3] = value
    said = "zero" if value == 0 else "not finite"
    with pytest.raises(KDHooksError, match=f"class 3 in the tensor given is {said}"):
        Rows.open(rows).slice(2, 5)
    torch.save(rows, tmp_path / "rows.pt")
    with pytest.raises(KDHooksError, match=rf"class 3 in '.*rows\.pt' is {said}"):
        Rows.open(tmp_path / "rows.pt").slice(2, 5)
    Rows.open(tmp_path / "rows.pt").slice(0, 3)  # a rank reads only its own rows


def test_the_class_is_counted_over_all_shards(tmp_path: Path) -> None:
    def weight(rank: int) -> Content:
        rows = normal(rank, 2, 12).float()
        rows[1] = 0 if rank == 2 else rows[1]
        return {"weight": rows}

    with pytest.raises(KDHooksError, match=r"class 5 in '.*checkpoint_gpu_2\.pt' is zero"):
        Rows.open(shards(tmp_path, state_dict_softmax_fc=weight)).slice(0, 6)


def test_rows_of_large_and_small_half_precision_are_read() -> None:
    rows = torch.tensor([[3e4, 3e4, 3e4], [6e-8, 0.0, 0.0]]).half()
    assert torch.equal(Rows.open(rows).slice(0, 2), rows.float())


def test_rows_of_float8_are_read() -> None:
    rows = normal(1, 3, 4).to(torch.float8_e4m3fn)
    assert torch.equal(Rows.open(rows).slice(0, 3), rows.float())


@pytest.mark.parametrize(
    "rows", [normal(1, 3, 4).to_sparse(), torch.empty(3, 4, device="meta")], ids=["sparse", "meta"]
)
def test_rows_must_be_plain_tensors(rows: Tensor) -> None:
    with pytest.raises(KDHooksError, match=r"must be a plain tensor \(c e\); the tensor given is"):
        Rows.open(rows)


@pytest.mark.parametrize("source", [3, None, [1, 2], {"weight": 1}, b"rows.pt"])
def test_rows_come_only_from_tensors_and_paths(source: Any) -> None:
    with pytest.raises(KDHooksError, match=r"must be a tensor \(c e\), a path, or a pattern"):
        Rows.open(source)


def test_a_transposed_classifier_is_refused_as_transposed() -> None:
    teacher = Teacher(teacher_network(), classifier=normal(1, 12, 6))
    with pytest.raises(KDHooksError, match=r"found 12 rows of width 6.* it is transposed; save"):
        probe_teacher(teacher, (), torch.zeros(2, 3, 32, 32))
    teacher = Teacher(teacher_network(), classifier=normal(1, 11, 6))
    with pytest.raises(KDHooksError, match="use the classifier that was trained with this teacher"):
        probe_teacher(teacher, (), torch.zeros(2, 3, 32, 32))


# --- the order of the classes ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "warned"), [(20, False), (18, False), (17, True), (10, True), (9, None)]
)
def test_a_class_order_that_is_half_right_causes_a_warning(
    right: int, warned: bool | None, caplog: Log
) -> None:
    rows = torch.eye(20)
    labels = torch.arange(20)
    embedding = rows.clone()
    embedding[right:] = rows[(labels[right:] + 1) % 20]
    if warned is None:
        with pytest.raises(
            KDHooksError, match="found 45% of 20 samples of the first batch nearest"
        ):
            check_class_order(Rows.open(rows), embedding, labels)
        return
    found = check_class_order(Rows.open(rows), embedding, labels)
    assert bool(found) == bool(caplog.text) == warned
    if warned:
        assert f"only {right / 20:.0%} of 20 samples of the first batch are nearest" in caplog.text


def test_a_transposed_square_classifier_is_found_by_the_order() -> None:
    rows = normal(3, 12, 12).float()
    embedding = F.normalize(rows)
    check_class_order(Rows.open(rows), embedding, torch.arange(12))
    with pytest.raises(KDHooksError, match="in the order of the training labels"):
        check_class_order(Rows.open(rows.T), embedding, torch.arange(12))


# --- rows inside of the teacher --------------------------------------------------------------


class WithHead(TinyFaceNet):
    def __init__(self) -> None:
        super().__init__(width=6)
        self.head = nn.Linear(12, 6, bias=False)


def with_head() -> nn.Module:
    module = WithHead()
    module.load_state_dict({**teacher_network().state_dict(), "head.weight": tiny_rows()})
    return module


def tiny_rows() -> Tensor:
    rows = tiny_teacher().classifier
    assert rows is not None
    return rows.slice(0, rows.total)


def made() -> nn.Module:
    """Build the network that recipes name as tests.test_row_files:made."""
    return TinyFaceNet(width=6)


def recipe(folder: Path, classifier: str, **teacher: Any) -> Path:
    table = {"network": f"{__name__}:made", "checkpoint": "model.pt", **teacher}
    lines = [f'{key} = "{value}"' for key, value in table.items()]
    text = 'methods = ["proxylesskd"]\ninput_shape = [3, 32, 32]\n[teacher]\n'
    (folder / "kd.toml").write_text(
        "\n".join([text, *lines, f'classifier = "{classifier}"']), encoding="utf-8"
    )
    return folder / "kd.toml"


@pytest.mark.parametrize(
    ("prefix", "name"),
    [("", "head.norm_product.weight"), ("module.", "head.norm_product.weight"),
     ("module.", "module.head.norm_product.weight")],
)  # fmt: skip
def test_rows_are_found_in_the_teachers_checkpoint(prefix: str, name: str, tmp_path: Path) -> None:
    state = {f"backbone.{key}": value for key, value in teacher_network().state_dict().items()}
    state["head.norm_product.weight"] = tiny_rows()
    content = {"state_dict": {f"{prefix}{key}": value for key, value in state.items()}}
    torch.save(content, tmp_path / "model.pt")
    kd = build(recipe(tmp_path, name), TinyFaceNet().train())
    assert kd.teacher_rows is not None
    assert torch.equal(kd.teacher_rows.shard().weight, tiny_rows())


def test_a_file_takes_precedence_over_a_weight_of_that_name(tmp_path: Path) -> None:
    torch.save(
        {**teacher_network().state_dict(), "kdhooks.rows": tiny_rows()}, tmp_path / "model.pt"
    )
    path = recipe(tmp_path, "kdhooks.rows")
    found = build_teacher(Recipe.read(path)).classifier
    assert found is not None
    assert torch.equal(found.slice(0, 6), tiny_rows())
    torch.save(2 * tiny_rows(), tmp_path / "kdhooks.rows")
    found = build_teacher(Recipe.read(path)).classifier
    assert found is not None
    assert torch.equal(found.slice(0, 6), 2 * tiny_rows())


def test_a_module_may_hold_the_rows() -> None:
    found = Teacher(with_head(), classifier="head.weight").classifier
    assert found is not None
    assert torch.equal(found.slice(0, 6), tiny_rows())


def test_an_unknown_name_lists_files_and_weights(tmp_path: Path) -> None:
    with pytest.raises(KDHooksError) as error:
        Teacher(with_head(), classifier="haed.weight")
    for text in (
        "no file matches 'haed.weight', and the teacher has no weight 'haed.weight'",
        "did you mean 'head.weight' or",
        "name a tensor file (c e), or the trainer's shards",
        "or a weight of the teacher, as one of fc.weight, head.weight",
    ):
        assert text in str(error.value)
    torch.save({"model": teacher_network().state_dict()}, tmp_path / "model.pt")
    torch.save(tiny_rows(), tmp_path / "rows.pt")
    with pytest.raises(KDHooksError, match=r"no file matches '.*rws\.pt'.* mean 'rows\.pt'"):
        build_teacher(Recipe.read(recipe(tmp_path, "rws.pt")))


def test_a_name_that_several_weights_have_is_refused(tmp_path: Path) -> None:
    heads = {"a": {"head.weight": tiny_rows()}, "b": {"head.weight": tiny_rows() + 1}}
    torch.save({"model": teacher_network().state_dict(), **heads}, tmp_path / "model.pt")
    with pytest.raises(
        KDHooksError, match=r"named 'head\.weight', like a\.head\.weight, b\.head\.wei"
    ):
        build_teacher(Recipe.read(recipe(tmp_path, "head.weight")))
    found = build_teacher(Recipe.read(recipe(tmp_path, "b.head.weight"))).classifier
    assert found is not None
    assert torch.equal(found.slice(0, 6), tiny_rows() + 1)


def test_a_name_of_several_equal_weights_is_accepted(tmp_path: Path) -> None:
    heads = {key: {"head.weight": tiny_rows()} for key in ("student", "ema")}
    torch.save({"model": teacher_network().state_dict(), **heads}, tmp_path / "model.pt")
    found = build_teacher(Recipe.read(recipe(tmp_path, "head.weight"))).classifier
    assert found is not None
    assert torch.equal(found.slice(0, 6), tiny_rows())


def test_a_weight_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=r"'fc\.bias' has shape \(12,\)"):
        Teacher(with_head(), classifier="fc.bias")
    torch.save(teacher_network().state_dict(), tmp_path / "model.pt")
    with pytest.raises(KDHooksError, match=r"holds no rows; .* it has the matrices fc\.weight: if"):
        build_teacher(Recipe.read(recipe(tmp_path, "model.pt")))


# --- networks by name, and one of several sets of weights ------------------------------------


def test_a_recipe_can_choose_among_sets_of_weights(tmp_path: Path) -> None:
    state = teacher_network().state_dict()
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"model": other, "ema": state}, tmp_path / "model.pt")
    torch.save(tiny_rows(), tmp_path / "rows.pt")
    with pytest.raises(KDHooksError, match="network, at 'model', 'ema'; specify one of them"):
        build_teacher(Recipe.read(recipe(tmp_path, "rows.pt")))
    found = build_teacher(Recipe.read(recipe(tmp_path, "rows.pt", weights="ema"))).module
    assert found is not None
    images = tiny_batch()[0]
    torch.testing.assert_close(found(images), teacher_network()(images))


@pytest.mark.parametrize(
    ("teacher", "match"),
    [
        ({"module": torch.flatten, "weights": "ema"}, "belongs to teacher.network or"),
        ({"network": "a:b", "checkpoint": __file__, "weights": 3}, "must be a string; found 3"),
    ],
)
def test_weights_belong_to_a_checkpoint(teacher: Content, match: str) -> None:
    with pytest.raises(KDHooksError, match=rf"teacher\.weights {match}"):
        Recipe.read({"teacher": teacher, "methods": ["fcd"]})
