"""Every method trains between real mmpretrain models, if mmpretrain is installed."""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdhooks import KDHooksError, methods

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # mmpretrain warns on a new torch and Python
    pytest.importorskip("mmpretrain", exc_type=ImportError)
    import_module("mmpretrain.models")
    import_module("mmengine.runner")

from mmengine.registry import DATASETS, MODELS

from kdhooks_integrations import mmengine
from kdhooks_integrations.mmengine.models import Conventions
from tests.mmengine_runs import QUIET, each_door, same, students, train

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore")]

SIDE, CLASSES = 64, 6
IMAGENET: dict[str, Any] = {
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "to_rgb": True,
    "num_classes": CLASSES,
}
GAP = {"type": "GlobalAveragePooling"}
SMALL = {"embed_dims": 32, "num_layers": 4, "num_heads": 2, "feedforward_channels": 64}
WINDOWS = {"embed_dims": 16, "depths": [2, 2, 2, 2], "num_heads": [2, 2, 2, 2]}
NETWORKS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "resnet": ({"type": "ResNet", "depth": 18, "base_channels": 16}, GAP, 128),
    "mobilenet": (
        {"type": "MobileNetV3", "arch": "small_050", "norm_cfg": {"type": "BN", "momentum": 0.1}},
        GAP,
        288,
    ),
    "vit": (
        {"type": "VisionTransformer", "arch": SMALL, "img_size": SIDE, "patch_size": 16},
        None,
        32,
    ),
    "swin": (
        {
            "type": "SwinTransformer",
            "arch": WINDOWS,
            "img_size": SIDE,
            "window_size": 2,
            "drop_path_rate": 0.0,  # MMEngine does not save the state of its random numbers
        },
        GAP,
        128,
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "cakd": {"urfm": {"width": 16, "heads": 2, "centres": 3}, "collapse": {"every": 0}},
    "coupleface": {"k": 3},
}
each_network = pytest.mark.parametrize("kind", NETWORKS)


def network(kind: str, **changes: Any) -> dict[str, Any]:
    backbone, neck, width = NETWORKS[kind]
    head = {"type": "ArcFaceClsHead", "num_classes": CLASSES, "in_channels": width}
    return {
        "type": "ImageClassifier",
        "_scope_": "mmpretrain",
        "backbone": dict(backbone),
        "neck": neck,
        "head": head,
        **changes,
    }


def MmpretrainSamples() -> list[Any]:
    """Return two pictures of each class, which differ only by noise."""
    structures = import_module("mmpretrain.structures")
    drawn = torch.Generator().manual_seed(0)
    shapes = F.interpolate(torch.rand(CLASSES, 3, 4, 4, generator=drawn), (SIDE, SIDE))
    noise = torch.rand(2 * CLASSES, 3, SIDE, SIDE, generator=drawn)
    pixels = ((0.8 * shapes.repeat(2, 1, 1, 1) + 0.2 * noise) * 255).to(torch.uint8)
    return [
        {
            "inputs": image,
            "data_samples": structures.DataSample().set_gt_label(number % CLASSES),
        }
        for number, image in enumerate(pixels)
    ]


DATASETS.register_module("MmpretrainSamples", module=MmpretrainSamples)  # pyright: ignore[reportArgumentType]


