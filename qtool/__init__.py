"""Quantize trained PyTorch networks, and see what each bit costs.

    stats = qtool.calibrate(model, batches)
    quantized = qtool.quantize(model, stats, qtool.QuantizeConfig(mode="asym_u"))
    qtool.evaluate(quantized, batches_with_labels).top1

The names below are imported when they are first used, so that `import qtool` is quick.
"""

import importlib
from typing import Any

_HOMES = {
    "QtoolError": "errors",
    "QuantizeConfig": "config",
    "load_config": "config",
    "calibrate": "pipeline.steps",
    "evaluate": "pipeline.steps",
    "load": "pipeline.steps",
    "quantize": "pipeline.steps",
    "save": "pipeline.steps",
    "compare": "report",
    "convert": "deploy.native",
    "keep_freed_memory": "memory",
    "evaluator": "deploy.engine",
    "parity": "deploy.parity",
    "read_stats": "observers.files",
    "write_stats": "observers.stats_yaml",
    "trace": "graph.trace",
    "layers": "graph.trace",
    "load_model": "models",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qtool' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qtool.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
