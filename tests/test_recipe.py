"""A recipe is checked completely before anything is loaded; dict and TOML are equivalent."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdhooks import InputTransform, KDHooksError, Teacher, build
from kdhooks.recipe import Recipe, build_teacher
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from kdhooks_plugins.cakd import CAKD
from kdhooks_plugins.coupleface import CoupleFace
from tests.small_distiller import teacher_network


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    module = teacher_network()
    torch.save(module.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def network(name: Any, state: Mapping[str, Tensor]) -> nn.Module:
    assert name == "tiny"
    return TinyFaceNet(dim=len(state["fc.bias"]), width=6)


def test_from_dict(checkpoint: Path) -> None:
    recipe = {
        "teacher": {"network": "tiny", "checkpoint": str(checkpoint)},
        "methods": ["fcd", {"name": "proxylesskd", "m": 0.4}],
        "input_shape": [3, 32, 32],
    }
    recipe["teacher"]["classifier"] = torch.randn(6, 12)  # type: ignore[index]
    kd = build(recipe, TinyFaceNet().train(), network=network)
    assert [tap.name for tap in kd.taps] == ["fcd", "proxylesskd"]


def test_building_does_not_use_the_global_generator(checkpoint: Path) -> None:
    spec = {"network": "tiny", "checkpoint": checkpoint}
    recipe = Recipe.read({"teacher": spec, "methods": ["fcd"], "input_shape": [3, 32, 32]})
    net = TinyFaceNet().train()
    before = torch.get_rng_state()
    build(recipe, net, network=network)
    assert torch.equal(torch.get_rng_state(), before)


def test_from_toml_with_paths_beside_the_file(checkpoint: Path) -> None:
    file = checkpoint.parent / "kd.toml"
    file.write_text(
        """
        methods = ["fcd", { name = "coupleface", k = 2 }]
        input_shape = [3, 32, 32]
        [teacher]
        network = "tiny"
        checkpoint = "model.pt"
        classifier = "rows.pt"
        [taps.student]
        embedding = "fc"
        """
    )
    torch.save(torch.randn(6, 12), checkpoint.parent / "rows.pt")
    net = TinyFaceNet().train()
    kd = build(file, net, network=network)
    assert [tap.name for tap in kd.taps] == ["fcd", "coupleface"]
    net(torch.rand(2, 3, 32, 32))
    assert list(kd._student.take()) == ["fc"]


def test_paths_in_a_methods_options_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "t.onnx").write_bytes(b"x")
    torch.save(torch.rand(7, 7), tmp_path / "map.pt")
    (tmp_path / "kd.toml").write_text(
        """
        methods = [
            { name = "coupleface", prototypes = "rows.pt", neighbours = "/all/near" },
            { name = "cakd", positions = { distance = "saliency", saliency = "map.pt" } },
        ]
        teacher.onnx = "t.onnx"
        """
    )
    coupleface, cakd = Recipe.read(tmp_path / "kd.toml").methods
    assert isinstance(coupleface, CoupleFace)
    assert isinstance(cakd, CAKD)
    assert coupleface.prototypes == tmp_path / "rows.pt"
    assert coupleface.neighbours == Path("/all/near")
    assert isinstance(cakd.positions.saliency, Tensor)  # read from the file


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("http://a/kd.toml", "'http://a/kd.toml' is a URL"),
        ("", "recipe must be a path; found ''"),
        ("/dev/null", "'/dev/null' is not a regular file"),
    ],
)
def test_a_path_that_is_no_file_is_refused(path: str, words: str) -> None:
    with pytest.raises(KDHooksError, match=words):
        Recipe.read(path)


@pytest.mark.parametrize("student", [None, nn.Identity, nn.Identity()])
def test_a_student_that_cannot_be_trained_is_refused(student: Any) -> None:
    recipe = {"teacher": tiny_teacher().module, "methods": ["fcd"]}
    with pytest.raises(KDHooksError, match="student must"):
        build(recipe, student)


def test_a_module_or_a_function_is_a_teacher() -> None:
    teacher = tiny_teacher().module
    recipe = Recipe.read({"teacher": teacher, "methods": ["fcd"]})
    assert build_teacher(recipe).module is teacher
    recipe = Recipe.read({"teacher": {"module": torch.flatten}, "methods": ["fcd"]})
    assert build_teacher(recipe).module is None


def test_teacher_options_reach_the_teacher() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3))

    spec = {
        "module": Mean(),
        "input": {"order": "bgr", "mean": 0, "std": 1, "size": [8, 8]},
        "dtype": "bfloat16",
        "micro_batch": 1,
    }
    teacher = build_teacher(Recipe.read({"teacher": spec, "methods": ["fcd"]}))
    image = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 16, 16)
    torch.testing.assert_close(
        TeacherSession(teacher)(image).embedding[0], torch.tensor([255.0, 127.5, 0.0])
    )


TEACHER = {"module": torch.flatten}


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ({"teacher": TEACHER}, "recipe needs its option 'methods'"),
        ({"methods": ["fcd"]}, "recipe needs its option 'teacher'"),
        (
            {"teacher": TEACHER, "method": []},
            "recipe has no option 'method'; did you mean 'methods'",
        ),
        ({"teacher": TEACHER, "methods": []}, "methods must be a list of at least one"),
        ({"teacher": TEACHER, "methods": "fcd"}, "methods must be a list"),
        ({"teacher": TEACHER, "methods": ["fdc"]}, "no method 'fdc' is installed; did you mean"),
        (
            {"teacher": TEACHER, "methods": [{"name": "fcd", "wieght": 1}]},
            "fcd has no option 'wieght'; did you mean 'weight'",
        ),
        (
            {"teacher": TEACHER, "methods": [{"name": "fcd", "weight": -1}]},
            "fcd: weight must be at least 0; found -1",
        ),
        (
            {"teacher": TEACHER, "methods": ["fcd"], "taps": {"pupil": {}}},
            "recipe: taps has no option 'pupil'",
        ),
        (
            {"teacher": TEACHER, "methods": ["fcd"], "taps": {"student": {"embeding": ""}}},
            "recipe: taps.student has no option 'embeding'; did you mean 'embedding'",
        ),
        ({"teacher": {}, "methods": ["fcd"]}, "needs exactly one of .*; found none"),
        (
            {"teacher": {"onnx": "a", "insightface": "b"}, "methods": ["fcd"]},
            "exactly one of .*; found onnx, insightface",
        ),
        (
            {"teacher": {"network": "r50"}, "methods": ["fcd"]},
            "teacher.network needs teacher.checkpoint",
        ),
        (
            {"teacher": {"network": "r50", "chekpoint": ""}, "methods": ["fcd"]},
            "teacher has no option 'chekpoint'; did you mean 'checkpoint'",
        ),
        (
            {"teacher": {"network": "r50", "checkpoint": "absent.pt"}, "methods": ["fcd"]},
            "teacher.checkpoint: there is no file 'absent.pt'",
        ),
        (
            {"teacher": {"onnx": "absent.onnx"}, "methods": ["fcd"]},
            "teacher.onnx: there is no",
        ),
        (
            {"teacher": 3, "methods": ["fcd"]},
            "recipe: teacher must be a table, such as .* in Python a module or a function; found 3",
        ),
        (
            {"teacher": {**TEACHER, "dtype": "float8"}, "methods": ["fcd"]},
            "dtype must be one of 'float32', 'float16', 'bfloat16'; found 'float8'",
        ),
        (
            {"teacher": {**TEACHER, "input": {"sise": 1}}, "methods": ["fcd"]},
            "teacher.input has no option 'sise'; did you mean 'size'",
        ),
        ("absent.toml", "'absent.toml' does not exist from '/"),
    ],
)
def test_refuses(recipe: Any, match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        Recipe.read(recipe)


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kd.toml").write_text("methods = [")
    with pytest.raises(KDHooksError, match="is not TOML"):
        Recipe.read(tmp_path / "kd.toml")


def test_a_missing_classifier_file_is_refused() -> None:
    recipe = {"teacher": {**TEACHER, "classifier": "absent_*.pt"}, "methods": ["fcd"]}
    with pytest.raises(KDHooksError, match=r"no file matches 'absent_\*\.pt'"):
        build_teacher(Recipe.read(recipe))


def test_a_networks_name_needs_a_factory(checkpoint: Path) -> None:
    spec = {"network": "tiny", "checkpoint": checkpoint}
    recipe = Recipe.read({"teacher": spec, "methods": ["fcd"]})
    with pytest.raises(KDHooksError, match="needs a factory of the host"):
        build_teacher(recipe)


def test_a_recipe_object_is_returned_as_it_is() -> None:
    recipe = Recipe.read({"teacher": TEACHER, "methods": ["fcd"]})
    assert Recipe.read(recipe) is recipe


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({"network": "r50", "checkpoint": None}, "teacher.network needs teacher.checkpoint"),
        ({"network": "r50", "checkpoint": 3}, "teacher.checkpoint must be a path; found 3"),
        ({"onnx": 3}, "teacher.onnx must be a path; found 3"),
        ({"insightface": None}, "teacher needs exactly one of"),
        ({**TEACHER, "channels_last": "yes"}, "channels_last must be true or false; found 'yes'"),
        ({**TEACHER, "compile": 1}, "or one of 'reduce-overhead', 'max-autotune'; found 1"),
        ({**TEACHER, "side_stream": 1}, "teacher.side_stream must be true or false; found 1"),
        ({**TEACHER, "convert": "no"}, "teacher.convert must be true or false; found 'no'"),
        ({**TEACHER, "input": {"size": 64}}, "size must be a list of 2 whole numbers; found 64"),
    ],
)
def test_a_teachers_keys_are_checked(spec: dict[str, object], match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        Recipe.read({"teacher": spec, "methods": ["fcd"]})


def from_onnx(folder: Path, **spec: object) -> tuple[nn.Module, Teacher]:
    """Return a network, and a teacher built from its ONNX file."""
    pytest.importorskip("onnxruntime")
    module = teacher_network()
    export(module, tiny_batch()[0], folder / "teacher.onnx")
    teacher = {"onnx": folder / "teacher.onnx", **spec}
    return module, build_teacher(Recipe.read({"teacher": teacher, "methods": ["fcd"]}))


@pytest.mark.parametrize("convert", [False, True])
def test_an_onnx_file_takes_means_of_three_channels(convert: bool, tmp_path: Path) -> None:
    said: dict[str, Any] = {"mean": [100.0, 110.0, 120.0], "std": [50, 60, 70]}
    module, teacher = from_onnx(tmp_path, convert=convert, input=said)
    images, _ = tiny_batch()
    wanted = module(InputTransform(mean=said["mean"], std=said["std"])(images)).detach()
    torch.testing.assert_close(
        TeacherSession(teacher)(images).embedding, wanted, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("convert", [False, True])
def test_an_onnx_file_is_a_teacher(convert: bool, tmp_path: Path) -> None:
    module, teacher = from_onnx(tmp_path, convert=convert)
    images, _ = tiny_batch()
    torch.testing.assert_close(
        TeacherSession(teacher)(images).embedding, module(images).detach(), rtol=1e-4, atol=1e-5
    )
    assert (teacher.module is not None) == convert


def export(module: nn.Module, images: Tensor, path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's exporter
        torch.onnx.export(
            module,
            (images,),
            str(path),
            dynamo=False,
            input_names=["data"],
            dynamic_axes={"data": {0: "b"}},
        )


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("input_shape", 112, "input_shape must be a list of 3 whole numbers; found 112"),
        ("input_shape", [3, 112], r"input_shape must be a list of 3 .*; found \[3, 112\]"),
        ("seed", "x", "seed must be a whole number; found 'x'"),
        ("nonfinite", "skipp", "nonfinite must be one of 'raise', 'skip'; found 'skipp'"),
    ],
)
def test_simple_keys_are_checked(key: str, value: object, found: str) -> None:
    with pytest.raises(KDHooksError, match=f"recipe: {found}"):
        Recipe.read({"teacher": nn.Identity(), "methods": ["fcd"], key: value})


# --- files ---------------------------------------------------------------------------------------

TEXT = '# r\u00e9sum\u00e9\nteacher.onnx = "teacher.onnx"\nmethods = ["fcd"]\n'


def test_a_utf_8_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "teacher.onnx").write_bytes(b"onnx")
    (tmp_path / "kd.toml").write_bytes(TEXT.encode("utf-8-sig"))
    assert Recipe.read(tmp_path / "kd.toml").teachers[0].onnx == tmp_path / "teacher.onnx"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (TEXT.encode("latin-1"), r"kd\.toml' must be UTF-8 text; found byte 0xe9 in line 1"),
        (TEXT.encode("utf-16"), r"kd\.toml' must be UTF-8 text; found byte 0xff in line 1"),
        (b"a = 1\n# \xe9", "found byte 0xe9 in line 2; save the file with UTF-8 encoding"),
        (b"methods = [", r"recipe: '.*kd\.toml' is not TOML: "),
        (b"seed = " + b"9" * 5000, r"recipe: '.*kd\.toml' is not TOML: "),
        (b"a = " + b"[" * 100_000, r"recipe: '.*kd\.toml' is not TOML: "),
        (b"", "recipe needs its option 'teacher'"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "kd.toml").write_bytes(content)
    with pytest.raises(KDHooksError, match=match):
        Recipe.read(tmp_path / "kd.toml")


def test_a_folder_is_refused_as_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(KDHooksError, match=r"recipe must be a TOML file; '.*' is a folder"):
        Recipe.read(tmp_path)
    with pytest.raises(KDHooksError, match=r"recipe: '~nosuchuser/kd\.toml' can't be looked up"):
        Recipe.read("~nosuchuser/kd.toml")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"teacher": {"module": nn.Identity(), "convert": True}}, "teacher.convert belongs to"),
        ({"teacher": {"module": nn.Identity(), "root": "x"}}, "teacher.root belongs to"),
        (
            {"teacher": {"module": nn.Identity(), "checkpoint": "x"}},
            "teacher.checkpoint belongs to",
        ),
        ({"teacher": {"onnx": "."}}, r"teacher\.onnx: '\.' is a folder"),
        ({"teacher": {"onnx": ""}}, "teacher.onnx must be a path; found ''"),
        ({"teacher": {"onnx": "~nosuchuser/a"}}, "'~nosuchuser/a' can't be looked up"),
        ({"teacher": {"module": nn.Identity(), "cache": ""}}, "teacher.cache must be a path"),
        (
            {"teacher": {"module": nn.Identity(), "dtype": []}},
            r"dtype must be one of .*; found \[\]",
        ),
        ({"teacher": nn.Identity}, "teacher must be a table.* found the class Identity"),
        ({"teacher": "t.onnx"}, "teacher must be a table, such as .* found 't.onnx'"),
        (
            {"teacher": {"onnx": __file__, "dtype": "float16"}},
            "teacher.dtype applies to torch modules",
        ),
        ({"methods": [3]}, "a method must be a name, a table .*; found 3"),
        ({"methods": {"name": "fcd"}}, r"recipe: methods must be a list; found .*; put it between"),
        ({"methods": "fcd"}, r"recipe: methods must be a list; found 'fcd'; write \['fcd'\]"),
        (
            {"teacher": {"module": nn.Identity(), "dtype": torch.float16}},
            "dtype must be one of .*; found torch.float16; write 'float16'",
        ),
        ({"methods": [{"weight": 1}]}, "the table of a method needs a 'name'"),
        ({"methods": [{"name": 3}]}, "the table of a method needs a 'name'"),
        ({"taps": {"student": {"stages": "layer3"}}}, r"stages must be .* write \['layer3'\]"),
        ({"taps": []}, r"taps must be a table; found \[\]"),
        ({"seed": 2**64}, "seed must be at least 0 and at most"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": True}, "seed must be a whole number; found True"),
        ({"input_shape": [3, 112, 0]}, r"input_shape\[2\] must be at least 1; found 0"),
        ({"input_shape": "3x112"}, "input_shape must be a list of 3 whole numbers; found '3x112'"),
    ],
)
def test_a_wrong_value_of_a_key_is_refused(changed: dict[str, object], match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        Recipe.read({"teacher": nn.Identity(), "methods": ["fcd"], **changed})
