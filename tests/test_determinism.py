"""No method needs an operator that has no deterministic form on CUDA.

`torch.use_deterministic_algorithms(True)` raises an error for such an operator, but only on CUDA.
A list of these operators stands in for CUDA on a machine without a GPU; with a GPU, every method is
also trained under torch's own check, twice with the same result.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kdhooks import ClassShard, Distiller, FeatureTap, Model, hookimpl, methods
from kdhooks.discovery import load
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from kdhooks_plugins._maps import pool
from tests.maps import normal
from tests.second_device import in_a_process, needs_cuda
from tests.transformers import TinyViT, teacher_of

aten = torch.ops.aten
NAMES = [info.name for info in methods()]
STEPS = 3

# The operators for which torch.use_deterministic_algorithms(True) raises an error on CUDA, in one
# of the supported versions of torch: always, or if the condition holds for their arguments. The
# documentation of torch 2.13 also lists `cumsum`, which has had a deterministic form for longer
# (pytorch pull requests 140887 and 190975).
ALWAYS = (
    aten._adaptive_avg_pool2d_backward,
    aten._adaptive_avg_pool3d_backward,
    aten._ctc_loss_backward,
    aten._embedding_bag_dense_backward,
    aten.adaptive_max_pool2d_backward,
    aten.avg_pool3d_backward,
    aten.fractional_max_pool2d_backward,
    aten.fractional_max_pool3d_backward,
    aten.grid_sampler_2d_backward,
    aten.grid_sampler_3d_backward,
    aten.histc,
    aten.kthvalue,
    aten.max_pool3d_with_indices_backward,
    aten.max_unpool2d,
    aten.max_unpool3d,
    aten.nll_loss2d_forward,
    aten.put,
    aten.put_,
    aten.reflection_pad1d_backward,
    aten.reflection_pad2d_backward,
    aten.reflection_pad3d_backward,
    aten.replication_pad1d_backward,
    aten.replication_pad2d_backward,
    aten.replication_pad3d_backward,
    aten.upsample_bicubic2d_backward,
    aten.upsample_bilinear2d_backward,
    aten.upsample_linear1d_backward,
    aten.upsample_trilinear3d_backward,
    aten._upsample_bicubic2d_aa_backward,
    aten._upsample_bilinear2d_aa_backward,
)


def _has_indices(func: Any, args: Any) -> bool:
    return "dim" in func._overloadname


def _has_weights(func: Any, args: Any) -> bool:
    return len(args) > 1 and args[1] is not None


def _is_product(func: Any, args: Any) -> bool:
    return "prod" in args


def _is_quantized(func: Any, args: Any) -> bool:
    return bool(args[0].is_quantized)


SOMETIMES: dict[Any, Callable[[Any, Any], bool]] = {
    aten.bincount: _has_weights,
    aten.median: _has_indices,
    aten.nanmedian: _has_indices,
    aten.resize_: _is_quantized,
    aten.scatter_reduce: _is_product,
    aten.scatter_reduce_: _is_product,
}


class OnlyDeterministic(TorchDispatchMode):
    """Inside, an operator without a deterministic form on CUDA raises an error on any device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        operator, condition = func.overloadpacket, SOMETIMES.get(func.overloadpacket)
        if operator in ALWAYS or (condition is not None and condition(func, given)):
            raise RuntimeError(f"{func} does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


@contextmanager
def torchs_own() -> Iterator[None]:
    """Inside, torch itself raises the error, but only on CUDA."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_of(place: str) -> AbstractContextManager[Any]:
    return torchs_own() if place == "cuda" else OnlyDeterministic()  # type: ignore[no-untyped-call]


def trained(
    place: str, make: Callable[[], object], transformer: bool = False, half: bool = False
) -> list[Tensor]:
    """Return each step's loss, followed by the weights of the student and of the losses.

    The student's stages are larger than the teacher's, so they are pooled. half: under autocast.
    """
    torch.manual_seed(0)
    student = TinyFaceNet().to(place).train()
    rows = nn.Parameter(torch.randn(6, 12).to(place))
    blocks, layers = ("blocks.0", "blocks.1", "blocks.2"), ("layer2", "layer3", "layer4")
    kd = Distiller(
        student,
        teacher_of(TinyViT) if transformer else tiny_teacher(),
        [make()],
        student_stages=("layer1", "layer2", "layer3"),
        teacher_stages=blocks if transformer else layers,
        head=ClassShard(rows, 0, 6),
        input_shape=(3, 32, 32),
    )
    images, labels = (x.to(place) for x in tiny_batch())
    learned = [*student.parameters(), *kd.parameters(), rows]
    optimizer = torch.optim.SGD(learned, lr=0.01, momentum=0.9)
    losses = []
    with kd, check_of(place):
        for _ in range(STEPS):
            with torch.autocast(place, torch.float16) if half else nullcontext():
                task = student(images).float().square().mean()
                loss = torch.stack([task, *kd(images, labels).values()]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        kd.check_finite()
    return [x.detach().cpu() for x in (*losses, *learned)]


def method(name: str, **options: Any) -> object:
    return load(name)(**options)


WARM_UP = {"value": 0.5, "warmup": 2}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("cakd", {"prompts": {"number": 2}, "teacher_cls_weight": 0.1}),
    ("coupleface", {"k": 2, "relations": "bank", "bank_momentum": 0.5, "alpha": WARM_UP}),
    ("fcd", {"projector": True}),
    ("proxylesskd", {"projector": True, "extra_fcd_weight": 1.0, "m": WARM_UP}),
]
every_method = pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in NAMES), *OPTIONS]
)
both_teachers = pytest.mark.parametrize("transformer", [False, True])


@both_teachers
@every_method
def test_a_method_uses_only_operators_with_a_deterministic_form(
    name: str, options: dict[str, Any], transformer: bool
) -> None:
    if "prompts" in options and not transformer:
        pytest.skip("prompts need a transformer")
    trained("cpu", partial(method, name, **options), transformer)


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with in_a_process("cuda") as pool:
        yield pool


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("half", [False, True])
@both_teachers
@every_method
def test_a_method_trains_bit_for_bit_the_same_on_a_gpu(
    process: ProcessPoolExecutor,
    name: str,
    options: dict[str, Any],
    transformer: bool,
    half: bool,
) -> None:
    if "prompts" in options and not transformer:
        pytest.skip("prompts need a transformer")
    make = partial(method, name, **options)
    first, second = (
        process.submit(trained, "cuda", make, transformer, half).result() for _ in range(2)
    )
    assert_close(first, second, rtol=0, atol=0)
    assert all(tensor.isfinite().all() for tensor in first)


# --- pooling -------------------------------------------------------------------------------------

SIZES = [
    ((14, 14), (12, 12)),
    ((7, 7), (5, 5)),
    ((28, 28), (14, 14)),
    ((13, 9), (4, 7)),
    ((7, 7), (4, 4)),
    ((7, 7), (2, 2)),
    ((7, 7), (1, 1)),
    ((8, 9), (4, 2)),
    ((9, 8), (9, 3)),
    ((9, 8), (2, 8)),
    ((5, 3), (1, 2)),
    ((3, 5), (4, 7)),
    ((1, 1), (2, 3)),
    ((56, 56), (9, 40)),
]


@pytest.mark.parametrize(("size", "wanted"), SIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_gives_the_averages_and_the_gradient_of_adaptive_pooling(
    size: tuple[int, int], wanted: tuple[int, int], layout: torch.memory_format
) -> None:
    x = normal(1, 2, 3, *size).contiguous(memory_format=layout).requires_grad_()
    towards = normal(2, 2, 3, *wanted)
    expected, found = F.adaptive_avg_pool2d(x, wanted), pool(x, wanted)
    assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert_close(
        torch.autograd.grad(found, x, towards),
        torch.autograd.grad(expected, x, towards),
        rtol=1e-13,
        atol=1e-14,
    )


@pytest.mark.parametrize("n", range(1, 17))
def test_pooling_agrees_for_all_pairs_of_heights_and_widths(n: int) -> None:
    for m in range(1, 17):
        x = normal(n, 1, 2, n, m)
        for size in ((m, n), (max(1, n - 1), max(1, m // 2))):
            assert_close(pool(x, size), F.adaptive_avg_pool2d(x, size), rtol=1e-13, atol=1e-14)


def test_pooling_keeps_the_dtype_and_a_tensor_of_that_size() -> None:
    x = torch.rand(2, 3, 7, 7, dtype=torch.bfloat16)
    assert pool(x, (7, 7)) is x
    for size in ((5, 5), (1, 1)):
        assert pool(x, size).dtype == torch.bfloat16
        assert_close(pool(x, size), F.adaptive_avg_pool2d(x, size))


# --- nondeterministic operators are noticed ------------------------------------------------------


class _Pooling(nn.Module):
    """Compares adaptively pooled maps."""

    def forward(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        ours, theirs = (F.adaptive_avg_pool2d(x[0], 3) for x in (student, teacher))
        return (ours.mean(dim=1) - theirs.mean(dim=1)).square().mean()


class _Method:
    @hookimpl
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
        ours, theirs = student.stages[0].path, teacher.stages[0].path
        return FeatureTap("pooling", _Pooling(), 1.0, student=(ours,), teacher=(theirs,))


REFUSAL = "does not have a deterministic implementation"


def test_a_method_that_pools_adaptively_is_noticed() -> None:
    with pytest.raises(RuntimeError, match=f"_adaptive_avg_pool2d_backward.default {REFUSAL}"):
        trained("cpu", _Method)


@pytest.mark.gpu
@needs_cuda
def test_torch_itself_refuses_adaptive_pooling_on_a_gpu(process: ProcessPoolExecutor) -> None:
    with pytest.raises(RuntimeError, match=f"adaptive_avg_pool2d_backward_cuda {REFUSAL}"):
        process.submit(trained, "cuda", _Method).result()


MAPS = (2, 3, 6, 6)
Computation = Callable[[Tensor], Tensor]
Cases = dict[str, Computation]
NOTICED: Cases = {
    "_adaptive_avg_pool2d_backward": lambda x: F.adaptive_avg_pool2d(x, 4),
    "_adaptive_avg_pool3d_backward": lambda x: F.adaptive_avg_pool3d(x, 2),
    "_ctc_loss_backward": lambda x: F.ctc_loss(
        x.flatten(1).T[:, :, None].repeat(1, 1, 2).log_softmax(2),
        torch.ones(2, 1, dtype=torch.long),
        torch.tensor([9, 9]),
        torch.tensor([1, 1]),
    ),
    "adaptive_max_pool2d_backward": lambda x: F.adaptive_max_pool2d(x, 4),
    "avg_pool3d_backward": lambda x: F.avg_pool3d(x, 2),
    "bincount": lambda x: torch.arange(3).bincount(x.detach().flatten()[:3].abs()) * x.sum(),
    "grid_sampler_2d_backward": lambda x: F.grid_sample(
        x, torch.zeros(2, 4, 4, 2, dtype=x.dtype), align_corners=False
    ),
    "histc": lambda x: x.detach().histc(3) * x.sum(),
    "kthvalue": lambda x: x.kthvalue(1).values,
    "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), (2, 2)),
    "median": lambda x: x.median(dim=1).values,
    "nll_loss2d_forward": lambda x: F.nll_loss(x, torch.zeros(2, 6, 6, dtype=torch.long)),
    "put": lambda x: x.put(torch.arange(2), x.flatten()[:2]),
    "reflection_pad2d_backward": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "replication_pad2d_backward": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "scatter_reduce": lambda x: x.scatter_reduce(0, torch.zeros(MAPS, dtype=torch.long), x, "prod"),
    "upsample_bicubic2d_backward": lambda x: F.interpolate(x, 4, mode="bicubic"),
    "upsample_bilinear2d_backward": lambda x: F.interpolate(x, 4, mode="bilinear"),
    "_upsample_bilinear2d_aa_backward": lambda x: F.interpolate(
        x, 4, mode="bilinear", antialias=True
    ),
}
ALLOWED: Cases = {
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "bincount": lambda x: torch.arange(3).bincount() * x.sum(),
    "cumsum": lambda x: x.cumsum(dim=1),
    "index_add": lambda x: x.index_add(0, torch.zeros(2, dtype=torch.long), x),
    "interpolate": lambda x: F.interpolate(x, 4),
    "median": lambda x: x.median(),
    "pool": lambda x: pool(x, (4, 4)),
    "scatter_add": lambda x: x.scatter_add(0, torch.zeros(MAPS, dtype=torch.long), x),
}


def computed(computation: Computation) -> None:
    x = normal(1, *MAPS).requires_grad_()
    with check_of("cpu"):
        computation(x).sum().backward()


@pytest.mark.parametrize("name", NOTICED)
def test_an_operator_without_a_deterministic_form_is_noticed(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"aten\.{name}\.\w+ {REFUSAL}"):
        computed(NOTICED[name])


@pytest.mark.parametrize("name", ALLOWED)
def test_an_operator_with_a_deterministic_form_is_allowed(name: str) -> None:
    computed(ALLOWED[name])
