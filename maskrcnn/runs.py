"""Where runs and their artefacts lie, and which one is the newest. Needs no library.

A run is a folder below `runs/`: `config.json`, `log.jsonl`, `best.safetensors`, `last.safetensors`,
`state.safetensors` (to resume from), `pictures/`, `tensorboard/`, and what was made of it: `model.onnx`,
`model.fp16.xml` ….
"""

from __future__ import annotations

from pathlib import Path

from maskrcnn.errors import UserError
from maskrcnn.files import make_folder

FOLDER = Path("runs")
BEST, LAST, STATE = "best.safetensors", "last.safetensors", "state.safetensors"
CONFIG, LOG, ONNX = "config.json", "log.jsonl", "model.onnx"
EVENTS, PICTURES = "tensorboard", "pictures"  # folders


def next_run(parent: Path = FOLDER, prefix: str = "train") -> Path:
    """The path `parent/prefix-NUMBER` with the number after the highest there is."""
    numbers = [
        int(path.name.rpartition("-")[2])
        for path in parent.glob(f"{prefix}-*")
        if path.name.rpartition("-")[2].isdigit()
    ]
    return parent / f"{prefix}-{max(numbers, default=0) + 1}"


def claim_next(parent: Path = FOLDER, prefix: str = "train") -> Path:
    """Makes the folder of `next_run`; each of several processes that ask at once gets one of its own.

    Raises:
        UserError: where it cannot be made.
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
            came = f"folder {path} cannot be made ({error.strerror or error})"
            raise UserError(came, "a folder that can be written", "name one with --output") from error


def newest(pattern: str, *, what: str, make_with: str, parent: Path = FOLDER, variants: bool = True) -> Path:
    """The file matching `pattern` in any run that was written last.

    Args:
        variants: whether a name with several suffixes counts.

    Raises:
        UserError: when there is none; `what` and `make_with` (a command) word it.
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
    """The ONNX file exported last, in single precision; variants of it have a second suffix, as model.fp16.onnx."""
    return newest("*.onnx", what="ONNX file", make_with="maskrcnn export --onnx", variants=False)
