"""Every form in which a picture is given, files that are none, and what loading leaves as it was."""

import base64
import collections
import concurrent.futures
import gzip
import io
import struct
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin

from conftest import encoded, exchanged_profile, noise
from mono_internvl.image_loading_mono_internvl import at_picture, load_image


def same(source, picture: Image.Image, most: int = 0, **options) -> bool:
    """Whether `source` is read as `picture`, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(source, **options)
    assert loaded.mode == "RGB" and loaded.size == picture.size
    return np.abs(np.asarray(loaded).astype(int) - np.asarray(picture)).max() <= most


PICTURE = noise(20, 12)
DATA = encoded(PICTURE)
TEXT = base64.b64encode(DATA).decode()


# --------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{TEXT}",
        f"data:image/png;base64,{TEXT.rstrip('=')}",
        f"data:image/png;charset=utf-8;base64,{TEXT}",
        f"data:image/png;base64;charset=utf-8,{TEXT}",
        f"data:;base64,{TEXT}",
        f"DATA:image/png;BASE64,{TEXT}",
        f"data:image/png;name=a.png; base64 ,{TEXT}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(DATA).decode()}",
        "data:image/png;base64," + TEXT.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        "  data:image/png;base64,\n" + "\r\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)) + "\n",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in DATA),
        TEXT,
        TEXT.rstrip("="),
        base64.urlsafe_b64encode(DATA).decode(),
        base64.encodebytes(DATA).decode(),
    ],
)
def test_data_uris_and_base64(uri):
    assert same(uri, PICTURE)


def test_files_by_name(tmp_path, monkeypatch):
    folder = tmp_path / "a folder é 100%41"
    folder.mkdir()
    path = folder / "picture #1.png"
    path.write_bytes(DATA)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    relative = path.relative_to(tmp_path)
    for source in (
        path,
        str(path),
        relative,
        str(relative),
        f"~/{relative}",
        path.as_uri(),
        f"file://{path}",
        f"FILE://localhost{path}",
        f"file:{path}",
        {"bytes": None, "path": str(path)},
        {"bytes": DATA, "path": "a name that it once had.png"},
        {"bytes": DATA, "path": None},
        {"bytes": DATA},
        {"path": path},
        collections.OrderedDict(bytes=memoryview(DATA), path=None),
    ):
        assert same(source, PICTURE), source
    (tmp_path / "~x").write_bytes(DATA)
    assert same("~x", PICTURE)
    # A name that could be base64, too, is a file where there is one.
    (tmp_path / TEXT[:40].replace("/", "A")).write_bytes(DATA)
    assert same(TEXT[:40].replace("/", "A"), PICTURE)


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("", ValueError, "empty string"),
        (" \n", ValueError, "empty string"),
        ("missing.png", FileNotFoundError, "^no such picture: missing.png$"),
        ("~nobody/x.png", FileNotFoundError, "no such picture: ~nobody/x.png"),
        ("file:///no/such.png", FileNotFoundError, "file:///no/such.png"),
        ("file://server/share.png", ValueError, "the host 'server'"),
        ("How many circles?", FileNotFoundError, "no such picture: How many circles.*a path, a URL or base64"),
        ("a\nb.png", FileNotFoundError, r"a\\nb.png"),
        ("a\0b.png", ValueError, "NUL"),
        ("caf\udce9.png", FileNotFoundError, r"caf\\udce9.png"),
        ("s3://bucket/a.png", ValueError, "only http, https, file and data: URLs"),
        ("ftp://host/a.png", ValueError, "only http, https, file and data: URLs"),
        ("data:image/png;base64", ValueError, "no comma"),
        ("data:image/png;base64,###", ValueError, "no valid base64"),
        ("data:image/png;base64,", ValueError, r"data: URI is empty \(0 bytes\)"),
        (f"data:image/png;base64,{TEXT[:200]}", ValueError, "data: URI is damaged or truncated"),
        (TEXT[:400], ValueError, "given as base64 is damaged or truncated"),
        (TEXT[:41] + "#" + TEXT[42:], ValueError, "given as base64 is no valid base64: iVBOR"),
        (base64.b64encode(bytes(6000)).decode(), ValueError, r"neither a file nor base64 of a picture \(8,000"),
        ("x y " * 2000, ValueError, "neither a file nor base64 of a picture"),
    ],
)
def test_texts_that_are_no_pictures(text, error, message):
    with pytest.raises(error, match=message) as raised:
        load_image(text)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "source, message",
    [
        ({"bytes": None, "path": None}, "neither"),
        ({}, "no keys"),
        ({"url": "x"}, "one with 'url'"),
        ({"bytes": DATA, "path": "x", "more": 1}, "'more'"),
        ({"bytes": b"", "path": "x"}, "empty"),
        (io.StringIO("x"), "binary mode"),
        (3, "got int"),
        (object(), "got object"),
    ],
)
def test_other_things_that_are_no_pictures(source, message):
    with pytest.raises((ValueError, TypeError), match=message):
        load_image(source)


# --------------------------------------------------------------------------------------------------------------- files


class Unseekable(io.RawIOBase):
    """A stream as sockets and pipes are."""

    def __init__(self, data: bytes):
        self._left = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._left.readinto(buffer)


def test_streams_keep_their_position(tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(DATA)
    with gzip.open(tmp_path / "p.gz", "wb") as packed:
        packed.write(DATA)
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("p.png", DATA)
    with (
        path.open("rb") as plain,
        path.open("rb", buffering=0) as raw,
        path.open("r+b") as both,
        gzip.open(tmp_path / "p.gz") as unpacked,
        zipfile.ZipFile(tmp_path / "p.zip") as archive,
        archive.open("p.png") as member,
    ):
        for file in (io.BytesIO(DATA), plain, raw, both, unpacked, member):
            for position in (0, 5, len(DATA)):
                file.seek(position)
                assert same(file, PICTURE)
                assert file.tell() == position and not file.closed
    assert same(Unseekable(DATA), PICTURE)
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")  # its position is at the end now
    assert same(buffer, PICTURE)


def test_a_picture_behind_another_in_one_stream():
    second = noise(9, 7, 1)
    file = io.BytesIO(DATA + encoded(second))
    file.seek(len(DATA))
    assert same(file, second) and file.tell() == len(DATA)
    file.seek(3)
    assert same(file, PICTURE)


def test_closed_files_and_pictures(tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(DATA)
    file = path.open("rb")
    file.close()
    with pytest.raises(ValueError, match="p.png is a closed file"):
        load_image(file)
    with Image.open(path) as image:
        pass
    with pytest.raises(ValueError, match="p.png: the file of this PIL image was closed"):
        load_image(image)
    for image in (PICTURE.copy(), Image.open(path), Image.open(io.BytesIO(DATA))):
        image.close()
        with pytest.raises(ValueError, match="closed"):
            load_image(image)


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_a_pil_image_is_not_changed(suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"p.{suffix.lower()}"
    path.write_bytes(encoded(PICTURE, suffix, **({} if suffix == "GIF" else {"exif": exif})))
    with Image.open(path) as image:
        image.fp.seek(11)
        before = (image.tile, image.size, image.mode, dict(image.info), image.fp, image.fp.tell())
        first = load_image(image)
        assert (image.tile, image.size, image.mode, dict(image.info), image.fp, image.fp.tell()) == before
        assert not image.fp.closed
        again = load_image(path)
        assert first.tobytes() == again.tobytes() and first.size == again.size
        image.load()
        loaded = image.tobytes()
        assert load_image(image).tobytes() == first.tobytes() and image.tobytes() == loaded


def test_what_was_edited_or_chosen_in_a_pil_image_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(PICTURE, exif=exif)))
    assert load_image(image).size == (12, 20)
    image.getexif()[0x0112] = 1
    assert load_image(image).size == (20, 12)
    small = Image.open(io.BytesIO(encoded(noise(640, 480), "JPEG")))
    small.draft("RGB", (160, 120))
    assert load_image(small).size == small.size == (160, 120)


def test_the_result_is_not_bound_to_its_source(tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(DATA)
    loaded = load_image(path)
    path.write_bytes(b"")
    assert not isinstance(loaded, ImageFile.ImageFile) and same(loaded, PICTURE)
    array = np.asarray(PICTURE).copy()
    loaded = load_image(array)
    array[:] = 0
    assert same(loaded, PICTURE)


def test_loading_changes_nothing_of_the_process():
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    sources = [
        DATA,
        encoded(PICTURE, pnginfo=text),
        encoded(PICTURE, "TIFF"),
        b"",
        b"junk",
        b"\0\0\0\x18ftypheic" + bytes(64),
    ]

    def state():
        return (
            Image.MAX_IMAGE_PIXELS,
            ImageFile.LOAD_TRUNCATED_IMAGES,
            PngImagePlugin.MAX_TEXT_CHUNK,
            PngImagePlugin.MAX_TEXT_MEMORY,
            TiffImagePlugin.READ_LIBTIFF,
            list(warnings.filters),
        )

    def attempt(source):
        try:
            return load_image(source).tobytes()
        except ValueError as error:
            return str(error)

    Image.init()
    before, formats = state(), list(Image.ID)
    wanted = [attempt(source) for source in sources]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(attempt, sources * 20)) == wanted * 20
    assert state() == before and list(Image.ID) == formats


def test_one_pil_image_in_many_threads():
    image = Image.open(io.BytesIO(encoded(noise(200, 150))))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert {load_image(image).tobytes() for image in [image]} == {
            picture.tobytes() for picture in pool.map(load_image, [image] * 40)
        }


# ----------------------------------------------------------------------------------------------------- not a picture


def page(content: str) -> bytes:
    return content.encode()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"\xff\x0a" + bytes(64), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64), "JPEG XL"),
        (page('<svg xmlns="http://www.w3.org/2000/svg"/>'), "SVG drawing"),
        (page('\ufeff<?xml version="1.0"?>\n<!-- made by hand -->\n<svg width="9"/>'), "SVG drawing"),
        (page('<?xml version="1.0"?><x/>'), "is not a picture but XML"),
        (b"%PDF-1.7\n%%EOF", "PDF document"),
        (page("<!doctype html><title>Sign in</title>"), "HTML page"),
        (page("\n <!-- x --><HTML><body>"), "HTML page"),
        ("<!DOCTYPE html><p>ä".encode("utf-16"), "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer.*git lfs pull"),
        (b'{"error": "not found"}', 'JSON, which starts \'{"error": "not found"}\''),
        (b"Not Found", "text, which starts 'Not Found'"),
        (TEXT.encode(), "base64 of one; decode it first"),
        (b"\0\0\0\x1cftypisom\0\0\2\0isomiso2avc1mp41", "video"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "video"),
        (b"\x1aE\xdf\xa3" + bytes(64), "video"),
        (b"RIFF\0\0\0\0AVI LIST" + bytes(64), "video"),
        (b"\0\0\1\xb3\x14\0\xf0" + bytes(64), "video"),
        (b"RIFF\0\0\0\0WAVEfmt " + bytes(64), "sound"),
        (b"PK\x03\x04" + bytes(64), "archive"),
        (gzip.compress(DATA), "archive"),
        (b"\x93NUMPY\1\0" + bytes(64), "numpy file"),
        (bytes(128) + b"DICM" + bytes(64), "DICOM"),
        (b"v/1\x01" + bytes(64), "high dynamic range"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
        (bytes(range(200, 256)) * 4, "is not a picture in a format that Pillow reads"),
    ],
)
def test_what_is_not_a_picture_is_named(data, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message):
            load_image(data)


def test_heic_without_pillow_heif(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brand in (b"heic", b"heix", b"mif1"):
        with pytest.raises(ValueError, match="HEIC picture.*pip install pillow-heif"):
            load_image(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(64))


def test_heic():
    heif = pytest.importorskip("pillow_heif")
    picture = Image.new("RGB", (64, 48), (200, 40, 10))
    buffer = io.BytesIO()
    heif.from_pillow(picture).save(buffer, quality=100)
    formats = list(Image.ID)
    assert same(buffer.getvalue(), picture, most=4)
    with pytest.raises(ValueError, match="max_pixels is 3,000"):
        load_image(buffer.getvalue(), max_pixels=3000)
    with pytest.raises(ValueError, match="picture given as bytes"):
        load_image(buffer.getvalue()[:200])
    assert list(Image.ID) == formats


def test_avif():
    from PIL import features

    if not features.check("avif"):
        with pytest.raises(ValueError, match="AVIF picture.*11.3"):
            load_image(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(64))
        return
    picture = Image.new("RGB", (64, 48), (200, 40, 10))
    assert same(encoded(picture, "AVIF", quality=100), picture, most=4)


# ------------------------------------------------------------------------------------------------- texts and profiles


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunks(data: bytes, chunks: bytes, at_end: bool = False) -> bytes:
    at = data.index(b"IEND") - 4 if at_end else 33
    return data[:at] + chunks + data[at:]


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    "chunks",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"tEXt", b"workflow\0" + b"x" * 3_000_000),
        b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(b"y" * 900_000)) for i in range(80)),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
    ],
)
def test_large_texts_and_profiles_of_a_png(chunks, at_end):
    if at_end and b"iCCP" in chunks[:8]:
        pytest.skip("a profile stands in front of the pixels")
    assert same(with_chunks(DATA, chunks, at_end), PICTURE)


def test_a_large_text_does_not_hide_the_orientation():
    xmp = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    big = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3_000_000)))
    packed = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp + b" " * 2_000_000))
    for chunks in (big + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp), packed):
        assert same(with_chunks(DATA, chunks), PICTURE.transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize("suffix", ["PNG", "TIFF", "WEBP"])
def test_colour_profiles_are_applied_where_asked_for(suffix):
    red, green, blue = PICTURE.split()
    stored = Image.merge("RGB", (green, red, blue))
    options = {"lossless": True} if suffix == "WEBP" else {}
    data = encoded(stored, suffix, icc_profile=exchanged_profile(), **options)
    assert same(data, stored)  # as the released model saw it
    assert same(data, PICTURE, most=2, convert_to_srgb=True)
    assert same(Image.open(io.BytesIO(data)), PICTURE, most=2, convert_to_srgb=True)
    once = load_image(data, convert_to_srgb=True)
    assert same(once, once, most=2, convert_to_srgb=True)  # not applied twice
    if suffix != "WEBP":
        large = encoded(stored, suffix, icc_profile=exchanged_profile() + bytes(3_000_000))
        assert same(large, PICTURE, most=2, convert_to_srgb=True)


def test_colour_profiles_beside_transparency_palettes_and_gray():
    profile = exchanged_profile()
    clear = Image.new("RGBA", (2, 1), (200, 10, 30, 255))
    clear.putpixel((1, 0), (200, 10, 30, 0))
    loaded = np.asarray(load_image(encoded(clear, icc_profile=profile), convert_to_srgb=True)).astype(int)
    assert np.abs(loaded[0] - [[10, 200, 30], [255, 255, 255]]).max() <= 2
    palette = Image.new("P", (4, 4))
    palette.putpalette([200, 10, 30])
    assert same(encoded(palette, icc_profile=profile), Image.new("RGB", (4, 4), (10, 200, 30)), 4, convert_to_srgb=True)
    gray = Image.new("L", (4, 4), 77)
    assert same(encoded(gray, icc_profile=profile), gray.convert("RGB"), 2, convert_to_srgb=True)
    assert same(PICTURE, PICTURE, convert_to_srgb=True)


def test_a_profile_that_cannot_be_applied_is_named():
    for profile in (b"nonsense", exchanged_profile()[:200]):
        with pytest.warns(UserWarning, match="colour profile of picture given as bytes cannot be applied"):
            loaded = load_image(encoded(PICTURE, icc_profile=profile), convert_to_srgb=True)
        assert same(loaded, PICTURE)
    cmyk = encoded(PICTURE.convert("CMYK"), "TIFF", icc_profile=exchanged_profile())
    with pytest.warns(UserWarning, match="describes RGB, the picture is CMYK"):
        load_image(cmyk, convert_to_srgb=True)
    with pytest.raises(ValueError, match="convert_to_srgb must be True or False"):
        load_image(PICTURE, convert_to_srgb="yes")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- pages, deep data


def test_further_pages_are_counted_once():
    pages = [noise(20, 12, seed) for seed in range(3)]
    for compression in (None, "tiff_lzw"):
        data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:], compression=compression)
        with pytest.warns(UserWarning) as warned:
            loaded = load_image(data)
        assert [str(each.message) for each in warned] == [
            "picture given as bytes has 3 pages, of which the first is read; give the others as pictures of their own"
        ]
        assert same(loaded, pages[0])
        opened = Image.open(io.BytesIO(data))
        opened.seek(1)
        assert same(opened, pages[1])  # chosen by the caller
    assert same(encoded(pages[0], "TIFF"), pages[0])
    gif = encoded(pages[0], "GIF")
    assert same(gif, Image.open(io.BytesIO(gif)).convert("RGB"))


def tiff(values: np.ndarray, bits: int, **tags: int) -> bytes:
    """A gray TIFF of one strip, its values packed to `bits` bits, made by hand."""
    height, width = values.shape
    packed = np.packbits(
        ((values[..., None] >> np.arange(bits)[::-1]) & 1).reshape(height, -1).astype(np.uint8), axis=1
    )
    entries = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: 1,
        273: 8,
        277: 1,
        278: height,
        279: packed.size,
        **{int(key[1:]): value for key, value in tags.items()},
    }
    ifd = struct.pack("<H", len(entries))
    for tag in sorted(entries):
        ifd += struct.pack("<HHII", tag, 4, 1, entries[tag])
    return b"II*\0" + struct.pack("<I", 8 + packed.size) + packed.tobytes() + ifd + struct.pack("<I", 0)


def test_a_tiff_that_says_it_has_12_bits():
    values = np.array([[0, 257, 2048, 4095]])
    assert np.asarray(load_image(tiff(values, 12)))[0, :, 0].tolist() == [0, 16, 128, 255]
    assert np.asarray(load_image(Image.open(io.BytesIO(tiff(values, 12)))))[0, :, 0].tolist() == [0, 16, 128, 255]


def test_the_preview_of_a_raw_file_is_not_the_picture():
    with pytest.raises(ValueError, match="raw file"):
        load_image(tiff(np.zeros((2, 8), int), 8, t254=1, t330=0))


@pytest.mark.parametrize("white", [255, 1023, 4095], ids=["8 bits", "10 bits", "12 bits"])
def test_values_of_fewer_bits_in_16_are_refused_by_name(white):
    values = np.array([[0, white // 2, white]], dtype=np.uint16)
    rgb = np.repeat(values[..., None], 3, -1)
    sources = [
        values,
        rgb,
        torch.from_numpy(values),
        Image.fromarray(values),
        Image.fromarray(values.astype(np.int32)),
        Image.fromarray(values.astype(np.float32)),
        encoded(Image.fromarray(values)),
        encoded(Image.fromarray(values), "TIFF"),
    ]
    for source in sources:
        if white == 255 and isinstance(source, Image.Image) and source.mode in ("I", "F"):
            continue  # modes without a white of their own: 255 is the nearest
        with pytest.raises(ValueError, match=f"at most {white}.*white is 65535.*array / {white} "):
            load_image(source)
    message = (values / white * 255).astype("uint8")  # what the message advises
    assert np.asarray(load_image(message))[0, :, 0].tolist() == [0, 127, 255]


def test_dark_pictures_of_16_bits():
    with pytest.warns(UserWarning, match="at most 16383.*dark, and read so.*16383 means white"):
        load_image(np.array([[0, 16383]], dtype=np.uint16))
    black = Image.new("RGB", (2, 1))
    assert same(np.zeros((1, 2), dtype=np.uint16), black)
    bright = np.array([[0, 16384]], dtype=np.uint16)
    assert np.asarray(load_image(bright))[0, :, 0].tolist() == [0, 64]


def png16(values: np.ndarray) -> bytes:
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    kind = {2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colour(channels):
    values = np.full((2, 3, channels), 65535)
    values[..., 0] = 0x8080
    loaded = np.asarray(load_image(png16(values)))
    assert loaded[0, 0].tolist() == ([128] * 3 if channels == 2 else [128, 255, 255])
    values[..., :3] = 4000
    if channels != 3:
        values[..., -1] = 65535
    with pytest.raises(ValueError, match="white is 65535.*4095 means white"):
        load_image(png16(values))


def test_pgm_says_what_is_white():
    data = b"P5 3 1 4095\n" + np.array([0, 2048, 4095], dtype=">u2").tobytes()
    assert np.asarray(load_image(data))[0, :, 0].tolist() == [0, 128, 255]


# -------------------------------------------------------------------------------------------------------------- arrays


class Wrapped:
    """Another library's array."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return self._array


