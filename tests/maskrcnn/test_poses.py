"""The drawn dataset of poses: annotations equal the drawn pixels and joints."""

import numpy as np
import pytest

from maskrcnn.data.check import check_dataset
from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.data.images import read_image
from maskrcnn.data.poses import JOINTS, SKELETON, generate_poses, poses_image
from maskrcnn.data.shapes import generate_shapes
from maskrcnn.errors import UserError
from maskrcnn.keypoints import mirrored


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "poses"
    return generate_poses(root, train_images=60, val_images=5, size_px=96, seed=2)


@pytest.fixture(scope="module")
def dataset(folder) -> CocoDataset:
    return CocoDataset.load(folder, "train")


def test_the_dataset_has_no_faults(folder, dataset):
    assert (dataset.class_names, dataset.keypoint_names, dataset.keypoint_skeleton) == (("figure",), JOINTS, SKELETON)
    assert dataset.skipped == {} and len(CocoDataset.load(folder, "val").images) == 5
    assert check_dataset(folder, workers=1).findings == ()
    numbers = [len(record.instances) for record in dataset.images]
    assert 1 <= numbers.count(0) <= 10 and max(numbers) == 3


def test_annotations_equal_the_drawn_pixels_and_joints(dataset):
    for index, record in enumerate(dataset.images[:20]):
        image, drawn = poses_image(np.random.default_rng([2, 0, index]), (96, 96))
        np.testing.assert_array_equal(read_image(record.path), image)
        assert len(drawn) == len(record.instances)
        for (joints, visible), instance in zip(drawn, record.instances, strict=True):
            np.testing.assert_array_equal(instance_mask(record, instance), visible)
            np.testing.assert_allclose(instance.keypoints, joints, atol=0.006)  # two decimals in the file
            assert instance.area_px == visible.sum()


def test_the_visibility_of_joints_fits_the_masks(dataset):
    found = []
    for record in dataset.images:
        for instance in record.instances:
            mask = instance_mask(record, instance)
            for x, y, shown in instance.keypoints:
                if shown:
                    assert 0 <= x <= 96 and 0 <= y <= 96
                    near = mask[max(int(y) - 1, 0) : int(y) + 2, max(int(x) - 1, 0) : int(x) + 2]
                    assert (shown == 2) <= near.any()
                found.append(shown)
    shares = np.bincount(np.array(found, int), minlength=3) / len(found)
    assert shares[2] > 0.75 and min(shares[0], shares[1]) > 0.005


def test_a_face_tells_left_from_right():
    """A figure with a face has its left side on the image's right; one seen from behind has it on the left."""
    sides = []
    for seed in range(40):
        image, drawn = poses_image(np.random.default_rng(seed), (256, 256))
        for joints, _ in drawn:
            at = dict(zip(JOINTS, joints, strict=True))
            if at["head"][2] < 2 or not all(at[name][2] for name in ("neck", "hip", "left_knee", "right_knee")):
                continue
            shows_skin = image[int(at["head"][1]), int(at["head"][0])].mean() > 100  # hair is darker
            down, across = (at["hip"] - at["neck"])[:2], (at["left_knee"] - at["right_knee"])[:2]
            assert (across[0] * down[1] - across[1] * down[0] > 0) == shows_skin
            sides.append(shows_skin)
    assert min(sides.count(True), sides.count(False)) > 5
    partners = mirrored(JOINTS)
    assert all(JOINTS[k].split("_")[-1] == JOINTS[partner].split("_")[-1] for k, partner in enumerate(partners))
    assert [JOINTS[k] for k, partner in enumerate(partners) if k == partner] == ["head", "neck", "hip"]


def test_the_command_draws_them_under_its_former_name_too(run, tmp_path):
    for name in ("poses", "figures"):
        words = ("data", name, tmp_path / name, "--train-images", 2, "--val-images", 1, "--size", 48)
        assert run(*words)[0] == 0
    first, second = (tmp_path / name / "annotations" / "instances_train.json" for name in ("poses", "figures"))
    assert first.read_bytes() == second.read_bytes()
    assert "│ figures" not in run("data", "--help")[1]


def test_a_complete_folder_is_kept_and_is_not_a_shapes_dataset(folder, tmp_path):
    before = (folder / "annotations" / "instances_train.json").stat().st_mtime_ns
    arguments = {"train_images": 60, "val_images": 5, "size_px": 96, "seed": 2}
    assert generate_poses(folder, **arguments) == folder
    assert (folder / "annotations" / "instances_train.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="is not the complete shapes dataset"):
        generate_shapes(folder, **arguments)
