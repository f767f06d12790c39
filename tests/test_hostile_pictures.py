"""Pictures at load: either a correct RGB picture or a `DataError`, in bounded memory."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reopold_agent.common.pictures import FORMATS, to_rgb
from reopold_agent.data.images import BytesImage, FileImage, ZipImage
from reopold_agent.errors import DataError

# Pillow warns of damage that it gets over.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def scene(width: int = 64, height: int = 48) -> Image.Image:
    """Four quarters: red, green / blue, yellow; smooth, so that lossy formats keep them."""
    pixels = np.zeros((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    pixels[:h, :w], pixels[:h, w:] = (200, 30, 30), (30, 200, 30)
    pixels[h:, :w], pixels[h:, w:] = (30, 30, 200), (200, 200, 30)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    image = BytesImage(data).open()
    assert image.mode == "RGB"
    assert min(image.size) > 0
    image.load()
    return image


def outcome(data: bytes) -> Image.Image | None:
    """The picture, or None where it is refused; anything else fails the test."""
    try:
        return opened(data)
    except DataError:
        return None


def close(image: Image.Image, expected: Image.Image, most: float = 12.0) -> bool:
    """Whether two pictures differ by little on average."""
    if image.size != expected.size:
        return False
    pair = [np.asarray(each, dtype=np.float32) for each in (image, expected)]
    return bool(np.abs(pair[0] - pair[1]).mean() <= most)


KINDS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]
SAMPLES = {kind: encoded(scene(), kind) for kind in KINDS}
SAMPLES["JPEG progressive"] = encoded(scene(), "JPEG", progressive=True)
SAMPLES["TIFF deflate"] = encoded(scene(), "TIFF", compression="tiff_adobe_deflate")
SAMPLES["PNG palette"] = encoded(scene().quantize(16), "PNG", transparency=3)


@pytest.mark.parametrize("kind", [*SAMPLES])
def test_whole_files_are_read(kind: str) -> None:
    expected = scene() if kind != "PNG palette" else opened(SAMPLES[kind])
    assert close(opened(SAMPLES[kind]), expected)


# Damage


@pytest.mark.parametrize("kind", [*SAMPLES])
def test_every_truncation_is_refused_or_a_picture_of_the_right_size(kind: str) -> None:
    data = SAMPLES[kind]
    lengths = range(len(data)) if len(data) < 1500 else range(0, len(data), len(data) // 700)
    for length in lengths:
        image = outcome(data[:length])
        assert image is None or image.size == (64, 48), length
    assert outcome(data[: len(data) // 2]) is None


@settings(max_examples=400)
@given(
    st.sampled_from([*SAMPLES]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=12),
    st.none() | st.floats(0, 1),
    st.binary(max_size=40),
)
def test_flipped_bytes_are_refused_or_some_picture(
    kind: str, flips: list[tuple[float, int]], cut: float | None, tail: bytes
) -> None:
    data = bytearray(SAMPLES[kind])
    for where, value in flips:
        # Half of the flips hit the header, where sizes and types are.
        span = len(data) if value % 2 else min(len(data), 120)
        data[int(where * span)] = value
    outcome(bytes(data if cut is None else data[: int(cut * len(data))]) + tail)


@settings(max_examples=200)
@given(
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1", b"RIFF\x00\x00\x00\x00WEBP",
                     b"GIF89a", b"BM", b"II*\x00", b"MM\x00*", b"P6 ", b"%!PS-Adobe-3.0 EPSF-3\n"]),
    st.binary(max_size=200),
)  # fmt: skip
def test_any_bytes_behind_a_known_beginning(head: bytes, rest: bytes) -> None:
    outcome(head + rest)


def test_a_warning_made_an_error_is_a_data_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # above: a warning; above twice: an error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="DecompressionBombWarning"):
            opened(SAMPLES["PNG"])


# Formats


def test_a_format_that_starts_a_program_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gs", "gswin64c", "gswin32c", "gswin"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert shutil.which("gs") == str(tmp_path / "gs")
    data = encoded(scene(), "EPS")
    with pytest.raises(DataError, match=r"not a readable picture: none of PNG, JPEG"):
        opened(data)
    assert not (tmp_path / "started").exists()
    # The trap works: Pillow itself would have started it.
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        Image.open(io.BytesIO(data)).load()
    assert (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["PCX", "TGA", "SGI", "ICO", "ICNS", "PDF", "EPS", "IM", "MSP"])
def test_other_formats_are_refused(kind: str) -> None:
    image = scene().convert("1") if kind == "MSP" else scene()
    assert kind not in FORMATS
    with pytest.raises(DataError, match="not a readable picture"):
        opened(encoded(image, kind))


# Kinds of pictures that are right


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("white", "black")]
    data = encoded(scene(), kind, save_all=True, append_images=frames, **options)
    assert close(opened(data), scene())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright(kind: str, orientation: int) -> None:
    ways = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how it must have been turned to need this
    turns = [Image.Transpose(n) for n in range(7)]
    stored = scene()
    if orientation > 1:
        stored = scene().transpose(turns[ways[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = opened(encoded(stored, kind, exif=exif))
    assert close(image, scene()), (kind, orientation, image.size)


@pytest.mark.parametrize("orientation", [0, 9, 77, 65535])
def test_an_orientation_that_does_not_exist_is_passed_over(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert close(opened(encoded(scene(), "JPEG", exif=exif)), scene())


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("big_endian", [False, True])
def test_sixteen_bits_are_scaled_to_eight(kind: str, big_endian: bool) -> None:
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    if big_endian:
        if kind == "PNG":
            pytest.skip("PNG is always big-endian")
        image = Image.frombytes("I;16B", (64, 48), values.astype(">u2").tobytes())
    else:
        image = Image.fromarray(values)
    grey = np.asarray(opened(encoded(image, kind)))[..., 0].astype(int)
    assert np.abs(grey - values / 257).max() <= 1
    assert grey.min() == 0
    assert grey.max() == 255


def test_sixteen_bit_colour_png() -> None:
    rows = b"".join(
        b"\0" + b"".join(struct.pack(">3H", 65535, 32768, 257 * x) for x in range(48))
        for _ in range(32)
    )
    image = opened(png(48, 32, zlib.compress(rows), depth=16, colour=2))
    pixels = np.asarray(image).astype(int)
    assert (pixels[..., 0] == 255).all()
    assert (np.abs(pixels[..., 1] - 128) <= 1).all()
    assert (np.abs(pixels[0, :, 2] - np.arange(48)) <= 1).all()


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of a cast that has no meaning
def test_floats_that_are_no_numbers() -> None:
    values = np.full((8, 8), 128, np.float32)
    values[0, :4] = [np.nan, np.inf, -np.inf, 1e30]
    pixels = np.asarray(opened(encoded(Image.fromarray(values), "TIFF")))
    assert pixels[0, :4, 0].tolist() == [0, 255, 0, 255]


def test_transparency_is_white() -> None:
    palette = scene().quantize(8)
    clear = palette.getpixel((0, 0))
    image = opened(encoded(palette, "PNG", transparency=clear))
    assert image.getpixel((2, 2)) == (255, 255, 255)
    assert close(image.crop((32, 24, 64, 48)), scene().crop((32, 24, 64, 48)))
    half = scene().convert("RGBA")
    half.putalpha(Image.linear_gradient("L").resize((64, 48)))
    image = opened(encoded(half, "PNG"))
    assert min(image.getpixel((2, 0))) >= 250
    assert close(image.crop((0, 46, 64, 48)), scene().crop((0, 46, 64, 48)))
    grey = opened(encoded(half.convert("LA"), "PNG"))
    assert min(grey.getpixel((2, 0))) >= 250
    keyed = opened(encoded(scene(), "PNG", transparency=(200, 30, 30)))
    assert keyed.getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    assert close(opened(encoded(scene().convert("CMYK"), kind, quality=95)), scene(), 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_the_smallest_pictures(kind: str, size: tuple[int, int]) -> None:
    image = opened(encoded(Image.new("RGB", size, (10, 200, 90)), kind))
    assert close(image, Image.new("RGB", size, (10, 200, 90)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr",
                                  "HSV", "I", "F", "I;16"])  # fmt: skip
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (5, 4))).mode == "RGB"


# Bombs: everything within a limit of memory, in a process of its own


def png(width: int, height: int, body: bytes, *, depth: int = 8, colour: int = 0) -> bytes:
    """Makes a PNG file of these compressed rows, valid or not."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    return start + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def zeros(size: int) -> bytes:
    """Compresses this many zeros without holding them in memory."""
    packer = zlib.compressobj(6)
    block = bytes(1 << 20)
    parts = [packer.compress(block) for _ in range(size >> 20)]
    return b"".join([*parts, packer.compress(bytes(size & ((1 << 20) - 1))), packer.flush()])


