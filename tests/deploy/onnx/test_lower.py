"""Quantized networks in onnxruntime against the simulation, integer by integer."""

import onnx
import pytest
import torch
from torch import nn

import qtool
from qtool.deploy.onnx import qdq_model
from qtool.errors import ConfigError
from qtool.graph.capped import CappedReLU6


@pytest.fixture
def x():
    """(8, 3, 8, 8)"""
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def assert_equal(layers, steps=1, share=0.995):
    """Up to ties, which are rare."""
    assert layers
    assert max(layer.largest for layer in layers.values()) <= steps
    assert min(layer.equal for layer in layers.values()) >= share


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("mode", ["sym", "sym_restr", "asym_s", "asym_u"])
def test_integers_are_those_of_the_simulation(mode, bits, tiny_net, x, as_quantized):
    settings = {"mode": mode, "bits_activations": bits, "bits_weights": bits}
    assert_equal(as_quantized(tiny_net, x, **settings)[2])


@pytest.mark.parametrize(
    "settings",
    [
        {"per_channel_weights": False},
        {"mode_weights": "sym"},
        {"scale_approx_bits": 6},
        {"scale_approx_bits": 6, "scale_approx_everywhere": True},
        {"bits_weights": 16, "bits_activations": 8},
        {"symmetric_unsigned": True, "mode": "sym"},
        {"no_quant_layers": ("depthwise",)},
        {"clip_activations": "avg"},
        {"add_rounding": "sum"},
        {"add_rounding": "sum", "float_output": True},
        {"add_rounding": "none", "float_output": True},
        {"add_rounding": "fused"},
        {"max_pool_grid": "input", "first_last_bits": 8, "bits_activations": 4},
    ],
    ids=str,
)
def test_integers_are_those_of_the_simulation_with_other_settings(settings, tiny_net, x, as_quantized):
    # Multipliers of few bits are short fractions, with which many values are ties.
    share = 0.9 if "scale_approx_everywhere" in settings else 0.995
    assert_equal(as_quantized(tiny_net, x, **settings)[2], share=share)


@pytest.mark.parametrize("opset", [18, 20, 21])
def test_opsets_give_the_same_integers_in_other_types(opset, tiny_net, x, as_quantized):
    _, proto, layers = as_quantized(tiny_net, x, opset=opset, bits_weights=4)
    assert_equal(layers)
    assert [entry.version for entry in proto.opset_import] == [opset]
    types = {t.name: t.data_type for t in proto.graph.initializer}
    expected = onnx.TensorProto.UINT4 if opset == 21 else onnx.TensorProto.UINT8
    assert types["conv1.weight_quantized"] == expected


def test_sixteen_bits_need_the_opset_that_has_them(tiny_net, x, as_quantized):
    assert_equal(as_quantized(tiny_net, x, bits_activations=16, bits_weights=8)[2], 3, 0.9)
    with pytest.raises(ConfigError, match=r"layer 'conv1'.*has 16 bits, and opset 20 knows 8; --opset 21"):
        as_quantized(tiny_net, x, opset=20, bits_activations=8, bits_weights=16)


def test_scales_zero_points_and_integers_are_those_of_the_plan(tiny_net, x, as_quantized):
    model, proto, _ = as_quantized(tiny_net, x)
    held = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in proto.graph.initializer}
    plan = model.plan.layers["depthwise"]
    assert torch.equal(held["depthwise.weight_quantized"], plan.weight_q)
    assert torch.equal(held["depthwise.weight_scale"], plan.weight.scale)
    assert torch.equal(held["depthwise.weight_zero_point"].float(), plan.weight.zero_point)
    assert torch.equal(held["depthwise.bias_quantized"].long(), plan.bias_q)
    assert float(held["depthwise_scale"]) == float(plan.output.scale)
    assert float(held["depthwise_zero_point"]) == float(plan.output.zero_point)


