import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qtool.errors import StatsError
from qtool.graph.neighbours import edit_stats, following_op, fused_activations
from qtool.graph.trace import layers
from qtool.observers.stats import ActivationStats, LayerStats, ModelStats

WIDE = ActivationStats(-10, 10, avg_min=-8, avg_max=8, mean=1, std=3, b=2)
SHAPE = (2, 4, 5, 5)


@pytest.fixture
def edited(traced_lambda):
    """The (min, max) of "conv" after the edit, in conv followed by a function of its output."""

    def run(follow, record=WIDE, quantized=("conv",), **modules):
        modules["conv"] = nn.Conv2d(4, 4, 1)
        traced = traced_lambda(lambda m, x: follow(m, m.conv(x)), SHAPE, **modules)
        stats = ModelStats({name: LayerStats({0: record}, record) for name, _, _ in layers(traced)})
        return edit_stats(traced, stats, set(quantized))

    return run


def limits(stats: ModelStats, name: str = "conv") -> tuple[float, float]:
    return stats.output(name).min, stats.output(name).max


def halves(y, first, second, split=torch.chunk):
    a, b = split(y, 2, 1)
    return torch.cat([first(a), second(b)])


# what follows "conv" (as a function of the module and its output) -> the range that is left of (-10, 10)
FOLLOWED = {
    "relu": (lambda m, y: m.act(y), nn.ReLU(), (0, 10)),
    "relu in place": (lambda m, y: m.act(y), nn.ReLU(inplace=True), (0, 10)),
    "relu6": (lambda m, y: m.act(y), nn.ReLU6(), (0, 6)),
    "hardtanh from 0 to 6": (lambda m, y: m.act(y), nn.Hardtanh(0, 6), (0, 6)),
    "another hardtanh": (lambda m, y: m.act(y), nn.Hardtanh(-1, 1), (-10, 10)),
    "tanh": (lambda m, y: m.act(y), nn.Tanh(), (-4, 4)),
    "sigmoid": (lambda m, y: m.act(y), nn.Sigmoid(), (-6, 6)),
    "leaky relu": (lambda m, y: m.act(y), nn.LeakyReLU(), (-10, 10)),
    "gelu": (lambda m, y: m.act(y), nn.GELU(), (-10, 10)),
    "F.relu": (lambda m, y: F.relu(y), None, (0, 10)),
    "relu_": (lambda m, y: y.relu_(), None, (0, 10)),
    "F.relu6": (lambda m, y: F.relu6(y), None, (0, 6)),
    "torch.tanh": (lambda m, y: torch.tanh(y), None, (-4, 4)),
    "sigmoid method": (lambda m, y: y.sigmoid(), None, (-6, 6)),
    "dropout, then relu": (lambda m, y: torch.relu(m.act(y)), nn.Dropout(), (0, 10)),
    "identity, then tanh": (lambda m, y: m.act(y).tanh(), nn.Identity(), (-4, 4)),
    "flatten, then relu": (lambda m, y: y.flatten(1).relu(), None, (-10, 10)),
    "two relus": (lambda m, y: y.relu() + m.act(y), nn.ReLU(), (-10, 10)),
    "relu and the network's output": (lambda m, y: (y.relu(), y), None, (-10, 10)),
    "relu and a size": (lambda m, y: y.relu() / y.shape[1], None, (0, 10)),
    "nothing": (lambda m, y: y, None, (-10, 10)),
    "halves into relus": (lambda m, y: halves(y, F.relu, F.relu), None, (0, 10)),
    "halves into tanhs": (lambda m, y: halves(y, torch.tanh, torch.tanh, torch.split), None, (-4, 4)),
    "halves into sigmoids": (lambda m, y: halves(y, torch.sigmoid, torch.sigmoid), None, (-6, 6)),
    "a gate": (lambda m, y: (h := y.chunk(2, 1))[0].tanh() * h[1].sigmoid(), None, (-6, 6)),
    "relu and tanh halves": (lambda m, y: (h := y.chunk(2, 1))[0].tanh() * h[1].relu(), None, (-10, 10)),
    "a half read twice": (lambda m, y: (h := y.chunk(2, 1))[0].relu() + h[1].relu() * h[0], None, (-10, 10)),
    "halves that are outputs": (lambda m, y: y.chunk(2, 1), None, (-10, 10)),
    "halves stacked, then relu": (lambda m, y: torch.stack(y.chunk(2, 1)).relu(), None, (-10, 10)),
}


@pytest.mark.parametrize("case", FOLLOWED.values(), ids=FOLLOWED)
def test_a_range_keeps_what_its_only_reader_distinguishes(edited, case):
    follow, module, expected = case
    stats = edited(follow, **({"act": module} if module else {}))
    assert limits(stats) == expected


# Distiller's own examples, and D4: (-5, 1, -4, -2) must not end with avg_min above avg_max.
BY_HAND = [
    (nn.ReLU(), (-5, 5, -3, 3), (0, 5, 0, 3)),
    (nn.ReLU(), (-5, -1, -4, -2), (0, 0, 0, 0)),
    (nn.Tanh(), (-6, 3, -5, 1), (-4, 3, -4, 1)),
    (nn.Sigmoid(), (1, 8, 2, 3), (1, 6, 2, 3)),
    (nn.Sigmoid(), (7, 9, 8, 8.5), (6, 6, 6, 6)),
    (nn.ReLU6(), (-1, 3, 0.5, 2), (0, 3, 0.5, 2)),
    (nn.ReLU(), (-5, 1, -4, -2), (0, 1, 0, 0)),
]


