"""Which settings of a tuning fit together."""

from __future__ import annotations

from qtool.config.searches import refuse_given
from qtool.config.sections import Config
from qtool.config.sections.evaluation import INT8
from qtool.errors import ConfigError


def check_tuning(config: Config) -> None:
    """Refuse what a tuning cannot honour.

    Raises:
        ConfigError: naming the flag.
    """
    refuse_given(config, ("lapq", "search", "conversion"), "is of 'qtool quantize', not of a tuning")
    refuse_given(config, ("mixed",), "has an effect with --bits only; add that")
    tuning = config.tuning
    if config.quantizers.dynamic:
        raise ConfigError("--qe-dynamic: a tuning chooses ranges that are known beforehand; leave it out")
    if config.run.skip_float:
        raise ConfigError("--skip-float: a tuning compares with the float network; leave it out")
    if config.run.chosen_device != "cpu" and tuning.trial_engine == INT8:
        raise ConfigError(
            f"--trial-engine int8: torch's int8 kernels run on the CPU, not on {config.run.chosen_device}; "
            "use auto"
        )
    if tuning.objective == "latency" and tuning.trial_workers != "1":
        raise ConfigError(
            "--objective latency: workers beside one another disturb what is measured; leave --workers out"
        )
