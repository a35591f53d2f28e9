"""A frozen teacher model and how to run it, which several runs can share."""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdhooks.classes.rows import Rows
from kdhooks.errors import KDHooksError, listed
from kdhooks.kinds import Bounds, Option, shown
from kdhooks.options import check_arguments
from kdhooks.paths import unwrap
from kdhooks.teacher.cache import CachedEmbeddings, CacheOptions
from kdhooks.teacher.checkpoints import refuse_untrained
from kdhooks.teacher.embedding_table import EmbeddingTable
from kdhooks.teacher.input_transform import InputTransform

log = logging.getLogger("kdhooks")

_ARGUMENTS = {
    "run": Option(Callable | None, None),
    "transform": Option(Callable | None, None),
    "embedding": Option(str, ""),
    "dtype": Option(torch.dtype | None, None),
    "channels_last": Option(bool, False),
    # Both modes of torch.compile use CUDA graphs.
    "compile": Option(bool | Literal["reduce-overhead", "max-autotune"], False),
    "side_stream": Option(bool, False),
    "micro_batch": Option(int | None, None, bounds=Bounds(least=1)),
}


class Teacher:
    """A frozen model and how to run it. It never changes, so any number of runs can share it.

    It is not an nn.Module: neither the student's checkpoint nor its optimizer, `.train()`, deepcopy
    or pickle can reach the model through it. A `TeacherSession` runs it.
    """

    def __init__(
        self,
        model: nn.Module | torch.export.ExportedProgram | Callable[[Tensor], Tensor],
        *,
        run: Callable[[Any, Tensor], object] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        classifier: "Tensor | str | Path | Rows | None" = None,
        embedding: str = "",
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        compile: bool | str = False,
        side_stream: bool = False,
        micro_batch: int | None = None,
        cache: CacheOptions | str | Path | None = None,
    ) -> None:
        """
        model: a module, a ScriptModule, an exported program, a function (b 3 h w) -> (b e),
            `CachedEmbeddings` or an `EmbeddingTable`.
        run: called as run(model, images), for a model that takes more than images; by default
            model(images).
        transform: from the trainer's images to the model's input; see `InputTransform`.
        classifier: the class rows (c e) of the teacher, a file of them, or the name of the module's
            parameter that holds them.
        embedding: path of the submodule that returns the embedding; "" is the model's output.
        dtype: the autocast dtype in which the model runs; by default there is no autocast.
        compile: whether to use torch.compile, or its mode: "reduce-overhead" or "max-autotune".
        side_stream: whether to run at the same time as the student's forward on CUDA, which takes
            more memory.
        micro_batch: the most images in one call of the model; when the GPU runs out of memory, the
            session halves it automatically.
        cache: a folder that stores embeddings, so that each view is embedded only once.
        """
        check_arguments("Teacher", _ARGUMENTS, locals())
        if cache is not None and not isinstance(cache, CacheOptions):
            cache = CacheOptions.read(
                {"path": cache} if isinstance(cache, str | Path) else cache, "teacher.cache"
            )
        if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
            raise KDHooksError(
                f"teacher: dtype must be torch.float16 or torch.bfloat16; found {dtype}"
            )
        if side_stream and isinstance(compile, str):
            raise KDHooksError(
                f"teacher: side_stream and compile = {compile!r} exclude each other, since CUDA "
                "graphs of two streams would share their memory; use compile = true"
            )
        if isinstance(model, torch.export.ExportedProgram):
            model = model.module()
        if isinstance(model, type) or not callable(model):
            raise KDHooksError(
                "teacher must be a module or a function (b 3 h w) -> (b e); found "
                f"{shown(model)}; kdhooks.build takes a recipe, which names files"
            )
        if isinstance(getattr(model, "__self__", None), nn.Module):
            raise KDHooksError(
                "teacher must not be a method of a module, since the module would not be frozen; "
                "pass the module itself, and run=lambda model, images: … to call another method "
                "than forward"
            )
        self.stored = model if isinstance(model, CachedEmbeddings | EmbeddingTable) else None
        if self.stored is not None:
            changed = {
                "run": run, "transform": transform, "embedding": embedding, "dtype": dtype,
                "channels_last": channels_last, "compile": compile, "side_stream": side_stream,
                "micro_batch": micro_batch, "cache": cache,
            }  # fmt: skip
            if given := [name for name, value in changed.items() if value]:
                raise KDHooksError(
                    "teacher: stored embeddings are read without a network; found the arguments "
                    f"{listed(given)}, which apply to a network only; leave them out"
                )
        self.module = unwrap(model) if isinstance(model, nn.Module) else None
        if self.module is None and (compile or channels_last):
            raise KDHooksError(
                "teacher: compile and channels_last apply to a torch module, but the teacher is a "
                "function; leave them out, or pass the module itself (for an ONNX file, set "
                "convert = true)"
            )
        if self.module is not None:
            set_eval(self.module)
            for parameter in self.module.parameters():  # a ScriptModule has no requires_grad_
                parameter.requires_grad_(False)
            refuse_untrained(self.module)
            if channels_last:
                self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        forward: Any = self.module or model
        if compile and self.module is not None:
            forward = torch.compile(self.module, mode=None if compile is True else compile)
        self.run = run
        self.forward: Callable[[Tensor], object] = partial(run, forward) if run else forward
        # A later call may reuse the memory of the output.
        self.overwrites_output = isinstance(compile, str) or self.module is None
        self.transform = transform or InputTransform()
        self.dtype = dtype
        self.channels_last = channels_last
        self.side_stream = side_stream
        self.micro_batch = micro_batch
        self.cache = cache
        self.embedding = embedding
        inside = dict(self.module.named_parameters()) if self.module is not None else {}
        self.classifier = None if classifier is None else Rows.open(classifier, inside)
        self._compare_backbones()

    def _compare_backbones(self) -> None:
        """Warn if the file of the class rows holds another backbone than the teacher.

        It is not an error, since an averaged or fine-tuned backbone still fits the class rows of
        its run. The first step checks this, by comparing each image with the class rows.
        """
        if self.module is None or self.classifier is None:
            return
        if self.classifier.trained_with(self.module.state_dict()) is False:
            log.warning(
                "teacher classifier: the backbone in its file has other weights than the teacher; "
                "if they are not from the same run, use the classifier that was trained with this "
                "teacher, or class means from kdhooks.class_means"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Absent, ()


class _Absent:
    """Stands in for the teacher in a pickled model."""

    def __getattr__(self, name: str) -> object:
        raise KDHooksError(
            "teacher was left out when this model was pickled; build the Distiller again"
        )


def set_eval(module: nn.Module) -> None:
    """Switch to eval mode. A torch.export program keeps the mode in which it was exported."""
    with suppress(NotImplementedError):
        module.eval()
