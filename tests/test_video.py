"""Videos: which frames are taken, from lists and from files that the tests write themselves."""

import http.server
import io
import math
import re
import subprocess
import sys
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, encoded, noise
from helpers_video import SIDE, numbered, numbers, write_video
from mono_internvl import MonoInternVLImageProcessor
from mono_internvl import video_mono_internvl as video
from mono_internvl.image_processing_mono_internvl import load_image
from mono_internvl.video_mono_internvl import DEFAULT_FRAMES, MOST_FRAMES, count_frames, read_frames, sample_places


# ------------------------------------------------------------------------------------------------------------- sampling


def internvl_places(total: int, count: int) -> list[int]:
    """As `load_video` of InternVL's model cards computes them for a whole video."""
    segment = float(total - 1) / count
    return [int(segment / 2 + np.round(segment * i)) for i in range(count)]


def test_places_are_internvls_and_none_comes_twice():
    for total in (*range(1, 70), 300, 301, 12345, 107_892):
        for count in (1, 2, 3, 7, 8, 16, 31, 64, 512):
            places = sample_places(total, count)
            assert len(places) == min(count, total) == len(set(places))
            assert places == sorted(places) and places[0] >= 0 and places[-1] < total
            if count < total:
                assert places == internvl_places(total, count)


@pytest.mark.parametrize(
    ("total", "count", "places"),
    [
        (30, 4, [3, 10, 17, 25]),
        (9, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 8, list(range(8))),
        (5, 1, [2]),
        (3, 8, [0, 1, 2]),
    ],
)
def test_places_by_hand(total, count, places):
    assert sample_places(total, count) == places


