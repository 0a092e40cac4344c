"""The example, cut down to two steps of training: it runs, repeats itself, and the filter is in its loop."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pumice import testbed
from pumice.testbed import world

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_with_filter.py"


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("finetune_with_filter", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"ORDINARY": 6, "BATCH": 4, "CALIBRATION": 2, "JUDGED": 2}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setitem(module.SAMPLER, "num_inference_steps", 3)
    return module


def test_it_runs_without_and_with_the_filter(example, tmp_path, capsys):
    example.main(["--steps", "2", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].split() == ["replicated", "similarity", "magnitude", "attributes"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == ["before", "without the filter", "with the filter"]
    for numbers in results.values():
        assert numbers["replicated"] == 0 and 0 <= numbers["attributes"] <= 1 and numbers["magnitude"] > 0
    assert results["before"] != results["without the filter"]
    with Image.open(tmp_path / "out" / "drawn.png") as sheet:
        assert sheet.size == (
            3 * world.SIZE,
            13 * world.SIZE,
        )  # the originals, and four drawings of each state


def test_the_filter_decides_what_is_learned_and_the_training_repeats_itself(example):
    pairs = [example.collage(i) for i in range(3)]
    pairs += [world.training_picture(2 * 10**8 + i)[:2] for i in range(3)]

    def trained(threshold):
        pipe = testbed.load()
        example.fine_tune(pipe, pairs, threshold, steps=2, minutes=1)
        return pipe.unet.state_dict()

    before, everything = testbed.load().unet.state_dict(), trained(None)
    nothing, all_kept = trained(torch.full((1000,), 1e-9)), trained(torch.full((1000,), 1e9))
    for name, weight in before.items():
        assert torch.equal(everything[name], all_kept[name]), name
        # all that is left of a step is the optimizer's weight decay
        torch.testing.assert_close(nothing[name], weight, rtol=1e-4, atol=1e-6)
        learned = not torch.allclose(everything[name], weight, rtol=1e-4, atol=1e-6)
        assert learned == (".attn2." in name), name


def test_it_stops_when_the_time_is_over(example, monkeypatch):
    steps = []
    monkeypatch.setattr(
        example.F, "mse_loss", lambda *a, real=example.F.mse_loss, **k: steps.append(1) or real(*a, **k)
    )
    pairs = [example.collage(i) for i in range(4)]
    example.fine_tune(testbed.load(), pairs, None, steps=50, minutes=0)
    assert len(steps) == 1
