"""Names of keypoints, and what a configuration makes of them."""

import numpy as np
import pytest
from tiny import tiny_config

from maskrcnn.config import ModelConfig, from_dict, model_config, to_dict
from maskrcnn.errors import UserError
from maskrcnn.keypoints import COCO_NAMES, COCO_SIGMAS, COCO_SKELETON, USUAL_SIGMA, mirrored, sigmas_of
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.weights.checkpoint import metadata_of


def test_cocos_names_and_sigmas_are_those_of_its_tools():
    from pycocotools.cocoeval import Params
    from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights

    assert list(COCO_NAMES) == KeypointRCNN_ResNet50_FPN_Weights.COCO_V1.meta["keypoint_names"]
    np.testing.assert_array_equal(COCO_SIGMAS, Params("keypoints").kpt_oks_sigmas)
    assert len(COCO_SKELETON) == 19 and {n for line in COCO_SKELETON for n in line} == set(range(1, 18))


def test_sigmas_of_other_keypoints_are_the_usual():
    assert sigmas_of(COCO_NAMES) == COCO_SIGMAS
    assert sigmas_of(COCO_NAMES[:2]) == (USUAL_SIGMA, USUAL_SIGMA) and sigmas_of(()) == ()


def test_left_and_right_change_places_in_a_mirror():
    assert mirrored(COCO_NAMES) == (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
    assert mirrored(("Paw-L", "nose", "Paw-R", "tail.left")) == (2, 1, 0, 3)  # nobody is the tail's partner
    assert mirrored(("left eye", "leftover", "eye_right", "right eye")) == (3, 1, 2, 0)
    assert mirrored(()) == ()


def test_a_pose_model_is_torchvisions_unless_its_keypoints_are_named():
    config = model_config("keypointrcnn_resnet50_fpn", class_names=("person",))
    assert (config.has_masks, config.has_keypoints) == (False, True)
    assert (config.keypoint_names, config.keypoint_skeleton) == (COCO_NAMES, COCO_SKELETON)
    other = model_config("keypointrcnn_resnet50_fpn", class_names=("cat",), keypoint_names=("nose", "tail"))
    assert other.keypoint_skeleton == () and metadata_of(other).keypoint_sigmas == (USUAL_SIGMA, USUAL_SIGMA)
    assert from_dict(ModelConfig, to_dict(config)) == config


def test_metadata_tell_of_keypoints_where_there_is_a_head():
    names = ("nose", "tail")
    without = metadata_of(tiny_config(keypoint_names=names))
    assert (without.has_keypoints, without.keypoint_names) == (False, ())
    having = metadata_of(tiny_config(has_keypoints=True, keypoint_names=names, keypoint_skeleton=((1, 2),)))
    assert (having.has_keypoints, having.keypoint_names, having.keypoint_skeleton) == (True, names, ((1, 2),))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"keypoint_names": ("a", "b"), "keypoint_skeleton": ((1, 3),)},
            r"a line \[1, 3\]\n  expected: .* from 1 to 2",
        ),
        ({"keypoint_names": ("a", "b"), "keypoint_skeleton": ((0, 1),)}, r"a line \[0, 1\]"),
        ({"keypoint_names": ("a", "b"), "keypoint_sigmas": (0.1,)}, "1 model.keypoint_sigmas for 2 keypoint names"),
    ],
)
def test_what_does_not_fit_the_names_is_refused(changes, text):
    with pytest.raises(UserError, match=text):
        tiny_config(**changes)


def test_a_head_for_no_keypoints_is_refused():
    with pytest.raises(UserError, match="without keypoint names"):
        MaskRCNN(tiny_config(has_keypoints=True))
