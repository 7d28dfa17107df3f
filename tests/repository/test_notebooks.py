"""The notebooks of docs/notebooks/ run from their first cell to their last, and are kept without what they printed."""

import ast
import re
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# What the cell tagged "parameters" is followed by here, so that each takes seconds; and how many pictures are shown.
SETTINGS = {
    "1-a-photo-stage-by-stage": {"IMAGES": 16, "EPOCHS": 1, "SHOWN": 3},
    "2-training-on-shapes": {"IMAGES": 16, "EPOCHS": 2, "SHOWN": 2},
    "3-from-checkpoint-to-engine": {"IMAGES": 12, "CHECKPOINT": "given.safetensors", "REPEAT": 1},
}
PICTURES = {"1-a-photo-stage-by-stage": 9, "2-training-on-shapes": 8, "3-from-checkpoint-to-engine": 1}


def parameters(notebook) -> int:
    """The place of the cell that holds what may be changed."""
    (place,) = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    return place


def assigned(source: str) -> set[str]:
    return {target.id for node in ast.parse(source).body if isinstance(node, ast.Assign) for target in node.targets}


@pytest.fixture
def executed(tmp_path, checkpoint, monkeypatch):
    """Runs a notebook with some of its parameters changed, in a folder that holds a checkpoint and nothing else."""
    shutil.copy(checkpoint, tmp_path / "given.safetensors")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # where other tests run too, threads wait for each other

    def run(path, **changes):
        notebook = nbformat.read(path, as_version=4)
        place = parameters(notebook)
        assert set(changes) <= assigned(notebook.cells[place].source), "a parameter that is none changes nothing"
        source = "\n".join(f"{name} = {value!r}" for name, value in changes.items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
        client = nbclient.NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        )
        return client.execute()

    return run


def outputs(notebook, kind):
    return [
        output.data[kind]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "display_data" and kind in output.data
    ]


def printed(notebook):
    return "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    )


def test_every_notebook_has_its_settings():
    assert {path.stem for path in NOTEBOOKS} == set(SETTINGS) == set(PICTURES)


@each
def test_it_runs(path, executed):
    notebook = executed(path, **SETTINGS[path.stem])
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert len(outputs(notebook, "image/png")) >= PICTURES[path.stem]
    text = printed(notebook)
    assert "nan" not in text
    if path.stem.startswith("1"):
        assert "→ images (1, 3, 128, 160)" in text and "box_features" in text
    if path.stem.startswith("2"):
        assert len(outputs(notebook, "image/svg+xml")) == 1
        assert re.search(r"\d+ anchors: [1-9]\d* positive, [1-9]\d* negative", text)
    if path.stem.startswith("3"):
        assert "forbidden and absent: True" in text
        counts = re.findall(r"^(PyTorch|ONNX Runtime|engine) +(\d+) detections", text, re.MULTILINE)
        assert len(counts) == 3 and counts[0][1] == counts[1][1] != "0"


@each
def test_it_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@each
def test_it_explains_itself(path):
    notebook = nbformat.read(path, as_version=4)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown" and kinds.count("markdown") >= 8
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (path.parent / target).exists(), target
    root = FOLDER.parents[1]
    for name in re.findall(r"`((?:maskrcnn|export|runtime|plugins)/[\w/]+\.py)`", text):
        assert (root / name).is_file(), name


def test_the_page_beside_them_names_them_and_their_papers():
    text = (FOLDER / "README.md").read_text()
    assert {path.name for path in NOTEBOOKS} == set(re.findall(r"\]\(([\w-]+\.ipynb)\)", text))
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (FOLDER / target).exists(), target
    root = FOLDER.parents[1]
    named = re.findall(r"`((?:maskrcnn|export|runtime|plugins)/[\w/]+\.py)`", text)
    assert len(named) > 10 and all((root / name).is_file() for name in named)
