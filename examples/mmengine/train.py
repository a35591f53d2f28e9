"""Train with a config: `python train.py CONFIG [--cfg-options KEY=VALUE …]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS
from mmengine.runner import Runner


def main(argv: Sequence[str] | None = None) -> Runner:
    options = _parser().parse_args(argv)
    runner = Runner.from_cfg(read(options))
    runner.train()
    return runner


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("config", help="config file")
    add("--work-dir", help="output folder (default: work_dirs/NAME_OF_THE_CONFIG)")
    add("--resume", nargs="?", const="auto", help="resume from this checkpoint, or from the latest")
    add("--amp", action="store_true", help="train in mixed precision, on a GPU (default: off)")
    add("--data", help="folder or zip of aligned 112x112 faces, one directory per person")
    add("--pairs", help="pairs to test on, in the format of LFW's pairs.txt")
    add("--cfg-options", nargs="+", action=DictAction, help="values that override the config's")
    add("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    add("--local_rank", "--local-rank", type=int, default=0)
    return parser


def read(options: argparse.Namespace) -> Config:
    """Read the config, and apply the options of the command line."""
    config = Config.fromfile(options.config)
    config.launcher = options.launcher
    config.work_dir = options.work_dir or f"work_dirs/{Path(options.config).stem}"
    if options.amp:
        config.optim_wrapper.type = "AmpOptimWrapper"
    if options.data:
        take_faces(config, options.data, options.pairs)
    if options.cfg_options:
        config.merge_from_dict(options.cfg_options)
    if options.resume:
        config.resume = True
        config.load_from = None if options.resume == "auto" else options.resume
    if options.resume or config.get("load_from"):
        config.custom_hooks = [*config.get("custom_hooks", []), {"type": "kdhooks.ResumeHook"}]
    return config


def take_faces(config: Config, data: str, pairs: str | None) -> None:
    """Set the faces to train and test on, and the number of classes of the head."""
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.update(data=data, pairs=pairs)
    model = config.model.get("student", config.model)
    model.head.classes = DATASETS.build(config.train_dataloader.dataset).metainfo["classes"]


if __name__ == "__main__":
    main()
