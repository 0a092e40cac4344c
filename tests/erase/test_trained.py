"""What all erasers that train have in common; a new one is a line in METHODS."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from inspect import signature
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pumice.erase import known
from pumice.erase.age import age
from pumice.erase.all_but_one import all_but_one
from pumice.erase.concept_ablation import concept_ablation
from pumice.erase.degeneration_tuning import degeneration_tuning
from pumice.erase.eap import eap
from pumice.erase.esd import esd
from pumice.erase.few_shot import few_shot
from pumice.erase.few_shot_ascent import few_shot_ascent
from pumice.erase.forget_me_not import forget_me_not
from pumice.erase.kpop import kpop
from pumice.erase.mace_lora import mace_lora
from pumice.erase.safety_lora import safety_lora
from pumice.erase.sdd import sdd
from pumice.erase.spm import spm
from pumice.models import Edit
from pumice.testbed import tiny_pipeline
from pumice.training import steps
from pumice.training.checkpoint import NAME

RATE = 1e-2
STILL = {"steps": 4, "learning_rate": RATE, "allow_unknown": True}
TINY = STILL | {"pending": 3, "num_inference_steps": 2}

METHODS = {
    "esd": lambda pipe, concept="cat", **k: esd(pipe, concept, **TINY | k),
    "sdd": lambda pipe, concept="cat", **k: sdd(pipe, concept, **TINY | {"ema_decay": 0.5} | k),
    "all_but_one": lambda pipe, concept="cat", **k: all_but_one(pipe, concept, **TINY | k),
    "safety_lora": lambda pipe, concept="cat", **k: safety_lora(pipe, concept, **TINY | {"rank": 2} | k),
    "eap": lambda pipe, concept="cat", **k: eap(pipe, concept, ["house", "snow"], **TINY | k),
    "age": lambda pipe, concept="cat", **k: age(pipe, concept, ["house", "snow"], **TINY | k),
    "esd, LoRA": lambda pipe, concept="cat", **k: esd(pipe, concept, **TINY | {"rank": 2} | k),
    "spm": lambda pipe, concept="cat", **k: spm(pipe, concept, **TINY | k),
    "few_shot": lambda pipe, concept="cat", **k: few_shot(
        pipe, concept, torch.full((1, 3, 32, 32), 0.3), **STILL | {"word_weight": 0} | k
    ),
    "few_shot_ascent": lambda pipe, concept="cat", **k: few_shot_ascent(pipe, concept, **STILL | k),
    "concept_ablation": lambda pipe, concept="cat", **k: concept_ablation(
        pipe, concept, "bird", **STILL | {"images": {"bird": torch.full((1, 3, 32, 32), 0.3)}} | k
    ),
    "degeneration_tuning": lambda pipe, concept="cat", **k: degeneration_tuning(
        pipe, concept, **STILL | {"parameters": "xattn", "num_images": 1} | k
    ),
    "kpop": lambda pipe, concept="cat", **k: kpop(
        pipe, concept, f"{mkdtemp()}/key.safetensors", **TINY | {"mode": "all"} | k
    ),
    "forget_me_not": lambda pipe, concept="cat", **k: forget_me_not(
        pipe, concept, torch.full((1, 3, 32, 32), 0.3), **STILL | k
    ),
    "mace_lora": lambda pipe, concept="cat", **k: mace_lora(
        pipe, concept, torch.full((1, 3, 32, 32), 0.3), **STILL | k
    ),
}
"""From a pipeline, a concept and options to an edit, in four steps of a rate of RATE; blocks of three end in
the middle between checkpoints."""

each = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1")


@pytest.fixture(scope="module")
def families():
    return {family: tiny_pipeline(family) for family in ("sd2", "sdxl")}


@pytest.fixture(scope="module")
def edits(pipe):
    """What each method makes of "cat", made when it is first wanted."""
    found: dict[str, Edit] = {}

    def made(method: str) -> Edit:
        if method not in found:
            found[method] = METHODS[method](pipe)
        return found[method]

    return made


def tensors(edit: Edit) -> dict[str, torch.Tensor]:
    """Of all its changes, by name."""
    return {
        f"{name}.{key}": value
        for name, change in edit.changes.items()
        for key, value in vars(change).items()
        if isinstance(value, torch.Tensor)
    }


def same(one: Edit, two: Edit) -> bool:
    one, two = tensors(one), tensors(two)
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def weights(pipe) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": weight.detach().clone()
        for part, network in pipe.components.items()
        if isinstance(network, torch.nn.Module)
        for name, weight in network.state_dict().items()
    }


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def modes(pipe) -> list[object]:
    """requires_grad, training, processors and hooks of all that the pipeline has."""
    found: list[object] = []
    for part, network in pipe.components.items():
        if not isinstance(network, torch.nn.Module):
            continue
        found += [(part, name, weight.requires_grad) for name, weight in network.named_parameters()]
        for name, module in network.named_modules():
            hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
            found.append((part, name, module.training, [list(each) for each in hooks]))
            found.append(id(getattr(module, "processor", None)))
    return found


def numpys(function):
    """The function, called with numbers of NumPy where they are Python's, also by default."""
    types = {int: np.int64, float: np.float32}
    defaults = {name: each.default for name, each in signature(function).parameters.items()}

    def called(*args, **given):
        every = {name: value for name, value in defaults.items() if type(value) in types} | given
        return function(
            *args, **{name: types.get(type(value), lambda v: v)(value) for name, value in every.items()}
        )

    return called


