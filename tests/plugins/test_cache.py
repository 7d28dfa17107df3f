"""The cache of compiled plugins, with other processes at work in it."""

import os

import pytest

from maskrcnn.plugins import build

RECORD = {"library": "x", "architectures": [90]}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path))


def writing(text):
    return lambda path: path.write_text(text)


def test_a_file_is_made_once_and_again_by_force():
    path = build.store(RECORD, "lib.so", writing("first"))
    assert build.store(RECORD, "lib.so", writing("second")) == path and path.read_text() == "first"
    assert build.store(RECORD, "lib.so", writing("second"), force=True) == path and path.read_text() == "second"
    assert sorted(entry.name for entry in build.folder().iterdir()) == [build.key_of(RECORD)]


def test_what_another_process_made_while_ours_was_replacing_it_is_kept(monkeypatch):
    """Both set the old one aside, and the other one's comes into its place first."""
    path = build.store(RECORD, "lib.so", writing("old"))
    set_aside = build._set_aside

    def set_aside_too_late(final):
        set_aside(final)
        final.mkdir()
        (final / "lib.so").write_text("theirs")

    monkeypatch.setattr(build, "_set_aside", set_aside_too_late)
    assert build.store(RECORD, "lib.so", writing("ours"), force=True) == path
    assert path.read_text() == "theirs"
    assert sorted(entry.name for entry in build.folder().iterdir()) == [build.key_of(RECORD)]


def test_a_folder_that_cannot_be_renamed_is_an_error_and_no_endless_loop(monkeypatch):
    monkeypatch.setattr(os, "rename", lambda *paths: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        build.store(RECORD, "lib.so", writing("ours"))
    assert not list(build.folder().iterdir())
