"""Annotated videos: drawn frames with the timestamps and the sound of the original."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.data.sources import Frame, Source, opened_video, pyav
from maskrcnn.files import FileKind, atomic_path

_MP4 = (".mp4", ".m4v", ".mov")
_COMMENT = "drawn by maskrcnn"


def video_suffix(source: Source) -> str:
    """The suffix of a source's annotated video: a container that can hold its sound unchanged."""
    return ".mp4" if source.is_live or Path(source.name.partition("?")[0]).suffix.lower() in _MP4 else ".mkv"


class AnnotatedVideo:
    """Writes a video frame by frame; the file appears when it is closed.

    Frames keep their timestamps, and the sound is copied if the container supports its codec. The video codec is H.264,
    or MPEG-4 if FFmpeg was built without it.

    Args:
        source: the original video.
        path: the file to write, with the suffix of `video_suffix`.

    Raises:
        UserError: if PyAV is missing, or the file cannot be written.
    """

    def __init__(self, source: Source, path: Path) -> None:
        self._av = av = pyav()
        with ExitStack() as stack:
            original = stack.enter_context(opened_video(source))
            stream = original.streams.video[0]
            self._time_base, self._rate = stream.time_base, stream.average_rate or 25
            draft = stack.enter_context(atomic_path(path))
            self._output = stack.enter_context(av.open(str(draft), "w"))
            self._output.metadata["comment"] = _COMMENT  # from which `VIDEO` recognises it
            self._stream: Any = None
            self._sound: Iterator[Any] = iter(())
            self._sound_stream: Any = None
            if original.streams.audio and not source.is_live:
                with suppress(ValueError, av.error.FFmpegError):  # a codec that the container does not support
                    self._sound_stream = self._output.add_stream_from_template(original.streams.audio[0])
                    self._sound = original.demux(original.streams.audio[0])
            self._packet: Any = next(self._sound, None)
            self._first: int | None = None
            self._stack = stack.pop_all()

    def add(self, pixels: np.ndarray, frame: Frame) -> None:
        """Appends a frame, uint8 `[H, W, 3]` RGB; an odd side is made even by repeating its last pixels."""
        height, width = pixels.shape[:2]
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
            self._stream = self._output.add_stream(codec, rate=self._rate)
            self._stream.height, self._stream.width = pixels.shape[:2]
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = self._time_base
        image = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        step = 1 / (self._rate * self._time_base)
        pts = frame.pts if frame.pts is not None else round(frame.index * step)
        self._first = pts if self._first is None else self._first
        image.pts, image.time_base = pts - self._first, self._time_base
        self._add_sound(float(image.pts * self._time_base))
        self._output.mux(self._stream.encode(image))

    def _add_sound(self, until_s: float) -> None:
        """Copies the sound up to a time, so that both streams are interleaved in the file."""
        while self._packet is not None:
            if self._packet.dts is not None:
                if float(self._packet.dts * self._packet.time_base) > until_s:
                    return
                self._packet.stream = self._sound_stream
                self._output.mux(self._packet)
            self._packet = next(self._sound, None)

    def close(self, *, is_complete: bool = True) -> None:
        """Finishes the file; an incomplete file is removed."""
        with suppress(_Incomplete), self._stack:
            if not is_complete or self._stream is None:
                raise _Incomplete
            self._add_sound(float("inf"))
            self._output.mux(self._stream.encode())


class _Incomplete(Exception):
    """Removes the draft of a video."""


def _is_ours(path: Path) -> bool:
    try:
        import av

        with av.open(str(path)) as container:
            return container.metadata.get("comment", container.metadata.get("COMMENT")) == _COMMENT
    except Exception:  # not a video, or no PyAV
        return False


VIDEO = FileKind("a video that maskrcnn drew", _is_ours)
