"""Sources of images: files, folders, patterns, lists, annotation files, videos, cameras, and remote storage.

`find_sources` turns the user's input into `Source`s, in order; `Source.images` yields their images one by one, so that
neither all frames of a video nor all images of a folder are in memory. Remote names (`s3://…`, `https://…`) are read
with fsspec, videos and cameras with PyAV.
"""

from __future__ import annotations

import glob
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from os import sep
from os.path import realpath
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from maskrcnn.data.images import (
    IMAGE_SUFFIXES,
    UNSEARCHED_SUFFIXES,
    ImageNotes,
    images_in,
    kinds_not_read,
    read_upright,
)
from maskrcnn.errors import UserError, missing_library, reason_of
from maskrcnn.files import atomic_path, files_below, parse_json
from maskrcnn.imaging.preprocess import Preprocessing

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")
_NAMED_SUFFIXES = (*IMAGE_SUFFIXES, ".npy")  # suffixes of images that a pattern matches
LIST_SUFFIXES = (".txt", ".json", ".parquet")
_LIVE = ("camera:", "/dev/video", "rtsp://", "rtsps://", "rtmp://", "udp://", "srt://")
_COLUMNS = (
    "file",
    "path",
    "file_name",
    "image",
    "uri",
    "url",
)  # columns of a Parquet file that may have the names of images
_KINDS = "image files, folders, patterns, lists (.txt, .json, .parquet), videos, cameras, or URLs of them"


@dataclass(frozen=True)
class Frame:
    """The position of an image in a video."""

    index: int  # from 0
    time_s: float | None  # from the start of the video; None: unknown
    pts: int | None  # presentation time in units of the stream's time base


@dataclass(frozen=True, eq=False)
class ImageItem:
    """One image to detect objects in."""

    name: str  # path, URL, or `video.mp4#12`
    pixels: np.ndarray | None = None  # uint8 [H, W, 3] RGB if the image is in memory; None: read from `name`
    frame: Frame | None = None

    @property
    def is_file(self) -> bool:
        """Whether the image is read from a local file."""
        return self.pixels is None and not is_remote(self.name)

    def read(self, preprocessing: Preprocessing, notes: ImageNotes) -> tuple[np.ndarray, int]:
        """The upright pixels, as from `read_image`, and the applied EXIF orientation (1: none).

        Raises:
            UserError: for an image that cannot be read.
        """
        if self.pixels is not None:
            return self.pixels, 1
        content = _remote_bytes(self.name) if is_remote(self.name) else Path(self.name)
        return read_upright(content, self.name, preprocessing, notes)


@dataclass(frozen=True, eq=False)
class Source:
    """An image, or a video with many images."""

    name: str
    pixels: np.ndarray | None = None  # pixels of an image in memory
    image_id: int | None = None  # id in the annotation file that lists the image
    is_video: bool = False

    @property
    def stem(self) -> str:
        """The name without folders and suffix."""
        if self.name.startswith("camera:"):
            return self.name.replace(":", "-")
        return PurePosixPath(self.name.partition("?")[0]).stem if "://" in self.name else Path(self.name).stem

    @property
    def is_live(self) -> bool:
        """Whether the source is a camera or a network stream, without an end."""
        return self.name.startswith(_LIVE)

    def images(self) -> Iterator[ImageItem]:
        """The image, or the frames of the video, upright.

        Raises:
            UserError: for a video that cannot be opened, has no frames, or is damaged after some.
        """
        if not self.is_video:
            yield ImageItem(self.name, self.pixels)
            return
        with opened_video(self) as container, _explained_video(self.name):
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            index = -1
            for index, frame in enumerate(container.decode(stream)):
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                place = Frame(index, None if frame.time is None else float(frame.time), frame.pts)
                yield ImageItem(f"{self.name}#{index}", np.ascontiguousarray(pixels), place)
            if index < 0:
                raise UserError(f"video {self.name} has no frames", "a video with frames", "restore the file")

    def length(self) -> int | None:
        """Number of images, for a video as stated in its header; None: unknown."""
        if not self.is_video:
            return 1
        if self.is_live:
            return None
        with opened_video(self) as container:
            stream = container.streams.video[0]
            if stream.frames:
                return int(stream.frames)
            if container.duration and stream.average_rate:
                return max(1, int(container.duration / 1e6 * float(stream.average_rate) + 0.5))
        return None


