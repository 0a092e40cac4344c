"""The pipelines draw what diffusers draws, to the bit, and the norms they keep are those of brute force."""

import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from pumice import models, pipelines
from pumice.models import UnsupportedModelError
from pumice.pipelines import Guard
from pumice.testbed import tiny_pipeline

PROMPTS = ["a red cat", "a photo of a dog in the city"]
NEVER = Guard(1e9)


def pair(family, scheduler=None):
    """diffusers' pipeline, and ours of the same parts."""
    plain = tiny_pipeline(family)
    if scheduler is not None:
        plain.scheduler = scheduler.from_config(plain.scheduler.config)
    ours = getattr(pipelines, type(plain).__name__).from_pipe(plain)
    ours.set_progress_bar_config(disable=True)
    return plain, ours


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def watched(pipe):
    """Whether anything is left of a call."""
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())
    return hooks or pipe._watch is not None


CALLS = {
    "one prompt": lambda: {"prompt": "a red cat", "generator": torch.Generator().manual_seed(3)},
    "prompts with a generator each": lambda: {"prompt": PROMPTS, "generator": generators(0, 1)},
    "pictures for a prompt": lambda: {
        "prompt": PROMPTS,
        "num_images_per_prompt": 2,
        "generator": generators(0, 1, 2, 3),
    },
    "noise in every step": lambda: {"prompt": PROMPTS, "eta": 0.7, "generator": generators(0, 1)},
    "a negative prompt": lambda: {
        "prompt": PROMPTS,
        "negative_prompt": ["a house", "the sea"],
        "generator": generators(0, 1),
    },
    "rescaled guidance": lambda: {"prompt": PROMPTS, "guidance_rescale": 0.7, "generator": generators(0, 1)},
    "latents": lambda: {"prompt": "a cat", "latents": torch.randn(1, 4, 16, 16, generator=generators(9)[0])},
    "latents out": lambda: {"prompt": "a cat", "output_type": "latent", "generator": generators(5)},
}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_pictures_are_those_of_diffusers_to_the_bit(family):
    plain, ours = pair(family)
    for name, call in CALLS.items():
        settings = {"num_inference_steps": 2, "output_type": "pt"}
        drawn = plain(**settings | call()).images
        found = ours(**settings | call(), track_noise_norm=True, guard=NEVER)
        assert torch.equal(found.images, drawn), name
        assert found.noise_norms.shape == (len(drawn), 2) and found.flagged.tolist() == [False] * len(drawn)
    assert not watched(ours)


def test_what_was_not_asked_for_is_none_and_nothing_is_watched():
    plain, ours = pair("sd1")
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    drawn = plain(PROMPTS, generator=generators(0, 1), **settings).images
    for extra in ({}, {"track_noise_norm": True}, {"guard": NEVER}):
        seen = []
        found = ours(
            PROMPTS,
            generator=generators(0, 1),
            callback_on_step_end=lambda pipe, i, t, given, seen=seen: seen.append(watched(pipe)) or {},
            **settings,
            **extra,
        )
        assert torch.equal(found.images, drawn)
        assert (found.noise_norms is None) == ("track_noise_norm" not in extra)
        assert (found.flagged is None) == ("guard" not in extra)
        assert seen == [bool(extra)] * 2 and not watched(ours)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_kind_of_output(family):
    plain, ours = pair(family)
    settings = {"num_inference_steps": 2}
    for kind in ("pil", "np", "pt", "latent"):
        drawn = plain(PROMPTS, generator=generators(0, 1), output_type=kind, **settings).images
        found = ours(
            PROMPTS,
            generator=generators(0, 1),
            output_type=kind,
            guard=NEVER,
            track_noise_norm=True,
            **settings,
        )
        assert isinstance(found, type(plain(PROMPTS, num_inference_steps=1)))
        same = [a == b for a, b in zip(found.images, drawn, strict=True)] if kind == "pil" else None
        assert all(same) if same else (found.images == drawn).all()


