"""What one image may cost: counted before it is decoded, kept by the system, said in its reason."""

import io
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import ROOT, children
from PIL import Image, PngImagePlugin
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless
from test_dicom import made
from test_images import encode
from test_workers import SMALL, ask

from features import limits, workers
from features.codestreams import rle_size, size_of
from features.datasets import open_dataset
from features.dicom import decode_dicom
from features.errors import ImageError
from features.extract import extract
from features.images import decode
from features.plan import ExtractionSettings
from features.workers import ImageRecipe, Workers

MEASURE = """
import os, sys
from pathlib import Path
import pydicom.pixels.utils, gdcm, openjpeg
from features import images, limits
from features.reasons import reason_of
from features.workers import ImageRecipe, load
from test_workers import SMALL
costs = []
plain = limits.check
def check(cost):
    costs.append(cost)
    plain(cost)
limits.check = check
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
for exact in (True, False) if sys.argv[1] == "both" else (True,):
    for name in sys.argv[2:]:
        costs.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is taken now
        before = peak()
        loaded, _ = load(Path(name), ImageRecipe((SMALL,), exact=exact))
        assert not loaded.reason or reason_of(loaded.reason), loaded.reason
        print(max(costs, default=0), peak() - before, loaded.reason, sep="\\t")
"""


def measured(files, *, both=False, megabytes="2000"):
    """Return (cost counted, memory taken, reason) of each file, loaded in one other process."""
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, "both" if both else "exact", *files],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | env | {limits.NAME: megabytes},
    )  # fmt: skip
    if "clear_refs" in run.stderr:
        pytest.skip("the system doesn't let a process measure itself")
    assert run.returncode == 0, run.stderr
    lines = [line.split("\t") for line in run.stdout.splitlines()]
    return [(float(cost), int(taken), reason) for cost, taken, reason in lines]


def compressed(image, syntax, kind, **options):
    """A DICOM file with an image's codestream."""
    header = {"Rows": image.height, "Columns": image.width}
    if image.mode == "RGB":
        colour = "YBR_FULL_422" if kind == "JPEG" else "YBR_RCT"
        header |= {"SamplesPerPixel": 3, "PhotometricInterpretation": colour}
        header["PlanarConfiguration"] = 0
    deep = np.uint16 if image.mode.startswith("I") else np.uint8
    return wrapped(made(np.zeros((1, 1), deep), **header), syntax, encode(image, kind, **options))


def wrapped(data, syntax, *frames):
    """A DICOM file's bytes with other pixels, compressed, in their place."""
    ds = pydicom.dcmread(io.BytesIO(data))
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate(list(frames))
    ds["PixelData"].is_undefined_length = True
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds)
    return out.getvalue()


def deflated(data, *, zeros=0):
    """A DICOM file deflated, with an element of zeros behind its pixels."""
    ds = pydicom.dcmread(io.BytesIO(data))
    plain = io.BytesIO()
    pydicom.dcmwrite(plain, ds, enforce_file_format=True)
    plain = plain.getvalue()
    end = 144 + struct.unpack("<I", plain[140:144])[0]
    meta = plain[144:end].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    meta = meta.replace(struct.pack("<2sH", b"UI", 20) + b"1.2.840.10008.1.2.1.99",
                        struct.pack("<2sH", b"UI", 22) + b"1.2.840.10008.1.2.1.99")  # fmt: skip
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    parts = [packer.compress(plain[end:])]
    if zeros:
        parts.append(packer.compress(struct.pack("<HH2sHI", 0x7FE1, 0x1010, b"OB", 0, zeros)))
        parts += [packer.compress(bytes(1 << 20)) for _ in range(zeros >> 20)]
    head = plain[:140] + struct.pack("<I", len(meta)) + meta
    return head + b"".join([*parts, packer.flush()])


SPARE = 25e6  # bytes: bands that are worked on, tables


