"""A student stays on the pipeline, is sampled as core samples it, and leaves no trace when it is released."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from turbodistill import scheduler_of, use_student
from turbodistill.core.card import KEY, CardError, read_card
from turbodistill.core.schedule import trailing_timesteps
from turbodistill.core.student import load_student
from turbodistill.trainer.pipeline.host import ModelError
from turbodistill.trainer.pipeline.scheduler import StudentScheduler


def by_core(made, noise, steps=1):
    """The student's latents, by core's own sampling."""
    student, *_ = load_student(made.path, made.model.denoiser)
    try:
        return student.generate(noise, made.model.encode_text(["a red fox", "an owl"]), steps)
    finally:
        student.release()


def recarded(path, to, **changes):
    """A copy of a student's file with another card."""
    card = json.loads(read_card(path).to_metadata()[KEY])
    save_file(load_file(path), to, {KEY: json.dumps(card | changes)})
    return to


def test_the_pipeline_makes_what_core_makes(tiny_kit, students, name):
    """In one step, two and four; the student was trained for four."""
    made = students(name)
    noise = tiny_kit.noise(made.model)
    bare = tiny_kit.pictures(made.pipe, name, noise, 2)
    before = tiny_kit.everything(made.pipe)
    expected = {steps: by_core(made, noise, steps) for steps in (1, 2, 4)}
    with use_student(made.pipe, made.path) as used:
        for steps, latents in expected.items():
            theirs = tiny_kit.pictures(made.pipe, name, noise, steps, "latent")
            assert torch.allclose(theirs, tiny_kit.latents_for(name, latents), atol=1e-4)
        pictures = tiny_kit.pictures(made.pipe, name, noise, 4)
        assert torch.allclose(pictures, made.model.decode(expected[4]), atol=1e-4)
        assert used.warning == "" and used.card.base_hash == made.model.base_hash
    used.release()
    assert tiny_kit.everything(made.pipe) == before
    assert torch.equal(tiny_kit.pictures(made.pipe, name, noise, 2), bare)


def test_a_stock_scheduler_makes_the_same_in_one_step(tiny_kit, students, name, tmp_path):
    """To 1e-5 where Euler's ends the same way, to 3e-3 in a zero-terminal schedule, where its last sigma is another."""
    made = students(name)
    path = recarded(made.path, tmp_path / "one-step.safetensors", timesteps=[999])
    noise = tiny_kit.noise(made.model)
    expected = tiny_kit.latents_for(name, by_core(made, noise))
    tiny_kit.pictures(made.pipe, name, noise, 2)
    before = tiny_kit.everything(made.pipe)
    with use_student(made.model, path, stock=True):
        assert type(made.pipe.scheduler).__module__.startswith("diffusers.")
        found = tiny_kit.pictures(made.pipe, name, noise, 1, "latent")
    assert torch.allclose(found, expected, atol=3e-3 if name == "sd-v" else 1e-5)
    assert tiny_kit.everything(made.pipe) == before


STEPPED = ["sd", "sd-v", "sdxl", "sd3", "flux-schnell", "sana"]


@pytest.mark.parametrize("name", STEPPED)
def test_a_stock_scheduler_adds_fresh_noise_between_steps(tiny_kit, students, name):
    """Its noise is another, so that the picture is: what it makes of the same noise is compared."""
    made = students(name)
    scheduler, noise = scheduler_of(read_card(made.path), made.pipe), tiny_kit.noise(made.model)
    sigmas = {"sigmas": [1.0, 0.5]} if name in ("sd3", "sana") else {}
    torch.manual_seed(3)
    drawn = torch.randn_like(tiny_kit.latents_for(name, noise))
    student, *_ = load_student(made.path, made.model.denoiser)
    cond = made.model.encode_text(["a red fox", "an owl"])
    levels = student.sigmas(2)
    with torch.no_grad():
        schedule = student.schedule
        x0 = student(schedule.add_noise(torch.zeros_like(noise), noise, levels[:1]), levels[:1].expand(2), cond)
        expected = student(schedule.add_noise(x0, tiny_kit.unpacked(drawn), levels[1:2]), levels[1:2].expand(2), cond)
    student.release()
    with use_student(made.pipe, made.path) as used:
        made.pipe.scheduler = scheduler
        torch.manual_seed(3)
        found = tiny_kit.pictures(made.pipe, name, noise, 2, "latent", **sigmas)
        used.release()
    expected = tiny_kit.latents_for(name, expected)
    assert torch.allclose(found, expected, atol=5e-3 * float(expected.abs().max()))  # LCM's first noise is 0.2 % larger


