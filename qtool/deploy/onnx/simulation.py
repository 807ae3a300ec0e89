"""The simulation in onnxruntime's arithmetic: what its integer kernels give, last bits included.

qtool's simulation rounds as torch's int8 kernels do. Next to a tie, onnxruntime's give the other neighbour
now and then, a few in a million; layer after layer these move others, up to a few steps of the logits.

| | torch's kernels | onnxruntime's |
|---|---|---|
| the bias | is added to what the accumulator stands for in steps of the output | to the accumulator |
| the ratio of scales | exact, rounded once to float32 | input times weight, by output, each rounded |
| the zero point | is added before rounding | after it |
| a sum rounded once | adds both products, each rounded | is two fused multiply-adds |
"""

from __future__ import annotations

import copy

from torch import Tensor, fx, nn

from qtool.errors import ConfigError
from qtool.graph.trace import layers
from qtool.numerics.spec import QParams
from qtool.quantizers.modules import QuantProduct
from qtool.quantizers.plan import LayerPlan
from qtool.quantizers.plan.derived import NodeGrids, grids_read, value_grids
from qtool.quantizers.prepare import QuantizedModel
from qtool.quantizers.rescaling import QuantAddOnce
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
    grids = value_grids(copied.network, copied.plan.layers)
    for _, node, module in layers(copied.network):
        if isinstance(module, QuantAddOnce):
            _replace_sum(copied, node, module, grids)
    return copied


class KernelSum(nn.Module):
    """The sum of two tensors of 8 bits as onnxruntime's kernel computes it, in float32.

    Args:
        module: the sum as qtool computes it.
        inputs: the two grids, in order.
        output: that of the sum.
    """

    def __init__(self, module: QuantAddOnce, inputs: list[QParams], output: QParams) -> None:
        super().__init__()
        self.clamp = module.clamp
        self.zero_points = [float(grid.zero_point) for grid in inputs]
        self.output_zero_point = float(output.zero_point)
        ratios = [grid.scale.float() / output.scale.float() for grid in inputs]
        a, b = (ratio * z for ratio, z in zip(ratios, self.zero_points, strict=True))
        self.ratios = [float(ratio) for ratio in ratios]
        # What both zero points come to is one number, rounded to float32.
        self.constant = float(self.output_zero_point - (a + b))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Centered integers of the sum, from those of what is added."""
        # In float64 the products are exact, so that each sum is rounded once, as a fused multiply-add is.
        total = ((b.double() + self.zero_points[1]) * self.ratios[1] + self.constant).float()
        total = ((a.double() + self.zero_points[0]) * self.ratios[0] + total).float()
        return self.clamp.apply_(total.round_().sub_(self.output_zero_point))


def _replace_sum(model: QuantizedModel, node: fx.Node, module: QuantAddOnce, grids: NodeGrids) -> None:
    """Give a network onnxruntime's sum of two tensors, where that has a kernel for these."""
    plan = model.plan.layers[node.meta["layer"]]
    read = grids_read(node, plan, grids)
    known = [grid for grid in (*read, plan.output) if grid is not None and grid.spec.num_bits <= KERNEL_BITS]
    one_sign = len({grid.spec.quant_min < 0 for grid in known}) == 1
    if (
        len(read) == 2
        and len(known) == 3
        and one_sign
        and plan.everywhere_bits is None
        and not module.saturates
    ):
        *inputs, output = known
        model.network.set_submodule(str(node.target), KernelSum(module, inputs, output).eval())


def _on_kernel(plan: LayerPlan) -> bool:
    if plan.output is None or plan.accum_scale is None or plan.scale_approx_bits is not None:
        return False
    grids = [plan.output, *([] if plan.weight is None else [plan.weight])]
    return all(grid.spec.num_bits <= KERNEL_BITS for grid in grids)
