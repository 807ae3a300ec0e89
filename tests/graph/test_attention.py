"""Attention as layers: the numbers of torch's own calls, under stable names."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from qtool.graph.attention import masked_softmax, window_mask
from qtool.graph.trace import layers, trace

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(2, length, 8, generator=GENERATOR) for length in (5, 3))
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False, False, False, True, True], [False, False, True, True, True]])


class Attends(nn.Module):
    """One attention module, with the arguments of its call."""

    def __init__(self, attention: nn.Module, **arguments: object) -> None:
        super().__init__()
        self.attention = attention
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, **self.arguments)


class Crosses(Attends):
    """Queries from one sequence, keys and values from another."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, y, y, **self.arguments)


class Calls(nn.Module):
    """A function of x as a network."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def attention(**options: object) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)  # zeros would hide a bias in the wrong place
    return module


@torch.no_grad()
def assert_same(net: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> list[str]:
    """The trace gives the network's own numbers; the names of its layers."""
    traced = trace(net, inputs)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    torch.testing.assert_close(traced(*inputs), net.eval()(*inputs), atol=1e-5, rtol=0)
    return [name for name, _, _ in layers(traced)]


def test_self_attention_has_named_parts():
    names = assert_same(Attends(attention(), need_weights=False), X)
    parts = ("in_proj", "matmul1", "mul", "softmax", "matmul2", "out_proj")
    assert names == [f"attention.{part}" for part in parts]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"average_attn_weights": False},
        {"need_weights": False},
        {"attn_mask": CAUSAL, "is_causal": True},
        {"attn_mask": torch.zeros(5, 5).masked_fill(CAUSAL, -math.inf)},
        {"attn_mask": torch.randn(4, 5, 5, generator=GENERATOR)},
        {"key_padding_mask": PADDING},
        {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
    ],
    ids=str,
)
def test_self_attention_is_torchs(batch_first, bias, arguments):
    net = Attends(attention(batch_first=batch_first, bias=bias), **arguments)
    assert_same(net, X if batch_first else X.transpose(0, 1).contiguous())


def test_sequences_without_a_batch_pass():
    assert_same(Attends(attention()), X[0])
    assert_same(Attends(attention(batch_first=False)), X[0])


@pytest.mark.parametrize("widths", [{}, {"kdim": 4, "vdim": 4}])
def test_cross_attention_has_three_projections(widths):
    names = assert_same(Crosses(attention(**widths), need_weights=False), (X, Y[..., : 4 if widths else 8]))
    assert names[:3] == [f"attention.{part}_proj" for part in "qkv"]


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_what_has_no_stand_in_stays_one_layer(option):
    assert assert_same(Attends(attention(**{option: True})), X) == ["attention"]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": ~CAUSAL},
        {"attn_mask": torch.randn(5, 5, generator=GENERATOR)},
    ],
    ids=str,
)
def test_scaled_dot_product_attention_is_torchs(arguments):
    def attend(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(x, x * 2, x + 1, **arguments)

    names = assert_same(Calls(attend), X)
    assert [name for name in names if name[:-1] in ("matmul", "softma")] == ["matmul1", "softmax", "matmul2"]


def test_grouped_queries_are_torchs():
    def attend(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (4, 2)).transpose(1, 2)
        return F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True)

    assert_same(Calls(attend), X)


@pytest.mark.parametrize("cls", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize("size", [(8, 8), (6, 9), (4, 8), (4, 4)], ids=str)
@pytest.mark.parametrize("shift", [[0, 0], [2, 2]], ids=str)
def test_windows_are_torchvisions(cls, size, shift):
    torch.manual_seed(0)
    names = assert_same(cls(8, [4, 4], shift, 2), torch.randn(2, *size, 8))
    assert [name for name in names if name in ("qkv", "proj")] == ["qkv", "proj"]
    assert {"matmul1", "softmax", "matmul2"} <= set(names)


def test_window_mask_parts_the_wrapped_edges():
    # Four pixels in a row, windows of two, rolled by one: the last window holds both ends.
    mask = window_mask([1, 4], [1, 2], [0, 1])
    assert mask.tolist() == [[[False, False], [False, False]], [[False, True], [True, False]]]


def test_maxvit_attention_is_torchvisions():
    torch.manual_seed(0)
    names = assert_same(RelativePositionalMultiHeadAttention(8, 4, 9), torch.randn(2, 3, 9, 8))
    assert {"to_qkv", "einsum1", "softmax", "einsum2", "merge"} <= set(names)


def test_a_row_without_keys_is_zero():
    mask = torch.tensor([[True, True], [False, True]])
    assert masked_softmax(torch.zeros(2, 2), mask).tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_functions_of_parameters_are_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_weight = nn.Parameter(torch.randn(6, 8))
            self.conv = nn.Conv1d(5, 5, 3, padding=1)

        def forward(self, x):
            x = F.conv1d(x, self.conv.weight * 2, self.conv.bias, padding=1)
            return F.linear(x, self.in_weight)

    torch.manual_seed(0)
    traced = trace(Net(), X)
    found = [(name, type(module)) for name, _, module in layers(traced)]
    assert found == [("conv", nn.Conv1d), ("in_", nn.Linear)]


def test_products_in_one_call_are_taken_apart():
    def forward(x: Tensor) -> Tensor:
        return torch.baddbmm(x @ x.transpose(1, 2), x, x.transpose(1, 2), beta=2.0)

    assert assert_same(Calls(forward), X) == ["matmul1", "matmul2", "mul", "add"]
