"""Preprocessing on a Triton server: converts image files to the network's inputs.

`maskrcnn triton` writes this file as the `model.py` of a model, with copies of the modules that it imports in the same
folder. The server needs no installation of maskrcnn, and an installed version does not change the results. The server
includes NumPy, but not Pillow, which JPEG and other formats need.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

if not __name__.startswith("maskrcnn."):  # on a server, which appends this folder to the end of sys.path
    sys.dont_write_bytecode = True  # see _NO_BYTECODE in triton.py
    sys.path.insert(0, str(Path(__file__).parent))

import triton_python_backend_utils as triton

from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing, batch_images
from maskrcnn.metadata import ModelMetadata

_NPY, _PPM = b"\x93NUMPY", b"P6"  # first bytes of these formats
_PPM_HEADER = re.compile(_PPM + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,7})" + rb"\s")  # width, height, maximum value
_FORMATS = "an image file (JPEG, PNG …), a PPM file, or an .npy file of uint8 [H, W, C], or float32 from 0 to 255"


class TritonPythonModel:
    """Interface of Triton's Python backend; each instance is a separate process."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the model's metadata from this file's folder, and the sizes that the network accepts."""
        path = Path(__file__).with_name("metadata.json")
        self.preprocessing = ModelMetadata.from_json(path.read_text(encoding="utf-8"), path).preprocessing
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self.sizes = sizes_from_text(parameters.get("sizes", {}).get("string_value", ""))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Returns a response for each request: an error if one of its images cannot be read."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        data = triton.get_input_tensor_by_name(request, "image").as_numpy().ravel()
        try:
            images = [
                image_from_bytes(bytes(part), f"{k} of the request", self.preprocessing) for k, part in enumerate(data)
            ]
            pixels, image_sizes = batch_images(images, self.preprocessing)
            pixels = padded(pixels, self.sizes)
        except UserError as error:
            return triton.InferenceResponse(error=triton.TritonError(str(error)))
        outputs = {
            "images": pixels,
            "image_sizes": image_sizes,
            "original_sizes": np.array([image.shape[:2] for image in images], np.int64),
        }
        return triton.InferenceResponse([triton.Tensor(name, value) for name, value in outputs.items()])


def image_from_bytes(data: bytes, name: str, preprocessing: Preprocessing | None = None) -> np.ndarray:
    """Decodes the content of an image file to `[H, W, C]`, upright, in the model's bands and pixel range.

    An .npy file is treated like an array in `batch_images`.

    Raises:
        UserError: if it is not an image, or Pillow is needed and missing.
    """
    if data.startswith(_NPY):
        return _from_npy(data, name)
    if data.startswith(_PPM):
        return _from_ppm(data, name)
    try:
        from maskrcnn.data.images import decode_image
    except ImportError as error:
        raise UserError(
            f"image {name} in a format that requires Pillow, and no Pillow on the server",
            "Pillow, or images as PPM or .npy files",
            "`pip install pillow` in the server's image (docs/serving.md), or send PPM or .npy",
        ) from error
    return decode_image(data, name, preprocessing)


def _from_npy(data: bytes, name: str) -> np.ndarray:
    """Reads an array of `numpy.save`; `numpy.load` would allocate any size that the header states."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = read_header[version](file)
        if is_fortran or dtype not in (np.uint8, np.float32) or len(shape) != 3:
            raise ValueError(f"{dtype} {list(shape)}{' in Fortran order' if is_fortran else ''}")
        return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)
    except (ValueError, KeyError) as error:
        raise UserError(f"image {name} is not an .npy image ({error})", _FORMATS, "send one of these") from error


def _from_ppm(data: bytes, name: str) -> np.ndarray:
    """Reads an 8-bit binary PPM file (netpbm.sourceforge.net/doc/ppm.html)."""
    header = _PPM_HEADER.match(data)
    if header is None or header[3] != b"255":
        raise UserError(f"image {name} is a PPM file of more than 8 bits or damaged", _FORMATS, "send another")
    width, height = int(header[1]), int(header[2])
    if len(data) - header.end() < height * width * 3:
        raise UserError(f"image {name} ends before its {height}×{width} pixels", "a complete file", "send it again")
    return np.frombuffer(data, np.uint8, height * width * 3, header.end()).reshape(height, width, 3)


def sizes_from_text(text: str) -> list[tuple[int, int, int, int]]:
    """Parses (min height, max height, min width, max width) of each `h:HxW:w`, separated by commas."""
    sides = [[int(side) for side in re.split("[x:]", size)] for size in text.split(",") if size]
    return [(low_h, high_h, low_w, high_w) for low_h, high_h, low_w, high_w in sides]


def padded(images: np.ndarray, sizes: list[tuple[int, int, int, int]]) -> np.ndarray:
    """Pads a batch `[N, 3, H, W]` with zeros at the right and bottom to the smallest allowed size.

    Args:
        images: the batch.
        sizes: from `sizes_from_text`; [] allows every size.

    Raises:
        UserError: if no size is large enough.
    """
    if not sizes:
        return images
    height, width = images.shape[2:]
    fitting = [
        (max(height, low_h), max(width, low_w))
        for low_h, high_h, low_w, high_w in sizes
        if height <= high_h and width <= high_w
    ]
    if not fitting:
        listed = ", ".join(f"{size[1]}x{size[3]}" for size in sizes)
        raise UserError(
            f"images of {height}x{width} after resizing",
            f"at most {listed}, which this server accepts",
            "write the repository with another --pad-to, or from an engine with larger profiles",
        )
    size = min(fitting, key=lambda hw: hw[0] * hw[1])
    if size == (height, width):
        return images
    larger = np.zeros((*images.shape[:2], *size), images.dtype)
    larger[:, :, :height, :width] = images
    return larger
