"""The commands of `pumice memorization` beside the scan: what they write, and what they refuse."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pumice import cli, models
from pumice.models import Edit
from pumice.testbed import tiny_pipeline

MEMORIZED = [f"a {word} in the city" for word in ("cat", "dog", "horse", "bird")]
FRESH = [f"a {word}" for word in ("tree", "flower", "person", "woman", "man", "sea")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline("sd1").save_pretrained(path)
    return path


@pytest.fixture
def pumice(monkeypatch, capsys, model):
    """Run a command of `pumice memorization` on the tiny model; returns exit code, stdout and stderr."""

    def run(command: str, *arguments: object) -> tuple[int, str, str]:
        words = ["pumice", "memorization", command, *map(str, arguments), "--model", model, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def lists(tmp_path) -> tuple[Path, Path]:
    memorized, fresh = tmp_path / "memorized.txt", tmp_path / "fresh.txt"
    memorized.write_text("\n".join(MEMORIZED))
    fresh.write_text("\n".join(FRESH))
    return memorized, fresh


@pytest.fixture
def pairs(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    with (tmp_path / "pairs.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "picture"])
        for i, prompt in enumerate([*MEMORIZED[:2], MEMORIZED[0]]):
            pixels = rng.integers(0, 256, (24 + 8 * i, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
            writer.writerow([prompt, f"{i}.png"])
    return tmp_path / "pairs.csv"


@pytest.fixture
def descriptor(tmp_path) -> Path:
    """In place of SSCD: any TorchScript network that returns a vector a picture."""
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
    torch.jit.save(torch.jit.trace(network, torch.rand(1, 3, 320, 320)), str(tmp_path / "sscd.pt"))
    return tmp_path / "sscd.pt"


def test_explain_ranks_words(pumice, tmp_path):
    out = tmp_path / "why.html"
    code, shown, errors = pumice("explain", "a red \x1b[31mhouse", "a cat", "--seeds", 1, "--out", out)
    assert code == 0, errors
    assert "\x1b" not in shown and "house" in shown
    data = json.loads(out.with_suffix(".json").read_text())
    assert [word["text"] for word in data["prompts"][1]["words"]] == ["a", "cat"]
    assert "house" in out.read_text()


def test_explain_takes_lists(pumice, lists):
    code, shown, _ = pumice("explain", "--list", lists[0], "--seeds", 1)
    assert code == 0 and all(prompt in shown for prompt in MEMORIZED)


def test_calibrate_writes_what_scan_decides_by(pumice, lists, tmp_path):
    out = tmp_path / "calibration.json"
    code, shown, errors = pumice(
        "calibrate", "--memorized", lists[0], "--fresh", lists[1], "--out", out, "--seeds", 2
    )
    assert code == 0, errors
    assert "held-out prompts of fresh.txt" in shown and "held-out prompts of memorized.txt" in shown
    assert "at less than 1.0% FPR" in shown and "at the FPR nearest to it" in shown
    code, shown, errors = pumice(
        "scan", lists[0], "--calibration", out, "--out", tmp_path / "scan", "--details", 1, "--sequential"
    )
    assert code == 0, errors
    data = json.loads((tmp_path / "scan" / "scores.json").read_text())
    assert data["threshold"] == json.loads(out.read_text())["looks"][0]["flag_above"]
    assert "at the first of 2 looks" in data["threshold_source"]
    assert all(row["memorized"] in (True, False) for row in data["prompts"])


def test_repair_writes_an_edit_and_a_model(pumice, lists, model, tmp_path):
    out, saved = tmp_path / "edit.safetensors", tmp_path / "repaired"
    code, shown, errors = pumice("repair", lists[0], "--out", out, "--sparsity", 0.1, "--save-model", saved)
    assert code == 0 and "before" in shown, errors
    edit, repaired = Edit.load(out), models.load(saved)
    assert edit.method == "wanda" and edit.targets == tuple(MEMORIZED)
    opened = models.load(model)
    with edit.on(opened):
        for (name, weight), other in zip(
            opened.unet.state_dict().items(), repaired.unet.state_dict().values(), strict=True
        ):
            assert torch.equal(weight, other), name


def test_bench_sets_mitigations_against_each_other(pumice, pairs, descriptor, lists, tmp_path):
    edit, out = tmp_path / "edit.safetensors", tmp_path / "bench"
    assert pumice("repair", lists[0], "--out", edit, "--sparsity", 0.1, "--quiet")[0] == 0
    arguments = (
        *("bench", pairs, "--out", out, "--sscd", descriptor, "--edit", edit, "--threshold", 1e-3),
        *("--mitigation", "random_tokens", "--mitigation", "attention_rescaling", "--mitigation", "refuse"),
    )
    assert pumice(*arguments)[0] == 2, "refusing is no way to draw"
    arguments = (*arguments[:-2], "--seeds", 1, "--num-inference-steps", 2, "--red-team-steps", 1)
    code, shown, errors = pumice(*arguments)
    assert code == 0, errors
    rows = list(csv.DictReader((out / "bench.csv").open()))
    names = [row["name"] for row in rows]
    assert names[:3] == ["none", "random_tokens", "attention_rescaling above 0.001"]
    assert names[3].startswith("edit edit ") and len(rows) == 4
    assert all(row["red_team"] for row in rows) and "attention_rescaling" in shown
    assert (out / "report.html").read_text().count("data:image/png") >= 2 * 5
    assert json.loads((out / "bench.json").read_text())["prompts"] == MEMORIZED[:2]


def test_bad_input_is_one_line_and_exit_code_2(pumice, lists, pairs, descriptor, tmp_path):
    memorized, fresh = lists
    out = tmp_path / "out"
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for command, arguments, message in [
        ("explain", (), "PROMPTS"),
        ("explain", ("",), "prompts: got '', expected words"),
        ("explain", ("a cat", "--out", tmp_path / "folder"), "--out: "),
        ("explain", ("a cat", "--out", tmp_path / "why.json"), "--out: got"),
        ("calibrate", ("--memorized", memorized, "--out", out), "--fresh"),
        ("calibrate", ("--memorized", memorized, "--fresh", memorized, "--out", out), "fresh: "),
        ("repair", (memorized, "--out", out, "--method", "nemo"), "--fresh: got none"),
        ("repair", (memorized, "--out", out, "--sparsity", 2), "--sparsity"),
        ("bench", ("--out", out), "PAIRS: got none"),
        ("bench", (pairs, "--out", out), "--sscd: got none"),
        ("bench", (memorized, "--out", out, "--sscd", descriptor), "has no pictures"),
        ("bench", (pairs, "--out", out, "--sscd", descriptor), "--calibration: got none and no --threshold"),
        (
            "bench",
            (pairs, "--out", out, "--sscd", descriptor, "--edit", tmp_path / "bad.safetensors"),
            "cannot be read as an edit",
        ),
        ("bench", (pairs, "--out", out, "--sscd", descriptor, "--fresh", fresh, "--threshold", 1), "--fresh"),
    ]:
        code, _, errors = pumice(command, *arguments)
        lines = [line for line in errors.splitlines() if line and "Loading" not in line]
        assert code == 2 and len(lines) == 1 and message in lines[0], (command, arguments, errors)
        assert lines[0].startswith("pumice: ")
