"""Where two statistics files differ, and by how much."""

from dataclasses import replace

import pytest

from qtool.observers.fingerprint import Fingerprint
from qtool.observers.stats import ActivationStats, LayerStats, ModelStats
from qtool.pipeline.stats_diff import diff, difference, differences_of_origin, differences_of_use


@pytest.fixture
def compare():
    """compare(a, b, tolerance=0.0, top=None): text and whether they are equal."""

    def compare(a, b, patterns=(), tolerance=0.0, top=None):
        return diff(a, b, patterns, tolerance, top)

    return compare


def tensors(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines() if line.split()[0].count(".") and "e-0" in line]


def test_files_of_the_same_images_are_equal(write_stats, images, compare):
    a, b = write_stats("a", images(8)), write_stats("b", images(8))
    assert compare(a, b) == ("4 tensors are equal", True)


def test_difference_is_relative_to_the_range_of_the_tensor():
    a, b = ActivationStats(-1, 1, mean=0.0, std=0.5), ActivationStats(-1, 3, mean=0.4, std=0.5)
    found = difference("x", a, b)
    assert found.fields == {"max": 0.5, "mean": 0.1}
    assert found.worst == (0.5, "max")
    assert found.beyond(0.49)
    assert not found.beyond(0.5)


def test_constant_tensors_are_compared_by_their_value():
    assert difference("x", ActivationStats(4, 4, mean=4.0), ActivationStats(4, 4, mean=3.0)).worst == (
        0.25,
        "mean",
    )
    assert difference("x", ActivationStats(0, 0, mean=0.0), ActivationStats(0, 0, mean=0.0)).worst == (0, "-")


def test_worst_tensors_come_first_and_the_rest_is_counted(write_stats, images, network_stats, compare):
    stats = network_stats(images(8))
    moved = dict(stats.layers)
    for name, share in (("conv1", 0.01), ("relu", 0.2), ("fc", 0.1)):
        record = moved[name].output
        mean = record.mean + share * (record.max - record.min)
        moved[name] = replace(moved[name], output=replace(record, mean=mean))
    a, b = write_stats("a", stats), write_stats("b", replace(stats, layers=moved))
    text, equal = compare(a, b)
    assert not equal
    assert tensors(text)[:3] == ["relu.output", "fc.output", "conv1.output"]
    assert "2.0e-01" in next(line for line in text.splitlines() if line.startswith("relu.output"))
    short, _ = compare(a, b, top=1)
    assert tensors(short) == ["relu.output"]
    assert "more; --top lists more of them" in short
    assert compare(a, b, top=0)[0].splitlines()[-1] == text.splitlines()[-1]


def test_within_the_tolerance_files_are_equal(write_stats, images, compare):
    a, b = write_stats("a", images(8)), write_stats("b", images(12))
    text, equal = compare(a, b)
    assert not equal
    assert "the number of elements measured differs" in text
    worst = float(text.splitlines()[3].split()[["min", "max", "avg_min", "avg_max", "mean", "std", "b"].index(
        text.splitlines()[3].split()[1]) + 2])  # fmt: skip
    assert compare(a, b, tolerance=min(1.0, worst * 1.1)) == (
        f"4 tensors are equal within {min(1.0, worst * 1.1):g} of their range", True,
    )  # fmt: skip
    assert not compare(a, b, tolerance=worst * 0.9)[1]


def test_histograms_count_without_tolerance_only(write_stats, images, network_stats, compare):
    stats = network_stats(images(8))
    record = stats.layers["fc"].output
    counts = record.histogram.counts.copy()
    counts[[0, -1]] += [5, 3]
    other = replace(record, histogram=replace(record.histogram, counts=counts))
    layers = dict(stats.layers) | {"fc": replace(stats.layers["fc"], output=other)}
    a, b = write_stats("a", stats), write_stats("b", replace(stats, layers=layers))
    text, equal = compare(a, b)
    assert not equal
    assert text.splitlines()[-1] == "1 of 4 tensors differ"
    distance = record.histogram.total_variation(other.histogram)
    assert text.splitlines()[3].split() == ["fc.output", "-", *"0000000", f"{distance:.4f}"]
    assert compare(a, b, tolerance=1e-9)[1]


def test_layers_and_tensors_of_one_file_only_are_named(write_stats, images, network_stats, compare):
    stats = network_stats(images(8))
    fewer = {name: layer for name, layer in stats.layers.items() if name != "relu"}
    fewer["fc"] = LayerStats({}, stats.layers["fc"].output)
    a, b = write_stats("a", stats), write_stats("b", replace(stats, layers=fewer))
    text, equal = compare(a, b, tolerance=1.0)
    assert not equal
    assert f"layers in {a} only: relu" in text
    assert f"tensors in {a} only: fc.inputs.0" in text
    assert compare(b, a, patterns=("conv1",)) == ("2 tensors are equal", True)
    assert f"layers in {a} only: relu" in compare(b, a, patterns=("relu",))[0]


def test_fields_and_shapes_that_differ_are_named_whatever_the_tolerance():
    a, b = ActivationStats(0, 1, b=0.3, shape=(1, 4)), ActivationStats(0, 1, shape=(256, 5))
    found = difference("x", a, b)
    assert found.others == ("b in A only", "shape 1x4 in A, 256x5 in B")
    assert found.beyond(1.0)
    assert not difference("x", a, replace(a, shape=(256, 4))).others


def test_what_differs_in_the_fingerprints_is_said_in_words():
    a = Fingerprint(((3, 8, 8),), "n", "s", "w", {"crop": 224, "mean": (0.5, 0.25)})
    assert differences_of_origin(a, a) == differences_of_use(a, a, "in B") == []
    assert differences_of_origin(a, None) == differences_of_use(None, a, "in B") == []
    assert differences_of_origin(a, replace(a, names="m")) == [
        "the names of the networks' layers, or their order, differ"
    ]
    assert differences_of_origin(a, replace(a, sizes="t")) == ["the sizes of the networks' tensors differ"]
    other = replace(a, weights="v", preprocessing={"crop": 225, "mean": (0.5, 0.25)})
    assert differences_of_use(a, other, "in B") == ["the weights differ", "crop 224 (in B 225)"]
    assert differences_of_use(a, replace(a, weights=None, preprocessing=None), "in B") == []


def test_a_tensor_under_several_names_is_listed_once(write_stats, images, compare):
    text, _ = compare(write_stats("a", images(8)), write_stats("b", images(8, seed=1)))
    assert sorted(tensors(text)) == ["conv1.inputs.0", "conv1.output", "fc.output", "relu.output"]


def test_files_of_distiller_are_compared(shared_data, compare):
    a, b = (shared_data / "distiller" / f"resnet{n}_quant_stats.yaml" for n in (18, 50))
    assert compare(a, a)[1]
    text, equal = compare(a, b, top=3)
    assert not equal
    assert f"layers in {b} only: layer1.0.conv3," in text


def test_networks_without_a_common_layer_differ(write_stats, compare):
    a = write_stats("a", ModelStats({"x": LayerStats({}, ActivationStats(0, 1))}))
    b = write_stats("b", ModelStats({"y": LayerStats({}, ActivationStats(0, 1))}))
    text, equal = compare(a, b)
    assert not equal
    assert text.splitlines()[-1] == "0 of 0 tensors differ"
