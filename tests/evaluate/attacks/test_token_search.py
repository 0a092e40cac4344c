"""UnlearnDiffAtk and P4D: what a step learns, whose tokens those are, and when a search is over."""

import json

import pytest
import torch

from pumice import erase, models, testbed
from pumice.evaluate.attacks import p4d, unlearn_diff_atk
from pumice.evaluate.attacks.free_tokens import FreeTokens, Vocabulary
from pumice.evaluate.attacks.p4d import _Nearest
from pumice.evaluate.attacks.unlearn_diff_atk import _Distributions
from pumice.models import Edit, Zeroed
from pumice.models.draws import Draws

pytestmark = pytest.mark.filterwarnings("ignore::pumice.erase.ErasureWarning")  # of tiny random models

PROMPTS = ["a red ball", "a blue ball by the sea", "a ball"]
DRAWN = {"num_inference_steps": 2, "label": "x"}
UDA = {"tokens": 2, "timesteps": 2, "steps": 2, **DRAWN}
P4D = {"tokens": 3, "steps": 4, "draw_every": 2, **DRAWN}


def never(images):
    return [["y"]] * len(images)


def attacked(method, pipe, edits, pictures, **change):
    if method == "p4d":
        return p4d(pipe, edits, PROMPTS, **{"classify": never} | P4D | change)
    return unlearn_diff_atk(pipe, edits, pictures, PROMPTS, **{"classify": never} | UDA | change)


@pytest.fixture(scope="module", params=["unlearn_diff_atk", "p4d"])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def found(method, tiny, edit, pictures):
    return attacked(method, tiny, {"uce": edit}, pictures)


def test_the_first_loss_is_that_of_words_before_the_prompt(tiny, edit, pictures):
    model = models.load(tiny)
    found = attacked("unlearn_diff_atk", tiny, {"uce": edit}, pictures)
    vocabulary, draws = Vocabulary(model), Draws(["0/unlearn_diff_atk/0"], model.device)
    tokens = _Distributions(vocabulary, draws, [0], 2, 1e-2, 0.1).read(0)[0]
    pieces = tiny.tokenizer(PROMPTS[0]).input_ids
    ids = [pieces[0], *vocabulary._ids[tokens].tolist(), *pieces[1:]]
    ids += [tiny.tokenizer.pad_token_id] * (tiny.tokenizer.model_max_length - len(ids))
    t = draws.integers([0], "timestep", 0, model.schedule.num_train_timesteps)
    x0 = model.encode_image(pictures[:1])
    noise = draws.normal([0], "noise", 0, x0.shape[1:])
    with torch.no_grad():
        text = tiny.text_encoder(torch.tensor([ids])).last_hidden_state
        embeds = models.PromptEmbeds(text, None, model.tokenize(PROMPTS[0]))
        for name, on in (("none", None), ("uce", edit)):
            with models.hook_edits(tiny, [on]):
                output = model.predict_noise(model.add_noise(x0, noise, t), t, embeds)
            torch.testing.assert_close(found.losses[name][0, 0], (output - noise).square().mean())
    assert found.losses["none"][0, 0] != found.losses["uce"][0, 0]


def test_p4d_compares_with_the_model_without_an_edit(tiny, edit, pictures):
    model = models.load(tiny)
    found = attacked("p4d", tiny, {"uce": edit}, pictures)
    vocabulary, draws = Vocabulary(model), Draws(["0/p4d/0"], model.device)
    tokens = _Nearest(vocabulary, draws, [0], 3, 0.1, 0.1).read(0)
    size = {"height": pictures.shape[2], "width": pictures.shape[3]}
    shown = tiny(
        PROMPTS[0],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **size,
    )
    x0 = model.encode_image((shown.images.clamp(0, 1) * 255).round() / 255)
    t = draws.integers([0], "timestep", 0, model.schedule.num_train_timesteps)
    z = model.add_noise(x0, draws.normal([0], "noise", 0, x0.shape[1:]), t)
    text = FreeTokens(model, ["{}"], 3, "tokens").encode([vocabulary.table[tokens]], [0])
    with torch.no_grad():
        goal = model.predict_noise(z, t, model.encode_prompt(PROMPTS[0]))
        for name, on in (("none", None), ("uce", edit)):
            with models.hook_edits(tiny, [on]):
                output = model.predict_noise(z, t, text)
            torch.testing.assert_close(
                found.losses[name][0, 0], (output - goal).square().mean(), rtol=1e-4, atol=1e-6
            )


