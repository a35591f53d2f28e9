"""A stand-in for arcface_torch's train_v2.py: the same order of statements, written independently.

`python train.py CONFIG.py`. It reads these environment variables: RANK and WORLD_SIZE; STORE, a
file through which the ranks meet; BELOW_IMPORTS, AFTER_SCHEDULE and BEFORE_LOOP, lines that a user
might have inserted. It writes what a test reads to `report_{rank}.json` in cfg.output.
"""

import hashlib
import importlib.util
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from tests.standin.backbones import get_model
from tests.standin.partial_fc import MarginLoss, PartialFC, PartialFC_V2
from tests.standin.utils import CallBackLogging, PolynomialWarmup

exec(os.environ["BELOW_IMPORTS"])

rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
dist.init_process_group(
    "gloo",
    init_method=f"file://{os.environ['STORE']}",
    rank=rank,
    world_size=world_size,
    timeout=timedelta(seconds=60),
)


Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def get_config(path: str) -> SimpleNamespace:
    """Run the config file, which is Python, before anything else is built."""
    spec = importlib.util.spec_from_file_location("configs.job", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = SimpleNamespace(**module.config)
    base = ModuleType("configs.base")  # where arcface_torch merges the two
    vars(base)["config"] = config
    sys.modules[base.__name__] = base
    return config


def batches(cfg: SimpleNamespace, epoch: int, verify: bool = False) -> Iterator[Batch]:
    """Yield this rank's part of each global batch: a pattern for each identity, with noise."""
    patterns = torch.rand(cfg.num_classes, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(100 + epoch + 1000 * verify)
    size = cfg.batch_size * world_size
    for _ in range(cfg.steps):
        labels = torch.randint(cfg.num_classes, (size, 1), generator=generator)
        images = torch.nn.functional.interpolate(2 * patterns[labels[:, 0]] - 1, 32)
        images = images + 0.3 * torch.randn(images.shape, generator=generator)
        part = slice(rank * cfg.batch_size, (rank + 1) * cfg.batch_size)
        yield images[part], labels[part]


def verification(backbone: torch.nn.Module, cfg: SimpleNamespace) -> float:
    """Embed a batch in eval mode through DDP, only on rank 0."""
    backbone.eval()
    with torch.no_grad():
        embedding = backbone(next(batches(cfg, 0, verify=True))[0])
    backbone.train()
    return float(embedding.norm())


def digest(tensors: Iterable[torch.Tensor]) -> str:
    joined = b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)
    return hashlib.sha256(joined).hexdigest()


def main(path: str) -> None:
    cfg = get_config(path)
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    os.makedirs(cfg.output, exist_ok=True)

    backbone: torch.nn.Module = get_model(
        cfg.network, dropout=0.0, fp16=False, num_features=cfg.embedding_size
    )
    raw = backbone
    if cfg.compile and cfg.compiled == "module":
        raw.compile(backend=cfg.compile)
    if cfg.compile and cfg.compiled == "before DDP":
        backbone = torch.compile(backbone, backend=cfg.compile)  # type: ignore[assignment]
    backbone = DistributedDataParallel(
        module=backbone, broadcast_buffers=False, bucket_cap_mb=16, find_unused_parameters=True
    )
    if cfg.compress:
        backbone.register_comm_hook(None, fp16_compress_hook)
    backbone.train()
    backbone._set_static_graph()
    if cfg.compile and cfg.compiled == "after DDP":
        backbone = torch.compile(backbone, backend=cfg.compile)  # type: ignore[assignment]

    margin_loss = MarginLoss(64.0, 0.5)
    make = PartialFC if cfg.old_head else PartialFC_V2
    heads = [
        make(margin_loss, cfg.embedding_size, cfg.num_classes, cfg.sample_rate, False).train()
        for _ in range(cfg.heads)
    ]
    module_partial_fc = heads[0]
    opt = torch.optim.SGD(
        params=[{"params": backbone.parameters()}, *({"params": h.parameters()} for h in heads)],
        lr=cfg.lr, momentum=0.9, weight_decay=5e-4,
    )  # fmt: skip
    lr_scheduler = PolynomialWarmup(opt, 2, cfg.steps * cfg.num_epoch + 1)
    exec(os.environ["AFTER_SCHEDULE"], globals() | locals())

    start_epoch = global_step = 0
    if cfg.resume:
        saved = torch.load(Path(cfg.resume) / f"checkpoint_gpu_{rank}.pt")
        start_epoch, global_step = saved["epoch"], saved["global_step"]
        raw.load_state_dict(saved["state_dict_backbone"])
        module_partial_fc.load_state_dict(saved["state_dict_softmax_fc"])
        opt.load_state_dict(saved["state_optimizer"])
        lr_scheduler.load_state_dict(saved["state_lr_scheduler"])
    exec(os.environ["BEFORE_LOOP"], globals() | locals())

    callback_logging = CallBackLogging(cfg.frequent, rank)
    others = [p for group in opt.param_groups[cfg.heads : -1] for p in group["params"]]
    third = [opt] if cfg.old_head else []
    losses, verified, first_auxiliaries = [], [], digest(others)
    for epoch in range(start_epoch, cfg.num_epoch):
        for img, local_labels in batches(cfg, epoch):
            global_step += 1
            local_embeddings = backbone(img)
            parts = zip(
                local_embeddings.chunk(cfg.heads), local_labels.chunk(cfg.heads), strict=True
            )
            of_heads = [h(*part, *third) for h, part in zip(heads, parts, strict=True)]
            loss = torch.stack(of_heads).sum()
            loss.backward()
            if global_step % cfg.gradient_acc == 0:
                torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
                opt.step()
                opt.zero_grad()
            lr_scheduler.step()
            losses.append(loss.item())
            callback_logging(global_step, losses)
            if global_step % cfg.verbose == 0 and rank == 0:
                verified.append(verification(backbone, cfg))
        torch.save(
            {
                "epoch": epoch + 1,
                "global_step": global_step,
                "state_dict_backbone": raw.state_dict(),
                "state_dict_softmax_fc": module_partial_fc.state_dict(),
                "state_optimizer": opt.state_dict(),
                "state_lr_scheduler": lr_scheduler.state_dict(),
            },
            os.path.join(cfg.output, f"checkpoint_gpu_{rank}.pt"),
        )
        if rank == 0:
            torch.save(raw.state_dict(), os.path.join(cfg.output, "model.pt"))

    dist.barrier()  # afterwards all files exist
    scope = globals() | locals()
    report = {
        "losses": losses,
        "verified": verified,
        "backbone": digest(raw.state_dict().values()),
        "parameters": digest(raw.parameters()),
        "head": digest(module_partial_fc.state_dict().values()),
        "first_auxiliaries": first_auxiliaries,
        "auxiliaries": digest(others),
        "generator": digest([torch.get_rng_state()]) + f"{random.random()} {np.random.rand()}",
        "groups": [len(group["params"]) for group in opt.param_groups],
        "logged": callback_logging.writer.logged,
        "files": sorted(path.name for path in Path(cfg.output).glob("*.pt")),
        "extra": {key: eval(text, scope) for key, text in cfg.ask.items()},
    }
    Path(cfg.output, f"report_{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
