"""Peak memory of a contender, in a process of its own."""

import json

import memory
import pytest


@pytest.mark.parametrize("peer", [None, "eager"])
def test_a_model_costs_more_than_its_weights(onnx_file, checkpoint, peer):
    spec = {"path": str(checkpoint), "peer": peer} if peer else {"path": str(onnx_file), "backend": "onnxruntime"}
    found = memory.peak_memory({**spec, "size_hw": [64, 96], "batch": 2})
    assert found["host_mb"] > found["host_before_mb"] + checkpoint.stat().st_size / 1e6
    assert found["host_before_mb"] > 20


def test_what_fails_is_not_known(tmp_path):
    found = memory.peak_memory({"path": str(tmp_path / "no.onnx"), "size_hw": [64, 64]})
    assert found == dict.fromkeys(memory.KEYS)


def test_limits_of_the_benchmark_end_with_code_1(tmp_path, onnx_file, capsys):
    import run

    arguments = ["--model", str(onnx_file), "--repeat", "1", "--batch", "1", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        run.main([*arguments, "--memory", "--max-latency", "0.001"])
    assert ended.value.code == 1
    assert "worse than allowed" in capsys.readouterr().err
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "host MB" in table and "model MB" in table
    older = tmp_path / "results.json"
    content = json.loads(older.read_text())
    for row in content["rows"]:  # of a machine that was far slower, so that noise decides nothing
        row["p50_ms"] *= 1000
    older.write_text(json.dumps(content))
    assert run.main([*arguments, "--compare", str(older), "--max-latency", "1e9"])
