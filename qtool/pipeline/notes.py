"""What a user may want to know about settings that are valid and change nothing."""

from __future__ import annotations

import logging

from torch import fx

from qtool.config import QuantizeConfig
from qtool.config.layers import matching
from qtool.graph.trace import layers
from qtool.quantizers.plan import WEIGHTED

LOG = logging.getLogger("qtool")

# Settings of an override that only layers with weights have a use for.
OF_WEIGHTS = ("bits_weights", "mode_weights", "per_channel_weights", "weight_range_factors", "accum_dtype")


def note_idle_settings(traced: fx.GraphModule, config: QuantizeConfig) -> None:
    """Say which settings of weights are asked of layers without any.

    A broad pattern may match such layers beside others, which needs no note.
    """
    with_weights = {name for name, node, _ in layers(traced) if node.meta["op"] in WEIGHTED | {"embedding"}}
    names = [name for name, _, _ in layers(traced)]
    for pattern, settings in config.overrides.items():
        idle = [key for key in OF_WEIGHTS if key in settings]
        if idle and with_weights.isdisjoint(matching(pattern, names)):
            LOG.info(
                "overrides.%s: %s: no effect, as no layer that it matches has weights",
                pattern,
                ", ".join(idle),
            )
