"""The copy that learns: what it learns, that it goes back to the bit, and that its original stays."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from pumice import testbed
from pumice.models import UnsupportedModelError, load, vae
from pumice.models.draws import Draws
from pumice.protect import ProtectionWarning
from pumice.protect import surrogate as surrogate_module
from pumice.protect.dreambooth import class_examples
from pumice.protect.surrogate import Surrogate
from pumice.testbed import tiny_pipeline, world
from pumice.training.examples import Examples

MODES = ("fp32_master", "bf16_faithful", "lora")
PROMPT, CLASS = "a photo of sks person", "a photo of person"

pytestmark = pytest.mark.filterwarnings("ignore::pumice.protect.ProtectionWarning")


@pytest.fixture(scope="module")
def sd1():
    return tiny_pipeline("sd1")


def pictures(count: int, height: int = 32, width: int = 32) -> list[Tensor]:
    return list(torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count)))


def state(pipe) -> dict[str, object]:
    """Everything of a pipeline that a careless training would change."""
    found: dict[str, object] = {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            found |= {f"{name}.{key}": (id(p), p.requires_grad, p.grad) for key, p in part.named_parameters()}
            for key, m in part.named_modules():
                found[f"{name}.{key} module"] = (type(m), m.training, sorted(vars(m)))
    return found


def weights(pipe) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, value in part.state_dict().items()
    }


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def differ(first: list[Tensor], second: list[Tensor]) -> float:
    """The share of numbers that differ."""
    changed = sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))
    return changed / sum(a.numel() for a in first)


def taught(pipe, mode="fp32_master", *, lr=1e-3, steps=2, batch_size=1, **how) -> Surrogate:
    surrogate = Surrogate(pipe, mode, lr=lr, **how)
    surrogate.train([Examples(surrogate.model, pictures(3), PROMPT)], steps, batch_size=batch_size)
    return surrogate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_it_learns_and_its_original_does_not(mode, dtype):
    pipe = tiny_pipeline("sd1").to(dtype)
    pipe.unet.train()
    before, bits = state(pipe), weights(pipe)
    surrogate = Surrogate(pipe, mode, lr=1e-2)
    fresh = surrogate.snapshot()
    surrogate.train([Examples(surrogate.model, pictures(3), PROMPT)], 2)
    assert state(pipe) == before and same_bits(weights(pipe), bits)
    assert not hasattr(pipe.unet, "peft_config")
    assert differ(fresh, surrogate.snapshot()) > 0.5
    assert all(bool(trained.isfinite().all()) for trained in surrogate.snapshot())
    assert surrogate.model.vae is pipe.vae and not surrogate.model.unet.training
    assert surrogate.model.dtype == (torch.bfloat16 if mode == "bf16_faithful" else dtype)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
@pytest.mark.parametrize("mode", MODES)
def test_every_family(family, mode):
    pipe = tiny_pipeline(family)
    load(pipe).encode_prompt(PROMPT)  # at the first one, transformers prepares its text encoders
    before, bits = state(pipe), weights(pipe)
    surrogate = Surrogate(pipe, mode, lr=1e-2)
    embeds = surrogate.embeds(PROMPT)
    tensors = [t for t in (embeds.embeds, embeds.pooled) if t is not None]
    old = [t.clone() for t in tensors]
    surrogate.train([Examples(surrogate.model, pictures(3), PROMPT)], 1)
    assert state(pipe) == before and same_bits(weights(pipe), bits)
    now = load(surrogate.model).encode_prompt(PROMPT)
    for tensor, was, fresh in zip(tensors, old, (now.embeds, now.pooled), strict=False):
        assert torch.equal(tensor, fresh)
        assert torch.equal(tensor, was) == (mode == "lora")  # whose text encoders do not train


def test_only_the_denoiser_trains_where_text_encoders_should_not(sd1):
    surrogate = taught(sd1, train_text_encoder=False)
    assert surrogate.model.pipe.text_encoder is sd1.text_encoder
    assert len(surrogate.snapshot()) == len(list(sd1.unet.parameters()))


def test_lora_reads_the_weights_of_its_original():
    pipe = tiny_pipeline("sd1").to(torch.bfloat16)
    surrogate = taught(pipe, "lora", rank=4)
    shared = {weight.data_ptr() for weight in pipe.unet.parameters()}
    trained = surrogate.model.unet.named_parameters()
    own = {name: weight for name, weight in trained if weight.data_ptr() not in shared}
    assert own and all("lora_" in name for name in own)
    assert {min(weight.shape) for weight in own.values()} == {4}
    assert all(weight.dtype == torch.float32 for weight in own.values())
    layers = Counter(name.split(".lora_")[0].rsplit(".", 1)[-1] for name in own)
    assert layers["to_q"] == layers["to_k"] == layers["to_v"] == layers["0"] > 0


@torch.no_grad()
def test_an_untrained_lora_is_the_model(sd1):
    surrogate, model = Surrogate(sd1, "lora"), load(sd1)
    z, embeds = torch.randn(1, 4, 16, 16), model.encode_prompt(PROMPT)
    assert torch.equal(surrogate.model.predict(z, 10, embeds), model.predict(z, 10, embeds))


@pytest.mark.parametrize("mode", MODES)
def test_scratch_is_undone_to_the_bit(mode):
    surrogate = taught(tiny_pipeline("sd1").to(torch.bfloat16), mode, lr=1e-2)
    examples, embeds = [Examples(surrogate.model, pictures(2), CLASS)], surrogate.embeds(PROMPT)
    before, text, net = surrogate.snapshot(), embeds.embeds.clone(), weights(surrogate.model.pipe)
    where = [weight.data_ptr() for weight in surrogate.model.unet.parameters()]
    for error in (None, KeyboardInterrupt):
        try:
            with surrogate.scratch():
                surrogate.train(examples, 1)
                assert differ(before, surrogate.snapshot()) > 0.5
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        assert differ(before, surrogate.snapshot()) == 0
        assert same_bits(net, weights(surrogate.model.pipe))
        assert torch.equal(embeds.embeds, text)
    # in place, for what a CUDA graph has captured
    assert where == [weight.data_ptr() for weight in surrogate.model.unet.parameters()]


def test_snapshots_are_places_to_go_back_to():
    surrogate = taught(tiny_pipeline("sd1").to(torch.bfloat16), lr=1e-2)
    first, net = surrogate.snapshot(), weights(surrogate.model.pipe)
    examples = [Examples(surrogate.model, pictures(2), CLASS)]
    surrogate.train(examples, 1)
    second = surrogate.snapshot()
    surrogate.restore(first)
    assert differ(first, surrogate.snapshot()) == 0 and same_bits(net, weights(surrogate.model.pipe))
    surrogate.restore(second)
    assert differ(second, surrogate.snapshot()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_published_learning_rate_moves_bfloat16_weights_hardly_and_float32_ones_all(dtype):
    def moved(mode: str) -> float:
        pipe = tiny_pipeline("sd1").to(dtype)
        draw = torch.Generator().manual_seed(0)
        matrices = [weight for weight in pipe.unet.parameters() if weight.ndim > 1]
        for weight in matrices:
            weight.data = 0.02 * torch.randn(weight.shape, generator=draw).to(dtype)
        surrogate = Surrogate(pipe, mode, train_text_encoder=False)
        before = [weight for weight in surrogate.snapshot() if weight.ndim > 1]
        surrogate.train([Examples(surrogate.model, pictures(3), PROMPT)], 1)
        return differ(before, [weight for weight in surrogate.snapshot() if weight.ndim > 1])

    assert 0.005 < moved("bf16_faithful") < 0.012
    assert moved("fp32_master") > 0.999


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_two_steps_are_those_of_a_plain_dreambooth(family):
    """Against AdamW on autograd's gradients of the formula, for pictures of two sizes and sets of weights."""
    pipe = tiny_pipeline(family).to(torch.float64)
    subject, of_class = pictures(3), pictures(2, 32, 48)
    surrogate = Surrogate(pipe, lr=1e-3, seed=5)
    surrogate.train(
        [
            Examples(surrogate.model, subject, PROMPT),
            Examples(surrogate.model, of_class, CLASS, weight=0.25),
        ],
        2,
        batch_size=2,
    )
    model = load(copy.deepcopy(pipe))
    parameters = [*model.unet.parameters(), *model.pipe.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=1e-2)
    draws = Draws([f"5/surrogate/{row}" for row in range(4)], torch.device("cpu"))
    for step in range(2):
        loss = torch.zeros(())
        for row in range(4):
            set_, prompt, weight = ((subject, PROMPT, 1.0), (of_class, CLASS, 0.25))[row // 2]
            image = set_[(2 * step + row % 2) % len(set_)][None]
            shape = model.latent_shape(*image.shape[2:])
            posterior, noise = (draws.normal([row], what, step, shape) for what in ("posterior", "noise"))
            t = draws.integers([row], "timestep", step, 1000)
            with torch.no_grad():
                z = model.encode_image(image, noise=posterior).float()
            output = model.predict(model.add_noise(z, noise, t), t, model.encode_prompt(prompt))
            loss = loss + weight / 2 * (output - model.schedule.target(z, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for mine, theirs, before in zip(
        surrogate.snapshot(), parameters, Surrogate(pipe).snapshot(), strict=True
    ):
        # keys have no use for a bias: its gradient is rounding alone
        assert (mine - theirs).norm() <= 1e-4 * (theirs - before).norm() + 1e-9


def test_steps_take_the_pictures_in_turn(sd1, monkeypatch):
    seen: list[int] = []
    real = Examples.latents

    def latents(self, index, *args):
        seen.append(index)
        return real(self, index, *args)

    monkeypatch.setattr(Examples, "latents", latents)
    surrogate = Surrogate(sd1)
    examples = [Examples(surrogate.model, pictures(4), PROMPT)]
    surrogate.train(examples, 3)
    surrogate.train(examples, 3)
    assert seen == [0, 1, 2, 0, 1, 2]  # every call from the start: the fourth is never met
    seen.clear()
    surrogate.train(examples, 3, batch_size=2)
    assert seen == [0, 1, 2, 3, 0, 1]


def test_pictures_are_encoded_once_and_sampled_each_time(sd1, monkeypatch):
    model, calls = load(sd1), []
    real = vae.encode
    monkeypatch.setattr(vae, "encode", lambda *a, **k: calls.append(a) or real(*a, **k))
    examples, draws = Examples(model, pictures(2), PROMPT), Draws(["x"], torch.device("cpu"))
    first, second = (examples.latents(1, draws, 0, step) for step in (0, 1))
    assert len(calls) == 1 and not torch.equal(first, second)
    noise = draws.normal([0], "posterior", 1, (4, 16, 16))
    with torch.no_grad():
        expected = model.encode_image(pictures(2)[1][None], noise=noise)[0]
    assert torch.allclose(second, expected, atol=1e-6)


def test_the_seed_decides_and_the_callers_random_numbers_stay(sd1):
    for mode in ("fp32_master", "lora"):
        state = torch.random.get_rng_state()
        first, again, other = (taught(sd1, mode, seed=seed).snapshot() for seed in (3, 3, 4))
        assert torch.equal(state, torch.random.get_rng_state())
        assert differ(first, again) == 0 and differ(first, other) > 0.1


def test_every_training_draws_anew(sd1):
    surrogate = Surrogate(sd1, lr=1e-3)
    examples, start = [Examples(surrogate.model, pictures(1), PROMPT)], surrogate.snapshot()
    found = []
    for _ in range(2):
        with surrogate.scratch():
            surrogate.train(examples, 1)
            found.append(surrogate.snapshot())
    assert differ(*found) > 0.1 and differ(start, surrogate.snapshot()) == 0


@torch.no_grad()
def test_a_subject_is_learned():
    """Its denoising loss falls, on timesteps and noise that training does not draw."""
    surrogate = Surrogate(testbed.load(), lr=5e-4)
    subject = torch.stack([torch.from_numpy(world.subject(0, picture)) for picture in range(4)])
    prompt = "a photo of a sks creature"

    def loss() -> float:
        model, draw, total = surrogate.model, torch.Generator().manual_seed(0), 0.0
        z, embeds = model.encode_image(subject), model.encode_prompt(prompt)
        for t in range(50, 1000, 100):
            noise = torch.randn(z.shape, generator=draw)
            output = model.predict(model.add_noise(z, noise, t), t, embeds)
            total += float((output - model.schedule.target(z, noise, t)).square().mean()) / 10
        return total

    before = loss()
    surrogate.train([Examples(surrogate.model, list(subject), prompt)], 12, batch_size=4)
    assert loss() < 0.8 * before


def test_a_rate_that_moves_nothing_is_said(sd1):
    bf16 = tiny_pipeline("sd1").to(torch.bfloat16)
    with pytest.warns(ProtectionWarning, match="lr: 1e-12 moves no weight"):
        taught(bf16, lr=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProtectionWarning)
        taught(bf16, "bf16_faithful", lr=1e-12)
        taught(bf16, lr=1e-3)
        taught(sd1, lr=5e-7)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float16, 1), (torch.float32, 2)])