def test_an_earlier_start_is_sampled_by_ours_and_by_a_stock_one(tiny_kit, students, tmp_path):
    made = students("sd")
    path = recarded(made.path, tmp_path / "early.safetensors", timesteps=[799])
    noise = tiny_kit.noise(made.model)
    student, *_ = load_student(path, made.model.denoiser)
    expected = student.generate(noise, made.model.encode_text(["a red fox", "an owl"]))
    student.release()
    assert student.start_timestep == 799
    for stock in (False, True):
        with use_student(made.pipe, path, stock=stock):
            found = tiny_kit.pictures(made.pipe, "sd", noise, 1, "latent")
            assert made.pipe.scheduler.timesteps.tolist() == [799]
        assert torch.allclose(found, expected, atol=1e-4)
    flow = students("sd3")
    path = recarded(flow.path, tmp_path / "flow.safetensors", timesteps=[799])
    with pytest.raises(ModelError, match=r"noise enters this student at timestep 799.*turbodistill\.sample"):
        use_student(flow.pipe, path)


def test_a_student_that_predicts_the_picture_is_read_as_that(tiny_kit, students):
    for name in ("sd", "flux-schnell"):
        made = students(name, prediction="x0")
        noise = tiny_kit.noise(made.model)
        for steps in (1, 2):
            expected = tiny_kit.latents_for(name, by_core(made, noise, steps))
            with use_student(made.pipe, made.path):
                found = tiny_kit.pictures(made.pipe, name, noise, steps, "latent")
            assert torch.allclose(found, expected, atol=1e-4)
    with pytest.raises(ModelError, match="predicts x0 on a flow, which no scheduler of diffusers reads"):
        scheduler_of(read_card(made.path), made.pipe)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_full_student_takes_the_weights_place_and_gives_them_back(tiny_kit, students, name):
    made = students(name, rank=0, lr=1e-3)
    noise = tiny_kit.noise(made.model)
    bare = tiny_kit.pictures(made.pipe, name, noise, 2)
    before = tiny_kit.everything(made.pipe)
    expected = tiny_kit.latents_for(name, by_core(made, noise))
    with use_student(made.pipe, made.path):
        found = tiny_kit.pictures(made.pipe, name, noise, 1, "latent")
    assert torch.allclose(found, expected, atol=1e-3)
    assert tiny_kit.everything(made.pipe) == before
    assert torch.equal(tiny_kit.pictures(made.pipe, name, noise, 2), bare)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux-schnell"])
