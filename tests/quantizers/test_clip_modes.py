"""Clip modes on a network: every one of them from one calibration, and weights by their own."""

import copy
from dataclasses import replace

import pytest
import torch

import qtool
from qtool.errors import ConfigError, StatsError
from qtool.numerics.metrics import sqnr_db
from qtool.numerics.spec import CLIP_MODES, HISTOGRAM_MODES, IMAGE_MODES
from qtool.observers.stats import LayerStats, ModelStats
from qtool.quantizers.weights import weight_values


@pytest.fixture
def quantized(varied_net, varied_stats, varied_batch):
    """Quantize the network with some settings."""

    def build(stats=varied_stats, net=varied_net, **settings):
        stats = None if settings.get("dynamic") else stats
        return qtool.quantize(net, stats, qtool.QuantizeConfig(**settings), example=varied_batch)

    return build


@pytest.fixture
def decibels(varied_net, varied_batch):
    """SQNR of the logits of a quantized network."""
    return lambda model: float(sqnr_db(varied_net(varied_batch), model(varied_batch)))


@pytest.mark.parametrize("mode", ["sym", "asym_u"])
@pytest.mark.parametrize("clip", [m for m in CLIP_MODES if m not in ("gauss", "laplace", "n_std")])
def test_every_estimator_gives_a_network_that_works(quantized, decibels, clip, mode):
    # The batch is of wider values than those of the calibration, which clipping to their mean shows most.
    averaged = decibels(quantized(clip_activations="avg", mode=mode))
    assert decibels(quantized(clip_activations=clip, mode=mode)) > averaged - 1


@pytest.mark.parametrize("clip", [*HISTOGRAM_MODES, *IMAGE_MODES])
def test_every_estimator_chooses_other_ranges_than_the_whole(quantized, clip):
    # Of so few values, the default settings leave out none.
    settings = {"percentile": {"clip_percentile": 99.0}, "quantile": {"clip_outlier_prob": 0.01}}
    whole = quantized(bits_activations=4)
    clipped = quantized(bits_activations=4, clip_activations=clip, **settings.get(clip, {}))
    scales = [float(model.plan.layers["up"].output.scale) for model in (clipped, whole)]
    assert scales[0] < 0.99 * scales[1]


def test_a_layer_can_have_another_estimator(quantized):
    all_mse = quantized(clip_activations="mse", bits_activations=4)
    mixed = quantized(
        clip_activations="mse",
        bits_activations=4,
        overrides={"fc": {"clip_activations": "percentile", "clip_percentile": 80.0}},
    )
    scales = [
        {n: p.output.scale.item() for n, p in m.plan.layers.items() if p.output} for m in (all_mse, mixed)
    ]
    assert scales[0].pop("fc") > scales[1].pop("fc")
    assert scales[0] == scales[1]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("mode", ["sym", "asym_u"])
def test_clipping_weights_by_their_error_lowers_it(quantized, varied_net, mode, per_channel):
    net = copy.deepcopy(varied_net)
    net.fc.weight.data = torch.randn(10, 224, generator=torch.Generator().manual_seed(0)) ** 3
    settings = {"mode": mode, "bits_weights": 4, "per_channel_weights": per_channel, "net": net}
    errors = []
    for clip in ("none", "mse"):
        layer = quantized(clip_weights=clip, **settings).plan.layers["fc"]
        values = weight_values(layer.weight, layer.weight_q)
        errors.append(float((values - net.fc.weight).square().sum()))
    assert errors[1] < 0.97 * errors[0]


def test_a_lower_percentile_of_weights_has_smaller_steps(quantized):
    scales = [
        quantized(clip_weights="percentile", clip_percentile_weights=p).plan.layers["fc"].weight.scale.item()
        for p in (90.0, 99.0, 100.0)
    ]
    assert scales == sorted(scales) and scales[0] < scales[-1]
    assert scales[-1] == pytest.approx(quantized().plan.layers["fc"].weight.scale.item(), rel=1e-3)


@pytest.mark.parametrize("clip", ["mse", "percentile", "quantile"])
def test_dynamic_mode_clips_what_passes(quantized, decibels, clip):
    settings = {"dynamic": True, "bits_activations": 4}
    clipped = quantized(clip_activations=clip, **settings)
    assert decibels(clipped) > 5
    assert decibels(clipped) != decibels(quantized(**settings))


def without(stats: ModelStats, *names: str) -> ModelStats:
    """Statistics as a file of Distiller's has them."""
    absent = dict.fromkeys(names)
    layers = {
        n: LayerStats(
            {i: replace(r, **absent) for i, r in layer.inputs.items()},
            layer.output and replace(layer.output, **absent),
        )
        for n, layer in stats.layers.items()
    }
    return ModelStats(layers, source="stats.yaml")


@pytest.mark.parametrize(
    ("clip", "absent", "wanted"),
    [(m, ("histogram",), "a histogram") for m in HISTOGRAM_MODES]
    + [(m, ("image_min", "image_max"), "image_min, image_max") for m in IMAGE_MODES],
)
def test_a_file_without_what_a_mode_needs_is_refused(quantized, varied_stats, clip, absent, wanted):
    message = rf"^stats.yaml: .*'conv1': clip mode {clip} needs {wanted}; calibrate again, the file has none$"
    with pytest.raises(StatsError, match=message):
        quantized(without(varied_stats, *absent), clip_activations=clip)


def test_activations_modes_do_not_clip_weights_per_channel(quantized):
    with pytest.raises(ConfigError, match="clip mode quantile is per tensor, the grid is per channel"):
        quantized(also_clip_weights=True, clip_activations="quantile", per_channel_weights=True)


def test_weights_per_channel_can_be_clipped_as_activations_are(quantized):
    settings = {"clip_activations": "mse", "per_channel_weights": True, "bits_weights": 4}
    also, own = quantized(also_clip_weights=True, **settings), quantized(clip_weights="mse", **settings)
    for name in ("conv1", "fc"):
        assert torch.equal(also.plan.layers[name].weight.scale, own.plan.layers[name].weight.scale)