def test_a_rate_that_breaks_the_weights_is_said(dtype, steps):
    """In float16 at once, in float32 by the loss of the next step."""
    with pytest.raises(ValueError, match=r"lr: got 1e\+09, at which weights are no longer finite"):
        taught(tiny_pipeline("sd1").to(dtype), lr=1e9, steps=steps)


@pytest.mark.parametrize("mode", ["fp32_master", "lora"])
def test_what_overflows_in_float16_moves_nothing(mode, monkeypatch):
    """Weight decay does."""
    real = surrogate_module.denoising_loss
    monkeypatch.setattr(surrogate_module, "denoising_loss", lambda *given: 1e30 * real(*given))
    pipe = tiny_pipeline("sd1").to(torch.float16)
    fresh = Surrogate(pipe, mode).snapshot()
    for before, after in zip(fresh, taught(pipe, mode, lr=1e-2, steps=1).snapshot(), strict=True):
        assert torch.allclose(after, before * (1 - 1e-2 * 1e-2), rtol=1e-6)


def test_class_pictures_are_drawn_as_far_as_training_goes(sd1, monkeypatch):
    model = load(sd1)
    how = {"weight": 1.0, "seed": 3, "progress": False}
    real, calls = type(model).decode_latents, []
    monkeypatch.setattr(type(model), "decode_latents", lambda self, z: calls.append(len(z)) or real(self, z))
    (two,) = class_examples(model, None, CLASS, count=200, needed=2, **how)
    assert len(two) == 2 and sum(calls) == 2
    (one,) = class_examples(model, None, CLASS, count=1, needed=2, **how)
    draws = Draws(["x"], torch.device("cpu"))
    assert torch.allclose(one.latents(0, draws, 0, 0), two.latents(0, draws, 0, 0), atol=1e-4)
    assert class_examples(model, None, CLASS, count=200, needed=0, **how) == []
    assert class_examples(model, None, CLASS, count=200, needed=9, **how | {"weight": 0.0}) == []
    (given,) = class_examples(model, torch.stack(pictures(5)), CLASS, count=1, needed=2, **how)
    assert len(given) == 5 and sum(calls) == 3


