"""The binary file beside a stats YAML: histograms, and the extremes of images and channels.

A NumPy archive of a few long arrays, compressed, the same bytes for the same statistics. A tensor that
stands under several names is stored once.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from qtool.errors import StatsError
from qtool.numerics.histogram import Histogram
from qtool.observers.stats import ActivationStats, LayerStats, ModelStats, records

T = TypeVar("T")

FORMAT = 1
# NumPy takes 6: a sixth smaller, and five times as long to write.
COMPRESSION = 1
VECTORS = ("image_min", "image_max", "channel_min", "channel_max")


def to_bytes(stats: ModelStats) -> bytes | None:
    """The content of the file, or None if there is nothing to store."""
    places: list[str] = []
    rows: list[list[int]] = []
    histograms, vectors = _Pool[Histogram](), _Pool[NDArray[np.float32]]()
    for place, record in records(stats):
        row = [histograms.index(record.histogram)]
        row += [vectors.index(getattr(record, name)) for name in VECTORS]
        if any(index >= 0 for index in row):
            places.append(place)
            rows.append(row)
    if not places:
        return None
    arrays: dict[str, Any] = {
        "format": np.array(FORMAT),
        "places": np.array(places),
        "rows": np.array(rows, dtype=np.int32),
        "exponents": np.array([h.exponent for h in histograms.items], dtype=np.int16),
        "firsts": np.array([h.first for h in histograms.items], dtype=np.int32),
        "bins": np.array([len(h.counts) for h in histograms.items], dtype=np.int32),
        "counts": _joined([h.counts for h in histograms.items], np.dtype(np.int64)),
        "lengths": np.array([len(v) for v in vectors.items], dtype=np.int64),
        "values": _joined(vectors.items, np.dtype(np.float32)),
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, values in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, values, allow_pickle=False)
            # A name alone would take the time of day along.
            entry = zipfile.ZipInfo(f"{name}.npy")
            archive.writestr(entry, member.getvalue(), zipfile.ZIP_DEFLATED, COMPRESSION)
    return file.getvalue()


def _joined(parts: list[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)


class _Pool(Generic[T]):
    """Items without their repetitions, by identity."""

    def __init__(self) -> None:
        self.items: list[T] = []
        self._known: dict[int, int] = {}

    def index(self, item: T | None) -> int:
        """Where an item is, -1 for None."""
        if item is None:
            return -1
        if id(item) not in self._known:
            self._known[id(item)] = len(self.items)
            self.items.append(item)
        return self._known[id(item)]


def with_details(stats: ModelStats, content: bytes, source: str) -> ModelStats:
    """Statistics with what a file of to_bytes holds of them.

    Raises:
        StatsError: if the file is damaged, or of a newer qtool.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if int(arrays["format"]) > FORMAT:
            raise StatsError(f"{source}: written by a newer qtool (format {int(arrays['format'])}); update")
        found = _details(arrays)
    except (ValueError, KeyError, IndexError, TypeError, OSError, EOFError) as error:
        raise StatsError(f"{source}: damaged ({error}); run 'qtool calibrate' again") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise StatsError(f"{source}: damaged ({error}); run 'qtool calibrate' again") from error
    layers = {name: _layer_with(name, layer, found) for name, layer in stats.layers.items()}
    return replace(stats, layers=layers)


def _details(arrays: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, Any]]:
    """Fields of the record at each place."""
    counts = np.split(arrays["counts"], np.cumsum(arrays["bins"])[:-1])
    histograms = [
        Histogram(int(exponent), int(first), part)
        for exponent, first, part in zip(arrays["exponents"], arrays["firsts"], counts, strict=False)
    ]
    vectors = np.split(arrays["values"], np.cumsum(arrays["lengths"])[:-1])
    found = {}
    for place, (histogram, *indices) in zip(arrays["places"].tolist(), arrays["rows"].tolist(), strict=True):
        fields: dict[str, Any] = {n: vectors[i] for n, i in zip(VECTORS, indices, strict=True) if i >= 0}
        if histogram >= 0:
            fields["histogram"] = histograms[histogram]
        found[place] = fields
    return found


def _layer_with(name: str, layer: LayerStats, found: Mapping[str, dict[str, Any]]) -> LayerStats:
    def detailed(place: str, record: ActivationStats) -> ActivationStats:
        return replace(record, **found[place]) if place in found else record

    return LayerStats(
        {i: detailed(f"{name}.inputs.{i}", record) for i, record in layer.inputs.items()},
        None if layer.output is None else detailed(f"{name}.output", layer.output),
    )
