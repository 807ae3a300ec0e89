"""Networks that a symbolic trace cannot take: quantized, saved, loaded without weights, and evaluated."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qtool
from qtool.graph.trace import trace
from qtool.numerics.metrics import sqnr_db
from qtool.pipeline.coverage import coverage
from qtool.pipeline.steps import specs_for
from qtool.quantizers.plan import FLOAT, INTEGER, UNREACHED
from qtool.quantizers.prepare import QuantizedModel


class Branching(nn.Module):
    """An `if` on a tensor's values, one shared convolution, `+`, torch.cat and F.relu; a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.bright, self.dark = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.bn(self.conv(x)))
        y = self.shared(y) + F.relu(self.shared(F.relu(y)))
        both = torch.cat([y, F.relu(y)], 1)
        features = self.bright(both) if x.mean() > 0 else self.dark(both)
        return {"logits": self.fc(features.flatten(1)), "features": features}


class Rounds(nn.Module):
    """A loop that ends when the values are small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        while x.abs().mean() > 0.5:
            x = 0.5 * x + 0.1 * torch.tanh(self.conv(x))
        return self.fc(x.flatten(1))


class Reader(nn.Module):
    """Two layers of a bidirectional LSTM or GRU, which classifies sequences of any length."""

    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = cls(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0].mean(1))


@dataclass
class Answer:
    features: Tensor
    logits: Tensor


class Encoder(nn.Module):
    """A transformer encoder, whose output is a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Answer:
        features = self.encoder(x)
        return Answer(features, self.fc(features.mean(1)))


def images(*means: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) + mean for mean in means]


def sequences(width: int, *lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, length, width, generator=generator) for length in lengths]


NETWORKS = {
    "branching": (Branching, images(0.5, -0.5, 1.0, -1.0)),
    "rounds": (Rounds, images(0.0, 2.0, -3.0)),
    "lstm": (lambda: Reader(nn.LSTM), sequences(6, 5, 3, 9)),
    "gru": (lambda: Reader(nn.GRU), sequences(6, 5, 3, 9)),
    "encoder": (Encoder, sequences(16, 5, 8)),
}
CONFIGS = {
    "static": qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True),
    "dynamic": qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True, dynamic=True),
    "per sample": qtool.QuantizeConfig(mode="asym_u", dynamic=True, per_sample=True),
    "weights only": qtool.QuantizeConfig(bits_activations=0),
}


def made(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def logits(output: object) -> Tensor:
    if isinstance(output, dict):
        return output["logits"]
    return output.logits if isinstance(output, Answer) else output


def quantized(net: nn.Module, batches: list[Tensor], config: qtool.QuantizeConfig) -> QuantizedModel:
    stats = None if config.dynamic else qtool.calibrate(net, batches)
    return qtool.quantize(net, stats, config, batches[0])


CASES = [(name, config) for name in NETWORKS for config in ("static", "dynamic")]
CASES += [("branching", "per sample"), ("encoder", "per sample"), ("branching", "weights only")]


@pytest.mark.parametrize("name, config", CASES)
def test_quantized_saved_loaded_and_evaluated(name, config, tmp_path):
    make, batches = NETWORKS[name]
    net = made(make)
    model = quantized(net, batches, CONFIGS[config])
    qtool.save(model, tmp_path / "q.pth")
    again = qtool.load(tmp_path / "q.pth", make(), batches[0])  # other weights: they do not matter
    with torch.no_grad():
        for x in batches:
            expected, found = logits(net(x)), logits(model(x))
            assert torch.equal(logits(again(x)), found)
            # A grid for each sample may make another branch's choice.
            assert config == "per sample" or sqnr_db(expected, found) > 15
    labelled = [(x, logits(net(x)).argmax(1)) for x in batches]
    assert qtool.evaluate(again, labelled).top1 > (40 if config == "per sample" else 80)


def test_every_branch_is_quantized_and_counted():
    net = made(Branching)
    model = quantized(net, images(0.5, -0.5), CONFIGS["static"])
    kinds = {name: layer.kind for name, layer in model.plan.layers.items()}
    assert {name for name, kind in kinds.items() if kind == FLOAT} == {"mean"}
    weighted = ("conv", "shared1", "shared2", "bright", "dark", "fc")
    assert all(kinds[name] == INTEGER for name in weighted)
    traced = trace(net, images(0.0)[0])
    found = coverage(traced, specs_for(traced, CONFIGS["static"]))
    assert found.percent == 100
    assert found.total == 64 * (3 * 4 * 9 + 2 * 4 * 4 * 9 + 8 * 4 + 8 * 4 * 9) + 4 * 64 * 5

    return specs_for(traced, CONFIGS["static"])


def test_what_calibration_did_not_reach_stays_in_float_and_says_so():
    net = made(Branching)
    bright, dark = images(1.0, -1.0)
    model = quantized(net, [bright], CONFIGS["static"])
    plan = model.plan.layers
    assert (plan["dark"].kind, plan["dark"].note) == (FLOAT, UNREACHED)
    assert plan["bright"].kind == INTEGER
    with torch.no_grad():
        assert sqnr_db(net(bright)["logits"], model(bright)["logits"]) > 20
        assert torch.isfinite(model(dark)["logits"]).all()


def test_calibration_sees_a_branch_only_when_it_is_taken():
    net = made(Branching)
    bright, dark = images(2.0, -2.0)
    both = qtool.calibrate(net, [bright, dark])
    alone = qtool.calibrate(net, [dark])
    assert both.output("dark") == alone.output("dark")
    assert both.output("fc") != alone.output("fc")


def test_the_decision_is_that_of_the_float_network():
    net = made(Branching)
    model = quantized(net, images(1.0, -1.0), CONFIGS["static"])
    ran = []
    for name in ("bright", "dark"):
        model.network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    for x in images(0.3, -0.3, 0.1):
        model(x)
    assert ran == ["bright", "dark", "bright"]


def test_a_recurrent_weight_is_stored_once(tmp_path):
    net = made(NETWORKS["lstm"][0])
    model = quantized(net, sequences(6, 30), CONFIGS["static"])
    hidden = [name for name, layer in model.plan.layers.items() if name.endswith("hidden")]
    assert len(hidden) == 4
    path: Path = qtool.save(model, tmp_path / "q.pth")
    stored = torch.load(path, weights_only=True)["layers"]
    assert sum(
        layer["weight_q"].numel() for layer in stored.values() if layer["weight_q"] is not None
    ) == sum(p.numel() for p in net.parameters() if p.dim() == 2)


def test_a_step_has_the_grids_of_all_steps():
    net = made(NETWORKS["gru"][0])
    model = quantized(net, sequences(6, 7, 3), CONFIGS["static"])
    (x,) = sequences(6, 7)
    with torch.no_grad():
        for cut in (1, 4, 7):
            assert sqnr_db(net(x[:, :cut]), model(x[:, :cut])) > 15
