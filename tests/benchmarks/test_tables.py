"""The tables of docs/results.md are those of the committed results."""

import json

import pytest
import tables


def test_the_tables_of_the_page_are_up_to_date():
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.files_of(text)
    assert tables.rewritten(text) == text, "run python benchmarks/tables.py"


def test_every_result_has_its_table():
    files = {path.name for path in tables.RESULTS.glob("*.json")}
    assert files and files == set(tables.files_of(tables.PAGE.read_text(encoding="utf-8")))


def test_charts_show_the_rows_of_their_files():
    charts = 0
    for path in tables.RESULTS.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if drawn := tables.chart(content):
            charts += 1
            stored = path.with_suffix(".svg").read_text(encoding="utf-8")
            measured = [row for row in content["rows"] if row["batch"] == 1 and row["mask_ap"] is not None]
            assert len(measured) > 5
            for row in measured:
                name = f"{row['model']}, {row['backend']} {row['precision']}"
                assert name in drawn and name in stored, "run python benchmarks/tables.py"
    assert charts == 1


def test_only_text_between_the_comments_is_rewritten(tmp_path):
    content = [{"model": "m", "backend": "b", "total_ms": 2.0, "stages_ms": {"one": 1.5, "two": 0.5}}]
    (tmp_path / "x.json").write_text(json.dumps(content))
    text = "before\n<!-- table: x.json -->\nold\n<!-- end -->\nafter\n"
    new = tables.rewritten(text, tmp_path)
    assert "old" not in new and "| one | 1.5 ms, 75% |" in new
    assert new.startswith("before\n<!-- table: x.json -->\n| stage") and new.endswith("<!-- end -->\nafter\n")
    assert tables.rewritten(new, tmp_path) == new


def result(name, *rows):
    keys = ("model", "backend", "precision", "peer", "size", "batch", "p50_ms", "times_torchvision")
    rows = [dict(zip(keys, row, strict=True), check="", status="ok") for row in rows]
    return {"workload": {"name": name}, "rows": rows}


def test_a_summary_has_a_column_group_for_each_result():
    ap = {"mask_ap": 0.5, "mask_ap_difference": 0.0}
    large = result(
        "large, random weights",
        ("a.onnx", "ONNX Runtime", "fp32", "", "800×1088", 1, 1000.0, 2.0),
        ("a.onnx", "ONNX Runtime", "fp32", "", "800×1344", 1, 1300.0, 2.0),
        ("a.int8.onnx", "ONNX Runtime", "int8", "", "800×1088", 1, 400.0, 5.0),
        ("torchvision", "PyTorch CPU", "fp32", "eager", "800×1088", 1, 2000.0, 1.0),
    )
    small = result(
        "small",
        ("best", "PyTorch CPU", "fp32", "", "", 1, 20.0, 1.2),
        ("best", "PyTorch CPU", "fp32", "", "", 4, 50.0, 1.2),
        ("m.onnx", "ONNX Runtime", "fp32", "", "", 1, 10.0, 2.4),
        ("m.engine", "TensorRT", "fp16", "", "", 1, None, None),
    )
    for row, difference in zip(small["rows"], (0.0, 0.0, -0.01, None), strict=True):
        row |= ap | {"mask_ap_difference": difference}
    small["rows"][0]["check"] = "reference"
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.summary([large, small]).splitlines()]
    assert lines[0] == ["run by", "large: ms", "× torchvision", "small: ms", "× torchvision", "mask AP"]
    assert lines[2:] == [
        ["ONNX Runtime, fp32", "1000", "2.0", "10", "2.4", "-0.0100"],
        ["ONNX Runtime, int8", "400", "5.0", "", "", ""],
        ["torchvision, PyTorch CPU", "2000", "1.0", "", "", ""],
        ["PyTorch CPU, fp32", "", "", "20", "1.2", "0.5000"],
    ]


@pytest.mark.parametrize(("name", "note"), [("a, random weights", "random weights"), ("a val", "trained weights")])
def test_a_summary_marks_detections_that_differ_from_fp32(name, note):
    content = result(
        name,
        ("a.onnx", "ONNX Runtime", "fp32", "", "", 1, 9.0, 2.0),
        ("a.int8.onnx", "ONNX Runtime", "int8", "", "", 1, 4.0, 4.5),
    )
    assert "*" not in tables.summary([content])
    content["rows"][1]["status"] = "inexact"
    table, *below = tables.summary([content]).split("\n\n")
    assert [line.split("|")[3].strip() for line in table.splitlines()[2:]] == ["2.0", "4.5 *"]
    assert len(below) == 1 and below[0].startswith(f"\\* {note}: detections that differ from FP32's")
    assert tables.summary([content, content]).count("\\*") == 1


def test_the_note_is_inside_the_block(tmp_path):
    content = result("a, random weights", ("a", "b", "int8", "", "", 1, 4.0, 4.5))
    content["rows"][0]["status"] = "inexact"
    (tmp_path / "x.json").write_text(json.dumps(content))
    text = "<!-- summary: x.json -->\n<!-- end -->\nafter\n"
    new = tables.rewritten(text, tmp_path)
    assert new.endswith("the cost in AP.\n<!-- end -->\nafter\n")
    assert tables.rewritten(new, tmp_path) == new


def test_missing_and_unknown_files_are_errors(tmp_path):
    text = "<!-- table: x.json -->\n<!-- end -->"
    with pytest.raises(FileNotFoundError):
        tables.rewritten(text, tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="unknown kind"):
        tables.rewritten(text, tmp_path)
