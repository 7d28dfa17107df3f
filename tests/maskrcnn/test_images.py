import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from maskrcnn.data.images import ImageNotes, decode_image, read_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing, with_channels

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


ARROW = np.zeros((24, 40, 3), np.uint8)  # asymmetric: every orientation of it differs
ARROW[2:8, 4:30] = (250, 40, 10)
ARROW[8:20, 4:10] = (20, 60, 240)
# The stored pixels that EXIF orientation k turns upright (EXIF 2.3, tag 274: what the first row and column are).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 3),
}


def turned(path, orientation, upright=ARROW):
    """Saves an image that is upright after its EXIF orientation is applied."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(path, np.ascontiguousarray(STORED[orientation](upright)), exif=exif)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_read_upright(tmp_path, orientation, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](ARROW))
    file = save(tmp_path / f"a.{suffix}", stored, exif=exif, **options)
    np.testing.assert_array_equal(read_image(file), ARROW)
    np.testing.assert_array_equal(decode_image(file.read_bytes(), "a"), ARROW)
    np.testing.assert_array_equal(read_image(file, exif="stored"), stored)
    annotated_stored = read_image(file, annotated_hw=stored.shape[:2])
    np.testing.assert_array_equal(annotated_stored, stored if orientation > 4 else ARROW)
    np.testing.assert_array_equal(read_image(file, annotated_hw=(24, 40)), ARROW)


def test_exif_after_the_pixels_of_a_png_counts(tmp_path):
    content = turned(tmp_path / "a.png", 6).read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    (tmp_path / "b.png").write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), ARROW)


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_image_of_another_size_is_scaled_to_its_annotation(tmp_path, orientation):
    notes = ImageNotes()
    file = turned(tmp_path / "a.png", orientation, ARROW[::2, ::2])
    scaled = read_image(file, annotated_hw=(24, 40), notes=notes)
    assert scaled.shape == (24, 40, 3) and np.abs(scaled.astype(int) - ARROW).mean() < 12
    assert notes.counts == {"resized": 1}
    with pytest.raises(UserError, match="20×12 pixels\n  expected: 40×40"):
        read_image(file, annotated_hw=(40, 40))


# --- ranges


def png16(path, samples):
    """A PNG of 16 bits, [H, W, 1 to 4], written by hand: Pillow writes no colours of 16 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, bands = samples.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def npy(path, samples):
    np.save(path, samples)
    return path


def tiff(path, samples, **options):
    if samples.ndim == 3 and samples.shape[2] > 1:
        options = {"photometric": "minisblack", "planarconfig": "contig"} | options
    pytest.importorskip("tifffile").imwrite(path, samples, **options)
    return path


RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64, 1)
OPAQUE = np.full_like(RAMP, 65535)
TWELVE = Preprocessing(pixel_range=(0, 4095))


@pytest.mark.parametrize(
    ("name", "write", "samples", "pixel_range"),
    [
        ("a.png", png16, RAMP, (0, 4095)),
        ("a.png", png16, np.dstack([RAMP, RAMP[::-1], RAMP[:, ::-1]]), (0, 4095)),
        ("a.png", png16, np.dstack([RAMP, OPAQUE]), (0, 4095)),
        ("a.png", png16, np.dstack([RAMP, RAMP[::-1], RAMP[:, ::-1], OPAQUE]), (0, 4095)),
        ("a.tif", tiff, np.dstack([RAMP, RAMP[::-1], RAMP[:, ::-1]]), (0, 4095)),
        ("a.tif", tiff, RAMP.astype(np.float32) / 4095, (0, 1)),
        ("a.tif", tiff, RAMP.astype(np.int16) - 1000, (-1000, 3095)),
        ("a.npy", npy, RAMP.astype(np.int32) * 1000, (0, 4095000)),
        ("a.npy", npy, (RAMP >> 4).astype(np.uint16), (0, 255)),
    ],
    ids=["grey", "rgb", "grey-alpha", "rgb-alpha", "rgb-tiff", "float", "signed", "32-bit", "8-in-16"],
)
def test_samples_of_more_than_8_bits_keep_them_with_a_range(tmp_path, name, write, samples, pixel_range):
    notes = ImageNotes()
    pixels = read_image(write(tmp_path / name, samples), Preprocessing(pixel_range=pixel_range), notes=notes)
    low, high = pixel_range
    colours = samples[..., : 3 if samples.shape[2] > 2 else 1]
    expected = np.broadcast_to((colours.astype(np.float64) - low) * 255 / (high - low), (64, 64, 3))
    assert pixels.dtype == np.float32 and pixels.shape == (64, 64, 3)
    np.testing.assert_allclose(pixels, expected, atol=1e-3)
    assert not notes.counts


def test_a_range_has_no_effect_on_8_bits(tmp_path):
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", COLOURS), TWELVE), COLOURS)


