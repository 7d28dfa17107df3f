"""The inputs of the export matrix: batches of several sizes, with ordinary, crowded and empty images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import numpy as np

from maskrcnn.data.shapes import shapes_image

BATCHES = (1, 2, 5)
# Small, landscape, portrait, and one with the longest side that the default preprocessing makes.
SIZES_HW = ((160, 192), (480, 640), (640, 416), (800, 1344))
_GREY = 128
_TILE_PX = (32, 96)  # sides of the pictures that a crowded image is put together from
_TILES_ALONG = 5  # of them along the shorter side, within those limits
_LEAST_OBJECTS = 3  # of an ordinary image
_DRAWINGS = 20  # after which an image stays as it is; images of 32 px have no room for three
_PADDING_HW = (17, 40)  # how much smaller than its batch every other image is


class Kind(Enum):
    """What the images of a batch show."""

    ORDINARY = "ordinary"  # a few drawn shapes
    EMPTY = "empty"  # even grey images, and empty slots: images of size 0 × 0, all padding
    CROWDED = "crowded"  # hundreds of drawn shapes


@dataclass(frozen=True)
class Cell:
    """One combination of the matrix."""

    kind: Kind
    batch: int
    size_hw: tuple[int, int]  # of the batch's tensor, multiples of 32

    def __str__(self) -> str:
        return f"N={self.batch}, {self.size_hw[0]}×{self.size_hw[1]}"


def cells(batches: Sequence[int], sizes_hw: Sequence[tuple[int, int]]) -> list[Cell]:
    """Every kind, size and batch size."""
    return [Cell(kind, batch, size) for kind in Kind for size in sizes_hw for batch in batches]


def cell_feeds(cell: Cell) -> Iterator[dict[str, np.ndarray]]:
    """The detector's inputs for a cell: one batch, or two where one has no room for both kinds of empty images.

    Every other image is smaller than the tensor and padded, every other empty one an empty slot. Cells of other
    batch sizes have other images.
    """
    first = cell.batch * (cell.batch - 1) // 2
    starts = (0, 1) if cell.kind is Kind.EMPTY and cell.batch == 1 else (first,)
    for start in starts:
        yield _feeds(cell, range(start, start + cell.batch))


def _feeds(cell: Cell, indices: range) -> dict[str, np.ndarray]:
    images = np.zeros((cell.batch, 3, *cell.size_hw), np.float32)
    sizes = [_true_size(cell, index) for index in indices]
    for image, (height, width), index in zip(images, sizes, indices, strict=True):
        image[:, :height, :width] = picture(cell.kind, (height, width), index).transpose(2, 0, 1)
    return {"images": images, "image_sizes": np.array(sizes, np.int64)}


def _true_size(cell: Cell, index: int) -> tuple[int, int]:
    """Height and width of an image before padding."""
    if index % 2 == 0:
        return cell.size_hw
    return (0, 0) if cell.kind is Kind.EMPTY else tuple(np.subtract(cell.size_hw, _PADDING_HW).tolist())


@lru_cache(maxsize=256)
def picture(kind: Kind, size_hw: tuple[int, int], index: int) -> np.ndarray:
    """One image, uint8 `[H, W, 3]`, not to be written to; the same arguments give the same image."""
    if kind is Kind.EMPTY:
        image = np.full((*size_hw, 3), _GREY, np.uint8)
    elif kind is Kind.ORDINARY:
        image = _with_objects(np.random.default_rng((0, index)), size_hw)
    else:
        image = _mosaic(np.random.default_rng((1, index)), size_hw)
    image.flags.writeable = False
    return image


def _with_objects(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """Drawn shapes, at least three."""
    for _ in range(_DRAWINGS):
        image, objects = shapes_image(rng, size_hw)
        if len(objects) >= _LEAST_OBJECTS:
            break
    return image


def _mosaic(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """Many small pictures of shapes side by side, cut at the right and the bottom."""
    side = int(np.clip(min(size_hw) // _TILES_ALONG, *_TILE_PX))
    rows, columns = (-(-length // side) for length in size_hw)
    tiles = [[shapes_image(rng, (side, side))[0] for _ in range(columns)] for _ in range(rows)]
    return np.ascontiguousarray(np.block([[[tile] for tile in row] for row in tiles])[: size_hw[0], : size_hw[1]])
