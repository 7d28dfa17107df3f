"""The notebooks of docs/notebooks/ run from the first cell to the last, and are stored without outputs."""

import ast
import re
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# Values for the cell tagged "parameters", so that each notebook takes seconds, and the minimum number of images shown.
SETTINGS = {
    "1-a-photo-stage-by-stage": {"IMAGES": 16, "EPOCHS": 1, "SHOWN": 3},
    "2-training-on-shapes": {"IMAGES": 16, "EPOCHS": 2, "SHOWN": 2},
    "3-from-checkpoint-to-engine": {"IMAGES": 12, "CHECKPOINT": "given.safetensors", "REPEAT": 1},
    "4-fine-tuning-on-own-data": {"IMAGES": 12, "WEIGHTS": "given.safetensors", "EPOCHS": 1, "SHOWN": 2},
}
MIN_IMAGES = {
    "1-a-photo-stage-by-stage": 9,
    "2-training-on-shapes": 8,
    "3-from-checkpoint-to-engine": 1,
    "4-fine-tuning-on-own-data": 4,
}


def assigned(source: str) -> set[str]:
    return {target.id for node in ast.parse(source).body if isinstance(node, ast.Assign) for target in node.targets}


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


@each
def test_it_runs(path, tmp_path, checkpoint, monkeypatch):
    shutil.copy(checkpoint, tmp_path / "given.safetensors")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # parallel tests would compete for the cores
    notebook = nbformat.read(path, as_version=4)
    settings = SETTINGS[path.stem]
    (place,) = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    assert set(settings) <= assigned(notebook.cells[place].source)
    source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute()

    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert len(outputs(notebook, "image/png")) >= MIN_IMAGES[path.stem]
    text = printed(notebook)
    assert "nan" not in text
    if path.stem.startswith("1"):
        assert "→ images (1, 3, 128, 160)" in text and "box_features" in text
    if path.stem.startswith("2"):
        assert len(outputs(notebook, "image/svg+xml")) == 1
        assert re.search(r"\d+ anchors: [1-9]\d* positive, [1-9]\d* negative", text)
    if path.stem.startswith("3"):
        assert "no Loop, If, NonZero: True" in text
        counts = re.findall(r"^(PyTorch|ONNX Runtime|engine) +(\d+) detections", text, re.MULTILINE)
        assert len(counts) == 3 and counts[0][1] == counts[1][1] != "0"
        assert len(re.findall(r"^(?:PyTorch|ONNX Runtime|engine) +box AP \d", text, re.MULTILINE)) == 3
    if path.stem.startswith("4"):
        assert "errors, at which training stops: none" in text and "recommended score threshold: 0." in text
        assert "AP50" in text and re.search(r"model.onnx: .* detections", text)


@each
def test_it_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("path", [*NOTEBOOKS, FOLDER / "README.md"], ids=lambda path: path.name)
def test_its_links_and_module_names_exist(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        assert {notebook.name for notebook in NOTEBOOKS} == set(re.findall(r"\]\(([\w-]+\.ipynb)\)", text))
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    modules = re.findall(r"`((?:maskrcnn|export|runtime|plugins)/[\w/]+\.py)`", text)
    assert targets and modules
    assert [target for target in targets if "://" not in target and not (path.parent / target).exists()] == []
    assert [name for name in modules if not (ROOT / name).is_file()] == []
