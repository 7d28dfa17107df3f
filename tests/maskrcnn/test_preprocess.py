"""Preprocessing against torchvision's own transform and torch's own interpolation."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing, batch_images, resize_bilinear, resized_size

GREY_LEVEL = 1e-3  # agreement wanted, of 255; float32's own rounding of a value near 255 is 1.5e-5


def torchvision_transform(preprocessing: Preprocessing) -> GeneralizedRCNNTransform:
    """torchvision's transform of the same sizes that leaves the pixel values alone."""
    return GeneralizedRCNNTransform(
        preprocessing.min_size_px,
        preprocessing.max_size_px,
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
        size_divisible=preprocessing.divisor,
    ).eval()


def torchvision_size(size_hw: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """The size that torchvision's transform gives, asked with a tensor that has a shape and no pixels."""
    image, _ = torchvision_transform(preprocessing).resize(torch.empty(3, *size_hw, device="meta"))
    return tuple(image.shape[-2:])


def random_image(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def torch_resized(image: np.ndarray, size_hw: tuple[int, int]) -> list[np.ndarray]:
    """torch's resizing with one thread and with two; it rounds the positions once or twice accordingly."""
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].float()
    threads_before = torch.get_num_threads()
    resized = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            resized.append(interpolate(planes, size=size_hw, mode="bilinear", align_corners=False)[0].numpy())
    finally:
        torch.set_num_threads(threads_before)
    return resized


def assert_equals_torch(image: np.ndarray, size_hw: tuple[int, int]) -> None:
    """Asserts equality with one of torch's results, and with both up to the rounding of a position."""
    resized = resize_bilinear(image, size_hw)
    assert resized.dtype == np.float32 and resized.shape == (3, *size_hw)
    differences = [np.abs(resized - expected).max() for expected in torch_resized(image, size_hw)]
    assert min(differences) < GREY_LEVEL
    assert max(differences) < GREY_LEVEL + 255 * 2 * np.spacing(np.float32(max(image.shape)))


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [
        ((480, 640), (800, 1066)),  # COCO's most common size
        ((640, 480), (1066, 800)),
        ((427, 640), (800, 1199)),
        ((800, 1333), (800, 1333)),
        ((500, 500), (800, 800)),
        ((1080, 1920), (749, 1333)),  # the long side decides
        ((1, 5000), (1, 1333)),  # torchvision fails here, for it rounds the height to 0
    ],
)
def test_resized_size_by_hand(size_hw, expected):
    assert resized_size(size_hw, Preprocessing()) == expected


@settings(deadline=None)
@given(
    size_hw=st.tuples(st.integers(20, 6000), st.integers(20, 6000)),
    min_size_px=st.integers(2, 1500),
    extra_px=st.integers(0, 1500),
)
def test_resized_size_equals_torchvision(size_hw, min_size_px, extra_px):
    preprocessing = Preprocessing(min_size_px=min_size_px, max_size_px=min_size_px + extra_px)
    if max(size_hw) * 1.01 > preprocessing.max_size_px * min(size_hw):
        return  # a side might round to nothing, which torchvision cannot do
    assert resized_size(size_hw, preprocessing) == torchvision_size(size_hw, preprocessing)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    size_hw=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    new_hw=st.tuples(st.integers(1, 150), st.integers(1, 150)),
)
def test_resize_equals_torch(seed, size_hw, new_hw):
    assert_equals_torch(random_image(seed, *size_hw), new_hw)


@pytest.mark.parametrize("size_hw", [(480, 640), (1080, 1920), (427, 640), (3, 1900)])
def test_resize_equals_torch_at_real_sizes(size_hw):
    # Far from the origin a position has few bits left for the weight: here careless rounding shows.
    image = random_image(1, *size_hw)
    assert_equals_torch(image, resized_size(size_hw, Preprocessing()))


def test_resize_by_hand():
    image = np.array([[[0.0], [100.0]]], np.float32)
    resized = resize_bilinear(image, (2, 4))
    np.testing.assert_array_equal(resized, [[[0, 25, 75, 100], [0, 25, 75, 100]]])


def test_resize_takes_float_and_reversed_views():
    image = random_image(3, 21, 34)
    expected = resize_bilinear(image, (50, 40))
    np.testing.assert_array_equal(resize_bilinear(image.astype(np.float32), (50, 40)), expected)
    np.testing.assert_array_equal(resize_bilinear(image[..., ::-1], (50, 40)), expected[::-1])
    np.testing.assert_array_equal(image, random_image(3, 21, 34))


@pytest.mark.parametrize("sizes", [[(40, 60)], [(40, 60), (61, 37), (50, 50)], [(7, 90), (90, 7)]])
def test_batch_equals_torchvision(sizes):
    preprocessing = Preprocessing(min_size_px=96, max_size_px=160)
    images = [random_image(seed, *size) for seed, size in enumerate(sizes)]
    batch, image_sizes = batch_images(images, preprocessing)
    expected, _ = torchvision_transform(preprocessing)(
        [torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() for image in images]
    )
    assert batch.dtype == np.float32 and image_sizes.dtype == np.int64
    assert image_sizes.tolist() == [list(size) for size in expected.image_sizes]
    assert batch.shape == tuple(expected.tensors.shape)
    np.testing.assert_allclose(batch, expected.tensors.numpy(), rtol=0, atol=GREY_LEVEL)
    for slot, (height, width) in zip(batch, image_sizes, strict=True):
        assert not slot[:, height:].any() and not slot[:, :, width:].any()


