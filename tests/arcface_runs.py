"""Methods, script lines and runs shared by the tests of the arcface_torch adapter."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.standin import Report, Trainer

FCD = {"name": "fcd", "weight": 8.0}
COUPLEFACE: dict[str, object] = {"name": "coupleface", "k": 2}
WARM_UP = {"value": 1.0, "warmup": 4}
METHODS: dict[str, dict[str, object]] = {
    "fcd": dict(FCD),
    "coupleface": COUPLEFACE,
    "proxylesskd": {"name": "proxylesskd"},
}
EVERY: dict[str, dict[str, object]] = {  # all methods, with all kinds of state that they keep
    **METHODS,
    "acsr": {"name": "acsr", "weight": {"value": 5.0, "warmup": 4}},
    "adadistill": {"name": "adadistill"},
    "at": {"name": "at"},
    "bank": {**COUPLEFACE, "relations": "bank", "bank_momentum": 0.5, "alpha": WARM_UP},
    "cakd": {
        "name": "cakd",
        "urfm": {"centres": 4, "width": 8, "heads": 2},
        "prompts": {"number": 0},
    },
    "cc": {"name": "cc"},
    "eckd": {"name": "eckd"},
    "fitnet": {"name": "fitnet", "center": True},
    "fskd": {"name": "fskd"},
    "ekd": {"name": "ekd"},
    "gkd": {"name": "gkd", "largest": 5},
    "aird": {"name": "aird"},
    "icdface": {"name": "icdface"},
    "kd": {"name": "kd"},
    "margindistillation": {"name": "margindistillation"},
    "own": {"name": "proxylesskd", "head": "own", "m": {"value": 0.5, "warmup": 4}},
    "reviewkd": {"name": "reviewkd", "weight": WARM_UP},
    "rkd": {"name": "rkd"},
    "sp": {"name": "sp"},
    "thkd": {"name": "thkd"},
}
TOGETHER: dict[str, list[dict[str, object]]] = {  # all of them, in as few runs as possible
    "one of each": [m for name, m in EVERY.items() if name not in ("bank", "own", "proxylesskd")],
    "bank and own": [EVERY["bank"], EVERY["own"]],
    "proxylesskd": [EVERY["proxylesskd"]],
}
PROJECTED = [{**FCD, "projector": True}, {**COUPLEFACE, "projector": True}]
OUTCOME = ("losses", "verified", "backbone", "head", "generator", "groups", "files")
NOT_COMPRESSED: dict[str, Any] = {"compress": False, "sample_rate": 1.0, "lr": 0.02}
EQUAL_ROWS = (
    "whole = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))\n"
    "start = module_partial_fc.class_start\n"
    "own = whole[start : start + module_partial_fc.num_local]\n"
    "if module_partial_fc.weight.requires_grad: module_partial_fc.weight.data.copy_(own)\n"
)


def trained(trainer: Trainer, **config: Any) -> Path:
    """Train without kdhooks until the identities are learned; return the output folder."""
    (report, *_) = trainer.run(steps=60, sample_rate=1.0, seed=1, verbose=100, **config)
    assert sum(report["losses"][-10:]) < 0.2 * sum(report["losses"][:10])
    return Path(report["output"])


def described(folder: Path, network: str = "tiny") -> dict[str, str]:
    return {
        "network": network,
        "checkpoint": str(folder / "model.pt"),
        "classifier": str(folder / "checkpoint_gpu_*.pt"),
    }


def recipe(teacher: dict[str, str], *methods: object, **more: object) -> dict[str, object]:
    return {"teacher": teacher, "methods": list(methods), "input_shape": [3, 32, 32], **more}


def install(teacher: dict[str, str], *methods: object, **more: object) -> str:
    """Return the lines that a user adds."""
    given = recipe(teacher, *methods, **more)
    return (
        "from kdhooks_integrations import arcface_torch\n"
        f"installed = arcface_torch.install({given!r})\n"
    )


def attach(teacher: dict[str, str], *methods: object, **more: object) -> str:
    given = recipe(teacher, *methods, **more)
    return (
        "from kdhooks_integrations import arcface_torch\n"
        "attached = arcface_torch.attach(\n"
        f"    backbone, module_partial_fc, opt, lr_scheduler, {given!r}, get_model=get_model\n"
        ")\n"
    )


def outcome(report: Report) -> dict[str, object]:
    """Return the results of a run; runs with equal results agree to the last bit."""
    assert "error" not in report, report
    return {key: report[key] for key in OUTCOME}


def saved(report: Report, file: str = "checkpoint_gpu_0.pt") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(Path(report["output"]) / file)
    return content


def rows_of(folder: Path) -> Tensor:
    shards = sorted(folder.glob("checkpoint_gpu_*.pt"))
    return torch.cat([torch.load(shard)["state_dict_softmax_fc"]["weight"] for shard in shards])


def same(found: Any, expected: Any) -> None:
    """Check that two checkpoints agree to the last bit, entry by entry."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def resumed_as_straight(trainer: Trainer, line: str, **config: Any) -> list[Report]:
    """Check that two epochs equal one epoch and a resumed one; return the straight run."""
    config = {"sample_rate": 1.0, "num_epoch": 2, **config}
    straight = trainer.run(line, **config)
    stopped = trainer.run(line, **config, before_loop="cfg.num_epoch = 1")
    resumed = trainer.run(line, **config, resume=stopped[0]["output"])
    for whole, first, second in zip(straight, stopped, resumed, strict=True):
        assert first["losses"] + second["losses"] == whole["losses"]
        for part in ("backbone", "head", "auxiliaries"):
            assert second[part] == whole[part]
    return straight
