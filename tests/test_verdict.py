"""What a report concludes: the answer, its tests, the parts that appear with their data."""

import numpy as np
import pytest
from reporting import Page, add, said

from features.errors import ProbeError
from probe.compare import compare_results
from probe.report import Options, make, write_report
from probe.results import Predictions

RNG = np.random.default_rng(5)
Y = RNG.integers(0, 2, 400)


def told(folder, skill, *, dataset="idrid", noise=0, **changes):
    """Add a two-class result of a given skill, scored by accuracy on the same 400 images."""
    rng = np.random.default_rng(noise)
    right = rng.random(len(Y)) < skill
    p = np.where(right == (Y == 1), 0.9, 0.1) + rng.normal(0, 0.03, len(Y))
    ids = [f"{i}.png" for i in range(len(Y))]
    said_ = Predictions(ids, ids, Y, np.stack([1 - p, p], axis=1).clip(0, 1), ["no", "yes"])
    value = float(((p > 0.5) == Y).mean())
    facts = {"metric": "accuracy", "value": value, "ci_low": value - 0.03, "ci_high": value + 0.03}
    facts |= {"classes": ["no", "yes"], "dataset": dataset, "predictions": said_}
    add(folder, **(facts | {"backbone": "dinov2"} | changes))


def test_the_answer_is_the_paired_test_of_compare(tmp_path):
    told(tmp_path, 0.9)
    told(tmp_path, 0.89, backbone="sam", noise=1)
    told(tmp_path, 0.6, backbone="blip", noise=2)
    report = make([tmp_path], Options())
    (column,) = report.columns
    assert [s.mark for s in column.standings] == ["best", "tied", ""]

    pairs = {(p.a, p.b): p for p in compare_results([tmp_path]).pairs}
    for s in column.standings[1:]:
        both = column.best.cell.name, s.cell.name
        pair = (pairs.get(both) or pairs[both[::-1]]).difference
        sign = 1 if both in pairs else -1
        assert s.difference.value == sign * pair.value and s.difference.p == pair.p
    assert column.standings[1].said.startswith("is not distinguishable (p = ")
    assert column.standings[2].said == "is worse (p < .001)"

    page = Page(write_report([tmp_path], tmp_path / "report"))
    (headline,) = page.find("h1", "headline")
    best, second = column.standings[:2]
    assert said(headline) == (
        f"On idrid, {best.cell.name} (frozen, linear): accuracy {best.scored} on 400 test images; "
        f"the next, {second.cell.name} (frozen, linear), {second.said}. {column.corrected}"
    )
    assert column.corrected.startswith("Chosen as the best of 3 on these images, it is estimated")
    (found,) = compare_results([tmp_path]).best
    assert (found.chosen, found.models) == (column.chosen, [s.cell.name for s in column.standings])
    assert column.chosen.p == [1, *(s.p for s in column.standings[1:])]
    assert column.chosen.estimate < best.value
    marks = [[said(m) for m in row.iter("span") if "mark" in m.get("class", "").split()]
             for row in page.find("table", "main")[0].find("tbody")]  # fmt: skip
    assert marks == [["best"], ["≈ best"], []]
    markdown = (tmp_path / "report" / "results.md").read_text()
    assert f"the next, {second.cell.name} (frozen, linear), {second.said}. Chosen as" in markdown


def test_other_test_images_are_not_compared_and_random_weights_wear_a_mark(tmp_path):
    told(tmp_path, 0.9, weights="random", notes=["not medical: handwritten digits"])
    add(tmp_path, backbone="blip", metric="accuracy", converged=False, N=50)
    page = Page(write_report([tmp_path], tmp_path / "report"))
    headline = said(page.find("h1", "headline")[0])
    assert "dinov2 (frozen, linear, random weights)" in headline
    assert headline.endswith("can't be tested against it (not the same test images and labels).")
    text = said(page.root)
    assert "1 of 2 results are of backbones that were never trained" in text
    assert "not medical: handwritten digits" in text
    tags = [[said(e) for e in row.iter("span") if "tag" in e.get("class", "").split()]
            for row in page.find("table", "main")[0].find("tbody")]  # fmt: skip
    assert tags == [["random weights"], ["not converged"]]


def test_over_several_data_sets_the_answer_is_a_mean_rank(tmp_path):
    for k, dataset in enumerate("abcdef"):
        told(tmp_path, 0.95, dataset=dataset, noise=k)
        told(tmp_path, 0.75, dataset=dataset, noise=10 + k, backbone="sam")
        told(tmp_path, 0.55, dataset=dataset, noise=20 + k, backbone="blip")
    report = make([tmp_path], Options())
    expected = compare_results([tmp_path], n=10)
    found = dict(
        zip((c.name for c in report.overall.models), report.overall.ranks.mean, strict=True)
    )
    assert found == dict(zip(expected.models, expected.ranks.mean, strict=True))
    assert report.overall.ranks.p == expected.ranks.p
    assert report.overall.models[report.overall.leader].name == "dinov2"
    assert "dinov2" not in [cell.name for cell in report.overall.tied]
    assert len(report.columns) == 6


