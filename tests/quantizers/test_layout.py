"""Channels last, sums without rounding, and skipped saturation change no integer."""

import copy
import types

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import qtool
from qtool.numerics.spec import QParams, QuantSpec
from qtool.quantizers.grids import Requantize, clamp_accumulator
from qtool.quantizers.layout import read_in_order
from qtool.quantizers.prepare import QuantizedModel
from qtool.quantizers.rescaling import QuantAdd
from qtool.quantizers.weighted import QuantWeighted, adds_up_products, largest_sum


def accumulate_plainly(self: QuantWeighted, x: Tensor) -> Tensor:
    """In float64, in the usual order, rounded, then the bias, then saturated."""
    accumulator = self.compute(x.double().contiguous(), self.weight.double().contiguous(), None).round_()
    if self.bias is not None:
        accumulator.add_(self.bias.double())
    return clamp_accumulator(accumulator, self.accum_bits).to(self.weight.dtype)


def plain(model: QuantizedModel) -> QuantizedModel:
    """The same network with nothing left out and nothing reordered."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, QuantWeighted):
            module.accumulate = types.MethodType(accumulate_plainly, module)
        if hasattr(module, "saturates"):
            module.saturates = True
    return other


def assert_same_integers(model: QuantizedModel, x: Tensor) -> None:
    found, wanted = model.integers(x), plain(model).integers(x)
    assert found.keys() == wanted.keys()
    for name, integers in wanted.items():
        assert torch.equal(found[name], integers), name
    assert torch.equal(model(x), plain(model)(x))


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
@pytest.mark.parametrize("accum_bits", [12, 32])
def test_tiny_networks_give_the_plain_integers(bits, accum_bits, tiny_net, tiny_batches):
    stats = qtool.calibrate(tiny_net, tiny_batches)
    for mode in ("sym", "asym_u"):
        config = qtool.QuantizeConfig(
            mode=mode,
            bits_weights=bits,
            bits_activations=bits,
            bits_accum=accum_bits,
            per_channel_weights=True,
        )
        model = qtool.quantize(tiny_net, stats, config)
        for x in tiny_batches:
            assert_same_integers(model, 3 * x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", ["resnet18", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5"]
)
def test_torchvision_networks_give_the_plain_integers(arch):
    torch.manual_seed(0)
    net = torchvision.models.get_model(arch).eval()
    x = torch.randn(2, 3, 96, 96)
    model = qtool.quantize(
        net, qtool.calibrate(net, [x]), qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True)
    )
    assert_same_integers(model, x)


class Viewing(nn.Module):
    """Reads the values of an image in their order in memory, as views do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(6 * 16, 5)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.conv(x))
        shuffled = x.view(x.size(0), 2, 3, 8, 8).transpose(1, 2).contiguous().view(x.size(0), 6, 8, 8)
        pooled = self.pool(shuffled)
        return self.fc(pooled.view(x.size(0), -1)), self.last(x)


def test_what_reads_memory_in_order_is_given_it_so():
    torch.manual_seed(0)
    net, x = Viewing().eval(), torch.randn(4, 3, 8, 8)
    model = qtool.quantize(net, qtool.calibrate(net, [x]), qtool.QuantizeConfig(mode="asym_u"))
    logits, image = model(x)
    assert torch.allclose(logits, net(x)[0], atol=0.05)
    assert image.is_contiguous() and torch.allclose(image, net(x)[1], atol=0.05)
    found, wanted = model.integers(x), plain(model).integers(x)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_values_between_convolutions_are_not_copied(tiny_net, tiny_batches):
    model = qtool.quantize(tiny_net, qtool.calibrate(tiny_net, tiny_batches))
    orders = {}
    for name in ("conv1", "depthwise", "add"):
        module = model.network.get_submodule(name)
        module.register_forward_hook(lambda _m, _a, y, name=name: orders.update({name: y.stride()}))
    model(tiny_batches[0])
    assert {strides[1] for strides in orders.values()} == {1}, orders
    copies = [node for node in model.network.graph.nodes if node.target == "contiguous"]
    assert [node.args[0].meta["op"] for node in copies] == ["dequantize"] * 2  # in front of pool and flatten
    before = len(model.network.graph.nodes)
    read_in_order(model.network)
    assert len(model.network.graph.nodes) == before


