"""Kills, full disks, damaged and odd images, large numbers: what a long run meets."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, PngImagePlugin
from test_images import bomb, encode

from features.datasets import open_dataset
from features.errors import StoreError
from features.extract import extract
from features.plan import ExtractionSettings
from features.store import FeatureStore


def command(folder, out, *options):
    return [
        sys.executable, ROOT / "cli.py", "extract", f"folder:{folder}", "-m", "efficientnet_lite0",
        "--batch-size", "2", "-o", out, *options,
    ]  # fmt: skip


def same(one, other):
    """Whether two complete stores hold the same to the bit, and both verify."""
    with FeatureStore.open(one) as a, FeatureStore.open(other) as b:
        assert (a.done == b.done).all()
        assert not (a.done == 0).any()
        for store in (a, b):
            assert not any(rows.size for _, rows in store.verify())
        assert a.features == b.features
        assert a.fingerprint == b.fingerprint
        return all(a.read(name).tobytes() == b.read(name).tobytes() for name in a.features)


@pytest.mark.slow
def test_thirty_kills_at_random_moments_lose_nothing(tmp_path, image_folder):
    store = Path("images", "efficientnet_lite0.h5")
    options = ("--tokens", "--views", "1", "--layers", "3,final")
    started = time.monotonic()
    subprocess.run(
        command(image_folder, tmp_path / "calm", *options),
        check=True, cwd=ROOT, capture_output=True,
    )  # fmt: skip
    whole = time.monotonic() - started
    draw = random.Random(0)
    rough = tmp_path / "rough" / store
    for kill in range(30):
        if kill % 10 == 0:  # each time from nothing, and then from wherever it was
            shutil.rmtree(tmp_path / "rough", ignore_errors=True)
        with subprocess.Popen(
            command(image_folder, tmp_path / "rough", *options),
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as run:  # fmt: skip
            time.sleep(draw.uniform(0.2 * whole, 0.9 * whole))
            run.send_signal(signal.SIGKILL)
        if rough.exists():
            with FeatureStore.open(rough) as opened:
                assert not any(rows.size for _, rows in opened.verify())
    subprocess.run(
        command(image_folder, tmp_path / "rough", *options),
        check=True, cwd=ROOT, capture_output=True,
    )  # fmt: skip
    assert same(tmp_path / "calm" / store, rough)


@pytest.mark.slow
def test_a_kill_while_features_are_added_loses_nothing(tmp_path, image_folder):
    store = Path("images", "efficientnet_lite0.h5")
    for out, more in (("calm", ("--layers", "all")), ("rough", ())):
        subprocess.run(
            command(image_folder, tmp_path / out, *more), check=True, cwd=ROOT, capture_output=True
        )
    adding = command(image_folder, tmp_path / "rough", "--layers", "all")
    side = (tmp_path / "rough" / store).with_suffix(".adding")
    for goal in (4, 20):
        with subprocess.Popen(
            adding, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as run:
            while run.poll() is None:
                if side.exists():
                    with FeatureStore.open(side) as opened:
                        if (opened.done == 1).sum() >= goal:
                            break
                time.sleep(0.01)
            run.send_signal(signal.SIGKILL)
        with FeatureStore.open(tmp_path / "rough" / store) as opened:
            assert list(opened.features) == ["final/mean"]  # as it was until all is there
            assert not any(rows.size for _, rows in opened.verify())
    subprocess.run(adding, check=True, cwd=ROOT, capture_output=True)
    assert same(tmp_path / "calm" / store, tmp_path / "rough" / store)
    assert not side.exists()


def test_a_full_disk_loses_nothing(tmp_path, image_folder, backbone):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        manifest = open_dataset(f"folder:{image_folder}")
        wanted = ExtractionSettings(batch_size=4, tokens=True)
        begun = []
        with pytest.raises(KeyboardInterrupt):
            extract(
                manifest, [backbone], out=disk, settings=wanted,
                progress=lambda n, of, bad: begun.append(n), stop=lambda: len(begun) > 1,
            )  # fmt: skip
        ballast = disk / "ballast"
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(free - 800_000))
        path = disk / "images" / "efficientnet_lite0.h5"
        with pytest.raises(StoreError, match="the disk is full. What is stored stays"):
            extract(manifest, [backbone], out=disk, settings=wanted)
        with FeatureStore.open(path) as store:
            assert 4 <= (store.done == 1).sum() < 40
            assert not any(rows.size for _, rows in store.verify())
        ballast.unlink()
        extract(manifest, [backbone], out=disk, settings=wanted)
        calm = extract(manifest, [backbone], out=tmp_path / "calm", settings=wanted)[0]
        assert same(path, calm.store)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_odd_images_come_out_as_a_person_sees_them_and_broken_ones_say_why(tmp_path, backbone):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 12), dtype=np.uint8)).resize((300, 260))
    folder = Path(tempfile.mkdtemp())  # not below pytest's own, which only root may enter
    folder.chmod(0o755)
    try:
        names = Image.Exif()
        names[0x010E] = "x" * 60_000
        text = PngImagePlugin.PngInfo()
        text.add_text("comment", "y" * 200_000, zip=True)
        alike = {
            "plain.png": encode(smooth),
            "sechzehn-bit.png": encode(Image.fromarray(np.asarray(smooth).astype(np.uint16) * 257)),
            "alpha.png": encode(smooth.convert("RGBA")),
            "palette.png": encode(smooth.convert("P")),
            "animated.gif": encode(smooth, "gif", save_all=True, append_images=[smooth.rotate(9)]),
            "animated.png": encode(smooth, "png", save_all=True, append_images=[smooth.rotate(9)]),
            "animated.webp": encode(
                smooth.convert("RGB"), "webp", lossless=True, save_all=True,
                append_images=[smooth.rotate(9).convert("RGB")],
            ),
            "cmyk.tiff": encode(smooth.convert("RGB").convert("CMYK"), "tiff"),
            "large-exif.png": encode(smooth, exif=names, pnginfo=text),
            "jpeg.bin": encode(smooth, "jpeg", quality=100),
            "cmyk.jpg": encode(smooth.convert("RGB").convert("CMYK"), "jpeg", quality=100),
            "größe-眼底-🩻.png": encode(smooth),
        }  # fmt: skip
        broken = {
            "empty.png": (b"", "file is empty"),
            "truncated.png": (encode(smooth)[:2000], "can't be decoded"),
            "truncated.jpg": (encode(smooth, "jpeg")[:900], "can't be decoded"),
            "text.jpg": (b"not an image", "not an image of a known kind"),
            "bomb.png": (bomb(), "decompression bomb"),
        }
        (folder / "a").mkdir()
        (folder / "b").mkdir()
        for turn in (90, 180):
            (folder / "b" / f"{turn}.png").write_bytes(encode(smooth.rotate(turn)))
        for name, data in alike.items():
            (folder / "a" / name).write_bytes(data)
        for name, (data, _) in broken.items():
            (folder / "a" / name).write_bytes(data)
        odd = os.fsencode(folder / "a") + b"/latin-\xe9.png"
        Path(os.fsdecode(odd)).write_bytes(encode(smooth))
        table = folder / "images.csv"
        paths = [f"a/{name}" for name in (*alike, *broken, "missing.png")]
        rows = "".join(f"{path},{'pq'[i % 2]}\n" for i, path in enumerate(paths))
        table.write_text(f"path,label\n{rows}")
        with pytest.warns(UserWarning, match=r"1 of \d+ files is not there: .*missing.png"):
            [report] = extract(open_dataset(f"csv:{table}"), [backbone], out=tmp_path)
        reasons = {Path(path).name: reason for path, reason in report.bad.items()}
        assert set(reasons) == {*broken, "missing.png"}
        for name, (_, words) in broken.items():
            assert words in reasons[name]
        assert reasons["missing.png"] == "file not found"
        with FeatureStore.open(report.store) as store:
            manifest, X = store.manifest(), torch.from_numpy(store.read("final/mean"))
        found = dict(zip(manifest.path.tolist(), X, strict=True))
        for name in alike:
            cosine = torch.cosine_similarity(found[f"a/{name}"], found["a/plain.png"], dim=0)
            assert cosine > (0.98 if name in ("jpeg.bin", "cmyk.jpg") else 0.999), name
        # a name that is not UTF-8 is read, stored and given back
        one = open_dataset(f"folder:{folder}")
        [report] = extract(one, [backbone], out=tmp_path / "folder")
        with FeatureStore.open(report.store) as store:
            assert os.fsdecode(b"a/latin-\xe9.png") in store.manifest().path.tolist()
            assert not any(rows.size for _, rows in store.verify())
        assert "a/text.jpg" in report.bad
    finally:
        shutil.rmtree(folder)


def test_a_file_that_may_not_be_read_says_so(tmp_path):
    """As another user, because root may read everything."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        file = folder / "secret.png"
        file.write_bytes(encode(Image.new("L", (9, 9))))
        file.chmod(0)
        code = f"""
import os
if os.getuid() == 0:
    os.setuid(65534)
from pathlib import Path
from features.errors import ImageError
from features.images import read_bytes
try:
    read_bytes(Path({str(file)!r}))
except ImageError as error:
    print(error)
"""
        # imported before the user changes, who need not be allowed to read the program
        code = "import features.images\n" + code
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert run.stdout == "can't be read: Permission denied\n"
    finally:
        shutil.rmtree(folder)


MEASURE = """
import resource, sys
from pathlib import Path
from features.backbones import load_backbone
from features.datasets import open_dataset
from features.extract import extract
from features.plan import ExtractionSettings
backbone = load_backbone("efficientnet_lite0", None, 32)
def run(name):
    manifest = open_dataset(f"folder:{sys.argv[1]}/{name}")
    [report] = extract(
        manifest, [backbone], out=Path(sys.argv[1]), settings=ExtractionSettings(tokens=True)
    )
    assert report.computed == len(manifest) and not report.bad
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
run("few")
print(run("some"), run("many"))
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    header = encode(Image.fromarray(np.arange(24 * 24, dtype=np.uint16).reshape(24, 24) % 251 * 1))
    for name, n in (("few", 64), ("some", 150), ("many", 1500)):
        for i in range(n):
            file = tmp_path / name / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(header + i.to_bytes(4, "little"))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    some, many = map(float, run.stdout.split())
    assert many - some < 10, f"{some} MB at 150 images, {many} MB at 1500"