def liar(path: Path, real: int, stated: int) -> None:
    """A zip archive whose member "a.png" unpacks to more than it says."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a.png", "w", force_zip64=False) as member:
            for _ in range(real >> 20):
                member.write(bytes(1 << 20))
        info = archive.getinfo("a.png")
        info.file_size = stated  # as it is then written into the directory at the end
    data = path.read_bytes()
    # The member's own header too.
    assert data[:4] == b"PK\x03\x04"
    path.write_bytes(data[:22] + struct.pack("<I", stated) + data[26:])


PROGRAM = """
    import resource, sys
    from pathlib import Path
    from reopold_agent.data.images import BytesImage, FileImage, ZipImage
    from reopold_agent.errors import DataError
    text = Path("/proc/self/status").read_text()
    used = int(next(l for l in text.splitlines() if l.startswith("VmData:")).split()[1]) << 10
    if {limit}:
        resource.setrlimit(resource.RLIMIT_DATA, (used + {limit}, used + {limit}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        image = {expression}.open()
        print("opened", image.mode, *image.size)
    except DataError as error:
        print("DataError", str(error)[:300])
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def in_a_process(expression: str, limit: int = 0) -> tuple[str, int]:
    """What opening it gave, and by how many MB memory grew."""
    code = textwrap.dedent(PROGRAM.format(expression=expression, limit=limit))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    *told, grown = done.stdout.strip().splitlines()
    return "\n".join(told), int(grown)


def _gigapixel_png(folder: Path) -> str:
    rows = zeros((1 + 40_000 // 8) * 25_000)
    (folder / "a.png").write_bytes(png(40_000, 25_000, rows, depth=1))
    return f"FileImage(Path({str(folder / 'a.png')!r}))"


def _png_that_says_too_much(folder: Path) -> str:
    (folder / "a.png").write_bytes(png(2**31 - 1, 2**31 - 1, zlib.compress(b"x")))
    return f"FileImage(Path({str(folder / 'a.png')!r}))"


def _png_with_more_rows_than_it_says(folder: Path) -> str:
    (folder / "a.png").write_bytes(png(64, 64, zeros(600 << 20)))
    return f"FileImage(Path({str(folder / 'a.png')!r}))"


def _png_with_a_bomb_of_a_text(folder: Path) -> str:
    text = b"zTXt" + b"note\0\0" + zeros(300 << 20)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    data = png(64, 64, zlib.compress(bytes(65 * 64)))
    (folder / "a.png").write_bytes(data[:33] + chunk + data[33:])
    return f"FileImage(Path({str(folder / 'a.png')!r}))"


def _gif_with_a_frame_beyond_its_screen(folder: Path) -> str:
    data = bytearray(encoded(scene().quantize(8), "GIF"))
    place = data.index(b"\x2c", 13)
    data[place + 5 : place + 9] = struct.pack("<HH", 65535, 65535)
    (folder / "a.gif").write_bytes(data)
    return f"FileImage(Path({str(folder / 'a.gif')!r}))"


def _file_of_many_gigabytes(folder: Path) -> str:
    with open(folder / "a.png", "wb") as file:
        file.write(SAMPLES["PNG"])
        file.truncate(8 << 30)  # a hole: it takes no room on the disk
    return f"FileImage(Path({str(folder / 'a.png')!r}))"


def _zip_that_says_too_little(folder: Path) -> str:
    liar(folder / "a.zip", 600 << 20, 1000)
    return f"ZipImage(Path({str(folder / 'a.zip')!r}), 'a.png')"


def _zip_that_says_too_much(folder: Path) -> str:
    liar(folder / "a.zip", 1 << 20, 2**32 - 2)
    return f"ZipImage(Path({str(folder / 'a.zip')!r}), 'a.png')"


def _zip_bomb_of_another_compression(method: int) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        with (
            zipfile.ZipFile(folder / "a.zip", "w", method) as archive,
            archive.open("a.png", "w") as member,
        ):
            for _ in range(200):
                member.write(bytes(1 << 20))
        # It says 100 MB, which would be allowed.
        data = (folder / "a.zip").read_bytes()
        place = data.rindex(b"PK\x01\x02")
        data = data[: place + 24] + struct.pack("<I", 100 << 20) + data[place + 28 :]
        (folder / "a.zip").write_bytes(data)
        return f"ZipImage(Path({str(folder / 'a.zip')!r}), 'a.png')"

    return make


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_gigapixel_png, "too large"),
        (_png_that_says_too_much, "too large"),
        (_png_with_more_rows_than_it_says, ""),
        (_png_with_a_bomb_of_a_text, ""),
        (_gif_with_a_frame_beyond_its_screen, "too large"),
        (_file_of_many_gigabytes, "has 8589934592 bytes; the limit is"),
        (_zip_that_says_too_little, "cannot read a.png"),
        (_zip_that_says_too_much, "has 4294967294 bytes; the limit is"),
        (_zip_bomb_of_another_compression(zipfile.ZIP_BZIP2), "neither stored nor deflated"),
        (_zip_bomb_of_another_compression(zipfile.ZIP_LZMA), "neither stored nor deflated"),
    ],
)
def test_a_bomb_is_refused_in_bounded_memory(
    tmp_path: Path, make: Callable[[Path], str], message: str
) -> None:
    expression = make(tmp_path)
    told, grown = in_a_process(expression)
    if message:
        assert told.startswith("DataError"), told
        assert message in told
    else:
        assert told.startswith("DataError") or told == "opened RGB 64 64"
    assert grown < 100
    # And with a limit it is no other error either.
    assert in_a_process(expression, 64 << 20)[0].split()[0] in ("DataError", "opened")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_a_picture_that_does_not_fit_into_memory_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(10_000, 10_000, zeros(10_001 * 10_000)))
    expression = f"FileImage(Path({str(tmp_path / 'a.png')!r}))"
    told, _ = in_a_process(expression, 40 << 20)
    assert told.startswith("DataError")
    assert "MemoryError" in told


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone.png", Path("/dev/zero")):
        with pytest.raises(DataError, match="does not exist"):
            FileImage(path).open()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", SAMPLES["PNG"])
    assert close(ZipImage(tmp_path / "a.zip", "a.png").open(), scene())
    with pytest.raises(DataError, match=r"b\.png"):
        ZipImage(tmp_path / "a.zip", "b.png").open()


def test_a_file_that_may_not_be_read_is_a_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(SAMPLES["PNG"])

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"cannot read the picture .*a\.png: .*Permission denied"):
        FileImage(tmp_path / "a.png").open()
