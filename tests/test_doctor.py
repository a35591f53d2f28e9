"""`kdhooks doctor` passes a good recipe, and reports each fault under its check, with a fix."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("PIL")

from benchmarks.recordio_files import people, write_records
from kdhooks import EmbeddingTap, KDHooksError, StudentView, hookimpl, viewed
from kdhooks.cli import main
from kdhooks.pictures import decode, encode
from kdhooks_integrations.arcface_torch.commands.cost import held, kept_for_backward
from kdhooks_integrations.arcface_torch.commands.faces import read_batch
from kdhooks_integrations.arcface_torch.commands.trial import Trial
from tests.trainer_folder import CLASSES, imports_undone, write_teacher, write_trainer

Captured = pytest.CaptureFixture[str]
CHECKS = (
    "settings", "recipe", "student", "images", "teacher", "classes", "class order", "taps", "view",
    "step", "gradients", "cost",
)  # fmt: skip
TEACHER = '[teacher]\nnetwork = "tiny"\ncheckpoint = "model.pt"\n'
ROWS = 'classifier = "rows.pt"\n'
SHAPE = (3, 112, 112)
STUDENT = ("--network", "wide", "--embedding-size", "16")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    write_trainer(folder)
    write_teacher(folder)
    write_records(folder / "records", people(CLASSES, 4))
    for index, (pixels, who) in enumerate(people(CLASSES, 4)):
        person = folder / "folders" / f"person{who}"
        person.mkdir(parents=True, exist_ok=True)
        (person / f"{index:03}.png").write_bytes(encode(pixels))
    return folder


@pytest.fixture(autouse=True)
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(made)
    with imports_undone():
        yield made


def doctor(
    capsys: Captured, recipe: str, *options: str, status: int = 0
) -> dict[str, tuple[str, str]]:
    """Return each check's status and text."""
    Path("kd.toml").write_text(recipe)
    assert main(["doctor", "--recipe", "kd.toml", *(options or STUDENT)]) == status
    found = {}
    for line in capsys.readouterr().out.splitlines():
        found[line[7:19].strip()] = (line[:5].strip(), line[20:])
    assert tuple(found) == CHECKS
    return found


def test_a_good_recipe_passes(capsys: Captured) -> None:
    found = doctor(capsys, f'methods = ["fcd", "at"]\n{TEACHER}')
    unchecked = {name for name, (status, _) in found.items() if status != "ok"}
    assert unchecked == {"classes", "class order", "view"}
    assert not Path("student_view.png").exists()
    assert found["settings"][1] == (
        "from the command line: network wide, embedding_size 16; assumed: batch_size 8, "
        "fp16 False, sample_rate 1.0, margin_list (1.0, 0.5, 0.0), "
        "interclass_filtering_threshold 0.0, gradient_acc 1, optimizer sgd, lr 0.1, "
        "weight_decay 0.0005"
    )
    assert found["student"][1].startswith("wide, 0.0")
    assert found["student"][1].endswith("million weights, embedding 16")
    stages = "layer1, layer2, layer3, layer4"
    assert found["taps"][1] == f"fcd on the embedding; at on {stages} <- {stages}"
    assert re.fullmatch(
        r"task \S+, fcd \S+, at \S+, all together \S+; the trainer clips them to 5",
        found["gradients"][1],
    )
    assert "a batch of 8 takes" in found["cost"][1]


@pytest.mark.parametrize("data", ["records", "folders"])
def test_the_class_order_is_checked_on_the_data_of_the_training(
    data: str, capsys: Captured
) -> None:
    recipe = f'methods = ["proxylesskd"]\n{TEACHER}{ROWS}'
    options = (*STUDENT, "--data", data, "--batch-size", "24", "--num-classes", str(CLASSES))
    found = doctor(capsys, recipe, *options)
    assert [name for name, (status, _) in found.items() if status != "ok"] == ["view"]
    assert found["classes"][1] == "6 of the teacher, of width 16, as many as in the training"
    assert found["images"][1] == f"24 of {data}, of {CLASSES} people"
    assert found["class order"][1] == "24 of 24 images are closest to their own class"
    assert found["taps"][1] == "the head holds the teacher's rows, frozen"