# ---------------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize(
    "form", ["pictures", "tuple", "arrays", "array", "tensor", "paths", "bytes", "generator", "object"]
)
def test_lists_in_every_form(form, tmp_path):
    pictures = [noise(70, 50, seed) for seed in range(12)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    stack = np.stack([np.asarray(picture) for picture in pictures])
    objects = np.empty(12, dtype=object)
    objects[:] = pictures
    source = {
        "pictures": pictures,
        "tuple": tuple(pictures),
        "arrays": list(stack),
        "array": stack,
        "tensor": torch.from_numpy(stack).permute(0, 3, 1, 2),
        "paths": [str(tmp_path / f"{number}.png") for number in range(12)],
        "bytes": [encoded(picture) for picture in pictures],
        "generator": (picture for picture in pictures),
        "object": objects,
    }[form]
    frames = read_frames(source, side=SIDE, num_frames=3)
    expected = [pictures[place] for place in (1, 5, 8)]
    cut = MonoInternVLImageProcessor(tile_size=SIDE, max_tiles=1)(expected)["pixel_values"]
    assert all(frame.picture.size == (SIDE, SIDE) for frame in frames)
    # A frame is the same tile as the picture would be, whatever the processor allows a picture.
    for processor in (
        MonoInternVLImageProcessor(tile_size=SIDE),
        MonoInternVLImageProcessor(tile_size=SIDE, min_tiles=4, max_tiles=6),
    ):
        features = processor(frames)
        assert features["num_tiles"] == [1, 1, 1] and np.array_equal(features["pixel_values"], cut)


def test_only_sampled_frames_are_opened(tmp_path):
    names = [str(tmp_path / f"{number}.png") for number in range(30)]
    for place in (3, 10, 17, 25):
        numbered(place).save(names[place])
    assert numbers(read_frames(names, side=SIDE, num_frames=4)) == [3, 10, 17, 25]
    with pytest.raises(FileNotFoundError, match="frame 3 of 30: no such picture: .*2.png"):
        read_frames(names, side=SIDE, num_frames=5)


def test_a_longer_list_is_sampled_with_a_warning():
    frames = [numbered(number) for number in range(20)]
    with pytest.warns(UserWarning, match="20 frames is sampled to 8 of them; num_frames"):
        assert len(read_frames(frames, side=SIDE)) == DEFAULT_FRAMES == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert numbers(read_frames(frames[:5], side=SIDE)) == [0, 1, 2, 3, 4]
        assert numbers(read_frames(frames, side=SIDE, num_frames=20)) == list(range(20))
        assert count_frames(frames) == 8 and count_frames(frames, num_frames=30) == 20


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ([], {}, ValueError, "list of frames has none"),
        (np.zeros((0, 4, 4, 3), np.uint8), {}, ValueError, "list of frames has none"),
        ([numbered(1)] * 3, {"fps": 1}, ValueError, "fps=1 is for files.*num_frames"),
        ([numbered(1)] * 3, {"fps": 1, "num_frames": 2}, ValueError, "num_frames=2 and fps=1 both say"),
        ([numbered(1)] * 3, {"num_frames": 0}, ValueError, f"whole number from 1 to {MOST_FRAMES}, got 0"),
        ([numbered(1)] * 3, {"num_frames": MOST_FRAMES + 1}, ValueError, "whole number from 1 to"),
        ([numbered(1)] * 3, {"num_frames": 2.0}, ValueError, "whole number from 1 to"),
        ([numbered(1)] * 3, {"num_frames": True}, ValueError, "whole number from 1 to"),
        ([numbered(1)] * 3, {"num_frames": "8"}, ValueError, "whole number from 1 to"),
        ("a.mp4", {"fps": 0}, ValueError, "fps must be a positive number"),
        ("a.mp4", {"fps": -1}, ValueError, "fps must be a positive number"),
        ("a.mp4", {"fps": math.inf}, ValueError, "fps must be a positive number"),
        ("a.mp4", {"fps": "1"}, ValueError, "fps must be a positive number"),
        ("a.mp4", {"fps": True}, ValueError, "fps must be a positive number"),
        (numbered(1), {}, TypeError, "not one picture"),
        (np.zeros((4, 4, 3), np.uint8), {}, TypeError, r"ndarray of shape \[4, 4, 3\]"),
        (7, {}, TypeError, "a video must be a path.*got int"),
        (None, {}, TypeError, "a video must be a path.*got NoneType"),
        ([numbered(1), 7], {}, TypeError, "frame 2 of 2: a picture must be"),
        ([numbered(1), b"text"], {}, ValueError, "frame 2 of 2: .* not a picture"),
        ("gone.mp4", {}, FileNotFoundError, "^no such video: gone.mp4$"),
        (Path("gone.mp4"), {}, FileNotFoundError, "^no such video: gone.mp4$"),
        ("file:///gone.mp4", {}, FileNotFoundError, "^no such video: file:///gone.mp4$"),
        ({"path": "gone.mp4"}, {}, FileNotFoundError, "^no such video: gone.mp4$"),
        ({"file": "gone.mp4"}, {}, TypeError, "a video must be given itself, or as a dict of 'bytes' and 'path'"),
        ("", {}, ValueError, "a video's path is an empty string"),
        (".", {}, ValueError, "is a folder, not a video"),
        (b"", {}, ValueError, "is empty .0 bytes., not a video"),
        (io.BytesIO(), {}, ValueError, "is empty .0 bytes., not a video"),
        (io.StringIO("text"), {}, TypeError, "open the file in binary mode"),
        ("rtsp://camera/1", {}, ValueError, "only http, https, file and data: URLs are read"),
        ("data:video/mp4;base64", {}, ValueError, "video given as data: URI has no comma"),
    ],
)
def test_what_is_refused_without_pyav(source, options, error, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(error, match=message):
        read_frames(source, side=SIDE, **options)
    if not message.startswith("frame 2"):  # counting opens no frame of a list
        with pytest.raises(error, match=message):
            count_frames(source, **options)


def test_frames_keep_within_max_pixels():
    with pytest.raises(ValueError, match="frame 2 of 2: .*3,072 pixels"):
        read_frames([numbered(1, (8, 8)), numbered(2)], side=SIDE, max_pixels=3000)
    strip = Image.new("L", (1, 2_000_000))
    with pytest.raises(ValueError, match="frame 1 of 1: picture of 1x2000000 is too narrow"):
        read_frames([strip], side=SIDE)


def test_without_pyav_a_file_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"something")
    for source in (tmp_path / "clip.mp4", b"something"):
        with pytest.raises(ImportError, match=r"needs PyAV: pip install 'mono-internvl\[video\]'"):
            read_frames(source, side=SIDE)