def test_tuples_grow_by_what_was_asked_for():
    plain, ours = pair("sd1")
    settings = {"num_inference_steps": 2, "output_type": "pt", "return_dict": False}

    def draw(pipe, **extra):
        return pipe("a cat", generator=generators(0), **settings, **extra)

    drawn = draw(plain)
    assert len(drawn) == 2
    for extra, kinds in (
        ({}, []),
        ({"track_noise_norm": True}, [torch.float32]),
        ({"guard": NEVER}, [torch.bool]),
        ({"guard": NEVER, "track_noise_norm": True}, [torch.float32, torch.bool]),
    ):
        found = draw(ours, **extra)
        assert torch.equal(found[0], drawn[0]) and found[1] is None
        assert [part.dtype for part in found[2:]] == kinds


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@torch.no_grad()
def test_norms_are_those_of_separate_predictions_along_the_trajectory(family):
    plain, ours = pair(family)
    latents = [torch.cat([torch.randn(1, 4, 16, 16, generator=g) for g in generators(0, 1, 2, 3)])]
    found = ours(
        PROMPTS,
        num_images_per_prompt=2,
        num_inference_steps=5,
        generator=generators(0, 1, 2, 3),
        callback_on_step_end=lambda pipe, i, t, given: latents.append(given["latents"]) or {},
        output_type="latent",
        track_noise_norm=True,
    )
    model = models.load(plain)
    embeds, uncond = model.encode_prompt(PROMPTS).repeat(2), model.unconditional()
    for step, t in enumerate((801, 601, 401, 201, 1)):
        cond, unc = (model.predict_noise(latents[step], t, e).double() for e in (embeds, uncond))
        expected = (cond - unc).flatten(1).norm(dim=1)
        torch.testing.assert_close(found.noise_norms[:, step].double(), expected, rtol=1e-4, atol=1e-5)
    assert found.noise_norms.shape == (4, 5) and found.noise_norms.dtype == torch.float32


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_other_samplers(family, scheduler, spacing):
    """Among them those that step between the timesteps: their own sigmas tell the noise level."""
    plain, ours = pair(family)
    plain.scheduler = scheduler.from_config(plain.scheduler.config, timestep_spacing=spacing)
    ours.scheduler = scheduler.from_config(plain.scheduler.config)
    settings = {"num_inference_steps": 4, "output_type": "latent"}
    raw = []
    hook = plain.unet.register_forward_hook(lambda unet, args, out: raw.append(out[0]))
    drawn = plain(PROMPTS, generator=generators(0, 1), **settings).images
    hook.remove()
    found = ours(PROMPTS, generator=generators(0, 1), track_noise_norm=True, guard=NEVER, **settings)
    assert torch.equal(found.images, drawn)
    sigma = ours.scheduler.sigmas[:4].double()  # sigma_t / alpha_t
    alpha = 1 / (sigma**2 + 1).sqrt() if family == "sd2" else torch.ones(4).double()
    uncond, cond = torch.stack(raw).double().chunk(2, dim=1)
    expected = alpha[:, None] * (cond - uncond).flatten(2).norm(dim=2)
    torch.testing.assert_close(found.noise_norms.double(), expected.T, rtol=2e-3, atol=1e-5)


def test_a_sampler_of_second_order_has_a_norm_for_each_call():
    _, ours = pair("sd1", HeunDiscreteScheduler)
    found = ours("a cat", num_inference_steps=4, output_type="pt", track_noise_norm=True)
    assert found.noise_norms.shape == (1, 7) and found.noise_norms.isfinite().all()


def test_watching_costs_no_further_call():
    _, ours = pair("sd1")
    calls = []
    ours.unet.register_forward_pre_hook(lambda unet, args: calls.append(len(args[0])))
    ours(PROMPTS, num_inference_steps=4, output_type="pt", track_noise_norm=True, guard=NEVER)
    assert calls == [4] * 4


def test_guidance_that_a_callback_switches_off():
    plain, ours = pair("sd1")

    def off(pipe, step, t, given):
        if step != 1:
            return {}
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": given["prompt_embeds"].chunk(2)[1]}

    settings = {
        "num_inference_steps": 4,
        "output_type": "pt",
        "callback_on_step_end": off,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    drawn = plain(PROMPTS, generator=generators(0, 1), **settings).images
    found = ours(PROMPTS, generator=generators(0, 1), track_noise_norm=True, guard=NEVER, **settings)
    assert torch.equal(found.images, drawn)
    assert found.noise_norms.isnan().tolist() == [[False, False, True, True]] * 2
    for mitigation in ("embedding", "attention_rescaling", "dynamic_guidance", "initial_noise"):
        found = ours(PROMPTS, generator=generators(0, 1), guard=Guard(1e-6, mitigation), **settings)
        assert found.flagged.all() and found.images.isfinite().all()


def test_embeddings_for_a_prompt():
    plain, ours = pair("sd1")
    model = models.load(plain)
    embeds = model.encode_prompt(PROMPTS).embeds.detach()
    negative = model.unconditional().embeds.detach().expand_as(embeds)
    settings = {"num_inference_steps": 2, "output_type": "pt", "track_noise_norm": True}
    found = ours(
        prompt_embeds=embeds, negative_prompt_embeds=negative, generator=generators(0, 1), **settings
    )
    expected = ours(PROMPTS, generator=generators(0, 1), **settings)
    torch.testing.assert_close(found.images, expected.images)
    torch.testing.assert_close(found.noise_norms, expected.noise_norms)


def test_a_compiled_denoiser():
    _, ours = pair("sd1")
    expected = ours("a cat", num_inference_steps=2, generator=generators(0), track_noise_norm=True)
    unet = ours.unet
    ours.unet = torch._dynamo.OptimizedModule(unet, torch._dynamo.disable)  # as torch.compile(unet) wraps it
    found = ours("a cat", num_inference_steps=2, generator=generators(0), track_noise_norm=True)
    torch.testing.assert_close(found.noise_norms, expected.noise_norms)
    ours.unet = unet
    unet.compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match="unet: it was compiled in place"):
        ours("a cat", num_inference_steps=2, track_noise_norm=True)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_saved_and_loaded_as_diffusers_own(family, tmp_path):
    plain, ours = pair(family)
    ours.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(plain)
    mine = type(ours).from_pretrained(tmp_path)
    assert type(mine) is type(ours)
    mine.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    found = mine("a cat", generator=generators(0), track_noise_norm=True, **settings)
    assert torch.equal(found.images, again("a cat", generator=generators(0), **settings).images)
    assert models.load(ours).pipe is ours and models.load(tmp_path).family == models.load(plain).family


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("mitigation", [None, "embedding", "attention_rescaling"])
def test_nothing_is_left_after_an_error(error, mitigation):
    _, ours = pair("sd1")
    guard = Guard(1e-6, mitigation) if mitigation else None

    def fail(pipe, step, t, given):
        assert watched(pipe)
        raise error

    with pytest.raises(error):
        ours("a cat", num_inference_steps=3, track_noise_norm=True, guard=guard, callback_on_step_end=fail)
    assert not watched(ours)


