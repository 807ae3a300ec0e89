"""The text of a commented file, for networks with unusual names and few layers."""

import re
from dataclasses import replace

import pytest
import yaml

from qtool.config import Config, LapqConfig, load_config
from qtool.config.layers import layer_specs
from qtool.config.template import NamedLayer, template

NAMED = {
    "one layer": [NamedLayer("fc", "linear", True)],
    "no weights": [NamedLayer("add", "add", False)],
    "no layers": [],
    "odd names": [NamedLayer("a-b.0", "conv", True), NamedLayer("a-b.null", "conv", True)],
    "words of YAML": [NamedLayer("0", "linear", True), NamedLayer("null", "relu", False)],
}


@pytest.mark.parametrize("layers", NAMED.values(), ids=NAMED)
def test_examples_of_overrides_match_whatever_the_names(layers, write_config):
    text = template(Config(), layers, "for a test")
    assert load_config(write_config(text)) == Config()
    shown = load_config(write_config(re.sub(r"^( +)#(?=[^ ]| {2})", r"\1", text, flags=re.MULTILINE)))
    specs = layer_specs(shown.quantizers, [layer.name for layer in layers])
    assert len(specs) == len(layers)
    assert bool(shown.quantizers.overrides) == any(layer.weighted for layer in layers)


def test_sections_beyond_the_usual_are_there_when_something_is_asked_of_them():
    plain = template(Config(), [], "t")
    searching = template(replace(Config(), lapq=LapqConfig(enabled=True)), [], "t")
    assert "lapq" not in yaml.safe_load(plain)
    further = plain[plain.index("# Further sections: corrections, lapq, search,") :]
    assert "conversion" in further and "#" in further
    assert yaml.safe_load(searching)["lapq"] == {"enabled": True}
    assert "# Further sections: corrections, search, " in searching


def test_help_names_keys_and_not_flags():
    comments = [line for line in template(Config(), [], "t").splitlines() if line.startswith("  # ")]
    assert "  # Like classes, for calib_data." in comments
    assert not [line for line in comments if re.search(r"--[a-z]", line)]


def test_lines_are_as_long_as_a_screen_is_wide():
    text = template(Config(), [NamedLayer(f"layer{i}", f"op{i}", True) for i in range(50)], "t")
    assert max(len(line) for line in text.splitlines() if "$schema" not in line) <= 110
