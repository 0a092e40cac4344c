"""Texts preserved once are those preserved anew, and cost the encoder nothing more."""

import pytest
import torch

from pumice.erase import Preserve, uce
from pumice.testbed import tiny_pipeline

CPU = torch.device("cpu")
KEPT = ["a dog", "a big house", "a red car", "A  dog"]


def same(one, other) -> bool:
    return all(
        torch.allclose(change.up @ change.down, other.changes[name].up @ other.changes[name].down, atol=1e-6)
        for name, change in one.changes.items()
    )


@pytest.mark.parametrize("tokens", ["last", "all"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_edits_are_those_of_the_texts(family, tokens):
    pipe = tiny_pipeline(family)
    kept = Preserve(pipe, KEPT, tokens=tokens)
    assert len(kept.texts) == (3 if tokens == "last" else 4)
    settings = {"guide": "bird", "tokens": tokens, "lamb": 2.0, "pooled": family == "sdxl"}
    for concept in ("cat", "a flower"):
        once, anew = (uce(pipe, concept, preserve=texts, **settings) for texts in (kept, KEPT))
        assert same(once, anew) and once.settings == anew.settings
        assert once.details["encoder_calls"] == anew.details["encoder_calls"] - kept.calls


def test_a_factorisation_is_kept(monkeypatch):
    pipe = tiny_pipeline("sd1")
    kept = Preserve(pipe, KEPT)
    uce(pipe, "cat", preserve=kept)
    assert list(kept.at(1.0, CPU)._factors) == [0.5]
    assert Preserve(pipe, ()).at(1.0, CPU) is None


def test_many_texts_go_in_blocks():
    pipe = tiny_pipeline("sd1")
    texts = [
        f"a dog {letters}" for letters in (chr(97 + i) + chr(97 + j) for i in range(10) for j in range(8))
    ]
    kept = Preserve(pipe, texts)
    assert kept.calls == 2
    halves = [Preserve(pipe, part).at(1.0, CPU).gram for part in (texts[:40], texts[40:])]
    torch.testing.assert_close(kept.at(1.0, CPU).gram, sum(halves), rtol=1e-6, atol=1e-6)


def test_bad_input():
    pipe = tiny_pipeline("sd1")
    kept = Preserve(pipe, KEPT)
    with pytest.raises(ValueError, match="preserve: it was encoded by a model with other weights"):
        uce(tiny_pipeline("sd1", seed=1), "cat", preserve=kept)
    with pytest.raises(ValueError, match="preserve: it keeps tokens='last', expected 'all'"):
        uce(pipe, "cat", preserve=kept, tokens="all")
    with pytest.raises(ValueError, match="preserve: got the concept 'A  dog' itself"):
        uce(pipe, "A dog", preserve=kept)
    with pytest.raises(ValueError, match="texts: got ' ', expected texts that are not empty"):
        Preserve(pipe, [" "])
    with pytest.raises(ValueError, match=r"preserve: 'a .*' is longer than the text encoder takes"):
        Preserve(pipe, ["a dog " * 60])
    with pytest.raises(ValueError, match="tokens: got 'first'"):
        Preserve(pipe, KEPT, tokens="first")
