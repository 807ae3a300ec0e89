"""What the user asked for: YAML under flags, checked, frozen."""

from qtool.config.layers import check, layer_specs
from qtool.config.load import dump_config, load_config
from qtool.config.options import options_of
from qtool.config.sections import (
    SECTIONS,
    CalibrationConfig,
    Config,
    DataConfig,
    ModelConfig,
    QuantizeConfig,
    RunConfig,
)

__all__ = [
    "SECTIONS",
    "CalibrationConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "QuantizeConfig",
    "RunConfig",
    "check",
    "dump_config",
    "layer_specs",
    "load_config",
    "options_of",
]