def test_layers_keep_their_names_and_the_batch_is_free(tiny_net, x, as_quantized):
    _, proto, _ = as_quantized(tiny_net, x)
    names = {node.name: node.op_type for node in proto.graph.node}
    wanted = {"conv1": "Conv", "depthwise": "Conv", "add": "Add", "pool": "AveragePool", "fc": "Gemm"}
    assert wanted.items() <= names.items()
    assert proto.graph.input[0].name == "x" and proto.graph.output[0].name == "output"
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_a_limit_of_each_channel_ends_where_the_simulation_does(tiny_net, x, as_quantized):
    tiny_net.relu2 = CappedReLU6(torch.linspace(0.3, 5.0, 8).reshape(8, 1, 1))
    model, _, layers = as_quantized(tiny_net, x)
    assert any(layer.activation_limit is not None for layer in model.plan.layers.values())
    assert_equal(layers)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(8, 6, 3, 2, 1, 1),
        nn.ConvTranspose2d(8, 6, 3, groups=2),
        nn.Conv2d(8, 6, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(8, 6, (2, 4), padding="same"),
        nn.Sequential(nn.Flatten(2), nn.Linear(64, 5), nn.GELU(), nn.LayerNorm(5)),
        nn.Sequential(nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Sigmoid()),
        nn.Sequential(nn.MaxPool2d(2), nn.Softmax(1), nn.SiLU()),
    ],
    ids=str,
)
def test_other_layers_give_the_integers_of_the_simulation(layer, x, as_quantized):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), layer)
    assert_equal(as_quantized(net, x)[2], share=0.97)


class Combining(nn.Module):
    """A product of two values on grids, a concatenation, a matrix product, and a sum of both."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return torch.cat([a * b, a], 1) + torch.matmul(torch.cat([a, b], 1), torch.cat([b, a], 1))


def test_products_and_concatenations_give_the_integers_of_the_simulation(x, as_quantized):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Combining()
    assert_equal(as_quantized(net, x)[2])
    approximated = {"scale_approx_bits": 5, "scale_approx_everywhere": True}
    assert_equal(as_quantized(net, x, **approximated)[2], share=0.9)


class Doubling(nn.Module):
    """A value that is added to itself, and multiplied with itself."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        a = self.a(x)
        return (a + a) * a


def test_a_value_may_be_read_twice(x, as_quantized):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Doubling()
    model, _, layers = as_quantized(net, x)
    assert {model.plan.layers[name].kind for name in ("a", "add", "mul")} == {"integer"}
    assert_equal(layers)


def test_weights_alone_are_integers_in_the_file_too(tiny_net, x, as_quantized):
    model, proto, _ = as_quantized(tiny_net, x, bits_activations=0, bits_weights=8)
    kinds = [node.op_type for node in proto.graph.node]
    assert "QuantizeLinear" not in kinds and kinds.count("DequantizeLinear") == 3
    assert model.plan.layers["fc"].kind == "weights only"


class Attending(nn.Module):
    """Self-attention as in a vision transformer."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.reshape(n, c * h // 8, 8 * w).permute(0, 2, 1).reshape(n, -1, 8)
        return self.head(self.layer(torch.cat([self.token.expand(n, -1, -1), x], 1))[:, 0])


def test_attention_is_written_for_any_number_of_images(x, as_quantized):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Attending()
    model, _, layers = as_quantized(net, x)
    assert_equal({name: layer for name, layer in layers.items() if "softmax" not in name}, 4, 0.85)
    assert model.plan.layers["layer.self_attn.matmul1"].kind == "integer"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits_accum": 12}, r"layer 'conv1': its sums can exceed 12 bits.*--qe-bits-accum 32"),
        (
            {"overrides": {"conv1": {"fpq_module": 16}}},
            r"layer 'conv1': runs in a float type of its own",
        ),
    ],
)
def test_what_no_operator_computes_is_refused_with_the_layer(settings, message, tiny_net, x, as_quantized):
    with pytest.raises(ConfigError, match=message):
        as_quantized(tiny_net, x, **settings)


def test_dynamic_mode_is_refused(tiny_net, x):
    config = qtool.QuantizeConfig(dynamic=True)
    model = qtool.quantize(tiny_net, None, config, example=x)
    with pytest.raises(ConfigError, match="--qe-dynamic finds them batch by batch; quantize without it"):
        qdq_model(model, (3, 8, 8))


def test_a_missing_extra_is_refused_with_the_command_that_installs_it(tiny_net, x, monkeypatch):
    model = qtool.quantize(tiny_net, qtool.calibrate(tiny_net, [x]))
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"needs onnx, which is not installed; pip install 'qtool\[onnx\]'"):
        qdq_model(model, (3, 8, 8))
