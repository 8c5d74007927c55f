"""The image processor against the released model's numbers, and against whatever people call a picture."""

import base64
import collections
import contextlib
import functools
import hashlib
import http.server
import io
import json
import math
import re
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from conftest import ROOT, encoded, noise
from mono_internvl.image_processing_mono_internvl import (
    MonoInternVLImageProcessor,
    choose_grid,
    load_image,
    patchify,
    unpatchify,
)
from mono_internvl.tiling_mono_internvl import AutoTiles, auto_tiles, candidate_grids, tile_limit


GOLDEN = Path(__file__).parent / "golden" / "preprocess"
GRIDS = json.loads((GOLDEN / "grids.json").read_text())
PIXELS = json.loads((GOLDEN / "pixel_values.json").read_text())
TENSORS = load_file(GOLDEN / "pixel_values.safetensors")


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def small(**options) -> MonoInternVLImageProcessor:
    return MonoInternVLImageProcessor(tile_size=56, **options)


# ---------------------------------------------------------------------------------------------------------------- grid


def test_grids_equal_the_released_models():
    for size, low, high, width, height, cols, rows, plain, with_thumbnail in GRIDS["rows"]:
        assert choose_grid(width, height, tile_size=size, min_tiles=low, max_tiles=high) == (cols, rows)
        if size % 28 == 0:
            processor = MonoInternVLImageProcessor(tile_size=size, min_tiles=low, max_tiles=high)
            assert processor.get_number_of_tiles(height, width) == with_thumbnail
            assert processor.get_number_of_tiles(height, width, use_thumbnail=False) == plain
            assert processor.get_number_of_image_patches(height, width) == with_thumbnail


@pytest.mark.parametrize("limits", GRIDS["candidate_ratios"])
def test_candidates_keep_the_released_models_order(limits):
    low, high = map(int, limits.split(","))
    assert [list(grid) for grid in candidate_grids(low, high)] == GRIDS["candidate_ratios"][limits]


def test_candidates_are_complete():
    for high in range(1, 41):
        for low in range(1, high + 1):
            all_grids = {(i, j) for i in range(1, high + 1) for j in range(1, high + 1) if low <= i * j <= high}
            assert set(candidate_grids(low, high)) == all_grids


@pytest.mark.parametrize(
    "width, height, options, names",
    [
        (0, 5, {}, "0x5"),
        (5, -1, {}, "5x-1"),
        (5, 5, {"min_tiles": 3, "max_tiles": 2}, "min_tiles=3 and max_tiles=2"),
        (5, 5, {"min_tiles": 0}, "min_tiles"),
        (5, 5, {"max_tiles": 0}, "max_tiles"),
        (5, 5, {"max_tiles": 1.5}, "max_tiles"),
        (5, 5, {"tile_size": 0}, "tile_size"),
    ],
)
def test_grid_refuses_bad_arguments(width, height, options, names):
    with pytest.raises(ValueError, match=re.escape(names)):
        choose_grid(width, height, **options)


# ------------------------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_patchify_order_and_inverse(dtype):
    tiles = torch.randint(0, 256, (3, 3, 84, 84)).to(dtype)
    patches = patchify(tiles)
    assert patches.shape == (3, 9, 3 * 28 * 28) and patches.dtype == dtype
    assert torch.equal(patches[1, 5], tiles[1, :, 28:56, 56:84].reshape(-1))
    assert torch.equal(unpatchify(patches), tiles)


def test_patchify_is_the_28_px_convolution():
    tiles, kernel = torch.randn(2, 3, 56, 56, dtype=torch.float64), torch.randn(5, 3, 28, 28, dtype=torch.float64)
    wanted = torch.nn.functional.conv2d(tiles, kernel, stride=28).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(tiles) @ kernel.reshape(5, -1).T, wanted)


def test_patchify_takes_no_tiles_and_refuses_wrong_shapes():
    assert patchify(torch.empty(0, 3, 448, 448)).shape == (0, 256, 2352)
    assert unpatchify(torch.empty(0, 256, 2352)).shape == (0, 3, 448, 448)
    for shape in [(1, 3, 50, 50), (1, 3, 56, 28), (1, 1, 28, 28), (3, 28, 28), (1, 3, 0, 0)]:
        with pytest.raises(ValueError, match="tile"):
            patchify(torch.empty(shape))
    for shape in [(1, 3, 2352), (1, 4, 2351), (4, 2352), (1, 0, 2352)]:
        with pytest.raises(ValueError, match="patches"):
            unpatchify(torch.empty(shape))


@pytest.mark.parametrize("width, height", [(112, 56), (56, 168), (168, 112)])
def test_tiles_put_the_picture_back_together(width, height):
    """A picture of the grid's very size is not resampled, so the tiles are its pixels."""
    picture = noise(width, height)
    out = small(use_thumbnail=False)(picture, do_normalize=False, return_tensors="pt")
    cols, rows = width // 56, height // 56
    tiles = unpatchify(out["pixel_values"]).reshape(rows, cols, 3, 56, 56)
    assert torch.equal(
        tiles.permute(0, 3, 1, 4, 2).reshape(height, width, 3), torch.from_numpy(np.asarray(picture).copy())
    )


