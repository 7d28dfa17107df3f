import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.data.images import read_image
from maskrcnn.data.shapes import CLASS_NAMES, generate_shapes, shapes_image
from maskrcnn.errors import UserError

SMALL = {"train_images": 90, "val_images": 10, "size_px": 96, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data") / "shapes", **SMALL)


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_folder_is_a_clean_coco_dataset(folder):
    for split, count in (("train", 90), ("val", 10)):
        dataset = CocoDataset.load(folder, split)
        assert dataset.class_names == CLASS_NAMES and dataset.category_ids == (1, 2, 3)
        assert len(dataset.images) == count and dataset.skipped == {}
        assert all(read_image(record.path).shape == (96, 96, 3) for record in dataset.images[:5])


def test_classes_are_balanced_and_some_images_are_empty(folder):
    dataset = CocoDataset.load(folder, "train")
    labels = Counter(instance.label for record in dataset.images for instance in record.instances)
    assert all(labels[label] > 0.25 * labels.total() for label in (1, 2, 3))
    objects = [len(record.instances) for record in dataset.images]
    assert 1 <= objects.count(0) <= 12 and max(objects) == 6


def test_annotations_equal_the_drawn_pixels(folder):
    dataset = CocoDataset.load(folder, "train")
    kinds = Counter()
    for index, record in enumerate(dataset.images):
        image, objects = shapes_image(np.random.default_rng([3, 0, index]), (96, 96))
        np.testing.assert_array_equal(read_image(record.path), image)
        assert [label for label, _ in objects] == [instance.label for instance in record.instances]
        for (_, painted), instance in zip(objects, record.instances, strict=True):
            mask = instance_mask(record, instance)
            iou = (mask & painted).sum() / (mask | painted).sum()
            kind = "polygon" if isinstance(instance.segmentation, list) else "rle"
            assert iou > 0.9 if kind == "polygon" else iou == 1
            kinds[kind] += 1
            rows, columns = np.nonzero(painted)
            expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert instance.box_xyxy_px == expected
            assert instance.area_px == painted.sum() >= 40
    assert min(kinds["polygon"], kinds["rle"]) > 0.2 * kinds.total()


def test_masks_are_disjoint_and_stand_out():
    distances = []
    for seed in range(40):
        image, objects = shapes_image(np.random.default_rng(seed), (128, 128))
        assert np.sum([mask for _, mask in objects], axis=0).max() <= 1
        for _, mask in objects:
            assert mask.dtype == bool and mask.shape == (128, 128)
            ring = np.zeros_like(mask)
            ring[1:] |= mask[:-1]
            ring[:-1] |= mask[1:]
            ring[:, 1:] |= mask[:, :-1]
            ring[:, :-1] |= mask[:, 1:]
            inside, around = image[mask].mean(axis=0), image[ring & ~mask].mean(axis=0)
            distances.append(np.linalg.norm(inside - around))
    assert np.median(distances) > 50


def test_polygons_have_the_geometry_of_their_class(tmp_path):
    folder = generate_shapes(tmp_path / "large", train_images=30, val_images=1, size_px=256)
    found = Counter()
    for record in CocoDataset.load(folder, "train").images:
        for instance in record.instances:
            if not isinstance(instance.segmentation, list):
                continue
            corners = instance.segmentation[0].reshape(-1, 2)
            (x, y), after = corners.T, np.roll(corners, -1, axis=0)
            shoelace = abs(np.dot(x, after[:, 1]) - np.dot(y, after[:, 0])) / 2
            perimeter = np.linalg.norm(corners - after, axis=1).sum()
            assert len(corners) == {1: 48, 2: 4, 3: 3}[instance.label]
            assert instance.area_px == pytest.approx(shoelace, abs=0.15 * perimeter)
            if instance.label == 1:
                assert 4 * math.pi * shoelace / perimeter**2 > 0.99
            if instance.label == 2:  # right angles; two decimals in the file
                sides = np.diff(corners, axis=0)
                assert abs(np.dot(sides[0], sides[1])) < 2e-3 * math.prod(np.linalg.norm(sides[:2], axis=1))
            found[instance.label] += 1
    assert min(found[label] for label in (1, 2, 3)) > 5


@pytest.mark.parametrize("size_hw", [(1, 1), (5, 300), (64, 200), (333, 250)])
def test_any_image_size(size_hw):
    for seed in range(5):
        image, objects = shapes_image(np.random.default_rng(seed), size_hw)
        assert image.shape == (*size_hw, 3) and image.dtype == np.uint8
        assert all(mask.shape == size_hw for _, mask in objects)


def test_size_of_objects_scales_with_the_image():
    def mean_side(size):
        found = [shapes_image(np.random.default_rng(seed), (size, size))[1] for seed in range(30)]
        return np.mean([math.sqrt(mask.sum()) for objects in found for _, mask in objects])

    assert mean_side(512) / mean_side(128) == pytest.approx(4, rel=0.15)


def test_same_seed_same_bytes_and_other_seed_other_images(folder, tmp_path):
    (tmp_path / "again").mkdir()  # an empty folder is filled
    again = generate_shapes(tmp_path / "again", **SMALL)
    other = generate_shapes(tmp_path / "other", **{**SMALL, "seed": 4})
    assert files(again) == files(folder)
    assert files(other).keys() == files(folder).keys()
    found = [files(folder)["train/000000.png"], files(folder)["val/000000.png"], files(other)["train/000000.png"]]
    assert len(set(found)) == 3  # another split has other images too


def test_complete_folder_is_kept(tmp_path):
    arguments = {"train_images": 2, "val_images": 1, "size_px": 32}
    out = generate_shapes(tmp_path / "s", **arguments)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert generate_shapes(out, **arguments) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("damage", ["other arguments", "image gone", "annotations cut", "foreign file", "a file"])
def test_any_other_folder_is_refused_and_left_alone(tmp_path, damage):
    out, arguments = tmp_path / "s", {"train_images": 2, "val_images": 1, "size_px": 32}
    if damage == "foreign file":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    elif damage == "a file":
        out.write_text("years of work")
    else:
        generate_shapes(out, **arguments)
    if damage == "other arguments":
        arguments["seed"] = 9
    elif damage == "image gone":
        (out / "train" / "000001.png").unlink()
    elif damage == "annotations cut":
        path = out / "annotations" / "instances_val.json"
        path.write_text(path.read_text()[:40])
    before = files(tmp_path)
    with pytest.raises(UserError, match="exists and is not the complete shapes dataset"):
        generate_shapes(out, **arguments)
    assert files(tmp_path) == before


def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    save, calls = Image.Image.save, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(*arguments, **options)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_shapes(tmp_path / "s", train_images=5, val_images=1, size_px=32)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_user_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"cannot be written to .*No space left"):
        generate_shapes(tmp_path / "s", train_images=1, val_images=1, size_px=32)
    assert list(tmp_path.iterdir()) == []


