"""A trained network as an ONNX file, which onnxruntime is found to run alike."""

import warnings
from pathlib import Path

import torch
from torch import nn

from kdhooks.drafts import drafts
from kdhooks.errors import KDHooksError
from kdhooks.onnx.graphs import require
from kdhooks.onnx.session import OnnxModel
from kdhooks.taps import evaluating

_ALIKE = 1e-3  # of the embedding's length; float32 on both sides differs by some 1e-6


def export_onnx(network: nn.Module, path: Path, size: tuple[int, int] = (112, 112)) -> float:
    """Write (b 3 h w) -> (b d), b open, for RGB images (pixel - 127.5) / 127.5.

    Returns the largest relative difference between the two embeddings of an image. If they differ,
    or if anything else goes wrong, the folder holds what it held before.
    """
    require("onnx")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, *size, generator=generator) * 2 - 1
    with evaluating(network), torch.no_grad():
        expected = _embeddings(network, images)
        try:
            with drafts(path.parent) as folder:
                draft = folder / path.name  # weights of 2 GB and more get files beside it
                _write(network, images[:2], draft)
                lengths = expected.norm(dim=1)
                largest = float(((OnnxModel(draft)(images) - expected).norm(dim=1) / lengths).max())
                if not largest <= _ALIKE:
                    raise KDHooksError(
                        f"the ONNX file '{path}' must agree with the network; found embeddings "
                        f"that differ by {largest:.2g} of their length (at most {_ALIKE} wanted): "
                        "what the network does depends on its input in a way that the exporter "
                        "does not see"
                    )
        except OSError as error:
            raise KDHooksError(
                f"the ONNX file '{path}' can't be written ({error.strerror}); name another folder"
            ) from error
    return largest


def _embeddings(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(b d), which must be finite and differ between images, as those of a trained network do."""
    found: object
    try:
        found = network(images)
    except Exception as error:
        raise KDHooksError(
            f"the network must run on images of the shape {tuple(images.shape[1:])}; it raises "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, torch.Tensor) or found.ndim != 2:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise KDHooksError(f"the network must return embeddings (b d); found {shape}")
    if not torch.isfinite(found).all():
        raise KDHooksError(
            "the network's embeddings must be finite; found nan or inf on random images; its "
            "training diverged: take an earlier checkpoint"
        )
    if (found == found[:1]).all():
        raise KDHooksError(
            "the network must give different images different embeddings; found the same one for "
            "all of them; it is untrained, or its training collapsed"
        )
    return found


def _write(network: nn.Module, images: torch.Tensor, path: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whether the exporter is right, the comparison tells
            torch.onnx.export(
                network,
                (images,),
                str(path),
                dynamo=False,
                input_names=["data"],
                output_names=["embedding"],
                dynamic_axes={"data": {0: "b"}, "embedding": {0: "b"}},
            )
    except (KDHooksError, OSError):
        raise
    except Exception as error:
        raise KDHooksError(
            f"torch can't export the network to ONNX; {type(error).__name__}: {error}"
        ) from error
