"""Load Student on every kind of model: what the file says is what is sampled."""

import pytest
import torch
from turbodistill.core.schedule import trailing_timesteps
from turbodistill.core.student import load_student

pytestmark = [pytest.mark.host, pytest.mark.newest]


def loaded(graph, model, choice, strength=1.0):
    return graph.add("TurboDistillLoadStudent", model=model, student=choice, strength=strength)


def as_the_student(graph, base, student, positive, latent, seed=0):
    """The base model, sampled with the student's sigmas and sampler."""
    sigmas = graph.add("TurboDistillScheduler", model=student, steps=1, denoise=1.0)
    sampler = graph.add("TurboDistillSampler", model=student)
    return graph.custom(base, positive, latent, sigmas, sampler, seed)


@pytest.fixture
def choice(comfyui, checkpoints, trained, saved):
    """A checkpoint's short name -> a LoRA student of it: its choice in Load Student, and the file's student here."""
    read = []

    def make(name, **settings):
        denoiser, file = checkpoints[name].denoiser, f"{name}_student.safetensors"
        if denoiser is None:
            return saved(name, file=file), None
        student = trained(denoiser, **settings)
        made = saved(name, student, file, prediction=student.prediction, timesteps=(student.start_timestep,))
        student, _, warning = load_student(comfyui.base / "models" / made, denoiser)
        assert not warning
        read.append(student)
        return made, student

    yield make
    for student in read:
        student.release()


@pytest.mark.share
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl_v"])
def test_a_student_gives_the_numbers_of_python(
    comfyui, graph, synthetic, checkpoints, choice, condition, noise, gap, name, steps
):
    base, positive, latent = synthetic(name)
    file, student = choice(name)
    model = loaded(graph, base, file)
    outputs = graph.sample(model, positive, latent, seed=5, steps=steps), graph.sample(base, positive, latent, seed=5)
    found, plain = comfyui.latents(graph, *outputs)
    with student.merged():
        expected = student.generate(noise(5, *found.shape), condition(name), steps) / checkpoints[name].scale
    assert gap(found, expected) < 1e-4 < 0.1 < gap(plain, expected)


@pytest.mark.parametrize("name", ["sd15", "sdxl_v"])
def test_a_student_of_guidance_alone_is_for_any_sampler(
    comfyui, graph, synthetic, checkpoints, trained, saved, condition, noise, gap, name
):
    """In its own number of steps where one is asked for; KSampler makes nearly the same, with any loader of LoRAs."""
    denoiser, timesteps = checkpoints[name].denoiser, tuple(trailing_timesteps(10))
    made = trained(denoiser)
    file = saved(name, made, f"{name}_alone.safetensors", guidance_only=True, timesteps=timesteps)
    base, positive, latent = synthetic(name)
    model = loaded(graph, base, file)
    lora = graph.add("LoraLoaderModelOnly", model=base, lora_name=file.removeprefix("loras/"), strength_model=1.0)
    options = {"positive": positive, "negative": positive, "latent_image": latent, "seed": 5, "steps": 10, "cfg": 1.0}
    options |= {"sampler_name": "euler", "scheduler": "sgm_uniform", "denoise": 1.0}
    by_others = [graph.add("KSampler", model=each, **options) for each in (model[0], lora, base)]
    ours = graph.sample(model, positive, latent, seed=5, steps=1)
    found, with_student, with_lora, plain = comfyui.latents(graph, ours, *by_others)
    student, _, warning = load_student(comfyui.base / "models" / file, denoiser)
    with student.merged():
        expected = student.generate(noise(5, *found.shape), condition(name)) / checkpoints[name].scale
    student.release()
    assert warning == "" and gap(found, expected) < 1e-3
    assert torch.equal(with_student, with_lora)
    assert gap(with_student, expected) < 0.1 < gap(plain, expected)


