"""Static web page that runs an ONNX file in the browser: the page, the model, ONNX Runtime for WebGPU and WebAssembly
(onnxruntime-web), and an image with expected detections to check the browser.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError, reason_of
from maskrcnn.files import atomic_path, kind_of, make_folder
from maskrcnn.imaging.preprocess import resized_size
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.engine_files import check_portable, read_model
from maskrcnn.runtime.verification.compare import TOLERANCES

RUNTIME_VERSION = "1.30.0"  # version of onnxruntime-web
# SHA-256 of the files that the page loads from the folder dist of that version.
RUNTIME_FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}
_PAGE = Path(__file__).parent / "page"
_MARK = "model.json"  # identifies the folder of a page
_CHECK_IMAGE, _CHECK = "check.png", "check.json"
_DRAWN_HW, _DRAWN_SEED = (240, 320), 5  # size and seed of the drawn image, the default
_MAX_CHECK_PIXELS = 4_000_000  # of a given image, which every visitor may download
_SOURCE = f"onnxruntime-web {RUNTIME_VERSION} (`npm pack onnxruntime-web@{RUNTIME_VERSION}`)"


def write_page(
    model: Path, out: Path, *, onnxruntime_web: Path | None = None, image: Path | None = None
) -> tuple[list[Path], int]:
    """Writes the page of an ONNX file into a folder; an existing page is replaced.

    Args:
        model: file of `maskrcnn export --onnx`.
        out: folder that is new, empty, or contains an earlier page.
        onnxruntime_web: the unpacked package or its `.tgz` (default: fetch it with npm).
        image: image file with objects of the model's classes, used to check the browser (default: drawn shapes).

    Returns:
        The written files, and the number of detections in the image.

    Raises:
        UserError: before anything is written, for a model that the page cannot run, a folder with other files, an image
            that cannot be read or is too large, or a runtime that is missing or has another version.
    """
    metadata = _checked(model)
    _check_folder(out, model)
    pixels, check = _expected(model, image)
    with tempfile.TemporaryDirectory() as temporary:
        runtime = _runtime(onnxruntime_web, Path(temporary))
        files = {path.name: path for path in sorted(_PAGE.iterdir())} | runtime | {"model.onnx": model}
        make_folder(out)
        with atomic_path(out / _MARK) as path:
            path.write_text(replace(metadata, stamp={}).to_json() + "\n", encoding="utf-8")
        with atomic_path(out / _CHECK) as path:
            path.write_text(json.dumps(check) + "\n", encoding="utf-8")
        with atomic_path(out / _CHECK_IMAGE) as path:
            Image.fromarray(pixels).save(path, format="PNG")
        for name, source in files.items():
            with atomic_path(out / name) as path:
                shutil.copyfile(source, path)
    return [out / name for name in (_MARK, _CHECK, _CHECK_IMAGE, *files)], len(check["detections"])


def _checked(model: Path) -> ModelMetadata:
    if model.suffix != ".onnx":
        raise UserError(f"{model}: {kind_of(model)}", "an ONNX file", "run `maskrcnn export --onnx`")
    proto, metadata = read_model(model)
    check_portable(proto, model)
    preprocessing = metadata.preprocessing
    if preprocessing.channels != 3 or preprocessing.bands:
        raise UserError(
            f"{model}: a model with {preprocessing.channels} channels or selected bands",
            "a model of RGB images, which browsers read",
            "serve it with `maskrcnn triton`",
        )
    if preprocessing.resize != "torchvision":
        raise UserError(
            f"{model}: a model whose images Pillow resizes (weights of Detectron2 or MMDetection)",
            "a model with torchvision's resizing, which the page implements",
            "serve it with `maskrcnn triton`, or fine-tune with --set model.preprocessing.resize=torchvision",
        )
    if metadata.precision == "bf16":
        raise UserError(f"{model}: a file in bfloat16", "fp32, fp16 or int8", "export it with another --precision")
    return metadata


def _expected(model: Path, image: Path | None) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns an image, its detections in ONNX Runtime, and tolerances for the browser's detections."""
    detector = Detector.load(model, "onnxruntime:cpu")
    pixels = shapes_image(np.random.default_rng(_DRAWN_SEED), _DRAWN_HW)[0] if image is None else detector.read(image)
    height, width = pixels.shape[:2]
    if height * width > _MAX_CHECK_PIXELS:
        raise UserError(
            f"{image}: {height * width / 1e6:.1f} megapixels",
            f"at most {_MAX_CHECK_PIXELS / 1e6:.0f}, as visitors download the image",
            "reduce it first",
        )
    (found,) = detector.detect([pixels])
    tolerance = TOLERANCES[detector.metadata.precision]
    scale = min(resized_size((height, width), detector.preprocessing)) / min(height, width)
    return pixels, {
        "detections": found.to_coco(),
        "tolerance": {
            "box_px": tolerance.box_px / min(scale, 1),  # from pixels of the resized image to pixels of the image
            "keypoint_px": tolerance.keypoints.px / min(scale, 1),
            "keypoint_share": tolerance.keypoints.share,
            "score": tolerance.score,
            "mask_mean": tolerance.mask_mean,
            "min_iou": tolerance.min_iou,
            "departing_share": tolerance.departing_share,
        },
    }