# ------------------------------------------------------------------------------------------------------------- goldens


def golden_tiles(key: str, **options) -> torch.Tensor:
    case = PIXELS["cases"][key]
    # The goldens were made with alpha dropped, which is not what `load_image` does.
    picture = Image.open(GOLDEN / case["file"]).convert("RGB")
    match = re.fullmatch(r"img\d\.s(\d+)\.(?:static|min(\d+)\.max(\d+)\.thumb(\d))", key)
    size, low, high = (int(group or 1) for group in match.groups()[:3])
    processor = MonoInternVLImageProcessor(
        tile_size=size, min_tiles=low, max_tiles=high, use_thumbnail=match.group(4) != "0"
    )
    out = processor(picture, return_tensors="pt", **options)
    assert out["num_tiles"].tolist() == [case["shape"][0]]
    return unpatchify(out["pixel_values"])


@pytest.mark.parametrize("key", PIXELS["cases"])
def test_pixels_equal_the_released_models_bit_for_bit(key):
    tiles = golden_tiles(key)
    assert list(tiles.shape) == PIXELS["cases"][key]["shape"] and tiles.dtype == torch.float32
    hashes = [hashlib.sha256(tile.contiguous().numpy().tobytes()).hexdigest() for tile in tiles]
    assert hashes == PIXELS["cases"][key]["sha256_float32"]
    if "static" in key:
        return
    raw = golden_tiles(key, do_normalize=False).permute(0, 2, 3, 1)
    assert raw.dtype == torch.uint8
    hashes = [hashlib.sha256(tile.contiguous().numpy().tobytes()).hexdigest() for tile in raw]
    assert hashes == PIXELS["cases"][key]["sha256_uint8"]


@pytest.mark.parametrize("key", TENSORS)
def test_pixels_are_close_to_the_released_models(key):
    tiles = golden_tiles(key.removesuffix(".lattice37"))
    if key.endswith(".lattice37"):
        tiles = tiles[:, :, ::37, ::37]
    torch.testing.assert_close(tiles, TENSORS[key], atol=1e-6, rtol=0)


# --------------------------------------------------------------------------------------------------- what a person sees


def test_plain_rgb_is_not_touched():
    picture = noise(31, 17)
    assert load_image(picture) is picture
    assert np.array_equal(pixels(load_image(encoded(picture))), pixels(picture))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "La", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
)
def test_every_mode_looks_the_same(mode):
    picture = Image.new("RGB", (40, 30), (255, 255, 255))
    ImageDraw.Draw(picture).rectangle((10, 5, 29, 24), fill=(0, 0, 0))
    if mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.applyTransform(picture, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    elif mode in ("La", "RGBa"):
        converted = picture.convert(mode.upper()).convert(mode)
    elif mode in ("LA", "PA", "I", "F", "1"):
        converted = picture.convert("L").convert(mode)
    else:
        converted = picture.convert(mode)
    assert converted.mode == mode
    before = converted.copy()
    assert np.abs(pixels(load_image(converted)) - pixels(picture)).max() <= 2
    assert converted.mode == mode and converted.tobytes() == before.tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_is_laid_on_white(mode):
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(0, 0, 0, 0), (100, 100, 100, 255), (0, 0, 0, 128)])
    if mode == "PA":
        converted = Image.new("PA", (3, 1))
        converted.putpalette([value for i in range(256) for value in (i, i, i)])
        converted.putdata([(0, 0), (100, 255), (0, 128)])
    else:
        converted = picture.convert(mode) if mode != "La" else picture.convert("LA").convert("La")
    left, middle, right = pixels(load_image(converted))[0]
    assert left.tolist() == [255] * 3 and middle.tolist() == [100] * 3
    assert np.abs(right - 127).max() <= 1


def test_palette_with_transparency():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.putdata([0, 1])
    by_index = load_image(encoded(picture, transparency=0))
    by_table = load_image(encoded(picture, transparency=bytes([0, 128])))
    gif = load_image(encoded(picture, "GIF", transparency=0))
    assert pixels(by_index)[0].tolist() == pixels(gif)[0].tolist() == [[255, 255, 255], [200, 0, 0]]
    assert pixels(by_table)[0].tolist()[0] == [255, 255, 255]
    assert np.abs(pixels(by_table)[0, 1] - [227, 127, 127]).max() <= 1


def test_transparent_colour_of_rgb_and_gray_png():
    rgb = Image.new("RGB", (2, 1), (1, 2, 3))
    rgb.putpixel((1, 0), (9, 9, 9))
    assert pixels(load_image(encoded(rgb, transparency=(1, 2, 3))))[0].tolist() == [[255] * 3, [9] * 3]
    gray = Image.new("L", (2, 1), 7)
    gray.putpixel((1, 0), 50)
    assert pixels(load_image(encoded(gray, transparency=7)))[0].tolist() == [[255] * 3, [50] * 3]