def test_what_cannot_be_trained_is_refused(sd1):
    with pytest.raises(ValueError, match="surrogate: got 'fp8', expected one of fp32_master"):
        Surrogate(sd1, "fp8")
    with pytest.raises(ValueError, match="lr: got -1"):
        Surrogate(sd1, lr=-1)
    with pytest.raises(TypeError, match="train_text_encoder: got 'no', expected a bool"):
        Surrogate(sd1, train_text_encoder="no")
    wrapped = tiny_pipeline("sd1")
    wrapped.unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(UnsupportedModelError, match="unet: a LoRA adapter is attached"):
        Surrogate(wrapped, "lora")
    offloaded = tiny_pipeline("sd1")
    offloaded.text_encoder._hf_hook = object()
    with pytest.raises(UnsupportedModelError, match="text_encoder: it is offloaded"):
        Surrogate(offloaded)
    narrow = tiny_pipeline("sd1")
    narrow.unet.conv_in.weight.data = narrow.unet.conv_in.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedModelError, match=r"unet: conv_in.weight is a torch.float8_e4m3fn Tensor"):
        Surrogate(narrow)


def test_a_compiled_denoiser_is_copied_as_it_was(sd1):
    pipe = copy.copy(sd1)
    pipe.unet = torch.compile(sd1.unet)
    surrogate = Surrogate(pipe)
    assert type(surrogate.model.unet) is type(sd1.unet)
    assert pipe.unet is not sd1.unet
