"""The audit finds what was put there, and what real data sets are known to hold."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_manifest, make_store
from PIL import Image
from reporting import Page, said
from sklearn.metrics.pairwise import cosine_similarity

from cli import cli
from features import audit as module
from features.audit import audit, hash_images
from features.datasets import open_dataset
from features.errors import ProbeError
from probe.report import write_report
from probe.sweep import ProbeOptions, probe

rng = np.random.default_rng(0)


def call(*words):
    return CliRunner().invoke(cli, [str(w) for w in words])


def test_identical_bytes_and_pixels_and_their_contrary_labels_are_found(tmp_path):
    pixels = [Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)) for _ in range(8)]
    for i, picture in enumerate(pixels):
        for split in ("train", "test"):
            (tmp_path / split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / ("test" if i > 5 else "train") / "ab"[i % 2] / f"{i}.png")
    pixels[0].save(tmp_path / "test" / "b" / "again.png")  # same bytes, other label, other split
    pixels[3].save(tmp_path / "train" / "b" / "other.bmp")  # same pixels, same label and split
    manifest = open_dataset(f"folder:{tmp_path}")
    hashes, pixel_hashes, bad = hash_images(manifest)
    found = audit(manifest, hashes=hashes, pixel_hashes=pixel_hashes, bad=bad)
    assert [sorted(g.images) for g in found.bytes] == [["test/b/again.png", "train/a/0.png"]]
    assert [sorted(g.images) for g in found.pixels] == [["train/b/3.png", "train/b/other.bmp"]]
    assert found.leaks == found.conflicts == found.bytes
    assert found.line() == (
        "the splits leak: 1 identical image is in more than one of them; 1 group of identical "
        "images has contrary labels; no subjects are known, so they are not checked"
    )
    result = call("audit", f"folder:{tmp_path}")
    assert result.exit_code == 1
    assert "contrary  test/b/again.png, train/a/0.png" in result.output
    document = json.loads(call("audit", f"folder:{tmp_path}", "--json").output)
    assert (document["leaks"], document["conflicts"]) == (1, 1)
    (tmp_path / "test" / "b" / "again.png").unlink()
    assert call("audit", f"folder:{tmp_path}").exit_code == 0


def test_near_duplicates_are_the_pairs_that_scikit_learn_s_cosine_finds(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    X = rng.standard_normal((50, 12)).astype(np.float32) + 3
    X[40] = X[3] + 0.01
    X[41] = X[7]
    manifest = make_manifest(rng.integers(0, 3, 50))
    usable = np.ones(50, dtype=bool)
    usable[7] = False
    found = audit(manifest, features=X, usable=usable, threshold=0.6)
    centred = X[usable] - X[usable].mean(0)
    wanted = np.triu(cosine_similarity(centred), 1) >= 0.6
    rows = np.flatnonzero(usable)
    pairs = {(manifest.path[rows[i]], manifest.path[rows[j]]) for i, j in np.argwhere(wanted)}
    assert {tuple(g.images) for g in found.near} == pairs
    assert found.n_near == len(pairs)
    assert ("00003.png", "00040.png") in pairs
    assert not found.leaks  # a suspicion, not a leak


def test_images_in_no_split_and_bad_ones_are_left_out():
    split = np.array(["train", "test", "none", "train"] * 3)
    manifest = make_manifest([0, 1] * 6, split=split, subject=["p", "q", "p", "p"] * 3)
    assert not audit(manifest, hashes=["x", "y", "x", "x"] * 3).leaks
    manifest = make_manifest([0, 1] * 6, subject=["p", "q", "r", "s"] * 2 + ["p"] * 4)
    assert [g.name for g in audit(manifest).leaks] == ["p"]
    usable = np.arange(12) > 3
    assert [g.name for g in audit(manifest, usable=usable).leaks] == ["p"]


@pytest.fixture
def leaking(tmp_path):
    n = 80
    y = rng.integers(0, 2, n)
    X = rng.standard_normal((n, 5)) + y[:, None]
    subject = np.array([f"p{i // 2}" for i in range(n)])  # every other pair is cut
    return make_store(tmp_path / "made" / "b.h5", X, make_manifest(y, subject=subject))


def test_probe_says_it_in_one_line_and_strict_splits_refuse(leaking, tmp_path):
    settings = ProbeOptions(C=(1.0,), bootstrap=100)
    result = probe(leaking, out=tmp_path / "out", settings=settings)
    assert result.audit["line"] == "the splits leak: 20 subjects are in more than one of them"
    assert result.audit["leaks"] == 20
    words = ("probe", leaking, "-o", tmp_path / "out", "--C", "1", "--bootstrap", "100")
    assert "the splits leak: 20 subjects" in call(*words).output
    strict = call(*words, "--strict-splits")
    assert strict.exit_code == 2
    assert (
        "the splits leak: 20 subjects are in more than one of them. See `medprobe audit"
        in strict.output
    )
    with pytest.raises(ProbeError):
        probe(leaking, out=tmp_path / "no", settings=ProbeOptions(strict_splits=True))
    assert not (tmp_path / "no").exists()


def test_a_leak_stands_in_the_headline_with_the_command_that_names_it(leaking, tmp_path):
    words = ("probe", leaking, "-o", tmp_path / "out", "--C", "1", "--bootstrap", "100")
    command = f"medprobe audit {leaking}"
    assert f"which images, and what to do: {command}" in call(*words).stderr
    page = Page(write_report([tmp_path / "out"], tmp_path / "report"))
    [headline] = page.find("h1", "headline")
    line = "the splits leak: 20 subjects are in more than one of them"
    assert f"leak Its score may be too high: {line}." in said(headline)
    assert f"{command} names the images" in " ".join(map(said, page.find("p", "warning")))
    assert [t for t in page.find("span", "tag") if said(t) == "leak" and t.get("title") == line]
    assert line in (tmp_path / "report" / "results.md").read_text()


def test_what_is_advised_ends_the_leak(tmp_path):
    """Two patients in both parts, one image twice: --split drawn, then the split none."""
    pixels = [Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)) for _ in range(20)]
    for i, picture in enumerate(pixels):
        picture.save(tmp_path / f"{i}.png")
    pixels[0].save(tmp_path / "19.png")
    rows = [[f"{i}.png", "ab"[i % 2], f"p{i // 2}", ("train", "test")[i > 12]] for i in range(20)]
    rows[2][2] = rows[13][2] = "p99"

    def audited(*options):
        table = ["path,label,subject,split", *map(",".join, rows)]
        (tmp_path / "t.csv").write_text("\n".join(table))
        return call("audit", f"csv:{tmp_path / 't.csv'}", *options)

    found = audited()
    assert found.exit_code == 1
    for words in ("--split drawn", "the split none", "Contrary labels", "Then extract and probe"):
        assert words in found.output
    assert "--subject-col" not in found.output  # they are known
    rows[19][3] = "none"
    half = audited()
    assert half.exit_code == 1 and "Identical" not in half.output and "--split drawn" in half.output
    assert audited("--split", "drawn").output.count("subjects are in") == 0
    rows[2][2] = "p1"
    clean = audited()
    assert clean.exit_code == 0 and clean.output.endswith(
        "no leak found: the splits share no subject, no identical file and no identical pixels\n"
    )


def test_a_store_is_audited_by_its_hashes_and_features(leaking):
    result = call("audit", leaking, "--near", "0.999999")
    assert result.exit_code == 1
    assert "subject in several splits  test/train" in result.output
    assert "near (" not in result.output


def test_a_store_that_is_not_there_is_said():
    result = call("audit", "none.h5")
    assert result.exit_code == 2
    assert "there is no store none.h5" in result.output


def test_the_known_duplicates_of_idrid_are_found(shared_data):
    document = json.loads(
        call("audit", f"csv:{shared_data / 'idrid' / 'manifest.csv'}", "--json").output
    )
    pairs = {tuple(sorted(group["images"])) for group in document["bytes"]}

    def name(split, number):
        return f"{split}/IDRiD_{number:03}.jpg"

    # ../shared/data/idrid/README.md names them.
    assert pairs == {
        (name("test", 64), name("train", 118)),
        *((name("train", a), name("train", b)) for a, b in ((21, 391), (28, 327), (45, 333))),
        *((name("train", a), name("train", b)) for a, b in ((73, 375), (79, 279))),
    }
    assert (document["leaks"], document["conflicts"]) == (1, 3)


def test_the_byte_identical_slices_of_ct_are_found_and_leak_nothing_by_patient(shared_data):
    table = shared_data / "ct_contrast_dev" / "manifest.csv"
    result = call("audit", f"csv:{table}", "--subject-col", "patient", "--json")
    document = json.loads(result.output)
    assert result.exit_code == 0
    pairs = [sorted(image.split("/ID_")[1][:4] for image in g["images"]) for g in document["bytes"]]
    assert sorted(pairs) == [["0003", "0006"], ["0010", "0013"], ["0032", "0034"], ["0065", "0066"]]
