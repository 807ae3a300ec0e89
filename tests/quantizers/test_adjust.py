"""New grids for single weights and outputs: the same bits as a network that is built from scratch."""

import copy
import io
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qtool
from qtool.graph.fold import fold_batch_norms, move_stats
from qtool.graph.trace import trace
from qtool.numerics.affine import qparams_from_range
from qtool.numerics.spec import QParams, QuantSpec
from qtool.pipeline.steps import specs_for
from qtool.quantizers.adjust import Adjustable, adjusted
from qtool.quantizers.checkpoint import to_checkpoint
from qtool.quantizers.plan import EMBEDDING, FAKE, INTEGER, WEIGHTS_ONLY, output_ranges, plan_model
from qtool.quantizers.prepare import build
from qtool.quantizers.weights import quantize_weight

SETTINGS = {
    "sym": {},
    "asym per channel, 4 bits": {
        "mode": "asym_u", "per_channel_weights": True, "bits_weights": 4, "bits_activations": 4
    },
    "weights only": {"bits_activations": 0, "bits_weights": 4},
    "acts only": {"bits_weights": 0, "mode": "asym_s"},
    "multipliers": {"scale_approx_bits": 8},
    "multipliers everywhere": {"scale_approx_bits": 8, "scale_approx_everywhere": True},
    "unsigned": {"symmetric_unsigned": True},
    "narrow accumulators": {"bits_accum": 12, "mode": "asym_u"},
    "wide": {"bits_weights": 12, "bits_activations": 12, "mode": "asym_u"},
}  # fmt: skip


class Words(nn.Module):
    """(N, 5) token numbers -> (N, 3): an embedding, products of its rows, an overflowing sum."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.dropout = nn.Dropout()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, index):
        x = self.dropout(self.embedding(index.long()))
        attention = torch.softmax(torch.matmul(x, self.first(x).transpose(1, 2)), -1)
        return self.second(torch.matmul(attention, x)).mean(1)


class Case:
    """A quantized network, and the specs that it was planned from."""

    def __init__(self, net: nn.Module, batch: Tensor, options: dict):
        self.batch = batch
        traced = trace(net, batch)
        self.folded = fold_batch_norms(traced)
        self.stats = move_stats(qtool.calibrate(traced, [batch]), self.folded.pairs)
        self.specs = specs_for(traced, qtool.QuantizeConfig(**options))
        self.modules = dict(self.folded.traced.named_modules())
        self.plan = plan_model(self.folded.traced, self.stats, self.specs)
        self.ranges = output_ranges(self.folded.traced, self.stats, self.specs)

    def parts(self) -> list[tuple[str, str]]:
        """Every weight and output that has a range of its own."""
        found = [(n, "weight") for n, p in self.plan.layers.items() if p.kind in (INTEGER, WEIGHTS_ONLY)]
        found = [(n, part) for n, part in found if self.plan.layers[n].weight is not None]
        return found + [(n, "output") for n, p in self.plan.layers.items() if p.kind in (INTEGER, FAKE)]

    def scaled(self, name: str, part: str, factor: float) -> QParams:
        """The grid of a range that is a multiple of the layer's own; its specs ask for it from now on."""
        spec = self.specs[name]
        if part == "weight":
            self.specs = {**self.specs, name: replace(spec, weight_range_factors=(factor, factor))}
            return quantize_weight(name, self.modules[name], spec.weight, self.specs[name])[0]
        low, high = (factor * end for end in self.ranges[name])
        self.specs = {**self.specs, name: replace(spec, output_range=(low, high))}
        return qparams_from_range(
            torch.tensor(low), torch.tensor(high), self.plan.layers[name].output.spec, spec.scale_approx_bits
        )  # fmt: skip


