"""Merging calibrations: as if all images had been measured together, or not at all."""

from dataclasses import replace

import numpy as np
import pytest

from qtool.errors import OutputError, StatsError
from qtool.observers.files import read_stats
from qtool.observers.sidecar import to_bytes
from qtool.observers.stats import LayerStats, ModelStats, records
from qtool.pipeline.stats_merge import merge, merge_files


@pytest.fixture
def halves(images, network_stats):
    x = images(12)
    return network_stats(x[:8]), network_stats(x[8:])


def test_merged_file_is_that_of_all_images(write_stats, images, tmp_path):
    x = images(20)
    parts = [write_stats(str(i), part) for i, part in enumerate(x.split([8, 4, 8]))]
    assert merge_files(parts, tmp_path / "all.yaml") == f"3 calibrations of 3 layers\n{tmp_path / 'all.yaml'}"
    merged, whole = read_stats(tmp_path / "all.yaml"), read_stats(write_stats("whole", x))
    assert merged.fingerprint == whole.fingerprint
    wanted = dict(records(whole))
    for place, record in records(merged):
        other = wanted.pop(place)
        size = other.max - other.min
        assert (record.min, record.max, record.shape) == (other.min, other.max, other.shape)
        assert record.total_numel == other.total_numel
        assert record.histogram.exponent == other.histogram.exponent
        np.testing.assert_array_equal(record.histogram.counts, other.histogram.counts)
        for name in ("avg_min", "avg_max", "mean", "std"):
            assert getattr(record, name) == pytest.approx(getattr(other, name), abs=1e-9 * size), (
                place,
                name,
            )
        # Off by at most 2 |shift of the mean| x the largest share of a bin, see mean_deviation_moved.
        share = (other.histogram.counts / other.histogram.total).max()
        shifts = [abs(dict(records(read_stats(p)))[place].mean - other.mean) for p in parts]
        assert abs(record.b - other.b) <= 4 * max(shifts) * share + 1e-9 * size
        np.testing.assert_array_equal(record.image_min, other.image_min)
    assert not wanted


def test_a_tensor_under_several_names_is_stored_once(halves):
    merged = merge(*halves)
    relu, fc = merged.layers["relu"].output, merged.layers["fc"].inputs[0]
    assert relu.histogram is fc.histogram
    assert relu.image_min is fc.image_min
    assert (relu.shape, fc.shape) == ((1, 3, 4, 4), (1, 48))
    assert (len(relu.channel_max), fc.channel_max) == (3, None)
    assert len(to_bytes(merged)) < 1.5 * len(to_bytes(halves[0]))


def with_fingerprint(stats: ModelStats, **changes: object) -> ModelStats:
    return replace(stats, source="b.yaml", fingerprint=replace(stats.fingerprint, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": "other"}, "measured on another network than this calibration: the names of the networks'"),
        ({"sizes": "other"}, "measured on another network than this calibration: the sizes"),
    ],
)
def test_another_network_is_refused_even_as_is(halves, changes, message):
    a, b = halves
    for as_is in (False, True):
        with pytest.raises(StatsError, match=f"^b.yaml: {message}"):
            merge(a, with_fingerprint(b, **changes), as_is)


def test_other_weights_and_images_are_refused_unless_as_is(halves):
    a, b = halves
    other = with_fingerprint(b, weights="w2", preprocessing={"crop": 225, "mean": (0.5, 0.5, 0.5)})
    wanted = r"b.yaml: measured in another way .*: the weights differ; crop 225 \(there 224\); .* add --as-is"
    with pytest.raises(StatsError, match=wanted):
        merge(a, other)
    merged = merge(a, other, as_is=True)
    assert (merged.fingerprint.weights, merged.fingerprint.preprocessing) == (None, None)
    assert merged.fingerprint.names == a.fingerprint.names
    assert merge(a, replace(b, fingerprint=None)).fingerprint is None


def test_layers_and_tensors_missing_on_one_side_are_refused(halves):
    a, b = halves
    without = replace(b, layers={k: v for k, v in b.layers.items() if k != "relu"}, source="b.yaml")
    for pair in ((a, without), (without, a)):
        with pytest.raises(
            StatsError, match=r"another network than .*: layers in this calibration only: relu"
        ):
            merge(*pair)
    silent = replace(b, layers=dict(b.layers) | {"fc": LayerStats({}, b.layers["fc"].output)})
    with pytest.raises(StatsError, match=r"tensors in this calibration only: fc\.inputs\.0"):
        merge(a, silent)


