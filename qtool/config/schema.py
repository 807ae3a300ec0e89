"""JSON Schemas of qtool's YAML files, from the declarations of the options, for editors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qtool.config.distiller import KEYS, MODE_KEYS, MODES, QUANTIZER_CLASS, WITHOUT_EFFECT
from qtool.config.gate import Expect, RunSettings, Settings, ThresholdType
from qtool.config.options import (
    Bits,
    Counts,
    FloatBits,
    NonNegativeFloat,
    Numbers,
    Option,
    Pair,
    PositiveFloat,
    Shape,
    Share,
    Widths,
    Words,
    WorkersOf,
    options_of,
)
from qtool.config.sections import INPUT_SETTINGS, LISTS, OVERRIDABLE, SECTIONS, QuantizeConfig
from qtool.config.sections.corrections import METHODS, Method
from qtool.config.wording import default_of_key, help_of_key
from qtool.numerics.spec import MAX_BITS, MIN_BITS

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"


def config_schema() -> Schema:
    """The schema of a file for -c: every section, overrides, and Distiller's form of a quantizer."""
    sections = {name: {"$ref": f"#/$defs/{name}"} for name in SECTIONS}
    return {
        "$schema": DIALECT,
        "title": "qtool: settings of a run",
        "description": "A YAML file for 'qtool quantize -c FILE' and the other commands.",
        **_mapping(sections),
        "$defs": _definitions(),
    }


def gate_schema() -> Schema:
    """The schema of a file for `qtool check`."""
    sections = {name: {"$ref": f"#/$defs/{name}"} for name in SECTIONS}
    expect = _mapping(_properties(Expect)) | {
        "type": "object",
        "minProperties": 1,
        "description": "What is expected of the run.",
    }
    settings = _properties(RunSettings)
    settings["name"]["type"] = ["string", "number"]  # it is needed, so null is none
    run = _mapping({**settings, **sections, "expect": expect})
    run |= {"type": "object", "required": ["name", "expect"]}
    runs = {"type": "array", "minItems": 1, "items": run, "description": "One after the other."}
    return {
        "$schema": DIALECT,
        "title": "qtool: runs and what is expected of them",
        "description": "A YAML file for 'qtool check FILE'.",
        **_mapping({**_properties(Settings), "runs": runs}),
        "type": "object",
        "required": ["runs"],
        "$defs": _definitions(),
    }


@dataclass(frozen=True)
class SchemaFile:
    """A schema, and the file beside this one that holds it."""

    make: Callable[[], Schema]
    file: str

    @property
    def path(self) -> Path:
        """The shipped file, for editors."""
        return Path(__file__).with_name(self.file)


SCHEMAS = {
    "config": SchemaFile(config_schema, "schema.json"),
    "check": SchemaFile(gate_schema, "gate_schema.json"),
}


def schema_text(name: str) -> str:
    """The text of the file of a schema, by its name in SCHEMAS."""
    return json.dumps(SCHEMAS[name].make(), indent=2, ensure_ascii=False) + "\n"


def _definitions() -> dict[str, Schema]:
    """A schema for each section, and for the parts of a quantizer."""
    found = {}
    for name, cls in SECTIONS.items():
        properties = _properties(cls)
        found[name] = {"title": str(cls.__doc__), **_mapping(properties)}
        if name in LISTS:
            as_list = {**properties[LISTS[name]], "title": str(cls.__doc__)}
            found[name] = {"anyOf": [found[name], as_list]}
    own = _quantizer("override")
    distiller = _quantizer("distiller_override", _distillers_properties)
    found["quantizer"] = {"title": found["quantizers"]["title"], **own}
    found["distiller_quantizer"] = {"title": "A quantizer in Distiller's form", **distiller}
    found["distiller_quantizer"]["properties"]["class"] = {"const": QUANTIZER_CLASS}
    component = {"type": "object", "properties": {"class": True}, "required": ["class"]}
    found["quantizers"] = {
        "if": {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": component,
        },
        "then": {"additionalProperties": {"$ref": "#/$defs/distiller_quantizer"}},
        "else": {"$ref": "#/$defs/quantizer"},
    }
    of_layers = _properties(QuantizeConfig, OVERRIDABLE)
    of_inputs = _properties(QuantizeConfig, INPUT_SETTINGS)
    found["override"] = _override(of_layers, "input")
    found["distiller_override"] = _override(of_layers | _distillers_properties(of_layers), "distiller_input")
    found["distiller_override"]["properties"][WITHOUT_EFFECT] = {"description": "Has no effect."}
    found["input"] = _input(of_inputs)
    found["distiller_input"] = _input(of_inputs | _distillers_properties(of_inputs))
    return found


