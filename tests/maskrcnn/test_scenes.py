"""Windows of large images: their pixels are those of the image decoded whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from maskrcnn.data import images
from maskrcnn.data.images import ImageNotes, read_image
from maskrcnn.data.scenes import Window, open_scene
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing

_SIZE_HW = 301, 420
_RGB = np.random.default_rng(0).integers(0, 256, (*_SIZE_HW, 3), np.uint8)
_WIDE = np.random.default_rng(1).integers(0, 3000, _SIZE_HW, np.uint16)
_WINDOWS = [(0, 0, 64, 80), (0, 50, 64, 80), (40, 300, 128, 120), (173, 0, 128, 420), (300, 419, 1, 1)]
_KINDS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "strips": (_RGB, {"rowsperstrip": 7, "photometric": "rgb"}),
    "strips, deflate": (_RGB, {"rowsperstrip": 7, "photometric": "rgb", "compression": "zlib", "predictor": True}),
    "contiguous": (_RGB, {"photometric": "rgb"}),
    "tiles": (_RGB, {"tile": (64, 48), "photometric": "rgb"}),
    "tiles, BigTIFF, deflate": (_RGB, {"tile": (64, 48), "bigtiff": True, "compression": "zlib", "photometric": "rgb"}),
    "bands one after the other": (
        np.moveaxis(_RGB, -1, 0),
        {"tile": (64, 48), "planarconfig": "separate", "photometric": "rgb", "compression": "zlib"},
    ),
    "alpha": (
        np.dstack([_RGB, _RGB[..., 0]]),
        {"tile": (64, 48), "photometric": "rgb", "extrasamples": ["unassalpha"], "compression": "zlib"},
    ),
    "grey of 16 bits": (_WIDE, {"tile": (32, 32), "photometric": "minisblack", "compression": "zlib"}),
    "white is zero": (_RGB[..., 0], {"rowsperstrip": 20, "photometric": "miniswhite"}),
}


def _check_windows(path: Path, preprocessing: Preprocessing) -> None:
    whole = read_image(path, preprocessing)
    with open_scene(path, preprocessing) as scene:
        assert scene.size_hw == whole.shape[:2]
        for top, left, height, width in _WINDOWS:
            if scene.size_hw != _SIZE_HW:
                top, left, height, width = left, top, width, height
            window = Window(top, left, height, width)
            np.testing.assert_array_equal(scene.read(window), whole[window.slices])


@pytest.mark.parametrize(
    ("kind", "orientation"), [*((kind, 6) for kind in _KINDS), *(("tiles", k) for k in (1, 2, 3, 4, 5, 7, 8))]
)
def test_windows_of_tiff_files_equal_the_whole(tmp_path: Path, kind: str, orientation: int) -> None:
    array, options = _KINDS[kind]
    path = tmp_path / "scene.tif"
    tifffile.imwrite(path, array, extratags=[(274, 3, 1, orientation, True)], metadata=None, **options)
    preprocessing = Preprocessing()
    _check_windows(
        path, replace(preprocessing, pixel_range=(0.0, 3000.0)) if array.dtype != np.uint8 else preprocessing
    )


@pytest.mark.parametrize("suffix", ["npy", "png", "jpg"])
def test_windows_of_other_files_equal_the_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scene.{suffix}"
    if suffix == "npy":
        np.save(path, _RGB)
    else:
        exif = Image.Exif()
        exif[274] = 8
        Image.fromarray(_RGB).save(path, exif=exif)
    _check_windows(path, Preprocessing())


def test_only_what_windows_need_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scene.tif"
    tifffile.imwrite(path, _RGB, tile=(64, 48), compression="zlib", photometric="rgb")
    decoded: list[int] = []
    decode = tifffile.TiffPage.decode.func  # type: ignore[attr-defined]

    def counting(page: tifffile.TiffPage) -> Any:
        own = decode(page)

        def counted(data: Any, index: int, **options: Any) -> Any:
            decoded.append(index)
            return own(data, index, **options)

        return counted

    monkeypatch.setattr(tifffile.TiffPage, "decode", property(counting))
    with open_scene(path) as scene:
        scene.read(Window(64, 48, 64, 96))
        assert sorted(set(decoded) - {0}) == [10, 11]  # of 9 tiles per row; the first shows that they can be decoded
        scene.read(Window(64, 96, 64, 96))
        assert decoded.count(11) == 1  # kept for the next window


def test_a_scene_beyond_the_limit_is_read_in_windows_or_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(images.MAX_PIXELS_VARIABLE, "30000")
    tiled, whole = tmp_path / "scene.tif", tmp_path / "scene.png"
    tifffile.imwrite(tiled, _RGB, tile=(64, 48), compression="zlib", photometric="rgb")
    Image.fromarray(_RGB).save(whole)
    with open_scene(tiled) as scene:
        np.testing.assert_array_equal(scene.read(Window(10, 20, 30, 40)), _RGB[10:40, 20:60])
    with pytest.raises(UserError) as caught, open_scene(whole):
        pass
    assert images.MAX_PIXELS_VARIABLE in caught.value.fix and "gdal_translate -of COG" in caught.value.fix


def test_a_scene_that_is_decoded_whole_needs_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskrcnn.errors._available_bytes", lambda: 1e5)
    path = tmp_path / "scene.png"
    Image.fromarray(_RGB).save(path)
    with pytest.raises(UserError, match="decoded whole") as caught, open_scene(path):
        pass
    assert "TIFF file in tiles" in caught.value.fix


def test_losses_are_counted_once_for_a_scene(tmp_path: Path) -> None:
    path, plain = tmp_path / "scene.tif", ImageNotes()
    tifffile.imwrite(path, _WIDE, tile=(32, 32), photometric="minisblack", compression="zlib")
    read_image(path, notes=plain)
    notes = ImageNotes()
    with open_scene(path, notes=notes) as scene:
        for left in (0, 100, 200):
            scene.read(Window(0, left, 100, 100))
    assert notes.counts == plain.counts and sum(plain.counts.values())


def test_a_damaged_tile_is_an_error_of_the_image(tmp_path: Path) -> None:
    path = tmp_path / "scene.tif"
    tifffile.imwrite(path, _RGB, tile=(64, 48), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[10]  # type: ignore[union-attr]
    content = bytearray(path.read_bytes())
    content[offset : offset + 200] = bytes(200)
    path.write_bytes(content)
    with open_scene(path) as scene:
        scene.read(Window(0, 0, 64, 48))
        with pytest.raises(UserError, match=str(path)):
            scene.read(Window(64, 48, 64, 48))
