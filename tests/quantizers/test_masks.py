"""Attention with a causal mask, however it is written, is quantized as well as without its -inf."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qtool
from qtool.quantizers.plan import DYNAMIC, FLOAT, INTEGER

LENGTH, WIDTH = 6, 16
SEEN = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
ADDED = torch.zeros(LENGTH, LENGTH).masked_fill(~SEEN, -math.inf)

WAYS = {
    "is_causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "boolean mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=SEEN),
    "float mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=ADDED),
    "masked_fill": lambda q, k, v: F.softmax(scores(q, k).masked_fill(~SEEN, -math.inf), -1) @ v,
    "masked_fill in place": lambda q, k, v: F.softmax(scores(q, k).masked_fill_(~SEEN, -math.inf), -1) @ v,
    "a large number": lambda q, k, v: F.softmax(scores(q, k).masked_fill(~SEEN, -1e9), -1) @ v,
    "where": lambda q, k, v: F.softmax(torch.where(SEEN, scores(q, k), -math.inf), -1) @ v,
    "added": lambda q, k, v: F.softmax(scores(q, k) + ADDED, -1) @ v,
    "made in forward": lambda q, k, v: F.softmax(scores(q, k) + made_in_forward(), -1) @ v,
}


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(WIDTH)


def made_in_forward() -> Tensor:
    return torch.full((LENGTH, LENGTH), -math.inf).triu(1)


class Causal(nn.Module):
    """(N, 6, 16) -> (N, 5)."""

    def __init__(self, attend, loops=False) -> None:
        super().__init__()
        self.attend = attend
        self.loops = loops
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.loops:  # torch.fx cannot follow this; torch.export can
            for _ in range(x.shape[1] - 5):
                q = q + 1
        return self.out(self.attend(q, k, v)).mean(1)


def network(way: str, loops: bool = False) -> Causal:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Causal(WAYS[way], loops).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batch() -> Tensor:
    return torch.randn(8, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def quantized(net: nn.Module, batch: Tensor, dynamic: bool, **settings):
    stats = None if dynamic else qtool.calibrate(net, [batch])
    config = qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True, dynamic=dynamic, **settings)
    return qtool.quantize(net, stats, config, example=batch)


def sqnr_db(signal: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(signal.square().sum() / (signal - found).square().sum()))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("way", WAYS)
def test_a_causal_mask_costs_no_precision(way, dynamic, batch):
    net = network(way)
    model = quantized(net, batch, dynamic)
    kinds = {name: layer.kind for name, layer in model.plan.layers.items()}
    on_integers = [name for name in kinds if name.startswith(("matmul", "qkv", "out"))]
    assert len(on_integers) == 4
    assert {kinds[name] for name in on_integers} == {DYNAMIC if dynamic else INTEGER}
    assert sqnr_db(net(batch), model(batch)) > 33  # 8 bits; a range that holds -1e9 leaves 16


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("way", ["masked_fill", "is_causal", "added"])
def test_what_is_hidden_stays_hidden(way, dynamic, batch):
    model = quantized(network(way), batch, dynamic)
    softmax = {}
    handle = model.network.get_submodule("softmax").register_forward_hook(
        lambda _m, _a, y: softmax.update(y=y)
    )
    model(batch)
    handle.remove()
    y = softmax["y"] if isinstance(softmax["y"], Tensor) else softmax["y"].centered
    assert (y[:, ~SEEN] == 0).all()
    assert (y[:, SEEN] > 0).any()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("way", ["masked_fill", "added", "is_causal"])
def test_a_network_captured_by_export_is_quantized_likewise(way, dynamic, batch):
    net = network(way, loops=True)
    assert sqnr_db(net(batch), quantized(net, batch, dynamic)(batch)) > 33


def test_the_mask_says_why_it_stays_in_float(batch):
    layer = quantized(network("masked_fill"), batch, dynamic=False).plan.layers["masked_fill"]
    assert (layer.kind, layer.note) == (FLOAT, "its values can be infinite, as those of a mask")


def test_a_saved_network_with_a_mask_gives_the_same(batch, tmp_path):
    net = network("added")
    model = quantized(net, batch, dynamic=False)
    again = qtool.load(qtool.save(model, tmp_path / "q.pth"), net, example=batch)
    assert torch.equal(model(batch), again(batch))


def test_padding_that_only_some_images_have_is_masked_too(batch):
    class Padded(Causal):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            padding = (x[..., 0] > 1.5).unsqueeze(1)
            return self.out(F.softmax(scores(q, k).masked_fill(padding, -math.inf), -1) @ v).mean(1)

    net = Padded(None).eval().requires_grad_(False)
    without = batch.clamp(max=1.0)
    assert sqnr_db(net(batch), quantized(net, torch.cat([without, batch]), dynamic=False)(batch)) > 30
