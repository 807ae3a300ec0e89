"""Which settings of the evaluation of a quantized network fit together."""

from __future__ import annotations

from qtool.config.sections import Config
from qtool.config.sections.evaluation import AUTO, INT8, ONNXRUNTIME, SIMULATE
from qtool.errors import ConfigError


def check_evaluation(config: Config) -> None:
    """Refuse an engine that cannot be had, and a comparison with nothing to compare.

    Raises:
        ConfigError: naming the flag.
    """
    engine, converts = config.evaluation.engine, config.conversion.convert_pytorch
    if engine != SIMULATE and converts:
        raise ConfigError(
            f"--engine {engine}: --qe-convert-pytorch evaluates int8 kernels beside the simulation; leave "
            "one of the two out"
        )
    if config.evaluation.arithmetic == ONNXRUNTIME:
        _check_onnxruntime(config)
    if config.evaluation.verify is not None and engine == SIMULATE and not converts:
        raise ConfigError(
            "--verify: compares int8 kernels with the simulation, and only the simulation is asked for; add "
            f"--engine {INT8}, --engine {AUTO} or --qe-convert-pytorch"
        )
    if engine != INT8:
        return
    if config.evaluation.compile:
        raise ConfigError(
            "--compile: compiles the simulation, and --engine int8 runs kernels that are compiled already; "
            "leave out one of the two"
        )
    if config.quantizers.dynamic:
        raise ConfigError(
            "--engine int8: int8 kernels need grids that are known beforehand, and --qe-dynamic finds them "
            "batch by batch; leave out one of the two"
        )
    if config.run.chosen_device != "cpu":
        raise ConfigError(
            f"--engine int8: torch's int8 kernels run on the CPU, not on {config.run.chosen_device}; use "
            "--device cpu"
        )


def _check_onnxruntime(config: Config) -> None:
    others = {
        f"--engine {config.evaluation.engine}": config.evaluation.engine != SIMULATE,
        "--qe-convert-pytorch": config.conversion.convert_pytorch,
    }
    for flag, given in others.items():
        if given:
            raise ConfigError(
                f"--arithmetic {ONNXRUNTIME}: is of the simulation, and {flag} runs torch's kernels; "
                "leave one of the two out"
            )
    if config.quantizers.dynamic:
        raise ConfigError(
            f"--arithmetic {ONNXRUNTIME}: is that of grids known beforehand, and --qe-dynamic finds "
            "them batch by batch; leave one of the two out"
        )