def test_a_tiff_of_12_bits_tells_its_range(tmp_path):
    rows = [0x000, 0xFFF, 0x800, 0x400]  # packed, big end first
    data = bytes.fromhex("".join(f"{value:03x}" for value in rows))
    tags = [(256, 4, 4), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (279, 4, 6)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 14) + data + ifd)
    pixels = read_image(tmp_path / "a.tif")
    np.testing.assert_allclose(pixels[0, :, 0], np.array(rows) * 255 / 4095, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "write", "samples", "rule", "kind"),
    [
        ("a.png", png16, RAMP, Preprocessing(), "few levels"),
        ("a.png", png16, RAMP << 4, Preprocessing(), "high byte"),
        ("a.png", png16, RAMP << 1, TWELVE, "clipped"),
        ("a.npy", npy, RAMP / np.float32(4095), Preprocessing(), "unit range"),
        ("a.npy", npy, RAMP / np.float32(4095), TWELVE, "few levels"),
        ("a.npy", npy, np.array([[[np.nan], [0.5]]]), Preprocessing(pixel_range=(0, 1)), "nan"),
        ("a.npy", npy, np.zeros((4, 4, 5), np.uint8), Preprocessing(), "bands"),
    ],
)
def test_losses_are_counted_and_name_the_option(tmp_path, name, write, samples, rule, kind):
    notes = ImageNotes()
    read_image(write(tmp_path / name, samples), rule, notes=notes)
    assert notes.counts == {kind: 1}
    (line,) = notes.lines()
    assert line.startswith("1 image(s) ") and line.endswith(str(tmp_path / name))
    assert "--pixel-range" in line or "pixel range" in line or "model.channels" in line


def test_frames_transparency_and_cmyk_are_counted(tmp_path):
    notes = ImageNotes()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "tif", "webp", "png"):
        file = tmp_path / f"a.{suffix}"
        frames[0].save(file, save_all=True, append_images=frames[1:])
        assert read_image(file, notes=notes)[0, 0, 0] > 240
    for mode in ("RGBA", "LA"):
        Image.new(mode, (4, 4)).save(tmp_path / "b.png")
        assert not read_image(tmp_path / "b.png", notes=notes).any()
    Image.new("RGBA", (4, 4), "white").save(tmp_path / "opaque.png")
    read_image(tmp_path / "opaque.png", notes=notes)
    Image.new("CMYK", (4, 4)).save(tmp_path / "c.jpg")
    assert (read_image(tmp_path / "c.jpg", notes=notes) > 250).all()
    assert notes.counts == {"frames": 4, "alpha": 2, "cmyk": 1}


# --- bands

FOUR = with_channels(Preprocessing(), 4)
BANDS = np.random.default_rng(0).integers(0, 256, (6, 7, 5), np.uint8)


@pytest.mark.parametrize(
    ("name", "write", "bands"),
    [
        ("a.npy", npy, BANDS),
        ("a.tif", tiff, BANDS),
        ("a.tif", lambda path, bands: tiff(path, bands.transpose(2, 0, 1), planarconfig="separate"), BANDS),
        ("a.png", save, BANDS[..., :4]),
        ("a.tif", lambda path, bands: save(path, bands, None), BANDS[..., :4]),
    ],
    ids=["npy", "tiff", "planar", "png", "pillow-tiff"],
)
def test_models_of_other_channels_read_bands_as_they_are(tmp_path, name, write, bands):
    file = write(tmp_path / name, bands)
    np.testing.assert_array_equal(read_image(file, FOUR), bands[..., :4])
    chosen = replace(Preprocessing(), bands=(4, 2, 1))
    np.testing.assert_array_equal(read_image(file, chosen), bands[..., [3, 1, 0]])
    np.testing.assert_array_equal(read_image(file), bands[..., :3])


def test_too_few_bands_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"a\.png has 3 band\(s\)\n  expected: at least 4"):
        read_image(save(tmp_path / "a.png", COLOURS), FOUR)


def test_a_model_of_one_channel_reads_grey(tmp_path):
    one = with_channels(Preprocessing(), 1)
    file = save(tmp_path / "a.png", COLOURS)
    with Image.open(file) as image:
        expected = np.array(image.convert("L")).astype(int)
    assert np.abs(read_image(file, one)[..., 0] - expected).max() <= 1
    np.testing.assert_allclose(
        read_image(png16(tmp_path / "b.png", RAMP), replace(one, pixel_range=(0, 4095))), RAMP * (255 / 4095), atol=1e-3
    )


# --- faults


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        (np.array([[0, 70000]], np.int32), r"from 0 to 70000 \(int32\), whose range is not known"),
        (np.array([[-1, 900]], np.float32), r"from -1 to 900 \(float32\), whose range is not known"),
    ],
)
def test_samples_of_unknown_range_are_refused(tmp_path, samples, text):
    file = save(tmp_path / "a.tif", samples)
    with pytest.raises(UserError, match=rf"a\.tif has samples {text}") as caught:
        read_image(file)
    assert "--pixel-range LOW,HIGH" in caught.value.fix


def test_complex_samples_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 2), np.complex64))
    with pytest.raises(UserError, match=r"a\.npy cannot be decoded .*complex64"):
        read_image(tmp_path / "a.npy")
    pytest.importorskip("tifffile").imwrite(tmp_path / "a.tif", np.zeros((2, 2), np.complex64))
    with pytest.raises(UserError, match=r"a\.tif cannot be decoded .*complex64"):
        read_image(tmp_path / "a.tif")


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


def test_large_images_are_read_up_to_a_limit_that_the_error_names(tmp_path, monkeypatch):
    file = save(tmp_path / "big.png", np.zeros((100, 100, 3), np.uint8))
    monkeypatch.setenv("MASKRCNN_MAX_IMAGE_PIXELS", "9999")
    with pytest.raises(UserError, match=r"big\.png of 100×100 pixels\n  expected: at most 9999") as caught:
        read_image(file)
    assert "MASKRCNN_MAX_IMAGE_PIXELS" in caught.value.fix
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit
    monkeypatch.setenv("MASKRCNN_MAX_IMAGE_PIXELS", "10000")
    assert read_image(file).shape == (100, 100, 3)


def test_large_metadata_of_png_files_is_read_over(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (3 << 20), zip=True)
    file = save(tmp_path / "a.png", COLOURS, pnginfo=text, icc_profile=bytes(3 << 20))
    np.testing.assert_array_equal(read_image(file), COLOURS)
