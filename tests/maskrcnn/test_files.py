import codecs
import errno
import json
import math
import os
import tempfile
from pathlib import Path

import pytest

from maskrcnn.errors import UserError
from maskrcnn.files import (
    atomic_path,
    cache_folder,
    check_output_folder,
    check_target,
    folder_beside,
    make_folder,
    read_json,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_takes_its_place_only_at_the_end(tmp_path):
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and temporary.suffix == ".onnx"
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_exception_leaves_the_old_file_and_nothing_else(tmp_path, exception):
    target = tmp_path / "weights.bin"
    target.write_text("old")
    with pytest.raises(exception), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise exception
    assert target.read_text() == "old"
    assert names(tmp_path) == ["weights.bin"]


def test_two_writers_do_not_share_a_temporary_file(tmp_path):
    with atomic_path(tmp_path / "a.txt") as first, atomic_path(tmp_path / "a.txt") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a.txt").read_text() == "first"  # the outer block ends last
    assert names(tmp_path) == ["a.txt"]


def test_block_that_writes_nothing_is_an_error(tmp_path):
    expected = pytest.raises(RuntimeError, match=r"nothing was written .* to become .*absent\.txt")
    with expected, atomic_path(tmp_path / "absent.txt"):
        pass
    assert names(tmp_path) == []


def test_missing_parents_are_made(tmp_path):
    with atomic_path(tmp_path / "a" / "b" / "c.txt") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "x"


@pytest.mark.parametrize("make", [atomic_path, check_target, lambda path: folder_beside(path, prefix=".x-")])
def test_a_name_that_a_folder_has_is_refused_before_the_work(tmp_path, make):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: a folder"), make(tmp_path / "out"):
        pytest.fail("the work was begun")


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"folder {tmp_path} cannot be written"):
        check_target(tmp_path / "out.json")


def test_a_check_creates_nothing(tmp_path):
    check_target(tmp_path / "new" / "inner" / "out.json")
    check_output_folder("--output", tmp_path / "new" / "out", [tmp_path], ())
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is no folder"):
        check_target(tmp_path / "file" / "out.json")


def full_disk(name):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


@pytest.mark.parametrize("name", [None, "another file"])
def test_a_full_disk_is_a_user_error_and_the_old_file_stays(tmp_path, name):
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(UserError, match=r"model\.onnx cannot be written \(No space left"), atomic_path(target) as draft:
        draft.write_text("half")
        full_disk(name)
    with pytest.raises(UserError, match="No space left"), folder_beside(target, prefix=".x-") as folder:
        (folder / "draft").write_text("half")
        full_disk(name)
    assert target.read_text() == "old" and names(tmp_path) == ["model.onnx"]


def test_errors_of_other_files_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_path(tmp_path / "out.json"):
        (tmp_path / "elsewhere").read_text()


def test_parent_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"folder .*inner cannot be created"):
        make_folder(tmp_path / "file" / "inner")
    with pytest.raises(UserError, match="cannot be created"), atomic_path(tmp_path / "file" / "x.json"):
        pass


def test_json_round_trip_in_utf8(tmp_path):
    value = {"name": "Zürich 犬", "values": [1, 2.5, None, True]}
    write_json(tmp_path / "v.json", value)
    raw = (tmp_path / "v.json").read_bytes()
    assert json.loads(raw) == value
    assert "Zürich 犬".encode() in raw and raw.endswith(b"}\n") and b"\r" not in raw


@pytest.mark.parametrize(("value", "error"), [(math.nan, ValueError), ({1, 2}, TypeError)])
def test_values_that_json_cannot_hold_leave_the_old_file(tmp_path, value, error):
    write_json(tmp_path / "v.json", {"ap": 0.5})
    with pytest.raises(error):
        write_json(tmp_path / "v.json", {"ap": value})
    assert json.loads((tmp_path / "v.json").read_text()) == {"ap": 0.5}
    assert names(tmp_path) == ["v.json"]


def test_json_is_read_with_and_without_a_byte_order_mark(tmp_path):
    for mark in (b"", codecs.BOM_UTF8):
        (tmp_path / "v.json").write_bytes(mark + '{"name": "犬"}'.encode())
        assert read_json(tmp_path / "v.json", "a JSON file") == {"name": "犬"}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, r"v\.json cannot be read \(No such file"),
        (b'{\n"a" 1}', r"v\.json, line 2, column 5: not JSON \(Expecting ':' delimiter\)"),
        (b'"\xff"', r"v\.json: not JSON"),
        (b"", r"v\.json: an empty file"),
        (b"\x1f\x8b\x08", r"v\.json: a gzip file, not JSON\n.*\n.*unpack it"),
        (b'{"a": 1}\n{"a": 2}\n', r"v\.json, line 2, column 1: not JSON(.|\n)*JSON Lines"),
        (b"[" * 200_000, r"v\.json: not JSON"),
    ],
)
def test_json_that_cannot_be_read_names_file_and_line(tmp_path, content, found):
    if content is not None:
        (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(UserError, match=found) as caught:
        read_json(tmp_path / "v.json", "a results file")
    assert caught.value.expected == "a results file"


def test_the_cache_folder_of_a_user_with_and_without_a_home(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    monkeypatch.delenv("MASKRCNN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "maskrcnn"

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    folder = cache_folder()
    assert folder.parent == tmp_path / "temporary"
    assert folder == cache_folder()
    if os.name == "posix":
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o777)
        with pytest.raises(UserError, match=r"other users may write(.|\n)*set MASKRCNN_CACHE"):
            cache_folder()
