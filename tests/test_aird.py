"""Instance and relation distillation agrees with its equations, and two ranks with one process."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.testing import assert_close

from kdhooks import KDHooksError, Model, Schedule
from kdhooks.testing import check_method
from kdhooks_plugins.aird import AIRD, InstancesAndRelations
from kdhooks_plugins.fcd import EmbeddingDistance
from tests import golden
from tests.maps import gradient, normal
from tests.maps import labels as any_labels
from tests.ranks import Results, mean_gradients, mine, on_two_ranks
from tests.references import aird as reference
from tests.references.differences import central_differences

GOLDEN = 1.13766845


def test_gives_the_golden_value() -> None:
    value, notes = InstancesAndRelations()(golden.S, golden.T, golden.Y)
    assert_close(notes["instance"].item(), golden.EMBEDDING_DISTANCE["cosine"], rtol=0, atol=6e-9)
    assert_close(value.item(), GOLDEN, rtol=0, atol=6e-9)
    by_loop = reference.instances_and_relations(golden.S.numpy(), golden.T.numpy())
    assert_close(by_loop, GOLDEN, rtol=0, atol=6e-9)


@pytest.mark.parametrize(("relation_weight", "temperature"), [(0.1, 0.1), (2.0, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize(("b", "d"), [(1, 3), (2, 9), (5, 4)])
def test_agrees_with_the_equation(
    relation_weight: float, temperature: float, b: int, d: int
) -> None:
    student, teacher = normal(1, b, d).requires_grad_(), 3 * normal(2, b, d)
    value, _ = InstancesAndRelations(relation_weight, temperature)(student, teacher, any_labels(b))
    value.backward()

    def loss(x: np.ndarray) -> float:
        return reference.instances_and_relations(x, teacher.numpy(), relation_weight, temperature)

    at = student.detach().numpy()
    assert_close(value.item(), loss(at))
    assert_close(gradient(student).numpy(), central_differences(loss, at), rtol=1e-6, atol=1e-8)


def test_without_relations_it_is_fcd() -> None:
    value, _ = InstancesAndRelations(0.0)(golden.S, golden.T, golden.Y)
    assert_close(value, EmbeddingDistance("cosine")(golden.S, golden.T, golden.Y))


def test_the_loss_is_0_for_the_teachers_embeddings_of_any_length() -> None:
    value, notes = InstancesAndRelations()(0.3 * golden.T, golden.T, golden.Y)
    assert_close(value.item(), 0.0)
    assert_close(notes["relation"].item(), 0.0)


def test_images_of_one_person_are_not_pushed_apart() -> None:
    """A contrastive loss with one class per image would push them apart."""
    teacher = normalize(torch.tensor([[1.0, 0.1, 0.0], [1.0, -0.1, 0.0], [0.0, 0.0, 1.0]]).double())
    student = teacher.clone().requires_grad_()
    _, notes = InstancesAndRelations(1.0, 0.1)(student, teacher, any_labels(3))
    assert_close(notes["relation"].item(), 0.0)
    InstancesAndRelations(1.0, 0.1)(student, teacher, any_labels(3))[0].backward()
    assert_close(gradient(student), torch.zeros(3, 3).double())
    one_class = nn.functional.cross_entropy(student @ teacher.T / 0.1, torch.arange(3))
    (apart,) = torch.autograd.grad(one_class, student)
    assert apart.norm() > 0.4


def test_precisions_agree() -> None:
    student, teacher = normal(3, 6, 8), normal(4, 6, 8)
    exact, _ = InstancesAndRelations()(student, teacher, any_labels(6))
    single, _ = InstancesAndRelations()(student.float(), teacher.float(), any_labels(6))
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)


def test_options_follow_a_schedule() -> None:
    loss = InstancesAndRelations(
        Schedule(value=0.4, initial=0.2, start=1), Schedule(value=0.3, initial=0.6, start=1)
    )
    for step, numbers in ((0, (0.2, 0.6)), (1, (0.4, 0.3))):
        loss.relation_weight.move(step, None)
        loss.temperature.move(step, None)
        expected, _ = InstancesAndRelations(*numbers)(golden.S, golden.T, golden.Y)
        assert_close(loss(golden.S, golden.T, golden.Y)[0], expected)


def test_a_map_brings_the_student_to_the_teachers_width() -> None:
    loss = AIRD(projector=True).embedding_tap(Model(None, 4), Model(None, 6)).loss
    assert isinstance(loss, InstancesAndRelations)
    assert loss.projector is not None
    student, teacher = normal(5, 3, 4).float(), normal(6, 3, 6).float()
    found, _ = loss(student, teacher, any_labels(3))
    expected, _ = InstancesAndRelations()(loss.projector(student), teacher, any_labels(3))
    assert_close(found, expected)
    with pytest.raises(KDHooksError, match=r"aird: .* found 4 and 6; set projector = true"):
        AIRD().embedding_tap(Model(None, 4), Model(None, 6))


@pytest.mark.parametrize(
    "options", [{"projector": True}, {"global_batch": False}, {"relation_weight": 0.0}]
)
def test_conforms_with_other_options(options: dict[str, object]) -> None:
    check_method(lambda weight=1.0: AIRD(weight=weight, **options))  # type: ignore[arg-type]


def test_a_temperature_of_0_is_refused() -> None:
    with pytest.raises(KDHooksError, match="aird: temperature must be above 0"):
        AIRD(temperature=0)


# --- two ranks against one process -----------------------------------------------------------


def _scenario(global_batch: bool) -> Results:
    student = nn.Linear(5, 4).double()
    with torch.no_grad():
        student.weight.copy_(normal(20, 4, 5))
        student.bias.copy_(normal(21, 4))
    module = InstancesAndRelations(global_batch=global_batch)
    loss, _ = module(student(mine(normal(23, 6, 5))), mine(normal(24, 6, 4)), mine(any_labels(6)))
    loss.backward()
    return {"loss": loss.detach(), "gradients": mean_gradients(student)}


def _scenarios() -> dict[str, Results]:
    return {"global": _scenario(global_batch=True), "local": _scenario(global_batch=False)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    return on_two_ranks(_scenarios, tmp_path_factory.mktemp("ranks"))


def test_the_relations_of_two_ranks_are_those_of_one_process(
    ranks: list[dict[str, Results]],
) -> None:
    """Each rank has its own instance term; the mean over ranks is that of one process."""
    alone = _scenario(global_batch=True)
    first, second = (found["global"] for found in ranks)
    assert_close((first["loss"] + second["loss"]) / 2, alone["loss"])
    for found in (first, second):
        assert_close(found["gradients"], alone["gradients"], rtol=1e-9, atol=1e-12)


def test_a_local_batch_is_each_ranks_own(ranks: list[dict[str, Results]]) -> None:
    first, second = (found["local"]["loss"] for found in ranks)
    weight, bias, x = normal(20, 4, 5), normal(21, 4), normal(23, 6, 5)
    halves = zip((x @ weight.T + bias).chunk(2), normal(24, 6, 4).chunk(2), strict=True)
    expected = [InstancesAndRelations()(s, t, any_labels(3))[0] for s, t in halves]
    assert_close([first, second], expected)
