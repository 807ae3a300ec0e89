import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qtool
from qtool.algorithms.equalization import (
    EqualizationSettings,
    absorbed_constants,
    centered,
    equalize,
    pair_factors,
    triple_factors,
)
from qtool.algorithms.exactness import check_unchanged
from qtool.algorithms.links import NO_CHANNELS, Rescaling, find_links, range_ratio
from qtool.graph.capped import CappedReLU6
from qtool.graph.edit import replace_layers, with_parameters
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import layers as graph_layers
from qtool.graph.trace import trace
from qtool.observers.stats import ModelStats

NAMES = ("conv1", "depthwise", "project", "expand", "fc")
RANGES = st.lists(st.floats(1e-4, 1e4), min_size=4, max_size=4).map(lambda v: torch.tensor(v).double())
EMPTY = ModelStats({})


@pytest.fixture
def folded(chain_net, tiny_batches):
    return fold_batch_norms(trace(chain_net, tiny_batches[0]))


@pytest.fixture
def stats(folded, tiny_batches):
    return qtool.calibrate(folded.traced, tiny_batches)


@given(r1=RANGES, r2=RANGES)
def test_a_pair_gets_equal_ranges(r1, r2):
    s = pair_factors(r1, r2)
    torch.testing.assert_close(r1 / s, (r1 * r2).sqrt())
    torch.testing.assert_close(r2 * s, (r1 * r2).sqrt())


@given(r1=RANGES, r2=RANGES, r3=RANGES)
def test_a_triple_gets_equal_ranges(r1, r2, r3):
    s1, s2 = triple_factors(r1, r2, r3)
    mean = (r1 * r2 * r3) ** (1 / 3)
    for found in (r1 / s1, r2 * s1 / s2, r3 * s2):
        torch.testing.assert_close(found, mean)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_channel_without_a_range_is_left_alone(bad):
    one, odd = torch.tensor([4.0]), torch.tensor([bad])
    for pair in ((odd, one), (one, odd), (odd, odd)):
        assert pair_factors(*pair).tolist() == [1.0]
    for triple in ((odd, one, one), (one, odd, one), (one, one, odd), (odd, odd, odd)):
        assert [s.item() for s in triple_factors(*triple)] == [1.0, 1.0]


def test_factors_are_centered_over_live_channels():
    found = centered(torch.tensor([2.0, 8.0, 100.0]), torch.tensor([True, True, False]))
    torch.testing.assert_close(found, torch.tensor([0.5, 2.0, 1.0]))
    assert centered(torch.tensor([3.0]), torch.tensor([False])).tolist() == [1.0]


@pytest.mark.parametrize("limit", [2.0, 10.0, 1e6])
def test_the_float_function_stays_and_ranges_become_alike(folded, tiny_batches, limit):
    new, report = equalize(folded, EMPTY, layers=NAMES, settings=EqualizationSettings(limit=limit))
    assert check_unchanged(folded.traced, new.traced, 3 * tiny_batches[0]) <= 1e-5
    assert [change.name for change in report.changed] == list(NAMES)
    ratios = {}
    for name in ("conv1", "depthwise"):
        before, after = (
            t.get_submodule(name).weight.abs().flatten(1).amax(1) for t in (folded.traced, new.traced)
        )
        ratios[name] = range_ratio(before), range_ratio(after)
        assert ratios[name][1] < ratios[name][0]
    note = next(change.note for change in report.changed if change.name == "conv1")
    assert note.endswith(f"{ratios['conv1'][0]:.3g} -> {ratios['conv1'][1]:.3g}")
    assert isinstance(new.traced.relu1, CappedReLU6) and isinstance(folded.traced.relu1, nn.ReLU6)


def test_converged_ranges_are_equal_and_a_second_run_finds_nothing(folded):
    wide = EqualizationSettings(limit=1e9, sweeps=200, tolerance=1e-7)
    new, _ = equalize(folded, EMPTY, layers=NAMES, settings=wide)
    graph = new.traced
    front = graph.conv1.weight.abs().flatten(1).amax(1)
    middle = graph.depthwise.weight.abs().flatten(1).amax(1)
    behind = graph.project.weight.abs().amax((0, 2, 3))
    torch.testing.assert_close(front, middle, rtol=1e-3, atol=0)
    torch.testing.assert_close(middle, behind, rtol=1e-3, atol=0)
    again, report = equalize(new, EMPTY, layers=NAMES, settings=wide)
    assert max((change.change for change in report.changed), default=0.0) < 1e-3
    torch.testing.assert_close(again.traced.relu1.limit, graph.relu1.limit, rtol=1e-3, atol=0)


