"""Paths of runs and their artefacts. Standard library only.

A run is a folder in `runs/`: `config.json`, `log.jsonl`, `best.safetensors`, `last.safetensors`, `state.safetensors`
(to resume from), `lock` (while it is trained), `pictures/`, `tensorboard/`, and files made from it: `model.onnx`,
`model.fp16.xml` ….
"""

from __future__ import annotations

from pathlib import Path

from maskrcnn.errors import UserError
from maskrcnn.files import make_folder

FOLDER = Path("runs")
BEST, LAST, STATE = "best.safetensors", "last.safetensors", "state.safetensors"
CONFIG, LOG, ONNX, LOCK = "config.json", "log.jsonl", "model.onnx", "lock"
EVENTS, PICTURES = "tensorboard", "pictures"  # folders


def next_run(parent: Path = FOLDER, prefix: str = "train") -> Path:
    """The path `parent/prefix-NUMBER` with the number after the highest existing one."""
    numbers = [
        int(path.name.rpartition("-")[2])
        for path in parent.glob(f"{prefix}-*")
        if path.name.rpartition("-")[2].isdigit()
    ]
    return parent / f"{prefix}-{max(numbers, default=0) + 1}"


def claim_next(parent: Path = FOLDER, prefix: str = "train") -> Path:
    """Create the folder of the next run; concurrent processes get different ones.

    Raises:
        UserError: if it cannot be created.
    """
    make_folder(parent)
    while True:
        path = next_run(parent, prefix)
        try:
            path.mkdir()
            return path
        except FileExistsError:  # another process was faster
            continue
        except OSError as error:
            found = f"folder {path} cannot be created ({error.strerror or error})"
            raise UserError(found, "a writable folder", "choose one with --output") from error


def newest(pattern: str, *, what: str, make_with: str, parent: Path = FOLDER, variants: bool = True) -> Path:
    """The most recently written file matching `pattern` in any run.

    Args:
        pattern: glob pattern of the file name.
        what: kind of file, for the error.
        make_with: command that creates it, for the error.
        parent: folder of the runs.
        variants: include names with several suffixes.

    Raises:
        UserError: if no file matches.
    """
    found = sorted(parent.glob(f"*/{pattern}"), key=lambda path: path.stat().st_mtime)
    if not variants:
        found = [path for path in found if len(path.suffixes) == 1]
    if not found:
        raise UserError(f"no {what} in {parent}/", f"a file {parent}/*/{pattern}", f"run `{make_with}` first")
    return found[-1]


def newest_checkpoint() -> Path:
    """The best checkpoint of the newest run that has one."""
    return newest(BEST, what="checkpoint", make_with="maskrcnn train")


def newest_onnx() -> Path:
    """The newest exported ONNX file in single precision; variants have a second suffix (model.fp16.onnx)."""
    return newest("*.onnx", what="ONNX file", make_with="maskrcnn export --onnx", variants=False)
