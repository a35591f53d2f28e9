"""Prompts join the blocks of a ViT and of a Swin, and change nothing else."""

import copy

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks.testing import TinyFaceNet, tiny_batch
from kdhooks_plugins._blocks import run_prompted, transformer_blocks, width
from kdhooks_plugins._prompts import Prompts
from kdhooks_plugins._windows import window_attention
from tests.maps import normal
from tests.prompted import TEACHERS, Maker, distiller_of, prompts_of, total
from tests.references import cakd as reference
from tests.transformers import Block, SwinBlock, TinySwin, TinyViT, WindowAttention, trained

# --- the effect of prompts -------------------------------------------------------------------


@TEACHERS
def test_no_prompts_leave_the_teacher_as_it_is(make: Maker, stage: str, last: str) -> None:
    network = trained(make)
    images, _ = tiny_batch()
    expected = network(images)
    assert_close(prompts_of(network, 0)(network, images), expected)
    moved = prompts_of(network)(network, images)
    assert (moved - expected).abs().max() > 0.01


def test_each_block_of_a_vit_gets_its_own_prompts_as_tokens() -> None:
    network = trained(TinyViT)
    images, _ = tiny_batch()
    prompts = prompts_of(network)
    x = rearrange(network.get_submodule("patch_embed")(images), "b k h w -> b (h w) k")
    x = x + network.get_parameter("pos_embed")
    for block, tokens in zip(
        network.get_submodule("blocks").children(), prompts.prompts, strict=True
    ):
        x = block(torch.cat([torch.stack([0.02 * tokens] * len(x)), x], dim=1))[:, 3:]
    expected = network.get_submodule("feature")(network.get_submodule("norm")(x).flatten(1))
    assert_close(prompts(network, images), expected)


