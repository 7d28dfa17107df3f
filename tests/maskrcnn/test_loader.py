"""Training samples: geometry, padding, order."""

import json
import shutil

import numpy as np
import pytest
import torch

from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.data.images import read_image
from maskrcnn.data.loader import (
    MASK_SIDE,
    EpochSampler,
    TrainingSamples,
    collate,
    mask_in_box,
    training_loader,
)
from maskrcnn.errors import UserError
from maskrcnn.preprocess import Preprocessing

TWICE = Preprocessing(min_size_px=192, max_size_px=400)


def samples(root, flip=0.0, seed=0, preprocessing=TWICE) -> TrainingSamples:
    dataset = CocoDataset.load(root, "train")
    return TrainingSamples(dataset, preprocessing, flip_probability=flip, seed=seed)


def with_objects(data: TrainingSamples) -> int:
    return next(i for i, record in enumerate(data.dataset.images) if len(record.instances) > 1)


def test_a_sample_is_the_image_and_its_boxes_at_the_new_size(shapes):
    data = samples(shapes)
    index = with_objects(data)
    record = data.dataset.images[index]
    image_id, pixels, boxes, labels, _ = data[0, index]
    assert image_id == record.id
    assert pixels.shape == (3, 192, 192)  # 96 px doubled
    np.testing.assert_allclose(boxes, 2 * np.array([i.box_xyxy_px for i in record.instances]), rtol=1e-6)
    assert labels.tolist() == [i.label for i in record.instances]
    original = read_image(record.path).astype(np.float32)
    np.testing.assert_allclose(pixels.mean(axis=(1, 2)), original.mean(axis=(0, 1)), atol=0.5)


def test_a_stored_mask_has_the_area_of_the_object(shapes):
    data = samples(shapes)
    for record in data.dataset.images:
        for instance in record.instances:
            full = instance_mask(record, instance)
            x1, y1, x2, y2 = instance.box_xyxy_px
            stored = mask_in_box(full, np.array([x1, y1, x2, y2], np.float32))
            share = (stored == 255).mean() * (x2 - x1) * (y2 - y1) / full.sum()
            assert share == pytest.approx(1, abs=0.06)


def test_a_flipped_sample_mirrors_pixels_boxes_and_masks(shapes):
    plain, flipped = samples(shapes), samples(shapes, flip=1.0)
    index = with_objects(plain)
    _, pixels, boxes, labels, masks = plain[0, index]
    _, mirrored, mirrored_boxes, same_labels, mirrored_masks = flipped[0, index]
    np.testing.assert_allclose(mirrored, pixels[:, :, ::-1], atol=1e-3)
    np.testing.assert_allclose(mirrored_boxes[:, [2, 0]], 192 - boxes[:, [0, 2]], atol=1e-4)
    np.testing.assert_array_equal(mirrored_boxes[:, [1, 3]], boxes[:, [1, 3]])
    np.testing.assert_array_equal(mirrored_masks, masks[:, :, ::-1])
    np.testing.assert_array_equal(labels, same_labels)


def test_a_batch_is_padded_and_says_what_is_real():
    def sample(image_id, height, width, objects):
        return (
            image_id,
            np.full((3, height, width), 9, np.float32),
            np.arange(4 * objects, dtype=np.float32).reshape(objects, 4),
            np.arange(1, objects + 1),
            np.full((objects, MASK_SIDE, MASK_SIDE), 255, np.uint8),
        )

    batch = collate([sample(5, 33, 50, 2), sample(6, 64, 20, 0)], divisor=32)
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.image_sizes.tolist() == [[33, 50], [64, 20]]
    assert batch.images.sum().item() == 9 * 3 * (33 * 50 + 64 * 20)
    assert batch.valid.tolist() == [[True, True], [False, False]]
    assert batch.labels.tolist() == [[1, 2], [0, 0]]
    assert batch.boxes[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batch.image_ids == [5, 6]


def test_a_batch_without_any_object_still_has_a_slot(shapes):
    image = np.zeros((3, 32, 32), np.float32)
    nothing = (
        1,
        image,
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int64),
        np.zeros((0, MASK_SIDE, MASK_SIDE), np.uint8),
    )
    assert collate([nothing], divisor=32).boxes.shape == (1, 1, 4)


def test_the_order_depends_on_seed_and_epoch_and_covers_everything():
    sampler = EpochSampler(20, seed=3)
    first = list(sampler)
    assert first == list(sampler)
    assert sorted(index for _, index in first) == list(range(20))
    sampler.epoch = 1
    assert [index for _, index in sampler] != [index for _, index in first]
    assert {epoch for epoch, _ in sampler} == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_number_of_workers(shapes, workers):
    batches = []
    for count in (0, workers):
        loader, sampler = training_loader(samples(shapes, flip=0.5), batch_size=4, workers=count, pin_memory=False)
        sampler.epoch = 2
        batches.append([(b.image_ids, b.images, b.masks) for b in loader])
    assert len(batches[0]) == 3
    for one, other in zip(*batches, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2], other[2])


def test_an_image_of_another_size_than_annotated_is_named(shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "wrong")
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["height"] += 1
    for annotation in content["annotations"]:
        if isinstance(annotation["segmentation"], dict):
            annotation["segmentation"]["size"][0] += 1
    content["annotations"] = [a for a in content["annotations"] if isinstance(a["segmentation"], list)]
    path.write_text(json.dumps(content))
    found = samples(root)[0, 0]
    assert isinstance(found, UserError)
    assert "96×96 pixels\nexpected: 96×97" in str(found)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_comes_out_of_the_loader_as_its_error(shapes, tmp_path, workers):
    root = shutil.copytree(shapes, tmp_path / "cut")
    victim = root / "train" / "000003.png"
    victim.write_bytes(victim.read_bytes()[:300])
    loader, _ = training_loader(samples(root), batch_size=4, workers=workers, pin_memory=False)
    errors = [batch for batch in loader if isinstance(batch, UserError)]
    assert len(errors) == 1
    assert "000003.png" in errors[0].came
