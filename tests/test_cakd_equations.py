"""Positions, losses and saliency maps of CAKD agree with their equations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Model, Stage
from kdhooks.testing import TinyFaceNet, tiny_batch
from kdhooks_plugins._cakd_options import Matching, PromptTokens
from kdhooks_plugins._facial_positions import FacialPositions, piecewise_index
from kdhooks_plugins._local_features import LocalFeatures
from kdhooks_plugins.cakd import CAKD
from kdhooks_plugins.saliency import saliency_map
from tests import maps
from tests.cakd_losses import OPTIONS, SHAPES, SMALL, inputs, made, value
from tests.maps import Shape, labels, model, normal
from tests.references import cakd as reference
from tests.transformers import TinySwin, TinyViT, trained

SIZES = [(7, 7), (12, 12), (14, 14), (4, 4), (2, 2), (3, 5), (1, 1)]


def tokens(x: np.ndarray, shape: Shape) -> np.ndarray:
    """(b …) -> (b n k), according to the shape."""
    if len(shape) == 2:
        return x
    channels_last = shape[0] == shape[1] != shape[2]
    h, w = shape[:2] if channels_last else shape[1:]
    places = [x[:, i, j] if channels_last else x[:, :, i, j] for i in range(h) for j in range(w)]
    return np.stack(places, axis=1)


class Expected:
    """The terms of a loss, computed from the equations."""

    def __init__(self, loss: LocalFeatures, ours: Shape, theirs: Shape, **options: Any) -> None:
        self.loss, self.ours, self.theirs, self.matching = (
            loss,
            ours,
            theirs,
            options.get("matching", {}),
        )

    def side(
        self, x: np.ndarray, weights: dict[str, np.ndarray], name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """h + MSA(h) (b l d) and its maps (b heads l l)."""
        shape, module = (
            (self.ours, self.loss.ours) if name == "ours" else (self.theirs, self.loss.theirs)
        )
        msa = "msa.0" if name == "ours" or len(self.loss.msa) == 1 else "msa.1"
        every = [
            reference.self_attention(
                reference.local_features(sample, module.buckets.tolist(), weights, name, 2),
                weights,
                msa,
                2,
            )
            for sample in reference.pixel_features(tokens(x, shape), weights, name)
        ]
        return np.stack([y for y, _ in every]), np.stack([m for _, m in every])

    def terms(
        self, ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]
    ) -> tuple[float, float]:
        return (
            reference.attention_term(ours[1], theirs[1], self.matching.get("attention", "mse")),
            reference.feature_term(ours[0], theirs[0], self.matching.get("standardise", True)),
        )

    def total(
        self, ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]
    ) -> float:
        attention, feature = self.terms(ours, theirs)
        factors = (
            self.matching.get("attention_weight", 1.0),
            self.matching.get("feature_weight", 1.0),
        )
        return float(factors[0]) * attention + float(factors[1]) * feature


# --- positions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "inputs", "expected"),
    [
        (
            (1.9, 3.8, 15.2),
            [0, 1, 1.9, 2, 3, 4, 5, 6, 8, 10, 12, 16],
            [0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3],
        ),
        ((4.0, 12.0, 24.0), list(range(15)), [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 8, 9, 9, 9, 10]),
        ((4.0, 12.0, 24.0), [24, 25, 1000], [12, 12, 12]),
    ],
)
def test_the_piecewise_index_gives_the_golden_values(
    pieces: tuple[float, float, float], inputs: list[float], expected: list[int]
) -> None:
    assert piecewise_index(torch.tensor(inputs, dtype=torch.float64), *pieces).tolist() == expected
    assert [reference.piecewise_index(x, *pieces) for x in inputs] == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.0},
        {"gamma": 2.5, "anchor": (40.0, 10.0)},
        {"distance": "saliency", "saliency": normal(3, 7, 7).sigmoid()},
        {"distance": "saliency", "saliency": normal(3, 4, 5).sigmoid(), "gamma": 0.5},
    ],
)
def test_distances_agree_with_the_equation(size: tuple[int, int], options: dict[str, Any]) -> None:
    positions = FacialPositions(**options)
    found = positions.distances(size)
    chosen = {key: value for key, value in options.items() if key != "distance"}
    if "saliency" in chosen:
        assert isinstance(positions.saliency, Tensor)  # scaled from 0 to 1
        chosen["saliency"] = positions.saliency.numpy()
    assert_close(found.tolist(), reference.distances(size, **chosen))
    expected = [reference.piecewise_index(x, 4.0, 12.0, 24.0) for x in found.tolist()]
    assert positions.buckets(size).tolist() == expected


def test_the_anchor_is_the_nose_and_the_buckets_are_many() -> None:
    buckets = FacialPositions(gamma=0.0).buckets((7, 7)).view(7, 7)
    assert buckets[4].tolist() == [6, 4, 2, 0, 2, 4, 6]
    assert buckets[:, 3].tolist() == [7, 6, 4, 2, 0, 2, 4]
    assert len(FacialPositions().buckets((7, 7)).unique()) > 8
    coarse = FacialPositions(pieces=(1.9, 3.8, 15.2))
    assert coarse.rows == 4
    assert FacialPositions().rows == 13


def test_a_place_on_the_face_has_one_position_on_grids_of_different_sizes() -> None:
    """Every third pixel of a 21 x 21 grid has the same place as a pixel of a 7 x 7 grid."""
    positions = FacialPositions()
    fine = positions.distances((21, 21)).view(21, 21)[1::3, 1::3].flatten()
    assert_close(fine, positions.distances((7, 7)))


# --- the equations ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_agrees_with_the_equation(ours: Shape, theirs: Shape, options: dict[str, Any]) -> None:
    loss = made(ours, theirs, **options)
    expected = Expected(loss, ours, theirs, **options)
    student, teacher = inputs(ours, theirs)

    def total(x: list[np.ndarray], weights: dict[str, np.ndarray]) -> float:
        return expected.total(
            expected.side(x[0], weights, "ours"),
            expected.side(teacher[0].numpy(), weights, "theirs"),
        )

    weights = maps.weights(loss)
    found, notes = loss(student, teacher, labels(3))
    assert_close(found.item(), total([student[0].numpy()], weights))
    y, own_map = expected.side(teacher[0].numpy(), weights, "theirs")
    of_student = expected.side(student[0].numpy(), weights, "ours")
    attention, feature = expected.terms(of_student, (y, own_map))
    assert_close(notes["attention"].item(), attention)
    assert_close(notes["feature"].item(), feature)
    assert_close(notes["token_variance"].item(), reference.token_variance(y))
    assert_close(notes["centre_cosine"].item(), reference.centre_cosine(weights["urfm.centres"]))
    maps.check_gradients(loss, student, teacher, total, directions=1)


def test_prompts_in_front_of_the_pixels_have_positions_of_their_own() -> None:
    ours: Shape = (3, 2, 2)
    teacher = Model(trained(TinyViT), 12, (Stage("blocks.2", (16, 8)),))
    both = Matching(teacher_side="shared")
    method = CAKD(**SMALL, matching=both, prompts=PromptTokens(number=2))
    loss = maps.seeded(method.feature_tap(model(ours), teacher).loss)
    assert isinstance(loss, LocalFeatures)
    expected = Expected(loss, ours, (18, 8))
    student, tokens_of_teacher = inputs(ours, (18, 8))

    def total(x: list[np.ndarray], weights: dict[str, np.ndarray]) -> float:
        return expected.total(
            expected.side(x[0], weights, "ours"),
            expected.side(tokens_of_teacher[0].numpy(), weights, "theirs"),
        )

    found = value(loss, student, tokens_of_teacher)
    assert_close(found.item(), total([student[0].numpy()], maps.weights(loss)))
    maps.check_gradients(loss, student, tokens_of_teacher, total, directions=1)


@pytest.mark.parametrize("teacher_side", ["fixed", "detached"])
def test_a_fixed_teacher_side_is_a_constant(teacher_side: str) -> None:
    """It has its own URFM, positions and self-attention, which are saved but never trained."""
    ours, theirs = SHAPES[2]
    loss = made(ours, theirs, matching={"teacher_side": teacher_side})
    expected = Expected(loss, ours, theirs)
    student, teacher = inputs(ours, theirs)
    stored = {name: tensor.numpy() for name, tensor in loss.state_dict().items()}
    own = {name.replace("target.", "urfm."): x for name, x in stored.items() if "urfm." not in name}
    constant = expected.side(teacher[0].numpy(), own, "theirs")

    def total(x: list[np.ndarray], weights: dict[str, np.ndarray]) -> float:
        return expected.total(expected.side(x[0], weights, "ours"), constant)

    maps.check_gradients(loss, student, teacher, total, directions=1)
    trained = {name.rpartition(".")[0] for name, _ in loss.named_parameters()}
    assert not {name for name in trained if name.startswith(("theirs", "target", "msa.1"))}
    assert {"theirs.project.weight", "target.table", "msa.1.out.weight"} <= set(stored)


def test_the_anchor_trains_only_the_teacher_side_to_predict_the_teachers_embedding() -> None:
    ours, theirs = SHAPES[2]
    loss = made(ours, theirs, matching={"teacher_side": "anchored", "anchor_weight": 2.0})
    expected = Expected(loss, ours, theirs)
    student, teacher = inputs(ours, theirs)
    teacher.append(normal(5, 3, 4))
    first = maps.weights(loss)

    def side(weights: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        own = {name.replace("target.", "urfm."): x for name, x in weights.items()}
        return expected.side(teacher[0].numpy(), own, "theirs")

    def total(x: list[np.ndarray], weights: dict[str, np.ndarray]) -> float:
        anchor = reference.anchor_term(
            side(weights)[0], teacher[1].numpy(), weights["anchor.weight"]
        )
        student_side = expected.side(x[0], weights, "ours")
        return expected.total(student_side, side(first)) + 2.0 * anchor

    found, notes = loss(student, teacher, labels(3))
    assert_close(found.item(), total([student[0].numpy()], first))
    assert_close(
        notes["anchor"].item(),
        reference.anchor_term(side(first)[0], teacher[1].numpy(), first["anchor.weight"]),
    )
    maps.check_gradients(loss, student, teacher, total, directions=1)


def test_both_sides_start_from_the_same_urfm_and_self_attention() -> None:
    loss = CAKD(**SMALL).feature_tap(model((2, 2, 2)), model((3, 2, 2))).loss
    assert isinstance(loss, LocalFeatures)
    assert loss.target is not None
    assert_close(loss.target.state_dict(), loss.urfm.state_dict(), rtol=0, atol=0)
    assert_close(loss.msa[1].state_dict(), loss.msa[0].state_dict(), rtol=0, atol=0)


# --- saliency --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "stage", "shape"),
    [
        (TinyFaceNet, "layer3", (12, 4, 4)),
        (TinyViT, "blocks.1", (16, 8)),
        (TinySwin, "layers.2", (4, 4, 16)),
    ],
)
def test_the_saliency_map_is_the_mean_energy_of_a_stage(
    make: type[nn.Module], stage: str, shape: Shape
) -> None:
    network = trained(make)
    images, _ = tiny_batch()
    outputs: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    with network.get_submodule(stage).register_forward_hook(see):
        network(images)
    energy = np.zeros((4, 4))
    every = tokens(outputs[0].detach().double().numpy(), shape)
    for place in range(16):
        energy[place // 4, place % 4] = (every[:, place] ** 2).sum()
    energy = (energy - energy.min()) / (energy.max() - energy.min())
    found = saliency_map(network, stage, [images[:5], images[5:]])
    assert_close(found, torch.from_numpy(energy), rtol=1e-4, atol=1e-5)


def test_a_saliency_map_can_be_a_file_and_its_scale_does_not_matter(tmp_path: Path) -> None:
    saliency = normal(1, 4, 4)
    torch.save(3 * saliency - 2, tmp_path / "saliency.pt")
    ours, theirs = SHAPES[2]
    positions: dict[str, Any] = {"distance": "saliency"}
    given = made(ours, theirs, positions={**positions, "saliency": saliency})
    file = str(tmp_path / "saliency.pt")
    read = made(ours, theirs, positions={**positions, "saliency": file})
    assert torch.equal(given.theirs.buckets, read.theirs.buckets)
    assert not torch.equal(given.theirs.buckets, made(ours, theirs).theirs.buckets)
