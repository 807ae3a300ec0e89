"""What a quantized network is evaluated on: the section `evaluation`."""

from __future__ import annotations

from dataclasses import dataclass

import click

from qtool.config.options import option

SIMULATE, INT8, AUTO = "simulate", "int8", "auto"
ENGINES = (SIMULATE, INT8, AUTO)
TORCH, ONNXRUNTIME = "torch", "onnxruntime"


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation of the quantized network"""

    engine: str = option(
        SIMULATE,
        click.Choice(ENGINES),
        "What computes the quantized network: the simulation, torch's int8 kernels on the same integers, or "
        "those where they do most of the work within the tolerance (auto).",
        "--engine",
    )
    arithmetic: str = option(
        TORCH,
        click.Choice((TORCH, ONNXRUNTIME)),
        "Whose integer kernels the simulation equals to the last bit; they round differently next to a tie. "
        "What 'qtool export' writes as ONNX gives what onnxruntime here says.",
        "--arithmetic",
    )
    compile: bool = option(
        False,
        click.BOOL,
        "Put the simulation through torch.compile, which takes a C++ compiler and a minute or more; where "
        "that fails it runs as it is.",
        "--compile",
    )
    verify: int | None = option(
        None,
        click.IntRange(min=1),
        "Compare the integers of the int8 kernels with the simulation's, layer by layer, on this many "
        "evaluation images.",
        "--verify",
        metavar="N",
        shown_default="none",
    )
