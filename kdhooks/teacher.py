"""Loading a teacher that is surely the one meant, and running it frozen."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError
from kdhooks.fingerprints import probe_images, weights_of
from kdhooks.inputs import InputTransform
from kdhooks.shards import Rows
from kdhooks.taps import HALF, Taps, unwrap
from kdhooks.teacher_cache import CacheOptions, TeacherCache

log = logging.getLogger("kdhooks")

_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class TeacherOutput:
    """embedding (b e) and the tapped features, both detached unless the teacher is adapted."""

    embedding: Tensor
    features: dict[str, Tensor]


class Teacher:
    """A frozen model in eval mode, run without grad. Not an nn.Module, so nobody's child.

    Neither the student's checkpoint nor its optimizer, `.train()`, deepcopy or pickle can reach
    it. `model` is a torch module, or any function (b 3 h w) -> (b e).
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
        compile: bool = False,
        micro_batch: int | None = None,
        cache: CacheOptions | None = None,
    ) -> None:
        """embedding: path of the submodule that puts it out; dtype: of its own autocast;
        micro_batch: so many images at a time, where memory is short;
        cache: a folder for embeddings, used from `start_cache` on.
        """
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
        self._run = torch.compile(self.module) if compile and self.module else self.module or model
        self._transform = transform or InputTransform()
        self._dtype = dtype
        self._channels_last = channels_last
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
                "ONNX session; kdhooks.onnx_to_torch turns an ONNX file into a module"
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

    def __call__(self, images: Tensor) -> TeacherOutput:
        """(b 3 h w), the trainer's images."""
        if self.cache is None:
            return self._forward(images)
        return TeacherOutput(self.cache(images, lambda some: self._forward(some).embedding), {})

    def _forward(self, images: Tensor) -> TeacherOutput:
        """The teacher itself, cached or not."""
        if self._micro_batch is not None and len(images) > self._micro_batch:
            return _joined([self._forward(part) for part in images.split(self._micro_batch)])
        self._prepare(images)
        adapted = self.adapter is not None and torch.is_grad_enabled()
        with self._taps, torch.set_grad_enabled(adapted), self._autocast:
            images = self._transform(images)
            if self._channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            output = self.adapter(self.module, images) if self.adapter else self._run(images)
        features = self._taps.take()
        if self.embedding_path:
            output = features[self.embedding_path]
        return TeacherOutput(_embedding(output), features)

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
        if self.cache:
            self.cache.flush()
        self.cache = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, ()


def _no_taps() -> Taps:
    return Taps(nn.Identity(), (), "teacher")


def _unpickled() -> Callable[[Tensor], TeacherOutput]:
    def absent(images: Tensor) -> TeacherOutput:
        raise KDHooksError("teacher was left out when this model was pickled; build it anew")

    return absent


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


def refuse_untrained(module: nn.Module) -> None:
    """A network whose every BatchNorm is still as it was made never saw a face."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracked = [m for m in norms if m.running_mean is not None and m.running_var is not None]
    if tracked and not any(_has_statistics(norm) for norm in tracked):
        raise KDHooksError(
            f"teacher was never trained: the running statistics of all {len(tracked)} BatchNorm "
            "layers are at their initial values; load a checkpoint into it first"
        )


def _has_statistics(norm: "nn.modules.batchnorm._BatchNorm") -> bool:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return bool((norm.running_mean != 0).any() or (norm.running_var != 1).any())


def load_checkpoint(path: str | Path, whose: str = "teacher") -> dict[str, Tensor]:
    """The backbone's state dict of `model.pt` or `checkpoint_gpu_{rank}.pt`; its hash is logged.

    What DistributedDataParallel and torch.compile put before each key is left out.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise KDHooksError(f"{whose} checkpoint: there is no file '{path}'")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise KDHooksError(
            f"{whose} checkpoint: '{path}' can't be read as tensors alone ({error}); save "
            "model.state_dict() with torch.save"
        ) from error
    for key in ("state_dict_backbone", "state_dict"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise KDHooksError(f"{whose} checkpoint: '{path}' holds no state dict")
    log.info("%s %s sha256 %s", whose, path, sha256(path))
    # A distilled teacher's own training may have saved the methods' weights beside it.
    content = {key: value for key, value in content.items() if not key.startswith("kdhooks.")}
    while all(key.startswith(_PREFIXES) for key in content) and content:
        content = {key.partition(".")[2]: value for key, value in content.items()}
    return content


def load_strictly(
    module: nn.Module, state: dict[str, Tensor], path: str | Path, whose: str = "teacher"
) -> nn.Module:
    """Every weight of the module comes from the file, and every weight of the file is used."""
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise KDHooksError(
            f"{whose} checkpoint: '{path}' does not fit the network named for it; {error}"
        ) from error
    return module


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
