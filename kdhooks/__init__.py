"""Knowledge distillation hooks and losses for existing face recognition trainers."""

from kdhooks.classes.chunked_sums import Wanted
from kdhooks.classes.shards import ClassShard
from kdhooks.declarations import (
    ClassifierShare,
    EmbeddingTap,
    FeatureTap,
    Model,
    ParameterTap,
    Stage,
)
from kdhooks.discovery import methods
from kdhooks.distiller import Distiller
from kdhooks.errors import KDHooksError
from kdhooks.hookspecs import hookimpl
from kdhooks.recipe import build
from kdhooks.teacher.class_means import class_means
from kdhooks.teacher.input_transform import InputTransform
from kdhooks.teacher.teacher import Teacher

__all__ = [
    "ClassShard",
    "ClassifierShare",
    "Distiller",
    "EmbeddingTap",
    "FeatureTap",
    "InputTransform",
    "KDHooksError",
    "Model",
    "ParameterTap",
    "Stage",
    "Teacher",
    "Wanted",
    "build",
    "class_means",
    "hookimpl",
    "methods",
]