def test_opaque_rgba_keeps_its_pixels():
    picture = noise(20, 20)
    assert np.array_equal(pixels(load_image(picture.convert("RGBA"))), pixels(picture))


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled(suffix):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    picture = Image.fromarray(values)
    for source in (picture, encoded(picture, suffix), values, torch.from_numpy(values.astype(np.int32))):
        if isinstance(source, torch.Tensor):
            with pytest.raises(ValueError, match="0 to 65535"):
                load_image(source)
        else:
            assert pixels(load_image(source))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_deep_gray_ranges():
    def gray(values, dtype):
        return pixels(load_image(Image.fromarray(np.array([values], dtype=dtype))))[0, :, 0].tolist()

    assert gray([0, 128, 255], np.int32) == [0, 128, 255]
    assert gray([0, 257, 65535], np.int32) == [0, 1, 255]
    assert gray([-100, 0, 100], np.int32) == [0, 128, 255]
    assert gray([0, 0.5, 1], np.float32) == [0, 128, 255]
    assert gray([0, 64, 255], np.float32) == [0, 64, 255]
    assert gray([1e6, 2e6, 3e6], np.float32) == [0, 128, 255]
    assert gray([1e6, 1e6], np.float32) == [0, 0]
    with pytest.raises(ValueError, match="finite"):
        gray([0, math.nan], np.float32)


def test_cmyk_jpeg():
    picture = Image.new("RGB", (16, 16), (200, 30, 60))
    loaded = load_image(encoded(picture.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels(loaded) - [200, 30, 60]).max() <= 6


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, suffix):
    # As seen: red on the left, blue on the right, green below; stored: turned so that the orientation undoes it.
    seen = Image.new("RGB", (96, 64), (255, 0, 0))
    ImageDraw.Draw(seen).rectangle((48, 0, 95, 31), fill=(0, 0, 255))
    ImageDraw.Draw(seen).rectangle((0, 32, 95, 63), fill=(0, 255, 0))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose: 0, 1 flips, 2 = 90, 3 = 180, 4 = 270
    stored = seen.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else seen
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, suffix, exif=exif, **({"quality": 95} if suffix in ("JPEG", "WEBP") else {}))
    loaded = load_image(data)
    assert loaded.size == (96, 64)
    assert np.abs(pixels(loaded)[4::8, 4::8] - pixels(seen)[4::8, 4::8]).max() <= 40  # lossy, at the edges most
    assert np.array_equal(pixels(load_image(loaded)), pixels(loaded))  # never applied twice
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(pixels(load_image(opened)), pixels(loaded))


@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_damaged_exif_hides_the_orientation_only():
    picture = noise(16, 16)
    picture.info["exif"] = b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"
    assert np.array_equal(pixels(load_image(picture)), pixels(picture))


@pytest.mark.parametrize("suffix", ["GIF", "PNG", "WEBP"])
def test_animated_files_give_their_first_frame(suffix):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], suffix, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="has 3 frames, of which the first is read") as warned:
        assert np.abs(pixels(load_image(data)) - [255, 0, 0]).max() <= 2
    assert len(warned) == 1
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)  # a frame that the caller has chosen stays chosen
    assert np.abs(pixels(load_image(opened)) - [0, 255, 0]).max() <= 8


# ------------------------------------------------------------------------------------------------------------- sources


def test_sources(tmp_path, monkeypatch):
    picture = noise(20, 12)
    path = tmp_path / "ü picture.png"
    path.write_bytes(encoded(picture))
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    monkeypatch.setenv("HOME", str(tmp_path))
    with path.open("rb") as file:
        for source in (path, str(path), f"~/{path.name}", path.read_bytes(), bytearray(path.read_bytes()), uri, file):
            assert np.array_equal(pixels(load_image(source)), pixels(picture))


