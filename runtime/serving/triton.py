"""Model repositories for NVIDIA's Triton Inference Server.

For each model file, the repository gets the network and, unless `raw`, a step before it, a step after it, and an
ensemble of the three for clients. In an existing repository a version is added; nothing is changed or removed.
"""

from __future__ import annotations

import contextlib
import importlib
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
from maskrcnn.imaging.preprocess import channels_from_rgb
from maskrcnn.metadata import ModelMetadata, sha256_of
from maskrcnn.runtime.serving.config import (
    Message,
    Warmup,
    ensemble_config,
    image_file,
    network_config,
    post_config,
    pre_config,
    size_file,
    to_pbtxt,
    warmup_batches,
)
from maskrcnn.runtime.serving.models import ServedModel, ServingOptions, model_names

_CONFIG, _METADATA, _LABELS, _KEYPOINTS = "config.pbtxt", "metadata.json", "labels.txt", "keypoints.txt"
# A file that prevents Python from creating its bytecode folder, which a polling server would treat as a change and load
# the model again.
_NO_BYTECODE = {"__pycache__": ""}
_WARMUP = "warmup"  # folder in which Triton finds input_data_file
# Modules that the steps import, copied to the same folder; a test runs the steps with only these.
STEP_MODULES = (
    *("__init__", "errors", "files", "metadata", "data/__init__", "data/images"),
    *("imaging/__init__", "imaging/preprocess", "imaging/postprocess", "imaging/paste", "imaging/run_lengths"),
)
# What the network step imports (`--network python`): packages without PyTorch, and the sources of the kernels. Their
# hash is needed to check a TensorRT engine.
_NETWORK_FILES = {
    "maskrcnn": ("*.py", "data/__init__.py", "data/images.py", "imaging/*.py"),
    "maskrcnn.plugins": ("*.py", "csrc/**/*"),
    "maskrcnn.runtime": ("*.py", "backends/*.py", "build/*.py", "gpu/*.py"),
}
_PACKAGE = Path(inspect.getfile(UserError)).parent
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class WrittenModel:
    """A model file in a repository."""

    name: str  # for clients
    version: int
    models: tuple[str, ...]  # names of its models in the repository
    is_new: bool  # False if the newest version already has this file


@dataclass(frozen=True)
class _RepositoryModel:
    """One model of a repository: its configuration, and the content of a new version."""

    name: str
    config: str
    files: dict[str, Path]  # to copy, by name
    texts: dict[str, str]  # to write, by name
    warmup: tuple[Warmup, ...] = ()
    channels: int = 3  # of the warm-up images


def write_repository(
    out: Path,
    served: Sequence[tuple[str, ServedModel]],
    options: ServingOptions,
    *,
    raw: bool = False,
    keep_config: bool = False,
) -> list[WrittenModel]:
    """Writes model files to a repository, each as a new version of its name.

    Args:
        out: folder of the repository; it may contain other models, and earlier versions of these.
        served: model files by their names for clients.
        options: serving options.
        raw: write the networks only.
        keep_config: add versions to existing models, even if the configurations differ.

    Raises:
        UserError: before anything is written, for names that Triton rejects, for existing configurations that differ,
            and as `batch_limit` and `size_ranges` do.
    """
    parts = [(name, model, _models(name, model, options, raw=raw)) for name, model in served]
    _check_names([model.name for _, _, models in parts for model in models])
    _check_folder(out)
    for _, _, models in parts:
        for model in models:
            _check_config(out / model.name, model, keep_config=keep_config)
    return [_write(out, name, model, models) for name, model, models in parts]


def default_name(path: Path) -> str:
    """Returns the name of a model file on the server: `model.fp16.engine` becomes `model_fp16_tensorrt`."""
    runtimes = {".onnx": "onnx", ".engine": "tensorrt", ".xml": "openvino"}
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)
    return f"{stem}_{runtimes.get(path.suffix, path.suffix.lstrip('.'))}"


def _models(name: str, served: ServedModel, options: ServingOptions, *, raw: bool) -> list[_RepositoryModel]:
    names = model_names(name)
    metadata = {_METADATA: served.metadata.to_json() + "\n"}
    warmup, channels = tuple(warmup_batches(served, options)), served.metadata.preprocessing.channels
    network = network_config(served, options, names["network"], warmup)
    files, texts = dict(served.files), dict(metadata)
    if served.backend == "python":
        files, texts = files | _network_step(), texts | _NO_BYTECODE
    models = [_RepositoryModel(names["network"], _text(network), files, texts, warmup, channels)]
    if raw:
        return models
    copied = {f"maskrcnn/{module}.py": _PACKAGE / f"{module}.py" for module in STEP_MODULES}
    lists = {_LABELS: served.metadata.class_names, _KEYPOINTS: served.metadata.keypoint_names}
    labels = {file: "".join(f"{entry}\n" for entry in entries) for file, entries in lists.items() if entries}
    for part, config in (("pre", pre_config), ("post", post_config)):
        text = _text(config(served, options, names[part]))
        files = {"model.py": _HERE / f"{part}.py", **copied}
        models.append(_RepositoryModel(names[part], text, files, metadata | _NO_BYTECODE))
    ensemble = ensemble_config(served, options, name)
    return [*models, _RepositoryModel(name, _text(ensemble), {}, labels)]


