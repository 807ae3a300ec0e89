"""The command tune, and those below it that look at its history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qtool.cli.commands import QtoolCommand, pipeline_module, print_text

FILE = click.Path(path_type=Path)
# Where parse_args leaves the words of a command below for invoke.
BELOW = "qtool.cli.tune.below"


class TuneCommand(QtoolCommand, click.Group):
    """A command with others below it: what does not begin with the name of one of them is its own."""

    allow_extra_args = False
    allow_interspersed_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] in self.commands:
            ctx.meta[BELOW] = list(args)
            return []
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if BELOW not in ctx.meta:
            return super().invoke(ctx)
        name, *args = ctx.meta.pop(BELOW)
        command = self.commands[name]
        with command.make_context(name, args, parent=ctx) as context:
            return command.invoke(context)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


class OwnArgument(click.Argument):
    """An argument that the commands below do not have."""

    def get_usage_pieces(self, ctx: click.Context) -> list[str]:
        return super().get_usage_pieces(ctx) if self in ctx.command.params else []


@click.command(cls=QtoolCommand)
@click.argument("file", type=FILE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv"]),
    default="table",
    show_default=True,
    help="A table for people, or all digits and all probes for programs.",
)
@click.option("--probes", is_flag=True, help="Show probes too: errors of logits on a few images.")
def history(file: Path, form: str, probes: bool) -> None:
    """Show the trials of a tuning, also while it runs.

    \b
    Example:
        qtool tune history logs/RUN/tuning.db
    """
    print_text(pipeline_module("tuning.look").show(file, form, probes))


@click.command(cls=QtoolCommand)
@click.argument("file", type=FILE)
@click.argument("number", type=click.IntRange(1))
@click.option("-o", "--output", type=FILE, help="File to write, in place of stdout.")
def config(file: Path, number: int, output: Path | None) -> None:
    """Give the settings of one trial, with which 'qtool quantize -c' makes it again.

    \b
    Example:
        qtool tune config logs/RUN/tuning.db 7 -o trial.yaml
    """
    print_text(pipeline_module("tuning.look").settings(file, number, output))


def add_below(tune: click.Group) -> None:
    """Put the commands below tune into it."""
    for command in (history, config):
        tune.add_command(command)
