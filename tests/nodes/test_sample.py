"""Sampling through ComfyUI: noise, mask, prompts and cfg, and the nodes on top."""

import dataclasses
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from turbodistill.core.families import FAMILIES, SamplingRecipe
from turbodistill.core.sampling import sample_euler, sample_few_step, sigmas_of, trailing_sigmas
from turbodistill.core.schedule import DiscreteSchedule, trailing_timesteps

SD = DiscreteSchedule()
TOP = SD.sigma_max
ONE_STEP = trailing_sigmas(SD, 1)


def draws(seed, count):
    """Noise (count, 4, 8, 8), row by row from one generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(4, 8, 8, generator=generator) for _ in range(count)])


def empty(batch=1, **more):
    return {"samples": torch.zeros(batch, 4, 8, 8)} | more


def prompt(toys, value=None):
    """A CONDITIONING of one prompt, as CLIP Text Encode gives it."""
    return [[toys.cond(1, value).context, {"pooled_output": None}]]


class Silent(nn.Module):
    """A network that finds no noise, so that x0 is the input itself; it keeps the prompts that it hears."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def forward(self, x, time, context):
        self.heard.append(float(context.flatten()[0]))
        return torch.zeros_like(x)


@pytest.fixture
def silent(toys, model_of):
    return model_of(toys.Toy(Silent(), SD, "eps"))


class Recorder:
    """A sampler that notes what reaches it, reports every step and gives the noise back."""

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar):
        self.guider, self.sigmas, self.seed, self.mask = guider, sigmas, extra_args["seed"], denoise_mask
        self.latent, self.quiet = latent_image, disable_pbar
        for i in range(len(sigmas) - 1):
            callback(i, noise, noise, len(sigmas) - 1)
        return noise


# --- host.fitting ---


def wide(comfyui, channels, ratio=8):
    """Another model's kind of latents."""
    form = {"latent_channels": channels, "spacial_downscale_ratio": ratio}
    return type("Wide", (comfyui.LatentFormat,), form)()


def test_an_empty_latent_takes_the_model_s_channels(nodes, comfyui, silent):
    silent.add_object_patch("latent_format", wide(comfyui, 16))
    assert nodes.patcher.fitting(silent, empty(2)).shape == (2, 16, 8, 8)
    with pytest.raises(ValueError, match="has 4 channels, this model wants 16: encode the picture with the VAE"):
        nodes.patcher.fitting(silent, {"samples": torch.ones(2, 4, 8, 8)})


def test_an_empty_latent_takes_the_model_s_factor(nodes, comfyui, silent):
    """Flux.2 has 16 pixels for each: 64 pixels of an empty latent's 8 are 4 of its own."""
    silent.add_object_patch("latent_format", wide(comfyui, 128, 16))
    latent = empty(2, downscale_ratio_spacial=8)
    assert nodes.patcher.fitting(silent, latent).shape == (2, 128, 4, 4)
    assert nodes.patcher.fitting(silent, empty(2)).shape == (2, 128, 8, 8)  # of whose factor nothing is said


def test_older_cores_take_no_factor(nodes, comfyui, silent, monkeypatch):
    monkeypatch.setattr(
        nodes.patcher.comfy.sample, "fix_empty_latent_channels", lambda model, latent_image: latent_image
    )
    assert nodes.patcher.fitting(silent, empty(2, downscale_ratio_spacial=16)).shape == (2, 4, 8, 8)


def test_a_latent_with_the_model_s_channels_stays(nodes, silent):
    latent = torch.ones(2, 4, 8, 8)
    assert nodes.patcher.fitting(silent, {"samples": latent, "downscale_ratio_spacial": 16}) is latent


def test_what_was_sampled_is_no_empty_latent_any_more(nodes, toys, silent):
    made = nodes.patcher.sample(
        silent, prompt(toys), empty(downscale_ratio_spacial=8, batch_index=[0]), 0, ONE_STEP, Recorder()
    )
    assert made.keys() == {"samples", "batch_index"}


