"""Our samplers over the hosts' own, against core's samplers on the same toy."""

import functools

import pytest
import torch
from safetensors.torch import save_file
from turbodistill.core.card import CardError, StudentCard
from turbodistill.core.denoiser import Cond, Guided
from turbodistill.core.families import FAMILIES
from turbodistill.core.sampling import sample_euler, sample_few_step, sigmas_of
from turbodistill.core.schedule import expand

ONE, FEW = "ADD 1-step", "ADD few-step"
KINDS = ("a1111", "forge", "reforge")
PLACES = {"forge": "predictor", "reforge": "model_sampling"}


class Scene:
    """A host with a toy loaded, and what to sample it with."""

    def __init__(self, webui, host, model, toy, text):
        self.webui, self.host, self.model, self.toy, self.text = webui, host, model, toy, text
        self.ours = host.get("host_sampling")
        self.ours.register()

    def sampler(self, name=ONE):
        config = self.host.samplers.all_samplers_map[name]
        made = config.constructor(self.model)
        made.config = config
        return made

    def p(self, **given):
        return self.webui.Processing(**given)

    def txt2img(self, x, name=ONE, p=None, **given):
        return self.sampler(name).sample(p or self.p(**given), x, self.text.context, None, image_conditioning=None)

    def img2img(self, x, noise, name=ONE, p=None, **given):
        return self.sampler(name).sample_img2img(p or self.p(**given), x, noise, self.text.context, None)

    def expected(self, x, timesteps, sampler=sample_few_step, model=None):
        """What core's sampler makes of noise x at these timesteps."""
        schedule = self.toy.schedule
        sigmas = sigmas_of(schedule, timesteps)
        more = {"schedule": schedule} if sampler is sample_few_step else {}
        return sampler(model or Guided(self.toy, self.text), sigmas[0] * x, sigmas, **more)

    @property
    def space(self):
        return getattr(self.model.forge_objects.unet.model, PLACES["forge" if self.kind == "forge" else "reforge"])


@pytest.fixture
def scene(webui, toys, tmp_path):
    """A host's short name and what the toy predicts -> the scene in it; all is taken away when the test ends."""
    entered = []

    def enter(kind="a1111", prediction="eps", file=None):
        toy = toys.conv(prediction)
        model = webui.Model(toy, file)
        if kind != "a1111":
            webui.forged(model, PLACES[kind])
        context = webui.installed(model, tmp_path, "a1111" if kind == "a1111" else "forge")
        made = Scene(webui, context.__enter__(), model, toy, Cond(torch.randn(2, 3, toys.TEXT)))
        made.kind = kind
        entered.append(context)
        return made

    yield enter
    for context in reversed(entered):
        context.__exit__(None, None, None)


@pytest.fixture
def student(tmp_path):
    """Puts a student's file among a scene's LoRAs, by name."""

    def put(scene, name="mine", prediction=None, timesteps=(999,), **more):
        base = scene.toy.prediction
        card = StudentCard("lora", "a base", "0" * 16, "sd", prediction or base, base, timesteps, 4.0, (64, 64), **more)
        path = tmp_path / f"{name}.safetensors"
        save_file({"weight": torch.zeros(1)}, path, card.to_metadata())
        entry = type("Entry", (), {"filename": str(path), "metadata": card.to_metadata()})
        scene.host.networks.available_networks[name] = entry
        scene.host.networks.available_network_aliases[name] = entry
        return {"extra_network_data": {"lora": [scene.webui.Parameters(name, "1")]}}

    return put


def test_registered_twice_they_are_there_once(scene):
    host = scene().host
    held = host.samplers.all_samplers
    host.get("host_sampling").register()
    assert [entry.name for entry in held] == ["DPM++ 2M", ONE, FEW]
    assert held is host.samplers.all_samplers
    assert host.samplers.all_samplers_map[ONE] is held[1]


