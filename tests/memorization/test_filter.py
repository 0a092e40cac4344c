"""The training filter against the detector, a batch filtered by hand, and training loops of every kind."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from pumice import models, testbed
from pumice.memorization.engine import initial_noise
from pumice.memorization.filter import FilteredBatch, filter_batch, threshold_table
from pumice.memorization.threshold import threshold_at
from pumice.models import NoiseSchedule
from pumice.testbed import tiny_pipeline, world

PROMPTS = ["a red cat", "a photo of a dog in the city", "house", "a painting of the sea"]
T = torch.tensor([981, 500, 1, 250])

NOTHING = torch.zeros(1, 1, 3)  # the toy's empty prompt
SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.001, 1000).double(), 1.0, "epsilon", {})


class Toy(nn.Module):
    """epsilon = W x + e, so that |d| is the norm of the prompt's embedding."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x, t, embeds):
        return torch.einsum("ij,bjhw->bihw", self.weight, x) + embeds.mean(1)[:, :, None, None]


def toy_batch(seed, pulls):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(pulls), 3, 1, 1, generator=generator)
    embeds = torch.tensor(pulls)[:, None, None] * torch.tensor([1.0, 0, 0])
    return x, torch.full((len(pulls),), 500), embeds


def batch_of(family="sd1"):
    """A training batch of four pairs, as a loop has it when it calls the filter."""
    pipe = tiny_pipeline(family)
    model = models.load(pipe)
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 4, *model.latent_shape(), generator=generator)
    with torch.no_grad():
        embeds, uncond = model.encode_prompt(PROMPTS), model.unconditional()
    arguments = {
        "denoiser": pipe.unet,
        "noisy_latents": model.add_noise(clean, noise, T),
        "timesteps": T,
        "prompt_embeds": embeds.embeds,
        "uncond_embeds": uncond.embeds,
        "schedule": model.schedule,
    }
    if embeds.pooled is not None:
        time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 4)
        arguments["added_cond_kwargs"] = {"text_embeds": embeds.pooled, "time_ids": time_ids}
        arguments["uncond_pooled"] = uncond.pooled
    return model, arguments, model.schedule.target(clean, noise, T)


def predicted(arguments):
    return arguments["denoiser"](
        arguments["noisy_latents"], arguments["timesteps"], arguments["prompt_embeds"]
    ).sample


def gradients(module):
    found = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    return found


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@torch.no_grad()
def test_magnitudes_are_those_of_two_noise_predictions(family):
    model, arguments, _ = batch_of(family)
    x = arguments["noisy_latents"]
    cond, uncond = (
        torch.cat([model.predict_noise(x[i : i + 1], T[i : i + 1], e[i % len(e)]) for i in range(4)]).double()
        for e in (model.encode_prompt(PROMPTS), model.unconditional())
    )
    expected = (cond - uncond).flatten(1).norm(dim=1)
    found = filter_batch(threshold=float(expected[1]) + 1e-4, **arguments)
    torch.testing.assert_close(found.magnitudes.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.keep, expected <= expected[1])
    prediction = model.predict(x, T, model.encode_prompt(PROMPTS))
    given = filter_batch(threshold=1.0, prediction=prediction, **arguments)
    assert torch.equal(given.magnitudes, found.magnitudes), "the loop's own prediction says the same"


def test_a_threshold_is_a_number_a_table_or_a_function():
    _, arguments, _ = batch_of()
    magnitudes = filter_batch(threshold=1.0, **arguments).magnitudes
    table = torch.full((1000,), float("inf"))
    table[T] = magnitudes * torch.tensor([1.1, 0.9, 1.0, 1.1])
    expected = [True, False, False, True]  # it is dropped at the threshold itself
    for threshold in (table, lambda t: table[t]):
        assert filter_batch(threshold=threshold, **arguments).keep.tolist() == expected
    assert filter_batch(threshold=float("inf"), **arguments).keep.all()