def test_arrays():
    rgb = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    tensor = torch.from_numpy(rgb)
    same = [
        rgb,
        rgb.transpose(2, 0, 1),
        rgb.astype(np.int64),
        rgb / 255,
        (rgb / 255).astype(np.float32),
        rgb.astype(np.uint16) * 257,
        rgb[:, ::-1][:, ::-1],
        np.concatenate([rgb, np.full_like(rgb[:, :, :1], 255)], axis=2),
        tensor,
        tensor.permute(2, 0, 1),
        tensor.permute(2, 0, 1).float().div(255).requires_grad_(),
    ]
    for source in same:
        assert np.array_equal(pixels(load_image(source)), rgb)
    gray = rgb[:, :, 0]
    for source in (gray, gray[:, :, None], gray[None], torch.from_numpy(gray), torch.from_numpy(gray)[None]):
        assert np.array_equal(pixels(load_image(source)), np.repeat(gray[:, :, None], 3, axis=2))
    assert pixels(load_image(np.array([[True, False]])))[0, :, 0].tolist() == [255, 0]
    half = torch.full((3, 2, 2), 0.5, dtype=torch.bfloat16)
    assert (pixels(load_image(half)) == 128).all()


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((5, 5, 7), np.uint8), "[5, 5, 7]"),
        (np.zeros(4, np.uint8), "[4]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.full((2, 2, 3), 255.0), "0..1"),
        (np.full((2, 2, 3), np.nan), "0..1"),
        (np.full((2, 2, 3), -1), "0..255"),
        (np.full((2, 2, 3), "a"), "dtype"),
        (torch.full((3, 2, 2), -0.5), "0..1"),
    ],
)
def test_arrays_that_are_no_pictures(array, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_image(array)


class _Pictures(http.server.BaseHTTPRequestHandler):
    body = encoded(noise(20, 12))

    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture.png")
            self.end_headers()
            return
        self.send_response(200 if self.path in ("/picture.png", "/page") else 404)
        self.end_headers()
        self.wfile.write(self.body if self.path == "/picture.png" else b"<html></html>")

    def log_message(self, *args):
        pass


def test_urls(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    try:
        root = f"http://127.0.0.1:{server.server_port}"
        for path in ("picture.png", "moved"):
            assert np.array_equal(pixels(load_image(f"{root}/{path}")), pixels(noise(20, 12)))
        with pytest.raises(ConnectionError, match=r"/gone: 404"):
            load_image(f"{root}/gone")
        with pytest.raises(ValueError, match="/page is not a picture"):
            load_image(f"{root}/page")
        monkeypatch.setattr("mono_internvl.image_loading_mono_internvl._MAX_DOWNLOAD_BYTES", 10)
        with pytest.raises(ValueError, match="MiB"):
            load_image(f"{root}/picture.png")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ConnectionError, match="cannot fetch"):
        load_image(f"{root}/picture.png")
    with pytest.raises(ConnectionError, match="cannot fetch"):
        load_image("http://[broken")


# ----------------------------------------------------------------------------------------------------------- bad input


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.png"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(FileNotFoundError, match="missing.png"):
        load_image(str(tmp_path / "missing.png"))


@pytest.mark.parametrize("content, reason", [(b"", "empty"), (b"not a picture at all", "not a picture")])
def test_files_that_are_no_pictures(tmp_path, content, reason):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken.png.*{reason}"):
        load_image(path)
    with pytest.raises(ValueError, match=reason):
        load_image(content)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(ValueError, match="folder"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match=r"neither a file nor base64 .*5,000 characters"):
        load_image("a" * 5000)
    with pytest.raises(ValueError, match="not a usable path"):
        load_image("a" * 300)
    for uri in ("data:image/png;base64", "data:image/png;base64,@@@", "data:image/png;base64,", "data:,hello"):
        with pytest.raises(ValueError, match="data: URI"):
            load_image(uri)
    for source in (None, 7, {"image": 1}):
        with pytest.raises(TypeError, match="a picture must be"):
            load_image(source)


@pytest.mark.filterwarnings("ignore:Truncated")
@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_truncated_files_are_never_loaded(tmp_path, suffix, part):
    data = encoded(noise(120, 90), suffix)
    path = tmp_path / f"cut.{suffix.lower()}"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match="cut.*(damaged or truncated|not a picture|cannot be read)"):
        load_image(path)
    with (
        pytest.raises(ValueError, match="cut.*(damaged or truncated|not a picture|cannot be read)"),
        path.open("rb") as f,
    ):
        load_image(f)


def test_truncated_pil_image():
    data = encoded(noise(120, 90), "JPEG")
    with pytest.raises(ValueError, match="truncated"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


@pytest.mark.filterwarnings("ignore")
def test_scrambled_files_never_raise_anything_else():
    random, loaded = np.random.default_rng(0), 0
    for suffix in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA"):
        original = np.frombuffer(encoded(noise(40, 30), suffix), dtype=np.uint8)
        for _ in range(40):
            damaged = original.copy()
            where = random.integers(0, min(len(damaged), 400), 12)
            damaged[where] = random.integers(0, 256, 12)
            with contextlib.suppress(ValueError):
                assert load_image(damaged.tobytes(), max_pixels=10**6).mode == "RGB"
                loaded += 1
    assert 0 < loaded < 9 * 40


def test_eps_is_refused():
    with pytest.raises(ValueError, match="EPS"):
        load_image(encoded(noise(8, 8), "EPS"))


def test_decompression_bomb(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (12000, 9000)).save(path)
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"bomb.png.*12000x9000.*max_pixels.*100,000,000"):
            load_image(path)
        with pytest.raises(ValueError, match="max_pixels"):
            load_image(Image.new("1", (12000, 9000)))
        with pytest.raises(ValueError, match="max_pixels"):
            load_image(np.zeros((20, 20), np.uint8), max_pixels=399)
        assert load_image(path, max_pixels=108_000_000).size == (12000, 9000)  # above Pillow's warning: no warning
        with pytest.raises(ValueError, match="max_pixels"):
            MonoInternVLImageProcessor()(path)
        with pytest.raises(ValueError, match="max_pixels is 99"):
            MonoInternVLImageProcessor(max_pixels=99)(noise(10, 10))
        assert len(MonoInternVLImageProcessor(max_pixels=99)(noise(10, 10), max_pixels=100)["num_tiles"]) == 1
    assert limit == Image.MAX_IMAGE_PIXELS and filters == list(warnings.filters)


