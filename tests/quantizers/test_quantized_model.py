import copy
import io
import itertools
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qtool
from qtool.errors import ModelError, StatsError
from qtool.numerics.metrics import sqnr_db
from qtool.numerics.spec import QParams, QuantSpec
from qtool.observers.stats import ModelStats
from qtool.quantizers.checkpoint import FORMAT, VERSION
from qtool.quantizers.grids import Requantize

SETTINGS = {
    "defaults": {},
    "asym per channel": {"mode": "asym_u", "per_channel_weights": True},
    "asym signed 4 bits": {"mode": "asym_s", "bits_weights": 4, "bits_activations": 4},
    "weights only": {"bits_activations": 0, "bits_weights": 4},
    "acts only": {"bits_weights": 0},
    "mixed": {
        "overrides": {
            "conv1": {"bits_weights": 4, "mode": "asym_s"},
            "gate": {"bits_activations": 0},
            "fc": {"bits_weights": 10, "per_channel_weights": True},
        },
        "no_quant_layers": ("maxpool",),
    },
    "multipliers": {"scale_approx_bits": 8},
    "16 bits": {"bits_weights": 16, "bits_activations": 16, "mode": "asym_u"},
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def quantized(varied_net, varied_stats):
    return lambda **settings: qtool.quantize(varied_net, varied_stats, qtool.QuantizeConfig(**settings))


class Words(nn.Module):
    """Token indices -> logits, through an embedding that holds nearly all weights."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(500, 16)
        self.fc = nn.Linear(16, 3)

    def forward(self, index):
        return self.fc(self.embedding(index.long()).mean(dim=1))


def bytes_of(model) -> bytes:
    buffer = io.BytesIO()
    torch.save(qtool.pipeline.steps.to_checkpoint(model), buffer)
    return buffer.getvalue()


@each_setting
def test_all_weights_are_within_their_grid_and_reach_both_halves(quantized, settings):
    plans = [p for p in quantized(**settings).plan.layers.values() if p.weight_q is not None]
    assert len(plans) == (0 if settings.get("bits_weights") == 0 else 5)
    for plan in plans:
        assert plan.weight.spec.quant_min <= int(plan.weight_q.min()) < int(plan.weight_q.max())
        assert int(plan.weight_q.max()) <= plan.weight.spec.quant_max


@each_setting
def test_integers_of_activations_are_within_their_grid(quantized, varied_batch, settings):
    model = quantized(**settings)
    for name, q in model.integers(varied_batch * 10).items():
        spec = model.plan.layers[name].output.spec
        assert spec.quant_min <= int(q.min()) <= int(q.max()) <= spec.quant_max, name


def test_each_bit_is_worth_6_db(quantized, varied_net, varied_batch):
    x = varied_batch.clamp(-1, 1)  # inside the calibrated ranges: no saturation
    y = varied_net(x)
    settings = [{"bits_weights": b, "bits_activations": b, "per_channel_weights": True} for b in (4, 6, 8)]
    found = [sqnr_db(y, quantized(**s)(x)) for s in settings]
    # 6.02 dB a bit in theory; single outputs of a small net scatter around it.
    assert [b - a for a, b in itertools.pairwise(found)] == pytest.approx([12.04, 12.04], abs=4)


def test_per_channel_weights_lose_less(quantized, varied_net, varied_batch):
    y = varied_net(varied_batch)
    settings = {"bits_weights": 4, "bits_activations": 0}
    alone = quantized(**settings, per_channel_weights=True)(varied_batch)
    shared = quantized(**settings)(varied_batch)
    assert sqnr_db(y, alone) > sqnr_db(y, shared) + 1


def test_the_given_model_is_untouched(varied_net, varied_stats, varied_batch):
    before = copy.deepcopy(varied_net.state_dict())
    model = qtool.quantize(varied_net, varied_stats)
    model(varied_batch)
    model.integers(varied_batch)
    after = varied_net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in varied_net.modules())
    assert varied_net.relu3.inplace


def test_reading_integers_leaves_no_hooks(quantized, varied_batch):
    model = quantized()
    model.integers(varied_batch)
    assert not any(m._forward_hooks for m in model.modules())


def test_the_input_batch_is_not_written_into(quantized, varied_batch):
    before = varied_batch.clone()
    quantized()(varied_batch)
    assert torch.equal(varied_batch, before)


def test_training_is_refused(quantized):
    with pytest.raises(RuntimeError, match="evaluation only"):
        quantized().train()
    assert not quantized().eval().training


def test_quantizing_twice_gives_the_same_bytes(quantized):
    settings = {"mode": "asym_u", "per_channel_weights": True}
    assert bytes_of(quantized(**settings)) == bytes_of(quantized(**settings))


@each_setting
def test_integers_do_not_depend_on_the_batch(quantized, settings):
    model = quantized(**settings, accum_dtype="float64")
    x = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    together = model.integers(x)
    alone = [model.integers(x[n : n + 1]) for n in (0, 6)]
    for name, q in together.items():
        difference = (q[[0, 6]] - torch.cat([one[name] for one in alone])).abs()
        # Float convolutions may sum in another order for another batch size.
        assert int(difference.max()) <= (settings.get("bits_weights") == 0), name


@each_setting
def test_a_saved_model_gives_the_same_logits_bit_for_bit(
    quantized, varied_net, varied_batch, tmp_path, settings
):
    model = quantized(**settings)
    path = qtool.save(model, tmp_path / "q.pth")
    other_weights = copy.deepcopy(varied_net)
    for p in other_weights.parameters():
        p.data.fill_(0.1)
    loaded = qtool.load(path, other_weights, varied_batch)
    assert torch.equal(loaded(varied_batch), model(varied_batch))
    assert bytes_of(loaded) == bytes_of(model)


def test_an_embedding_is_saved_as_integers(tmp_path):
    torch.manual_seed(0)
    net, x = Words().eval(), torch.randint(0, 500, (8, 6)).float()
    model = qtool.quantize(net, qtool.calibrate(net, [x]), example=x)
    assert model.plan.layers["embedding"].kind == "embedding"
    assert sqnr_db(net(x).detach(), model(x)) > 30
    path = qtool.save(model, tmp_path / "q.pth")
    assert torch.equal(qtool.load(path, Words(), x)(x), model(x))


def test_a_checkpoint_holds_no_float_weights_and_loads_as_plain_data(quantized, tmp_path):
    path = qtool.save(quantized(per_channel_weights=True), tmp_path / "q.pth", arch="varied")
    content = torch.load(path, weights_only=True)
    assert content["model"] == {"arch": "varied"}
    assert content["float_state"] == {}
    weights = {n: layer["weight_q"].dtype for n, layer in content["layers"].items() if layer["weight"]}
    assert weights == dict.fromkeys(["conv1", "depthwise", "up", "gate", "fc"], torch.int8)
    floats = [v for layer in content["layers"].values() for v in layer.values()
              if isinstance(v, torch.Tensor) and v.is_floating_point()]  # fmt: skip
    assert max(v.numel() for v in floats) <= 14  # scales, one for each channel


def test_a_checkpoint_of_8_bits_is_a_quarter_of_the_float_one(tmp_path):
    net, x = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)), torch.randn(4, 256)
    torch.save(net.state_dict(), tmp_path / "float.pth")
    path = qtool.save(qtool.quantize(net, qtool.calibrate(net, [x])), tmp_path / "q.pth")
    # Biases are int64, and there is a plan.
    assert path.stat().st_size < 0.3 * (tmp_path / "float.pth").stat().st_size


def change_scale(content):
    content["layers"]["conv1"]["output"]["scale"] = torch.tensor(-1.0)


def change_weight(content):
    content["layers"]["conv1"]["weight_q"] = torch.zeros(2, 2, dtype=torch.int8)


DAMAGES = {
    "foreign": (lambda c: c.update(format="else"), "not a quantized model of qtool"),
    "newer": (lambda c: c.update(version=VERSION + 1), f"format version {VERSION + 1}"),
    "no layers": (lambda c: c.pop("layers"), "damaged"),
    "no state": (lambda c: c.pop("float_state"), "quantized model"),
    "a layer less": (lambda c: c["layers"].pop("fc"), "another network.*'fc'"),
    "a layer more": (lambda c: c["layers"].update(new=c["layers"]["fc"]), "another network.*'new'"),
    "a field unknown": (lambda c: c["layers"]["fc"].update(colour="red"), "damaged"),
    "a field less": (lambda c: c["layers"]["fc"].pop("inputs"), "damaged"),
    "a layer that is none": (lambda c: c["layers"].update(fc=3), "damaged"),
    "layers that are none": (lambda c: c.update(layers=3), "damaged"),
    "a scale": (change_scale, "scale that is not positive"),
    "a scale that is no tensor": (lambda c: c["layers"]["fc"]["output"].update(scale="x"), "damaged"),
    "a weight of another shape": (change_weight, "quantized model"),
    "a weight less": (lambda c: c["layers"]["fc"].update(weight_q=None), "quantized model"),
    "an output less": (lambda c: c["layers"]["fc"].update(output=None), "quantized model"),
    "a kind unknown": (lambda c: c["layers"]["maxpool"].update(kind="magic"), "quantized model"),
    "state of another": (lambda c: c["float_state"].update(extra=torch.ones(1)), "another network.*extra"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_one_line(quantized, varied_net, varied_batch, tmp_path, damage):
    change, message = damage
    path = qtool.save(quantized(), tmp_path / "q.pth")
    content = torch.load(path, weights_only=True)
    assert content["format"] == FORMAT
    change(content)
    torch.save(content, path)
    with pytest.raises(ModelError) as error:
        qtool.load(path, varied_net, varied_batch)
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_checkpoint_is_one_line(varied_net, varied_batch, tmp_path, content):
    path = tmp_path / "q.pth"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(str(path))) as error:
        qtool.load(path, varied_net, varied_batch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["up", "mul", "conv1"])
def test_a_missing_record_names_the_layer(varied_net, varied_stats, missing):
    """E5: a KeyError with a bare name."""
    layers = {name: layer for name, layer in varied_stats.layers.items() if name != missing}
    with pytest.raises(StatsError, match=f"s.yaml: no entry for '{missing}'"):
        qtool.quantize(varied_net, ModelStats(layers, "s.yaml"), example=torch.rand(2, 3, 8, 8))


def test_a_missing_field_names_layer_field_and_mode(varied_net, varied_stats):
    """E5: a KeyError with a bare field."""
    layers = dict(varied_stats.layers)
    layers["fc"] = replace(layers["fc"], output=replace(layers["fc"].output, b=None))
    config = qtool.QuantizeConfig(clip_activations="laplace")
    with pytest.raises(StatsError, match=r"s\.yaml: the output of layer 'fc': clip mode laplace needs b"):
        qtool.quantize(varied_net, ModelStats(layers, "s.yaml"), config)


def test_a_ratio_that_the_multiplier_holds_exactly_is_kept():
    for steps in range(128, 256):  # scales of 8-bit multipliers, as float32 reciprocals
        output = QParams(1 / torch.tensor(float(steps)), torch.tensor(0.0), QuantSpec())
        ratio = Requantize(output, torch.tensor(1 / 128, dtype=torch.float64), scale_approx_bits=8).ratio
        assert float(ratio) == steps / 128


@pytest.mark.parametrize(
    ("mode", "bits", "activation", "ratio", "place"),
    [
        ("asym_u", 8, None, 0.0123, 100.0),  # the unsigned integer that stands for 0.0
        ("sym", 6, None, 0.0123, 32.0),
        ("asym_u", 8, "relu", 0.0123, 0.0),
        ("asym_u", 8, None, 3 / 64, 0.0),  # every 64th integer is a tie, and goes to the even one
        ("asym_u", 12, None, 0.0123, 0.0),  # no kernel has such a grid
    ],
)
def test_values_are_rounded_where_kernels_round_them(mode, bits, activation, ratio, place):
    spec = QuantSpec.from_mode(mode, bits)
    output = QParams(torch.tensor(1.0), torch.tensor(100.0 if mode == "asym_u" else 0.0), spec)
    requantize = Requantize(output, torch.tensor([ratio], dtype=torch.float64), activation)
    assert requantize.offset == place


def test_a_bias_is_added_in_steps_of_the_output():
    """In float32 (sum + bias) * ratio goes the other way next to a tie, here 15 times."""
    ratio = torch.tensor([0.3], dtype=torch.float64)
    requantize = Requantize(QParams(torch.tensor(1.0), torch.tensor(0.0), QuantSpec()), ratio, "relu")
    step, sums = torch.tensor(0.3), torch.arange(2000.0).reshape(1, 1, 1, -1)
    bias = (torch.tensor(-335.0).double() * step.double()).float()
    expected = torch.round(sums * step + bias).clamp(0, 127)
    assert torch.equal(requantize(sums.clone(), bias), expected)
    assert not torch.equal(torch.round((sums - 335) * step).clamp(0, 127), expected)


@pytest.mark.parametrize("accum_dtype", ["float32", "float64"])
def test_d12_accumulators_hold_integers_and_in_float64_the_exact_ones(accum_dtype):
    """Convolution kernels that transform their input (Winograd's) are off by fractions, and more."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False)).eval().requires_grad_(False)
    x = torch.rand(32, 32, 16, 16, generator=generator)
    config = qtool.QuantizeConfig(mode="asym_u", accum_dtype=accum_dtype)
    layer = qtool.quantize(net, qtool.calibrate(net, [x]), config).network.get_submodule("0")
    x_q = torch.randint(0, 256, x.shape, generator=generator).float()
    exact = F.conv2d(x_q.double(), layer.weight.double(), padding=1)
    with torch.backends.mkldnn.flags(enabled=False):  # other kernels for batches of 16 and more
        found = layer.accumulate(x_q)
    assert torch.equal(found, found.round())
    if accum_dtype == "float64":
        assert torch.equal(found, exact)
    else:
        assert (found - exact).abs().max() < 1e-5 * exact.abs().max()
