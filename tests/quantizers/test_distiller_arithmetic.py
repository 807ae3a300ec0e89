"""qtool against a plain simulation of Distiller's arithmetic, integer by integer.

The simulation is written from the published behaviour alone, in float64 and with Distiller's own
convention: q = clamp(round(S x - Z)). A float32 product may land on the other side of a tie, so an
integer may differ by one where the simulated value lies on a tie; that it does is checked, and the
simulation goes on from qtool's integer.

What qtool offers beyond Distiller's arithmetic is simulated too: ranges within the observed values (D9),
unsigned symmetric grids (D10), approximation of every scale (D13), and the cap of ReLU6 (D14).
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import qtool
from qtool.quantizers.grids import Quantize

LAPLACE = {4: (5.03, 6.2), 6: (7.41, 8.64), 8: (9.89, 11.16)}
GAUSS = {4: (2.55, 2.93), 6: (3.28, 3.61), 8: (3.92, 4.2)}
# Layers of VariedNet whose output a ReLU, ReLU6 or sigmoid keeps from being negative.
NEVER_NEGATIVE = {"conv1", "relu1", "depthwise", "add", "maxpool", "sigmoid"}
# An 8-bit integer times a few roundings of 2^-24; a float convolution in acts-only adds some more.
TIE = 2e-4


@dataclass
class Grid:
    S: Tensor
    Z: Tensor
    q_min: int
    q_max: int

    def quantize(self, x: Tensor) -> Tensor:
        return self.S * x - self.Z

    def clamp(self, unrounded: Tensor) -> Tensor:
        return torch.clamp(torch.round(unrounded), self.q_min, self.q_max)


@dataclass
class Act:
    """A tensor as integers on a grid."""

    q: Tensor
    grid: Grid

    @property
    def centered(self) -> Tensor:
        return self.q + self.grid.Z

    @property
    def x(self) -> Tensor:
        return self.centered / self.grid.S


def float32(x) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).float().double()


def approximate(s: Tensor, bits: int | None) -> Tensor:
    if bits is None:
        return s
    shift = torch.floor(torch.log2((2**bits - 1) / s))
    return torch.floor(s * 2**shift) / 2**shift


def make_grid(low, high, mode: str, bits: int, approx: int | None = None) -> Grid:
    low, high = float32(low), float32(high)
    if mode == "unsigned":  # D10: no zero point, no negative integers
        S = float32((2**bits - 1) / high)
        return Grid(approximate(S, approx), torch.zeros_like(S), 0, 2**bits - 1)
    signed = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if mode.startswith("sym"):
        n = 2 ** (bits - 1) - 1 if mode == "sym_restr" else (2**bits - 1) / 2
        v = torch.maximum(low.abs(), high.abs())
        S = float32(n / torch.where(v == 0, float(n), v))
        return Grid(approximate(S, approx), torch.zeros_like(S), signed[0] + (mode == "sym_restr"), signed[1])
    low, high = low.clamp(max=0), high.clamp(min=0)
    n = 2**bits - 1
    d = float32(high - low)
    S = float32(n / torch.where(d == 0, float(n), d))
    Z = torch.round(S * low) + (2 ** (bits - 1) if mode == "asym_s" else 0)
    q_min, q_max = signed if mode == "asym_s" else (0, n)
    return Grid(approximate(S, approx), Z, q_min, q_max)


@dataclass
class Distiller:
    """One forward pass; `found` holds qtool's integers, against which each step is checked."""

    settings: dict
    stats: dict
    found: dict

    def __post_init__(self):
        self.checked, self.saturated = [], 0
        get = self.settings.get
        self.mode_acts = get("mode_activations") or get("mode", "sym")
        self.mode_wts = get("mode_weights") or get("mode", "sym")
        self.bits_acts, self.bits_wts = get("bits_activations", 8), get("bits_weights", 8)
        self.accum, self.approx = get("bits_accum", 32), get("scale_approx_bits")
        self.everywhere = self.approx if get("scale_approx_everywhere") else None  # D13

    def clip_of(self, layer: str) -> str:
        unclipped = layer in self.settings.get("no_clip_layers", ())
        return "none" if unclipped else self.settings.get("clip_activations", "none")

    def mode_of(self, layer: str, is_input: bool) -> str:
        unsigned = self.settings.get("symmetric_unsigned") and layer in NEVER_NEGATIVE and not is_input
        return "unsigned" if unsigned else self.mode_acts

    def grid_of(self, record, layer: str, half_range: bool = False, is_input: bool = False) -> Grid:
        clip, mode = self.clip_of(layer), self.mode_of(layer, is_input)
        if clip == "none":
            low, high = record.min, record.max
        elif clip == "avg":
            low, high = record.avg_min, record.avg_max
        elif clip == "n_std":
            reach = self.settings["clip_n_stds"] * record.std
            low, high = max(record.min, record.mean - reach), min(record.max, record.mean + reach)
            high = max(low, high)  # D18
        else:
            spread, table = (record.b, LAPLACE) if clip == "laplace" else (record.std, GAUSS)
            full, half = table[self.bits_acts]
            if not mode.startswith("asym"):  # the upper half of a grid with one bit more is half a range
                high = abs(record.mean) + spread * (half if mode == "unsigned" else full)
                low = -high
            else:
                alpha = spread * (half if half_range else full)
                low = max(record.avg_min, record.mean - alpha)
                high = low + (alpha if half_range else 2 * alpha)
            if self.settings.get("clip_to_observed"):  # D9
                largest = max(abs(record.min), record.max) if low == -high else record.max
                high = min(high, largest)
                low = -high if mode.startswith("sym") else max(low, record.min)
        return make_grid(low, high, mode, self.bits_acts, self.approx)

    def agree(self, name: str, unrounded: Tensor, grid: Grid, cap: float = math.inf, rounded=()) -> Act:
        """Where qtool's integers differ, one of the numbers rounded on the way has to be on a tie."""
        expected, found = grid.clamp(unrounded).clamp(max=cap), self.found[name].double()
        wrong = expected != found
        ties = sum((distance_to_tie(x) < TIE).long() for x in (unrounded, *rounded))
        assert ((expected - found).abs() <= ties)[wrong].all(), f"{name}: {int(wrong.sum())} differ"
        self.checked.append(name)
        return Act(found, grid)

    def output(self, name, accumulator: Tensor, ratio, op=None, record=None, rounded=()) -> Act:
        """The end of a layer: ReLU of the accumulator, requantization."""
        half_range = op in ("relu", "relu6")
        grid = self.grid_of(record or self.record(name, op), name, half_range)
        if half_range:
            accumulator = accumulator.clamp(min=0)
        # Distiller leaves the 6 of ReLU6 to the statistics; qtool caps the integer too (D14).
        cap = float(torch.round(6 * grid.S)) - float(grid.Z) if op == "relu6" else math.inf
        return self.agree(name, accumulator * ratio - grid.Z, grid, cap, rounded)

    def record(self, name: str, following: str | None = None):
        """The output record, after the net-aware edit (8.1)."""
        intervals = {"relu": (0, math.inf), "relu6": (0, 6), "sigmoid": (-6, 6)}
        low, high = intervals.get(following, (-math.inf, math.inf))
        record = self.stats[name].output
        clamped = {f: min(max(getattr(record, f), low), high) for f in ("min", "max", "avg_min", "avg_max")}
        return replace(record, **clamped)

    def fresh(self, key: str, x: Tensor, layer: str) -> Act:
        grid = self.grid_of(self.stats[layer].inputs[0], layer, is_input=True)
        return self.agree(key, grid.quantize(x), grid)

    def weighted(self, name, x: Act | Tensor, weight, bias, compute, following=None, rows=None, record=None):
        """A convolution or linear layer. rows: view of the weight with a row for each output channel."""
        axes = [-1] if x_dims(x) == 2 else [-1, 1, 1]
        if self.bits_wts == 0:  # acts only: a fake-quant layer, inputs as they come
            y = compute(x.x if isinstance(x, Act) else x, weight)
            y = y if bias is None else y + bias.reshape(axes)
            grid_s = self.grid_of(
                record or self.record(name, following), name, following in ("relu", "relu6")
            ).S
            return self.output(name, y, grid_s, following, record)
        to_rows, from_rows = rows or (lambda w: w, lambda w: w)
        by_row = to_rows(weight)
        if self.settings.get("per_channel_weights"):
            flat = by_row.flatten(1)
            grid = make_grid(flat.amin(1), flat.amax(1), self.mode_wts, self.bits_wts, self.everywhere)
            S, Z = (v.reshape(-1, *[1] * (by_row.dim() - 1)) for v in (grid.S, grid.Z))
        else:
            grid = make_grid(by_row.min(), by_row.max(), self.mode_wts, self.bits_wts, self.everywhere)
            S, Z = grid.S, grid.Z
        q = self.agree(name + " weight", S * by_row - Z, grid).q
        S_acc = approximate(x.grid.S * grid.S, self.approx)
        limits = -(2 ** (self.accum - 1)), 2 ** (self.accum - 1) - 1
        accumulator = compute(x.centered, from_rows(q + Z))
        if bias is not None:
            accumulator = accumulator + torch.round(bias * S_acc).clamp(*limits).reshape(axes)
        self.saturated += int(((accumulator < limits[0]) | (accumulator > limits[1])).sum())
        S_out = self.grid_of(record or self.record(name, following), name, following in ("relu", "relu6")).S
        ratio = approximate(S_out / S_acc, self.approx)
        ratio = ratio.reshape(axes) if ratio.dim() else ratio
        return self.output(name, accumulator.clamp(*limits), ratio, following, record)

    def rescaled(self, acts: list[Act], out: Grid) -> list[Tensor]:
        return [a.centered * approximate(out.S / a.grid.S, self.everywhere) for a in acts]

    def add(self, name: str, inputs: list[Act], following: str) -> Act:
        grid = self.grid_of(self.record(name, following), name, half_range=True)
        parts = self.rescaled(inputs, grid)
        return self.output(name, sum(torch.round(r) for r in parts), 1.0, following, rounded=parts)

    def cat(self, name: str, inputs: list[Act]) -> Act:
        joined = torch.cat(self.rescaled(inputs, self.grid_of(self.record(name), name)), 1)
        return self.output(name, torch.round(joined), 1.0, rounded=[joined])

    def mul(self, name: str, a: Act, b: Act) -> Act:
        S_out = self.grid_of(self.record(name), name).S
        ratio = approximate(S_out / approximate(a.grid.S * b.grid.S, self.everywhere), self.approx)
        return self.output(name, a.centered * b.centered, ratio)

    def fake(self, name: str, y: Tensor) -> Act:
        return self.output(name, y, self.grid_of(self.record(name), name).S)

    def alone_relu(self, name: str, x: Tensor) -> Act:
        """A ReLU whose producer stays in float (8.3): a fresh input, half range, moments of the input."""
        x = self.fresh("conv1_quantize", x, name).x
        before = self.stats[name].inputs[0]
        record = replace(self.stats[name].output, mean=before.mean, std=before.std, b=before.b)
        grid = self.grid_of(record, name, half_range=True)
        return self.agree(name, grid.quantize(x.clamp(min=0)), grid)