def find_sources(
    named: str | Path | np.ndarray | Iterable[str | Path | np.ndarray], *, leave_out: Path | None = None
) -> list[Source]:
    """The sources given by a user, in order; folders yield their images and those of their subfolders, sorted.

    Args:
        named: image files, folders, patterns (`photos/**/*.jpg`), lists (`.txt`: a name per line, `#` begins a
            comment; `.json`: a list of names, or an annotation file in COCO's format; `.parquet`: a column of names),
            videos, cameras (`camera:0`, `rtsp://…`), URLs that fsspec opens, or arrays uint8 `[H, W, 3]` RGB.
        leave_out: folder whose images are left out of folders that contain it.

    Raises:
        UserError: for a name without a file, a pattern without a match, a folder or list without images, a video that
            cannot be decoded, a missing library, and if nothing is given.
    """
    several = [named] if isinstance(named, (str, Path, np.ndarray)) or not isinstance(named, Iterable) else list(named)
    for each in several:
        if not isinstance(each, (str, Path, np.ndarray)):
            kind = f"an image that is a {type(each).__module__}.{type(each).__name__}"
            raise UserError(
                kind, f"{_KINDS}; or arrays uint8 [H, W, 3] RGB", "convert it, for example with numpy.asarray(image)"
            )
    found: list[Source] = []
    arrays = 0
    for each in several:
        if isinstance(each, np.ndarray):
            found.append(Source(str(arrays), each))
            arrays += 1
        else:
            found += _sources_of(str(each), leave_out)
    if not found:
        raise UserError("no images", _KINDS, "specify at least one")
    for source in found:
        if source.is_video and not source.is_live:
            with opened_video(source):  # reports an unsupported codec before any work
                pass
    return found


def left_out_of(named: Any) -> list[str]:
    """One line for each given folder and pattern with files that may be images but are not read."""
    several = [named] if isinstance(named, (str, Path)) else named if isinstance(named, (list, tuple)) else []
    lines = []
    for each in (str(one) for one in several if isinstance(one, (str, Path))):
        if Path(each).is_dir():
            files = files_below(Path(each), UNSEARCHED_SUFFIXES)
        elif not is_remote(each) and glob.has_magic(each) and not Path(each).exists():
            matches = (Path(match) for match in sorted(glob.glob(each, recursive=True)))
            files = [path for path in matches if path.suffix.lower() in {*UNSEARCHED_SUFFIXES} - {".npy"}]
        else:
            continue
        if files:
            kinds, fix = kinds_not_read(files, each)
            lines.append(f"{len(files)} file(s) {kinds} of {each} are left out, such as {files[0]}: {fix}")
    return lines


def is_remote(name: str) -> bool:
    """Whether a name is a URL for fsspec."""
    return "://" in name and not name.startswith(_LIVE)


@contextmanager
def open_source(name: str) -> Iterator[IO[bytes]]:
    """Opens a local file, or a remote file with fsspec.

    Raises:
        UserError: if it cannot be opened: missing file, credentials or library.
    """
    if not is_remote(name):
        with open(name, "rb") as file:
            yield file
        return
    fsspec = _fsspec()
    with _explained_remote(name), fsspec.open(name, "rb") as file:
        yield file


@contextmanager
def atomic_file(name: str) -> Iterator[Path]:
    """A temporary path whose content becomes a local or remote file if the block ends without an error.

    Raises:
        UserError: if it cannot be written.
    """
    if not is_remote(name):
        with atomic_path(name) as draft:
            yield draft
        return
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, PurePosixPath(name).name)
        yield draft
        with file_system(name) as (system, path):
            system.put_file(str(draft), path)


@contextmanager
def file_system(name: str) -> Iterator[tuple[Any, str]]:
    """fsspec's file system for a path or URL, and the path in it.

    Raises:
        UserError: for operations in the block that the storage rejects.
    """
    fsspec = _fsspec()
    with _explained_remote(name):
        yield fsspec.core.url_to_fs(name) if is_remote(name) else (fsspec.filesystem("file"), name)


@contextmanager
def opened_video(source: Source) -> Iterator[Any]:
    """The PyAV container of a video or camera.

    Raises:
        UserError: if it cannot be opened, or has no video that can be decoded here.
    """
    av = pyav()
    name, options = source.name, {}
    if name.startswith("camera:"):
        name, options = f"/dev/video{name.partition(':')[2]}", {"format": "v4l2"}
    with _explained_video(source.name), ExitStack() as stack:
        file = stack.enter_context(open_source(name)) if is_remote(name) else name
        container = stack.enter_context(closing(av.open(file, **options)))
        if not container.streams.video:
            raise UserError(f"{source.name} has no video stream", "a video", "choose another file")
        if container.streams.video[0].codec_context is None:
            raise UserError(
                f"{source.name}: a video in a codec that this PyAV cannot decode",
                "a codec of FFmpeg, such as H.264, HEVC, VP9 or AV1",
                "convert it: `ffmpeg -i IN -c:v libx264 OUT.mp4`",
            )
        yield container


