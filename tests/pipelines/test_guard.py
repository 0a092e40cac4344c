"""Every mitigation against the same thing done by hand, and what each does on the trained testbed."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pumice import models, pipelines, testbed
from pumice.memorization.attention_rescaling import rescaled_attention
from pumice.memorization.dynamic_guidance import transition_step
from pumice.memorization.initial_noise import adjust_batchwise
from pumice.memorization.mitigate import mitigate
from pumice.pipelines import Guard
from pumice.testbed import tiny_pipeline, world

PROMPTS = ["a red cat", "a photo of a dog in the city", "the sea"]
SEEDS = (0, 1, 2)
STEPS = 10


def ours_of(plain):
    ours = getattr(pipelines, type(plain).__name__).from_pipe(plain)
    ours.set_progress_bar_config(disable=True)
    return ours


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(seeds=SEEDS):
    return torch.cat([torch.randn(1, 4, 16, 16, generator=g) for g in generators(seeds)])


def draw(pipe, **arguments):
    return pipe(
        PROMPTS,
        **{"generator": generators(), "num_inference_steps": STEPS, "guidance_scale": 5.0} | arguments,
        output_type="latent",
    )


def between(norms: Tensor) -> float:
    """A threshold that flags two samples of three."""
    lowest, middle, _ = norms.sort().values.tolist()
    return (lowest + middle) / 2


@torch.no_grad()
def by_hand(pipe, latents, scale_of) -> Tensor:
    """DDIM step by step; scale_of(sample, t, its magnitudes so far) is the guidance scale."""
    model = models.load(pipe)
    embeds, uncond = model.encode_prompt(PROMPTS), model.unconditional()
    pipe.scheduler.set_timesteps(STEPS)
    x, traces = latents, [[] for _ in latents]
    for t in pipe.scheduler.timesteps:
        cond, unc = (model.predict(x, t, e) for e in (embeds, uncond))
        norms = (cond - unc).flatten(1).norm(dim=1) * model.schedule.epsilon_scale(t)
        for trace, norm in zip(traces, norms.tolist(), strict=True):
            trace.append(norm)
        scale = torch.tensor([scale_of(i, int(t), trace) for i, trace in enumerate(traces)])
        x = pipe.scheduler.step(unc + scale[:, None, None, None] * (cond - unc), t, x).prev_sample
    return x


@pytest.fixture(scope="module", params=["sd2", "sdxl"])  # v-prediction; epsilon and a pooled embedding
def case(request):
    """A pipeline, ours, what diffusers draws, a threshold that flags two of three, and which."""
    plain = tiny_pipeline(request.param)
    # random weights pull so little that guidance would not show
    for layer in models.load(plain).cross_attention.values():
        layer.module.to_out[0].weight.data.mul_(8)
    ours = ours_of(plain)
    drawn = draw(ours, track_noise_norm=True)
    threshold = between(drawn.noise_norms[:, 0])
    return plain, ours, drawn.images, threshold, drawn.noise_norms[:, 0] > threshold


@pytest.mark.parametrize(("early_scale", "latest"), [(1.0, 500), (-2.0, None)])
def test_dynamic_guidance(case, early_scale, latest):
    plain, ours, drawn, threshold, flagged = case
    guard = Guard(threshold, "dynamic_guidance", early_scale=early_scale, latest_timestep=latest)
    found = draw(ours, guard=guard, track_noise_norm=True)

    def scale(i, t, trace):
        begun = transition_step(trace) is not None or (latest is not None and t < latest)
        return 5.0 if begun or not flagged[i] else early_scale

    assert torch.equal(found.flagged, flagged)
    assert torch.equal(found.images[~flagged], drawn[~flagged])
    assert not torch.allclose(found.images[flagged], drawn[flagged], atol=1e-2)
    torch.testing.assert_close(found.images, by_hand(plain, noise(), scale), rtol=1e-3, atol=1e-3)


def test_initial_noise(case):
    plain, ours, drawn, threshold, flagged = case
    found = draw(ours, guard=Guard(threshold, "initial_noise"))
    model = models.load(plain)
    latents = noise()
    latents[flagged] = adjust_batchwise(
        model, latents[flagged], model.encode_prompt(PROMPTS)[flagged.nonzero().flatten().tolist()], 901
    )
    assert torch.equal(found.images[~flagged], drawn[~flagged])
    expected = by_hand(plain, latents, lambda i, t, trace: 0.0 if flagged[i] and t > 900 else 5.0)
    torch.testing.assert_close(found.images, expected, rtol=1e-3, atol=1e-3)


def test_initial_noise_in_the_units_of_another_scheduler(case):
    """Euler's latents are sigma / alpha times as large as what the denoiser sees; the pictures stay alike."""
    from diffusers import EulerDiscreteScheduler

    plain, ours, _, threshold, flagged = case
    expected = draw(ours, guard=Guard(threshold, "initial_noise"))
    ours = ours_of(plain)
    ours.scheduler = EulerDiscreteScheduler.from_config(plain.scheduler.config, timestep_spacing="leading")
    found = draw(ours, guard=Guard(threshold, "initial_noise"), track_noise_norm=True)
    assert torch.equal(found.flagged, flagged)
    # DDIM is Euler's method, but for the last step to t = 0
    correlation = torch.stack(
        [
            torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
            for a, b in zip(found.images, expected.images, strict=True)
        ]
    )
    assert correlation.min() > 0.99


