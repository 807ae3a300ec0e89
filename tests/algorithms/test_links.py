import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtool.algorithms.links import Rescaling, Shifts, find_links, response, scaled_weight, why_no_shift
from qtool.graph.edit import replace_layers
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import trace

NAMES = ("conv1", "depthwise", "project", "expand", "fc")


def folded_of(net, example):
    return fold_batch_norms(trace(net, example)).traced


def test_links_of_a_chain_are_found_and_its_end_is_not_a_complaint(chain_net, tiny_batches):
    links, left = find_links(folded_of(chain_net, tiny_batches[0]), NAMES)
    assert [(link.first, link.readers[0].name, link.passed) for link in links] == [
        ("conv1", "depthwise", ("relu1",)),
        ("depthwise", "project", ("relu2",)),
        ("project", "expand", ()),
        ("expand", "fc", ("relu3",)),
    ]
    assert left == {}


def test_a_layer_in_front_of_one_that_stays_says_so(chain_net, tiny_batches):
    links, left = find_links(folded_of(chain_net, tiny_batches[0]), {"conv1", "project", "expand"})
    assert [link.first for link in links] == ["project"]
    assert left["conv1"] == "'depthwise', which reads it, is not to be changed"
    assert left["expand"] == "'fc', which reads it, is not to be changed"


def test_residual_sums_are_named(tiny_net, tiny_batches):
    links, left = find_links(folded_of(tiny_net, tiny_batches[0]), {"conv1", "depthwise", "fc"})
    assert links == []
    assert left == {"conv1": "'add' (add) reads it", "depthwise": "'add' (add) reads it"}


@given(
    seed=st.integers(0, 1000),
    groups=st.sampled_from([1, 2, 4]),
    transposed=st.booleans(),
    wide=st.floats(0.0, 6.0),
)
def test_factors_move_over_any_pair(seed, groups, transposed, wide):
    generator = torch.Generator().manual_seed(seed)
    cls = nn.ConvTranspose2d if transposed else nn.Conv2d
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            cls(4, 8, 3, padding=1, groups=groups), nn.ReLU6(),
            cls(8, 4, 2, groups=groups), nn.LeakyReLU(0.1), nn.Flatten(), nn.LazyLinear(3),
        )  # fmt: skip
        x = 3 * torch.randn(2, 4, 5, 5, generator=generator)
        net(x)
    traced = trace(net.eval(), x)
    links, _ = find_links(traced, {"0", "2", "5"})
    assert [link.first for link in links] == ["0", "2"]
    rescaling = Rescaling(traced)
    for link in links:
        rescaling.divide(link, torch.exp(wide * torch.randn(link.channels, generator=generator)))
    after = replace_layers(traced, {name: new for name, _, new in rescaling.layers()})
    expected = traced(x)
    assert float((after(x) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_the_given_network_stays_as_it_was(chain_net, tiny_batches):
    traced = folded_of(chain_net, tiny_batches[0])
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    links, _ = find_links(traced, NAMES)
    rescaling = Rescaling(traced)
    rescaling.divide(links[0], torch.full((8,), 2.0))
    changed = [name for name, _, _ in rescaling.layers()]
    assert changed == ["conv1", "relu1", "depthwise"]
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())


def test_grouped_weights_are_scaled_as_a_loop_over_channels_does():
    weight = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))  # 3 groups, C_in = 6
    outputs, inputs = torch.arange(1.0, 7), torch.arange(10.0, 16)
    found = scaled_weight(weight, 3, outputs, inputs)
    for out in range(6):
        for j in range(2):
            channel = out // 2 * 2 + j
            torch.testing.assert_close(found[out, j], weight[out, j] * inputs[channel] / outputs[out])


def test_the_response_to_a_constant_is_that_of_the_layer():
    layer = nn.Conv2d(6, 4, 3, groups=2, bias=False)
    constants = torch.randn(6)
    found = layer(constants.reshape(1, 6, 1, 1).expand(1, 6, 3, 3)).flatten()
    torch.testing.assert_close(response(layer.weight, 2, constants).float(), found)


def test_constants_move_over_a_link_without_padding(chain_net, tiny_batches):
    traced = folded_of(chain_net, tiny_batches[0])
    links, _ = find_links(traced, NAMES)
    (link,) = [link for link in links if link.first == "project"]
    assert why_no_shift(link, traced) is None
    shifts = Shifts(traced)
    shifts.subtract(link, torch.tensor([1.0, -2.0, 30.0, 0.0]))
    after = replace_layers(traced, {name: new for name, _, new in shifts.layers()})
    torch.testing.assert_close(after(tiny_batches[0]), traced(tiny_batches[0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(after.project.bias, torch.tensor([-1.0, 2.0, -30.0, 0.0]))


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (nn.Conv2d(4, 2, 3, padding=1), "pads its input with zeros"),
        (nn.Conv2d(4, 2, 3, padding="same"), "pads its input with zeros"),
        (nn.ConvTranspose2d(4, 2, 3), "pads its input with zeros"),
        (nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), None),
        (nn.Conv2d(4, 2, 3, padding="valid"), None),
    ],
)
def test_constants_do_not_pass_padding_with_zeros(second, why):
    traced = trace(nn.Sequential(nn.Conv2d(3, 4, 1), second).eval(), torch.randn(1, 3, 6, 6))
    (link,), _ = find_links(traced, {"0", "1"})
    found = why_no_shift(link, traced)
    assert found is None if why is None else why in found