def test_another_class_order_is_a_fault(capsys: Captured) -> None:
    torch.save(torch.load("rows.pt").roll(1, 0), "rolled.pt")
    recipe = f'methods = ["proxylesskd"]\n{TEACHER}classifier = "rolled.pt"\n'
    found = doctor(capsys, recipe, *STUDENT, "--data", "folders", status=1)
    assert found["class order"][0] == "FAULT"
    assert "must be in the order of the training labels" in found["class order"][1]
    assert found["taps"] == ("--", "not checked: correct the fault above first")


def test_without_labels_no_classes_are_compared(capsys: Captured) -> None:
    """The head's number of classes differs from the teacher's."""
    options = (*STUDENT, "--num-classes", str(CLASSES + 1))
    table = f"{TEACHER}{ROWS}"
    found = doctor(capsys, f'methods = ["fcd"]\nlabels = false\n{table}', *options)
    for check in ("classes", "class order"):
        assert found[check][0] == "--"
        assert "labels = false, and no class is compared" in found[check][1]
    found = doctor(capsys, f'methods = ["fcd"]\n{table}', *options, status=1)
    assert found["classes"][0] == "FAULT"


def test_without_data_the_class_order_is_reported_as_unchecked(capsys: Captured) -> None:
    found = doctor(capsys, f'methods = ["proxylesskd"]\n{TEACHER}{ROWS}')
    assert found["class order"][0] == "--"
    assert found["class order"][1].endswith("specify --data FOLDER of the training")
    assert found["classes"][1].endswith(
        "specify --config or --num-classes of the training to compare them"
    )
    assert found["step"][0] == "ok"


@pytest.mark.parametrize("options", [(), ("--picture", "both.png")])
def test_a_view_is_shown_beside_the_teachers_images(
    options: tuple[str, ...], capsys: Captured
) -> None:
    view = "seed = 3\n[student_view]\nlow_resolution = { sizes = [14] }\nmask = { p = 1.0 }\n"
    recipe = f'methods = ["fcd"]\n{view}{TEACHER}'
    found = doctor(capsys, recipe, *STUDENT, "--data", "folders", "--batch-size", "6", *options)
    file = Path(options[-1] if options else "student_view.png")
    assert found["view"][0] == "ok"
    assert found["view"][1].startswith(f"'{file}' shows the teacher's images above and the stude")
    assert "the view changes 6 of 6 images, by " in found["view"][1]
    pixels = torch.from_numpy(decode(file.read_bytes())).permute(2, 0, 1)
    assert pixels.shape == (3, 224, 672)
    images, _, _ = read_batch("folders", 6, None, SHAPE)
    table = {"low_resolution": {"sizes": [14]}, "mask": {"p": 1.0}}
    seen = viewed(StudentView(**table), images, seed=3)
    for row, side in ((0, images), (112, seen)):
        shown = pixels[:, row : row + 112].unflatten(2, (6, 112)).permute(2, 0, 1, 3)
        expected = (side * 127.5 + 127.5).clamp(0, 255)
        assert (shown.float() - expected).abs().max() <= 0.51
    file.unlink()


def test_a_picture_that_cannot_be_written_is_a_fault(capsys: Captured) -> None:
    recipe = f'methods = ["fcd"]\n[student_view]\ngrey = {{}}\n{TEACHER}'
    found = doctor(capsys, recipe, *STUDENT, "--picture", "absent/a.png", status=1)
    said = "--picture 'absent/a.png' can't be written: No such file or directory; name another file"
    assert found["view"] == ("FAULT", said)


class NoGradient:
    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("still", _Embeddings())


class _Embeddings(nn.Module):
    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        return teacher.abs().sum() + 0 * student.sum()


