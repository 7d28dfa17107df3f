"""Augmented samples: objects stay with their pixels, whatever happens to both."""

import random
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solid import COLOURS, write_solid_dataset

from maskrcnn.config import AugmentConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.training.augmentation import Scene, mixup
from maskrcnn.training.loader import training_loader
from maskrcnn.training.samples import Sample, TrainingSamples
from maskrcnn.training.view import MASK_SIDE, mask_extent

# Small enough that every object's crop has one pixel per pixel and shows its mask completely.
SMALL = Preprocessing(min_size_px=80, max_size_px=MASK_SIDE)
CHANGES = {
    "nothing": {"flip_probability": 0.0},
    "flips": {"flip_probability": 0.5, "vertical_flip_probability": 0.5},
    "shorter sides": {"shorter_sides_px": (40, 64, 100)},
    "aspect ratio": {"largest_aspect_ratio": 1.2},
    "jitter": {"jitter_probability": 1.0, "jitter_canvas_px": 104, "jitter_least_scale": 0.4},
    "perspective": {"perspective_probability": 1.0, "perspective_distortion": 0.5},
    "mosaic": {"mosaic_probability": 1.0},
    "copy-paste": {"copy_paste_probability": 1.0},
    "own": {"transform": "own_transforms:moved"},
    "everything": {
        "vertical_flip_probability": 0.5,
        "jitter_probability": 0.5,
        "jitter_least_scale": 0.4,
        "mosaic_probability": 0.5,
        "perspective_probability": 0.5,
        "copy_paste_probability": 0.5,
    },
}
KEYS = {"epoch": st.integers(0, 10_000), "index": st.integers(0, 11)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CocoDataset:
    return CocoDataset.load(write_solid_dataset(tmp_path_factory.mktemp("solid")), "train")


def samples(dataset, seed: int = 0, preprocessing=SMALL, **changes) -> TrainingSamples:
    return TrainingSamples(dataset, preprocessing, augment=AugmentConfig(**changes), seed=seed)


def full_masks(sample: Sample) -> np.ndarray:
    """Masks bool `[G, h, w]` of a sample whose crops have one pixel per pixel."""
    height, width = sample.image.shape[1:]
    masks = np.zeros((len(sample.objects), height + MASK_SIDE, width + MASK_SIDE), bool)
    for mask, crop, frame in zip(masks, sample.objects.masks, sample.objects.frames, strict=True):
        left, top, right, bottom = frame.astype(int)
        assert (right - left, bottom - top) == (MASK_SIDE, MASK_SIDE)
        mask[top:bottom, left:right] = crop > 0
    assert not masks[:, height:].any() and not masks[:, :, width:].any()
    return masks[:, :height, :width]


def inner(mask: np.ndarray, margin: int) -> np.ndarray:
    """Pixels of a mask bool `[h, w]` with none outside it within `margin`."""
    padded = np.pad(mask, margin)
    side = 2 * margin + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    return windows.all(axis=(2, 3))


def assert_same(one: Sample, other: Sample) -> None:
    assert (one.image_id, one.seed) == (other.image_id, other.seed)
    np.testing.assert_array_equal(one.image, other.image)
    for name, value in vars(one.objects).items():
        np.testing.assert_array_equal(value, getattr(other.objects, name), err_msg=name)


@pytest.mark.parametrize("change", CHANGES)
def test_objects_stay_with_their_pixels(dataset, change):
    is_scaled_widely = "jitter_probability" in CHANGES[change]
    margin = 6 if is_scaled_widely else 3  # an enlarged pixel and the one beside it, which a resized pixel mixes
    tip = 2.01 if is_scaled_widely else 1.01  # a point of an object may vanish from its mask when it shrinks

    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 10_000), **KEYS)
    def check(seed, epoch, index):
        sample = samples(dataset, seed, **CHANGES[change])[epoch, index]
        assert sample.image.dtype == np.uint8
        height, width = sample.image.shape[1:]
        for mask, box, label in zip(full_masks(sample), sample.objects.boxes, sample.objects.labels, strict=True):
            assert (box[:2] >= 0).all() and (box[2:] <= (width, height)).all()
            assert (box[2:] - box[:2] >= 1).all()
            np.testing.assert_allclose(box, mask_extent(mask), atol=tip)
            pixels = sample.image[:, inner(mask, margin)]
            assert (abs(pixels - np.array(COLOURS[label], np.float32)[:, None]) < 0.1).all()

    check()


