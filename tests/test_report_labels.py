"""A store that has other labels now than a result: what the report says, and still shows."""

from dataclasses import replace

import numpy as np
import pytest
from reporting import Page, said, stored

from features.store import FeatureStore
from probe.report import Options, closely, make, write_report
from probe.report.gather import gather, leading

BACK = "medprobe extract csv:/data/ward.csv --name ward --label-col grade"


def relabelled(folder, manifest, **changes):
    with FeatureStore.open(folder / "dinov2.h5", write=True) as store:
        store.relabel(replace(manifest, **changes))


def shown(folder):
    [cell] = leading(gather([("", [folder])], private=False))
    return closely(cell, private=False)


@pytest.mark.parametrize("what", ["labels", "order", "splits", "both"])
def test_other_labels_or_splits_are_said_and_the_map_has_those_of_the_result(tmp_path, what):
    manifest = stored(tmp_path, label_from="grade", labelled_by=BACK)
    before, _ = shown(tmp_path)
    assert before.store == ""
    N, test = len(manifest), manifest.split == "test"
    changes = {}
    if what in ("labels", "both"):
        changes = {"label": np.arange(N) % 3, "classes": ("u", "v", "w"), "label_from": "risk"}
    if what == "order":
        changes = {"label": 1 - manifest.label, "classes": manifest.classes[::-1]}
    if what in ("splits", "both"):
        changes["split"] = np.where(np.arange(N) % 3 == 0, "test", "train")
    if "label" in changes:
        changes["label"] = changes["label"].astype(np.int32)
    relabelled(tmp_path, manifest, **changes)
    panel, there = shown(tmp_path)
    assert there and there.anew
    other = "splits or labels" if "split" in changes else "labels"
    assert f"has other {other} now than this result" in panel.store
    columns = "(column risk; this result is of column grade)"
    assert (columns in panel.store) is ("label_from" in changes)
    assert panel.store.endswith(f"To give it these labels again: {BACK}")
    [points] = [c for c in panel.charts if c.kind == "points"]
    assert list(points.ids) == manifest.id[test].tolist()
    names, codes = points.facts["label"]
    assert [names[k] for k in codes] == [manifest.classes[k] for k in manifest.label[test]]
    [full] = [c for c in before.charts if c.kind == "points"]
    assert set(points.ids) < set(full.ids)

    page = Page(write_report([tmp_path], tmp_path / "report"))
    assert panel.store in " ".join(map(said, page.find("p", "warning")))
    pictures = page.data["images"]["ward"]
    assert set(manifest.id[test]) >= set(pictures) > set()
    rows = page.rows("results")
    assert any("grade" in row and BACK in row for row in rows)
    private = Page(write_report([tmp_path], tmp_path / "p", Options(private=True)))
    assert "csv:/data" not in private.text and "ward.csv" in private.text


def test_a_store_that_is_gone_or_another_one_is_said(tmp_path):
    stored(tmp_path)
    (tmp_path / "dinov2.h5").rename(tmp_path / "away.h5")
    panel, there = shown(tmp_path)
    assert there is None and "dinov2.h5 is not there any more" in panel.store
    (tmp_path / "dinov2.h5").write_bytes(b"not a store")
    assert "can't be read" in shown(tmp_path)[0].store
    (tmp_path / "dinov2.h5").unlink()
    stored(tmp_path / "other", N=50)
    (tmp_path / "other" / "dinov2.h5").rename(tmp_path / "dinov2.h5")
    report = make([tmp_path], Options())
    assert report.datasets[0].audit is None