def test_embedding(case):
    plain, ours, drawn, threshold, flagged = case
    target = 0.8 * threshold
    found = draw(ours, guard=Guard(threshold, "embedding", target))
    assert torch.equal(found.images[~flagged], drawn[~flagged])
    model = models.load(plain)
    for i in flagged.nonzero().flatten().tolist():
        alone = mitigate(plain, PROMPTS[i], target=target, seeds=[SEEDS[i]], num_inference_steps=STEPS)
        assert alone.iterations > 0
        embeds = {"prompt_embeds": alone.prompt_embeds.embeds}
        if alone.prompt_embeds.pooled is not None:
            embeds["pooled_prompt_embeds"] = alone.prompt_embeds.pooled.detach()
        expected = plain(
            **embeds,
            **({} if model.family.endswith("xl") else {"negative_prompt": [""]}),
            **negatives(model),
            generator=generators()[i],
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            output_type="latent",
        ).images
        torch.testing.assert_close(found.images[i : i + 1], expected, rtol=1e-2, atol=1e-2)


def negatives(model):
    """A negative prompt, for pipelines that want its embeddings where they get those of the prompt."""
    if not model.family.endswith("xl"):
        return {}
    empty = model.unconditional()
    return {"negative_prompt_embeds": empty.embeds, "negative_pooled_prompt_embeds": empty.pooled}


def test_attention_rescaling(case):
    plain, ours, drawn, threshold, flagged = case
    found = draw(ours, guard=Guard(threshold, "attention_rescaling"))
    with rescaled_attention(models.load(plain), models.load(plain).tokenize(PROMPTS)):
        expected = draw(plain).images
    torch.testing.assert_close(found.images[flagged], expected[flagged], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.images[~flagged], drawn[~flagged], rtol=1e-4, atol=1e-4)


