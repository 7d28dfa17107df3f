"""The resizing kernel, compiled for the CPU, against the preprocessing that every backend shares."""

import kernels_on_cpu
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn.imaging.preprocess import Preprocessing, batch_images, resize_bilinear, resized_size
from maskrcnn.plugins.native import Kernels


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if kernels_on_cpu.compiler() is None:
        pytest.skip("no C++ compiler")
    return Kernels(kernels_on_cpu.build(tmp_path_factory.mktemp("kernels")))


def an_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=300, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    resized=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    padding=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    swap=st.booleans(),
)
def test_it_is_resize_bilinear_and_zeros(kernels, size, resized, padding, swap):
    image = an_image(*size)
    padded = (resized[0] + padding[0], resized[1] + padding[1])
    found = kernels_on_cpu.resize_pad(kernels, image, resized, padded, swap_channels=swap)
    wanted = np.zeros((3, *padded), np.float32)
    wanted[:, : resized[0], : resized[1]] = resize_bilinear(image[..., ::-1] if swap else image, resized)
    np.testing.assert_array_equal(found, wanted)


def test_a_batch_is_batch_images(kernels):
    images, preprocessing = [an_image(61, 97), an_image(120, 50, 1)], Preprocessing(min_size_px=64, max_size_px=120)
    batch, _ = batch_images(images, preprocessing)
    for image, wanted in zip(images, batch, strict=True):
        resized = resized_size(image.shape[:2], preprocessing)
        np.testing.assert_array_equal(kernels_on_cpu.resize_pad(kernels, image, resized, wanted.shape[1:]), wanted)


def test_a_ramp_is_read_between_pixel_centres(kernels):
    image = np.zeros((1, 2, 3), np.uint8)
    image[0, 1] = 200
    # Centres of the four output pixels lie at input 0, 0.25, 0.75, 1 between the two pixels' centres.
    assert kernels_on_cpu.resize_pad(kernels, image, (1, 4), (1, 4))[0, 0].tolist() == [0, 50, 150, 200]


@pytest.mark.parametrize(("resized", "padded"), [((0, 4), (4, 4)), ((4, 4), (3, 4)), ((4, 5), (4, 4))])
def test_impossible_sizes_are_refused(kernels, resized, padded):
    with pytest.raises(ValueError, match=r"kernels\.h"):
        kernels_on_cpu.resize_pad(kernels, an_image(4, 4), resized, padded)
