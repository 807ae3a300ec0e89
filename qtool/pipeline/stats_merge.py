"""Calibrations of one network on several machines, merged as if one had seen all images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtool.errors import OutputError, StatsError
from qtool.observers.files import histograms_of, read_stats
from qtool.observers.fingerprint import Fingerprint
from qtool.observers.sidecar import VECTORS
from qtool.observers.stats import ActivationStats, LayerStats, ModelStats, records
from qtool.pipeline.stats_diff import differences_of_origin, differences_of_use, only_in
from qtool.pipeline.stats_files import histograms_path, save_stats
from qtool.run_dir import check_writable

LOG = logging.getLogger("qtool")

CALIBRATE = "measure this network with 'qtool calibrate'"


def merge_files(files: Sequence[Path], output: Path, as_is: bool = False, force: bool = False) -> str:
    """Merge statistics files into another one; what to say at the end.

    Raises:
        StatsError: if they cannot be read or merged, see merge.
        OutputError: if the output is an input, is there already and force is not given, or cannot be
            written.
    """
    _check_output(files, output, force)
    _check_repeated(files)
    merged = None
    for file in files:
        stats = read_stats(file)
        _check_details(stats, file)
        merged = stats if merged is None else merge(merged, stats, as_is)
    assert merged is not None
    save_stats(merged, output)
    return f"{len(files)} calibrations of {len(merged.layers)} layers\n{output}"


def merge(a: ModelStats, b: ModelStats, as_is: bool = False) -> ModelStats:
    """The statistics of the images of both.

    Integers are exact, and so are min and max; the rest is as exact as ActivationStats.merge.

    Args:
        a, b: of the same network, with histograms.
        as_is: whether other weights and images preprocessed in another way pass.

    Raises:
        StatsError: naming what differs or is missing.
    """
    _check_same(a, b, as_is)
    pool = _Merged()
    layers = {}
    for name, layer in a.layers.items():
        other = b.layers[name]
        inputs = {
            i: pool.record(f"{b.source}: {name}.inputs.{i}", record, other.inputs[i])
            for i, record in layer.inputs.items()
        }
        output = layer.output
        if output is not None and other.output is not None:
            output = pool.record(f"{b.source}: {name}.output", output, other.output)
        layers[name] = LayerStats(inputs, output)
    return ModelStats(layers, a.source, _common(a.fingerprint, b.fingerprint))


class _Merged:
    """Merged records; details of a tensor that stands under several names are stored once for all of them."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], Any] = {}

    def record(self, where: str, a: ActivationStats, b: ActivationStats) -> ActivationStats:
        try:
            merged = a.merge(b)
        except ValueError as error:
            raise StatsError(f"{where}: {error}; {CALIBRATE}") from error
        details = {}
        for name in ("histogram", *VECTORS):
            # By identity: the files' own details are in memory as long as this is.
            key = (name, id(getattr(a, name)), id(getattr(b, name)))
            details[name] = self._known.setdefault(key, getattr(merged, name))
        return replace(merged, **details)


def _check_same(a: ModelStats, b: ModelStats, as_is: bool) -> None:
    network = [*only_in(a, b), *only_in(b, a), *differences_of_origin(a.fingerprint, b.fingerprint)]
    if network:
        raise StatsError(
            f"{b.source}: measured on another network than {a.source}: {'; '.join(network)}; {CALIBRATE}"
        )
    use = differences_of_use(b.fingerprint, a.fingerprint, "there")
    if use and not as_is:
        raise StatsError(
            f"{b.source}: measured in another way than {a.source}: {'; '.join(use)}; "
            "measure again with 'qtool calibrate', or add --as-is"
        )


def _common(a: Fingerprint | None, b: Fingerprint | None) -> Fingerprint | None:
    """What both files say alike of their origin; the rest is unknown."""
    if a is None or b is None:
        return None
    same: dict[str, Any] = {
        "weights": a.weights if a.weights == b.weights else None,
        "preprocessing": a.preprocessing if a.preprocessing == b.preprocessing else None,
    }
    return replace(a, **same)


def _check_details(stats: ModelStats, file: Path) -> None:
    """Refuse a file of which the histograms are missing, and say why they are."""
    if any(record.histogram is not None for _, record in records(stats)):
        return
    beside = histograms_of(file)
    if beside is None:
        raise StatsError(
            f"{file}: has no histograms (Distiller's files have none), without which averages and b "
            f"cannot be merged; {CALIBRATE}"
        )
    raise StatsError(
        f"{file}: its histograms, {beside}, are missing; put them back beside it, or {CALIBRATE}"
    )


def _check_repeated(files: Sequence[Path]) -> None:
    """Refuse a calibration that is given twice, whose images would count twice."""
    contents: dict[bytes, Path] = {}
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise StatsError(f"{file}: cannot be read: {error.strerror}") from error
        if content in contents:
            raise StatsError(
                f"{file}: holds the same as {contents[content]}, whose images would count twice; leave it out"
            )
        contents[content] = file


def _check_output(files: Sequence[Path], output: Path, force: bool) -> None:
    written = (output, histograms_path(output))
    read = [path for file in files if file.exists() for path in (file, histograms_of(file)) if path]
    for path in written:
        if path.resolve() in [other.resolve() for other in read]:
            raise OutputError(f"{path}: is an input; name another file with -o")
        if path.exists() and not force:
            raise OutputError(
                f"{path}: is there already; name another file with -o, or replace it with --force"
            )
        check_writable(path)