def batch() -> dict[str, list[Any]]:
    samples = MmpretrainSamples()
    return {key: [sample[key] for sample in samples] for key in samples[0]}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write checkpoints into a folder; their class rows are the class means of `batch()`."""
    folder = tmp_path_factory.mktemp("teachers")
    for kind in NETWORKS:
        torch.manual_seed(1)
        model: Any = MODELS.build(network(kind, data_preprocessor=dict(IMAGENET))).train()
        given = model.data_preprocessor(batch(), True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for _ in range(15):
            optimizer.zero_grad()
            model(**given, mode="loss")["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            for _ in range(20):
                model.backbone(given["inputs"])
            model.eval()
            embedding = F.normalize(model.extract_feat(given["inputs"])[-1])
            common = F.normalize(embedding.mean(dim=0), dim=0)
            rows = embedding - (embedding @ common)[:, None] * common
            rows = torch.stack([rows[number::CLASSES].mean(dim=0) for number in range(CLASSES)])
            model.head.norm_product.weight.copy_(rows)
        torch.save({"state_dict": model.state_dict()}, folder / f"{kind}.pth")
        config = network(kind)
        del config["_scope_"]
        (folder / f"{kind}.py").write_text(
            f"default_scope = 'mmpretrain'\nmodel = {config!r}\ndata_preprocessor = {IMAGENET!r}\n"
        )
    return folder


def table(teachers: Path, kind: str, method: str, **options: Any) -> dict[str, Any]:
    return {
        "teacher": {
            "config": str(teachers / f"{kind}.py"),
            "checkpoint": str(teachers / f"{kind}.pth"),
            "classifier": "head.norm_product.weight",
        },
        "methods": [{"name": method, **OPTIONS.get(method, {}), **options}],
        "input_shape": [3, SIDE, SIDE],
    }


@each_network
@pytest.mark.parametrize("method", [method.name for method in methods()])
def test_every_method_trains(teachers: Path, kind: str, method: str) -> None:
    torch.manual_seed(0)
    model: Any = mmengine.Distill(
        network(kind), data_preprocessor=dict(IMAGENET), **table(teachers, kind, method)
    )
    losses = model(**model.train().data_preprocessor(batch(), True), mode="loss")
    ours = [value for key, value in losses.items() if key.startswith("loss_kd_")]
    assert ours
    torch.stack(ours).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    if kind in ("vit", "swin") and method == "cakd":
        assert model.kdhooks.distiller.adapter is not None


@pytest.mark.parametrize("teacher", NETWORKS)
@pytest.mark.parametrize("student", NETWORKS)
def test_stages_of_any_two_networks_are_compared(
    teachers: Path, student: str, teacher: str
) -> None:
    for method in ("reviewkd", "cakd"):
        model: Any = mmengine.Distill(
            network(student), data_preprocessor=dict(IMAGENET), **table(teachers, teacher, method)
        )
        losses = model(**model.train().data_preprocessor(batch(), True), mode="loss")
        assert losses[f"loss_kd_{method}"].isfinite()


@pytest.mark.parametrize(
    ("backbone", "stages"),
    [
        ({"type": "MobileNetV2"}, ["layer2", "layer3", "layer5", "layer7"]),
        ({"type": "EfficientNet", "arch": "b0"}, [f"layers.{n}" for n in (2, 3, 4, 6)]),
        ({"type": "ShuffleNetV2"}, ["layers.0", "layers.1", "layers.3"]),
        ({"type": "RepVGG", "arch": "A0"}, [f"stage_{n}" for n in (1, 2, 3, 4)]),
        ({"type": "DeiT3", "arch": "s"}, [f"layers.{n}" for n in (2, 5, 8, 11)]),
        ({"type": "HRNet", "arch": "w18"}, None),
    ],
)
def test_stages_of_other_backbones(backbone: dict[str, Any], stages: list[str] | None) -> None:
    model = MODELS.build({**backbone, "_scope_": "mmpretrain"})
    assert Conventions().model_stages(model) == stages


@pytest.mark.parametrize("augment", ["Mixup", "CutMix"])
def test_mixed_images_are_for_methods_without_labels(teachers: Path, augment: str) -> None:
    mixing = {"augments": {"type": augment, "alpha": 0.8}}
    given: dict[str, Any] = {
        "data_preprocessor": dict(IMAGENET),
        "student": network("resnet", train_cfg=mixing),
    }
    model: Any = mmengine.Distill(**given, **table(teachers, "resnet", "rkd"))
    # ArcFace, the head's own loss, does not accept mixed labels.
    model.head.loss = lambda features, samples: {"loss": features[-1].mean()}
    losses = model(**model.train().data_preprocessor(batch(), True), mode="loss")
    assert losses["loss_kd_rkd"].requires_grad
    given["data_preprocessor"] = dict(IMAGENET)  # a new dict, since mmpretrain adds keys to it
    with pytest.raises(KDHooksError, match=rf"kd need one .*batch_augments \({augment}\) mix"):
        mmengine.Distill(**given, **table(teachers, "resnet", "kd"))


def ran(folder: Path, kind: str, door: str = "", given: Any = None, **changes: Any) -> Any:
    """Train two epochs of three steps, with the data_preprocessor at the config's top."""
    model, hooks = network(kind), []
    if door == "model":
        model = {"type": "kdhooks.Distill", "student": model, **given}
    elif door:
        hooks = [{"type": "kdhooks.DistillHook", **given}]
    loader = {
        "dataset": {"type": "MmpretrainSamples"},
        "batch_size": 4,
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        "collate_fn": {"type": "pseudo_collate"},
    }
    return train(
        folder,
        model=model,
        hooks=[*hooks, {"type": "kdhooks.ResumeHook"}],
        data_preprocessor=dict(IMAGENET),
        train_dataloader=loader,
        **changes,
    )


@each_door
@each_network
def test_with_weight_0_the_run_is_the_plain_run(
    teachers: Path, tmp_path: Path, kind: str, door: str
) -> None:
    plain = ran(tmp_path / "plain", kind)
    given = table(teachers, kind, "rkd", weight=0.0)
    run = ran(tmp_path / "kd", kind, door, given)
    assert run["loss"] == plain["loss"]
    assert same(students(run.state), plain.state)


@each_network
def test_a_resumed_run_equals_the_straight_one(teachers: Path, tmp_path: Path, kind: str) -> None:
    given = table(teachers, kind, "fcd", projector=True)
    straight = ran(tmp_path / "straight", kind, "model", given)
    with pytest.raises(InterruptedError):
        ran(tmp_path / "killed", kind, "model", given, kill=4)
    resumed = ran(tmp_path / "killed", kind, "model", given, resume=True)
    assert resumed["loss_kd_fcd"] == straight["loss_kd_fcd"][3:]
    assert same(resumed.state, straight.state)