@pytest.mark.parametrize("name", ["demo", "sd15", "sdxl", "sd3"])
def test_strength_leads_from_the_base_to_the_student(comfyui, graph, demo, synthetic, choice, gap, name):
    _, positive, latent = demo[:3] if name == "demo" else synthetic(name)
    base = demo.base if name == "demo" else graph.add("CheckpointLoaderSimple", ckpt_name=f"{name}.safetensors")[0]
    file = "the demo model's student (built in)" if name == "demo" else choice(name)[0]
    models = [loaded(graph, base, file, strength) for strength in (0.0, 0.5, 1.0)]
    made = [graph.sample(model, positive, latent) for model in models]
    none, half, whole, expected = comfyui.latents(
        graph, *made, as_the_student(graph, base, models[0], positive, latent)
    )
    assert torch.equal(none, expected)
    assert gap(half, none) > 0.01 and gap(whole, none) > 0.01 and gap(whole, half) > 0.01
    assert whole.isfinite().all()


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_lora_is_patched_as_by_core_s_loader(comfyui, graph, synthetic, choice, name):
    base, positive, latent = synthetic(name)
    file = choice(name)[0]
    model = loaded(graph, base, file, 0.5)
    lora = file.removeprefix("loras/")
    theirs = graph.add("LoraLoaderModelOnly", model=base, lora_name=lora, strength_model=0.5)
    made = graph.sample(model, positive, latent), as_the_student(graph, theirs, model, positive, latent)
    found, expected = comfyui.latents(graph, *made)
    assert torch.equal(found, expected)


def test_another_lora_goes_with_it_and_the_base_is_known_for_itself(comfyui, graph, synthetic, choice, gap):
    base, positive, latent = synthetic("sd15")
    file = choice("sd15")[0]
    student = loaded(graph, base, file)
    (alone,) = comfyui.latents(graph, graph.sample(student, positive, latent))  # now the base's weights are patched
    style = {"lora_name": file.removeprefix("loras/"), "strength_model": 0.5}  # any LoRA will do
    before = loaded(graph, graph.add("LoraLoaderModelOnly", model=base, **style), file)
    after = graph.add("LoraLoaderModelOnly", model=student, **style)
    made = [graph.sample(model, positive, latent) for model in (before, after)]
    first, second = comfyui.latents(graph, *made)
    assert gap(first, second) < 1e-4 and gap(first, alone) > 0.1
    assert comfyui.text(graph, before[1]).startswith("One-step student of sd15")  # no warning of another base


def test_a_student_that_reads_x0_at_its_own_timestep(
    comfyui, graph, synthetic, checkpoints, choice, condition, noise, gap
):
    base, positive, latent = synthetic("sd15")
    file, student = choice("sd15", prediction="x0", start_timestep=399)
    (found,) = comfyui.latents(graph, graph.sample(loaded(graph, base, file), positive, latent, seed=5, steps=2))
    with student.merged():
        expected = student.generate(noise(5, *found.shape), condition("sd15"), 2) / checkpoints["sd15"].scale
    assert gap(found, expected) < 1e-4


def test_a_full_student_takes_the_base_s_place(
    comfyui, graph, synthetic, checkpoints, trained, saved, condition, noise, gap
):
    student = trained(checkpoints["sd15"].denoiser, rank=0)
    with torch.no_grad():
        for weight in student.backbone.parameters():
            weight.mul_(0.9)
    student.backbone.half().float()  # as the file keeps it
    file = saved("sd15", student, "sd15_full_student.safetensors", kind="full", rank=0, alpha=0.0)
    base, positive, latent = synthetic("sd15")
    models = [loaded(graph, base, file, strength) for strength in (0.0, 1.0)]
    made = [graph.sample(model, positive, latent, seed=5) for model in models]
    none, found, plain = comfyui.latents(graph, *made, as_the_student(graph, base, models[0], positive, latent, seed=5))
    expected = student.generate(noise(5, *found.shape), condition("sd15")) / checkpoints["sd15"].scale
    assert gap(found, expected) < 1e-4 < 0.01 < gap(none, expected)
    assert torch.equal(none, plain)


def test_the_card_is_told_and_another_base_warned_of(comfyui, graph, synthetic, checkpoints, trained, saved):
    student = trained(checkpoints["sd15"].denoiser)
    base, _, _ = synthetic("sd15")
    right = saved("sd15", student, "right.safetensors")
    words = comfyui.text(graph, loaded(graph, base, right)[1])
    assert words.startswith("Few-step student of sd15, a LoRA of rank 4") and "timestep 999" in words
    wrong = saved("sd15", student, "wrong.safetensors", base_model="another", base_hash="0" * 16)
    warning, _, card = comfyui.text(graph, loaded(graph, base, wrong)[1]).partition("\n")
    assert warning.startswith("wrong.safetensors was made for another (0000000000000000)")
    assert warning in comfyui.log.read_text() and card.startswith("Few-step student of another")