@pytest.fixture
def fail_at(monkeypatch):
    """Call `what` instead of the backward pass that has this number, from 0, of those to come."""
    real = steps._backward

    def at(number, what):
        calls = iter(range(10**6))

        def backward(*args):
            return what() if next(calls) == number else real(*args)

        monkeypatch.setattr(steps, "_backward", backward)

    return at


@each
def test_the_pipeline_stays_as_it_is_and_the_edit_is_put_on_and_taken_off_to_the_bit(
    pipe, edits, method, tmp_path
):
    unet = pipe.unet
    unet.train()
    unet.conv_in.requires_grad_(False)
    hook = unet.mid_block.register_forward_hook(lambda *args: None)
    handed = weights(pipe), modes(pipe)
    try:
        edit = edits(method)
        assert equal(weights(pipe), handed[0])
        assert modes(pipe) == handed[1]
    finally:
        hook.remove()
        unet.conv_in.requires_grad_(True)
        unet.eval()
    assert edit.changes and all(tensor.isfinite().all() for tensor in tensors(edit).values())
    assert edit.targets == ("cat",) and len(edit.details["losses"]) == 4
    edit.save(tmp_path / "edit.safetensors")
    read = Edit.load(tmp_path / "edit.safetensors")
    assert same(read, edit) and read.to_dict() == edit.to_dict()
    json.dumps(edit.to_dict(), allow_nan=False)
    applied = []
    for of in (edit, read):
        with of.on(pipe):
            applied.append(weights(pipe))
        assert equal(weights(pipe), handed[0])
    assert equal(*applied) and not equal(applied[0], handed[0])


@each
def test_stopped_twice_and_taken_up_again_it_gives_the_same_result(pipe, edits, method, tmp_path, fail_at):
    def interrupt():
        raise KeyboardInterrupt

    handed = weights(pipe), modes(pipe)
    how = {"checkpoint": tmp_path, "checkpoint_every": 2}
    fail_at(3, lambda: torch.tensor(torch.nan))
    with pytest.raises(ValueError, match=r"learning_rate: got .* step 3 has a loss of nan"):
        METHODS[method](pipe, **how)
    assert len(load_file(tmp_path / NAME)["losses"]) == 2
    with pytest.raises(ValueError, match=f"learning_rate was {RATE}, is 0.02"):
        METHODS[method](pipe, **how, learning_rate=0.02)
    fail_at(1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        METHODS[method](pipe, **how)
    assert equal(weights(pipe), handed[0]) and modes(pipe) == handed[1]
    fail_at(2, interrupt)  # as two of four steps are left, it is not reached
    edit = METHODS[method](pipe, **how)
    assert same(edit, edits(method)) and edit.details["losses"] == edits(method).details["losses"]


@each
def test_the_seed_decides_and_the_rows_of_a_pass_do_not(pipe, method):
    how = {"steps": 2, "batch_size": 2}
    together = METHODS[method](pipe, **how)
    assert not same(together, METHODS[method](pipe, **how, seed=1))
    two, one = tensors(together), tensors(METHODS[method](pipe, **how, rows=1))
    assert two.keys() == one.keys()
    apart = torch.cat([(value - one[name]).abs().flatten() for name, value in two.items()])
    # Adam makes steps of the sign of a gradient, also of one that is nearly 0
    assert apart.quantile(0.99) < 1e-2 * RATE


@each
def test_two_concepts_compose(pipe, edits, method):
    first, second = edits(method), METHODS[method](pipe, "dog", steps=1)
    with Edit.compose([first, second]).on(pipe):
        together = weights(pipe)
    with first.on(pipe):
        moved = second.rebased(pipe)
        with moved.on(pipe):
            assert all(
                torch.allclose(weight, together[name], atol=1e-6) for name, weight in weights(pipe).items()
            )


@each
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_every_family_can_be_trained_and_settings_are_plain_data_whatever_numbers_came(
    families, method, family, monkeypatch
):
    name = method.partition(",")[0]
    monkeypatch.setitem(globals(), name, numpys(globals()[name]))
    edit = METHODS[method](families[family], steps=1)
    assert edit.changes and all(tensor.isfinite().all() for tensor in tensors(edit).values())
    assert json.loads(json.dumps(edit.settings)) == edit.settings


@each
def test_what_the_model_does_not_know_is_refused(pipe, method, monkeypatch):
    monkeypatch.setattr(known, "answers", lambda model, texts, **_: [1.0] * len(texts))
    with pytest.raises(ValueError, match="the model does not know 'cat'"):
        METHODS[method](pipe, allow_unknown=False)
    with pytest.raises(ValueError, match="concepts: got"):
        METHODS[method](pipe, [])


def learn(folder: Path, *, main: bool = True) -> None:
    """With as many rows as two processes are, and with one, of which the second process has none."""
    pipe, found = tiny_pipeline("sd1").to(torch.float64), {}
    for rows in (2, 1):
        edit = esd(pipe, "cat", **TINY | {"batch_size": rows, "pending": 2, "steps": 2 * rows})
        named = {"losses": torch.tensor(edit.details["losses"]), **tensors(edit)}
        found |= {f"{rows} {name}": value for name, value in named.items()}
    if main:
        save_file(found, folder / "edit.safetensors")


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    learn(tmp_path / "one")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_trained import learn\n"
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
    one, two = (load_file(tmp_path / name / "edit.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert not {name for name in one if not torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-5)}
