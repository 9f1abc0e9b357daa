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
        both = column.best.entry.name, s.entry.name
        pair = (pairs.get(both) or pairs[both[::-1]]).difference
        sign = 1 if both in pairs else -1
        assert s.difference.value == sign * pair.value and s.difference.p == pair.p
    assert column.standings[1].said.startswith("is not distinguishable (p = ")
    assert column.standings[2].said == "is worse (p < .001)"

    page = Page(write_report([tmp_path], tmp_path / "report"))
    (headline,) = page.find("h1", "headline")
    best, second = column.standings[:2]
    assert said(headline) == (
        f"On idrid, {best.entry.name} (frozen, linear): accuracy {best.scored} on 400 test images; "
        f"the next, {second.entry.name} (frozen, linear), {second.said}. {column.corrected}"
    )
    assert column.corrected.startswith("Chosen as the best of 3 on these images, it is estimated")
    (found,) = compare_results([tmp_path]).best
    assert (found.chosen, found.models) == (column.chosen, [s.entry.name for s in column.standings])
    assert column.chosen.p == [1, *(s.p for s in column.standings[1:])]
    assert column.chosen.estimate < best.value
    marks = [[said(m) for m in row.iter("span") if "mark" in m.get("class", "").split()]
             for row in page.find("table", "main")[0].find("tbody")]  # fmt: skip
    assert marks == [["best"], ["≈ best"], []]
    markdown = (tmp_path / "report" / "results.md").read_text()
    assert f"the next, {second.entry.name} (frozen, linear), {second.said}. Chosen as" in markdown


def tags(page, name="tag"):
    """Return the words of one class of every row of the main table."""
    return [
        [said(e) for e in row.iter("span") if name in e.get("class", "").split()]
        for row in page.find("table", "main")[0].find("tbody")
    ]


def test_other_test_images_are_not_compared_and_random_weights_wear_a_mark(tmp_path):
    told(tmp_path, 0.9, weights="random", notes=["not medical: handwritten digits"])
    add(tmp_path, backbone="blip", metric="accuracy", converged=False, N=50)
    page = Page(write_report([tmp_path], tmp_path / "report"))
    headline = said(page.find("h1", "headline")[0])
    assert headline.startswith("On idrid, blip (frozen, linear): accuracy")
    assert "Untrained, dinov2 (frozen, linear, random weights) has" in headline
    assert headline.endswith("(it can't be tested: not the same test images and labels).")
    text = said(page.root)
    assert "1 of 2 results are of backbones that were never trained" in text
    assert "not medical: handwritten digits" in text
    assert tags(page) == [["untrained: random weights"], ["not converged"]]


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_an_untrained_model_is_never_the_best_and_one_model_is_no_contest(tmp_path, trained):
    told(tmp_path, 0.95, backbone="noise", weights="random")
    told(tmp_path, 0.94, backbone="static", weights="random", noise=4)
    for k, name in enumerate(("dinov2", "sam")[:trained]):
        told(tmp_path, 0.8, backbone=name, noise=1 + k)
    report = make([tmp_path], Options())
    (column,) = report.columns
    assert [s.mark for s in column.standings if s.untrained] == ["", ""]
    page = Page(write_report([tmp_path], tmp_path / "report"))
    text = said(page.root)
    headline = said(page.find("h1", "headline")[0])
    marks = [word for row in tags(page, "mark") for word in row]
    latex = (tmp_path / "report" / "tables" / "000-main.tex").read_text()
    if trained == 2:
        assert marks == ["best", "≈ best"] and column.chosen and column.among == 2
        tests = {row[3]: row for row in report.tables[1].rows}
        noise = tests["noise (random weights)"]
        assert noise[4].value < 0 and noise[5] < 0.001 and noise[6] is None
    else:
        assert marks == [] and "the best" not in headline and "Chosen as" not in text
        assert "textbf" not in latex and "bold" not in latex
    if trained:
        assert not column.best.untrained and "Untrained, noise" in headline
        assert "(p < .001 for a difference of −." in headline  # noqa: RUF001
    else:
        assert headline.startswith("On idrid, where no model is trained, noise (")
    found = compare_results([tmp_path], n=100).best
    assert [best.models for best in found] == (
        [[s.entry.name for s in column.standings if not s.untrained]] if trained == 2 else []
    )


def test_the_headline_is_of_the_data_with_a_choice_and_enough_subjects_and_says_what_is_few(
    tmp_path,
):
    few = "few test {}: 3 in all; so few that no 95 % interval can be relied on"
    told(tmp_path, 0.9, dataset="a-tiny", few=few.format("subjects"), n_subjects_test=3)
    told(tmp_path, 0.9, dataset="b-alone", n_subjects_test=9000)
    told(tmp_path, 0.9, dataset="c-small", n_subjects_test=90)
    told(tmp_path, 0.8, dataset="c-small", n_subjects_test=90, backbone="sam", noise=1)
    images = {"few": few.format("images"), "subjects_known": False}
    told(tmp_path, 0.8, dataset="d-images", backbone="blip", noise=1, **images)
    page = Page(write_report([tmp_path], tmp_path / "report"))
    headline = said(page.find("h1", "headline")[0])
    assert headline.startswith("On c-small, dinov2") and "few" not in headline
    answers = [said(p) for p in page.find("p", "answer")]
    assert [a.split(",")[0] for a in answers] == ["On a-tiny", "On b-alone", "On d-images"]
    assert "few subjects, so that the interval is not reliable" in answers[0]
    assert "few images, so that the interval is not reliable" in answers[2]
    assert tags(page) == [["few subjects"], [], ["few images"]]
    markdown = (tmp_path / "report" / "results.md").read_text()
    assert "**few subjects**: the interval" in markdown and "**few images**" in markdown
    for kind in ("csv", "md", "tex"):
        table = (tmp_path / "report" / "tables" / f"000-main.{kind}").read_text()
        assert "few subjects" in table and "few images" in table

    (tmp_path / "tiny").mkdir()
    told(tmp_path / "tiny", 0.9, few=few.format("subjects"))
    page = Page(write_report([tmp_path / "tiny"], tmp_path / "report"))
    assert "few subjects, so that" in said(page.find("h1", "headline")[0])