def test_arrays_of_any_kind():
    array = np.asarray(PICTURE)
    read_only = array.copy()
    read_only.flags.writeable = False
    tensor = torch.from_numpy(array.copy())
    for source in (
        Wrapped(array),
        read_only,
        array[::-1][::-1],
        np.asfortranarray(array),
        np.ma.masked_array(array),
        tensor.to(torch.int16),
        tensor.to(torch.float64) / 255,
        (tensor.to(torch.uint16) * 1).to(torch.int32),
        torch.nn.Parameter(tensor / 255),
    ):
        assert same(source, PICTURE)
    with torch.inference_mode():
        assert same((tensor / 255).permute(2, 0, 1), PICTURE)


@pytest.mark.parametrize(
    "source, message",
    [
        (torch.empty(3, 4, 4, device="meta"), r"\[3, 4, 4\].*meta"),
        (torch.zeros(4, 4).to_sparse(), "sparse"),
        (torch.zeros(4, 4, dtype=torch.complex64), "dtype"),
        (np.zeros((2, 4, 4, 3), np.uint8), "several pictures"),
        (torch.zeros(2, 3, 4, 4), "several pictures"),
        (np.ma.masked_array(np.zeros((4, 4), np.uint8), np.eye(4)), "masked"),
        (np.full((4, 4), 4095, np.int32), "0..255 .or uint16, 0..65535"),
        (np.full((4, 4), np.inf), "0..1"),
    ],
)
def test_arrays_that_cannot_be_read(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


def test_an_error_says_which_picture():
    error = at_picture(FileNotFoundError("no such picture: x"), 2, 3)
    assert isinstance(error, FileNotFoundError) and str(error) == "picture 2 of 3: no such picture: x"
    assert type(at_picture(UnicodeDecodeError("utf-8", b"x", 0, 1, "no"), 1, 2)) is ValueError
    alone = TypeError("x")
    assert at_picture(alone, 1, 1) is alone
