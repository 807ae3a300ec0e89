import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtool.algorithms.channel_alignment import (
    ChannelAlignmentSettings,
    align_channels,
    alignment,
    image_quantiles,
)
from qtool.algorithms.exactness import check_unchanged
from qtool.errors import DataError
from qtool.graph.edit import replace_layers, with_parameters
from qtool.graph.fold import Folded, fold_batch_norms
from qtool.graph.trace import trace
from qtool.observers.stats import ModelStats

NAMES = ("conv1", "depthwise", "project", "expand", "fc")
EMPTY = ModelStats({})


@pytest.fixture
def folded(chain_net, tiny_batches):
    return fold_batch_norms(trace(chain_net, tiny_batches[0]))


def pair(first, second, example):
    return fold_batch_norms(trace(nn.Sequential(first, second).eval().requires_grad_(False), example))


def test_quantiles_are_those_of_numpy_per_image_and_channel():
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = np.quantile(x.numpy().reshape(3, 4, 30), [0.01, 0.99], axis=2)
    np.testing.assert_allclose(image_quantiles(x, 0.01).numpy(), expected, rtol=1e-5)


def test_widths_are_relative_to_the_median_of_those_there_are():
    low, high = torch.tensor([0.0, -1.0, 5.0, 0.0]), torch.tensor([1.0, 3.0, 5.0, 1000.0])
    middle, factors = alignment(low, high)
    assert middle.tolist() == [0.5, 1.0, 5.0, 500.0]
    assert factors.tolist() == [0.25, 1.0, 1.0, 100.0]  # the median of 1, 4 and 1000 is 4; at most 100


def test_channels_of_no_width_are_only_centered():
    middle, factors = alignment(torch.tensor([2.0, -1.0]), torch.tensor([2.0, -1.0]))
    assert middle.tolist() == [2.0, -1.0] and factors.tolist() == [1.0, 1.0]


def test_channels_end_up_centered_and_of_one_width(folded, tiny_batches):
    new, report = align_channels(folded, EMPTY, layers=NAMES, batches=tiny_batches)
    assert check_unchanged(folded.traced, new.traced, 3 * tiny_batches[0]) <= 1e-5
    assert [change.name for change in report.changed] == ["project", "expand"]
    assert report.left == {}
    values = []
    handle = new.traced.project.register_forward_hook(lambda _m, _a, y: values.append(y))
    for batch in tiny_batches:
        new.traced(batch)
    handle.remove()
    low, high = torch.quantile(image_quantiles(torch.cat(values), 1e-4), 0.5, dim=1)
    scale = float((high - low).median())
    torch.testing.assert_close((low + high) / scale, torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close((high - low) / scale, torch.ones(4), rtol=1e-4, atol=0)
    assert " -> 1" in report.changed[0].note


def test_alignment_of_what_is_aligned_changes_next_to_nothing(folded, tiny_batches):
    once, _ = align_channels(folded, EMPTY, layers=NAMES, batches=tiny_batches)
    twice, _ = align_channels(once, EMPTY, layers=NAMES, batches=tiny_batches)
    for name in ("project", "expand"):
        before, after = (graph.traced.get_submodule(name) for graph in (once, twice))
        torch.testing.assert_close(after.weight, before.weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after.bias, before.bias, rtol=1e-3, atol=1e-4)


@given(seed=st.integers(0, 1000), size=st.floats(0.01, 100))
def test_the_float_function_stays_for_any_weights(seed, size):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 6, 6, generator=generator)
    net = (nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 4, 2, bias=False))
    for layer in net:
        layer.weight.data = size * torch.randn(layer.weight.shape, generator=generator)
    folded = pair(*net, x)
    new, report = align_channels(folded, EMPTY, layers=("0", "1"), batches=[x])
    assert check_unchanged(folded.traced, new.traced, x) <= 1e-4
    assert len(report.changed) == 2
    assert new.traced.get_submodule("1").bias is not None


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (nn.Conv2d(4, 2, 3, padding=1), "pads its input with zeros"),
        (nn.Conv2d(4, 4, 3, groups=2), "groups, a stride or a dilation"),
        (nn.Conv2d(4, 2, 1, stride=2), "groups, a stride or a dilation"),
        (nn.Conv2d(4, 2, 2, dilation=2), "groups, a stride or a dilation"),
        (nn.ConvTranspose2d(4, 2, 2), "groups, a stride or a dilation"),
    ],
)
def test_other_second_layers_are_left_alone_with_the_reason(second, why):
    x = torch.randn(2, 3, 6, 6)
    folded = pair(nn.Conv2d(3, 4, 1), second, x)
    new, report = align_channels(folded, EMPTY, layers=("0", "1"), batches=[x])
    assert report.changed == () and why in report.left["0"]
    assert torch.equal(new.traced(x), folded.traced(x))


def test_nan_is_left_alone(folded, tiny_batches):
    project = folded.traced.project
    broken = replace_layers(
        folded.traced, {"project": with_parameters(project, weight=project.weight * torch.nan)}
    )
    _, report = align_channels(Folded(broken, {}), EMPTY, layers=NAMES, batches=tiny_batches)
    assert report.changed == () and report.left["project"] == "its output holds NaN or infinity"


def test_no_images_are_refused(folded):
    with pytest.raises(DataError, match="no images to measure channels with"):
        align_channels(folded, EMPTY, layers=NAMES, batches=[])


@pytest.mark.parametrize("wrong", [{"quantile": 0.5}, {"quantile": -0.1}, {"limit": 0.5}])
def test_settings_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        ChannelAlignmentSettings(**wrong)


def test_the_given_network_has_no_hooks_left(folded, tiny_batches):
    align_channels(folded, EMPTY, layers=NAMES, batches=tiny_batches)
    assert not any(module._forward_hooks for module in folded.traced.modules())
