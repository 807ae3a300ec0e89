"""Whole networks of torchvision, random weights: trace, calibrate, quantize, run."""

import pytest
import torch
import torchvision

import qtool

slow = pytest.mark.slow
FAMILIES = [
    ("squeezenet1_1", 64),
    pytest.param("mobilenet_v3_small", 64, marks=slow),
    pytest.param("shufflenet_v2_x0_5", 64, marks=slow),
    pytest.param("densenet121", 64, marks=slow),
    pytest.param("googlenet", 64, marks=slow),
    pytest.param("efficientnet_b0", 64, marks=slow),
    pytest.param("regnet_y_400mf", 64, marks=slow),
    pytest.param("convnext_tiny", 64, marks=slow),
    pytest.param("vit_b_32", 224, marks=slow),
    pytest.param("swin_t", 64, marks=slow),
]


@pytest.mark.parametrize(("arch", "size"), FAMILIES)
def test_a_family_of_networks_is_quantized_as_it_is(arch, size):
    torch.manual_seed(0)
    settings = {"init_weights": False} if arch == "googlenet" else {}
    net = torchvision.models.get_model(arch, num_classes=10, **settings).eval()
    x = torch.randn(2, 3, size, size)
    stats = qtool.calibrate(net, [x])
    model = qtool.quantize(net, stats, qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True))
    y = model(x)
    assert y.shape == (2, 10)
    assert bool(y.isfinite().all())
    kinds = {layer.kind for layer in model.plan.layers.values() if layer.op in ("conv", "linear")}
    assert kinds == {"integer"}
