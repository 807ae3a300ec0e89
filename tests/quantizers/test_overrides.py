"""What the settings of single layers and inputs do to the arithmetic."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import qtool
from qtool.errors import ConfigError
from qtool.graph.trace import trace
from qtool.numerics.affine import fake_quantize
from qtool.numerics.spec import LayerSpec, QuantSpec
from qtool.quantizers.plan import CAST, FAKE, FLOAT, IDENTITY, INTEGER, WEIGHTS_ONLY
from qtool.quantizers.prepare import QuantizedModel, quantize_graph

MODES = ("sym", "sym_restr", "asym_s", "asym_u")
TYPES = {16: torch.float16, 32: torch.float32, 64: torch.float64}


def seeded(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """Layers with weights of their own seed, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(*layers).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return net


@pytest.fixture
def batch() -> Tensor:
    """(6, 8), values from about -2 to 4."""
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(1)) + 1


@pytest.fixture
def images() -> Tensor:
    """(4, 3, 6, 6)."""
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2)) + 0.2


@pytest.fixture
def quantize(tmp_path):
    """Quantize a network with the statistics of one batch, and see that a file gives back the same."""

    def quantize(net: nn.Module, x: Tensor, **settings) -> QuantizedModel:
        stats = None if settings.get("dynamic") else qtool.calibrate(net, [x])
        model = qtool.quantize(net, stats, qtool.QuantizeConfig(**settings), example=x)
        return read_back(model, net, x, tmp_path / "q.pth")

    return quantize


def read_back(model: QuantizedModel, net: nn.Module, x: Tensor, path) -> QuantizedModel:
    """The network as read from a file into an architecture of other weights; it gives the same."""
    other = copy.deepcopy(net)
    for parameter in other.parameters():
        parameter.data.normal_()
    again = qtool.load(qtool.save(model, path), other, example=x)
    assert torch.equal(again(x), model(x))
    return again


def identity_layer() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(8, 8, bias=False)).eval().requires_grad_(False)
    net[0].weight.copy_(torch.eye(8))
    return net


# Settings of inputs


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_an_explicit_input_keeps_its_whole_range(mode, dynamic, batch, quantize):
    """D1: an explicit input took a signed range with an unsigned grid."""
    entry = {"mode": mode, "bits_activations": 4}
    model = quantize(
        identity_layer(),
        batch,
        bits_activations=16,
        bits_weights=16,
        dynamic=dynamic,
        overrides={"0": {"input_overrides": {0: entry}}},
    )
    low, high = min(float(batch.min()), 0), float(batch.max())
    extent = 2 * max(-low, high) if mode.startswith("sym") else high - low
    step = extent / (14 if mode == "sym_restr" else 15)
    error = (model(batch) - batch).abs().max()
    # With a rounded zero point, the last step on one side may be cut short by half.
    assert step / 4 < error <= step * (0.5 if mode.startswith("sym") else 1) + 1e-3


def test_an_input_from_the_output_is_as_the_default(batch, quantize):
    settings = {"mode": "asym_u", "clip_activations": "avg", "bits_activations": 5, "dynamic": False}
    asked = quantize(
        identity_layer(), batch, **settings, overrides={"0": {"input_overrides": {0: {"from_output": True}}}}
    )
    default = quantize(identity_layer(), batch, **settings)
    assert asked.plan.layers["0"].inputs[0].same_grid(default.plan.layers["0"].inputs[0])
    assert torch.equal(asked(batch), default(batch))


