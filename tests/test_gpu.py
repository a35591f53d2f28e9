"""CUDA graphs, streams, loss scaling and NCCL behave on a GPU as documented.

The functions that do the work take the device as an argument. Except for those about events, they
can also be called with "cpu", for a trial on a machine without a GPU.
"""

import io
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from kdhooks import ClassShard, Distiller, Model, Teacher
from kdhooks.classes.chunked_sums import chunk_size
from kdhooks.later import Sent, SideStream
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from kdhooks_plugins.kd import KD
from kdhooks_plugins.thkd import THKD
from tests.second_device import in_a_process, needs_cuda
from tests.small_distiller import teacher_network

pytestmark = [pytest.mark.gpu, needs_cuda]
needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile needs a C compiler and Python's headers",
)
CLASSES, DIM = 6, 12
STAGES = ("layer1", "layer2", "layer3", "layer4")
FCD = {"name": "fcd", "projector": True}
BANK = {
    "name": "coupleface",
    "k": 2,
    "relations": "bank",
    "bank_momentum": 0.5,
    "alpha": {"value": 1.0, "warmup": 2},
}


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with in_a_process("cuda") as pool:
        yield pool


@pytest.fixture
def own_process() -> Iterator[ProcessPoolExecutor]:
    """A process for a single test, since some settings affect the whole process."""
    with in_a_process("cuda") as pool:
        yield pool


def batches(device: str, count: int) -> list[Tensor]:
    """Return the same images in different orders, so that mixed-up batches are noticed."""
    images, _ = tiny_batch()
    return [images.roll(shift, 0).to(device) for shift in range(count)]


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, an operator without a deterministic form raises an error."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# --- a compiled teacher --------------------------------------------------------------------------

Outputs = list[list[Tensor]]  # for each batch: its embedding, then its features


def taught(teacher: Teacher, device: str, tapped: bool = True) -> Outputs:
    """Return the outputs of all batches, read after the last call."""
    session = TeacherSession(teacher, ["layer2"] if tapped else ())
    outputs = [list(session(images)) for images in batches(device, 4)]
    return [[tensor.cpu() for tensor in output] for output in outputs]


def compiled(device: str, mode: bool | str, clones: bool = True) -> Outputs:
    torch._dynamo.reset()
    teacher = Teacher(teacher_network(), compile=mode)
    teacher.overwrites_output = teacher.overwrites_output and clones
    return taught(teacher, device, tapped=clones)  # a tap would split the CUDA graph


def eager(device: str, tapped: bool = True) -> Outputs:
    return taught(Teacher(teacher_network()), device, tapped)


@needs_compiler
@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_a_compiled_teacher_keeps_the_eager_outputs_over_later_calls(
    process: ProcessPoolExecutor, mode: bool | str
) -> None:
    found = process.submit(compiled, "cuda", mode).result()
    assert_close(found, process.submit(eager, "cuda").result(), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_without_clones_a_later_call_would_overwrite_the_output(
    own_process: ProcessPoolExecutor,
) -> None:
    """Torch then refuses to read it, or it has the values of the later call."""
    expected = own_process.submit(eager, "cuda", tapped=False).result()
    found = own_process.submit(compiled, "cuda", "reduce-overhead", clones=False)
    with pytest.raises((RuntimeError, AssertionError), match=r"overwritten|not close"):
        assert_close(found.result(), expected, rtol=1e-4, atol=1e-5)


# --- streams -------------------------------------------------------------------------------------


def late(images: Tensor) -> Tensor:
    """Delay the stream, so that a reader that does not wait reads too early."""
    if images.is_cuda:
        torch.cuda._sleep(50_000_000)
    return images


def beside(device: str, joins: bool = True) -> Outputs:
    teacher = Teacher(teacher_network(), transform=late, side_stream=True)
    session = TeacherSession(teacher, ["layer2"])
    given = batches(device, 4)
    session(given[0])  # `run_ahead` does nothing until the teacher is on the device
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        if not joins:
            patch.setattr(SideStream, "join", lambda stream: None)
        for images in given:
            session.run_ahead(images)
            outputs.append([tensor.clone() for tensor in session(images)])
    return [[tensor.cpu() for tensor in output] for output in outputs]


def test_a_teacher_on_its_own_stream_is_waited_for(process: ProcessPoolExecutor) -> None:
    expected = process.submit(eager, "cuda").result()
    found = process.submit(beside, "cuda").result()
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    early = process.submit(beside, "cuda", joins=False).result()
    with pytest.raises(AssertionError, match="not close"):
        assert_close(early, expected, rtol=1e-4, atol=1e-5)


def distilled(device: str, side_stream: bool) -> list[Tensor]:
    """Return the teacher's outputs as the losses get them, and the loss, of each step; then the
    weights.
    """
    torch.manual_seed(0)
    student = TinyFaceNet().to(device).train()
    teacher = Teacher(teacher_network(), transform=late, side_stream=side_stream)
    seen: list[Tensor] = []

    def note(loss: nn.Module, given: tuple[Any, ...]) -> None:
        outputs = given[1] if isinstance(given[1], list) else [given[1]]
        seen.extend(tensor.clone() for tensor in outputs)

    stages: dict[str, Any] = {"student_stages": STAGES, "teacher_stages": STAGES}
    with Distiller(student, teacher, ["fcd", "at"], input_shape=(3, 32, 32), **stages) as kd:
        for loss in kd.losses.values():
            loss.register_forward_pre_hook(note)
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9)
        labels = tiny_batch()[1].to(device)
        for images in batches(device, 6):
            task = student(images).square().mean()
            total = torch.stack([task, *kd(images, labels).values()]).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            seen.append(total)
        assert isinstance(kd._session, TeacherSession)
        assert (kd._session._stream is not None) == (side_stream and device == "cuda")
    return [tensor.detach().cpu() for tensor in (*seen, *student.parameters())]


