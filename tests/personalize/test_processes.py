"""Two processes learn what one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pumice.personalize import dreambooth, textual_inversion
from pumice.testbed import tiny_pipeline
from pumice.training import examples

CLASS_STEPS = 3


def learn(folder: Path, *, main: bool = True) -> None:
    """Three trainings: with a class that is drawn, without work for a second process, and of a word."""
    examples._STEPS = CLASS_STEPS
    one, two, v = (tiny_pipeline(family).to(torch.float64) for family in ("sd1", "sdxl", "sd2"))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts, how = ("a photo of sks dog", "a photo of dog"), {"steps": 2, "learning_rate": 1e-3}
    results = {
        "class": dreambooth(one, images, *prompts, checkpoint=folder / "kept", **how),
        "alone": dreambooth(two, images, prompts[0], **how),
        "word": textual_inversion(v, images, "<new>", "dog", batch_size=3, **how),
    }
    for name, result in results.items() if main else ():
        tensors = {
            f"{part}.{key}": weight.detach().clone()
            for part in ("unet", "text_encoder")
            for key, weight in getattr(result.pipe, part).named_parameters()
        }
        save_file({"losses": result.losses, **tensors}, folder / f"{name}.safetensors")


@pytest.mark.filterwarnings("ignore:class_images")
def test_two_processes_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "_STEPS", CLASS_STEPS)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    learn(tmp_path / "one")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_processes import learn\n"
        "learn(Path(sys.argv[1]), main=os.environ['RANK'] == '0')\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # on CPUs `accelerate launch --cpu` starts one process; it is told so by the environment
    launch = [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)),
    ]
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "lo"}
    found = subprocess.run(
        [sys.executable, *launch, script, tmp_path / "two"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    for name in ("class", "alone", "word"):
        one, two = (load_file(tmp_path / each / f"{name}.safetensors") for each in ("one", "two"))
        assert one.keys() == two.keys()
        far = {key for key in one if not torch.allclose(one[key], two[key], rtol=1e-6, atol=1e-8)}
        assert not far
    drawn = [sorted((tmp_path / name / "kept").rglob("*.png")) for name in ("one", "two")]
    assert [path.relative_to(tmp_path / "one") for path in drawn[0]] == [
        path.relative_to(tmp_path / "two") for path in drawn[1]
    ]
    assert len(drawn[0]) == 2