@pytest.mark.parametrize("t", [0, 1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_prompts_join_every_window_as_in_the_equation(t: int, masked: bool) -> None:
    """Two samples of three windows of four tokens."""
    attn = WindowAttention(4, 2, side=2).double()
    weights = {name: p.detach().numpy() for name, p in attn.named_parameters()}
    bias = weights["relative_position_bias_table"][attn.relative_position_index.numpy()]
    windows, prompts = normal(1, 6, 4, 4), normal(2, 2, t, 4)
    mask = normal(3, 3, 4, 4) if masked else torch.zeros(3, 4, 4, dtype=torch.float64)
    found, mixed = window_attention(attn, windows, prompts, mask if masked else None)
    for sample in range(2):
        ends = []
        for window in range(3):
            tokens, end = reference.prompted_window(
                list(windows[3 * sample + window].numpy()),
                list(prompts[sample].numpy()),
                bias,
                mask[window].numpy(),
                weights,
                heads=2,
                scale=attn.scale,
            )
            assert_close(found[3 * sample + window], torch.tensor(np.array(tokens)))
            ends.append(np.array(end).reshape(t, 4))
        assert_close(mixed[sample], torch.from_numpy(sum(ends) / 3))
    assert_close(window_attention(attn, windows, prompts[:, :0], mask)[0], attn(windows, mask))


@pytest.mark.parametrize("flat", [True, False])
def test_a_swin_block_of_one_window_without_bias_is_a_vit_block(flat: bool) -> None:
    """So prompts pass through its norms and its mlp like any token."""
    block = SwinBlock(8, 2, size=4, side=4, shift=0, flat=flat)
    with torch.no_grad():
        block.get_parameter("attn.relative_position_bias_table").zero_()
        for place, name in enumerate(("norm1", "norm2")):
            block.get_parameter(f"{name}.weight").copy_(normal(place, 8))
    same = Block(8, 2)
    same.load_state_dict(block.state_dict(), strict=False)
    x, prompts = normal(1, 3, 16, 8).float(), normal(2, 2, 8).float()
    expected = same(torch.cat([prompts.expand(3, 2, 8), x], dim=1))
    pixels = x if flat else x.view(3, 4, 4, 8)
    found, end = run_prompted(block, block.forward, prompts, pixels)
    assert_close(found.reshape(x.shape), expected[:, 2:])
    assert_close(end, expected[:, :2])


@TEACHERS
def test_a_samples_prompts_come_from_its_own_windows(make: Maker, stage: str, last: str) -> None:
    """Windows are ordered by sample; in the other order, the prompts would mix samples."""
    network = trained(make)
    block = network.get_submodule(last)
    shape = {"vit": (16, 8), "swin": (4, 4, 16), "flat": (16, 16)}[
        "vit" if make is TinyViT else "swin" if make is TinySwin else "flat"
    ]
    x = normal(5, 3, *shape).float()
    prompts = normal(6, 2, width(block)).float()
    together = run_prompted(block, block.forward, prompts, x)
    assert together[1].shape == (3, 2, width(block))
    for sample in range(3):
        alone = run_prompted(block, block.forward, prompts, x[sample : sample + 1])
        assert_close(together[0][sample], alone[0][0])
        assert_close(together[1][sample], alone[1][0])


def test_the_mask_of_a_shifted_window_does_not_apply_to_prompts() -> None:
    """A change of a masked pixel leaves all other outputs as they were; prompts change them all."""
    block = SwinBlock(4, 2, size=4, side=2, shift=1, flat=False)
    x = normal(1, 1, 4, 4, 4).float()
    changed = x.clone()
    changed[0, 0, 0] += 5.0
    none = torch.zeros(0, 4)
    before, after = (run_prompted(block, block.forward, none, y)[0] for y in (x, changed))
    moved = (before - after).abs().sum(dim=3)[0] > 1e-6
    assert moved.sum() == 1  # the mask separates this corner from the pixels shifted next to it
    prompts = normal(2, 2, 4).float()
    with_prompts = run_prompted(block, block.forward, prompts, x)[0]
    assert ((with_prompts - before).abs().sum(dim=3) > 1e-6).all()


@TEACHERS
def test_prompts_have_the_gradient_of_the_equation(make: Maker, stage: str, last: str) -> None:
    """The reference is finite differences through the frozen teacher."""
    network = trained(make).double().requires_grad_(False)
    images = normal(1, 3, 3, 32, 32)
    prompts = prompts_of(network, 2).double()
    towards = normal(9, 3, 12)
    (prompts(network, images) * towards).sum().backward()
    for place, tokens in enumerate(prompts.prompts):
        direction = normal(20 + place, *tokens.shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = copy.deepcopy(prompts)
            with torch.no_grad():
                moved.prompts[place] += step * direction
                values.append((moved(network, images) * towards).sum())
        assert tokens.grad is not None
        found = (tokens.grad * direction).sum()
        assert found.abs() > 1e-6
        assert_close(found, (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-8)
    assert all(p.grad is None for p in network.parameters())


# --- what prompts do not change --------------------------------------------------------------


@TEACHERS
def test_the_teacher_stays_frozen_while_prompts_move(make: Maker, stage: str, last: str) -> None:
    student = TinyFaceNet().train()
    distiller = distiller_of(make, stage, student)
    module = distiller._session.teacher.module
    assert module is not None
    before = copy.deepcopy(module.state_dict())
    start = copy.deepcopy(distiller.adapter)
    assert isinstance(start, Prompts)
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], 0.1)
    images, labels = tiny_batch()
    for _ in range(3):
        student(images)
        optimizer.zero_grad()
        total(distiller(images, labels)).backward()
        optimizer.step()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert isinstance(distiller.adapter, Prompts)
    for now, then in zip(distiller.adapter.prompts, start.prompts, strict=True):
        assert not torch.equal(now, then)
    names = [name for name, _ in distiller.named_parameters()]
    assert all(f"adapter.prompts.{place}" in names for place in range(len(start.prompts)))


@TEACHERS
def test_outside_of_a_step_the_teacher_has_no_prompts(make: Maker, stage: str, last: str) -> None:
    network = trained(make)
    images, _ = tiny_batch()
    expected = network(images)
    prompts = prompts_of(network, joined=(stage, last))
    prompts(network, images)
    assert torch.equal(network(images), expected)
    with pytest.raises(RuntimeError):
        prompts(network, images[:, :2])
    assert torch.equal(network(images), expected)
    for module in network.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks


def test_a_forward_that_was_replaced_before_is_restored() -> None:
    network = trained(TinyViT)
    images, _ = tiny_batch()
    block = network.get_submodule("blocks.1")
    own, calls = block.forward, list[int]()

    def counted(x: Tensor) -> Tensor:
        calls.append(x.shape[1])
        out: Tensor = own(x)
        return out

    prompts = prompts_of(network)
    vars(block)["forward"] = counted
    prompts(network, images)
    network(images)
    assert calls == [19, 16]


@TEACHERS
def test_only_prompts_are_parameters(make: Maker, stage: str, last: str) -> None:
    network = trained(make)
    prompts = prompts_of(network, 5)
    blocks = transformer_blocks(network)
    assert [tuple(p.shape) for p in prompts.parameters()] == [
        (5, width(b)) for b in blocks.values()
    ]
    assert not list(prompts.buffers())


# --- checkpointing ---------------------------------------------------------------------------


def step(prompts: Prompts, network: nn.Module) -> tuple[Tensor, list[Tensor], int]:
    """Run forward and backward; return the embedding, the prompts' gradients, the saved bytes."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    prompts.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        embedding = prompts(network, tiny_batch(copies=4)[0])
    embedding.square().sum().backward()
    gradients = [p.grad.clone() for p in prompts.prompts if p.grad is not None]
    return embedding.detach(), gradients, sum(kept.values())


@TEACHERS
@pytest.mark.parametrize("join", [True, False])
def test_checkpointing_changes_only_the_memory(
    make: Maker, stage: str, last: str, join: bool
) -> None:
    network = trained(make).requires_grad_(False)
    joined = (stage, last) if join else None
    plain = step(prompts_of(network, joined=joined), network)
    again = step(prompts_of(network, joined=joined, checkpointing=True), network)
    assert_close(again[0], plain[0])
    assert_close(again[1], plain[1])
    assert len(plain[1]) == len(transformer_blocks(network))
    assert again[2] < plain[2] / 2


@TEACHERS
def test_a_step_with_checkpointing_is_the_same(make: Maker, stage: str, last: str) -> None:
    results = []
    for checkpointing in (False, True):
        student = TinyFaceNet()
        student.load_state_dict(trained(TinyFaceNet).state_dict())
        distiller = distiller_of(
            make, stage, student.train(), prompts={"checkpointing": checkpointing}
        )
        assert isinstance(distiller.adapter, Prompts)
        assert distiller.adapter.checkpointing == checkpointing
        images, labels = tiny_batch()
        student(images)
        total(distiller(images, labels)).backward()
        results.append([p.grad for p in (*student.layer4.parameters(), *distiller.parameters())])
    assert_close(results[0], results[1])


# --- prompts among the pixels ----------------------------------------------------------------


@TEACHERS
def test_only_the_tap_sees_joined_prompts(make: Maker, stage: str, last: str) -> None:
    network = trained(make)
    images, _ = tiny_batch()
    seen: list[Tensor] = []
    apart, joined = prompts_of(network), prompts_of(network, joined=(stage, last))

    def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    network.get_submodule(stage).register_forward_hook(see)
    assert_close(joined(network, images), apart(network, images))
    with_prompts, without = seen
    assert with_prompts.shape == (12, 3 + 16, with_prompts.shape[2])
    assert_close(with_prompts[:, 3:], without.flatten(1, -2))
    assert (with_prompts[0, :3] - with_prompts[1, :3]).abs().max() > 1e-3


@TEACHERS
def test_the_positions_of_joined_prompts_get_a_gradient(make: Maker, stage: str, last: str) -> None:
    student = TinyFaceNet().train()
    distiller = distiller_of(make, stage, student, prompts={"number": 2, "in_features": True})
    images, labels = tiny_batch()
    student(images)
    total(distiller(images, labels)).backward()
    positions = dict(distiller.named_parameters())["losses.cakd.theirs.prompt_positions"]
    assert positions.shape == (2, 8)
    assert positions.grad is not None
    assert positions.grad.any()
