"""Folders of runs: each training has its own."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from maskrcnn import runs
from maskrcnn.errors import UserError


def test_the_number_after_the_highest(tmp_path):
    assert runs.next_run(tmp_path) == tmp_path / "train-1"
    for name in ("train-2", "train-10", "train-x", "other-30"):
        (tmp_path / name).mkdir()
    assert runs.next_run(tmp_path) == tmp_path / "train-11"


def test_trainings_that_begin_together_get_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: runs.claim_next(tmp_path / "runs"), range(40)))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(path.name for path in claimed)
    assert len(set(claimed)) == 40


def test_a_place_that_cannot_have_runs_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="runs cannot be created"):
        runs.claim_next(tmp_path / "runs")
