"""What an option is: one dataclass field from which flag, help, YAML key and check all come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from qtool.numerics.spec import MAX_BITS, MIN_BITS


@dataclass(frozen=True)
class Option:
    """The command-line half of a field.

    Args:
        type: click's type; it checks YAML values too, by their text.
        help: one sentence.
        flags: spellings on the command line; none means the option lives in YAML only.
        multiple: whether the flag may be repeated; in YAML, a list.
        metavar: what the help shows for the value.
        shown_default: what the help shows for a default of None.
        layer_only: whether it makes sense for single layers only, in an override.
        nullable: whether None is a value of its own.
        spellings: further flags that mean the same, each with a help of its own; one may be given.
    """

    type: click.ParamType[Any]
    help: str
    flags: tuple[str, ...]
    multiple: bool = False
    metavar: str | None = None
    shown_default: str | None = None
    layer_only: bool = False
    nullable: bool = False
    spellings: tuple[tuple[str, str], ...] = ()

    @property
    def is_flag(self) -> bool:
        """Whether it takes no value."""
        return isinstance(self.type, click.types.BoolParamType)


def option(
    default: Any,
    type: click.ParamType[Any],
    help: str,
    *flags: str,
    multiple: bool = False,
    metavar: str | None = None,
    shown_default: str | None = None,
    layer_only: bool = False,
    spellings: tuple[tuple[str, str], ...] = (),
) -> Any:
    """Declare a dataclass field that is an option."""
    nullable = default is None and not layer_only
    described = Option(type, help, flags, multiple, metavar, shown_default, layer_only, nullable, spellings)
    return field(default=default, metadata={"option": described})


def options_of(section: type) -> Iterator[tuple[str, Any, Option]]:
    """The options of a section class: name, default, description."""
    for f in fields(section):
        if "option" in f.metadata:
            yield f.name, None if f.default is MISSING else f.default, f.metadata["option"]


class Bits(click.ParamType[int]):
    """A bit width: 2 to 16, or 0 for "stays in float"."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = click.INT.convert(value, param, ctx)
        if number != 0 and not MIN_BITS <= number <= MAX_BITS:
            self.fail(f"{number} is not 0 (float) or in the range {MIN_BITS}<=x<={MAX_BITS}.", param, ctx)
        return int(number)


class FloatBits(click.ParamType[int]):
    """The width of a float type: 16, 32 or 64."""

    name = "16|32|64"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if str(value) not in ("16", "32", "64"):
            self.fail(f"{value!r} is not one of 16, 32, 64.", param, ctx)
        return int(value)


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas."""

    name = "x,y,z"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.485,0.456,0.406.", param, ctx)


class Counts(click.ParamType[tuple[int, ...]]):
    """Positive whole numbers separated by commas."""

    name = "n,n"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        parts = [str(part) for part in value] if isinstance(value, (tuple, list)) else str(value).split(",")
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list of positive whole numbers such as 1,32.", param, ctx)
        return tuple(int(part) for part in parts)


class WorkersOf(click.ParamType[str]):
    """How many processes, or a Ray cluster with as many workers as it has processors, or with so many."""

    name = "N|ray|ray:N"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        kind, colon, count = text.rpartition(":")
        if text == "ray" or (count.isdigit() and int(count) > 0 and (kind == "ray" or not colon)):
            return text
        self.fail(f"{text!r} is not a number of processes such as 2, nor ray or ray:N.", param, ctx)


class Widths(Counts):
    """Bit widths separated by commas, each once."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        found = super().convert(value, param, ctx)
        if not all(MIN_BITS <= bits <= MAX_BITS for bits in found):
            self.fail(
                f"{value!r} is not a list of bits from {MIN_BITS} to {MAX_BITS} such as 4,8.", param, ctx
            )
        return tuple(dict.fromkeys(found))


class Pair(Numbers):
    """Two finite numbers."""

    name = "x,y"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        numbers = super().convert(value, param, ctx)
        if len(numbers) != 2 or not all(math.isfinite(n) for n in numbers):
            self.fail(f"{value!r} is not two numbers such as -1.5,2.0.", param, ctx)
        return numbers


class Shape(click.ParamType[tuple[int, ...]]):
    """Channels, height and width of an image."""

    name = "c,h,w"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).lower().replace("x", ",").split(",")
        if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
            self.fail(f"{value!r} is not channels, height and width, such as 3,224,224.", param, ctx)
        return tuple(int(p) for p in parts)


class PositiveFloat(click.ParamType[float]):
    """A number above zero, of an interval that may be open or closed at its upper end."""

    name = "float"

    def __init__(self, maximum: float | None = None) -> None:
        self.maximum = maximum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(click.FLOAT.convert(value, param, ctx))
        # Written so that NaN fails too.
        if not (0 < number < float("inf")) or (self.maximum is not None and number > self.maximum):
            wanted = "a positive number" if self.maximum is None else f"in the range 0<x<={self.maximum:g}"
            self.fail(f"{value} is not {wanted}.", param, ctx)
        return number


class Share(click.ParamType[float]):
    """A number from 0 to 1, with 1 or without."""

    name = "float"

    def __init__(self, below_one: bool = False) -> None:
        self.below_one = below_one

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(click.FLOAT.convert(value, param, ctx))
        # Written so that NaN fails too.
        if not 0 <= number <= 1 or (self.below_one and number == 1):
            self.fail(f"{value} is not in the range 0<=x<{'' if self.below_one else '='}1.", param, ctx)
        return number


# What is read, and what is written.
FILE = click.Path(path_type=Path)
OUTPUT = click.Path(path_type=Path)


def is_input_path(described: Option) -> bool:
    """Whether an option's value names a file or folder to read."""
    return described.type is FILE


class NonNegativeFloat(click.ParamType[float]):
    """A finite number from zero on."""

    name = "float"

    def __init__(self, maximum: float | None = None) -> None:
        self.maximum = maximum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(click.FLOAT.convert(value, param, ctx))
        # Written so that NaN fails too.
        if not (0 <= number < float("inf")) or (self.maximum is not None and number > self.maximum):
            wanted = "a number from 0 on" if self.maximum is None else f"in the range 0<=x<={self.maximum:g}"
            self.fail(f"{value} is not {wanted}.", param, ctx)
        return number


class Words(click.ParamType[tuple[str, ...]]):
    """Names separated by commas, each once."""

    name = "name,name"

    def __init__(self, choices: Sequence[str]) -> None:
        self.choices = tuple(choices)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        parts = value if isinstance(value, (tuple, list)) else str(value).split(",")
        words = tuple(str(part).strip() for part in parts)
        for word in words:
            if word not in self.choices:
                self.fail(f"{word!r} is not one of {', '.join(self.choices)}.", param, ctx)
        if len(set(words)) < len(words):
            self.fail(f"{','.join(words)} names something twice.", param, ctx)
        return words


# What is read, and what is written.
FILE = click.Path(path_type=Path)
OUTPUT = click.Path(path_type=Path)
