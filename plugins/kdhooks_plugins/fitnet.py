"""FitNets: hints for thin deep nets, Romero et al., ICLR 2015, arXiv:1412.6550.

It compares the outputs of any two modules; a learned connector transforms the student's.
Differs from the paper: the hints are trained together with the task, as in TFace and FaceX-Zoo, and
not in an earlier stage; the squared difference is a mean and not half a sum; the connector keeps
the number of pixels, and maps of different sizes are average-pooled to the smaller size.
Ours: the other distances and connectors, and `center`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdhooks import (
    FeatureTap,
    KDHooksError,
    Model,
    Options,
    Scheduled,
    Weight,
    hookimpl,
    option,
)
from kdhooks.declarations import check_name
from kdhooks_plugins._hints import Connector, Distance, Features, Hint, connect


class Hints(nn.Module):
    """The sum of the distances of all pairs."""

    def __init__(self, pairs: Sequence[Hint]) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(pairs)

    def forward(
        self, student: list[Tensor], teacher: list[Tensor], labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        terms = [pair(s, t) for pair, s, t in zip(self.pairs, student, teacher, strict=True)]
        notes = {f"pair{k}": term.detach() for k, term in enumerate(terms, start=1)}
        return torch.stack(terms).sum(), notes


class FitNet(Options):
    """L = Σ_p d(C_p(F_p), F'_p) over the pairs p, C_p the connector."""

    weight: Weight = option(1.0, "The factor of the term.", least=0)
    student: str | Sequence[str] | None = option(
        None,
        "The path of a submodule of the student, or a list of paths. The default is its last "
        'stage; "" is the output of the student. A pattern in a list stands for all its matches.',
    )
    teacher: str | Sequence[str] | None = option(
        None, "The same for the teacher. The paths are paired in their order."
    )
    distance: Distance = option(
        "l2",
        "l2: the mean squared difference; l1: the mean absolute difference; cosine: 1 - cos of the "
        "flattened features of a sample; kl: temperature² times KL(teacher ‖ student) of the "
        "softmax over the channels, as a mean over pixels and samples.",
    )
    connector: Connector = option(
        "1x1",
        "The map from the student's channels to the teacher's, the same at each pixel. none: no "
        "map, for equally many channels; linear: a linear map with a bias; 1x1: a linear map "
        "without a bias, then a batch norm; mlp: two linear maps with a ReLU between them.",
    )
    hidden: int | None = option(
        None,
        "The hidden width of the mlp. The default is the larger of both numbers of channels.",
        least=1,
    )
    temperature: Scheduled = option(1.0, "Divides both sides before the softmax of kl.", above=0)
    normalise: bool = option(
        False,
        "Divide the features of a sample by their root mean square before l2 or l1. The term of l2 "
        "is then ‖s - t‖² at unit length, which is 2(1 - cos).",
    )
    center: bool = option(
        False, "Subtract the teacher's running mean over images before comparing."
    )
    term: str = option(
        "fitnet",
        "The name of the term in logs and checkpoints. Each entry of a recipe needs its own.",
    )

    def check(self) -> None:
        check_name(self.term, "fitnet: term")
        if self.has("temperature") and self.distance != "kl":
            raise self.refused("temperature", f"belongs to distance 'kl'; found '{self.distance}'")
        if self.normalise and self.distance not in ("l2", "l1"):
            raise self.refused(
                "normalise", f"belongs to the distances 'l2' and 'l1'; found '{self.distance}'"
            )
        if self.hidden is not None and self.connector != "mlp":
            raise self.refused("hidden", f"belongs to connector 'mlp'; found '{self.connector}'")

    @hookimpl
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
        ours = self._paths("student", self.student, student)
        theirs = self._paths("teacher", self.teacher, teacher)
        if len(ours) != len(theirs):
            raise KDHooksError(
                f"{self.term}: student and teacher must name equally many submodules, which are "
                f"compared pair by pair; found {len(ours)} and {len(theirs)}"
            )
        pairs = [
            self._pair(
                Features.of(student.stage(path, f"{self.term}: student"), f"{self.term}: student"),
                Features.of(teacher.stage(other, f"{self.term}: teacher"), f"{self.term}: teacher"),
            )
            for path, other in zip(ours, theirs, strict=True)
        ]
        return FeatureTap(
            self.term, Hints(pairs), self.weight, student=ours, teacher=theirs, needs_labels=False
        )

    def _paths(self, side: str, given: str | Sequence[str] | None, model: Model) -> tuple[str, ...]:
        """The specified paths, or the path of the last stage."""
        if given is None and not model.stages:
            raise KDHooksError(
                f"{self.term} compares the last stage of both sides by default, and the {side}'s "
                f"stages are not known; name a submodule as {side} = \"…\", with '' for the output"
            )
        if given is None:
            return (model.stages[-1].path,)
        if isinstance(given, str):
            return (model.path(given, f"{self.term}: {side}"),)
        if not given:
            raise self.refused(side, "must name at least one submodule; found []")
        return model.paths(given, f"{self.term}: {side}")

    def _pair(self, ours: Features, theirs: Features) -> Hint:
        if self.connector == "none" and ours.channels != theirs.channels:
            raise KDHooksError(
                f"{self.term}: without a connector both sides must have equally many channels; "
                f"found {ours.channels} in {ours.name} and {theirs.channels} in {theirs.name}; set "
                "connector = '1x1', or 'linear' for vectors and tokens"
            )
        if self.distance == "kl" and theirs.channels == 1:
            raise KDHooksError(
                f"{self.term}: a softmax over one channel is 1 whatever the features are; found "
                f"one channel in {theirs.name}; set distance = 'l2'"
            )
        return Hint(
            ours,
            theirs,
            connect(self.connector, ours.channels, theirs.channels, self.hidden),
            self.distance,
            temperature=self.temperature,
            normalise=self.normalise,
            center=self.center,
        )
