"""Optimization profiles: parsing, the stamp, and the profile of a batch."""

import numpy as np
import pytest

from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing, batch_sizes
from maskrcnn.runtime.build.profiles import Profile, Span, choose, from_json, padded_shape, parse_profiles, to_json

USUAL = Preprocessing()
SMALL = Preprocessing(min_size_px=96, max_size_px=160)


def corners(batch: str, size: str, preprocessing: Preprocessing = USUAL) -> list[list[tuple[int, int, int]]]:
    profiles = parse_profiles(batch, size, preprocessing)
    return [[profile.corner(which) for which in ("min", "opt", "max")] for profile in profiles]


def test_each_batch_size_with_each_image_size_is_a_profile():
    assert corners("1,4", "800x1344, 640x640") == [
        [(1, 800, 1344)] * 3,
        [(4, 800, 1344)] * 3,
        [(1, 640, 640)] * 3,
        [(4, 640, 640)] * 3,
    ]
    assert corners("1:4:8", "320x320:800x1088:1344x1344") == [[(1, 320, 320), (4, 800, 1088), (8, 1344, 1344)]]
    assert corners("2,2", "64×64") == [[(2, 64, 64)] * 3]


def test_named_sizes_follow_the_resizing_of_the_model():
    assert corners("1", "landscape") == [[(1, 800, 1344)] * 3]
    assert corners("1", "portrait") == [[(1, 1344, 800)] * 3]
    assert corners("1", "coco") == [[(1, 224, 224), (1, 800, 1088), (1, 1344, 1344)]]
    assert corners("1", "coco", SMALL) == [[(1, 32, 32), (1, 96, 128), (1, 160, 160)]]
    square = Preprocessing(min_size_px=512, max_size_px=512)
    assert corners("1", "coco", square) == [[(1, 128, 128), (1, 384, 512), (1, 512, 512)]]


@pytest.mark.parametrize("size_hw", [(480, 640), (640, 480), (500, 500), (333, 500), (120, 480), (3000, 4000)])
@pytest.mark.parametrize("preprocessing", [USUAL, SMALL, Preprocessing(min_size_px=512, max_size_px=512)])
def test_coco_accepts_usual_images(size_hw, preprocessing):
    image = np.broadcast_to(np.uint8(0), (*size_hw, 3))
    _, padded_hw = batch_sizes([image], preprocessing)
    assert parse_profiles("1", "coco", preprocessing)[0].takes((1, *padded_hw))


def test_the_profile_tuned_for_the_nearest_shape_is_chosen():
    profiles = parse_profiles("1,1:4:8", "coco,800x1344", USUAL)
    named = {str(profile): index for index, profile in enumerate(profiles)}
    assert len(named) == 4
    assert choose(profiles, (1, 800, 1344)) == named["batch 1 of 800×1344"]
    assert choose(profiles, (3, 800, 1344)) == named["batch 1–8 of 800×1344, tuned for 4 of 800×1344"]
    assert str(profiles[choose(profiles, (6, 800, 1088))]).startswith("batch 1–8 of 224–1344×224–1344")
    assert str(profiles[choose(profiles, (1, 640, 640))]).startswith("batch 1 of 224–1344")


def test_a_shape_outside_all_profiles_is_an_error_with_all_profiles_and_the_command():
    profiles = parse_profiles("1,4", "800x1344", USUAL)
    with pytest.raises(UserError) as raised:
        choose(profiles, (2, 800, 1344), rebuild="maskrcnn build-engine m.onnx --fp16")
    assert raised.value.found == "a batch of 2 image(s) of 800×1344, outside the profiles of the engine"
    assert raised.value.expected == "batch 1 of 800×1344; batch 4 of 800×1344"
    assert "--batch and --size of `maskrcnn build-engine m.onnx --fp16`" in raised.value.fix


def test_batches_are_padded_to_the_smallest_shape():
    profiles = parse_profiles("1,4", "224x224:800x1088:1344x1344", USUAL)
    assert padded_shape(profiles, (1, 32, 800)) == (1, 224, 800)
    assert padded_shape(profiles, (2, 640, 640)) == (4, 640, 640)
    with pytest.raises(UserError, match=r"a batch of 5 image\(s\) of 32×32"):
        padded_shape(profiles, (5, 32, 32))
    with pytest.raises(UserError, match=r"a batch of 1 image\(s\) of 32×1376"):
        padded_shape(profiles, (1, 32, 1376))


def test_profiles_survive_the_stamp():
    profiles = parse_profiles("1,2:4:8", "coco,landscape", USUAL)
    assert from_json(to_json(profiles)) == profiles


@pytest.mark.parametrize(
    "text", ["", "[1]", '[{"batch": [1, 2]}]', '[{"batch": [2, 1, 3], "height": [1, 1, 1], "width": [1, 1, 1]}]']
)
def test_an_invalid_stamp_is_an_error(text):
    with pytest.raises(UserError, match="in an engine's stamp"):
        from_json(text)


@pytest.mark.parametrize(
    ("batch", "size", "part"),
    [
        ("0", "coco", "1 ≤ MIN ≤ OPT ≤ MAX"),
        ("4:2:8", "coco", "1 ≤ MIN ≤ OPT ≤ MAX"),
        ("1:2", "coco", "MIN:OPT:MAX"),
        ("one", "coco", "--batch one"),
        ("1,", "coco", "--batch"),
        ("1", "800", "--size 800"),
        ("1", "800x", "HEIGHTxWIDTH"),
        ("1", "huge", "coco, landscape, portrait"),
        ("1", "800x1333", "multiples of 32"),
        ("1", "0x64", "multiples of 32"),
        ("1", "64x64:32x64:96x96", "MIN ≤ OPT ≤ MAX"),
        ("1,2,3", "32x32,64x64,96x96", "9 profiles"),
    ],
)
def test_invalid_profiles_are_errors(batch, size, part):
    with pytest.raises(UserError, match=part):
        parse_profiles(batch, size, USUAL)


def test_a_fixed_profile_accepts_its_shape_only():
    fixed = Profile(Span(1, 1, 1), Span(64, 64, 64), Span(96, 96, 96))
    assert fixed.is_fixed and fixed.takes((1, 64, 96)) and not fixed.takes((1, 96, 64))
