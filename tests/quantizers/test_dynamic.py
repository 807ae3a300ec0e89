"""Dynamic quantization against a plain simulation of Distiller's arithmetic, and what it leaves in float.

The simulation is written from the published behaviour alone, in float64, with Distiller's convention
q = clamp(round(S x - Z)). It follows qtool layer by layer: each layer starts from the integers that
qtool has given so far, so that one tie does not hide what comes after it.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qtool
from qtool.errors import ConfigError, ModelError
from qtool.numerics.spec import LIVE_CLIP_MODES
from qtool.pipeline.runs import log_notes
from qtool.quantizers.dynamic import OnGrid
from qtool.quantizers.plan import DYNAMIC, DYNAMIC_FAKE, EMBEDDING, FLOAT, IDENTITY, WEIGHTS_ONLY

MODES = ("sym", "sym_restr", "asym_s", "asym_u")
# An 8-bit integer times a few roundings of 2^-24.
TIE = 2e-4
LAPLACE = {6: (7.41, 8.64), 8: (9.89, 11.16)}
GAUSS = {6: (3.28, 3.61), 8: (3.92, 4.2)}


class DynamicNet(nn.Module):
    """conv-relu, conv-relu6, pooling, linear and a product of matrices; (N, 3, 6, 6) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 4, 3, stride=2)
        self.relu2 = nn.ReLU6()
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.pool(self.relu2(self.conv2(x)))
        y = self.fc(torch.flatten(x, 1))
        return torch.matmul(y, y.transpose(0, 1))


@pytest.fixture(scope="module")
def net() -> DynamicNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DynamicNet().eval().requires_grad_(False)
    net.conv1.weight *= torch.linspace(0.3, 3, 6)[:, None, None, None]
    net.conv2.weight *= 12  # some of its outputs are beyond 6
    net.conv1.bias.normal_(generator=torch.Generator().manual_seed(3))
    return net


@pytest.fixture(scope="module")
def batch() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.3


@pytest.fixture
def dynamic(tmp_path):
    """Quantize a network in dynamic mode; what a file gives back gives the same."""

    def dynamic(net: nn.Module, x: Tensor, **settings):
        model = qtool.quantize(net, None, qtool.QuantizeConfig(dynamic=True, **settings), example=x)
        other = copy.deepcopy(net)
        for parameter in other.parameters():
            parameter.data.normal_()
        again = qtool.load(qtool.save(model, tmp_path / "q.pth"), other, example=x)
        assert torch.equal(again(x), model(x))
        return again

    return dynamic