def test_tokens_are_read_as_often_as_their_distribution_says(tiny):
    vocabulary = Vocabulary(models.load(tiny))
    draws = Draws(["0"], torch.device("cpu"))
    state = _Distributions(vocabulary, draws, [0], 1, 1e-2, 0.1)
    state.weights = torch.zeros(1, 1, len(vocabulary))
    state.weights[0, 0, [3, 5, -1]] = torch.tensor([0.5, 0.2, 0.3])
    read = torch.cat([state.read(step).flatten() for step in range(2000)])
    shares = read.bincount(minlength=len(vocabulary)) / 2000
    torch.testing.assert_close(shares, state.weights[0, 0], rtol=0, atol=0.04)  # 3.6 standard deviations
    assert set(read.tolist()) == {3, 5, len(vocabulary) - 1}


def test_distributions_follow_the_gradient_and_stay_distributions(tiny):
    """A gradient against one token's embedding moves weight to what looks like it."""
    vocabulary = Vocabulary(models.load(tiny))
    state = _Distributions(vocabulary, Draws(["0"], torch.device("cpu")), [0], 2, 0.05, 0.0)
    before = state.weights.clone()
    for _ in range(60):
        state.update(-vocabulary.table[7].expand(1, 2, -1))
    assert not torch.equal(state.weights, before)
    torch.testing.assert_close(state.weights.sum(-1), torch.ones(1, 2))
    score = state.weights @ (vocabulary.table @ vocabulary.table[7])
    assert (score > before @ (vocabulary.table @ vocabulary.table[7])).all()


def test_embeddings_of_tokens_are_nearest_to_themselves(tiny):
    vocabulary = Vocabulary(models.load(tiny))
    assert torch.equal(vocabulary.nearest(vocabulary.table * 3), torch.arange(len(vocabulary)))
    assert not set(vocabulary._ids.tolist()) & set(tiny.tokenizer.all_special_ids)


def test_the_pipeline_is_left_as_it_was(method, tiny, edit, pictures):
    before = models.fingerprint(models.load(tiny))
    tiny.text_encoder.train()
    with torch.inference_mode():
        attacked(method, tiny, edit, pictures)
    assert tiny.text_encoder.training
    tiny.text_encoder.eval()
    assert models.fingerprint(models.load(tiny)) == before
    assert all(p.requires_grad and p.grad is None for p in tiny.unet.parameters())
    assert not tiny.text_encoder.get_input_embeddings()._forward_hooks


def test_neither_neighbours_nor_batches_change_what_is_found(method, tiny, edit, pictures, found):
    other = erase.uce(tiny, "dog", tokens="all")
    again = attacked(method, tiny, {"other": other, "uce": edit}, pictures, rows=4)
    for name in ("none", "uce"):
        assert again.prompts[name] == found.prompts[name]
        torch.testing.assert_close(again.losses[name], found.losses[name], rtol=1e-3, atol=1e-5)


def test_hooks_and_changed_weights_are_attacked_alike(method, tiny, edit, pictures, found):
    model = models.load(tiny)
    name = next(iter(model.cross_attention)) + ".to_k.weight"
    as_weights = {
        name: Zeroed.pack(torch.zeros(model.unet.get_parameter(name).shape, dtype=torch.bool)),
        **{key: change for key, change in edit.changes.items() if key != name},
    }
    both = {
        "hooks": Edit.made(
            model, {k: v for k, v in edit.changes.items() if k != name}, method="t", targets=()
        ),
        "weights": Edit.made(model, as_weights, method="t", targets=()),
    }
    again = attacked(method, tiny, both, pictures)
    torch.testing.assert_close(again.losses["weights"], again.losses["hooks"], rtol=1e-3, atol=1e-5)
    assert not torch.equal(again.losses["weights"], again.losses["none"])


def test_an_edited_text_encoder_reads_the_words(method, tiny, text_edit, pictures, found):
    again = attacked(method, tiny, {"text": text_edit}, pictures)
    torch.testing.assert_close(again.losses["none"], found.losses["none"], rtol=1e-3, atol=1e-5)
    assert ((again.losses["text"] - again.losses["none"])[:, 0].abs() > 1e-6).all()


