"""Attention as layers that torch.fx can trace: linear layers, two matmuls and a softmax.

torch computes each of these in one opaque call. The forms here give the same numbers, up to the
order of the additions, and every step has a name: `in_proj`, `matmul1`, `softmax`, `matmul2`,
`out_proj`. The factor in front of the softmax is a layer `mul`; a mask is part of the softmax, as
its -inf and -100 would leave no integers for the scores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOG_LARGEST_COSINE_SCALE = math.log(100.0)


def masked_softmax(
    scores: Tensor,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """The softmax over the last axis, some of its inputs left out.

    Args:
        scores: (..., L, S), a row for each query.
        mask: added to scores, or a boolean that is True where a key is left out; broadcast to scores,
            or (N * heads, L, S) for scores of (N, heads, L, S).
        key_padding_mask: like mask, (N, S) for scores of (N, heads, L, S).
        is_causal: whether query i sees keys 0 to i only.

    Returns:
        The shape of scores; a row whose keys are all left out is 0.
    """
    if torch.overrides.has_torch_function_unary(scores):
        result: Tensor = torch.overrides.handle_torch_function(
            masked_softmax, (scores,), scores, mask, key_padding_mask, is_causal
        )
        return result
    if mask is not None:
        scores = _masked(scores, mask.view_as(scores) if _is_per_head(mask, scores) else mask)
    if key_padding_mask is not None:
        scores = _masked(scores, key_padding_mask.unsqueeze(-2).unsqueeze(-2))
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ones.triu(1), -math.inf)
    nothing = scores.isneginf().all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(nothing, 0.0)


def _is_per_head(mask: Tensor, scores: Tensor) -> bool:
    return mask.dim() == 3 and scores.dim() == 4 and mask.shape[0] == scores.shape[0] * scores.shape[1]


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask


class MultiheadAttention(nn.Module):
    """What nn.MultiheadAttention computes, made of layers.

    Self-attention has one layer `in_proj` for query, key and value; otherwise they have layers
    `q_proj`, `k_proj` and `v_proj`.

    Args:
        source: the module to stand in for, without bias_k, bias_v and add_zero_attn; its parameters
            are shared.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = source.num_heads, source.head_dim
        self.sequence_axis = -3 if source.batch_first else 0  # once the heads have an axis
        self.in_proj: nn.Linear | None = None
        bias = source.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        if source.in_proj_weight is not None:
            self.in_proj = linear(source.in_proj_weight, bias)
            weights = source.in_proj_weight.chunk(3)
        else:
            weights = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        self.q_proj, self.k_proj, self.v_proj = (linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = source.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention; is_causal without a mask makes one."""
        if query is key and key is value and self.in_proj is not None:
            q, k, v = self.in_proj(query).chunk(3, -1)
        else:
            q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (self._split_heads(x) for x in (q, k, v))  # (N, heads, L, head_dim)
        is_causal = is_causal and attn_mask is None
        scores = torch.matmul(q, k.transpose(-2, -1)) * self.head_dim**-0.5
        weights = _softmax(scores, attn_mask, key_padding_mask, is_causal)
        mixed = torch.matmul(weights, v).movedim(-2, self.sequence_axis).flatten(-2)
        output = self.out_proj(mixed)
        if not need_weights:
            return output, None
        return output, weights.mean(-3) if average_attn_weights else weights

    def _split_heads(self, x: Tensor) -> Tensor:
        heads: Any = x
        split: Tensor = heads.unflatten(-1, (self.num_heads, self.head_dim)).movedim(self.sequence_axis, -2)
        return split


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of given parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _softmax(scores: Tensor, *masks: Any) -> Tensor:
    return (
        masked_softmax(scores, *masks)
        if any(m is not None and m is not False for m in masks)
        else (torch.softmax(scores, -1))
    )


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """F.scaled_dot_product_attention of traced values as layers; dropout is that of evaluation: none."""
    if scale is None:
        scale = shape_of(query)[-1] ** -0.5
    if enable_gqa:
        repeats = shape_of(query)[-3] // shape_of(key)[-3]
        key, value = (x.repeat_interleave(repeats, -3) for x in (key, value))
    if attn_mask is not None and attn_mask.node.meta["value"].dtype == torch.bool:
        attn_mask = ~attn_mask  # there, True keeps a key
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    return torch.matmul(_softmax(scores, attn_mask, None, is_causal), value)


def shape_of(x: Any) -> tuple[int, ...]:
    """The shape of a traced value on the example."""
    return tuple(x.node.meta["value"].shape)


def shifted_window_attention(
    x: Any,
    qkv_weight: Any,
    proj_weight: Any,
    relative_position_bias: Any,
    window_size: list[int],
    num_heads: int,
    shift_size: list[int],
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    qkv_bias: Any = None,
    proj_bias: Any = None,
    logit_scale: Any = None,
    training: bool = False,
) -> Any:
    """Swin's attention in windows, of traced values, as layers.

    Reference:
        Liu et al. 2021, arXiv:2103.14030, section 3.2; with logit_scale, the cosine attention of
        Liu et al. 2022, arXiv:2111.09883, section 3.2.
    """
    size = shape_of(x)[1:3]
    padded = [-(-n // w) * w for n, w in zip(size, window_size, strict=True)]
    shift = [s if w < n else 0 for s, w, n in zip(shift_size, window_size, padded, strict=True)]
    windows = [n // w for n, w in zip(padded, window_size, strict=True)]
    y: Any = x
    if padded != list(size):
        y = F.pad(y, (0, 0, 0, padded[1] - size[1], 0, padded[0] - size[0]))
    if any(shift):
        y = torch.roll(y, (-shift[0], -shift[1]), (1, 2))
    y = y.unflatten(2, (windows[1], window_size[1])).unflatten(1, (windows[0], window_size[0]))
    y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (N, windows, L, C)
    if logit_scale is not None and qkv_bias is not None:
        q_bias, _, v_bias = qkv_bias.chunk(3)  # keys have no bias there
        qkv_bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    y = F.linear(y, qkv_weight, qkv_bias)
    y = y.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (3, N, windows, heads, L, head_dim)
    q, k, v = y.unbind(0)
    if logit_scale is not None:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scale: Any = logit_scale.clamp(max=LOG_LARGEST_COSINE_SCALE).exp()
    else:
        scale = (shape_of(x)[-1] // num_heads) ** -0.5
    scores = torch.matmul(q, k.transpose(-2, -1)) * scale + relative_position_bias
    mask = window_mask(padded, window_size, shift) if any(shift) else None
    y = torch.matmul(_softmax(scores, None if mask is None else mask.unsqueeze(1)), v)
    y = F.linear(y.transpose(2, 3).flatten(3), proj_weight, proj_bias)
    y = y.unflatten(2, (window_size[0], window_size[1])).unflatten(1, (windows[0], windows[1]))
    y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (N, H, W, C)
    if any(shift):
        y = torch.roll(y, (shift[0], shift[1]), (1, 2))
    return y if padded == list(size) else y[:, : size[0], : size[1]]


def window_mask(size: list[int], window: list[int], shift: list[int]) -> Tensor:
    """Which pairs of a window are no neighbours in the image, True for those: (windows, L, L).

    Args:
        size: of the image, a multiple of the window.
        window: height and width of a window.
        shift: how far the image was rolled, less than the window.
    """
    parts = []
    for axis in (0, 1):
        n = torch.arange(size[axis])
        parts.append((n >= size[axis] - window[axis]).long() + (n >= size[axis] - shift[axis]).long())
    region: Any = 3 * parts[0].unsqueeze(1) + parts[1]  # (H, W)
    region = region.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0]))
    region = region.transpose(1, 2).flatten(2).flatten(0, 1)  # (windows, L)
    apart: Tensor = region.unsqueeze(1) != region.unsqueeze(2)
    return apart
