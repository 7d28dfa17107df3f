"""Detection on a Ray cluster: a Ray Data pipeline whose pool of actors reads images, detects, and writes Parquet.

The unit of work is a block of images, which produces one output file. The actor that processes a block also writes its
file. The file name depends on the images of the block, so a block repeated after an actor has died replaces its own
file. Each block returns only one row of counts to the driver. The model file is put into Ray's object store, which
transfers it to each node once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError, missing_library, reason_of
from maskrcnn.runtime.predictions import Record, write_parquet
from maskrcnn.runtime.tiles import Tiles

_CONNECT_S = 10.0
_BLOCK = 32  # images per block, the unit that is repeated when an actor dies
_MOST_BLOCKS = 20_000  # maximum per run; beyond it blocks get larger, as the driver keeps a list of them

Images = Sequence[tuple[int, str]]  # image id and name of each image


@dataclass(frozen=True)
class Pool:
    """The actors of a run."""

    least: int = 1
    most: int | None = None  # Ray adds actors while there is work and capacity; None: as many as fit
    cpus: float = 1  # per actor; also the number of threads of its model
    gpus: float = 0


def blocks_of(images: Images) -> dict[str, Images]:
    """Returns the blocks of a run by file name."""
    size = max(_BLOCK, -(-len(images) // _MOST_BLOCKS))
    blocks = [images[start : start + size] for start in range(0, len(images), size)]
    return {
        f"{number:06d}-{hashlib.sha256(json.dumps(block).encode()).hexdigest()[:16]}.parquet": block
        for number, block in enumerate(blocks)
    }


def detect_blocks(
    blocks: Mapping[str, Images],
    folder: str,
    model: Path,
    options: dict[str, Any],
    about: dict[str, Any],
    pool: Pool,
    *,
    tiles: Tiles | None = None,
    batch: int = 1,
    strict: bool = False,
) -> Iterator[tuple[int, int, dict[int, str]]]:
    """Detects in blocks of images on the cluster of `connected`; writes a file per block with a row per detection.

    Args:
        blocks: see `blocks_of`; every node must be able to read the images.
        folder: path or URL that every node can write to.
        model: the model file.
        options: other arguments of `Detector.load`.
        about: metadata of the Parquet files.
        pool: number and resources of the actors.
        tiles: tiles for larger images; None: each image is processed as a whole.
        batch: maximum number of images of one size, or of tiles, per model call.
        strict: stop the run at the first image that cannot be used.

    Yields:
        For each completed block: the numbers of images and detections, and the errors of images that could not be
        used, by image id.

    Raises:
        UserError: for an unusable image with `strict`; if the folder cannot be written, or the run fails.
    """
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"name": name, "images": json.dumps(block)} for name, block in blocks.items()]  # ASCII, whatever the names
    options = {**options, **_threads(options, pool)}
    actor: Any = _DetectionActor
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        actor,
        fn_constructor_args=(ray.put(_files_of(model)), model.name, options, folder, about, tiles, batch, strict),
        compute=ray.data.ActorPoolStrategy(min_size=pool.least, max_size=pool.most),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    try:
        for row in done.iter_rows():
            yield row["images"], row["detections"], {int(key): text for key, text in json.loads(row["failed"]).items()}
    except Exception as error:  # Ray wraps exceptions of actors in several ways
        cause = _user_error_in(error)
        if cause is not None:
            raise cause from error
        raise UserError(
            f"the run on Ray failed ({type(error).__name__}: {reason_of(error)[:2000]})",
            "nodes that can import maskrcnn, read the images and write the output",
            "see the logs of Ray (/tmp/ray/session_latest/logs on each node)",
        ) from error


class _DetectionActor:
    """A Ray Data actor that detects in blocks of images and writes their files."""

    def __init__(
        self,
        files: Any,
        name: str,
        options: dict[str, Any],
        folder: str,
        about: dict[str, Any],
        tiles: Tiles | None,
        batch: int,
        strict: bool,
    ) -> None:
        import ray

        from maskrcnn.runtime.detector import Detector

        content: dict[str, bytes] = ray.get(files) if isinstance(files, ray.ObjectRef) else files
        self.detector = Detector.load(_unpacked(content) / name, **options)
        self._folder, self._about, self._tiles, self._batch, self._strict = folder, about, tiles, batch, strict

    def __call__(self, block: dict[str, str]) -> dict[str, Any]:
        images: list[tuple[int, str]] = [(image_id, name) for image_id, name in json.loads(block["images"])]
        failed: dict[int, str] = {}
        count = write_parquet(self._records(images, failed), f"{self._folder}/{block['name']}", self._about)
        return {"images": len(images), "detections": count - len(failed), "failed": json.dumps(failed)}

    def _records(self, images: Images, failed: dict[int, str]) -> Iterator[Record]:
        """The records of a block; errors of images are also stored in `failed`."""
        from maskrcnn.data.sources import ImageItem
        from maskrcnn.runtime.pipeline import detect_images
        from maskrcnn.runtime.predictions import record_of
        from maskrcnn.runtime.tiles import detect_scenes

        def finish(item: ImageItem, _: Any, orientation: int, detections: Any) -> Record:
            return record_of(item, number[item], orientation, detections, self.detector.metadata)

        items = [ImageItem(name) for _, name in images]
        number = {item: image_id for item, (image_id, _) in zip(items, images, strict=True)}
        if self._tiles is None:
            results = detect_images(self.detector, items, finish, batch=self._batch)
        else:
            results = detect_scenes(self.detector, items, finish, self._tiles, batch=self._batch)
        for item, found in results:
            if not isinstance(found, UserError):
                yield found
            elif self._strict:
                raise found
            else:
                failed[number[item]] = found.found
                yield {"image_id": number[item], "file": item.name, "error": found.found}


def ray_package() -> Any:
    """Imports Ray with Ray Data; raises `UserError` if it is missing."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise missing_library("ray", "predict on a cluster", "pip install 'maskrcnn[ray]'") from error
    return ray


