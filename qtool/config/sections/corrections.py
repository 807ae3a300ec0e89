"""What mends the damage of quantization: the section `corrections`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import click
import yaml

from qtool.config.options import option
from qtool.errors import nearest

PRESETS = ("none", "fast", "accurate", "best")
# Every method by its name; docs/methods.md says what each does.
METHODS = (
    "equalization",
    "channel_alignment",
    "smooth_quant",
    "fast_bias_correction",
    "bias_correction",
    "analytic_bias_correction",
    "weight_correction",
    "activation_ranges",
    "gptq",
    "adaround",
    "reconstruction",
)
# Settings that every method takes.
EXCLUDE = "exclude"


class Method(click.ParamType[str]):
    """A method's name, or {name: {setting: value}}; several separated by commas."""

    name = "METHOD"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        items = [value] if isinstance(value, dict) else _split(str(value))
        return ", ".join(self._checked(item, param, ctx) for item in items)

    def _checked(self, item: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            found = yaml.safe_load(item) if isinstance(item, str) else item
        except yaml.YAMLError:
            found = None
        if isinstance(found, str):
            found = {found: {}}
        if not isinstance(found, dict) or len(found) != 1:
            self.fail(
                f"found {item!r}; a method's name, or {{name: {{setting: value}}}}, is wanted", param, ctx
            )
        ((method, settings),) = found.items()
        if method not in METHODS:
            close = nearest(str(method), METHODS) or f"; one of {', '.join(METHODS)} is wanted"
            self.fail(f"unknown method {method!r}{close}", param, ctx)
        if settings is not None and not isinstance(settings, dict):
            self.fail(f"{method}: found {settings!r}; a mapping of settings is wanted", param, ctx)
        if not settings:
            return str(method)
        flow = yaml.safe_dump({method: settings}, default_flow_style=True, width=2**20, sort_keys=False)
        return str(flow).strip()


def _split(text: str) -> list[str]:
    """The items of a list, at commas outside braces."""
    depth, parts = 0, [""]
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


@dataclass(frozen=True)
class CorrectionConfig:
    """One correction that was asked for.

    Args:
        method: one of METHODS.
        settings: by name, as the file or flag gives them.
        exclude: patterns of layers that it leaves alone.
    """

    method: str
    settings: dict[str, Any]
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class CorrectionsConfig:
    """Corrections, for accuracy"""

    preset: str | None = option(
        None,
        click.Choice(PRESETS),
        "Corrections and estimators that fit the network and its bits: none is plain rounding, fast costs "
        "about one more calibration, accurate some more, best chooses how to round by images.",
        "--preset",
        shown_default="none",
    )
    methods: tuple[str, ...] = option(
        (),
        Method(),
        "Corrections, in order: names, repeated or separated by commas, or {name: {setting: value}} "
        "(docs/methods.md).",
        "--corrections",
        multiple=True,
        metavar="METHOD",
    )
    images: int = option(
        256,
        click.IntRange(1),
        "Calibration images that corrections look at, at most.",
        "--corrections-images",
    )

    @property
    def asked(self) -> bool:
        """Whether there is anything to correct."""
        return bool(self.methods) or self.preset not in (None, "none")

    def list(self) -> list[CorrectionConfig]:
        """The methods that are named, in order."""
        found = []
        for item in (part for text in self.methods for part in _split(text)):
            parsed = yaml.safe_load(item)
            ((method, settings),) = ({parsed: {}} if isinstance(parsed, str) else parsed).items()
            settings = dict(settings)
            exclude = settings.pop(EXCLUDE, ())
            patterns = re.split(r"\s*,\s*", exclude) if isinstance(exclude, str) else list(exclude)
            found.append(CorrectionConfig(method, settings, tuple(str(p) for p in patterns)))
        return found
