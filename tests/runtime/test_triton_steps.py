"""The steps of a network on a Triton server, without a server: image formats, padding, masks, and what they import."""

import io
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from triton_server import encoded

from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import batch_images
from maskrcnn.runtime import Detector
from maskrcnn.runtime.serving.models import ServingOptions, served_model
from maskrcnn.runtime.serving.triton import STEP_MODULES, write_repository

SIZES_HW = ((120, 150), (90, 61), (200, 130))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(5)
    return [shapes_image(rng, size)[0] for size in SIZES_HW]


@pytest.fixture(scope="module")
def steps():
    """The modules of the steps in the package: pre, post and network."""
    sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
    try:
        from maskrcnn.runtime.serving import network, post, pre
    finally:
        del sys.modules["triton_python_backend_utils"]
    return pre, post, network


# Images


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "NPY"])
def test_formats_without_loss(steps, images, kind):
    np.testing.assert_array_equal(steps[0].image_from_bytes(encoded(images[1], kind), "0"), images[1])


def test_jpeg_is_read_as_from_a_file(steps, images, tmp_path):
    from maskrcnn.data.images import read_image

    data = encoded(images[0], "JPEG")
    (tmp_path / "image.jpg").write_bytes(data)
    np.testing.assert_array_equal(steps[0].image_from_bytes(data, "0"), read_image(tmp_path / "image.jpg"))


def test_a_ppm_file_with_comments(steps):
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 4, 3)
    data = b"P6 # made by hand\n# 4 by 1\n4\t1\n255\n" + pixels.tobytes()
    np.testing.assert_array_equal(steps[0].image_from_bytes(data, "0"), pixels)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is empty"),
        (b"hello", "is not an image"),
        (b"P6 2 2 255\n12345", "ends before its 2×2 pixels"),
        (b"P6 2 2 65535\n", "more than 8 bits or damaged"),
        (b"P6 999999999 1 255\n", "more than 8 bits or damaged"),
        (b"\x93NUMPY\x01\x00", r"not an \.npy image"),
        (b"\x93NUMPY\x09\x00", r"not an \.npy image"),
        (encoded(np.zeros((2, 2, 3), np.float64), "NPY"), "float64"),
        (encoded(np.zeros((2, 2), np.uint8), "NPY"), r"uint8 \[2, 2\]"),
        (encoded(np.zeros((2, 4, 3), np.uint8), "NPY")[:-1], r"not an \.npy image"),
    ],
)
def test_invalid_images(steps, data, text):
    with pytest.raises(UserError, match=text):
        steps[0].image_from_bytes(data, "0 of the request")


def test_the_header_of_an_array_does_not_allocate(steps):
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 3)}
    np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(UserError, match=r"not an \.npy image"):
        steps[0].image_from_bytes(file.getvalue(), "0")


def test_without_pillow_arrays_and_ppm_still_work(steps, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "maskrcnn.data.images", None)
    for kind in ("PPM", "NPY"):
        np.testing.assert_array_equal(steps[0].image_from_bytes(encoded(images[0], kind), "0"), images[0])
    with pytest.raises(UserError, match=r"no Pillow on the server(.|\n)*send PPM or \.npy"):
        steps[0].image_from_bytes(encoded(images[0], "JPEG"), "0")


def test_the_smallest_size_that_fits_is_taken(steps):
    sizes = steps[0].sizes_from_text("64:64x96:96,32:96x32:96")
    assert sizes == [(64, 64, 96, 96), (32, 96, 32, 96)]
    for given, taken in (((64, 96), (64, 96)), ((32, 32), (32, 32)), ((96, 96), (96, 96)), ((64, 64), (64, 64))):
        assert steps[0].padded(np.ones((1, 3, *given), np.float32), sizes).shape[2:] == taken
    larger = steps[0].padded(np.ones((2, 3, 32, 64), np.float32), [(64, 64, 96, 96)])
    assert larger.shape == (2, 3, 64, 96) and larger.sum() == 2 * 3 * 32 * 64


def test_bits_of_images_of_different_sizes(steps):
    masks = [np.zeros((0, 5, 9), bool), np.ones((2, 3, 10), bool)]
    packed = steps[1].bits(masks)
    assert packed.shape == (2, 2, 5, 2) and not packed[0].any()
    np.testing.assert_array_equal(packed[1, 0, :3], [[255, 192]] * 3)
    assert steps[1].bits([np.zeros((0, 4, 4), bool)]).shape == (1, 1, 4, 1)


# The network


def test_requests_of_one_size_are_one_batch(steps, onnx_file, images, monkeypatch):
    """In the order of the requests, of any number of images each; an input that does not fit fails its own batch."""
    triton = types.SimpleNamespace(
        Tensor=lambda name, value: (name, value),
        InferenceResponse=lambda tensors=(), error=None: error or dict(tensors),
        TritonError=lambda text: text,
        get_input_tensor_by_name=lambda request, name: types.SimpleNamespace(as_numpy=lambda: request[name]),
    )
    monkeypatch.setattr(steps[2], "triton", triton)
    network = steps[2].TritonPythonModel()
    detector, batches = Detector.load(onnx_file, threads=1), []
    network.network = lambda feeds: batches.append(len(feeds["images"])) or detector.backend(feeds)
    network.inputs, network.outputs = (list(specs) for specs in detector.backend.describe())

    def request(*found):
        pixels, sizes = batch_images(found, detector.preprocessing)
        return {"images": pixels, "image_sizes": sizes}

    requests = [request(images[0]), request(images[1]), request(images[0][:, ::-1], images[0]), request(images[1])]
    answers = network.execute([*requests, {**requests[0], "images": requests[0]["images"][..., :31]}])
    assert batches == [3, 2, 1] and "multiples of 32" in answers.pop()
    for given, answer in zip(requests, answers, strict=True):
        for name, value in detector.backend(given).items():
            np.testing.assert_allclose(answer[name], value, rtol=0, atol=1e-3, err_msg=name)


# What the steps import


@pytest.mark.parametrize(("has_pillow", "failed"), [(False, "['maskrcnn.data.images']"), (True, "[]")])
def test_the_steps_need_no_more_than_their_modules_and_numpy(tmp_path, onnx_file, has_pillow, failed):
    """Every copied module imports with NumPy only, except the one that needs Pillow."""
    write_repository(tmp_path, [("det", served_model(onnx_file))], ServingOptions())
    folder = tmp_path / "det_pre" / "1"
    names = [f"maskrcnn.{module.replace('/', '.')}".removesuffix(".__init__") for module in STEP_MODULES]
    no_pillow = "" if has_pillow else "sys.modules['PIL'] = None\n"
    program = (
        f"import importlib, sys\nsys.path[:0] = sys.argv[1:3]\n{no_pillow}"
        "failed = []\nfor name in sys.argv[3:]:\n"
        "    try: importlib.import_module(name)\n    except ImportError: failed.append(name)\nprint(failed)"
    )
    numpy = Path(np.__file__).parents[1]
    command = [sys.executable, "-S", "-I", "-c", program, str(folder), str(numpy), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == failed, done.stderr