def test_the_library_does_not_import_pyav():
    code = "import sys, mono_internvl; assert 'av' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def clip(tmp_path) -> Path:
    """Three seconds of 30 frames."""
    return write_video(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("suffix", "codec", "keys_every"),
    [
        ("mp4", "mpeg4", None),
        ("mp4", "libx264", 7),
        ("mp4", "libx264", 250),
        ("mov", "libx264", 5),
        ("mkv", "libx264", 7),
        ("webm", "libvpx-vp9", 8),
        ("avi", "mpeg4", 6),
        ("avi", "mjpeg", None),
        ("ts", "libx264", 7),
        ("mpg", "mpeg2video", 6),
        ("flv", "flv", 6),
        ("gif", "gif", None),
    ],
)
def test_the_frames_of_a_file_are_those_of_its_list(suffix, codec, keys_every, tmp_path):
    """By seeking and by decoding all, in every container: the same numbers as a list of the frames gives."""
    path = write_video(tmp_path / f"clip.{suffix}", codec=codec, keys_every=keys_every, rate=25)
    for options in ({}, {"num_frames": 1}, {"num_frames": 4}, {"num_frames": 29}, {"num_frames": 60}):
        places = sample_places(30, options.get("num_frames", 8))
        frames = read_frames(path, side=SIDE, **options)
        assert numbers(frames) == places
        assert count_frames(path, **options) == len(places)
        assert all(frame.picture.size == (SIDE, SIDE) and frame.picture.mode == "RGB" for frame in frames)


@pytest.mark.parametrize(("fps", "count"), [(1, 3), (2, 6), (0.1, 1), (3.3, 10), (10, 30), (60, 30)])
def test_fps_takes_so_many_of_a_second(clip, fps, count):
    frames = read_frames(clip, side=SIDE, fps=fps)
    assert numbers(frames) == sample_places(30, count) and count_frames(clip, fps=fps) == count


def test_files_in_every_form(clip, tmp_path, monkeypatch):
    data = clip.read_bytes()
    monkeypatch.setenv("HOME", str(tmp_path))
    with open(clip, "rb") as file:
        file.seek(11)
        forms = [
            *(
                clip,
                str(clip),
                f"file://{clip}",
                "~/clip.mp4",
                data,
                bytearray(data),
                memoryview(data),
                io.BytesIO(data),
            ),
            *(file, {"path": str(clip), "bytes": None}, {"bytes": data, "path": None}),
            "data:video/mp4;base64," + __import__("base64").b64encode(data).decode(),
        ]
        for form in forms:
            assert numbers(read_frames(form, side=SIDE, num_frames=4)) == [3, 10, 17, 25], str(form)[:40]
        assert file.tell() == 11 and not file.closed


