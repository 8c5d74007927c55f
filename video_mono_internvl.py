"""A video -> sampled frames, each a picture of one tile. A list of frames needs nothing; files are read by PyAV.

    read_frames      a file, URL, data: URI, bytes or list of frames -> `Frame`s
    count_frames     how many they will be, without decoding one
    sample_places    which of so many frames: the middles of equal segments, as InternVL samples

A file is gone through twice: its packets are read for their times, and then only what leads to a wanted frame is
decoded, from the key frame before it. A frame is resized to the tile's side as it comes, so that what is held is small
however long the video is.
"""

import bisect
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .image_loading_mono_internvl import (
    DEFAULT_MAX_PIXELS,
    bytes_or_path,
    flatten_pictures,
    load_image,
    located,
    prefixed,
)
from .image_pixels_mono_internvl import check_size, printable, warn
from .image_processing_mono_internvl import Frame, resize


# What a caller may say of a video, in a call or in its part of a message.
VIDEO_OPTIONS = ("num_frames", "fps")
DEFAULT_FRAMES = 8
# More than fill any prompt of this model: a mistake, such as the video's own rate as `fps`.
MOST_FRAMES = 512
# Containers that hold their frames themselves. FFmpeg also reads playlists, which name other files and URLs, and takes
# any text for a video of letters.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,mxf,nut,ivf,h264,hevc,obu,m4v,mjpeg,dv,rm,wtv,"
    "yuv4mpegpipe"
)
_NO_VIDEO = "is no video that can be read (MP4, MOV, WebM, MKV, AVI, MPEG, GIF, ..)"


