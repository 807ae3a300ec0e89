"""nn.Transformer and its parts as layers that torch.fx can trace.

torch's own forward asks at run time whether a fused kernel would do, which no trace can hold. These
compute the same in the plain way, on the same modules: `self_attn`, `linear1`, `norm1` and so on. A
padded position has some value here; torch's fused kernel gives zeros there, and neither is to be read.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class _Parts(nn.Module):
    """The modules and settings of another module, under the same names."""

    def __init__(self, source: nn.Module, *settings: str) -> None:
        super().__init__()
        for name, module in source.named_children():
            self.add_module(name, module)
        for name in settings:
            if name not in self._modules:  # an activation may be a function or a module
                setattr(self, name, getattr(source, name))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class TransformerEncoderLayer(_Parts):
    """What nn.TransformerEncoderLayer computes.

    Args:
        source: the module to stand in for; its modules are shared.
    """

    def __init__(self, source: nn.TransformerEncoderLayer) -> None:
        super().__init__(source, "norm_first", "activation")

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerEncoderLayer."""
        x: Any = src
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = x + self._attend(self.norm1(x), *masks)
            x = x + self._feed_forward(self.norm2(x))
        else:
            x = self.norm1(x + self._attend(x, *masks))
            x = self.norm2(x + self._feed_forward(x))
        result: Tensor = x
        return result

    def _attend(self, x: Any, mask: Any, padding: Any, is_causal: bool) -> Any:
        masks = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": is_causal}
        return self.dropout1(self.self_attn(x, x, x, need_weights=False, **masks)[0])

    def _feed_forward(self, x: Any) -> Any:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class TransformerDecoderLayer(_Parts):
    """What nn.TransformerDecoderLayer computes.

    Args:
        source: the module to stand in for; its modules are shared.
    """

    def __init__(self, source: nn.TransformerDecoderLayer) -> None:
        super().__init__(source, "norm_first", "activation")

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerDecoderLayer."""
        x: Any = tgt
        own = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
        other = {
            "attn_mask": memory_mask,
            "key_padding_mask": memory_key_padding_mask,
            "is_causal": memory_is_causal,
        }
        if self.norm_first:
            x = x + self._attend(self.norm1(x), own)
            x = x + self._read(self.norm2(x), memory, other)
            x = x + self._feed_forward(self.norm3(x))
        else:
            x = self.norm1(x + self._attend(x, own))
            x = self.norm2(x + self._read(x, memory, other))
            x = self.norm3(x + self._feed_forward(x))
        result: Tensor = x
        return result

    def _attend(self, x: Any, masks: dict[str, Any]) -> Any:
        return self.dropout1(self.self_attn(x, x, x, need_weights=False, **masks)[0])

    def _read(self, x: Any, memory: Any, masks: dict[str, Any]) -> Any:
        return self.dropout2(self.multihead_attn(x, memory, memory, need_weights=False, **masks)[0])

    def _feed_forward(self, x: Any) -> Any:
        return self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class TransformerEncoder(_Parts):
    """What nn.TransformerEncoder computes.

    Args:
        source: the module to stand in for; its modules are shared.
    """

    def __init__(self, source: nn.TransformerEncoder) -> None:
        super().__init__(source, "norm")

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As nn.TransformerEncoder."""
        x: Any = src
        masks = {"src_mask": mask, "src_key_padding_mask": src_key_padding_mask}
        for layer in self.layers:
            x = layer(x, is_causal=bool(is_causal), **masks)
        result: Tensor = x if self.norm is None else self.norm(x)
        return result


class TransformerDecoder(_Parts):
    """What nn.TransformerDecoder computes.

    Args:
        source: the module to stand in for; its modules are shared.
    """

    def __init__(self, source: nn.TransformerDecoder) -> None:
        super().__init__(source, "norm")

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerDecoder."""
        x: Any = tgt
        masks = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
        }
        for layer in self.layers:
            causal = {"tgt_is_causal": bool(tgt_is_causal), "memory_is_causal": memory_is_causal}
            x = layer(x, memory, **masks, **causal)
        result: Tensor = x if self.norm is None else self.norm(x)
        return result


class Transformer(_Parts):
    """What nn.Transformer computes.

    Args:
        source: the module to stand in for; its modules are shared.
    """

    def __init__(self, source: nn.Transformer) -> None:
        super().__init__(source)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As nn.Transformer."""
        memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
        paddings = (tgt_key_padding_mask, memory_key_padding_mask)
        causal = (tgt_is_causal, memory_is_causal)
        result: Tensor = self.decoder(tgt, memory, tgt_mask, memory_mask, *paddings, *causal)
        return result
