"""What corrections start from: a float network, its plan, and images."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from qtool.config import QuantizeConfig
from qtool.graph.fold import Folded, fold_batch_norms, move_stats
from qtool.graph.trace import trace
from qtool.numerics.metrics import sqnr_db
from qtool.pipeline import steps
from qtool.quantizers.plan import ModelPlan, plan_model
from qtool.quantizers.prepare import build


@dataclass
class Planned:
    """A network with its plan, and what it was planned on."""

    folded: Folded
    plan: ModelPlan
    batches: list[Tensor]

    @property
    def reference(self):
        return self.folded.traced

    @property
    def names(self) -> list[str]:
        return list(self.plan.layers)

    @property
    def given(self) -> tuple:
        """The arguments of a plan pass."""
        return self.reference, self.folded, self.plan, self.batches

    def mean_error(self, folded: Folded, plan: ModelPlan) -> float:
        """How far the mean output is from that of the float network, over the channels."""
        x = torch.cat(self.batches)
        with torch.no_grad():
            error = build(folded, plan)(x) - self.reference(x)
        return float(error.mean(0).norm())


@pytest.fixture
def planned() -> Callable[..., Planned]:
    """Plan a network: planned(net, batches, bits_weights=4, ...)."""

    def make(net: nn.Module, batches: list[Tensor], **settings) -> Planned:
        traced = trace(net.eval(), batches[0])
        folded = fold_batch_norms(traced)
        stats = move_stats(steps.calibrate(traced, batches), folded.pairs)
        specs = steps.specs_for(traced, QuantizeConfig(**{"mode": "asym_u", **settings}))
        return Planned(folded, plan_model(folded.traced, stats, specs), batches)

    return make


@pytest.fixture
def planned_w4(planned) -> Callable[..., tuple[Folded, ModelPlan]]:
    """planned_w4(net, batches, **settings): the folded network, and a plan of it with 4-bit weights."""

    def make(net: nn.Module, batches: list[Tensor], **settings) -> tuple[Folded, ModelPlan]:
        found = planned(net, batches, **{"bits_weights": 4, **settings})
        return found.folded, found.plan

    return make


@pytest.fixture
def logits_sqnr() -> Callable[..., float]:
    """logits_sqnr(reference, folded, plan, batches): in dB."""

    def measure(reference: nn.Module, folded: Folded, plan: ModelPlan, batches: list[Tensor]) -> float:
        quantized = build(folded, plan)
        with torch.no_grad():
            pairs = [(reference(x), quantized(x)) for x in batches]
        return sqnr_db(torch.cat([y for y, _ in pairs]), torch.cat([y for _, y in pairs]))

    return measure


@pytest.fixture
def relu_chain() -> tuple[nn.Module, list[Tensor]]:
    """Eight linear layers with ReLUs between them, seeded, and 64 rows for them."""
    generator = torch.Generator().manual_seed(3)
    parts: list[nn.Module] = []
    for _ in range(8):
        linear = nn.Linear(16, 16)
        linear.weight.data = torch.randn(16, 16, generator=generator) / 3
        linear.bias.data = torch.randn(16, generator=generator) / 3
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1]).eval(), [torch.randn(16, 16, generator=generator) for _ in range(4)]
