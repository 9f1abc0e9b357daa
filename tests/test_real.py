"""Real medical images from one end to the other, on the embedded backbone's published weights."""

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT

from cli import cli


def call(*words):
    result = CliRunner().invoke(cli, [str(w) for w in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_fundus_images_on_their_official_split(shared_data, tmp_path):
    table = shared_data / "idrid" / "manifest.csv"
    call(
        "extract",
        f"csv:{table}",
        "--name",
        "idrid",
        "-m",
        "efficientnet_lite0",
        "-o",
        tmp_path / "features",
    )
    store = tmp_path / "features" / "idrid" / "efficientnet_lite0.h5"
    words = ("probe", store, "-o", tmp_path / "results", "--metric", "quadratic_kappa", "--json")
    [result] = json.loads(call(*words))
    assert (result["n_train"], result["n_test"], result["n_bad"]) == (413, 103, 0)
    assert result["converged"]
    # Other code on the same features (standardised, balanced, C = .003): .621; chance is 0.
    assert result["ci_low"] < 0.621 < result["ci_high"]
    assert result["ci_low"] > 0.3
    page = call("report", tmp_path / "results", "-o", tmp_path / "report").strip()
    assert "quadratic kappa" in Path(page).read_text()


def test_chest_x_rays_with_several_findings_and_patients(shared_data, tmp_path):
    table = shared_data / "nih_cxr14_dev" / "manifest.csv"
    options = ("--name", "nih", "--label-sep", "|", "--subject-col", "patient")
    call("extract", f"csv:{table}", *options, "-m", "efficientnet_lite0", "-o", tmp_path)
    store = tmp_path / "nih" / "efficientnet_lite0.h5"
    [result] = json.loads(call("probe", store, "-o", tmp_path / "results", "--json"))
    assert result["task"] == "multilabel"
    assert len(result["classes"]) == 15
    assert result["n_subjects_test"] < result["n_test"]
    assert result["converged"]
    assert 0.6 < result["value"] < 0.9


def test_a_number_of_the_results_page_is_made_again_by_its_command(
    shared_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "results.md").read_text()
    [block] = [b for b in re.findall(r"```console\n(.*?)```", page, re.S) if "ct_contrast" in b]
    for command in re.findall(r"\$ medprobe (.*)", block):
        output = call(*shlex.split(command.replace("$DATA", str(shared_data))))
    numbers = r"auroc ([\d.]+) \[([\d.]+), ([\d.]+)\] on (\d+) test images"
    shown, made = (re.search(numbers, text).groups() for text in (block, output))
    assert [float(v) for v in made] == pytest.approx([float(v) for v in shown], abs=0.02)


def test_every_score_in_the_table_of_results_is_one_that_a_command_shows():
    page = (ROOT / "docs" / "results.md").read_text()
    table, commands = page.split("## The commands")
    for score, low, high in re.findall(
        r"\| (?:quadratic kappa|AUROC|mean AUROC) ([\d.]+) \| \[([\d.]+), ([\d.]+)\]", table
    ):
        assert f"{score} [{low}, {high}]" in commands
