"""Settings that change nothing are said (E4), and those of broad patterns are not."""

import pytest

from qtool.config import QuantizeConfig
from qtool.graph.trace import trace
from qtool.pipeline.notes import note_idle_settings


@pytest.mark.parametrize(
    ("pattern", "settings", "note"),
    [
        (
            "relu1|add",
            {"per_channel_weights": True, "mode": "asym_u"},
            "overrides.relu1|add: per_channel_weights: no",
        ),
        (
            "pool",
            {"bits_weights": 4, "mode_weights": "sym"},
            "overrides.pool: bits_weights, mode_weights: no effect",
        ),
        ("relu1", {"bits_activations": 4}, None),
        ("conv1", {"bits_weights": 4}, None),
        (".*", {"bits_weights": 4}, None),
    ],
)
def test_e4_settings_of_weights_for_layers_without_any_are_noted(
    pattern, settings, note, tiny_net, tiny_batches, caplog
):
    with caplog.at_level("INFO", logger="qtool"):
        note_idle_settings(trace(tiny_net, tiny_batches[0]), QuantizeConfig(overrides={pattern: settings}))
    assert [message[: len(note or "")] for message in caplog.messages] == ([note] if note else [])
