"""The scaling benchmark on a tiny model."""

import json

import pytest
import scaling

from maskrcnn.machine import available_cpus


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
    assert content["curves"]["threads"]["lines"]["model.onnx"][-1][0] == available_cpus()
    kept = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(content))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_growth_is_the_exponent(power):
    assert scaling.growth([(x, 3 * x**power) for x in (1, 2, 8)]) == pytest.approx(power, abs=1e-9)


def test_both_scorers_score_the_same_results_silently(capsys):
    curve = scaling.dataset_curve([20])
    theirs, fast = (curve.calls[name][20.0](0) for name in ("pycocotools", "maskrcnn"))
    assert fast.metrics["AP"] == pytest.approx(theirs.stats[0], abs=1e-12) and 0.05 < theirs.stats[0] < 0.95
    assert len(theirs.params.imgIds) == 20
    assert capsys.readouterr().out == ""


def test_unknown_curves_are_refused():
    with pytest.raises(SystemExit):
        scaling.parse(["--curves", "size,weight"])
