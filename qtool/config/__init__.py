"""What the user asked for: YAML under flags, checked, frozen."""

from qtool.config.bits import with_bits, with_bits_of_layers
from qtool.config.conversion import check_conversion
from qtool.config.evaluation import check_evaluation
from qtool.config.layers import check, layer_specs, own_settings
from qtool.config.load import absolute_arch, dump_config, dump_quantizers, load_config
from qtool.config.options import options_of
from qtool.config.searches import check_search, refuse_given, with_settings_of_layers
from qtool.config.sections import (
    DEVICE_OPTIONS,
    SECTIONS,
    CalibrationConfig,
    Config,
    ConversionConfig,
    CorrectionConfig,
    CorrectionsConfig,
    DataConfig,
    EvaluationConfig,
    FinetuningConfig,
    LapqConfig,
    MixedConfig,
    ModelConfig,
    QuantizeConfig,
    RunConfig,
    SearchConfig,
    SensitivityConfig,
    TuningConfig,
)
from qtool.config.tuning import check_tuning

__all__ = [
    "DEVICE_OPTIONS",
    "SECTIONS",
    "CalibrationConfig",
    "Config",
    "ConversionConfig",
    "CorrectionConfig",
    "CorrectionsConfig",
    "DataConfig",
    "EvaluationConfig",
    "FinetuningConfig",
    "LapqConfig",
    "MixedConfig",
    "ModelConfig",
    "QuantizeConfig",
    "RunConfig",
    "SearchConfig",
    "SensitivityConfig",
    "TuningConfig",
    "absolute_arch",
    "check",
    "check_conversion",
    "check_evaluation",
    "check_search",
    "check_tuning",
    "dump_config",
    "dump_quantizers",
    "layer_specs",
    "load_config",
    "options_of",
    "own_settings",
    "refuse_given",
    "with_bits",
    "with_bits_of_layers",
    "with_settings_of_layers",
]
