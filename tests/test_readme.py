"""Every Python example of the README runs as it stands."""

import re
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from pumice import testbed

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
    assert all(len([line for line in example.splitlines() if line]) <= 6 for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.splitlines()[0])
def test_example(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipe = testbed.load()
    monkeypatch.setattr(pipe, "to", lambda *_, **__: pipe)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pipe)
    names = {
        "prompts": ["a red ball", "a blue fish"],
        "memorized_prompts": [testbed.world.memorized(i).caption for i in range(4)],
        "fresh_prompts": ["a green tent", "a star", "a red moon at the beach", "a box"],
    }
    exec(compile(example, str(README), "exec"), names)
