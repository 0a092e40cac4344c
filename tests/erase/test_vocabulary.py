"""What a concept may be preserved by: distances against float64, k-means against what is plain to see."""

from __future__ import annotations

import pytest
import torch

from erase.toy import Toy
from pumice import models
from pumice.erase import vocabulary
from pumice.erase.vocabulary import candidates, representatives
from pumice.testbed import tiny_pipeline

WORDS = ["dog", "house", "a red tree", "big ship", "snow", "the city", "two people"]


@pytest.fixture(scope="module")
def model():
    return models.load(tiny_pipeline("sd1"))


def by_distance(model, concept: str, words: list[str]) -> list[str]:
    with torch.no_grad():
        own = model.encode_prompt(concept).embeds.double()
        return sorted(words, key=lambda word: float((model.encode_prompt(word).embeds.double() - own).norm()))


@pytest.mark.parametrize("concept", ["cat", "a blue house"])
def test_takes_the_nearest(model, concept):
    ordered = by_distance(model, concept, WORDS)
    assert candidates(model, [concept], WORDS) == [tuple(ordered)]
    assert candidates(model, [concept], WORDS, nearest=3) == [tuple(ordered[:3])]


def test_each_concept_has_its_own_whatever_the_batch(model):
    concepts = ["cat", "dog"]
    found = candidates(model, concepts, WORDS, nearest=4)
    assert found == candidates(model, concepts, WORDS, nearest=4, rows=1)
    others = [word for word in WORDS if word != "dog"]
    assert found == [tuple(by_distance(model, concept, others)[:4]) for concept in concepts]


def test_one_for_each_cluster_of_distances():
    values = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 5.3, 9.0])
    assert representatives(values, 3).tolist() == [1, 4, 6]
    assert representatives(values.flip(0), 3).tolist() == [0, 2, 5]
    assert representatives(values, 7).tolist() == representatives(values, 50).tolist() == [*range(7)]
    assert representatives(values, 1).tolist() == [3]  # the mean is 3.53
    assert representatives(torch.ones(5), 2).tolist() == [0]


def test_lloyds_centres_are_the_means_of_what_is_nearest_to_them():
    values = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    for count in (1, 4, 20, 100):
        found = values[representatives(values, count)]
        assert 0.9 * count <= len(found) <= count
        spread = (values[:, None] - found).abs().min(1).values.square().mean()
        chance = values[:: len(values) // count][:count]
        assert spread < 1.2 * (values[:, None] - chance).abs().min(1).values.square().mean()


def test_the_tokenizers_words_by_default(monkeypatch):
    model = Toy()
    tokens = ["!</w>", "th", "of</w>", "red</w>", "b2b</w>", "two</w>", "Ship</w>", "one</w>", "ships</w>"]

    class Table(dict):
        def get_vocab(self):
            return {word: number for number, word in reversed([*enumerate(tokens)])}

    model.pipe.tokenizer = Table(model.pipe.tokenizer)
    assert candidates(model, ["one"]) == [("red", "ships", "two")]
    monkeypatch.setattr(vocabulary, "FREQUENT", 2)
    assert candidates(model, ["one"]) == [("red", "two")]


def test_a_file_has_one_a_line(model, tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("\r\n".join(["﻿dog", "", "  house ", "DOG", *WORDS]).encode())
    for name in (path, str(path)):
        assert candidates(model, ["cat"], name) == candidates(model, ["cat"], WORDS)


@pytest.mark.parametrize(
    "word", ["<dog>", "b2b", "don't", "naïve", "x/y", "a cat", "The  CAT", "cat in the snow"]
)
def test_other_characters_and_the_concept_are_left_out(model, word):
    assert candidates(model, ["cat"], [word, "dog"]) == [("dog",)]


def test_what_is_read_like_the_concept_is_left_out():
    model = Toy()
    assert candidates(model, ["three"], ["four", "one"]) == [("one",)]  # both are unknown to the toy
    assert candidates(model, ["three", "one"], ["four", "one", "two"]) == [("two",), ("two",)]
    with pytest.raises(ValueError, match="vocabulary: every candidate is the concept itself"):
        candidates(model, ["three"], ["four", "five"])
    with pytest.raises(ValueError, match="vocabulary: every candidate is the concept itself"):
        candidates(model, ["three"], ["Three"])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ([], ValueError, "vocabulary: got an empty list, expected words"),
        (["1", "<>"], ValueError, "vocabulary: got 2 texts with other characters"),
        ("nowhere/words.txt", ValueError, "vocabulary: 'nowhere/words.txt' cannot be read"),
        (b"words", TypeError, "vocabulary: got a bytes"),
        (3, TypeError, "vocabulary: got a int"),
        (["dog", 3], TypeError, "vocabulary: got a int, expected strings"),
    ],
)
def test_bad_vocabularies(model, wrong, error, message):
    with pytest.raises(error, match=message):
        candidates(model, ["cat"], wrong)


@pytest.mark.parametrize("name", ["nearest", "centres"])
def test_bad_counts(model, name):
    with pytest.raises(ValueError, match=f"{name}: got 0"):
        candidates(model, ["cat"], WORDS, **{name: 0})
    with pytest.raises(TypeError, match=f"{name}: got a float"):
        candidates(model, ["cat"], WORDS, **{name: 1.5})
