"""Every torchvision classification model through trace, calibrate, quantize and forward.

    python benchmarks/torchvision_models.py benchmarks/torchvision_models.md

Random weights, batch-norm statistics fitted on random images, the model's own input size, 8 bits
asym_u per channel. A model passes when all steps succeed and the quantized output is finite; SQNR is
of its outputs against the float network's on images that did not calibrate. Each model runs in a
process of its own, so memory is given back. Models that the file already lists are not run again.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import click
import torch
import torchvision
from torch import nn

import qtool
from qtool.numerics.metrics import sqnr_db
from qtool.quantizers.plan import FAKE, FLOAT, INTEGER
from qtool.run_dir import write_text

IMAGES = 2
HEAD = "| model | input | layers | on integers | output on a grid | float | SQNR dB | seconds |"


def fit_batch_norms(model: nn.Module, images: torch.Tensor) -> None:
    """Give batch norms the statistics that these images have."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = None  # a plain average
        norm.reset_running_stats()
        norm.train()
    model(images)
    model.eval()


@torch.no_grad()
def run(arch: str) -> str:
    """One row of the table."""
    start = time.perf_counter()
    loaded = qtool.load_model(arch)
    generator = torch.Generator().manual_seed(0)
    calibration, images = torch.randn(2, IMAGES, *loaded.input_shape, generator=generator)
    fit_batch_norms(loaded.model, calibration)
    # Transformers start with a classifier of zeros, whose output would say nothing.
    for parameter in loaded.model.parameters():
        if parameter.dim() == 2 and not parameter.any():
            parameter.normal_(std=0.02, generator=generator)
    traced = qtool.trace(loaded.model, calibration)
    stats = qtool.calibrate(traced, [calibration])
    config = qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True)
    quantized = qtool.quantize(traced, stats, config)
    output = quantized(images)
    assert output.isfinite().all(), "the quantized output is not finite"
    kinds = [layer.kind for layer in quantized.plan.layers.values()]
    size = "x".join(str(n) for n in loaded.input_shape)
    return (
        f"| {arch} | {size} | {len(kinds)} | {kinds.count(INTEGER)} | {kinds.count(FAKE)} "
        f"| {kinds.count(FLOAT)} | {sqnr_db(loaded.model(images), output):.1f} "
        f"| {time.perf_counter() - start:.0f} |"
    )


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--model", help="Print the row of this model alone.")
def main(result: Path, model: str | None) -> None:
    """Run every model that RESULT does not list as passed, and rewrite RESULT after each."""
    if model is not None:
        click.echo(run(model))
        return
    text = result.read_text() if result.exists() else ""
    rows = {m[1]: m[0] for m in re.finditer(r"^\| (\w+) \|.*\|$", text, re.M) if "FAILED" not in m[0]}
    names = torchvision.models.list_models(module=torchvision.models)
    for name in names:
        if name in rows:
            continue
        command = [sys.executable, __file__, str(result), "--model", name]
        done = subprocess.run(command, capture_output=True, text=True)
        failure = (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
        rows[name] = done.stdout.strip() if done.returncode == 0 else f"| {name} | FAILED: {failure} |"
        click.echo(rows[name], err=True)
        passed = sum("FAILED" not in row for row in rows.values())
        header = [
            "# Every torchvision classification model",
            "",
            *(line.strip() for line in (__doc__ or "").strip().splitlines()),
            "",
            f"torch {torch.__version__}, torchvision {torchvision.__version__}: "
            f"{passed} of {len(names)} pass.",
            "",
            HEAD,
            "|---|---|---|---|---|---|---|---|",
        ]
        write_text(result, "\n".join([*header, *(rows[n] for n in names if n in rows)]) + "\n")


if __name__ == "__main__":
    main()
