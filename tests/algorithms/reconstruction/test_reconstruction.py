"""Block-wise reconstruction on networks: the simulation is the network, and what is kept is better."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from qtool.algorithms.reconstruction import ReconstructionSettings, first_images, reconstruct
from qtool.algorithms.reconstruction.blocks import find_blocks
from qtool.algorithms.reconstruction.simulate import SimulatedBlock
from qtool.algorithms.store import MemoryStore
from qtool.quantizers.lockstep import Lockstep, integer_layers
from qtool.quantizers.prepare import build

# A tenth of so few images would be two.
FAST = ReconstructionSettings(iterations=120, batch=6, held_out=0.2, drop=0.5)


class Residual(nn.Module):
    """Two residual blocks, branches that are concatenated, a depthwise layer, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.left = nn.Conv2d(4, 6, 1)
        self.right = nn.Conv2d(4, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.point = nn.Conv2d(12, 8, 1)
        self.act = nn.ReLU6()
        self.gate = nn.Hardswish()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.conv2(self.act(self.conv1(x))))
        x = torch.relu(self.squeeze(x))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        x = self.gate(self.point(self.act(self.depthwise(x))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Residual().eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 10, 10, generator=generator) for n in (8, 8, 5)]


def _run(planned_w4, net, batches, settings=FAST, store=None, progress=None, layers=None, **config):
    folded, plan = planned_w4(net, batches, **{"per_channel_weights": True, "bits_activations": 4, **config})
    names = integer_layers(folded.traced, plan) if layers is None else layers
    return (folded, plan), reconstruct(
        folded.traced,
        folded,
        plan,
        batches,
        layers=names,
        settings=settings,
        store=store,
        progress=progress,
    )


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("mode", ["asym_u", "sym"])
def test_a_block_that_was_not_learned_gives_what_the_quantized_network_gives(
    net, batches, planned_w4, mode, bits
):
    folded, plan = planned_w4(net, batches, mode=mode, bits_activations=bits)
    lockstep = Lockstep(folded.traced, folded, plan, batches)
    blocks = find_blocks(lockstep.folded.traced.graph, integer_layers(folded.traced, plan))
    assert len(blocks) == 5
    for block in blocks:
        read, grid = lockstep.quant_values(block.entry)
        simulated = SimulatedBlock(lockstep.folded.traced, block, plan.layers, learn_scales=True)
        for weight in simulated.weights.values():
            weight.decided = weight.start()
        found = simulated(read[0] if grid is None else read[0] * grid.scale)
        expected, grid = lockstep.quant_values(block.exit)
        values = expected[0] if grid is None else expected[0] * grid.scale
        step = 1e-5 if grid is None else float(grid.scale)
        # Ties, which float values may break another way, move single values by one step.
        assert float(((found - values).abs() > 0.5 * step).float().mean()) < 0.001


@pytest.mark.parametrize(
    "config", [{}, {"mode": "sym", "per_channel_weights": False}, {"bits_activations": 8}]
)
def test_logits_come_closer_to_the_float_network(net, batches, planned_w4, logits_sqnr, config):
    (folded, plan), (new, new_plan, report) = _run(planned_w4, net, batches, **config)
    before = logits_sqnr(net, folded, plan, batches)
    assert logits_sqnr(net, new, new_plan, batches) > before + 0.4
    assert [change.name for change in report.changed] == integer_layers(folded.traced, plan)
    moved = [
        name
        for name, layer in plan.layers.items()
        if layer.output is not None and not layer.output.same_grid(new_plan.layers[name].output)
    ]
    assert moved


def test_a_block_is_learned_as_a_whole_better_than_layer_by_layer(net, batches, planned_w4, logits_sqnr):
    names = ["squeeze", "left", "right"]
    losses = []
    for unit in ("block", "layer"):
        settings = replace(FAST, unit=unit)
        (folded, _), (new, new_plan, _) = _run(planned_w4, net, batches, settings, layers=names)
        lockstep = Lockstep(folded.traced, new, new_plan, batches)
        block = next(b for b in find_blocks(lockstep.folded.traced.graph, names) if "left" in b.layers)
        wanted = torch.cat(lockstep.float_values(block.exit))
        values, grid = lockstep.quant_values(block.exit)
        losses.append(float((torch.cat(values) * grid.scale - wanted).square().sum()))
    assert losses[0] < losses[1]


def test_a_max_pool_hands_on_a_scale_that_is_learned(batches, planned_w4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3)).eval()
    (_, plan), (_, new_plan, _) = _run(planned_w4, net, batches, max_pool_grid="input")
    assert new_plan.layers["2"].output is new_plan.layers["0"].output
    assert not new_plan.layers["0"].output.same_grid(plan.layers["0"].output)


