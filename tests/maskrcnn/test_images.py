import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError

# 2 × 3 pixels of distinct colours, typed by hand.
COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [200, 100, 50], [255, 255, 255]]], np.uint8)


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def test_rgb_is_returned_as_stored(tmp_path):
    pixels = read_image(save(tmp_path / "a.png", COLOURS))
    assert pixels.dtype == np.uint8 and pixels.shape == (2, 3, 3) and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, COLOURS)


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    if mode == "P":  # a palette that holds exactly the six colours
        file = tmp_path / "a.png"
        palette = Image.new("P", (3, 2))
        palette.putpalette(COLOURS.reshape(-1).tolist())
        palette.putdata(range(6))
        palette.save(file, transparency=bytes([0, 128, 255]))
        with Image.open(file) as check:
            assert check.mode == "P"
    else:
        file = save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), COLOURS, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_image(file), COLOURS)


def test_alpha_is_dropped_and_not_blended(tmp_path):
    rgba = np.dstack([COLOURS, np.full((2, 3), 7, np.uint8)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", rgba)), COLOURS)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_the_high_byte(tmp_path, suffix):
    samples = np.array([[0, 255, 256], [0x1234, 0x80FF, 65535]], np.uint16)
    pixels = read_image(save(tmp_path / f"a.{suffix}", samples))
    expected = np.array([[0, 0, 1], [0x12, 0x80, 255]], np.uint8)
    np.testing.assert_array_equal(pixels, np.dstack([expected] * 3))


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_is_repeated_over_the_channels(tmp_path, mode):
    grey = np.array([[0, 255, 0], [255, 0, 255]], np.uint8)
    pixels = read_image(save(tmp_path / "a.png", grey, mode))
    np.testing.assert_array_equal(pixels, np.dstack([grey] * 3))


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90° to display"
    save(tmp_path / "a.jpg", np.zeros((20, 40, 3), np.uint8), exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (20, 40, 3)


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        (np.full((2, 2), 70000, np.int32), "outside 0 to 65535"),
        (np.ones((2, 2), np.float32), "floating-point"),
    ],
)
def test_samples_of_unknown_range_are_refused(tmp_path, samples, text):
    file = save(tmp_path / "a.tif", samples)
    with pytest.raises(UserError, match=rf"a\.tif cannot be decoded .*{text}"):
        read_image(file)


def test_missing_file_folder_empty_file_and_no_image(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture")
    for name, text in [
        ("absent.jpg", "does not exist"),
        ("", "is a folder"),
        ("empty.jpg", "is an empty file"),
        ("text.jpg", "is not an image"),
    ]:
        with pytest.raises(UserError, match=text) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in caught.value.found
        assert caught.value.expected and caught.value.fix


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "bmp", "gif"])
def test_truncated_files_are_user_errors_at_every_length(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    whole = save(tmp_path / f"whole.{suffix}", pixels).read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    for length in np.linspace(1, len(whole) * 0.8, 25).astype(int):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"cut\.{suffix}"):
            read_image(cut)


def test_image_without_pixels(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 0, 4, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
    (tmp_path / "zero.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(UserError, match=r"zero\.png"):
        read_image(tmp_path / "zero.png")


def test_bomb_is_a_user_error(tmp_path, monkeypatch):
    file = save(tmp_path / "big.png", np.zeros((100, 100, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"big\.png cannot be decoded \(DecompressionBombError"):
        read_image(file)
