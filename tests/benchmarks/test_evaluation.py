"""The evaluation benchmark compares before measuring, and its simulated results are plausible."""

import json

import evaluation
import pytest
from evaluation import CLASSES, detections, simulated
from resources import call_in_new_process
from session import Progress

from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.protocol import KINDS
from maskrcnn.runtime.evaluation.scoring import score_entries


def test_everything_is_measured_and_written(tmp_path, capsys):
    options = ["--images", "3", "--detections", "12", "--dataset", "4,6", "--repeat", "1", "--output", str(tmp_path)]
    rows = evaluation.main(options)
    assert [row.work.split(",")[0] for row in rows] == [
        "paste and encode",
        *(f"score {kind}" for kind in KINDS for _ in range(2)),
        "AP difference",
    ]
    assert all(row.times > 0 and row.check for row in rows[:-1])
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(content["rows"]) == len(rows) and "pycocotools" in content["environment"]["versions"]
    assert (tmp_path / "evaluation.svg").read_text().startswith("<svg")
    assert (tmp_path / "evaluation.md").read_text().strip() in capsys.readouterr().out


def test_masks_that_differ_are_not_timed(monkeypatch):
    found = [detections(seed, 9, (120, 160)) for seed in range(2)]
    assert evaluation.paste_check(found).startswith("0 of 18 masks differ, 0 px in all")
    eroded = {**evaluation.PASTERS, "ours": lambda own: own.rles(0.9)}
    monkeypatch.setattr(evaluation, "PASTERS", eroded)
    with pytest.raises(AssertionError, match="a metric differs by"):
        evaluation.paste_check(found)


def test_scores_that_differ_are_not_reported(monkeypatch):
    right = evaluation.scored_by_pycocotools

    def wrong(content, results, kind):
        scorer = right(content, results, kind)
        scorer.eval["recall"] += 1e-15
        return scorer

    monkeypatch.setattr(evaluation, "scored_by_pycocotools", wrong)
    with pytest.raises(AssertionError, match="recall differs"):
        evaluation.score_row(4, 10, "bbox", 1, Progress())


@pytest.mark.parametrize("kind", KINDS)
def test_simulated_results_have_a_moderate_ap(kind):
    content, results = simulated(12, 40, kind, (240, 320))
    assert len(results) == 12 * 40 and len(content["images"]) == 12
    assert len(content["categories"]) == (1 if kind == "keypoints" else CLASSES)
    metrics = score_entries(GroundTruth.of_content(content, "gt"), results, kind).metrics
    assert 0.05 < metrics["AP"] < 0.9
    assert simulated(12, 40, kind, (240, 320)) == (content, results)


def test_memory_is_measured_in_a_new_process():
    task = {"images": 2, "count": 5, "size_hw": [64, 96], "paster": "torchvision"}
    growth = call_in_new_process("evaluation:pasting_peak_mb", task)
    assert growth is None or growth >= 0