def test_max_pixels_decides_beyond_pillows_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture = noise(60, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix in ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "TGA", "PCX", "SGI", "DDS"):
            data = encoded(picture, suffix)
            assert load_image(data).size == (60, 40)
            with pytest.raises(ValueError, match=r"too large \(60x40 = 2,400 pixels\); the limit max_pixels is 2,399"):
                load_image(data, max_pixels=2399)
            with pytest.raises(ValueError, match=r"too large.*limit max_pixels is off.*PIL.Image.MAX_IMAGE_PIXELS"):
                load_image(data, max_pixels=None)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        assert load_image(data, max_pixels=None).size == (60, 40)
    assert Image.MAX_IMAGE_PIXELS == 10_000


def test_a_strip_that_would_explode_when_stretched():
    with pytest.raises(ValueError, match="1x300000.*max_pixels"):
        MonoInternVLImageProcessor()(Image.new("RGB", (1, 300_000)))


# ----------------------------------------------------------------------------------------------------------- processor


@pytest.mark.parametrize("width, height, tiles", [(1, 1, 1), (20000, 1, 13), (1, 20000, 13)])
def test_extreme_pictures(width, height, tiles):
    out = MonoInternVLImageProcessor()(Image.new("RGB", (width, height), (255, 255, 255)), return_tensors="pt")
    assert out["pixel_values"].shape == (tiles, 256, 2352) and out["num_tiles"].tolist() == [tiles]
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(unpatchify(out["pixel_values"])[:, :, 5, 7], white.expand(tiles, 3))


def test_batches_and_nesting():
    processor = small(max_tiles=4)
    pictures = [noise(100, 50, 0), noise(30, 31, 1), noise(50, 150, 2)]
    single = [processor(picture, return_tensors="pt") for picture in pictures]
    wanted = torch.cat([out["pixel_values"] for out in single])
    counts = [int(out["num_tiles"][0]) for out in single]
    assert counts == [3, 1, 4]
    for images in (
        pictures,
        tuple(pictures),
        [pictures[:1], [], pictures[1:]],
        [[pictures[0]], pictures[1], [pictures[2]]],
    ):
        out = processor(images, return_tensors="pt")
        assert torch.equal(out["pixel_values"], wanted)
        assert out["num_tiles"].dtype == torch.int64 and out["num_tiles"].tolist() == counts
    batch = np.stack([np.asarray(noise(60, 40, seed)) for seed in range(3)])
    out = processor(batch, return_tensors="pt")
    assert torch.equal(out["pixel_values"], processor(list(batch), return_tensors="pt")["pixel_values"])
    assert len(out["num_tiles"]) == 3
    with pytest.raises(ValueError, match="picture 2 of 2: .*empty"):
        processor([pictures[0], b""])


def test_no_pictures():
    for images in ([], [[]]):
        out = small()(images, return_tensors="pt")
        assert out["pixel_values"].shape == (0, 4, 2352) and out["pixel_values"].dtype == torch.float32
        assert out["num_tiles"].shape == (0,) and out["num_tiles"].dtype == torch.int64


def test_return_types():
    picture = noise(100, 50)
    plain, numpy, torch_out = (small()(picture, return_tensors=kind) for kind in (None, "np", "pt"))
    assert isinstance(plain["num_tiles"], list) and plain["num_tiles"] == [3]
    assert isinstance(numpy["pixel_values"], np.ndarray) and numpy["num_tiles"].dtype == np.int64
    assert np.array_equal(numpy["pixel_values"], plain["pixel_values"])
    assert np.array_equal(numpy["pixel_values"], torch_out["pixel_values"].numpy())
    moved = torch_out.to(torch.bfloat16)
    assert moved["pixel_values"].dtype == torch.bfloat16 and moved["num_tiles"].dtype == torch.int64


def test_limits_per_call():
    processor, picture = small(min_tiles=2, max_tiles=6), noise(160, 100)

    def tiles(**options):
        return processor(picture, **options)["num_tiles"][0]

    assert tiles() == 7 and tiles(use_thumbnail=False) == 6
    assert tiles(max_tiles=1) == 1
    assert tiles(max_tiles=12, min_tiles=8) == processor.get_number_of_tiles(100, 160, max_tiles=12, min_tiles=8)
    options = {"max_tiles": 3, "use_thumbnail": False}
    assert tiles(**options) == processor.get_number_of_image_patches(100, 160, options)
    assert tiles() == 7  # nothing stuck
    for options in ({"max_tiles": 0}, {"min_tiles": 7}, {"min_tiles": -1}):
        with pytest.raises(ValueError, match="tiles"):
            tiles(**options)


