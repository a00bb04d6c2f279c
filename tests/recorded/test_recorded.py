"""Our core and the hosts' stand-ins against numbers of the real hosts; `record.py` says what they are.

Tolerances are relative, for sigmas number by number, for latents to the largest number: 2e-6, some roundings of
float32, where the host makes its table in double precision; 2e-5 where it keeps alphas_cumprod in float32
(AUTOMATIC1111), and 1e-4 where it then rescales that (zero-terminal levels there and in Forge). Two timesteps are at
least 3e-4 apart.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from turbodistill.core.families import SamplingRecipe
from turbodistill.core.sampling import sample_euler, seeded_noise, sigmas_of, trailing_sigmas
from turbodistill.core.schedule import DiscreteSchedule, FlowSchedule, expand, scaled_linear, zero_terminal
from turbodistill.generate import recipe

HERE = Path(__file__).parent
HOSTS = ("comfyui", "a1111", "forge")
RECORDED = {host: json.loads((HERE / f"{host}.json").read_text(encoding="utf-8")) for host in HOSTS}
MODELS = [(host, model) for host in HOSTS for model in RECORDED[host]["models"]]
SCHEDULES = {
    "sd3": FlowSchedule(3.0),
    "flux": FlowSchedule(math.exp(1.15)),
    "zsnr": DiscreteSchedule(zero_terminal(scaled_linear())),
}
PREDICTIONS = {"zsnr": "v", "sd3": "flow", "flux": "flow"}
LATENTS = {"x", "seen", "x0", "start", "result", "pure", "pure_sgm"}


def loaded(name, *place):
    """A file of the tests as a module: tests are no package, and nothing is put on sys.path."""
    spec = importlib.util.spec_from_file_location(f"turbodistill_recorded_{name}", HERE.joinpath(*place))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # the files of a package import each other
    spec.loader.exec_module(module)
    return module


record = loaded("record", "record.py")
nodes_stand_ins = loaded("stand_ins", "..", "nodes", "stand_ins", "__init__.py")
webui_stand_ins = loaded("webui", "..", "webui_extension", "stand_ins", "webui.py")
loaded_stand_ins = loaded("loaded", "..", "webui_extension", "stand_ins", "models.py")


def known(host, model):
    """What was recorded of a host's model, core's schedule of it, and what its network predicts."""
    prediction = PREDICTIONS.get(model, model)
    return RECORDED[host]["models"][model], SCHEDULES.get(model, DiscreteSchedule()), prediction


def tolerance(host, model):
    if model == "zsnr" and host != "comfyui":
        return 1e-4
    return 2e-5 if host == "a1111" and model in ("eps", "v") else 2e-6


def differences(found, recorded, rtol, where=""):
    """Where numbers differ, in words; of what was recorded only what was found is compared."""
    if isinstance(found, dict):
        return [d for k, v in found.items() for d in differences(v, recorded[k], rtol, f"{where}/{k}")]
    name = where.rpartition("/")[2]
    ours, theirs = (torch.as_tensor(v, dtype=torch.float64) for v in (found, recorded))
    if ours.shape != theirs.shape:
        return [f"{where}: {tuple(ours.shape)} numbers instead of {tuple(theirs.shape)}"]
    size = theirs.abs().max() if name in LATENTS else theirs.abs()
    # Where the host interpolates timesteps, each is a quotient of small differences.
    allowed = (rtol * size).clamp(min=2e-3 if name == "told" and rtol > 2e-6 else 0)
    beyond = ((ours - theirs).abs() - allowed).flatten()
    if (beyond <= 0).all():
        return []
    worst = int(beyond.argmax())
    return [f"{where}[{worst}]: {float(ours.flatten()[worst])!r} instead of {float(theirs.flatten()[worst])!r}"]


def tensor(values, rows=1):
    return torch.tensor(values).reshape(rows, 4, 2, 2)


def timesteps_of(rows, entries):
    """Timesteps of 1000, of rows in a table of any length."""
    return (torch.tensor(rows, dtype=torch.float64) + 1) * 1000 / entries - 1


# --- core ---


@pytest.mark.parametrize(("host", "model"), MODELS)
def test_core_has_the_host_s_sigmas(host, model):
    recorded, schedule, _ = known(host, model)
    entries, rows = recorded["entries"], [int(row) for row in recorded["table"]]
    found = {
        "table": dict(zip(recorded["table"], schedule.sigma(timesteps_of(rows, entries)).tolist(), strict=True)),
        "sigma_min": float(schedule.sigma(timesteps_of(0, entries))),
        "sigma_max": schedule.sigma_max,
    }
    assert differences(found, recorded, tolerance(host, model)) == []


@pytest.mark.parametrize(("host", "model"), MODELS)
@pytest.mark.parametrize("by", [-1, 1])
def test_the_timesteps_beside_are_beyond_the_tolerance(host, model, by):
    recorded, schedule, _ = known(host, model)
    for row, sigma in recorded["table"].items():
        beside = timesteps_of(int(row), recorded["entries"]) + by
        if 0 <= beside <= 999:
            assert differences(float(schedule.sigma(beside)), sigma, tolerance(host, model)), row


@pytest.mark.parametrize(("host", "model"), MODELS)
def test_core_has_the_host_s_timesteps(host, model):
    recorded, schedule, prediction = known(host, model)
    sigmas, told = torch.tensor(recorded["told"], dtype=torch.float64).unbind(1)
    found = schedule.timestep(sigmas.float()).double()
    if prediction == "flow":  # a network is told sigma itself, or a thousand times that: core's timestep is unshifted
        scale = 1 if model == "flux" else 1000
        assert differences((schedule.sigma(found) * scale).tolist(), told.tolist(), 2e-6) == []
    elif model == "lcm":  # the nearest of every twentieth
        assert (((found - 19) / 20).round() * 20 + 19).clamp(min=19).tolist() == told.tolist()
    elif host == "a1111":
        assert differences({"told": found.tolist()}, {"told": told.tolist()}, 1e-4) == []
    else:
        assert found.round().tolist() == told.tolist()


def planned(host, model, name):
    """The sigmas of a host's scheduler by core; `name` as in the file."""
    _, schedule, prediction = known(host, model)
    scheduler, count, *denoise = name.replace("SGM Uniform", "sgm_uniform").split()
    steps = int(count)
    # ComfyUI spaces a flow model's sigmas as if they were its timesteps, and so shifts them twice.
    twice = host == "comfyui" and prediction == "flow"
    last = 1000 * float(schedule.sigma(timesteps_of(0, RECORDED[host]["models"][model]["entries"]))) - 1 if twice else 0
    match scheduler:
        case "simple" | "Simple" | "Turbo":
            return trailing_sigmas(schedule, steps)
        case "normal" | "Automatic":
            return sigmas_of(schedule, torch.linspace(999, last, steps).tolist())
        case "sgm_uniform":
            return sigmas_of(schedule, torch.linspace(999, last, steps + 1)[:-1].tolist())
        case "sd_turbo":
            return sigmas_of(schedule, range(round(1000 * float(denoise[-1])) - 1, 0, -100)[:steps])


