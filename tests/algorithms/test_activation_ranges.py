"""Ranges of activations by what their errors do to the network's outputs."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from qtool.algorithms.activation_ranges import (
    FACTORS,
    SAME,
    ActivationRangesSettings,
    Site,
    activation_ranges,
)
from qtool.numerics.affine import fake_quantize
from qtool.quantizers.prepare import build


class Uneven(nn.Module):
    """A linear layer whose large outputs the next one reads with weights a thousand times smaller."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first, self.relu, self.second = nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6)
        self.first.weight.data = torch.randn(8, 12, generator=generator)
        self.first.weight.data[:2] *= 4
        self.second.weight.data = torch.randn(6, 8, generator=generator)
        self.second.weight.data[:, :2] /= 1000

    def forward(self, x):
        return self.second(self.relu(self.first(x)))


@pytest.fixture
def uneven(planned):
    generator = torch.Generator().manual_seed(6)
    batches = [torch.randn(32, 12, generator=generator) for _ in range(4)]
    return planned(Uneven(), batches, bits_activations=4, clip_activations="mse", float_output=True)


def _run(found, **settings):
    return activation_ranges(*found.given, layers=found.names, settings=ActivationRangesSettings(**settings))


def _output_error(found, plan):
    x = torch.cat(found.batches)
    with torch.no_grad():
        return float((build(found.folded, plan)(x) - found.reference(x)).square().sum())


def test_random_signs_find_the_squared_error_of_a_linear_network_s_outputs(uneven):
    # second is linear, so the first order is exact: J = W2 for every image.
    generator = torch.Generator().manual_seed(0)
    x = torch.relu(torch.randn(16, 8, generator=generator))
    weight = uneven.reference.second.weight.detach()
    (node,) = [node for node in uneven.reference.graph.nodes if node.meta.get("layer") == "relu"]
    site = Site(node, uneven.plan.layers["first"].output)
    probes = 4000
    signs = [(torch.randint(0, 2, (16, 6), generator=generator) * 2 - 1).float() for _ in range(probes)]
    site.add(x, [r @ weight for r in signs], len(x))
    for number, factor in enumerate(FACTORS):
        grid = replace(site.grid, scale=site.grid.scale * factor)
        error = fake_quantize(x, grid) - x
        expected = float((error @ weight.T).square().sum())
        assert float(site.at_outputs[number]) / probes == pytest.approx(expected, rel=0.1)
        assert float(site.of_its_own[number]) == pytest.approx(float(error.square().sum()), rel=1e-5)


def test_what_the_outputs_hardly_read_is_clipped(uneven):
    _, plan, report = _run(uneven, own=0.0)
    given, chosen = (p.layers["first"].output.scale for p in (uneven.plan, plan))
    assert float(chosen) < float(given)
    assert _output_error(uneven, plan) < 0.7 * _output_error(uneven, uneven.plan)
    (change,) = report.changed
    assert change.name == "first"
    assert change.change == pytest.approx(1 - float(chosen / given))
    assert "times" in change.note
    assert "dB" in change.note


def test_its_own_error_alone_finds_the_range_of_the_smallest_mse(uneven):
    wide = uneven.plan.layers["first"].output
    _, chosen, _ = _run(uneven, own=1.0)
    x = torch.cat(uneven.batches)[:128]
    with torch.no_grad():
        values = torch.relu(uneven.reference.first(x))
    errors = [
        float((fake_quantize(values, replace(wide, scale=wide.scale * f)) - values).square().mean())
        for f in FACTORS
    ]
    best = FACTORS[errors.index(min(errors))]
    assert float(chosen.layers["first"].output.scale) == pytest.approx(float(wide.scale) * best)


def test_the_choice_does_not_depend_on_how_images_are_batched(uneven):
    _, expected, _ = _run(uneven, images=100)
    images = torch.cat(uneven.batches)
    _, found, _ = _run(replace(uneven, batches=list(images.split(7))), images=100)
    assert torch.equal(found.layers["first"].output.scale, expected.layers["first"].output.scale)
    # Images beyond the number that is asked for are not looked at.
    spoilt = images.clone()
    spoilt[100:] = 1e6
    _, found, _ = _run(replace(uneven, batches=[spoilt]), images=100)
    assert torch.equal(found.layers["first"].output.scale, expected.layers["first"].output.scale)


def test_layers_that_are_not_named_keep_their_ranges(uneven):
    _, plan, report = activation_ranges(*uneven.given, layers=["second"])
    assert report.changed == ()
    assert plan.layers["first"] is uneven.plan.layers["first"]


def test_a_range_that_is_handed_on_is_chosen_where_it_comes_from(planned, tiny_batches):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3))
    settings = {"bits_activations": 3, "max_pool_grid": "input", "float_output": True}
    found = planned(net, tiny_batches, **settings)
    _, plan, report = _run(found)
    assert [change.name for change in report.changed] == ["0"]
    assert plan.layers["0"].output.scale != found.plan.layers["0"].output.scale
    assert plan.layers["2"].output is plan.layers["0"].output


def test_values_that_are_not_finite_are_left_alone(uneven):
    batches = [batch.clone() for batch in uneven.batches]
    batches[0][0, 0] = float("nan")
    _, plan, report = _run(replace(uneven, batches=batches))
    assert report.changed == ()
    assert report.left == {"first": "it gives NaN or infinity"}
    assert plan.layers["first"] is uneven.plan.layers["first"]


def test_a_tensor_without_an_error_keeps_its_range(uneven):
    site = Site(next(iter(uneven.reference.graph.nodes)), uneven.plan.layers["first"].output)
    site.add(torch.zeros(2, 8), [torch.ones(2, 8)], 2)
    assert site.best(0.3) == SAME


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 0}, "images must be at least 1, found 0"),
        ({"probes": 0}, "probes must be at least 1, found 0"),
        ({"own": 1.5}, "own must be from 0 to 1, found 1.5"),
        ({"own": float("nan")}, "own must be from 0 to 1, found nan"),
        ({"seed": -1}, "seed must be at least 0, found -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ActivationRangesSettings(**settings)