@pytest.mark.parametrize(
    ("width", "height", "tiles"),
    [
        (1, 1, 1),
        (28, 56, 1),  # half a tile
        (56, 84, 2),  # 1.5 tiles: a half goes to the even neighbour, as Python rounds
        (56, 140, 2),  # 2.5
        (56, 141, 3),
        (56, 139, 2),
        (56, 196, 4),  # 3.5
        (140, 56, 2),
        (112, 112, 4),
        (560, 560, 100),
    ],
)
def test_auto_counts_the_tiles_that_a_picture_fills(width, height, tiles):
    assert auto_tiles(width, height, 56) == tiles == max(1, round(width * height / 56**2))


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 12])
def test_auto_never_enlarges_and_never_exceeds_what_holds_without_it(limit):
    """In a call, of a processor made with it, and in the counts: one grid, that of the smaller of two numbers."""
    processor, made = small(max_tiles=limit), small(max_tiles="auto")
    for width, height in ((30, 20), (56, 56), (112, 56), (56, 140), (120, 200), (168, 112), (9, 900), (800, 600)):
        own = auto_tiles(width, height, 56)
        for used, most, options in (
            (processor, limit, {"max_tiles": "auto"}),
            (made, 12, {}),
            (made, 12, {"max_tiles": "auto"}),
            (made, limit, {"max_tiles": AutoTiles(limit)}),
        ):
            grid = choose_grid(width, height, tile_size=56, max_tiles=min(own, most))
            assert used.grid_of(width, height, **options) == grid
            cut = used(noise(width, height), **options)["num_tiles"][0]
            assert cut == used.get_number_of_tiles(height, width, **options)
            assert cut == used.get_number_of_image_patches(height, width, options)
            assert cut == math.prod(grid) + (math.prod(grid) > 1)
            # A picture is blown up only where it is smaller than a tile, or by half a tile's worth of pixels.
            assert math.prod(grid) * 56**2 <= max(width * height + 56**2 / 2, 56**2)
        assert processor.grid_of(width, height) == choose_grid(width, height, tile_size=56, max_tiles=limit)
        assert choose_grid(width, height, tile_size=56, max_tiles="auto") == made.grid_of(width, height)


def test_auto_lowers_min_tiles_and_a_number_is_the_callers():
    processor = small(min_tiles=2, max_tiles=6)
    assert processor.grid_of(56, 56) != (1, 1) and processor.grid_of(56, 56, max_tiles="auto") == (1, 1)
    assert processor.grid_of(56, 56, max_tiles="auto", min_tiles=4) == (1, 1)
    with pytest.raises(ValueError, match="min_tiles=7 and max_tiles=6"):
        processor.grid_of(56, 56, max_tiles="auto", min_tiles=7)
    assert small(max_tiles="auto").grid_of(60, 40) == (1, 1)
    assert small(max_tiles="auto").grid_of(60, 40, max_tiles=6) == (3, 2)
    assert (processor.tile_limit(), processor.tile_limit("auto"), processor.tile_limit(9)) == (6, 6, 9)
    assert small(max_tiles="auto").tile_limit() == tile_limit("auto") == 12


def test_the_table_of_the_page_about_pictures_is_right():
    rows = re.findall(
        r"^\| (\d+) x (\d+) \| (\d+) x (\d+)(?: tiles)? \| ([\d,]+).*? \| (.+?)(?: tiles?)? \| ([\d,]+)",
        (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert len(rows) == 7
    processor = MonoInternVLImageProcessor()
    for width, height, cols, rows_, tokens, auto_grid, auto_tokens in rows:
        size = int(width), int(height)
        assert processor.grid_of(*size) == (int(cols), int(rows_))
        assert 256 * processor.get_number_of_tiles(*size[::-1]) == int(tokens.replace(",", ""))
        grid = processor.grid_of(*size, max_tiles="auto")
        assert auto_grid == ("1" if grid == (1, 1) else f"{grid[0]} x {grid[1]}")
        tiles = processor.get_number_of_tiles(*size[::-1], max_tiles="auto")
        assert 256 * tiles == int(auto_tokens.replace(",", ""))


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "4", "Auto", "", b"auto", [4], (3,), {}])
def test_a_wrong_max_tiles_names_what_is_allowed(wrong):
    allowed = 'max_tiles must be "auto" or a whole number of at least 1, got ' + re.escape(repr(wrong))
    for refuse in (
        lambda: small(max_tiles=wrong),
        lambda: small()(noise(5, 5), max_tiles=wrong),
        lambda: small()([], max_tiles=wrong),
        lambda: small().get_number_of_tiles(5, 5, max_tiles=wrong),
        lambda: choose_grid(5, 5, max_tiles=wrong),
    ):
        with pytest.raises(ValueError, match=allowed):
            refuse()


