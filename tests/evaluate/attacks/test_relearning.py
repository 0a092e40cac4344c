"""Each edited model is fine-tuned for itself, and what was hidden comes back."""

import pytest
import torch

from pumice import erase, models, testbed
from pumice.evaluate.attacks import relearning
from pumice.models.draws import Draws
from pumice.testbed import world

pytestmark = pytest.mark.filterwarnings("ignore::pumice.erase.ErasureWarning")  # of tiny random models

FEW = {"steps": 3, "batch_size": 2, "seeds": 2, "num_inference_steps": 2, "label": "x"}


def always(images):
    return [["x"]] * len(images)


@pytest.fixture(scope="module")
def found(tiny, edit, text_edit, pictures):
    edits = {"uce": edit, "text": text_edit}
    return relearning(
        tiny, edits, pictures, "a ball", classify=always, learning_rate=1e-3, checkpoints=(0, 2), **FEW
    )


def test_the_first_loss_is_that_of_the_edited_model(tiny, edit, text_edit, found):
    """The denoising loss of one picture, by hand."""
    model = models.load(tiny)
    pictures = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    few = FEW | {"steps": 1, "batch_size": 1}
    edits = {"uce": edit, "text": text_edit}
    found = relearning(tiny, edits, pictures, "a ball", classify=always, **few)
    draws = Draws(["0/training/0"], model.device)
    x0 = model.encode_image(pictures, noise=draws.normal([0], "posterior", 0, model.latent_shape(32, 32)))
    t = draws.integers([0], "timestep", 0, model.schedule.num_train_timesteps)
    noise = draws.normal([0], "noise", 0, x0.shape[1:])
    losses = {}
    with torch.no_grad():
        for name, one in {"none": None, **edits}.items():
            if one:
                one.apply(tiny)
            output = model.predict(model.add_noise(x0, noise, t), t, model.encode_prompt("a ball"))
            losses[name] = (output - model.schedule.target(x0, noise, t)).square().mean()
            if one:
                one.remove(tiny)
            torch.testing.assert_close(found.losses[name][0, 0], losses[name])
    assert len({float(loss) for loss in losses.values()}) == 3


def test_it_is_measured_at_each_checkpoint_and_learns_in_between(found):
    assert [(row["name"], row["steps"]) for row in found.rows] == [
        (name, steps) for name in ("none", "uce", "text") for steps in (0, 2, 3)
    ]
    assert all(row["success"] == 100 and row["esr"] == 0 for row in found.rows)
    assert all(loss.shape == (1, 3) and loss.isfinite().all() for loss in found.losses.values())
    assert {shown.shape for shown in found.pictures.values()} == {(2, 3, 32, 32)}
    assert found.table()[0] == ("edit", "0 steps", "2 steps", "3 steps")


def test_one_edit_does_not_depend_on_the_others(tiny, edit, pictures, found):
    before = models.fingerprint(models.load(tiny))
    again = relearning(tiny, edit, pictures, "a ball", classify=always, learning_rate=1e-3, **FEW)
    assert torch.equal(again.losses["uce"], found.losses["uce"])
    assert torch.equal(again.pictures["uce"], found.pictures["uce"])
    assert models.fingerprint(models.load(tiny)) == before
    assert all(p.requires_grad and p.grad is None for p in tiny.unet.parameters())


def test_a_lora_learns_too(tiny, edit, pictures):
    found = relearning(
        tiny, edit, pictures, "a ball", classify=always, mode="lora", rank=2, learning_rate=1e-2, **FEW
    )
    assert found.losses["uce"].isfinite().all()


def test_a_closed_form_edit_of_the_trained_model_gives_the_concept_back():
    pipe = testbed.load()
    edit = erase.uce(pipe, "ball", tokens="all", guide="box")
    scenes = zip(["red", "blue", "yellow", "pink"], world.PLACES, strict=False)
    shown = pipe(
        [world.full_caption(world.Scene("ball", *scene)) for scene in scenes],
        num_inference_steps=10,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(900 + i) for i in range(4)],
        output_type="pt",
    ).images
    found = relearning(
        pipe,
        edit,
        shown,
        "a ball",
        label="ball",
        classify=testbed.classifier("object"),
        steps=20,
        learning_rate=3e-4,
        seeds=6,
        num_inference_steps=10,
        guidance_scale=5.0,
    )
    (_, before), (_, after) = found.curve("uce")
    assert before <= 35 and after >= 65


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"checkpoints": [9]}, ValueError, r"checkpoints: got \[9\], expected 0 to steps = 3"),
        ({"learning_rate": 0}, ValueError, "learning_rate: got 0"),
        ({"mode": "half"}, ValueError, "mode: got 'half'"),
        ({"seeds": [1, 1]}, ValueError, "seeds: got"),
        ({"prompt": 1}, TypeError, "prompt: got a int"),
        ({"images": torch.zeros(3, 32, 32)}, ValueError, "images: got shape"),
        ({"classify": lambda images: []}, ValueError, "classify: returned 0 lists"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(tiny, pictures, change, error, message):
    good = {"images": pictures, "prompt": "a ball", "classify": always} | FEW | change
    with pytest.raises(error, match=message) as caught:
        relearning(tiny, {}, good.pop("images"), good.pop("prompt"), **good)
    assert "\n" not in str(caught.value)
