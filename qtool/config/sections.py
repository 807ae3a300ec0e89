"""Every option once, in the section of the YAML file that it stands in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from qtool.config.options import (
    FILE,
    OUTPUT,
    Bits,
    FloatBits,
    Numbers,
    Pair,
    PositiveFloat,
    Shape,
    option,
)
from qtool.numerics.spec import CLIP_MODES, MODES

DATASETS = ("folder", "imagenet", "cifar10", "cifar100", "mnist", "fashion-mnist", "npz", "digits")


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    arch: str | None = option(
        None,
        click.STRING,
        "A torchvision classification model, a CIFAR ResNet (resnet20, resnet20_cifar, ...), digits_resnet, "
        "or path/to/file.py:factory.",
        "-a",
        "--arch",
        shown_default="the checkpoint's own, or digits_resnet",
    )
    pretrained: bool = option(False, click.BOOL, "Take torchvision's trained weights.", "--pretrained")
    weights: str | None = option(
        None,
        click.STRING,
        "Which of torchvision's weights --pretrained takes, such as IMAGENET1K_V2.",
        "--weights",
        shown_default="the first published",
    )
    checkpoint: Path | None = option(
        None,
        FILE,
        "Trained weights (a state_dict, or a file that holds one), or a quantized model.",
        "--checkpoint",
    )
    num_classes: int | None = option(
        None, click.IntRange(1), "Outputs of the network.", "--num-classes", shown_default="the network's own"
    )
    input_shape: tuple[int, ...] | None = option(
        None, Shape(), "Shape of one image, as 3,224,224.", "--input-shape", shown_default="the network's own"
    )


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    path: Path | None = option(None, FILE, "The evaluation images; on the command line, the argument DATA.")
    dataset: str | None = option(
        None, click.Choice(DATASETS), "What DATA is.", "--dataset", shown_default="found out from DATA"
    )
    split: str | None = option(
        None, click.STRING, "Part of DATA to evaluate on.", "--split", shown_default="val or test"
    )
    classes: Path | None = option(
        None, FILE, "File that maps folder names to class indices: `index wnid name` lines.", "--classes"
    )
    resize: int | None = option(
        None,
        click.IntRange(0),
        "Scale the short side to this many pixels; 0 for none.",
        "--resize",
        shown_default="the model's own",
    )
    crop: int | None = option(
        None,
        click.IntRange(0),
        "Cut this square out of the centre; 0 for none.",
        "--crop",
        shown_default="the model's own",
    )
    mean: tuple[float, ...] | None = option(
        None, Numbers(), "Mean of each channel, pixels in 0 to 1.", "--mean", shown_default="the model's own"
    )
    std: tuple[float, ...] | None = option(
        None, Numbers(), "Standard deviation of each channel.", "--std", shown_default="the model's own"
    )
    effective_test_size: float = option(
        1.0,
        PositiveFloat(1.0),
        "Share of the evaluation images to use, chosen by seed.",
        "--effective-test-size",
    )
    skip_bad_images: bool = option(
        False, click.BOOL, "Leave unreadable images out and count them.", "--skip-bad-images"
    )
    batch_size: int = option(64, click.IntRange(1), "Images in a batch.", "-b", "--batch-size")
    workers: int = option(2, click.IntRange(0), "Processes that decode images.", "-j", "--workers")
    print_freq: int | None = option(
        None,
        click.IntRange(1),
        "Log a line of progress every so many batches.",
        "-p",
        "--print-freq",
        shown_default="a progress bar",
    )


@dataclass(frozen=True)
class CalibrationConfig:
    """Calibration images"""

    fraction: float | None = option(
        None,
        PositiveFloat(1.0),
        "Calibrate on this share of the evaluation images, or of --calib-data or --calib-split.",
        "--fraction",
        shown_default="0.05 where there is no other set",
    )
    calib_data: Path | None = option(
        None, FILE, "Calibrate on images of this folder or file.", "--calib-data"
    )
    calib_split: str | None = option(
        None,
        click.STRING,
        "Calibrate on this part of DATA (or of --calib-data), such as train.",
        "--calib-split",
    )
    calib_samples: int | None = option(
        None, click.IntRange(1), "Calibrate on this many images.", "--calib-samples"
    )
    calib_classes: Path | None = option(
        None, FILE, "Like --classes, for --calib-data.", "--calib-classes", shown_default="--classes"
    )


@dataclass(frozen=True)
class QuantizeConfig:
    """Quantization, for every layer that no override names"""

    mode: str = option(
        "sym", click.Choice(MODES), "Integer grid of weights and activations.", "--qe-mode", "--qem"
    )
    mode_activations: str | None = option(
        None,
        click.Choice(MODES),
        "Grid of activations.",
        "--qe-mode-acts",
        "--qema",
        shown_default="--qe-mode",
    )
    mode_weights: str | None = option(
        None, click.Choice(MODES), "Grid of weights.", "--qe-mode-wts", "--qemw", shown_default="--qe-mode"
    )
    bits_activations: int = option(
        8, Bits(), "Bits of an activation, 2 to 16; 0 leaves them in float.", "--qe-bits-acts", "--qeba"
    )
    bits_weights: int = option(
        8, Bits(), "Bits of a weight, 2 to 16; 0 leaves them in float.", "--qe-bits-wts", "--qebw"
    )
    bits_accum: int = option(
        32, click.IntRange(8, 64), "Bits of an accumulator, and of the bias.", "--qe-bits-accum"
    )
    accum_dtype: str = option(
        "float32",
        click.Choice(["float32", "float64"]),
        "Type that simulates the accumulator: float32 is exact up to 2^24, float64 up to 2^53. "
        "Above 16 bits of weight and activation together it is always float64.",
        "--qe-accum-dtype",
    )
    clip_activations: str = option(
        "none",
        click.Choice(CLIP_MODES),
        "How the range of activations is chosen.",
        "--qe-clip-acts",
        "--qeca",
    )
    clip_n_stds: float | None = option(
        None, PositiveFloat(), "Standard deviations that clip mode n_std keeps.", "--qe-clip-n-stds"
    )
    clip_to_observed: bool = option(
        False,
        click.BOOL,
        "Keep the ranges of clip modes gauss and laplace within the values observed.",
        "--qe-clip-to-observed",
    )
    symmetric_unsigned: bool = option(
        False,
        click.BOOL,
        "With a symmetric grid: integers from 0 on for activations that are never negative.",
        "--qe-sym-unsigned",
    )
    per_channel_weights: bool = option(
        False, click.BOOL, "One scale for each output channel of a weight.", "--qe-per-channel", "--qepc"
    )
    scale_approx_bits: int | None = option(
        None,
        click.IntRange(2, 32),
        "Replace scales by an integer of this many bits and a shift.",
        "--qe-scale-approx-bits",
        "--qesab",
    )
    scale_approx_everywhere: bool = option(
        False,
        click.BOOL,
        "With --qe-scale-approx-bits: also scales of weights, and those by which sums, concatenations and "
        "products rescale their inputs.",
        "--qe-scale-approx-everywhere",
    )
    no_clip_layers: tuple[str, ...] = option(
        (),
        click.STRING,
        "Layers whose activations are not clipped: names or patterns, repeated or separated by commas.",
        "--qe-no-clip-layers",
        "--qencl",
        multiple=True,
        metavar="PATTERN",
    )
    no_quant_layers: tuple[str, ...] = option(
        (),
        click.STRING,
        "Layers that stay in float: names or patterns, repeated or separated by commas.",
        "--qe-no-quant-layers",
        "--qenql",
        multiple=True,
        metavar="PATTERN",
    )
    stats_file: Path | None = option(
        None, FILE, "Activation statistics from an earlier calibration.", "--qe-stats-file"
    )
    stats_as_is: bool = option(
        False,
        click.BOOL,
        "Use --qe-stats-file though its images were preprocessed in another way, or the weights were others.",
        "--qe-stats-as-is",
    )
    dynamic: bool = option(
        False, click.BOOL, "Take the range of activations from each batch that passes.", "--qe-dynamic"
    )
    per_sample: bool = option(
        False, click.BOOL, "With --qe-dynamic: from each image, whatever its neighbours.", "--per-sample"
    )
    save_fp_weights: bool = option(
        False,
        click.BOOL,
        "Keep the float weights in the checkpoint, beside the integers.",
        "--qe-save-fp-weights",
    )
    clip_half_range: bool = option(
        False, click.BOOL, "Treat every output as if it went through a ReLU, and apply one."
    )
    also_clip_weights: bool = option(False, click.BOOL, "Clip weights as activations are clipped.")
    inputs_quant_auto_fallback: bool = option(
        True, click.BOOL, "Quantize inputs that arrive in float by the settings of the output."
    )
    fpq_module: int | None = option(
        None, FloatBits(), "Run layers in a float type of 16, 32 or 64 bits in place of integers."
    )
    fake: bool | None = option(
        None, click.BOOL, "With fpq_module: whether the output is put on a grid.", layer_only=True
    )
    make_identity: bool = option(False, click.BOOL, "Replace the layer by nothing.", layer_only=True)
    quantize_inputs: bool = option(
        True,
        click.BOOL,
        "Whether a layer that computes in float puts its float inputs on a grid.",
        layer_only=True,
    )
    output_range: tuple[float, ...] | None = option(
        None, Pair(), "Smallest and largest value of the output, in place of measured ones.", layer_only=True
    )
    weight_range_factors: tuple[float, ...] | None = option(
        None, Pair(), "Factors on the weight's smallest and largest value.", layer_only=True
    )
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    input_overrides: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


# What an override may set for the layers that its pattern matches.
OVERRIDABLE = (
    "mode",
    "mode_activations",
    "mode_weights",
    "bits_activations",
    "bits_weights",
    "bits_accum",
    "accum_dtype",
    "clip_activations",
    "clip_n_stds",
    "clip_half_range",
    "clip_to_observed",
    "symmetric_unsigned",
    "per_channel_weights",
    "scale_approx_bits",
    "scale_approx_everywhere",
    "inputs_quant_auto_fallback",
    "fpq_module",
    "fake",
    "make_identity",
    "quantize_inputs",
    "output_range",
    "weight_range_factors",
)
# What input_overrides, inside an override, may set for one input.
INPUT_SETTINGS = ("bits_activations", "mode", "clip_activations", "clip_n_stds", "clip_to_observed")


# Those of SciPy's methods that need no derivatives: the loss is constant between steps of the grids.
METHODS = ("Powell", "Nelder-Mead")
INIT_MODES = ("auto", "none", "avg", "laplace", "gauss", "l1", "l2", "l3")


@dataclass(frozen=True)
class LapqConfig:
    """LAPQ: search for the ranges of all tensors together, by the loss"""

    enabled: bool = option(False, click.BOOL, "Search for ranges with LAPQ.", "--qe-lapq")
    maxiter: int | None = option(
        2, click.IntRange(1), "Iterations of the search, each through all ranges.", "--lapq-maxiter"
    )
    maxfev: int | None = option(
        None, click.IntRange(1), "Evaluations of the search.", "--lapq-maxfev", shown_default="no limit"
    )
    method: str = option(
        "Powell",
        click.Choice(METHODS, case_sensitive=False),
        "SciPy's method of the search.",
        "--lapq-method",
    )
    basinhopping: bool = option(
        False,
        click.BOOL,
        "Repeat the search from points nearby, chosen by seed.",
        "--lapq-basinhopping",
        "--lapq-bh",
    )
    basinhopping_niter: int = option(
        100, click.IntRange(1), "How often --lapq-basinhopping repeats it.", "--lapq-basinhopping-niter"
    )
    init_mode: str = option(
        "auto",
        click.Choice(INIT_MODES, case_sensitive=False),
        "Where the search starts: ranges of a clip mode, or those of the smallest error in the p-norm; "
        "auto finds p by a quadratic fit.",
        "--lapq-init-mode",
    )
    init_method: str = option(
        "Powell",
        click.Choice(METHODS, case_sensitive=False),
        "SciPy's method for the ranges of a p-norm.",
        "--lapq-init-method",
    )
    eval_memoize_dataloader: bool = option(
        False,
        click.BOOL,
        "In Distiller's scripts; images always stay in memory.",
        "--lapq-eval-memoize-dataloader",
    )
    search_clipping: bool = option(
        False,
        click.BOOL,
        "Move the two ends of an asymmetric range independently.",
        "--lapq-search-clipping",
    )


@dataclass(frozen=True)
class SearchConfig:
    """Search, by --qe-lapq or search-clipping"""

    eval_size: float = option(
        1.0,
        PositiveFloat(1.0),
        "Share of the calibration images that every trial is evaluated on, chosen by seed.",
        "--lapq-eval-size",
        "--search-eval-size",
    )
    resume: Path | None = option(
        None,
        FILE,
        "Folder of a run that ended in the middle of its search; what it evaluated is taken over.",
        "--resume-search-from",
    )


@dataclass(frozen=True)
class RunConfig:
    """Run"""

    out_dir: Path = option(
        Path("logs"), OUTPUT, "Folder in which the run's own folder is made.", "-o", "--out-dir"
    )
    name: str | None = option(
        None,
        click.STRING,
        "Name of the run; its folder starts with it.",
        "-n",
        "--name",
        shown_default="none",
    )
    seed: int = option(0, click.IntRange(0, 2**32 - 1), "Chooses the calibration images.", "--seed")
    device: str = option("cpu", click.STRING, "Where the network runs: cpu, cuda, cuda:1.", "--device")
    cpu: bool = option(False, click.BOOL, "Run on the CPU, as --device cpu does.", "--cpu")
    gpus: str | None = option(
        None, click.STRING, "Run on the GPU of this number, as --device cuda:N does.", "--gpus", metavar="N"
    )
    det: bool = option(
        False, click.BOOL, "Refuse operations whose result depends on timing (a GPU has some).", "--det"
    )
    confusion: bool = option(
        False, click.BOOL, "Write confusion matrices (rows: labels, columns: predictions).", "--confusion"
    )
    skip_float: bool = option(False, click.BOOL, "Do not evaluate the float network.", "--skip-float")
    save_predictions: Path | None = option(
        None,
        OUTPUT,
        "Write path, label and predictions of every image to this .npz file.",
        "--save-predictions",
    )

    @property
    def chosen_device(self) -> str:
        """Where the network runs, by whichever of the three flags says it."""
        return "cpu" if self.cpu else self.device if self.gpus is None else f"cuda:{self.gpus}"


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "calibration": CalibrationConfig,
    "quantizers": QuantizeConfig,
    "lapq": LapqConfig,
    "search": SearchConfig,
    "run": RunConfig,
}


@dataclass(frozen=True)
class Config:
    """Everything a user asked for, checked."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    quantizers: QuantizeConfig = field(default_factory=QuantizeConfig)
    lapq: LapqConfig = field(default_factory=LapqConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    run: RunConfig = field(default_factory=RunConfig)
