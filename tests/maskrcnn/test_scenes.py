"""Windows of large images: their pixels are those of the image decoded whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from command_line import expect_error
from PIL import Image

from maskrcnn.data import images
from maskrcnn.data.images import ImageNotes, read_image
from maskrcnn.data.scenes import Window, open_scene
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.tiles import Tiles, detect_tiles

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
    # Pillow 13.0 would map this one into memory, and exchange height and width if it is turned.
    "contiguous grey": (_RGB[..., 0], {"photometric": "minisblack"}),
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
    assert "tiled TIFF file" in caught.value.fix


def test_a_huge_compressed_strip_needs_memory_and_strips_and_tiles_need_that_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskrcnn.errors._available_bytes", lambda: 100_000.0)
    path = tmp_path / "scene.tif"
    deflate = {"compression": "zlib", "photometric": "rgb"}
    for layout in ({}, {"rowsperstrip": 100}, {"tile": (80, 80)}):  # 378,000, 126,000 and 115,200 bytes
        tifffile.imwrite(path, _RGB, **layout, **deflate)
        with pytest.raises(UserError, match="of which a row is decoded") as caught, open_scene(path):
            pass
        assert str(path) in caught.value.found and "tiled TIFF file" in caught.value.fix
    for layout in ({"rowsperstrip": 50}, {"tile": (64, 64)}):  # 63,000 and 86,016 bytes
        tifffile.imwrite(path, _RGB, **layout, **deflate)
        _check_windows(path, Preprocessing())


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


# Commands


def _detections(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "detections.jsonl").read_text().splitlines()]


def test_predict_in_tiles(run: Any, shapes: Path, onnx_file: Path, tmp_path: Path) -> None:
    """A mosaic of the dataset's images as a scene; what is written is what the function finds."""
    files = sorted((shapes / "val").glob("*.png"))[:4]
    mosaic = np.hstack([np.asarray(Image.open(file).convert("RGB").resize((128, 128))) for file in files])
    scene, side = tmp_path / "scene.tif", 128
    tifffile.imwrite(scene, np.rot90(mosaic, 1), tile=(64, 64), photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    arguments = ("predict", scene, "--model", onnx_file, "--threshold", 0, "--save", "parquet", "--save", "overlays")
    code, _, err = run(*arguments, "--tile", side, "--overlap", 0.25, "--batch-size", 2, "--output", "tiled")
    assert code == 0, err
    detector = Detector.load(onnx_file)
    expected = detect_tiles(detector, mosaic, Tiles(side, 0.25), batch_size=2)
    (record,) = _detections(tmp_path / "tiled")
    assert (record["height"], record["width"], record["orientation"]) == (128, 512, 6)
    found = [{key: each[key] for key in ("bbox", "score", "segmentation")} for each in record["detections"]]
    assert len(found) and found == [
        {key: each[key] for key in ("bbox", "score", "segmentation")} for each in expected.to_coco()
    ]
    drawn = Image.open(tmp_path / "tiled" / "scene.png")
    assert drawn.size == (2 * 512, 2 * 128)  # enlarged
    manifest = json.loads((tmp_path / "tiled" / "run.json").read_text())
    assert manifest["tiles"] == {"size_px": side, "overlap": 0.25}
    expect_error(run(*arguments, "--tile", 64, "--output", "tiled", "--resume"), "a run with tiles")
    # The whole scene in one tile is the scene without tiles.
    for name, more in (("one", ("--tile", 512)), ("plain", ())):
        assert run(*arguments, *more, "--output", name)[0] == 0
    assert _detections(tmp_path / "one") == _detections(tmp_path / "plain")


def test_a_scene_that_is_not_drawn_says_so(
    run: Any, onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskrcnn.runtime.tiles.SHOWN_MEGAPIXELS", 0.1)
    tifffile.imwrite(tmp_path / "scene.tif", _RGB, tile=(64, 48), photometric="rgb")
    code, out, err = run("predict", "scene.tif", "--model", onnx_file, "--tile", 256, "--save", "overlays")
    assert code == 0 and "not drawn: more than 0.1 megapixels" in out + err
    assert not (tmp_path / "predictions" / "scene.png").exists()


def test_evaluate_in_tiles_scores_what_predict_finds_in_tiles(
    run: Any, shapes: Path, onnx_file: Path, tmp_path: Path
) -> None:
    tiles = ("--tile", 96, "--overlap", 0.25)
    assert run("predict", shapes / "val", "--model", onnx_file, *tiles, "--save", "results")[0] == 0
    truth = ("--annotations", shapes / "annotations" / "instances_val.json")
    assert run("evaluate", "--results", "predictions/results.json", *truth, "--json", "file.json")[0] == 0
    for number, more in enumerate(((), ("--batch-size", 4, "--resume", "log.jsonl"))):
        code, _, err = run(
            "evaluate", onnx_file, "--data", shapes, *tiles, *more, "--json", f"{number}.json", "--overwrite"
        )
        assert code == 0, err
        own, other = (json.loads(Path(name).read_text()) for name in (f"{number}.json", "file.json"))
        for kind in ("box", "mask"):
            assert own[kind]["AP"] == pytest.approx(other[kind]["AP"], abs=1e-3)
    other_tiles = ("--tile", 64, "--batch-size", 4, "--resume", "log.jsonl")
    expect_error(run("evaluate", onnx_file, "--data", shapes, *other_tiles), "detections of another reading")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tile", 16), "stride"),
        (("--tile", 256, "--overlap", 1), "from 0 to less than 1"),
        (("--tile", 256, "--overlap", -0.5), "from 0 to less than 1"),
        (("--overlap", 0.5), "--tile 1024"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_faulty_tiles_are_refused_before_any_work(
    run: Any, shapes: Path, onnx_file: Path, tmp_path: Path, command: str, options: tuple[Any, ...], message: str
) -> None:
    named = (shapes / "val", "--model", onnx_file) if command == "predict" else (onnx_file, "--data", shapes)
    expect_error(run(command, *named, *options), message)
    assert not list(tmp_path.glob("predictions/*"))
