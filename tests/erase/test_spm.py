"""SPM: the optimum between erasing and holding still, random texts, and edits as strong as a prompt wants."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from erase.toy import QUICK, Toy
from pumice import models
from pumice.erase.spm import _layers, _schedule, random_texts, spm
from pumice.erase.transport import permeability, transport
from pumice.models import Added, Edit, Mapped, PromptEmbeds, Shifted
from pumice.models.draws import Draws
from pumice.testbed import tiny_pipeline

PROMPTS = ["a cat", "a red house by the sea"]

# of random texts in two dimensions, kept with probability min(1, 1 - cos): E[cos^2] E[u^2]
HELD = (1 / 2 - 2 / (3 * math.pi)) / (1 - 1 / math.pi) * (1 + 0.4**2 / 12)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


class TestOptimum:
    @pytest.mark.parametrize("eta", [0.5, 1.0])
    def test_without_anchors_it_is_that_of_esd(self, eta):
        toy = Toy()
        edit = spm(toy, "one", negative_guidance=eta, anchor_scale=0, **{**QUICK, "num_inference_steps": 2})
        assert toy.mean("one", edit) == pytest.approx(-eta * 1.5, abs=2e-2)

    def test_anchors_hold_the_weight_in_all_directions(self):
        """|W' e - target|^2 + lambda E |(W' - W) a|^2, whose a lean away from e."""
        toy = Toy()
        how = {**QUICK, "steps": 400, "learning_rate": 0.02, "num_inference_steps": 2, "num_anchors": 8}
        edit = spm(toy, "one", anchor_scale=1.0, **how)
        assert toy.mean("one", edit) == pytest.approx(1.5 - 3 / (1 + HELD), abs=3e-2)
        assert toy.mean("two", edit) == pytest.approx(-1.0, abs=0.1)


class TestRandomTexts:
    def texts(self, width: int = 2, pooled: bool = False) -> PromptEmbeds:
        one = torch.zeros(1, 1, width)
        one[..., 0] = 3.0
        return PromptEmbeds(one, torch.full((1, 5), 2.0) if pooled else None, (None,))

    def found(self, count: int, **how) -> list[PromptEmbeds]:
        draws = Draws(["0"], torch.device("cpu"))
        return [random_texts(self.texts(**how), draws, [0], step, 0) for step in range(count)]

    def test_lengths_and_angles(self):
        rows = torch.cat([text.embeds[0] for text in self.found(4000)])
        lengths, cos = rows.norm(dim=1), rows[:, 0] / rows.norm(dim=1)
        assert 2.4 <= lengths.min() < 2.41 and 3.59 < lengths.max() <= 3.6
        assert float(lengths.mean()) == pytest.approx(3.0, abs=0.03)
        assert float(cos.square().mean()) == pytest.approx(HELD / (1 + 0.4**2 / 12), abs=0.02)
        # E[w cos] = -(1 / pi + (1 / 4 - 1 / pi)): the front half has what the back half has, less cos^2
        assert float(cos.mean()) == pytest.approx(-0.25 / (1 - 1 / math.pi), abs=0.03)

    def test_pooled_embeddings_of_the_same_length(self):
        for text in self.found(20, width=7, pooled=True):
            assert text.embeds.shape == (1, 1, 7) and text.pooled.shape == (1, 5)
            share = text.embeds.norm() / 3.0
            assert float(text.pooled.norm() / math.sqrt(20)) == pytest.approx(float(share), rel=1e-5)

    def test_each_step_number_and_row_has_its_own(self):
        draws = Draws(["0", "1"], torch.device("cpu"))
        both = PromptEmbeds.cat([self.texts(), self.texts()])
        found = [random_texts(both, draws, [0, 1], *at).embeds for at in ((0, 0), (0, 1), (1, 0))]
        assert len({float(value) for value in torch.cat(found)[..., 0].flatten()}) == 6
        alone = random_texts(self.texts(), draws, [1], 0, 1).embeds
        assert torch.equal(alone[0], found[1][1])


TINY = {"steps": 2, "learning_rate": 1e-2, "num_inference_steps": 2, "allow_unknown": True}


class TestAdapters:
    def test_all_linears_and_convolutions_of_transformer_blocks(self, pipe):
        edit = spm(pipe, "cat", **TINY)
        assert all(isinstance(change, Added) and change.rank == 1 for change in edit.changes.values())
        layers = [
            name
            for name, part in pipe.unet.named_modules()
            if ".attentions." in name and hasattr(part, "weight")
        ]
        wanted = {f"{name}.weight" for name in layers if "norm" not in name}
        assert set(edit.changes) == wanted and any("proj_in" in name for name in wanted)
        assert any(pipe.unet.get_parameter(name).ndim == 4 for name in wanted)

    def test_the_rate_starts_falls_and_starts_again(self):
        rate = _schedule(1.0, 3000)
        assert rate(0) == pytest.approx(1 / 500) and rate(249) == pytest.approx(0.5) and rate(499) == 1
        assert rate(500) == 1 and rate(1750) == pytest.approx(0.5)
        falls = [step for step in range(501, 3000) if rate(step) > rate(step - 1)]
        assert falls == [1334, 2167] and rate(2999) < 1e-4

    def test_bad_input(self, pipe):
        for how, message in (
            ({"rank": None}, "rank: got None, expected one"),
            ({"num_anchors": 0}, "num_anchors: got 0, expected at least 1"),
            ({"anchor_scale": -1.0}, "anchor_scale: got -1.0, expected"),
            ({"negative_guidance": math.nan}, "negative_guidance: got nan"),
        ):
            with pytest.raises(ValueError, match=message):
                spm(pipe, "cat", **TINY | how)


def adapters(pipe, concept: str, seed: int) -> Edit:
    """As training would leave them, but larger."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name in _layers(models.load(pipe)):
        rows = pipe.unet.get_parameter(name).flatten(1)
        up = torch.randn(len(rows), 1, generator=generator) / 3
        changes[name] = Added(up, torch.randn(1, rows.shape[1], generator=generator) / 3)
    return Edit.made(models.load(pipe), changes, method="spm", targets=(concept,))


