"""VOC's average precision, by hand."""

import json

import numpy as np
import pytest

from maskrcnn.api.evaluate import evaluate
from maskrcnn.errors import UserError
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.voc import area_ap, eleven_point_ap, voc_metrics, voc_table


def content(*objects: tuple[int, str, tuple[int, ...], int]) -> dict:
    """Annotations from (image, class, box xywh, difficult); three images of 100×100, classes cat and dog."""
    ids = {"cat": 1, "dog": 2}
    return {
        "images": [{"id": k, "file_name": f"{k}.png", "height": 100, "width": 100} for k in (1, 2, 3)],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        "annotations": [
            {"id": k, "image_id": image, "category_id": ids[name], "bbox": list(box), "iscrowd": crowd, "area": 1.0}
            for k, (image, name, box, crowd) in enumerate(objects, 1)
        ],
    }


def results(*found: tuple[int, str, tuple[int, ...], float]) -> list[dict]:
    ids = {"cat": 1, "dog": 2}
    return [
        {"image_id": image, "category_id": ids[name], "bbox": list(box), "score": score}
        for image, name, box, score in found
    ]


OBJECTS = (
    (1, "cat", (0, 0, 10, 10), 0),
    (1, "cat", (20, 0, 10, 10), 0),
    (2, "cat", (0, 0, 10, 10), 0),
    (2, "cat", (50, 50, 10, 10), 1),  # difficult
    (3, "cat", (0, 0, 10, 10), 0),
    (3, "dog", (40, 40, 20, 20), 0),
)
FOUND = (
    (1, "cat", (0, 0, 10, 10), 0.9),  # true
    (1, "cat", (1, 0, 10, 10), 0.8),  # the same object again: false
    (2, "cat", (50, 50, 10, 9), 0.7),  # difficult: does not count
    (2, "cat", (0, 0, 10, 10), 0.6),  # true
    (3, "cat", (0, 0, 10, 4), 0.5),  # IoU 0.4: false
    (3, "cat", (0, 5, 10, 10), 0.4),  # IoU 1/3: false
    (1, "cat", (20, 0, 10, 5), 0.3),  # IoU 0.5: true
)


def test_both_rules_by_hand():
    """Of cats, four objects: true, false, true, false, false, true.

    Recall 1/4, 1/4, 2/4, 2/4, 2/4, 3/4 at precision 1, 1/2, 2/3, 1/2, 2/5, 1/2. Falling monotonically the precision
    is 1, 2/3, 2/3, 1/2, 1/2, 1/2. Area: (1 + 2/3 + 1/2) / 4. Eleven points: three at 1 (recall 0, 0.1, 0.2), three at
    2/3 (0.3 to 0.5), two at 1/2 (0.6, 0.7), three at 0.
    """
    truth = GroundTruth.of_content(content(*OBJECTS), "cats.json")
    metrics = voc_metrics(truth, results(*FOUND))
    assert metrics["per_class"]["cat"] == {
        "objects": 4,
        "AP_area": pytest.approx((1 + 2 / 3 + 1 / 2) / 4),
        "AP_11": pytest.approx((3 * 1 + 3 * 2 / 3 + 2 * 1 / 2) / 11),
    }
    assert metrics["per_class"]["dog"] == {"objects": 1, "AP_area": 0.0, "AP_11": 0.0}
    assert metrics["mAP_area"] == pytest.approx((1 + 2 / 3 + 1 / 2) / 8)
    assert "cat                 4         0.5417         0.5455" in voc_table(metrics)


def test_a_detection_counts_for_the_object_that_it_overlaps_most():
    """COCO would give the second one the other object, which it overlaps enough."""
    truth = GroundTruth.of_content(content((1, "cat", (0, 0, 10, 10), 0), (1, "cat", (0, 3, 10, 10), 0)), "x.json")
    found = results((1, "cat", (0, 0, 10, 10), 0.9), (1, "cat", (0, 1, 10, 10), 0.8))
    assert voc_metrics(truth, found)["per_class"]["cat"]["AP_area"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("hits", "area", "eleven"),
    [
        ([1] * 10, 1.0, 1.0),
        ([0] * 10, 0.0, 0.0),
        ([1, 1, 1] + [0] * 3, 0.3, 4 / 11),  # a recall of 3/10 reaches the point 0.3
        ([], 0.0, 0.0),
    ],
)
def test_limits_of_the_rules(hits, area, eleven):
    """Of ten objects."""
    true = np.cumsum(hits)
    curve = true / 10, true / np.arange(1, len(hits) + 1)
    assert (area_ap(*curve), eleven_point_ap(*curve)) == (pytest.approx(area), pytest.approx(eleven))


def test_a_results_file_is_scored_by_vocs_rules(tmp_path):
    (tmp_path / "truth.json").write_text(json.dumps(content(*OBJECTS)))
    (tmp_path / "found.json").write_text(json.dumps(results(*FOUND)))
    out = tmp_path / "out.json"
    found = evaluate(
        results=tmp_path / "found.json", annotations=tmp_path / "truth.json", voc=True, json=out, images=tmp_path
    )
    assert found.voc["mAP_11"] == json.loads(out.read_text())["voc"]["mAP_11"] == pytest.approx(3 / 11)
    assert set(found.metrics) == {"box"}


def test_results_without_boxes_have_no_voc_metrics():
    truth = GroundTruth.of_content(content(*OBJECTS), "cats.json")
    with pytest.raises(UserError, match="results without bbox"):
        voc_metrics(truth, [{"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": {}}])
