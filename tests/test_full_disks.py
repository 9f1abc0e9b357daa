"""No room, or no right, to write: one line, an exit code, and what was there stays whole.

The system's limit on the size of a file stands for a full disk: a write beyond it fails at the very
byte, of whichever file it is, in this process and in those that it starts.
"""

import os
import resource
import subprocess
from contextlib import contextmanager

import pytest
from test_kills import COMMANDS, NAME, PROBE, SMALL, outcome, store_of, whole, write_images
from test_odd_stores import call

AT_ONCE = 6  # limits that are tried per command


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write_images(root / "images")
    for words in (
        ("extract", f"folder:{root / 'images'}", "-m", NAME, *SMALL, "-o", root / "features"),
        ("probe", lambda: store_of(root), "-o", root / "results", *PROBE),
    ):
        assert call(*[word() if callable(word) else word for word in words]).exit_code == 0
    return root


@contextmanager
def no_file_above(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores the signal
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def said_once(found, words):
    """The error: one line, or one per cell of a grid."""
    lines = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, found.output
    assert words in found.output
    assert "Traceback" not in found.output
    assert "Errno" not in found.output
    return lines[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fills_at_any_file_leaves_what_was_there_whole(tmp_path, made, name):
    calm, out = tmp_path / "calm", tmp_path / "out"
    assert call(*COMMANDS[name](made, calm)).exit_code == 0
    wanted = outcome(calm)
    sizes = sorted({p.stat().st_size for p in calm.rglob("*") if p.is_file()} - {0})
    limits = [size - 1 for size in sizes[:: -(-len(sizes) // AT_ONCE)]]
    codes = []
    for limit in limits:
        out = tmp_path / f"{limit}"
        with no_file_above(limit):
            found = call(*COMMANDS[name](made, out))
        codes.append(found.exit_code)
        if found.exit_code:
            assert found.exit_code == (1 if "cells failed" in found.stderr else 2)
            said_once(found, "File too large")
            assert not [*out.rglob("*.part")]
        whole(out, {})
    assert codes.count(0) < len(codes) / 2
    again = call(*COMMANDS[name](made, out))  # there is room now
    assert again.exit_code == 0
    assert outcome(out) == wanted
    for limit in limits[:: len(limits) - 1]:
        with no_file_above(limit):
            call(*COMMANDS[name](made, out))
        assert outcome(out) == wanted


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path, made, name):
    """Root may write everywhere but to a disk that is read-only, and below a file."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "disk").mkdir()
    places = {tmp_path / "file": "", tmp_path / "file" / "below": "Not a directory"}
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", tmp_path / "disk"],
        capture_output=True,
    ).returncode
    if mounted:
        places |= dict.fromkeys((tmp_path / "disk", tmp_path / "disk" / "x"), "Read-only file sys")
    if os.getuid():
        (tmp_path / "closed").mkdir(mode=0o555)
        places[tmp_path / "closed"] = "Permission denied"
    try:
        for place, words in places.items():
            found = call(*COMMANDS[name](made, place))
            assert found.exit_code == 2
            line = said_once(found, words)
            assert "Make room, or " in line
            assert str(place) in line
    finally:
        if mounted:
            subprocess.run(["umount", tmp_path / "disk"], check=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_predictions_are_replaced_whole_or_not_at_all(tmp_path, made):
    head = next(iter(sorted(made.glob("results/**/heads.json"))))
    said = tmp_path / "said.csv"
    words = ("predict", head, store_of(made), "-o", said)
    assert call(*words).exit_code == 0
    before = said.read_bytes()
    with no_file_above(len(before) - 1):
        found = call(*words)
    assert found.exit_code == 2
    assert said_once(found, f"{said}: File too large. Make room")
    assert said.read_bytes() == before
    assert list(tmp_path.iterdir()) == [said]
