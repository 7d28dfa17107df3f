"""docs/cpp: the program compiles against TensorRT's headers, and does with an engine what `Detector.detect` does.

No machine of these tests has a GPU: it runs with a stand-in for TensorRT and CUDA, whose engine finds two boxes, or the
outputs that a test gives it.
"""

import dataclasses
import resource
import shutil
import subprocess
from pathlib import Path

import kernels_on_cpu
import numpy as np
import plugin_library
import pytest
from paste_cases import KINDS_OF_BOX, boxes_of
from PIL import Image

from maskrcnn.data.shapes import shapes_image
from maskrcnn.imaging.paste import paste_mask
from maskrcnn.imaging.postprocess import Detections, unpack
from maskrcnn.imaging.preprocess import Preprocessing, batch_images, resized_size
from maskrcnn.plugins.toolchain import find_cuda_headers
from maskrcnn.runtime.engine_files import read_model

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "docs" / "cpp"
FAKE = ROOT / "tests" / "support" / "tensorrt_on_cpu"
PREPROCESSING = Preprocessing(min_size_px=96, max_size_px=160)
SIZES = ("--min-size", "96", "--max-size", "160")
PLAN = "plan 8 96 160 96 160\n"

pytestmark = pytest.mark.skipif(kernels_on_cpu.compiler() is None, reason="no C++ compiler")


def compile_program(output: Path, *words: str) -> subprocess.CompletedProcess:
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    command = [str(kernels_on_cpu.compiler()), *flags, *words, str(SOURCES / "main.cpp"), "-o", str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not plugin_library.header_folders(), reason="no TensorRT headers: set TENSORRT_INCLUDE_DIR")
@pytest.mark.skipif(find_cuda_headers(None) is None, reason="no CUDA headers: pip install nvidia-cuda-runtime")
@pytest.mark.parametrize("headers", plugin_library.header_folders() or [None], ids=str)
def test_it_compiles_against_the_headers(tmp_path, headers):
    done = compile_program(tmp_path / "x.o", "-c", "-isystem", str(headers), "-isystem", str(find_cuda_headers(None)))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("cpp") / "detect"
    done = compile_program(path, "-I", str(FAKE))
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def detect(program, tmp_path, monkeypatch):
    """Runs the program on an image with sizes 96 and 160; returns what it did and the file of the engine's input."""
    monkeypatch.setenv("FAKE_TENSORRT_IMAGES", str(tmp_path / "input"))
    monkeypatch.setenv("FAKE_TENSORRT_OUTPUTS", str(tmp_path / "outputs"))
    (tmp_path / "outputs").mkdir()

    def run(image, *options, plan=PLAN, outputs=None, sizes=SIZES, **how):
        (tmp_path / "model.engine").write_text(plan)
        for name, values in (outputs or {}).items():
            shape = " ".join(map(str, values.shape))
            (tmp_path / "outputs" / name).write_bytes(f"{shape}\n".encode() + values.tobytes())
        if isinstance(image, np.ndarray):
            Image.fromarray(image).save(tmp_path / "image.ppm")
        else:
            (tmp_path / "image.ppm").write_bytes(image)
        command = [str(program), str(tmp_path / "model.engine"), str(tmp_path / "image.ppm"), *sizes, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, **how)
        return done, tmp_path / "input"

    return run


@pytest.mark.parametrize("size_hw", [(120, 150), (300, 97), (96, 96), (40, 61)])
def test_the_network_gets_what_python_gives_it(detect, size_hw):
    image = shapes_image(np.random.default_rng(1), size_hw)[0]
    done, path = detect(image)
    assert done.returncode == 0, done.stderr
    header, _, data = path.read_bytes().partition(b"\n")
    height, width = map(int, header.split())
    given = np.frombuffer(data, np.float32).reshape(3, height, width)
    wanted = batch_images([image], PREPROCESSING)[0][0]
    assert height >= 96 and width >= 96  # the engine's least
    np.testing.assert_allclose(given[:, : wanted.shape[1], : wanted.shape[2]], wanted, atol=1e-3)
    assert not given[:, wanted.shape[1] :].any() and not given[:, :, wanted.shape[2] :].any()