@contextmanager
def connected(address: str, pool: Pool) -> Iterator[None]:
    """Connects to a Ray cluster that can run a pool; disconnects at the end unless the caller was already connected.

    Args:
        address: "local" starts Ray on this machine; otherwise passed to `ray.init`, such as "auto" or "ray://HOST:10001".
        pool: pool whose minimum number of actors must fit.

    Raises:
        UserError: if Ray is missing, there is no cluster at the address, or it lacks resources for the actors.
    """
    ray = ray_package()
    if ray.is_initialized():
        _check_resources(ray, pool)
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        place = address.rpartition("://")[2]
        if ":" in place:  # otherwise Ray waits for a minute and ends the process
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
        _check_resources(ray, pool)
        yield
    finally:
        ray.shutdown()


def _check_resources(ray: Any, pool: Pool) -> None:
    """Raises if the cluster cannot start the minimum number of actors."""
    total = ray.cluster_resources()
    for name, needed in (("CPU", pool.cpus * pool.least), ("GPU", pool.gpus * pool.least)):
        if needed > total.get(name, 0):
            raise UserError(
                f"{pool.least} actors need {needed:g} {name}s; the cluster has {total.get(name, 0):g}",
                "enough resources for all actors",
                "use fewer --actors, or lower --actor-cpus and --actor-gpus",
            )


def _threads(options: dict[str, Any], pool: Pool) -> dict[str, Any]:
    """The `threads` option of an actor's model, for backends that support it."""
    on_gpu = pool.gpus > 0 or str(options.get("backend") or "").partition(":")[0] in ("torch", "tensorrt")
    return {} if on_gpu else {"threads": max(1, int(pool.cpus))}


def _files_of(model: Path) -> dict[str, bytes]:
    """Contents of the model file and its companion files, by name."""
    weights, metadata = model.with_suffix(".bin"), model.with_name(f"{model.name}.json")  # OpenVINO, TensorRT
    return {file.name: file.read_bytes() for file in (model, weights, metadata) if file.is_file()}


def _unpacked(files: dict[str, bytes]) -> Path:
    """Writes the files to a local folder, shared by the actors of a node, and returns the folder."""
    from maskrcnn.files import atomic_path, cache_folder

    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(name.encode("utf-8", "surrogatepass") + content)
    folder = cache_folder() / "models" / digest.hexdigest()
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != len(content):
            with atomic_path(path) as draft:
                draft.write_bytes(content)
    return folder


def _user_error_in(error: BaseException | None) -> UserError | None:
    """The UserError that caused a Ray error, if any."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