def test_an_input_with_its_own_clipping_leaves_the_output_unclipped(batch, quantize):
    entry = {"clip_activations": "none", "input_overrides": {0: {"clip_activations": "avg"}}}
    net = identity_layer()
    layer = quantize(net, batch, mode="asym_u", clip_activations="avg", overrides={"0": entry}).plan.layers[
        "0"
    ]
    stats = qtool.calibrate(net, [batch])
    record, output = stats.input("0", 0), stats.output("0")
    assert float(layer.inputs[0].scale) == pytest.approx((record.avg_max - min(record.avg_min, 0)) / 255)
    assert float(layer.output.scale) == pytest.approx((output.max - min(output.min, 0)) / 255)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_entry_for_an_input_that_arrives_quantized_is_refused(dynamic, images, quantize):
    net = seeded(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    overrides = {"1": {"input_overrides": {0: {"from_output": True}}}}
    with pytest.raises(ConfigError, match=r"^input 0 of layer '1': arrives quantized by the layer in front"):
        quantize(net, images, dynamic=dynamic, overrides=overrides)
    overrides["0"] = {"bits_activations": 0}
    assert quantize(net, images, dynamic=dynamic, overrides=overrides)(images).isfinite().all()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("net", [nn.Conv2d(3, 4, 3), nn.Softplus()], ids=["integer", "fake"])
def test_without_fallback_a_float_input_is_refused_with_three_remedies(net, dynamic, images, quantize):
    with pytest.raises(ConfigError) as caught:
        quantize(seeded(net), images, dynamic=dynamic, inputs_quant_auto_fallback=False)
    assert str(caught.value) == (
        "input 0 of layer '0': arrives in float; quantize the layer in front of it, give the input an entry "
        "in input_overrides, or set inputs_quant_auto_fallback to true"
    )
    entry = {"0": {"input_overrides": {0: {"from_output": True}}}}
    settings = {"dynamic": dynamic, "inputs_quant_auto_fallback": False}
    model = quantize(seeded(net), images, **settings, overrides=entry)
    assert torch.equal(model(images), quantize(seeded(net), images, dynamic=dynamic)(images))


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_entry_for_an_input_that_a_layer_does_not_have_is_refused(dynamic, batch, quantize):
    with pytest.raises(ConfigError, match=r"layer '0': input_overrides.1: it has 1 inputs, counted from 0"):
        overrides = {"0": {"input_overrides": {1: {"from_output": True}}}}
        quantize(identity_layer(), batch, dynamic=dynamic, overrides=overrides)


# Float types


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_a_layer_in_a_float_type_computes_in_it_and_not_on_integers(bits, dynamic, batch, quantize):
    net = seeded(nn.Linear(8, 5))
    model = quantize(net, batch, dynamic=dynamic, fpq_module=bits)
    expected = copy.deepcopy(net[0]).to(TYPES[bits])(batch.to(TYPES[bits])).float()
    assert model.plan.layers["0"].kind == CAST
    assert torch.equal(model(batch), expected)
    assert torch.equal(expected, net(batch)) is (bits == 32)


@pytest.mark.parametrize(("fake", "kind"), [(None, FAKE), (True, FAKE), (False, CAST)])
def test_another_operation_in_a_float_type_is_put_on_a_grid_unless_told_otherwise(
    fake, kind, batch, quantize
):
    net = seeded(nn.Softplus())
    model = quantize(net, batch, overrides={"0": {"fpq_module": 16, "fake": fake}})
    layer = model.plan.layers["0"]
    assert layer.kind == kind
    x = batch if kind == CAST else fake_quantize(batch, layer.inputs[0])
    expected = nn.functional.softplus(x.half()).float()
    assert torch.equal(model(batch), expected if kind == CAST else fake_quantize(expected, layer.output))


@pytest.mark.parametrize(("fake", "kind"), [(None, CAST), (True, FAKE), (False, CAST)])
def test_a_linear_layer_in_a_float_type_is_put_on_a_grid_only_when_told(fake, kind, batch, quantize):
    net = seeded(nn.Linear(8, 5))
    model = quantize(net, batch, fpq_module=64, overrides={"0": {"fake": fake}})
    layer = model.plan.layers["0"]
    assert layer.kind == kind
    x = batch if kind == CAST else fake_quantize(batch, layer.inputs[0])
    expected = copy.deepcopy(net[0]).double()(x.double()).float()
    assert torch.equal(model(batch), expected if kind == CAST else fake_quantize(expected, layer.output))


def test_a_float_type_leaves_the_given_graph_as_it_was(batch):
    traced = trace(seeded(nn.Linear(8, 5)), batch)
    before = traced(batch)
    qtool.quantize(traced, None, qtool.QuantizeConfig(dynamic=True, fpq_module=16))
    assert torch.equal(traced(batch), before)


# Operations left out, and inputs taken as they are


def test_a_layer_made_an_identity_is_not_there(batch, quantize):
    net = seeded(nn.Linear(8, 8), nn.Softplus())
    model = quantize(net, batch, overrides={"1": {"make_identity": True}})
    assert model.plan.layers["1"].kind == IDENTITY
    assert torch.equal(model(batch), quantize(net[:1], batch)(batch))


def test_a_layer_that_changes_the_shape_cannot_be_left_out(images, quantize):
    net = seeded(nn.MaxPool2d(2), nn.Conv2d(3, 4, 1))
    layer = quantize(net, images, overrides={"0": {"make_identity": True}}).plan.layers["0"]
    assert (layer.kind, layer.note) == (FLOAT, "cannot be left out: its output has another shape")


@pytest.mark.parametrize("quantize_inputs", [True, False])
def test_inputs_of_a_float_operation_are_put_on_a_grid_unless_told_otherwise(
    quantize_inputs, images, quantize
):
    net = seeded(nn.AvgPool2d(2))
    overrides = {"0": {"quantize_inputs": quantize_inputs}}
    model = quantize(net, images, bits_activations=4, overrides=overrides)
    layer = model.plan.layers["0"]
    x = fake_quantize(images, layer.inputs[0]) if quantize_inputs else images
    assert torch.equal(model(images), fake_quantize(net(x), layer.output))
    other = fake_quantize(images, layer.output) if not quantize_inputs else images
    assert not torch.equal(model(images), fake_quantize(net(other), layer.output))


# Clipping


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bits_weights": 0},
        {"bits_activations": 0},
        {"fpq_module": 16, "overrides": {"0": {"fake": True}}},
    ],
    ids=["integer", "acts only", "weights only", "float16 on a grid"],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_half_range_applies_a_relu(settings, dynamic, batch, quantize):
    net = seeded(nn.Linear(8, 5))
    plain = quantize(net, batch, dynamic=dynamic, **settings)(batch)
    halved = quantize(net, batch, dynamic=dynamic, clip_half_range=True, **settings)(batch)
    assert plain.min() < -0.1
    if dynamic and plain.max() < -plain.min() and settings != {"bits_activations": 0}:
        assert halved.min() == 0  # the grid is that of the positive part
        torch.testing.assert_close(halved, net(batch).clamp(min=0), rtol=0, atol=0.05)
    else:
        assert torch.equal(halved, plain.clamp(min=0))


