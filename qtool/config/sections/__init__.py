"""Every option once, in the section of the YAML file that it stands in: a file for each kind of section."""

from __future__ import annotations

from dataclasses import dataclass, field

from qtool.config.sections.compare import CompareConfig
from qtool.config.sections.conversion import NATIVE_BACKENDS, ConversionConfig
from qtool.config.sections.corrections import METHODS, CorrectionConfig, CorrectionsConfig
from qtool.config.sections.evaluation import EvaluationConfig
from qtool.config.sections.export import BenchConfig, ExportConfig
from qtool.config.sections.finetuning import FinetuningConfig
from qtool.config.sections.inputs import CalibrationConfig, DataConfig, ModelConfig
from qtool.config.sections.mixed import MixedConfig
from qtool.config.sections.quantizers import INPUT_SETTINGS, OVERRIDABLE, QuantizeConfig
from qtool.config.sections.run import DEVICE_OPTIONS, RunConfig
from qtool.config.sections.searches import LapqConfig, SearchConfig
from qtool.config.sections.sensitivity import SensitivityConfig
from qtool.config.sections.tuning import TuningConfig

__all__ = [
    "DEVICE_OPTIONS",
    "INPUT_SETTINGS",
    "LISTS",
    "METHODS",
    "NATIVE_BACKENDS",
    "OVERRIDABLE",
    "SECTIONS",
    "BenchConfig",
    "CalibrationConfig",
    "CompareConfig",
    "Config",
    "ConversionConfig",
    "CorrectionConfig",
    "CorrectionsConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FinetuningConfig",
    "LapqConfig",
    "MixedConfig",
    "ModelConfig",
    "QuantizeConfig",
    "RunConfig",
    "SearchConfig",
    "SensitivityConfig",
    "TuningConfig",
]

# Sections that may be written as a list, and the option that it is.
LISTS = {"corrections": "methods"}
SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "calibration": CalibrationConfig,
    "quantizers": QuantizeConfig,
    "corrections": CorrectionsConfig,
    "lapq": LapqConfig,
    "search": SearchConfig,
    "tuning": TuningConfig,
    "conversion": ConversionConfig,
    "evaluation": EvaluationConfig,
    "finetuning": FinetuningConfig,
    "export": ExportConfig,
    "bench": BenchConfig,
    "sensitivity": SensitivityConfig,
    "mixed": MixedConfig,
    "compare": CompareConfig,
    "run": RunConfig,
}


@dataclass(frozen=True)
class Config:
    """Everything a user asked for, checked."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    quantizers: QuantizeConfig = field(default_factory=QuantizeConfig)
    corrections: CorrectionsConfig = field(default_factory=CorrectionsConfig)
    lapq: LapqConfig = field(default_factory=LapqConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    conversion: ConversionConfig = field(default_factory=ConversionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    mixed: MixedConfig = field(default_factory=MixedConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    run: RunConfig = field(default_factory=RunConfig)