def _mapping(properties: Mapping[str, Schema]) -> Schema:
    """A mapping with these keys and no others; an empty one reads as null in YAML."""
    return {"type": ["object", "null"], "properties": dict(properties), "additionalProperties": False}


def _quantizer(
    override: str, more: Callable[[Mapping[str, Schema]], dict[str, Schema]] = lambda properties: {}
) -> Schema:
    plain = [name for name, _, described in options_of(QuantizeConfig) if not described.layer_only]
    properties = _properties(QuantizeConfig, plain)
    properties |= more(properties)
    properties["overrides"] = {
        "type": ["object", "null"],
        "description": "Settings of single layers, by name or regular expression.",
        "additionalProperties": {"$ref": f"#/$defs/{override}"},
    }
    return _mapping(properties)


def _override(properties: Mapping[str, Schema], of_input: str) -> Schema:
    inputs = {
        "type": ["object", "null"],
        "description": "Settings of single inputs that arrive in float, by number.",
        "patternProperties": {"^[0-9]+$": {"$ref": f"#/$defs/{of_input}"}},
        "additionalProperties": False,
    }
    return _mapping({**properties, "input_overrides": inputs}) | {"type": "object"}


def _input(properties: Mapping[str, Schema]) -> Schema:
    one_mode = {name: schema for name, schema in properties.items() if name != "mode"}
    one_mode["mode"] = next(s for s in properties["mode"]["anyOf"] if "enum" in s)
    from_output = {"type": "boolean", "description": "Take the settings of the layer's output."}
    return _mapping({**one_mode, "from_output": from_output}) | {"type": "object"}


def _distillers_properties(properties: Mapping[str, Schema]) -> dict[str, Schema]:
    """Distiller's spellings of keys and of values, of those properties that are there."""
    spelled = {key: properties[name] for key, name in KEYS.items() if name in properties}
    if "clip_activations" in properties:
        schema = properties["clip_activations"]
        names = [*schema["enum"], *(n.upper() for n in schema["enum"] if n is not None)]
        spelled |= {key: {**schema, "enum": names} for key in ("clip_acts", "clip_activations")}
    for key in MODE_KEYS:
        if key in properties:
            spelled[key] = _with_names(properties[key], MODES)
    if "fpq_module" in properties:
        spelled["fp16"] = {"type": ["boolean", "null"], "description": "fpq_module: 16"}
    return spelled


def _with_names(schema: Schema, names: Iterable[str]) -> Schema:
    """A mode's schema, with further names for modes."""
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], *names]}
    forms = []
    for form in schema["anyOf"]:
        if "properties" in form:
            parts = {key: _with_names(part, names) for key, part in form["properties"].items()}
            forms.append({**form, "properties": parts})
        else:
            forms.append(_with_names(form, names))
    return {**schema, "anyOf": forms}


def _properties(cls: type, names: Iterable[str] | None = None) -> dict[str, Schema]:
    """The schema of each option of a section, or of those that are named."""
    chosen = None if names is None else set(names)
    return {
        name: _option_schema(name, default, described)
        for name, default, described in options_of(cls)
        if chosen is None or name in chosen
    }


def _option_schema(name: str, default: Any, described: Option) -> Schema:
    text = help_of_key(described)
    if (default_in_words := default_of_key(described)) is not None:
        text += f" Default: {default_in_words}."
    found: Schema = {"description": text}
    if default is not None:
        found["default"] = str(default) if isinstance(default, Path) else default
    accepted = _accepted(described)
    if name == "mode" and "enum" in accepted:
        part = {"enum": [mode for mode in accepted["enum"] if mode is not None]}
        both = {"activations": part, "weights": part}
        mapping = {**_mapping(both), "type": "object", "required": list(both)}
        accepted = {"anyOf": [accepted, mapping]}
    return {**found, **accepted}


def _accepted(described: Option) -> Schema:
    """What the values of an option may be; null means that it is not given, or for bits, float."""
    if isinstance(described.type, Method):
        item = rf"({'|'.join(METHODS)}|\{{.*\}})"
        named = {"type": "string", "pattern": rf"^\s*{item}(\s*,\s*{item})*\s*$", "examples": list(METHODS)}
        settings = {name: {"type": ["object", "null"]} for name in METHODS}
        one = {
            "anyOf": [named, {**_mapping(settings), "type": "object", "minProperties": 1, "maxProperties": 1}]
        }
        return {"anyOf": [*one["anyOf"], {"type": "array", "items": one}, {"type": "null"}]}
    if described.multiple:
        types = ["string", "number"]
        return {"type": [*types, "array", "null"], "items": {"type": types}}
    for kind, schema in _KINDS.items():
        if isinstance(described.type, kind):
            return schema(described.type)
    raise TypeError(f"say in _KINDS what a value of type {type(described.type).__name__} is in JSON")


