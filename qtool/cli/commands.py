"""What all commands have in common: how options are declared, read and shown, and how errors are said."""

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

from qtool.config import SECTIONS, options_of
from qtool.errors import ConfigError, QtoolError, ShareError
from qtool.launch import launched, speaks

LOG = logging.getLogger("qtool")

INTERRUPTED = "interrupted: files that were not finished have not been written"


# The commands whose images several processes can share.
SHARED = ("calibrate", "quantize", "evaluate")


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
            if launched() > 1 and ctx.command.name not in SHARED:
                raise ConfigError(f"qtool {ctx.command.name}: runs in one process; start it without torchrun")
            return super().invoke(ctx)
        except QtoolError as error:
            # What all processes of a run find is said by the first.
            for line in str(error).splitlines() if speaks() or isinstance(error, ShareError) else ():
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


def print_text(text: str) -> None:
    """Write results to stdout; what its encoding lacks, such as a byte in a file name, is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding))


def pipeline_module(name: str = "runs") -> ModuleType:
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
        refuse_together(given)
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


_HEADINGS = {name: str(cls.__doc__) for cls in SECTIONS.values() for name, _, _ in options_of(cls)}


def _log_to_stderr() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.INFO if speaks() else logging.CRITICAL)
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
    """Give a command the flags of some sections, and -c; of a flag in two of them, the later one's."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        described = [item for name in sections for item in options_of(SECTIONS[name])]
        taken: set[str] = set()
        for name, default, opt in reversed(described):
            # A flag that two sections have, such as --workers, is that of the later one.
            flags = [flag for flag in opt.flags if flag not in taken]
            taken.update(flags)
            if not flags:
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
                *flags,
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


def refuse_together(flags: dict[str, Any]) -> None:
    """Refuse, as wrong usage, all but one of these flags and their values."""
    given = [flag for flag, value in flags.items() if value]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude one another; give one of them.")