@pytest.mark.parametrize(("activation", "before", "after"), BY_HAND)
def test_range_and_averages_are_clamped_and_the_moments_stay(edited, activation, before, after):
    low, high, avg_low, avg_high = before
    record = ActivationStats(low, high, avg_low, avg_high, mean=-1.5, std=2.5, b=1.25)
    found = edited(lambda m, y: m.act(y), record, act=activation).output("conv")
    assert (found.min, found.max, found.avg_min, found.avg_max) == after
    assert (found.mean, found.std, found.b) == (-1.5, 2.5, 1.25)


def test_a_record_without_averages_is_edited(edited):
    found = edited(lambda m, y: y.relu(), ActivationStats(-1, 2)).output("conv")
    assert found == ActivationStats(0, 2)


def test_the_readers_input_record_follows_the_edit(edited):
    stats = edited(lambda m, y: m.act(y), act=nn.Tanh())
    assert stats.input("act", 0) == stats.output("conv") != WIDE
    assert stats.output("act") == WIDE


def test_input_records_behind_a_split_stay(edited):
    stats = edited(lambda m, y: halves(y, F.relu, F.relu))
    assert stats.input("relu1", 0) == WIDE


def test_outputs_that_stay_in_float_are_not_edited(edited):
    assert limits(edited(lambda m, y: y.relu(), quantized=())) == (-10, 10)


def test_editing_leaves_the_given_statistics_alone(traced_lambda):
    traced = traced_lambda(lambda m, x: m.conv(x).relu(), SHAPE, conv=nn.Conv2d(4, 4, 1))
    stats = ModelStats({"conv": LayerStats({0: WIDE}, WIDE), "relu": LayerStats({0: WIDE}, WIDE)}, "s.yaml")
    found = edit_stats(traced, stats, {"conv"})
    assert stats.output("conv") == WIDE != found.output("conv")
    assert found.source == "s.yaml"


def test_a_missing_record_is_named(traced_lambda):
    traced = traced_lambda(lambda m, x: m.conv(x).relu(), SHAPE, conv=nn.Conv2d(4, 4, 1))
    stats = ModelStats({"conv_1": LayerStats({}, WIDE)}, "s.yaml")
    with pytest.raises(StatsError, match=r"s\.yaml: no entry for 'conv'; did you mean 'conv_1'"):
        edit_stats(traced, stats, {"conv"})


def test_reading_a_shape_is_not_reading_values(traced_lambda):
    traced = traced_lambda(lambda m, x: x.relu().view(x.shape[0], -1), SHAPE)
    ((_, node, _),) = layers(traced)
    op, reader = following_op(node)
    assert (op, reader.op) == ("view", "call_method")


# what follows "conv" -> the activation that it computes
FUSED = {
    "module": (lambda m, y: m.act(y) * 2, nn.ReLU(), {"conv": ("act", "relu")}),
    "capped": (lambda m, y: m.act(y) * 2, nn.ReLU6(), {"conv": ("act", "relu6")}),
    "capped by hardtanh": (lambda m, y: m.act(y) * 2, nn.Hardtanh(0, 6), {"conv": ("act", "relu6")}),
    "function": (lambda m, y: torch.relu(y) * 2, None, {"conv": ("relu", "relu")}),
    "through dropout": (lambda m, y: torch.relu(m.act(y)) * 2, nn.Dropout(), {"conv": ("relu", "relu")}),
    "two readers": (lambda m, y: torch.relu(y) * y, None, {}),
    "tanh": (lambda m, y: torch.tanh(y) * 2, None, {}),
    "split": (lambda m, y: halves(y, F.relu, F.relu) * 2, None, {}),
}


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_which_activations_a_layer_takes_over(traced_lambda, case):
    follow, module, expected = case
    modules = {"conv": nn.Conv2d(4, 4, 1)} | ({"act": module} if module else {})
    traced = traced_lambda(lambda m, x: follow(m, m.conv(x)), SHAPE, **modules)
    assert fused_activations(traced, {"conv"}) == expected
    assert fused_activations(traced, set()) == {}


@pytest.mark.parametrize("order", [["act", "conv"], ["conv", "act"]])
def test_fusion_does_not_depend_on_the_order_in_which_modules_were_registered(traced_lambda, order):
    """D19: a ReLU that was registered first was not fused."""
    made = {"conv": nn.Conv2d(4, 4, 1), "act": nn.ReLU()}
    traced = traced_lambda(lambda m, x: m.act(m.conv(x)), SHAPE, **{name: made[name] for name in order})
    assert fused_activations(traced, {"conv", "act"}) == {"conv": ("act", "relu")}


def test_each_call_of_a_reused_relu_is_taken_over_by_its_own_layer(traced_lambda):
    traced = traced_lambda(
        lambda m, x: m.relu(m.b(m.relu(m.a(x)))),
        SHAPE, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), relu=nn.ReLU(),
    )  # fmt: skip
    assert fused_activations(traced, {"a", "b"}) == {"a": ("relu1", "relu"), "b": ("relu2", "relu")}


def test_a_comparison_reads_values(traced_lambda):
    def forward(net, x):
        y = net.conv(x)
        return F.relu(y) * (y > -1)

    traced = traced_lambda(forward, (2, 3, 4, 4), conv=nn.Conv2d(3, 3, 1))
    assert fused_activations(traced, {"conv"}) == {}


def test_a_decision_reads_values(traced_lambda):
    def forward(net, x):
        y = net.conv(x)
        return F.relu(y) if y.min() > -1 else F.relu(y) * 2

    traced = traced_lambda(forward, (2, 3, 4, 4), conv=nn.Conv2d(3, 3, 1))
    assert fused_activations(traced, {"conv"}) == {}
