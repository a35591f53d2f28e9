"""EC-KD, exclusivity and consistency, Wang et al., ECCV 2020, doi:10.1007/978-3-030-58586-0_20.

There are two terms. Exclusivity keeps the filters of one layer from using the same positions, so a
small student wastes no filters. Consistency pulls its embedding to the teacher's, with more weight
on hard samples.
Reconstruction: the paper's method section could not be read. From secondary sources: the l1 form of
exclusivity, and that each sample is weighted by its own distance. Ours: the form of that weight
(exponential, with mean 1), unit length, the factors of both terms, the division of a layer's sum by
its number of filters minus one, and the choice of layers.
Exclusivity is computed in O(n d) for n filters, with the same value as the sum over pairs. The
abstract of the authors' earlier work (IJCAI 2017) has such a linear form, so the paper may use it.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import (
    EmbeddingTap,
    KDHooksError,
    Model,
    Options,
    ParameterTap,
    Scheduled,
    Varying,
    Weight,
    hookimpl,
    option,
)
from kdhooks_plugins._widths import projection

Hardness: TypeAlias = Literal["none", "linear", "exponential"]


class HardnessAwareConsistency(nn.Module):
    """factor · mean ω_i ‖H(s_i) - t_i‖², with no gradient through ω."""

    def __init__(
        self,
        regressor: nn.Module | None = None,
        *,
        factor: Scheduled = 1.0,
        hardness: Hardness = "exponential",
        gamma: Scheduled = 1.0,
        mean_one: bool = True,
        unit_length: bool = True,
    ) -> None:
        super().__init__()
        self.regressor = regressor or nn.Identity()
        self.factor, self.gamma = Varying(factor), Varying(gamma)
        self.hardness, self.mean_one = hardness, mean_one
        self.unit_length = unit_length

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(b d), (b e), (b) -> ()."""
        student, teacher = self.regressor(student), teacher.detach()
        if self.unit_length:
            student, teacher = F.normalize(student), F.normalize(teacher)
        squared = (student - teacher).square().sum(dim=1)
        omega = self._omega(squared.detach().sqrt())
        loss = self.factor.now * (omega * squared).mean()
        return loss, {"squared_distance": squared.detach().mean(), "hardest": omega.max()}

    def _omega(self, distance: Tensor) -> Tensor:
        """(b) -> (b)."""
        if self.hardness == "none":
            return torch.ones_like(distance)
        if self.hardness == "exponential":
            exponent = self.gamma.now * distance
            # Equals exp / mean(exp), but cannot overflow on raw embeddings.
            return len(distance) * exponent.softmax(dim=0) if self.mean_one else exponent.exp()
        omega = 1 + self.gamma.now * distance
        return omega / omega.mean() if self.mean_one else omega


