"""docs/results.md shows what the committed results say."""

import json

import pytest
import tables


def test_the_page_is_as_its_files_give_it():
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.rewritten(text) == text, "run python benchmarks/tables.py"


def test_every_result_has_its_table():
    files = {path.name for path in tables.RESULTS.glob("*.json")}
    assert files and files == set(tables.files_of(tables.PAGE.read_text(encoding="utf-8")))


def test_only_what_lies_between_the_comments_is_rewritten(tmp_path):
    content = [{"model": "m", "backend": "b", "total_ms": 2.0, "stages_ms": {"one": 1.5, "two": 0.5}}]
    (tmp_path / "x.json").write_text(json.dumps(content))
    text = "before\n<!-- table: x.json -->\nold\n<!-- end -->\nafter\n"
    new = tables.rewritten(text, tmp_path)
    assert "old" not in new and "| one | 1.5 ms, 75% |" in new
    assert new.startswith("before\n<!-- table: x.json -->\n| stage") and new.endswith("<!-- end -->\nafter\n")
    assert tables.rewritten(new, tmp_path) == new


def test_missing_and_unknown_files_are_errors(tmp_path):
    text = "<!-- table: x.json -->\n<!-- end -->"
    with pytest.raises(FileNotFoundError):
        tables.rewritten(text, tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="no known kind"):
        tables.rewritten(text, tmp_path)
