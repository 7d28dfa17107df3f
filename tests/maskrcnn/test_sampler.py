"""Which images make which optimizer step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn.errors import UserError
from maskrcnn.training.loader import StepSampler, aspect_ratio_group, repeat_factors


def images_of_steps(length: int, world_size: int, accumulate: int, epoch: int = 0, **options) -> np.ndarray:
    """The images of each optimizer step and each part of it: int64 `[steps, world_size · accumulate, images]`."""
    ranks = []
    for rank in range(world_size):
        sampler = StepSampler(length, rank=rank, world_size=world_size, accumulate=accumulate, **options)
        sampler.epoch = epoch
        parts = list(sampler)
        assert len(parts) == len(sampler) == sampler.steps * accumulate
        assert {found for part in parts for found, *_ in part} == {epoch}
        ranks.append([[index for _, index, _ in part] for part in parts])
    found = np.array(ranks).reshape(world_size, sampler.steps, accumulate, -1).swapaxes(0, 1)
    assert found.shape[3] == options["batch_size"] // (world_size * accumulate)
    return found.reshape(sampler.steps, world_size * accumulate, -1)


@settings(max_examples=60)
@given(
    length=st.integers(1, 90),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 99),
    grouped=st.booleans(),
)
def test_steps_are_the_same_for_any_number_of_processes_and_parts(length, seed, epoch, grouped):
    groups = np.random.default_rng(0).integers(0, 2, length) if grouped else None
    plans = {}
    for world_size in (1, 2, 4):
        for accumulate in (1, 2):
            steps = images_of_steps(length, world_size, accumulate, epoch, batch_size=8, seed=seed, groups=groups)
            plans[world_size, accumulate] = np.sort(steps.reshape(len(steps), -1))
    one = plans[1, 1]
    assert all(np.array_equal(plan, one) for plan in plans.values())
    assert len(one) == -(-length // 8)
    counts = np.bincount(one.ravel(), minlength=length)
    assert len(counts) == length and counts.min() >= 1
    assert counts.max() - 1 <= -(-(one.size - length) // length)
    if grouped:
        mixed = [len({groups[image] for image in step}) > 1 for step in one]
        assert not any(mixed[:-2])


def test_each_image_occurs_once_where_batches_come_out_even():
    for groups in (None, [0] * 13 + [1] * 11):
        found = images_of_steps(24, 1, 1, batch_size=4, seed=1, groups=groups)
        assert sorted(found.ravel().tolist()) == list(range(24))


def test_the_order_depends_on_seed_and_epoch():
    orders = {
        images_of_steps(20, 1, 1, epoch, batch_size=4, seed=seed).tobytes() for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4
    again = images_of_steps(20, 1, 1, 1, batch_size=4, seed=1)
    assert again.tobytes() in orders


def test_groups_come_in_random_order():
    groups = [0] * 40 + [1] * 40
    steps = images_of_steps(80, 1, 1, batch_size=4, seed=0, groups=groups)
    kinds = [groups[step[0, 0]] for step in steps]
    assert sorted(kinds) == [0] * 10 + [1] * 10
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)


def test_an_iteration_may_begin_amid_an_epoch():
    sampler = StepSampler(20, batch_size=4, seed=0)
    whole = list(sampler)
    sampler.start = 3
    assert list(sampler) == whole[3:]
    assert len(sampler) == 5


def test_a_small_dataset_still_fills_a_batch():
    (step,) = images_of_steps(3, 2, 1, batch_size=8, seed=0)
    assert step.shape == (2, 4)
    assert np.bincount(step.ravel()).min() == 2


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(UserError, match=r"batch_size 8 for 3 process\(es\), accumulate 2\n  expected: a multiple of 6"):
        StepSampler(20, batch_size=8, seed=0, world_size=3, accumulate=2)


def test_repeat_factors_by_hand():
    """Of 16 images all have class 1, four class 2, one class 3: fractions 1, 1/4, 1/16; the threshold is 1/4."""
    labels = [[1], [1, 1, 2, 2], [1, 2], [1, 2, 3], [2, 1], *([[1]] * 11)]
    assert repeat_factors(labels, 0.25).tolist() == [1, 1, 1, 2, 1, *([1] * 11)]
    np.testing.assert_allclose(repeat_factors(labels, 1.0), [1, 2, 2, 4, 2, *([1] * 11)])
    assert repeat_factors([[], [7]], 1.0).tolist() == [1, pytest.approx(2**0.5)]


@pytest.mark.parametrize("grouped", [False, True])
def test_images_occur_as_often_as_their_repeats_in_epochs_of_one_length(grouped):
    repeats = np.array([1.0, 1.25, 1.5, 3.0, 1.75, 2.5] * 4)  # 44 in all
    groups = np.arange(24) % 2 if grouped else None
    counts = np.zeros(24)
    for epoch in range(400):
        sampler = StepSampler(24, batch_size=4, seed=3, repeats=repeats, groups=groups)
        sampler.epoch = epoch
        assert (sampler.length, sampler.steps) == (44, 11)
        keys = [key for batch in sampler for key in batch]
        assert len(set(keys)) == 44  # copies of an image are numbered
        found = np.bincount([index for _, index, _ in keys], minlength=24)
        assert (found >= np.floor(repeats)).all() and (found <= np.ceil(repeats)).all()
        counts += found
    np.testing.assert_allclose(counts / 400, repeats, atol=0.1)  # four standard deviations


def test_repeated_images_are_shared_among_processes_and_continue_after_a_resume():
    repeats = np.linspace(1, 3, 21)
    one = images_of_steps(21, 1, 1, 5, batch_size=4, seed=1, repeats=repeats)
    shared = images_of_steps(21, 2, 2, 5, batch_size=4, seed=1, repeats=repeats)
    assert np.array_equal(one.reshape(len(one), -1), shared.reshape(len(one), -1))
    sampler = StepSampler(21, batch_size=4, seed=1, repeats=repeats)
    whole = list(sampler)
    sampler.start = 4
    assert list(sampler) == whole[4:]


def test_groups_of_aspect_ratios():
    """The bounds of torchvision's reference training (2^-1, 2^0 and 2^1 for four groups)."""
    ratios = np.array([0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 2.1])
    assert aspect_ratio_group(ratios, 1).tolist() == [0] * 7
    assert aspect_ratio_group(ratios, 2).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert aspect_ratio_group(ratios, 3).tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert aspect_ratio_group(ratios, 4).tolist() == [0, 0, 1, 1, 2, 2, 3]
