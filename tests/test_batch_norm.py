"""Batch norms adapted to test images agree with an explicitly computed mixture."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import KDHooksError
from kdhooks_plugins.batch_norm import adapted_batch_norm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5),
        nn.BatchNorm1d(5),
    ).double()  # fmt: skip
    for _ in range(20):
        made(torch.randn(8, 3, 5, 5).double())
    return made.eval()


def probes(count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 + 3 * torch.randn(count, 3, 5, 5, generator=generator, dtype=torch.float64)


def mixed(model: nn.Sequential, images: Tensor, share: float) -> Tensor:
    """Compute each batch norm by hand, from the moments of the batch and of the training."""
    x = images
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            axes = [0, *range(2, x.ndim)]
            shape = [1, -1, *[1] * (x.ndim - 2)]
            mean = (1 - share) * layer.running_mean + share * x.mean(axes)
            var = (1 - share) * layer.running_var + share * x.var(axes, unbiased=False)
            x = (x - mean.view(shape)) / (var.view(shape) + layer.eps).sqrt()
            x = x * layer.weight.view(shape) + layer.bias.view(shape)
        else:
            x = layer(x)
    return x


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_statistics_are_the_mixture_of_the_training_and_the_test(share: float) -> None:
    model, images = network(), probes()
    adapted = adapted_batch_norm(model, [images], share)
    assert_close(adapted(images), mixed(model, images, share))
    assert not adapted.training


def test_a_share_of_1_equals_training_mode() -> None:
    model, images = network(), probes()
    found = adapted_batch_norm(model, [images], 1.0)(images)
    assert_close(found, model.train()(images))


def test_a_share_of_0_changes_no_bit_and_the_model_is_left_as_it_was() -> None:
    model = network().float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    same = adapted_batch_norm(model, [probes().float()], 0.0)
    adapted = adapted_batch_norm(model, [probes().float()])
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(same.state_dict()[name], value)
    assert not torch.equal(adapted.state_dict()["1.running_mean"], before["1.running_mean"])
    assert not model[1]._forward_pre_hooks
    assert not adapted[1]._forward_pre_hooks  # type: ignore[index]


def test_the_first_layers_statistics_are_those_of_all_batches() -> None:
    """The batches may have different sizes and come in any order."""
    model, images = network(), probes(10)
    whole = adapted_batch_norm(model, [images]).state_dict()
    parts = adapted_batch_norm(model, [images[7:], images[:7]]).state_dict()
    for name in ("1.running_mean", "1.running_var"):
        assert_close(parts[name], whole[name])


def test_a_model_that_takes_more_than_images_is_run_by_a_function() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, images: Tensor, scale: float) -> Tensor:
            found: Tensor = self.inner(scale * images)
            return found

    images = probes()
    found = adapted_batch_norm(Two(), [images], run=lambda model, some: model(some, 0.5))
    assert_close(found(images, 0.5), mixed(network(), 0.5 * images, 0.5))


@pytest.mark.parametrize("share", [-0.1, 1.1, True, "half", float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(share: object) -> None:
    with pytest.raises(KDHooksError, match="share must be a number from 0 to 1; found"):
        adapted_batch_norm(network(), [probes()], share)  # type: ignore[arg-type]


def test_a_model_without_running_statistics_is_refused() -> None:
    plain = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(KDHooksError, match="found none in Sequential"):
        adapted_batch_norm(plain, [torch.zeros(2, 3)])


def test_no_batch_is_refused() -> None:
    with pytest.raises(KDHooksError, match="at least one batch of images; found none"):
        adapted_batch_norm(network(), [])


def test_one_tensor_is_one_batch() -> None:
    model, images = network(), probes()
    one, several = adapted_batch_norm(model, images), adapted_batch_norm(model, [images])
    for name, value in several.state_dict().items():
        assert torch.equal(one.state_dict()[name], value)


@pytest.mark.parametrize("labelled", [True, False])
def test_batches_that_are_no_images_are_refused(labelled: bool) -> None:
    images = probes()
    batch: object = (images, torch.zeros(len(images))) if labelled else images.byte()
    found = "found tuple" if labelled else "found torch.uint8"
    with pytest.raises(KDHooksError, match=f"floating-point images .*; {found}.*labels in loader"):
        adapted_batch_norm(network(), [batch])  # type: ignore[list-item]
    with pytest.raises(KDHooksError, match=r"found torch\.float64 \(0, "):
        adapted_batch_norm(network(), [images[:0]])


def test_images_that_are_not_finite_are_refused() -> None:
    images = probes()
    images[0, 0] = torch.nan
    with pytest.raises(KDHooksError, match="must be finite; found others at a batch norm"):
        adapted_batch_norm(network(), [images])