def distance_to_tie(x: Tensor) -> Tensor:
    return (x - torch.floor(x) - 0.5).abs()


def x_dims(x: Act | Tensor) -> int:
    return (x.q if isinstance(x, Act) else x).dim()


def folded(layer, norm) -> tuple[Tensor, Tensor]:
    """Weight and bias with the batch norm inside, held in float32 as a model holds them."""
    r = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    weight = layer.weight.double() * r.reshape(-1, 1, 1, 1)
    return float32(weight), float32(norm.bias.double() - r * norm.running_mean.double())


def rows_of_transposed(weight: Tensor) -> Tensor:
    """Two groups of 4 inputs and 3 outputs: output channel g * 3 + j is column j of group g."""
    return torch.stack([weight[g * 4 : g * 4 + 4, j] for g in range(2) for j in range(3)])


def transposed_from_rows(rows: Tensor) -> Tensor:
    return torch.cat([torch.stack([rows[g * 3 + j] for j in range(3)], 1) for g in range(2)])


def run_distiller(sim: Distiller, net, x: Tensor) -> Act:
    """VariedNet, layer by layer."""
    net = dict(net.named_children())
    w1, b1 = folded(net["conv1"], net["bn1"])
    w2, b2 = folded(net["depthwise"], net["bn2"])
    gate, up, fc = ({k: v.double() for k, v in net[n].state_dict().items()} for n in ("gate", "up", "fc"))
    bn1, bn2 = sim.stats["bn1"].output, sim.stats["bn2"].output
    sim.stats = {**sim.stats, "conv1": replace(sim.stats["conv1"], output=bn1)}
    sim.stats["depthwise"] = replace(sim.stats["depthwise"], output=bn2)
    x = x.double()
    acts_only = sim.bits_wts == 0

    def conv_3x3(groups):
        return lambda t, w: F.conv2d(t, w, padding=1, groups=groups)

    if "conv1" in sim.settings.get("no_quant_layers", ()):
        a = sim.alone_relu("relu1", conv_3x3(1)(x, w1) + b1.reshape(-1, 1, 1))
    else:
        image = x if acts_only else sim.fresh("x_quantize", x, "conv1")
        a = sim.weighted("conv1", image, w1, b1, conv_3x3(1), "relu")
    b = sim.weighted("depthwise", a, w2, b2, conv_3x3(8), "relu6")
    s = sim.add("add", [a, b], "relu")
    m = sim.fake("maxpool", F.max_pool2d(s.x, 2))
    u = sim.weighted(
        "up", m, up["weight"], up["bias"],
        lambda t, w: F.conv_transpose2d(t, w, stride=2, groups=2),
        rows=(rows_of_transposed, transposed_from_rows),
    )  # fmt: skip
    c = sim.cat("cat", [s, u])
    g = sim.weighted("gate", c, gate["weight"], gate["bias"], F.conv2d, "sigmoid")
    p = sim.mul("mul", c, sim.fake("sigmoid", torch.sigmoid(g.x)))
    v = sim.fake("avgpool", F.avg_pool2d(p.x, 2))
    flat = v.x.flatten(1)  # the grid is lost
    flat = flat if acts_only else sim.fresh("flatten_quantize", flat, "fc")
    return sim.weighted("fc", flat, fc["weight"], fc["bias"], F.linear)


