"""Every operation that is written gives in onnxruntime what it gives in torch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtool.deploy.onnx.rules import FLOAT_RULES
from qtool.errors import ConfigError


class Of(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


MODULES = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(), nn.CELU(1.5), nn.SELU(), nn.PReLU(4), nn.Sigmoid(),
    nn.Tanh(), nn.Hardswish(), nn.Hardsigmoid(), nn.SiLU(), nn.Mish(), nn.GELU(), nn.GELU("tanh"),
    nn.Softplus(), nn.Softmax(1), nn.LogSoftmax(-1), nn.Hardtanh(-0.5, 0.7), nn.Softsign(),
    nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 1, dilation=2),
    nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2, ceil_mode=True),
    nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((3, 1)), nn.AdaptiveMaxPool2d(1),
    nn.BatchNorm2d(4), nn.LayerNorm(9), nn.LayerNorm((9, 9)), nn.GroupNorm(2, 4),
    nn.GroupNorm(2, 4, affine=False),
    nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.Conv2d(4, 8, 3, groups=4, dilation=2),
    nn.Conv2d(4, 6, (2, 3), padding="same"), nn.Conv2d(4, 6, 3, padding="valid"),
    nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Linear(9, 5),
    nn.Linear(9, 5, bias=False), nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.PixelShuffle(2), nn.ChannelShuffle(2), nn.Sequential(nn.Flatten(), nn.Linear(4 * 81, 3)),
]  # fmt: skip
FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x + 1.5, lambda x: x - x.mean((2, 3), keepdim=True), lambda x: x * 0.5 / 3.0,
    lambda x: torch.cat([x, x * 2], 1), lambda x: torch.stack([x, x + 1], dim=1).sum(1),
    lambda x: x.mean(1), lambda x: torch.clamp(x, max=0.3), lambda x: x.abs().sqrt().exp(),
    lambda x: (x.abs() + 1).pow(1.5), lambda x: torch.matmul(x, x.transpose(-2, -1)),
    lambda x: F.pad(x, (1, 2, 0, 1)) * 2, lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate") * 2,
    lambda x: x.permute(0, 2, 3, 1).flatten(1, 2) * 2, lambda x: x.view(x.size(0), -1) * 2,
    lambda x: x.reshape(x.shape[0] * 4, -1) * 2, lambda x: x.unsqueeze(1).squeeze(1) * 2,
    lambda x: x[:, 1:3, ..., -1] * 2, lambda x: x[:, :, ::2, None] * 2, lambda x: x.select(1, -1) * 2,
    lambda x: x.narrow(2, 1, 3) * 2, lambda x: x.chunk(2, 1)[1] * 2, lambda x: x.split([1, 3], dim=1)[1] * 2,
    lambda x: x.unbind(1)[2] * 2, lambda x: torch.roll(x, (1, -2), (2, 3)) * 2, lambda x: x.flip(2) * 2,
    lambda x: x.repeat(1, 2, 1, 1) * 2, lambda x: x[:, :1].expand(-1, 3, -1, -1) * 2,
    lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2, 2), lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.softmax(x, dim=-1), lambda x: F.interpolate(x, scale_factor=3, mode="nearest") * 2,
    lambda x: F.layer_norm(x, (9,)), lambda x: torch.rsqrt(x.abs() + 1), lambda x: torch.amax(x, 1),
    lambda x: x.movedim(1, -1) * 2, lambda x: torch.maximum(x, -x), lambda x: torch.minimum(x, x * x),
    lambda x: torch.einsum("nchw,nchk->nwk", x, x), lambda x: x.abs().log(),
    lambda x: torch.erf(x), lambda x: F.hardtanh(x, -0.2, 0.3),
]  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    """(2, 4, 9, 9)"""
    return torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_gives_the_same_for_any_number_of_images(module, opset, as_float, x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
        assert_same(nn.Sequential(module), opset, as_float, x)


@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_a_function_gives_the_same_for_any_number_of_images(number, as_float, x):
    assert_same(Of(FUNCTIONS[number]), 21, as_float, x)


def assert_same(net: nn.Module, opset: int, as_float: Callable, x: Tensor) -> None:
    try:
        exported = as_float(net, x, opset)
    except ConfigError as error:
        # The two that these opsets lack say which one has them.
        assert opset == 18 and "--opset" in str(error)
        return
    for images in (x, x[:1], torch.cat([x, x + 1, x - 1])):
        with torch.no_grad():
            torch.testing.assert_close(exported(images), net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Of(lambda x: torch.sort(x)[0] * 2), "'sort'"),
        (Of(lambda x: x.cumsum(1)), "layer 'cumsum': 'cumsum' has no form in ONNX that qtool writes"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(4)), "layer '0': pools [9, 9] to [4, 4], in windows of"),
        (
            nn.Sequential(nn.AvgPool2d(2, divisor_override=3)),
            "layer '0': an average with a divisor of",
        ),
        (Of(lambda x: torch.div(x, 2.0, rounding_mode="floor")), "a division that rounds"),
    ],
)
def test_what_cannot_be_written_is_refused_with_the_layer(net, message, as_float, x):
    with pytest.raises(ConfigError) as refused:
        as_float(net, x)
    assert str(refused.value).startswith("--format onnx-float: ") and message in str(refused.value)


def test_every_rule_belongs_to_an_operation_that_a_test_exports(x):
    from qtool.graph.trace import layers, trace

    networks = [nn.Sequential(m).eval() for m in MODULES] + [Of(f) for f in FUNCTIONS]
    found = {node.meta["op"] for net in networks for _, node, _ in layers(trace(net, x))}
    # Pooling over one or three dimensions is written by the rules of two.
    kinds = ("max", "avg", "adaptive_avg", "adaptive_max")
    dimensions = {f"{kind}_pool{n}d" for kind in kinds for n in (1, 3)}
    assert set(FLOAT_RULES) - found - dimensions == set()
