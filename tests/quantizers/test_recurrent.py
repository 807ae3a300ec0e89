"""An LSTM and a GRU that read the embedded digits row by row, trained, and quantized in all their parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qtool
from qtool.quantizers.plan import INTEGER, ModelPlan

DIGITS = Path(qtool.__file__).parent / "data" / "digits.npz"


class RowReader(nn.Module):
    """(N, 8, 8), eight rows of eight pixels, to ten classes."""

    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = cls(8, 24, batch_first=True)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)
        return self.fc(output[:, -1])


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    content = np.load(DIGITS)
    images = torch.from_numpy(content["images"]).float()
    return images.reshape(len(images), 8, 8) / images.max(), torch.from_numpy(content["labels"]).long()


def trained(cls: type[nn.Module], x: Tensor, labels: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = RowReader(cls)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(12):
        for index in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(x[index]), labels[index]).backward()
            optimizer.step()
    return net.eval()


def weighted(plan: ModelPlan) -> dict[str, str]:
    return {name: layer.kind for name, layer in plan.layers.items() if layer.op in ("linear", "matmul")}


@pytest.mark.slow
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_digits_lose_at_most_two_points(cls, digits, tmp_path):
    x, labels = digits
    net = trained(cls, x[:1000], labels[:1000])
    batches = [(x[1000:], labels[1000:])]
    config = qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True)
    quantized = qtool.quantize(net, qtool.calibrate(net, [x[:256]]), config)
    kinds = weighted(quantized.plan)
    assert set(kinds.values()) == {INTEGER}
    assert {"rnn.layers.0.0.input", "rnn.layers.0.0.cell.hidden", "fc"} <= kinds.keys()
    float_top1 = qtool.evaluate(net, batches).top1
    assert float_top1 > 80  # it has learned something that could be lost
    assert qtool.evaluate(quantized, batches).top1 > float_top1 - 2
    qtool.save(quantized, tmp_path / "q.pth")
    again = qtool.load(tmp_path / "q.pth", RowReader(cls), x[:2])
    assert torch.equal(again(x[:8]), quantized(x[:8]))
    assert torch.equal(again(x[:8, :5]), quantized(x[:8, :5]))  # three rows less


@pytest.mark.slow
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_digits_of_any_height_lose_at_most_two_points_in_both_modes(cls, digits):
    x, labels = digits
    net = trained(cls, x[:1000], labels[:1000])
    static = qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True)
    dynamic = qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True, dynamic=True)
    models = [
        qtool.quantize(net, qtool.calibrate(net, [x[:256], x[:256, 1:]]), static),
        qtool.quantize(net, None, dynamic, x[:2]),
    ]
    for rows in (x[1000:], x[1000:, 1:]):
        batches = [(rows, labels[1000:])]
        float_top1 = qtool.evaluate(net, batches).top1
        assert float_top1 > 70
        for model in models:
            assert qtool.evaluate(model, batches).top1 > float_top1 - 2