def test_sizes_come_from_the_metadata_beside_the_engine(detect, tmp_path, onnx_file):
    image = np.full((120, 150, 3), 90, np.uint8)
    _, path = detect(image)
    wanted = path.read_bytes()
    path.unlink()
    done, _ = detect(image, sizes=())
    assert done.returncode == 1
    assert "no sizes of the model's images" in done.stderr and "model.engine.json" in done.stderr
    metadata = dataclasses.replace(read_model(onnx_file)[1], preprocessing=PREPROCESSING)
    (tmp_path / "model.engine.json").write_text(metadata.to_json())
    done, path = detect(image, sizes=())
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == wanted


def test_boxes_are_printed_in_the_original_image(detect):
    done, _ = detect(np.full((120, 150, 3), 90, np.uint8))
    assert done.stdout.splitlines() == ["label 3 score 0.9000 box 0.00 0.00 150.00 120.00"]
    done, _ = detect(np.full((120, 150, 3), 90, np.uint8), "--score", "0.3")
    assert done.stdout.splitlines()[1] == "label 1 score 0.4000 box 75.00 30.00 150.00 60.00"
    height, width = resized_size((120, 150), PREPROCESSING)
    assert (height, width) != (120, 150)  # boxes had to be scaled


def outputs_of(boxes, masks=None, keypoints=None, scores=None) -> dict[str, np.ndarray]:
    """What an engine gives for one image, with two rows of padding.

    Args:
        boxes: `[D, 4]` in pixels of the resized image.
        masks: `[D, S, S]`.
        keypoints: `[D, K, 3]`.
        scores: `[D]`; by default from 0.99 down to 0.6.
    """
    count = len(boxes)
    scores = np.linspace(0.99, 0.6, count) if scores is None else scores
    rows = {"boxes": (boxes, np.float32), "scores": (scores, np.float32), "labels": (np.arange(count) + 1, np.int64)}
    rows |= {"masks": (masks, np.float32)} if masks is not None else {}
    rows |= {"keypoints": (keypoints, np.float32)} if keypoints is not None else {}
    padded = {}
    for name, (values, dtype) in rows.items():
        padded[name] = np.zeros((1, count + 2, *np.shape(values)[1:]), dtype)
        padded[name][0, :count] = values
    return {"num_detections": np.int32([count]), **padded}


def detections_of(outputs, size_hw, score=0.5) -> Detections:
    """What Python makes of the same outputs."""
    return unpack(outputs, np.array([resized_size(size_hw, PREPROCESSING)]), [size_hw])[0].above(score)


def numbered_pixels(found: Detections) -> np.ndarray:
    """The numbers of the detections, painted from the last to the first, `[H, W]`."""
    pixels = np.zeros(found.size_hw, np.int64)
    for k in reversed(range(len(found))):
        window, top, left = paste_mask(found.masks[k], found.boxes_xyxy_px[k], found.size_hw)
        pixels[top : top + window.shape[0], left : left + window.shape[1]][window > 0.5] = k + 1
    return pixels


def read_pgm(path: Path) -> np.ndarray:
    magic, size, largest, data = path.read_bytes().split(b"\n", 3)
    width, height = map(int, size.split())
    assert magic == b"P5" and largest in (b"255", b"65535")
    return np.frombuffer(data, np.uint8 if largest == b"255" else ">u2").reshape(height, width)


