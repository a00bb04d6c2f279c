"""`turbodistill sample`, and what it makes of LoRAs and checkpoints of others, beside diffusers' own schedulers."""

import copy
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from turbodistill.app import cli
from turbodistill.core.denoiser import Guidance, guided
from turbodistill.core.families import recognise
from turbodistill.core.sampling import seeded_noise
from turbodistill.generate.few_step import check_steps, few_step_model, open_file
from turbodistill.generate.recipe import FewStepModel
from turbodistill.generate.sample import sample
from turbodistill.trainer.checkpoint.errors import ModelError
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.prompts import drawn
from turbodistill.trainer.pipeline.load import load_model

PROMPTS = ["a fox", "an owl"]
LCM, LIGHTNING = "lcm-lora-sdv1-5", "Hyper-SD15-4steps-lora"


@pytest.fixture(scope="module")
def model(pipeline_folder):
    return load_model(pipeline_folder)


@pytest.fixture
def pairs(model, others):
    return others.pairs(model.denoiser.backbone, size=0.1)


@pytest.fixture
def lora(pairs, others, tmp_path):
    return lambda name, style="kohya", **more: others.write(tmp_path / f"{name}.safetensors", pairs, style, **more)


def ours(model, path, steps, fresh=None):
    made, remarks = few_step_model(model, open_file(path))
    assert not remarks
    cond = model.encode_text(PROMPTS)
    with made.merged():
        return made.generate(seeded_noise([1, 2], model.latent_shape), cond, steps, fresh=fresh)


@torch.no_grad()
def theirs(model, others, pairs, scheduler, steps, generator=None):
    """A scheduler of diffusers' on a UNet with the LoRA in its weights, without guidance."""
    unet = others.changed(copy.deepcopy(model.denoiser.backbone), others.deltas(pairs))
    scheduler.set_timesteps(steps)
    latents = seeded_noise([1, 2], model.latent_shape) * scheduler.init_noise_sigma
    context = model.encode_text(PROMPTS).context
    more = {} if generator is None else {"generator": generator}
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(latents, t), t, context).sample
        latents = scheduler.step(output, t, latents, **more).prev_sample
    return latents


def near(found, wanted, most):
    assert (found - wanted).abs().max() / wanted.abs().max() < most


@pytest.mark.parametrize("steps", [1, 2])
def test_lcm_is_diffusers_lcm_from_the_same_noise(model, others, pairs, lora, steps):
    from diffusers import LCMScheduler

    scheduler = LCMScheduler.from_config(model.pipe.scheduler.config)
    generator, shape = torch.Generator().manual_seed(5), (2, *model.latent_shape)
    wanted = theirs(model, others, pairs, scheduler, steps, generator)
    again = torch.Generator().manual_seed(5)
    found = ours(model, lora(LCM), steps, lambda _: torch.randn(shape, generator=again))
    near(found, wanted, 1e-4)
    plain = theirs(model, others, {}, scheduler, steps, torch.Generator().manual_seed(5))
    assert (plain - wanted).abs().max() / wanted.abs().max() > 0.05


