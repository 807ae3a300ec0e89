"""What is not rounded between layers on integers: the network's output, its sums, and max pools."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import qtool
from qtool.algorithms.gptq import GptqSettings, gptq
from qtool.config import QuantizeConfig, check
from qtool.deploy.engine import choose_engine
from qtool.deploy.native import IN_FLOAT, INT8, convert
from qtool.deploy.native.files import from_file, to_file
from qtool.errors import ConfigError
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import trace
from qtool.numerics.metrics import sqnr_db
from qtool.pipeline import steps
from qtool.pipeline.coverage import coverage
from qtool.pipeline.describe import layer_table
from qtool.quantizers.adjust import adjusted
from qtool.quantizers.lockstep import integer_layers
from qtool.quantizers.prepare import build


def test_the_output_may_stay_in_float(tiny_net, tiny_batches):
    (x,) = tiny_batches[:1]
    stats = qtool.calibrate(tiny_net, tiny_batches)
    asked = QuantizeConfig(mode="asym_u", float_output=True)
    found = qtool.quantize(tiny_net, stats, asked).plan.layers
    assert (found["fc"].kind, found["fc"].output, found["fc"].weight.spec.num_bits) == (
        "weights only",
        None,
        8,
    )
    assert found["pool"].output.spec.num_bits == 8
    # Nothing is lost against an output of so many steps that their size does not matter.
    fine = QuantizeConfig(mode="asym_u", overrides={"fc": {"bits_activations": 16}})
    a, b = (qtool.quantize(tiny_net, stats, c)(x) for c in (asked, fine))
    coarse = qtool.quantize(tiny_net, stats, QuantizeConfig(mode="asym_u"))(x)
    assert float((a - b).abs().max()) < 0.1 * float((a - coarse).abs().max())


def test_an_activation_at_the_end_stays_in_float_with_its_layer(tiny_batches):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval()
    stats = qtool.calibrate(net, tiny_batches)
    found = qtool.quantize(net, stats, QuantizeConfig(float_output=True)).plan.layers
    assert [(layer.kind, layer.output) for layer in found.values()] == [
        ("weights only", None),
        ("float", None),
    ]


def test_an_override_of_the_last_layer_wins_over_the_float_output(tiny_net, tiny_batches):
    asked = QuantizeConfig(float_output=True, overrides={"fc": {"bits_activations": 6}})
    found = qtool.quantize(tiny_net, qtool.calibrate(tiny_net, tiny_batches), asked).plan.layers
    assert found["fc"].output.spec.num_bits == 6


def test_a_single_layer_still_reads_its_input_on_a_grid(tiny_batches):
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    stats = qtool.calibrate(net, tiny_batches)
    plan = qtool.quantize(net, stats, QuantizeConfig(float_output=True, bits_activations=5)).plan
    assert [grid.spec.num_bits for grid in plan.layers["0"].inputs] == [5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"float_output": True, "dynamic": True}, "--qe-float-output: has no effect with --qe-dynamic"),
        (
            {"float_output": True, "bits_activations": 0},
            "--qe-float-output: has no effect with --qe-bits-acts",
        ),
        (
            {"add_rounding": "none", "bits_activations": 0},
            "--qe-add-rounding: has no effect with --qe-bits-acts",
        ),
        ({"add_rounding": "sum", "dynamic": True}, "--qe-add-rounding: with --qe-dynamic additions are made"),
        ({"max_pool_grid": "input", "dynamic": True}, "--qe-max-pool-grid: has no effect with --qe-dynamic"),
        (
            {"max_pool_grid": "input", "bits_activations": 0},
            "--qe-max-pool-grid: has no effect with --qe-bits-acts",
        ),
    ],
)
def test_what_has_no_effect_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        check(QuantizeConfig(**settings))


class Blocks(nn.Module):
    """A stem with pooling, a block whose sum goes through ReLU, and one behind it."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(2)
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.third, self.fourth = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        x = self.third(x) + self.fourth(x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def blocks():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Blocks().eval()


def _quantized(net, batches, **settings):
    config = QuantizeConfig(**{"mode": "asym_u", "per_channel_weights": True, **settings})
    return qtool.quantize(net, qtool.calibrate(net, batches), config)


def test_neither_sums_nor_what_they_add_up_are_rounded(blocks, tiny_batches):
    plan = _quantized(blocks, tiny_batches, add_rounding="none", bits_activations=5).plan.layers
    on_grid = {name: layer.output.spec.num_bits for name, layer in plan.items() if layer.output is not None}
    assert on_grid == {"first": 5, "mean": 5, "fc": 5}
    reads = {n: [g and g.spec.num_bits for g in layer.inputs] for n, layer in plan.items() if layer.weight}
    # second reads what first gives on a grid; third and fourth put one float sum on the same grid.
    assert reads == {"stem": [5], "first": [5], "second": [None], "third": [5], "fourth": [5], "fc": [None]}
    assert plan["third"].inputs[0].same_grid(plan["fourth"].inputs[0])


def test_the_values_are_those_of_float_sums_of_integer_products(blocks, tiny_batches):
    model = _quantized(blocks, tiny_batches, add_rounding="none", bits_activations=5, float_output=True)
    plan, x = model.plan.layers, torch.cat(tiny_batches)

    def rounded(values, grid):
        q = (values.double() / grid.scale.double()).round() + grid.zero_point
        return (q.clamp(grid.spec.quant_min, grid.spec.quant_max) - grid.zero_point) * grid.scale.double()

    def layer(name, values, activated=False):
        own, module = plan[name], getattr(blocks, name)
        read = values if own.inputs[0] is None else rounded(values, own.inputs[0])
        axis = (-1, *[1] * (own.weight_q.dim() - 1))
        weight = (own.weight_q.double() - own.weight.zero_point.reshape(axis)) * own.weight.scale.reshape(
            axis
        )
        function = nn.functional.linear if name == "fc" else nn.functional.conv2d
        more = {} if name == "fc" else {"padding": module.padding}
        y = function(read, weight.double(), module.bias.double(), **more)
        y = torch.relu(y) if activated else y
        return y if own.output is None else rounded(y, own.output)

    with torch.no_grad():
        y = blocks.pool(layer("stem", x, activated=True))
        y = torch.relu(y + layer("second", layer("first", y, activated=True)))
        y = layer("third", y) + layer("fourth", y)
        expected = layer("fc", rounded(y.mean((2, 3)), plan["mean"].output))
    off = (model(x).double() - expected).abs()
    assert float(off.max()) < 1e-5 * float(expected.abs().max())


def test_a_max_pool_may_hand_on_the_integers_that_it_reads(blocks, tiny_batches):
    settings = {"bits_activations": 4, "first_last_bits": 8, "max_pool_grid": "input"}
    model = _quantized(blocks, tiny_batches, **settings)
    plan = model.plan.layers
    assert plan["pool"].output is plan["stem"].output
    assert plan["pool"].output.spec.num_bits == 8
    seen = {}
    for name in ("stem", "pool"):
        model.network.get_submodule(name).register_forward_hook(
            lambda _module, _args, y, name=name: seen.update({name: y})
        )
    model(torch.cat(tiny_batches))
    assert torch.equal(seen["pool"], torch.nn.functional.max_pool2d(seen["stem"], 2))
    own = _quantized(blocks, tiny_batches, **settings | {"max_pool_grid": "own"}).plan.layers["pool"].output
    assert own.spec.num_bits == 4


@pytest.mark.parametrize("own", [{"bits_activations": 4}, {"output_range": [0.0, 1.0]}])
def test_a_max_pool_with_bits_or_a_range_of_its_own_keeps_them(own, blocks, tiny_batches):
    settings = {"max_pool_grid": "input", "overrides": {"pool": own}}
    plan = _quantized(blocks, tiny_batches, **settings).plan.layers
    assert plan["pool"].output.scale != plan["stem"].output.scale
    assert plan["pool"].output.spec.num_bits == own.get("bits_activations", 8)


def test_a_max_pool_of_floats_has_a_grid_of_its_own(blocks, tiny_batches):
    settings = {"max_pool_grid": "input", "no_quant_layers": ("stem",)}
    assert _quantized(blocks, tiny_batches, **settings).plan.layers["pool"].output.spec.num_bits == 8


def test_a_new_grid_is_handed_on_by_a_max_pool(blocks, tiny_batches):
    model = _quantized(blocks, tiny_batches, max_pool_grid="input")
    given = model.plan.layers["stem"].output
    wider = replace(given, scale=given.scale * 2)
    folded = fold_batch_norms(trace(blocks, tiny_batches[0])).traced
    plan = adjusted(folded, model.plan, outputs={"stem": wider}).layers
    assert plan["pool"].output is plan["stem"].output is wider
    # A grid that the pool is given itself is its own from then on.
    plan = adjusted(folded, model.plan, outputs={"pool": wider}).layers
    assert (plan["stem"].output, plan["pool"].output) == (given, wider)


def test_the_table_of_layers_says_that_a_grid_is_handed_on(blocks, tiny_batches):
    traced = trace(blocks, tiny_batches[0])
    lines = layer_table(traced, steps.specs_for(traced, QuantizeConfig(max_pool_grid="input"))).splitlines()
    (line,) = [line for line in lines if line.startswith("pool ")]
    assert line.endswith("output on its input's grid (computes in float)")


def test_a_fused_sum_takes_one_summand_from_its_accumulator(blocks, tiny_batches):
    model = _quantized(blocks, tiny_batches, add_rounding="fused", bits_activations=5)
    plan = model.plan.layers
    # second and fourth run last, and nothing else reads them; third is another summand, on its grid.
    assert [name for name, layer in plan.items() if layer.kind == "weights only"] == ["second", "fourth"]
    sums = {name: layer for name, layer in plan.items() if layer.op == "add"}
    assert [layer.kind for layer in sums.values()] == ["fake", "fake"]
    assert all(layer.output.spec.num_bits == 5 for layer in (*sums.values(), plan["third"]))
    assert [layer.activation for layer in sums.values()] == ["relu", None]
    seen = {}
    for name in ("third", "fourth", "add2"):

        def note(_module, args, y, name=name):
            seen[name] = (args, y)

        model.network.get_submodule(name).register_forward_hook(note)
    model(torch.cat(tiny_batches))
    (summands, y), grid = seen["add2"], plan["add2"].output
    assert torch.equal(summands[1], seen["fourth"][1])
    assert torch.equal(summands[0], seen["third"][1] * plan["third"].output.scale)
    exact = (summands[0].double() + summands[1].double()) / grid.scale.double()
    low, high = (end - grid.zero_point for end in (grid.spec.quant_min, grid.spec.quant_max))
    assert float((y.double() - exact.clamp(low, high)).abs().max()) <= 0.5 + 1e-4


def test_a_summand_that_something_else_reads_is_not_fused(tiny_batches):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.one(x)
            return self.two(y) * (y + x)

    plan = _quantized(Net().eval(), tiny_batches, add_rounding="fused").plan.layers
    assert plan["one"].kind == plan["add"].kind == "integer"


def test_fewer_roundings_cost_less(tiny_batches):
    found = dict.fromkeys(("sum", "fused", "none"), 0.0)
    x = torch.cat(tiny_batches)
    for seed in range(6):
        torch.manual_seed(seed)
        net = Blocks().eval()
        for rounding in found:
            model = _quantized(net, tiny_batches, add_rounding=rounding, bits_activations=5)
            found[rounding] += sqnr_db(net(x), model(x)) / 6
    assert found["none"] > found["fused"] > found["sum"]


def test_what_computes_in_float_takes_a_sum_as_it_is(tiny_batches):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x):
            x = x + self.one(x)
            x = x + self.two(self.norm(x))
            return self.fc(self.norm(x))

    torch.manual_seed(0)
    batches = [torch.randn(16, 8) for _ in range(2)]
    plan = _quantized(Net().eval(), batches, add_rounding="none").plan.layers
    norms = [layer for layer in plan.values() if layer.op == "layer_norm"]
    assert len(norms) == 2 and all(n.output is not None and set(n.inputs) == {None} for n in norms)
    sums = [layer for layer in plan.values() if layer.op == "add"]
    assert len(sums) == 2 and all(layer.output is None for layer in (*sums, plan["one"], plan["two"]))