def test_a_video_of_a_url(clip, tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    pytest.importorskip("httpx")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        assert numbers(read_frames(f"{base}/clip.mp4", side=SIDE, num_frames=4)) == [3, 10, 17, 25]
        with pytest.raises(ConnectionError, match="gone.mp4: 404"):
            read_frames(f"{base}/gone.mp4", side=SIDE)
        server.shutdown()


def test_a_frame_is_the_same_tile_as_its_picture(clip):
    """Decoded here with PyAV's own loop, given as pictures of one tile."""
    import av

    with av.open(str(clip)) as container:
        pictures = [frame.to_image() for frame in container.decode(video=0)]
    expected = MonoInternVLImageProcessor(tile_size=SIDE)([pictures[i] for i in (3, 10, 17, 25)], max_tiles=1)
    found = MonoInternVLImageProcessor(tile_size=SIDE)(read_frames(clip, side=SIDE, num_frames=4))
    assert np.array_equal(found["pixel_values"], expected["pixel_values"])
    # The thumbnail of a video's frame is the frame.
    assert found["num_tiles"] == [1, 1, 1, 1]


def halves(number: int, size: tuple[int, int]) -> Image.Image:
    """White above, black below."""
    image = Image.new("RGB", size, "white")
    image.paste("black", (0, size[1] // 2, *size))
    return image


@pytest.mark.parametrize(
    ("matrix", "bright"),
    [
        ((1, 0, 0, 1), "top"),
        ((0, 1, -1, 0), "right"),  # a quarter clockwise, as phones held upright write it
        ((-1, 0, 0, -1), "bottom"),
        ((0, -1, 1, 0), "left"),
    ],
)
def test_a_turned_camera_gives_upright_frames(matrix, bright, tmp_path):
    path = write_video(tmp_path / "turned.mp4", 6, picture=halves)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (number * 0x10000 for number in matrix)
    shown = [a, b, 0, c, d, 0, 0, 0, 0x40000000]
    data[at : at + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in shown)
    (frame,) = read_frames(bytes(data), side=SIDE, num_frames=1)
    pixels = np.asarray(frame.picture.convert("L")).astype(int)
    half = SIDE // 2
    sides = {"top": pixels[:half], "bottom": pixels[half:], "left": pixels[:, :half], "right": pixels[:, half:]}
    assert max(sides, key=lambda name: sides[name].mean()) == bright and sides[bright].mean() > 230


def test_what_an_edit_list_cuts_away_is_no_frame(tmp_path):
    """libx264's reordering makes MP4 files with an edit list, and a start time that is not 0."""
    path = write_video(tmp_path / "clip.mp4", codec="libx264", keys_every=7, options={"movflags": "+faststart"})
    assert b"elst" in path.read_bytes()
    assert numbers(read_frames(path, side=SIDE, num_frames=30)) == list(range(30))


def test_a_seek_that_leads_astray_is_noticed(tmp_path, monkeypatch):
    """Whatever a container's index says, no other frame is taken: then all is decoded."""
    av = pytest.importorskip("av")
    path = write_video(tmp_path / "clip.mp4", codec="libx264", keys_every=5)
    sought = []

    class Astray:
        """The container, whose index is wrong."""

        def __init__(self, container, broken):
            self.container, self.broken = container, broken

        def seek(self, time, **kwargs):
            sought.append(time)
            if self.broken:
                raise av.error.PermissionError(1, "Operation not permitted")
            self.container.seek(10**9, backward=False, **kwargs)

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

    for broken in (False, True):
        sought.clear()
        original = av.open
        with monkeypatch.context() as patch:
            patch.setattr(av, "open", lambda *args, **kw: Astray(original(*args, **kw), broken))  # noqa: B023
            assert numbers(read_frames(path, side=SIDE, num_frames=6)) == sample_places(30, 6)
        assert len(sought) == 2  # by one time and the other, and not again


def test_a_file_without_times_is_decoded_in_order(tmp_path):
    path = write_video(tmp_path / "clip.h264", codec="libx264", format="h264", keys_every=7)
    assert numbers(read_frames(path, side=SIDE, num_frames=5)) == sample_places(30, 5)
    assert count_frames(path, num_frames=5) == 5


def test_seeking_skips_what_lies_between(tmp_path):
    """A long video with key frames: of 600 frames few are decoded."""
    av = pytest.importorskip("av")
    path = write_video(tmp_path / "long.mp4", 600, codec="libx264", keys_every=10)
    decoded = []

    class Counted:
        def __init__(self, container):
            self.container = container

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame.pts)
                yield frame

        def __getattr__(self, name):
            return getattr(self.container, name)

    with video._opened(path, "long.mp4") as (container, stream):
        packets = video._read_packets(container, stream, "long.mp4")
    places = sample_places(600, 8)
    times, keys = [packets.times[place] for place in places], [(key.shown, key.shown) for key in packets.keys]
    with video._opened(path, "long.mp4") as (container, stream):
        found = [frame.pts for frame in video._at_times(Counted(container), stream, times, keys)]
    assert found == times
    assert av and 8 <= len(decoded) <= 8 * 10


def test_memory_does_not_grow_with_the_video(tmp_path):
    """Frames are made small as they come: 24 frames of 1.5 MB each in RGB are held as 9 kB each."""
    path = write_video(tmp_path / "large.mp4", 60, (832, 624), keys_every=12)
    read_frames(path, side=SIDE, num_frames=2)
    tracemalloc.start()
    frames = read_frames(path, side=SIDE, num_frames=24)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert numbers(frames) == sample_places(60, 24)
    assert peak < 5 * 832 * 624 * 3


@pytest.mark.parametrize("share", [0.97, 0.8, 0.5, 0.3, 0.1, 0.01])
@pytest.mark.parametrize("moov", ["first", "last"])
def test_a_file_that_breaks_off_is_one_clear_error(share, moov, tmp_path):
    options = {"movflags": "+faststart"} if moov == "first" else {}
    path = write_video(tmp_path / "clip.mp4", options=options, picture=lambda number, size: noise(*size, number))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    for call in (read_frames, count_frames):
        with pytest.raises(ValueError, match="clip.mp4 (is damaged|is no video that can be read)"):
            call(path, **({"side": SIDE} if call is read_frames else {}))


def test_damage_inside_is_one_clear_error(tmp_path):
    """Whatever bytes are broken, a file gives its frames or one error that names it."""
    path = write_video(tmp_path / "clip.mp4", codec="libx264", keys_every=6, picture=lambda n, size: noise(*size, n))
    data = path.read_bytes()
    draw, refused = np.random.default_rng(0), 0
    for _ in range(60):
        broken = bytearray(data)
        start = int(draw.integers(len(broken) - 400))
        broken[start : start + 400] = draw.integers(0, 256, 400, dtype=np.uint8).tobytes()
        path.write_bytes(broken)
        try:
            assert len(read_frames(path, side=SIDE, num_frames=6)) == 6
        except ValueError as error:
            assert re.search(r"clip\.mp4 (is damaged|is no video|holds no video|has no|is too large)", str(error)), (
                error
            )
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", b"just some notes\n" * 30),
        ("clip.mp4", b"just some notes\n" * 30),
        ("page.mp4", b"<!doctype html><html><body>404</body></html>"),
        ("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nclip.ts\n#EXT-X-ENDLIST\n"),
        ("list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nclip.ts\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", b"ffconcat version 1.0\nfile clip.ts\n"),
    ],
)
def test_what_is_no_video_is_refused(name, content, tmp_path):
    """Playlists too: what they name may be any file or address."""
    write_video(tmp_path / "clip.ts", codec="mpeg2video", format="mpegts")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is no video that can be read"):
        read_frames(tmp_path / name, side=SIDE)


@pytest.mark.parametrize("empty_video", [False, True])
def test_sound_is_no_video(empty_video, tmp_path):
    av = pytest.importorskip("av", reason="needs PyAV: pip install av")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        if empty_video:
            video = container.add_stream("mpeg4", rate=10)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(ValueError, match="sound.mkv has no frames" if empty_video else "holds no video, only audio"):
        read_frames(tmp_path / "sound.mkv", side=SIDE)


def test_too_large_and_too_many(clip, tmp_path):
    with pytest.raises(ValueError, match="clip.mp4 is too large .64x48 = 3,072 pixels"):
        read_frames(clip, side=SIDE, max_pixels=3000)
    long = write_video(tmp_path / "long.mp4", MOST_FRAMES + 88, (16, 16), rate=50)
    with pytest.raises(ValueError, match=r"fps=50 gives 600 frames of .*long.mp4 \(12.0 s\), and at most 512"):
        count_frames(long, fps=50)
    assert count_frames(long, fps=40) == 480


def test_a_video_given_as_a_picture_says_what_to_write(clip):
    with pytest.raises(ValueError, match="is not a picture but a video; .*'type': 'video'"):
        load_image(clip)