@pytest.mark.parametrize(("host", "model"), [m for m in MODELS if m[1] != "lcm"])  # which has fifty levels
def test_core_makes_the_host_s_schedules(host, model):
    recorded = known(host, model)[0]
    found = {name: planned(host, model, name).tolist() for name in recorded["schedules"]}
    assert len(found) >= 2
    assert differences(found, recorded["schedules"], tolerance(host, model)) == []


@pytest.mark.parametrize(("host", "model"), MODELS)
def test_core_starts_where_the_host_does(host, model):
    recorded, schedule, _ = known(host, model)
    latent, noise = (tensor(RECORDED[host]["given"][name]) for name in ("latent", "noise"))
    first = sigmas_of(schedule, SamplingRecipe("one-step model").timesteps(1))
    half = sigmas_of(schedule, SamplingRecipe("one-step model").timesteps(1, 0.5))
    found = {
        "pure": schedule.add_noise(torch.zeros_like(noise), noise, first[:1]).flatten().tolist(),
        "img2img": {
            "sigmas": half.tolist(),
            "start": schedule.add_noise(latent, noise, half[:1]).flatten().tolist(),
        },
    }
    assert differences(found, recorded, tolerance(host, model)) == []


@pytest.mark.parametrize(("host", "model"), MODELS)
def test_core_reads_the_network_as_the_host_does(host, model):
    recorded, schedule, prediction = known(host, model)
    x, sigma = tensor(RECORDED[host]["given"]["x"], 2), torch.tensor(recorded["denoiser"]["sigma"])
    told = torch.tensor([dict(map(tuple, recorded["told"]))[s] for s in recorded["denoiser"]["sigma"]])
    seen = x if prediction == "flow" else expand(schedule.alpha_sigma(sigma)[0], x) * x
    output = record.Network()(seen, told)
    if model == "lcm":
        x0 = recipe.to_x0("lcm", schedule, x, output, sigma, told)
    else:
        x0 = schedule.to_x0(prediction, x, output, sigma)
        assert torch.allclose(schedule.from_x0(prediction, x, x0, sigma), output, atol=1e-5)
    found = {"seen": seen.flatten().tolist(), "x0": x0.flatten().tolist()}
    assert differences(found, recorded["denoiser"], 2e-6) == []