def test_an_override_of_a_summand_wins(blocks, tiny_batches):
    overrides = {"second": {"bits_activations": 6}}
    plan = _quantized(blocks, tiny_batches, add_rounding="none", overrides=overrides).plan.layers
    assert plan["second"].output.spec.num_bits == 6


@pytest.mark.parametrize("rounding", ["fused", "none"])
def test_a_checkpoint_gives_the_same_network(rounding, blocks, tiny_batches, tmp_path):
    model = _quantized(blocks, tiny_batches, add_rounding=rounding, bits_activations=5)
    x = torch.cat(tiny_batches)
    again = qtool.load(qtool.save(model, tmp_path / "q.pth.tar"), blocks, x)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("rounding", ["fused", "none"])
def test_corrections_see_what_its_layers_read(rounding, blocks, tiny_batches):
    """What a layer with a float output reads is on its grid when its integers are chosen."""
    settings = {"add_rounding": rounding, "bits_weights": 3, "bits_activations": 8}
    model = _quantized(blocks, tiny_batches, **settings)
    folded = fold_batch_norms(qtool.trace(blocks, tiny_batches[0]))
    names = integer_layers(folded.traced, model.plan)
    assert names == ["stem", "first", "second", "third", "fourth", "fc"]
    new, plan, report = gptq(
        folded.traced, folded, model.plan, tiny_batches, layers=names, settings=GptqSettings()
    )
    x = torch.cat(tiny_batches)
    assert len(report.changed) == len(names)
    assert sqnr_db(blocks(x), build(new, plan)(x)) > sqnr_db(blocks(x), model(x)) + 1


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rounding", ["sum", "fused", "none"])
def test_layers_that_give_floats_run_on_int8_kernels(rounding, bits, blocks, tiny_batches):
    settings = {
        "add_rounding": rounding,
        "float_output": True,
        "mode_weights": "sym",
        "bits_activations": bits,
    }
    model = _quantized(blocks, tiny_batches, **settings)
    chosen = choose_engine(model, "int8")
    runs = {n: layer.runs for n, layer in chosen.native.layers.items() if model.plan.layers[n].weight}
    assert runs == dict.fromkeys(("stem", "first", "second", "third", "fourth", "fc"), INT8)
    assert chosen.work == 1.0
    x = torch.cat(tiny_batches)
    torch.testing.assert_close(chosen.network(x), model(x), rtol=0, atol=1e-4)


