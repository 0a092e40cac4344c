"""The command as a user meets it: exit codes, one-line errors, files."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from pumice import cli
from pumice.cli.memorization import options
from pumice.memorization.settings import METRICS
from pumice.pipelines import Mitigation
from pumice.testbed import tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline("sd1").save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog in the city\n<b>bold</b> \x1b[31mred\n" + "a house " * 60 + "\n")
    return path


@pytest.fixture
def pumice(monkeypatch, capsys):
    """Run a command in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pumice", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, *capsys.readouterr()

    return run


def scan(prompts, model, out, *more):
    return (
        "memorization",
        "scan",
        prompts,
        "--model",
        model,
        "--out",
        out,
        "--seeds",
        2,
        "--device",
        "cpu",
        *more,
    )


def test_env_and_help_and_version(pumice):
    code, out, _ = pumice("env")
    assert code == 0 and "cpu extension" in out and "torch" in out
    code, out, _ = pumice("memorization", "scan", "--help")
    assert code == 0 and "--threshold" in out
    assert pumice("--version")[0] == 0


def test_the_choices_are_those_that_there_are():
    """Written down for --help, which should not import them."""
    assert set(options.METRICS) == set(METRICS)
    assert set(options.GUARDS) == set(get_args(Mitigation))


def test_without_a_command_it_explains_itself(pumice):
    for arguments in ((), ("memorization",)):
        code, _, errors = pumice(*arguments)
        assert code == 2 and "Commands:" in errors.splitlines()


def test_the_installed_command():
    done = subprocess.run(
        [Path(sys.executable).with_name("pumice"), "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "pumice" in done.stdout


def test_a_scan_writes_csv_json_and_html(pumice, prompts, model, tmp_path):
    out = tmp_path / "deep" / "out"
    code, shown, errors = pumice(*scan(prompts, model, out, "--threshold", 1.0, "--details", 1))
    assert code == 0, errors
    assert "report: " in shown and "\x1b" not in shown
    rows = list(csv.DictReader((out / "scores.csv").open()))
    scores = [float(row["score"]) for row in rows]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"] and scores == sorted(scores, reverse=True)
    assert {row["memorized"] for row in rows} <= {"True", "False"}
    data = json.loads((out / "scores.json").read_text())
    assert [row["prompt"] for row in data["prompts"]] == [row["prompt"] for row in rows]
    assert data["threshold"] == 1.0 and data["columns"] == ["magnitude at t=981"]
    assert len(data["prompts"][0]["seed_scores"]) == 2 and len(data["prompts"][0]["curve"]) == 50
    assert [bool(row["truncated"]) for row in data["prompts"]].count(True) == 1
    listed = [json.loads(line)["prompt"] for line in (out / "memorized.jsonl").read_text().splitlines()]
    assert listed == [row["prompt"] for row in rows if row["memorized"] == "True"]
    page = (out / "report.html").read_text()
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page and page.count("data:image/png") == 2


def test_a_second_call_takes_everything_from_the_folder(pumice, prompts, model, tmp_path):
    first = pumice(*scan(prompts, model, tmp_path / "out", "--quiet"))
    scores = (tmp_path / "out" / "scores.json").read_bytes()
    parts = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "parts").iterdir()}
    assert pumice(*scan(prompts, model, tmp_path / "out", "--quiet")) == first
    assert (tmp_path / "out" / "scores.json").read_bytes() == scores
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "parts").iterdir()} == parts


def test_without_a_threshold_nothing_is_judged(pumice, prompts, model, tmp_path):
    code, shown, _ = pumice(*scan(prompts, model, tmp_path / "out", "--details", 0))
    assert code == 0 and "no verdicts: give --calibration, --threshold, or --fresh" in shown
    assert {row["memorized"] for row in csv.DictReader((tmp_path / "out" / "scores.csv").open())} == {""}


def test_bad_input_is_one_line_and_exit_code_2(pumice, prompts, model, tmp_path):
    broken, empty, out = tmp_path / "broken.jsonl", tmp_path / "empty.txt", tmp_path / "out"
    broken.write_text('{"prompt": "a"}\n{oops\n')
    empty.write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    flux = tmp_path / "flux"
    flux.mkdir()
    (flux / "model_index.json").write_text('{"_class_name": "FluxPipeline", "_diffusers_version": "0.35.0"}')
    for arguments, message in [
        (scan(tmp_path / "gone.txt", model, out), "prompts: cannot read"),
        (scan(broken, model, out), "prompts: broken.jsonl, line 2: not JSON"),
        (scan(empty, model, out), "prompts: "),
        (scan(prompts, tmp_path / "nowhere", out), "--model: "),
        (scan(prompts, tmp_path / "folder", out), "is not a diffusers folder"),
        (scan(prompts, flux, out), "FluxPipeline is not supported"),
        (scan(prompts, model, tmp_path / "file"), "--out: cannot write to"),
        (scan(prompts, model, out, "--steps", 0), "--steps"),
        (scan(prompts, model, out, "--steps", -3), "--steps"),
        (scan(prompts, model, out, "--steps", 51), "steps: got 51"),
        (scan(prompts, model, out, "--metric", "loudness"), "--metric"),
        (
            scan(prompts, model, out, "--metric", "anisotropy", "--steps", 2),
            "--steps: got 2, which anisotropy",
        ),
        (scan(prompts, model, out, "--calibration", empty), "calibration: "),
        (scan(prompts, model, out, "--sequential"), "sequential: needs a calibration"),
        (scan(prompts, model, out, "--guard", "refuse"), "guard: got 'refuse', which needs a calibration"),
        (scan(prompts, model, out, "--guard", "hope"), "--guard"),
        (scan(prompts, model, out, "--height", 33), "height: got 33"),
        (scan(prompts, model, out, "--fpr", 1), "--fpr"),
        (scan(prompts, model, out, "--threshold", 1, "--fresh", prompts), "threshold, fresh: got 2 of them"),
        (scan(prompts, model, out, "--device", "abacus"), "device: 'abacus' cannot be used"),
        (scan(prompts, model, out, "--frobnicate"), "--frobnicate"),
        (("memorization", "scan"), "PROMPTS"),
        (("unknown",), "unknown"),
    ]:
        code, shown, errors = pumice(*arguments)
        assert code == 2, (arguments, shown, errors)
        lines = [
            line for line in errors.splitlines() if line and "Loading" not in line and "scoring" not in line
        ]
        assert len(lines) == 1 and lines[0].startswith("pumice: ") and message in lines[0], errors
        assert not out.exists() or not list(out.iterdir()), (arguments, "nothing half-written")


def test_a_folder_of_another_scan_is_refused_until_restart(pumice, prompts, model, tmp_path):
    out = tmp_path / "out"
    assert pumice(*scan(prompts, model, out, "--quiet"))[0] == 0
    code, _, errors = pumice(*scan(prompts, model, out, "--quiet", "--guidance-scale", 3))
    assert code == 2 and "holds results of another model, list or settings" in errors
    assert pumice(*scan(prompts, model, out, "--quiet", "--guidance-scale", 3, "--restart"))[0] == 0


def test_an_interruption_says_how_to_go_on(pumice, prompts, model, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pumice.jobs.scan", interrupt)
    code, _, errors = pumice(*scan(prompts, model, tmp_path / "out"))
    assert code == 130 and "a scan or bench goes on where it stopped" in errors
