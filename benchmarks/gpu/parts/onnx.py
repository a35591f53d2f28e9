"""A teacher in an ONNX file, run by onnxruntime on images that are on the device."""

import copy
import importlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.command import bars
from benchmarks.gpu.part import Absent, Goal, Options, Result, Table
from benchmarks.measuring import Work, in_turns, spreads, told
from benchmarks.networks import network, settle
from kdhooks.onnx.export import export_onnx
from kdhooks.onnx.session import OnnxModel

ABOUT = (
    "A network is exported to ONNX, and onnxruntime runs the file on images that are on the "
    "device. With IO binding, onnxruntime reads and writes the tensors on the GPU; without it, the "
    "images and the embeddings are copied to and from the CPU. The embeddings are compared with "
    "those of the same network in torch, in float32, on the device and on the CPU; the least "
    "cosine and the largest relative difference are over all images. The rates are medians of "
    "images per second, with the quartiles in brackets."
)

BOUND, PROCESSOR = "IO binding on CUDA", "onnxruntime on the processor"
SECONDS = 30.0
LEAST_COSINE = 0.9999  # the goal
_CUDA = "CUDAExecutionProvider"
ONNX, TORCH = "onnxruntime", "torch, float32"


def cases(options: Options) -> Mapping[str, float]:
    return dict.fromkeys((BOUND, PROCESSOR), SECONDS)


def run(case: str, options: Options) -> Result:
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            raise Absent(f"the package {package} is not installed")
    ort = importlib.import_module("onnxruntime")
    providers = ort.get_available_providers()
    if case == BOUND and not (options.cuda and _CUDA in providers):
        raise Absent(
            f"it needs a CUDA device and onnxruntime's {_CUDA}; the device is {options.device}, "
            f"and onnxruntime.get_available_providers() returns {providers}"
        )
    sizes = (1, 2) if options.tiny else (1, 128)
    torch.manual_seed(0)
    images = torch.rand(max(sizes), 3, 112, 112) * 2 - 1
    name, net = _network(options)
    settle(net, images)
    net.eval()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        file = Path(folder) / "network.onnx"
        with patch.object(ort, "get_available_providers", lambda: ["CPUExecutionProvider"]):
            exported = export_onnx(net, file)
            model = OnnxModel(file) if case == PROCESSOR else None
        model = model or OnnxModel(file)
    if case == BOUND and model.provider != _CUDA:
        raise Absent(
            f"onnxruntime could not start its {_CUDA}, although get_available_providers() returns "
            f"{providers}; it runs the file by the {model.provider}"
        )
    device = options.device
    there, images = copy.deepcopy(net).to(device), images.to(device)
    embeddings = model(images)
    assert embeddings.device == images.device
    agreement = {"the device": _agreement(embeddings, there, images)}
    if options.cuda:
        agreement["the processor"] = _agreement(embeddings.cpu(), net, images.cpu())
    return {
        "network": name,
        "provider": model.provider,
        "providers": providers,
        "onnxruntime": ort.__version__,
        "tf32": torch.backends.cudnn.allow_tf32,
        "difference_at_export": exported,
        "agreement": agreement,
        "images_a_second": {
            str(size): _rates(model, there, images[:size], options) for size in sizes
        },
    }


def _network(options: Options) -> tuple[str, nn.Module]:
    """Return the network, on the CPU, with its name."""
    if options.arcface_torch is None:
        return "stand-in", network(4 if options.tiny else 48, 2)
    sys.path.insert(0, str(options.arcface_torch))
    try:
        get_model = importlib.import_module("backbones").get_model
    finally:
        sys.path.remove(str(options.arcface_torch))
    return "mbf", get_model("mbf", fp16=False, num_features=512)


@torch.no_grad()
def _agreement(embeddings: Tensor, net: nn.Module, images: Tensor) -> dict[str, float]:
    """Compare embeddings (b d) with those of a network for the images (b 3 h w)."""
    expected = net(images)
    cosines = F.cosine_similarity(embeddings, expected)
    differences = (embeddings - expected).norm(dim=1) / expected.norm(dim=1)
    return {
        "least_cosine": cosines.min().item(),
        "largest_relative_difference": differences.max().item(),
    }


def _rates(model: OnnxModel, net: nn.Module, images: Tensor, options: Options) -> dict[str, Any]:
    """Return the images per second of onnxruntime and torch, in wall time."""
    works: dict[str, Work] = {ONNX: partial(model, images), TORCH: partial(net, images)}
    with torch.no_grad():
        for work in works.values():
            work()
        seconds = in_turns(works, 2 if options.tiny else 12, options.device)
    return {
        way: spreads("images_a_second", len(images) / found)["clock_images_a_second"]
        for way, found in seconds.items()
    }


def tables(found: Mapping[str, Result]) -> Sequence[Table]:
    agreement = [["", "network", "provider", "compared with torch on", "least cosine",
                  "largest relative difference"]]  # fmt: skip
    rates = [["images a second", "batch", ONNX, TORCH]]
    for case, one in found.items():
        for place, values in one["agreement"].items():
            cosine, difference = values["least_cosine"], values["largest_relative_difference"]
            cells = [f"{cosine:.7f}", f"{difference:.1e}"]
            agreement.append([case, one["network"], one["provider"], place, *cells])
        for size, ways in one["images_a_second"].items():
            rates.append([case, size, *(told(ways[way], 0) for way in (ONNX, TORCH))])
    return [agreement, rates]


def goals(found: Mapping[str, Result]) -> Sequence[Goal]:
    reached = []
    for case, one in found.items():
        cosine = min(values["least_cosine"] for values in one["agreement"].values())
        text = f"{case}: the least cosine is at least {LEAST_COSINE}"
        reached.append(Goal(text, f"{cosine:.7f}", cosine >= LEAST_COSINE))
    return reached


def picture(found: Mapping[str, Result]) -> Figure | None:
    groups = {
        way: {
            f"{case}, batch {size}": ways[way]
            for case, one in found.items()
            for size, ways in one["images_a_second"].items()
        }
        for way in (ONNX, TORCH)
    }
    figure = Figure(figsize=(8, 1 + 0.6 * len(groups[ONNX])), layout="constrained")
    axes = figure.subplots()
    bars(axes, groups)
    axes.set(xscale="log", xlabel="images a second")
    axes.set_xlim(left=1)
    axes.legend()
    return figure