def test_loss_and_gradient_are_those_of_a_batch_filtered_by_hand():
    _, arguments, target = batch_of()
    unet = arguments["denoiser"]
    weights = torch.tensor([0.3, 5.0, 1.2, 0.7])  # as Min-SNR has them: one a pair, of the whole batch
    magnitudes = filter_batch(threshold=1.0, **arguments).magnitudes
    prediction = predicted(arguments)
    filtered = filter_batch(threshold=float(magnitudes.median()) + 1e-4, prediction=prediction, **arguments)
    assert filtered.keep.sum() == 2 and not filtered.empty
    loss = filtered.mean(F.mse_loss(prediction, target, reduction="none") * weights.reshape(4, 1, 1, 1))
    loss.backward()
    found = gradients(unet)

    kept = filtered.keep.nonzero().flatten()
    for name in ("noisy_latents", "timesteps", "prompt_embeds"):
        arguments[name] = arguments[name][kept]
    each = F.mse_loss(predicted(arguments), target[kept], reduction="none").mean((1, 2, 3)) * weights[kept]
    each.mean().backward()
    assert loss.item() == pytest.approx(each.mean().item(), rel=1e-5)
    for ours, theirs in zip(found, gradients(unet), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_all_kept_is_the_plain_mean():
    losses = torch.rand(5, 4, 8, 8, dtype=torch.float64)
    filtered = FilteredBatch(torch.ones(5, dtype=torch.bool), torch.zeros(5))
    torch.testing.assert_close(filtered.mean(losses), losses.mean())
    torch.testing.assert_close(filtered.mean(losses.mean((1, 2, 3))), losses.mean())


def test_nothing_kept_is_a_zero_that_reaches_every_weight():
    _, arguments, target = batch_of()
    prediction = predicted(arguments)
    filtered = filter_batch(threshold=1e-9, prediction=prediction, **arguments)
    assert filtered.empty
    loss = filtered.mean(F.mse_loss(prediction, target, reduction="none"))
    assert loss.item() == 0
    loss.backward()
    assert all(not gradient.any() for gradient in gradients(arguments["denoiser"]))


def test_a_batch_of_no_pairs():
    toy = Toy()
    x, t, embeds = (part[:0] for part in toy_batch(0, [1.0]))
    prediction = toy(x, t, embeds)
    filtered = filter_batch(toy, x, t, embeds, NOTHING, 2.0, schedule=SCHEDULE, prediction=prediction)
    assert filtered.empty and filtered.keep.shape == filtered.magnitudes.shape == (0,)
    loss = filtered.mean(prediction.square())
    loss.backward()
    assert loss.item() == 0 and not gradients(toy)[0].any()


def test_a_diverged_pair_shows_in_the_loss():
    _, arguments, target = batch_of()
    arguments["noisy_latents"][2] = float("nan")
    prediction = predicted(arguments)
    filtered = filter_batch(threshold=1e9, prediction=prediction, **arguments)
    assert filtered.keep.all() and filtered.magnitudes.isnan().tolist() == [False, False, True, False]
    assert filtered.mean(F.mse_loss(prediction, target, reduction="none")).isnan()


@pytest.mark.parametrize("first", ["filter", "loop"])
def test_under_autocast_the_loop_still_learns(first):
    """Weights that autocast casts and caches without gradient must not reach the loop's own forward."""
    _, arguments, target = batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        if first == "filter":
            filtered = filter_batch(threshold=1e9, **arguments)
            prediction = predicted(arguments)
        else:
            prediction = predicted(arguments)
            filtered = filter_batch(threshold=1e9, prediction=prediction, **arguments)
        loss = filtered.mean(F.mse_loss(prediction.float(), target, reduction="none"))
    loss.backward()
    assert filtered.magnitudes.dtype == torch.float32
    assert all(gradient.any() for gradient in gradients(arguments["denoiser"]))


def test_leaves_the_loops_graph_and_modes_alone():
    _, arguments, _ = batch_of()
    unet = arguments["denoiser"].train()
    unet.conv_in.requires_grad_(False)
    filtered = filter_batch(threshold=1.0, **arguments)
    assert unet.training and not unet.conv_in.weight.requires_grad and unet.conv_out.weight.requires_grad
    assert not filtered.magnitudes.requires_grad and torch.is_grad_enabled()


def test_gradient_accumulation_with_a_batch_of_which_nothing_is_kept():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    toy = Toy()
    module, optimizer = accelerator.prepare(toy, torch.optim.SGD(toy.parameters(), lr=1.0))
    for seed, pulls in ((0, [3.0, 4.0]), (1, [0.5, 5.0])):
        with accelerator.accumulate(module):
            x, t, embeds = toy_batch(seed, pulls)
            prediction = module(x, t, embeds)
            filtered = filter_batch(
                module, x, t, embeds, NOTHING, 2.0, schedule=SCHEDULE, prediction=prediction
            )
            assert filtered.magnitudes.tolist() == pytest.approx(pulls)
            accelerator.backward(filtered.mean(prediction.square()))
            optimizer.step()
            optimizer.zero_grad()

    expected = Toy()
    x, t, embeds = (part[:1] for part in toy_batch(1, [0.5, 5.0]))
    (expected(x, t, embeds).square().mean() / 2).backward()
    torch.testing.assert_close(toy.weight, expected.weight.data - expected.weight.grad)


WORKER = """
import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pumice.memorization.filter import filter_batch
from pumice.models import NoiseSchedule

rank, meeting, pulls = json.loads(sys.argv[1])
NOTHING = torch.zeros(1, 1, 3)
SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.001, 1000).double(), 1.0, "epsilon", {})
{toy}
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
module = DistributedDataParallel(Toy())
optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
for step, batch in enumerate(pulls):
    x, t, embeds = toy_batch(10 * step + rank, batch)
    prediction = module(x, t, embeds)
    filtered = filter_batch(module, x, t, embeds, NOTHING, 2.0, schedule=SCHEDULE, prediction=prediction)
    filtered.mean(prediction.square()).backward()
    optimizer.step()
    optimizer.zero_grad()
dist.destroy_process_group()
print(module.module.weight.flatten().tolist())
"""


def test_processes_that_keep_nothing_do_not_hold_up_the_others(tmp_path):
    """Two processes; in the first step one of them keeps nothing, in the second the other, then both."""
    pulls = ([[0.5, 1.0], [3.0, 4.0], [3.0, 3.0]], [[3.0, 4.0], [0.5, 5.0], [4.0, 4.0]])
    code = WORKER.replace("{toy}", inspect.getsource(Toy) + "\n" + inspect.getsource(toy_batch))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps([rank, str(tmp_path / "meeting"), pulls[rank]])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        results = [worker.communicate(timeout=600) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], results
    found = [json.loads(out) for out, _ in results]
    assert found[0] == found[1]

    toy = Toy()
    for step in range(3):  # the mean of the two processes' gradients
        for rank in (0, 1):
            x, t, embeds = toy_batch(10 * step + rank, pulls[rank][step])
            keep = torch.tensor(pulls[rank][step]) < 2
            if keep.any():
                (toy(x, t, embeds)[keep].square().mean() / 2).backward()
        toy.weight.data -= 0.5 * (0 if toy.weight.grad is None else toy.weight.grad)
        toy.weight.grad = None
    torch.testing.assert_close(torch.tensor(found[0]), toy.weight.data.flatten())


# --- The threshold table


def test_the_table_is_a_quantile_at_the_samplers_timesteps_and_linear_between():
    pipe = tiny_pipeline("sd2")
    table = threshold_table(pipe, PROMPTS[:3], fpr=0.4, seeds=[2, 5], num_inference_steps=5, batch_size=3)
    assert table.shape == (1000,) and table.dtype == torch.float32 and not table.is_inference()

    model = models.load(pipe)
    steps = model.schedule.timesteps(5)
    assert steps.tolist() == [801, 601, 401, 201, 1]
    magnitudes = []
    with torch.no_grad():
        uncond = model.unconditional().embeds
        for prompt in PROMPTS[:3]:
            x = initial_noise([2, 5], model.latent_shape())
            embeds, row = model.encode_prompt(prompt), []
            pipe.scheduler.set_timesteps(5)
            for t in steps:
                found = filter_batch(
                    pipe.unet, x, t.expand(2), embeds.embeds.expand(2, -1, -1), uncond, 1.0,
                    schedule=model.schedule,
                )  # fmt: skip
                row.append(found.magnitudes)
                x = pipe.scheduler.step(model.predict(x, t, embeds), t, x).prev_sample
            magnitudes.append(torch.stack(row, 1))
    limits = [threshold_at(0.4, column) for column in torch.cat(magnitudes).unbind(1)]
    torch.testing.assert_close(table[steps], torch.tensor(limits), rtol=1e-4, atol=1e-5)
    assert table[701].item() == pytest.approx((limits[0] + limits[1]) / 2, rel=1e-3)
    assert table[0] == table[1] and table[999] == table[801]


def test_on_the_trained_model_it_keeps_what_is_new_and_drops_what_is_memorized():
    pipe = testbed.load()
    model = models.load(pipe)
    table = threshold_table(pipe, world.fresh_captions(10, seed=77), seeds=1, num_inference_steps=25)

    def kept(pairs, timestep):
        with torch.no_grad():
            x0 = model.encode_image(torch.from_numpy(np.stack([picture for picture, _ in pairs])))
            embeds = model.encode_prompt([caption for _, caption in pairs]).embeds
        t = torch.full((len(pairs),), timestep)
        x = model.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(3)), t)
        uncond = model.unconditional().embeds
        found = filter_batch(pipe.unet, x, t, embeds, uncond, table, schedule=model.schedule)
        return found.keep.float().mean().item()

    new = [
        (picture, caption) for caption, picture, _ in (world.training_picture(10**8 + i) for i in range(16))
    ]
    known = [(it.picture, it.caption) for it in (world.memorized(i) for i in range(16))]
    for timestep in (961, 1):
        assert kept(known, timestep) <= 0.2
    for timestep in (961, 801, 501, 201, 1):
        assert kept(new, timestep) >= 0.7, timestep


