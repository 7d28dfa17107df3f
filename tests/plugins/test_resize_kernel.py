"""The resizing kernel against the preprocessing that every backend shares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_calls import resize_pad

from maskrcnn.imaging.preprocess import Preprocessing, batch_images, resize_bilinear, resized_size


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    resized=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    padding=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    swap=st.booleans(),
)
def test_the_result_equals_resize_bilinear_padded_with_zeros(device, size, resized, padding, swap):
    image = random_image(*size)
    padded = (resized[0] + padding[0], resized[1] + padding[1])
    expected = np.zeros((3, *padded), np.float32)
    expected[:, : resized[0], : resized[1]] = resize_bilinear(image[..., ::-1] if swap else image, resized)
    np.testing.assert_array_equal(resize_pad(device, image, resized, padded, swap_channels=swap), expected)


def test_a_batch_equals_batch_images(any_device):
    images = [random_image(61, 97), random_image(120, 50, 1)]
    preprocessing = Preprocessing(min_size_px=64, max_size_px=120)
    for image, expected in zip(images, batch_images(images, preprocessing)[0], strict=True):
        resized = resized_size(image.shape[:2], preprocessing)
        np.testing.assert_array_equal(resize_pad(any_device, image, resized, expected.shape[1:]), expected)


def test_a_ramp_is_sampled_between_pixel_centres(any_device):
    image = np.zeros((1, 2, 3), np.uint8)
    image[0, 1] = 200
    # The centres of the four output pixels are at 0, 0.25, 0.75 and 1 between the centres of the two input pixels.
    assert resize_pad(any_device, image, (1, 4), (1, 4))[0, 0].tolist() == [0, 50, 150, 200]


@pytest.mark.parametrize(("resized", "padded"), [((0, 4), (4, 4)), ((4, 4), (3, 4)), ((4, 5), (4, 4))])
def test_impossible_sizes_are_errors(any_device, resized, padded):
    with pytest.raises(ValueError, match=r"kernels\.h"):
        resize_pad(any_device, random_image(4, 4), resized, padded)
