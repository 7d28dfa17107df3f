"""Matching and sampling against torchvision's rules."""

from pathlib import Path

import pytest
import torch
from resources import memory_growth_mb
from torchvision.models.detection._utils import Matcher

from maskrcnn.model.boxes import pairwise_iou
from maskrcnn.model.targets import match_anchors, random_keys, sample_balanced


def boxes(count: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=rng) * 60
    return torch.cat([corners, corners + 5 + torch.rand(count, 2, generator=rng) * 40], dim=1)


@pytest.mark.parametrize("max_pairs", [1 << 22, 100])
@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_matching_in_one_and_in_many_portions_equals_torchvision(seed, keep_best, max_pairs):
    anchors, objects = boxes(300, seed), boxes(6, seed + 100)
    theirs = Matcher(0.7, 0.3, allow_low_quality_matches=keep_best)(pairwise_iou(anchors, objects).T)
    valid = torch.tensor([True] * 6 + [False] * 3)
    padded = torch.cat([objects, anchors[:3]])  # would match if they were valid
    matched, positive, negative = match_anchors(
        anchors, padded, valid, foreground=0.7, background=0.3, keep_best=keep_best, max_pairs=max_pairs
    )
    assert torch.equal(positive, theirs >= 0)
    assert torch.equal(negative, theirs == Matcher.BELOW_LOW_THRESHOLD)
    assert torch.equal(matched[positive], theirs[positive])
    assert positive.any() == (theirs >= 0).any()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's process status")
def test_memory_of_matching_does_not_grow_with_the_number_of_objects():
    anchors, objects = boxes(50_000, 0), boxes(500, 1)
    valid = torch.ones(len(objects), dtype=torch.bool)
    grown = memory_growth_mb(
        lambda: match_anchors(anchors, objects, valid, foreground=0.7, background=0.3, max_pairs=1 << 20)
    )
    assert grown < 4 * anchors.shape[0] * objects.shape[0] / 1e6  # one float per pair


def test_without_objects_every_box_is_negative():
    valid = torch.zeros(2, dtype=torch.bool)
    _, positive, negative = match_anchors(boxes(50, 0), torch.zeros(2, 4), valid, foreground=0.7, background=0.3)
    assert not positive.any()
    assert negative.all()


@pytest.mark.parametrize(
    ("positives", "negatives", "taken_positives", "taken_negatives"),
    [(100, 500, 16, 48), (5, 500, 5, 59), (0, 500, 0, 64), (100, 20, 16, 20), (3, 0, 3, 0)],
)
def test_a_sample_has_the_right_numbers_of_each(positives, negatives, taken_positives, taken_negatives):
    torch.manual_seed(0)
    kind = torch.zeros(700, dtype=torch.int64)
    order = torch.randperm(700)
    kind[order[:positives]], kind[order[positives : positives + negatives]] = 1, 2
    index, is_positive, is_sampled = sample_balanced(
        kind == 1, kind == 2, torch.tensor(5), count=64, positive_fraction=0.25
    )
    assert is_positive.sum() == taken_positives
    assert is_sampled.sum() == taken_positives + taken_negatives
    assert (kind[index[is_positive]] == 1).all()
    assert (kind[index[is_sampled & ~is_positive]] == 2).all()
    assert is_positive[:taken_positives].all()
    assert len(set(index[is_sampled].tolist())) == taken_positives + taken_negatives


def test_samples_are_random_and_even():
    positive = torch.zeros(40, dtype=torch.bool)
    hits = torch.zeros(40)
    for seed in range(2000):
        index, _, is_sampled = sample_balanced(positive, ~positive, torch.tensor(seed), count=10, positive_fraction=0.5)
        hits[index[is_sampled]] += 1
    # Each box is taken with probability 1/4: 500 ± 19.4; six standard deviations either way.
    assert hits.min() > 500 - 120
    assert hits.max() < 500 + 120


def test_fewer_boxes_than_samples():
    index, is_positive, is_sampled = sample_balanced(
        torch.tensor([True, False, False]),
        torch.tensor([False, True, False]),
        torch.tensor(0),
        count=8,
        positive_fraction=0.5,
    )
    assert index.shape == (3,)
    assert (is_positive.sum(), is_sampled.sum()) == (1, 2)


def test_random_keys_are_splitmix64():
    mask = (1 << 64) - 1

    def expected(seed: int, position: int) -> int:
        value = (seed + position * 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return (value >> 31) & ((1 << 29) - 1)

    for seed in (0, 12345, 2**63 - 1):
        found = random_keys(torch.tensor(seed), 50).tolist()
        assert found == [expected(seed, position) for position in range(1, 51)]