def test_the_model_is_left_as_it_was():
    pipe = tiny_pipeline("sd1")
    pipe.unet.train()
    threshold_table(pipe, PROMPTS, seeds=1, num_inference_steps=2)
    assert pipe.unet.training and all(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_results_are_plain_data():
    _, arguments, _ = batch_of()
    found = filter_batch(threshold=1.0, **arguments)
    data = json.loads(json.dumps(found.to_dict()))
    assert torch.equal(torch.tensor(data["magnitudes"]), found.magnitudes)
    assert data["keep"] == found.keep.tolist()


BAD = {
    "one timestep for all": ({"timesteps": torch.tensor(5)}, ValueError, "timesteps: got shape"),
    "too few timesteps": ({"timesteps": T[:3]}, ValueError, r"timesteps: got shape \(3,\), expected \(4,\)"),
    "timesteps that are not integers": ({"timesteps": T.float()}, TypeError, "timesteps: got torch.float32"),
    "timesteps out of range": ({"timesteps": T + 500}, ValueError, "timesteps: got values from"),
    "flat embeddings": ({"uncond_embeds": torch.zeros(77, 32)}, ValueError, "uncond_embeds: got shape"),
    "two empty prompts": ({"uncond_embeds": torch.zeros(2, 77, 32)}, ValueError, "uncond_embeds: got shape"),
    "a threshold of zero": ({"threshold": 0.0}, ValueError, "threshold: got 0.0"),
    "a threshold of NaN": ({"threshold": float("nan")}, ValueError, "threshold: got nan"),
    "a table of another length": ({"threshold": torch.ones(50)}, ValueError, r"threshold: got shape \(50,\)"),
    "a function of another length": ({"threshold": lambda t: t[:2]}, ValueError, "threshold: returned shape"),
    "another prediction": ({"prediction": torch.zeros(4, 4, 2, 2)}, ValueError, "prediction: got shape"),
    "a pooled embedding alone": ({"uncond_pooled": torch.zeros(1, 40)}, ValueError, "uncond_pooled: got one"),
    "none where one is needed": (
        {"added_cond_kwargs": {"text_embeds": torch.zeros(4, 40)}}, ValueError, "uncond_pooled: got none",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_names_the_argument(change, error, message):
    _, arguments, _ = batch_of()
    with pytest.raises(error, match=message) as caught:
        filter_batch(**{"threshold": 1.0} | arguments | change)
    assert "\n" not in str(caught.value)


BAD_TABLE = {
    "no prompts": ({"prompts": []}, ValueError, "prompts: got an empty list"),
    "a prompt that is none": ({"prompts": [3]}, TypeError, "prompts: got a int"),
    "no seeds": ({"seeds": 0}, ValueError, "seeds: got 0"),
    "a rate of one": ({"fpr": 1.0}, ValueError, "fpr: got 1.0"),
    "no steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps: got 0"),
    "rows of none": ({"batch_size": 0}, ValueError, "batch_size: got 0"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_TABLE.values(), ids=BAD_TABLE.keys())
def test_bad_input_of_the_table(change, error, message):
    with pytest.raises(error, match=message) as caught:
        threshold_table(tiny_pipeline("sd1"), **{"prompts": "a cat", "num_inference_steps": 2} | change)
    assert "\n" not in str(caught.value)


def test_reduced_losses_are_refused():
    filtered = FilteredBatch(torch.ones(3, dtype=torch.bool), torch.zeros(3))
    for losses in (torch.tensor(0.5), torch.rand(2)):
        with pytest.raises(ValueError, match="losses: got shape") as caught:
            filtered.mean(losses)
        assert "\n" not in str(caught.value)
