"""The four grids of Distiller have its integer ranges, and senseless grids are refused."""

import pytest
import torch

from qtool.numerics.spec import MODES, QParams, QuantSpec


@pytest.mark.parametrize(
    ("mode", "num_bits", "limits"),
    [
        ("sym", 8, (-128, 127)),
        ("sym_restr", 8, (-127, 127)),
        ("asym_u", 8, (0, 255)),
        ("asym_s", 8, (-128, 127)),
        ("sym", 2, (-2, 1)),
        ("sym_restr", 2, (-1, 1)),
        ("asym_u", 2, (0, 3)),
        ("asym_s", 4, (-8, 7)),
        ("sym_restr", 16, (-32767, 32767)),
        ("asym_u", 16, (0, 65535)),
    ],
)
def test_integer_range_is_that_of_the_mode(mode, num_bits, limits):
    spec = QuantSpec.from_mode(mode, num_bits)
    assert (spec.quant_min, spec.quant_max) == limits


@pytest.mark.parametrize("mode", MODES)
def test_mode_name_round_trips(mode):
    assert QuantSpec.from_mode(mode, 5, axis=0).mode == mode


@pytest.mark.parametrize("num_bits", [-1, 0, 1, 17, 40])
def test_bits_out_of_range_are_refused(num_bits):
    with pytest.raises(ValueError, match=rf"^num_bits must be 2 to 16, found {num_bits}$"):
        QuantSpec(num_bits=num_bits)


def test_narrow_range_of_an_asymmetric_grid_is_refused():
    with pytest.raises(ValueError, match="narrow_range needs a symmetric, signed grid"):
        QuantSpec(symmetric=False, narrow_range=True)


def test_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="mode must be one of sym, sym_restr, asym_s, asym_u, found 'int8'"):
        QuantSpec.from_mode("int8")


@pytest.mark.parametrize(
    ("scale", "zero_point", "spec"),
    [
        (2.0, 0.0, QuantSpec()),
        (1.0, 1.0, QuantSpec()),
        (1.0, 0.0, QuantSpec(num_bits=4)),
    ],
)
def test_another_scale_zero_point_or_width_is_another_grid(scale, zero_point, spec):
    one = QParams(torch.tensor(1.0), torch.tensor(0.0), QuantSpec())
    assert one.same_grid(QParams(torch.tensor(1.0), torch.tensor(0.0), QuantSpec()))
    assert not one.same_grid(QParams(torch.tensor(scale), torch.tensor(zero_point), spec))


@pytest.mark.parametrize("mode", ["sym", "sym_restr"])
def test_d10_the_unsigned_grid_of_a_symmetric_mode_starts_at_zero(mode):
    spec = QuantSpec.from_mode(mode, 4).unsigned()
    assert (spec.quant_min, spec.quant_max, spec.symmetric, spec.mode) == (0, 15, True, "sym_u")


@pytest.mark.parametrize("mode", ["asym_s", "asym_u"])
def test_an_asymmetric_grid_is_its_own_unsigned_one(mode):
    spec = QuantSpec.from_mode(mode, 4)
    assert spec.unsigned() is spec