# --- host.sample ---


@pytest.mark.parametrize("seed", [0, 7, 0xFFFFFFFFFFFFFFFF])
def test_the_seed_is_the_noise(nodes, toys, silent, seed):
    recorder = Recorder()
    out = nodes.patcher.sample(silent, prompt(toys), empty(2), seed, ONE_STEP, recorder)
    expected = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(out["samples"], expected) and recorder.seed == seed


@pytest.mark.parametrize("index", [[0, 1, 2], [2, 0], [1, 1]])
def test_a_batch_s_items_keep_their_noise_alone(nodes, toys, silent, index):
    latent = empty(len(index), batch_index=index)
    out = nodes.patcher.sample(silent, prompt(toys), latent, 7, ONE_STEP, Recorder())
    assert torch.equal(out["samples"], draws(7, 3)[index])


def test_what_else_the_latent_holds_goes_on(nodes, toys, silent):
    latent = empty(1, batch_index=[3], noise_mask=torch.ones(1, 64, 64), made_by="LoadLatent")
    before = latent["samples"]
    out = nodes.patcher.sample(silent, prompt(toys), latent, 7, ONE_STEP, Recorder())
    assert out | {"samples": before} == latent and out is not latent
    assert latent["samples"] is before and (before == 0).all()


def test_a_picture_s_latent_is_scaled_in_and_out(nodes, comfyui, toys, model_of):
    half = type("Half", (comfyui.LatentFormat,), {"scale_factor": 0.5})()
    model = model_of(toys.Toy(Silent(), SD, "eps"), latent_format=half)
    recorder, picture = Recorder(), torch.ones(1, 4, 8, 8)
    out = nodes.patcher.sample(model, prompt(toys), {"samples": picture}, 7, ONE_STEP, recorder)
    assert torch.equal(recorder.latent, picture * 0.5) and torch.equal(out["samples"], draws(7, 1) / 0.5)


def test_the_mask_reaches_the_sampler_or_none(nodes, toys, silent):
    mask = torch.zeros(1, 1, 64, 64)  # in pixels
    mask[..., 32:] = 1
    with_mask, without = Recorder(), Recorder()
    nodes.patcher.sample(silent, prompt(toys), empty(noise_mask=mask), 7, ONE_STEP, with_mask)
    nodes.patcher.sample(silent, prompt(toys), empty(), 7, ONE_STEP, without)
    assert with_mask.mask.shape == (1, 4, 8, 8) and with_mask.mask.mean() == 0.5
    assert without.mask is None


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_what_the_mask_protects_stays(nodes, toys, model_of, prediction):
    toy, picture, mask = toys.conv(prediction), toys.picture(1), torch.zeros(1, 8, 8)
    mask[..., 4:] = 1
    latent = {"samples": picture, "noise_mask": mask}
    model = model_of(toy)
    sigmas = trailing_sigmas(toy.schedule, 2)
    out = nodes.patcher.sample(model, prompt(toys), latent, 7, sigmas, nodes.patcher.FewStep(SamplingRecipe("")))[
        "samples"
    ]
    assert torch.allclose(out[..., :4], picture[..., :4], atol=1e-5)
    assert not torch.allclose(out[..., 4:], picture[..., 4:], atol=0.1)


@pytest.mark.parametrize(
    ("negative", "cfg", "heard"), [(None, 1.0, [1.0]), (-1.0, 1.0, [1.0]), (-1.0, 7.0, [-1.0, 1.0])]
)
def test_a_negative_is_asked_only_where_it_counts(nodes, toys, silent, negative, cfg, heard):
    against = negative and prompt(toys, negative)
    nodes.patcher.sample(
        silent, prompt(toys, 1.0), empty(), 7, ONE_STEP, nodes.patcher.FewStep(SamplingRecipe("")), against, cfg
    )
    assert sorted(silent.model.diffusion_model.heard) == heard


