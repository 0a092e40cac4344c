"""A diffusion model of two parameters, whose every prediction and every trained optimum is a closed form.

The pictures of text c are Gaussian, N(mu_c, s^2) in each element of a latent (1, 2, 2), so that the best
denoiser is known:

    epsilon(x, t, c) = sigma_t (x - alpha_t mu_c) / (alpha_t^2 s^2 + sigma_t^2)        mu_c = W e(c)

W (1, 2) is the weight mid_block.attn2.to_v of the denoiser, all that "xattn", "xattn-kv" and "full" find.
The text encoder is a table: e("one") and e("two") are the unit vectors, that of "one, two" is their sum,
and that of anything else e(""), which is 0 unless asked otherwise.

Predictions are linear in mu_c, so a loss that sets epsilon'(c) to a mixture of predictions of the original,
sum_i a_i epsilon(c_i) with sum_i a_i = 1, is zero where the trained mean is that mixture of means:

    ESD, eta                    mu_c' = mu_0 - eta (mu_c - mu_0)
    diffusers' ESD, eta         mu_c' = mu_c - eta (mu_c - mu_0)
    to the empty prompt, SDD    mu_c' = mu_0
    to an anchor a              mu_c' = mu_a

Weights of texts that no step reads keep their bits.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from pumice.models import DiffusionModel, Edit
from pumice.models.prompts import PromptTokens, Word

WEIGHT = "mid_block.attn2.to_v.weight"
MEANS = (1.5, -1.0)
WORDS = ("one", "two")
S = 0.5
QUICK: dict[str, Any] = {"steps": 200, "learning_rate": 0.1, "batch_size": 2, "pending": 8}
"""What a training needs to reach its optimum to 1e-2, in a fraction of a second."""


class Denoiser(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """epsilon(x, t, c), as above."""

    @register_to_config
    def __init__(
        self, in_channels: int = 1, sample_size: int = 2, time_cond_proj_dim: int | None = None
    ) -> None:
        super().__init__()
        self.mid_block = nn.ModuleDict({"attn2": nn.ModuleDict({"to_v": nn.Linear(2, 1, bias=False)})})
        self.squares = DDIMScheduler().alphas_cumprod.double()  # alpha_t^2, in float64 whatever the dtype

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        mu = self.mid_block["attn2"]["to_v"](encoder_hidden_states)[..., None]  # attention to one token
        square = self.squares[t].reshape(-1, 1, 1, 1)
        scale = (1 - square).sqrt() / (square * S**2 + 1 - square)
        return (scale.to(x) * (x - square.sqrt().to(x) * mu),)


class Pipe:
    """The parts of a pipeline that a training needs."""

    _execution_device = torch.device("cpu")

    def __init__(self, means: tuple[float, float], empty: tuple[float, float]) -> None:
        self.unet = Denoiser().requires_grad_(False).eval()
        self.unet.mid_block["attn2"]["to_v"].weight.data.copy_(torch.tensor([means]))
        table = torch.tensor([empty, (1.0, 0.0), (0.0, 1.0)])
        self.text_encoder = nn.Embedding.from_pretrained(table)
        self.tokenizer = {word: number for number, word in enumerate(WORDS, 1)}
        self.vae = SimpleNamespace(config=SimpleNamespace(latent_channels=1, block_out_channels=(1,)))
        self.scheduler = DDIMScheduler()

    @property
    def components(self) -> dict[str, Any]:
        return dict(vars(self))


class Toy(DiffusionModel):
    """The model.

    means: mu of "one" and "two".
    empty: e("").
    """

    family = "toy"
    pipelines = ()

    def __init__(
        self, means: tuple[float, float] = MEANS, *, empty: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        super().__init__(Pipe(means, empty))

    def mean(self, text: str, edit: Edit | None = None) -> float:
        """mu_c, with an edit that was made for this model."""
        with torch.no_grad():
            weight = self.unet.get_parameter(WEIGHT)
            if edit is None:
                return float((self.encode_prompt(text).embeds @ weight.float().T).squeeze())
            with edit.on(self):
                return self.mean(text)

    def epsilon(self, x: Tensor, t: Tensor, mean: float) -> Tensor:
        """The prediction for pictures of that mean, float64; t (B,)."""
        square = self.schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        scale = (1 - square).sqrt() / (square * S**2 + 1 - square)
        return scale * (x.double() - square.sqrt() * mean)

    def _tokenize(self, prompts: Any, tokenizer: Any) -> tuple[PromptTokens, ...]:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return tuple(_tokens(text, tokenizer) for text in texts)

    def _encode_text(self, ids: list[Tensor]) -> tuple[Tensor, None]:
        (rows,), table = ids, self.pipe.text_encoder.weight
        known = rows > 0
        found = (table[rows] * known[..., None]).sum(1, keepdim=True)
        return torch.where(known.any(1)[:, None, None], found, table[0]), None

    def _conditioning(self, latents: Tensor, prompt_embeds: Any) -> dict[str, Any]:
        return {}


def _tokens(text: str, tokenizer: dict[str, int]) -> PromptTokens:
    words = [word for word in text.replace(",", " ").split() if word in tokenizer][:2]
    ids = [tokenizer[word] for word in words]
    places = tuple(Word(word, range(place, place + 1)) for place, word in enumerate(words, 1))
    return PromptTokens(
        prompt=text,
        ids=(0, *ids, *[0] * (3 - len(ids))),
        bos=0,
        content=range(1, 1 + len(ids)),
        eos=1 + len(ids),
        pads=range(2 + len(ids), 4),
        words=places,
        truncated="",
    )
