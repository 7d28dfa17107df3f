"""The cache of compiled plugins under concurrent access."""

import os

import pytest

from maskrcnn.plugins import build

RECORD = {"library": "x", "architectures": [90]}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path))


def writing(text):
    return lambda path: path.write_text(text)


def test_a_file_is_created_once_and_again_with_force():
    path = build.store(RECORD, "lib.so", writing("first"))
    assert build.store(RECORD, "lib.so", writing("second")) == path and path.read_text() == "first"
    assert build.store(RECORD, "lib.so", writing("second"), force=True) == path and path.read_text() == "second"
    assert list(build.folder().iterdir()) == [path.parent]


def test_the_file_of_a_faster_process_is_kept(monkeypatch):
    """Another process puts its folder in place after the old one has been set aside."""
    path = build.store(RECORD, "lib.so", writing("old"))
    rename = os.rename

    def rename_and_write(source, target):
        rename(source, target)
        if source == path.parent:  # the old folder
            source.mkdir()
            path.write_text("theirs")

    monkeypatch.setattr(os, "rename", rename_and_write)
    assert build.store(RECORD, "lib.so", writing("ours"), force=True) == path
    assert path.read_text() == "theirs"
    assert list(build.folder().iterdir()) == [path.parent]


def test_a_folder_that_cannot_be_renamed_is_an_error(monkeypatch):
    monkeypatch.setattr(os, "rename", lambda *paths: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        build.store(RECORD, "lib.so", writing("ours"))
    assert not list(build.folder().iterdir())
