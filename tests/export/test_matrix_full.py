"""The full export matrix: models of real size, about half an hour on two cores.

Run it with `python -m pytest -m slow tests/export/test_matrix_full.py`; the table of docs/results.md is written by
`python tests/support/export_matrix.py --json OUT`.
"""

import pytest
from export_matrix import FULL, export_and_compare, summary
from session import Progress


@pytest.mark.slow
@pytest.mark.parametrize("extent", FULL, ids=lambda extent: extent.model)
def test_every_cell_of_the_model_agrees(extent):
    rows = summary(export_and_compare(extent, Progress()))
    assert {row.kind.value: row.status for row in rows} == dict.fromkeys(("ordinary", "empty", "crowded"), "ok")
