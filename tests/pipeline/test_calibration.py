"""One pass over the images: the same statistics for all batches, and the same network in its fast form."""

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qtool
from qtool.graph.fast import fast
from qtool.observers.stats import records
from qtool.pipeline.calibration import chunk_size, chunks, fast_or_plain

FIELDS = ("min", "max", "avg_min", "avg_max", "mean", "std", "b")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 8))
def test_chunks_hold_the_same_images_in_order(sizes, size):
    images = torch.arange(sum(sizes)).reshape(-1, 1)
    found = list(chunks(iter(images.split(sizes)), size))
    assert torch.equal(torch.cat(found), images)
    assert [len(c) for c in found[:-1]] == [size] * (len(found) - 1)
    assert 1 <= len(found[-1]) <= size


def test_chunks_shrink_with_the_size_of_an_image():
    assert [chunk_size((3, side, side)) for side in (16, 224, 320, 640)] == [128, 32, 8, 2]


def images(count: int) -> torch.Tensor:
    x = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return x * torch.linspace(0.5, 2, count).reshape(-1, 1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "swin_t", "squeezenet1_1"])
def test_statistics_are_equal_for_every_batch_size(arch):
    torch.manual_seed(0)
    traced = qtool.trace(getattr(torchvision.models, arch)(weights=None).eval(), images(2))
    x = images(130)
    whole = qtool.calibrate(traced, [x])
    for size in (1, 7, 16, 128):
        assert qtool.calibrate(traced, x.split(size)).layers == whole.layers, size


@pytest.mark.parametrize(("arch", "count", "side"), [(None, 600, 8), ("squeezenet1_1", 70, 64)])
def test_statistics_are_equal_for_every_number_of_threads(arch, count, side, tiny_net):
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)(weights=None).eval() if arch else tiny_net
    x = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(qtool.calibrate(model, x.split(32)).layers)
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "swin_t", "squeezenet1_1"])
def test_statistics_are_those_of_the_plain_network(arch):
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)(weights=None).eval()
    x = images(9)
    leaves = {name: m for name, m in model.named_modules() if not list(m.children())}
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, y, name=name: seen.update({name: y.double().clone()}))
        for name, module in leaves.items()
        if not getattr(module, "inplace", False)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    stats = qtool.calibrate(model, x.split(4))
    compared = 0
    for name, layer in stats.layers.items():
        if name not in seen or layer.output is None:
            continue
        y, record = seen[name], layer.output
        if len(y) % len(x):
            continue  # a tensor without images
        per_image = y.reshape(len(x), -1)
        single = per_image.shape[1] == 1
        wanted = {
            "min": y.min(),
            "max": y.max(),
            "avg_min": y.min() if single else per_image.amin(1).mean(),
            "avg_max": y.max() if single else per_image.amax(1).mean(),
            "mean": y.mean(),
            "std": y.std(unbiased=False),
        }
        extent = float(y.max() - y.min())
        for field, value in wanted.items():
            # Folded batch norms and other kernels round float32 in another way, layer after layer.
            assert getattr(record, field) == pytest.approx(float(value), abs=2e-5 * extent), (name, field)
        compared += 1
    assert compared > 10


def test_the_fast_form_computes_the_network(tiny_net, tiny_batches):
    traced = qtool.trace(tiny_net, tiny_batches[0])
    network = fast(traced)
    x = tiny_batches[0]
    with torch.no_grad():
        torch.testing.assert_close(network.traced(x), tiny_net(x), rtol=1e-4, atol=1e-5)
    assert network.folded == {"bn1": "conv1", "bn2": "depthwise"}
    assert torch.equal(traced(x), qtool.trace(tiny_net, tiny_batches[0])(x))  # the given one is as it was


def test_a_network_whose_fast_form_is_another_one_runs_as_it_is(caplog):
    class Strides(nn.Module):
        """Depends on the order of its input's memory."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return torch.as_strided(y, (len(x), 4), (y[0].numel(), 1))

    traced = qtool.trace(Strides(), torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        network = fast_or_plain(traced)
    assert network.traced is traced
    assert "calibrating without the faster form of the network" in caplog.text


def test_every_tensor_has_a_histogram_and_its_extremes(tiny_net, tiny_batches):
    stats = qtool.calibrate(tiny_net, tiny_batches)
    for place, record in records(stats):
        assert record.histogram is not None, place
        assert len(record.image_min) == len(record.image_max) == sum(map(len, tiny_batches))
        assert record.min == record.image_min.min()


def test_memory_that_cannot_be_had_at_the_start_is_done_without(tiny_net, monkeypatch):
    x = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = qtool.calibrate(tiny_net, [x]).layers
    monkeypatch.setattr("qtool.pipeline.calibration.SPREAD", 1e12)
    assert qtool.calibrate(tiny_net, [x]).layers == expected
