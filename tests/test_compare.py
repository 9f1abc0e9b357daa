"""Models are compared on the same images; judged by scipy and by hand."""

import json

import numpy as np
import pytest
import scipy.stats
from click.testing import CliRunner
from conftest import make_manifest, make_store

from cli import cli
from features.errors import ProbeError
from probe.compare import compare_results
from probe.sweep import ProbeOptions, probe, probe_all

rng = np.random.default_rng(0)
N = 160


def fill(folder, *, datasets=1, backbones=("weak", "strong"), seeds=(0,), metric="auroc"):
    """Results of backbones of different worth on made data sets."""
    for d in range(datasets):
        y = rng.integers(0, 2, N)
        for k, name in enumerate(backbones):
            X = rng.standard_normal((N, 4)) + (0.3 + 0.4 * k) * y[:, None]
            made = {
                "backbone": {
                    "name": name,
                    "architecture": name,
                    "weights": "published",
                    "weights_digest": str(k),
                },
                "manifest": {"images": N},
            }
            path = folder / f"set{d}" / f"{name}.h5"
            make_store(path, X, make_manifest(y, dataset=f"set{d}"), fingerprint=made)
            for seed in seeds:
                settings = ProbeOptions(C=(0.1,), folds=2, seed=seed, metric=metric, bootstrap=100)
                probe(path, out=folder / "results", settings=settings)
    return folder / "results"


def test_two_models_are_compared_on_the_same_images_with_seeds_as_mean_and_deviation(tmp_path):
    folder = fill(tmp_path, seeds=(0, 1, 2), metric="accuracy")
    found = compare_results([folder], n=500)
    by_model = {score.model: score for score in found.scores}
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for model, score in by_model.items():
        values = [line["value"] for line in lines if line["backbone"] == model]
        assert (len(values), score.seeds) == (3, [0, 1, 2])
        assert score.value == pytest.approx(np.mean(values))
        assert score.deviation == pytest.approx(np.std(values, ddof=1))
    [pair] = found.pairs
    assert (pair.a, pair.b) == ("weak", "strong")
    apart = by_model["weak"].value - by_model["strong"].value
    assert pair.difference.value == pytest.approx(apart)
    assert pair.difference.test == "permutation by image"
    assert pair.p_holm == pair.difference.p  # one pair
    assert pair.difference.ci_low < pair.difference.value < pair.difference.ci_high


def test_the_auroc_of_two_classes_and_independent_images_takes_delong_s_test(tmp_path):
    [pair] = compare_results([fill(tmp_path)], n=100).pairs
    assert pair.difference.test == "DeLong"
    assert pair.difference.p < 0.05


def test_ranks_over_data_sets_and_holm_over_pairs(tmp_path):
    folder = fill(tmp_path, datasets=6, backbones=("a", "b", "c"))
    found = compare_results([folder], n=100)
    assert len(found.pairs) == 18
    values = {(s.dataset, s.model): s.value for s in found.scores}
    table = np.array([[values[d, m] for m in found.models] for d in found.datasets])
    wanted = scipy.stats.rankdata(-table, axis=1).mean(0)
    np.testing.assert_allclose(found.ranks.mean, wanted)
    for name in found.datasets:
        pairs = [pair for pair in found.pairs if pair.dataset == name]
        smallest = min(pairs, key=lambda pair: pair.difference.p)
        assert smallest.p_holm == pytest.approx(min(1, 3 * smallest.difference.p))
    output = CliRunner().invoke(cli, ["compare", str(folder), "--resamples", "100"]).output
    assert "mean ranks over 6 data sets" in output
    assert "Friedman's p = " in output
    assert "p by permutation can be as small as " not in output  # DeLong's have no floor
    assert output.count("; having been chosen on these images, it is estimated at ") == 6
    document = json.loads(
        CliRunner().invoke(cli, ["compare", str(folder), "--resamples", "100", "--json"]).output
    )
    assert document["models"] == ["a", "b", "c"]
    best = document["best"][0]
    value = max(values[best["dataset"], model] for model in found.models)
    assert best["chosen"]["value"] == pytest.approx(value)
    assert values[best["dataset"], best["models"][0]] == value
    assert len(best["chosen"]["p"]) == 3 and best["chosen"]["p"][0] == 1


def test_models_with_different_test_images_are_not_tested(tmp_path):
    folder = fill(tmp_path, backbones=("a",))
    y = rng.integers(0, 2, N)
    about = dict.fromkeys(("name", "architecture", "weights_digest"), "z")
    made = {"backbone": about | {"weights": "published"}}
    split = np.where(np.arange(N) % 5 == 0, "test", "train")
    X = rng.standard_normal((N, 4))
    path = tmp_path / "set0" / "z.h5"
    make_store(path, X, make_manifest(y, dataset="set0", split=split), fingerprint=made)
    probe(path, out=folder, settings=ProbeOptions(C=(1.0,), folds=2, metric="auroc", bootstrap=100))
    found = compare_results([folder, folder])
    assert found.pairs == []
    assert found.notes == [
        "set0 is split or labelled in 2 ways: models are compared within each, not across"
    ]
    assert found.notes[0] in CliRunner().invoke(cli, ["compare", str(folder)]).stderr


def test_one_model_has_nothing_to_be_compared_with(tmp_path):
    with pytest.raises(ProbeError, match=r"one model only \(a\): nothing to compare with"):
        compare_results([fill(tmp_path, backbones=("a",))])


def test_a_pair_is_tested_by_the_means_that_stand_above_it_whatever_the_seeds(tmp_path):
    """Few shots: each seed's head is another, and the two models have unlike numbers of seeds."""
    folder = fill(tmp_path)
    store = tmp_path / "set0" / "weak.h5"
    few = ProbeOptions(C=(0.1,), folds=2, metric="auroc", bootstrap=100, shots=(2,), seeds=3)
    probe_all(store, out=folder, settings=few)
    found = compare_results([folder], n=500)
    scores = {score.model: score for score in found.scores}
    assert sorted(len(score.seeds) for score in scores.values()) == [1, 1, 3]
    for score in scores.values():
        assert score.ci_low < score.value < score.ci_high
    assert len(found.pairs) == 3
    for pair in found.pairs:
        apart = scores[pair.a].value - scores[pair.b].value
        assert pair.difference.value == pytest.approx(apart, abs=1e-6)
        assert -1 <= pair.difference.ci_low < apart < pair.difference.ci_high <= 1
    own = {frozenset((pair.a, pair.b)): pair.difference.p for pair in found.pairs}
    best = found.best[0]
    for model, p in zip(best.models[1:], best.chosen.p[1:], strict=True):
        assert p >= own[frozenset((best.models[0], model))]  # a search makes nothing surer
