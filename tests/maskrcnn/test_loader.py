"""Training samples: geometry, padding, order."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from solid import write_solid_dataset

from maskrcnn.config import AugmentConfig
from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.data.images import read_image
from maskrcnn.data.records import Records
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing, batch_images
from maskrcnn.training.loader import PipedBatch, collate, training_loader
from maskrcnn.training.samples import Sample, TrainingSamples
from maskrcnn.training.view import MASK_SIDE, Objects

TWICE = Preprocessing(min_size_px=192, max_size_px=400)
EVERYTHING = {
    f"{name}_probability": 0.5 for name in ("colour", "flip", "jitter", "mosaic", "perspective", "mixup", "copy_paste")
}


def samples(root, preprocessing=TWICE, **changes) -> TrainingSamples:
    """Samples of the training split; without changes, as they are in the file."""
    augment = AugmentConfig(**{"flip_probability": 0.0, **changes})
    return TrainingSamples(CocoDataset.load(root, "train"), preprocessing, augment=augment, seed=0)


def with_objects(data: TrainingSamples) -> int:
    return next(i for i, record in enumerate(data.records) if len(record.instances) > 1)


def test_a_sample_is_the_image_and_its_boxes_at_the_new_size(shapes):
    data = samples(shapes)
    index = with_objects(data)
    record = data.records[index]
    sample = data[0, index]
    assert sample.image_id == record.id
    assert sample.image.shape == (3, 192, 192)  # 96 px doubled
    np.testing.assert_allclose(sample.objects.boxes, 2 * np.array([i.box_xyxy_px for i in record.instances]), rtol=1e-6)
    assert sample.objects.labels.tolist() == [i.label for i in record.instances]
    original = read_image(record.path).astype(np.float32)
    np.testing.assert_allclose(sample.image.mean(axis=(1, 2)), original.mean(axis=(0, 1)), atol=0.5)


def test_a_stored_mask_has_the_area_of_the_object(shapes):
    data = samples(shapes)
    for index, record in enumerate(data.records):
        found = data[0, index].objects
        for instance, mask, frame in zip(record.instances, found.masks, found.frames, strict=True):
            area = (mask == 255).mean() * (frame[2] - frame[0]) * (frame[3] - frame[1])
            assert area == pytest.approx(4 * instance_mask(record, instance).sum(), rel=0.02)


def test_a_flipped_sample_mirrors_pixels_boxes_and_masks(shapes):
    plain, flipped = samples(shapes), samples(shapes, flip_probability=1.0)
    index = with_objects(plain)
    one, other = plain[0, index], flipped[0, index]
    np.testing.assert_array_equal(other.image, one.image[:, :, ::-1])
    np.testing.assert_allclose(other.objects.boxes[:, [2, 0]], 192 - one.objects.boxes[:, [0, 2]], atol=1e-4)
    np.testing.assert_array_equal(other.objects.boxes[:, [1, 3]], one.objects.boxes[:, [1, 3]])
    assert (other.objects.masks > 0).sum() == (one.objects.masks > 0).sum()
    np.testing.assert_array_equal(other.objects.labels, one.objects.labels)


def test_a_batch_is_padded_and_says_what_is_real():
    def sample(image_id, height, width, count):
        boxes = np.arange(4 * count, dtype=np.float32).reshape(count, 4)
        masks = np.full((count, MASK_SIDE, MASK_SIDE), 255, np.uint8)
        keypoints = np.full((count, 5, 3), image_id, np.float32)
        objects = Objects(boxes, np.arange(1, count + 1), masks, boxes + 1, keypoints)
        return Sample(image_id, np.full((3, height, width), 9, np.uint8), objects, seed=image_id + 70)

    batch = collate([sample(5, 33, 50, 2), sample(6, 64, 20, 0)], divisor=32)
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.image_sizes.tolist() == [[33, 50], [64, 20]]
    assert batch.images.sum().item() == 9 * 3 * (33 * 50 + 64 * 20)
    assert batch.valid.tolist() == [[True, True], [False, False]]
    assert batch.labels.tolist() == [[1, 2], [0, 0]]
    assert batch.boxes[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batch.mask_frames[0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.masks.float().mean(dim=(1, 2, 3)).tolist() == [255, 0]
    assert batch.keypoints.shape == (2, 2, 5, 3) and batch.keypoints.amax(dim=(1, 2, 3)).tolist() == [5, 0]
    assert (batch.image_ids, batch.seeds.tolist()) == ([5, 6], [75, 76])
    assert collate([sample(6, 64, 20, 0)], divisor=32).boxes.shape == (1, 1, 4)  # a slot without an object


def test_pixels_are_inferences_in_bytes_or_of_more_bits_in_float(shapes, tmp_path):
    """Bytes are rounded after each axis, which changes no pixel by more than a level, and none on average."""
    root = shutil.copytree(shapes, tmp_path / "mixed")
    ramp = np.arange(96 * 96, dtype=np.uint16).reshape(96, 96) % 4096
    Image.fromarray(ramp).save(root / "train" / "000003.png")
    rule = Preprocessing(min_size_px=160, max_size_px=400, pixel_range=(0, 4095))
    data, found = samples(root, rule), []
    for index, record in enumerate(data.records):
        found.append(data[0, index])
        inferred = batch_images([read_image(record.path, rule)], rule)[0][0]
        if record.path.name == "000003.png":
            wide = found[-1]
            np.testing.assert_array_equal(wide.image, inferred)
        else:
            assert found[-1].image.dtype == np.uint8
            change = found[-1].image - inferred
            assert abs(change).max() < 1.01 and abs(change.mean()) < 0.02
    plain = [sample for sample in found if sample is not wide]
    batch, mixed = collate(plain[:2], divisor=32), collate([plain[0], wide], divisor=32)
    assert batch.images.nbytes == 2 * 3 * 160 * 160
    assert torch.equal(mixed.images[0], batch.images[0].float())
    np.testing.assert_array_equal(mixed.images[1].numpy(), wide.image)
    everything, kinds = samples(root, rule, **EVERYTHING), set()
    for sample in (everything[epoch, index] for epoch in range(3) for index in range(len(everything))):
        kinds.add(sample.image.dtype.name)
        assert sample.image.min() >= -1e-3 and sample.image.max() <= 255 + 1e-3 and np.isfinite(sample.image).all()
    assert kinds == {"uint8", "float32"}


def test_the_parts_of_all_processes_are_the_batches_of_one(shapes):
    def parts(**options):
        loader, sampler = training_loader(
            samples(shapes, flip_probability=0.5), batch_size=4, workers=0, pin_memory=False, **options
        )
        sampler.epoch = 1
        return {tuple(batch.image_ids): batch for batch in loader}

    whole = parts()
    assert {len(ids) for ids in whole} == {4} and len(whole) == 3
    shared = [parts(rank=rank, world_size=2, accumulate=2) for rank in (0, 1)]
    assert [len(found) for found in shared] == [6, 6]
    for ids, batch in whole.items():
        for n, image_id in enumerate(ids):
            (part,) = (found[(image_id,)] for found in shared if (image_id,) in found)
            assert torch.equal(part.images[0], batch.images[n])
            assert torch.equal(part.seeds[0], batch.seeds[n])


def test_batches_are_grouped_by_aspect_ratio(tmp_path):
    dataset = CocoDataset.load(write_solid_dataset(tmp_path / "solid"), "train")  # four of twelve are portrait
    data = TrainingSamples(dataset, Preprocessing(min_size_px=32, max_size_px=64), seed=0)
    loader, _ = training_loader(data, batch_size=4, workers=0, pin_memory=False, aspect_ratio_groups=2)
    portrait = [{bool(height > width) for height, width in batch.image_sizes.tolist()} for batch in loader]
    assert sorted(map(str, portrait)) == ["{False}", "{False}", "{True}"]


@pytest.mark.parametrize("has_shared_memory", [True, False])
def test_batches_do_not_depend_on_workers_or_shared_memory(shapes, monkeypatch, has_shared_memory):
    def fail(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    if not has_shared_memory:
        monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    batches = []
    for workers in (0, 2):
        state = torch.get_rng_state()
        loader, sampler = training_loader(
            samples(shapes, **EVERYTHING), batch_size=4, workers=workers, pin_memory=False
        )
        sampler.epoch = 2
        batches.append(list(loader))
        assert torch.equal(torch.get_rng_state(), state)
    assert len(batches[0]) == 3
    assert {isinstance(batch, PipedBatch) for batch in batches[1]} == {not has_shared_memory}
    for one, other in zip(*batches, strict=True):
        assert one.image_ids == other.image_ids
        for name, value in vars(one).items():
            assert name == "image_ids" or torch.equal(value, getattr(other, name)), name


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("error", "found"), [(ValueError("odd"), "ValueError: odd"), (MemoryError(), "out of memory")])
def test_whatever_fails_on_an_image_names_it(shapes, monkeypatch, workers, error, found):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("maskrcnn.training.samples.read_record", fail)
    loader, _ = training_loader(samples(shapes), batch_size=4, workers=workers, pin_memory=False)
    try:
        text = str(next(iter(loader)))
    except RuntimeError as raised:
        text = str(raised)
    assert found in text
    assert "/train/0000" in text


def test_packed_records_are_the_records(shapes):
    records = list(CocoDataset.load(shapes, "train").images)
    packed = Records.of(records)
    assert len(packed) == len(records)
    for one, other in zip(packed, records, strict=True):
        assert (one.id, one.path, one.height, one.width) == (other.id, other.path, other.height, other.width)
        for mine, theirs in zip(one.instances, other.instances, strict=True):
            assert repr(mine) == repr(theirs)
    assert [record.id for record in packed[-2:]] == [record.id for record in records[-2:]]
    assert packed[-1].id == records[-1].id
    with pytest.raises(IndexError):
        packed[len(records)]


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
    assert "96×96 pixels\n  expected: 96×97" in str(found)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_comes_out_of_the_loader_as_its_error(shapes, tmp_path, workers):
    root = shutil.copytree(shapes, tmp_path / "cut")
    victim = root / "train" / "000003.png"
    victim.write_bytes(victim.read_bytes()[:300])
    loader, _ = training_loader(samples(root), batch_size=4, workers=workers, pin_memory=False)
    errors = [batch for batch in loader if isinstance(batch, UserError)]
    assert len(errors) == 1
    assert "000003.png" in errors[0].found


def test_copies_of_an_image_are_augmented_independently(shapes):
    data = samples(shapes, flip_probability=0.5, colour_probability=1.0)
    assert np.array_equal(data[1, 0, 0].image, data[1, 0].image)
    assert not np.array_equal(data[1, 0, 1].image, data[1, 0].image)
    assert np.array_equal(data[1, 0, 1].image, data[1, 0, 1].image)
    assert len({data[1, 0, copy].seed for copy in range(5)}) == 5
