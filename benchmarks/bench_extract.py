"""Time extraction beside bare forward passes and beside what people use today; print Markdown.

Everything that a ratio compares is timed in this run, one after the other, the bare passes before
and after. Weights are random but for the embedded backbone's: speed does not depend on them.
"Today" is a timm model in float32 fed by a DataLoader of torchvision's transforms on Pillow images,
with as many workers as cores. Images are photographs resized to what stands in the table, each file
with other bytes.
"""

import datetime
import io
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms

from features.backbones import load_backbone
from features.datasets import open_dataset
from features.devices import PRECISIONS, resolve_precision
from features.extract import extract
from features.images import decode
from features.plan import ExtractionSettings
from features.store import FeatureStore

CORES = os.cpu_count()
BACKBONES = {
    "ViT-B/16": ("deit", "random"),
    "ResNet152": ("resnet152", "random"),
    "EfficientNet-Lite0": ("efficientnet_lite0", None),
}
SETS = {
    "512 x 512 JPEG": ("JPEG", (512, 512)),
    "3216 x 2136 JPEG": ("JPEG", (3216, 2136)),
    "2416 x 1736 PNG": ("PNG", (2416, 1736)),
}
BATCH = 16
SECONDS = 10  # that the forward passes of one cell should take
MADE = {"backbone": {"name": "made", "weights": "random"}}