def test_half_range_leaves_fresh_inputs_their_full_range(batch, quantize):
    settings = {"mode": "asym_u", "clip_activations": "laplace"}
    grids = [
        quantize(identity_layer(), batch, clip_half_range=half, **settings).plan.layers["0"]
        for half in (0, 1)
    ]
    assert grids[0].inputs[0].same_grid(grids[1].inputs[0])
    assert not grids[0].output.same_grid(grids[1].output)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bits_activations", [0, 8])
def test_weights_are_clipped_as_activations_when_told(dynamic, bits_activations, batch, quantize):
    net = seeded(nn.Linear(8, 5))
    settings = {"clip_activations": "avg", "dynamic": dynamic, "bits_activations": bits_activations}
    clipped, plain = (quantize(net, batch, also_clip_weights=also, **settings) for also in (True, False))
    weight = net[0].weight
    v = max(abs(float(weight.amin(1).mean())), abs(float(weight.amax(1).mean())))
    assert float(clipped.plan.layers["0"].weight.scale) == pytest.approx(v / 127.5)
    assert float(plain.plan.layers["0"].weight.scale) == pytest.approx(float(weight.abs().max()) / 127.5)


@pytest.mark.parametrize("clip", ["avg", "laplace", "gauss"])
def test_weights_per_channel_cannot_be_clipped(clip, batch, quantize):
    settings = {"also_clip_weights": True, "per_channel_weights": True, "clip_activations": clip}
    with pytest.raises(
        ConfigError, match=f"^layer '0': its weight cannot be clipped: clip mode {clip} is per"
    ):
        quantize(identity_layer(), batch, **settings)
    quantize(identity_layer(), batch, **{**settings, "clip_activations": "none"})


# Float weights beside the integers


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bits_activations", [0, 8])
def test_float_weights_are_kept_in_the_file_when_told(dynamic, bits_activations, images, quantize, tmp_path):
    net = seeded(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 3))
    settings = {"dynamic": dynamic, "bits_activations": bits_activations, "bits_weights": 3}
    kept, plain = (quantize(net, images, save_fp_weights=save, **settings) for save in (True, False))
    assert torch.equal(kept(images), plain(images))
    content = torch.load(qtool.save(kept, tmp_path / "kept.pth"), weights_only=True)
    assert torch.equal(content["layers"]["0"]["float_weight"], net[0].weight.transpose(0, 1))
    assert torch.equal(kept.plan.layers["2"].float_weight, net[2].weight)
    assert plain.plan.layers["0"].float_weight is plain.plan.layers["2"].float_weight is None


# The accumulator


@pytest.mark.parametrize("dynamic", [False, True])
def test_sums_saturate_at_the_accumulator(dynamic, batch, quantize):
    net = seeded(nn.Linear(8, 5, bias=False))
    settings = {"bits_activations": 6, "bits_weights": 6, "dynamic": dynamic}
    plain = quantize(net, batch, **settings)
    narrow = quantize(net, batch, bits_accum=8, **settings)
    wide = quantize(net, batch, bits_accum=64, **settings)
    assert torch.equal(wide(batch), plain(batch))
    weight = plain.plan.layers["0"].weight
    v = float(batch.abs().max())
    x_q = torch.round(batch * 31.5 / v).clamp(-32, 31)
    sums = x_q @ torch.round(net[0].weight / weight.scale).clamp(-32, 31).T
    assert (sums.abs() > 128).any()
    expected = sums.clamp(-128, 127) * (v / 31.5) * weight.scale
    step = float(plain.plan.layers["0"].output.scale) if not dynamic else float(expected.abs().max()) / 31.5
    within = expected.clamp(-32 * step, 31 * step)
    torch.testing.assert_close(narrow(batch), within, rtol=0, atol=0.501 * step)
    assert (narrow(batch) - plain(batch)).abs().max() > step


