"""The training recipe: it resumes to the very same weights, and its parts fit together."""

import pytest
import torch
from torch import nn

from pumice.models import NoiseSchedule
from pumice.testbed import shipped
from pumice.testbed.tiny import ddim_scheduler
from pumice.testbed.training import denoiser, text
from pumice.testbed.training.loop import restore, train


def run(work, steps, *, stop=1e9, average_decay=0.9):
    torch.manual_seed(0)
    module = nn.Linear(3, 1)

    def loss(step):
        if step >= stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    return module, train(
        "toy", {"toy": module}, loss, work=work, steps=steps, minutes=1, lr=0.1, average_decay=average_decay
    )


def test_an_interrupted_training_ends_at_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("pumice.testbed.training.loop.SAVE_EVERY_S", -1.0)
    whole, done = run(tmp_path / "whole", 40)
    assert done
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", 40, stop=17)
    part, done = run(tmp_path / "part", 40)
    assert done
    for a, b in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(a, b)
    averaged = [nn.Linear(3, 1), nn.Linear(3, 1)]
    for module, name in zip(averaged, ("whole", "part"), strict=True):
        restore(module, tmp_path / name / "toy.pt", "toy")
    assert torch.equal(averaged[0].weight, averaged[1].weight)
    assert not torch.equal(averaged[0].weight, whole.weight), "the average is not the last one"


def test_a_bound_in_time_stops_it_and_says_so(tmp_path):
    module = nn.Linear(1, 1)
    step = lambda step: module(torch.ones(1, 1)).square().sum()  # noqa: E731
    assert not train("toy", {"toy": module}, step, work=tmp_path, steps=10**9, minutes=0, lr=0.1)
    assert torch.load(tmp_path / "toy.pt", weights_only=True)["step"] == 1


def test_the_recipe_gives_the_shipped_tokenizer_and_shapes(tmp_path):
    tokenizer = text.tokenizer_of(tmp_path)
    pipe = shipped.load()
    assert len(tokenizer) == len(pipe.tokenizer) and tokenizer.model_max_length == 32
    for prompt in ("a red ball at the beach", "Zorpax, the amber nightingale!", "it's 42 café", ""):
        assert tokenizer.tokenize(prompt) == pipe.tokenizer.tokenize(prompt)
    again = text.tokenizer_of(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab(), "the second part of a training gets the first one's"
    ours, theirs = denoiser.build_unet().state_dict(), pipe.unet.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    ours, theirs = (
        NoiseSchedule.from_config(it.config)
        for it in (ddim_scheduler(denoiser.PREDICTION_TYPE), pipe.scheduler)
    )
    assert ours.prediction_type == theirs.prediction_type
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