def test_nothing_is_left_after_an_error_inside_a_mitigation(monkeypatch):
    _, ours = pair("sd1")
    monkeypatch.setattr(pipelines.responses, "optimize_embeds", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours("a cat", num_inference_steps=3, guard=Guard(1e-6, "embedding"))
    assert not watched(ours)


BAD = {
    "no guidance": ({"guidance_scale": 1.0, "guard": NEVER}, ValueError, "guidance_scale: got 1.0, expected"),
    "no guidance, tracked": (
        {"guidance_scale": 0.0, "track_noise_norm": True},
        ValueError,
        "guidance_scale: got 0.0, expected more than 1",
    ),
    "a guidance of NaN": (
        {"guidance_scale": float("nan"), "guard": NEVER},
        ValueError,
        "guidance_scale: got",
    ),
    "a threshold for a guard": ({"guard": 1.5}, TypeError, "guard: got a float, expected a pumice.pipelines"),
    "embeddings where the prompt's end counts": (
        {
            "prompt": None,
            "prompt_embeds": torch.zeros(1, 77, 32),
            "negative_prompt_embeds": torch.zeros(1, 77, 32),
            "guard": Guard(1, "attention_rescaling"),
        },
        ValueError,
        "prompt: got none, expected one",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_calls_are_one_line_that_names_the_argument(change, error, message):
    _, ours = pair("sd1")
    with pytest.raises(error, match=message) as caught:
        ours(**{"prompt": "a cat", "num_inference_steps": 1} | change)
    assert "\n" not in str(caught.value)
    assert not watched(ours)


def test_pure_noise_at_the_first_step_is_refused():
    _, ours = pair("sd2")
    ours.scheduler = type(ours.scheduler).from_config(
        ours.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    with pytest.raises(ValueError, match="guard: the sampler's first step is pure noise"):
        ours("a cat", num_inference_steps=2, guard=Guard(1))
    assert ours("a cat", num_inference_steps=2, track_noise_norm=True).noise_norms[0, 0] == 0


GUARDS = {
    "a threshold of NaN": ({"threshold": float("nan")}, "threshold: got nan, expected a finite number"),
    "a negative threshold": ({"threshold": -1.0}, "threshold: got -1.0, expected"),
    "an unknown mitigation": (
        {"mitigation": "hope"},
        "mitigation: got 'hope', expected one of dynamic_guidance",
    ),
    "a target for nothing": (
        {"mitigation": "dynamic_guidance", "target": 1.0},
        "target: got 1.0 with 'dynamic_guidance'",
    ),
    "a target of zero": ({"mitigation": "embedding", "target": 0.0}, "target: got 0.0, expected"),
    "a target of NaN": ({"mitigation": "embedding", "target": float("nan")}, "target: got nan, expected"),
    "an infinite early scale": (
        {"early_scale": float("inf")},
        "early_scale: got inf, expected a finite number",
    ),
}


@pytest.mark.parametrize(("change", "message"), GUARDS.values(), ids=GUARDS.keys())
def test_bad_guards_are_one_line_that_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        Guard(**{"threshold": 1.5} | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mitigation", ["embedding", "initial_noise"])
@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("sd1", {"cross_attention_kwargs": {"scale": 0.5}}),
        ("sdxl", {"original_size": (512, 512)}),
        ("sdxl", {"crops_coords_top_left": (8, 0)}),
    ],
)
def test_conditioning_that_a_mitigation_does_not_see_is_refused(family, arguments, mitigation):
    ours = pipelines.around(tiny_pipeline(family))
    with pytest.raises(UnsupportedModelError, match=f"{next(iter(arguments))}: guards by embedding"):
        ours("a cat", num_inference_steps=2, guard=Guard(1e6, mitigation), **arguments)


def test_a_pictures_own_sizes_are_no_such_conditioning():
    ours = pipelines.around(tiny_pipeline("sdxl"))
    sizes = {"original_size": (32, 32), "target_size": (32, 32), "crops_coords_top_left": (0, 0)}
    assert not ours("a cat", num_inference_steps=1, guard=Guard(1e6, "embedding"), **sizes).flagged.any()
