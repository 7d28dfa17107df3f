"""Model repositories for NVIDIA's Triton Inference Server.

Of each model file `NAME`: the network itself, and unless it is to be served bare, a step before it, a step after it,
and an ensemble of the three that clients call. A repository that is there gets a further version; nothing in it is
changed or removed.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.files import atomic_path, make_folder
from maskrcnn.metadata import sha256_of
from maskrcnn.runtime.serving import config as pbtxt
from maskrcnn.runtime.serving.config import (
    Warmup,
    ensemble_config,
    image_file,
    network_config,
    post_config,
    pre_config,
    size_file,
    warmup_batches,
)
from maskrcnn.runtime.serving.models import Served, Serving, names_of

CONFIG, METADATA, LABELS, KEYPOINTS = "config.pbtxt", "metadata.json", "labels.txt", "keypoints.txt"
_WARMUP = "warmup"  # the folder where Triton looks for input_data_file
# What the steps import; a test runs them with nothing else.
STEP_MODULES = (
    *("__init__", "errors", "metadata", "data/__init__", "data/images"),
    *("imaging/__init__", "imaging/preprocess", "imaging/postprocess", "imaging/paste", "imaging/run_lengths"),
)
_PACKAGE = Path(inspect.getfile(UserError)).parent
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Written:
    """What became of one model file."""

    name: str  # for clients
    version: int
    models: tuple[str, ...]  # of the repository that it consists of
    is_new: bool  # False: this very file is the newest version already


@dataclass(frozen=True)
class _Model:
    """One model of the repository: its configuration, and what a new version of it holds."""

    name: str
    config: str
    files: dict[str, Path]  # to copy, by name
    texts: dict[str, str]  # to write, by name
    warmup: tuple[Warmup, ...] = ()


def write_models(
    out: Path,
    served: Sequence[tuple[str, Served]],
    serving: Serving,
    *,
    is_bare: bool = False,
    keeps_config: bool = False,
) -> list[Written]:
    """Writes model files to a repository, each as a new version of its name.

    Args:
        out: the repository's folder; it may hold other models, and earlier versions of these.
        served: names for clients, and what `read_served` gave.
        serving: how they are served.
        is_bare: write the networks alone.
        keeps_config: where a model is there with another configuration, leave that and add the version.

    Raises:
        UserError: before anything is written: for names that cannot be used, where a configuration that is there says
            otherwise, and as `serving.options` raises.
    """
    parts = [(name, each, _models(name, each, serving, is_bare=is_bare)) for name, each in served]
    _check_names([model.name for _, _, models in parts for model in models])
    _check_folder(out)
    for _, _, models in parts:
        for model in models:
            _check_config(out / model.name, model, keeps_config=keeps_config)
    return [_write(out, name, each, models) for name, each, models in parts]


def default_name(path: Path) -> str:
    """A model's name by its file: `model.fp16.engine` becomes `model_fp16_tensorrt`."""
    runtimes = {".onnx": "onnx", ".engine": "tensorrt", ".xml": "openvino"}
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)
    return f"{stem}_{runtimes.get(path.suffix, path.suffix.lstrip('.'))}"


def _models(name: str, served: Served, serving: Serving, *, is_bare: bool) -> list[_Model]:
    names = names_of(name)
    metadata = {METADATA: served.metadata.to_json() + "\n"}
    warmup = tuple(warmup_batches(served, serving))
    network = network_config(served, serving, names["network"], warmup)
    models = [_Model(names["network"], _text(network), served.files, metadata, warmup)]
    if is_bare:
        return models
    copied = {f"maskrcnn/{module}.py": _PACKAGE / f"{module}.py" for module in STEP_MODULES}
    listed = {LABELS: served.metadata.class_names, KEYPOINTS: served.metadata.keypoint_names}
    labels = {file: "".join(f"{name}\n" for name in names) for file, names in listed.items() if names}
    for part, config in (("pre", pre_config), ("post", post_config)):
        text = _text(config(served, serving, names[part]))
        models.append(_Model(names[part], text, {"model.py": _HERE / f"{part}.py", **copied}, metadata))
    ensemble = ensemble_config(served, serving, name)
    return [*models, _Model(name, _text(ensemble), {}, labels)]


