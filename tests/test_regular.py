"""Only files are opened, at most so many bytes of them are read, and nothing waits for more."""

import os
import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image
from test_images import encode

from features import limits, urls
from features.datasets import Options, open_dataset
from features.errors import DatasetError, ImageError, MedprobeError
from features.files import NotRegularError, TooLargeError, open_regular, read_regular
from features.images import read_bytes
from features.urls import Url, locate


@pytest.fixture
def odd(tmp_path):
    """What lies in a file system and is no file."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    ours, theirs = os.openpty()
    (tmp_path / "terminal").symlink_to(os.ttyname(theirs))
    yield [tmp_path / name for name in ("pipe", "socket", "zero.png", "terminal")]
    os.close(ours)
    os.close(theirs)


def test_devices_pipes_sockets_and_terminals_are_never_opened(odd):
    for path in odd:
        with pytest.raises(NotRegularError):
            open_regular(path)
        with pytest.raises(NotRegularError):
            urls.opened(Url(f"file://{path}"))
        for place in (path, Url(f"file://{path}")):
            with pytest.raises(ImageError) as error:
                read_bytes(place)
            assert str(error.value) == "can't be read: a device, pipe or socket, not a file"


def test_links_to_files_are_files(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to("b")
    assert read_regular(tmp_path / "c", 5)[0] == b"12345"
    with open_regular(tmp_path / "c", "r", encoding="utf-8", newline="") as file:
        assert file.read() == "12345"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ImageError, match="file not found"):
        read_bytes(tmp_path / "loop")
    with pytest.raises(ImageError, match="no file can have this name"):
        read_bytes(tmp_path / "zero\0byte")
    with pytest.raises(ImageError, match="no file can have this name"):
        read_bytes(tmp_path / ("n" * 300))


def test_no_more_is_read_than_may_be(tmp_path, monkeypatch):
    file = tmp_path / "large.png"
    with file.open("wb") as stream:
        stream.truncate(3 << 30)  # sparse: takes no room
    with pytest.raises(TooLargeError):
        read_regular(file, (3 << 30) - 1)
    with pytest.raises(ImageError, match="file of 3,222 MB: over the 1,000 MB that are read of"):
        read_bytes(file)
    monkeypatch.setenv(limits.NAME, "200")
    with pytest.raises(ImageError, match="over the 100 MB"):
        read_bytes(file)
    # what the system makes up as it is read has no size, and /proc/kmsg would wait for more
    assert read_regular(ROOT.__class__("/proc/self/status"), 100)[0] == b""


@pytest.mark.parametrize("text", ["2 GB", "-5", "100", "1e9", "²"])
def test_a_wrong_limit_is_said(monkeypatch, text):
    monkeypatch.setenv(limits.NAME, text)
    with pytest.raises(MedprobeError, match="want whole megabytes, 200 or more"):
        limits.memory()


def test_a_server_that_sends_more_than_it_says_is_cut_off(monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/ward/big.png", bytes(5000))
    said = urls.Stat(0, 0)
    monkeypatch.setattr(Url, "stat", lambda self: said)
    with pytest.raises(TooLargeError):
        Url("memory://ward/big.png").read(4999)
    assert len(Url("memory://ward/big.png").read(5000)[0]) == 5000


@pytest.mark.parametrize(
    "url", ["hdfs://host/x", "reference://x", "zip://a::file:///b", "git://x", "github://a:b@/c"]
)
def test_urls_that_start_programs_or_open_other_things_are_refused(url):
    with pytest.raises(DatasetError, match=":// is not read: want one of abfs, "):
        locate(url).is_file()


FOLDER = """
import sys
from pathlib import Path
from features.datasets import Options, open_dataset
print(open_dataset(f"folder:{sys.argv[1]}", Options(test_share=0.5)).path.tolist())
"""


def test_a_folder_with_a_pipe_in_it_is_listed(tmp_path):
    """In a process of its own, which a pipe that is waited for would keep from ending."""
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(Image.new("L", (9, 9))))
    os.mkfifo(tmp_path / "a" / "IM0001")
    os.mkfifo(tmp_path / "a" / "3.png")  # an image by its name: found bad when it is decoded
    done = subprocess.run(
        [sys.executable, "-c", FOLDER, tmp_path],
        capture_output=True, text=True, cwd=ROOT, timeout=300, check=True,
    )  # fmt: skip
    assert done.stdout == "['a/1.png', 'a/2.png', 'a/3.png', 'b/1.png', 'b/2.png']\n"
    options = Options(test_share=0.5, subject_from_dicom=True)
    with pytest.raises(DatasetError, match="no patient id: "):
        open_dataset(f"folder:{tmp_path}", options)
