"""The grid does each cell once, says which failed and why, and goes on."""

import json
from collections import Counter

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.metrics import accuracy_score

from cli import cli
from probe import grid, results

TINY = ["--head-size", "deit-tiny", "--head-weights", "random", "--epochs", "1", "--seed", "3"]
TINY += ["--image-size", "96", "--batch-size", "16", "--lr", "1e-3", "--bootstrap", "100"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """60 images in two classes that their brightness tells apart."""
    root = tmp_path_factory.mktemp("grid") / "images"
    rng = np.random.default_rng(0)
    for i in range(60):
        folder = root / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (96, 96, 3)) + 100 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


def run(tmp_path, *options):
    command = ["run", "-o", str(tmp_path / "results"), "--features", str(tmp_path / "features")]
    return CliRunner().invoke(cli, [*command, *options], catch_exceptions=False)


def test_all_four_scenarios_of_two_backbones_are_done_once_and_a_failure_is_said(images, tmp_path):
    options = ["-d", f"folder:{images}", "-m", "timm:test_vit", "-m", "timm:test_efficientnet"]
    options += ["-m", "timm:no_such_model", "--weights", "random", *TINY]
    first = run(tmp_path, *options)
    assert first.exit_code == 1
    lines = first.stdout.splitlines()
    assert len(lines) == 12
    assert sum("FAILED: " in line and "no_such_model" in line for line in lines) == 4
    assert "4 of 12 cells failed (images x timm:no_such_model, frozen-linear, " in first.stderr
    assert any("left)" in line for line in lines)
    found = results.load(tmp_path / "results")
    cells = Counter((r.backbone, r.scenario) for r in found)
    assert len(cells) == 8
    assert set(cells.values()) == {1}
    for result in found:
        said = results.read_predictions(tmp_path / "results" / result.predictions)
        theirs = accuracy_score(said.labels, said.probabilities.argmax(1))
        assert result.metrics["accuracy"]["value"] == pytest.approx(theirs)
        assert result.seed == 3

    again = run(tmp_path, *options)
    assert again.exit_code == 1
    assert again.stdout.count("done before") == 8
    assert len((tmp_path / "results" / "results.jsonl").read_text().splitlines()) == 8
    log = grid.read_log(tmp_path / "results")
    assert Counter(line["status"] for line in log) == {"done": 8, "failed": 8}


def test_a_cell_is_done_anew_where_anything_its_number_depends_on_has_changed(images, tmp_path):
    command = ["-d", f"folder:{images}", "-m", "timm:test_vit", "--weights", "random"]
    command += ["--scenario", "frozen-linear", "--image-size", "96"]
    assert "frozen-linear  to do" in run(tmp_path, *command, "--dry-run").stdout
    assert "done before" not in run(tmp_path, *command).stdout
    assert "frozen-linear  done" in run(tmp_path, *command, "--dry-run").stdout
    assert (
        "done before"
        not in run(tmp_path, *command, "--limit", "40", "--features", str(tmp_path)).stdout
    )
    assert "done before" in run(tmp_path, *command).stdout
    assert "done before" in run(tmp_path, *command, "--device", "cpu", "--strict-splits").stdout
    assert "done before" not in run(tmp_path, *command, "--split-seed", "1").stdout
    assert "done before" not in run(tmp_path, *command, "--C", "0.5").stdout
    [predictions] = {r.predictions for r in results.load(tmp_path / "results") if r.C == 0.5}
    (tmp_path / "results" / predictions).unlink()
    assert "done before" not in run(tmp_path, *command, "--C", "0.5").stdout


def test_a_file_gives_options_and_the_command_line_overrules_it(images, tmp_path):
    config = tmp_path / "grid.toml"
    config.write_text(
        f'dataset = "folder:{images}"\nbackbone = ["timm:test_vit"]\nweights = "random"\n'
        'scenario = ["frozen-linear"]\nimage-size = 96\nC = [0.1, 1]\nfolds = 3\n'
    )
    done = run(tmp_path, str(config), "--folds", "2", "--json")
    assert done.exit_code == 0, done.output
    [cell] = json.loads(done.stdout)
    [result] = cell["results"]
    assert result["folds"]["C"] == [0.1, 1]
    assert len(result["folds"]["scores"][0]) == 2
    text = config.read_text().replace(f'dataset = "folder:{images}"', "")
    config.write_text(f'{text}[[dataset]]\nsource = "folder:{images}"\nmerge = ["a=nothing"]\n')
    told = run(tmp_path, str(config))
    assert told.exit_code == 2
    assert "nothing" in told.stderr  # the option of that data set holds: it has no such class
    config.write_text("bacbone = 1\n")
    wrong = run(tmp_path, str(config))
    assert wrong.exit_code == 2
    assert "unknown key 'bacbone': did you mean backbone" in wrong.stderr
    assert "no datasets: give some by -d" in run(tmp_path, "-m", "deit").stderr


def test_depths_are_cells_of_their_own_and_layers_are_drawn(images, tmp_path):
    options = ["-d", f"folder:{images}", "-m", "timm:test_vit", "--weights", "random", *TINY]
    options += ["--scenario", "unfrozen-linear", "--scenario", "frozen-linear"]
    done = run(tmp_path, *options, "--unfreeze", "last:1,all", "--drop-last", "0,2")
    assert done.exit_code == 0, done.output
    found = results.load(tmp_path / "results")
    assert {r.protocol for r in found} == {
        *("dinov2-logreg", "finetune", "finetune last:1"),
        *("finetune drop 2", "finetune last:1 drop 2"),
    }
    out = tmp_path / "analysis"
    command = ["analyze", "layers", str(tmp_path / "results"), "-o", str(out)]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    [unfreezing] = out.glob("unfreezing-*.csv")
    text = unfreezing.read_text()
    assert all(f",{place},0." in text or f",{place},1" in text for place in ("0", "1", "all"))
    assert list(out.glob("dropping-*.png"))
    command = ["analyze", "convergence", str(tmp_path / "results"), "-o", str(out)]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    header, *rows = (out / "convergence.csv").read_text().splitlines()
    assert header.endswith("best,epoch,epoch of 95%,epoch of 99%")
    assert len(rows) == 4


def test_weights_belong_to_a_backbone(images, tmp_path):
    options = ["-d", f"folder:{images}", "-m", "deit", "-m", "dino", "--scenario", "frozen-linear"]
    wrong = run(tmp_path, *options, "--weights", "some.pth")
    assert wrong.exit_code == 2
    assert "goes with one backbone: write BACKBONE=some.pth" in wrong.stderr
    each = run(tmp_path, *options, "--weights", "deit=a.pth", "--weights", "dino=b.pth")
    assert each.exit_code == 1
    assert "a.pth" in each.stdout
    assert "b.pth" in each.stdout
