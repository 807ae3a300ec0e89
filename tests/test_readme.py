"""The README is true: its commands run, and it names every command and flag.

In a fence marked `console`, each line that starts with `$ qtool` is run, in order, and all of them
in one folder that holds copies of configs/ and stats/; `> FILE` works, pipes do not. Lines without
`$` are output, and other fences (sh, text) are not run.
"""

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def cli() -> click.Group:
    from qtool.cli import main

    return main


def console_commands(text: str) -> list[list[str]]:
    """The words of each `$ qtool` line inside console fences; a backslash continues a line."""
    fences = re.findall(r"^```console\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(fences).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"\$ qtool\b", line)]


def all_commands(cli: click.Group) -> dict[str, click.Command]:
    """The group and the commands below it that are not hidden, by the words that call them."""
    return {"qtool": cli} | commands_below("qtool", cli)


def commands_below(words: str, group: click.Group) -> dict[str, click.Command]:
    commands: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if command.hidden:
            continue
        commands[f"{words} {name}"] = command
        if isinstance(command, click.Group):
            commands |= commands_below(f"{words} {name}", command)
    return commands


def options(command: click.Command) -> list[click.Option]:
    return [p for p in command.params if isinstance(p, click.Option) and not p.hidden]


def test_commands_shown_in_the_readme_run(readme, cli, runner, chdir_tmp):
    for folder in ("configs", "stats"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, folder)
    commands = console_commands(readme)
    assert commands
    for _, *words in commands:
        args, target = (words[:-2], words[-1]) if ">" in words else (words, None)
        result = runner.invoke(cli, args)
        assert result.exit_code == 0, f"$ qtool {shlex.join(words)}\n{result.output}"
        if target:
            Path(target).write_text(result.stdout, encoding="utf-8")


def test_only_console_prompts_are_commands():
    text = "```sh\n$ qtool a\n```\n```console\n$ ls\n$ qtool b \\\n   --c 'd e'  # why\nqtool f\n```\n"
    assert console_commands(text) == [["qtool", "b", "--c", "d e"]]


def test_every_command_and_flag_has_help(cli):
    without = []
    for path, command in all_commands(cli).items():
        without += [] if command.help else [path]
        without += [f"{path} {option.opts[0]}" for option in options(command) if not option.help]
    assert not without


def test_every_help_has_an_example_of_its_command(cli):
    commands = {words: c for words, c in all_commands(cli).items() if not isinstance(c, click.Group)}
    assert {"qtool stats show", "qtool quantize"} <= set(commands)
    without = [
        words
        for words, command in commands.items()
        if not re.search(rf"^\s*Example:\n\s*{words} ", command.help, flags=re.MULTILINE)
    ]
    assert not without


def test_every_command_and_flag_is_in_the_readme(readme, cli):
    table = readme.partition("<!-- flags:begin -->")[2].partition("<!-- flags:end -->")[0]
    shown = set(re.findall(r"--?[\w-]+", table))
    missing = []
    for path, command in all_commands(cli).items():
        missing += [] if re.search(rf"`{path}[` ]", table) else [path]
        for option in options(command):
            missing += [f"{path} {flag}" for flag in option.opts + option.secondary_opts if flag not in shown]
    assert not missing, "run 'make docs'"