def encoded(kind, size, noise=2.0):
    """Return a photograph of that size, with a sensor's noise so that it compresses like one."""
    picture = Image.fromarray(load_sample_images().images[0]).resize(size, Image.LANCZOS)
    grain = np.random.default_rng(0).normal(0, noise, (size[1], size[0], 3))
    data = io.BytesIO()
    pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(data, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return data.getvalue()


def write_images(folder, kind, data, n):
    """N files of the same picture and other bytes: decoders pass over what follows the end."""
    for i in range(n):
        file = folder / "ab"[i % 2] / f"{i:05d}.{kind.lower()}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data + i.to_bytes(4, "little"))
    return open_dataset(f"folder:{folder}")


@torch.inference_mode()
def bare(backbone, dtype, n):
    """Images per second of the passes alone, pixels in memory as extraction hands them over."""
    t = backbone.transform
    pixels = torch.randint(0, 256, (BATCH, t.size, t.size, 3), dtype=torch.uint8)
    images = backbone.normalise(pixels, dtype)
    wanted = [backbone.spec.default_feature]
    backbone.network(images, wanted)
    start = time.perf_counter()
    for _ in range(0, n, BATCH):
        backbone.network(images, wanted)
    return n / (time.perf_counter() - start)


def end_to_end(manifest, backbones, **settings):
    """Images per second of a whole run, from the list of files to the closed store."""
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        extract(
            manifest,
            backbones,
            out=Path(out),
            settings=ExtractionSettings(batch_size=BATCH, **settings),
        )
        return len(manifest) / (time.perf_counter() - start)


class Files(torch.utils.data.Dataset):
    def __init__(self, paths, prepare):
        self.paths, self.prepare = paths, prepare

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.prepare(Image.open(self.paths[i]).convert("RGB"))


@torch.inference_mode()
def today(architecture, transform, manifest):
    """Images per second of the usual recipe."""
    import timm

    model = timm.create_model(architecture, num_classes=0).eval()
    prepare = transforms.Compose(
        [
            transforms.Resize(transform.resize, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(transform.size),
            transforms.ToTensor(),
            transforms.Normalize(transform.mean, transform.std),
        ]
    )
    start = time.perf_counter()
    files = Files([manifest.root / p for p in manifest.path], prepare)
    loader = torch.utils.data.DataLoader(files, BATCH, num_workers=CORES)
    found = [model(images).numpy() for images in loader]
    with tempfile.TemporaryFile() as file:
        np.save(file, np.concatenate(found))
    return len(manifest) / (time.perf_counter() - start)


def table_of_speeds():
    print("\n### End to end\n")
    print(
        "| backbone | images | bare passes, img/s | end to end, img/s | of bare "
        "| decoding all cores, ms/image | of bare + decoding | today, img/s | times today |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    names = {"deit": "deit_base_patch16_224", "efficientnet_lite0": "tf_efficientnet_lite0"}
    data = {what: (kind, encoded(kind, size)) for what, (kind, size) in SETS.items()}
    for title, (name, weights) in BACKBONES.items():
        backbone = load_backbone(name, weights)
        dtype = PRECISIONS[resolve_precision("auto", "cpu", bfloat16=backbone.spec.bfloat16)]
        backbone.to("cpu", dtype)
        n = BATCH * max(2, round(SECONDS * bare(backbone, dtype, 2 * BATCH) / BATCH))
        for what, (kind, image) in data.items():
            with tempfile.TemporaryDirectory() as folder:
                manifest = write_images(Path(folder), kind, image, n)
                before = bare(backbone, dtype, n)
                ours = end_to_end(manifest, [backbone])
                alone = (before + bare(backbone, dtype, n)) / 2
                decoding = decode_seconds(manifest, backbone.transform) / CORES
                old = today(names.get(name, name), backbone.transform, manifest)
            print(
                f"| {title}, {str(dtype).removeprefix('torch.')} | {what} | {alone:.1f} "
                f"| {ours:.1f} | {ours / alone:.2f} | {1e3 * decoding:.1f} "
                f"| {ours * (1 / alone + decoding):.2f} | {old:.1f} | {ours / old:.1f} |",
                flush=True,
            )


def decode_seconds(manifest, transform):
    """Seconds of one core to read and decode an image as extraction does."""
    from features.workers import ImageRecipe, load

    recipe = ImageRecipe((transform,))
    files = [manifest.root / p for p in manifest.path[:24]]
    return float(np.median([load(file, recipe)[0].seconds for file in files]))


def table_of_decoders():
    """Milliseconds of one core, decoding to 8-bit RGB, by whichever libraries are installed."""
    print("\n### Decoding alone, milliseconds on one core\n")
    import torchvision

    torch.set_num_threads(1)
    as_bytes = {what: encoded(*how) for what, how in SETS.items()}

    def crop(data, exact):
        t = load_backbone("deit", "random").transform
        return lambda: t.prepare(decode(data, side=None if exact else t.resize), exact=exact)

    def with_pillow(data):
        return lambda: Image.open(io.BytesIO(data)).convert("RGB")

    def with_torchvision(data):
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return lambda: torchvision.io.decode_image(tensor)

    def with_opencv(data):
        import cv2

        cv2.setNumThreads(1)
        return lambda: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)

    def with_simplejpeg(data):
        import simplejpeg

        return lambda: simplejpeg.decode_jpeg(data)

    def with_simplejpeg_scaled(data):
        import simplejpeg

        return lambda: simplejpeg.decode_jpeg(data, min_height=512, min_width=512, min_factor=1)

    def with_imagecodecs(data):
        import imagecodecs

        return lambda: imagecodecs.imread(data) if data[:2] == b"\xff\xd8" else png(data)

    def png(data):
        import imagecodecs

        return imagecodecs.png_decode(data)

    rows = {
        "Pillow": with_pillow,
        "torchvision": with_torchvision,
        "OpenCV": with_opencv,
        "imagecodecs": with_imagecodecs,
        "simplejpeg": with_simplejpeg,
        "simplejpeg, scaled": with_simplejpeg_scaled,
        "Medprobe to a 224 crop, --exact-decode": lambda data: crop(data, exact=True),
        "Medprobe to a 224 crop": lambda data: crop(data, exact=False),
    }
    print(f"| library | {' | '.join(as_bytes)} |")
    print(f"|---|{'---|' * len(as_bytes)}")
    for what, make in rows.items():
        cells = []
        for data in as_bytes.values():
            try:
                run = make(data)
                run()
            except ImportError:
                cells.append("not installed")
                continue
            except ValueError:
                cells.append("-")
                continue
            times = []
            for _ in range(9):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            cells.append(f"{1e3 * np.median(times):.1f}")
        print(f"| {what} | {' | '.join(cells)} |", flush=True)
    torch.set_num_threads(CORES)


def table_of_eight(n=4 * BATCH):
    print("\n### Eight backbones in one run, and in eight\n")
    names = ("sam", "seem", "dinov2", "openclip", "blip", "deit", "dino", "resnet152")
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_images(Path(folder), "JPEG", encoded("JPEG", (3216, 2136)), n)
        loaded = [load_backbone(name, "random") for name in names]
        dtypes = [
            PRECISIONS[resolve_precision("auto", "cpu", bfloat16=b.spec.bfloat16)] for b in loaded
        ]
        for backbone, dtype in zip(loaded, dtypes, strict=True):
            backbone.to("cpu", dtype)
        before = sum(n / bare(b, d, n) for b, d in zip(loaded, dtypes, strict=True))
        together = n / end_to_end(manifest, loaded)
        apart = sum(n / end_to_end(manifest, [backbone]) for backbone in loaded)
        passes = (before + sum(n / bare(b, d, n) for b, d in zip(loaded, dtypes, strict=True))) / 2
        decoding = decode_seconds(manifest, loaded[0].transform) / CORES * n
    print("| what | seconds | of passes + one decoding |")
    print("|---|---|---|")
    for what, seconds in (
        ("forward passes alone, summed", passes),
        ("decoding once, all cores", decoding),
        ("eight backbones in one run", together),
        ("eight runs", apart),
    ):
        print(f"| {what} | {seconds:.1f} | {seconds / (passes + decoding):.2f} |")


def table_of_reading(n=60_000, d=768, tokens=(197, 768)):
    print("\n### Reading a store, warm\n")
    from features.manifest import Manifest

    ids = np.array([f"{i:06d}" for i in range(n)])
    manifest = Manifest(
        "made", Path("/nowhere"), ids, ids, ids, np.full(n, "train"), np.zeros(n, np.int32),
        ("a", "b"), "given",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "s.h5")
        m = 4096
        for rows, name, shape in ((n, "final/cls", (d,)), (m, "final/tokens", tokens)):
            FeatureStore.create(
                path, manifest.head(rows), {name: shape}, fingerprint=MADE, default_feature=name,
                batch_size=256,
            )  # fmt: skip
            with FeatureStore.open(path, write=True) as store:
                column = store.columns[f"features/{name}"]
                for start in range(0, rows, 1024):
                    some = np.arange(start, min(start + 1024, rows))
                    column.write(some, rng.standard_normal((len(some), *shape), np.float32))
                size = column.row_bytes * rows

                def whole(store=store, name=name):
                    return store.read(name)

                def raw(column=column, size=size):
                    return np.fromfile(path, np.uint8, size, offset=column.offset)

                def shuffled(store=store, name=name, rows=rows):
                    order = rng.permutation(rows)
                    for k in range(0, rows, 64):
                        store.read(name, order[k : k + 64])

                times = {}
                for what, run in (("fromfile", raw), ("read", whole), ("random", shuffled)):
                    run()
                    spent = []
                    for _ in range(5):
                        start = time.perf_counter()
                        run()
                        spent.append(time.perf_counter() - start)
                    times[what] = size / np.median(spent) / 1e9
            if name == "final/cls":
                print("| what | numpy.fromfile, GB/s | store.read, GB/s | ratio "
                      "| random batches of 64, GB/s | rows/s |")  # fmt: skip
                print("|---|---|---|---|---|---|")
            print(
                f"| {name} {rows} x {' x '.join(map(str, shape))} | {times['fromfile']:.2f} "
                f"| {times['read']:.2f} | {times['read'] / times['fromfile']:.2f} "
                f"| {times['random']:.2f} | {times['random'] * 1e9 / column.row_bytes:,.0f} |"
            )


TABLES = {
    "speeds": table_of_speeds,
    "decoders": table_of_decoders,
    "eight": table_of_eight,
    "reading": table_of_reading,
}


def main():
    print(
        f"{datetime.date.today()}, {CORES} cores, {platform.machine()}, torch {torch.__version__}, "
        f"auto precision {resolve_precision('auto', 'cpu')}"
    )
    for name in sys.argv[1:] or TABLES:
        TABLES[name]()


if __name__ == "__main__":
    main()
