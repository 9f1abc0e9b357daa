"""Decoding, judged by torchvision's transforms and by what a person would expect to see."""

import contextlib
import io
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_dicom import made
from torchvision import transforms

from features import images
from features.errors import ImageError
from features.images import FILTERS, Decoded, Transform, read_bytes
from features.images import decode as decode_any
from features.reasons import Reason, bad, reason_of

WIDE = Transform(size=224, resize=256, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
TALL = Transform(size=96, resize=64, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


def decode(data):
    return decode_any(data).image.convert("RGB")


def encode(image, kind="png", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize(
    "shape", [(300, 500), (500, 300), (256, 256), (8, 8), (225, 1001), (57, 41)]
)
def test_resize_and_crop_equal_torchvision_s(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.PILToTensor(),
        ]
    )
    ours = WIDE.prepare(Decoded(image, image.size), exact=True)
    assert np.array_equal(ours.transpose(2, 0, 1), theirs(image))


def test_what_looks_the_same_decodes_the_same():
    grey = np.random.default_rng(1).integers(0, 256, (20, 30), dtype=np.uint8)
    base = Image.fromarray(grey)
    wanted = np.repeat(grey[..., None], 3, 2)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    same = {
        "grey": encode(base),
        "rgb": encode(base.convert("RGB")),
        "rgba": encode(base.convert("RGBA")),
        "palette": encode(base.convert("P")),
        "16 bit": encode(Image.fromarray(grey.astype(np.uint16) * 257)),
        "tiff": encode(base, "tiff"),
        "exif": encode(base.rotate(90, expand=True), "png", exif=turned),
        "two frames": encode(base, "gif", save_all=True, append_images=[Image.new("L", base.size)]),
    }
    for name, data in same.items():
        np.testing.assert_array_equal(np.asarray(decode(data)), wanted, err_msg=name)
    clear = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    assert not np.asarray(decode(encode(clear))).any()  # what is transparent lies over black
    one_bit = decode(encode(base.convert("1")))
    assert set(np.unique(one_bit)) <= {0, 255}
    assert decode(encode(base.convert("CMYK"), "tiff")).mode == "RGB"


def bomb():
    """A PNG of 60,000 x 60,000 pixels in a few hundred bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello", "not an image of a known kind"),
        (
            encode(Image.new("RGB", (64, 64), "red"), "jpeg")[:300],
            "can't be decoded: the data is truncated|not an image",
        ),
        (
            encode(Image.effect_noise((64, 64), 50))[:2000],
            "can't be decoded: the data is truncated",
        ),
        (bomb(), "decompression bomb"),
        (encode(Image.fromarray(np.ones((4, 4), np.float32)), "tiff"), "floating-point pixels"),
        (
            encode(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "tiff"),
            "32-bit integer pixels",
        ),
    ],
)
def test_what_can_t_be_decoded_says_why(data, words):
    with pytest.raises(ImageError, match=words):
        decode(data)


def test_files_that_can_t_be_read_say_why(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="file is empty"):
        read_bytes(tmp_path / "empty.png")
    with pytest.raises(ImageError, match="file not found"):
        read_bytes(tmp_path / "none.png")
    with pytest.raises(ImageError, match="can't be read: Is a directory"):
        read_bytes(tmp_path)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("transform", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("shape", [(10, 701), (700, 9), (3, 400), (1, 60), (300, 16_000)], ids=str)
def test_very_long_images_are_cropped_before_they_are_scaled_to_the_same_pixels(
    shape, transform, exact
):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    short = min(shape)
    wide, high = (int(transform.resize * side / short) for side in image.size)
    kind = FILTERS[transform.interpolation]
    whole = image.resize((wide, high), kind, reducing_gap=None if exact else 3.0)
    left, top = round((wide - transform.size) / 2), round((high - transform.size) / 2)
    wanted = whole.crop((left, top, left + transform.size, top + transform.size))
    ours = transform.prepare(Decoded(image, image.size), exact=exact).astype(int)
    assert abs(ours - np.asarray(wanted)).max() <= 1
    assert wide > 50 * high or high > 50 * wide


def test_a_long_jpeg_is_cropped_as_long():
    pixels = np.random.default_rng(0).integers(0, 256, (1200, 80), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((1200, 64_000), Image.Resampling.BICUBIC)
    data = encode(image, "jpeg", quality=95)
    ours = WIDE.prepare(decode_any(data, side=256), exact=False).astype(float)
    wanted = WIDE.prepare(decode_any(data), exact=True)
    assert abs(ours - wanted).mean() < 2


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n"
    b"(x) print newpath 0 0 moveto 100 100 lineto stroke showpage\n%%EOF\n"
)
STARTS = """
import sys
events = []
def hook(name, arguments):
    if name in ("subprocess.Popen", "os.exec", "os.system", "os.posix_spawn", "os.fork"):
        events.append(name)
from pathlib import Path
from features.errors import ImageError
from features.images import decode
sys.addaudithook(hook)
for file in sorted(Path(sys.argv[1]).iterdir()):
    try:
        decode(file.read_bytes())
        print(file.name, "decoded")
    except ImageError as error:
        print(file.name, error)
sys.exit(f"started {events}" if events else 0)
"""


def test_no_kind_of_image_starts_a_program(tmp_path):
    """With a `gs` in the path that would leave a trace, and each start of a program noticed."""
    program, trace, files = tmp_path / "bin" / "gs", tmp_path / "trace", tmp_path / "files"
    program.parent.mkdir()
    files.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    small = Image.effect_noise((30, 20), 50)
    (files / "xray.png").write_bytes(EPS)
    dos = struct.pack("<IIIIIIIH", 0xC6D3D0C5, 32, len(EPS), 0, 0, 0, 0, 0xFFFF)[:32]
    (files / "xray.jpg").write_bytes(dos.ljust(32, b"\0") + EPS)
    (files / "meta.png").write_bytes(b"\xd7\xcd\xc6\x9a\0\0" + bytes(60))  # WMF
    (files / "hdf.png").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(60))
    (files / "grib.png").write_bytes(b"GRIB" + bytes(3) + b"\1" + bytes(60))
    Image.init()
    for kind in Image.SAVE.keys() - {"PDF", "MPO"}:
        with contextlib.suppress(Exception):  # needs a mode, a library or an option
            small.save(files / f"a.{kind.lower()}", kind)
    run = subprocess.run(
        [sys.executable, "-c", STARTS, files], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert not trace.exists()
    said = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    read = {name for name, words in said.items() if words == "decoded"}
    kinds = {"bmp", "dib", "gif", "jpeg", "jpeg2000", "png", "ppm", "tiff", "webp"}
    assert {"a.bmp", "a.gif", "a.jpeg", "a.jpeg2000", "a.png", "a.ppm", "a.tiff", "a.webp"} <= read
    assert read <= {f"a.{kind}" for kind in kinds}
    for name in said.keys() - read:
        assert said[name].startswith("not an image of a known kind"), name
    assert "xray.png" in said
    assert len(said) > 15


SECRET = "Doe^Jane"  # stands in headers, and in no reason


def spoiled(rng, data):
    """Bytes cut, flipped, or with others between them."""
    data, kind = bytearray(data), rng.integers(5)
    if kind == 0:
        return bytes(data[: int(rng.integers(1, len(data)))])
    if kind == 1:
        at = int(rng.integers(len(data)))
        data[at:at] = rng.bytes(int(rng.integers(1, 40)))
        return bytes(data)
    within = min(len(data), 1200) if kind == 2 else len(data)
    for _ in range(int(rng.integers(1, 30))):
        data[int(rng.integers(within))] = int(rng.integers(256))
    return bytes(data)


def test_every_reason_is_of_the_closed_list_and_quotes_nothing():
    rng = np.random.default_rng(0)
    grey = Image.effect_noise((64, 48), 50)
    header = {"PatientName": SECRET, "StudyDescription": SECRET, "WindowWidth": "50"}
    seeds = [encode(grey, kind) for kind in ("png", "jpeg", "tiff", "bmp", "gif", "ppm", "webp")]
    seeds += [encode(grey.convert("RGB"), "jpeg2000"), encode(grey, "tiff", compression="tiff_lzw")]
    seeds += [
        made(np.arange(3072, dtype=np.uint16).reshape(64, 48), WindowCenter="9", **header)
    ] * 4
    reasons = set()
    for _ in range(400):
        data = spoiled(rng, seeds[rng.integers(len(seeds))])
        try:
            decode_any(data, side=32)
        except ImageError as error:
            assert reason_of(str(error)), str(error)
            assert len(str(error)) < 200
            assert "Doe" not in str(error)
            reasons.add(reason_of(str(error)))
    assert len(reasons) > 4


def test_a_reason_takes_numbers_only():
    with pytest.raises(TypeError, match="no number"):
        bad(Reason.NO_FRAME, asked=1, found="Doe")
    for kind in Reason:
        names = re.findall(r"\{(\w+)", kind.value)
        text = str(bad(kind, **dict.fromkeys(names, 1234567)))
        assert reason_of(text) is kind
        assert len(text) <= 240  # what a store has room for
    assert reason_of("can't be decoded: Doe^Jane") is None


def test_what_a_library_says_is_shown_to_who_debugs(monkeypatch, capfd):
    data = encode(Image.effect_noise((64, 64), 50))[:2000]
    for wanted in (False, True):
        monkeypatch.setenv("MEDPROBE_DEBUG", str(int(wanted)))
        with pytest.raises(ImageError):
            decode(data)
        assert ("truncated" in capfd.readouterr().err) == wanted


def test_transparency_and_16_bits_are_the_same_in_bands(monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 30, 4), dtype=np.uint8)
    for image in (
        Image.fromarray(pixels),
        Image.fromarray(pixels).convert("LA"),
        Image.fromarray(rng.integers(0, 65536, (40, 30), dtype=np.uint16)),
    ):
        whole = decode_any(encode(image)).image
        monkeypatch.setattr(images, "BAND", 70)
        np.testing.assert_array_equal(decode_any(encode(image)).image, whole)
        monkeypatch.undo()
    over = pixels[..., :3].astype(int) * pixels[..., 3:] / 255
    found = np.asarray(decode_any(encode(Image.fromarray(pixels))).image)
    assert abs(found - over).max() <= 1


def test_ordinary_images_come_out_as_pillow_has_them_to_the_byte(shared_data):
    files = sorted((shared_data / "idrid").rglob("*.jpg"))[:20]
    files += sorted((shared_data / "nih_cxr14_dev").rglob("*.png"))[:2]
    files += sorted((shared_data / "mednist_small").rglob("*.jp*g"))[:20]
    small = Image.effect_noise((300, 200), 50)
    kinds = {"png": {}, "jpeg": {"progressive": True}, "bmp": {}, "gif": {}, "ppm": {},
             "tiff": {"compression": "tiff_lzw"}, "webp": {"lossless": True}}  # fmt: skip
    written = [encode(small, kind, **options) for kind, options in kinds.items()]
    for data in [*written, *(file.read_bytes() for file in files)]:
        plain = Image.open(io.BytesIO(data))
        if plain.mode == "RGBA":  # as if it lay on black
            black = Image.new("RGBA", plain.size, (0, 0, 0, 255))
            plain = Image.alpha_composite(black, plain)
        np.testing.assert_array_equal(decode(data), plain.convert("RGB"))
        scaled = Image.open(io.BytesIO(data))
        if scaled.format == "JPEG":  # the short cut for large ones is Pillow's, too
            times = 512 / min(scaled.size)
            scaled.draft(None, tuple(round(side * times) for side in scaled.size))
            decoded = decode_any(data, side=256).image.convert("RGB")
            np.testing.assert_array_equal(decoded, scaled.convert("RGB"))