@pytest.fixture(scope="session")
def cases(varied_net, varied_batch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        words, index = Words().eval(), torch.randint(0, 20, (4, 5)).float()
    nets = {"varied": (varied_net, varied_batch), "words": (words, index)}
    made: dict[tuple[str, str], Case] = {}

    def case(net: str, options: str) -> Case:
        if (net, options) not in made:
            made[net, options] = Case(*nets[net], SETTINGS[options])
        return copy.copy(made[net, options])

    return case


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, QParams) and isinstance(b, QParams):
        return a.spec == b.spec and same(a.scale, b.scale) and same(a.zero_point, b.zero_point)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def bytes_of(model) -> bytes:
    buffer = io.BytesIO()
    torch.save(to_checkpoint(model), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("net", ["varied", "words"])
@settings(max_examples=6)
@given(data=st.data())
def test_new_grids_give_the_bits_of_a_network_built_from_scratch(cases, net, options, data):
    case = cases(net, options)
    adjustable = Adjustable(case.folded, case.plan)
    several = st.lists(st.sampled_from(case.parts()), min_size=1, max_size=3, unique=True)
    for chosen in data.draw(st.lists(several, min_size=1, max_size=3)):
        new = {"weight": {}, "output": {}}
        for name, part in chosen:
            new[part][name] = case.scaled(name, part, data.draw(st.floats(0.1, 8)))
        adjustable.change(weights=new["weight"], outputs=new["output"])
        expected = plan_model(case.folded.traced, case.stats, case.specs)
        found = adjustable.model.plan
        for name, layer in expected.layers.items():
            wrong = [f.name for f in fields(layer)
                     if not same(getattr(layer, f.name), getattr(found.layers[name], f.name))]  # fmt: skip
            assert not wrong, (name, wrong)
        rebuilt = build(case.folded, expected)
        assert torch.equal(adjustable.model(case.batch), rebuilt(case.batch))
        assert bytes_of(adjustable.model) == bytes_of(rebuilt)


def test_an_embedding_and_its_readers_follow_its_weight(cases):
    case = cases("words", "sym")
    plan = case.plan.layers["embedding"]
    assert plan.kind == EMBEDDING
    new = replace(plan.weight, scale=3 * plan.weight.scale)
    adjustable = Adjustable(case.folded, case.plan)
    before = adjustable.model(case.batch)
    assert {"embedding", "first", "matmul1"} <= adjustable.change(weights={"embedding": new})
    found = adjustable.model.plan
    assert found.layers["embedding"].output is new
    ratio = found.layers["first"].accum_scale / case.plan.layers["first"].accum_scale
    assert float(ratio) == pytest.approx(3.0)
    assert not torch.equal(adjustable.model(case.batch), before)
    assert torch.equal(adjustable.model(case.batch), build(case.folded, found)(case.batch))


def test_what_does_not_depend_on_a_grid_stays_the_same_object(cases):
    case = cases("varied", "sym")
    found = adjusted(
        case.folded.traced, case.plan, outputs={"conv1": case.scaled("conv1", "output", 2.0)}
    ).layers  # fmt: skip
    changed = {name for name, layer in found.items() if layer is not case.plan.layers[name]}
    assert changed == {"conv1", "depthwise", "add"}  # its readers: one convolution, one sum
    assert found["depthwise"].weight_q is case.plan.layers["depthwise"].weight_q


def test_only_modules_that_changed_are_replaced(cases):
    case = cases("varied", "sym")
    adjustable = Adjustable(case.folded, case.plan)
    before = dict(adjustable.model.network.named_modules())
    changed = adjustable.change(weights={"gate": case.scaled("gate", "weight", 0.5)})
    after = dict(adjustable.model.network.named_modules())
    assert changed == {"gate"}
    replaced = {n for n in before if "." not in n and after[n] is not before[n]}
    assert replaced == {"gate"}


def test_a_border_to_float_follows(cases):
    case = cases("varied", "acts only")
    adjustable = Adjustable(case.folded, case.plan)
    changed = adjustable.change(outputs={"conv1": case.scaled("conv1", "output", 2.0)})
    assert changed >= {"conv1", "conv1_dequantize"}


def test_the_given_plan_is_untouched(cases):
    case = cases("varied", "sym")
    before = bytes_of(build(case.folded, case.plan))
    Adjustable(case.folded, case.plan).change(weights={"fc": case.scaled("fc", "weight", 0.5)})
    assert bytes_of(build(case.folded, case.plan)) == before


GRID = QParams(torch.tensor(1.0), torch.tensor(0.0), QuantSpec())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"maxpool": GRID}}, "layer 'maxpool' has no weight on a grid"),
        ({"outputs": {"relu1": GRID}}, "layer 'relu1' has no output on a grid"),  # conv1 computes it
        ({"outputs": {"none": GRID}}, "layer 'none' has no output on a grid"),
        ({"outputs": {"fc": replace(GRID, spec=QuantSpec(num_bits=4))}}, "other bits or modes need a new"),
        ({"weights": {"fc": replace(GRID, spec=QuantSpec(axis=0))}}, "other bits or modes need a new plan"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(cases, change, message):
    case = cases("varied", "sym")
    adjustable = Adjustable(case.folded, case.plan)
    with pytest.raises(ValueError, match=message):
        adjustable.change(**change)
    assert adjustable.model.plan is case.plan


def test_a_dynamic_network_is_refused(varied_net, varied_batch):
    model = qtool.quantize(varied_net, None, qtool.QuantizeConfig(dynamic=True), varied_batch)
    traced = fold_batch_norms(trace(varied_net, varied_batch)).traced
    with pytest.raises(ValueError, match="found at run time"):
        adjusted(traced, model.plan, weights={"fc": GRID})


def test_another_grid_of_an_input_gives_what_a_new_plan_gives(tiny_net, tiny_batches):
    """The input of a layer in front of which nothing is quantized."""
    traced = trace(tiny_net, tiny_batches[0])
    folded = fold_batch_norms(traced)
    stats = move_stats(qtool.calibrate(traced, tiny_batches), folded.pairs)
    plan = plan_model(folded.traced, stats, specs_for(traced, qtool.QuantizeConfig()))
    (old,) = plan.layers["conv1"].inputs
    new = replace(old, scale=2 * old.scale)
    found = adjusted(folded.traced, plan, inputs={("conv1", 0): new})
    layer, before = found.layers["conv1"], plan.layers["conv1"]
    assert layer.inputs == (new,)
    torch.testing.assert_close(layer.accum_scale, 2 * before.accum_scale)
    assert float((layer.bias_q - before.bias_q / 2).abs().max()) <= 0.5
    assert found.layers["fc"] is plan.layers["fc"]
    with pytest.raises(ValueError, match="input 0 of layer 'relu1' is not put on a grid"):
        adjusted(folded.traced, plan, inputs={("relu1", 0): new})
    with pytest.raises(ValueError, match="input 0 of layer 'conv1'"):
        adjusted(folded.traced, plan, inputs={("conv1", 0): replace(new, spec=QuantSpec(num_bits=4))})
