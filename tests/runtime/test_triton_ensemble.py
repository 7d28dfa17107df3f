"""The steps around a network on a Triton server: detections equal to `Detector.detect`, and invalid requests."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import triton_stub
from PIL import Image
from triton_server import Refused, Server

from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.runtime import Detector
from maskrcnn.runtime.build.openvino import build_openvino_engine
from maskrcnn.runtime.serving.models import ServingOptions, served_model
from maskrcnn.runtime.serving.triton import STEP_MODULES, write_repository

SIZES_HW = ((120, 150), (90, 61), (200, 130))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(5)
    return [shapes_image(rng, size)[0] for size in SIZES_HW]


@pytest.fixture(scope="module")
def steps():
    """The modules of the two steps in the package."""
    sys.modules["triton_python_backend_utils"] = triton_stub
    try:
        from maskrcnn.runtime.serving import post as triton_post
        from maskrcnn.runtime.serving import pre as triton_pre
    finally:
        del sys.modules["triton_python_backend_utils"]
    return triton_pre, triton_post


def serve(root, path, **options) -> Server:
    write_repository(root, [("det", served_model(path))], ServingOptions(**options))
    return Server(root)


def encoded(image, kind="PNG") -> bytes:
    file = io.BytesIO()
    np.save(file, image) if kind == "NPY" else Image.fromarray(image).save(file, kind)
    return file.getvalue()


def request(*files: bytes) -> dict[str, np.ndarray]:
    return {"image": np.array([[file] for file in files], object)}


def assert_as_detected(answer, detected, class_names):
    rows = answer["boxes"].shape[1]
    assert len(detected) == len(answer["boxes"])
    for n, found in enumerate(detected):
        used = answer["num_detections"][n, 0]
        assert used == len(found)
        assert tuple(answer["image_size"][n]) == found.size_hw
        np.testing.assert_array_equal(answer["boxes"][n, :used], found.boxes_xyxy_px)
        np.testing.assert_array_equal(answer["scores"][n, :used], found.scores)
        np.testing.assert_array_equal(answer["labels"][n, :used], found.labels)
        names = [class_names[label - 1].encode() for label in found.labels]
        assert answer["class_names"][n].tolist() == names + [b""] * (rows - used)
        assert not answer["boxes"][n, used:].any() and not answer["scores"][n, used:].any()


# The whole ensemble


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_ensemble_detects_as_the_detector(tmp_path, onnx_file, images, backend):
    path = onnx_file
    if backend == "openvino":
        path = tmp_path / "model.fp16.xml"
        build_openvino_engine(onnx_file, path, half=True)
    server, detector = serve(tmp_path / "repo", path), Detector.load(path)
    assert server.warm_up("det_network") == 2
    answer = server.infer("det", request(*map(encoded, images)))
    detected = detector.detect(images)
    assert sum(map(len, detected)) > 5
    assert_as_detected(answer, detected, detector.metadata.class_names)
    for n, found in enumerate(detected):
        counts = [rle["counts"].encode() for rle in found.rles()]
        assert answer["masks"][n, : len(found)].tolist() == counts
    assert len(server.imported_from) == 2
    assert all(tmp_path in path.parents for path in server.imported_from)  # not this installation


def test_masks_as_bits(tmp_path, onnx_file, images):
    server, detector = serve(tmp_path, onnx_file, masks="bits"), Detector.load(onnx_file)
    answer = server.infer("det", request(*map(encoded, images)))
    for n, found in enumerate(detector.detect(images)):
        height, width = found.size_hw
        unpacked = np.unpackbits(answer["masks"][n], axis=2, count=None).astype(bool)
        np.testing.assert_array_equal(unpacked[: len(found), :height, :width], found.full_masks())
        assert not unpacked[len(found) :].any() and not unpacked[:, height:].any() and not unpacked[:, :, width:].any()


def test_a_detector_without_masks(tmp_path, boxes_onnx_file, images):
    server, detector = serve(tmp_path, boxes_onnx_file), Detector.load(boxes_onnx_file)
    answer = server.infer("det", request(encoded(images[0])))
    assert "masks" not in answer
    assert_as_detected(answer, detector.detect(images[:1]), detector.metadata.class_names)


def test_keypoints_are_in_pixels_of_the_original_image(tmp_path, joint_onnx_file, images):
    server, detector = serve(tmp_path, joint_onnx_file, masks="none"), Detector.load(joint_onnx_file)
    answer = server.infer("det", request(*map(encoded, images)))
    assert "masks" not in answer and answer["keypoints"].shape == (3, 12, 5, 3)
    detected = detector.detect(images)
    assert_as_detected(answer, detected, detector.metadata.class_names)
    for n, found in enumerate(detected):
        np.testing.assert_array_equal(answer["keypoints"][n, : len(found)], found.keypoints)
        assert len(found) and not answer["keypoints"][n, len(found) :].any()


def test_low_scores_are_not_sent(tmp_path, onnx_file, images):
    (found,) = Detector.load(onnx_file).detect(images[:1])
    middle = float(np.median(found.scores))
    server = serve(tmp_path, onnx_file, min_score=middle, masks="none")
    answer = server.infer("det", request(encoded(images[0])))
    assert answer["num_detections"].tolist() == [[len(found.above(middle))]]
    assert 0 < len(found.above(middle)) < len(found)


def test_images_are_padded_to_the_sizes_of_the_server(tmp_path, onnx_file, images):
    server = serve(tmp_path, onnx_file, pad_to=((160, 160), (128, 160)))
    made = server.infer("det_pre", request(encoded(images[0])))
    assert made["images"].shape == (1, 3, 128, 160)
    assert made["image_sizes"].tolist() == [[96, 120]] and not made["images"][:, :, 96:].any()
    assert server.infer("det", request(encoded(images[0])))["num_detections"][0, 0] > 0
    with pytest.raises(Refused, match=r"images of 64x160 after resizing(.|\n)*at most 128x128"):
        serve(tmp_path / "small", onnx_file, pad_to=((128, 128),)).infer("det", request(encoded(images[0][:60])))


def test_a_request_with_too_many_images(tmp_path, onnx_file, images):
    server = serve(tmp_path, onnx_file, max_batch=2)
    with pytest.raises(Refused, match="batch-size must be <= 2"):
        server.infer("det", request(*map(encoded, images)))


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
        (b"\x93NUMPY\x01\x00", r"no \.npy file"),
        (b"\x93NUMPY\x09\x00", r"no \.npy file"),
        (encoded(np.zeros((2, 2, 3), np.float64), "NPY"), "float64"),
        (encoded(np.zeros((2, 2), np.uint8), "NPY"), r"uint8 \[2, 2\]"),
        (encoded(np.zeros((2, 4, 3), np.uint8), "NPY")[:-1], r"no \.npy file"),
    ],
)
def test_invalid_images(steps, data, text):
    with pytest.raises(UserError, match=text):
        steps[0].image_from_bytes(data, "0 of the request")


def test_the_header_of_an_array_does_not_allocate(steps):
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 3)}
    np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(UserError, match=r"no \.npy file"):
        steps[0].image_from_bytes(file.getvalue(), "0")


def test_an_invalid_image_fails_its_own_request_only(steps, onnx_file, images, monkeypatch, tmp_path):
    module = steps[0]
    path = tmp_path / "model.py"
    (tmp_path / "metadata.json").write_text(served_model(onnx_file).metadata.to_json())
    monkeypatch.setattr(module, "__file__", str(path))
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps({"parameters": {}})})
    files = [encoded(images[0]), b"no image"]
    requests = [triton_stub.InferenceRequest([triton_stub.Tensor("image", request(file)["image"])]) for file in files]
    good, bad = model.execute(requests)
    assert good.error is None and len(good.outputs) == 3
    assert "image 0 of the request is not an image" in bad.error.message() and "fix:" in bad.error.message()


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


# What the steps import


def test_the_steps_need_no_more_than_their_modules_and_numpy(tmp_path, onnx_file):
    """Every copied module imports with NumPy only, except the one that needs Pillow."""
    write_repository(tmp_path, [("det", served_model(onnx_file))], ServingOptions())
    folder = tmp_path / "det_pre" / "1"
    names = [f"maskrcnn.{module.replace('/', '.')}".removesuffix(".__init__") for module in STEP_MODULES]
    program = (
        "import importlib, sys\nsys.path[:0] = sys.argv[1:3]\nsys.modules['PIL'] = None\n"
        "failed = []\nfor name in sys.argv[3:]:\n"
        "    try: importlib.import_module(name)\n    except ImportError: failed.append(name)\nprint(failed)"
    )
    numpy = Path(np.__file__).parents[1]
    command = [sys.executable, "-S", "-I", "-c", program, str(folder), str(numpy), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['maskrcnn.data.images']", done.stderr
