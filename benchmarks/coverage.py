"""How much of the work of torchvision's networks runs on integers, and how close the logits stay.

    python benchmarks/coverage.py benchmarks/coverage.md

Static quantization, 8 bits, asym_u, weights per channel. The weights are random; what a trained network
never has is repaired first: batch norms get the statistics of random images, and parameters that start
as nothing (class tokens, heads and positions of zeros; layer scales of 1e-6) get the size of trained
ones. SQNR is of the logits against the float network's, on images of noise that did not calibrate: with
everything quantized, and with residual additions in float (`--qe-no-quant-layers '.*add.*'`), as peers leave
them. Each network runs in a process of its own.

googlenet at random weights multiplies noise: rounding the output of its first pooling alone to 8 bits
ends 20 dB below the logits. Other ranges (mse, percentile, avg), common grids for the inputs of a
concatenation and more calibration images change its figure by less than a dB; photographs in place of
noise bring it to 18. Its 8-bit weights alone leave 25 dB. The cause is batch norm in an untrained network:
by taking away the mean behind each ReLU it multiplies the share of noise by pi / (pi - 1), 1.7 dB a
layer (Yang et al. 2019, arXiv:1902.08129), and googlenet stacks 21 of them without a way around.
"""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
import torchvision
from torch import nn
from torchvision_models import fit_batch_norms

import qtool
from qtool.graph.trace import layers
from qtool.numerics.metrics import sqnr_db
from qtool.pipeline.coverage import coverage
from qtool.pipeline.steps import specs_for
from qtool.run_dir import write_text

MODELS = (
    *("vit_b_16", "swin_t", "convnext_tiny", "efficientnet_b0", "mobilenet_v3_small", "densenet121"),
    *("googlenet", "shufflenet_v2_x1_0", "regnet_y_400mf"),
)
CALIBRATION, EVALUATION = 16, 8
# Class tokens and positions of trained transformers are about as large as their patch embeddings.
TOKEN_STD = 0.5
HEAD_STD = 0.02
# A trained ConvNeXt's layer scales lie between 0.01 and 1.
LAYER_SCALE = 0.1


def give_trained_sizes(model: nn.Module, generator: torch.Generator) -> None:
    """Parameters that start as nothing get the size of trained ones."""
    for name, parameter in model.named_parameters():
        if name.endswith(("class_token", "pos_embedding")):
            parameter.normal_(std=TOKEN_STD, generator=generator)
        elif name.endswith("layer_scale"):
            parameter.fill_(LAYER_SCALE)
        elif parameter.dim() == 2 and not parameter.any():
            parameter.normal_(std=HEAD_STD, generator=generator)


@torch.no_grad()
def run(arch: str) -> str:
    """One row of the table."""
    start = time.perf_counter()
    torch.manual_seed(0)
    loaded = qtool.load_model(arch)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(CALIBRATION + EVALUATION, *loaded.input_shape, generator=generator)
    calibration, images = noise.split([CALIBRATION, EVALUATION])
    fit_batch_norms(loaded.model, calibration)
    give_trained_sizes(loaded.model, generator)
    traced = qtool.trace(loaded.model, calibration[:2])
    config = qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True)
    covered = coverage(traced, specs_for(traced, config))
    stats, logits = qtool.calibrate(traced, [calibration]), loaded.model(images)
    whole = sqnr_db(logits, qtool.quantize(traced, stats, config)(images))
    adds = "-"
    if any(node.meta["op"] == "add" for _, node, _ in layers(traced)):
        left = replace(config, overrides={".*add.*": {"bits_activations": 0}})
        adds = f"{sqnr_db(logits, qtool.quantize(traced, stats, left)(images)):.1f}"
    return (
        f"| {arch} | {covered.total / 1e9:.2f} | {covered.percent:.2f} | {len(covered.left)} "
        f"| {whole:.1f} | {adds} | {time.perf_counter() - start:.0f} |"
    )


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--model", help="Print the row of this network alone.")
def main(result: Path, model: str | None) -> None:
    """Write the table of all networks to RESULT."""
    if model is not None:
        click.echo(run(model))
        return
    rows = []
    for name in MODELS:
        command = [sys.executable, __file__, str(result), "--model", name]
        done = subprocess.run(command, capture_output=True, text=True)
        failure = (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
        rows.append(done.stdout.strip() if done.returncode == 0 else f"| {name} | FAILED: {failure} |")
        click.echo(rows[-1], err=True)
        lines = [
            "# Coverage of multiply-accumulates (MACs)",
            "",
            *(line.strip() for line in (__doc__ or "").strip().splitlines()),
            "",
            f"torch {torch.__version__}, torchvision {torchvision.__version__}.",
            "",
            "| network | 10^9 MACs | % on integers | left out | logits dB | adds in float dB | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        write_text(result, "\n".join([*lines, *rows]) + "\n")


if __name__ == "__main__":
    main()