def test_picture_to_picture_begins_at_a_later_step(tiny_kit, students, name):
    """Two of four steps from a picture: equal to core's, from the same noisy latents."""
    import diffusers
    from turbodistill.core.sampling import sample_few_step

    made = students(name)
    kind = getattr(diffusers, type(made.pipe).__name__.replace("Pipeline", "Img2ImgPipeline"))
    parts = {k: v for k, v in made.pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    more = {"requires_safety_checker": False, "feature_extractor": None} if name == "sd" else {}
    pipe = kind(**parts, **more)
    pipe.set_progress_bar_config(disable=True)
    image, seen = torch.rand(1, 3, 16, 16), []
    with use_student(pipe, made.path):
        network = made.model.denoiser.backbone
        hook = network.register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        sizes = {"width": 16, "height": 16} if name in ("sd3", "flux-schnell") else {}
        found = pipe(
            "a red fox", image=image, strength=0.5, num_inference_steps=4, guidance_scale=0.0, output_type="pt",
            generator=torch.Generator().manual_seed(1), **sizes,
        ).images  # fmt: skip
        hook.remove()
    assert len(seen) == 2
    student, *_ = load_student(made.path, made.model.denoiser)
    sigmas = student.sigmas(4)[2:]
    scale = 1.0 if student.prediction == "flow" else student.schedule.alpha_sigma(sigmas[0])[0]
    cond = made.model.encode_text(["a red fox"])
    with torch.no_grad():
        first = tiny_kit.unpacked(seen[0]) / scale
        latents = sample_few_step(lambda x, s: student(x, s, cond), first, sigmas, schedule=student.schedule)
    student.release()
    assert torch.allclose(found, made.model.decode(latents), atol=1e-4)


def test_our_scheduler_is_saved_and_loaded_with_its_pipeline(tiny_kit, students, tmp_path):
    for name in ("sd", "flux-schnell"):
        made = students(name)
        with use_student(made.pipe, made.path):
            scheduler = made.pipe.scheduler
            scheduler.save_pretrained(tmp_path / name)
            again = StudentScheduler.from_pretrained(tmp_path / name)
            kept = {k: v for k, v in scheduler.config.items() if k not in ("latent_size", "_use_default_values")}
            assert {k: again.config[k] for k in kept} == kept
            made.pipe.scheduler = again
            noise = tiny_kit.noise(made.model)
            found = tiny_kit.pictures(made.pipe, name, noise, 4, "latent")
        assert torch.allclose(found, tiny_kit.latents_for(name, by_core(made, noise, 4)), atol=1e-4)
    made = students("sd")
    with use_student(made.pipe, made.path):
        made.pipe.save_pretrained(tmp_path / "pipe")
    whole = type(made.pipe).from_pretrained(tmp_path / "pipe", safety_checker=None)
    assert type(whole.scheduler) is StudentScheduler and whole.scheduler.init_noise_sigma == pytest.approx(
        0.99766, 1e-4
    )


def test_guidance_of_a_distilled_transformer_is_that_of_its_training(tiny_kit, students):
    made = students("flux-dev")
    noise = tiny_kit.noise(made.model)
    with use_student(made.pipe, made.path):
        found = [tiny_kit.pictures(made.pipe, "flux-dev", noise, guidance_scale=g) for g in (0.0, 7.0)]
    assert torch.equal(*found)


def test_more_steps_than_were_trained_are_warned_of(tiny_kit, students):
    made = students("sd")
    with (
        use_student(made.pipe, made.path),
        pytest.warns(UserWarning, match="num_inference_steps is 5: .*trained for 4"),
    ):
        tiny_kit.pictures(made.pipe, "sd", tiny_kit.noise(made.model), 5)


def test_a_scheduler_refuses_no_steps_and_unknown_predictions():
    scheduler = StudentScheduler()
    with pytest.raises(ValueError, match="give num_inference_steps"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="prediction_type is 'noise': use one of epsilon"):
        StudentScheduler(prediction_type="noise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.set_timesteps(timesteps=[900, 300])
        assert scheduler.timesteps.tolist() == [900, 300] and len(scheduler) == 1000


def test_noise_is_added_as_core_adds_it():
    x0, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    discrete = StudentScheduler()
    alpha = discrete.alphas_cumprod[[999, 200]].sqrt()[:, None, None, None]
    expected = alpha * x0 + (1 - alpha**2).sqrt() * noise
    assert torch.allclose(discrete.add_noise(x0, noise, torch.tensor([999, 200])), expected, atol=1e-5)
    flow = StudentScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, shift=3.0)
    assert torch.allclose(flow.scale_noise(x0, torch.tensor([250.0, 250.0]), noise), 0.75 * x0 + 0.25 * noise)


def test_a_second_student_and_a_training_wait_for_the_release(tiny_kit, students):
    made = students("sd")
    used = use_student(made.pipe, made.path)
    before = tiny_kit.everything(made.pipe)
    for attempt in (lambda: use_student(made.model, made.path), lambda: tiny_kit.host("sd", made.pipe)):
        with pytest.raises(ModelError, match="carries a student"):
            attempt()
    assert tiny_kit.everything(made.pipe) == before
    used.release()
    tiny_kit.host("sd", made.pipe)


def test_a_file_that_does_not_fit_changes_nothing(tiny_kit, students, tmp_path):
    made = students("sd")
    before = tiny_kit.everything(made.pipe)
    other = students("sd3")
    broken = tmp_path / "broken.safetensors"
    shutil.copy(made.path, broken)
    broken.write_bytes(broken.read_bytes()[:300])
    for path, told in (
        (other.path, "predicts flow, the loaded one predicts eps"),
        (students("sdxl").path, "does not fit this model"),
        (students("sd", rank=0, lr=1e-3).path.with_name("nothing"), "does not exist"),
        (broken, "no complete safetensors file"),
    ):
        with pytest.raises(CardError, match=told):
            use_student(made.pipe, path)
        assert tiny_kit.everything(made.pipe) == before


def test_the_embedded_model_has_no_pipeline(tmp_path):
    from turbodistill import load_model
    from turbodistill.demo.files import STUDENT

    with pytest.raises(ModelError, match=r"is no pipeline of diffusers: use turbodistill\.load_student"):
        use_student(load_model(), STUDENT)


def of_guidance_alone(made, path, steps=9):
    """The student's file, as if it had guidance alone."""
    return recarded(made.path, path, guidance_only=True, timesteps=trailing_timesteps(steps))


@pytest.mark.parametrize("stock", [False, True])
def test_a_student_of_guidance_alone_keeps_the_pipeline_s_scheduler(tiny_kit, students, name, stock, tmp_path):
    made = students(name)
    path, own = of_guidance_alone(made, tmp_path / "alone.safetensors"), made.pipe.scheduler
    tiny_kit.pictures(made.pipe, name, tiny_kit.noise(made.model), 2)  # which a pipeline remembers
    before = tiny_kit.everything(made.pipe)
    with use_student(made.pipe, path, stock=stock) as used:
        found = made.pipe.scheduler
        assert type(found) is type(own) and dict(found.config) == dict(own.config) and found is not own
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # there is no number of steps that it was not made for
            tiny_kit.pictures(made.pipe, name, tiny_kit.noise(made.model), 12)
        assert used.card.guidance_only
    assert made.pipe.scheduler is own and tiny_kit.everything(made.pipe) == before


@pytest.mark.parametrize("name", ["sd", "sd-v", "sdxl"])
@pytest.mark.parametrize("steps", [9, 20])
def test_what_it_makes_is_euler_s_of_diffusers(tiny_kit, students, name, steps, tmp_path):
    from diffusers import DDIMScheduler

    made = students(name)
    path, own = of_guidance_alone(made, tmp_path / "alone.safetensors"), made.pipe.scheduler
    noise = tiny_kit.noise(made.model)
    student, *_ = load_student(path, made.model.denoiser)
    cond = made.model.encode_text(["a red fox", "an owl"])
    expected = student.generate(noise, cond, steps)
    assert steps != 9 or torch.equal(student.generate(noise, cond), expected)
    student.release()
    like = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    made.pipe.scheduler = DDIMScheduler.from_config(own.config, **like)
    try:
        with use_student(made.pipe, path):
            found = tiny_kit.pictures(made.pipe, name, noise, steps, "latent")
    finally:
        made.pipe.scheduler = own
    # Pure noise is scaled by 1 there, by sigma_t here; and so is what of it is left where the network is a toy.
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