def test_training_is_the_same_with_and_without_a_side_stream(process: ProcessPoolExecutor) -> None:
    expected = process.submit(distilled, "cuda", side_stream=False).result()
    found = process.submit(distilled, "cuda", side_stream=True).result()
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def sent() -> tuple[bool, list[float]]:
    """Return whether a tensor had arrived before it was read, and its values."""
    for cycles in (1000, 200_000_000):  # the first round loads the kernels, for which CUDA may wait
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        tensor = Sent(torch.ones(2, device="cuda") * cycles)
        assert tensor._arrived is not None
        early = tensor._arrived.query()
        found = tensor.get().tolist()
        del tensor  # the next round reuses its host memory, as CUDA may wait for an allocation
    return early, found


def test_reading_waits_for_a_tensor_that_has_not_arrived(process: ProcessPoolExecutor) -> None:
    assert process.submit(sent).result() == (False, [2e8, 2e8])


# --- mixed precision -----------------------------------------------------------------------------


class Scaled(NamedTuple):
    losses: list[float]
    moved: list[bool]  # whether the optimizer changed the weights in that step
    scales: list[float]
    steps: int  # counted by the Distiller


def scaled(device: str, name: str, overflow_in: int | None) -> Scaled:
    """Run eight steps in float16 with an active GradScaler."""
    torch.manual_seed(0)
    student = TinyFaceNet().to(device).train()
    rows = nn.Parameter(torch.randn(CLASSES, DIM).to(device))
    head = ClassShard(rows, 0, CLASSES)
    images, labels = (x.to(device) for x in tiny_batch())
    scaler = torch.amp.GradScaler(device, init_scale=64.0, growth_interval=100)
    ended = Scaled([], [], [], 8)
    with Distiller(student, tiny_teacher(), [FCD, name], head=head, input_shape=(3, 32, 32)) as kd:
        optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters(), rows], lr=1e-3)
        for step in range(8):
            if step == overflow_in:
                scaler.update(2.0**60)  # float16 overflows above 65504
            before = student.fc.weight.detach().clone()
            with torch.autocast(device, torch.float16):
                cosines = F.linear(F.normalize(student(images)), F.normalize(rows))
                task = F.cross_entropy(8 * cosines, labels)
                total = sum(kd(images, labels).values(), start=task)
            optimizer.zero_grad()
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
            ended.losses.append(total.item())
            ended.moved.append(not torch.equal(before, student.fc.weight))
            ended.scales.append(scaler.get_scale())
            if step == overflow_in:
                scaler.update(64.0)
        kd.check_finite()
        return ended._replace(steps=kd.step)


