"""nn.Transformer and its parts as layers: the same numbers, with and without masks, and named parts."""

import itertools
import warnings

import pytest
import torch
from torch import nn

from qtool.graph.macs import count_macs
from qtool.graph.trace import layers, trace

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])
MASKS = {
    "none": {},
    "causal": {"mask": CAUSAL},
    "boolean": {"mask": CAUSAL.isinf()},
    "padding": {"src_key_padding_mask": PADDING},
    "both": {"mask": CAUSAL.isinf(), "src_key_padding_mask": PADDING},
}


def encoder(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a fused kernel does not apply
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **settings)
        return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16)).eval()


@pytest.mark.parametrize("norm_first, activation", [*itertools.product([False, True], ["relu", "gelu"])])
@pytest.mark.parametrize("masks", MASKS)
def test_an_encoder_gives_the_same(norm_first, activation, masks):
    net = encoder(norm_first=norm_first, activation=activation)
    traced = trace(net, {"src": X, **MASKS[masks]})
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        found, expected = traced(src=x, **MASKS[masks]), net(x, **MASKS[masks])
    seen = ~PADDING if "src_key_padding_mask" in MASKS[masks] else torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=0)


def test_its_parts_have_names():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation=nn.GELU())
    attention = ["in_proj", "matmul1", "mul", "softmax", "matmul2", "out_proj"]
    expected = [f"self_attn.{part}" for part in attention]
    expected += ["add1", "norm1", "linear1", "activation", "linear2", "add2", "norm2"]
    assert [name for name, _, _ in layers(trace(layer, X))] == expected


def test_sequences_of_another_length_pass():
    net = encoder()
    traced = trace(net, X)
    x = torch.randn(3, 9, 16)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), net(x), atol=1e-5, rtol=0)


def test_the_whole_transformer_gives_the_same():
    torch.manual_seed(0)
    net = nn.Transformer(16, 4, 2, 2, 32, batch_first=True).eval()
    target = torch.randn(2, 3, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    example = {"src": X, "tgt": target, "tgt_mask": mask}
    traced = trace(net, example)
    with torch.no_grad():
        torch.testing.assert_close(traced(**example), net(**example), atol=1e-5, rtol=0)
    names = [name for name, _, _ in layers(traced)]
    assert {"encoder.layers.1.linear2", "decoder.layers.0.multihead_attn.q_proj"} <= set(names)


def test_a_decoder_normalizes_first_when_told_to():
    torch.manual_seed(0)
    net = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True, norm_first=True), 2)
    example = (torch.randn(2, 3, 16), X)
    with torch.no_grad():
        torch.testing.assert_close(trace(net, example)(*example), net.eval()(*example), atol=1e-5, rtol=0)


def test_all_of_its_matrices_are_counted():
    counts = count_macs(trace(encoder(), X))
    linear = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32)
    assert sum(work.count for work in counts.values()) == linear + 2 * 2 * 5 * 5 * 16
    assert all(work.known for work in counts.values())
