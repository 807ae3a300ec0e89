"""Stored values come back as they were, and a damaged file is refused."""

import json

import numpy as np
import pytest

from qtool.errors import ConfigError
from qtool.pipeline.gate.baseline import FLAGS, differences, read_baseline, write_baseline


@pytest.mark.parametrize("noise", [1.0, 0.0, np.inf])
def test_a_baseline_comes_back(tmp_path, evidence, store, noise):
    stored = store(evidence(images=1000, losses=3, noise=noise))
    again = read_baseline(write_baseline(tmp_path / "b.json", {"w8": stored}))["w8"]
    assert (again.inputs, again.values) == (stored.inputs, stored.values)
    assert all(np.array_equal(getattr(again, name), getattr(stored, name)) for name in FLAGS)


def test_no_file_is_an_empty_baseline(tmp_path):
    assert read_baseline(tmp_path / "none.json") == {}


def damaged(tree: dict) -> list[str]:
    yield "{"
    yield "[]"
    yield json.dumps(tree | {"format": 2})
    yield json.dumps(tree | {"runs": []})
    for key in tree["runs"]["w8"]:
        yield json.dumps(
            {"format": 1, "runs": {"w8": {k: v for k, v in tree["runs"]["w8"].items() if k != key}}}
        )
        yield json.dumps({"format": 1, "runs": {"w8": tree["runs"]["w8"] | {key: "Az"}}})


def test_a_damaged_file_is_refused(tmp_path, evidence, store):
    path = write_baseline(tmp_path / "b.json", {"w8": store(evidence())})
    for text in damaged(json.loads(path.read_text())):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"b\.json: not a baseline"):
            read_baseline(path)


def test_differences_name_values_inputs_and_images(evidence, store):
    old = {"a": store(evidence()), "b": store(evidence()), "same": store(evidence())}
    new = {"a": store(evidence(losses=10), seed=4), "c": store(evidence()), "same": old["same"]}
    assert differences(old, new) == [
        "a: top1: 98.000 -> 97.000",
        "a: drop: 0.000 -> 1.000",
        "a: agreement: 100.000 -> 99.000",
        "a: seed: 0 -> 4",
        "a: images that are right in one of the two only: 10",
        "c: new: top1 98.000, drop 0.000, agreement 100.000, logit_sqnr_db 30.000",
        "b: removed",
    ]
    assert differences(old, old) == ["no difference"]
