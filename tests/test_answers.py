"""The page's first screen answers three questions, each sentence with a link to its evidence."""

import re

import numpy as np
from reporting import Page, add, said
from scipy.stats import beta

from probe.report import Options, make, write_report
from probe.results import Predictions

rng = np.random.default_rng(4)
Y = np.arange(300) % 2


def told(folder, right, noise=0, **changes):
    """Add a result on 300 images of 150 subjects whose decisions are right with a probability."""
    own = np.random.default_rng(noise)
    hit = own.permutation(300) < round(300 * right)
    p = np.where(hit == (Y == 1), 0.9, 0.1)
    ids = [f"{i}.png" for i in range(300)]
    subjects = [f"s{i // 2}" for i in range(300)]
    answers = Predictions(ids, subjects, Y, np.stack([1 - p, p], axis=1), ["no", "yes"])
    value = float(((p > 0.5) == Y).mean())
    low, high = max(0.0, value - 0.03), min(1.0, value + 0.02)
    facts = {"metric": "accuracy", "value": value, "ci_low": low, "ci_high": high, "n_test": 300}
    facts |= {"n_subjects_test": 150, "classes": ["no", "yes"], "dataset": "scans"}
    add(folder, **(facts | {"predictions": answers, "backbone": "dinov2"} | changes))


def statements(report):
    return {a.question: [(s.text, s.warning) for s in a.statements] for a in report.answers}


def test_the_answers_agree_with_the_tests_and_their_links_lead_somewhere(tmp_path):
    told(tmp_path, 0.95)
    told(tmp_path, 0.94, backbone="sam", noise=1)
    told(tmp_path, 0.6, backbone="blip", noise=2)
    told(tmp_path, 0.7, backbone="dinov2", weights="random", noise=3)
    report = make([tmp_path], Options())
    [column] = report.columns
    found = statements(report)
    assert list(found) == ["Which backbone?", "How sure?", "Can it be trusted?"]
    assert "dinov2" in found["Which backbone?"][0][0]
    sure = " ".join(text for text, _ in found["How sure?"])
    marks = {s.entry.result.backbone: s.mark for s in column.standings if not s.untrained}
    assert ("Tied with sam" in sure) == (marks["sam"] == "tied")
    assert "Clearly better than blip" in sure and "150 subjects" in sure
    assert column.corrected in sure
    trust = found["Can it be trusted?"]
    d = column.untrained.difference
    assert any(re.search(r"training counts: \+\.2\d\d .* untrained dinov2", t) for t, _ in trust)
    assert d.p < 0.05 and not any("best" in text for text, _ in trust)
    page = Page(write_report([tmp_path], tmp_path / "report"))
    anchors = {e.get("id") for e in page.root.iter() if e.get("id")}
    [answers] = page.find("dl", "answers")
    links = [a.get("href") for a in answers.iter("a")]
    assert len(links) == sum(map(len, found.values()))
    assert all(link.startswith("#") and link[1:] in anchors for link in links)
    shown = [said(dd) for dd in answers.iter("dd")]
    assert shown == [text for lines in found.values() for text, _ in lines]


def test_what_speaks_against_a_number_is_a_warning_and_comes_first(tmp_path):
    audit = {"line": "the splits leak: 1 subject is in more than one of them", "leaks": 1}
    control = {"kind": "shuffle", "value": 0.88, "ci_low": 0.8, "ci_high": 0.95, "C": 1.0}
    told(
        tmp_path, 0.9, audit=audit | {"conflicts": 2}, control=control, subjects_known=False,
        converged=False, few="few test subjects: 9 in all; so few that no interval is sure",
    )  # fmt: skip
    told(tmp_path, 0.89, weights="random", noise=5)
    found = statements(make([tmp_path], Options()))
    trust = found["Can it be trusted?"]
    warnings = [text for text, warning in trust if warning]
    for words in (
        "The splits leak: 1 subject", "2 groups of identical images have contrary labels",
        "Which images are of one subject is not known", "can't be told from an untrained dinov2",
        "With shuffled labels it scores .880: no less", "did not converge",
    ):  # fmt: skip
        assert any(words in text for text in warnings), words
    assert [warning for _, warning in trust] == sorted((w for _, w in trust), reverse=True)
    assert any("few test subjects"[1:] in text and warning for text, warning in found["How sure?"])


def test_a_perfect_score_says_what_it_can_t_exclude(tmp_path):
    told(tmp_path, 1.0, ci_high=1.0)
    sure = " ".join(text for text, _ in statements(make([tmp_path], Options()))["How sure?"])
    bound = float(beta.ppf(0.95, 1, 150))  # Clopper and Pearson, one-sided, 0 of 150 subjects
    assert f"excludes an error rate above {bound:.1%}" in sure


def test_an_untrained_network_alone_answers_no_question(tmp_path):
    told(tmp_path, 0.9, weights="random")
    found = statements(make([tmp_path], Options()))
    text, warning = found["Which backbone?"][0]
    assert warning and text.startswith("None: ")


def test_the_checklist_says_what_results_know_and_leaves_the_rest_open(tmp_path):
    told(tmp_path, 0.9, notes=["split: drawn by subject, seed 0"])
    write_report([tmp_path], tmp_path / "report")
    text = (tmp_path / "report" / "checklist.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({len(re.split(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "accuracy .900 [.870, .920]" in text and "split: drawn by subject, seed 0" in text
    assert "300 test images of 150 subjects" in text
    assert sum("…" in row for row in rows) >= 6
