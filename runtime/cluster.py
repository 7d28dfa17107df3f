"""Detection on a Ray cluster: read → detect in a pool of actors → write Parquet, as a pipeline of Ray Data.

Ray replaces actors that die and repeats their blocks; a block's file is written once, when it is complete. The model
file goes into Ray's object store, which moves it to each node once.
"""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError, missing_library, reason_of
from maskrcnn.runtime.predictions import parquet_schema, rows_of

_CONNECT_S = 10.0
_BLOCK = 32  # images of a block, the unit that is repeated when an actor dies


@dataclass(frozen=True)
class Pool:
    """The actors of a run."""

    least: int = 1
    most: int | None = None  # Ray adds actors as there is work and room; None: as many as fit
    cpus: float = 1  # of an actor, which are also the threads of its model
    gpus: float = 0


def detect_on_ray(
    address: str,
    images: Sequence[tuple[int, str]],
    model: Path,
    options: dict[str, Any],
    about: dict[str, Any],
    output: str,
    pool: Pool,
) -> tuple[int, dict[str, str]]:
    """Detects in images and writes Parquet files to a folder, one row per detection.

    Args:
        address: "local" starts Ray on this machine; else as `ray.init` takes it, such as "auto" or "ray://HOST:10001".
        images: image id and name of each; every node must be able to read the names.
        model: the model file.
        options: arguments of `Detector.load` besides the file.
        about: metadata of the Parquet files.
        output: folder or URL; must not have Parquet files.
        pool: number and resources of the actors.

    Returns:
        The number of detections, and what was wrong with the images that could not be used.

    Raises:
        UserError: if Ray is missing, there is no cluster at the address, or it lacks what an actor needs.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise missing_library("ray", "predict on a cluster", "pip install 'maskrcnn[ray]'") from error
    with _cluster(ray, address):
        _check_resources(ray, pool)
        files = ray.put(_files_of(model))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [{"image_id": image_id, "file": name} for image_id, name in images]
        blocks = max(1, min(len(rows), -(-len(rows) // _BLOCK)))
        found = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            _DetectionActor,
            fn_constructor_args=(files, model.name, {**options, **_threads(options, pool)}, about),
            batch_size=_BLOCK,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=pool.least, max_size=pool.most),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
        )
        try:
            found.write_parquet(output, ray_remote_args={"num_cpus": 0})  # the actors may hold all CPUs
        except Exception as error:  # Ray wraps what an actor raised, in several ways
            cause = _user_error_in(error)
            if cause is not None:
                raise cause from error
            raise UserError(
                f"the run on Ray failed ({type(error).__name__}: {reason_of(error)[:2000]})",
                "nodes that can import maskrcnn and read the images, and an output that they can write",
                "see the logs of Ray (/tmp/ray/session_latest/logs on each node)",
            ) from error
    return _outcome(output)


def _outcome(output: str) -> tuple[int, dict[str, str]]:
    """What `detect_on_ray` returns, from the files."""
    from pyarrow import dataset

    rows = dataset.dataset(output, format="parquet", schema=parquet_schema({}))
    failed = rows.to_table(columns=["file", "error"], filter=dataset.field("error").is_valid())
    names = dict(zip(failed["file"].to_pylist(), failed["error"].to_pylist(), strict=True))
    return rows.count_rows() - failed.num_rows, names


class _DetectionActor:
    """Detects in blocks of images; an actor of Ray Data."""

    def __init__(self, files: Any, name: str, options: dict[str, Any], about: dict[str, Any]) -> None:
        import ray

        from maskrcnn.runtime.detector import Detector

        content: dict[str, bytes] = ray.get(files) if isinstance(files, ray.ObjectRef) else files
        self.detector = Detector.load(_unpacked(content) / name, **options)
        self._about = about

    def __call__(self, block: Any) -> Any:
        import pyarrow

        rows = [row for record in self._records(block.to_pylist()) for row in rows_of(record)]
        return pyarrow.Table.from_pylist(rows, schema=parquet_schema(self._about))

    def _records(self, images: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        from maskrcnn.data.sources import ImageItem
        from maskrcnn.runtime.pipeline import detect_images
        from maskrcnn.runtime.predictions import record_of

        metadata = self.detector.metadata
        items = (ImageItem(each["file"]) for each in images)
        results = detect_images(self.detector, items, lambda *found: found)
        for each, (_, found) in zip(images, results, strict=True):
            if isinstance(found, UserError):
                yield {"image_id": each["image_id"], "file": each["file"], "error": found.found}
            else:
                item, _, orientation, detections = found
                yield record_of(item, each["image_id"], orientation, detections, metadata)


@contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    """A connection to Ray, which ends with the block unless the caller had one."""
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        place = address.rpartition("://")[2]
        if ":" in place:  # Ray itself waits for a minute and ends the process
            host, _, port = place.rpartition(":")
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        if address == "local":
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        else:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # ConnectionError, ValueError and others of Ray's own
        raise UserError(
            f"--ray {address}: no cluster ({reason_of(error)[:500]})",
            '"local" (this machine), "auto" (the cluster of this node), or ray://HOST:10001',
            "start one with `ray start --head`, or correct the address",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_resources(ray: Any, pool: Pool) -> None:
    """Refuses a pool whose first actors would wait for ever."""
    total = ray.cluster_resources()
    for name, needed in (("CPU", pool.cpus * pool.least), ("GPU", pool.gpus * pool.least)):
        if needed > total.get(name, 0):
            raise UserError(
                f"{pool.least} actors that need {needed:g} {name}s of a cluster with {total.get(name, 0):g}",
                "a cluster with room for all of them",
                "use fewer with --actors, or less for each with --actor-cpus and --actor-gpus",
            )


def _threads(options: dict[str, Any], pool: Pool) -> dict[str, Any]:
    """The threads of an actor's model, for the backends that take them."""
    on_gpu = pool.gpus > 0 or str(options.get("backend") or "").partition(":")[0] in ("torch", "tensorrt")
    return {} if on_gpu else {"threads": max(1, int(pool.cpus))}


def _files_of(model: Path) -> dict[str, bytes]:
    """The model file and those that belong to it, by name."""
    weights, metadata = model.with_suffix(".bin"), model.with_name(f"{model.name}.json")  # of OpenVINO, of TensorRT
    return {file.name: file.read_bytes() for file in (model, weights, metadata) if file.is_file()}


def _unpacked(files: dict[str, bytes]) -> Path:
    """A folder of this machine with the files, which the actors of a node share."""
    from maskrcnn.files import atomic_path, cache_folder

    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(name.encode() + content)
    folder = cache_folder() / "models" / digest.hexdigest()
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != len(content):
            with atomic_path(path) as draft:
                draft.write_bytes(content)
    return folder


def _user_error_in(error: BaseException | None) -> UserError | None:
    """The UserError that caused an error of Ray."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
