"""Where two statistics files differ, and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtool.observers.files import read_stats
from qtool.observers.fingerprint import Fingerprint, differences_of_images
from qtool.observers.stats import ActivationStats, ModelStats, records
from qtool.pipeline.stats_records import STATISTICS, of_layers, values

NAMED = 5


@dataclass(frozen=True)
class TensorDifference:
    """How two records of one tensor differ.

    Args:
        place: the layer and which of its tensors.
        fields: by field, |a - b| as a share of the range of the tensor in both files together.
        others: what differs and is no such number, in words.
        distance: total variation of the two histograms, 0 to 1; None without two of them.
        counts: whether they are of different numbers of elements.
    """

    place: str
    fields: dict[str, float]
    others: tuple[str, ...] = ()
    distance: float | None = None
    counts: bool = False

    @property
    def worst(self) -> tuple[float, str]:
        """The largest difference of a field, and its name."""
        return max(((share, name) for name, share in self.fields.items()), default=(0.0, "-"))

    def beyond(self, tolerance: float) -> bool:
        """Whether this is a difference; without tolerance, histograms and numbers of elements count too."""
        exact = tolerance == 0 and (self.counts or (self.distance or 0) > 0)
        return bool(self.others) or exact or self.worst[0] > tolerance


def diff(
    file_a: Path, file_b: Path, patterns: Sequence[str], tolerance: float, top: int | None
) -> tuple[str, bool]:
    """What differs between two files as text, and whether they are equal within the tolerance.

    Args:
        file_a, file_b: what to compare.
        patterns: of layers, see stats_records.of_layers; all without any.
        tolerance: largest difference of a field that counts as none, as a share of the tensor's range.
        top: how many tensors to list, None for all that differ.

    Raises:
        StatsError: if a file cannot be read.
        ConfigError: if a pattern matches no layer of either file.
    """
    a, b = of_layers(patterns, read_stats(file_a), read_stats(file_b))
    fingerprints = (a.fingerprint, b.fingerprint)
    notes = [*differences_of_origin(*fingerprints), *differences_of_use(*fingerprints, "in B")]
    notes += [*only_in(a, b), *only_in(b, a)]
    pairs = list(compared(a, b))
    differing = [pair for pair in pairs if pair.beyond(tolerance)]
    if not notes and not differing:
        within = f" within {tolerance:g} of their range" if tolerance else ""
        return f"{len(pairs)} tensors are equal{within}", True
    lines = [f"A: {file_a}", f"B: {file_b}", *notes, *_rows(differing, top)]
    if any(pair.counts for pair in pairs):
        lines.append("the number of elements measured differs")
    beyond = f" by more than {tolerance:g} of their range" if tolerance else ""
    lines.append(f"{len(differing)} of {len(pairs)} tensors differ{beyond}")
    return "\n".join(lines), False


def compared(a: ModelStats, b: ModelStats) -> Iterator[TensorDifference]:
    """The differences of all tensors that both have; one under several names stands under its first."""
    there = dict(records(b))
    # Outputs first: an input then is the output of the layer that gives it.
    both = [(place, record, there[place]) for place, record in records(a) if place in there]
    seen = set()
    for place, x, y in sorted(both, key=lambda pair: not pair[0].endswith(".output")):
        found = difference(place, x, y)
        # The same values may be equal in one shape and not in another.
        key = (values(x), values(y), found.others)
        if key not in seen:
            seen.add(key)
            yield found


def difference(place: str, a: ActivationStats, b: ActivationStats) -> TensorDifference:
    """How two records differ; shapes without their first number, which in old files is that of a batch."""
    low, high = min(a.min, b.min), max(a.max, b.max)
    size = (high - low) or abs(high) or 1.0
    fields: dict[str, float] = {}
    others = []
    for name in STATISTICS:
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None):
            others.append(f"{name} in {'B' if x is None else 'A'} only")
        elif x is not None and x != y:
            fields[name] = abs(x - y) / size
    if a.shape is not None and b.shape is not None and a.shape[1:] != b.shape[1:]:
        others.append(f"shape {_in_words(a.shape)} in A, {_in_words(b.shape)} in B")
    distance = None
    if a.histogram is not None and b.histogram is not None:
        distance = a.histogram.total_variation(b.histogram)
    known = a.total_numel is not None and b.total_numel is not None
    return TensorDifference(place, fields, tuple(others), distance, known and a.total_numel != b.total_numel)


def _rows(differing: Sequence[TensorDifference], top: int | None) -> list[str]:
    if not differing:
        return []
    worst_first = sorted(differing, key=lambda d: (not d.others, -d.worst[0], -(d.distance or 0)))
    shown = worst_first[:top]
    names = max(len(text) for text in ("tensor", *(d.place for d in shown)))
    heads = "".join(name.rjust(9) for name in STATISTICS)
    lines = [f"{'tensor'.ljust(names)}  worst  {heads}  histogram"]
    for d in shown:
        numbers = "".join(
            (f"{d.fields[name]:.1e}" if name in d.fields else "0").rjust(9) for name in STATISTICS
        )
        distance = "-" if d.distance is None else f"{d.distance:.4f}"
        lines.append(f"{d.place.ljust(names)}  {d.worst[1]:7}{numbers}  {distance:>9}")
        lines += [f"  {other}" for other in d.others]
    if len(shown) < len(differing):
        lines.append(f"... and {len(differing) - len(shown)} more; --top lists more of them")
    lines.append("fields: |A - B| / range of the tensor; histogram: total variation, 0 to 1")
    return lines


def only_in(here: ModelStats, there: ModelStats) -> list[str]:
    """What only the first file has: whole layers, and tensors of layers that both have."""
    layers = [name for name in here.layers if name not in there.layers]
    places = set(dict(records(there)))
    tensors = [
        place
        for name, layer in here.layers.items()
        if name in there.layers
        for place, _ in records(ModelStats({name: layer}))
        if place not in places
    ]
    notes = []
    for kind, only in (("layers", layers), ("tensors", tensors)):
        if only:
            more = f", ... ({len(only)})" if len(only) > NAMED else ""
            notes.append(f"{kind} in {here.source} only: {', '.join(only[:NAMED])}{more}")
    return notes


def differences_of_origin(a: Fingerprint | None, b: Fingerprint | None) -> list[str]:
    """How the networks differ that two files were measured on."""
    if a is None or b is None:
        return []
    if a.names != b.names:
        return ["the names of the networks' layers, or their order, differ"]
    return (
        ["the sizes of the networks' tensors differ"] if a.sizes != b.sizes and a.inputs == b.inputs else []
    )


def differences_of_use(a: Fingerprint | None, b: Fingerprint | None, other: str) -> list[str]:
    """How the weights and the images differ; what one of the files does not say is no difference.

    Args:
        a, b: of the two files.
        other: what b is called in the text.
    """
    if a is None or b is None:
        return []
    weights = None not in (a.weights, b.weights) and a.weights != b.weights
    images = [text.replace("(here ", f"({other} ") for text in differences_of_images(a, b)]
    return ["the weights differ"] * weights + images


def _in_words(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)
