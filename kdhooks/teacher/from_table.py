"""Creates the teacher that a recipe's table describes."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kdhooks.errors import KDHooksError
from kdhooks.onnx.files import read_recognition_file
from kdhooks.onnx.session import OnnxModel, insightface_model
from kdhooks.onnx.to_torch import OnnxNetwork, to_torch
from kdhooks.teacher.cache import CachedEmbeddings
from kdhooks.teacher.embedding_table import EmbeddingTable
from kdhooks.teacher.input_transform import InputTransform
from kdhooks.teacher.table import Channels, NetworkFactory, TeacherTable, with_module
from kdhooks.teacher.teacher import Teacher

_DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build_from_table(
    table: TeacherTable, embedding: str | None = None, network: NetworkFactory | None = None
) -> Teacher:
    """Create one teacher. embedding: the submodule named in `taps`, if the table names none."""
    spec = with_module(table, network)
    if spec.embeddings is not None:
        made = EmbeddingTable if spec.embeddings.is_file() else CachedEmbeddings
        return Teacher(made(spec.embeddings), classifier=spec.classifier)
    if spec.config is not None:
        raise KDHooksError(
            f"recipe: teacher.config is a config file of MMEngine, and this trainer can't read "
            f"'{spec.config}'; pass the module itself as teacher"
        )
    model: Any = spec.module
    transform = InputTransform()
    if model is None:
        model = _open_onnx(spec)
        transform = InputTransform(size=model.size, mean=model.mean, std=model.std)
    changes = spec.input.given()
    stored = isinstance(model, CachedEmbeddings | EmbeddingTable)
    return Teacher(
        model,
        transform=None if stored and not changes else replace(transform, **changes),
        classifier=spec.classifier,
        embedding=spec.embedding or embedding or "",
        dtype=_DTYPES[spec.dtype],
        channels_last=spec.channels_last,
        compile=spec.compile,
        side_stream=spec.side_stream,
        micro_batch=spec.micro_batch,
        cache=spec.cache,
    )


def _open_onnx(spec: TeacherTable) -> OnnxModel | OnnxNetwork:
    """Open the ONNX file of a teacher's table, or of an insightface pack."""
    path = spec.onnx or insightface_model(
        str(spec.insightface), spec.root or "~/.insightface", spec.output
    )
    given = spec.input
    # The file takes one mean and one std; those of each channel go to the transform later.
    said = given.mean is not None and given.std is not None
    file = read_recognition_file(
        path,
        (_average(given.mean), _average(given.std)) if said else None,
        order=given.order,
        size=given.size,
        output=spec.output,
    )
    for key, wanted in {"mean": 0, "std": 1}.items() if file.whole_pixels else ():
        if (found := getattr(given, key)) is not None and {*np.ravel(found)} != {wanted}:
            raise KDHooksError(
                f"recipe: teacher.input.{key} must be {wanted} or left out, since "
                f"'{file.path}' takes uint8 images; found {found}"
            )
    return to_torch(file) if spec.convert else OnnxModel(file)


def _average(numbers: Channels | None) -> float:
    assert numbers is not None
    return sum(numbers) / len(numbers) if isinstance(numbers, tuple) else numbers