def _check_folder(out: Path, model: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file", "a new folder, or the folder of an earlier page", "choose another folder")
    if out.is_dir() and any(out.iterdir()) and not all((out / name).is_file() for name in (_MARK, "page.js")):
        raise UserError(
            f"{out}: a folder with other files",
            "a new or empty folder, or that of an earlier page",
            "choose another folder",
        )
    if model.resolve().parent == out.resolve():
        raise UserError(f"{out}: the folder of {model.name}", "another folder", "choose another folder")


def _runtime(given: Path | None, temporary: Path) -> dict[str, Path]:
    """The checked files of onnxruntime-web by name."""
    package = given or _fetched(temporary)
    if package.is_file():
        package = _unpacked(package, temporary)
    folder = package / "dist" if (package / "dist").is_dir() else package
    for name, expected in RUNTIME_FILES.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"no {name} in {folder}", _SOURCE, "pass its folder or .tgz with --onnxruntime-web")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise UserError(
                f"{path}: SHA-256 {found[:12]}…, another version or damaged",
                f"{expected[:12]}… of {_SOURCE}",
                "fetch that version, or omit --onnxruntime-web",
            )
    return {name: folder / name for name in RUNTIME_FILES}


def _fetched(temporary: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            "no npm, which fetches onnxruntime-web",
            f"npm, or {_SOURCE} from another machine",
            "install Node.js, or pass the package with --onnxruntime-web",
        )
    command = [npm, "pack", f"onnxruntime-web@{RUNTIME_VERSION}", "--silent", "--pack-destination", str(temporary)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
    packed = list(temporary.glob("*.tgz"))
    if done.returncode or not packed:
        raise UserError(
            f"npm cannot fetch onnxruntime-web: {(done.stderr.strip() or 'no file').splitlines()[-1]}",
            "a package registry that npm reaches",
            "check the network and `npm config get registry`, or pass the package with --onnxruntime-web",
        )
    return packed[0]


def _unpacked(package: Path, temporary: Path) -> Path:
    """Extracts the files that the page needs from npm's `.tgz`, and returns the folder."""
    folder = temporary / "unpacked"
    folder.mkdir()
    try:
        with tarfile.open(package) as archive:
            for name in RUNTIME_FILES:
                content = archive.extractfile(f"package/dist/{name}")
                if content is not None:
                    (folder / name).write_bytes(content.read())
    except (tarfile.TarError, KeyError, OSError) as error:
        raise UserError(
            f"{package}: not a package of onnxruntime-web ({reason_of(error)})", _SOURCE, "fetch it again"
        ) from error
    return folder