@pytest.mark.parametrize("change", [*CHANGES, "mixup", "colour"])
def test_a_sample_is_decided_by_seed_epoch_and_index(dataset, change):
    values = CHANGES.get(change, {f"{change}_probability": 1.0})
    made = samples(dataset, 5, **values)
    state = torch.get_rng_state()
    first = [made[3, index] for index in range(4)]
    assert torch.equal(torch.get_rng_state(), state)  # the training process's generator is left alone
    torch.manual_seed(1)
    np.random.seed(1)
    for one, other in zip(reversed(first), [made[3, index] for index in reversed(range(4))], strict=True):
        assert_same(one, other)
    for others in (samples(dataset, 6, **values)[3, 0], made[4, 0], made[3, 1]):
        assert first[0].seed != others.seed
    if change != "nothing":
        images = {made[epoch, 0].image.tobytes() for epoch in range(6)}
        assert len(images) > 1


def test_samples_do_not_depend_on_the_number_of_threads(dataset):
    values = {f"{name}_probability": 1.0 for name in ("colour", "perspective", "mixup")}
    made, threads = samples(dataset, preprocessing=Preprocessing(min_size_px=500), **values), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(made[0, 0])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert_same(*found)


@pytest.mark.parametrize("change", CHANGES)
def test_an_image_without_objects_is_a_sample(dataset, change):
    values = {**CHANGES[change], "mosaic_probability": 0.0, "copy_paste_probability": 0.0}
    for epoch in range(5):
        sample = samples(dataset, **values)[epoch, 2]
        assert len(sample.objects) == 0
        assert sample.objects.boxes.shape == (0, 4) and sample.objects.masks.shape == (0, MASK_SIDE, MASK_SIDE)


def test_colours_change_nothing_else(dataset):
    plain, coloured = (
        samples(dataset, flip_probability=0.0),
        samples(dataset, flip_probability=0.0, colour_probability=1.0),
    )
    for index in range(len(dataset.images)):
        one, other = plain[0, index], coloured[0, index]
        assert abs(one.image.astype(np.float32) - other.image).mean() > 1
        for name, value in vars(one.objects).items():
            np.testing.assert_array_equal(value, getattr(other.objects, name))


def test_channels_come_in_the_models_order(dataset):
    mean = (0.1, 0.2, 0.3)
    rgb = Preprocessing(min_size_px=80, max_size_px=MASK_SIDE, mean=mean)
    bgr = replace(rgb, channel_order="BGR", mean=mean[::-1])
    for change in ("jitter", "perspective"):
        one, other = (samples(dataset, preprocessing=rule, **CHANGES[change])[0, 0] for rule in (rgb, bgr))
        np.testing.assert_array_equal(one.image, other.image[::-1])


def test_shorter_sides_are_those_asked_for(dataset):
    made = samples(dataset, preprocessing=Preprocessing(min_size_px=80, max_size_px=400), shorter_sides_px=(40, 64))
    found = {min(made[epoch, 0].image.shape[1:]) for epoch in range(20)}
    assert found == {40, 64}


def test_jittered_samples_have_the_canvas_size_and_all_scales(dataset):
    made = samples(dataset, jitter_probability=1.0, jitter_canvas_px=100)
    scales = []
    for epoch in range(60):
        sample = made[epoch, 2]  # nothing but ground: what is not ground is empty canvas
        assert sample.image.shape == (3, 100, 100)
        scales.append((abs(sample.image - 120) < 0.01).all(axis=0).mean() ** 0.5)
    assert min(scales) < 0.3
    assert max(scales) == 1.0
    assert (samples(dataset, jitter_probability=1.0)[0, 0].image.shape) == (3, 80, 80)  # the model's min_size_px