def predict(pipe, prompts=PROMPTS) -> Tensor:
    model = models.load(pipe)
    latents = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict(latents, 300, model.encode_prompt(prompts))


class TestTransport:
    def test_how_near_prompts_are(self, pipe):
        model = models.load(pipe)
        prompts, concepts = ["a cat", "the cat on a red cat", "", "zebra"], ["red cat", "zebra"]
        found = permeability(pipe, prompts, concepts)
        assert found.shape == (4, 2) and float(found.min()) >= 0 and float(found.max()) <= 1 + 1e-6
        assert float(found[3, 1]) == pytest.approx(1)

        def vector(text: str) -> Tensor:
            return model.encode_prompt(text).embeds.detach().flatten().double()

        def tokens(text: str) -> set[int]:
            return set(pipe.tokenizer(text).input_ids[1:-1])

        for i, prompt in enumerate(prompts):
            for j, concept in enumerate(concepts):
                cosine = torch.cosine_similarity(vector(prompt), vector(concept), dim=0)
                share = len(tokens(prompt) & tokens(concept)) / len(tokens(concept))
                assert float(found[i, j]) == pytest.approx(max(float(cosine), share), abs=1e-5)

    def test_strength_is_linear_and_adapters_do_not_meet(self, pipe, monkeypatch):
        """W + gamma_1 D_1 + gamma_2 D_2, for each prompt."""
        edits = [adapters(pipe, "cat", 1), adapters(pipe, "dog", 2)]
        strengths = torch.tensor([[0.5, 0.0], [0.3, 0.7]])
        monkeypatch.setattr(
            importlib.import_module("pumice.erase.transport"),
            "permeability",
            lambda pipe, prompts, targets: strengths[:, [["cat", "dog"].index(targets[0])]],
        )
        before = predict(pipe)
        with transport(pipe, edits, PROMPTS):
            found = predict(pipe)
        assert torch.equal(predict(pipe), before)
        for i, gammas in enumerate(strengths.tolist()):
            changes = {
                name: Shifted(
                    sum(
                        g * (e.changes[name].up @ e.changes[name].down)
                        for g, e in zip(gammas, edits, strict=True)
                    )
                    .view_as(pipe.unet.get_parameter(name))
                    .contiguous()
                )
                for name in edits[0].changes
            }
            with Edit.made(models.load(pipe), changes, method="sum", targets=()).on(pipe):
                expected = predict(pipe)[i]
            torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-4)
            assert (expected - before[i]).abs().max() > 1e-2

    def test_one_prompt_for_all_samples(self, pipe):
        edit = adapters(pipe, "red house", 1)
        near = float(permeability(pipe, PROMPTS[0], "red house"))
        with transport(pipe, [edit], PROMPTS[0]):
            found = predict(pipe, [PROMPTS[0]] * 2)
        with edit.scaled(near).on(pipe):
            torch.testing.assert_close(found, predict(pipe, [PROMPTS[0]] * 2), rtol=0, atol=1e-4)

    def test_scaled(self, pipe, tmp_path):
        edit = adapters(pipe, "cat", 1)
        half = edit.scaled(0.5)
        for name, change in edit.changes.items():
            assert torch.equal(half.changes[name].up @ half.changes[name].down, 0.5 * change.up @ change.down)
        assert half.scaled(0.5).details["scaled"] == 0.25
        half.save(tmp_path / "half.safetensors")
        assert Edit.load(tmp_path / "half.safetensors").details == {"scaled": 0.5}

    def test_bad_input(self, pipe):
        edit = adapters(pipe, "cat", 1)
        name = next(name for name in edit.changes if name.endswith("attn2.to_k.weight"))
        width = pipe.unet.get_parameter(name).shape[1]
        mapped = Mapped.of(torch.zeros(width, 1), torch.zeros(1, width))
        for call, message in (
            (lambda: transport(pipe, [], "a cat"), "edits, prompts: got 0 and 1, expected"),
            (lambda: transport(pipe, [edit], []), "edits, prompts: got 1 and 0, expected"),
            (lambda: edit.scaled(math.inf), "factor: got inf, expected a finite number"),
            (
                lambda: Edit.made(models.load(pipe), {name: mapped}, method="uce", targets=()).scaled(2),
                "edit: uce does more to .* than to add to it",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(TypeError, match="edits: got a str, expected edits"):
            transport(pipe, ["cat"], "a cat")