@pytest.mark.parametrize("steps", [2, 4])
def test_lightning_and_its_kin_are_diffusers_ddim_trailing(model, others, pairs, lora, steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(
        model.pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    name = f"Hyper-SD15-{steps}steps-lora"  # the same step as SDXL-Lightning's, of this architecture
    near(ours(model, lora(name), steps), theirs(model, others, pairs, scheduler, steps), 1e-4)


def test_lightning_in_one_step_puts_out_x0(model, lora, pairs, others):
    recipe = recognise("sdxl_lightning_1step_x0")
    made = FewStepModel(model.denoiser, recipe)
    noise, cond = seeded_noise([1, 2], model.latent_shape), model.encode_text(PROMPTS)
    with torch.no_grad():
        wanted = model.denoiser.backbone(noise, 999, cond.context).sample
    near(made.generate(noise, cond, 1), wanted, 1e-5)


def test_nitrofusion_s_network_is_told_another_timestep_and_nothing_else_changes(model):
    made = FewStepModel(model.denoiser, recognise("NitroFusion-realism"))
    noise, cond = seeded_noise([1, 2], model.latent_shape), model.encode_text(PROMPTS)
    with torch.no_grad():
        output = model.denoiser.backbone(noise, 249, cond.context).sample
    sigma = model.denoiser.schedule.sigma(999)
    near(made.generate(noise, cond, 1), (1 + sigma**2).sqrt() * noise - sigma * output, 1e-4)
    assert float(model.denoiser.schedule.timestep(sigma)) == pytest.approx(999, abs=1e-2)


def test_a_recipe_s_guidance_is_taken_against_the_empty_prompt(model, lora):
    path = lora("Hyper-SD15-8steps-CFG-lora")
    made, _ = few_step_model(model, open_file(path))
    assert made.recipe.cfg == 5
    noise, cond = seeded_noise([1, 2], model.latent_shape), model.encode_text(PROMPTS)
    empty = model.encode_text(["", ""])
    x, sigma = 14 * noise, torch.tensor([14.0, 14.0])
    with made.merged(), torch.no_grad():
        wanted = made(x, sigma, empty) + 5 * (made(x, sigma, cond) - made(x, sigma, empty))
        near(guided(made, x, sigma, cond, made.uncond, Guidance(made.recipe.cfg)), wanted, 1e-4)
        assert not torch.allclose(made.generate(noise, cond, 8), made.generate(noise, empty, 8))


def test_peft_loads_the_same_file_and_makes_the_same(model, others, tmp_path):
    pytest.importorskip("peft", reason="needs peft: pip install 'turbodistill[test]'")
    from diffusers import DDIMScheduler

    # One alpha for all: diffusers 0.42 gives an attention's layer the most frequent one.
    pairs = others.pairs(model.denoiser.backbone, alphas=(4.0,), size=0.1)
    path = others.write(tmp_path / "Hyper-SD15-2steps-lora.safetensors", pairs)
    pipe = type(model.pipe)(**{**model.pipe.components, "unet": copy.deepcopy(model.denoiser.backbone)})
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(str(path))
        noise = seeded_noise([1, 2], model.latent_shape)
        wanted = pipe(PROMPTS, num_inference_steps=2, guidance_scale=0, latents=noise, output_type="latent").images
    near(ours(model, path, 2), wanted, 1e-4)


def test_the_model_is_as_before_when_a_batch_is_made(model, lora):
    before = {n: (p.data_ptr(), p.clone()) for n, p in model.denoiser.backbone.named_parameters()}
    ours(model, lora(LCM), 2)
    for name, p in model.denoiser.backbone.named_parameters():
        assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1])


def test_less_strength_keeps_more_of_the_picture(model, lora):
    made, _ = few_step_model(model, open_file(lora(LCM)))
    noise, cond = seeded_noise([1, 2], model.latent_shape), model.encode_text(PROMPTS)
    picture = model.encode_images(torch.rand(1, 3, *model.resolution))
    far = [
        (made.generate(noise, cond, 2, picture, strength) - picture).abs().mean().item() for strength in (0.05, 0.5, 1)
    ]
    assert far[0] < far[1] < far[2]
    assert made.sigmas(2, 0.5)[0] == pytest.approx(float(model.denoiser.schedule.sigma(499)), rel=1e-4)


def test_more_steps_than_it_was_made_for_are_refused_and_fewer_told():
    recipe = recognise("dmd2_sdxl_4step_lora")
    assert check_steps(recipe, None) == (4, []) and check_steps(recipe, 4) == (4, [])
    assert check_steps(recipe, 2) == (2, ["steps is 2: DMD2 was made for 4 steps."])
    with pytest.raises(
        ModelError, match=r"steps is 8: DMD2 was made for at most 4 steps.* Give 4, or leave it out \(4\)"
    ):
        check_steps(recipe, 8)


def test_a_family_of_other_models_is_refused(model, lora):
    other = copy.copy(model)
    other.architecture = "stable-diffusion-v1"
    with pytest.raises(
        ModelError, match=r"is of SDXL-Lightning, which is made for another kind of model: this is tiny-sd"
    ):
        few_step_model(other, open_file(lora("sdxl_lightning_4step_lora")))