class FilterExclusivity(nn.Module):
    """factor · Σ over layers of the overlap of their filters in the same positions."""

    def __init__(
        self,
        layers: Sequence[str],
        *,
        factor: Scheduled = 1.0,
        normalize_rows: bool = False,
        mean_overlap: bool = True,
    ) -> None:
        """layers: names of the parameters that `forward` receives, in the same order."""
        super().__init__()
        self.layers = tuple(layers)
        self.factor = Varying(factor)
        self.normalize_rows, self.mean_overlap = normalize_rows, mean_overlap

    def forward(self, parameters: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """[(…)] -> ()."""
        by_layer = {
            layer: self._overlap(weight)
            for layer, weight in zip(self.layers, parameters, strict=True)
        }
        loss = self.factor.now * torch.stack(list(by_layer.values())).sum()
        return loss, {layer: value.detach() for layer, value in by_layer.items()}

    def _overlap(self, weight: Tensor) -> Tensor:
        """(n …) -> ()."""
        filters = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
        if self.normalize_rows:
            filters = F.normalize(filters)
        overlap = exclusivity(filters)
        return overlap / (len(filters) - 1) if self.mean_overlap else overlap


def exclusivity(filters: Tensor) -> Tensor:
    """(n d) -> (): Σ_{i≠j} ‖f_i ⊙ f_j‖_1 over ordered pairs, as ‖F‖²_{1,2} - ‖F‖²_F."""
    size = filters.abs()
    return (size.sum(dim=0).square() - size.square().sum(dim=0)).sum()


def convolutions(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    *,
    depthwise: bool = False,
) -> list[str]:
    """Return the names of trained convolution weights, chosen by patterns of the layers' paths."""
    paths = [
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and parameter.requires_grad
        if _comparable(model.get_submodule(name.removesuffix(".weight")), depthwise)
    ]
    if not paths:
        raise KDHooksError(
            "eckd: student has no trained convolution of two filters or more; set "
            "exclusivity_weight = 0 for consistency alone"
        )
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise KDHooksError(
                f"eckd: pattern '{pattern}' matches none of the student's {len(paths)} trained "
                f"convolutions; they are: {', '.join(paths[:8])}{', …' if len(paths) > 8 else ''}"
            )
    chosen = [
        path
        for path in paths
        if any(fnmatchcase(path, pattern) for pattern in include)
        if not any(fnmatchcase(path, pattern) for pattern in exclude)
    ]
    if not chosen:
        raise KDHooksError(
            "eckd: exclude leaves no convolution to regularise; set exclusivity_weight = 0 for "
            "consistency alone"
        )
    return [f"{path}.weight" for path in chosen]


def _comparable(layer: nn.Module, depthwise: bool) -> bool:
    """Whether there are two filters or more, all on the same input channels unless `depthwise`."""
    if not isinstance(layer, nn.Conv2d) or layer.out_channels < 2:
        return False
    return layer.groups == 1 or depthwise


class ECKD(Options):
    """L = consistency_weight · mean ω_i ‖H(s_i) - t_i‖² + exclusivity_weight · Σ L_WE(F_l)."""

    weight: Weight = option(1.0, "The factor of both terms together.", least=0)
    consistency_weight: Scheduled = option(
        16.0,
        "The factor of consistency; 0 leaves it out. 16 is as strong as the default of fcd.",
        least=0,
    )
    exclusivity_weight: Scheduled = option(
        2.5e-4,
        "The factor of exclusivity; 0 leaves it out. The default is half of the usual weight "
        "decay, and its gradient is about as large as that weight decay's.",
        least=0,
    )
    regressor: bool = option(
        True, "Learn H, a linear map without a bias; false: H is the identity, for equal widths."
    )
    hardness: Hardness = option(
        "exponential",
        "The weight ω of a sample at distance d. exponential: exp(γd); linear: 1 + γd; none: 1.",
    )
    gamma: Scheduled = option(1.0, "γ: a larger γ gives distant samples more weight.", least=0)
    mean_one: bool = option(True, "Divide ω by its mean over the batch of this rank.")
    unit_length: bool = option(True, "Compare embeddings at unit length.")
    include: Sequence[str] = option(
        ("*",),
        "Patterns of the paths of the student's convolutions, with * ? and [abc], such as "
        "`layer4.*`.",
    )
    exclude: Sequence[str] = option((), "Patterns of the paths of convolutions to leave out.")
    include_depthwise: bool = option(
        False, "Include grouped convolutions, although their filters see different channels."
    )
    normalize_rows: bool = option(
        False, "Compare filters at unit length, so that smaller weights do not lower the term."
    )
    mean_overlap: bool = option(True, "Divide the sum of a layer with n filters by n - 1.")

    def check(self) -> None:
        if self.consistency_weight == self.exclusivity_weight == 0:
            raise self.refused(
                "consistency_weight", "or exclusivity_weight must be above 0; found 0 twice"
            )

    @hookimpl
    def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap | None:
        if not self.consistency_weight:
            return None
        regressor = projection("eckd", student, teacher, self.regressor, "regressor")
        loss = HardnessAwareConsistency(
            regressor,
            factor=self.consistency_weight,
            hardness=self.hardness,
            gamma=self.gamma,
            mean_one=self.mean_one,
            unit_length=self.unit_length,
        )
        return EmbeddingTap("eckd", loss, self.weight, needs_labels=False)

    @hookimpl
    def parameter_tap(self, student: Model) -> ParameterTap | None:
        if not self.exclusivity_weight:
            return None
        assert student.module is not None
        names = convolutions(
            student.module, self.include, self.exclude, depthwise=self.include_depthwise
        )
        loss = FilterExclusivity(
            names,
            factor=self.exclusivity_weight,
            normalize_rows=self.normalize_rows,
            mean_overlap=self.mean_overlap,
        )
        return ParameterTap("eckd_exclusivity", loss, self.weight, parameters=tuple(names))
