"""Converts an ONNX file of a recognition network to int8 or float16, with onnxruntime's tools.

This module does not check that the converted network still recognises faces: compare its embeddings
with those of the float file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from kdhooks.errors import KDHooksError
from kdhooks.onnx.graphs import Array, image_inputs, load_graph, require

METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
"""Methods of choosing the range of an activation, with onnxruntime's names for them."""

DEFAULT_METHOD = "minmax"


def write_int8(
    source: Path, target: Path, images: Iterable[Tensor], method: str = DEFAULT_METHOD
) -> None:
    """Write weights in int8, each output channel with its own scale, and activations in int8.

    The range of each activation is measured on the images, [(b 3 h w)] as the network takes them.
    The new file still takes float32 images and returns float32 embeddings. Operators for which
    onnxruntime has no int8 form, such as PRelu, stay float.
    """
    quantization = require("onnxruntime.quantization")
    model, _ = load_graph(source)
    (image,) = image_inputs(model.graph)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, Array]] = (
                # One at a time, since percentile and entropy refuse a smaller last batch.
                {image.name: one.numpy()}
                for batch in images
                for one in batch.split(1)
            )

        def get_next(self) -> dict[str, Array] | None:
            return next(self._feeds, None)

    # Folds batch norms into the convolutions before them. Its symbolic shape inference is skipped:
    # for these networks it finds no more than ONNX's own, and it fails at an AveragePool.
    fold: Callable[..., None] = require(
        "onnxruntime.quantization.shape_inference"
    ).quant_pre_process
    with TemporaryDirectory(prefix=".folded-", dir=target.parent) as folder, _named("int8", source):
        folded = Path(folder, "folded.onnx")
        fold(model, str(folded), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(folded),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[METHODS[method]],
        )


def write_float16(source: Path, target: Path, *, images: bool = False) -> None:
    """Write weights and activations in float16.

    images: whether the new file also takes images, and returns embeddings, in float16; otherwise
    they stay float32.
    """
    convert = require("onnxruntime.transformers.float16").convert_float_to_float16
    with _named("float16", source):
        model, _ = load_graph(source)
        require("onnx").save(convert(model, keep_io_types=not images), str(target))


@contextmanager
def _named(form: str, source: Path) -> Iterator[None]:
    """Turn every failure of onnxruntime's tools into a KDHooksError, and drop their output."""
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except (KDHooksError, OSError):
        raise
    except Exception as error:  # they have no class of errors in common
        raise KDHooksError(
            f"onnxruntime {require('onnxruntime').__version__} can't convert '{source.name}' to "
            f"{form}; {type(error).__name__}: {error}; another version may be able to"
        ) from error