def test_raw_pixels_normalise_to_the_same_values():
    picture = noise(123, 77)
    raw = small()(picture, do_normalize=False, return_tensors="pt")
    assert raw["pixel_values"].dtype == torch.uint8
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None]
    values = (raw["pixel_values"].float().view(*raw["pixel_values"].shape[:2], 3, 784) / 255 - mean) / std
    assert torch.equal(values.flatten(2), small()(picture, return_tensors="pt")["pixel_values"])
    made_raw = small(do_normalize=False)(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(made_raw, raw["pixel_values"])


def test_fetch_images_sees_what_a_person_sees(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(path)
    (white,), again = small().fetch_images([[str(path)], path])
    assert (pixels(white) == 255).all() and (pixels(again) == 255).all()
    assert len(small().fetch_images(np.zeros((2, 4, 4, 3), np.uint8))) == 2


def test_options_of_a_call():
    picture = noise(60, 60)
    small()(picture, device="cpu", data_format=None, disable_grouping=True, size=None, tile_size=56, do_resize=None)
    small()(picture, do_resize=True, do_rescale=True, rescale_factor=1 / 255, do_center_crop=False, resample=3)
    small()(picture, size={"height": 56, "width": 56}, do_convert_rgb=True, data_format="channels_first")
    for name, nearest in (("max_tile", "max_tiles"), ("use_thumbnails", "use_thumbnail"), ("maxpixels", "max_pixels")):
        with pytest.raises(TypeError, match=f"'{name}' \\(did you mean '{nearest}'"):
            small()(picture, **{name: 3})
    for options in (
        {"tile_size": 84},
        {"do_resize": False},
        {"do_rescale": False},
        {"do_center_crop": True},
        {"crop_size": 40},
        {"size": 224},
        {"resample": 0},
        {"data_format": "channels_last"},
        {"input_data_format": "HWC"},
        {"image_mean": [0, 0, 0, 0]},
        {"image_std": 0},
        {"use_thumbnail": "no"},
        {"convert_to_srgb": 1},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            small()(picture, **options)


def test_mean_and_std_of_a_call():
    picture = noise(60, 60)
    once = small()(picture, image_mean=0.5, image_std=(0.1, 0.2, 0.3))["pixel_values"]
    made = small(image_mean=[0.5, 0.5, 0.5], image_std=np.array([0.1, 0.2, 0.3]))
    assert np.array_equal(once, made(picture)["pixel_values"])
    assert not np.array_equal(once, small()(picture)["pixel_values"])


def test_input_data_format():
    # Shapes that could be meant either way.
    array = np.random.default_rng(0).integers(0, 256, (3, 30, 3), dtype=np.uint8)
    first, last = (small()(array, input_data_format=f"channels_{at}")["pixel_values"] for at in ("first", "last"))
    assert np.array_equal(last, small()(Image.fromarray(array))["pixel_values"])
    assert np.array_equal(first, small()(Image.fromarray(array.transpose(1, 2, 0)))["pixel_values"])
    tensor = torch.from_numpy(array)
    assert np.array_equal(first, small()(tensor, input_data_format="channels_first")["pixel_values"])
    assert np.array_equal(last, small()(tensor, input_data_format="channels_last")["pixel_values"])
    with pytest.raises(ValueError, match="30 channels where channels_first"):
        small()(np.zeros((30, 20, 3), np.uint8), input_data_format="channels_first")


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_matter(device):
    picture, processor = noise(130, 60), small(max_tiles=2)
    tensor = torch.from_numpy(np.array(picture))
    wanted = processor([picture, tensor], return_tensors="pt")["pixel_values"]
    torch.set_default_device(device)
    try:
        out = processor([picture, tensor], return_tensors="pt")
        assert out["pixel_values"].device.type == out["num_tiles"].device.type == "cpu"
        assert processor([], return_tensors="pt")["pixel_values"].device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert torch.equal(out["pixel_values"], wanted)


def test_tensors_on_the_device_that_is_asked_for():
    out = small()(noise(20, 20), return_tensors="pt", device="meta")
    assert out["pixel_values"].device.type == "meta"


@pytest.mark.parametrize(
    "bad, error",
    [
        (b"", ValueError),
        ("missing.png", FileNotFoundError),
        ("http://127.0.0.1:9/x.png", ConnectionError),
        (None, TypeError),
        (np.zeros((9, 3, 9), np.uint8), ValueError),
        (torch.empty(3, 4, 4, device="meta"), ValueError),
        (io.StringIO("text"), TypeError),
        (encoded(noise(90, 90))[:500], ValueError),
    ],
)
def test_the_bad_one_of_several_pictures_is_named(bad, error, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(error, match="^picture 2 of 3: "):
        small()([noise(9, 9), [bad], noise(9, 9)])


def test_files_and_other_sequences_are_not_taken_apart(tmp_path):
    picture = noise(70, 50)
    path = tmp_path / "p.png"
    picture.save(path)
    wanted = small()(picture)["pixel_values"]
    with path.open("rb") as file:
        assert np.array_equal(small()(file)["pixel_values"], wanted) and file.tell() == 0
    assert np.array_equal(small()(bytearray(path.read_bytes()))["pixel_values"], wanted)
    objects = np.empty(2, dtype=object)
    objects[:] = [str(path), path]
    for several in (objects, collections.deque([path, path]), (each for each in (path, path))):
        assert small(max_tiles=1)(several)["num_tiles"] == [1, 1]
    frames = np.stack([np.asarray(picture)] * 3)
    assert small(max_tiles=1)(np.stack([frames, frames]))["num_tiles"] == [1] * 6


@pytest.mark.parametrize(
    "options",
    [
        {"tile_size": 450},
        {"tile_size": 0},
        {"min_tiles": 0},
        {"min_tiles": 4, "max_tiles": 3},
        {"max_pixels": 0},
        {"image_mean": [0.5]},
        {"image_std": [0.5, 0.5, 0]},
        {"image_mean": "abc"},
        {"image_mean": [0.5, 0.5, math.nan]},
        {"use_thumbnail": "no"},
        {"convert_to_srgb": None},
        {"do_resize": False},
        {"size": 448, "tile_size": 224},
    ],
)
def test_constructor_refuses(options):
    with pytest.raises(ValueError, match="|".join(options)):
        MonoInternVLImageProcessor(**options)


def test_save_and_load(tmp_path):
    processor = MonoInternVLImageProcessor(
        tile_size=84, min_tiles=2, max_tiles=5, use_thumbnail=False, image_mean=(0.5, 0.4, 0.3), max_pixels=10**6
    )
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["auto_map"] == {"AutoImageProcessor": "image_processing_mono_internvl.MonoInternVLImageProcessor"}
    assert settings["image_processor_type"] == "MonoInternVLImageProcessor"
    assert (tmp_path / "image_processing_mono_internvl.py").exists()
    loaded = MonoInternVLImageProcessor.from_pretrained(tmp_path)
    again = json.loads(loaded.to_json_string())
    assert {key: again[key] for key in settings} == settings
    picture = noise(200, 100)
    assert np.array_equal(processor(picture)["pixel_values"], loaded(picture)["pixel_values"])
    assert MonoInternVLImageProcessor.from_pretrained(tmp_path, max_tiles=7, tile_size=56).max_tiles == 7
    with pytest.raises(ValueError, match="tile_size"):
        MonoInternVLImageProcessor.from_pretrained(tmp_path, tile_size=50)


def test_auto_is_saved_and_loaded(tmp_path):
    small(max_tiles="auto").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["max_tiles"] == "auto"
    for loaded in (
        MonoInternVLImageProcessor.from_pretrained(tmp_path),
        MonoInternVLImageProcessor.from_pretrained(tmp_path, max_tiles="auto"),
        MonoInternVLImageProcessor.from_dict({"tile_size": 56}, max_tiles="auto"),
    ):
        assert loaded.max_tiles == "auto" and loaded(noise(60, 60))["num_tiles"] == [1]


def test_keys_of_other_image_processors_are_dropped(tmp_path, caplog):
    # As in the released folder.
    clip = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 448, "crop_size": 448, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**clip, "resample": 3, "image_mean": [0.1] * 3}))
    processor = MonoInternVLImageProcessor.from_pretrained(tmp_path)
    assert processor.image_mean == [0.1] * 3 and not {"size", "crop_size", "resample"} & set(processor.to_dict())
    assert "ignores" not in caplog.text
    MonoInternVLImageProcessor.from_dict({"max_tile": 3})
    assert "max_tile" in caplog.text
    with pytest.raises(ValueError, match="crop_size|do_center_crop"):
        MonoInternVLImageProcessor(**clip | {"size": 448})


def test_unknown_options_are_refused_by_name(tmp_path):
    small().save_pretrained(tmp_path)
    for make in (
        MonoInternVLImageProcessor,
        functools.partial(MonoInternVLImageProcessor.from_pretrained, tmp_path),
        functools.partial(MonoInternVLImageProcessor.from_dict, {}),
    ):
        with pytest.raises(TypeError, match="'max_tile' .did you mean 'max_tiles'"):
            make(max_tile=3)
        with pytest.raises(TypeError, match="'colour'"):
            make(colour=3)
    processor, unused = MonoInternVLImageProcessor.from_pretrained(tmp_path, return_unused_kwargs=True, max_tile=3)
    assert unused == {"max_tile": 3} and processor.tile_size == 56
    assert MonoInternVLImageProcessor.from_pretrained(tmp_path, image_mean=0.5).image_mean == [0.5] * 3
