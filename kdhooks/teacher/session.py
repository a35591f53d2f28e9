"""Runs a teacher for one training run: its taps, its adapter, its cache, and running it ahead."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdhooks.copies import NotCopied
from kdhooks.errors import KDHooksError
from kdhooks.later import Later, Ready, SideStream
from kdhooks.taps import HALF, Taps
from kdhooks.teacher.cache import CachedEmbeddings, TeacherCache
from kdhooks.teacher.embedding_table import EmbeddingTable
from kdhooks.teacher.fingerprints import probe_images, weights_of
from kdhooks.teacher.input_transform import InputTransform
from kdhooks.teacher.teacher import Teacher, set_eval

log = logging.getLogger("kdhooks")

_PATIENCE = 8  # outputs that were started ahead and then not used


@dataclass(frozen=True)
class TeacherOutput:
    """embedding (b e) and the tapped features, detached unless the teacher is adapted.

    finite: whether the embedding is known to be finite, so that no step needs to check it.
    """

    embedding: Tensor
    features: dict[str, Tensor]
    finite: bool = False

    def __iter__(self) -> Iterator[Tensor]:
        yield self.embedding
        yield from self.features.values()

    def each(self, change: Callable[[Tensor], Tensor]) -> "TeacherOutput":
        """Apply `change`, which must keep finite tensors finite, to every tensor."""
        features = {path: change(tensor) for path, tensor in self.features.items()}
        return TeacherOutput(change(self.embedding), features, self.finite)


class _Ahead(NamedTuple):
    """The output for images whose student forward has just started."""

    images: Tensor
    version: int  # of the images, to notice if they are overwritten before the call
    output: Later[TeacherOutput]


class TeacherSession(NotCopied):
    """Runs a `Teacher`, frozen, in eval mode and without gradients, until it is closed.

    A session owns everything that the run adds to the teacher, so the sessions of several runs are
    independent. Calling it returns the output for the trainer's images. `run_ahead` starts that
    work before the student's forward, while the student's activations do not yet take memory.
    """

    def __init__(
        self,
        teacher: Teacher,
        taps: Sequence[str] = (),
        adapter: nn.Module | None = None,
        like: Tensor | None = None,
    ) -> None:
        """
        taps: paths of the teacher's submodules whose outputs each call returns. The path of the
            teacher's embedding stands for the embedding, wherever it comes from.
        adapter: called as (the teacher's module, images) -> (b e), with gradients.
        like: images (b 3 h w) of the trainer's shape, which are needed to open the teacher's cache.
        """
        self.teacher, self.adapter = teacher, adapter
        self.named = [("teacher", teacher)]
        self.cache: TeacherCache | None = None
        self._tapped = tuple(path for path in taps if path != teacher.embedding)
        self._taps_embedding = teacher.embedding in taps
        self._micro_batch = teacher.micro_batch
        self._stream: SideStream | None = None
        self._ahead: _Ahead | None = None
        self._unused = 0
        self._device: torch.device | None = None
        paths = [*self._tapped, *([teacher.embedding] if teacher.embedding else [])]
        if paths and teacher.module is None:
            if teacher.stored is not None:
                raise KDHooksError(
                    f"teacher has no submodules to tap ({', '.join(paths)}): its embeddings are "
                    "stored, and no network is loaded; give the network itself"
                )
            raise KDHooksError(
                f"teacher has no submodules to tap ({', '.join(paths)}): it is a function or an "
                "ONNX session; kdhooks.onnx.to_torch turns an ONNX file into a module"
            )
        if adapter is not None and teacher.run is not None:
            raise KDHooksError(
                f"{type(adapter).__name__} adapts the teacher by calling its module, which leaves "
                "out the argument run; found a Teacher with run=…; give Teacher a module that "
                "holds the model and whose forward does what run does, or switch the adaptation "
                "off (in cakd: prompts = { number = 0 })"
            )
        self._taps = Taps(teacher.module or nn.Identity(), paths, "teacher")
        self._table = teacher.stored if isinstance(teacher.stored, EmbeddingTable) else None
        if isinstance(teacher.stored, CachedEmbeddings):
            self.cache = teacher.stored.open()
        if like is not None and teacher.cache is not None:
            try:
                self.cache = self._open_cache(like)
            except BaseException:
                self.close()
                raise

    def __call__(self, images: Tensor, indices: Tensor | None = None) -> TeacherOutput:
        """(b 3 h w), the trainer's images; (b), their indices in the training set, for a table."""
        ahead, self._ahead = self._ahead, None
        if self._table is not None:
            output = TeacherOutput(self._table(images, indices), {})
        elif ahead is not None and ahead.images is images and ahead.version == images._version:
            self._unused -= 1
            output = ahead.output.get()
        else:
            output = self._forward(images) if self.cache is None else _LookedUp(self, images).get()
        if self._taps_embedding:
            output.features[self.teacher.embedding] = output.embedding
        return output

    @property
    def by_index(self) -> bool:
        """Whether a call needs the indices of the samples in the training set."""
        return self._table is not None

    @property
    def caches(self) -> list[TeacherCache]:
        """The caches of all its teachers."""
        return [] if self.cache is None else [self.cache]

    def of_each(self, output: TeacherOutput) -> list[tuple[str, Teacher, TeacherOutput]]:
        """Return the name, teacher and output of each teacher; here there is only one."""
        return [("teacher", self.teacher, output)]

    def run_ahead(self, images: Tensor) -> None:
        """Start computing the output for these images (b 3 h w), for the next call with them.

        After _PATIENCE outputs that no call used, running ahead is switched off.
        """
        self._ahead = None
        if self._table is not None:  # it needs the indices, which come with the call
            return
        if torch.compiler.is_compiling() or images.is_inference() or self._unused > _PATIENCE:
            return
        if self._device != images.device and self.teacher.stored is None:
            return  # only a call moves the teacher to another device
        self._unused += 1  # a call that uses the output subtracts it again
        if self._unused > _PATIENCE:
            log.info(
                "from now on the teacher runs after the student, since no call used the outputs "
                "that were started ahead"
            )
            return
        self._ahead = _Ahead(images, images._version, self._start(images))

    def drop_ahead(self) -> None:
        """Discard the output that was started ahead."""
        self._ahead = None

    def _start(self, images: Tensor) -> Later[TeacherOutput]:
        if self.cache is not None:
            return _LookedUp(self, images)
        if self.teacher.side_stream and images.is_cuda and self.adapter is None:
            if self._stream is None or self._stream.device != images.device:
                self._stream = SideStream(images.device)
            return self._stream.run(self._forward, images)
        return Ready(self._forward(images))

    def _forward(self, images: Tensor) -> TeacherOutput:
        """Run the teacher itself, on as many images at a time as fit into memory."""
        if self._micro_batch is not None and len(images) > self._micro_batch:
            return _joined([self._forward(part) for part in images.split(self._micro_batch)])
        try:
            return self._forward_once(images)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
        # Outside of the handler, because the exception keeps the first try's tensors alive.
        self._micro_batch = (len(images) + 1) // 2
        log.warning(
            "teacher: not enough memory for %d images in one call; from now on it gets %d at a "
            "time, as with teacher.micro_batch = %d",
            len(images),
            self._micro_batch,
            self._micro_batch,
        )
        return self._forward(images)

    def _forward_once(self, images: Tensor) -> TeacherOutput:
        teacher = self.teacher
        self._prepare(images)
        adapted = self.adapter is not None and torch.is_grad_enabled()
        switched = teacher.dtype is not None or torch.is_autocast_enabled(images.device.type)
        autocast = self._autocast if switched else nullcontext()
        with self._taps, torch.set_grad_enabled(adapted), autocast:
            images = teacher.transform(images)
            if images.dtype != self._dtype:
                images = images.to(self._dtype)
            if teacher.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            if self.adapter is None:
                output = teacher.forward(images)
            else:
                output = self.adapter(teacher.module, images)
        features = self._taps.take()
        if teacher.embedding:
            output = features[teacher.embedding]
        found = TeacherOutput(_embedding(output), features)
        return found.each(torch.clone) if teacher.overwrites_output else found

    def _prepare(self, images: Tensor) -> None:
        teacher = self.teacher
        if teacher.module is not None and teacher.module.training:
            set_eval(teacher.module)  # the host may have switched it to training mode
        if self._device != images.device:
            self._device = images.device
            self._autocast = torch.autocast(
                images.device.type,
                teacher.dtype or torch.bfloat16,
                enabled=teacher.dtype is not None,
            )
            if teacher.module is not None:
                teacher.module.to(images.device)
            self._dtype = _input_dtype(teacher.module)

    def _open_cache(self, images: Tensor) -> TeacherCache:
        teacher = self.teacher
        assert teacher.cache is not None
        if self._tapped or self.adapter:
            kept = f"tapped at {', '.join(self._tapped)}" if self._tapped else "adapted in training"
            raise KDHooksError(
                f"teacher.cache stores embeddings only, but the teacher is {kept}; remove "
                "teacher.cache, or the methods that need this"
            )
        ours = isinstance(teacher.transform, InputTransform)
        known = {
            "weights": weights_of(teacher.module or teacher.forward),
            "input": repr(teacher.transform) if ours else None,
            "dtype": str(teacher.dtype or torch.float32),
            "embedding": teacher.embedding,
            "images": list(images.shape[1:]),
        }
        probe = self._forward(probe_images(images)).embedding
        return TeacherCache(teacher.cache, known, probe)

    def close(self) -> None:
        """Remove every hook from the teacher, and write the cache's pending embeddings."""
        self._taps.remove()
        self._ahead = None
        if self._stream is not None:  # it may still be computing an unused output
            self._stream.join()
        if self.cache is not None:
            self.cache.flush()

    def __enter__(self) -> "TeacherSession":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _LookedUp:
    """Embeddings from the cache: `get` waits for their keys on the host, and looks them up."""

    def __init__(self, session: TeacherSession, images: Tensor) -> None:
        assert session.cache is not None
        self._rows = session.cache.start(images, lambda some: session._forward(some).embedding)

    def get(self) -> TeacherOutput:
        embedding, finite = self._rows.get()
        return TeacherOutput(embedding, {}, finite)


def _input_dtype(module: nn.Module | None) -> torch.dtype:
    """The dtype of the module's floating-point parameters; float32 for a function."""
    parameters = [] if module is None else module.parameters()
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


def _joined(parts: Sequence[TeacherOutput]) -> TeacherOutput:
    features = {
        path: torch.cat([part.features[path] for part in parts]) for path in parts[0].features
    }
    return TeacherOutput(torch.cat([part.embedding for part in parts]), features)


def _embedding(output: object) -> Tensor:
    """Check the embedding, and return it in float32 at least, and usable in a loss."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise KDHooksError(
            f"teacher embedding must be a tensor (b e); found {found}; specify the submodule that "
            "returns it as taps.teacher.embedding"
        )
    if output.is_inference():
        output = output.clone()
    return output.float() if output.dtype in HALF else output
