import math

import pytest
import torch
from torch import nn

import qtool
from qtool.errors import DataError, ModelError, StatsError
from qtool.observers.stats import records


class Gives(nn.Module):
    """Logits that are the input itself."""

    def forward(self, x):
        return x * 1


def test_generators_transforms_and_tensors_calibrate_alike(tiny_net, tiny_batches):
    expected = qtool.calibrate(tiny_net, tiny_batches)
    assert qtool.calibrate(tiny_net, (x for x in tiny_batches)) == expected
    assert qtool.calibrate(tiny_net, [(x, "labels") for x in tiny_batches]) == expected
    items = [{"pixels": x * 2} for x in tiny_batches]
    assert qtool.calibrate(tiny_net, iter(items), lambda item: item["pixels"] / 2) == expected


def test_a_traced_network_calibrates_and_quantizes_like_the_network(tiny_net, tiny_batches):
    traced = qtool.trace(tiny_net, tiny_batches[0])
    stats = qtool.calibrate(traced, tiny_batches)
    assert stats == qtool.calibrate(tiny_net, tiny_batches)
    x = tiny_batches[0]
    assert torch.equal(qtool.quantize(traced, stats)(x), qtool.quantize(tiny_net, stats)(x))
    assert not any(m._forward_hooks for m in traced.modules())


def test_recorded_numbers_are_those_of_the_tensors(tiny_net, tiny_batches):
    stats = qtool.calibrate(tiny_net, tiny_batches)
    x = torch.cat(tiny_batches)
    y = tiny_net.bn1(tiny_net.conv1(x)).detach().double()
    record = stats.output("bn1")
    assert record.min == pytest.approx(float(y.min()), rel=1e-5)  # float32 kernels sum in another order
    assert record.avg_max == pytest.approx(float(y.flatten(1).amax(1).mean()), rel=1e-5)
    assert record.std == pytest.approx(float(y.std(unbiased=False)), rel=1e-5)
    assert record.b == pytest.approx(float((y - y.mean()).abs().mean()), rel=1e-5)
    assert stats.input("conv1", 0).min == float(x.min())
    assert record.total_numel == y.numel()


@pytest.mark.parametrize("size", [1, 3, 7])
def test_statistics_do_not_depend_on_the_batch_size(tiny_net, tiny_batches, size):
    """D2: averages were those of the first batch."""
    x = torch.cat(tiny_batches)
    together, split = (qtool.calibrate(tiny_net, x.split(n)) for n in (len(x), size))
    for (name, a), (_, b) in zip(records(together), records(split), strict=True):
        assert a == b, name


@pytest.mark.parametrize(
    "nothing", [[], iter([]), [torch.empty(0, 3, 8, 8)]], ids=["list", "iterator", "batch"]
)
def test_calibrating_on_nothing_is_refused(tiny_net, nothing):
    with pytest.raises(DataError, match="no images"):
        qtool.calibrate(tiny_net, nothing)


def test_evaluating_on_nothing_is_refused(tiny_net):
    with pytest.raises(DataError, match="no images"):
        qtool.evaluate(tiny_net, [])


def test_the_layer_that_gives_nan_is_named(tiny_net, tiny_batches):
    tiny_net.depthwise.weight.data[3] = math.nan
    with pytest.raises(StatsError, match="output of layer 'depthwise' holds NaN"):
        qtool.calibrate(tiny_net, tiny_batches)


def test_the_callers_network_keeps_its_mode_and_its_weights(tiny_net, tiny_batches):
    tiny_net.train()
    before = {k: v.clone() for k, v in tiny_net.state_dict().items()}
    qtool.calibrate(tiny_net, tiny_batches)
    qtool.evaluate(tiny_net, [(tiny_batches[0], torch.zeros(4))])
    assert all(m.training for m in tiny_net.modules())
    assert all(torch.equal(v, before[k]) for k, v in tiny_net.state_dict().items())
    assert not any(m._forward_hooks for m in tiny_net.modules())


# Six classes; the label's rank is 1, 2, 6, and 1 again.
LOGITS = torch.tensor(
    [[9, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 7]], dtype=torch.float32
)
LABELS = torch.tensor([0, 1, 5, 5])


def test_accuracies_and_loss_by_hand():
    result = qtool.evaluate(Gives(), [(LOGITS, LABELS)])
    assert (result.top1, result.top5, result.images) == (50.0, 75.0, 4)
    staircase = math.log(sum(math.exp(k) for k in range(6)))
    losses = [math.log(1 + 5 * math.exp(-9)), staircase - 4, staircase, math.log(1 + 5 * math.exp(-7))]
    assert result.loss == pytest.approx(sum(losses) / 4)
    assert result.predictions.tolist() == [0, 0, 0, 5]


def test_a_short_last_batch_weighs_by_its_images():
    """D17: the loss was the mean of batch means."""
    whole = qtool.evaluate(Gives(), [(LOGITS, LABELS)])
    parts = qtool.evaluate(Gives(), [(LOGITS[:3], LABELS[:3]), (LOGITS[3:], LABELS[3:])])
    assert (parts.top1, parts.top5, parts.images) == (whole.top1, whole.top5, whole.images)
    assert parts.loss == pytest.approx(whole.loss)


def test_a_transform_gives_images_and_labels():
    items = [{"x": LOGITS, "y": LABELS}]
    assert qtool.evaluate(Gives(), items, lambda item: (item["x"], item["y"])).top1 == 50


@pytest.mark.parametrize("label", [-1, 6, 1000])
def test_labels_without_an_output_are_refused(label):
    with pytest.raises(DataError, match=rf"label {label} has no output: the network has 6"):
        qtool.evaluate(Gives(), [(LOGITS, torch.tensor([0, 1, 2, label]))])


def test_images_without_labels_are_refused():
    with pytest.raises(DataError, match="needs labels"):
        qtool.evaluate(Gives(), [LOGITS])


def test_an_output_that_is_no_logits_is_refused():
    with pytest.raises(ModelError, match=r"gives a tensor of shape \(2, 6, 1\); qtool evaluates classifiers"):
        qtool.evaluate(Gives(), [(torch.zeros(2, 6, 1), torch.zeros(2))])


@pytest.mark.parametrize("wrap", [lambda y: (y, None), lambda y: [y], lambda y: {"out": y}])
def test_logits_may_come_in_a_tuple_list_or_dict(wrap):
    class Wraps(nn.Module):
        def forward(self, x):
            return wrap(x)

    assert qtool.evaluate(Wraps(), [(LOGITS, LABELS)]).top1 == 50


def test_a_logit_of_nan_is_never_right():
    assert qtool.evaluate(Gives(), [(LOGITS * math.nan, LABELS)]).top1 == 0


def test_8_bits_predict_as_float_does(tiny_net, tiny_batches):
    quantized = qtool.quantize(tiny_net, qtool.calibrate(tiny_net, tiny_batches))
    labels = [tiny_net(x).argmax(1) for x in tiny_batches]
    result = qtool.evaluate(quantized, list(zip(tiny_batches, labels, strict=True)))
    assert result.top1 >= 90
    assert result.top1 < 100 or result.loss > 0
