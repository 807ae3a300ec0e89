"""Rows at sampled positions against the layers themselves."""

import pytest
import torch
from torch import nn

from qtool.algorithms.rounding.rows import choose_positions, grouped, groups_of, output_extent, rows_at

ALL = 10**9
LAYERS = {
    "plain": (nn.Conv2d(4, 6, 3), (2, 4, 7, 9)),
    "strided, padded, dilated": (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 1), dilation=2),
        (2, 4, 9, 8),
    ),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 6, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, stride=2), (2, 4, 6, 5)),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same"), (2, 4, 6, 5)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 6, 5)),
    "one axis": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 6)),
    "three axes": (nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), (2, 2, 3, 4, 5)),
    "linear": (nn.Linear(5, 3), (2, 5)),
    "linear of tokens": (nn.Linear(5, 3), (2, 4, 5)),
}


def _rows(layer, shape, per_image):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    positions = choose_positions(layer, x, per_image, generator)
    return x, positions, rows_at(layer, x, positions)


def _outputs(layer, rows):
    """(n, C_out) from rows, bias included."""
    products = rows @ grouped(layer.weight, groups_of(layer)).transpose(1, 2)  # (G, n, C_out / G)
    return products.transpose(0, 1).flatten(1) + layer.bias


@pytest.mark.parametrize("name", LAYERS)
def test_all_rows_times_the_weight_are_the_outputs(name):
    layer, shape = LAYERS[name]
    x, positions, rows = _rows(layer, shape, ALL)
    expected = layer(x)
    if not isinstance(layer, nn.Linear):
        expected = expected.movedim(1, -1)
    torch.testing.assert_close(_outputs(layer, rows), expected.flatten(0, -2), atol=1e-5, rtol=1e-5)
    assert len(positions) == rows.shape[1]


@pytest.mark.parametrize("name", LAYERS)
def test_sampled_rows_are_some_of_all_and_none_comes_twice(name):
    layer, shape = LAYERS[name]
    _, positions, rows = _rows(layer, shape, 3)
    _, every, all_rows = _rows(layer, shape, ALL)
    places = {tuple(p): i for i, p in enumerate(every.tolist())}
    found = [places[tuple(p)] for p in positions.tolist()]
    assert len(set(found)) == len(found) == 2 * min(3, len(every) // 2)
    assert torch.equal(rows, all_rows[:, found])


def test_the_seed_decides_which_rows():
    layer, shape = LAYERS["plain"]
    first, again = (_rows(layer, shape, 3)[1] for _ in range(2))
    other = choose_positions(layer, torch.zeros(shape), 3, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_extent_is_that_of_the_output():
    for layer, shape in LAYERS.values():
        if not isinstance(layer, nn.Linear):
            x = torch.zeros(shape)
            assert output_extent(layer, x) == list(layer(x).shape[2:])
