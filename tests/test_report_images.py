"""What of images and their names goes into a report, and what of it must not."""

import base64
import gzip
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reporting import HOSTILE, Page, add, said, stored

from features.manifest import Manifest
from features.urls import Stat, Url
from probe.report import Options, make, write_report

JPEG = b"\xff\xd8\xff"


def everything(out):
    """Return all bytes of a report, what is packed in base64 unpacked as well."""
    parts = []
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        data = path.read_bytes()
        parts += [str(path.relative_to(out)).encode(), data]
        for packed in re.findall(rb"[A-Za-z0-9+/]{40,}={0,2}", data):
            raw = base64.b64decode(packed + b"=" * (-len(packed) % 4))
            parts.append(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    return b"\n".join(parts)


def test_without_images_no_pixel_path_or_id_is_in_any_file(tmp_path):
    groups = [
        {"column": "subject", "group": "MRN-77003", "n": 2, "subjects": 1, "value": 0.5,
         "ci_low": 0.4, "ci_high": 0.6, "small": True},
        {"column": "sex", "group": "F", "n": 20, "subjects": 9, "value": 0.5,
         "ci_low": 0.4, "ci_high": 0.6, "small": True},
    ]  # fmt: skip
    words = [
        "medprobe",
        "probe",
        "/scans/Jane Quillfeather/dinov2.h5",
        "-o",
        "C:\\scans\\Jane Quillfeather\\out",
    ]
    changes = {
        "command": shlex.join(words),
        "tuned": {"head_weights": "/scans/Jane Quillfeather/w.pth"},
    }
    manifest = stored(tmp_path / "results", subgroups=groups, **changes)
    add(tmp_path / "results", backbone="gone", missing=True, dataset="ward", metric="accuracy")
    out = tmp_path / "report"
    open_ = everything(write_report([tmp_path / "results"], out).parent)
    page = Page(write_report([tmp_path / "results"], out, Options(private=True)))
    closed = everything(out)

    names = {*manifest.id, *manifest.path, *manifest.subject, str(tmp_path), "ward seven"}
    names |= {"Jane", "Quillfeather", "/scans"}
    found = {name for name in names if str(name).encode() in open_}  # the search finds
    assert found & {*manifest.id} and found & {*manifest.subject} and str(tmp_path) in found
    assert [name for name in names if str(name).encode() in closed] == []
    assert JPEG in open_ and JPEG not in closed
    figures = {p.stem for p in (out / "figures").iterdir()}
    assert {p.stem for p in out.rglob("*.png")} == figures

    text = said(page.root)
    assert "without images, paths and ids" in text and "medprobe probe dinov2.h5" in text
    assert "sex F" in text and "no predictions can be read" in text
    (points,) = [c for c in page.data["charts"].values() if c["kind"] == "points"]
    assert list(points["facts"]) == ["label", "split", "error"] and points["ids"] == []


def test_the_map_the_audit_and_bad_images_come_from_the_store(tmp_path):
    manifest = stored(tmp_path)
    report = make([tmp_path], Options())
    (ward,) = report.datasets
    assert ward.line == "no leak found: the splits share no subject and no identical file"
    assert ward.bad.rows == [["id-scan-4045.png", "can't read scan-4045.png"]]
    (points,) = [c for c in ward.panels[0].charts if c.kind == "points"]
    assert points.ids == [i for i in manifest.id if i != "id-scan-4045.png"]
    assert list(points.facts) == ["label", "split", "subject", "error"]
    labels, codes = points.facts["label"]
    assert [labels[k] for k in codes] == [
        manifest.classes[y] for y in np.delete(manifest.label, 45)
    ]
    assert set(ward.thumbnails) == set(points.ids)
    image = Image.open(io.BytesIO(base64.b64decode(ward.thumbnails["id-scan-4001.png"])))
    with Image.open(manifest.root / "scan-4001.png") as file:
        original = file.convert("RGB")
    assert image.size == original.size  # nothing is made larger
    assert np.abs(np.asarray(image, float) - np.asarray(original, float)).mean() < 30

    (manifest.root / "scan-4002.png").unlink()
    Image.new("RGB", (9, 9)).save(manifest.root / "scan-4003.png")
    left = make([tmp_path], Options()).datasets[0].thumbnails
    assert set(ward.thumbnails) - set(left) == {"id-scan-4002.png", "id-scan-4003.png"}


@pytest.mark.parametrize("then", [{"backbone": "other"}, {}], ids=["other", "unknown"])
def test_a_store_of_other_features_is_left_out(tmp_path, then):
    stored(tmp_path, extraction=then)
    report = make([tmp_path], Options())
    assert not [c for c in report.charts() if c.kind == "points"]
    assert report.datasets[0].line == "" and report.datasets[0].thumbnails == {}


def test_images_at_urls_are_fetched_only_where_it_is_asked_for(tmp_path, monkeypatch):
    """A store may be somebody else's, and name any server; one that fails costs a picture."""
    manifest = stored(tmp_path)
    asked = []

    def file(self, row):
        asked.append(row)
        return Url(f"http://127.0.0.1:9/{row}" if row % 2 else f"nothing://{row}")

    monkeypatch.setattr(Manifest, "file", file)
    monkeypatch.setattr(Url, "read", lambda self, most: pytest.fail("it was fetched"))
    assert make([tmp_path], Options()).datasets[0].thumbnails == {}
    assert asked
    monkeypatch.undo()
    monkeypatch.setattr(Manifest, "file", file)
    assert make([tmp_path], Options(fetch=True)).datasets[0].thumbnails == {}
    picture = (manifest.root / "scan-4001.png").read_bytes()
    monkeypatch.setattr(Url, "read", lambda self, most: (picture, Stat(len(picture), 0)))
    pictures = make([tmp_path], Options(fetch=True)).datasets[0].thumbnails
    assert list(pictures) == ["id-scan-4001.png"]  # of the others the bytes are not theirs


@pytest.mark.parametrize("asked", [False, True])
def test_dicom_is_shown_only_where_it_is_asked_for(tmp_path, asked):
    from pydicom.data import get_testdata_file

    data = Path(get_testdata_file("CT_small.dcm")).read_bytes()
    stored(tmp_path, suffix=".dcm", N=8, pixels=lambda i: data)
    thumbnails = make([tmp_path], Options(dicom=asked)).datasets[0].thumbnails
    assert len(thumbnails) == (7 if asked else 0)


def test_hostile_names_of_images_stay_text(tmp_path):
    stored(tmp_path, names=HOSTILE[:6], N=48)
    page = Page(write_report([tmp_path], tmp_path / "report"))
    assert len([e for e in page.root.iter("script")]) == 3
    (points,) = [c for c in page.data["charts"].values() if c["kind"] == "points"]
    assert HOSTILE[0] in points["facts"]["label"][0]
