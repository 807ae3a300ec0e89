"""Networks in onnxruntime beside qtool's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qtool
from qtool.deploy.onnx import float_model, qdq_model, to_model
from qtool.deploy.onnx.parity import onnx_parity
from qtool.deploy.onnx.session import OnnxNetwork
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import trace

for extra in ("onnx", "onnxruntime"):
    pytest.importorskip(extra, reason="needs the extra: pip install 'qtool[onnx]'")


@pytest.fixture
def as_float() -> Callable[..., OnnxNetwork]:
    """A float network, exported and loaded."""

    def export(net: nn.Module, x: Tensor, opset: int = 21) -> OnnxNetwork:
        folded = fold_batch_norms(trace(net.eval(), x)).traced
        proto = to_model(float_model(folded, tuple(x.shape[1:]), opset), "net")
        return OnnxNetwork(proto.SerializeToString())

    return export


@pytest.fixture
def as_quantized() -> Callable[..., Any]:
    """A network, quantized on x and exported: the simulation, the model, and each layer's difference."""

    def export(net: nn.Module, x: Tensor, opset: int = 21, **settings: Any) -> tuple[Any, Any, Any]:
        stats = qtool.calibrate(net.eval(), [x])
        config = qtool.QuantizeConfig(**{"mode": "asym_u", "per_channel_weights": True, **settings})
        model = qtool.quantize(net, stats, config, example=x)
        written = qdq_model(model, tuple(x.shape[1:]), opset)
        proto = to_model(written, "net")
        with torch.no_grad():
            return model, proto, onnx_parity(model, written, proto, x)

    return export
