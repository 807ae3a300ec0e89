"""What follows quantization: the section `conversion`."""

from __future__ import annotations

from dataclasses import dataclass

import click

from qtool.config.options import option

# The engines of torch's int8 kernels; a build of torch has some of them.
NATIVE_BACKENDS = ("x86", "fbgemm", "onednn", "qnnpack")


@dataclass(frozen=True)
class ConversionConfig:
    """Conversion to torch's int8 kernels"""

    convert_pytorch: bool = option(
        False,
        click.BOOL,
        "Convert the quantized network to torch's int8 kernels, save it as a file that loads without qtool, "
        "and evaluate it.",
        "--qe-convert-pytorch",
        "--qept",
    )
    pytorch_backend: str = option(
        "x86", click.Choice(NATIVE_BACKENDS), "Engine of the int8 kernels.", "--qe-pytorch-backend"
    )
    reduce_range: bool = option(
        False,
        click.BOOL,
        "Give 7 bits to activations where 8 could saturate on processors without VNNI; with "
        "--qe-convert-pytorch.",
        "--qe-reduce-range",
    )