def test_finishing_second_uses_the_first_ones_folder(tmp_path, monkeypatch):
    arguments, save = {"train_images": 1, "val_images": 1, "size_px": 32}, Image.Image.save

    def overtaken(image, *given, **options):
        monkeypatch.setattr(Image.Image, "save", save)
        generate_shapes(tmp_path / "s", **arguments)
        save(image, *given, **options)

    monkeypatch.setattr(Image.Image, "save", overtaken)
    assert generate_shapes(tmp_path / "s", **arguments) == tmp_path / "s"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("arguments", [{"train_images": 0}, {"val_images": 0}, {"size_px": 16}, {"seed": -1}], ids=str)
def test_arguments_out_of_range(tmp_path, arguments):
    with pytest.raises(UserError, match="at least 1 image of each, at least 32 px"):
        generate_shapes(tmp_path / "s", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_classes_may_be_unequal(tmp_path):
    root = generate_shapes(tmp_path / "unequal", train_images=40, val_images=1, size_px=64, class_shares=(10, 3, 0))
    dataset = CocoDataset.load(root, "train")
    counts = np.bincount([label for own in dataset.labels_of_images() for label in own], minlength=4)
    share = counts[1] / counts.sum()
    assert counts[3] == 0 and abs(share - 10 / 13) < 4 * (10 / 13 * 3 / 13 / counts.sum()) ** 0.5
    assert len(dataset.class_names) == 3
    with pytest.raises(UserError, match=r"class shares 1, 2\n  expected: 3 numbers"):
        generate_shapes(tmp_path / "other", class_shares=(1, 2))