def test_composed_samples_hold_the_objects_of_their_images(dataset):
    count = [len(record.instances) for record in dataset.images]
    for change in ("mosaic", "mixup", "copy_paste"):
        made = samples(dataset, **{f"{change}_probability": 1.0})
        found = [[len(made[epoch, index].objects) for epoch in range(10)] for index in range(12)]
        assert np.mean(found) > np.mean(count) + 0.5


@pytest.mark.parametrize(("kinds", "expected"), [("uu", 18), ("ff", 18.25), ("uf", 18.25)])
def test_a_mixture_is_rounded_once_and_only_to_bytes(kinds, expected):
    pixels = [
        np.full((3, 2, 2), value, {"u": np.uint8, "f": np.float32}[k]) for value, k in zip((10, 21), kinds, strict=True)
    ]
    nothing = (np.zeros((0, 2, 2), bool), np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 0, 3)), np.zeros(0, bool))
    found = mixup(*(Scene(image, *nothing) for image in pixels), weight=0.25).image
    assert found.dtype == (np.uint8 if kinds == "uu" else np.float32)
    assert (found == expected).all()


@pytest.mark.parametrize("change", ["mosaic", "mixup", "copy_paste"])
def test_a_damaged_partner_is_named(tmp_path, change):
    root = write_solid_dataset(tmp_path / "solid")
    dataset = CocoDataset.load(root, "train")
    for record in dataset.images[1:]:
        record.path.write_bytes(record.path.read_bytes()[:100])
    found = [samples(dataset, **{f"{change}_probability": 1.0})[epoch, 0] for epoch in range(5)]
    errors = [error for error in found if isinstance(error, UserError)]
    assert len(errors) >= 4  # a partner may be the image itself
    assert all(error.found.startswith(f"image {root / 'train'}") for error in errors)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"flip_probability": 1.5}, "augment.flip_probability 1.5\n  expected: 0 to 1"),
        ({"mosaic_probability": -0.1}, "augment.mosaic_probability -0.1"),
        ({"colour_hue": 0.6}, "augment.colour_hue 0.6"),
        ({"shorter_sides_px": (640, 0)}, "augment.shorter_sides_px 0"),
        ({"jitter_least_scale": 3.0}, "augment.jitter_largest_scale 2.0\n  expected: at least 3.0"),
    ],
)
def test_values_out_of_range_are_refused(values, text):
    with pytest.raises(UserError) as caught:
        AugmentConfig(**values)
    assert text in str(caught.value)


def test_long_images_are_cropped_to_the_largest_aspect_ratio(dataset):
    """The solid images are 60×90 to 44×110 and 100×48; those within 3:2 stay whole."""
    found, whole = samples(dataset, largest_aspect_ratio=1.5), samples(dataset)
    for index, record in enumerate(dataset.images):
        height, width = found[0, index].image.shape[1:]
        short, long = sorted((record.height, record.width))
        if long <= 1.5 * short:
            assert np.array_equal(found[0, index].image, whole[0, index].image)
        else:
            assert max(height, width) == pytest.approx(1.5 * min(height, width), abs=2)
            assert (height > width) == (record.height > record.width)
    index = next(k for k, record in enumerate(dataset.images) if record.width > 2 * record.height)
    assert len({found[epoch, index].image.tobytes() for epoch in range(8)}) > 2


# --- the user's own augmentation ---------------------------------------------------------------------