@pytest.mark.parametrize(("host", "model"), MODELS)
def test_core_takes_the_host_s_euler_steps(host, model):
    recorded, pull = known(host, model)[0]["euler"], record.Pull()
    result = sample_euler(pull, tensor(recorded["x"][0]), torch.tensor(recorded["sigmas"]))
    assert differences(record.walk(pull, result), recorded, 2e-6) == []


@pytest.mark.parametrize("host", HOSTS)
def test_core_s_noise_is_the_host_s(host):
    rows = seeded_noise(record.SEEDS, (4, 8, 8)).flatten(1)[:, :8]
    assert {str(seed): row.tolist() for seed, row in zip(record.SEEDS, rows, strict=True)}.items() <= (
        RECORDED[host]["noise"].items()
    )


# --- ComfyUI's stand-ins ---


@pytest.fixture(scope="module")
def nodes():
    with nodes_stand_ins.installed() as modules:
        yield modules


@pytest.fixture
def comfyui_model(nodes):
    """A model's name -> the stand-in of it as ComfyUI loads it."""
    theirs = nodes_stand_ins
    lcm = type("LCM", (theirs.EPS,), {"calculate_denoised": nodes.patcher.READINGS["lcm"]})  # our own reading
    spaces = {
        "eps": (theirs.EPS, theirs.ModelSamplingDiscrete),
        "v": (theirs.V_PREDICTION, theirs.ModelSamplingDiscrete),
        "zsnr": (theirs.V_PREDICTION, theirs.ModelSamplingDiscrete, SCHEDULES["zsnr"].sigmas),
        "x0": (theirs.X0, theirs.ModelSamplingDiscrete),
        "lcm": (lcm, theirs.ModelSamplingDiscreteDistilled),
        "sd3": (theirs.CONST, theirs.ModelSamplingDiscreteFlow, 3.0),
        "flux": (theirs.CONST, theirs.ModelSamplingDiscreteFlow, math.exp(1.15), 10000, 1),
    }

    def build(name):
        return theirs.BaseModel(record.Network(), theirs.model_sampling(*spaces[name]))

    return build


@pytest.mark.parametrize("name", RECORDED["comfyui"]["models"])
@torch.no_grad()
def test_comfyui_s_stand_in_gives_its_numbers(comfyui_model, name):
    theirs, model = nodes_stand_ins.sampling, comfyui_model(name)
    recorded, space = RECORDED["comfyui"]["models"][name], model.model_sampling

    def sample(sigmas, latent):
        pull = record.Pull(inner_model=model)
        result = theirs.ksampler("euler").sample(pull, torch.tensor(sigmas), {}, None, record.NOISE, latent)
        return record.walk(pull, result)

    nothing = torch.zeros_like(record.NOISE)
    half, full = recorded["img2img"]["sigmas"], recorded["euler"]["sigmas"]
    schedules = {f"normal {n}": theirs.calculate_sigmas(space, "normal", n).tolist() for n in record.STEPS}
    if "sd_turbo 4 denoise 1" in recorded["schedules"]:
        schedules["sd_turbo 4 denoise 1"] = [*space.sigma(torch.tensor([999, 899, 799, 699])).tolist(), 0.0]
    found = {
        **record.levels(space.sigmas, space.sigma_min, space.sigma_max),
        "schedules": schedules,
        **record.denoised(model.diffusion_model, space.sigmas, lambda x, s: model.apply_model(x, s)),
        "pure": space.noise_scaling(torch.tensor(full[:1]), record.NOISE, nothing).flatten().tolist(),
        "img2img": {"sigmas": half, "start": sample(half, record.LATENT)["x"][0]},
        "euler": sample(full, nothing),
    }
    assert differences(found, recorded, 2e-6) == []


def test_comfyui_s_stand_in_draws_its_noise():
    for name, recorded in RECORDED["comfyui"]["noise"].items():
        seed, _, chosen = name.partition(" batch_index ")
        rows = [int(row) for row in chosen.split()] or None
        latent = torch.zeros(len(rows or [0]), 4, 8, 8)
        found = nodes_stand_ins.sampling.prepare_noise(latent, int(seed), rows)
        assert found.flatten(1)[:, :8].flatten().tolist() == recorded, name


# --- the WebUIs' stand-ins ---


class Toy:
    """What the stand-ins ask of a toy; its network is the recorder's, which is told what the host's is."""

    def __init__(self, prediction, schedule):
        self.prediction, self.schedule, self.network, self.model = prediction, schedule, record.Network(), None

    def backbone(self, x, time, cond):
        return self.network(x, self.model.told[-1])