def pictures(width, height):
    """Images of every kind that is decoded differently."""
    small = np.random.default_rng(0).integers(0, 256, (50, 40), dtype=np.uint8)
    grey = Image.fromarray(small).resize((width, height))
    rgb = Image.merge("RGB", [grey, grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT), grey])
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 16)
    turned = Image.Exif()
    turned[0x0112] = 6
    table = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        table[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        table[f"{name}PaletteColorLookupTableData"] = np.arange(256, dtype="<u2").tobytes()
    fast = {"compress_level": 1}
    return {
        "baseline.jpg": encode(rgb, "JPEG"),
        "turned.jpg": encode(rgb, "JPEG", exif=turned),
        "progressive.jpg": encode(rgb, "JPEG", progressive=True, subsampling=0),
        "rgb.png": encode(rgb, **fast),
        "alpha.png": encode(rgb.convert("RGBA"), **fast),
        "deep.png": encode(deep, **fast),
        "palette.png": encode(grey.convert("P"), transparency=3, **fast),
        "cmyk.tif": encode(rgb.convert("CMYK"), "TIFF"),
        "alpha.tif": encode(rgb.convert("RGBA"), "TIFF", compression="tiff_adobe_deflate"),
        "integers.tif": encode(Image.fromarray(np.asarray(grey).astype(np.int32)), "TIFF"),
        "a.bmp": encode(rgb, "BMP"),
        "a.gif": encode(grey, "GIF"),
        "a.webp": encode(rgb, "WEBP", quality=5, method=0),
        "a.ppm": encode(rgb, "PPM"),
        "grey.jp2": encode(grey, "JPEG2000"),
        "rgb.jp2": encode(rgb, "JPEG2000", quality_layers=[80]),
        "8.dcm": made(np.asarray(grey)),
        "16.dcm": made(np.asarray(deep), RescaleSlope="2", RescaleIntercept="-9"),
        "palette.dcm": made(np.asarray(grey), **table),
        "j2k.dcm": compressed(deep, JPEG2000Lossless, "JPEG2000", no_jp2=True),
        "j2k-rgb.dcm": compressed(rgb, JPEG2000, "JPEG2000", no_jp2=True, quality_layers=[80]),
        "jpeg-rgb.dcm": compressed(rgb, JPEGBaseline8Bit, "JPEG"),
    }


@pytest.mark.parametrize(
    "size", [(2000, 2500), pytest.param((4000, 5000), marks=pytest.mark.slow)], ids=str
)
def test_what_is_counted_before_decoding_is_what_decoding_takes(tmp_path, size):
    made_of = pictures(*size)
    for name, data in made_of.items():
        (tmp_path / name).write_bytes(data)
    found = measured([tmp_path / name for name in made_of])
    for name, (counted, taken, reason) in zip(made_of, found, strict=True):
        assert not reason, (name, reason)
        assert 0 < taken < counted + SPARE, (name, counted, taken)
        assert counted < 4 * taken + limits.RESERVE, (name, counted, taken)  # nothing far-fetched


def tiled(width, height):
    """A TIFF of 64 x 64 pixels in one deflated tile, which is said to be larger."""
    data = zlib.compress(bytes(4096))
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height}
    tags |= {324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def bombs():
    """Small files that would take gigabytes, with words of why they don't; "" where all is well."""
    text = PngImagePlugin.PngInfo()
    for k in range(80):
        text.add_text(f"k{k}", "x" * 1_000_000, zip=True)
    pixels = np.zeros((64, 64), np.uint8)
    plain = io.BytesIO()
    Image.new("L", (4000, 4000)).save(plain, "JPEG2000", no_jp2=True)
    jpeg = encode(Image.new("L", (9000, 9000)), "JPEG", quality=10)
    j2k = bytearray(encode(Image.new("L", (64, 64)), "JPEG2000"))
    size = j2k.find(b"\xff\x4f\xff\x51") + 8
    j2k[size : size + 8] = struct.pack(">II", 60_000, 60_000)
    run = b"\x81\0" * 2_500_000  # expands 64 times
    rle = struct.pack("<16I", 1, 64, *[0] * 14) + run
    return {
        "tall.png": (encode(Image.new("RGB", (1, 60_000))), ""),
        "wide.png": (encode(Image.new("L", (60_000, 1))), ""),
        "wide16.png": (encode(Image.fromarray(np.zeros((1, 60_000), np.uint16))), ""),
        "wide.dcm": (made(np.zeros((1, 65_535), np.uint16)), ""),
        "tall.dcm": (made(np.zeros((65_535, 1), np.uint16)), ""),
        "large.png": (encode(Image.new("RGB", (9000, 9000))), "would take about"),
        "larger.png": (encode(Image.new("1", (30_000, 30_000))), "over 179 megapixels"),
        "text.png": (encode(Image.new("L", (9, 9)), pnginfo=text), "can't be decoded|^$"),
        "codestream.jp2": (bytes(j2k), "can't be decoded"),
        "tile.tif": (tiled(30_000, 3_000), "would take about"),
        "declared.dcm": (made(pixels, Rows=65_535, Columns=2_700), "would take about"),
        "frames.dcm": (made(pixels, NumberOfFrames=10**9), "DICOM that can't be decoded"),
        "deflated.dcm": (deflated(made(pixels), zeros=1 << 20), ""),
        "deflated-bomb.dcm": (deflated(made(pixels), zeros=1 << 27), "inflates to more than 75 MB"),
        "j2k.dcm": (
            wrapped(made(pixels), JPEG2000Lossless, plain.getvalue()),
            "pixels are 4,000 x 4,000, its header says 64 x 64",
        ),
        "jpeg.dcm": (wrapped(made(pixels), JPEGBaseline8Bit, jpeg), "are 9,000 x 9,000"),
        "rle.dcm": (wrapped(made(pixels), RLELossless, rle), "would take about"),
    }


def test_small_files_that_would_take_gigabytes_take_no_more_than_one_image_may(tmp_path):
    files = bombs()
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
        assert len(data) < 9_000_000
    found = measured([tmp_path / name for name in files], both=True, megabytes="300")
    assert len(found) == 2 * len(files)
    for name, (_, taken, reason) in zip([*files, *files], found, strict=True):
        assert taken < 300e6, (name, taken)
        words = files[name][1]
        if words:
            assert re.search(words, reason), (name, reason)
        else:
            assert not reason, (name, reason)


HUNGRY = """
import sys
import features.workers as w
import numpy as np
plain = w.decode
def decode(data, **options):
    if data.startswith(b"hungry"):
        kept = np.ones(300_000_000, np.uint8)  # no header says so
    if data.startswith(b"crash"):
        import os
        try:
            kept = np.ones(300_000_000, np.uint8)
        except MemoryError:
            os.abort()  # as libraries do that don't look whether they got memory
    return plain(data, **options)
w.decode = decode
w.main()
"""


@pytest.mark.parametrize("threads", ["1", "4"])
def test_the_system_refuses_a_worker_more_memory_than_one_image_may_take(
    tmp_path, monkeypatch, threads
):
    monkeypatch.setenv(limits.NAME, "200")
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", HUNGRY))
    names = ["1.png", "hungry.png", "2.png", "crash.png", "3.png"]
    for name in names:
        (tmp_path / name).write_bytes(
            encode(Image.new("L", (50, 50))) if name[0].isdigit() else name.encode()
        )
    with Workers(ImageRecipe((SMALL,)), 1) as pool:
        facts, _ = ask(pool, [tmp_path / name for name in names], ImageRecipe((SMALL,)))
    assert [fact.reason for fact in facts] == [
        "", "decoding it takes more than the 200 MB of memory of one image, or than is left here "
        "(MEDPROBE_IMAGE_MEMORY)",
        "", "decoding it killed the worker process (signal 6), the second time alone", "",
    ]  # fmt: skip


SHARED = """
import os, signal, sys, time
from pathlib import Path
import features.workers as w
plain, busy = w.decode, Path(sys.argv[1])
def decode(data, **options):
    mine = busy / str(os.getpid())
    mine.touch()
    try:
        if data.startswith(b"large"):  # there is room for it only where nothing else is decoded
            time.sleep(0.3)
            if len(list(busy.iterdir())) > 1 or data.endswith(b"never"):
                mine.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            data = data[5:]
        time.sleep(0.05)
        return plain(data, **options)
    finally:
        mine.unlink(missing_ok=True)
w.decode = decode
w.main()
"""


@pytest.mark.parametrize("threads", ["1", "4"])
def test_an_image_that_ends_its_worker_for_want_of_memory_is_tried_alone(
    tmp_path, monkeypatch, threads
):
    """A worker kills itself, as the kernel would, where others decode beside it."""
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    (tmp_path / "busy").mkdir()
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", SHARED, str(tmp_path / "busy")))
    image = encode(Image.new("L", (50, 50)))
    files = []
    for k in range(24):
        files.append(tmp_path / f"{k:02d}.png")
        files[-1].write_bytes((b"large" if k % 6 == 1 else b"") + image)
    files.append(tmp_path / "never.png")
    files[-1].write_bytes(b"large never")
    with Workers(ImageRecipe((SMALL,)), 4) as pool:
        facts, _ = ask(pool, files, ImageRecipe((SMALL,)))
    assert [fact.reason for fact in facts[:-1]] == [""] * 24
    wanted = f"decoding it killed the worker process (signal {int(signal.SIGKILL)}), the second "
    assert facts[-1].reason == wanted + "time alone"


def test_workers_are_what_the_system_ends_first(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(Image.new("L", (50, 50))))
    before = set(children(os.getpid()))
    with Workers(ImageRecipe((SMALL,)), 1) as pool:
        ask(pool, [tmp_path / "a.png"], ImageRecipe((SMALL,)))
        [pid] = set(children(os.getpid())) - before
        score = Path(f"/proc/{pid}/oom_score_adj").read_text()
    assert score == "1000\n"


HANGING = """
import time
import features.workers as w
w.decode = lambda data, **options: time.sleep(3600)
w.main()
"""


def test_a_wish_to_stop_is_heard_while_an_image_hangs(tmp_path, monkeypatch, backbone):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(Image.new("L", (50, 50))))
    manifest = open_dataset(f"folder:{tmp_path}")
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", HANGING))
    end = time.monotonic() + 1
    with pytest.raises(KeyboardInterrupt):  # and not in an hour
        extract(
            manifest, [backbone], out=tmp_path / "out", settings=ExtractionSettings(batch_size=2),
            stop=lambda: time.monotonic() > end,
        )  # fmt: skip


