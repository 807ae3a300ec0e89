"""More bits for the first and the last layer, and for what they read."""

import pytest
import torch
from torch import nn

import qtool
from qtool.config import QuantizeConfig, check
from qtool.errors import ConfigError
from qtool.graph.trace import trace
from qtool.pipeline import steps


def _bits(net, batches, **settings):
    """(weights, output, fresh inputs) of each layer, with 4 bits and 8 at the ends."""
    config = QuantizeConfig(
        **{"bits_weights": 4, "bits_activations": 4, "first_last_bits": 8, "mode": "asym_u", **settings}
    )
    stats = None if config.dynamic else qtool.calibrate(net, batches)
    plan = qtool.quantize(net, stats, config, example=batches[0]).plan
    found = {}
    for name, layer in plan.layers.items():
        if layer.dynamic is not None:
            output = layer.dynamic.output.num_bits
            fresh = [one and one.grid.num_bits for one in layer.dynamic.inputs]
        else:
            output = layer.output and layer.output.spec.num_bits
            fresh = [grid and grid.spec.num_bits for grid in layer.inputs]
        found[name] = (layer.weight and layer.weight.spec.num_bits, output, fresh)
    return found


def test_the_ends_read_and_give_as_many_bits_as_their_weights_have(tiny_net, tiny_batches):
    found = _bits(tiny_net, tiny_batches)
    assert found["conv1"] == (8, 8, [8])
    assert found["depthwise"] == (4, 4, [None])
    assert found["add"] == (None, 4, [None, None])
    assert found["pool"] == (None, 8, [None])  # what it reads keeps its 4 bits
    assert found["fc"] == (8, 8, [8])


def test_dynamic_mode_has_the_same_ends(tiny_net, tiny_batches):
    found = _bits(tiny_net, tiny_batches, dynamic=True)
    assert found["conv1"] == (8, 8, [8])
    assert found["depthwise"] == (4, 4, [None])
    assert found["pool"] == (None, 8, [4])  # the sum in front of it stays in float
    assert found["fc"] == (8, 8, [8])


def test_what_an_override_sets_wins_and_the_rest_of_it_does_not_count(tiny_net, tiny_batches):
    overrides = {"conv1": {"bits_weights": 6}, "pool": {"bits_activations": 5}, "fc": {"mode": "sym"}}
    found = _bits(tiny_net, tiny_batches, overrides=overrides)
    assert (found["conv1"], found["pool"], found["fc"]) == ((6, 8, [8]), (None, 5, [None]), (8, 8, [8]))


def test_what_an_override_sets_for_one_input_wins_too(tiny_net, tiny_batches):
    for given, bits in (({"bits_activations": 5}, 5), ({"mode": "sym"}, 8)):
        found = _bits(tiny_net, tiny_batches, overrides={"conv1": {"input_overrides": {0: given}}})
        assert found["conv1"] == (8, 8, [bits])


def test_what_stays_in_float_stays_there(tiny_net, tiny_batches):
    assert _bits(tiny_net, tiny_batches, no_quant_layers=("fc",))["fc"] == (None, None, [])
    assert _bits(tiny_net, tiny_batches, bits_activations=0)["fc"] == (8, None, [None])
    assert _bits(tiny_net, tiny_batches, bits_weights=0)["pool"] == (None, 8, [None])


def test_values_that_are_only_selected_are_made_with_as_many_bits(tiny_batches):
    """A pooling by maximum, a ReLU or a concatenation cannot give more values than its input has."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.conv3, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(8 * 16, 2)
            self.pool = nn.MaxPool2d(2)

        def forward(self, x):
            x = torch.relu(self.conv1(x))
            x = torch.cat([torch.relu(self.conv2(x)), torch.relu(self.conv3(x))], 1)
            return self.fc(self.pool(x).flatten(1))

    found = _bits(Net().eval(), tiny_batches)
    assert found["conv2"] == found["conv3"] == (4, 8, [None])
    assert (found["cat"][1], found["pool"][1], found["fc"]) == (8, 8, (8, 8, [8]))


def test_other_layers_are_asked_what_they_were(tiny_net, tiny_batches):
    traced = trace(tiny_net, tiny_batches[0])
    plain = steps.specs_for(traced, QuantizeConfig(bits_weights=4))
    found = steps.specs_for(traced, QuantizeConfig(bits_weights=4, first_last_bits=8))
    assert [name for name in plain if plain[name] != found[name]] == ["conv1", "fc"]


def test_a_network_without_weights_has_no_ends(tiny_batches):
    traced = trace(nn.Sequential(nn.ReLU()).eval(), tiny_batches[0])
    with pytest.raises(ConfigError, match="--first-last-bits: the network has no layer with weights"):
        steps.specs_for(traced, QuantizeConfig(first_last_bits=8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"bits_weights": 0, "bits_activations": 0},
            "--first-last-bits: has no effect with --qe-bits-wts 0 and --qe-bits-acts 0",
        ),
        ({"bits_accum": 10}, "--first-last-bits: --qe-bits-accum: 10 bits are fewer than the 12"),
        (
            {"clip_activations": "gauss"},
            "--first-last-bits: --qe-clip-acts gauss: has published constants for up to 8",
        ),
    ],
)
def test_bits_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        check(QuantizeConfig(first_last_bits=12, **settings))
    assert str(caught.value).startswith(message)


def test_the_flag_is_shown_by_layers_and_checked(run_cli):
    shown = run_cli("layers", "-a", "resnet20_cifar", "--qe-bits-wts", 4, "--first-last-bits", 8)
    assert shown.exit_code == 0
    lines = {line.split()[0]: line for line in shown.stdout.splitlines()}
    assert ["weights 8-bit" in lines[n] for n in ("conv1", "layer1.0.conv1", "fc")] == [True, False, True]
    assert run_cli("layers", "-a", "resnet20_cifar", "--first-last-bits", 1).exit_code == 2
