"""How an option is described where it is a key of a YAML file, and not a flag."""

from __future__ import annotations

import re
from functools import cache

import click

from qtool.config.options import Option, options_of
from qtool.config.sections import SECTIONS


def help_of_key(described: Option) -> str:
    """The help of an option, with keys in place of flags.

    Example:
        >>> described = Option(click.STRING, "Like --calib-data, or --qe-stats-file.", ("--x",))
        >>> help_of_key(described)
        'Like calib_data, or stats_file.'
    """
    return _with_keys(described.help)


def default_of_key(described: Option) -> str | None:
    """What holds where an option is null, in words, with keys in place of flags."""
    return None if described.shown_default is None else _with_keys(described.shown_default)


def limits_of_key(described: Option) -> str:
    """Which values an option takes, in a few characters, or nothing.

    Example:
        >>> limits_of_key(Option(click.IntRange(2, 32), "", ())), limits_of_key(Option(click.STRING, "", ()))
        ('2 to 32', '')
    """
    kind = described.type
    if isinstance(kind, click.Choice):
        return ", ".join(map(str, kind.choices))
    if isinstance(kind, click.IntRange):
        return f"{kind.min} to {kind.max}" if kind.max is not None else f"{kind.min} or more"
    return ""


def _with_keys(text: str) -> str:
    return re.sub(r"--[a-z][a-z-]*[a-z]", lambda match: _keys().get(match[0], match[0]), text)


@cache
def _keys() -> dict[str, str]:
    """The key of each flag."""
    return {
        flag: name
        for section in SECTIONS.values()
        for name, _, described in options_of(section)
        for flag in described.flags
    }
