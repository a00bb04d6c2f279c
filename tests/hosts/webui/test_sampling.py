"""The samplers through the API of a real AUTOMATIC1111 and a real Forge."""

import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from turbodistill.core.card import StudentCard

pytestmark = [pytest.mark.host, pytest.mark.slow]
ONE, FEW = "ADD 1-step", "ADD few-step"
ROUNDED = 2.0  # of 255: the hosts sum the same in another order


def chosen(name):
    return {"alwayson_scripts": {"TurboDistill": {"args": [name]}}}


@pytest.mark.share
def test_each_sampler_is_in_the_list_once(webui):
    assert [webui.samplers().count(name) for name in (ONE, FEW)] == [1, 1]


@pytest.mark.share
def test_one_step_is_euler_s_at_the_right_sigma(webui, gap):
    euler = webui.txt2img(sampler_name="Euler", scheduler="Uniform")  # of its schedulers one that begins at the top
    assert gap(webui.txt2img().picture, euler.picture) <= ROUNDED


def test_one_step_makes_one_pass_whatever_steps_says(webui, gap):
    made = webui.txt2img(steps=20)
    assert "Steps: 1," in made.infotext and "ADD timesteps: 999" in made.infotext
    assert gap(made.picture, webui.txt2img().picture) == 0


@pytest.mark.parametrize("scheduler", ["Karras", "Align Your Steps", "DDIM"])
def test_no_scheduler_changes_the_levels(webui, gap, scheduler):
    assert gap(webui.txt2img(scheduler=scheduler).picture, webui.txt2img().picture) == 0


@pytest.mark.share
@pytest.mark.parametrize(
    ("steps", "made", "timesteps"),
    [(1, 1, "999"), (2, 2, "999 499"), (4, 4, "999 749 499 249"), (20, 8, "999 874 749 624 499 374 249 124")],
)
def test_few_steps_are_those_asked_for_up_to_eight(webui, steps, made, timesteps):
    infotext = webui.txt2img(sampler_name=FEW, steps=steps).infotext
    assert f"Steps: {made}," in infotext and f"ADD timesteps: {timesteps}," in infotext


def test_more_steps_make_another_picture(webui, distance):
    pictures = [webui.txt2img(sampler_name=FEW, steps=steps).picture for steps in (1, 2, 4)]
    assert distance(pictures[0], pictures[1]) > 1 and distance(pictures[1], pictures[2]) > 1


@pytest.mark.parametrize(("sampler", "steps"), [(ONE, 1), (FEW, 2), (FEW, 4)])
def test_strength_leads_away_from_the_picture(webui, drawing, distance, sampler, steps):
    def made(strength):
        return webui.img2img(drawing, denoising_strength=strength, sampler_name=sampler, steps=steps).picture

    kept = made(0)
    near, middle, far = (distance(made(strength), kept) for strength in (0.3, 0.6, 1.0))
    assert 5 < near < middle - 1 < far - 2


@pytest.mark.share
def test_strength_sets_the_first_level(webui, drawing):
    made = webui.img2img(drawing, denoising_strength=0.6, sampler_name=FEW, steps=2)
    assert "ADD timesteps: 599 299" in made.infotext


@pytest.mark.parametrize(("sampler", "steps"), [(ONE, 1), (FEW, 4)])
def test_a_batch_equals_its_single_seeds(webui, gap, sampler, steps):
    both = webui.txt2img(sampler_name=sampler, steps=steps, batch_size=2).pictures
    for seed, picture in zip((1, 2), both, strict=True):
        assert gap(webui.txt2img(sampler_name=sampler, steps=steps, seed=seed).picture, picture) <= ROUNDED
    assert gap(*both) > 20


def test_a_batch_in_image_to_image_equals_its_single_seeds(webui, drawing, gap):
    told = {"denoising_strength": 0.6, "sampler_name": FEW, "steps": 2}
    both = webui.img2img(drawing, batch_size=2, **told).pictures
    for seed, picture in zip((1, 2), both, strict=True):
        assert gap(webui.img2img(drawing, seed=seed, **told).picture, picture) <= ROUNDED