def test_no_block_gets_worse_on_all_images(net, batches, planned_w4):
    """With so few steps at so large a rate nothing useful is learned."""
    settings = replace(FAST, iterations=2, learning_rate=30.0)
    (_, plan), (_, new_plan, report) = _run(planned_w4, net, batches, settings)
    dropped = [change.name for change in report.changed if "was dropped" in change.note]
    assert dropped
    for name in dropped:
        assert torch.equal(plan.layers[name].weight_q, new_plan.layers[name].weight_q)
        assert plan.layers[name].output.same_grid(new_plan.layers[name].output)


def test_scales_and_dropping_can_be_left_out(net, batches, planned_w4):
    settings = replace(FAST, scale_learning_rate=0.0)
    (_, plan), (_, new_plan, _) = _run(planned_w4, net, batches, settings)
    for name, layer in plan.layers.items():
        assert layer.output is None or layer.output.same_grid(new_plan.layers[name].output)
    plans = [_run(planned_w4, net, batches, replace(FAST, drop=drop))[1][1] for drop in (0.0, 0.5)]
    assert not torch.equal(*(p.layers["conv1"].weight_q for p in plans))


def test_the_plan_builds_the_network_that_was_walked(net, batches, planned_w4):
    _, (new, new_plan, _) = _run(planned_w4, net, batches)
    lockstep = Lockstep(new.traced, new, new_plan, batches)
    quantized = build(new, new_plan)
    with torch.no_grad():
        assert torch.equal(lockstep.network(batches[0]), quantized.network(batches[0]))


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(net, batches, planned_w4):
    plans = [_run(planned_w4, net, batches, replace(FAST, seed=seed))[1][1] for seed in (3, 3, 4)]
    first, again, other = ([p.layers[n].weight_q for n in ("conv1", "conv2", "fc")] for p in plans)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_run_that_was_ended_goes_on_to_the_same_bytes(net, batches, planned_w4, blocks):
    class Stopping(MemoryStore):
        left = blocks

        def put(self, key, tensors):
            super().put(key, tensors)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    store = Stopping()
    with pytest.raises(KeyboardInterrupt):
        _run(planned_w4, net, batches, store=store)
    _, (_, resumed, report) = _run(planned_w4, net, batches, store=store)
    _, (_, whole, expected) = _run(planned_w4, net, batches)
    assert report == expected
    for name, layer in whole.layers.items():
        if layer.weight_q is not None:
            assert torch.equal(layer.weight_q, resumed.layers[name].weight_q)
        if layer.bias_q is not None:
            assert torch.equal(layer.bias_q, resumed.layers[name].bias_q)
        assert layer.output is None or layer.output.same_grid(resumed.layers[name].output)


def test_what_was_given_stays_and_other_layers_keep_their_integers(net, batches, planned_w4):
    (folded, plan), (_, new_plan, report) = _run(planned_w4, net, batches, layers=["conv1"])
    _, fresh = planned_w4(net, batches, per_channel_weights=True, bits_activations=4)
    assert [change.name for change in report.changed] == ["conv1"]
    for name in integer_layers(folded.traced, plan):
        assert torch.equal(plan.layers[name].weight_q, fresh.layers[name].weight_q)
        assert torch.equal(plan.layers[name].weight_q, new_plan.layers[name].weight_q) == (name != "conv1")


def test_progress_is_told_within_blocks_and_estimates_the_rest(net, batches, planned_w4):
    seen = []
    _run(planned_w4, net, batches, progress=seen.append)
    assert {p.number for p in seen} == {1, 2, 3, 4, 5} and {p.of for p in seen} == {5}
    assert len(seen) > 50
    assert seen[0].seconds_left is None and seen[-1].seconds_left is not None
    assert "squeeze to right" in {p.name for p in seen}


def test_at_most_so_many_images_are_used(batches):
    assert [len(batch) for batch in first_images(batches, 10)] == [8, 2]
    assert [len(batch) for batch in first_images(batches, 16)] == [8, 8]
    assert [len(batch) for batch in first_images(batches, 100)] == [8, 8, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "net"}, "unit must be one of block, layer, found 'net'"),
        ({"drop": 1.5}, "drop must be from 0 to 1, found 1.5"),
        ({"regularizer": 0.0}, "regularizer must be above 0, found 0.0"),
        ({"scale_learning_rate": -1.0}, "scale_learning_rate must be at least 0, found -1.0"),
        ({"images": 0}, "images must be at least 1, found 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionSettings(**settings)
