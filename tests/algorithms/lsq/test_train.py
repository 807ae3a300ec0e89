"""Steps of training: they help, they can be taken up again, and they end where numbers do."""

import copy
import io
import math

import pytest
import torch

from qtool.algorithms.lsq import DivergedError, FinetuneSettings, Trainer
from qtool.quantizers.prepare import build


@pytest.fixture
def trainer(tiny_net, tiny_batches, planned_w4):
    def make(bits=3, **settings):
        folded, plan = planned_w4(
            tiny_net, tiny_batches, mode="asym_u", bits_weights=bits, bits_activations=4
        )
        return Trainer(folded.traced, folded, plan, FinetuneSettings(**{"steps": 40, **settings}))

    return make


def _quantized_loss(trainer, batches):
    """The loss of what the trained network is saved as."""
    network = build(*trainer.network.quantized())
    with torch.no_grad():
        return sum(float(trainer.loss_of(network(x), x, _labels(trainer, x))) for x in batches)


def _labels(trainer, x):
    """What the float network predicts."""
    return trainer._reference(x).argmax(1)


def _run(trainer, batches, last):
    while trainer.step < last:
        x = batches[trainer.step % len(batches)]
        trainer.learn(x, _labels(trainer, x))
    return trainer


@pytest.mark.parametrize("ranges", ["learned", "ema"])
@pytest.mark.parametrize("distillation", [1.0, 0.5])
def test_training_brings_the_quantized_network_closer_to_the_float_one(
    trainer, tiny_batches, ranges, distillation
):
    trained = trainer(ranges=ranges, distillation=distillation)
    before = _quantized_loss(trained, tiny_batches)
    _run(trained, tiny_batches, 40)
    assert _quantized_loss(trained, tiny_batches) < 0.95 * before


def test_a_training_that_is_taken_up_again_ends_with_the_same_bytes(trainer, tiny_batches):
    for ranges in ("learned", "ema"):
        whole = _run(trainer(ranges=ranges), tiny_batches, 20)
        first = _run(trainer(ranges=ranges), tiny_batches, 7)
        file = io.BytesIO()
        torch.save(first.state(), file)
        file.seek(0)
        second = trainer(ranges=ranges)
        second.load_state(torch.load(file, weights_only=True))
        assert second.step == 7
        _run(second, tiny_batches, 20)
        for name, tensor in whole.network.state().items():
            assert torch.equal(tensor, second.network.state()[name]), name


def test_the_rate_falls_to_zero_along_a_cosine(trainer, tiny_batches):
    trained = trainer(steps=4)
    found = []
    for _ in range(4):
        _run(trained, tiny_batches, trained.step + 1)
        found.append(trained._optimizer.param_groups[0]["lr"] / trained.settings.learning_rate)
    assert found == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_a_loss_that_is_not_finite_changes_nothing(trainer, tiny_batches):
    trained = _run(trainer(), tiny_batches, 2)
    before = copy.deepcopy(trained.state())
    with pytest.raises(DivergedError, match="step 3: the loss") as caught:
        trained.learn(tiny_batches[0] * math.nan)
    assert caught.value.step == 3
    assert all(torch.equal(v, before["network"][k]) for k, v in trained.state()["network"].items())


def test_a_gradient_that_is_not_finite_changes_nothing(trainer, tiny_batches):
    trained = trainer()
    (weight, *_) = trained.network.parameters()["weights"].values()
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = copy.deepcopy(trained.state())
    with pytest.raises(DivergedError, match="step 1: a gradient"):
        trained.learn(tiny_batches[0])
    assert all(torch.equal(v, before["network"][k]) for k, v in trained.state()["network"].items())


def test_cross_entropy_needs_labels(trainer, tiny_batches):
    with pytest.raises(ValueError, match="needs labels"):
        trainer(distillation=0.5).learn(tiny_batches[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": math.nan}, "learning_rate must be above 0, found nan"),
        ({"scale_learning_rate": 0}, "scale_learning_rate must be above 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"distillation": 1.5}, "from 0 to 1, found 1.5"),
        ({"temperature": math.inf}, "temperature must be above 0"),
        ({"ranges": "none"}, "one of learned, ema"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        FinetuneSettings(**settings)