def run(model, x: Tensor) -> dict[str, OnGrid]:
    """What every layer gives on a grid."""
    found: dict[str, OnGrid] = {}
    handles = [
        model.network.get_submodule(name).register_forward_hook(
            lambda _m, _a, y, name=name: found.update({name: y})
        )
        for name, layer in model.plan.layers.items()
        if layer.kind in (DYNAMIC, DYNAMIC_FAKE, EMBEDDING)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


class Simulation:
    """One forward pass of section 11, layer by layer."""

    # The outputs that are never negative, and the input that fc gets from one of them.
    UNSIGNED = ("conv1", "conv2", "pool", "input of fc")

    def __init__(self, model, x: Tensor, settings: dict) -> None:
        self.model, self.found = model, run(model, x)
        get = settings.get
        self.mode, self.bits, self.clip = get("mode"), get("bits", 8), get("clip_activations", "none")
        self.approx, self.observed = get("scale_approx_bits"), get("clip_to_observed")
        self.everywhere, self.unsigned = get("scale_approx_everywhere"), get("symmetric_unsigned")
        self.checked: list[str] = []

    def approximate(self, s):
        if self.approx is None:
            return s
        s = torch.as_tensor(s, dtype=torch.float64)
        # A product of approximated scales can be one itself; float32 holds it to 2^-22.
        shift = torch.floor(torch.log2((2**self.approx - 1) / (s * (1 - 2**-22))))
        return torch.floor(s * (1 + 2**-22) * 2**shift) / 2**shift

    def grid(self, x: Tensor, mode: str, bits: int, clip: str, half_range: bool = False, name: str = ""):
        """S, Z, and the limits of the integers, for a live tensor."""
        unsigned = self.unsigned and name in self.UNSIGNED
        rows = x.reshape(len(x) if clip == "avg" and x.dim() else 1, -1)
        low, high = float(rows.amin(1).mean()), float(rows.amax(1).mean())
        mean = float(x.mean())
        if clip == "n_std":
            low, high = max(low, mean - 2 * float(x.std())), min(high, mean + 2 * float(x.std()))
        signed = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        v = max(abs(low), abs(high))
        if clip in ("gauss", "laplace"):
            full, half = (GAUSS if clip == "gauss" else LAPLACE)[bits]
            spread = float(x.std()) if clip == "gauss" else float((x - mean).abs().mean())
            largest = float(x.abs().max())
            v = abs(mean) + spread * (half if unsigned else full)
            v = min(v, largest) if self.observed else v
            low = max(low, mean - spread * (half if half_range else full))
            high = low + spread * (half if half_range else 2 * full)
            high = min(high, float(x.max())) if self.observed else high
        if unsigned:
            return (2**bits - 1) / v, 0.0, 0, 2**bits - 1
        if mode.startswith("sym"):
            n = 2 ** (bits - 1) - 1 if mode == "sym_restr" else (2**bits - 1) / 2
            return n / v, 0.0, signed[0] + (mode == "sym_restr"), signed[1]
        S = (2**bits - 1) / (max(high, 0) - min(low, 0))
        Z = float(torch.round(torch.tensor(S * min(low, 0), dtype=torch.float64)))
        return (S, Z, 0, 2**bits - 1) if mode == "asym_u" else (S, Z + 2 ** (bits - 1), *signed)

    def agree(self, name: str, x: Tensor, scaled=None, half_range=False, cap=None) -> None:
        """The layer's integers and scale are those of the value x; scaled = x * S when approximated."""
        S, Z, q_min, q_max = self.grid(x, self.mode, self.bits, self.clip, half_range, name)
        S = float(self.approximate(S))
        found = self.found[name]
        assert 1 / float(found.scale) == pytest.approx(S, rel=1e-6)
        unrounded = x * S if scaled is None else scaled(S)
        q_max = q_max if cap is None else min(q_max, round(cap * S) - Z)
        self.settle(name, found.centered, unrounded - Z, q_min, q_max, Z)
        self.checked.append(name)

    def settle(self, name: str, found: Tensor, unrounded: Tensor, q_min, q_max, Z) -> Tensor:
        """qtool's centered integers, which may be others than expected only at a tie."""
        expected = torch.round(unrounded).clamp(q_min, q_max) + Z
        tie = (unrounded - torch.floor(unrounded) - 0.5).abs() < TIE
        wrong = (found.double() != expected) & ~tie
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} differ"
        return found.double()

    def fresh(self, name: str, index: int, x: Tensor):
        """Centered integers and S of an input that arrives in float."""
        S, Z, q_min, q_max = self.grid(x, self.mode, self.bits, self.clip, name=f"input of {name}")
        S = float(self.approximate(S))
        found = self.model.network.get_submodule(name).take(x.float(), index)
        assert 1 / float(found.scale) == pytest.approx(S, rel=1e-6)
        return self.settle(f"input of {name}", found.centered, S * x - Z, q_min, q_max, Z), S

    def weighted(self, name, compute, layer, x, per_channel, activation=None):
        """A convolution or linear layer, on what its source gave, or on a float tensor."""
        if isinstance(x, OnGrid):
            centered, S_in = x.centered.double(), 1 / float(x.scale)
        else:
            centered, S_in = self.fresh(name, 0, x)
        weight = layer.weight.double()
        shape = [-1] + [1] * (weight.dim() - 1)
        rows = weight if per_channel else weight[None]
        S, Z, q_min, q_max = zip(*(self.grid(w, self.mode, self.bits, "none") for w in rows), strict=True)
        S_w, Z_w = (torch.tensor(v, dtype=torch.float64).reshape(shape) for v in (S, Z))
        S_w = self.approximate(S_w) if self.everywhere else S_w
        w = self.model.network.get_submodule(name).weight
        w = self.settle(f"weight of {name}", w, S_w * weight - Z_w, q_min[0], q_max[0], Z_w)
        S_acc = self.approximate(S_in * S_w).reshape([-1] + [1] * (weight.dim() - 2))
        b = layer.bias.double()
        S_b = (2**32 - 1) / 2 / float(b.abs().max())
        ratio = self.approximate(S_acc.flatten() / S_b)
        q_b = torch.round(torch.round(b * S_b).clamp(-(2**31), 2**31 - 1) * ratio)
        accumulator = compute(centered, w) + q_b.reshape([-1] + [1] * (weight.dim() - 2))
        if activation is not None:
            accumulator = accumulator.clamp(min=0)
        x_out = accumulator / S_acc
        cap = 6.0 if activation == "relu6" else None
        x_out = x_out if cap is None else x_out.clamp(max=cap)  # D14
        scaled = None if self.approx is None else lambda S: accumulator * self.approximate(S / S_acc)
        self.agree(name, x_out, scaled, activation is not None, cap)