def integers(quantized, x: Tensor) -> dict[str, Tensor]:
    """qtool's integers of every layer, weight, and tensor that arrives in float."""
    found = dict(quantized.integers(x))
    handles = []
    for name, module in quantized.network.named_modules():
        if isinstance(module, Quantize):

            def note(m, _args, y, name=name):
                found[name] = y + m.zero_point

            handles.append(module.register_forward_hook(note))
    quantized(x)
    for handle in handles:
        handle.remove()
    weights = {f"{n} weight": p.weight_q for n, p in quantized.plan.layers.items() if p.weight_q is not None}
    return found | weights


CONFIGS = [
    *({"mode": mode} for mode in ("sym", "sym_restr", "asym_u", "asym_s")),
    {"mode_activations": "asym_u", "mode_weights": "sym"},
    {"mode_activations": "sym", "mode_weights": "asym_s"},
    {"mode_activations": "asym_s", "mode_weights": "sym_restr"},
    {"mode": "sym", "bits_activations": 6, "bits_weights": 4},
    {"mode": "asym_u", "bits_activations": 4, "bits_weights": 8},
    {"mode": "asym_s", "bits_activations": 6, "bits_weights": 6},
    *({"mode": mode, "per_channel_weights": True} for mode in ("sym", "sym_restr", "asym_u", "asym_s")),
    {"mode": "asym_u", "per_channel_weights": True, "bits_weights": 4, "bits_activations": 6},
    *(
        {"mode": mode, "clip_activations": clip, "bits_activations": bits}
        for clip in ("avg", "laplace", "gauss")
        for mode, bits in (("sym", 8), ("asym_u", 4), ("asym_s", 6))
    ),
    {"mode": "sym", "clip_activations": "n_std", "clip_n_stds": 2.0},
    {"mode": "asym_u", "clip_activations": "n_std", "clip_n_stds": 1.0, "bits_activations": 6},
    {"mode": "asym_u", "clip_activations": "laplace", "no_clip_layers": ("fc",)},
    {"mode": "sym", "clip_activations": "avg", "no_clip_layers": ("fc", "conv1")},
    *(
        {"mode": mode, "scale_approx_bits": bits, "per_channel_weights": per_channel}
        for mode, bits, per_channel in [
            ("sym", 8, False), ("asym_u", 8, True), ("asym_s", 4, False), ("sym_restr", 15, True),
            ("sym", 3, True),
        ]
    ),
    *({"mode": mode, "no_quant_layers": ("conv1",)} for mode in ("sym", "asym_u")),
    *(
        {"mode": "asym_u", "no_quant_layers": ("conv1",), "clip_activations": clip, "bits_activations": 4}
        for clip in ("gauss", "laplace")
    ),
    *({"mode": mode, "bits_weights": 0} for mode in ("sym", "asym_s")),
    {"mode": "asym_u", "bits_weights": 0, "clip_activations": "gauss", "bits_activations": 6},
    {"mode": "sym", "accum_dtype": "float64", "per_channel_weights": True},
    *(
        {"mode": mode, "clip_activations": clip, "clip_to_observed": True, "bits_activations": bits}
        for clip in ("laplace", "gauss")
        for mode, bits in (("sym", 8), ("asym_u", 8), ("asym_s", 6))
    ),
    *({"mode": mode, "symmetric_unsigned": True} for mode in ("sym", "sym_restr")),
    {"mode_activations": "sym", "mode_weights": "asym_u", "symmetric_unsigned": True, "bits_activations": 4},
    {"mode": "sym", "symmetric_unsigned": True, "no_quant_layers": ("conv1",), "per_channel_weights": True},
    {"mode": "sym", "symmetric_unsigned": True, "clip_activations": "laplace", "bits_activations": 6},
    {
        "mode": "sym", "symmetric_unsigned": True, "clip_activations": "gauss", "clip_to_observed": True,
        "scale_approx_bits": 8,
    },
    *(
        {
            "mode": mode, "scale_approx_bits": bits, "scale_approx_everywhere": True,
            "per_channel_weights": per_channel,
        }
        for mode, bits, per_channel in [
            ("sym", 8, False), ("asym_u", 4, True), ("asym_s", 3, False), ("sym_restr", 15, True),
        ]
    ),
]  # fmt: skip


