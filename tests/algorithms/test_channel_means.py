"""Means by channel, however the images come in batches."""

import pytest
import torch
from torch import nn

from qtool.algorithms.channel_means import MeanInput, Spread, mean_output
from qtool.quantizers.weighted import weighted_function

LAYERS = {
    "conv": (nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False), (10, 3, 7, 7)),
    "reflected border": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False), (10, 3, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (10, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, padding=1, stride=2, groups=2, bias=False), (10, 4, 5, 5)),
    "linear": (nn.Linear(5, 3, bias=False), (10, 5)),
    "tokens": (nn.Linear(5, 3, bias=False), (10, 7, 5)),
}


@pytest.mark.parametrize("sizes", [[10], [3, 7], [1] * 10], ids=str)
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_the_layer_of_the_mean_is_the_mean_of_the_layer_borders_included(layer, shape, sizes):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        y = layer(x).double()
    axis = -1 if isinstance(layer, nn.Linear) else 1
    found = mean_output(MeanInput.of(layer, x.split(sizes)), weighted_function(layer), layer.weight)
    spread = Spread(axis)
    for batch in y.float().split(sizes):
        spread.add(batch)
    rows = y.movedim(axis, 0).flatten(1)
    assert torch.allclose(found, rows.mean(1), atol=1e-6)
    assert torch.allclose(spread.std, rows.std(1, correction=0), rtol=1e-5)


def test_images_of_several_sizes_count_by_their_positions():
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    batches = [torch.randn(2, 2, 4, 4), torch.randn(1, 2, 6, 5), torch.randn(3, 2, 4, 4)]
    outputs = torch.cat([layer(x).detach().movedim(1, 0).flatten(1) for x in batches], 1)  # (C, positions)
    found = mean_output(MeanInput.of(layer, batches), weighted_function(layer), layer.weight)
    assert torch.allclose(found, outputs.double().mean(1), atol=1e-6)


def test_an_image_without_a_batch_axis_is_one_image():
    layer, x = nn.Conv2d(2, 3, 1, bias=False), torch.randn(2, 4, 4)
    found = mean_output(MeanInput.of(layer, [x]), weighted_function(layer), layer.weight)
    assert torch.allclose(found, layer(x).detach().double().mean((1, 2)), atol=1e-6)
