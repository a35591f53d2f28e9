"""Generated faces for the demo's tests, in memory and as files."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from kdhooks_demo.faces import Faces


def made_faces(people: int = 6, images: int = 4) -> Faces:
    """Return faces: a colour pattern for each person, with different noise in each image."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(40, 215, (people, 3, 7, 7))
    pixels, names = [], []
    for person in range(people):
        for image in range(images):
            noisy = patterns[person] + generator.integers(-20, 20, (3, 7, 7))
            pixels.append(np.kron(noisy, np.ones((1, 16, 16))))
            names.append(f"p{person}/p{person}_{image + 1:04d}")
    return Faces(torch.from_numpy(np.stack(pixels)).to(torch.uint8), tuple(names))


def written(faces: Faces, folder: Path) -> Path:
    for image, name in zip(faces.images, faces.names, strict=True):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder
