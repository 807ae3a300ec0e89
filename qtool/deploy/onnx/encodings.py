"""The grids of a quantized network as JSON, in the layout of AIMET's encodings, version 0.6.1.

Each tensor has a list of grids, one for each of its channels or one alone:

    bitwidth, dtype       "int"
    scale, offset         x = (n + offset) * scale, n from 0 to 2^bitwidth - 1
    min, max              the smallest and largest value
    is_symmetric          "True" or "False"

and, which that layout lacks, `zero_point` and `signed` as qtool has them: offset = quant_min - zero_point.
Activations are named as in the ONNX file of the float network, parameters as in the network itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import ConfigError
from qtool.graph.trace import tensor_inputs
from qtool.numerics.spec import QParams
from qtool.quantizers.grids import Quantize
from qtool.quantizers.prepare import QuantizedModel

VERSION = "0.6.1"


def encodings(model: QuantizedModel) -> dict[str, Any]:
    """All grids of a quantized network.

    Args:
        model: quantized with static ranges.

    Raises:
        ConfigError: if its grids are found at run time.
    """
    if model.plan.dynamic:
        raise ConfigError(
            "--format encodings: --qe-dynamic finds grids batch by batch, and there are none to write; "
            "quantize without it"
        )
    layers = model.plan.layers
    activations = _borders(model)
    activations |= {name: layer.output for name, layer in layers.items() if layer.output is not None}
    weights = {f"{name}.weight": layer.weight for name, layer in layers.items() if layer.weight is not None}
    return {
        "version": VERSION,
        "activation_encodings": _entries(activations),
        "param_encodings": _entries(weights),
    }


def _borders(model: QuantizedModel) -> dict[str, QParams]:
    """The grids on which float values are put, by the name of what gives them."""
    modules = dict(model.network.named_modules())
    found = {}
    for node in model.network.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Quantize):
            (source,) = tensor_inputs(node)
            is_named = source.op in ("placeholder", "get_attr")
            found[source.meta.get("layer", str(source.target) if is_named else source.name)] = module.qparams
    return found


def _entries(grids: Mapping[str, QParams]) -> dict[str, list[dict[str, Any]]]:
    return {name: _grids(grid) for name, grid in grids.items()}


def _grids(grid: QParams) -> list[dict[str, Any]]:
    """One entry for each channel, or one."""
    spec = grid.spec
    pairs = zip(grid.scale.flatten().tolist(), grid.zero_point.flatten().tolist(), strict=True)
    return [
        {
            "bitwidth": spec.num_bits,
            "dtype": "int",
            "is_symmetric": str(spec.symmetric),
            "max": (spec.quant_max - zero_point) * scale,
            "min": (spec.quant_min - zero_point) * scale,
            "offset": int(spec.quant_min - zero_point),
            "scale": scale,
            "signed": spec.signed,
            "zero_point": int(zero_point),
        }
        for scale, zero_point in pairs
    ]
