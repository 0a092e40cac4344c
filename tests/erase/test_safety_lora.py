"""A safety adapter survives a fine-tune of the base; fine-tuning an erased model brings the concept back."""

from __future__ import annotations

import pytest
import torch

from erase.toy import QUICK, WEIGHT, Toy
from pumice.erase.safety_lora import safety_lora
from pumice.models import Added, Edit

HOW = {"num_inference_steps": 4, "rank": 1, **QUICK}


def finetuned(weight: torch.Tensor) -> Toy:
    """What such weights become by the denoising loss on pictures of "one, two", whose mean is 1."""
    found = Toy(tuple(weight.flatten().tolist()))
    trained = found.unet.get_parameter(WEIGHT).requires_grad_()
    optimizer, generator = torch.optim.Adam([trained], 0.05), torch.Generator().manual_seed(0)
    text = found.encode_prompt("one, two")
    for _ in range(100):
        x0, noise = torch.randn(2, 16, 1, 2, 2, generator=generator)
        x0, t = 1 + 0.5 * x0, torch.randint(1000, (16,), generator=generator)
        optimizer.zero_grad()
        output = found.predict_noise(found.add_noise(x0, noise, t), t, text)
        (output - noise).square().mean().backward()
        optimizer.step()
    trained.requires_grad_(False)
    return found


@pytest.mark.parametrize("objective", ["sdd", "esd"])
def test_a_safety_adapter_survives_a_fine_tune(objective):
    base = Toy()
    options = {"ema_decay": 0.9} if objective == "sdd" else {"negative_guidance": 0.0}
    edit = safety_lora(base, "one", objective=objective, **options, **HOW)
    erased = base.mean("one", edit)
    assert erased == pytest.approx(0, abs=5e-2)
    with edit.on(base):
        trained_on_it = finetuned(base.unet.get_parameter(WEIGHT).detach().clone())
    trained_apart = finetuned(base.unet.get_parameter(WEIGHT))
    with pytest.raises(ValueError, match="got weights of the fingerprint"):
        edit.apply(trained_apart)
    beside = edit.rebased(trained_apart)
    for text in ("one", "two", "one, two"):  # W* = W0 + dW_safe + dW_finetune
        changed = trained_apart.mean(text) - base.mean(text)
        assert trained_apart.mean(text, beside) == pytest.approx(base.mean(text, edit) + changed, abs=1e-5)
    assert trained_apart.mean("one, two") == pytest.approx(1, abs=0.1)
    assert abs(trained_apart.mean("one", beside)) < 0.4
    assert trained_on_it.mean("one") > trained_apart.mean("one", beside) + 0.3
    assert trained_apart.mean("one") > 1.5  # the fine-tune without it has not forgotten


def test_it_is_a_lora_of_that_rank_and_names_itself(tmp_path):
    edit = safety_lora(Toy(), "one", **HOW | {"steps": 2})
    (change,) = edit.changes.values()
    assert isinstance(change, Added) and change.rank == 1
    assert edit.method == "safety_lora" and edit.settings["objective"] == "sdd" and edit.settings["rank"] == 1
    edit.save(tmp_path / "edit.safetensors")
    assert Edit.load(tmp_path / "edit.safetensors").to_dict() == edit.to_dict()


def test_what_is_not_an_argument_is_refused():
    for name, value in (("objective", "uce"), ("rank", 0), ("learning_rate", -1)):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            safety_lora(Toy(), "one", **{name: value})
    with pytest.raises(TypeError, match="rank"):
        safety_lora(Toy(), "one", rank=None)