def _text(config: dict) -> str:
    return f"# Written by `maskrcnn triton`; see docs/serving.md.\n{pbtxt.text_of(config)}"


# What is there already


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    odd = sorted(name for name in names if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name))
    if twice or odd:
        came = f"two models of the name {twice[0]}" if twice else f"a model of the name {odd[0]!r}"
        raise UserError(came, "a name of its own for each, of letters, digits, -, _ and .", "choose one with --name")


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file", "the folder of a model repository, or a new one", "choose another folder")
    if (out / CONFIG).exists() or (out.is_dir() and any(path.name.isdigit() for path in out.iterdir())):
        raise UserError(
            f"{out}: the folder of one model ({CONFIG} or versions in it)",
            "the folder that holds models",
            f"name the folder above it: {out.parent}",
        )


def _check_config(folder: Path, model: _Model, *, keeps_config: bool) -> None:
    """Refuses a model that is there with another configuration."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file", "a model's folder, or nothing", "choose another --name")
    path = folder / CONFIG
    if keeps_config or not path.is_file() or path.read_text(encoding="utf-8") == model.config:
        return
    present, wanted = path.read_text(encoding="utf-8").splitlines(), model.config.splitlines()
    there = next((line for line in present if line not in wanted), "other lines").strip()
    here = next((line for line in wanted if line not in present), "other lines").strip()
    raise UserError(
        f"{path} says `{there}`, this model and these options `{here}`",
        "the same configuration for all versions of a model",
        "choose another --name, or add the version under the present configuration with --keep-config",
    )


def _versions(folder: Path) -> list[int]:
    # Triton ignores names that begin with 0.
    found = (path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()
    return sorted(int(name) for name in found if name.isdigit() and not name.startswith("0"))


def _version(out: Path, served: Served, models: Sequence[_Model]) -> tuple[int, bool]:
    """The version to write, the same in all models, and whether the newest one is this very file already."""
    newest = max((number for model in models for number in _versions(out / model.name)), default=0)
    folder = out / models[0].name / str(newest)
    present = [folder / name for name in served.files]
    is_there = newest > 0 and all(path.is_file() for path in present)
    if is_there and all(map(_is_equal, present, served.files.values())):
        return newest, True
    return newest + 1, False


def _is_equal(path: Path, other: Path) -> bool:
    return path.stat().st_size == other.stat().st_size and sha256_of(path) == sha256_of(other)


# Writing


def _write(out: Path, name: str, served: Served, models: Sequence[_Model]) -> Written:
    version, is_there = _version(out, served, models)
    missing = [model for model in models if not (out / model.name / str(version)).is_dir()]
    with contextlib.ExitStack() as drafts:
        ready = [(drafts.enter_context(_draft(out / model.name, model)), model) for model in missing]
        # A configuration without a version is not served; a version without its configuration would be, as Triton
        # guesses it. The ensemble comes last, as it needs the others.
        for draft, model in ready:
            folder = out / model.name
            if not (folder / CONFIG).is_file():
                _write_warmup(folder, model.warmup)
                with atomic_path(folder / CONFIG) as path:
                    path.write_text(model.config, encoding="utf-8", newline="\n")
            draft.rename(folder / str(version))
    return Written(name, version, tuple(model.name for model in models), is_new=not (is_there and not missing))


@contextlib.contextmanager
def _draft(folder: Path, model: _Model) -> Iterator[Path]:
    """A version's content under a name that Triton ignores; gone afterwards, unless it was renamed."""
    path = folder / f".version-{secrets.token_hex(4)}"
    make_folder(path)
    try:
        for name, source in model.files.items():
            make_folder((path / name).parent)
            shutil.copyfile(source, path / name)
        for name, text in model.texts.items():
            (path / name).write_text(text, encoding="utf-8", newline="\n")
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _write_warmup(folder: Path, batches: Sequence[Warmup]) -> None:
    """The images that instances see first: drawn shapes, not noise, so that there are detections to work on.

    A file holds one image. Triton repeats it where it batches; elsewhere a warm-up is one image.
    """
    for size in {size for _, size in batches}:
        image = shapes_image(np.random.default_rng(0), size)[0]
        pixels = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)
        for name, value in ((image_file(size), pixels), (size_file(size), np.array(size, np.int64))):
            with atomic_path(folder / _WARMUP / name) as path:
                value.tofile(path)