def test_a_layer_that_reads_floats_stays_in_float(blocks, tiny_batches):
    settings = {
        "mode_weights": "sym",
        "overrides": {"fc": {"bits_activations": 0}, "mean": {"bits_activations": 0}},
    }
    native = choose_engine(_quantized(blocks, tiny_batches, **settings), "int8").native
    assert native.layers["fc"].runs == IN_FLOAT and "only its weights" in native.layers["fc"].why


def test_asymmetric_weights_are_computed_in_float(blocks, tiny_batches):
    model = _quantized(blocks, tiny_batches, float_output=True, mode_weights="asym_u")
    layer = choose_engine(model, "int8").native.layers["fc"]
    assert layer.runs == IN_FLOAT and "--qe-mode-wts sym" in layer.why


def test_a_file_holds_layers_that_give_floats(blocks, tiny_batches, tmp_path):
    model = _quantized(blocks, tiny_batches, add_rounding="none", float_output=True, mode_weights="sym")
    native = convert(model)
    path = tmp_path / "native.pt"
    path.write_bytes(to_file(native, tiny_batches[0]))
    x = torch.cat(tiny_batches)
    torch.testing.assert_close(from_file(path)(x), model(x), rtol=0, atol=1e-4)
    assert torch.equal(from_file(path)(x), native(x))


