"""How equal exported networks are where they run, on real images, and how fast.

    QTOOL_DATA=path/to/data PYTHONPATH=. python benchmarks/export.py benchmarks/export.md
    ... benchmarks/export.md --only 'onnx/resnet18/8' --only 'pt2e/*'

Each network is quantized on 256 images of imagenet-sample (asym_u, weights sym per channel), exported, and
evaluated on the first images of imagenet-nips2017: by qtool's simulation, for ONNX with --arithmetic
onnxruntime, and as ONNX by onnxruntime or as a torch.export program, which torch computes in float and rounds
where its quantizers stand. `ulp` is the simulation against itself with the results of every softmax larger by
one unit in the last place of float32, which shows what a network makes of such differences. vit_b_16 has
random weights, so its top-1 says nothing; it is calibrated on 16 images. Its residual stream stays in float
(--qe-add-rounding none, --qe-float-output) and its ranges are those of --qe-clip-acts mse, as sums that are
rounded in all blocks turn differences of one unit in the last place into others of the logits.
Times are of one thread and batches of 32, in turns with onnxruntime's float network.

What has been measured lies beside RESULT in a JSON file, a row for each name; it is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import qtool
from benchmarks import networks
from qtool.deploy.onnx import NEWEST_OPSET, float_model, qdq_model, to_model
from qtool.deploy.onnx.session import OnnxNetwork
from qtool.deploy.onnx.simulation import simulation
from qtool.deploy.pt2e import reference, to_program
from qtool.deploy.timing import time_in_turns
from qtool.graph.fold import fold_batch_norms
from qtool.numerics.metrics import sqnr_db
from qtool.quantizers.modules import FakeQuantize
from qtool.run_dir import write_text

# With it weights of 4 bits lie in 8, on integer kernels; newer ones have 16 bits for sums.
FOUR_BIT_OPSET = 20
RANDOM = "vit_b_16"
OF_RANDOM: dict[str, Any] = {"add_rounding": "none", "float_output": True, "clip_activations": "mse"}
NAMES = [f"onnx/{n}/{bits}" for n in networks.IMAGENET for bits in (8, 4)]
NAMES += [f"onnx/{RANDOM}/8", f"ulp/{RANDOM}/8"]
NAMES += [f"pt2e/{n}/8" for n in networks.IMAGENET]
HEAD = (
    "| format | network | bits | images | top-1 qtool | top-1 there | agreement, % | SQNR of the logits, dB "
    "| the simulation's from the float network, dB | ms an image there | onnxruntime float | ratio |"
)


def main() -> None:
    """Write a table to RESULT."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--only", action="append", help="rows by pattern, such as 'onnx/*/8'")
    parser.add_argument("--seconds", type=float, default=10, help="to measure the speed for")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    qtool.keep_freed_memory()
    store = asked.result.with_suffix(".json")
    rows = json.loads(store.read_text()) if store.is_file() else {}
    wanted = [n for n in NAMES if not asked.only or any(fnmatch.fnmatch(n, p) for p in asked.only)]
    wanted = [name for name in wanted if asked.again or name not in rows]
    for network in dict.fromkeys(name.split("/")[1] for name in wanted):
        subject = load(network)
        stats = qtool.calibrate(subject.traced, subject.calibration)
        for name in (n for n in wanted if n.split("/")[1] == network):
            rows[name] = measure(subject, stats, name, asked.images, asked.seconds)
            print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
            write_text(store, json.dumps(rows, indent=1) + "\n")
            write_text(asked.result, text_of(rows))
    if not wanted:
        write_text(asked.result, text_of(rows))


def load(name: str) -> networks.Subject:
    """A network with its images; one with random weights has those of resnet18."""
    if name != RANDOM:
        return networks.load(name)
    subject = networks.load("resnet18")
    torch.manual_seed(0)
    net: Any = torchvision.models.get_model(name, weights=None).eval()
    nn.init.normal_(net.heads.head.weight, std=0.02)  # zeros otherwise, and so all logits
    some = [subject.calibration[0][:16]]
    return replace(subject, name=name, traced=qtool.trace(net, some[0][:2]), calibration=some)