def test_record_without_its_details_is_refused_by_name(halves):
    a, b = halves
    bare = replace(b.layers["fc"], output=replace(b.layers["fc"].output, b=None, histogram=None))
    with pytest.raises(StatsError, match=r"^b.yaml: fc\.output: b, histogram: missing"):
        merge(a, replace(b, source="b.yaml", layers=dict(b.layers) | {"fc": bare}))


def test_other_shapes_are_refused_by_name(halves):
    a, b = halves
    other = replace(b.layers["relu"], output=replace(b.layers["relu"].output, shape=(1, 3, 16)))
    with pytest.raises(StatsError, match=r"relu\.output: tensors of shape \(1, 3, 4, 4\) and \(1, 3, 16\)"):
        merge(a, replace(b, layers=dict(b.layers) | {"relu": other}))


def test_histograms_that_were_left_behind_are_asked_for(write_stats, images, tmp_path):
    a, b = write_stats("a", images(4)), write_stats("b", images(4, seed=1))
    (tmp_path / "b_histograms.npz").unlink()
    with pytest.raises(
        StatsError, match=r"b.yaml: its histograms, .*b_histograms.npz, are missing; put them back"
    ):
        merge_files([a, b], tmp_path / "c.yaml")
    assert not (tmp_path / "c.yaml").exists()


def test_file_that_never_had_histograms_is_refused(write_stats, images, shared_data, tmp_path):
    a, theirs = write_stats("a", images(4)), shared_data / "distiller" / "resnet18_quant_stats.yaml"
    for files in ([a, theirs], [theirs, a]):
        with pytest.raises(
            StatsError, match=r"resnet18_quant_stats.yaml: has no histograms .*qtool calibrate"
        ):
            merge_files(files, tmp_path / "c.yaml")


def test_histograms_of_another_file_are_refused(write_stats, images, tmp_path):
    a, b = write_stats("a", images(4)), write_stats("b", images(4, seed=1))
    (tmp_path / "a_histograms.npz").replace(tmp_path / "b_histograms.npz")
    with pytest.raises(StatsError, match=r"b_histograms.npz: does not belong to .*b.yaml"):
        merge_files([b, a], tmp_path / "c.yaml")


def test_images_never_count_twice(write_stats, images, tmp_path):
    a, b = write_stats("a", images(4)), write_stats("b", images(4, seed=1))
    for again in (a, tmp_path / "copy.yaml"):
        again.write_bytes(a.read_bytes())
        with pytest.raises(StatsError, match=r"holds the same as .*a\.yaml, whose images would count twice"):
            merge_files([a, b, again], tmp_path / "c.yaml")


def test_an_input_is_never_replaced(write_stats, images, tmp_path):
    a, b = write_stats("a", images(4)), write_stats("b", images(4, seed=1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "link.yaml").symlink_to(a)
    for output in (a, b, tmp_path / "link.yaml"):
        with pytest.raises(OutputError, match="is an input; name another file with -o"):
            merge_files([a, b], output, force=True)
    (tmp_path / "link.yaml").unlink()
    # Its histograms would be written over those of an input.
    a.rename(tmp_path / "a2.yaml")
    with pytest.raises(OutputError, match=r"a_histograms\.npz: is an input"):
        merge_files([tmp_path / "a2.yaml", b], a, force=True)
    assert (tmp_path / "a2.yaml").read_bytes() == before.pop("a.yaml")
    assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()


def test_output_that_is_there_is_replaced_by_force_only(write_stats, images, tmp_path):
    a, b = write_stats("a", images(4)), write_stats("b", images(4, seed=1))
    for name in ("c.yaml", "c_histograms.npz"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(OutputError, match=f"{name}: is there already; name another file with -o, or"):
            merge_files([a, b], tmp_path / "c.yaml")
        assert (tmp_path / name).read_text() == "mine"
        merge_files([a, b], tmp_path / "c.yaml", force=True)
        assert read_stats(tmp_path / "c.yaml").layers["fc"].output.total_numel == 80
        for path in tmp_path.glob("c*"):
            path.unlink()
