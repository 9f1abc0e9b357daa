"""Workers give the pixels of the plain functions, and survive what kills them."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import children
from PIL import Image

from features import workers
from features.images import Transform, decode
from features.workers import ImageRecipe, Workers, load

SMALL = Transform(32, 40, "bicubic", (0.5,) * 3, (0.5,) * 3)
LARGE = Transform(64, 64, "bilinear", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.jpg"
        )
    return sorted(tmp_path.iterdir())


def ask(pool, files, recipe):
    """Have files loaded; return their facts and pixels."""
    blocks = [
        [np.zeros((1 + recipe.views, t.size, t.size, 3), np.uint8) for t in recipe.transforms]
        for _ in files
    ]
    futures = [
        pool.load(f, [memoryview(b).cast("B") for b in some])
        for f, some in zip(files, blocks, strict=True)
    ]
    return [future.result(timeout=60) for future in futures], blocks


@pytest.mark.parametrize("count", [1, 3])
def test_pixels_are_those_of_the_plain_functions_whatever_the_number_of_workers(files, count):
    recipe = ImageRecipe((SMALL, LARGE), views=2, seed=7)
    with Workers(recipe, count) as pool:
        facts, blocks = ask(pool, files, recipe)
    for file, fact, pixels in zip(files, facts, blocks, strict=True):
        known, wanted = load(file, recipe)
        assert (fact.hash, fact.size, fact.mtime_ns) == (known.hash, known.size, known.mtime_ns)
        for ours, theirs in zip(pixels, wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        exact = SMALL.prepare(decode(file.read_bytes()), exact=True)
        np.testing.assert_array_equal(pixels[0][0], exact)  # nothing here is large enough to scale


def test_a_worker_that_is_killed_loses_no_image(files):
    recipe = ImageRecipe((SMALL,))
    others = set(children(os.getpid()))  # such as multiprocessing's resource tracker
    with Workers(recipe, 2) as pool:
        ask(pool, files[:4], recipe)
        ours = set(children(os.getpid())) - others
        assert len(ours) == 2
        for pid in ours:
            os.kill(pid, signal.SIGKILL)
        facts, blocks = ask(pool, files, recipe)
    assert not any(fact.reason for fact in facts)
    for file, [pixels] in zip(files, blocks, strict=True):
        np.testing.assert_array_equal(pixels, load(file, recipe)[1][0])


DYING = """
import features.workers as w
plain = w.decode
def decode(data, **options):
    if data.startswith(b"poison"):
        import os
        os.abort()
    return plain(data, **options)
w.decode = decode
w.main()
"""


def test_an_image_that_kills_its_worker_twice_is_bad_and_the_others_are_not(
    files, tmp_path, monkeypatch
):
    poison = tmp_path / "poison.jpg"
    poison.write_bytes(b"poison")
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", DYING))
    recipe = ImageRecipe((SMALL,))
    with Workers(recipe, 1) as pool:
        facts, _ = ask(pool, [*files[:3], poison, *files[3:6]], recipe)
    reasons = [fact.reason for fact in facts]
    assert reasons[3] == ("decoding it killed the worker process (signal 6), the second time alone")
    assert not any(reasons[:3] + reasons[4:])


def test_workers_end_with_their_parent_even_when_it_is_killed(files):
    code = f"""
import time
from pathlib import Path
import numpy as np
from features.images import Transform
from features.workers import ImageRecipe, Workers
recipe = ImageRecipe(({SMALL!r},))
pool = Workers(recipe, 2)
for _ in range(2):
    block = np.zeros((1, 32, 32, 3), np.uint8)
    pool.load(Path({str(files[0])!r}), [memoryview(block).cast("B")]).result()
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "ready\n"
        found = children(run.pid)
        run.kill()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in found):  # noqa: PTH110
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_starting_a_worker_imports_no_torch():
    code = "import sys, features.workers; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