def test_an_accumulator_narrower_than_its_terms_is_refused(batch, quantize):
    with pytest.raises(ConfigError, match="--qe-bits-accum: 9 bits are fewer than the 10 of the values"):
        quantize(identity_layer(), batch, bits_weights=10, bits_accum=9)


# Ranges that are given


@pytest.fixture
def with_spec(batch, tmp_path):
    """Quantize one linear layer as a LayerSpec says; a file gives back the same."""
    net = seeded(nn.Linear(8, 5))
    traced, stats = trace(net, batch), qtool.calibrate(net, [batch])

    def with_spec(**changes) -> QuantizedModel:
        grid = QuantSpec.from_mode("asym_u", 6)
        spec = replace(LayerSpec(weight=grid, output=grid), **changes)
        return read_back(quantize_graph(traced, stats, {"0": spec}), net, batch, tmp_path / "q.pth")

    return with_spec


def test_given_range_takes_the_place_of_the_outputs_own(with_spec, batch):
    model = with_spec(output_range=(-0.5, 0.75))
    grid = model.plan.layers["0"].output
    assert float(grid.scale) == pytest.approx(1.25 / 63)
    assert float(grid.zero_point) == round(0.5 / 1.25 * 63)
    assert float(model(batch).min()) == pytest.approx(-0.5, abs=0.01)
    assert float(model(batch).max()) == pytest.approx(0.75, abs=0.01)


def test_given_range_takes_the_place_of_the_weights_own(with_spec):
    layer = with_spec(weight_range=(-0.1, 0.2)).plan.layers["0"]
    assert float(layer.weight.scale) == pytest.approx(0.3 / 63)
    assert {int(layer.weight_q.min()), int(layer.weight_q.max())} == {0, 63}


@pytest.mark.parametrize(("mode", "steps"), [("sym", 31.5), ("sym_restr", 31)])
def test_d7_a_given_range_of_weights_has_the_scale_of_its_mode(mode, steps, with_spec):
    """Distiller gave a restricted grid the scale of the full one."""
    layer = with_spec(weight=QuantSpec.from_mode(mode, 6), weight_range=(-0.1, 0.1)).plan.layers["0"]
    assert float(layer.weight.scale) == pytest.approx(0.1 / steps)
    assert {int(layer.weight_q.min()), int(layer.weight_q.max())} == {-32 + (mode == "sym_restr"), 31}


def test_one_range_for_weights_per_channel_is_refused(with_spec):
    with pytest.raises(ConfigError, match="layer '0': one range was given for its per-channel weights"):
        with_spec(weight=QuantSpec.from_mode("sym", 6, axis=0), weight_range=(-0.1, 0.2))


def test_kinds_of_layers_follow_from_their_bits(batch, quantize):
    net = seeded(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    overrides = {
        "1": {"bits_weights": 0},
        "2": {"bits_activations": 0},
        "3": {"bits_weights": 0, "bits_activations": 0},
    }
    kinds = [layer.kind for layer in quantize(net, batch, overrides=overrides).plan.layers.values()]
    assert kinds == [INTEGER, FAKE, WEIGHTS_ONLY, FLOAT]


@pytest.mark.parametrize("dynamic", [False, True])
def test_e4_a_broad_pattern_sets_what_each_layer_has_a_use_for(dynamic, tiny_net, tiny_batches):
    """Distiller stopped with a TypeError where a pattern with per_channel_wts or mode hit a ReLU."""
    overrides = {".*": {"per_channel_weights": True, "mode": "asym_u", "bits_weights": 6}}
    config = qtool.QuantizeConfig(overrides=overrides, dynamic=dynamic)
    stats = None if dynamic else qtool.calibrate(tiny_net, tiny_batches)
    plan = qtool.quantize(tiny_net, stats, config, example=tiny_batches[0]).plan.layers
    assert plan["conv1"].weight.scale.shape == (8,)
    outputs = [p.dynamic.output if dynamic else p.output.spec for p in plan.values() if p.dynamic or p.output]
    assert {spec.mode for spec in outputs} == {"asym_u"}
    assert len(outputs) > 3
