"""The teacher is frozen, is not copied with the student, and gets the images that it expects."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import InputTransform, KDHooksError, Teacher
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher


def trained() -> TinyFaceNet:
    module = tiny_teacher().module
    assert isinstance(module, TinyFaceNet)
    return module


def test_runs_in_eval_without_grad_and_keeps_its_statistics() -> None:
    module = trained().train()
    teacher = Teacher(module)
    before = copy.deepcopy(module.state_dict())
    images, _ = tiny_batch()
    output = TeacherSession(teacher)(images)
    assert not output.embedding.requires_grad
    assert not any(p.requires_grad for p in module.parameters())
    assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_returns_to_eval_if_it_was_set_to_train() -> None:
    module = trained()
    teacher = TeacherSession(Teacher(module))
    images, _ = tiny_batch()
    expected = teacher(images).embedding
    module.train()
    assert_close(teacher(images).embedding, expected, rtol=0, atol=0)


def test_an_untrained_network_is_refused() -> None:
    with pytest.raises(KDHooksError, match="never trained: the running statistics of all 5 Batch"):
        Teacher(TinyFaceNet())


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_one_number_of_one_batchnorm_shows_that_a_network_was_trained(statistic: str) -> None:
    """Most statistics may be initial ones: a dead channel keeps them, and so does a new layer."""
    network = TinyFaceNet()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    getattr(norms[-1], statistic)[1] = 0.5
    assert Teacher(network).module is network


def test_neither_deepcopy_nor_pickle_copies_it() -> None:
    teacher = tiny_teacher()
    assert copy.deepcopy(teacher) is teacher
    absent = pickle.loads(pickle.dumps(teacher))
    with pytest.raises(KDHooksError, match="left out when this model was pickled"):
        TeacherSession(absent)


def test_a_function_is_a_teacher_without_taps() -> None:
    teacher = Teacher(lambda images: images.mean(dim=(2, 3)))
    assert TeacherSession(teacher)(tiny_batch()[0]).embedding.shape == (12, 3)
    with pytest.raises(KDHooksError, match=r"no submodules to tap \(layer1\)"):
        TeacherSession(teacher, ["layer1"])


def test_tensors_of_an_inference_mode_function_can_be_used_in_a_loss() -> None:
    @torch.inference_mode()
    def embed(images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))

    embedding = TeacherSession(Teacher(embed))(tiny_batch()[0]).embedding
    weight = torch.ones(3, requires_grad=True)
    (embedding * weight).sum().backward()
    assert weight.grad is not None


def test_taps_features_and_an_inner_embedding() -> None:
    module = trained()
    teacher = Teacher(module, embedding="fc")
    output = TeacherSession(teacher, ["layer4"])(tiny_batch()[0])
    assert output.features["layer4"].shape == (12, 24, 2, 2)
    assert_close(module.features(output.embedding), module(tiny_batch()[0]))


def test_an_output_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(KDHooksError, match=r"must be a tensor \(b e\); found \(12, 3, 32, 32\)"):
        TeacherSession(Teacher(lambda images: images))(tiny_batch()[0])


def test_it_ignores_the_callers_autocast() -> None:
    seen: list[torch.dtype] = []

    class Spy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input.mean(dim=(2, 3)))
            seen.append(out.dtype)
            return out

    images, _ = tiny_batch()
    with torch.autocast("cpu", torch.bfloat16):
        full = TeacherSession(Teacher(Spy(3, 4)))(images).embedding
    half = TeacherSession(Teacher(Spy(3, 4), dtype=torch.bfloat16))(images).embedding
    assert seen == [torch.float32, torch.bfloat16]
    assert full.dtype == half.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of inductor
@pytest.mark.parametrize(
    "options",
    [
        {"channels_last": True},
        {"side_stream": True},
        {"compile": True},
        {"compile": "reduce-overhead"},
        *({"micro_batch": n} for n in (1, 5, 12, 99)),
    ],
)
def test_the_options_of_running_do_not_change_the_result(options: dict[str, Any]) -> None:
    images, _ = tiny_batch()
    outputs = []
    for teacher in (Teacher(trained()), Teacher(trained(), **options)):
        outputs.append(TeacherSession(teacher, ["layer2", "layer4"])(images))
    expected, found = outputs
    assert_close(found.embedding, expected.embedding)
    assert_close(found.features, expected.features)


def test_a_micro_batch_is_the_largest_batch_that_it_sees() -> None:
    seen: list[int] = []

    def embed(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.mean(dim=(2, 3))

    images, _ = tiny_batch()
    TeacherSession(Teacher(embed, micro_batch=5))(images)
    assert seen == [5, 5, 2]
    for wrong in (0, "4", True):
        with pytest.raises(KDHooksError, match=f"micro_batch must be .*; found {wrong!r}"):
            Teacher(embed, micro_batch=wrong)  # type: ignore[arg-type]


def test_cuda_graphs_of_two_streams_are_refused() -> None:
    Teacher(trained(), side_stream=True, compile=True)
    with pytest.raises(KDHooksError, match="side_stream and compile = 'max-autotune' exclude each"):
        Teacher(trained(), side_stream=True, compile="max-autotune")


def test_without_enough_memory_it_gets_smaller_batches(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def embed(images: Tensor) -> Tensor:
        seen.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images.mean(dim=(2, 3))

    images, _ = tiny_batch()
    teacher = TeacherSession(Teacher(embed))
    assert_close(teacher(images).embedding, images.mean(dim=(2, 3)))
    assert seen == [12, 6, 3, 3, 3, 3]
    seen.clear()
    teacher(images)
    assert seen == [3, 3, 3, 3]
    assert "not enough memory for 6 images in one call; from now on it gets 3" in caplog.text


def test_no_memory_for_a_single_image_is_an_error() -> None:
    def embed(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        TeacherSession(Teacher(embed))(tiny_batch()[0])


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (InputTransform(), [-1.0, 0.0, 1.0]),
        (InputTransform(order="bgr"), [1.0, 0.0, -1.0]),
        (InputTransform(mean=0, std=1), [0.0, 127.5, 255.0]),
        (InputTransform(mean=127.5, std=128), [-127.5 / 128, 0.0, 127.5 / 128]),
        (InputTransform(mean=[0.0], std=1), [0.0, 127.5, 255.0]),
        (InputTransform(mean=[0, 7.5, 55], std=[1, 2, 4]), [0.0, 60.0, 50.0]),
        (InputTransform(mean=(5.0, 7.5, 0.0), std=50, order="bgr"), [5.0, 2.4, 0.0]),
    ],
)
def test_input_transform(transform: InputTransform, expected: list[float]) -> None:
    image = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    found = transform(image)
    assert_close(found[0, :, 0, 0], torch.tensor(expected))


def test_input_transform_resizes() -> None:
    assert InputTransform(size=(56, 48))(torch.rand(2, 3, 112, 112)).shape == (2, 3, 56, 48)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": "grb"}, "order must be 'rgb' or 'bgr'; found 'grb'"),
        ({"std": 0.0}, "std must be positive; found 0"),
        ({"std": [1, 1, -1]}, r"std must be positive; found \(1.0, 1.0, -1.0\)"),
        (
            {"mean": "0"},
            "teacher input: mean must be a number, or a list of three; found '0'",
        ),
        ({"mean": [1, 2]}, r"mean must be a number, or a list of three; found \[1, 2\]"),
        ({"std": float("nan")}, "std must be a number, or a list of three; found nan"),
        (
            {"mean": 0.5, "std": 0.5},
            "those of pixels in 0..255, .* by 255",
        ),
        ({"size": 64}, "size must be height and width; found 64"),
        ({"size": [64, 0]}, r"size must be height and width; found \[64, 0\]"),
    ],
)
def test_input_transform_refuses(options: dict[str, object], match: str) -> None:
    with pytest.raises(KDHooksError, match=match):
        InputTransform(**options)  # type: ignore[arg-type]


def test_equal_input_transforms_have_the_same_repr() -> None:
    """The teacher's cache is identified by it."""
    given: list[Any] = [[1, 2, 3], (1.0, 2.0, 3.0), torch.tensor([1, 2, 3]), np.array([1, 2, 3])]
    assert len({repr(InputTransform(mean=mean)) for mean in given}) == 1
    assert repr(InputTransform(mean=0)).endswith("order='rgb', mean=0, std=127.5)")


@pytest.mark.parametrize("options", [{"compile": True}, {"channels_last": True}])
def test_a_function_cannot_be_changed_like_a_module(options: dict[str, Any]) -> None:
    with pytest.raises(
        KDHooksError, match="apply to a torch module, but the teacher is a function"
    ):
        Teacher(torch.flatten, **options)
