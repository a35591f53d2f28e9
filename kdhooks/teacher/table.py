"""A recipe's table for a teacher: reads its source and settings, and loads its network."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor, nn

from kdhooks.classes.rows import Rows
from kdhooks.errors import KDHooksError, listed
from kdhooks.factories import factory_named, is_factory_name, made_by
from kdhooks.kinds import OptionError
from kdhooks.options import Options, option
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.checkpoints import load_checkpoint, load_strictly
from kdhooks.tensor_files import first_bytes

NetworkFactory: TypeAlias = Callable[[Any, Mapping[str, Tensor]], nn.Module]
"""A host's function: builds the module from `teacher.network` and the checkpoint's tensors.

The weights are loaded into the module afterwards.
"""


Channels: TypeAlias = float | tuple[float] | tuple[float, float, float]

_SOURCES = ("module", "network", "config", "onnx", "insightface", "embeddings")
_RUN = _SOURCES[:-1]  # the sources of a network, which runs
FILES = ("checkpoint", "config", "onnx")
_BELONGS: Mapping[str, tuple[str, ...]] = {  # option -> the sources that it applies to
    "checkpoint": ("network", "config"),
    "weights": ("network", "config"),
    "convert": ("onnx", "insightface"),
    "output": ("onnx", "insightface"),
    "root": ("insightface",),
    "embedding": _RUN,
    "input": _RUN,
    "dtype": _RUN,
    "channels_last": _RUN,
    "compile": _RUN,
    "side_stream": _RUN,
    "micro_batch": _RUN,
    "cache": _RUN,
}
_OFF = (False, "", "float32")  # values with which such an option changes nothing


def _given(source: str) -> Mapping[str, Any]:
    """Return the JSON Schema that requires this source."""
    return {"required": [source]}


class InputTable(Options, subject="recipe: teacher.input"):
    """The images that the teacher expects, if they differ from the trainer's."""

    size: tuple[int, int] | None = option(
        None, "Height and width; by default those of the training images.", least=1, unit="pixels"
    )
    order: Literal["rgb", "bgr"] | None = option(None, "The order of the channels; by default rgb.")
    mean: Channels | None = option(
        None, "Subtracted from pixels in 0..255, in the order of the channels; by default 127.5."
    )
    std: Channels | None = option(
        None, "The pixels are divided by it after that; by default 127.5.", above=0
    )