def test_no_channel_is_scaled_by_more_than_the_limit(folded):
    new, _ = equalize(folded, EMPTY, layers=NAMES, settings=EqualizationSettings(limit=3.0))
    for name in ("relu1", "relu2"):
        factors = 6 / new.traced.get_submodule(name).limit
        assert float(factors.max()) <= 3.0 + 1e-5 and float(factors.min()) >= 1 / 3 - 1e-5
    assert float(factors.max()) > 2.9 or float(factors.min()) < 0.34  # the limit was met


def test_dead_channels_stay_dead_and_finite(folded, tiny_batches):
    conv1, project = folded.traced.conv1, folded.traced.project
    weights = {"conv1": conv1.weight.clone(), "project": project.weight.clone()}
    weights["conv1"][2], weights["project"][:, 5] = 0, 0
    dead = replace_layers(
        folded.traced,
        {name: with_parameters(folded.traced.get_submodule(name), weight=w) for name, w in weights.items()},
    )
    new, _ = equalize(type(folded)(dead, {}), EMPTY, layers=NAMES)
    assert check_unchanged(dead, new.traced, tiny_batches[0]) <= 1e-5
    assert float(new.traced.relu1.limit[2]) == 6.0 and float(new.traced.relu2.limit[5]) == 6.0


def test_weights_of_nothing_but_nan_are_left_alone(folded):
    weight = torch.full_like(folded.traced.conv1.weight, torch.nan)
    broken = replace_layers(folded.traced, {"conv1": with_parameters(folded.traced.conv1, weight=weight)})
    new, report = equalize(type(folded)(broken, {}), EMPTY, layers=NAMES)
    assert "conv1" not in [change.name for change in report.changed]
    assert new.traced.conv1 is broken.conv1


def test_several_readers_share_one_factor():
    class Fire(nn.Module):
        def __init__(self):
            super().__init__()
            self.squeeze, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU()
            self.a, self.b = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 3, padding=1)

        def forward(self, x):
            y = self.relu(self.squeeze(x))
            return torch.cat([self.a(y), self.b(y)], 1)

    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    net = Fire().eval().requires_grad_(False)
    net.squeeze.weight *= torch.tensor([0.1, 1.0, 3.0, 5.0])[:, None, None, None]
    folded = fold_batch_norms(trace(net, x))
    new, report = equalize(folded, EMPTY, layers=("squeeze", "a", "b"))
    assert check_unchanged(folded.traced, new.traced, x) <= 1e-5
    assert [change.name for change in report.changed] == ["squeeze", "a", "b"]
    assert report.left == {"a": "'cat' (cat) reads it", "b": "'cat' (cat) reads it"}


def test_by_activations_evens_out_their_channels(folded, stats, tiny_batches):
    settings = EqualizationSettings(by="activations", limit=1e6)
    new, _ = equalize(folded, stats, layers=NAMES, settings=settings)
    assert check_unchanged(folded.traced, new.traced, tiny_batches[0]) <= 1e-5
    after = qtool.calibrate(new.traced, tiny_batches)
    # In front of a depthwise layer, whose grids of channels take any factor, they become equal.
    assert range_ratio(torch.tensor(after.output("relu1").channel_max)) == pytest.approx(1.0, rel=1e-3)
    assert range_ratio(torch.tensor(stats.output("relu1").channel_max)) > 1.2
    again, _ = equalize(new, after, layers=NAMES, settings=settings)
    torch.testing.assert_close(again.traced.relu1.limit, new.traced.relu1.limit, rtol=1e-3, atol=0)


def test_without_ranges_of_channels_activations_are_left_alone(folded):
    _, report = equalize(folded, EMPTY, layers=NAMES, settings=EqualizationSettings(by="activations"))
    assert report.changed == ()
    assert report.left == dict.fromkeys(("conv1", "depthwise", "project", "expand"), NO_CHANNELS)


