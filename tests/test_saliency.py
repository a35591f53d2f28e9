"""Saliency maps are computed from a network, or read from files."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdhooks import KDHooksError
from kdhooks.testing import TinyFaceNet, tiny_batch
from kdhooks_plugins.saliency import load_saliency, saliency_map


def test_a_map_is_read_from_a_path_of_either_kind(tmp_path: Path) -> None:
    content = torch.arange(6).reshape(2, 3)
    torch.save(content, tmp_path / "map.pt")
    for source in (tmp_path / "map.pt", str(tmp_path / "map.pt"), content, content.half()):
        torch.testing.assert_close(load_saliency(source), content.double() / 5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.ones(3), r"must be a map \(h w\); found \(3,\)"),
        (torch.ones(0, 3), r"must be a map \(h w\); found \(0, 3\)"),
        ({"map": torch.ones(2, 2)}, r"must be a map \(h w\); found dict"),
        (torch.ones(2, 2), "must be finite and differ between pixels; found 1.0 to 1.0"),
        (torch.tensor([[1.0, torch.nan]]), "must be finite and differ"),
        (torch.tensor([[1.0, torch.inf]]), "must be finite and differ"),
        (torch.tensor([[1j, 2j]]), "plain tensor of real numbers; found torch.complex64"),
        (torch.tensor([[True, False]]), "plain tensor of real numbers; found torch.bool"),
        (torch.eye(2).to_sparse(), "plain tensor .* found torch.float32, torch.sparse_coo on cpu"),
        (torch.ones(2, 2, device="meta"), "plain tensor .* found torch.float32, .* on meta"),
    ],
)
def test_a_file_of_something_else_is_refused(content: object, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "map.pt")
    with pytest.raises(KDHooksError, match=f"cakd: saliency .*{said}"):
        load_saliency(tmp_path / "map.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.uint8])
def test_numbers_of_few_bits_are_scaled_to_0_and_1(dtype: torch.dtype) -> None:
    found = load_saliency(torch.tensor([[3, 7], [11, 14]]).to(dtype))
    assert [float(found.min()), float(found.max())] == [0, 1]


def test_an_empty_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "map.pt").write_bytes(b"")
    with pytest.raises(KDHooksError, match=r"cakd: saliency: '.*map\.pt' is empty"):
        load_saliency(tmp_path / "map.pt")
    with pytest.raises(KDHooksError, match=r"there is no file '.*mpa\.pt'; did you mean 'map\.pt'"):
        load_saliency(str(tmp_path / "mpa.pt"))


def broken(images: Tensor) -> Tensor:
    images = images.clone()
    images[0, 0, 0, 0] = torch.nan
    return images


@pytest.mark.parametrize(
    ("batches", "stage", "said"),
    [
        ([], "layer3", "needs at least one batch of images; found none"),
        ([tiny_batch()], "layer3", "batches must be tensors of images .*; found tuple"),
        (None, "layer3", "batches must be a list or a loader of images .*; found NoneType"),
        ([torch.rand(2, 1, 32, 32)], "layer3", r"run on images \(2, 1, 32, 32\) of torch.float32"),
        (
            [tiny_batch()[0].byte()],
            "layer3",
            "of torch.uint8; it raises RuntimeError: .*; preprocess",
        ),
        ([tiny_batch()[0]], "layer9", "has no submodule 'layer9'"),
        ([tiny_batch()[0], broken(tiny_batch()[0])], "layer3", "is not finite in batch 1; check"),
        ([torch.rand(2, 3, 32, 32), torch.rand(2, 3, 48, 32)], "layer2", "images must have one"),
    ],
)
def test_batches_without_a_map_are_refused(batches: Any, stage: str, said: str) -> None:
    stages = nn.Sequential(OrderedDict(list(TinyFaceNet().named_children())[:4]))  # of any size
    with pytest.raises(KDHooksError, match=said):
        saliency_map(stages, stage, batches)