def test_the_host_forgets_that_it_has_not_known_the_names(scene):
    made = scene()
    asked = functools.cache(lambda name: name if name in made.host.samplers.all_samplers_map else "DPM++ 2M")
    del made.host.samplers.all_samplers_map[ONE]
    made.host.samplers.get_sampler_and_scheduler = asked
    assert asked(ONE) == "DPM++ 2M"
    made.ours.register()
    assert asked(ONE) == ONE


@pytest.mark.parametrize(("name", "asked", "made"), [(ONE, 20, 1), (FEW, 3, 3), (FEW, 20, 8)])
def test_the_host_counts_the_passes_that_are_made(scene, name, asked, made):
    assert scene().host.samplers.all_samplers_map[name].total_steps(asked) == made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@torch.no_grad()
def test_one_step_is_the_model_s_x0_of_pure_noise(scene, toys, kind, prediction):
    made, x = scene(kind, prediction), toys.picture()
    found = made.txt2img(x, steps=20)
    assert torch.allclose(found, made.expected(x, [999]), atol=1e-4)
    assert len(made.model.told) == 1 and made.host.shared.state.seen == [0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@torch.no_grad()
def test_few_steps_are_core_s(scene, toys, kind, prediction):
    made, x = scene(kind, prediction), toys.picture()
    found = made.txt2img(x, FEW, steps=4)
    assert torch.allclose(found, made.expected(x, [999, 749, 499, 249]), atol=1e-3)
    assert made.host.shared.state.seen == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_batch_equals_its_rows(scene, toys, kind):
    made, x = scene(kind), toys.picture()
    both = made.txt2img(x, FEW, steps=4)
    for row in (0, 1):
        alone = scene(kind)
        alone.text = made.text.rows([row])
        assert torch.allclose(alone.txt2img(x[[row]], FEW, steps=4), both[[row]], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_family_of_euler_s_steps(scene, toys, kind):
    made, x = scene(kind), toys.picture()
    found = made.txt2img(x, FEW, steps=4, turbodistill_choice="SDXL-Lightning")
    assert torch.allclose(found, made.expected(x, [999, 749, 499, 249], sample_euler), atol=1e-3)


# --- reading ---


def read_as(toy, reading, x, sigma, cond):
    """x0 when the toy's output is read in another way, from the papers' formulas."""
    output, (alpha, s) = toy.output(x, sigma, cond), (expand(v, x) for v in toy.schedule.alpha_sigma(sigma))
    return {"x0": output, "eps": x - expand(sigma, x) * output, "v": alpha * alpha * x - s * output}[reading]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("base", "reading"), [("eps", "x0"), ("v", "x0"), ("v", "eps"), ("eps", "v")])
@torch.no_grad()
def test_the_output_is_read_as_the_student_puts_it_out(scene, student, toys, kind, base, reading):
    made, x = scene(kind, base), toys.picture()
    found = made.txt2img(x, FEW, steps=2, **student(made, prediction=reading))
    expected = made.expected(x, [999, 499], model=lambda x, sigma: read_as(made.toy, reading, x, sigma, made.text))
    assert torch.allclose(found, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_lcm_keeps_its_boundaries(scene, toys, kind):
    made, x, picture = scene(kind), toys.picture(), toys.picture()
    chosen = {"turbodistill_choice": "LCM", "denoising_strength": 0.001}
    sigma = made.toy.schedule.sigma(torch.zeros(2))
    noisy = picture + expand(sigma, x) * x
    # At timestep 0 the picture is the input, whatever the network puts out.
    assert torch.allclose(made.img2img(picture, x, **chosen), noisy, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_network_is_told_another_timestep(scene, toys, kind):
    made = scene(kind)
    made.txt2img(toys.picture(), turbodistill_choice="NitroFusion Realism")
    assert made.model.told[0].tolist() == [249, 249]  # 999 of 1000, a quarter of it
    made.txt2img(toys.picture())
    assert made.model.told[1].float().tolist() == pytest.approx([999, 999], abs=0.1)


@pytest.mark.parametrize("kind", ["forge", "reforge"])
@torch.no_grad()
def test_forge_s_model_is_as_it_was_even_after_a_failure(scene, toys, monkeypatch, kind):
    made = scene(kind)
    before = made.space
    made.txt2img(toys.picture(), turbodistill_choice="LCM")
    assert made.space is before
    monkeypatch.setattr(made.toy.backbone, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.txt2img(toys.picture(), turbodistill_choice="LCM")
    assert made.space is before and type(made.space).__name__ == "Predictor"


# --- image to image, masks, interrupts ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["eps", "flow"])
@pytest.mark.parametrize(("strength", "steps", "timesteps"), [(0.3, 1, [299]), (0.6, 2, [599, 299]), (1.0, 1, [999])])
@torch.no_grad()
def test_the_strength_sets_the_first_level(scene, toys, kind, prediction, strength, steps, timesteps):
    made, picture, noise = scene(kind, prediction), toys.picture(), toys.picture()
    p = made.p(steps=steps, denoising_strength=strength)
    found = made.img2img(picture, noise, FEW, p)
    schedule, sigmas = made.toy.schedule, sigmas_of(made.toy.schedule, timesteps)
    noisy = schedule.add_noise(picture, noise, sigmas[:1].expand(2))
    expected = sample_few_step(Guided(made.toy, made.text), noisy, sigmas, schedule=schedule)
    assert torch.allclose(found, expected, atol=1e-3)
    assert p.extra_generation_params["ADD timesteps"] == " ".join(map(str, timesteps))


def test_strength_nought_keeps_the_picture(scene, toys):
    picture = toys.picture()
    made = scene()
    assert made.img2img(picture, toys.picture(), denoising_strength=0.0) is picture
    assert not made.model.told


@torch.no_grad()
def test_image_to_image_takes_the_schedule_as_it_is_now(scene, toys):
    made, picture, noise = scene(), toys.picture(), toys.picture()
    sampler = made.sampler()
    made.model.zero_terminal = True  # the host does so after it has made the sampler
    p = made.p(denoising_strength=0.6)
    sampler.sample_img2img(p, picture, noise, made.text.context, None)
    assert sampler.levels[0] == pytest.approx(2 * float(made.toy.schedule.sigma(599)), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_not_masked_stays(scene, toys, kind):
    made, picture = scene(kind), toys.picture()
    mask = torch.zeros_like(picture)
    mask[..., 4:] = 1
    found = made.img2img(picture, toys.picture(), FEW, steps=3, denoising_strength=1.0, mask=mask, nmask=1 - mask)
    assert torch.equal(found[..., 4:], picture[..., 4:])
    assert not torch.allclose(found[..., :4], picture[..., :4], atol=0.1)


@torch.no_grad()
def test_an_interrupt_gives_what_there_is(scene, toys):
    made = scene()
    state = made.host.shared.state

    class Seen(list):
        def append(self, step):
            super().append(step)
            state.interrupted = step == 1

    state.seen = Seen()
    found = made.txt2img(toys.picture(), FEW, steps=4)
    assert state.seen == [0, 1] and found.shape == (2, 4, 8, 8)


# --- which model, and what is written ---


@torch.no_grad()
def test_a_student_in_the_prompt_is_sampled_as_its_card_says(scene, student, toys):
    made = scene()
    p = made.p(**student(made, timesteps=(799,)))
    made.txt2img(toys.picture(), p=p)
    assert p.extra_generation_params == {"ADD model": "student of a base", "ADD timesteps": "799"}
    assert p.comments == []


@torch.no_grad()
def test_in_the_second_pass_its_own_loras_count(scene, student, toys):
    made = scene()
    second = student(made, timesteps=(799,))["extra_network_data"]
    p = made.p(is_hr_pass=True, hr_extra_network_data=second, denoising_strength=0.5)
    made.img2img(toys.picture(), toys.picture(), p=p)
    assert p.extra_generation_params == {"Hires ADD timesteps": "399"}


@torch.no_grad()
def test_a_student_of_weight_nought_does_not_count(scene, student, toys):
    made = scene()
    student(made, timesteps=(799,))
    p = made.p(extra_network_data={"lora": [made.webui.Parameters("mine", "0")]})
    made.txt2img(toys.picture(), p=p)
    assert p.extra_generation_params["ADD timesteps"] == "999"


@torch.no_grad()
def test_the_loaded_checkpoint_counts(scene, toys, tmp_path):
    made = scene(file=tmp_path / "dmd2_sdxl_1step_unet_fp16.safetensors")
    shared = {}
    p = made.p(extra_generation_params=shared)  # as the cells of a plot
    made.txt2img(toys.picture(), p=p)
    assert p.extra_generation_params == {"ADD model": "DMD2", "ADD timesteps": "399"}
    assert shared == {}


@torch.no_grad()
def test_what_is_said_stands_below_the_picture(scene, toys):
    made = scene()
    p = made.p(steps=20, cfg_scale=7.0)
    made.txt2img(toys.picture(), p=p)
    assert p.comments == p.turbodistill_remarks
    assert [words.split(":")[0] for words in p.comments][::2] == ["ADD 1-step makes one pass", "cfg is 7"]
    assert p.comments[1].startswith("No student and no known one-step model")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_student_that_does_not_fit_is_told_or_refused(scene, student, toys, kind, tmp_path):
    made = scene(kind, file=tmp_path / "sibling.safetensors")
    student(made, "second")
    loras = {"lora": [made.webui.Parameters("mine", "0.7"), made.webui.Parameters("second", "1", "-1")]}
    student(made)
    p = made.p(extra_network_data=loras)
    made.txt2img(toys.picture(), FEW, p=p, steps=2)
    assert [words.split(":")[0] for words in p.turbodistill_remarks] == [
        "mine was made for a base, the loaded model is sibling.safetensors",
        "the weight of mine is 0.7",
        "second was made for a base, the loaded model is sibling.safetensors",
        "the weight of second is -1",
        "2 students are in the prompt (mine, second)",
    ]
    if kind != "reforge":  # which does not say what its model predicts
        with pytest.raises(CardError, match="mine was made for a model that predicts eps, the loaded one predicts v"):
            other = scene(kind, "v")
            other.toy.prediction = "eps"  # for the card
            other.txt2img(toys.picture(), **student(other))


@torch.no_grad()
def test_a_student_under_another_sampler_is_told_of(scene, student):
    made = scene()
    p = made.p(sampler_name="Euler", **student(made, timesteps=(999, 499)))
    made.ours.foreign(p)
    assert p.turbodistill_remarks == ["mine is a student: Euler is not made for it, take ADD few-step and CFG Scale 1."]
    plain = made.p(sampler_name="Euler")
    made.ours.foreign(plain)
    assert plain.comments == []
    alone = student(made, timesteps=tuple(range(999, 0, -63)), guidance_only=True)
    p = made.p(sampler_name="Euler", steps=20, cfg_scale=1.0, **alone)
    made.ours.foreign(p)
    assert p.comments == []
    p = made.p(sampler_name="Euler", steps=20, cfg_scale=7.0, **alone)
    made.ours.foreign(p)
    assert p.comments == ["cfg is 7: mine was made for 1, more burns the picture."]


def test_a_wrong_choice_is_an_error(scene, toys):
    with pytest.raises(ValueError, match="neither a LoRA here nor a family"):
        scene().txt2img(toys.picture(), turbodistill_choice="nonsense")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["eps", "flow"])
@torch.no_grad()
def test_a_student_begins_with_the_noise_it_learnt(scene, student, toys, kind, prediction):
    made, x = scene(kind, prediction), toys.picture()
    told = student(made)
    plain = made.txt2img(x, **told)
    made.host.shared.opts.sgm_noise_multiplier = True
    assert torch.allclose(made.txt2img(x, **told), plain, atol=1e-4)
    if prediction == "eps":  # others begin as the host is told to
        assert not torch.allclose(made.txt2img(x), plain, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 2, 8])
@torch.no_grad()
def test_every_family_samples_in_every_number_of_steps(scene, toys, family, steps):
    found = scene().txt2img(toys.picture(), FEW, steps=steps, turbodistill_choice=family)
    assert found.isfinite().all()