def bumps(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    """Masks `[count, side, side]`: a smooth hill each, somewhere in its frame."""
    place = (np.arange(side) + 0.5) / side
    centres, widths = rng.uniform(0.2, 0.8, (2, count, 1)), rng.uniform(0.15, 0.6, (2, count, 1))
    across, down = np.exp(-(((place - centres) / widths) ** 2))
    return (down[:, :, None] * across[:, None, :]).astype(np.float32)


@pytest.mark.parametrize("kind", ["bumps", "noise"])
@pytest.mark.parametrize(
    ("size_hw", "side"), [((120, 150), 28), ((300, 97), 28), ((96, 96), 7), ((40, 61), 1), ((211, 333), 60)]
)
def test_masks_are_pythons_to_the_pixel(detect, tmp_path, size_hw, side, kind):
    rng = np.random.default_rng(side)
    resized = resized_size(size_hw, PREPROCESSING)
    # Inside the image, across its border, around it, outside, empty; the large ones last, as they hide the others.
    boxes = np.array(
        sorted(boxes_of(rng, [*KINDS_OF_BOX] * 4, resized), key=lambda box: abs(np.prod(box[2:] - box[:2])))
    )
    masks = bumps(rng, len(boxes), side) if kind == "bumps" else rng.random((len(boxes), side, side), np.float32)
    outputs = outputs_of(boxes, masks)
    path = tmp_path / "masks.pgm"
    done, _ = detect(np.zeros((*size_hw, 3), np.uint8), "--masks", str(path), outputs=outputs)
    assert done.returncode == 0, done.stderr
    wanted = numbered_pixels(detections_of(outputs, size_hw))
    assert len(np.unique(wanted)) > 10 and len(done.stdout.splitlines()) == len(boxes)
    np.testing.assert_array_equal(read_pgm(path), wanted)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), wanted)
    assert not list(tmp_path.glob("*.part"))


def test_where_masks_overlap_the_earlier_detection_keeps_the_pixel(detect, tmp_path):
    # A mask of 2 x 2 ones has 4 x 4 pixels with its border; a box of 3.5 px grows to 8, of which the middle four are
    # more than a half in each direction, as in tests/plugins/test_mask_paste_kernel.py.
    box = np.float32([1.75, 1.75, 5.25, 5.25])
    boxes = np.stack([box + np.float32([right, down, right, down]) for right, down in ((0, 0), (1, 2), (0, 1))])
    outputs = outputs_of(boxes, np.ones((3, 2, 2)), scores=[0.9, 0.8, 0.4])
    wanted = np.zeros((96, 96), np.uint8)
    wanted[4:8, 3:7] = 2
    wanted[2:6, 2:6] = 1
    path = tmp_path / "masks.pgm"
    detect(np.zeros((96, 96, 3), np.uint8), "--masks", str(path), outputs=outputs)
    np.testing.assert_array_equal(read_pgm(path), wanted)
    detect(np.zeros((96, 96, 3), np.uint8), "--masks", str(path), "--score", "0.3", outputs=outputs)
    wanted[6, 2] = 3  # what is left of the third
    np.testing.assert_array_equal(read_pgm(path), wanted)


def test_no_detections_are_an_empty_image(detect, tmp_path):
    path = tmp_path / "masks.pgm"
    outputs = outputs_of(np.zeros((0, 4)), np.zeros((0, 28, 28)))
    done, _ = detect(np.zeros((120, 150, 3), np.uint8), "--masks", str(path), outputs=outputs)
    assert done.returncode == 0 and done.stdout == ""
    assert path.read_bytes() == b"P5\n150 120\n255\n" + bytes(150 * 120)


@pytest.mark.parametrize("count", [255, 256])
def test_numbers_of_more_than_255_detections_have_two_bytes(detect, tmp_path, count):
    across, down = np.arange(count) % 20 * 5, np.arange(count) // 20 * 5
    boxes = np.stack([across, down, across + 4, down + 4], axis=1)
    outputs = outputs_of(boxes, np.ones((count, 28, 28)))
    path = tmp_path / "masks.pgm"
    done, _ = detect(np.zeros((96, 110, 3), np.uint8), "--masks", str(path), outputs=outputs)
    assert done.returncode == 0, done.stderr
    pixels = read_pgm(path)
    assert pixels.dtype.itemsize == (1 if count == 255 else 2) and pixels.max() == count
    np.testing.assert_array_equal(pixels, numbered_pixels(detections_of(outputs, (96, 110))))


