"""Which settings of the conversion to int8 kernels fit together."""

from __future__ import annotations

from qtool.config.searches import refuse_given
from qtool.config.sections import Config
from qtool.errors import ConfigError


def check_conversion(config: Config) -> None:
    """Refuse options of a conversion that is not asked for, or that cannot be had.

    Raises:
        ConfigError: naming the flag.
    """
    if not config.conversion.convert_pytorch:
        refuse_given(config, ("conversion",), "has an effect with --qe-convert-pytorch only; add that")
        return
    if config.quantizers.dynamic:
        raise ConfigError(
            "--qe-convert-pytorch: int8 kernels need grids that are known beforehand, and --qe-dynamic finds "
            "them batch by batch; leave out one of the two"
        )
    if config.run.chosen_device != "cpu":
        raise ConfigError(
            f"--qe-convert-pytorch: torch's int8 kernels run on the CPU, not on {config.run.chosen_device}; "
            "use --device cpu"
        )
