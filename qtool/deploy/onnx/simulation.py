"""The simulation in onnxruntime's arithmetic: what its integer kernels give, last bits included.

qtool's simulation rounds as torch's int8 kernels do. Next to a tie, onnxruntime's give the other neighbour
now and then, a few in a million; layer after layer these move others, up to a few steps of the logits.

| | torch's kernels | onnxruntime's |
|---|---|---|
| the bias | is added to what the accumulator stands for in steps of the output | to the accumulator |
| the ratio of scales | exact, rounded once to float32 | input times weight, by output, each rounded |
| the zero point | is added before rounding | after it |
"""

from __future__ import annotations

import copy

from qtool.errors import ConfigError
from qtool.quantizers.modules import QuantProduct
from qtool.quantizers.plan import LayerPlan
from qtool.quantizers.prepare import QuantizedModel
from qtool.quantizers.weighted import QuantWeighted

# Integer kernels are of 8 bits; wider layers run in float there.
KERNEL_BITS = 8


def simulation(model: QuantizedModel) -> QuantizedModel:
    """A copy of a simulated network that rounds as onnxruntime does.

    Layers with an approximated ratio, and those of more than 8 bits, stay as they are.

    Raises:
        ConfigError: if the network is dynamic: it has no form in ONNX that qtool writes.
    """
    if model.plan.dynamic:
        raise ConfigError(
            "onnxruntime's arithmetic is that of grids known beforehand, and --qe-dynamic finds them batch "
            "by batch; leave out one of the two"
        )
    copied = copy.deepcopy(model)
    for name, plan in copied.plan.layers.items():
        if not _on_kernel(plan):
            continue
        module = copied.network.get_submodule(name)
        if isinstance(module, QuantWeighted):
            module.bias_in_sums = True
        elif not isinstance(module, QuantProduct):
            continue
        assert plan.output is not None and plan.accum_scale is not None
        requantize = module.requantize
        requantize.offset = 0.0
        ratio = plan.accum_scale.float() / plan.output.scale.float()
        requantize.ratio = ratio.expand(requantize.ratio.numel()).reshape(requantize.ratio.shape).clone()
    return copied


def _on_kernel(plan: LayerPlan) -> bool:
    if plan.output is None or plan.accum_scale is None or plan.scale_approx_bits is not None:
        return False
    grids = [plan.output, *([] if plan.weight is None else [plan.weight])]
    return all(grid.spec.num_bits <= KERNEL_BITS for grid in grids)
