"""Running a teacher: frozen, and no dearer than it must be."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kdhooks.classes.rows import Rows
from kdhooks.errors import KDHooksError, listed
from kdhooks.later import SideStream
from kdhooks.taps import HALF, Taps, unwrap
from kdhooks.teacher.cache import CacheOptions, TeacherCache
from kdhooks.teacher.checkpoints import refuse_untrained
from kdhooks.teacher.fingerprints import probe_images, weights_of
from kdhooks.teacher.input_transform import InputTransform

log = logging.getLogger("kdhooks")

_PATIENCE = 8  # how often what was begun may be of no use
_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile; both use CUDA graphs


@dataclass(frozen=True)
class TeacherOutput:
    """embedding (b e) and the tapped features, both detached unless the teacher is adapted.

    finite: whether the embedding is known to be finite, so that no step needs to check it.
    """

    embedding: Tensor
    features: dict[str, Tensor]
    finite: bool = False

    def __iter__(self) -> Iterator[Tensor]:
        yield self.embedding
        yield from self.features.values()


Begun: TypeAlias = tuple[Tensor, int, Callable[[], TeacherOutput]]
"""Images, their version, and what gives the output for them."""


class Teacher:
    """A frozen model in eval mode, run without grad. Not an nn.Module, so nobody's child.

    Neither the student's checkpoint nor its optimizer, `.train()`, deepcopy or pickle can reach
    it. `model` is a torch module, or any function (b 3 h w) -> (b e).

    What `begin(images)` gives, before the student's forward, a call with the same images takes: the
    keys of a cache, or all of the teacher's output, on a stream of its own if wanted.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Tensor],
        *,
        transform: Callable[[Tensor], Tensor] | None = None,
        classifier: "Tensor | str | Path | Rows | None" = None,
        embedding: str = "",
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        compile: bool | str = False,
        side_stream: bool = False,
        micro_batch: int | None = None,
        cache: CacheOptions | None = None,
    ) -> None:
        """embedding: path of the submodule that puts it out; dtype: of its own autocast;
        compile: by torch.compile; a name is its mode, "reduce-overhead" or "max-autotune";
        side_stream: run beside the student's forward, on CUDA; it takes memory of its own;
        micro_batch: so many images at a time; by itself fewer, where a GPU's memory is short;
        cache: a folder for embeddings, used from `start_cache` on.
        """
        check_compile(compile)
        if side_stream and isinstance(compile, str):
            raise KDHooksError(
                f"teacher: side_stream and compile = {compile!r} exclude each other, since CUDA "
                "graphs of two streams would share their memory; take compile = true"
            )
        if micro_batch is not None and not (type(micro_batch) is int and micro_batch >= 1):
            raise KDHooksError(
                f"teacher: micro_batch must be a whole number, at least 1; found {micro_batch!r}"
            )
        self.module = unwrap(model).eval() if isinstance(model, nn.Module) else None
        if self.module is not None:
            self.module.requires_grad_(False)
            refuse_untrained(self.module)
            if channels_last:
                self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._run = self.module or model
        if compile and self.module is not None:
            self._run = torch.compile(self.module, mode=None if compile is True else compile)
        self._overwrites = isinstance(compile, str)  # its output, in the next call
        self._transform = transform or InputTransform()
        self._dtype = dtype
        self._channels_last = channels_last
        self._side_stream = side_stream
        self._beside: SideStream | None = None
        self._wasted = 0  # of what was begun
        self._micro_batch = micro_batch
        self._taps = _no_taps()
        self._tapped: tuple[str, ...] = ()
        self._cache_options = cache
        self.cache: TeacherCache | None = None
        self._device: torch.device | None = None
        self.embedding_path = embedding
        self.classifier = None if classifier is None else Rows.open(classifier)
        self.adapter: nn.Module | None = None
        if embedding:
            self.tap(())

    def tap(self, paths: Sequence[str]) -> None:
        """Record these submodules' outputs in every call from now on."""
        wanted = [*paths, *([self.embedding_path] if self.embedding_path else [])]
        if wanted and self.module is None:
            raise KDHooksError(
                f"teacher has no submodules to tap ({', '.join(wanted)}): it is a function or an "
                "ONNX session; kdhooks.onnx.to_torch turns an ONNX file into a module"
            )
        self.remove()
        self._tapped = tuple(paths)
        if self.module is not None:
            self._taps = Taps(self.module, wanted, "teacher")

    def start_cache(self, images: Tensor) -> None:
        """Look embeddings up from now on, if a cache was named; images are like the trainer's."""
        if self._cache_options is None:
            return
        if self._tapped or self.adapter:
            kept = f"tapped at {', '.join(self._tapped)}" if self._tapped else "adapted in training"
            raise KDHooksError(
                f"teacher.cache keeps embeddings alone, and the teacher is {kept}; remove "
                "teacher.cache, or the methods that do this"
            )
        ours = isinstance(self._transform, InputTransform)
        known = {
            "weights": weights_of(self.module or self._run),
            "input": repr(self._transform) if ours else None,
            "dtype": str(self._dtype or torch.float32),
            "embedding": self.embedding_path,
            "images": list(images.shape[1:]),
        }
        probe = self._forward(probe_images(images)).embedding
        self.cache = TeacherCache(self._cache_options, known, probe)

    def begin(self, images: Tensor) -> Begun | None:
        """(b 3 h w), at the student's entrance, whose activations take no memory yet.

        What it gives goes with a call about the same images. Where too much of it is not asked
        for, nothing is begun any more.
        """
        if torch.compiler.is_compiling() or images.is_inference() or self._wasted > _PATIENCE:
            return None
        if self._device != images.device:  # a call takes the teacher there
            return None
        self._wasted += 1  # until it is taken
        if self._wasted > _PATIENCE:
            log.info("the teacher runs after the student: it was not asked for what it had begun")
            return None
        return images, images._version, self._start(images)

    def __call__(self, images: Tensor, begun: Begun | None = None) -> TeacherOutput:
        """(b 3 h w), the trainer's images."""
        if begun is not None:
            seen, version, finish = begun
            if seen is images and version == images._version:
                self._wasted -= 1
                return finish()
        return self._forward(images) if self.cache is None else self._look_up(images)()

    def _start(self, images: Tensor) -> Callable[[], TeacherOutput]:
        """Puts the device to work; the result gives what came of it."""
        if self.cache is not None:
            return self._look_up(images)
        if self._side_stream and images.is_cuda and self.adapter is None:
            if self._beside is None or self._beside.device != images.device:
                self._beside = SideStream(images.device)
            return self._beside.run(self._forward, images)
        output = self._forward(images)
        return lambda: output

    def _look_up(self, images: Tensor) -> Callable[[], TeacherOutput]:
        """Sends the keys to the host; the result waits for them."""
        assert self.cache is not None
        finish = self.cache.begin(images, lambda some: self._forward(some).embedding)

        def output() -> TeacherOutput:
            embedding, finite = finish()
            return TeacherOutput(embedding, {}, finite)

        return output

    def _forward(self, images: Tensor) -> TeacherOutput:
        """The teacher itself, cached or not, on as many images at a time as memory is there for."""
        if self._micro_batch is not None and len(images) > self._micro_batch:
            return _joined([self._forward(part) for part in images.split(self._micro_batch)])
        try:
            return self._at_once(images)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
        # Outside of the handler, which holds what the first try has left.
        self._micro_batch = (len(images) + 1) // 2
        log.warning(
            "teacher: no memory for %d images at once; it sees %d at a time from now on, as "
            "teacher.micro_batch = %d would say",
            len(images),
            self._micro_batch,
            self._micro_batch,
        )
        return self._forward(images)

    def _at_once(self, images: Tensor) -> TeacherOutput:
        self._prepare(images)
        adapted = self.adapter is not None and torch.is_grad_enabled()
        switched = self._dtype is not None or torch.is_autocast_enabled(images.device.type)
        autocast = self._autocast if switched else nullcontext()
        with self._taps, torch.set_grad_enabled(adapted), autocast:
            images = self._transform(images)
            if self._channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            output = self.adapter(self.module, images) if self.adapter else self._run(images)
        features = self._taps.take()
        if self.embedding_path:
            output = features[self.embedding_path]
        found = TeacherOutput(_embedding(output), features)
        return _cloned(found) if self._overwrites else found

    def _prepare(self, images: Tensor) -> None:
        if self.module is not None and self.module.training:
            self.module.eval()
        if self._device != images.device:
            self._device = images.device
            self._autocast = torch.autocast(
                images.device.type, self._dtype or torch.bfloat16, enabled=self._dtype is not None
            )
            if self.module is not None:
                self.module.to(images.device)

    def remove(self) -> None:
        self._taps.remove()
        self._taps = _no_taps()
        if self._beside is not None:  # it may be at work on what nobody took
            self._beside.join()
        if self.cache:
            self.cache.flush()
        self.cache = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, ()


