"""Knowledge distillation hooks and losses for existing face recognition trainers."""

from kdhooks.balance import Balance
from kdhooks.classes.chunked_sums import Wanted
from kdhooks.classes.per_class import PerClass
from kdhooks.classes.shards import ClassShard
from kdhooks.classes.splits import ClassSplit
from kdhooks.declarations import (
    ClassifierShare,
    ComparedClassifiers,
    EmbeddingTap,
    FeatureTap,
    InheritedClassifier,
    Model,
    ParameterTap,
    Weight,
)
from kdhooks.discovery import methods
from kdhooks.distiller import Distiller
from kdhooks.errors import KDHooksError
from kdhooks.hookspecs import hookimpl
from kdhooks.options import Options, option
from kdhooks.recipe import build
from kdhooks.schedules import Schedule, Scheduled, Varying
from kdhooks.stages import Stage
from kdhooks.teacher.class_means import class_means
from kdhooks.teacher.input_transform import InputTransform
from kdhooks.teacher.teacher import Teacher
from kdhooks.views.student_view import StudentView
from kdhooks.views.viewing import viewed

__version__ = "0.1.0"

__all__ = [
    "Balance",
    "ClassShard",
    "ClassSplit",
    "ClassifierShare",
    "ComparedClassifiers",
    "Distiller",
    "EmbeddingTap",
    "FeatureTap",
    "InheritedClassifier",
    "InputTransform",
    "KDHooksError",
    "Model",
    "Options",
    "ParameterTap",
    "PerClass",
    "Schedule",
    "Scheduled",
    "Stage",
    "StudentView",
    "Teacher",
    "Varying",
    "Wanted",
    "Weight",
    "build",
    "class_means",
    "hookimpl",
    "methods",
    "option",
    "viewed",
]
