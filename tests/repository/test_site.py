"""The documentation site builds without a warning, and its generated pages hold what the code defines."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    """The site, built strictly: broken links and anchors, and names that mkdocstrings cannot find, are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(site, page):
    return (site / page / "index.html").read_text(encoding="utf-8")


def test_every_page_is_in_the_site(site, root):
    for page in (root / "docs").glob("*.md"):
        assert (site / ("" if page.stem == "index" else page.stem) / "index.html").is_file(), page.name


def test_the_reference_comes_from_the_code(site):
    commands = text_of(site, "reference/command-line")
    assert "maskrcnn data convert" in commands and "--max-detections" in commands
    settings = text_of(site, "reference/configuration")
    assert "model.pool_sampling_ratio" in settings and "samples per bin and axis" in settings  # a comment
    assert "<code>learning_rate</code>" in settings and "Peak learning rate." in settings  # a help text
    functions = text_of(site, "reference/python")
    for name in ("maskrcnn.api.export.export", "maskrcnn.runtime.detector.Detector.detect"):
        assert f'id="{name}"' in functions


def test_links_out_of_the_documentation_are_paths(site):
    assert "<code>configs/finetune.yaml</code>" in text_of(site, "recipes").replace("\n", " ")
    assert 'href="../configs' not in text_of(site, "recipes")
