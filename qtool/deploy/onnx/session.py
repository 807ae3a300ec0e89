"""An exported network in onnxruntime, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtool.deploy.onnx.extra import load_extra


class OnnxNetwork(nn.Module):
    """An ONNX model as a network: it takes and gives float tensors.

    Args:
        content: the file's.
        threads: that compute; None is as many as torch takes.
        info: what the file says of itself.

    Raises:
        ConfigError: if onnxruntime is not installed.
    """

    def __init__(
        self, content: bytes, threads: int | None = None, info: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        runtime = load_extra("onnxruntime", "onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3  # its warnings are of its own optimizations
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.info = info or {}
        self._session = session
        self._input: str = session.get_inputs()[0].name
        self._outputs: list[str] = [output.name for output in session.get_outputs()]

    def forward(self, x: Tensor) -> Any:
        """The results by name, or the only one."""
        found = self.run(x, self._outputs)
        return found[0] if len(found) == 1 else dict(zip(self._outputs, found, strict=True))

    def run(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Some of the graph's outputs."""
        found = self._session.run(list(names), {self._input: x.contiguous().numpy()})
        return [torch.from_numpy(value) for value in found]