def test_masks_that_can_not_be_written_leave_nothing(detect, tmp_path):
    folder = tmp_path / "written"
    (folder / "taken.pgm").mkdir(parents=True)
    (folder / "old.pgm").write_bytes(b"what was there")
    image, outputs = np.zeros((120, 150, 3), np.uint8), outputs_of([[0, 0, 90, 90]], np.ones((1, 28, 28)))

    def least_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    # Python leaves SIGXFSZ ignored, so that writing too much is an error.
    full = {"preexec_fn": least_disk, "restore_signals": False}
    for name, how in (("taken.pgm", {}), ("none/masks.pgm", {}), ("old.pgm", full), ("new.pgm", full)):
        done, _ = detect(image, "--masks", str(folder / name), outputs=outputs, **how)
        assert done.returncode == 1
        assert done.stderr == f"error: {folder / name} cannot be written\n"
    assert sorted(path.name for path in folder.iterdir()) == ["old.pgm", "taken.pgm"]
    assert (folder / "old.pgm").read_bytes() == b"what was there"
    done, _ = detect(image, "--masks", str(folder / "old.pgm"), outputs=outputs)
    assert done.returncode == 0 and read_pgm(folder / "old.pgm").max() == 1


def test_keypoints_are_printed_in_the_original_image(detect, tmp_path):
    assert resized_size((120, 150), PREPROCESSING) == (96, 120)
    keypoints = [[[10, 20, 7.5], [119, 95, -0.25]], [[0, 0, 0], [60, 1, 12]], [[1, 1, 1], [2, 2, 2]]]
    boxes = [[8, 16, 120, 96], [0, 0, 60, 48], [0, 0, 1, 1]]
    outputs = outputs_of(boxes, keypoints=np.float32(keypoints), scores=[0.9, 0.75, 0.1])
    image = np.zeros((120, 150, 3), np.uint8)
    done, _ = detect(image, outputs=outputs)
    assert done.stdout.splitlines() == [
        "label 1 score 0.9000 box 10.00 20.00 150.00 120.00 keypoints 12.50 25.00 7.5000 148.75 118.75 -0.2500",
        "label 2 score 0.7500 box 0.00 0.00 75.00 60.00 keypoints 0.00 0.00 0.0000 75.00 1.25 12.0000",
    ]
    done, _ = detect(image, "--masks", str(tmp_path / "masks.pgm"), outputs=outputs)
    assert done.returncode == 1 and "an engine without a tensor masks" in done.stderr


def test_one_engine_may_have_masks_and_keypoints(detect, tmp_path):
    rng = np.random.default_rng(3)
    size_hw = (97, 300)
    height, width = resized_size(size_hw, PREPROCESSING)
    boxes = boxes_of(rng, ["inside"] * 4, (height, width))
    keypoints = rng.uniform(0, 1, (4, 17, 3)) * (width, height, 9)
    outputs = outputs_of(boxes, bumps(rng, 4, 28), keypoints)
    path = tmp_path / "masks.pgm"
    done, _ = detect(np.zeros((*size_hw, 3), np.uint8), "--masks", str(path), outputs=outputs)
    assert done.returncode == 0, done.stderr
    wanted = detections_of(outputs, size_hw)
    printed = [line.partition(" keypoints ")[2] for line in done.stdout.splitlines()]
    assert printed == [" ".join(f"{x:.2f} {y:.2f} {score:.4f}" for x, y, score in row) for row in wanted.keypoints]
    np.testing.assert_array_equal(read_pgm(path), numbered_pixels(wanted))


def test_the_profile_that_fits_is_taken(detect):
    image = np.zeros((96, 160, 3), np.uint8)
    done, path = detect(image, plan="plan 1 96 96 96 128\n4 128 160 160 160\n")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"128 160\n")