def test_the_longer_of_two_prompts_tells_where_the_padding_is():
    plain = tiny_pipeline("sdxl")
    ours, tokens = ours_of(plain), models.load(plain).tokenize([PROMPTS[1]] * 3)
    settings = {"prompt_2": [PROMPTS[1]] * 3}
    found = draw(ours, guard=Guard(1e-6, "attention_rescaling"), **settings)
    with rescaled_attention(models.load(plain), tokens):
        torch.testing.assert_close(found.images, draw(plain, **settings).images, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def small():
    """Of random weights, and a threshold that flags two of three."""
    ours = ours_of(tiny_pipeline("sd1"))
    norms = draw(ours, track_noise_norm=True, num_inference_steps=3).noise_norms
    return ours, between(norms[:, 0])


@pytest.mark.parametrize(
    "mitigation", ["dynamic_guidance", "initial_noise", "embedding", "attention_rescaling"]
)
def test_several_pictures_of_a_prompt(small, mitigation):
    """Each is judged and mitigated by itself, as if its prompt stood there once more."""
    ours, _ = small

    def drawn(prompts, **arguments):
        settings = {"num_inference_steps": 2, "output_type": "latent"}
        return ours(prompts, generator=generators(range(4)), **settings, **arguments)

    repeated = [prompt for prompt in PROMPTS[:2] for _ in range(2)]
    guard = Guard(float(drawn(repeated, track_noise_norm=True).noise_norms[:, 0].median()), mitigation)
    found, expected = drawn(PROMPTS[:2], num_images_per_prompt=2, guard=guard), drawn(repeated, guard=guard)
    assert found.flagged.sum() == 2 and torch.equal(found.flagged, expected.flagged)
    torch.testing.assert_close(found.images, expected.images)


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_refused_pictures_are_black(small, kind):
    ours, threshold = small
    settings = {"num_inference_steps": 3, "output_type": kind}
    drawn = ours(PROMPTS, generator=generators(), **settings).images
    found = ours(PROMPTS, generator=generators(), guard=Guard(threshold, "refuse"), **settings)
    for image, plain, flagged in zip(found.images, drawn, found.flagged, strict=True):
        assert (np.asarray(image) == (0 if flagged else np.asarray(plain))).all()
        assert np.asarray(plain).any()


def test_nothing_more_is_drawn_where_all_is_refused():
    ours = ours_of(tiny_pipeline("sd1"))
    calls = []
    ours.unet.register_forward_pre_hook(lambda unet, args: calls.append(1))
    found = draw(ours, guard=Guard(1e-6, "refuse"))
    assert found.flagged.all() and not found.images.any()
    assert len(calls) == 1
    assert draw(ours).images.any(), "the next call is not interrupted"


CALLS = {"dynamic_guidance": 0, "initial_noise": 3, "embedding": None, "attention_rescaling": 0, "refuse": 0}


@pytest.mark.parametrize("mitigation", CALLS)
def test_what_a_mitigation_costs_and_that_callbacks_and_generators_see_each_step_once(small, mitigation):
    """Calls of the denoiser beside the sampler's own; to repeat the first step is one more."""
    ours, _ = small
    generator, plain = generators((4, 4))
    settings = {"eta": 0.5, "num_inference_steps": 3}
    norms = draw(ours, generator=plain, track_noise_norm=True, **settings).noise_norms[:, 0]
    calls, seen = [], []
    hook = ours.unet.conv_in.register_forward_pre_hook(lambda conv, args: calls.append(len(args[0])))
    draw(
        ours,
        generator=generator,
        guard=Guard(between(norms), mitigation),
        callback_on_step_end=lambda pipe, i, t, given: seen.append(int(t)) or {},
        **settings,
    )
    hook.remove()
    again = mitigation in ("initial_noise", "embedding", "attention_rescaling")
    assert calls.count(6) == 3 + again
    others = [rows for rows in calls if rows != 6]
    if mitigation == "embedding":
        assert 2 <= len(others) <= 11 and max(others) == 2, "no unconditional rows"
    else:
        assert others == [4] * CALLS[mitigation]
    assert seen == [667, 334, 1]
    assert torch.equal(generator.get_state(), plain.get_state())


def test_in_inference_mode_and_with_trainable_weights():
    ours = ours_of(tiny_pipeline("sd1"))
    for mitigation in ("initial_noise", "embedding"):
        arguments = {"guard": Guard(1e-6, mitigation), "num_inference_steps": 2}
        expected = draw(ours, **arguments).images
        with torch.inference_mode():
            assert torch.equal(draw(ours, **arguments).images, expected)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in ours.unet.parameters())


def test_a_caller_keeps_the_latents_that_were_passed():
    ours = ours_of(tiny_pipeline("sd1"))
    latents = noise()
    draw(ours, latents=latents, guard=Guard(1e-6, "initial_noise"), num_inference_steps=1)
    assert torch.equal(latents, noise())


# --- On the trained testbed: one memorized caption, one fresh one


@pytest.fixture(scope="module")
def trained():
    ours = ours_of(testbed.load())
    prompts = [world.memorized(4).caption, world.fresh_captions(1, seed=7)[0]]

    def draw(guard=None):
        return ours(
            prompts,
            generator=generators((0, 1)),
            num_inference_steps=25,
            guidance_scale=5.0,
            output_type="pt",
            guard=guard,
            track_noise_norm=True,
        )

    return draw, draw(), torch.from_numpy(world.memorized(4).picture)[None]


def test_the_memorized_prompt_is_flagged_and_replayed(trained):
    _, plain, original = trained
    assert (plain.noise_norms[:, 0] > 1.5).tolist() == [True, False]
    assert (testbed.similarity(plain.images, original) > testbed.REPLAYED).flatten().tolist() == [True, False]


@pytest.mark.parametrize(
    "guard",
    [
        Guard(1.5, "dynamic_guidance", early_scale=0.0, latest_timestep=None),
        Guard(1.5, "embedding", 1.2),
        Guard(1.5, "refuse"),
    ],
    ids=lambda guard: guard.mitigation,
)
def test_no_replay_of_a_flagged_prompt_and_the_fresh_picture_as_it_was(trained, guard):
    draw, plain, original = trained
    found = draw(guard)
    assert found.flagged.tolist() == [True, False]
    assert torch.equal(found.images[1], plain.images[1])
    assert testbed.similarity(found.images[:1], original) < testbed.REPLAYED
