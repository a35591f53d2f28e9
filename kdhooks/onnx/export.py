"""Exports a trained network to an ONNX file, and checks its embeddings in onnxruntime."""

import warnings
from pathlib import Path

import torch
from torch import nn

from kdhooks.drafts import drafts
from kdhooks.errors import KDHooksError
from kdhooks.modes import evaluating
from kdhooks.onnx.graphs import require
from kdhooks.onnx.session import OnnxModel

_ALIKE = 1e-3  # relative to the embedding's length; float32 rounding causes about 1e-6


def export_onnx(network: nn.Module, path: Path) -> float:
    """Write the network as (b 3 112 112) -> (b d), for RGB images (pixel - 127.5) / 127.5.

    Returns the largest relative difference between an image's embeddings by torch and by
    onnxruntime. If they disagree, or if anything else fails, the folder stays unchanged.
    """
    require("onnx")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 112, 112, generator=generator) * 2 - 1
    with evaluating(network), torch.no_grad():
        expected = _embeddings(network, images)
        try:
            with drafts(path.parent) as folder:
                draft = folder / path.name  # weights of 2 GB or more are written beside it
                _write(network, images[:2], draft)
                lengths = expected.norm(dim=1)
                largest = float(((OnnxModel(draft)(images) - expected).norm(dim=1) / lengths).max())
                if not largest <= _ALIKE:
                    raise KDHooksError(
                        f"the ONNX file '{path}' must agree with the network; found embeddings "
                        f"that differ by {largest:.2g} of their length (at most {_ALIKE} wanted): "
                        "the network's computation depends on its input in a way that the "
                        "exporter does not record"
                    )
        except OSError as error:
            raise KDHooksError(
                f"the ONNX file '{path}' can't be written ({error.strerror}); name another folder"
            ) from error
    return largest


def _embeddings(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the embeddings (b d); check that they are finite and differ between images."""
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
            "training diverged; use an earlier checkpoint"
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
            warnings.simplefilter("ignore")  # the comparison with onnxruntime finds any fault
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
