import numpy as np
import pytest
import torch

from qtool.deploy.native.saturation import SAFE_BITS, saturating_channels


def sums_in_16_bits(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What pmaddubsw makes of neighbours in a row of weights: (C, K), (K,) -> (C, K / 2), saturated."""
    products = weight.astype(np.int64) * x.astype(np.int64)
    return np.clip(products[:, 0::2] + products[:, 1::2], -32768, 32767)


@pytest.mark.parametrize("largest", [255, 200, 127])
def test_channels_without_the_flag_never_saturate(largest):
    generator = np.random.default_rng(0)
    weight = generator.integers(-128, 128, (64, 18)) * (generator.random((64, 1)) < 0.5)
    weight[::3] //= 3
    flagged = saturating_channels(torch.from_numpy(weight), largest).numpy()
    for _ in range(200):
        x = generator.choice([0, largest], 18)
        exact = weight[:, 0::2] * x[0::2] + weight[:, 1::2] * x[1::2]
        saturated = (sums_in_16_bits(weight, x) != exact).any(axis=1)
        assert not (saturated & ~flagged).any()
    assert flagged.any() == (largest > 127)
    assert not flagged.all()


def test_a_flagged_channel_does_saturate_for_some_input():
    weight = np.array([[129 - 1, 1], [-127, -127], [127, 2], [100, -100]])
    flagged = saturating_channels(torch.from_numpy(weight), 255).tolist()
    assert flagged == [True, True, True, False]
    x = np.array([255, 255])
    assert (sums_in_16_bits(weight, x) != weight @ x[:, None]).any(axis=1).tolist() == flagged


def test_neighbours_are_input_channels_of_one_tap():
    # The two large ones are of neighbouring taps, and of channels that are no neighbours.
    weight = torch.zeros(1, 4, 1, 2, dtype=torch.int64)
    weight[0, 0, 0, 0] = weight[0, 3, 0, 0] = weight[0, 1, 0, 1] = 127
    assert not saturating_channels(weight, 255).any()
    weight[0, 1, 0, 0] = 127
    assert saturating_channels(weight, 255).all()


def test_an_odd_number_of_channels_may_be_filled_up_or_not():
    filled_up = torch.tensor([[127, 127, 0], [0, 0, 0]]).T.reshape(1, 3, 1, 2)
    going_on = torch.tensor([[0, 0, 127], [127, 0, 0]]).T.reshape(1, 3, 1, 2)
    for weight in (filled_up, going_on):
        assert saturating_channels(weight, 255).all()


def test_seven_bits_are_safe_for_any_weights():
    weight = torch.full((2, 4, 3, 3), -128)
    assert saturating_channels(weight, 255).all()
    assert not saturating_channels(weight, 2**SAFE_BITS - 1).any()