def test_a_loss_that_trains_nothing_is_a_fault(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdhooks.recipe.create", lambda method: NoGradient())
    found = doctor(capsys, f'methods = ["still"]\n{TEACHER}', status=1)
    assert found["gradients"][0] == "FAULT"
    assert "but no gradient reaches the student" in found["gradients"][1]


def test_a_batch_that_is_too_large_is_a_fault_without_a_traceback(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(trial: Trial) -> torch.Tensor:
        raise error

    monkeypatch.setattr(Trial, "step", step)
    monkeypatch.setattr("traceback.print_exc", lambda file: pytest.fail("a traceback"))
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ):
        found = doctor(capsys, f'methods = ["fcd"]\n{TEACHER}', status=1)
        assert found["step"] == (
            "FAULT",
            f"a batch must fit into memory; found {error}; lower --batch-size or --num-classes",
        )


@pytest.mark.parametrize(
    ("recipe", "options", "check", "said"),
    [
        ('methods = ["fdc"]\n' + TEACHER, STUDENT, "recipe", "did you mean 'fcd'"),
        ('methods = ["fcd"]\n' + TEACHER, ("--network", "tny"), "student", "'tny' is unknown to"),
        (
            'methods = ["fcd"]\n' + TEACHER.replace("tiny", "wide"),
            STUDENT, "teacher", "does not fit the network",
        ),
        (
            'methods = ["fcd"]\n' + TEACHER + ROWS,
            (*STUDENT, "--num-classes", "7"), "classes", "has 6 classes, the training 7",
        ),
        (
            'methods = ["fcd"]\n' + TEACHER,
            ("--network", "tiny", "--embedding-size", "12"), "taps", "12",
        ),
        (
            'methods = ["at"]\n' + TEACHER + '[taps.student]\nstages = ["layer9"]\n',
            STUDENT, "taps", "student has no submodule 'layer9'",
        ),
        (
            'methods = ["fcd"]\n' + TEACHER,
            (*STUDENT, "--data", "absent"), "images", "'absent' does not exist",
        ),
        (
            'methods = ["fcd"]\n' + TEACHER,
            (*STUDENT, "--data", "folders", "--num-classes", "9"), "images", "has 6 classes, but",
        ),
        (
            'methods = ["fcd"]\n' + TEACHER,
            ("--network", "plain", "--embedding-size", "16"), "student", "found RuntimeError: mat1",
        ),
        (
            'methods = ["fcd"]\n' + TEACHER,
            ("--network", "backbones:broken"), "student", "it raises ValueError: no such width",
        ),
    ],
)  # fmt: skip
def test_a_fault_is_reported_under_its_check(
    recipe: str, options: tuple[str, ...], check: str, said: str, capsys: Captured
) -> None:
    found = doctor(capsys, recipe, *options, status=1)
    assert [name for name, (status, _) in found.items() if status == "FAULT"] == [check]
    assert said in found[check][1]


def test_images_equal_the_trainers(folder: Path) -> None:
    """Both kinds of folder give the same pictures, labels and range."""
    pictures = people(CLASSES, 4)
    images, labels, classes = read_batch("records", 24, None, SHAPE)
    pixels = torch.stack([torch.from_numpy(picture) for picture, _ in pictures])
    torch.testing.assert_close((images + 1) * 127.5, pixels.permute(0, 3, 1, 2).float())
    assert (labels.tolist(), classes) == ([who for _, who in pictures], CLASSES)
    assert read_batch("folders", 6, None, SHAPE)[1].tolist() == list(range(CLASSES))


def write_people(folder: Path) -> Path:
    for name in ("a/1.png", "b/deep/2.png", "c/.hidden", "top.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(people(1, 1)[0][0]))
    return folder


def test_labels_count_folders_as_the_trainer_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_people(tmp_path)
    with pytest.raises(KDHooksError, match="must have pictures; found none in 'c', 1 of 3"):
        read_batch(str(data), 2, None, SHAPE)
    (data / "c/3.png").write_bytes(encode(people(1, 1)[0][0]))
    assert read_batch(str(data), 3, None, SHAPE)[1].tolist() == [0, 1, 2]
    assert "repeats some" not in caplog.text
    assert read_batch(str(data), 6, None, SHAPE)[1].tolist() == [0, 0, 1, 1, 2, 2]
    assert "has 3 pictures for a batch of 6; the batch repeats some of them" in caplog.text


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (
            lambda data: (data / "a/1.png").write_bytes(b"text"),
            "'a/1.png' can't be read as",
        ),
        (
            lambda data: (data / "a/1.png").write_bytes(encode(people(1, 1)[0][0][:9])),
            "is 112x9",
        ),
        (lambda data: (data / "train.idx").write_text("0\t0\n"), "found only train.idx in"),
    ],
)
def test_wrong_data_is_named(break_it: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    data = write_people(tmp_path)
    (data / "c/3.png").write_bytes(encode(people(1, 1)[0][0]))
    break_it(data)
    with pytest.raises(KDHooksError, match=re.escape(said)):
        read_batch(str(data), 3, None, SHAPE)


def test_a_folder_without_people_is_refused(tmp_path: Path) -> None:
    (tmp_path / "top.png").write_bytes(encode(people(1, 1)[0][0]))
    with pytest.raises(KDHooksError, match="or one folder for each person; found neither in"):
        read_batch(str(tmp_path), 2, None, SHAPE)


# --- what it costs -------------------------------------------------------------------------------


def test_tensors_for_backward_are_counted_once() -> None:
    layers = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Sigmoid(), nn.Sigmoid())
    x = torch.rand(4, 8, requires_grad=True)
    # The first layer's input and both sigmoids' outputs count, in float32; the weight does not.
    kept = kept_for_backward(lambda: layers(x), layers.parameters())
    assert kept == 4 * (4 * 8 + 2 * 4 * 16)
    assert kept_for_backward(lambda: layers(x), []) == kept + 4 * 8 * 16