def test_layers_that_give_floats_count_as_quantized(blocks, tiny_batches):
    traced = qtool.trace(blocks, tiny_batches[0])
    for rounding in ("sum", "fused", "none"):
        asked = QuantizeConfig(add_rounding=rounding, float_output=True)
        assert coverage(traced, steps.specs_for(traced, asked)).percent == 100
    weights_alone = QuantizeConfig(overrides={"second": {"bits_activations": 0}})
    assert list(coverage(traced, steps.specs_for(traced, weights_alone)).left) == ["second"]


@pytest.mark.parametrize("rounding", ["sum", "fused", "none"])
@pytest.mark.parametrize("left", [("add.*",), ("second", "mean"), ("relu.*", "pool"), (".*",)])
def test_layers_that_are_not_quantized_stay_as_they_are(left, rounding, blocks, tiny_batches):
    model = _quantized(blocks, tiny_batches, add_rounding=rounding, no_quant_layers=left, float_output=True)
    x = torch.cat(tiny_batches)
    assert sqnr_db(blocks(x), model(x)) > 20
    names = [name for name, layer in model.plan.layers.items() if re.fullmatch("|".join(left), name)]
    assert names and all(model.plan.layers[n].kind in ("float", "identity") for n in names)


def test_the_list_of_layers_says_what_stays_in_float(run_cli):
    flags = ("--qe-bits-acts", 4, "--qe-float-output", "--qe-add-rounding", "fused")
    lines = run_cli("layers", "-a", "resnet20_cifar", *flags).stdout.splitlines()
    shown = {line.split()[0]: line for line in lines if line.strip()}
    assert shown["layer1.0.conv1"].endswith("weights 8-bit sym, output 4-bit sym")
    assert shown["layer1.0.conv2"].endswith("weights 8-bit sym, output in float")
    assert shown["layer1.0.residual_eltwiseadd"].endswith("output 4-bit sym (input 1 in float)")
    assert shown["fc"].endswith("weights 8-bit sym, output in float")