def sections(folder, **options):
    return {s.key: s.charts for s in make([folder], Options(**options)).sections}


def test_parts_appear_with_their_data_and_only_then(tmp_path):
    told(tmp_path, 0.9)
    assert set(sections(tmp_path)) == {"strength"}  # one model: no gain over another
    told(tmp_path, 0.8, backbone="sam", noise=1)
    assert set(sections(tmp_path)) == {"strength", "gain"}

    told(tmp_path, 0.93, scenario="unfrozen-linear", noise=2, folds={}, C=None, history=[
        {"epoch": 1, "train_loss": 0.7, "value": 0.6}, {"epoch": 2, "train_loss": 0.4, "value": 0.9}
    ])  # fmt: skip
    for k, layer in enumerate(("block00", "block01")):
        told(tmp_path, 0.6 + k / 10, feature=f"{layer}/cls", noise=3 + k)
    for shots, skill in ((1, 0.6), (4, 0.7)):
        for seed in (0, 1):
            told(tmp_path, skill, shots=shots, seed=seed, noise=5 + shots + seed)
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "cka_dinov2.csv").write_text(",a,b\na,1,.25\nb,.25,1\n")
    (tmp_path / "analysis" / "cka_list.csv").write_text("x,y,cka\na,b,.5\na,c,.75\n")
    found = sections(tmp_path, analysis=tmp_path / "analysis")
    order = ["gain", "scenarios", "strength", "depth", "shots", "convergence", "cka"]
    assert list(found) == order

    (scenarios,) = found["scenarios"]
    assert [s.name for s in scenarios.series] == ["frozen, linear", "unfrozen, linear"]
    assert scenarios.rows == ["dinov2", "sam"]
    (depth,) = found["depth"]
    assert list(depth.x.names) == ["block00", "block01", "final"]
    assert depth.series[0].y[0] < depth.series[0].y[1] < depth.series[0].y[2]
    (shots,) = found["shots"]
    assert list(shots.series[0].x) == [1, 4]
    value, loss = found["convergence"]
    assert list(value.series[0].y) == [0.6, 0.9] and list(loss.series[0].y) == [0.7, 0.4]
    assert [chart.shares for chart in found["cka"]] == [[[1, 0.25], [0.25, 1]], [[0.5, 0.75]]]
    # The table has the final layer and all training images only.
    names = [s.cell.name for s in make([tmp_path], Options()).columns[0].standings]
    assert names == ["dinov2 unfrozen-linear", "dinov2 frozen-linear", "sam"]

    (tmp_path / "analysis" / "cka_bad.csv").write_text(",a,b\na,1\n")
    with pytest.raises(ProbeError, match=r"cka_bad.csv is no table of CKA"):
        sections(tmp_path, analysis=tmp_path / "analysis")
    with pytest.raises(ProbeError, match=r"no cka\*.csv in .*nowhere"):
        sections(tmp_path, analysis=tmp_path / "nowhere")


def test_the_gain_is_relative_to_the_studys_reference_where_it_is_trained(tmp_path):
    told(tmp_path, 0.9)
    told(tmp_path, 0.8, backbone="deit", noise=1)
    (bars,) = sections(tmp_path)["gain"]
    values = {r.backbone: r.value for r in make([tmp_path], Options()).results}
    gain = 100 * (values["dinov2"] - values["deit"]) / values["deit"]
    assert bars.foundations == ["dinov2", "deit"] and bars.sizes == [1e8, 1e6]
    np.testing.assert_allclose(bars.values, [gain, 0])


def test_two_sets_are_compared_in_what_they_can_agree_in(tmp_path):
    for k, (name, scenario) in enumerate((("a", "frozen-linear"), ("b", "unfrozen-linear"))):
        for j, (backbone, skill) in enumerate((("dinov2", 0.75), ("sam", 0.7))):
            better = 0.15 * k if backbone == "dinov2" else 0
            told(
                tmp_path / name,
                skill + better,
                scenario=scenario,
                backbone=backbone,
                noise=k + 7 * j,
            )
    sides = (tmp_path / "a", tmp_path / "b")
    report = make([], Options(compare=sides))
    rows = {row[2].split(",")[0]: row for row in report.versus.rows}
    assert set(rows) == {"dinov2", "sam"}
    assert rows["dinov2"][3] == "dinov2, unfrozen-linear"
    assert rows["dinov2"][6].value < -0.05 and rows["dinov2"][8] < 0.05 < rows["sam"][8]
    pairs = {(p.a, p.b): p for p in compare_results(sides).pairs}
    expected = pairs["dinov2 frozen-linear", "dinov2 unfrozen-linear"].difference
    assert rows["dinov2"][6].value == expected.value and rows["dinov2"][7] == expected.p
    assert report.sections[0].key == "versus"
    page = Page(write_report([], tmp_path / "report", Options(compare=sides)))
    assert "A against B" in said(page.root)
    assert (tmp_path / "report" / "tables" / "000-versus.tex").is_file()