def test_absorbed_constants_never_exceed_the_limit_of_relu6():
    found = absorbed_constants(torch.tensor([-2.0, 1.5, 8.0, float("nan")]), torch.full((4,), 6.0))
    assert found.tolist() == [0.0, 1.5, 6.0, 0.0]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2)])
def test_absorption_is_exact_on_the_calibration_images_and_narrows_the_activations(activation):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 1), activation, nn.Conv2d(6, 4, 3, bias=False)).eval()
    net.requires_grad_(False)
    net[0].bias += torch.tensor([3.0, 4.0, 0.0, 2.0, 9.0, 0.0])
    images = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    folded = fold_batch_norms(trace(net, images))
    stats = qtool.calibrate(folded.traced, [images])
    plain, _ = equalize(folded, stats, layers=("0", "2"))
    new, report = equalize(folded, stats, layers=("0", "2"), settings=EqualizationSettings(absorb=True))
    assert report.left == {}
    assert check_unchanged(folded.traced, new.traced, images) <= 1e-5
    smallest = new.traced.get_submodule("0")(images).amin((0, 2, 3))
    assert float(smallest[[0, 1, 3]].abs().max()) < 1e-5  # the smallest value is now zero
    assert new.traced.get_submodule("2").bias is not None and plain.traced.get_submodule("2").bias is None


def test_absorption_says_where_padding_forbids_it(folded, stats):
    record = stats.layers["conv1"].output
    positive = type(record)(**{**record.__dict__, "channel_min": np.ones(8, dtype=np.float32)})
    layers = {**stats.layers, "conv1": type(stats.layers["conv1"])({}, positive)}
    _, report = equalize(folded, ModelStats(layers), layers=NAMES, settings=EqualizationSettings(absorb=True))
    assert report.left["conv1"].startswith("its bias is not absorbed: 'depthwise' pads its input with zeros")


@pytest.mark.parametrize(
    "wrong", [{"by": "names"}, {"sweeps": 0}, {"tolerance": 0.0}, {"limit": 1.0}, {"limit": float("nan")}]
)
def test_settings_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        EqualizationSettings(**wrong)


def test_factors_that_spoil_one_grid_for_all_channels_are_undone(folded, tiny_batches, chain_net):
    wide = EqualizationSettings(limit=1e9, sweeps=100, tolerance=1e-7)
    even, _ = equalize(folded, EMPTY, layers=NAMES, settings=wide)
    spoiling = Rescaling(even.traced)
    generator = torch.Generator().manual_seed(0)
    for link in find_links(even.traced, NAMES)[0]:
        spoiling.divide(link, torch.exp(2 * torch.randn(link.channels, generator=generator)))
    spoiled = replace_layers(even.traced, {name: new for name, _, new in spoiling.layers()})
    again, _ = equalize(type(folded)(spoiled, {}), EMPTY, layers=NAMES, settings=wide)
    for name in NAMES:
        wanted = even.traced.get_submodule(name).weight
        torch.testing.assert_close(again.traced.get_submodule(name).weight, wanted, rtol=1e-3, atol=1e-6)
    x = torch.cat(tiny_batches)
    errors = {}
    for key, graph in (("spoiled", spoiled), ("again", again.traced)):
        config = qtool.QuantizeConfig(bits_activations=0)
        quantized = qtool.quantize(graph, qtool.calibrate(graph, tiny_batches), config)
        errors[key] = float((quantized(x) - chain_net(x)).square().mean())
    assert errors["again"] < 0.2 * errors["spoiled"]


@pytest.mark.slow
def test_mobilenet_v2_stays_the_same_network():
    torchvision = pytest.importorskip("torchvision")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torchvision.models.mobilenet_v2().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.2, 3.0)
                nn.init.normal_(module.bias)
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    folded = fold_batch_norms(trace(net, x))
    names = [name for name, _, _ in graph_layers(folded.traced)]
    new, report = equalize(folded, EMPTY, layers=names)
    assert check_unchanged(folded.traced, new.traced, x) <= 1e-5
    assert len(report.changed) == 53
    assert report.left["features.3.conv.2"] == "'features.3.add' (add) reads it"
