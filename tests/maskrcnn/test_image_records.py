"""Images as their annotations mean them, in training, checks and evaluation alike: orientation, size, range, bands."""

import json

import numpy as np
import pytest
from PIL import Image

from maskrcnn.config import AugmentConfig
from maskrcnn.data.check import check_dataset
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.survey import measured_range, survey_images, with_exif
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing, with_channels
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends.base import Backend, detector_specs
from maskrcnn.runtime.evaluation.evaluate import evaluate
from maskrcnn.training.samples import TrainingSamples

SIZE_HW = (64, 96)
BOX = (8, 4, 40, 16)  # x, y, width, height of the bright object, in the corner of the upright image
AS_IS = Preprocessing(min_size_px=64, max_size_px=96)
# The stored pixels that EXIF orientation k turns upright.
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


def drawn(bands=3, dtype=np.uint8, bright=250):
    """A dark image with one bright rectangle."""
    x, y, width, height = BOX
    pixels = np.full((*SIZE_HW, bands), bright // 20, dtype)
    pixels[y : y + height, x : x + width] = bright
    return pixels


def dataset(root, write, *, size_hw=SIZE_HW, box=BOX, names=("a.png",), split="val"):
    """A split whose images `write(path)` writes, each with the box as its only object."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    x, y, w, h = box
    images, annotations = [], []
    for number, name in enumerate(names, start=1):
        write(root / split / name)
        images.append({"id": number, "file_name": name, "height": size_hw[0], "width": size_hw[1]})
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            | {"segmentation": outline}
        )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "bright"}]}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return CocoDataset.load(root, split)


class BrightRegions(Backend):
    """Detects the bright pixels of each image as one object."""

    name, precision = "test", "fp32"

    def __init__(self, preprocessing=AS_IS):
        self.metadata = ModelMetadata(
            model="test", class_names=("bright",), category_ids=(1,), preprocessing=preprocessing, detections=1
        )

    def describe(self):
        return detector_specs(self.metadata)

    def infer(self, feeds):
        count = len(feeds["images"])
        boxes = np.zeros((count, 1, 4), np.float32)
        for box, image in zip(boxes, feeds["images"], strict=True):
            rows, columns = (np.flatnonzero((image[-1] > 127).any(axis=axis)) for axis in (1, 0))
            box[0] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return {
            "num_detections": np.ones(count, np.int32),
            "boxes": boxes,
            "scores": np.full((count, 1), 0.9, np.float32),
            "labels": np.ones((count, 1), np.int64),
            "masks": np.ones((count, 1, 28, 28), np.float32),
        }


def object_covers_the_bright_pixels(data, preprocessing=AS_IS):
    """Whether the box of a training sample is that of the bright pixels."""
    sample = TrainingSamples(data, preprocessing, augment=AugmentConfig(flip_probability=0.0), seed=0)[0, 0]
    x1, y1, x2, y2 = sample.objects.boxes[0].round().astype(int)
    inside = np.zeros(sample.image.shape[1:], bool)
    inside[y1:y2, x1:x2] = True
    return np.array_equal(sample.image[-1] > 127, inside)


@pytest.mark.parametrize("frame", ["upright", "stored"])
@pytest.mark.parametrize("orientation", STORED)
def test_objects_lie_on_their_pixels_with_every_exif_orientation(tmp_path, orientation, frame):
    stored = np.ascontiguousarray(STORED[orientation](drawn()))

    def write(path):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(path, exif=exif)

    if frame == "upright":
        data = dataset(tmp_path, write)
    else:  # the annotation refers to the pixels as stored
        rows, columns = (np.flatnonzero((stored > 127).any(axis=(axis, 2))) for axis in (1, 0))
        box = tuple(int(n) for n in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1))
        data = dataset(tmp_path, write, size_hw=stored.shape[:2], box=box)
        if orientation < 5:  # the size does not tell
            data = with_exif(data, "stored")
    assert object_covers_the_bright_pixels(data)
    scores = evaluate(Detector(BrightRegions()), data)
    assert scores.box["AP"] == scores.mask["AP"] == pytest.approx(1.0)
    assert check_dataset(tmp_path).findings == ()
    assert survey_images(data, AS_IS).counts.total() == (orientation != 1)


@pytest.mark.parametrize("factor", [0.5, 2])
def test_objects_lie_on_their_pixels_in_a_resized_folder(tmp_path, factor):
    def write(path):
        Image.fromarray(drawn()).resize((int(96 * factor), int(64 * factor)), Image.Resampling.BOX).save(path)

    data = dataset(tmp_path, write)
    assert object_covers_the_bright_pixels(data)
    assert evaluate(Detector(BrightRegions()), data).box["AP"] == pytest.approx(1.0)
    (line,) = survey_images(data).lines()
    assert "1 of 1 image(s) of another size than their annotations" in line
    assert [finding.problem.is_error for finding in check_dataset(tmp_path).findings] == [False]


def test_another_aspect_ratio_is_an_error_before_work_starts(tmp_path):
    data = dataset(tmp_path, lambda path: Image.fromarray(drawn()[:40]).save(path), names=("a.png", "b.png"))
    with pytest.raises(UserError, match=r"2 of 2 images do not fit, first: .*a\.png: 96×40 pixels\n  expected: 96×64"):
        survey_images(data)
    with pytest.raises(UserError, match="96×40 pixels"):
        evaluate(Detector(BrightRegions()), data)
    (found,) = check_dataset(tmp_path).by_problem(is_error=True)
    assert found == "image of another size than its entry says"


@pytest.mark.parametrize(
    ("dtype", "bright", "expected"),
    [
        (np.uint16, 4000, (0, 4095)),
        (np.uint16, 250, (0, 255)),
        (np.uint16, 60000, (0, 65535)),
        (np.float32, 0.9, (0, 1)),
        (np.float32, 200.0, (0, 255)),
        (np.float32, 3000.0, (150, 3000)),
    ],
)
def test_the_range_of_wide_samples_is_measured(tmp_path, dtype, bright, expected):
    pixels = drawn(dtype=dtype, bright=bright) if bright >= 1 else (drawn() / 250 * bright).astype(dtype)
    data = dataset(tmp_path, lambda path: np.save(path, pixels), names=("a.npy", "b.npy"))
    value_range, line = measured_range(survey_images(data))
    assert value_range == expected
    assert "2 of 2 image(s)" in line and "--set model.preprocessing.pixel_range" in line
    ranged = Preprocessing(min_size_px=64, max_size_px=96, pixel_range=value_range)
    assert object_covers_the_bright_pixels(data, ranged)
    assert evaluate(Detector(BrightRegions(ranged)), data).box["AP"] == pytest.approx(1.0)
    assert check_dataset(tmp_path).by_problem(is_error=True) == {}


def test_the_range_is_that_of_the_bands_that_are_read(tmp_path):
    pixels = drawn(dtype=np.uint16, bright=4000, bands=4)
    pixels[..., 3] = 65535  # an alpha channel, or a band that the model has no channel for
    survey = survey_images(dataset(tmp_path, lambda path: np.save(path, pixels), names=("a.npy",)))
    assert measured_range(survey, AS_IS)[0] == (0, 4095)
    assert measured_range(survey, with_channels(AS_IS, 4))[0] == (0, 65535)


def test_floats_from_0_to_1_among_integers_are_an_error(tmp_path):
    kinds = {"a.npy": drawn(dtype=np.uint16, bright=4000), "b.npy": (drawn() / 255).astype(np.float32)}
    data = dataset(tmp_path, lambda path: np.save(path, kinds[path.name]), names=(*kinds,))
    with pytest.raises(UserError, match=r"floats from 0 to 1 \(.*b\.npy\) and integers up to 4000 \(.*a\.npy\)"):
        measured_range(survey_images(data))


def test_images_of_8_bits_have_no_range(tmp_path):
    data = dataset(tmp_path, lambda path: Image.fromarray(drawn()).save(path))
    assert measured_range(survey_images(data)) == (None, "")


def test_further_bands_are_read_by_models_that_have_them(tmp_path):
    pixels = drawn(bands=5)
    pixels[..., :4] = 0  # only the last band shows the object
    data = dataset(tmp_path, lambda path: np.save(path, pixels), names=("a.npy",))
    five = with_channels(AS_IS, 5)
    assert object_covers_the_bright_pixels(data, five)
    assert evaluate(Detector(BrightRegions(five)), data).box["AP"] == pytest.approx(1.0)
    assert survey_images(data, five).lines() == []
    (line,) = survey_images(data, AS_IS).lines()
    assert "have 5 bands, of which the model reads 3" in line and "model.channels=5" in line
    with pytest.raises(UserError, match=r"1 of 1 images do not fit.*5 band\(s\)\n  expected: at least 6"):
        survey_images(data, with_channels(AS_IS, 6))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_colours_of_other_channels_are_augmented(tmp_path, channels):
    data = dataset(tmp_path, lambda path: np.save(path, drawn(bands=channels)), names=("a.npy",))
    everything = {f"{name}_probability": 1.0 for name in ("colour", "mosaic", "perspective", "mixup", "copy_paste")}
    sample = TrainingSamples(data, with_channels(AS_IS, channels), augment=AugmentConfig(**everything), seed=0)[0, 0]
    assert sample.image.shape == (channels, *SIZE_HW)


def test_a_detector_reads_files_as_viewers_show_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(STORED[6](drawn()))).save(tmp_path / "a.png", exif=exif)
    (found,) = Detector(BrightRegions()).detect([tmp_path / "a.png"])
    assert found.size_hw == SIZE_HW
    x, y, w, h = BOX
    np.testing.assert_allclose(found.boxes_xyxy_px, [[x, y, x + w, y + h]], atol=1e-4)
