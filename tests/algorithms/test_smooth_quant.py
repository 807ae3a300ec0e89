import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qtool
from qtool.algorithms.exactness import check_unchanged
from qtool.algorithms.links import NO_CHANNELS, range_ratio
from qtool.algorithms.smooth_quant import SmoothQuantSettings, mildest, smooth, smoothing_factors
from qtool.errors import ConfigError
from qtool.graph.capped import CappedReLU6
from qtool.graph.edit import replace_layers, with_parameters
from qtool.graph.fold import Folded, fold_batch_norms
from qtool.graph.trace import layers as graph_layers
from qtool.graph.trace import trace
from qtool.observers.stats import ModelStats

WIDTH = 8


class Block(nn.Module):
    """A transformer's block with an outlier in each layer norm: (N, 5, 8) -> (N, 5, 8)."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.att = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.up, self.gelu, self.down = nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.att(y, y, y, need_weights=False)[0]
        return x + self.down(self.gelu(self.up(self.norm2(x))))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, WIDTH, generator=generator) for _ in range(2)]


@pytest.fixture
def block():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Block().eval().requires_grad_(False)
    for norm in (net.norm1, net.norm2):
        norm.weight[3], norm.bias[5] = 40.0, 10.0
    return net


def prepared(net, batches):
    folded = fold_batch_norms(trace(net, batches[0]))
    names = [name for name, _, _ in graph_layers(folded.traced)]
    return folded, qtool.calibrate(folded.traced, batches), names


@given(
    a=st.lists(st.floats(0, 1e4), min_size=5, max_size=20),
    seed=st.integers(0, 100),
    alpha=st.floats(0, 1),
)
def test_factors_are_those_of_the_formula_within_their_bounds(a, seed, alpha):
    w = torch.rand(len(a), generator=torch.Generator().manual_seed(seed)) * 2
    found = smoothing_factors(torch.tensor(a, dtype=torch.float64), w, alpha)
    wide = [np.maximum(values, 1e-5) for values in (np.array(a), w.double().numpy())]
    plain = wide[0] ** alpha / (wide[1] ** (1 - alpha) + 1.19e-7)
    expected = np.minimum(np.maximum(plain, np.quantile(plain, 0.1)), 100.0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_equal_ranges_ask_for_nothing():
    found = smoothing_factors(torch.full((6,), 3.0), torch.full((6,), 3.0), 0.5)
    assert found.tolist() == pytest.approx([1.0] * 6, rel=1e-6)


def test_the_mildest_of_a_group_is_taken_and_nan_never():
    nan = torch.full((2,), torch.nan)
    assert mildest([nan, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])]) == 2
    assert mildest([nan, nan]) is None and mildest([]) is None


def test_outliers_of_layer_norms_and_of_attention_move_into_weights(block, batches):
    folded, stats, names = prepared(block, batches)
    new, report = smooth(folded, stats, layers=names)
    assert check_unchanged(folded.traced, new.traced, 3 * batches[0]) <= 1e-5
    assert [change.name for change in report.changed] == [
        "norm1",
        "att.in_proj",
        "att.out_proj",
        "norm2",
        "up",
    ]
    assert report.left == {"down": "its input comes from 'gelu' (gelu), which can take no factors"}
    after = qtool.calibrate(new.traced, batches)
    for name in ("norm1", "norm2"):
        before_ratio, ratio = (
            range_ratio(torch.maximum(-torch.tensor(r.channel_min), torch.tensor(r.channel_max)))
            for r in (stats.output(name), after.output(name))
        )
        assert ratio < 0.5 * before_ratio
    # Queries and keys meet in a product of their own: their channels stay, those of values do not.
    old_rows, new_rows = (graph.traced.att.in_proj.bias for graph in (folded, new))
    scores = slice(0, 2 * WIDTH)
    torch.testing.assert_close(new_rows[scores], old_rows[scores])
    values = [graph.traced.att.in_proj.weight[2 * WIDTH :].norm(dim=1) for graph in (folded, new)]
    assert not torch.allclose(*values, rtol=1e-2)


def test_the_second_time_finds_next_to_nothing(block, batches):
    folded, stats, names = prepared(block, batches)
    once, _ = smooth(folded, stats, layers=names, settings=SmoothQuantSettings(alphas={"att.*": 0.0}))
    _, report = smooth(once, qtool.calibrate(once.traced, batches), layers={"up"})
    (norm,) = [change for change in report.changed if change.name == "norm2"]
    _, first = smooth(folded, stats, layers={"up"})
    (norm_first,) = [change for change in first.changed if change.name == "norm2"]
    assert norm.change < 0.2 * norm_first.change


def test_readers_of_one_source_share_the_mildest_factors(batches):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.q, self.k, self.v = (nn.Linear(WIDTH, 4) for _ in range(3))

        def forward(self, x):
            y = self.norm(x)
            return self.q(y) * self.k(y) + self.v(y)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Three().eval().requires_grad_(False)
    net.norm.weight *= torch.logspace(-1, 1, WIDTH)
    net.q.weight *= torch.logspace(-2, 2, WIDTH)
    folded, stats, names = prepared(net, batches)
    new, report = smooth(folded, stats, layers=names)
    assert check_unchanged(folded.traced, new.traced, batches[0]) <= 1e-5
    assert [change.name for change in report.changed] == ["norm", "q", "k", "v"]
    a = torch.maximum(
        *(torch.tensor(v).abs() for v in (stats.output("norm").channel_min, stats.output("norm").channel_max))
    )
    options = [smoothing_factors(a, net.get_submodule(n).weight.abs().amax(0), 0.5) for n in "qkv"]
    expected = options[mildest(options)]
    torch.testing.assert_close(folded.traced.norm.weight / new.traced.norm.weight, expected.float())


def test_one_other_reader_keeps_the_factors_out(batches):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            y = self.norm(x)
            return y + self.fc(y)

    folded, stats, names = prepared(Residual().eval(), batches)
    new, report = smooth(folded, stats, layers=names)
    assert report.changed == ()
    assert report.left == {"fc": "'norm', which gives its input, cannot take factors: 'add' (add) reads it"}
    assert new.traced.norm is folded.traced.norm


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Identity()])
def test_factors_fold_into_the_weights_in_front(activation, batches):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(WIDTH, 6), activation, nn.Linear(6, 3)).eval().requires_grad_(False)
    net[0].weight *= 3 * torch.logspace(-1, 1, 6).unsqueeze(1)
    folded, stats, _ = prepared(net, batches)
    new, report = smooth(folded, stats, layers=("0", "2"))
    assert check_unchanged(folded.traced, new.traced, 3 * batches[0]) <= 1e-5
    assert [change.name for change in report.changed] == ["0", "2"]
    assert report.left == {"0": "its input is the network's"}
    assert isinstance(new.traced.get_submodule("1"), CappedReLU6) == isinstance(activation, nn.ReLU6) or (
        isinstance(activation, nn.Identity)
    )
    _, alone = smooth(folded, stats, layers=("2",))
    assert alone.left == {"2": "'0', which gives its input, is not to be changed"}


def test_convolutions_are_smoothed_when_asked(chain_net, tiny_batches):
    folded, stats, names = prepared(chain_net, tiny_batches)
    _, plain = smooth(folded, stats, layers=names)
    assert [change.name for change in plain.changed] == ["expand", "fc"]
    new, report = smooth(folded, stats, layers=names, settings=SmoothQuantSettings(convolutions=True))
    assert [change.name for change in report.changed] == ["conv1", "depthwise", "project", "expand", "fc"]
    assert check_unchanged(folded.traced, new.traced, tiny_batches[0]) <= 1e-5


def test_alpha_of_a_layer_wins_by_name_then_by_expression(block, batches):
    settings = SmoothQuantSettings(alpha=0.4, alphas={"att.*": 0.7, "att.in_proj": 0.9})
    assert [settings.alpha_of(n) for n in ("att.in_proj", "att.out_proj", "up")] == [0.9, 0.7, 0.4]
    folded, stats, names = prepared(block, batches)
    ratios = []
    for alpha in (0.1, 0.9):
        new, _ = smooth(folded, stats, layers=names, settings=SmoothQuantSettings(alphas={"up": alpha}))
        record = qtool.calibrate(new.traced, batches).output("norm2")
        ratios.append(range_ratio(torch.tensor(record.channel_max)))
    assert ratios[1] < ratios[0]


@pytest.mark.parametrize(
    ("pattern", "why"), [("nothing", "matches no layer"), ("(", "no regular expression")]
)
def test_an_expression_that_fits_nothing_is_refused(pattern, why, block, batches):
    folded, stats, names = prepared(block, batches)
    with pytest.raises(ConfigError, match=why):
        smooth(folded, stats, layers=names, settings=SmoothQuantSettings(alphas={pattern: 0.5}))


@pytest.mark.parametrize("wrong", [{"alpha": 1.5}, {"alpha": float("nan")}, {"alphas": {"fc": -0.1}}])
def test_alphas_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be 0 to 1"):
        SmoothQuantSettings(**wrong)


def test_without_ranges_of_channels_nothing_is_done(block, batches):
    folded, _, names = prepared(block, batches)
    _, report = smooth(folded, ModelStats({}), layers=names)
    assert report.changed == ()
    assert report.left["att.in_proj"] == report.left["up"] == NO_CHANNELS


def test_dead_channels_and_nan_weights(block, batches):
    folded, stats, _ = prepared(block, batches)
    up = folded.traced.up
    dead = up.weight.clone()
    dead[:, 2] = 0
    for weight, ok in ((dead, True), (torch.full_like(dead, torch.nan), False)):
        graph = replace_layers(folded.traced, {"up": with_parameters(up, weight=weight)})
        new, report = smooth(Folded(graph, {}), stats, layers={"up"})
        assert [change.name for change in report.changed] == (["norm2", "up"] if ok else [])
        assert ("NaN" in report.left.get("up", "")) is not ok
        if ok:
            assert check_unchanged(graph, new.traced, batches[0]) <= 1e-5


def test_an_outlier_no_longer_costs_the_other_channels_their_steps(batches):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)).eval().requires_grad_(False)
    net[0].weight[3] = 100.0
    net[1].weight[:, 3] /= 100.0
    folded, stats, names = prepared(net, batches)
    new, _ = smooth(folded, stats, layers=names)
    x = torch.cat(batches)
    errors = []
    for graph in (folded.traced, new.traced):
        config = qtool.QuantizeConfig(per_channel_weights=True)
        quantized = qtool.quantize(graph, qtool.calibrate(graph, batches), config)
        errors.append(float((quantized(x) - net(x)).square().mean()))
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "linear", "left"), [("vit_b_16", 49, 12), ("swin_t", 52, 12)])
def test_torchvisions_transformers_stay_the_same_networks(arch, linear, left):
    torchvision = pytest.importorskip("torchvision")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = getattr(torchvision.models, arch)().eval()
        for module in net.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.05, 5.0)
                nn.init.normal_(module.bias)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    folded, stats, names = prepared(net, [x])
    new, report = smooth(folded, stats, layers=names)
    assert check_unchanged(folded.traced, new.traced, x) <= 1e-4
    ops = {name: node.meta["op"] for name, node, _ in graph_layers(folded.traced)}
    assert sum(op == "linear" for op in ops.values()) == linear
    assert len(report.left) == left
    assert {ops[change.name] for change in report.changed} == {"linear", "layer_norm"}
    smoothed = [change.name for change in report.changed if ops[change.name] == "linear"]
    assert len(set(smoothed) | set(report.left)) == linear
