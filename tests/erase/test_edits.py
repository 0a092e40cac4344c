"""What an erasure's edit says of itself, and that it draws the same however it is put on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from pumice import testbed
from pumice.erase import ErasureWarning, uce
from pumice.erase.closed_form import LinearMap, solve
from pumice.erase.edits import HELD_OUT, POOLED, edit_of, pooled_linear, pooled_map, projections, residual
from pumice.erase.rows import Texts, pairs
from pumice.models import DiffusionModel, Edit, UnsupportedModelError, load
from pumice.testbed import tiny_pipeline

FAMILIES = ("sd1", "sd2", "sdxl", "testbed")
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"


def pipeline(name: str):
    return testbed.load() if name == "testbed" else tiny_pipeline(name)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> DiffusionModel:
    return load(pipeline(request.param))


@pytest.fixture(scope="module")
def sd1() -> DiffusionModel:
    return load(tiny_pipeline("sd1"))


def predict(pipe) -> Tensor:
    """For two prompts, of which one speaks of the concept."""
    model = load(pipe)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *model.latent_shape(), generator=generator)
    with torch.no_grad():
        return model.predict(latents, 500, model.encode_prompt(["a cat on the beach", "a red house"]))


def changed(pipe, layers: dict[str, tuple[Tensor, Tensor]]):
    """The pipeline with W + up @ down in the place of W."""
    unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for name, (up, down) in layers.items():
            weight = unet.get_submodule(name).weight
            weight += (up.double() @ down.double()).float()
    return type(pipe)(**{**pipe.components, "unet": unet})


def read_back(pipe, path, folder):
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return type(pipe).from_single_file(str(path), config=str(folder), local_files_only=True)


@pytest.fixture(scope="module", params=["one map", "a map for each layer"])
def edit(request, model) -> Edit:
    if request.param == "one map":
        return uce(model, "cat", guide="dog", tokens="all", preserve=["a red house"])
    pooled = model.family == "stable_diffusion_xl"
    return uce(model, "cat", guide="dog", technique="tensor", expand=True, pooled=pooled)


@pytest.fixture(scope="module")
def expected(model, edit) -> Tensor:
    before = predict(model.pipe)
    with edit.on(model):
        after = predict(model.pipe)
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(predict(model.pipe), before)
    return after


@pytest.mark.filterwarnings("ignore::pumice.erase.ErasureWarning")
class TestEveryWayToPutItOn:
    """Weights changed in place, hooks, LoRA files, a whole model in one file: one prediction."""

    def same(self, actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)

    def test_hooks(self, model, edit, expected):
        with edit.hook(model.pipe):
            self.same(predict(model.pipe), expected)

    @pytest.mark.parametrize("format", ["diffusers", "kohya"])
    def test_a_lora_file_in_diffusers(self, model, edit, expected, format, tmp_path):
        edit.save_lora(tmp_path / "edit.safetensors", format=format)
        pipe = model.pipe
        pipe.load_lora_weights(str(tmp_path), weight_name="edit.safetensors")
        try:
            self.same(predict(pipe), expected)
        finally:
            pipe.unload_lora_weights()

    def test_a_lora_file_by_hand(self, model, edit, expected, tmp_path):
        edit.save_lora(tmp_path / "edit.safetensors")
        tensors = load_file(tmp_path / "edit.safetensors")
        layers = {
            name: tuple(tensors[f"unet.{name}.lora_{part}.weight"] for part in "BA")
            for name in (weight.removesuffix(".weight") for weight in edit.changes)
        }
        assert len(tensors) == 2 * len(layers)
        assert {len(down) for _, down in layers.values()} == {edit.report()["rank"]}
        self.same(predict(changed(model.pipe, layers)), expected)

    def test_the_whole_model_in_one_file(self, model, edit, expected, tmp_path):
        edit.save_single_file(tmp_path / "model.safetensors")
        again = read_back(model.pipe, tmp_path / "model.safetensors", tmp_path / "config")
        assert torch.equal(predict(again), expected)

    def test_a_saved_edit(self, model, edit, expected, tmp_path):
        edit.save(tmp_path / "edit.safetensors")
        with Edit.load(tmp_path / "edit.safetensors").on(model):
            assert torch.equal(predict(model.pipe), expected)


@pytest.mark.filterwarnings("ignore::pumice.erase.ErasureWarning")
def test_one_map_for_all_layers_is_one_of_the_prompts_embeddings(model, monkeypatch):
    edit = uce(model, "cat", guide="dog", tokens="all")
    (change,) = {id(change): change for change in edit.changes.values()}.values()
    forward = model.unet.forward

    def mapped(*args, encoder_hidden_states, **more):
        e = encoder_hidden_states
        return forward(*args, encoder_hidden_states=e + (e @ change.down.T) @ change.up.T, **more)

    with edit.on(model):
        expected = predict(model.pipe)
    monkeypatch.setattr(model.unet, "forward", mapped)
    torch.testing.assert_close(predict(model.pipe), expected, rtol=0, atol=5e-5)


class TestOneKindOfProjection:
    @pytest.mark.parametrize("which", ["k", "v"])
    def test_the_other_stays_in_every_way(self, sd1, which, tmp_path):
        found = pairs(texts := Texts(sd1, padded=False), ["cat"], ["dog"], tokens="last")
        one = solve(found.c, found.g, lamb=0.5)
        edit = edit_of(
            sd1,
            dict.fromkeys(projections(sd1, which), one),
            method="by hand",
            concepts=["cat"],
            settings={},
            texts=texts,
            residual=residual(one, found.c, found.g),
        )
        assert {name.split(".")[-2] for name in edit.changes} == {f"to_{which}"}
        before, plain = dict(sd1.unet.named_parameters()), predict(sd1.pipe)
        before = {name: weight.detach().clone() for name, weight in before.items()}
        with edit.on(sd1):
            after = predict(sd1.pipe)
            for name, weight in sd1.unet.named_parameters():
                assert torch.equal(weight, before[name]) == (name not in edit.changes)
        assert (after - plain).abs().max() > 1e-4
        with edit.hook(sd1):
            torch.testing.assert_close(predict(sd1.pipe), after, rtol=0, atol=1e-5)
        edit.save_lora(tmp_path / "edit.safetensors")
        assert all(f".to_{which}." in name for name in load_file(tmp_path / "edit.safetensors"))


class TestProjections:
    def test_they_are_the_keys_and_values_of_all_cross_attention(self, model):
        found = projections(model)
        parameters = dict(model.unet.named_parameters())
        assert found.keys() == {
            name for name in parameters if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        }
        for name, weight in found.items():
            assert weight.data_ptr() == parameters[name].data_ptr() and not weight.requires_grad

    def test_the_pooled_layer(self):
        xl = load(tiny_pipeline("sdxl"))
        assert pooled_linear(xl) is xl.unet.add_embedding.linear_1
        xl.unet.add_adapter(LoraConfig(target_modules=["add_embedding.linear_1"]))
        with pytest.raises(UnsupportedModelError, match=f"{POOLED}: a LoRA adapter is attached"):
            pooled_linear(xl)

    def test_sizes_behind_the_pooled_embedding_pass(self):
        xl = load(tiny_pipeline("sdxl"))
        generator = torch.Generator().manual_seed(0)
        up = torch.randn(40, 3, generator=generator, dtype=torch.float64)
        found = LinearMap(up, torch.randn(3, 40, generator=generator, dtype=torch.float64), 7.0)
        wide = pooled_map(pooled_linear(xl), found).dense()
        torch.testing.assert_close(wide[:40, :40], found.dense(), rtol=0, atol=1e-14)
        rest = torch.eye(88, dtype=torch.float64)[40:]
        assert torch.equal(wide[40:], rest) and torch.equal(wide[:, 40:], rest.T)
        assert pooled_map(pooled_linear(xl), found).condition == 7


@pytest.mark.filterwarnings("ignore::pumice.erase.ErasureWarning")
class TestReport:
    @pytest.mark.parametrize("technique", ["replace", "tensor"])
    @pytest.mark.parametrize("tokens", ["last", "all"])
    def test_every_number_is_what_it_says(self, model, tokens, technique):
        pooled = model.family == "stable_diffusion_xl"
        edit = uce(model, "cat", guide="dog", tokens=tokens, technique=technique, pooled=pooled, lamb=0.1)
        report, before = edit.report(), {}
        maps = {
            name: torch.eye(len(change.up)) + change.up.double() @ change.down.double()
            for name, change in edit.changes.items()
        }
        squares = []
        for name, m in maps.items():
            w = model.unet.get_parameter(name).detach().double()
            difference = w @ m - w
            share = float(difference.norm() / w.norm())
            assert report["relative_change"][name] == pytest.approx(share, rel=1e-3)
            squares.append((float(difference.square().sum()), float(w.square().sum())))
            before[name] = w
        assert report["relative_change"].keys() == edit.changes.keys()
        overall = (sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5
        assert report["overall_change"] == pytest.approx(overall, rel=1e-3)

        rows = model.encode_prompt(HELD_OUT)
        rows = torch.cat(
            [e[: t.eos + 1] for e, t in zip(rows.embeds.detach().double(), rows.tokens, strict=True)]
        )
        drifts = [
            float(((rows @ m.T - rows).norm(dim=1) / rows.norm(dim=1)).mean())
            for name, m in maps.items()
            if not name.startswith(POOLED)
        ]
        assert report["drift"] == pytest.approx(sum(drifts) / len(drifts), rel=1e-3)
        assert report["rank"] == max(change.rank for change in edit.changes.values())
        assert report["encoder_calls"] <= 3

    def test_the_condition_number_is_of_the_rows(self, model):
        texts = Texts(model, padded=False)
        c = torch.stack([texts[text].embeds[texts[text].last] for text in ("cat", "zebra")])
        p = torch.stack([texts[text].embeds[texts[text].last] for text in ("a red house", "dog")])
        exact = torch.linalg.cond(0.2 * torch.eye(c.shape[1]) + c.T @ c + 3 * p.T @ p)
        edit = uce(model, ["cat", "zebra"], preserve=["a red house", "dog"], lamb=0.2, preserve_scale=3.0)
        found = edit.report()["condition_number"]
        assert exact / 1.2 <= found <= exact * 1.001

    def test_the_residual_is_the_way_that_is_left(self, model):
        """Of one token all but k = |c|^2 / (lambda + |c|^2) of it."""
        texts = Texts(model, padded=False)
        square = float(texts["cat"].embeds[texts["cat"].last].square().sum())
        for lamb in (0.01, 1.0, 100.0):
            found = uce(model, "cat", lamb=lamb).report()["residual"]
            assert found == pytest.approx(lamb / (lamb + square), rel=1e-6)

    def test_where_there_is_no_way_to_go_nothing_is_left(self):
        c = torch.ones(1, 3, dtype=torch.float64)
        assert residual(solve(c, c, lamb=0.5), c, c) == 0

    def test_it_is_plain_and_survives_a_file(self, sd1, tmp_path):
        edit = uce(sd1, ["cat", "dog"], tokens="all")
        edit.save(tmp_path / "edit.safetensors")
        again = Edit.load(tmp_path / "edit.safetensors")
        assert again.to_dict() == edit.to_dict() and again.report() == edit.report()


class TestWarnings:
    def test_a_change_of_more_than_a_third_of_the_weights(self, sd1):
        names = ["cat", "dog", "horse", "bird", "car", "house"]
        with pytest.warns(
            ErasureWarning, match=r"changes the weights by \d+% of their norm, more than 30%"
        ) as seen:
            edit = uce(sd1, names, tokens="all", lamb=1e-3)
        assert edit.report()["overall_change"] > 0.3 and len(seen) == 1
        assert f"by {edit.report()['overall_change']:.0%} of" in str(seen[0].message)

    def test_an_equation_without_digits(self, sd1):
        with pytest.warns(ErasureWarning, match=r"badly conditioned \([\d.e+]+\)") as seen:
            edit = uce(sd1, "cat", guide="dog", lamb=1e-12)
        assert edit.report()["condition_number"] > 1e12 and len(seen) == 1

    def test_nothing_is_said_of_a_small_edit(self, sd1):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            edit = uce(sd1, "cat", guide="dog", lamb=20.0)
        assert edit.report()["overall_change"] < 0.3


def test_a_map_that_is_not_finite_is_refused(sd1):
    broken = LinearMap(torch.full((32, 1), torch.nan, dtype=torch.float64), torch.ones(1, 32).double())
    with pytest.raises(ValueError, match="pipe: the edit is not finite") as caught:
        edit_of(
            sd1,
            dict.fromkeys(projections(sd1), broken),
            method="by hand",
            concepts=["cat"],
            settings={},
            texts=Texts(sd1, padded=False),
            residual=0.0,
        )
    assert "\n" not in str(caught.value)
