"""Every operation in float that is written as ONNX, by what it computes."""

from qtool.deploy.onnx.activations import ACTIVATIONS
from qtool.deploy.onnx.arithmetic import ARITHMETIC
from qtool.deploy.onnx.pooling import POOLING
from qtool.deploy.onnx.site import Rule
from qtool.deploy.onnx.weighted import write_float

FLOAT_RULES: dict[str, Rule] = {
    **ACTIVATIONS,
    **ARITHMETIC,
    **POOLING,
    **dict.fromkeys(("conv", "conv_transpose", "linear"), write_float),
}
