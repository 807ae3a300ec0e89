"""How equal an exported network is in onnxruntime, on real images, and how fast.

    QTOOL_DATA=... python benchmarks/export.py --images 1000 --networks resnet18 --bits 8,4 > out.json

Each network is quantized on 256 images of imagenet-sample (asym_u, weights sym per channel), exported, and
evaluated by qtool's simulation and by onnxruntime on the first images of imagenet-nips2017.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor, nn

import qtool
from benchmarks import networks
from qtool.deploy.onnx import NEWEST_OPSET, float_model, qdq_model, to_model
from qtool.deploy.onnx.session import OnnxNetwork
from qtool.deploy.timing import time_in_turns
from qtool.graph.fold import fold_batch_norms
from qtool.numerics.metrics import sqnr_db

# With it weights of 4 bits lie in 8, on integer kernels; newer ones have 16 bits for sums.
FOUR_BIT_OPSET = 20


def main() -> None:
    """Print a JSON list with an entry for each network and number of bits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--networks", default=",".join(networks.IMAGENET))
    parser.add_argument("--bits", default="8")
    parser.add_argument("--seconds", type=float, default=10, help="to measure the speed for")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name in asked.networks.split(","):
        subject = networks.load(name)
        stats = qtool.calibrate(subject.traced, subject.calibration)
        for bits in map(int, asked.bits.split(",")):
            found.append(measure(subject, stats, bits, asked.images, asked.seconds))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print(json.dumps(found, indent=2))


def measure(subject: networks.Subject, stats: Any, bits: int, images: int, seconds: float) -> dict[str, Any]:
    """One network at one number of bits."""
    config = qtool.QuantizeConfig(
        mode="asym_u",
        mode_weights="sym",
        per_channel_weights=True,
        bits_activations=bits,
        bits_weights=bits,
    )
    model = qtool.quantize(subject.traced, stats, config)
    shape = tuple(subject.images[0].shape[1:])
    opset = NEWEST_OPSET if bits > 4 else FOUR_BIT_OPSET
    int8 = _session(qdq_model(model, shape, opset), subject.name)
    folded = fold_batch_norms(subject.traced).traced
    in_float = _session(float_model(folded, shape), subject.name)
    batches = subject.images[: -(-images // networks.BATCH)]
    ours, theirs = _logits(model, batches)[:images], _logits(int8, batches)[:images]
    labels = subject.labels[: len(ours)]
    top1 = [100 * float((x.argmax(1) == labels).double().mean()) for x in (ours, theirs)]
    timed = time_in_turns({"float": in_float, "int8": int8}, batches[0], seconds)
    return {
        "network": subject.name,
        "bits": bits,
        "images": len(ours),
        "top1_qtool": top1[0],
        "top1_onnxruntime": top1[1],
        "agreement": 100 * float((ours.argmax(1) == theirs.argmax(1)).double().mean()),
        "logit_sqnr_db": sqnr_db(ours, theirs),
        "float_ms": timed["float"].median_ms,
        "int8_ms": timed["int8"].median_ms,
    }


def _session(written: Any, name: str) -> nn.Module:
    return OnnxNetwork(to_model(written, name).SerializeToString(), threads=1)


def _logits(network: nn.Module, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(batch) for batch in batches])


if __name__ == "__main__":
    main()