def test_an_own_transform_that_changes_nothing_gives_the_same_sample(dataset):
    """But for the boxes, which are the extents of the masks; whatever the other augmentations do."""
    for values in ({}, {"mosaic_probability": 1.0, "vertical_flip_probability": 0.5}):
        plain, own = samples(dataset, **values), samples(dataset, transform="own_transforms:same", **values)
        for index in range(12):
            one, other = plain[2, index], own[2, index]
            np.testing.assert_array_equal(other.image, one.image)
            assert (other.seed, other.objects.labels.tolist()) == (one.seed, one.objects.labels.tolist())
            np.testing.assert_array_equal(other.objects.masks, one.objects.masks)
            np.testing.assert_allclose(other.objects.boxes, one.objects.boxes, atol=1.01)


def test_an_own_transform_may_use_any_generator_and_leaves_them_alone(dataset):
    made = samples(dataset, transform="own_transforms:noisy")
    states = []
    first = made[0, 0]
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        assert_same(made[0, 0], first)
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        states.append(before)
    assert states[0] != states[1]
    assert len({float(made[epoch, 0].image.mean()) for epoch in range(8)}) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_an_own_transform_runs_in_loading_processes(dataset, workers):
    loader, _ = training_loader(
        samples(dataset, transform="own_transforms:moved"), batch_size=4, workers=workers, pin_memory=False
    )
    other, _ = training_loader(
        samples(dataset, transform="own_transforms:moved"), batch_size=4, workers=0, pin_memory=False
    )
    for one, same in zip(loader, other, strict=True):
        assert torch.equal(one.images, same.images) and torch.equal(one.masks, same.masks)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("boxes_left", r"returned box \[.*\] of object 0, whose mask extends over .*\n  expected: boxes around"),
        ("boxes_lost", r"boxes \[\d, 4\], labels \[(\d)\].*\n  expected: one row per object.*boxes \[\1, 4\]"),
        ("masks_small", r"image of 74×112 with .*masks \[2, 37, 56\]\n.*masks \[2, 74, 112\]"),
        ("array", r"returned a ndarray as image\n  expected: a tensor"),
        ("bytes_", r"returned a tensor \[3, 74, 112\] of uint8 as image\n  expected: .* of floating point"),
        ("normalised", r"values from -\d.* to \d.*\n  expected: 0 to 1, not normalised"),
        ("infinite", r"returned boxes that are not finite"),
        ("relabelled", r"returned labels \[.*\]\n  expected: integers from 1 to 3"),
        ("nothing", r"returned nothing\n  expected: \(image, target\)"),
        ("failing", r"0.png: KeyError: 'colour' \(.*own_transforms.py, line \d+\)"),
    ],
)
def test_an_own_transform_that_contradicts_itself_is_refused(dataset, function, words):
    error = samples(dataset, flip_probability=0.0, transform=f"own_transforms:{function}")[0, 0]
    assert isinstance(error, UserError)
    assert re.search(rf"augment.transform own_transforms:{function} on .*0.png: ", str(error))
    assert re.search(words, str(error)), str(error)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_transforms", r"augment.transform 'own_transforms'\n  expected: package.module:function"),
        ("absent_module:moved", r"module absent_module cannot be imported \(ModuleNotFoundError.*\n.*\n.*PYTHONPATH"),
        ("broken:moved", r"module broken cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("own_transforms:move", r"no move in own_transforms\n  expected: .*own_transforms has .*moved, turned, same"),
        ("own_transforms:number", r"augment.transform own_transforms:number: a int"),
    ],
)
def test_an_own_transform_that_cannot_be_imported_is_named(dataset, tmp_path, monkeypatch, name, words):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    with pytest.raises(UserError, match=words):
        samples(dataset, transform=name)


def test_a_transform_in_the_working_directory_is_found(dataset, tmp_path, monkeypatch):
    (tmp_path / "mine_here.py").write_text("def grey(image, target, generator):\n    return 0 * image + 0.5, target\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    sample = samples(dataset, transform="mine_here:grey")[0, 0]
    assert (sample.image == 128).all() and len(sample.objects)  # 0.5 · 255, rounded to even