def run(capsys, out, *arguments, model=None, code=0):
    """The pictures that the command has written, and what it said on stderr."""
    flags = [*(["--model", model] if model else []), "--out", out, *arguments]
    assert cli.main(["sample", *map(str, flags)]) == code
    return sorted(out.glob("*.png")), capsys.readouterr().err


def test_the_command_takes_prompt_files_and_foreign_loras(pipeline_folder, lora, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("an owl\n# nothing\n{a|a} cat\n")
    pictures, said = run(
        capsys, tmp_path / "o", "a fox", "--prompts", tmp_path / "p.txt", "--student", lora(LCM), model=pipeline_folder
    )
    assert [p.name for p in pictures] == ["00001-a-fox-0.png", "00002-an-owl-1.png", "00003-a-cat-2.png"]
    about = Image.open(pictures[0]).text["parameters"].splitlines()[1]
    assert about == (
        "Steps: 4, Sampler: ADD few-step, CFG scale: 1, Seed: 0, Size: 16x16, ADD model: LCM, "
        f"ADD timesteps: 999 749 499 249, Model: tiny-sd, Student: {LCM}.safetensors"
    )
    assert said == ""


def test_the_command_takes_wildcards_and_the_prompts_of_its_own_pictures(pipeline_folder, lora, tmp_path, capsys):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "colour.txt").write_text("red\n")
    flags = ("--student", lora(LCM), "--wildcards", tmp_path / "words")
    pictures, _ = run(capsys, tmp_path / "o", "a __colour__ fox", *flags, model=pipeline_folder)
    assert [p.name for p in pictures] == ["00001-a-red-fox-0.png"]
    flags = ("--student", lora(LCM), "--prompts", tmp_path / "o", "--seed", "3")
    pictures, said = run(capsys, tmp_path / "again", *flags, model=pipeline_folder)
    assert [p.name for p in pictures] == ["00001-a-red-fox-3.png"]
    assert "1 prompts of 1 pictures" in said and "4 steps, guidance 1, sampler ADD few-step" in said


@pytest.mark.parametrize("flags", [(), ("--student", "none")])
def test_a_checkpoint_that_is_a_few_step_model_needs_no_student(pipeline_folder, tmp_path, capsys, flags):
    folder = shutil.copytree(pipeline_folder, tmp_path / "LCM_Dreamshaper_v7")
    (picture,), _ = run(capsys, tmp_path / "o", "a fox", *flags, model=folder)
    about = Image.open(picture).text["parameters"]
    assert "Steps: 4, " in about and "ADD model: LCM, " in about and about.endswith("Model: LCM_Dreamshaper_v7")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_precision_and_size_are_as_asked_for(pipeline_folder, lora, tmp_path, capsys, dtype):
    flags = ("a fox", "--student", lora(LCM), "--size", "32x16", "--steps", "2", "--dtype", dtype)
    (picture,), _ = run(capsys, tmp_path / "o", *flags, model=pipeline_folder)
    assert Image.open(picture).size == (32, 16)