@pytest.fixture
def webui_model(tmp_path):
    """A host's name and a model's -> the stand-in of it, loaded in the host; it is gone when the test ends."""
    entered = []

    def build(host, name):
        _, schedule, prediction = known(host, name)
        toy = Toy(prediction, schedule)
        toy.model = model = webui_stand_ins.Model(toy)
        if host == "forge":
            webui_stand_ins.forged(model)
        entered.append(webui_stand_ins.installed(model, tmp_path, host))
        entered[-1].__enter__()
        return model

    yield build
    for context in reversed(entered):
        context.__exit__(None, None, None)


# Of Flux the stand-ins know nothing: its table has ten times as many rows.
WEBUI_MODELS = [m for m in MODELS if m[0] != "comfyui" and m[1] != "flux"]


@pytest.mark.parametrize(("host", "name"), WEBUI_MODELS)
@torch.no_grad()
def test_a_webui_s_stand_in_gives_its_numbers(webui_model, host, name):
    model, recorded = webui_model(host, name), RECORDED[host]["models"][name]

    class Simple(webui_stand_ins.KDiffusionSampler):
        def get_sigmas(self, p, steps):
            rows = [len(self.model_wrap.sigmas) * (steps - i) // steps - 1 for i in range(steps)]
            return torch.cat([self.model_wrap.sigmas[rows].float(), torch.zeros(1)])

    def sampler():
        made = Simple(sample_euler, model)
        wrap, made.model_wrap_cfg = made.model_wrap_cfg, record.Pull()
        return made, wrap, made.model_wrap_cfg

    def txt2img(more=False):
        webui_stand_ins.shared.opts.sgm_noise_multiplier = more
        made, _, pull = sampler()
        return record.walk(pull, made.sample(SimpleNamespace(), record.NOISE, None, None, steps=4))

    def img2img():
        made, _, pull = sampler()
        p = SimpleNamespace(denoising_strength=0.5)
        made.sample_img2img(p, record.LATENT, record.NOISE, None, None, steps=1)
        return {"sigmas": [*pull.sigmas, 0.0], "start": record.numbers(pull.xs[0])}

    _, wrap, _ = sampler()
    sigmas = wrap.inner_model.sigmas
    found = {
        **record.levels(sigmas, sigmas[0], sigmas[-1]),
        **record.denoised(model.toy.network, sigmas, lambda x, sigma: wrap(x, sigma, None)),
        "pure": txt2img()["x"][0],
        "pure_sgm": txt2img(more=True)["x"][0],
        "img2img": img2img(),
        "euler": txt2img(),
    }
    assert differences(found, recorded, tolerance(host, name)) == []


@pytest.mark.parametrize("name", ["eps", "v", "zsnr", "sd3"])
@torch.no_grad()
def test_forge_s_loaded_stand_in_gives_its_numbers(name):
    recorded, schedule, prediction = known("forge", name)
    kind = {"eps": "epsilon", "v": "v_prediction", "flow": "const"}[prediction]
    sigmas = schedule.sigma(torch.arange(1000.0)) if prediction == "flow" else schedule.sigmas
    predictor = loaded_stand_ins.Predictor(kind, *([] if name in ("eps", "v") else [sigmas]))
    inner = loaded_stand_ins.KModel(record.Network(), predictor)

    def x0_of(x, sigma):
        return inner.apply_model(x, sigma, c_crossattn=torch.zeros(1), transformer_options={})

    levels = record.levels(predictor.sigmas, predictor.sigmas[0], predictor.sigmas[-1])
    found = levels | record.denoised(inner.diffusion_model, predictor.sigmas, x0_of)
    assert differences(found, recorded, tolerance("forge", name)) == []


@pytest.mark.parametrize("name", ["eps", "v"])
def test_a1111_s_loaded_stand_in_gives_its_numbers(toys, name):
    alphas = loaded_stand_ins.Compvis(toys, name).alphas_cumprod
    sigmas = ((1 - alphas) / alphas).sqrt()
    found = record.levels(sigmas, sigmas[0], sigmas[-1])
    assert differences(found, RECORDED["a1111"]["models"][name], tolerance("a1111", name)) == []


# --- the real hosts ---


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_the_host_still_gives_these_numbers(host, tmp_path):
    try:
        record.installation(host)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    found, recorded = json.loads(record.record(host, tmp_path).read_text(encoding="utf-8")), RECORDED[host]
    versions = f"{found.pop('host')} on torch {found.pop('torch')}; recorded: {recorded['host']} on {recorded['torch']}"
    assert found.keys() == recorded.keys() - {"host", "torch"}
    assert found["models"].keys() == recorded["models"].keys(), versions
    # On another CPU the host's own tables are summed in another order.
    moved = [
        difference
        for name, model in found.pop("models").items()
        for difference in differences(model, recorded["models"][name], tolerance(host, name), f"/models/{name}")
    ]
    assert moved + differences(found, recorded, 2e-6) == [], versions
