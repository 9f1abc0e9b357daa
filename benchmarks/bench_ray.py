"""Time extraction and the sweep in one process beside Ray at equal cores; print Markdown.

Every cell is a process of its own that keeps to as many cores as it has workers (or all, where they
are fewer), all of Ray included; cells are run in turn, twice. A cluster is there before the clock
starts. `start` is until the first image is done (a worker imports torch and unpacks the weights);
what follows is of the images after it. CPU is of all processes, Ray's own too: on a machine that is
shared it says more than seconds. Images are photographs, each file with other bytes.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

CORES = os.cpu_count()
IMAGES = 1600
SIZE = (512, 512)
ROWS, WIDTH, CLASSES = 40_000, 384, 8
LISTED, GATHERED = 1_000_000, 65_536


class Meter(threading.Thread):
    """CPU seconds of this process and all that come from it, the dead included, every 0.5 s."""

    def __init__(self):
        super().__init__(daemon=True)
        self.spent = {}
        self.start()

    def run(self):
        """Look again and again."""
        while True:
            self.look()
            time.sleep(0.5)

    def look(self):
        """Return the seconds until now."""
        parents, used = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            pid = int(stat.parent.name)
            parents[pid], used[pid] = int(fields[1]), sum(map(int, fields[11:13]))
        for pid, ticks in used.items():
            above = pid
            while above in parents and above != os.getpid():
                above = parents[above]
            if above == os.getpid() or pid in self.spent:
                self.spent[pid] = max(ticks, self.spent.get(pid, 0))
        return sum(self.spent.values()) / os.sysconf("SC_CLK_TCK")


def cell(what, engine, workers, folder):
    """Run one measurement on a core for each worker, in this process and those it starts."""
    cores = min(workers, CORES)
    os.sched_setaffinity(0, range(cores))
    os.environ["OMP_NUM_THREADS"] = str(cores if engine == "local" else 1)
    if engine == "ray":
        import ray

        ray.init(
            address="local",
            num_cpus=workers,
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False,
        )
    cells = {"extract": extraction, "sweep": sweep, "driver": driver}
    print(json.dumps(cells[what](engine, cores, folder)))


def extraction(engine, cores, folder):
    from features.backbones import load_backbone
    from features.datasets import open_dataset
    from features.distributed import fill_by
    from features.extract import extract
    from features.plan import ExtractionSettings

    manifest, backbone = open_dataset(f"folder:{folder}"), load_backbone("efficientnet_lite0")
    settings, fill = ExtractionSettings(batch_size=16), None
    if engine == "ray":
        from features.cluster import Cluster

        cluster = Cluster(None)
        settings, fill = cluster.settle(settings), partial(fill_by, cluster.pool)
    with tempfile.TemporaryDirectory() as out:
        meter, begun, seen = Meter(), time.perf_counter(), []

        def note(done, *_):
            if done and not seen:
                seen.extend([time.perf_counter(), meter.look(), done])

        extract(manifest, [backbone], out=Path(out), settings=settings, progress=note, engine=fill)
        ended, used = time.perf_counter(), meter.look()
    first, before, done = seen
    return {
        "start": first - begun,
        "seconds": ended - begun,
        "rate": (len(manifest) - done) / (ended - first),
        "cpu": 1e3 * (used - before) / (len(manifest) - done),
    }


def sweep(engine, cores, _):
    import numpy as np
    import torch

    from probe.heads import fit_heads

    torch.set_num_threads(cores if engine == "local" else 1)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((ROWS, WIDTH)).astype(np.float32) * np.arange(1, WIDTH + 1) ** -0.5
    y = (X[:, :CLASSES] + 0.3 * rng.standard_normal((ROWS, CLASSES))).argmax(1)
    X, y = torch.from_numpy(X.astype(np.float32)), torch.from_numpy(y)
    C = np.logspace(-4, 2, 13)
    begun = time.perf_counter()
    if engine == "local":
        heads = fit_heads(X, y, C=C)
    else:
        from features.cluster import Cluster
        from probe.cluster import RowWorkers
        from probe.solve.sources import InMemory

        with RowWorkers(Cluster(None)) as team:
            team.fit_heads(InMemory(X[:4096]), y[:4096], C=[1e-4])  # the workers are there
            begun = time.perf_counter()
            heads = team.fit_heads(InMemory(X), y, C=C)
    return {"seconds": time.perf_counter() - begun, "values": heads.value.flatten().tolist()}


def measured(what, engine, workers, folder=""):
    words = [sys.executable, __file__, what, engine, str(workers), str(folder)]
    return json.loads(subprocess.check_output(words).splitlines()[-1])


def table_of_extraction():
    from bench_extract import encoded, write_images

    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), "JPEG", encoded("JPEG", SIZE), IMAGES)
        print("| workers | what | start, s | all, s | images/s | CPU, ms/image | of one process |")
        print("|---|---|---|---|---|---|---|")
        cpu = {}
        for workers in sorted({1, CORES, 2 * CORES}):
            engines = ("local", "ray") if workers <= CORES else ("ray",)
            found = {engine: [] for engine in engines}
            for engine in engines * 2:
                found[engine].append(measured("extract", engine, workers, folder))
            cpu |= {e: sum(f["cpu"] for f in fs) / len(fs) for e, fs in found.items()}
            cores = f"{min(workers, CORES)} core{'s'[: workers - 1]}"
            for engine, cells in found.items():
                columns = [
                    ", ".join(f"{c[name]:.1f}" for c in cells)
                    for name in ("start", "seconds", "rate", "cpu")
                ]
                what = f"one process, {cores}" if engine == "local" else f"Ray, {cores}"
                row = [workers, what, *columns, f"{cpu[engine] / cpu['local']:.2f}"]
                print(f"| {' | '.join(map(str, row))} |", flush=True)


def table_of_sweep():
    print("\n| cores | what | seconds | of one process | objective differs by |")
    print("|---|---|---|---|---|")
    for cores in range(1, CORES + 1):
        here, there = (measured("sweep", engine, cores) for engine in ("local", "ray"))
        off = max(abs(a - b) / a for a, b in zip(here["values"], there["values"], strict=True))
        print(f"| {cores} | one process | {here['seconds']:.1f} | 1.00 | |")
        ratio = there["seconds"] / here["seconds"]
        workers = f"Ray, {cores} worker{'s'[: cores - 1]}"
        print(
            f"| {cores} | {workers} | {there['seconds']:.1f} | {ratio:.2f} | {off:.0e} |",
            flush=True,
        )


def driver(_, __, folder):
    """Measure what the driver itself takes per image: its manifest, dealing, gathering."""
    import resource

    import numpy as np

    from features.datasets import open_dataset
    from features.jobs import Job
    from features.layout import is_filled
    from features.parts import deal, gather
    from features.store import FeatureStore

    def most():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    table = Path(folder, "table.csv")
    with table.open("w") as file:
        file.write("path,label\n")
        for i in range(LISTED):
            file.write(f"patient{i % 60000:05d}/study{i % 3}/view{i:09d}.jpg,{'ab'[i % 2]}\n")
    before, begun = most(), time.perf_counter()
    manifest = open_dataset(f"csv:{table}")
    read, grown = time.perf_counter() - begun, most() - before

    small = manifest.take(np.arange(GATHERED))
    shape, rng = {"final/cls": (768,)}, np.random.default_rng(0)
    about = {
        "fingerprint": {"backbone": {"name": "made", "weights": "random"}},
        "default_feature": "final/cls",
    }
    FeatureStore.create(Path(folder, "s.h5"), small, shape, **about, batch_size=256)
    with FeatureStore.open(Path(folder, "s.h5"), write=True) as store:
        job = Job(store, None, "cpu")
        begun = time.perf_counter()
        dealt = deal(small, [job], np.zeros(len(small), bool), 1000)
        dealing = time.perf_counter() - begun
        gathering = 0.0
        for part in dealt:
            n = len(part.rows)
            values = rng.standard_normal((n, 768), np.float32)
            source = {"hash": ["0" * 64] * n, "size": [1] * n, "mtime_ns": [1] * n}
            with part.sheets[0].opened(part.images) as filled:
                filled.commit(np.arange(n), {"final/cls": values}, source, {})
            begun = time.perf_counter()
            gather(part, [job])
            gathering += time.perf_counter() - begun
        size = sum(c.row_bytes for name, c in store.columns.items() if is_filled(name))
    return {
        "bytes": grown / LISTED,
        "read": read / LISTED,
        "deal": dealing / GATHERED,
        "gather": gathering / GATHERED,
        "rate": size * GATHERED / gathering,
    }


def table_of_driver():
    with tempfile.TemporaryDirectory() as folder:
        found = measured("driver", "local", 1, folder)
    print("\n| what the driver does, on one core | per image | 100 million images |")
    print("|---|---|---|")
    names = {"read": "read the table", "deal": "deal", "gather": "gather 768 floats"}
    for name, what in names.items():
        each = found[name]
        print(f"| {what} | {each * 1e6:.1f} us | {each * 1e8 / 60:.0f} min |")
    print(f"| hold the manifest | {found['bytes']:.0f} B | {found['bytes'] * 1e8 / 1e9:.0f} GB |")
    print(f"\nGathering went at {found['rate'] / 1e6:.0f} MB/s.")


def main():
    if len(sys.argv) > 2:
        return cell(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    import torch

    print(
        f"{datetime.date.today()}, {CORES} cores, {platform.machine()}, torch {torch.__version__}, "
        f"{IMAGES} JPEGs of {SIZE[0]} x {SIZE[1]}, EfficientNet-Lite0, float32, batches of 16\n"
    )
    if sys.argv[1:] in ([], ["extraction"]):
        table_of_extraction()
    if sys.argv[1:]:
        return None
    print(f"\n{ROWS} x {WIDTH}, {CLASSES} classes, 13 strengths, tol 1e-6")
    table_of_sweep()
    table_of_driver()
    return None


if __name__ == "__main__":
    main()
