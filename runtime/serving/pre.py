"""The step before the network on a Triton server: image files in, the network's inputs out.

`maskrcnn triton` writes this file as a model's `model.py`, with copies of the modules that it imports beside it. So the
server needs no installation of maskrcnn, and what is installed there changes no result. NumPy comes with the server;
Pillow, which JPEG and other formats need, does not.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np

if not __name__.startswith("maskrcnn."):  # on a server, which appends this folder to the path, where it comes last
    sys.path.insert(0, str(Path(__file__).parent))

import triton_python_backend_utils as triton

from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import batch_images
from maskrcnn.metadata import ModelMetadata

_NPY, _PPM = b"\x93NUMPY", b"P6"  # how these formats begin
_PPM_HEADER = re.compile(_PPM + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,7})" + rb"\s")  # width, height, largest value
_FORMATS = "an image file (JPEG, PNG …), a PPM file, or an .npy file of uint8 [H, W, 3]"


class TritonPythonModel:
    """What Triton's Python backend calls; each instance is a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the model's metadata, from beside this file, and the sizes that the network takes."""
        path = Path(__file__).with_name("metadata.json")
        self.preprocessing = ModelMetadata.from_json(path.read_text(encoding="utf-8"), path).preprocessing
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self.sizes = sizes_from_text(parameters.get("sizes", {}).get("string_value", ""))

    def execute(self, requests: list) -> list:
        """A response for each request; one with an image that cannot be read gets an error, the others do not."""
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        data = triton.get_input_tensor_by_name(request, "image").as_numpy().ravel()
        try:
            images = [image_from_bytes(bytes(part), f"{k} of the request") for k, part in enumerate(data)]
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


def image_from_bytes(data: bytes, name: str) -> np.ndarray:
    """The pixels `[H, W, 3]` uint8 RGB of an image file's content.

    Raises:
        UserError: for what is no image, and where Pillow is needed and missing.
    """
    if data.startswith(_NPY):
        return _from_npy(data, name)
    if data.startswith(_PPM):
        return _from_ppm(data, name)
    try:
        from maskrcnn.data.images import decode_image
    except ImportError as error:
        raise UserError(
            f"image {name} in a format that Pillow reads, and no Pillow on the server",
            "Pillow, or images as PPM or .npy files",
            "`pip install pillow` in the server's image (docs/serving.md), or send PPM or .npy",
        ) from error
    return decode_image(data, name)


def _from_npy(data: bytes, name: str) -> np.ndarray:
    """An array as `numpy.save` writes it; `numpy.load` would trust the header, and allocate what it says."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = read_header[version](file)
        if is_fortran or dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
            raise ValueError(f"{dtype} {list(shape)}{' in columns' if is_fortran else ''}")
        return np.frombuffer(data, np.uint8, offset=file.tell()).reshape(shape)
    except (ValueError, KeyError) as error:
        raise UserError(f"image {name} is no .npy file of an image ({error})", _FORMATS, "send one of these") from error


def _from_ppm(data: bytes, name: str) -> np.ndarray:
    """A binary PPM file (netpbm.sourceforge.net/doc/ppm.html) of 8 bits."""
    header = _PPM_HEADER.match(data)
    if header is None or header[3] != b"255":
        raise UserError(f"image {name} is a PPM file of more than 8 bits or damaged", _FORMATS, "send another")
    width, height = int(header[1]), int(header[2])
    if len(data) - header.end() < height * width * 3:
        raise UserError(f"image {name} ends before its {height}×{width} pixels", "a complete file", "send it again")
    return np.frombuffer(data, np.uint8, height * width * 3, header.end()).reshape(height, width, 3)


def sizes_from_text(text: str) -> list[tuple[int, int, int, int]]:
    """Least and largest height, least and largest width of each `h:HxW:w` in a text with commas between."""
    return [tuple(int(side) for side in re.split("[x:]", size)) for size in text.split(",") if size]


def padded(images: np.ndarray, sizes: list[tuple[int, int, int, int]]) -> np.ndarray:
    """A batch `[N, 3, H, W]` with zeros at the right and at the bottom, up to the smallest size that is allowed.

    Args:
        images: the batch.
        sizes: as `sizes_from_text` gives them; none allow every size.

    Raises:
        UserError: where no size is large enough.
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
            f"at most {listed}, which this server takes",
            "write the repository with another --pad-to, or from an engine with larger profiles",
        )
    size = min(fitting, key=lambda hw: hw[0] * hw[1])
    if size == (height, width):
        return images
    larger = np.zeros((*images.shape[:2], *size), images.dtype)
    larger[:, :, :height, :width] = images
    return larger
