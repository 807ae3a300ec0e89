"""Augmentation and the order of images: by seed and step alone."""

import torch

from qtool.data.augmentation import Augmentation, shifted, training_order

IMAGES = torch.randn(50, 3, 16, 24, generator=torch.Generator().manual_seed(0))
BLACK = (-1.0, -2.0, -3.0)


def test_an_image_is_moved_by_its_own_shift_and_black_comes_in():
    moved = shifted(IMAGES[:2], torch.tensor([[1, -2], [0, 3]]), torch.tensor(BLACK))
    assert torch.equal(moved[0, :, 1:, :-2], IMAGES[0, :, :-1, 2:])
    assert torch.equal(moved[1, :, :, 3:], IMAGES[1, :, :, :-3])
    for channel, black in enumerate(BLACK):
        assert bool((moved[0, channel, 0] == black).all() and (moved[0, channel, :, -2:] == black).all())
        assert bool((moved[1, channel, :, :3] == black).all())


def test_about_half_of_the_images_are_mirrored_and_the_others_stay():
    found = Augmentation(True, False, BLACK)(IMAGES, 0)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(found, IMAGES, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(found, IMAGES, strict=True)]
    assert sum(mirrored) + sum(kept) == 50
    assert 15 < sum(mirrored) < 35


def test_images_are_moved_by_an_eighth_of_their_sides_at_most():
    ones = torch.ones(200, 1, 16, 24)
    found = Augmentation(False, True, (0.0,))(ones, 0)[:, 0]
    rows, columns = found.amax(2).sum(1), found.amax(1).sum(1)
    assert (rows.min(), rows.max()) == (14, 16)
    assert (columns.min(), columns.max()) == (21, 24)


def test_it_follows_from_the_seed_and_the_step():
    augment = Augmentation(True, True, BLACK, seed=3)
    assert torch.equal(augment(IMAGES, 5), augment(IMAGES, 5))
    assert not torch.equal(augment(IMAGES, 5), augment(IMAGES, 6))
    assert not torch.equal(augment(IMAGES, 5), Augmentation(True, True, BLACK, seed=4)(IMAGES, 5))
    assert torch.equal(Augmentation(False, False, BLACK)(IMAGES, 5), IMAGES)


def test_the_images_of_a_batch_do_not_share_their_changes():
    same = IMAGES[:1].expand(20, -1, -1, -1)
    assert len({tuple(x.flatten().tolist()) for x in Augmentation(True, True, BLACK)(same, 0)}) > 10


def test_every_image_comes_once_before_any_comes_again():
    order = training_order(7, 30, seed=0)
    for start in range(0, 28, 7):
        assert sorted(order[start : start + 7]) == list(range(7))
    assert order[:7] != order[7:14]


def test_the_order_does_not_depend_on_how_many_are_wanted():
    assert training_order(7, 30, seed=1)[:12] == training_order(7, 12, seed=1)
    assert training_order(7, 12, seed=1) != training_order(7, 12, seed=2)