def test_without_a_negative_it_is_the_positive_at_cfg_1(nodes, toys, silent):
    """Which costs no pass; patches that ask for it (Self-Attention Guidance) find one."""
    recorder = Recorder()
    nodes.patcher.sample(silent, prompt(toys), empty(), 7, ONE_STEP, recorder)
    assert recorder.guider.conds.keys() == {"positive", "negative"} and recorder.guider.cfg == 1
    assert recorder.guider.conds["negative"] is recorder.guider.conds["positive"]
    nodes.patcher.sample(silent, prompt(toys), empty(), 7, ONE_STEP, recorder, prompt(toys), 7.5)
    assert recorder.guider.conds.keys() == {"positive", "negative"} and recorder.guider.cfg == 7.5


@torch.no_grad()
def test_cfg_leads_away_from_the_negative(nodes, toys, model_of):
    toy, positive, negative = toys.conv(), prompt(toys), prompt(toys)
    out = nodes.patcher.sample(
        model_of(toy),
        positive,
        empty(2),
        7,
        ONE_STEP,
        nodes.patcher.FewStep(SamplingRecipe("", exact=True)),
        negative,
        3,
    )
    x = draws(7, 2) * TOP
    for_, against = (toy(x, ONE_STEP[:1].expand(2), toys.Cond(c[0][0]).repeat(2)) for c in (positive, negative))
    assert torch.allclose(out["samples"], against + 3 * (for_ - against), atol=1e-3)


def test_every_step_is_previewed(nodes, toys, silent, monkeypatch):
    shown = []

    def prepare_callback(model, steps):
        shown.append((model, steps))
        return lambda step, x0, x, total: shown.append((step, total))

    monkeypatch.setattr(nodes.patcher.latent_preview, "prepare_callback", prepare_callback)
    nodes.patcher.sample(
        silent, prompt(toys), empty(), 7, trailing_sigmas(SD, 3), nodes.patcher.FewStep(SamplingRecipe(""))
    )
    assert shown == [(silent, 3), (0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_progress_bar_is_as_the_host_wants_it(nodes, toys, silent, monkeypatch, wanted):
    recorder = Recorder()
    monkeypatch.setattr(nodes.patcher.comfy.utils, "PROGRESS_BAR_ENABLED", wanted)
    nodes.patcher.sample(silent, prompt(toys), empty(), 7, ONE_STEP, recorder)
    assert recorder.quiet is not wanted


# --- the nodes ---


@pytest.fixture
def sampled(nodes):
    """One-Step Sample's latents (B, ...)."""

    def run(model, positive, latent, seed=7, steps=1, denoise=1.0, **more):
        inputs = {"positive": positive, "latent_image": latent, "seed": seed, "steps": steps, "denoise": denoise}
        return nodes.sample.OneStepSample.run(model=model, **inputs, **more)[0]["samples"]

    return run


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("prediction", "output"), [("eps", "inherit"), ("v", "inherit"), ("v", "x0"), ("flow", "inherit"), ("flow", "x0")]
)
def test_a_student_s_picture_is_the_trainer_s(
    nodes, toys, model_of, student_of, saved, sampled, prediction, output, rank, steps
):
    teacher, cond = toys.conv(prediction), toys.cond(1)
    student = student_of(teacher, rank, prediction=output)
    path = saved(student)
    tensors, card = nodes.load.read_student(path)
    expected = student.generate(draws(7, 2), cond.repeat(2), steps)
    student.release()
    model, _ = nodes.patcher.with_student(model_of(teacher), tensors, card, 1.0, path.name)
    found = sampled(model, [[cond.context, {}]], empty(2), steps=steps)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("steps", "made"), [(1, 9), (7, 9), (8, 8), (20, 20)])
