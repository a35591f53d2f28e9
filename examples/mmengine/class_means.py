"""Compute class rows for a teacher without a classifier: `python class_means.py CONFIG`.

They are written to the file that the config names as its teacher's classifier.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from torch.utils.data import DataLoader

from kdhooks import class_means
from kdhooks.recipe import Recipe, build_teacher
from kdhooks_demo.embedding import as_input


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file with a teacher")
    parser.add_argument("--data", help="the same as for train.py")
    parser.add_argument("--pairs", help="the same as for train.py")
    options = parser.parse_args(argv)
    config = Config.fromfile(options.config)
    table = config.model.teacher.to_dict()
    out = Path(table.pop("classifier"))
    teacher = build_teacher(
        Recipe.read(
            {"teacher": {**table, "module": MODELS.build(table["module"])}, "methods": ["fcd"]}
        )
    )
    dataset = DATASETS.build(
        {**config.train_dataloader.dataset, "data": options.data, "pairs": options.pairs}
    )
    loader = DataLoader(dataset, batch_size=8)  # larger batches are slower on a CPU
    batches = ((as_input(batch["inputs"]), batch["data_samples"]) for batch in loader)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(class_means(teacher, batches, dataset.metainfo["classes"]), out)
    print(f"{out}: {dataset.metainfo['classes']} rows", file=sys.stderr)
    return out


if __name__ == "__main__":
    main()