def _network_step() -> dict[str, Path]:
    """The files of the network in the Python backend, by name in the version's folder."""
    files = {"model.py": _HERE / "network.py"}
    for package, patterns in _NETWORK_FILES.items():
        (root,) = importlib.import_module(package).__path__
        found = [path for pattern in patterns for path in Path(root).glob(pattern) if path.is_file()]
        files |= {f"{package.replace('.', '/')}/{path.relative_to(root).as_posix()}": path for path in sorted(found)}
    return files


def _text(config: Message) -> str:
    return f"# Written by `maskrcnn triton`; see docs/serving.md.\n{to_pbtxt(config)}"


# Checks of an existing repository


def _check_names(names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    invalid = sorted(name for name in names if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name))
    if repeated or invalid:
        found = f"two models named {repeated[0]}" if repeated else f"a model named {invalid[0]!r}"
        raise UserError(found, "a unique name for each, made of letters, digits, -, _ and .", "choose one with --name")


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file", "the folder of a model repository, or a new one", "choose another folder")
    if (out / _CONFIG).exists() or (out.is_dir() and any(path.name.isdigit() for path in out.iterdir())):
        raise UserError(
            f"{out}: the folder of one model ({_CONFIG} or versions in it)",
            "the folder that holds models",
            f"pass the parent folder: {out.parent}",
        )


def _check_config(folder: Path, model: _RepositoryModel, *, keep_config: bool) -> None:
    """Raises if the model exists with another configuration or another version of the contract."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file", "a model's folder, or nothing", "choose another --name")
    for version in _versions(folder)[-1:]:
        metadata = folder / str(version) / _METADATA
        if metadata.is_file():
            ModelMetadata.from_json(metadata.read_text(encoding="utf-8"), metadata)
    path = folder / _CONFIG
    if keep_config or not path.is_file() or path.read_text(encoding="utf-8") == model.config:
        return
    present, new = path.read_text(encoding="utf-8").splitlines(), model.config.splitlines()
    present_line = next((line for line in present if line not in new), "other lines").strip()
    new_line = next((line for line in new if line not in present), "other lines").strip()
    raise UserError(
        f"{path} has `{present_line}`; this model and these options require `{new_line}`",
        "the same configuration for all versions of a model",
        "choose another --name, or add the version under the existing configuration with --keep-config",
    )


def _versions(folder: Path) -> list[int]:
    # Triton ignores names that begin with 0.
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit() and not name.startswith("0"))


def _version(out: Path, served: ServedModel, models: Sequence[_RepositoryModel]) -> tuple[int, bool]:
    """Returns the version to write, equal in all models, and whether the newest version already has this file."""
    newest = max((number for model in models for number in _versions(out / model.name)), default=0)
    folder = out / models[0].name / str(newest)
    present = [folder / name for name in served.files]
    exists = newest > 0 and all(path.is_file() for path in present)
    if exists and all(map(_is_equal, present, served.files.values())):
        return newest, True
    return newest + 1, False


def _is_equal(path: Path, other: Path) -> bool:
    return path.stat().st_size == other.stat().st_size and sha256_of(path) == sha256_of(other)


# Writing


def _write(out: Path, name: str, served: ServedModel, models: Sequence[_RepositoryModel]) -> WrittenModel:
    version, exists = _version(out, served, models)
    missing = [model for model in models if not (out / model.name / str(version)).is_dir()]
    with contextlib.ExitStack() as drafts:
        ready = [(drafts.enter_context(_draft(out, model)), model) for model in missing]
        # First the configuration: Triton ignores a configuration without a version, but generates a configuration for a
        # version without one. The ensemble is last, as it uses the others.
        for draft, model in ready:
            folder = out / model.name
            make_folder(folder)
            if not (folder / _CONFIG).is_file():
                _write_warmup(folder, model.warmup, model.channels)
                with atomic_path(folder / _CONFIG) as path:
                    path.write_text(model.config, encoding="utf-8", newline="\n")
            draft.rename(folder / str(version))
    return WrittenModel(name, version, tuple(model.name for model in models), is_new=not (exists and not missing))


@contextlib.contextmanager
def _draft(out: Path, model: _RepositoryModel) -> Iterator[Path]:
    """Writes a version under a temporary name, for the caller to rename; otherwise it is deleted at the end.

    The draft is written next to the repository: a polling server treats a folder in the repository as a model, and
    reloads the existing versions of a model when its folder changes. If renaming from there is impossible (the
    repository is a mount, or its parent folder is read-only), the draft is written in the model's folder, which may
    cause a second load.
    """
    make_folder(out)
    name = f".{model.name}.version-{secrets.token_hex(4)}"
    above = out.resolve().parent if _renames_into(out, out.resolve().parent / name) else out / model.name
    path = above / name
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


def _renames_into(folder: Path, file: Path) -> bool:
    """Returns whether an empty file at this path can be renamed into the folder; deletes the file."""
    try:
        file.touch()
        file.rename(folder / file.name)
    except OSError:
        return False
    finally:
        for path in (file, folder / file.name):
            path.unlink(missing_ok=True)
    return True


def _write_warmup(folder: Path, batches: Sequence[Warmup], channels: int) -> None:
    """Writes warm-up images with drawn shapes, so that there are detections to process.

    A file contains one image. Triton repeats it if it batches; otherwise the warm-up is one image.
    """
    for size in {size for _, size in batches}:
        image = channels_from_rgb(shapes_image(np.random.default_rng(0), size)[0], channels)
        pixels = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)
        for name, value in ((image_file(size), pixels), (size_file(size), np.array(size, np.int64))):
            with atomic_path(folder / _WARMUP / name) as path:
                value.tofile(path)
