"""Which layers change together."""

from collections import Counter

import pytest
import torch
import torchvision
from torch import Tensor, nn

import qtool
from qtool.config import QuantizeConfig
from qtool.graph.fold import Folded, fold_batch_norms, move_stats
from qtool.graph.trace import trace
from qtool.pipeline.steps import specs_for
from qtool.quantizers.plan import ModelPlan, plan_dynamic, plan_model
from qtool.search.groups import Group, layer_groups, quantizer_groups


def planned(net: nn.Module, x: Tensor, config: QuantizeConfig | None = None) -> tuple[Folded, ModelPlan]:
    folded = fold_batch_norms(trace(net, x))
    specs = specs_for(folded.traced, config or QuantizeConfig())
    stats = move_stats(qtool.calibrate(net, [x]), folded.pairs)
    return folded, plan_model(folded.traced, stats, specs)


def layers_of(groups: tuple[Group, ...]) -> list[set[str]]:
    return [set(group.layers) for group in groups]


class Branches(nn.Module):
    """Two convolutions meet in a sum, whose result meets a third in another sum; then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = (*(nn.Conv2d(3, 3, 1) for _ in range(3)), nn.Linear(3, 4))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        first = self.relu(self.a(x) + self.b(x))
        return self.fc((first + self.c(first)).mean((2, 3)))


@pytest.fixture
def branches() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Branches().eval(), torch.randn(2, 3, 4, 4)


def test_branches_that_meet_in_a_sum_change_together_and_the_sum_itself_does_not(branches):
    folded, plan = planned(*branches)
    found = layers_of(quantizer_groups(folded.traced, plan))
    assert found[:2] == [{"a", "b"}, {"add1", "relu", "c"}]
    assert {"fc"} in found and {"add2"} in found


def test_a_group_is_named_by_its_first_layer_with_weights(branches):
    folded, plan = planned(*branches)
    groups = quantizer_groups(folded.traced, plan)
    assert [group.name for group in groups[:2]] == ["a", "c"]
    assert groups[1].layers == ("add1", "relu", "c")  # in the order of execution


def test_no_operation_of_integers_is_left_with_mixed_inputs(branches):
    folded, plan = planned(*branches)
    specs = specs_for(folded.traced, QuantizeConfig())
    stats = plan.edited_stats
    assert stats is not None
    for group in quantizer_groups(folded.traced, plan):
        left = {name: spec for name, spec in specs.items() if name not in group.layers}
        after = plan_model(folded.traced, stats, left).layers
        for name, layer in after.items():
            if layer.op in ("add", "mul", "cat") and layer.kind == "integer":
                before = [own is not None for own in plan.layers[name].inputs]
                now = [own is not None for own in layer.inputs]
                assert all(now) or now == before, (group, name)


@pytest.mark.parametrize("group_by", [quantizer_groups, layer_groups])
def test_every_quantized_layer_is_in_exactly_one_group(branches, group_by):
    folded, plan = planned(*branches)
    count = Counter(name for group in group_by(folded.traced, plan) for name in group.layers)
    assert count == dict.fromkeys(plan.layers, 1)


def test_an_activation_goes_with_the_layer_that_computes_it(tiny_net, tiny_batches):
    folded, plan = planned(tiny_net, tiny_batches[0])
    found = layers_of(layer_groups(folded.traced, plan))
    assert {"conv1", "relu1"} in found and {"depthwise", "relu2"} in found


def test_layers_left_in_float_are_in_no_group(tiny_net, tiny_batches):
    config = QuantizeConfig(overrides={"depthwise": {"bits_weights": 0, "bits_activations": 0}})
    folded, plan = planned(tiny_net, tiny_batches[0], config)
    assert "depthwise" not in {n for g in quantizer_groups(folded.traced, plan) for n in g.layers}


def test_layers_with_one_weight_change_together():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    net[2].weight = net[0].weight
    folded, plan = planned(net, torch.randn(2, 4))
    assert layers_of(layer_groups(folded.traced, plan)) == [{"0", "2"}, {"1"}]


def test_a_dynamic_plan_has_groups_too(tiny_net, tiny_batches):
    folded = fold_batch_norms(trace(tiny_net, tiny_batches[0]))
    plan = ModelPlan(plan_dynamic(folded.traced, specs_for(folded.traced, QuantizeConfig())))
    found = layers_of(quantizer_groups(folded.traced, plan))
    assert {"conv1", "relu1"} in found and {"fc"} in found
    assert "add" not in set().union(*found)  # sums stay in float there


def test_in_resnet18_a_downsampling_convolution_goes_with_the_branch_that_it_meets():
    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval()
    folded, plan = planned(net, torch.randn(1, 3, 64, 64))
    by_name = {group.name: set(group.layers) for group in quantizer_groups(folded.traced, plan)}
    assert by_name["layer2.0.conv2"] == {"layer2.0.conv2", "layer2.0.downsample.0"}
    assert by_name["layer1.0.conv2"] == {"layer1.0.conv2", "maxpool"}
    assert by_name["layer1.0.conv1"] == {"layer1.0.conv1", "layer1.0.relu1"}
    single = {group.name for group in layer_groups(folded.traced, plan)}
    assert {"layer2.0.conv2", "layer2.0.downsample.0", "maxpool"} <= single