SETTINGS = [
    *({"mode": mode} for mode in MODES),
    *({"mode": "asym_u", "clip_activations": clip} for clip in ("avg", "n_std", "gauss", "laplace")),
    {"mode": "sym", "clip_activations": "laplace"},
    {"mode": "asym_s", "clip_activations": "gauss", "bits": 6},
    {"mode": "asym_u", "per_channel_weights": True, "bits": 6},
    {"mode": "sym", "per_channel_weights": True, "scale_approx_bits": 8},
    {"mode": "asym_u", "scale_approx_bits": 4},
    {"mode": "sym", "scale_approx_bits": 5, "scale_approx_everywhere": True},
    {"mode": "asym_u", "scale_approx_bits": 3, "scale_approx_everywhere": True, "per_channel_weights": True},
    {"mode": "sym", "symmetric_unsigned": True},
    {"mode": "sym_restr", "symmetric_unsigned": True, "bits": 6},
    {"mode": "sym", "symmetric_unsigned": True, "clip_activations": "laplace", "bits": 6},
    {"mode": "sym", "clip_activations": "laplace", "clip_to_observed": True},
    {"mode": "asym_s", "clip_activations": "gauss", "clip_to_observed": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(map(str, s.values())))
def test_dynamic_layers_give_the_integers_that_distiller_would(settings, net, batch, dynamic):
    """The rules of section 11, and D9, D10 and D13 where they are asked for."""
    given = {key: value for key, value in settings.items() if key != "bits"}
    per_channel = settings.get("per_channel_weights", False)
    if settings.get("clip_activations") == "n_std":
        given["clip_n_stds"] = 2
    bits = settings.get("bits", 8)
    model = dynamic(net, batch, **given, bits_activations=bits, bits_weights=bits)
    simulation = Simulation(model, batch, settings)
    found = simulation.found
    conv1, conv2 = ({"padding": 1}, {"stride": 2})
    simulation.weighted(
        "conv1", lambda x, w: F.conv2d(x, w, **conv1), net.conv1, batch.double(), per_channel, "relu"
    )
    simulation.weighted(
        "conv2", lambda x, w: F.conv2d(x, w, **conv2), net.conv2, found["conv1"], per_channel, "relu6"
    )
    pooled = F.avg_pool2d(found["conv2"].centered.double() * found["conv2"].scale.double(), 2)
    simulation.agree("pool", pooled)
    flat = found["pool"].centered.double() * found["pool"].scale.double()
    simulation.weighted("fc", F.linear, net.fc, flat.flatten(1), per_channel)
    x, S = found["fc"].centered.double(), 1 / float(found["fc"].scale)
    other, S_other = simulation.fresh("matmul", 1, x.T / S)
    accumulator = x @ other
    product = simulation.approximate(S * S_other) if simulation.everywhere else S * S_other
    scaled = (
        None if simulation.approx is None else lambda s: accumulator * simulation.approximate(s / product)
    )
    simulation.agree("matmul", accumulator / product, scaled)
    assert simulation.checked == ["conv1", "conv2", "pool", "fc", "matmul"]


def test_kinds_of_layers_and_their_fused_relus(net, batch, dynamic):
    kinds = {n: layer.kind for n, layer in dynamic(net, batch).plan.layers.items()}
    assert kinds == {
        "conv1": DYNAMIC,
        "relu1": IDENTITY,
        "conv2": DYNAMIC,
        "relu2": IDENTITY,
        "pool": DYNAMIC_FAKE,
        "fc": DYNAMIC,
        "matmul": DYNAMIC,
    }


def test_relu6_caps_though_there_are_no_statistics(net, batch, dynamic):
    """D14: only statistics held the cap of 6."""
    found = run(dynamic(net, batch), batch)["conv2"]
    top = float(found.centered.max() * found.scale)
    assert F.relu(net.conv2(F.relu(net.conv1(batch)))).max() > 12
    assert top == pytest.approx(6, abs=0.51 * float(found.scale))


class Sums(nn.Module):
    """A sum, a product and a concatenation of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return torch.cat([self.relu(a + b), a * b], 1)


def test_sums_products_and_concatenations_stay_in_float_with_one_note(batch, dynamic, monkeypatch):
    net = Sums().eval()
    model = dynamic(net, batch)
    layers = model.plan.layers
    assert [layers[n].kind for n in ("add", "mul", "cat")] == [FLOAT] * 3
    assert layers["relu"].kind == DYNAMIC_FAKE  # its input is in float, and it stays a layer of its own
    found = {name: y.centered * y.scale for name, y in run(model, batch).items()}
    assert torch.equal(model(batch)[:, 4:], found["a"] * found["b"])
    assert torch.equal(model(batch)[:, :4], found["relu"])
    said = []
    monkeypatch.setattr("qtool.pipeline.runs.LOG.info", lambda text, *args: said.append(text % args))
    log_notes(model)
    assert said == [
        "3 layers stay in float, such as add: sums, products and concatenations stay in float in dynamic mode"
    ]


def test_batch_norms_are_folded(tiny_net, tiny_batches, dynamic):
    model = dynamic(tiny_net, tiny_batches[0])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.network.modules())
    error = model(tiny_batches[0]) - tiny_net(tiny_batches[0])
    assert error.abs().max() < 0.05 * tiny_net(tiny_batches[0]).abs().max()


def test_weights_only_and_acts_only(net, batch, dynamic):
    weights = dynamic(net, batch, bits_activations=0)
    assert weights.plan.layers["conv1"].kind == WEIGHTS_ONLY
    stats = qtool.calibrate(net, [batch])
    static = qtool.quantize(net, stats, qtool.QuantizeConfig(bits_activations=0))
    assert torch.equal(weights(batch), static(batch))
    acts = dynamic(net, batch, bits_weights=0)
    found = run(acts, batch)
    assert acts.plan.layers["conv1"].kind == DYNAMIC_FAKE
    expected = F.relu(net.conv1(batch))  # its input is taken as it comes
    scale = expected.max() / 127.5
    assert float(found["conv1"].scale) == pytest.approx(float(scale), rel=1e-6)
    torch.testing.assert_close(found["conv1"].centered * scale, expected, rtol=0, atol=0.501 * float(scale))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, index: Tensor) -> Tensor:
        return self.fc(self.table(index))


@pytest.mark.parametrize("seed", [0, 28, 77])
def test_embedding_hands_its_tables_grid_to_the_next_layer(dynamic, seed):
    torch.manual_seed(seed)
    net = Embedded().eval().requires_grad_(False)
    index = torch.tensor([[0, 3, 11], [5, 5, 2]])
    model = dynamic(net, index, bits_weights=4)
    rows = run(model, index)["table"]
    table = net.table.weight
    assert float(rows.scale) == pytest.approx(float(table.abs().max()) / 7.5)
    # By the scale itself: the largest entry lies half way between two integers, where the last bit decides.
    assert torch.equal(rows.centered, torch.round(table[index] / rows.scale).clamp(-8, 7))
    assert model.network.fc.take(rows, 0) is rows


def test_integers_of_a_dynamic_network_are_refused(dynamic):
    net = Embedded().eval()
    index = torch.tensor([[0, 3, 11]])
    with pytest.raises(ConfigError, match=r"^dynamic mode: every batch has grids of its own"):
        dynamic(net, index).integers(index)


# Neighbours


@pytest.mark.parametrize("clip", ["none", "avg", "laplace"])
def test_per_sample_a_result_does_not_depend_on_the_neighbours(clip, net, batch, dynamic):
    net = nn.Sequential(net.conv1, net.relu1, net.conv2)
    apart = dynamic(net, batch, per_sample=True, clip_activations=clip)
    together = dynamic(net, batch, clip_activations=clip)
    loud = batch.clone()
    loud[1:] *= 3
    assert torch.equal(apart(batch)[0], apart(loud)[0])
    assert torch.equal(apart(batch)[:1], apart(batch[:1]))
    assert not torch.equal(together(batch)[0], together(loud)[0])
    assert torch.equal(apart(batch[:1]), together(batch[:1]))


def test_per_sample_is_for_dynamic_mode_only(net, batch):
    with pytest.raises(ConfigError, match=r"^--per-sample: has an effect with --qe-dynamic only"):
        qtool.quantize(net, qtool.calibrate(net, [batch]), qtool.QuantizeConfig(per_sample=True))


# Clipping


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [m for m in LIVE_CLIP_MODES if m != "none"])
def test_every_clip_mode_works_on_a_relu_of_its_own(clip, mode, batch, dynamic):
    """E6: gauss and laplace ended in a TypeError here."""
    net = nn.Sequential(nn.ReLU())
    settings = {"mode": mode, "clip_activations": clip, "clip_n_stds": 2 if clip == "n_std" else None}
    model = dynamic(net, batch, **settings)
    y = run(model, batch)["0"]
    assert (y.centered >= 0).all()
    values = y.centered * y.scale
    kept = batch.clamp(0, float(values.max()))
    assert (values - kept).abs().max() <= 1.01 * float(y.scale) + 1.01 * float(batch.max()) / 127


def test_input_in_channels_last_gives_the_same(net, batch, dynamic):
    """D21: avg and per-channel ranges failed on a strided view."""
    for clip in ("none", "avg"):
        model = dynamic(net, batch, clip_activations=clip, per_channel_weights=True)
        turned = batch.contiguous(memory_format=torch.channels_last)
        assert not turned.is_contiguous()
        assert torch.equal(model(turned), model(batch))


# Widths


def test_sums_of_wide_integers_are_exact(dynamic):
    """D12: float32 sums are inexact above 2^24."""
    generator = torch.Generator().manual_seed(5)
    net = nn.Sequential(nn.Linear(4000, 3, bias=False)).eval().requires_grad_(False)
    net[0].weight.copy_(torch.rand(3, 4000, generator=generator))
    x = torch.rand(2, 4000, generator=generator)
    model = dynamic(net, x, bits_activations=12, bits_weights=12)
    layer = model.plan.layers["0"]
    x_q = torch.round(x / (x.max() / 2047.5)).clamp(max=2047).double()
    sums = x_q @ layer.weight_q.double().T
    y = run(model, x)["0"]
    exact = sums * float(x.max()) / 2047.5 * layer.weight.scale.double()
    assert (y.centered.double() - (exact / y.scale.double()).round().clamp(max=2047)).abs().max() <= 0
    assert model.network.get_submodule("0").weight.dtype == torch.float64
    narrow = dynamic(net, x).network.get_submodule("0")
    asked = dynamic(net, x, accum_dtype="float64").network.get_submodule("0")
    assert (narrow.weight.dtype, asked.weight.dtype) == (torch.float32, torch.float64)


def test_activations_without_a_range_are_explained(net, batch, dynamic):
    model = dynamic(net, batch)
    for value in (torch.nan, torch.inf):
        with pytest.raises(
            ModelError, match=r"^dynamic mode: activations have no range: x_min and x_max must"
        ):
            model(torch.full_like(batch, value))
    with pytest.raises(ModelError, match=r"the range of an empty tensor is not defined"):
        model(batch[:0])


def test_the_given_network_and_batch_are_untouched(net, batch, dynamic):
    before = [p.clone() for p in net.parameters()], batch.clone()
    dynamic(net, batch, fpq_module=16)(batch)
    dynamic(net, batch)(batch)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before[0], strict=True))
    assert torch.equal(batch, before[1])
