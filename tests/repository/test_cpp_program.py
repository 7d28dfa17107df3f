"""docs/cpp: the program compiles against TensorRT's headers, and does with an engine what `Detector.detect` does.

No machine of these tests has a GPU: it runs with a stand-in for TensorRT and CUDA, whose engine finds two boxes.
"""

import shutil
import subprocess
from pathlib import Path

import kernels_on_cpu
import numpy as np
import plugin_library
import pytest
from PIL import Image

from maskrcnn.data.shapes import shapes_image
from maskrcnn.plugins.toolchain import find_cuda_headers
from maskrcnn.preprocess import Preprocessing, batch_images, resized_size

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "docs" / "cpp"
FAKE = ROOT / "tests" / "support" / "tensorrt_on_cpu"
PREPROCESSING = Preprocessing(min_size_px=96, max_size_px=160)
PLAN = "plan 8 96 160 96 160\n"

pytestmark = pytest.mark.skipif(kernels_on_cpu.compiler() is None, reason="no C++ compiler")


def compile_program(output: Path, *words: str) -> subprocess.CompletedProcess:
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
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

    def run(image, *options, plan=PLAN):
        (tmp_path / "model.engine").write_text(plan)
        if isinstance(image, np.ndarray):
            Image.fromarray(image).save(tmp_path / "image.ppm")
        else:
            (tmp_path / "image.ppm").write_bytes(image)
        sizes = ("--min-size", "96", "--max-size", "160")
        command = [str(program), str(tmp_path / "model.engine"), str(tmp_path / "image.ppm"), *sizes, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
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


def test_boxes_are_printed_in_the_original_image(detect):
    done, _ = detect(np.full((120, 150, 3), 90, np.uint8))
    assert done.stdout.splitlines() == ["label 3 score 0.9000 box 0.00 0.00 150.00 120.00"]
    done, _ = detect(np.full((120, 150, 3), 90, np.uint8), "--score", "0.3")
    assert done.stdout.splitlines()[1] == "label 1 score 0.4000 box 75.00 30.00 150.00 60.00"
    height, width = resized_size((120, 150), PREPROCESSING)
    assert (height, width) != (120, 150)  # boxes had to be scaled


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
    assert done.returncode == 1 and "error: none.so is no plugin library" in done.stderr


@pytest.mark.parametrize(
    ("image", "options", "text"),
    [
        (b"P5 2 2 255\n1234", (), "is no binary PPM file"),
        (b"P6 2 2 255\n1234", (), "ends before its last pixel"),
        (b"P6 0 2 255\n", (), "is no binary PPM file"),
        (b"", (), "is no binary PPM file"),
        (np.zeros((96, 96, 3), np.uint8), ("--colour",), "unknown option --colour"),
        (np.zeros((96, 96, 3), np.uint8), ("--score",), "--score without a value"),
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
    assert done.returncode == 1 and "is no engine that runs here" in done.stderr
    command = [str(program), str(tmp_path / "none.engine"), str(tmp_path / "image.ppm")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "none.engine can not be opened" in done.stderr


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
    assert done.returncode != 0 and "do: pass -DTensorRT_ROOT=" in done.stderr
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
