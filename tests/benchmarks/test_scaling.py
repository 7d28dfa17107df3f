"""Curves of cost, on a tiny model."""

import json
import os

import pytest
import scaling


def test_every_curve_is_measured_drawn_and_written(tmp_path, onnx_file):
    content = scaling.main(
        ["--model", str(onnx_file), "--sizes", "64x96,128x160", "--batch", "1,2", "--images", "3,6", "--repeat", "1",
         "--output", str(tmp_path)]
    )  # fmt: skip
    assert set(content["curves"]) == {"size", "batch", "threads", "detections", "dataset"}
    for name, curve in content["curves"].items():
        assert all(y > 0 for points in curve["lines"].values() for _, y in points)
        assert (tmp_path / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg")
        assert scaling.table(curve).count("\n") == len(curve["lines"]) + 1
    assert [x for x, _ in content["curves"]["size"]["lines"]["model.onnx"]] == [64 * 96 / 1e6, 128 * 160 / 1e6]
    assert content["curves"]["threads"]["lines"]["model.onnx"][-1][0] == os.cpu_count()
    kept = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(content))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_growth_is_the_exponent(power):
    assert scaling.growth([(x, 3 * x**power) for x in (1, 2, 8)]) == pytest.approx(power, abs=1e-9)


def test_the_simulated_dataset_has_an_ap_between_nothing_and_all():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth_json, results = scaling.simulated_dataset(20)
    truth = COCO()
    truth.dataset = truth_json
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert 0.05 < evaluation.stats[0] < 0.95
    assert len(results) == 20 * scaling.RESULTS


def test_unknown_curves_are_refused():
    with pytest.raises(SystemExit):
        scaling.parse(["--curves", "size,weight"])