@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_a_student_of_guidance_alone_is_sampled_by_euler_in_its_own_number_of_steps_or_more(
    nodes, toys, model_of, student_of, saved, sampled, caplog, prediction, steps, made
):
    teacher, cond = toys.conv(prediction), toys.cond(1)
    student = student_of(teacher)
    path = saved(student)
    tensors, card = nodes.load.read_student(path)
    card = replace(card, guidance_only=True, timesteps=tuple(trailing_timesteps(9)))
    sigmas = trailing_sigmas(teacher.schedule, made)
    x = teacher.schedule.add_noise(torch.zeros(2, 4, 8, 8), draws(7, 2), sigmas[:1])
    with torch.no_grad():
        expected = sample_euler(lambda x, s: student(x, s, cond.repeat(2)), x, sigmas)
    student.release()
    model, warning = nodes.patcher.with_student(model_of(teacher), tensors, card, 1.0, path.name)
    assert warning == ""
    found = sampled(model, [[cond.context, {}]], empty(2), steps=steps)
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()
    told = [f"student of toy is sampled as its base is: in 9 steps, not {steps}"] if made != steps else []
    assert [record.getMessage() for record in caplog.records] == told


def test_compare_says_in_how_many_steps_it_was_sampled(nodes, compared):
    recipe = SamplingRecipe("student of toy", steps=9, renoise=False, span=(8, 1000), ordinary=True)
    compared.made.student = nodes.patcher.with_sampling(compared.made.student, recipe)
    made = compared(student_steps=1)
    assert made.titles[1].startswith("student, 9 steps: ")
    assert len(made.student.model.diffusion_model.heard) == 9


@pytest.mark.parametrize("steps", [1, 4])
def test_item_k_of_a_batch_is_that_item_alone(nodes, toys, model_of, sampled, steps):
    model, positive = (
        nodes.patcher.with_sampling(model_of(toys.conv()), SamplingRecipe("student of toy")),
        prompt(toys),
    )
    batch = sampled(model, positive, empty(3, batch_index=[0, 1, 2]), steps=steps)
    for k in range(3):
        assert torch.allclose(sampled(model, positive, empty(1, batch_index=[k]), steps=steps)[0], batch[k], atol=1e-3)
    assert not torch.allclose(batch[0], batch[1], atol=0.1)