@pytest.mark.parametrize("name", ["kd", "gkd"])
def test_a_grad_scaler_skips_only_the_step_that_overflows(
    process: ProcessPoolExecutor, name: str
) -> None:
    ended = process.submit(scaled, "cuda", name, overflow_in=4).result()
    assert torch.tensor(ended.losses).isfinite().all()
    assert ended.moved == [step != 4 for step in range(8)]
    assert ended.scales == [2.0**59 if step == 4 else 64.0 for step in range(8)]
    assert ended.steps == 8
    assert all(process.submit(scaled, "cuda", name, overflow_in=None).result().moved)


# --- many classes --------------------------------------------------------------------------------


class Compared(NamedTuple):
    chunks: int
    found: list[Tensor]  # the loss, then its gradients, each divided by the largest expected one
    expected: list[Tensor]
    lacking: list[Tensor]  # expected, without the last chunk's classes


def chunked(device: str, name: str, b: int, d: int = 64) -> Compared:
    """Compute a loss in chunks of classes, and its plain form in float64."""
    c = 22 * chunk_size(torch.empty(b, d, device=device), trained=name == "kd") // 10
    generator = torch.Generator().manual_seed(0)
    student, teacher, ours, theirs = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((b, d), (b, d), (c, d), (c, d))
    )
    labels = torch.randint(c, (b,), generator=generator).to(device)
    classifier, trained = ClassShard(theirs, 0, c), [student.requires_grad_()]
    if name == "kd":
        trained.append(ours.requires_grad_())
        shards = [classifier, ClassShard(ours, 0, c)]
        loss = KD(standardize=False).classifier_share().loss
    else:
        ours, shards = theirs, [classifier]
        loss = THKD().classifier_share(Model(None, d), Model(None, d)).loss
    value, _ = loss(student, teacher, labels, *shards)
    found = [value, *torch.autograd.grad(value, trained)]
    sizes = [len(chunk.weight) for chunk in shards[-1].chunks(student)]

    def plain(classes: int) -> list[Tensor]:
        value = divergence(student, teacher, ours[:classes], theirs[:classes])
        return [value, *torch.autograd.grad(value, trained)]

    expected, lacking = plain(c), plain(c - sizes[-1])
    peaks = [tensor.detach().abs().max() for tensor in expected]

    def shares(tensors: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(tensors, peaks, strict=True)
        return [(tensor.detach().double() / peak).float().cpu() for tensor, peak in pairs]

    return Compared(len(sizes), shares(found), shares(expected), shares(lacking))


def divergence(student: Tensor, teacher: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """T² · KL(teacher ‖ student) of softened scores in float64, at scale 64 and T = 4."""
    sides = ((student, ours), (teacher, theirs))
    cosines = [F.normalize(x.double()) @ F.normalize(rows.double()).T for x, rows in sides]
    log_s, log_t = ((64 / 4 * x).log_softmax(dim=1) for x in cosines)
    return 16 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("name", ["kd", "thkd"])
def test_a_loss_in_several_chunks_agrees_with_its_plain_form(
    process: ProcessPoolExecutor, name: str
) -> None:
    """The last of the three chunks is not full."""
    ended = process.submit(chunked, "cuda", name, b=1024).result()
    assert ended.chunks == 3
    assert_close(ended.found, ended.expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(ended.lacking, ended.expected, rtol=1e-3, atol=1e-4)


# --- bit for bit ---------------------------------------------------------------------------------


class Run:
    """A student with a head, and, if there are methods, a Distiller."""

    def __init__(self, device: str, methods: Sequence[object]) -> None:
        torch.manual_seed(3)
        self.student = TinyFaceNet().to(device).train()
        self.head = nn.Linear(DIM, CLASSES, bias=False).to(device)
        shard = ClassShard(self.head.weight, 0, CLASSES)
        self.kd = (
            Distiller(self.student, tiny_teacher(), methods, head=shard, input_shape=(3, 32, 32))
            if methods
            else None
        )
        learned = [*self.student.parameters(), *self.head.parameters()]
        own = self.kd.parameters() if self.kd else []
        self.optimizer = torch.optim.SGD([*learned, *own], lr=0.01, momentum=0.9)
        self.device = device

    def train(self, steps: range) -> list[Tensor]:
        """Return the weights of student and head after these steps."""
        labels = tiny_batch()[1]
        for step, images in enumerate(batches(self.device, steps.stop)):
            if step not in steps:
                continue
            classes = labels.roll(step).to(self.device)
            loss = F.cross_entropy(self.head(self.student(images)), classes)
            if self.kd:
                loss = sum(self.kd(images, classes).values(), start=loss)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        trained = {**self.student.state_dict(), **self.head.state_dict()}
        return [tensor.cpu() for tensor in trained.values()]

    def parts(self) -> list[Any]:
        return [self.student, self.head, self.optimizer, self.kd]


def trained(device: str, methods: Sequence[object]) -> list[Tensor]:
    with deterministic():
        return Run(device, methods).train(range(4))


@pytest.mark.parametrize(
    "name", ["fcd", "coupleface", "proxylesskd", "kd", "gkd", "thkd", "adadistill"]
)
def test_weight_zero_is_the_plain_run_bit_for_bit(process: ProcessPoolExecutor, name: str) -> None:
    plain = process.submit(trained, "cuda", []).result()
    idle = process.submit(trained, "cuda", [{"name": name, "weight": 0.0}]).result()
    assert_close(idle, plain, rtol=0, atol=0)
    other = process.submit(trained, "cuda", [{"name": name, "weight": 0.1}]).result()
    with pytest.raises(AssertionError, match=r"not (equal|close)"):
        assert_close(other, plain, rtol=0, atol=0)


def resumed(device: str, loaded: int) -> list[Tensor]:
    """Run two steps, and two more in a second run that loads `loaded` of the first's four parts."""
    methods = [FCD, BANK, "adadistill"]
    with deterministic():
        first = Run(device, methods)
        first.train(range(2))
        if not loaded:
            return first.train(range(2, 4))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first.parts()], file)
        file.seek(0)
        second = Run(device, methods)
        for part, state in list(zip(second.parts(), torch.load(file), strict=True))[:loaded]:
            part.load_state_dict(state)
        return second.train(range(2, 4))


def test_a_run_resumes_from_its_state_dict_bit_for_bit(process: ProcessPoolExecutor) -> None:
    straight = process.submit(resumed, "cuda", loaded=0).result()
    assert_close(process.submit(resumed, "cuda", loaded=4).result(), straight, rtol=0, atol=0)
    without = process.submit(resumed, "cuda", loaded=3).result()
    with pytest.raises(AssertionError, match=r"not (equal|close)"):
        assert_close(without, straight, rtol=0, atol=0)


# --- NCCL ----------------------------------------------------------------------------------------


class Ranked(NamedTuple):
    weights: list[Tensor]
    moved: list[bool]  # whether each weight differs from its first value


def in_a_group(device: str, folder: str) -> Ranked:
    """Do the same as `alone` under DDP, with classes split over a group of one rank."""
    cuda = device == "cuda"
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # a machine may have no other network
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("nccl" if cuda else "gloo", init_method=meeting, rank=0, world_size=1)
    try:
        return ranked(device, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def alone(device: str) -> Ranked:
    return ranked(device, None)


def ranked(device: str, group: "dist.ProcessGroup | None") -> Ranked:
    torch.manual_seed(0)
    student: nn.Module = TinyFaceNet().to(device).train()
    if group is not None:
        student = DistributedDataParallel(student, device_ids=[0] if device == "cuda" else None)
    rows = nn.Parameter(torch.randn(CLASSES, DIM).to(device))
    head = ClassShard(rows, 0, CLASSES, group)
    images, labels = (x.to(device) for x in tiny_batch())
    with Distiller(student, tiny_teacher(), [FCD, "kd"], head=head, input_shape=(3, 32, 32)) as kd:
        learned = [*student.parameters(), *kd.parameters(), rows]
        first = [tensor.detach().clone() for tensor in learned]
        optimizer = torch.optim.SGD(learned, lr=1e-3)
        for _ in range(2):
            task = student(images).square().mean()
            total = torch.stack([task, *kd(images, labels).values()]).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    moved = [not torch.equal(*pair) for pair in zip(learned, first, strict=True)]
    return Ranked([tensor.detach().cpu() for tensor in learned], moved)


def test_one_rank_with_nccl_and_ddp_equals_a_run_without(
    own_process: ProcessPoolExecutor, tmp_path: Path
) -> None:
    expected = own_process.submit(alone, "cuda").result()
    found = own_process.submit(in_a_group, "cuda", str(tmp_path)).result()
    assert all(tensor.isfinite().all() for tensor in found.weights)
    assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-6)
    assert found.moved == expected.moved
    assert sum(found.moved) > len(found.moved) / 2, "so that equal weights say something"
