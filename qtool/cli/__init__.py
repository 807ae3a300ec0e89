"""The command line: load the configuration, call the pipeline, print.

torch is imported inside the commands, so that --help stays quick.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from qtool.cli.commands import (
    QtoolCommand,
    QtoolGroup,
    config_options,
    refuse_together,
)
from qtool.cli.commands import pipeline_module as _pipeline
from qtool.cli.commands import print_text as _print
from qtool.cli.stats import stats
from qtool.cli.tune import OwnArgument, TuneCommand, add_below
from qtool.config import DEVICE_OPTIONS, Config, load_config, refuse_given
from qtool.config.options import PositiveFloat
from qtool.memory import keep_freed_memory

LOG = logging.getLogger("qtool")


def _shared_run(command: str, config: Config) -> None:
    """Make a run of pipeline.runs, with the other processes that torchrun has started; the first speaks."""
    with _pipeline("ranks").joined(config.run.chosen_device) as ranks:
        outcome = getattr(_pipeline(), command)(config, ranks)
        if ranks.first:
            _print(outcome.text)


DATA = click.argument("path", metavar="[DATA]", required=False, type=click.Path(path_type=Path))


# Read when it lies in the working directory and -c names no other.
DEFAULT_CONFIG = Path("qtool.yaml")


def _config(config_file: Path | None, flags: dict[str, Any]) -> Config:
    refuse_together({f"--{name}": flags.get(name) for name in DEVICE_OPTIONS})
    if config_file is None and DEFAULT_CONFIG.is_file():
        LOG.info("settings from %s", DEFAULT_CONFIG)
        config_file = DEFAULT_CONFIG
    config = load_config(config_file, **flags)
    if not config.run.release_memory:
        keep_freed_memory()
    return config


@click.group(
    cls=QtoolGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="qtool")
def main() -> None:
    """Quantize a trained PyTorch network, see what it cost, and keep the result.

    Without a model and data, commands use an embedded network and images:

    \b
        qtool calibrate --fraction 0.05
        qtool quantize --qe-mode asym_u --qe-per-channel
    """


HISTOGRAMS = click.option(
    "--activation-histograms",
    "histograms_portion",
    metavar="P",
    type=PositiveFloat(1.0),
    help="Calibrate on this share of the evaluation images, write the histograms in Distiller's form too "
    "(acts_histograms.pt), and end, as Distiller does.",
)


def _with_histograms(config_file: Path | None, portion: float, flags: dict[str, Any], **others: Any) -> None:
    """What --activation-histograms does, beside which nothing else says where ranges come from."""
    sources = {"--fraction": flags.get("fraction"), "--qe-stats-file": flags.get("stats_file")}
    sources |= {"--qe-dynamic": flags.get("dynamic"), "--qe-config-file": flags.get("quantizer_file")}
    for flag, value in (sources | others).items():
        refuse_together({"--activation-histograms": portion, flag: value})
    _shared_run("collect_histograms", _config(config_file, flags | {"fraction": portion}))


@main.command(cls=QtoolCommand)
@DATA
@HISTOGRAMS
@config_options("model", "data", "calibration", "run")
def calibrate(config_file: Path | None, histograms_portion: float | None, **flags: Any) -> None:
    """Measure the activations of a network, and write them to a YAML file.

    \b
    Example:
        qtool calibrate -a resnet18 --pretrained --fraction 0.05 /data/imagenet
    """
    if histograms_portion is not None:
        _with_histograms(config_file, histograms_portion, flags)
    else:
        _shared_run("calibrate", _config(config_file, flags))


@main.command(cls=QtoolCommand)
@DATA
@click.option(
    "-e", "--evaluate", "evaluate_", is_flag=True, help="In Distiller's scripts; this command does."
)
@click.option("--quantize-eval", "--qe", is_flag=True, help="In Distiller's scripts; this command does.")
@click.option(
    "--qe-calibration",
    "calibration_portion",
    type=PositiveFloat(1.0),
    help="Calibrate on this share of the evaluation images, as --fraction does. Without --evaluate "
    "--quantize-eval, write the statistics and end, as Distiller does.",
)
@HISTOGRAMS
@click.option(
    "--qe-config-file",
    "quantizer_file",
    type=click.Path(path_type=Path),
    help="YAML file with a quantizer in Distiller's form.",
)
@config_options(
    "model",
    "data",
    "calibration",
    "quantizers",
    "corrections",
    "lapq",
    "search",
    "conversion",
    "evaluation",
    "run",
)
def quantize(
    config_file: Path | None,
    evaluate_: bool,
    quantize_eval: bool,
    calibration_portion: float | None,
    histograms_portion: float | None,
    **flags: Any,
) -> None:
    """Quantize a network, and compare its accuracy with the float network's.

    \b
    Example:
        qtool quantize -a resnet18 --pretrained --qe-mode asym_u --qe-per-channel /data/imagenet
    """
    refuse_together(
        {
            "--qe-stats-file": flags["stats_file"],
            "--qe-dynamic": flags["dynamic"],
            "--qe-calibration": calibration_portion,
            "--qe-config-file": flags["quantizer_file"],
        }
    )
    if histograms_portion is not None:
        if evaluate_ and quantize_eval:
            LOG.info("--activation-histograms: statistics and histograms only, nothing is quantized")
        _with_histograms(config_file, histograms_portion, flags, **{"--qe-calibration": calibration_portion})
        return
    if calibration_portion is not None:
        refuse_together({"--qe-calibration": calibration_portion, "--fraction": flags["fraction"]})
        flags["fraction"] = calibration_portion
    config = _config(config_file, flags)
    if calibration_portion is not None and not (evaluate_ and quantize_eval):
        LOG.info("--qe-calibration without --evaluate --quantize-eval: measuring statistics only")
        _shared_run("calibrate", config)
    else:
        _shared_run("quantize", config)


@main.command("search-clipping", cls=QtoolCommand)
@DATA
@config_options("model", "data", "calibration", "quantizers", "search", "run")
def search_clipping(config_file: Path | None, **flags: Any) -> None:
    """Find a clip mode for each layer, one after the other, by trying each on calibration images.

    \b
    Example:
        qtool search-clipping -a resnet18 --pretrained --qe-bits-acts 4 /data/imagenet
    """
    _print(_pipeline("search_clipping").run(_config(config_file, flags)).text)


@main.group(cls=TuneCommand, invoke_without_command=True, subcommand_metavar="| COMMAND [ARGS]...")
@click.argument("path", metavar="[DATA]", required=False, type=click.Path(path_type=Path), cls=OwnArgument)
@config_options(
    "model", "data", "calibration", "quantizers", "corrections", "tuning", "mixed", "evaluation", "run"
)
def tune(config_file: Path | None, **flags: Any) -> None:
    """Find settings that keep the accuracy; the exit code is 1 if none that were tried do.

    The quantization flags say where to start. Which images chose and which validated is said at the end.
    With --bits it chooses bits for each layer within a budget instead.

    \b
    Example:
        qtool tune -a resnet18 --pretrained --qe-bits-wts 6 --qe-bits-acts 6 --max-drop 0.5 /data/imagenet
    """
    config = _config(config_file, flags)
    if config.mixed.choices is not None:
        refuse_given(config, ("tuning",), "keeps an accuracy, and --bits a budget; leave out --bits")
        _print(_pipeline("mixed_precision").find_bits(config).text)
        return
    outcome, met = _pipeline("tuning.run").tune(config)
    _print(outcome.text)
    if not met:
        raise SystemExit(1)


add_below(tune)


@main.command(cls=QtoolCommand)
@DATA
@config_options("model", "data", "calibration", "quantizers", "corrections", "sensitivity", "run")
def sensitivity(config_file: Path | None, **flags: Any) -> None:
    """Find which layers hurt: what each costs when it alone is quantized, or gains alone in float.

    \b
    Example:
        qtool sensitivity -a resnet18 --pretrained --qe-mode asym_u --bits 8,4 /data/imagenet
    """
    _print(_pipeline("sensitivity").run(_config(config_file, flags)).text)


@main.command(cls=QtoolCommand)
@DATA
@config_options("model", "data", "calibration", "quantizers", "corrections", "compare", "run")
def compare(config_file: Path | None, **flags: Any) -> None:
    """Compare a float network with its quantized version: layer by layer, and the images that flip.

    \b
    Example:
        qtool compare --checkpoint float.pth --quantized logs/RUN/quantized_checkpoint.pth.tar images/
    """
    _print(_pipeline("comparison").compare_networks(_config(config_file, flags)).text)


@main.command(cls=QtoolCommand)
@DATA
@config_options("model", "data", "conversion", "evaluation", "run")
def evaluate(config_file: Path | None, **flags: Any) -> None:
    """Evaluate a float network, or one that a run has saved: quantized, or converted to int8 kernels.

    \b
    Example:
        qtool evaluate --checkpoint logs/RUN/quantized_checkpoint.pth.tar /data/imagenet
    """
    _shared_run("evaluate", _config(config_file, flags))


@main.command(cls=QtoolCommand)
@DATA
@config_options("model", "data", "export", "run")
def export(config_file: Path | None, **flags: Any) -> None:
    """Write a network for other programs, and compare on images what these compute.

    \b
    Example:
        qtool export --checkpoint logs/RUN/quantized_checkpoint.pth.tar --verify 128 /data/imagenet
    """
    _print(_pipeline("export").export(_config(config_file, flags)).text)


@main.command(cls=QtoolCommand)
@config_options("model", "quantizers", "bench", "run")
def bench(config_file: Path | None, **flags: Any) -> None:
    """Measure the speed of a network in float, simulated, on int8 kernels and in onnxruntime.

    \b
    Example:
        qtool bench -a resnet18 --qe-mode asym_u --qe-mode-wts sym --qe-per-channel
    """
    _print(_pipeline("bench").bench(_config(config_file, flags)).text)


@main.command(cls=QtoolCommand)
@config_options("model", "quantizers")
def layers(config_file: Path | None, **flags: Any) -> None:
    """List the layers of a network: names, shapes, and what would be quantized and how.

    \b
    Example:
        qtool layers -a resnet18 --qe-no-quant-layers conv1,fc
    """
    _print(_pipeline().list_layers(_config(config_file, flags)))


@main.command(cls=QtoolCommand)
@DATA
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="File to write; - prints it.",
)
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@config_options("model", "data", "calibration", "quantizers")
def init(config_file: Path | None, output: Path, force: bool, **flags: Any) -> None:
    """Write a commented YAML file for a network, with all that is set here and every other option.

    \b
    Example:
        qtool init -a resnet18 --checkpoint resnet18.pth --qe-mode asym_u /data/imagenet
    """
    _print(_pipeline("init").write_template(load_config(config_file, **flags), output, force))


@main.command(cls=QtoolCommand)
@DATA
@config_options(
    "model", "data", "calibration", "quantizers", "corrections", "finetuning", "evaluation", "run"
)
def finetune(config_file: Path | None, **flags: Any) -> None:
    """Quantize a network and train the result, by default to predict what the float network predicts.

    \b
    Example:
        qtool finetune --qe-mode asym_u --qe-per-channel --qe-bits-wts 4 --qe-bits-acts 4
    """
    _print(_pipeline("finetune").run(_config(config_file, flags)).text)


@main.command(cls=QtoolCommand)
@click.argument("kind", type=click.Choice(["config", "check"]), default="config")
def schema(kind: str) -> None:
    """Print the JSON Schema of a YAML file: for -c, or for 'qtool check'.

    \b
    Example:
        qtool schema check > gate_schema.json
    """
    from qtool.config.schema import schema_text

    _print(schema_text(kind).removesuffix("\n"))


@main.command(cls=QtoolCommand)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--sequential", is_flag=True, help="End a run as soon as all its verdicts are certain.")
@click.option("--allow-undecided", is_flag=True, help="Pass where there are too few images to tell.")
@click.option(
    "--update-baseline",
    is_flag=True,
    help="Show what differs from the stored values, and store the new ones.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the report to this file.")
@click.option(
    "--junit", "junit_file", type=click.Path(path_type=Path), help="Write it as JUnit XML, which CI shows."
)
@click.option(
    "--release-memory",
    is_flag=True,
    help="Give freed memory back to the system at once; keeping it is faster (on Linux with glibc).",
)
def check(file: Path, release_memory: bool, **options: Any) -> None:
    """Make the runs of a YAML file, and exit with 1 unless they reach what it expects of them.

    \b
    Example:
        qtool check configs/ci.yaml --junit report.xml
    """
    if not release_memory:
        keep_freed_memory()
    if not _pipeline("gate").check(file, _print, **options):
        raise SystemExit(1)


main.add_command(stats)
