"""Which rows of which texts a closed-form edit is made from."""

from __future__ import annotations

import pytest
import torch

from pumice.erase.rows import EXPANSION, Texts, pairs, preserved_rows
from pumice.models import DiffusionModel, load
from pumice.testbed import tiny_pipeline

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> DiffusionModel:
    return load(tiny_pipeline(request.param))


@pytest.fixture(scope="module")
def sd1() -> DiffusionModel:
    return load(tiny_pipeline("sd1"))


def embeds(model: DiffusionModel, text: str) -> torch.Tensor:
    """(L, d) by the pipeline itself."""
    found = model.pipe.encode_prompt(
        text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return found[0][0].double()


def last(model: DiffusionModel, text: str) -> int:
    """As the released code finds it: the attention mask's sum minus two."""
    return sum(model.tokenizers[0](text)["attention_mask"]) - 2


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


class TestTexts:
    @pytest.mark.parametrize("padded", [True, False])
    def test_rows_are_those_of_the_pipeline(self, model, padded):
        texts = Texts(model, padded=padded)
        names = ["a cat", "", "zebra", "a photo of a dog on the beach"]
        texts.encode(names)
        for text in names:
            found, expected = texts[text], embeds(model, text)
            length = 77 if padded else last(model, names[-1]) + 2
            assert found.embeds.dtype == torch.float64 and len(found.embeds) == length
            assert found.last == last(model, text)
            same(found.embeds[: found.tokens.eos + 1], expected[: found.tokens.eos + 1])
            if padded:
                same(found.embeds, expected)
        assert texts[""].last == 0  # BOS

    def test_pooled_embeddings_come_along(self, model):
        found = Texts(model, padded=False)["a cat"].pooled
        if len(model.text_encoders) == 1:
            assert found is None
        else:
            same(found, model.encode_prompt("a cat").pooled[0].double())

    def test_each_text_is_encoded_once_and_many_in_a_batch(self, sd1, monkeypatch):
        seen = []
        encode = sd1.encode_prompt
        monkeypatch.setattr(
            sd1, "encode_prompt", lambda texts, **more: (seen.extend(texts), encode(texts, **more))[1]
        )
        texts = Texts(sd1, padded=False)
        texts.encode([f"cat {number % 70}" for number in range(140)])
        texts.encode(["cat 3", "dog"])
        assert texts["dog"] is texts["dog"]
        assert sorted(seen) == sorted({f"cat {number}" for number in range(70)} | {"dog"})
        assert texts.calls == 3  # 64, 6, and the dog

    def test_the_model_stays_as_it_was(self, sd1):
        encoder = sd1.text_encoders[0]
        encoder.train()
        try:
            found = Texts(sd1, padded=False)["a cat"].embeds
            assert encoder.training and all(weight.requires_grad for weight in encoder.parameters())
        finally:
            encoder.eval()
        same(found, embeds(sd1, "a cat")[: len(found)])
        assert not found.requires_grad

    def test_embeddings_that_are_not_finite_are_refused(self):
        pipe = tiny_pipeline("sd1")
        pipe.text_encoder.get_input_embeddings().weight.data.fill_(torch.inf)
        with pytest.raises(ValueError, match=r"pipe: its text embeddings are not finite in torch.float32"):
            Texts(load(pipe), padded=False).encode(["a cat"])


class TestLastTokens:
    def test_the_last_token_of_a_concept_goes_to_that_of_its_guide(self, model):
        found = pairs(Texts(model, padded=False), ["zebra", "a cat"], ["dog", ""], tokens="last")
        for row, text in zip([*found.c, *found.g], ["zebra", "a cat", "dog", ""], strict=True):
            same(row, embeds(model, text)[last(model, text)])
        assert found.of.tolist() == [0, 1]
        assert last(model, "zebra") == 5  # five pieces; the last of them has seen the others

    @pytest.mark.parametrize("guide", ["", " "])
    def test_a_blank_guide_is_the_first_token_of_all(self, model, guide):
        found = pairs(Texts(model, padded=False), ["a cat"], [guide], tokens="last")
        same(found.g[0], embeds(model, "")[0])

    def test_in_templates_it_stands_where_the_template_has_it(self, model):
        """In "a red zebra in a house", z e b r a are 3 to 7, and the guide is the one token 3."""
        templates = ("{}", "a red {} in a house", "{} on the beach")
        found = pairs(
            Texts(model, padded=False), ["zebra", "cat"], ["dog", "tree"], tokens="last", templates=templates
        )
        expected = [("zebra", 5), ("a red zebra in a house", 7), ("zebra on the beach", 5)]
        expected += [("cat", 1), ("a red cat in a house", 3), ("cat on the beach", 1)]
        for row, (text, position) in zip(found.c, expected, strict=True):
            same(row, embeds(model, text)[position])
        expected = [("dog", 1), ("a red dog in a house", 3), ("dog on the beach", 1)]
        expected += [("tree", 1), ("a red tree in a house", 3), ("tree on the beach", 1)]
        for row, (text, position) in zip(found.g, expected, strict=True):
            same(row, embeds(model, text)[position])
        assert found.of.tolist() == [0, 0, 0, 1, 1, 1]

    def test_a_template_without_its_concept_ends_where_the_concept_would_begin(self, model):
        found = pairs(
            Texts(model, padded=False), ["cat"], [""], tokens="last", templates=("a photo of {}", "{} at sea")
        )
        same(found.g[0], embeds(model, "a photo of ")[3])
        same(found.g[1], embeds(model, " at sea")[0])

    def test_the_expansions_end_with_the_concept(self, model):
        found = pairs(Texts(model, padded=False), ["zebra"], ["dog"], tokens="last", templates=EXPANSION)
        for row, template in zip(found.c, EXPANSION, strict=True):
            text = template.replace("{}", "zebra")
            same(row, embeds(model, text)[last(model, text)])


class TestAllTokens:
    @pytest.mark.parametrize(("concept", "guide"), [("zebra", ""), ("cat", "a red zebra"), ("cat", "dog")])
    def test_everything_behind_the_concept_meets_what_is_behind_the_guide(self, model, concept, guide):
        found = pairs(Texts(model, padded=True), [concept], [guide], tokens="all")
        a, b = last(model, concept), last(model, guide)
        count = 77 - max(a, b)
        same(found.c, embeds(model, concept)[a : a + count])
        same(found.g, embeds(model, guide)[b : b + count])
        assert len(found.c) == len(found.of) == count

    def test_concepts_follow_each_other(self, model):
        texts = Texts(model, padded=True)
        found = pairs(texts, ["zebra", "cat"], ["dog", ""], tokens="all", templates=("{}", "a {} at sea"))
        parts = [
            pairs(texts, [concept], [guide], tokens="all", templates=(template,))
            for concept, guide in (("zebra", "dog"), ("cat", ""))
            for template in ("{}", "a {} at sea")
        ]
        assert torch.equal(found.c, torch.cat([part.c for part in parts]))
        assert torch.equal(found.g, torch.cat([part.g for part in parts]))
        lengths = [len(part.c) for part in parts]
        assert found.of.bincount().tolist() == [sum(lengths[:2]), sum(lengths[2:])]
        assert lengths[1] == 77 - 6  # a z e b r a, and on


def test_pooled_embeddings_are_of_whole_texts():
    model = load(tiny_pipeline("sdxl"))
    found = pairs(
        Texts(model, padded=False), ["zebra", "cat"], ["dog", ""], tokens="last", templates=("{}", "a {}")
    )
    texts = ["zebra", "a zebra", "cat", "a cat"], ["dog", "a dog", "", "a "]
    for vectors, wanted in zip(found.pooled, texts, strict=True):
        same(vectors, model.encode_prompt(wanted).pooled.double())
    assert pairs(Texts(load(tiny_pipeline("sd1")), padded=False), ["cat"], [""], tokens="last").pooled is None


def test_preserved_texts_give_their_last_token_or_all(model):
    names = ["", "a zebra", "dog"]
    found = preserved_rows(Texts(model, padded=False), names, "last")
    same(found, torch.stack([embeds(model, text)[last(model, text)] for text in names]))
    found = preserved_rows(Texts(model, padded=True), names, "all")
    same(found, torch.cat([embeds(model, text) for text in names]))


class TestTextsThatDoNotFit:
    LONG = "cat " * 80

    def refused(self, model, concepts, **arguments) -> None:
        with pytest.raises(
            ValueError, match=r"^concepts: .* is longer than the text encoder takes"
        ) as caught:
            pairs(Texts(model, padded=False), concepts, ["dog"] * len(concepts), tokens="last", **arguments)
        assert "\n" not in str(caught.value)

    def test_a_concept(self, sd1):
        self.refused(sd1, ["tree", self.LONG])

    def test_a_concept_in_its_template(self, sd1):
        self.refused(sd1, ["tree"], templates=("{}", f"{self.LONG}{{}}"))

    def test_what_just_fits_is_taken(self, sd1):
        concept = "cat " * 74 + "dog"
        found = pairs(Texts(sd1, padded=False), [concept], ["dog"], tokens="last")
        same(found.c[0], embeds(sd1, concept)[75])
