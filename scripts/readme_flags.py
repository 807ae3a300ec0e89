"""Write the commands and flags of qtool into README.md, between two markers.

python scripts/readme_flags.py            rewrite README.md
python scripts/readme_flags.py --check    exit with 1 if README.md is out of date

The text comes from the click commands, so help and defaults are written once, in qtool. Options that
several commands share, with the same default and help, are listed once for all of them.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

Row = tuple[str, str, str]  # flags, default, meaning

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- flags:begin -->", "<!-- flags:end -->"


def main() -> None:
    """Rewrite README.md, or only check it."""
    parser = argparse.ArgumentParser(description="Write the commands and flags of qtool into README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    check = parser.parse_args().check

    from qtool.cli import main as cli

    try:
        old = README.read_text(encoding="utf-8")
        new = with_flags(old, flags_as_markdown(cli))
    except ValueError as error:
        raise SystemExit(f"README.md: {error}") from error
    if check and new != old:
        raise SystemExit("README.md: the table of flags is out of date; run 'make docs'")
    if not check:
        README.write_text(new, encoding="utf-8")


def with_flags(text: str, flags: str) -> str:
    """Text with all between its two markers replaced by flags.

    Raises:
        ValueError: if text does not hold each marker once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one line '{BEGIN}' and, below it, one line '{END}'")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n\n{flags}\n{END}{tail}"


def flags_as_markdown(cli: click.Command) -> str:
    """A table of the commands, then one table for each set of commands that share options."""
    contexts = list(all_contexts(click.Context(cli, info_name="qtool")))
    commands = [(usage(context), first_paragraph(context)) for context in contexts]
    users: dict[Row, list[str]] = {}  # option -> the commands that have it
    for context in contexts:
        for row in option_rows(context):
            users.setdefault(row, []).append(f"`{context.command_path}`")
    tables: dict[str, list[Row]] = {}  # the commands that share options -> these options
    for row, names in users.items():
        tables.setdefault(", ".join(names), []).append(row)
    parts = [table(("command", "what it does"), commands)]
    for title, rows in tables.items():
        parts.append(f"Options of {title}:\n\n{table(('option', 'default', 'meaning'), rows)}")
    return "\n".join(parts)


def all_contexts(context: click.Context) -> Iterator[click.Context]:
    """This context, and one for every command below it that is not hidden."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            if command is not None and not command.hidden:
                yield from all_contexts(click.Context(command, info_name=name, parent=context))


def usage(context: click.Context) -> str:
    """How a command is called, as the first line of its --help says."""
    return f"`{' '.join([context.command_path, *context.command.collect_usage_pieces(context)])}`"


def first_paragraph(context: click.Context) -> str:
    """The first paragraph of a command's help, on one line."""
    return one_line((context.command.help or "").split("\n\n")[0])


def option_rows(context: click.Context) -> Iterator[Row]:
    """Flags, default and meaning of each option of a command, in the order of --help."""
    for option in context.command.params:
        if not isinstance(option, click.Option) or option.hidden:
            continue
        record, extra = option.get_help_record(context), option.get_help_extra(context)
        assert record is not None  # only hidden options have none
        default = extra.get("default", "").removeprefix("(").removesuffix(")")
        limits = f" [{extra['range']}]" if "range" in extra else ""
        required = " Required." if option.required else ""
        yield (
            f"`{record[0]}`",
            f"`{default}`" if default else "",
            one_line(option.help or "") + limits + required,
        )


def one_line(text: str) -> str:
    return " ".join(text.replace("\b", "").split())


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; a bar inside a cell is escaped, as GitHub wants even within code."""
    lines = [
        header,
        ("---",) * len(header),
        *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
