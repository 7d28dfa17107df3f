"""An interrupted benchmark is resumed."""

import json

import pytest
import run
from session import Unfinished

FILE = "unfinished.json"


def test_kept_results_are_not_measured_again(tmp_path):
    path, calls = tmp_path / FILE, []

    def make(value):
        calls.append(value)
        return value

    first = Unfinished(path, {"a": [1, (2, 3)]})
    assert first.found == 0
    assert first.get("ap", "x", lambda: make(1.5)) == 1.5
    second = Unfinished(path, {"a": [1, [2, 3]]})
    assert second.found == 1
    assert second.get("ap", "x", lambda: make(2.5)) == 1.5
    assert second.get("ap", "y", lambda: make([3])) == [3]
    assert second.get("memory", "x", lambda: make(4)) == 4
    assert calls == [1.5, [3], 4]
    second.finish()
    assert not path.exists()
    assert Unfinished(path, {}).found == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": {"a": 2}, "sections": {"ap": {"x": 1}}}', "{}"])
def test_a_file_of_another_version_is_not_used(tmp_path, content):
    path = tmp_path / FILE
    path.write_text(content)
    assert Unfinished(path, {"a": 1}).get("ap", "x", lambda: 7) == 7


def test_a_failure_is_not_kept(tmp_path):
    kept = Unfinished(tmp_path / FILE, {})
    with pytest.raises(ZeroDivisionError):
        kept.get("ap", "x", lambda: 1 / 0)
    assert not (tmp_path / FILE).exists()
    assert kept.get("ap", "x", lambda: 1) == 1


def test_the_benchmark_is_resumed_unless_afresh(tmp_path, onnx_file, monkeypatch, capsys):
    arguments = ["--model", str(onnx_file), "--repeat", "1", "--batch", "1", "--output", str(tmp_path)]

    def interrupted():
        with monkeypatch.context() as patch:
            patch.setattr(run, "write_report", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run.main(arguments)
        return json.loads((tmp_path / FILE).read_text())["sections"]["samples"][" 1"]

    kept = interrupted()
    rows = run.main(arguments)
    assert "resuming" in capsys.readouterr().out
    assert {row.latencies_ms[0] for row in rows} == {ms[0] for ms, _ in kept.values()}
    assert not (tmp_path / FILE).exists()
    interrupted()
    run.main([*arguments, "--afresh"])
    assert "resuming" not in capsys.readouterr().out