def check_compile(found: object, where: str = "") -> None:
    if not isinstance(found, bool) and found not in _MODES:
        raise KDHooksError(
            f"{where}teacher.compile must be true, false or one of {listed(_MODES)}; "
            f"found {found!r}"
        )


def _no_taps() -> Taps:
    return Taps(nn.Identity(), (), "teacher")


def _unpickled() -> Callable[[Tensor], TeacherOutput]:
    def absent(images: Tensor) -> TeacherOutput:
        raise KDHooksError("teacher was left out when this model was pickled; build it anew")

    return absent


def _cloned(output: TeacherOutput) -> TeacherOutput:
    features = {path: tensor.clone() for path, tensor in output.features.items()}
    return TeacherOutput(output.embedding.clone(), features)


def _joined(parts: Sequence[TeacherOutput]) -> TeacherOutput:
    features = {
        path: torch.cat([part.features[path] for part in parts]) for path in parts[0].features
    }
    return TeacherOutput(torch.cat([part.embedding for part in parts]), features)


def _embedding(output: object) -> Tensor:
    """In float32 at least, and usable in a loss."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise KDHooksError(
            f"teacher embedding must be a tensor (b e); found {found}; name the submodule that "
            "puts it out as taps.teacher.embedding"
        )
    if output.is_inference():
        output = output.clone()
    return output.float() if output.dtype in HALF else output