def test_weights_count_with_gradient_and_momentum() -> None:
    network = nn.BatchNorm1d(8)
    network.bias.requires_grad_(False)
    statistics = 4 * (8 + 8) + 8
    assert held([network, network], 3) == 4 * (3 * 8 + 8) + statistics


# --- several teachers ----------------------------------------------------------------------------

SEVERAL = TEACHER.replace("[teacher]", "[[teacher]]")


def test_each_of_several_teachers_is_examined(capsys: Captured) -> None:
    recipe = f'methods = ["kd"]\n{SEVERAL}{ROWS}{SEVERAL}{ROWS}input = {{ order = "bgr" }}\n'
    found = doctor(capsys, recipe, *STUDENT, "--data", "folders", "--num-classes", str(CLASSES))
    assert re.fullmatch(
        r"teacher 0: \S+ million weights, embedding 16, finite, different for each image; "
        r"teacher 1: \S+ million weights, embedding 16, finite, different for each image",
        found["teacher"][1],
    )
    assert found["classes"][1] == "6 of the teacher, of width 32, as many as in the training"
    assert found["class order"][1].startswith("teacher 0: 8 of 8 images are closest")
    assert "; teacher 1: " in found["class order"][1]
    assert found["step"][0] == "ok"


def test_the_one_of_several_teachers_that_is_at_fault_is_named(capsys: Captured) -> None:
    torch.save(torch.load("rows.pt").roll(1, 0), "rolled.pt")
    recipe = f'methods = ["kd"]\n{SEVERAL}{ROWS}{SEVERAL}classifier = "rolled.pt"\n'
    found = doctor(capsys, recipe, *STUDENT, "--data", "folders", status=1)
    assert found["class order"][0] == "FAULT"
    assert found["class order"][1].startswith("teacher 1 classifier: its classes must be in the")
    found = doctor(capsys, f'methods = ["sp"]\n{SEVERAL}{ROWS}{SEVERAL}')
    said = "not checked: teacher 1 has no classifier, and no class is compared"
    assert found["classes"] == ("--", said)
    assert found["step"][0] == "ok"


def test_several_teachers_with_class_rows_need_data(capsys: Captured) -> None:
    recipe = f'methods = ["METHOD"]\n{SEVERAL}{ROWS}{SEVERAL}{ROWS}'
    found = doctor(capsys, recipe.replace("METHOD", "kd"), status=1)
    assert found["taps"][0] == "FAULT"
    assert found["taps"][1].startswith("--data is needed if several teachers have class rows")
    assert doctor(capsys, recipe.replace("METHOD", "sp"))["step"][0] == "ok"


def test_a_cache_in_place_of_the_teacher_is_tried_on_the_training(capsys: Captured) -> None:
    Path("kd.toml").write_text(f'methods = ["fcd"]\n{TEACHER}cache = "cache"\n')
    assert main(["cache", "build", "--recipe", "kd.toml", "--data", "folders"]) == 0
    capsys.readouterr()
    recipe = 'methods = ["fcd"]\nteacher = { embeddings = "cache" }\n'
    found = doctor(capsys, recipe, *STUDENT, "--data", "folders")
    assert found["teacher"] == ("ok", "embedding 16, finite, different for each image")
    assert found["step"][0] == "ok"
    found = doctor(capsys, recipe, status=1)
    assert found["teacher"][0] == "FAULT"
    assert found["teacher"][1].startswith("--data is needed if a cache replaces the teacher")
