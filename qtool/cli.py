"""The command line: load the configuration, call the pipeline, print.

torch is imported inside the commands, so that --help stays quick.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import click

from qtool.config import DEVICE_OPTIONS, SECTIONS, Config, load_config, options_of
from qtool.config.options import PositiveFloat
from qtool.errors import QtoolError

LOG = logging.getLogger("qtool")

INTERRUPTED = "interrupted: files that were not finished have not been written"


class QtoolCommand(click.Command):
    """A command whose help groups options by section, and whose errors are one message."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, _spread_lists(args, self))
        _merge_spellings(self, ctx.params)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        grouped: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                name = param.stands_for if isinstance(param, SpellingOption) else param.name
                grouped.setdefault(_HEADINGS.get(name or "", "General"), []).append(record)
        for heading, records in grouped.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        handler = _log_to_stderr()
        try:
            return super().invoke(ctx)
        except QtoolError as error:
            for line in str(error).splitlines():
                click.echo(f"error: {line}", err=True)
            raise SystemExit(1) from error
        except (KeyboardInterrupt, click.Abort) as error:
            click.echo(INTERRUPTED, err=True)
            raise SystemExit(1) from error
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            click.echo("error: out of memory; try a smaller --batch-size", err=True)
            raise SystemExit(1) from error
        finally:
            LOG.removeHandler(handler)


def _spread_lists(args: list[str], command: click.Command) -> list[str]:
    """Repeat a list option for each of the words behind it, as Distiller's parser takes them.

    The list ends at the next option, and at a word that is the name of a file or folder: that is DATA.
    """
    lists = {flag for p in command.params if isinstance(p, click.Option) and p.multiple for flag in p.opts}
    spread: list[str] = []
    current: str | None = None
    first = False
    for position, arg in enumerate(args):
        if arg == "--":
            return spread + args[position:]
        if arg.startswith("-") and len(arg) > 1:
            current, first = (arg if arg in lists else None), True
        elif current is not None and not first and not os.path.lexists(arg):
            spread.append(current)
        elif current is not None and not first:
            current = None
        else:
            first = False
        spread.append(arg)
    return spread


def _merge_spellings(command: click.Command, params: dict[str, Any]) -> None:
    """Give what was said with another spelling of an option to the option itself."""
    spellings = [p for p in command.params if isinstance(p, SpellingOption)]
    for target in {p.stands_for for p in spellings}:
        (itself,) = (p for p in command.params if p.name == target)
        others = [p for p in spellings if p.stands_for == target]
        given = {p.opts[0]: params[str(p.name)] for p in (itself, *others)}
        _refuse_together(given)
        params[target] = next((value for value in given.values() if value is not None), None)
        for other in others:
            del params[str(other.name)]


class QtoolGroup(click.Group):
    """The commands; an output that the system refuses, help included, is one message."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            click.echo(f"error: {error.filename or 'stdout'}: {error.strerror or error}", err=True)
            raise SystemExit(1) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it is Python or torch, whose error is a RuntimeError, that got no memory."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "not enough memory", "can't allocate memory")
    )


def _print(text: str) -> None:
    """Write results to stdout; what its encoding lacks, such as a byte in a file name, is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding))


_HEADINGS = {name: str(cls.__doc__) for cls in SECTIONS.values() for name, _, _ in options_of(cls)}


def _log_to_stderr() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.INFO)
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)  # the log of a run has more
    LOG.propagate = False
    return handler


class QtoolOption(click.Option):
    """An option whose default, where it is described in words, is shown without parentheses."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra


class SpellingOption(QtoolOption):
    """Another spelling of an option; the command is given only that option."""

    def __init__(self, *args: Any, stands_for: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stands_for = stands_for


def config_options(*sections: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the flags of some sections, and -c."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        described = [item for name in sections for item in options_of(SECTIONS[name])]
        for name, default, opt in reversed(described):
            if not opt.flags:
                continue
            has_default = not (default is None or default is False or default == ())
            shown = opt.shown_default or (str(default) if has_default else None)
            for flag, help_text in reversed(opt.spellings):
                command = click.option(
                    flag,
                    cls=SpellingOption,
                    stands_for=name,
                    type=opt.type,
                    metavar=opt.metavar,
                    help=help_text,
                )(command)
            command = click.option(
                *opt.flags,
                name,
                cls=QtoolOption,
                type=None if opt.is_flag else opt.type,
                is_flag=opt.is_flag,
                multiple=opt.multiple,
                default=None,
                metavar=opt.metavar,
                help=opt.help,
                show_default=shown or False,
            )(command)
        return click.option(
            "-c",
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            help="YAML file with any of these settings; flags win over it.",
        )(command)

    return decorate


def _pipeline(name: str = "runs") -> ModuleType:
    """A module of qtool.pipeline that does a command's work, which imports torch.

    Ctrl-C inside that import would reach torch's C++ code, which loses it or aborts; nothing has been
    written yet, so it ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one handles signals
        return importlib.import_module(f"qtool.pipeline.{name}")
    on_interrupt = signal.signal(signal.SIGINT, _exit_now)
    try:
        return importlib.import_module(f"qtool.pipeline.{name}")
    finally:
        signal.signal(signal.SIGINT, on_interrupt)


