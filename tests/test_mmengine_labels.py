"""Only methods that need labels require them, and these methods refuse mixed labels."""

import warnings
from importlib import import_module
from typing import Any

import pytest
import torch

from kdhooks import KDHooksError
from kdhooks.testing import tiny_teacher

pytest.importorskip("mmengine")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from kdhooks_integrations import mmengine
from tests.mmengine_runs import QUIET
from tests.mmengine_shapes import IMAGENET, batch, losses, shaped

pytestmark = QUIET

MIXED = {**IMAGENET, "batch_augments": {"augments": ["Mixup"]}}


def distilled(method: Any, preprocessor: dict[str, Any] = IMAGENET, **changes: Any) -> Any:
    teacher = tiny_teacher()
    return mmengine.Distill(
        shaped("ShapedMobileNet", data_preprocessor=preprocessor),
        teacher={"module": teacher.module, "classifier": teacher.classifier},
        methods=[method],
        input_shape=[3, 32, 32],
        **changes,
    )


def test_methods_without_labels_need_none() -> None:
    model = distilled("rkd")
    assert losses(model, batch(labels=False))["loss_kd_rkd"].requires_grad
    given = model.data_preprocessor(batch(labels=False), True)
    assert model.kdhooks.distiller.labelled == []
    model(given["inputs"], given["data_samples"], mode="loss")
    with pytest.raises(KDHooksError, match="labels must be one class number for each of 12"):
        losses(distilled("kd"), batch(labels=False))


def test_methods_without_labels_see_the_mixed_images() -> None:
    model = distilled("rkd", MIXED)
    seen = []
    module = model.kdhooks.distiller._session.teacher.module
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    losses(model)
    pixels = torch.stack(batch()["inputs"]).flip(1)
    wanted = (pixels + pixels.roll(1, 0)) / 2 / 127.5 - 1
    torch.testing.assert_close(seen[-1], wanted, atol=1e-4, rtol=1e-4)


def test_methods_that_need_labels_refuse_augments_that_mix_classes() -> None:
    with pytest.raises(KDHooksError, match=r"kd need one .*batch_augments \(Mixup\) mix images"):
        distilled("kd", MIXED)


@pytest.mark.parametrize("path", ["", "data_samples.gt_label"])
def test_mixed_scores_beside_the_labels_are_noticed(path: str) -> None:
    """This does not depend on who mixed them; a score of 1 for one class counts as a label."""
    for share, mixed in ((1.0, False), (0.7, True), (0.3, True)):
        model = distilled("kd", labels=path)
        given = model.data_preprocessor(batch(), True)
        for one in given["data_samples"]:
            score = torch.zeros(6)
            score[one.gt_label] = share
            score[(one.gt_label + 1) % 6] += 1 - share
            one.gt_score = score
        if mixed:
            with pytest.raises(KDHooksError, match="12 of 12 have a gt_score that mixes several"):
                model(**given, mode="loss")
        else:
            assert model(**given, mode="loss")["loss_kd_kd"].requires_grad
