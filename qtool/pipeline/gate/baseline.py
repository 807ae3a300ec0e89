"""The stored values of a gate: numbers and, image by image, what they were counted from."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtool.errors import ConfigError
from qtool.pipeline.gate.measure import Evidence, Flags
from qtool.run_dir import write_text

FORMAT = 1
FLAGS = ("seen", "float_correct", "correct", "agree")
VALUES = ("top1", "drop", "agreement", "logit_sqnr_db")


@dataclass(frozen=True, eq=False)
class Stored:
    """What a baseline holds of one run.

    Args:
        inputs: what the values depend on, apart from the settings under test.
        values: as Evidence.values.
        seen: (N,), for the evaluation images in ascending order: whether it could be read.
        float_correct, correct, agree: (N,), as in Evidence; false where an image was not seen.
    """

    inputs: dict[str, Any]
    values: dict[str, float]
    seen: Flags
    float_correct: Flags
    correct: Flags
    agree: Flags

    @classmethod
    def of(cls, evidence: Evidence, inputs: dict[str, Any], numbers: NDArray[np.int64]) -> Stored:
        """Of a whole evaluation of the images that have these numbers."""
        flags = {name: np.zeros(len(numbers), dtype=bool) for name in FLAGS}
        for name, column in flags.items():
            here = np.searchsorted(numbers, evidence.indices)
            column[here] = True if name == "seen" else getattr(evidence, name)
        return cls(inputs, evidence.values(), **flags)

    def changes(self, inputs: dict[str, Any]) -> list[str]:
        """How inputs differ from these, in words."""
        return [
            f"{key}: {_short(self.inputs[key])} in the baseline, {_short(now)} now"
            for key, now in inputs.items()
            if self.inputs[key] != now
        ]


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


Baseline = dict[str, Stored]


def read_baseline(path: Path) -> Baseline:
    """The runs of a baseline by name; none if there is no such file.

    Raises:
        ConfigError: if the file cannot be read, or is something else.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']}")
        return {name: _stored(entry) for name, entry in tree["runs"].items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError) as error:
        raise ConfigError(
            f"{path}: not a baseline that this qtool wrote ({type(error).__name__}: {error}); restore it, "
            "or delete it and run with --update-baseline"
        ) from error


def _stored(entry: dict[str, Any]) -> Stored:
    inputs = entry["inputs"]
    flags = {name: _unpack(entry[name], inputs["images"]) for name in FLAGS}
    return Stored(dict(inputs), {name: float(entry[name]) for name in VALUES}, **flags)


def write_baseline(path: Path, baseline: Baseline) -> Path:
    """Write a baseline whole: until the last moment, the old one stays."""
    runs = {
        name: {
            "inputs": stored.inputs,
            # JSON has no infinity, as the SQNR of equal logits; float() reads these words.
            **{key: v if np.isfinite(v) else str(v) for key, v in stored.values.items()},
            **{key: _pack(getattr(stored, key)) for key in FLAGS},
        }
        for name, stored in baseline.items()
    }
    return write_text(path, json.dumps({"format": FORMAT, "runs": runs}, indent=2) + "\n")


def _pack(flags: Flags) -> str:
    return base64.b64encode(np.packbits(flags).tobytes()).decode("ascii")


def _unpack(text: str, count: int) -> Flags:
    packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(packed) != (count + 7) // 8:
        raise ValueError(f"{len(packed)} bytes for {count} images")
    return np.unpackbits(packed, count=count).astype(bool)


def differences(old: Baseline, new: Baseline) -> list[str]:
    """What an update changes, a line for each value and input."""
    lines = []
    for name in [*new, *(name for name in old if name not in new)]:
        if name not in new:
            lines.append(f"{name}: removed")
        elif name not in old:
            values = ", ".join(f"{key} {value:.3f}" for key, value in new[name].values.items())
            lines.append(f"{name}: new: {values}")
        else:
            lines += [f"{name}: {line}" for line in _differences(old[name], new[name])]
    return lines or ["no difference"]


def _differences(old: Stored, new: Stored) -> list[str]:
    lines = [
        f"{key}: {old.values[key]:.3f} -> {value:.3f}"
        for key, value in new.values.items()
        if value != old.values[key]
    ]
    lines += [
        text.replace(" in the baseline, ", " -> ").removesuffix(" now") for text in old.changes(new.inputs)
    ]
    if len(old.correct) == len(new.correct):
        count = int((old.correct != new.correct).sum())
        lines += [f"images that are right in one of the two only: {count}"] if count else []
    return lines