class TeacherTable(Options, subject="recipe: teacher"):
    """Where the teacher comes from, and how it runs."""

    module: nn.Module | Callable[..., object] | None = option(
        None, "The module itself, or a function (b 3 h w) -> (b e); in Python only."
    )
    network: str | Mapping[str, Any] | None = option(
        None,
        "The name of a network that the host can build, or package.module:factory; in MMEngine the "
        "config of a model.",
    )
    config: Path | None = option(
        None, "An MMEngine config file, whose model is the network; in MMEngine only."
    )
    onnx: Path | None = option(None, "An ONNX file.")
    insightface: str | None = option(None, "The name of an insightface pack, such as buffalo_l.")
    embeddings: Path | None = option(
        None,
        "Stored embeddings instead of a network: a folder that kdhooks cache build has filled; or, "
        "if the loop passes indices, a file with one row for each sample.",
    )
    checkpoint: Path | None = option(None, "The file of the network's weights.")
    weights: str = option(
        "", "The place of the weights in the checkpoint, such as ema, if several sets fit."
    )
    output: str | None = option(
        None, "The output of the ONNX file that is the embedding, if the file has several outputs."
    )
    root: Path | None = option(
        None,
        "The folder that holds models, with insightface's packs; by default ~/.insightface.",
    )
    convert: bool = option(
        False, "Turn the ONNX file into a torch module, whose features can be tapped."
    )
    classifier: Tensor | Rows | Path | None = option(
        None,
        "The class rows (c e): a file, a pattern of checkpoint_gpu_*.pt shards, or the name of a "
        "weight of the teacher.",
    )
    embedding: str | None = option(
        None,
        "The submodule that returns the embedding; for a single teacher, taps.teacher.embedding "
        "can name it too.",
    )
    input: InputTable = option(InputTable(), "The images that the teacher expects.")
    dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "The autocast precision in which the teacher runs."
    )
    channels_last: bool = option(False, "Keep the weights in channels_last memory order.")
    compile: bool | Literal["reduce-overhead", "max-autotune"] = option(
        False, "Whether to use torch.compile, or its mode."
    )
    side_stream: bool = option(
        False, "Run at the same time as the student on CUDA, which takes more memory."
    )
    micro_batch: int | None = option(
        None, "The most images in one call of the teacher; by default the whole batch.", least=1
    )
    cache: CacheOptions | Path | None = option(
        None, "A folder that stores the embeddings, so that each view is embedded only once."
    )

    rules: ClassVar[Mapping[str, Any]] = {
        "oneOf": [_given(source) for source in _SOURCES if source != "module"],
        "dependentRequired": {"network": ["checkpoint"], "config": ["checkpoint"]},
        "dependentSchemas": {
            key: {"anyOf": [{"properties": {key: {"enum": list(_OFF)}}}, *map(_given, owners)]}
            for key, owners in _BELONGS.items()
        },
    }

    def check(self) -> None:
        sources = [key for key in _SOURCES if self.has(key)]
        if len(sources) != 1:
            raise self._refused_whole(
                f"needs exactly one of {', '.join(_SOURCES)}; found {listed(sources)}"
            )
        if sources[0] in ("network", "config") and not self.has("checkpoint"):
            raise self.refused(
                sources[0],
                "needs teacher.checkpoint, since the network would be untrained; found "
                f"{listed(self.given())}",
            )
        for key, owners in _BELONGS.items():
            if self.has(key) and sources[0] not in owners:
                raise self.refused(
                    key, f"belongs to teacher.{' or teacher.'.join(owners)}; found {sources[0]}"
                )
        if sources[0] in ("onnx", "insightface") and self.has("dtype") and not self.convert:
            raise self.refused(
                "dtype",
                "applies to torch modules, but onnxruntime computes in the file's own precision; "
                f"set convert = true, or leave it out; found '{self.dtype}'",
            )
        if self.embeddings is not None and not self.embeddings.exists():
            raise self.refused(
                "embeddings",
                "must be a folder that kdhooks cache build has filled, or a file with one row for "
                f"each sample; found '{self.embeddings}', which does not exist",
            )
        for key in FILES:
            path = getattr(self, key)
            if path is not None:
                first_bytes(path, f"recipe: teacher.{key}")
        if isinstance(self.cache, Path):
            object.__setattr__(
                self, "cache", CacheOptions.read({"path": self.cache}, "recipe: teacher.cache")
            )

    def _refused_whole(self, rule: str) -> OptionError:
        return OptionError(rule, subject=type(self).subject)


def with_module(
    spec: TeacherTable, network: NetworkFactory | None, preferred: str = ""
) -> TeacherTable:
    """Build and load the network of a teacher's table; class rows may be in the same file.

    preferred: the place to choose if several sets of weights in the checkpoint fit.
    """
    name = spec.network
    if name is None:
        return spec
    assert spec.checkpoint is not None
    # A misspelt factory is found before the file is read.
    factory = factory_named(str(name), "teacher.network") if is_factory_name(name) else None
    if factory is None and network is None:
        raise KDHooksError(
            f"teacher network {name!r} needs a factory of the host, and there is none here; "
            "specify a function of your own as package.module:factory, pass the module itself as "
            "teacher, or call kdhooks.build(…, network=factory)"
        )
    checkpoint = load_checkpoint(spec.checkpoint)
    if factory is not None:
        module = made_by(factory, str(name), "teacher.network")
    else:
        assert network is not None
        module = network(name, checkpoint.largest())
    module = load_strictly(module, checkpoint, spec.weights, preferred)
    classifier = spec.classifier
    if isinstance(classifier, Path):
        inside = {**checkpoint.tensors, **dict(module.named_parameters())}
        classifier = Rows.open(classifier, inside)
    return replace(
        spec, module=module, classifier=classifier, network=None, checkpoint=None, weights=""
    )
