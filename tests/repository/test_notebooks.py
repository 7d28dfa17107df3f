"""The notebooks of docs/notebooks/ run from the first cell to the last, and are stored with what they print and draw.

    python tests/repository/test_notebooks.py [NAME ...]

executes them (default: all) and stores them with their outputs.
"""

import ast
import base64
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
import pytest
from jupyter_client import KernelManager
from PIL import Image

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_IMAGE = 80_000  # characters of base64: 60 kB
MACHINE = "machine: "  # before the processor's name, in notebooks that print times
# The kernel of the tests does what their own process does (tests/conftest.py): what it has traced is not traced again.
SUPPORT = ROOT / "tests" / "support"
TRACING_ONCE = """
import pathlib, sys
sys.path.insert(0, {support!r})
from maskrcnn.export import exporter
from shared_files import tracing_once
exporter._trace = tracing_once(pathlib.Path({root!r}))
"""
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# Values for the cell tagged "parameters", so that each notebook takes seconds, and the minimum number of images shown.
SETTINGS = {
    "1-a-photo-stage-by-stage": {"IMAGES": 16, "EPOCHS": 1, "SHOWN": 3},
    "2-training-on-shapes": {"IMAGES": 16, "EPOCHS": 2, "SHOWN": 2},
    "3-from-checkpoint-to-engine": {"IMAGES": 12, "CHECKPOINT": "given.safetensors", "REPEAT": 1},
    "4-fine-tuning-on-own-data": {"IMAGES": 12, "WEIGHTS": "given.safetensors", "EPOCHS": 1, "SHOWN": 2},
    "5-torchvision-to-four-runtimes": {"REPEAT": 1},  # of the weights of a run
}
MIN_IMAGES = {
    "1-a-photo-stage-by-stage": 9,
    "2-training-on-shapes": 8,
    "3-from-checkpoint-to-engine": 1,
    "4-fine-tuning-on-own-data": 4,
    "5-torchvision-to-four-runtimes": 1,
}


def assigned(source: str) -> set[str]:
    return {target.id for node in ast.parse(source).body if isinstance(node, ast.Assign) for target in node.targets}


def outputs(notebook, *kinds):
    return [
        output.data[kind]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        for kind in kinds
        if output.output_type == "display_data" and kind in output.data
    ]


def printed(notebook):
    return "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    )


def execute(notebook, folder, kernel=None):
    """Runs all cells in a folder, without a limit of time, in a new kernel or one that runs there."""
    client = nbclient.NotebookClient(
        notebook,
        km=kernel,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute()


def store(path, folder):
    """Executes a notebook in a folder, which its outputs do not name, and stores it with them."""
    notebook = nbformat.read(path, as_version=4)
    execute(notebook, folder)
    clean(notebook)
    path.write_text(nbformat.writes(notebook).replace(f"{folder}/", "") + "\n", encoding="utf-8")


def clean(notebook):
    """Leaves one small image of each output, and neither warnings nor addresses of objects."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for data in (output.data for output in cell.get("outputs", ()) if "data" in output):
            encoded = {kind: data.pop(kind) for kind in ("image/png", "image/jpeg") if kind in data}
            if encoded:
                data.pop("text/plain", None)
                kind, image = min(encoded.items(), key=lambda item: len(item[1]))
                data |= {kind: image} if len(image) <= MAX_IMAGE else {"image/jpeg": small_jpeg(image)}


def small_jpeg(encoded):
    """An image in base64, reduced to a JPEG of at most `MAX_IMAGE` characters."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    while len(encoded) > MAX_IMAGE:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=85)
        encoded = base64.b64encode(file.getvalue()).decode()
        image.thumbnail((image.width * 4 // 5, image.height * 4 // 5))
    return encoded


@pytest.fixture(scope="module")
def kernel(shared_root):
    """One kernel for all notebooks, as starting another takes ten seconds."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env={**os.environ, "OMP_NUM_THREADS": "1"})  # parallel tests would compete for the cores
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=300)
    client.execute_interactive(TRACING_ONCE.format(support=str(SUPPORT), root=str(shared_root)))
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


@each
def test_it_runs(path, tmp_path, checkpoint, kernel):
    shutil.copy(checkpoint, tmp_path / "given.safetensors")
    if path.stem.startswith("5"):
        (tmp_path / "runs" / "train-1").mkdir(parents=True)
        shutil.copy(checkpoint, tmp_path / "runs" / "train-1" / "best.safetensors")
    notebook = nbformat.read(path, as_version=4)
    settings = SETTINGS[path.stem]
    (place,) = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    assert set(settings) <= assigned(notebook.cells[place].source)
    source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    # The folder first: that of the notebook before may be gone.
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"import os\nos.chdir({str(tmp_path)!r})\n%reset -f"))
    execute(notebook, tmp_path, kernel)

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
    if path.stem.startswith("5"):
        found = re.findall(r"^(ONNX Runtime|OpenVINO) .* (\d+) of (\d+) found too", text, re.MULTILINE)
        assert [name for name, *_ in found] == ["ONNX Runtime", "OpenVINO"]
        assert all(int(equal) >= 0.9 * int(wanted) > 0 for _, equal, wanted in found)  # boxes of random weights tie


@each
def test_it_is_stored_with_outputs(path):
    """Of one execution from the first cell to the last, without errors and paths of a machine, and small."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.execution_count for cell in code):
        pytest.skip("not stored with outputs yet: make notebooks")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}  # "error" is none of them
    images = outputs(notebook, "image/png", "image/jpeg", "image/svg+xml")
    assert len(images) >= MIN_IMAGES[path.stem] and max(map(len, images)) <= MAX_IMAGE
    text = path.read_text(encoding="utf-8")
    assert re.search(r"/tmp/|/home/| at 0x", text) is None  # further private paths: test_text.py
    for line in printed(notebook).splitlines():
        assert not re.search(r"\d ms\b", line) or MACHINE in printed(notebook), line
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and notebook.metadata.language_info.keys() == {
        "name"
    }


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


if __name__ == "__main__":
    chosen = [path for path in NOTEBOOKS if path.stem in sys.argv[1:] or not sys.argv[1:]]
    # The second trains what the others use, the fourth trains on other data.
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(chosen, key=lambda path: (path != NOTEBOOKS[1], path == NOTEBOOKS[3], path)):
            print(path.name, flush=True)
            store(path, folder)