def test_plugins_are_loaded_first(detect, tmp_path):
    (tmp_path / "libmaskrcnn_plugins.so").touch()
    image = np.zeros((96, 96, 3), np.uint8)
    done, _ = detect(image, "--plugins", str(tmp_path / "libmaskrcnn_plugins.so"))
    assert done.returncode == 0 and "loaded" in done.stderr
    done, _ = detect(image, "--plugins", "none.so")
    assert done.returncode == 1 and "error: none.so is not a plugin library" in done.stderr


@pytest.mark.parametrize(
    ("image", "options", "text"),
    [
        (b"P5 2 2 255\n1234", (), "is not a binary PPM file"),
        (b"P6 2 2 255\n1234", (), "ends before its last pixel"),
        (b"P6 0 2 255\n", (), "is not a binary PPM file"),
        (b"", (), "is not a binary PPM file"),
        (np.zeros((96, 96, 3), np.uint8), ("--colour",), "unknown option --colour"),
        (np.zeros((96, 96, 3), np.uint8), ("--score",), "--score without a value"),
        (np.zeros((96, 96, 3), np.uint8), ("--masks",), "--masks without a value"),
        (np.zeros((96, 96, 3), np.uint8), ("--masks", "x.pgm"), "without a tensor masks: --masks needs a model"),
        (np.zeros((96, 96, 3), np.uint8), ("third",), "usage: detect ENGINE IMAGE.ppm"),
        (np.zeros((96, 96, 3), np.uint8), ("--min-size", "320", "--max-size", "320"), "no profile of the engine takes"),
    ],
)
def test_errors_are_one_line(detect, image, options, text):
    done, _ = detect(image, *options)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and text in line


def test_files_that_are_no_engines(detect, program, tmp_path):
    done, _ = detect(np.zeros((96, 96, 3), np.uint8), plan="something else")
    assert done.returncode == 1 and "is not an engine for this machine" in done.stderr
    command = [str(program), str(tmp_path / "none.engine"), str(tmp_path / "image.ppm"), *SIZES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "none.engine cannot be opened" in done.stderr


def test_a_ppm_file_with_a_comment(detect):
    image = np.arange(96 * 96 * 3, dtype=np.uint8).reshape(96, 96, 3)
    done, path = detect(b"P6\n# from a camera\n96 96\n255\n" + image.tobytes())
    assert done.returncode == 0, done.stderr
    data = path.read_bytes().partition(b"\n")[2]
    np.testing.assert_array_equal(np.frombuffer(data, np.float32).reshape(3, 96, 96), image.transpose(2, 0, 1))


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_cmake_builds_it_or_says_what_is_missing(tmp_path):
    def cmake(*words):
        return subprocess.run(["cmake", *words], capture_output=True, text=True, timeout=300)

    # An empty value is not searched for.
    done = cmake("-S", str(SOURCES), "-B", str(tmp_path / "none"), "-DTENSORRT_LIBRARY=")
    assert done.returncode != 0 and "fix: pass -DTensorRT_ROOT=" in done.stderr
    library = tmp_path / "libnothing.so"
    command = [str(kernels_on_cpu.compiler()), "-shared", "-x", "c++", "/dev/null", "-o", str(library)]
    subprocess.run(command, check=True, timeout=60)
    found = {"TENSORRT_INCLUDE_DIR": FAKE, "CUDA_INCLUDE_DIR": FAKE}
    found |= {"TENSORRT_LIBRARY": library, "CUDA_RUNTIME_LIBRARY": library}
    folder = tmp_path / "build"
    done = cmake("-S", str(SOURCES), "-B", str(folder), *(f"-D{name}={path}" for name, path in found.items()))
    assert done.returncode == 0, done.stderr
    done = cmake("--build", str(folder))
    assert done.returncode == 0 and "warning" not in done.stdout, done.stdout + done.stderr
    assert (folder / "detect").is_file()
