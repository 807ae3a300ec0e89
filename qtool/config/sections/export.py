"""What a network is exported to, and how its speed is measured: the sections `export` and `bench`."""

from __future__ import annotations

from dataclasses import dataclass

import click

from qtool.config.options import Counts, option

ONNX, ONNX_FLOAT, ENCODINGS, PT2E = "onnx", "onnx-float", "encodings", "pt2e"
FORMATS = (ONNX, ONNX_FLOAT, ENCODINGS, PT2E)
OLDEST_OPSET, NEWEST_OPSET = 18, 21


@dataclass(frozen=True)
class ExportConfig:
    """Export"""

    format: str = option(
        ONNX,
        click.Choice(FORMATS),
        "What to write: the quantized network as ONNX with QuantizeLinear and DequantizeLinear, the float "
        "network as ONNX, the grids as JSON, or the quantized network as a torch.export program.",
        "--format",
    )
    opset: int = option(
        NEWEST_OPSET,
        click.IntRange(OLDEST_OPSET, NEWEST_OPSET),
        "Version of ONNX's operators; before 21 there are no integers of 4 and of 16 bits.",
        "--opset",
    )
    compared_images: int | None = option(
        None,
        click.IntRange(min=1),
        "Run the file on this many evaluation images, ONNX in onnxruntime, and compare with qtool's results.",
        "--verify",
        metavar="N",
        shown_default="all if DATA is given, else none",
    )
    lower: bool = option(
        False,
        click.BOOL,
        "Compare the pt2e program as torchao lowers it to x86's int8 kernels, compiled for the batch size.",
        "--lower",
    )


@dataclass(frozen=True)
class BenchConfig:
    """Measurement of speed"""

    batch_sizes: tuple[int, ...] = option(
        (1, 32), Counts(), "Images in a batch, one or several numbers.", "--batch-sizes", shown_default="1,32"
    )
    threads: tuple[int, ...] = option(
        (1,), Counts(), "Threads that compute, one or several numbers.", "--threads", shown_default="1"
    )
    seconds: int = option(
        40, click.IntRange(1), "Time to measure for, in all; at least three rounds are made.", "--seconds"
    )