def conv_of(channels: int, largest: int, weight: int, bias: int = 0) -> QuantWeighted:
    layer = nn.Conv2d(channels, 2, 1)
    grid = QParams(torch.tensor(1.0), torch.tensor(0.0), QuantSpec())
    requantize = Requantize(grid, torch.ones(2, dtype=torch.float64))
    return QuantWeighted(
        layer,
        torch.full((2, channels, 1, 1), float(weight)),
        torch.tensor([bias, 0]),
        requantize,
        32,
        torch.float32,
        largest,
    )


def test_sums_are_exact_up_to_2_to_the_24_and_no_further():
    assert conv_of(2**9, 2**8, 2**7).exact
    assert not conv_of(2**9, 2**8, 2**7, bias=1).exact
    assert not conv_of(2**9 + 1, 2**8, -(2**7)).exact
    assert not conv_of(1, 1, 1, bias=2**31).exact and conv_of(1, 1, 1, bias=2**31).saturates
    assert not conv_of(2**9, 2**8, 2**7).saturates


def test_sums_count_the_weights_of_each_output_channel():
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1)
    assert largest_sum(weight, None, 10) == 70
    assert largest_sum(weight, torch.tensor([-50, 5]), 10) == 80


def test_nothing_is_left_out_where_a_kernel_may_transform_its_input(monkeypatch):
    assert not adds_up_products(torch.device("cuda"))
    layer = conv_of(3, 255, 1, bias=7)
    x = torch.randint(0, 256, (2, 3, 4, 4)).float()
    wanted = layer.accumulate(x)
    # A kernel that is off by a fraction, as Winograd's is.
    compute = layer.compute
    layer.compute = lambda x, weight, bias: compute(x, weight, bias) + 0.25
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(layer.accumulate(x), wanted)


@pytest.mark.skipif(not adds_up_products(torch.device("cpu")), reason="x86 with oneDNN")
@pytest.mark.parametrize("groups", [1, 4, 64])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (7, 2)])
def test_kernels_are_exact_up_to_2_to_the_24(groups, kernel, stride):
    generator = torch.Generator().manual_seed(0)
    for batch, size in ((1, 9), (4, 14), (17, 7)):
        per_sum = 64 // groups * kernel * kernel
        x = torch.randint(-255, 256, (batch, 64, size, size), generator=generator).float()
        limit = min(2**15, 2**24 // (255 * per_sum))
        weight = torch.randint(
            -limit, limit + 1, (64, 64 // groups, kernel, kernel), generator=generator
        ).float()
        settings = {"stride": stride, "padding": kernel // 2, "groups": groups}
        wanted = F.conv2d(x.double(), weight.double(), None, **settings)
        found = F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), None, **settings)
        assert torch.equal(found.double(), wanted)


def test_an_addition_leaves_its_inputs_as_they_were():
    grid = QParams(torch.tensor(0.5), torch.tensor(0.0), QuantSpec(num_bits=8))
    add = QuantAdd([grid, grid], grid, None, 32)
    a, b = torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 200.0]])
    assert add(a, b).tolist() == [[3.0, 127.0]]
    assert add(a, a).tolist() == [[2.0, -6.0]]
    assert add(a[:, :1], b).tolist() == [[3.0, 127.0]]  # broadcast
    assert a.tolist() == [[1.0, -3.0]] and b.tolist() == [[2.0, 200.0]]
    assert not add.saturates
    assert QuantAdd([grid, grid], grid, None, 8).saturates


def test_large_tensors_in_parts_give_the_plain_integers(tiny_net, tiny_batches, monkeypatch):
    stats = qtool.calibrate(tiny_net, tiny_batches)
    model = qtool.quantize(tiny_net, stats, qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True))
    x = torch.cat(tiny_batches)
    whole = model.integers(x)
    seen = []
    monkeypatch.setattr("qtool.quantizers.blocks.BLOCK", 2 * 8 * 8 * 8)
    apply = model.network.add.clamp.apply_
    monkeypatch.setattr(model.network.add.clamp, "apply_", lambda t: seen.append(len(t)) or apply(t))
    parts = model.integers(x)
    assert seen == [2] * 6
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_inputs_with_gradients_are_taken_whole(tiny_net, tiny_batches, monkeypatch):
    model = qtool.quantize(tiny_net, qtool.calibrate(tiny_net, tiny_batches))
    monkeypatch.setattr("qtool.quantizers.blocks.BLOCK", 1)
    x = tiny_batches[0]
    assert torch.equal(model(x.clone().requires_grad_()), model(x))