def measure(subject: networks.Subject, stats: Any, name: str, images: int, seconds: float) -> dict[str, Any]:
    """One network in one format at one number of bits."""
    form, _, bits_text = name.split("/")
    bits = int(bits_text)
    config = qtool.QuantizeConfig(
        mode="asym_u",
        mode_weights="sym",
        per_channel_weights=True,
        bits_activations=bits,
        bits_weights=bits,
        **OF_RANDOM if subject.name == RANDOM else {},
    )
    model = qtool.quantize(subject.traced, stats, config)
    if form == "onnx":
        model = simulation(model)
    shape = tuple(subject.images[0].shape[1:])
    folded = fold_batch_norms(subject.traced).traced
    in_float = _session(float_model(folded, shape), subject.name)
    there = _exported(model, form, shape, bits, subject)
    batches = subject.images[: -(-images // networks.BATCH)]
    ours, theirs = _logits(model, batches)[:images], _logits(there, batches)[:images]
    floats = _logits(in_float, batches[:2])
    labels = subject.labels[: len(ours)]
    top1 = [100 * float((x.argmax(1) == labels).double().mean()) for x in (ours, theirs)]
    timed = time_in_turns({"float": in_float, "there": there}, batches[0], seconds)
    return {
        "images": len(ours),
        "top1_qtool": top1[0],
        "top1_there": top1[1],
        "agreement": 100 * float((ours.argmax(1) == theirs.argmax(1)).double().mean()),
        "logit_sqnr_db": sqnr_db(ours, theirs),
        "quantization_sqnr_db": sqnr_db(floats, ours[: len(floats)]),
        "float_ms": timed["float"].median_ms / len(batches[0]),
        "there_ms": timed["there"].median_ms / len(batches[0]),
    }


def _exported(
    model: Any, form: str, shape: tuple[int, ...], bits: int, subject: networks.Subject
) -> nn.Module:
    if form == "ulp":
        return _perturbed(model)
    if form == "pt2e":
        program: nn.Module = to_program(reference(model), subject.images[0][:2]).module()
        return program
    return _session(qdq_model(model, shape, NEWEST_OPSET if bits > 4 else FOUR_BIT_OPSET), subject.name)


def _perturbed(model: Any) -> nn.Module:
    """A copy of a simulation whose softmaxes give values that are larger by one unit in the last place."""
    network = copy.deepcopy(model)
    for name, module in network.network.named_modules():
        if isinstance(module, FakeQuantize) and network.plan.layers[name].op == "softmax":
            module.operation = NextFloat(module.operation)
    return network  # type: ignore[no-any-return]


class NextFloat(nn.Module):
    """An operation whose results are the next larger float32."""

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = self.operation(*args, **kwargs)
        return torch.nextafter(x, torch.full_like(x, torch.inf))


def _session(written: Any, name: str) -> nn.Module:
    return OnnxNetwork(to_model(written, name).SerializeToString(), threads=1)


def _logits(network: nn.Module, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(batch) for batch in batches])


def text_of(rows: dict[str, Any]) -> str:
    """The table."""
    lines = ["# Exported networks", "", *[line.strip() for line in (__doc__ or "").strip().splitlines()]]
    lines += ["", f"torch {torch.__version__}", "", HEAD, "|---" * 12 + "|"]
    for name in (n for n in NAMES if n in rows):
        row, (form, network, bits) = rows[name], name.split("/")
        lines.append(
            f"| {form} | {network} | W{bits}A{bits} | {row['images']} | {row['top1_qtool']:.1f} "
            f"| {row['top1_there']:.1f} | {row['agreement']:.1f} | {row['logit_sqnr_db']:.1f} "
            f"| {row['quantization_sqnr_db']:.1f} | {row['there_ms']:.2f} | {row['float_ms']:.2f} "
            f"| {row['there_ms'] / row['float_ms']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