def words(settings: dict) -> str:
    return " ".join(f"{v}" if isinstance(v, str) else f"{k}={v}" for k, v in settings.items())


@pytest.fixture
def compare(varied_net, varied_batch, varied_stats):
    """Run both; the simulation that was compared."""

    def run(settings: dict, batch: Tensor = varied_batch) -> Distiller:
        quantized = qtool.quantize(varied_net, varied_stats, qtool.QuantizeConfig(**settings))
        found = integers(quantized, batch)
        sim = Distiller(settings, dict(varied_stats.layers), found)
        logits = run_distiller(sim, varied_net, batch)
        assert set(sim.checked) == set(found), "every integer is compared"
        torch.testing.assert_close(quantized(batch), logits.x.float())
        return sim

    return run


@pytest.mark.parametrize("settings", CONFIGS, ids=words)
def test_every_integer_of_every_layer_is_distillers(compare, settings):
    compare(settings)


@pytest.mark.parametrize("mode", ["sym", "asym_u"])
@pytest.mark.parametrize("bits", [10, 12])
def test_a_narrow_accumulator_saturates_as_in_distiller(compare, mode, bits):
    assert compare({"mode": mode, "bits_accum": bits}).saturated > 100


def test_images_beyond_the_calibrated_range_saturate_as_in_distiller(compare, varied_batch):
    sim = compare({"mode": "asym_u"}, varied_batch * 4)
    assert (sim.found["x_quantize"] == 255).sum() > 10
    assert (sim.found["x_quantize"] == 0).sum() > 10