@pytest.mark.parametrize("prediction", ["eps", "flow"])
@torch.no_grad()
def test_denoise_begins_nearer_to_the_picture_even_in_one_step(toys, model_of, sampled, prediction):
    toy, cond, picture = toys.conv(prediction), toys.cond(1), toys.picture(2)
    sigmas = sigmas_of(toy.schedule, [599])
    x = toy.schedule.add_noise(picture, draws(7, 2), sigmas[:1].expand(2))
    expected = toy(x, sigmas[:1].expand(2), cond.repeat(2))
    found = sampled(model_of(toy), [[cond.context, {}]], {"samples": picture}, denoise=0.6)
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("denoise", [1.0, 0.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_scheduler_and_sampler_together_are_one_step_sample(nodes, toys, model_of, sampled, name, denoise):
    model, positive = nodes.patcher.with_sampling(model_of(toys.conv()), FAMILIES[name].for_steps(4)), prompt(toys)
    latent = {"samples": toys.picture(2)}
    sigmas = nodes.sample.OneStepScheduler.run(model=model, steps=4, denoise=denoise)[0]
    sampler = nodes.sample.OneStepSampler.run(model=model)[0]
    assert isinstance(sampler, nodes.patcher.comfy.samplers.KSAMPLER) and len(sigmas) == 5
    by_parts = nodes.patcher.sample(model, positive, latent, 7, sigmas, sampler)["samples"]
    assert torch.equal(by_parts, sampled(model, positive, latent, steps=4, denoise=denoise))


@pytest.mark.parametrize("steps", [1, 4])
@torch.no_grad()
def test_a_plain_turbo_is_sampled_as_add_says(toys, model_of, sampled, steps):
    toy, cond = toys.conv(), toys.cond(1)
    sigmas = trailing_sigmas(SD, steps)
    expected = sample_few_step(
        lambda x, s: toy(x, s, cond.repeat(2)), draws(7, 2) * (1 + TOP**2) ** 0.5, sigmas, schedule=SD
    )
    assert torch.allclose(sampled(model_of(toy), [[cond.context, {}]], empty(2), steps=steps), expected, atol=1e-3)


@pytest.mark.parametrize(("steps", "denoise", "words"), [(9, 1.0, "give 1 to 8"), (1, 0.0, r"give 0\.01 to 1")])
def test_what_cannot_be_sampled_is_told(nodes, silent, steps, denoise, words):
    with pytest.raises(ValueError, match=words):
        nodes.sample.OneStepScheduler.run(model=silent, steps=steps, denoise=denoise)


# --- Compare ---


class Decoder:
    """A VAE whose pictures are latents, twice the size."""

    def __init__(self):
        self.decoded = []

    def decode(self, samples):
        self.decoded.append(samples)
        return samples[:, :3].movedim(1, -1).repeat_interleave(2, 1).repeat_interleave(2, 2)


@pytest.fixture
def compared(nodes, toys, silent, model_of, monkeypatch):
    """Compare on two models: teacher, student and VAE, what was loaded and written, and the output."""
    made = type("Made", (), {"titles": [], "loaded": [], "guidance": [], "vae": Decoder()})
    made.teacher, made.student = silent, model_of(toys.Toy(Silent(), SD, "eps"))
    draw, sample = nodes.sample.side_by_side, nodes.patcher.sample

    def noted(model, positive, latent, seed, sigmas, sampler, negative=None, cfg=1.0):
        made.guidance.append((negative is not None, cfg))
        return sample(model, positive, latent, seed, sigmas, sampler, negative, cfg)

    monkeypatch.setattr(nodes.patcher, "sample", noted)
    monkeypatch.setattr(
        nodes.sample, "side_by_side", lambda columns: made.titles.extend(t for t, _ in columns) or draw(columns)
    )
    monkeypatch.setattr(nodes.patcher.comfy.model_management, "load_models_gpu", made.loaded.extend)

    def run(**changes):
        inputs = {
            "teacher": made.teacher,
            "student": made.student,
            "vae": made.vae,
            "positive": prompt(toys, 1.0),
            "negative": prompt(toys, -1.0),
            "latent_image": empty(2),
            "seed": 7,
            "teacher_steps": 3,
            "teacher_cfg": 7.5,
            "student_steps": 1,
        }
        made.output = nodes.sample.Compare.run(**inputs | changes)
        return made

    run.made = made
    return run


def test_teacher_and_student_begin_with_the_same_noise(compared):
    made = compared()
    assert made.loaded == [made.teacher, made.student]
    # Neither network changes its input, and a model from elsewhere begins as ComfyUI's own samplers do.
    for samples in made.vae.decoded:
        assert torch.allclose(samples, draws(7, 2) * (1 + TOP**2) ** 0.5, atol=1e-3)


def test_the_negative_and_cfg_are_the_teacher_s_alone(compared):
    made = compared()
    assert sorted(made.teacher.model.diffusion_model.heard) == [-1.0] * 3 + [1.0] * 3
    assert made.student.model.diffusion_model.heard == [1.0]
    assert made.guidance == [(True, 7.5), (False, 1.0)]


@pytest.mark.parametrize(
    ("changes", "titles"),
    [
        ({}, ["teacher, 3 steps, cfg 7.5", "student, 1 step"]),
        ({"teacher_cfg": 1.0, "student_steps": 4}, ["teacher, 3 steps, cfg 1", "student, 4 steps"]),
    ],
)
def test_the_titles_say_steps_and_seconds(compared, changes, titles):
    made = compared(**changes)
    assert [t.rpartition(": ")[0] for t in made.titles] == titles
    assert len(made.student.model.diffusion_model.heard) == changes.get("student_steps", 1)  # and it is so
    for title in made.titles:
        number, unit = title.rpartition(": ")[2].split(" ")
        assert unit == "s" and 0 <= float(number) < 60


def test_the_sheet_is_the_output_and_its_preview(nodes, compared):
    output = compared().output
    assert len(output.args) == 1 and output[0].shape == (2, 16 * 16 + 26, 2 * 16 * 16 + 8, 3)
    assert output.ui.image is output[0] and issubclass(output.ui.cls, nodes.sample.Compare)


def test_a_student_of_another_clip_skip_is_remarked_on(nodes, toys, model_of, student_of, saved, caplog, monkeypatch):
    teacher = toys.conv()
    model = model_of(teacher)
    tensors, card = nodes.load.read_student(saved(student_of(teacher, 4)))
    card = dataclasses.replace(card, clip_skip=2, architecture="stable-diffusion-v1", base_hash="")
    monkeypatch.setattr(type(model.model.model_config), "architecture", "stable-diffusion-v1")
    student, _ = nodes.patcher.with_student(model, tensors, card, 1.0, "fox.safetensors")
    last = {"class_type": "CLIPSetLastLayer", "inputs": {"clip": ["1", 1], "stop_at_clip_layer": -2}}
    other = "trained with clip skip 2, and is sampled with 1"
    for between, said in ((last, []), ({"inputs": {"clip": ["1", 1]}}, [other])):
        graph = {"1": {"inputs": {}}, "2": between, "3": {"inputs": {"clip": ["2", 0]}}}
        graph["4"] = {"inputs": {"positive": ["3", 0]}}
        caplog.clear()
        inputs = {"positive": prompt(toys), "latent_image": empty(), "seed": 7, "steps": 1, "denoise": 1.0}
        nodes.sample.OneStepSample.run(prompt=graph, unique_id="4", model=student, **inputs)
        found = [r.message for r in caplog.records if "clip skip" in r.message]
        assert len(found) == len(said) and all(words in message for words, message in zip(said, found, strict=True))


# --- the negative prompt ---


class NAGuidance:
    """As ComfyUI's node: `told` is what its patch is told of the rows, None where the network never calls it."""

    told = None

    @staticmethod
    def define_schema():
        inputs = [SimpleNamespace(id="model"), SimpleNamespace(id="nag_scale", default=5.0)]
        return SimpleNamespace(inputs=inputs)

    @classmethod
    def execute(cls, model, nag_scale):
        assert nag_scale == 5.0
        patched = model.clone()
        patched.model_options["disable_cfg1_optimization"] = True

        def set_model_attn1_output_patch(patch):
            if cls.told is not None:
                patch(torch.ones(1), {"cond_or_uncond": cls.told})

        patched.set_model_attn1_output_patch = set_model_attn1_output_patch
        return SimpleNamespace(args=(patched,))


def test_a_negative_needs_a_comfyui_that_has_nag(toys, silent, sampled):
    with pytest.raises(ValueError, match=r"too old for: update ComfyUI to 0\.15 or later, or disconnect negative"):
        sampled(silent, prompt(toys), empty(), negative=prompt(toys))


@pytest.mark.parametrize(
    ("told", "words"),
    [([1, 0], ""), ([0], "did not fit into one pass"), (None, "has no place for Normalized Attention Guidance")],
)
def test_a_negative_that_does_nothing_is_refused(toys, silent, sampled, monkeypatch, told, words):
    module = SimpleNamespace(NAGuidance=type("Told", (NAGuidance,), {"told": told}))
    monkeypatch.setitem(sys.modules, "comfy_extras", ModuleType("comfy_extras"))
    monkeypatch.setitem(sys.modules, "comfy_extras.nodes_nag", module)
    if words:
        with pytest.raises(ValueError, match=words):
            sampled(silent, prompt(toys), empty(), negative=prompt(toys))
    else:
        sampled(silent, prompt(toys), empty(), negative=prompt(toys))
        assert "disable_cfg1_optimization" not in silent.model_options


def test_a_model_that_comes_through_a_node_for_negatives_keeps_it(toys, silent, sampled):
    silent.model_options["disable_cfg1_optimization"] = True
    sampled(silent, prompt(toys), empty(), negative=prompt(toys))
