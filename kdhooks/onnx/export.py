"""A trained network as an ONNX file, which onnxruntime is found to run alike."""

import warnings
from pathlib import Path

import torch
from torch import nn

from kdhooks.errors import KDHooksError
from kdhooks.onnx.graphs import require
from kdhooks.onnx.session import OnnxModel
from kdhooks.taps import evaluating

_ALIKE = 1e-3  # of the embedding's length; float32 on both sides differs by some 1e-6


def export_onnx(network: nn.Module, path: Path, size: tuple[int, int] = (112, 112)) -> float:
    """Write (b 3 h w) -> (b d), b open, for RGB images (pixel - 127.5) / 127.5.

    The largest relative difference between the two embeddings of an image comes back; the file is
    refused, and removed, where they differ.
    """
    require("onnx")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, *size, generator=generator) * 2 - 1
    with evaluating(network), torch.no_grad():
        expected = network(images)
        _write(network, images[:2], path)
    try:
        difference = (OnnxModel(path)(images) - expected).norm(dim=1) / expected.norm(dim=1)
        largest = float(difference.max())
        if not largest <= _ALIKE:
            raise KDHooksError(
                f"the ONNX file '{path}' must agree with the network; found embeddings that differ "
                f"by {largest:.2g} of their length (at most {_ALIKE} wanted): what the network "
                "does depends on its input in a way that the exporter does not see"
            )
    except KDHooksError:
        path.unlink()
        raise
    return largest


def _write(network: nn.Module, images: torch.Tensor, path: Path) -> None:
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