def test_batch_in_bgr_order():
    image = random_image(5, 30, 40)
    rgb, _ = batch_images([image], Preprocessing(min_size_px=32))
    bgr, _ = batch_images([image], Preprocessing(min_size_px=32, channel_order="BGR"))
    np.testing.assert_array_equal(bgr, rgb[:, ::-1])


PILLOW = Preprocessing(min_size_px=96, max_size_px=160, resize="pillow")


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [
        ((480, 640), (800, 1067)),  # 1066.67 px
        ((640, 480), (1067, 800)),
        ((427, 640), (800, 1199)),
        ((1080, 1920), (750, 1333)),  # 749.8 px
        ((500, 500), (800, 800)),
        ((1600, 2401), (800, 1201)),  # 1200.5 px
        ((1, 5000), (1, 1333)),  # a side may not vanish
    ],
)
def test_resized_size_for_pillow_is_rounded_to_the_nearest(size_hw, expected):
    assert resized_size(size_hw, Preprocessing(resize="pillow")) == expected


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("size_hw", [(40, 60), (333, 201), (1000, 700), (7, 90)])
def test_resizing_with_pillow_is_pillows(size_hw, order):
    image = random_image(1, *size_hw)
    batch, sizes = batch_images([image, random_image(2, 50, 50)], replace(PILLOW, channel_order=order))
    height, width = (int(side) for side in sizes[0])
    assert (height, width) == resized_size(size_hw, PILLOW)
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    expected = expected[..., ::-1] if order == "BGR" else expected
    np.testing.assert_array_equal(batch[0, :, :height, :width], expected.transpose(2, 0, 1).astype(np.float32))
    assert batch.dtype == np.float32
    assert not batch[0, :, height:].any() and not batch[0, :, :, width:].any()


def test_without_pillow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    batch_images([random_image(1, 30, 40)], Preprocessing(min_size_px=32))  # needs none
    with pytest.raises(UserError, match="pip install pillow"):
        batch_images([random_image(1, 30, 40)], PILLOW)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([], "an empty list of images"),
        ([np.zeros((4, 4, 3))], r"image 0 is float64 of shape \(4, 4, 3\)"),
        ([np.full((4, 4, 3), -0.5, np.float32)], "image 0 of float32 from -0.5 to -0.5"),
        ([np.full((4, 4, 3), np.nan, np.float32)], "image 0 of float32 from nan"),
        ([np.full((4, 4, 3), 0.5, np.float32)], "image 0 of float32 from 0.5 to 0.5(.|\n)*multiply them by 255"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)], r"image 1 is uint8 of shape \(4, 4\)"),
        ([np.zeros((4, 4, 4), np.uint8)], r"image 0 of shape \(4, 4, 4\)\n  expected: 3 channel"),
        ([np.zeros((0, 4, 3), np.uint8)], r"image 0 of shape \(0, 4, 3\)\n  expected: at least 1×1 pixel"),
        (["cat.jpg"], "image 0 is str"),
    ],
)
def test_batch_refuses_other_images(images, text):
    with pytest.raises(UserError, match=text):
        batch_images(images, Preprocessing())


def test_preprocessing_survives_json():
    preprocessing = Preprocessing(min_size_px=640, max_size_px=1024, divisor=64, channel_order="BGR")
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing
    assert Preprocessing.from_dict(json.loads(json.dumps(PILLOW.to_dict()))) == PILLOW


def test_a_file_that_does_not_say_how_to_resize_means_as_torchvision():
    values = Preprocessing(min_size_px=640).to_dict()
    del values["resize"]
    assert Preprocessing.from_dict(values) == Preprocessing(min_size_px=640, resize="torchvision")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"min_size": 3}, r"unknown key\(s\) min_size\n"),
        ({"mean": None}, "values of the wrong type"),
        ({"divisor": 0}, r"divisor = \(800, 1333, 0\)"),
        ({"max_size_px": "1333"}, "whole numbers of at least 1"),
        ({"std": [1.0, 1.0]}, "a number per channel each"),
        ({"std": [1.0, 0.0, 1.0]}, "those of std above 0"),
        ({"mean": [0.5, float("nan"), 0.5]}, "finite numbers"),
        ({"pixel_range": [0, float("inf")]}, "finite numbers"),
        ({"channel_order": "rgb"}, "channel_order 'rgb'\n  expected: 'RGB' or 'BGR'"),
        ({"resize": "opencv"}, "resize 'opencv'\n  expected: one of torchvision, pillow"),
    ],
)
def test_preprocessing_refuses_other_values(changes, text):
    with pytest.raises(UserError, match=text):
        Preprocessing.from_dict({**Preprocessing().to_dict(), **changes})


def test_preprocessing_names_missing_and_unknown_keys_together():
    values = Preprocessing().to_dict()
    values["size_px"] = values.pop("divisor")
    with pytest.raises(UserError, match=r"unknown key\(s\) size_px and missing key\(s\) divisor"):
        Preprocessing.from_dict(values)


def test_an_image_of_the_wanted_size_keeps_its_pixels():
    image = np.random.default_rng(5).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    assert np.array_equal(resize_bilinear(image, (37, 53)), image.transpose(2, 0, 1).astype(np.float32))
    taller = resize_bilinear(image, (38, 53))  # one side alone is interpolated
    assert not np.array_equal(taller[:, :37], image.transpose(2, 0, 1))