def test_codestreams_are_measured_as_they_were_written():
    image = Image.new("RGB", (300, 200))
    for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG2000", {}),
                          ("JPEG2000", {"no_jp2": True})):  # fmt: skip
        size = size_of(encode(image, kind, **options))
        assert (size.width, size.height, size.components, size.bits) == (300, 200, 3, 8)
    assert size_of(b"\xff\xd8" * 9) is None
    assert size_of(b"") is None
    assert rle_size(bytes(64) + b"\xff\x01\x02abc\x80\x81\x07", 10**9) == 2 + 3 + 128


def test_a_deflated_file_is_what_it_was_before():
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 30), dtype=np.uint16)
    data = made(pixels, WindowCenter="2000", WindowWidth="3000")
    again = deflated(data)
    assert pydicom.dcmread(io.BytesIO(again)).file_meta.TransferSyntaxUID.is_deflated
    np.testing.assert_array_equal(decode_dicom(again), decode_dicom(data))


def test_what_an_image_costs_is_said_in_megabytes(monkeypatch):
    monkeypatch.setenv(limits.NAME, "200")
    with pytest.raises(ImageError, match="about 322 MB of memory: over the 200 MB of one image"):
        decode(encode(Image.new("RGB", (5000, 4470), "red"), "bmp"))
