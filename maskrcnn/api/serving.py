"""`maskrcnn.triton(...)` and `maskrcnn.web(...)`: a model repository for NVIDIA's Triton server, and a web page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from maskrcnn.api.progress import Progress
from maskrcnn.api.results import Result
from maskrcnn.errors import UserError


class MaskFormat(str, Enum):
    """Format of the masks that clients receive."""

    RLE = "rle"  # COCO's compressed run lengths
    BITS = "bits"  # eight pixels per byte
    NONE = "none"


class NetworkStep(str, Enum):
    """The backend that runs the network on the server."""

    NATIVE = "native"  # Triton's backend for the file: ONNX Runtime, OpenVINO or TensorRT
    PYTHON = "python"  # Triton's Python backend, with maskrcnn's backends


class InstanceKind(str, Enum):
    """Where a server runs ONNX files."""

    AUTO = "auto"  # on a GPU if present
    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True, repr=False)
class ServedModelResult(Result):
    """A model file in a repository."""

    name: str  # model name that clients use
    path: Path
    precision: str
    backend: str  # Triton's backend
    version: int
    is_new: bool  # False if the newest version already was this file
    models: list[str]  # the models of the repository that it consists of
    needs: list[str]  # requirements on the server

    def lines(self) -> list[str]:
        """The result as lines of text."""
        state = "written" if self.is_new else "exists already"
        return [
            f"{self.name}: {self.path} in {self.precision} on Triton's {self.backend} backend, "
            f"version {self.version} {state}",
            f"  models: {', '.join(self.models)}",
            *(f"  needs: {need}" for need in self.needs),
        ]


@dataclass(frozen=True, repr=False)
class TritonResult(Result):
    """A model repository, and the command that serves it."""

    out: Path
    served: list[ServedModelResult]
    command: str  # with the repository at /models

    def lines(self) -> list[str]:
        """The result as lines of text."""
        models = [line for model in self.served for line in model.lines()]
        return [*models, f"start, with {self.out} at /models: {self.command}"]


def triton(
    models: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    name: str | None = None,
    raw: bool = False,
    network: NetworkStep | str = NetworkStep.NATIVE,
    masks: MaskFormat | str = MaskFormat.RLE,
    min_score: float = 0.0,
    max_batch: int | None = None,
    queue_delay: int = 0,
    pad_to: Sequence[tuple[int, int]] = (),
    instances: int = 1,
    step_instances: int = 2,
    kind: InstanceKind | str = InstanceKind.AUTO,
    threads: int = 0,
    cuda_graphs: bool = True,
    plugin_library: str | Path | None = None,
    keep_config: bool = False,
    progress: Progress | None = None,
) -> TritonResult:
    """Writes model files to a model repository: image files in, detections out.

    Args:
        models: ONNX files, TensorRT engines, OpenVINO engines (`.xml`).
        out: folder of the repository; an existing one receives another version of each model.
        name: model name that clients use, for a single model. Default: from the file name.
        raw: write only the network: tensors in, tensors out.
        network: backend of the network: "native", Triton's backend for the file, or "python", Triton's Python backend
            with maskrcnn's backends.
        masks: format of the masks: "rle", "bits" or "none".
        min_score: minimum score of a detection to send.
        max_batch: maximum batch size. Default: 8, or the engine's maximum.
        queue_delay: microseconds that a request waits to be batched with others.
        pad_to: (height, width) in pixels that images are padded to, as only images of equal size are batched.
        instances: number of instances of the network on each GPU.
        step_instances: number of processes for each step before and after the network.
        kind: device for ONNX files: "auto", "gpu" or "cpu".
        threads: number of threads per CPU instance; 0: the runtime's default.
        cuda_graphs: run TensorRT engines as CUDA graphs.
        plugin_library: libmaskrcnn_plugins.so, for engines that use it. Default: from the cache.
        keep_config: add versions under existing configurations, even if these differ.
        progress: receives the steps.

    Raises:
        UserError: for files that cannot be served, and existing configurations that differ.
    """
    from maskrcnn.runtime.serving.models import ServingOptions, served_model
    from maskrcnn.runtime.serving.triton import default_name, write_repository

    progress, out = progress or Progress(), Path(out)
    paths = [Path(path) for path in ([models] if isinstance(models, (str, Path)) else models)]
    options = ServingOptions(
        max_batch=max_batch,
        instances=instances,
        step_instances=step_instances,
        kind=_value(kind),
        queue_delay_us=queue_delay,
        pad_to=tuple(pad_to),
        masks=_value(masks),
        min_score=min_score,
        threads=threads,
        cuda_graphs=cuda_graphs,
    )
    if name is not None and len(paths) > 1:
        raise UserError(f"--name {name} for {len(paths)} models", "one model", "drop it, or pass a single model")
    library = None if plugin_library is None else Path(plugin_library)
    served = [
        (name or default_name(path), served_model(path, plugin_library=library, network=_value(network)))
        for path in paths
    ]
    with progress.task(f"writing {out}"):
        written = write_repository(out, served, options, raw=raw, keep_config=keep_config)
    results, flags = [], []
    for each, (_, model) in zip(written, served, strict=True):
        folder = f"/models/{each.models[0]}/{each.version}"
        flags += [flag.format(folder=folder) for flag in model.flags]
        results.append(
            ServedModelResult(
                name=each.name,
                path=model.path,
                precision=model.metadata.precision,
                backend=model.backend,
                version=each.version,
                is_new=each.is_new,
                models=list(each.models),
                needs=list(model.needs),
            )
        )
    command = shlex.join(["tritonserver", "--model-repository=/models", *dict.fromkeys(flags)])
    return TritonResult(out, results, command)


@dataclass(frozen=True, repr=False)
class WebResult(Result):
    """The folder of a web page."""

    out: Path
    files: list[Path]
    size_mb: float
    detections: int  # number of detections in the image of the page's browser check

    def lines(self) -> list[str]:
        """The result as lines of text."""
        count = self.detections or "none, so the check proves nothing: use --image with a photo of the model's classes"
        return [
            f"{self.out}: {len(self.files)} files, {self.size_mb:.1f} MB",
            f"detections in the image that checks a browser: {count}",
            f"open: python -m http.server --directory {shlex.quote(str(self.out))} 8000, then http://localhost:8000",
        ]


def web(
    model: str | Path,
    out: str | Path,
    *,
    onnxruntime_web: str | Path | None = None,
    image: str | Path | None = None,
    progress: Progress | None = None,
) -> WebResult:
    """Writes a static web page that runs an ONNX file in the browser.

    Args:
        model: file written by `maskrcnn export --onnx`.
        out: folder: new, empty, or that of an earlier page, which is replaced.
        onnxruntime_web: the npm package onnxruntime-web, a folder or `.tgz`. Default: downloaded with npm.
        image: file with objects of the model's classes, for the page's check of a browser. Default: drawn shapes.
        progress: receives the steps.

    Raises:
        UserError: for a model that the page cannot run, a folder with other files, an image that cannot be read or is
            too large, and a runtime that is missing or has another version.
    """
    from maskrcnn.runtime.serving.web import write_page

    package, photo = (None if path is None else Path(path) for path in (onnxruntime_web, image))
    with (progress or Progress()).task(f"writing {out}"):
        files, detections = write_page(Path(model), Path(out), onnxruntime_web=package, image=photo)
    return WebResult(Path(out), files, sum(path.stat().st_size for path in files) / 1e6, detections)


def _value(choice: Enum | str) -> str:
    return str(choice.value) if isinstance(choice, Enum) else choice