def _integer(kind: Any) -> Schema:
    limits = {"minimum": kind.min, "maximum": kind.max}
    return {"type": ["integer", "null"], **{k: v for k, v in limits.items() if v is not None}}


def _positive(kind: Any) -> Schema:
    limit = {} if kind.maximum is None else {"maximum": kind.maximum}
    return {"type": ["number", "null"], "exclusiveMinimum": 0, **limit}


def _from_zero(kind: Any) -> Schema:
    limit = {} if kind.maximum is None else {"maximum": kind.maximum}
    return {"type": ["number", "null"], "minimum": 0, **limit}


def _words(kind: Any) -> Schema:
    one = "|".join(kind.choices)
    words = [*kind.choices, *(int(word) for word in kind.choices if word.isdigit())]
    as_text = {"type": "string", "pattern": rf"^\s*({one})(\s*,\s*({one}))*\s*$"}
    as_list = {"type": "array", "items": {"enum": words}, "minItems": 1, "uniqueItems": True}
    return {"anyOf": [{"enum": [*words, None]}, as_text, as_list]}


def _list_of_numbers(count: int | None) -> Schema:
    limits = {"minItems": count or 1, **({} if count is None else {"maxItems": count})}
    repeats = "*" if count is None else f"{{{count - 1}}}"
    types = ["array", "string", "null"] if count else ["array", "number", "string", "null"]
    pattern = rf"^{_NUMBER}(,\s*{_NUMBER}){repeats}$"
    return {"type": types, "items": {"type": "number"}, "pattern": pattern, **limits}


def _threshold(kind: Any) -> Schema:
    limits = {"minimum": kind.minimum, "maximum": kind.maximum}
    return {
        "type": ["number", "string", "null"],
        **{k: v for k, v in limits.items() if math.isfinite(v)},
        "pattern": rf"^baseline(\s*[+-]\s*{_NUMBER})?$",
        "examples": ["baseline", "baseline - 0.5"],
    }


_WIDTH = "0*(" + "|".join(str(bits) for bits in range(MIN_BITS, MAX_BITS + 1)) + ")"
_WIDTHS = rf"^\s*{_WIDTH}\s*(,\s*{_WIDTH}\s*)*$"
# By type of an option; the first that fits counts.
_KINDS: dict[type, Callable[[Any], Schema]] = {
    click.types.BoolParamType: lambda kind: {"type": ["boolean", "null"]},
    click.IntRange: _integer,
    click.Choice: lambda kind: {"enum": [*kind.choices, None]},
    # `gpus: 0` and `path: 3` are numbers in YAML, and read as text.
    click.Path: lambda kind: {"type": ["string", "number", "null"]},
    click.types.StringParamType: lambda kind: {"type": ["string", "number", "null"]},
    Bits: lambda kind: {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_BITS, "not": {"const": 1}},
    FloatBits: lambda kind: {"enum": [16, 32, 64, None]},
    Pair: lambda kind: _list_of_numbers(2),
    Numbers: lambda kind: _list_of_numbers(None),
    Widths: lambda kind: {
        "type": ["array", "integer", "string", "null"],
        "items": {"type": "integer", "minimum": MIN_BITS, "maximum": MAX_BITS},
        "minimum": MIN_BITS,
        "maximum": MAX_BITS,
        "minItems": 1,
        "pattern": _WIDTHS,
    },
    Counts: lambda kind: {
        "type": ["array", "integer", "string", "null"],
        "items": {"type": "integer", "minimum": 1},
        "minimum": 1,
        "minItems": 1,
        "pattern": r"^\s*0*[1-9]\d*\s*(,\s*0*[1-9]\d*\s*)*$",
    },
    Shape: lambda kind: {
        "type": ["array", "string", "null"],
        "items": {"type": "integer", "minimum": 1},
        "minItems": 3,
        "maxItems": 3,
        "pattern": r"^\d+(,\d+){2}$|^\d+(x\d+){2}$",
    },
    PositiveFloat: _positive,
    Share: lambda kind: {
        "type": ["number", "null"],
        "minimum": 0,
        "exclusiveMaximum" if kind.below_one else "maximum": 1,
    },
    NonNegativeFloat: _from_zero,
    Words: _words,
    WorkersOf: lambda kind: {
        "type": ["integer", "string", "null"],
        "minimum": 1,
        "pattern": r"^(ray|(ray:)?0*[1-9]\d*)$",
    },
    ThresholdType: _threshold,
}
