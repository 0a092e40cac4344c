"""What a checkpoint says it is of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pumice
from pumice.training.checkpoint import NAME, Checkpoint


def test_settings_that_are_no_plain_data_are_refused_at_once(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        Checkpoint(tmp_path, {"steps": np.int64(3)})


def test_a_tuple_is_the_list_that_it_is_read_as_and_long_values_are_cut(tmp_path):
    said = f'{{"settings": {{"pumice": "{pumice.__version__}", "words": ["a", "b"]}}, "done": 1}}'
    save_file({"losses": torch.zeros(1)}, tmp_path / NAME, {"training": said})
    Checkpoint(tmp_path, {"words": ("a", "b")})
    with pytest.raises(ValueError, match="is of another training") as caught:
        Checkpoint(tmp_path, {"words": ["word"] * 1000, "more": "x" * 1000})
    message = str(caught.value)
    assert "words was ['a', 'b'], is ['word', 'word', " in message
    assert len(message) < len(str(tmp_path)) + 350