def test_a_search_is_over_when_a_picture_shows_the_concept(method, tiny, edit, pictures):
    """The classifier finds it in one picture of the prompts as they are, and in all that follow the first
    words."""
    calls = []

    def classify(images):
        calls.append(len(images))
        return [["X" if row == 0 or len(calls) == 2 else "y"] for row in range(len(images))]

    found = attacked(method, tiny, {}, pictures, classify=classify)
    assert calls == [3, 2], "what has succeeded is drawn no more"
    assert [(row["steps"], round(row["success"], 1)) for row in found.rows] == [
        (0, 33.3), (2, 100.0), (4, 100.0)
    ]  # fmt: skip
    assert found.rows[0]["success_low"] == pytest.approx(0.84, abs=0.01)
    losses = found.losses["none"]
    assert losses[0].isnan().all() and losses[1:, :2].isfinite().all() and losses[1:, 2:].isnan().all()
    assert found.prompts["none"][0] == PROMPTS[0] and found.prompts["none"][1] != PROMPTS[1]
    if method == "unlearn_diff_atk":
        assert found.prompts["none"][1].endswith(f" {PROMPTS[1]}")
    assert json.loads(json.dumps(found.to_dict()))["losses"]["none"][0] == [None] * 4
    assert found.table()[0] == ("edit", "0 steps", "2 steps", "4 steps")
    assert found.attack == method and found.names == ["none"]


def test_stable_diffusion_xl_reads_one_token_in_both_text_encoders(method):
    pipe = testbed.tiny_pipeline("sdxl")
    model = models.load(pipe)
    side = model.latent_shape()[1] * model.vae_scale_factor
    pictures = torch.rand(3, 3, side, side)
    found = attacked(method, pipe, erase.uce(pipe, "ball"), pictures)
    assert found.losses["uce"].isfinite().all()
    assert Vocabulary(model).table.shape[1] == sum(e.config.hidden_size for e in model.text_encoders)


def test_half_precision_is_searched_too(method, pictures):
    pipe = testbed.tiny_pipeline("sd1").to(torch.bfloat16)
    assert attacked(method, pipe, {}, pictures).losses["none"].isfinite().all()


def test_p4d_finds_words_for_a_concept_that_a_closed_form_edit_led_elsewhere():
    pipe = testbed.load()
    edit = erase.uce(pipe, "ball", tokens="all", guide="box")  # alone, it draws no ball at all
    trial = testbed.trial("ball", 3)
    found = p4d(
        pipe,
        edit,
        [prompt for prompt, _ in trial.erased],
        label="ball",
        classify=trial.classify,
        tokens=8,
        steps=15,
        draw_every=5,
        num_inference_steps=10,
        guidance_scale=5.0,
    )
    assert found.curve("uce")[0][1] == 0 and found.curve("uce")[-1][1] > 0
    assert found.curve("none")[0][1] == 100


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"tokens": 0}, ValueError, "tokens: got 0"),
        ({"tokens": 200}, ValueError, "tokens: .* does not fit"),
        ({"draw_every": 0}, ValueError, "draw_every: got 0"),
        ({"rows": 0}, ValueError, "rows: got 0"),
        ({"k": 0}, ValueError, "k: got 0"),
        ({"learning_rate": 0}, ValueError, "learning_rate: got 0"),
        ({"weight_decay": -1}, ValueError, "weight_decay: got -1"),
        ({"label": 1}, TypeError, "label: got a int"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"tokens": "a"}, TypeError, "tokens: got a str"),
        ({"k": "a"}, TypeError, "k: got a str"),
        ({"weight_decay": "a"}, TypeError, "weight_decay: got a str"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale: got nan"),
        ({"classify": lambda images: []}, ValueError, "classify: returned 0 lists"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(method, tiny, pictures, change, error, message):
    with pytest.raises(error, match=message) as caught:
        attacked(method, tiny, {}, pictures, **change)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_is_computed_once(method, tiny, edit, pictures, monkeypatch):
    calls = []

    def counted(model):
        calls.append(model)
        return models.fingerprint(model)

    monkeypatch.setattr("pumice.evaluate.attacks.token_search.fingerprint", counted)
    monkeypatch.setattr("pumice.models.edit.fingerprint", counted)
    attacked(method, tiny, {"uce": edit}, pictures)
    assert len(calls) == 1


def test_every_prompt_has_a_picture(tiny, pictures):
    with pytest.raises(ValueError, match="images: got 2, expected 3, one a prompt"):
        attacked("unlearn_diff_atk", tiny, {}, pictures[:2])
    with pytest.raises(ValueError, match="prompts: got an empty list"):
        p4d(tiny, {}, [], classify=never, **P4D)
    with pytest.raises(TypeError, match="edits: got a int under 'a'"):
        attacked("unlearn_diff_atk", tiny, {"a": 1}, pictures)