def test_a_picture_is_begun_from_with_its_strength(pipeline_folder, lora, tmp_path, capsys):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.jpg")
    flags = ("a fox", "--student", lora(LCM), "--image", tmp_path / "red.jpg", "--strength", "0.4", "--steps", "2")
    (picture,), _ = run(capsys, tmp_path / "o", *flags, model=pipeline_folder)
    about = Image.open(picture).text["parameters"]
    assert "Denoising strength: 0.4" in about and "ADD timesteps: 399 199" in about


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--student", "LORA", "--steps", "8"], "steps is 8: "),
        (["--student", "LORA", "--strength", "0.5"], "--strength belongs to --image"),
        (["--student", "LORA", "--image", "gone.png"], "gone.png does not exist"),
        (["--student", "LORA", "--image", __file__], "it is empty or no picture"),
        (["--student", "LORA", "--device", "xpu"], "device 'xpu' cannot be used ("),
        (["--student", "LORA", "--prompts", "gone.txt"], "gone.txt does not exist"),
        (["--student", "style"], "is a LoRA, but of no few-step family that is known by its name. Call the file"),
        (["--student", "styleLightningMix"], "'lightning' is in its name, beside words that are no known family's"),
        ([], "tiny-sd by itself is of no few-step family"),
        (["--student", "DORA"], "holds DoRA"),
    ],
)
def test_what_cannot_be_is_one_line(pipeline_folder, lora, tmp_path, capsys, flags, told, others, pairs):
    named = {"LORA": lambda: lora(LIGHTNING), "DORA": lambda: lora(LCM, more={"x.dora_scale": torch.ones(1)})}
    if flags[:1] == ["--student"]:
        flags = ["--student", named.get(flags[1], lambda: lora(flags[1]))(), *flags[2:]]
    pictures, said = run(capsys, tmp_path / "o", "a fox", *flags, model=pipeline_folder, code=1)
    assert not pictures and len(said.splitlines()) == 1 and told in said


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--size", "100x64"], "width is 100: give a multiple of 8 from 16 to 4096"),
        (["--size", "64"], "--size: is '64': give WIDTHxHEIGHT"),
        (["--size", "64x100000"], "height is 100000"),
        (["--strength", "0"], "--strength: is '0': give 0.01 to 1"),
        (["--strength", "1.5"], "--strength: is '1.5': give 0.01 to 1"),
        (["--device", "tpu"], "--device: is 'tpu': give cpu, cuda, mps or xpu"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_what_can_never_be_is_told_before_a_model_is_loaded(capsys, flags, told):
    with pytest.raises(SystemExit):
        cli.main(["sample", "a fox", *flags])
    assert told in capsys.readouterr().err


def test_nobody_s_noise_is_on_stderr(pipeline_folder, lora, tmp_path):
    code = "import sys; from turbodistill.app.cli import main; sys.exit(main())"
    flags = ["--model", pipeline_folder, "--student", lora(LCM), "--out", tmp_path / "o"]
    done = subprocess.run(
        [sys.executable, "-c", code, "sample", "a fox", *map(str, flags)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.strip().endswith("00001-a-fox-0.png")


def test_of_a_lora_layers_that_are_left_out_are_told(pipeline_folder, lora, tmp_path, capsys):
    path = lora(LCM)
    half = torch.zeros(2, 2)
    more = {f"lora_te_layer.lora_{part}.weight": half.clone() for part in ("down", "up")}
    save_file(load_file(path) | more, path)
    _, said = run(capsys, tmp_path / "o", "a fox", "--student", path, model=pipeline_folder)
    assert said == f"turbodistill: {LCM}.safetensors changes 1 layers of text encoders, too: they are left out.\n"


def test_of_choices_each_picture_s_seed_draws_one_in_python_too(model, lora):
    made, _ = few_step_model(model, open_file(lora(LCM)))
    several = list(sample(model, made, ["{a fox|an owl}"] * 6, seed=2, steps=1))
    words = drawn(["{a fox|an owl}"] * 6, range(2, 8))
    assert set(words) == {"a fox", "an owl"}
    for picture, plain in zip(several, sample(model, made, words, seed=2, steps=1), strict=True):
        assert torch.equal(picture, plain)
    with pytest.raises(DataError, match="has a brace without its other one"):
        next(sample(model, made, ["a {red"]))


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"seed": -1}, "seed is -1: give a whole number, 0 to 9223372036854775807"),
        ({"seed": 1.5}, "seed is 1.5: give a whole number"),
        ({"seed": 2**63 - 1}, "of 2 pictures the last would have one above 9223372036854775807"),
        ({"steps": "2"}, "steps is '2': give a whole number, 1 to 1000"),
        ({"steps": True}, "steps is True: give a whole number"),
        ({"steps": 1001}, "steps is 1001: give a whole number, 1 to 1000"),
        ({"batch_size": 0}, "batch_size is 0: give a whole number, 1 or more"),
    ],
)
def test_numbers_that_cannot_be_are_told_in_python(model, numbers, told):
    with pytest.raises(ValueError, match=told):
        next(sample(model, FewStepModel(model.denoiser, recognise(LCM)), PROMPTS, **numbers))