def test_hires_fix_takes_the_same_path(webui, distance):
    told = {"enable_hr": True, "hr_scale": 2, "steps": 20}
    near, far = (webui.txt2img(denoising_strength=strength, **told) for strength in (0.3, 0.9))
    assert near.picture.shape == (128, 128, 3)
    assert "ADD timesteps: 999" in near.infotext and "Hires ADD timesteps: 299" in near.infotext
    enlarged = webui.txt2img().picture.repeat(2, 0).repeat(2, 1)
    assert distance(near.picture, enlarged) < distance(far.picture, enlarged)


def test_hires_fix_after_another_sampler(webui):
    told = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.5}
    made = webui.txt2img(sampler_name="Euler", hr_sampler_name=ONE, steps=3, **told)
    assert "Steps: 3," in made.infotext and "Hires steps: 1" in made.infotext
    assert "Hires ADD timesteps: 499" in made.infotext
    turned = webui.txt2img(sampler_name=ONE, hr_sampler_name="Euler", steps=3, **told)
    assert "Steps: 1," in turned.infotext and "Hires steps: 3" in turned.infotext


@pytest.mark.parametrize(("sampler", "steps"), [(ONE, 1), (FEW, 4)])
def test_inpainting_changes_what_is_masked(webui, drawing, distance, encoded, sampler, steps):
    mask = np.zeros((64, 64))
    mask[:, 32:] = 255
    masked = {"mask": encoded(mask), "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}
    made = webui.img2img(drawing, denoising_strength=1.0, sampler_name=sampler, steps=steps, **masked).picture
    assert distance(made[:, :32], drawing[:, :32]) < 1
    assert distance(made[:, 32:], drawing[:, 32:]) > 20


@pytest.mark.share
@pytest.mark.parametrize(
    "told",
    [
        {},
        {"sampler_name": FEW, "steps": 4, "seed": 7},
        {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.5},
        chosen("DMD2"),
    ],
    ids=["one step", "few steps", "hires fix", "a chosen family"],
)
def test_a_picture_s_infotext_makes_it_again(webui, gap, told):
    made = webui.txt2img(**told)
    again = webui.from_infotext(made.infotext)
    assert again.infotext == made.infotext
    assert gap(again.picture, made.picture) == 0


@pytest.mark.parametrize(
    ("family", "timesteps"),
    [("DMD2", 399), ("Hyper-SD", 800), ("SDXL-Lightning", 999), ("NitroFusion Realism", 999), ("LCM", 999)],
)
def test_a_chosen_family_is_sampled_as_its_own(webui, gap, family, timesteps):
    ordinary, made = webui.txt2img(), webui.txt2img(**chosen(family))
    assert f"ADD model: {family}, ADD timesteps: {timesteps}" in made.infotext
    # At timestep 9990 of LCM's ten thousand its boundary scalings are nought.
    assert gap(made.picture, ordinary.picture) <= 1 if family == "LCM" else gap(made.picture, ordinary.picture) > 5
    assert gap(webui.txt2img().picture, ordinary.picture) == 0  # nothing is left behind


def test_a_choice_that_is_none_is_refused_in_words(webui, refused):
    with pytest.raises(refused, match="'nonsense' is neither a LoRA here nor a family"):
        webui.txt2img(**chosen("nonsense"))
    assert webui.txt2img().picture.shape == (64, 64, 3)


@pytest.fixture(scope="session")
def put(webui):
    """Puts a student into the Lora folder, whose card says that noise enters at timestep 799; gives its name."""

    def put(name, base="a base", architecture="stable-diffusion-v1", timesteps=(799, 399), **more):
        layer, width = (
            "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
            64 if webui.kind.name == "a1111" else 320,
        )
        draw, wide = torch.Generator().manual_seed(0), width
        tensors = {
            f"{layer}.lora_up.weight": torch.randn(wide, 2, generator=draw),
            f"{layer}.lora_down.weight": torch.randn(2, wide, generator=draw),
            f"{layer}.alpha": torch.tensor(2.0),
        }
        about = ("lora", base, "0" * 16, architecture, "eps", "eps", timesteps, 4.0, (64, 64))
        card = StudentCard(*about, rank=2, **more)
        save_file(tensors, webui.data / "models" / "Lora" / f"{name}.safetensors", card.to_metadata())
        webui.refresh_loras()
        return name

    return put


@pytest.fixture(scope="session")
def student(put):
    """The name of a LoRA of ours."""
    return put("fox-turbo")


@pytest.mark.share
def test_what_does_not_fit_is_told_to_programs_too(webui, student, put):
    second = put("second-turbo", "tiny.safetensors" if webui.kind.name == "a1111" else "small.ckpt")
    said = webui.txt2img(prompt=f"a fox <lora:{student}:0.7> <lora:{second}:-1>", cfg_scale=7).remarks
    another, weight, negative, two, cfg = said
    assert another.startswith(f"{student} was made for a base") and "the loaded model is" in another
    assert weight.startswith(f"the weight of {student} is 0.7: it was trained at 1")
    assert negative.startswith(f"the weight of {second} is -1")
    assert two == f"2 students are in the prompt ({student}, {second}): their changes add up, use one."
    assert cfg == "cfg is 7: student of a base was made for 1, more burns the picture."
    right = {"prompt": f"a fox <lora:{second}:1>", "sampler_name": FEW}
    assert webui.txt2img(**right, steps=2).remarks == []
    assert "was made for 1 to 2 steps" in " ".join(webui.txt2img(**right, steps=4).remarks)
    (euler,) = webui.txt2img(**right | {"sampler_name": "Euler"}).remarks
    assert euler == f"{second} is a student: Euler is not made for it, take {FEW} and CFG Scale 1."
    assert "remarks" not in webui.txt2img(**right, steps=4).infotext


def test_a_student_of_guidance_alone_is_for_the_host_s_own_samplers(webui, put, gap):
    base = "tiny.safetensors" if webui.kind.name == "a1111" else "small.ckpt"
    alone = put("alone", base, timesteps=tuple(range(999, 0, -63)), guidance_only=True)
    usual = {"prompt": f"a fox <lora:{alone}:1>", "sampler_name": "DPM++ 2M", "steps": 10, "cfg_scale": 1}
    made = webui.txt2img(**usual)
    assert made.remarks == [] and "ADD" not in made.infotext
    assert gap(made.picture, webui.txt2img(**usual | {"prompt": "a fox"}).picture) > 5
    assert webui.txt2img(**usual | {"cfg_scale": 7}).remarks == [
        "cfg is 7: alone was made for 1, more burns the picture."
    ]
    ours = webui.txt2img(**usual | {"sampler_name": FEW, "steps": 8})
    assert ours.remarks == [f"student of {base} is sampled as its base is: take an ordinary sampler, 16 steps."]


def test_a_newcomer_s_first_picture_is_remarked_upon(webui):
    nothing, cfg = webui.txt2img(cfg_scale=7).remarks
    assert nothing.startswith("No student and no known one-step model") and cfg.startswith("cfg is 7")


def test_a_student_of_another_architecture_is_refused(webui, refused, put):
    foreign = put("foreign-turbo", architecture="stable-diffusion-xl-v1-base")
    with pytest.raises(refused, match=r"made for a model of architecture stable-diffusion-xl-v1-base, the loaded one"):
        webui.txt2img(prompt=f"a fox <lora:{foreign}:1>")
    assert webui.txt2img().picture.shape == (64, 64, 3)


@pytest.mark.share
def test_a_student_in_the_prompt_is_sampled_as_its_card_says(webui, gap, student):
    plain, made = webui.txt2img(), webui.txt2img(prompt=f"a fox <lora:{student}:1>")
    assert "ADD model: student of a base, ADD timesteps: 799" in made.infotext
    assert gap(made.picture, plain.picture) > 5
    few = webui.txt2img(prompt=f"a fox <lora:{student}:1>", sampler_name=FEW, steps=2)
    assert "ADD timesteps: 799 399" in few.infotext
    assert gap(webui.txt2img().picture, plain.picture) == 0


def test_a_student_of_weight_nought_does_not_count(webui, student):
    assert "ADD timesteps: 999" in webui.txt2img(prompt=f"a fox <lora:{student}:0>").infotext


@pytest.fixture
def setting(webui):
    """Sets options of the host for one test."""
    before = {}

    def change(**options):
        now = webui.call("sdapi/v1/options")
        before.update({name: now[name] for name in options if name not in before})
        webui.set(**options)

    yield change
    webui.set(**before)


def test_a_student_begins_with_its_own_noise_whatever_the_host_s_multiplier(webui, gap, setting, student):
    plain, made = webui.txt2img(), webui.txt2img(prompt=f"a fox <lora:{student}:1>")
    setting(sgm_noise_multiplier=True)
    assert gap(webui.txt2img(prompt=f"a fox <lora:{student}:1>").picture, made.picture) <= ROUNDED
    assert "SGM noise multiplier" in webui.txt2img().infotext and "SGM noise multiplier" not in plain.infotext


def test_zero_terminal_snr(webui, drawing, gap, setting):
    plain = webui.img2img(drawing, denoising_strength=0.8).picture
    setting(sd_noise_schedule="Zero Terminal SNR")
    # Image to image is given the levels of this schedule at once, not of the one before.
    first = webui.img2img(drawing, denoising_strength=0.8).picture
    assert gap(webui.txt2img().picture, webui.txt2img(sampler_name="Euler", scheduler="Uniform").picture) <= ROUNDED
    assert gap(first, webui.img2img(drawing, denoising_strength=0.8).picture) == 0
    assert gap(first, plain) > 5


def test_interrupt_ends_the_passes(webui, gap):
    size = 256 if webui.kind.name == "a1111" else 128
    told = {"sampler_name": FEW, "steps": 8, "width": size, "height": size}
    made = []
    worker = threading.Thread(target=lambda: made.append(webui.txt2img(**told)))

    def under_way():
        state = webui.call("sdapi/v1/progress?skip_current_image=true")["state"]
        return state["job"] and state["sampling_steps"] == 8 and state["sampling_step"] >= 1

    worker.start()
    while worker.is_alive() and not under_way():
        time.sleep(0.02)
    webui.call("sdapi/v1/interrupt", {})
    worker.join()
    assert gap(made[0].picture, webui.txt2img(**told).picture) > 5


@pytest.fixture(scope="module")
def plot(webui):
    """Makes an X/Y/Z plot of axes by their titles, each with its values: the cells, without the grid."""
    info = next(each for each in webui.call("sdapi/v1/script-info") if each["name"] == "x/y/z plot")
    kinds = info["args"][0]["choices"]

    def made(**axes):
        values = {"Include Sub Images": True, "Use text inputs instead of dropdowns": True}
        for letter in "XYZ":
            title, asked = axes.get(letter, ("Nothing", ""))
            assert kinds.count(title) == 1
            values |= {f"{letter} type": kinds.index(title), f"{letter} values": asked}
        args = [values.get(arg["label"], arg.get("value")) for arg in info["args"]]
        return webui.txt2img(script_name="X/Y/Z plot", script_args=args)

    return made


AXIS = "[TurboDistill] Student or family"


def test_the_plot_has_our_axis(webui, gap, plot):
    made = plot(X=(AXIS, "detect, DMD2"))
    single = [webui.txt2img(**told).picture for told in (chosen("detect"), chosen("DMD2"))]
    cells = [picture for picture in made.pictures if picture.shape == single[0].shape]
    assert all(min(gap(cell, picture) for cell in cells) == 0 for picture in single)


def test_each_cell_of_a_plot_says_only_what_is_its_own(webui, gap, plot):
    made = plot(X=(AXIS, "DMD2, detect"), Y=("Sampler", f"{FEW}, Euler"))
    told = made.infotexts[-4:]
    assert all(f"Sampler: {name}" in text for name, text in zip((FEW, FEW, "Euler", "Euler"), told, strict=True))
    assert "ADD chosen: DMD2" in told[0] and "ADD model: DMD2" in told[0]
    assert "ADD chosen" not in told[1] and "ADD model: one-step model" in told[1]
    assert "ADD" not in told[2] + told[3]
    for picture, infotext in zip(made.pictures[-4:], told, strict=True):
        assert gap(webui.from_infotext(infotext).picture, picture) <= ROUNDED


def test_its_infotext_gives_the_prompt_back(webui):
    from turbodistill.trainer.data.infotext import of_infotext

    infotext = webui.txt2img(prompt="a {red} fox,\n(sharp:1.2)", negative_prompt="blurry,\ntext").infotext
    found = of_infotext(infotext)
    assert found and (found.prompt, found.negative) == ("a {red} fox, (sharp:1.2)", "blurry, text")
    assert (found.steps, found.cfg, found.sampler) == ("1", "1.0", ONE)
