"""The program in a folder that isn't its own, with names in it that Python would import."""

import os
import subprocess
import sys

import numpy as np
from conftest import ROOT
from PIL import Image

# What an editable install does: a finder that is asked after all of sys.path.
EDITABLE = f"""
import sys
from importlib.machinery import PathFinder

class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(ROOT)!r}])

sys.meta_path.append(Editable)
from cli import main
"""
PROGRAM = (
    EDITABLE
    + """
if __name__ == "__main__":
    main()
"""
)
PROCESSES = (
    EDITABLE
    + """
from probe.report import processes
processes.cores = lambda: 2
if __name__ == "__main__":
    with processes.several() as run:
        assert list(run(abs, [-1, -2, -3], few=0)) == [1, 2, 3]
"""
)
TRAP = "open({!r}, 'w').close()\nraise ImportError('not to be imported')\n"
TRAPS = ("json.py", "hashlib.py", "numpy.py", "PIL/__init__.py", "sklearn/__init__.py", "plotly.py")
MODELS = ("timm:resnet10t", "timm:mobilenetv3_small_050")
STORES = [f"features/images/{name.replace(':', '-')}.h5" for name in MODELS]


def made(tmp_path):
    """Make a folder of images, empty folders named as our packages, and modules to fall into."""
    noise = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    for name in ("features", "probe", "cli"):
        (tmp_path / name).mkdir()
    for name in TRAPS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(TRAP.format(str(tmp_path / "trace")))
    return tmp_path


def ran(folder, code, *words):
    """Run code as a program in the folder, as after an editable install."""
    program = folder / "program" / "medprobe"
    program.parent.mkdir(exist_ok=True)
    program.write_text(code)
    done = subprocess.run(
        [sys.executable, program, *words],
        cwd=folder, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (folder / "trace").exists(), words


def test_nothing_is_imported_from_the_current_folder(tmp_path):
    folder = made(tmp_path)
    models = ("-m", MODELS[0], "-m", MODELS[1], "--weights", "random")
    ran(folder, PROGRAM, "extract", "folder:images", *models, "--image-size", "64")
    ran(folder, PROGRAM, "probe", *STORES, "--bootstrap", "100")
    ran(folder, PROGRAM, "report", "results")


def test_nor_by_the_processes_that_draw_the_report(tmp_path):
    ran(made(tmp_path), PROCESSES)