def test_where_less_is_better_the_lowest_leads_and_axes_hold_every_interval(tmp_path):
    for k, (name, value) in enumerate((("dinov2", 0.4), ("sam", 1.9), ("blip", 3.5))):
        facts = {"ci_low": value - 0.2, "ci_high": value + 0.3}
        told(tmp_path, 0.9 - k / 10, backbone=name, noise=k, metric="log_loss", value=value,
             missing=True, **facts)  # fmt: skip
        told(tmp_path, 0.9 - k / 10, backbone=name, noise=k, scenario="unfrozen-linear",
             metric="log_loss", value=value + 0.1, missing=True, **facts)  # fmt: skip
    report = make([tmp_path], Options())
    (column,) = report.columns
    assert column.best.entry.result.value == 0.4 and column.span == (0, 3.8)
    assert column.words == "log loss (less is better)"
    page = Page(write_report([tmp_path], tmp_path / "report"))
    drawn = [
        {e.get("class"): [float(e.get(x)) for x in ("x1", "x2")] for e in svg}
        for svg in page.find("svg", "range")
    ]
    ends = [(s.entry.result.ci_low, s.entry.result.ci_high) for s in column.standings]
    places = sorted(line["span"] for line in drawn)
    for place, end in zip(places, sorted(ends), strict=True):  # in scale, and none cut off
        np.testing.assert_allclose(place, 2 + 96 * np.array(end) / 3.8, atol=0.01)
    charts = [c for section in report.sections for c in section.charts]
    titles = {c.x.title for c in charts if c.kind == "dots"}
    titles |= {c.y.title for c in charts if c.kind == "lines"}
    assert titles == {"log loss (less is better)"}
    (gain,) = [c for c in charts if c.kind == "bars"]
    assert list(gain.values) == sorted(gain.values, reverse=True)
    assert gain.foundations[0] == "dinov2" and "Upwards is better" in gain.caption


def test_every_bar_and_every_line_has_a_name_of_its_own(tmp_path):
    tuned = {"scenario": "unfrozen-linear", "protocol": "finetune", "folds": {}, "C": None}
    for k, which in enumerate(("all", "last:1")):
        how = {"unfreeze": which}
        history = [{"epoch": e, "train_loss": 0.5, "value": 0.6} for e in range(2)]
        told(tmp_path, 0.9, noise=k, settings=how, tuned=how, history=history, **tuned)
    for k, protocol in enumerate(("paper", "dinov2-logreg")):
        told(tmp_path, 0.8, noise=5 + k, protocol=protocol)
        for shots in (1, 4):
            told(tmp_path, 0.6, noise=9 + k + shots, protocol=protocol, shots=shots)
        told(tmp_path, 0.6, noise=20 + k, protocol=protocol, feature="block00/cls")
    found = sections(tmp_path)
    (bars,) = found["gain"]
    labels = list(zip(bars.classifiers, bars.foundations, strict=True))
    assert len(set(labels)) == 4 and {f for _, f in labels} == {"dinov2"}
    assert "unfrozen, linear · protocol finetune · unfreeze last:1" in bars.classifiers
    assert "frozen, linear · protocol paper" in bars.classifiers
    for key in ("strength", "depth", "shots", "convergence"):
        for chart in found[key]:
            drawn = [s.name for s in chart.series if s.legend]
            assert len(set(drawn)) == len(drawn) == 2, key
            assert all("protocol" in n or "unfreeze" in n for n in drawn), drawn
    (chart,) = found["scenarios"]
    at = [(s.name, y) for s in chart.series for y in s.y]
    assert len(set(at)) == len(at) == 4
    assert "frozen, linear · protocol paper" in [s.name for s in chart.series]


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
    assert list(shots.series[0].x) == [1, 4, 413 / 2]
    value, loss = found["convergence"]
    assert list(value.series[0].y) == [0.6, 0.9] and list(loss.series[0].y) == [0.7, 0.4]
    assert [chart.shares for chart in found["cka"]] == [[[1, 0.25], [0.25, 1]], [[0.5, 0.75]]]
    # The table has the final layer and all training images only.
    names = [s.entry.name for s in make([tmp_path], Options()).columns[0].standings]
    assert names == ["dinov2 · unfrozen, linear", "dinov2 · frozen, linear", "sam"]

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
    rows = {row[2].split(" · ")[0]: row for row in report.versus.rows}
    assert set(rows) == {"dinov2", "sam"}
    assert rows["dinov2"][3] == "dinov2 · unfrozen, linear"
    assert rows["dinov2"][6].value < -0.05 and rows["dinov2"][8] < 0.05 < rows["sam"][8]
    pairs = {(p.a, p.b): p for p in compare_results(sides).pairs}
    expected = pairs["dinov2 · frozen, linear", "dinov2 · unfrozen, linear"].difference
    assert rows["dinov2"][6].value == expected.value and rows["dinov2"][7] == expected.p
    assert report.sections[0].key == "versus"
    page = Page(write_report([], tmp_path / "report", Options(compare=sides)))
    assert "A against B" in said(page.root)
    assert (tmp_path / "report" / "tables" / "000-versus.tex").is_file()