@contextmanager
def _explained_video(name: str) -> Iterator[None]:
    try:
        yield
    except pyav().error.FFmpegError as error:
        raise UserError(
            f"{name} cannot be decoded as a video ({reason_of(error)})",
            "a complete video file, or a connected camera",
            "connect the camera, or check its address and its permissions"
            if name.startswith(_LIVE)
            else "restore the file, or convert it: `ffmpeg -i IN -c:v libx264 OUT.mp4`",
        ) from error


def _sources_of(name: str, leave_out: Path | None) -> list[Source]:
    """The sources of one name."""
    if name.startswith(_LIVE):
        return [Source(name, is_video=True)]
    if is_remote(name):
        return _remote_sources(name)
    path = Path(name)
    if path.is_dir():
        videos = len(files_below(path, VIDEO_SUFFIXES))
        if videos and not files_below(path, IMAGE_SUFFIXES):
            raise UserError(f"{path}: no image in it, but {videos} video(s)", _KINDS, f"name the videos: '{path}/*'")
        files = images_in(path, sys.maxsize)
        if leave_out is not None and Path(realpath(path)) in Path(realpath(leave_out)).parents:
            files = [file for file in files if not realpath(file).startswith(f"{realpath(leave_out)}{sep}")]
        return [Source(str(file)) for file in files]
    if path.exists():
        return _file_sources(name)
    if glob.has_magic(name):
        files = sorted(Path(match) for match in glob.glob(name, recursive=True))
        sources = [Source(str(file)) for file in files if file.is_file() and _suffix(str(file)) in _NAMED_SUFFIXES]
        sources += [Source(str(file), is_video=True) for file in files if _suffix(str(file)) in VIDEO_SUFFIXES]
        if not sources:
            found = f"pattern {name} matches no image" + (f", of {len(files)} files" if files else "")
            raise UserError(found, f"a pattern of files ({', '.join(_NAMED_SUFFIXES)})", "correct the pattern")
        return sources
    raise UserError(f"image {name} does not exist", _KINDS, "correct the path")


def _file_sources(name: str) -> list[Source]:
    """The sources of a file that exists, by its suffix."""
    suffix = _suffix(name)
    if suffix in VIDEO_SUFFIXES:
        return [Source(name, is_video=True)]
    return _listed(name) if suffix in LIST_SUFFIXES else [Source(name)]


def _suffix(name: str) -> str:
    return PurePosixPath(name.partition("?")[0] if is_remote(name) else name).suffix.lower()


def _is_pattern(name: str) -> bool:
    """Whether a URL has wildcards; in HTTP a question mark begins the query, such as a signature."""
    return glob.has_magic(name.partition("?")[0] if name.startswith(("http://", "https://")) else name)


def _remote_sources(name: str) -> list[Source]:
    """The sources of a URL: a file, a pattern, or a folder with its subfolders."""
    if _suffix(name) in (*VIDEO_SUFFIXES, *LIST_SUFFIXES, *_NAMED_SUFFIXES) and not _is_pattern(name):
        return _file_sources(name)
    with file_system(name) as (system, path):
        names = sorted(system.glob(path) if _is_pattern(name) else system.find(path))
        if names == [path] and not system.isdir(path):
            return [Source(name)]
        found = [system.unstrip_protocol(each) for each in names]
    suffixes = _NAMED_SUFFIXES if _is_pattern(name) else IMAGE_SUFFIXES
    sources = [Source(each) for each in found if _suffix(each) in suffixes and "/." not in each]
    if not sources:
        raise UserError(f"{name}: no image in it, of {len(found)} files", _KINDS, "correct the URL")
    return sources


