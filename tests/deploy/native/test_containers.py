from io import BytesIO

import pytest
import torch
from torch import nn

from qtool.deploy.native.containers import FromGrid, Pack, ToGrid, Unpack, container_for, labelled
from qtool.numerics.affine import qparams_from_range, quantize_centered
from qtool.numerics.spec import MODES, QuantSpec


def grid(mode, bits, low=-2.3, high=4.1):
    return qparams_from_range(torch.tensor(low), torch.tensor(high), QuantSpec.from_mode(mode, bits))


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("mode", MODES)
def test_float_values_are_quantized_as_in_the_simulation(mode, bits):
    qparams = grid(mode, bits)
    container = container_for(qparams)
    # Ties, and values beyond the range.
    x = torch.cat([torch.arange(-300, 300) * 0.5 * qparams.scale, torch.linspace(-9, 9, 999)])
    integers = ToGrid(container)(x)
    assert torch.equal(Unpack(container)(integers), quantize_centered(x, qparams))
    assert int(integers.int_repr().min()) >= 0 and int(integers.int_repr().max()) <= container.high
    assert integers.q_scale() == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_centered_integers_survive_a_round_trip(mode):
    qparams = grid(mode, 8)
    container = container_for(qparams)
    x = quantize_centered(torch.linspace(-5, 5, 321), qparams)
    assert torch.equal(Unpack(container)(Pack(container)(x)), x)
    assert torch.equal(FromGrid(container)(Pack(container)(x)), x * qparams.scale)


def test_grids_above_8_bits_have_no_container():
    assert container_for(grid("asym_u", 9)) is None
    assert container_for(grid("sym", 16)) is None


def test_what_an_activation_cuts_off_needs_no_room():
    # Nine bits of which a ReLU leaves eight.
    container = container_for(grid("sym", 9), "relu")
    assert (container.zero_point, container.high) == (0, 255)
    capped = container_for(grid("asym_u", 8, 0.0, 11.0), "relu6")
    assert capped.high == 139 and capped.limits == (0.0, pytest.approx(6.0, abs=0.03))


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "arranged",
    [torch.Tensor.contiguous, channels_last, lambda x: x[:, ::2], lambda x: x.flatten(1)],
    ids=["contiguous", "channels last", "with gaps", "rows"],
)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_program_puts_another_scale_beside_the_same_integers(arranged):
    class Twice(nn.Module):
        def forward(self, x):
            integers = torch.quantize_per_tensor(x, 1.0, 3, torch.quint8)
            return labelled(labelled(arranged(integers), 0.5), 2.0)

    program = torch.jit.trace(Twice(), torch.zeros(2, 4, 6, 6), check_trace=False)
    file = BytesIO()
    torch.jit.save(torch.jit.freeze(program.eval()), file)
    program = torch.jit.load(BytesIO(file.getvalue()))
    for shape in ((2, 4, 6, 6), (1, 4, 6, 6), (3, 4, 5, 7)):
        x = torch.randint(-3, 250, shape).float()
        y = program(x)
        assert y.q_scale() == 2.0 and y.q_zero_point() == 3
        assert torch.equal(y.dequantize(), 2 * arranged(x))
