from __future__ import annotations

import copy
import dataclasses

import diffusers
import pytest
import torch

from pumice.models import DiffusionModel, load
from pumice.testbed.tiny import tiny_pipeline

FAMILIES = ("sd1", "sd2", "sdxl")


def randn(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def draw(
    model: DiffusionModel, prompts: list[str], latents: torch.Tensor, steps: int, guidance: float
) -> torch.Tensor:
    """DDIM with classifier-free guidance, written with nothing but the model's own methods."""
    schedule, conditional, unconditional = model.schedule, model.encode_prompt(prompts), model.unconditional()
    for t, coefficients in zip(schedule.timesteps(steps), schedule.ddim_coefficients(steps), strict=True):
        without, with_text = (model.predict(latents, t, embeds) for embeds in (unconditional, conditional))
        output = without + guidance * (with_text - without)
        x0, epsilon = schedule.to_x0(output, latents, t), schedule.to_epsilon(output, latents, t)
        latents = coefficients[2] * x0 + coefficients[3] * epsilon
    return model.decode_latents(latents)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
@torch.no_grad()
def test_sampling_draws_the_pictures_of_the_pipeline(family, size):
    pipe = tiny_pipeline(family)
    model = load(pipe)
    prompts = ["a photo of a zebra", "a castle by the sea"]
    latents = randn(2, *model.latent_shape(*size))
    expected = pipe(
        prompts,
        height=size[0],
        width=size[1],
        num_inference_steps=5,
        guidance_scale=6.0,
        latents=latents,
        output_type="pt",
    ).images
    torch.testing.assert_close(draw(model, prompts, latents, 5, 6.0), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_sampling_from_pure_noise_agrees_with_the_pipeline():
    pipe = tiny_pipeline("sd2")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    model = load(pipe)
    latents = randn(1, *model.latent_shape())
    assert model.schedule.timesteps(5)[0] == 999
    expected = pipe(
        "a cat", num_inference_steps=5, guidance_scale=3.0, latents=latents, output_type="pt"
    ).images
    torch.testing.assert_close(draw(model, ["a cat"], latents, 5, 3.0), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_is_epsilon_whatever_the_model_predicts(family):
    model = load(tiny_pipeline(family))
    latents, embeds = randn(2, *model.latent_shape()), model.encode_prompt(["a cat", "a dog"])
    t = torch.tensor([10, 900])
    output, noise = model.predict(latents, t, embeds), model.predict_noise(latents, t, embeds)
    alpha, sigma = (c.float().view(2, 1, 1, 1) for c in model.schedule.alpha_sigma(t))
    expected = alpha * output + sigma * latents if family == "sd2" else output
    torch.testing.assert_close(noise, expected)
    assert model.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")
    x_t = model.add_noise(latents, noise, t)
    torch.testing.assert_close(x_t, alpha * latents + sigma * noise)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_a_batch_are_independent(family):
    model = load(tiny_pipeline(family))
    latents, embeds = randn(3, *model.latent_shape()), model.encode_prompt(["a cat", "a dog", ""])
    t = torch.tensor([10, 500, 900])
    batch = model.predict_noise(latents, t, embeds)
    for i in range(3):
        alone = model.predict_noise(latents[i : i + 1], int(t[i]), embeds[i])
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.predict(latents, 500, embeds[1]), model.predict(latents, torch.tensor(500), embeds[1].repeat(3))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_those_of_the_autoencoder_scaled(family):
    model = load(tiny_pipeline(family))
    images = pictures(2, 3, 32, 48)
    posterior = model.vae.encode(images * 2 - 1).latent_dist
    scale = model.vae.config.scaling_factor
    latents = model.encode_image(images)
    assert latents.shape == (2, *model.latent_shape(32, 48)) == (2, 4, 16, 24)
    torch.testing.assert_close(latents, posterior.mean * scale)
    noise = randn(2, 4, 16, 24)
    torch.testing.assert_close(
        model.encode_image(images, noise=noise), (posterior.mean + posterior.std * noise) * scale
    )
    torch.testing.assert_close(
        model.decode_latents(latents), (model.vae.decode(latents / scale).sample / 2 + 0.5).clamp(0, 1)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_one_pass_gives_the_gradient_of_any_loss_of_the_latents(family, recompute):
    model = load(tiny_pipeline(family))
    for part in (model.vae, model.unet):
        part.double()
    images, noise = pictures(2, 3, 32, 32, dtype=torch.float64), randn(2, 4, 16, 16, dtype=torch.float64)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return (z.sin() * z).sum() + z.square().sum()

    def cotangent(z: torch.Tensor) -> torch.Tensor:
        assert not z.requires_grad
        return z.sin() + z * z.cos() + 2 * z

    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(model.encode_image(leaf, noise=noise)), leaf)
    with model.frozen(data_gradient=True):
        found = model.vjp(images, cotangent, noise=noise, recompute=recompute)
    torch.testing.assert_close(found, expected)
    assert not images.requires_grad


@pytest.mark.parametrize(
    "keys", [{"shift_factor": 0.3}, {"latents_mean": [1.0, 2, 3, 4], "latents_std": [2.0, 1, 3, 5]}]
)
def test_shifts_of_the_autoencoder_are_undone(keys):
    model = load(tiny_pipeline("sdxl"))
    images = pictures(1, 3, 32, 32)
    mean = model.encode_image(images) / model.vae.config.scaling_factor
    plain = model.decode_latents(mean * model.vae.config.scaling_factor)
    model.vae.register_to_config(**keys)
    latents = model.encode_image(images)
    shift = torch.tensor(keys.get("latents_mean", [0.3] * 4)).view(1, 4, 1, 1)
    std = torch.tensor(keys.get("latents_std", [1.0] * 4)).view(1, 4, 1, 1)
    torch.testing.assert_close(latents, (mean - shift) / std * model.vae.config.scaling_factor)
    torch.testing.assert_close(model.decode_latents(latents), plain)


def test_shapes_come_from_the_configs():
    pipe = tiny_pipeline("sd1")
    vae = diffusers.AutoencoderKL(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    unet = diffusers.UNet2DConditionModel.from_config(
        {**pipe.unet.config, "in_channels": 8, "out_channels": 8, "sample_size": [8, 6]}
    )
    model = load(diffusers.StableDiffusionPipeline(**{**pipe.components, "vae": vae, "unet": unet}))
    assert model.vae_scale_factor == 8
    assert model.latent_shape() == (8, 8, 6)
    latents = model.encode_image(pictures(1, 3, 64, 48))
    assert latents.shape == (1, 8, 8, 6)
    assert model.predict_noise(latents, 3, model.encode_prompt("a cat")).shape == latents.shape
    assert model.decode_latents(latents).shape == (1, 3, 64, 48)


class TestGradients:
    """Directional derivatives in float64 against central differences."""

    def check(self, function, x: torch.Tensor) -> None:
        x = x.clone().requires_grad_()
        weights, direction = (
            randn(*function(x).shape, dtype=x.dtype, seed=1),
            randn(*x.shape, dtype=x.dtype, seed=2),
        )
        (gradient,) = torch.autograd.grad((function(x) * weights).sum(), x)
        step = 1e-5 * direction
        with torch.no_grad():
            expected = ((function(x + step) - function(x - step)) * weights).sum() / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-6, atol=1e-8)

    @pytest.fixture(params=FAMILIES)
    def model(self, request) -> DiffusionModel:
        pipe = tiny_pipeline(request.param)
        pipe.to(dtype=torch.float64)
        return load(pipe)

    def test_encode_image(self, model):
        self.check(model.encode_image, pictures(1, 3, 32, 32, dtype=torch.float64))

    def test_decode_latents(self, model):
        self.check(model.decode_latents, 0.1 * randn(1, *model.latent_shape(), dtype=torch.float64))

    def test_predict_noise(self, model):
        embeds = model.encode_prompt("a cat")
        latents = randn(1, *model.latent_shape(), dtype=torch.float64)
        self.check(lambda x: model.predict_noise(x, 500, embeds), latents)

        def of_embeds(x: torch.Tensor) -> torch.Tensor:
            return model.predict_noise(latents, 500, dataclasses.replace(embeds, embeds=x))

        self.check(of_embeds, embeds.embeds.detach())


class TestHalfPrecision:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_loading_keeps_the_pipeline_as_it_is_and_results_are_float32(self, family, dtype):
        pipe = tiny_pipeline(family)
        pipe.to(dtype=dtype)
        model = load(pipe)
        assert model.pipe is pipe
        assert model.dtype == pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == dtype
        latents, embeds = model.encode_image(pictures(1, 3, 32, 32)), model.encode_prompt("a cat")
        assert embeds.embeds.dtype == model.predict(latents, 3, embeds).dtype == dtype
        assert latents.dtype == torch.float32
        assert (
            model.predict_noise(latents, 3, embeds).dtype
            == model.decode_latents(latents).dtype
            == torch.float32
        )

    def overflowing(self, family: str) -> DiffusionModel:
        """A model whose autoencoder leaves float16's range inside, as that of XL does."""
        pipe = tiny_pipeline(family)
        with torch.no_grad():
            pipe.vae.encoder.conv_in.weight.mul_(3e5)
            pipe.vae.decoder.conv_in.weight.mul_(3e5)
        pipe.to(dtype=torch.float16)
        return load(pipe)

    def test_the_autoencoder_of_xl_runs_in_float32(self):
        model = self.overflowing("sdxl")
        images = pictures(2, 3, 32, 32).requires_grad_()
        latents = model.encode_image(images)
        decoded = model.decode_latents(latents)
        (gradient,) = torch.autograd.grad(decoded.sum(), images)
        assert model.vae.dtype == torch.float16

        reference = load(copy.copy(model.pipe))
        reference.pipe.vae = copy.deepcopy(model.vae).float()
        latents_32 = reference.encode_image(images)
        torch.testing.assert_close(latents, latents_32)
        torch.testing.assert_close(decoded, reference.decode_latents(latents_32))
        torch.testing.assert_close(
            gradient, torch.autograd.grad(reference.decode_latents(latents_32).sum(), images)[0]
        )
        assert model.vae.dtype == torch.float16

        model.vae.register_to_config(force_upcast=False)
        assert not load(model.pipe).encode_image(images).isfinite().all()

    def test_gradient_checkpointing_of_such_an_autoencoder_is_refused(self):
        model = self.overflowing("sdxl")
        model.vae.enable_gradient_checkpointing()
        with pytest.raises(
            ValueError, match=r"vae: it overflows in float16 .* call pipe.vae.to\(torch.float32\)"
        ):
            model.encode_image(pictures(1, 3, 32, 32))
        model.pipe.vae.to(torch.float32)
        assert model.encode_image(pictures(1, 3, 32, 32)).isfinite().all()


class TestBadInput:
    @pytest.fixture
    def model(self) -> DiffusionModel:
        return load(tiny_pipeline("sd1"))

    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            (
                torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
                TypeError,
                "images: got torch.uint8, expected a floating",
            ),
            ("cat.png", TypeError, "images: got str, expected a floating"),
            (torch.zeros(3, 32, 32), ValueError, r"images: got shape \(3, 32, 32\), expected \(B, 3, H, W\)"),
            (
                torch.zeros(1, 4, 32, 32),
                ValueError,
                r"images: got shape \(1, 4, 32, 32\), expected \(B, 3, H, W\)",
            ),
            (torch.zeros(1, 3, 33, 32), ValueError, "height: got 33, expected a positive multiple of 2"),
            (torch.zeros(1, 3, 32, 0), ValueError, "width: got 0, expected a positive multiple of 2"),
            (
                torch.full((1, 3, 32, 32), torch.nan),
                ValueError,
                r"images: got NaN, expected values in \[0, 1\]",
            ),
            (torch.full((1, 3, 32, 32), 255.0), ValueError, r"images: got 255 to 255, expected values in"),
            (torch.full((1, 3, 32, 32), -1.0), ValueError, r"images: got -1 to -1, expected values in"),
        ],
    )
    def test_images(self, model, images, error, message):
        with pytest.raises(error, match=message):
            model.encode_image(images)

    def test_latents(self, model):
        for wrong in (
            torch.zeros(4, 16, 16),
            torch.zeros(1, 3, 16, 16),
            torch.zeros(1, 4, 16, 16, dtype=torch.int32),
        ):
            with pytest.raises(
                ValueError, match=r"latents: got torch\.\w+ of shape .* expected floating \(B, 4, h, w\)"
            ):
                model.decode_latents(wrong)

    def test_batches_that_do_not_fit(self, model):
        latents, embeds = torch.zeros(3, 4, 16, 16), model.encode_prompt(["a cat", "a dog"])
        with pytest.raises(ValueError, match="prompt_embeds: got 2 prompts, expected 1 or 3"):
            model.predict(latents, 3, embeds)
        with pytest.raises(ValueError, match=r"timesteps: got shape \(2,\), expected \(\) or \(3,\)"):
            model.predict(latents, torch.tensor([1, 2]), embeds[0])

    def test_embeddings_of_another_family(self, model):
        xl = load(tiny_pipeline("sdxl"))
        with pytest.raises(ValueError, match="prompt_embeds: got no pooled ones"):
            xl.predict(torch.zeros(1, 4, 16, 16), 3, model.encode_prompt("a cat"))