def test_weights_only_computes_in_float_with_the_weights_that_the_integers_stand_for(
    varied_net, varied_batch, varied_stats
):
    settings = {"bits_activations": 0, "bits_weights": 4, "mode": "asym_s", "bits_accum": 8}
    quantized = qtool.quantize(varied_net, varied_stats, qtool.QuantizeConfig(**settings))

    def survives(w: Tensor) -> Tensor:
        grid = make_grid(w.min(), w.max(), "asym_s", 4)
        return (grid.clamp(grid.quantize(w)) + grid.Z) / grid.S

    def bias_survives(b: Tensor) -> Tensor:
        steps = 127.5 / b.abs().max()
        return torch.round(b * steps).clamp(-128, 127) / steps

    net = dict(varied_net.named_children())
    w = {n: folded(net[n], net[bn]) for n, bn in (("conv1", "bn1"), ("depthwise", "bn2"))}
    w |= {n: (net[n].weight.double(), net[n].bias.double()) for n in ("up", "gate", "fc")}
    w = {n: (survives(weight), bias_survives(bias)) for n, (weight, bias) in w.items()}
    a = F.conv2d(varied_batch.double(), *w["conv1"], padding=1).relu()
    s = (a + F.relu6(F.conv2d(a, *w["depthwise"], padding=1, groups=8))).relu()
    u = F.conv_transpose2d(F.max_pool2d(s, 2), *w["up"], stride=2, groups=2)
    c = torch.cat([s, u], 1)
    p = F.avg_pool2d(c * torch.sigmoid(F.conv2d(c, *w["gate"])), 2)
    expected = F.linear(p.flatten(1), *w["fc"])
    # float32 sums of up to 224 products
    torch.testing.assert_close(quantized(varied_batch).double(), expected, rtol=1e-5, atol=1e-4)
    assert quantized.integers(varied_batch) == {}
