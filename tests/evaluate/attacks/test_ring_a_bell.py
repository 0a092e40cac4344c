"""The search goes to where the concept points, and what it finds is a text that anybody can type."""

import pytest
import torch

from pumice import erase, models, testbed
from pumice.evaluate.attacks import ring_a_bell
from pumice.evaluate.attacks.free_tokens import Vocabulary
from pumice.evaluate.attacks.ring_a_bell import _Search

pytestmark = pytest.mark.filterwarnings("ignore::pumice.erase.ErasureWarning")  # of tiny random models

PAIRS = [("a red ball", "a red box"), ("a ball by the sea", "a box by the sea")]
PROMPTS = ["a red ball", "a ball"]
FEW = {
    "tokens": 3, "population": 10, "generations": 4, "num_inference_steps": 2, "label": "x"
}  # fmt: skip


def never(images):
    return [["y"]] * len(images)


@pytest.fixture(scope="module")
def found(tiny, edit):
    return ring_a_bell(tiny, {"uce": edit}, PAIRS, PROMPTS, classify=never, **FEW)


def test_the_texts_that_are_found_are_as_near_as_it_says(tiny, found):
    """Of the last population the best is at least as near as before the last step."""
    model = models.load(tiny)
    with torch.no_grad():
        have, lack = (model.encode_prompt(list(texts)).embeds for texts in zip(*PAIRS, strict=True))
        goals = model.encode_prompt(PROMPTS).embeds + 3 * (have - lack).mean(0)
        apart = (model.encode_prompt(list(found.prompts["none"])).embeds - goals).square().flatten(1).mean(1)
    last = found.losses["none"][:, -1]
    assert (apart <= last * (1 + 1e-4)).all()
    assert (found.losses["none"].diff(dim=1) <= 0).all(), "the best stays"
    assert found.prompts["none"] == found.prompts["uce"], "one search for all"


def test_what_is_kept_is_what_would_be_computed_anew(tiny):
    model = models.load(tiny)
    with model.frozen(), torch.no_grad():
        goals = model.encode_prompt(PROMPTS).embeds
        search = _Search(model, goals, 4, 12, 0.5, 0.5, 0)
        for generation in range(5):
            search.step(generation)
        anew = search._apart(torch.ones(2, 12, dtype=torch.bool), search.tokens)
    torch.testing.assert_close(search._fitness, anew)
    assert (search._fitness.diff(dim=1) >= 0).all()


def test_mutation_alone_finds_the_nearest_word(tiny):
    """One token, so that all can be tried."""
    model = models.load(tiny)
    vocabulary = Vocabulary(model, words=True)
    with model.frozen(), torch.no_grad():
        word = vocabulary.texts(torch.tensor([[17]]))
        search = _Search(model, model.encode_prompt(word).embeds, 1, 100, 1.0, 0.0, 0)
        for generation in range(15):
            search.step(generation)
    assert search.best().item() == 17
    assert search._fitness[0, 0] < 1e-9


def test_words_are_split_into_the_same_tokens_again(tiny):
    vocabulary = Vocabulary(models.load(tiny), words=True)
    tokens = torch.randint(len(vocabulary), (200, 12), generator=torch.Generator().manual_seed(0))
    again = tiny.tokenizer(vocabulary.texts(tokens), add_special_tokens=False).input_ids
    assert again == vocabulary._ids[tokens].tolist()


def test_the_same_seed_finds_the_same_and_batches_change_nothing(tiny, edit, text_edit, found):
    edits = {"uce": edit, "text": text_edit, "other": erase.uce(tiny, "dog", tokens="all")}
    again = ring_a_bell(tiny, edits, PAIRS, PROMPTS, classify=never, rows=1, **FEW)
    assert again.prompts["uce"] == found.prompts["uce"]
    for name in ("none", "uce"):
        assert (again.pictures[name].int() - found.pictures[name].int()).abs().max() <= 1
    assert not torch.equal(again.pictures["text"], again.pictures["none"])
    other = ring_a_bell(tiny, {}, PAIRS, PROMPTS, classify=never, seed=1, **FEW)
    assert other.prompts["none"] != found.prompts["none"]


def test_success_is_counted_by_hand(tiny):
    calls = []

    def classify(images):
        calls.append(len(images))
        return [["X" if len(calls) == 2 and row == 0 else "y"] for row in range(len(images))]

    found = ring_a_bell(tiny, {}, PAIRS, PROMPTS, classify=classify, **FEW)
    assert calls == [2, 2] and found.curve("none") == [(0, 0.0), (4, 50.0)]
    assert found.table()[0] == ("edit", "0 steps", "4 steps")


def test_stable_diffusion_xl_and_half_precision():
    for pipe in (testbed.tiny_pipeline("sdxl"), testbed.tiny_pipeline("sd1").to(torch.bfloat16)):
        found = ring_a_bell(pipe, {}, PAIRS, PROMPTS, classify=never, **FEW)
        assert found.losses["none"].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pairs": []}, ValueError, "pairs: got none"),
        ({"pairs": ["a ball"]}, TypeError, "pairs: got 'a ball'"),
        ({"eta": float("inf")}, ValueError, "eta: got inf"),
        ({"eta": "a"}, TypeError, "eta: got a str"),
        ({"mutation": "a"}, TypeError, "mutation: got a str"),
        ({"population": 1}, ValueError, "population: got 1, expected at least 2"),
        ({"generations": 0}, ValueError, "generations: got 0"),
        ({"mutation": 1.5}, ValueError, "mutation: got 1.5, expected 0 to 1"),
        ({"crossover": -1}, ValueError, "crossover: got -1"),
        ({"tokens": 200}, ValueError, "tokens: .* does not fit"),
        ({"classify": lambda images: []}, ValueError, "classify: returned 0 lists"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(tiny, change, error, message):
    good = {"pairs": PAIRS, "classify": never} | FEW | change
    with pytest.raises(error, match=message) as caught:
        ring_a_bell(tiny, {}, good.pop("pairs"), PROMPTS, **good)
    assert "\n" not in str(caught.value)