def _listed(name: str) -> list[Source]:
    """The images of a list, relative to its folder."""
    suffix = _suffix(name)
    base = name.rpartition("/")[0] if is_remote(name) else str(Path(name).parent)
    if suffix == ".parquet":
        names = _parquet_names(name)
    else:
        with open_source(name) as file:
            data = file.read()
        if suffix == ".txt":
            lines = (line.strip() for line in data.decode("utf-8-sig", "surrogateescape").splitlines())
            names = [line for line in lines if line and not line.startswith("#")]
        else:
            content = parse_json(data, name, "a list of image names, or annotations in COCO's format")
            entries: Any = content.get("images") if isinstance(content, dict) else content
            are_names = isinstance(entries, list) and all(isinstance(each, str) for each in entries)
            if isinstance(content, dict) and isinstance(entries, list) and not are_names:
                if is_remote(name):
                    raise UserError(
                        f"{name}: annotations in a remote file", "a local file", "download it with its images"
                    )
                return _checked(name, _annotated(name, entries))
            if not are_names:
                expected = 'a list of names, ["a.jpg", …], or annotations in COCO\'s format'
                raise UserError(f"{name}: another content", expected, "correct the file, or give the images themselves")
            names = entries
    sources = []
    for each in names:
        place = each if "://" in each else f"{base}/{each}" if is_remote(name) else str(Path(base, each))
        if not is_remote(place) and not Path(place).is_file() and Path(each).is_file():
            place = each  # relative to the working directory
        sources.append(Source(place, is_video=_suffix(place) in VIDEO_SUFFIXES))
    return _checked(name, sources)


def _checked(name: str, sources: list[Source]) -> list[Source]:
    """The sources of a list; raises `UserError` if none of them exists."""
    if not sources:
        raise UserError(f"{name}: an empty list", "names of images", "specify at least one")
    if not any(is_remote(each.name) or Path(each.name).is_file() for each in sources):
        expected = "names relative to the list's folder or to the working directory, or absolute"
        found = f"{name}: none of its {len(sources)} images exists, such as {sources[0].name}"
        raise UserError(found, expected, "correct the names")
    return sources


def _annotated(name: str, entries: Sequence[Any]) -> list[Source]:
    """The images of an annotation file in COCO's format, with their ids."""
    from maskrcnn.data.annotations import usable_id
    from maskrcnn.data.layouts import ImageFinder, splits_of

    known = [each for each in entries if isinstance(each, dict) and isinstance(each.get("file_name"), str)]
    finder = ImageFinder(next(iter(splits_of(name).values())).image_folders)
    finder.choose([each["file_name"].replace("\\", "/") for each in known])
    sources = []
    for entry in known:
        image_id = usable_id(entry.get("id"))
        own = image_id if isinstance(image_id, int) else None
        sources.append(Source(str(finder.find(entry["file_name"])), image_id=own))
    return sources


def _parquet_names(name: str) -> list[str]:
    _, parquet = pyarrow_parquet()
    with open_source(name) as file:
        try:
            table = parquet.ParquetFile(file)
            column = next((each for each in _COLUMNS if each in table.schema_arrow.names), None)
            if column is None:
                found = f"{name}: columns {', '.join(table.schema_arrow.names)}"
                raise UserError(found, f"a column of names: {', '.join(_COLUMNS)}", "rename the column")
            return [str(each) for each in table.read([column])[column].to_pylist()]
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read ({reason_of(error)})", "a Parquet file", "restore it") from error


def _remote_bytes(name: str) -> bytes:
    with open_source(name) as file:
        return bytes(file.read())


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise missing_library("fsspec", "read URLs", "pip install fsspec") from error
    return fsspec


def pyarrow_parquet() -> tuple[Any, Any]:
    """The packages pyarrow and pyarrow.parquet; raises `UserError` if they are missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_library("pyarrow", "read and write Parquet", "pip install pyarrow") from error
    return pyarrow, pyarrow.parquet


def pyav() -> Any:
    """The package PyAV; raises `UserError` if it is missing."""
    try:
        import av
    except ImportError as error:
        raise missing_library("av", "read and write videos", "pip install av") from error
    return av


@contextmanager
def _explained_remote(name: str) -> Iterator[None]:
    """Turns exceptions of fsspec and its file systems into a UserError."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:  # fsspec names the package of the protocol
        protocol = name.partition("://")[0]
        raise UserError(
            f"{name}: no library for {protocol} ({reason_of(error)})",
            "fsspec's package for this protocol, such as s3fs, gcsfs, adlfs or aiohttp",
            "install it with pip",
        ) from error
    except Exception as error:  # each file system has its own errors, also for credentials
        raise UserError(
            f"{name} cannot be accessed ({type(error).__name__}: {reason_of(error)})",
            "an existing file or folder, and credentials with access to it",
            "check the URL, and the credentials in the environment, as for the storage's own tools",
        ) from error
