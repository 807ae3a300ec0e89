"""What statistics were measured on, so that those of another network or of other images are noticed."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
# The entry of a stats file that is no layer: no layer's name starts with a dot.
HEADER = ".qtool"


@dataclass(frozen=True)
class Fingerprint:
    """A network, its weights, and how images become its input.

    Args:
        inputs: shapes of what the network takes, for one image.
        names: SHA-256 of the names of its layers, in order.
        sizes: SHA-256 of the number of axes and of elements that they give for one image, in order.
        weights: SHA-256 of the weights, None where nobody said.
        preprocessing: steps from an image to a tensor, by name, None where nobody said.
    """

    inputs: tuple[Shape, ...]
    names: str
    sizes: str
    weights: str | None = None
    preprocessing: Mapping[str, Any] | None = None


def fingerprint_tree(fingerprint: Fingerprint) -> dict[str, Any]:
    """A fingerprint as plain values for YAML; None is left out."""
    tree: dict[str, Any] = {
        "inputs": [str(shape) for shape in fingerprint.inputs],
        "names": fingerprint.names,
        "sizes": fingerprint.sizes,
    }
    if fingerprint.weights is not None:
        tree["weights"] = fingerprint.weights
    if fingerprint.preprocessing is not None:
        steps = fingerprint.preprocessing
        tree["preprocessing"] = {k: list(v) if isinstance(v, tuple) else v for k, v in steps.items()}
    return tree


def read_fingerprint(tree: Any) -> Fingerprint:
    """The fingerprint that fingerprint_tree wrote; keys of a newer qtool are ignored.

    Raises:
        ValueError: naming what is wrong.
    """
    if not isinstance(tree, dict):
        raise ValueError("a mapping with inputs, names and sizes is wanted")
    for key in ("names", "sizes", "weights"):
        if not isinstance(tree.get(key, None if key == "weights" else 0), str | None):
            raise ValueError(f"{key}: found {tree.get(key)!r}; a text is wanted")
    steps = tree.get("preprocessing")
    if not isinstance(steps, dict | None):
        raise ValueError(f"preprocessing: found {steps!r}; a mapping is wanted")
    preprocessing = None if steps is None else {str(k): _without_lists(v) for k, v in steps.items()}
    return Fingerprint(
        _read_shapes(tree.get("inputs")), tree["names"], tree["sizes"], tree.get("weights"), preprocessing
    )


def _read_shapes(texts: Any) -> tuple[Shape, ...]:
    try:
        shapes = tuple(tuple(ast.literal_eval(text)) for text in texts)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        shapes = (("?",),)
    if not all(isinstance(n, int) for shape in shapes for n in shape):
        raise ValueError(f"inputs: found {texts!r}; shapes such as (3, 224, 224) are wanted")
    return shapes


def _without_lists(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def differences_of_images(there: Fingerprint, here: Fingerprint) -> list[str]:
    """How the images of two fingerprints differ, in words; what one of them does not say is no difference."""
    found = []
    if there.inputs != here.inputs:
        found.append(f"inputs {_in_words(there.inputs)} (here {_in_words(here.inputs)})")
    steps, own = there.preprocessing or {}, here.preprocessing or {}
    for name in steps.keys() & own.keys():
        if steps[name] != own[name]:
            found.append(f"{name} {_value(steps[name])} (here {_value(own[name])})")
    return sorted(found)


def _in_words(shapes: tuple[Shape, ...]) -> str:
    return " and ".join("x".join(str(n) for n in shape) for shape in shapes)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(str(v) for v in value)
    return "none" if value is None else str(value)