def check_sampling(num_frames: Any, fps: Any) -> None:
    """Raise ValueError unless at most one is given, num_frames a whole number from 1 to 512, fps a positive number."""
    if num_frames is not None and fps is not None:
        raise ValueError(f"num_frames={num_frames!r} and fps={fps!r} both say how many frames: give one of them")
    whole = isinstance(num_frames, Integral) and not isinstance(num_frames, bool)
    if num_frames is not None and not (whole and 1 <= num_frames <= MOST_FRAMES):
        raise ValueError(f"num_frames must be a whole number from 1 to {MOST_FRAMES}, got {num_frames!r}")
    number = isinstance(fps, Real) and not isinstance(fps, bool)
    if fps is not None and not (number and math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive number (frames a second), got {fps!r}")


def sample_places(total: int, count: int) -> list[int]:
    """Which of `total` frames: of `count` segments of equal length each the middle one, in order and without repeats.

    Frame i is int(s / 2 + round(s * i)) with s = (total - 1) / count: InternVL's `load_video`, as its model cards have
    it. Of a video that has no more than `count` frames all are taken, each once (there some come twice).
    """
    if count >= total:
        return list(range(total))
    segment = (total - 1) / count
    return [int(segment / 2 + round(segment * i)) for i in range(count)]


def read_frames(
    source: Any,
    *,
    side: int,
    num_frames: int | None = None,
    fps: float | None = None,
    max_pixels: int | None = DEFAULT_MAX_PIXELS,
    convert_to_srgb: bool = False,
) -> list[Frame]:
    """The sampled frames of a video: RGB, upright, `side` x `side` pixels, the same as `load_image` and a tile give.

    Args:
        source: path, `file://` or http(s) URL, data: URI, bytes, a binary file, `{"bytes", "path"}` of `datasets`; or
            frames: a list of pictures that `load_image` takes, an array [frames, H, W, C], a tensor [frames, C, H, W].
        side: of a tile, in pixels.
        num_frames: how many; 8 where neither is given. A shorter video gives all its frames.
        fps: frames for each second of a file.
        max_pixels, convert_to_srgb: of each frame, see `load_image`; the second is for frames given as pictures.

    Raises:
        ImportError: a file, without PyAV. FileNotFoundError, ConnectionError: it is not there.
        ValueError: no video, damaged, without a frame, larger than max_pixels, options that `check_sampling` refuses,
            fps of a list, or an fps that gives more than 512 frames.
        TypeError: a source of another type.
    """
    check_sampling(num_frames, fps)
    frames = _given_frames(source)
    if frames is None:
        found, name = _file_of(source)
        with _opened(found, name) as (container, stream):
            packets = _read_packets(container, stream, name)
        places = _chosen(packets, num_frames, fps, name)
        return _decoded(found, name, packets, places, side, max_pixels)
    places = _places_of_list(len(frames), num_frames, fps)
    if num_frames is None and len(places) < len(frames):
        warn(f"a video given as {len(frames)} frames is sampled to {len(places)} of them; num_frames says how many")
    read = []
    for place in places:
        try:
            picture = load_image(frames[place], max_pixels=max_pixels, convert_to_srgb=convert_to_srgb)
            read.append(Frame(resize(picture, side, side, max_pixels)))
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise prefixed(error, f"frame {place + 1} of {len(frames)}") from error
    return read


def count_frames(source: Any, *, num_frames: int | None = None, fps: float | None = None) -> int:
    """How many frames `read_frames` would give. Of a file only its packets are read; raises as that does."""
    check_sampling(num_frames, fps)
    frames = _given_frames(source)
    if frames is not None:
        return len(_places_of_list(len(frames), num_frames, fps))
    found, name = _file_of(source)
    with _opened(found, name) as (container, stream):
        packets = _read_packets(container, stream, name)
    return len(_chosen(packets, num_frames, fps, name))


# ------------------------------------------------------------------------------------------------------------- sources


def _given_frames(source: Any) -> list[Any] | None:
    """The frames of a video that is given as such, or None for what a file's bytes are looked for in."""
    if isinstance(source, Image.Image):
        raise TypeError("a video is a file or a list of frames, not one picture; give that as a picture, or in a list")
    text = isinstance(source, (str, bytes, bytearray, memoryview)) or hasattr(source, "read")
    if text or isinstance(source, Mapping) or hasattr(source, "__fspath__"):
        return None
    several = isinstance(source, (Sequence, Iterator)) or getattr(source, "ndim", 0) >= 4
    if not (several or (isinstance(source, np.ndarray) and source.dtype == object)):
        shape = f" of shape {list(source.shape)}" if hasattr(source, "shape") else ""
        raise TypeError(
            "a video must be a path, an http(s), file: or data: URL, bytes, a binary file, or its frames as a list or "
            f"an array of four dimensions, got {type(source).__name__}{shape}"
        )
    return flatten_pictures(source)


def _places_of_list(total: int, num_frames: int | None, fps: float | None) -> list[int]:
    if fps is not None:
        raise ValueError(f"fps={fps!r} is for files: a list of frames does not say how long it is; give num_frames")
    if not total:
        raise ValueError("a video given as a list of frames has none")
    return sample_places(total, DEFAULT_FRAMES if num_frames is None else int(num_frames))


def _file_of(source: Any) -> tuple[Path | bytes, str]:
    """Where a video's bytes are, and its name for messages."""
    if isinstance(source, Mapping):
        source = bytes_or_path(source, "video")
    name = "video given as bytes"
    if hasattr(source, "read"):
        given = getattr(source, "name", None)
        name = printable(given) if isinstance(given, str) else "video given as file"
        if getattr(source, "closed", False) is True:
            raise ValueError(f"{name} is a closed file; give it open, or its path")
        source = _content(source)
    if not isinstance(source, (bytes, bytearray, memoryview)):
        if not isinstance(source, str) and not hasattr(source, "__fspath__"):
            raise TypeError(f"{name}: open the file in binary mode, reading it gave {type(source).__name__}")
        return located(source, "video")
    if not len(source):
        raise ValueError(f"{name} is empty (0 bytes), not a video")
    return bytes(source), name


def _content(file: Any) -> Any:
    """All of a binary file, whose position stays as it is; what cannot seek is read on from where it stands."""
    try:
        position = file.tell()
        file.seek(0)
    except (AttributeError, OSError):
        return file.read()
    try:
        data = file.read()
    finally:
        file.seek(position)
    return data if isinstance(data, bytes) else None


# --------------------------------------------------------------------------------------------------------------- files


class _Key(NamedTuple):
    """A frame that decoding can start from: when it is shown, and the time by which it is stored."""

    shown: int
    stored: int


class _Packets(NamedTuple):
    """What the packets of a file say. `times`: when each frame is shown, in order and in the stream's unit; empty where
    they do not tell them apart."""

    total: int
    times: list[int]
    keys: list[_Key]
    seconds: float | None


def _pyav(name: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"{name}: reading a video file needs PyAV: pip install 'mono-internvl[video]', or pip install av; a list "
            "of frames needs none"
        ) from error
    return av


@contextmanager
def _opened(found: Path | bytes, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; whatever FFmpeg says inside of the block is said of the file."""
    av = _pyav(name)
    # Given open: a name could mean one of FFmpeg's protocols.
    with io.BytesIO(found) if isinstance(found, bytes) else found.open("rb") as file:
        try:
            # Not as `options`: PyAV 14 to 16 crash on these where a stream is found late (MPEG program streams).
            chosen = {"format_whitelist": _FORMATS}
            container = av.open(file, metadata_errors="replace", container_options=chosen)
        except (av.FFmpegError, ValueError, OSError) as error:
            raise ValueError(f"{name} {_NO_VIDEO}, or is damaged ({_reason(error)})") from error
        with container:
            if "mp4" in container.format.name and _breaks_off(file):
                raise ValueError(f"{name} is damaged: it breaks off before its end")
            streams = [stream for stream in container.streams.video if not _is_cover(stream)]
            if not streams:
                kinds = sorted({stream.type for stream in container.streams})
                raise ValueError(f"{name} holds no video, only {', '.join(kinds) or 'nothing'}")
            streams[0].thread_type = "AUTO"
            try:
                yield container, streams[0]
            except av.FFmpegError as error:
                raise ValueError(f"{name} is damaged: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _is_cover(stream: Any) -> bool:
    """Whether it is the picture on the cover of a piece of music."""
    return bool(getattr(getattr(stream, "disposition", None), "value", 0) & 0x400)  # AV_DISPOSITION_ATTACHED_PIC


def _breaks_off(file: Any) -> bool:
    """Whether an MP4 or MOV file ends within one of its boxes, which FFmpeg takes for the end of the video."""
    position = file.tell()
    try:
        end, start = file.seek(0, io.SEEK_END), 0
        while start + 8 <= end:
            file.seek(start)
            size, kind = int.from_bytes(file.read(4), "big"), file.read(4)
            size = int.from_bytes(file.read(8), "big") if size == 1 else size
            if start + size > end:
                return kind in (b"mdat", b"moov", b"moof")
            if size < 8:  # to the end of the file
                return False
            start += size
        return False
    finally:
        file.seek(position)


def _read_packets(container: Any, stream: Any, name: str) -> _Packets:
    times: list[int | None] = []
    keys: list[_Key] = []
    for packet in container.demux(stream):
        # The end, a frame that only repeats the one before, or one that the file's own edit list cuts away.
        if not packet.size or packet.is_discard:
            continue
        times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            keys.append(_Key(packet.pts, packet.pts if packet.dts is None else packet.dts))
    if not times:
        raise ValueError(f"{name} has no frames")
    shown = sorted(time for time in times if time is not None)
    told = len(shown) == len(times) == len(set(shown))
    seconds = None
    if told and len(shown) > 1:
        # The last frame is shown as long as the others are on average.
        seconds = float((shown[-1] - shown[0]) * stream.time_base) * len(shown) / (len(shown) - 1)
    elif stream.average_rate:
        seconds = len(times) / float(stream.average_rate)
    return _Packets(len(times), shown if told else [], sorted(keys) if told else [], seconds)


def _chosen(packets: _Packets, num_frames: int | None, fps: float | None, name: str) -> list[int]:
    count = DEFAULT_FRAMES if num_frames is None else int(num_frames)
    if fps is not None:
        if packets.seconds is None:
            raise ValueError(f"{name} does not say how long it is, so that fps means nothing: give num_frames")
        count = min(max(1, round(packets.seconds * fps)), packets.total)
        if count > MOST_FRAMES:
            raise ValueError(
                f"fps={fps:g} gives {count:,} frames of {name} ({packets.seconds:,.1f} s), and at most {MOST_FRAMES} "
                "are taken: lower it, or give num_frames"
            )
    return sample_places(packets.total, count)


def _decoded(
    found: Path | bytes, name: str, packets: _Packets, places: list[int], side: int, max_pixels: int | None
) -> list[Frame]:
    """The frames of these places; where seeking leads astray, by decoding all up to the last of them.

    Some containers are sought by when a frame is shown (MP4, Matroska), others by when it is stored (MPEG).
    """
    times = [packets.times[place] for place in places] if packets.times else []
    for sought_by in ("shown", "stored", "nothing") if packets.keys[1:] else ("nothing",):
        keys = [(key.shown, getattr(key, sought_by)) for key in packets.keys] if sought_by != "nothing" else []
        read: list[Frame] = []
        with _opened(found, name) as (container, stream):
            check_size((stream.width, stream.height), name, max_pixels)
            frames = _at_times(container, stream, times, keys) if times else _at_places(container, stream, places)
            for frame in frames:
                if frame is None or frame.is_corrupt:
                    break
                check_size((frame.width, frame.height), name, max_pixels)
                image = frame.to_image()
                # The camera's turn, counter-clockwise as Pillow's.
                upright = image.rotate(frame.rotation, expand=True) if frame.rotation else image
                read.append(Frame(resize(upright, side, side, max_pixels)))
        if len(read) == len(places):
            return read
    raise ValueError(f"{name} is damaged: only {len(read)} of {len(places)} sampled frames can be decoded")


def _at_times(container: Any, stream: Any, wanted: list[int], keys: list[tuple[int, int]]) -> Iterator[Any]:
    """The frame of each time, or the next there is; None, and no more, where a seek fails or has gone past it."""
    from av import FFmpegError

    shown = [time for time, _ in keys]
    frames, position = container.decode(stream), -math.inf
    for target in wanted:
        key = bisect.bisect_right(shown, target) - 1
        # From the file's start there is nothing to seek: the first key frame is where decoding begins.
        sought = key > 0 and shown[key] > position
        if sought:
            try:
                container.seek(keys[key][1], stream=stream)
            except FFmpegError:
                yield None
                return
            frames = container.decode(stream)
        for frame in frames:
            if frame.pts is None:
                continue
            position = frame.pts
            if sought and position > target:
                yield None
                return
            sought = False
            if position >= target:
                yield frame
                break


def _at_places(container: Any, stream: Any, places: list[int]) -> Iterator[Any]:
    wanted = set(places)
    for place, frame in enumerate(container.decode(stream)):
        if place in wanted:
            yield frame
        if place >= places[-1]:
            return