def _exit_now(_number: int, _frame: FrameType | None) -> None:
    click.echo(INTERRUPTED, err=True)
    os._exit(1)


DATA = click.argument("path", metavar="[DATA]", required=False, type=click.Path(path_type=Path))


# Read when it lies in the working directory and -c names no other.
DEFAULT_CONFIG = Path("qtool.yaml")


def _config(config_file: Path | None, flags: dict[str, Any]) -> Config:
    _refuse_together({f"--{name}": flags.get(name) for name in DEVICE_OPTIONS})
    if config_file is None and DEFAULT_CONFIG.is_file():
        LOG.info("settings from %s", DEFAULT_CONFIG)
        config_file = DEFAULT_CONFIG
    return load_config(config_file, **flags)


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


@main.command(cls=QtoolCommand)
@DATA
@config_options("model", "data", "calibration", "run")
def calibrate(config_file: Path | None, **flags: Any) -> None:
    """Measure the activations of a network, and write them to a YAML file.

    \b
    Example:
        qtool calibrate -a resnet18 --pretrained --fraction 0.05 /data/imagenet
    """
    _print(_pipeline().calibrate(_config(config_file, flags)).text)


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
@click.option(
    "--qe-config-file",
    "quantizer_file",
    type=click.Path(path_type=Path),
    help="YAML file with a quantizer in Distiller's form.",
)
@config_options("model", "data", "calibration", "quantizers", "lapq", "search", "run")
def quantize(
    config_file: Path | None,
    evaluate_: bool,
    quantize_eval: bool,
    calibration_portion: float | None,
    **flags: Any,
) -> None:
    """Quantize a network, and compare its accuracy with the float network's.

    \b
    Example:
        qtool quantize -a resnet18 --pretrained --qe-mode asym_u --qe-per-channel /data/imagenet
    """
    _refuse_together(
        {
            "--qe-stats-file": flags["stats_file"],
            "--qe-dynamic": flags["dynamic"],
            "--qe-calibration": calibration_portion,
            "--qe-config-file": flags["quantizer_file"],
        }
    )
    if calibration_portion is not None:
        _refuse_together({"--qe-calibration": calibration_portion, "--fraction": flags["fraction"]})
        flags["fraction"] = calibration_portion
    config = _config(config_file, flags)
    if calibration_portion is not None and not (evaluate_ and quantize_eval):
        LOG.info("--qe-calibration without --evaluate --quantize-eval: measuring statistics only")
        _print(_pipeline().calibrate(config).text)
    else:
        _print(_pipeline().quantize(config).text)


def _refuse_together(flags: dict[str, Any]) -> None:
    given = [flag for flag, value in flags.items() if value]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude one another; give one of them.")


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


@main.command(cls=QtoolCommand)
@DATA
@config_options("model", "data", "run")
def evaluate(config_file: Path | None, **flags: Any) -> None:
    """Evaluate a float network, or a quantized one that a run has saved.

    \b
    Example:
        qtool evaluate --checkpoint logs/RUN/quantized_checkpoint.pth.tar /data/imagenet
    """
    _print(_pipeline().evaluate(_config(config_file, flags)).text)


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
def check(file: Path, **options: Any) -> None:
    """Make the runs of a YAML file, and exit with 1 unless they reach what it expects of them.

    \b
    Example:
        qtool check configs/ci.yaml --junit report.xml
    """
    if not _pipeline("gate").check(file, _print, **options):
        raise SystemExit(1)
