"""Record numbers of the real hosts, to which `test_recorded.py` holds our code and the hosts' stand-ins.

    python tests/recorded/record.py comfyui|a1111|forge [FOLDER]

writes comfyui.json and so on beside this file, or into FOLDER. The host is found as in tests/hosts (COMFYUI_PATH,
A1111_PATH, FORGE_PATH). This file is then run by the host's own Python, where it calls the host's own modules on the
CPU: no server is started, and no checkpoint is loaded, since a small function stands where the network would.

A file holds, with tensors as flat lists:

- `host`, `torch`: the versions
- `given`: what the host was given: `x` (2, 4, 2, 2), `noise` and `latent` (1, 4, 2, 2)
- `noise`: the first 8 numbers of each row of the host's noise (B, 4, 8, 8), by seed
- `models`: for each kind of model (SD 1 `eps`, SD 2 `v`, zero-terminal `zsnr`, `sd3`, `flux`; ComfyUI's `lcm`, `x0`)
    - `entries`, `sigma_min`, `sigma_max`, and `table`: sigmas by their row in the host's table
    - `told`: pairs of a sigma and the timestep that the network is told there
    - `schedules`: sigmas by the scheduler's name and number of steps
    - `denoiser`: x0 of x at two sigmas, what the network saw and was told; the network is x / 2 + timestep / 1000
    - `pure`, `pure_sgm`: where sampling starts from pure noise, without and with the factor sqrt(1 + sigma^2)
    - `img2img`: the sigmas of one step at denoise 0.5, and where it starts from the latent
    - `euler`: four steps of Euler's method where x0 is 0.3 x: x at each step, and the result
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).resolve().parent
HOSTS = ("comfyui", "a1111", "forge")
FLAGS = {
    "a1111": ["--use-cpu", "all", "--no-half", "--skip-torch-cuda-test"],
    "forge": ["--always-cpu", "--all-in-fp32", "--skip-torch-cuda-test"],
}
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}

TIMESTEPS = (0, 20, 250, 399, 499, 749, 799, 899, 999)  # of 1000
STEPS = (1, 4)
SEEDS = (0, 1, 7)
BETWEEN = (0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)  # sigmas that are in no table; a flow model's are up to 1


def client(host: str):
    """The module of tests/hosts that knows where the host is."""
    path = HERE.parent / "hosts" / ("comfyui" if host == "comfyui" else "webui") / "client.py"
    spec = importlib.util.spec_from_file_location(f"turbodistill_recorded_{path.parent.name}_client", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def installation(host: str) -> tuple[str, str]:
    """The host's folder and Python; raises FileNotFoundError, which says where it was looked for."""
    found = client(host)
    folder, python = found.installation(*([] if host == "comfyui" else [found.KINDS[host]]))
    return str(folder), str(python)


def record(host: str, into: Path) -> Path:
    """Record a host's numbers; the file. Raises FileNotFoundError without the host, RuntimeError if it fails."""
    folder, python = installation(host)
    path = Path(into).resolve() / f"{host}.json"
    command = [python, str(Path(__file__).resolve()), "inside", host, str(path)]
    done = subprocess.run(command, cwd=folder, env=os.environ | QUIET, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{host} in {folder} could not be recorded:\n{done.stderr[-3000:]}")
    return path


# --- inside a host's Python ---


def grid(step: int, rows: int = 1) -> torch.Tensor:
    """Numbers (rows, 4, 2, 2) between -2 and 2 that binary fractions hold exactly."""
    count = 16 * rows
    return (((torch.arange(count) * step) % count - (count - 1) / 2) * 4 / count).reshape(rows, 4, 2, 2)


X, NOISE, LATENT = grid(7, 2), grid(5), grid(3)


def numbers(tensor) -> list[float]:
    return torch.as_tensor(tensor).detach().double().flatten().tolist()


class Network(torch.nn.Module):
    """What stands where a network would; it keeps what it sees and is told."""

    dtype = storage_dtype = computation_dtype = torch.float32
    load_device = offload_device = initial_device = torch.device("cpu")

    def forward(self, x, t, *_, **__):
        self.seen, self.told = x, t
        return x / 2 + t.float().view(-1, 1, 1, 1) / 1000


class Pull:
    """What samplers call: x0 is 0.3 x; it keeps what it is called with."""

    def __init__(self, **held):
        self.xs, self.sigmas = [], []
        vars(self).update(held)

    def __call__(self, x, sigma, *_, **__):
        self.xs.append(x.clone())
        self.sigmas.append(float(sigma[0]))
        return 0.3 * x


def levels(sigmas: torch.Tensor, sigma_min, sigma_max) -> dict:
    """A table's ends, and its rows at some timesteps of 1000."""
    rows = sorted({(t + 1) * len(sigmas) // 1000 - 1 for t in TIMESTEPS} - {-1})
    return {
        "entries": len(sigmas),
        "sigma_min": float(sigma_min),
        "sigma_max": float(sigma_max),
        "table": {str(row): float(sigmas[row]) for row in rows},
    }


def denoised(network: Network, sigmas: torch.Tensor, x0_of) -> dict:
    """What `x0_of(x, sigma)`, the host's model around the network, makes of X, and what the network is told."""
    rows = [(t + 1) * len(sigmas) // 1000 - 1 for t in (499, 999)]
    two = sigmas[rows].float()
    x0 = x0_of(X.clone(), two)
    found = {"sigma": numbers(two), "seen": numbers(network.seen), "x0": numbers(x0)}
    between = [s for s in BETWEEN if float(sigmas[0]) < s < float(sigmas[-1])]
    asked = torch.tensor(list(levels(sigmas, 0, 0)["table"].values()) + between)
    x0_of(X[:1].repeat(len(asked), 1, 1, 1), asked)
    told = zip(numbers(asked), numbers(network.told), strict=True)
    return {"denoiser": found, "told": [list(pair) for pair in told]}


def walk(pull: Pull, result: torch.Tensor) -> dict:
    return {"sigmas": [*pull.sigmas, 0.0], "x": [numbers(x) for x in pull.xs], "result": numbers(result)}


# --- ComfyUI ---


def comfyui() -> dict:
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_base
    import comfy.sample
    import comfy.supported_models as known
    import comfyui_version
    from comfy_extras import nodes_model_advanced

    kinds = comfy.model_base.ModelType
    bare = {"disable_unet_model_creation": True}

    def loaded(config, kind):
        model = comfy.model_base.BaseModel(config(bare), kind)
        model.diffusion_model = Network()
        return model

    def advanced(sampling, zsnr=False):
        """SD 1 behind the node ModelSamplingDiscrete."""
        model = loaded(known.SD15, kinds.EPS)
        patched = SimpleNamespace(model=model, add_object_patch=lambda name, value: setattr(model, name, value))
        patched.clone = lambda: patched
        nodes_model_advanced.ModelSamplingDiscrete().patch(patched, sampling, zsnr)
        return model

    models = {
        "eps": loaded(known.SD15, kinds.EPS),
        "v": loaded(known.SD20, kinds.V_PREDICTION),
        "zsnr": advanced("v_prediction", zsnr=True),
        "x0": advanced("x0"),
        "lcm": advanced("lcm"),
        "sd3": loaded(known.SD3, kinds.FLOW),
        "flux": loaded(known.Flux, kinds.FLUX),
    }
    latent = torch.zeros(3, 4, 8, 8)
    noise = {str(seed): numbers(comfy.sample.prepare_noise(latent[:1], seed)[0])[:8] for seed in SEEDS}
    for chosen in ([0], [2], [2, 0], [1, 1]):
        rows = comfy.sample.prepare_noise(latent[: len(chosen)], 7, chosen)
        noise["7 batch_index " + " ".join(map(str, chosen))] = [v for row in rows for v in numbers(row)[:8]]
    return {
        "host": f"ComfyUI {comfyui_version.__version__}",
        "noise": noise,
        "models": {name: comfyui_model(model) for name, model in models.items()},
    }


def comfyui_model(model) -> dict:
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SDTurboScheduler

    space = model.model_sampling
    patcher = SimpleNamespace(get_model_object=lambda name: getattr(model, name))

    def plan(scheduler, steps, denoise=1.0):
        return comfy.samplers.KSampler(patcher, steps, torch.device("cpu"), "euler", scheduler, denoise).sigmas

    def sample(sigmas, latent):
        pull = Pull(inner_model=model)
        result = comfy.samplers.ksampler("euler").sample(pull, sigmas, {}, None, NOISE.clone(), latent.clone())
        return walk(pull, result)

    schedules = {f"{s} {n}": numbers(plan(s, n)) for s in ("simple", "normal", "sgm_uniform") for n in STEPS}
    if hasattr(space, "log_sigmas"):  # it asks a flow model of timesteps up to 999, whatever the model's own
        for denoise in (1.0, 0.5):
            for n in range(1, 5):
                (sigmas,) = SDTurboScheduler().get_sigmas(patcher, n, denoise)
                schedules[f"sd_turbo {n} denoise {denoise:g}"] = numbers(sigmas)
    half, full = plan("simple", 1, 0.5), plan("simple", 4)
    sigma = full[:1]
    return {
        **levels(space.sigmas, space.sigma_min, space.sigma_max),
        "schedules": schedules,
        **denoised(model.diffusion_model, space.sigmas, lambda x, s: model.apply_model(x, s)),
        "pure": numbers(space.noise_scaling(sigma, NOISE.clone(), torch.zeros_like(NOISE))),
        "pure_sgm": sample(full, torch.zeros_like(LATENT))["x"][0],
        "img2img": {"sigmas": numbers(half), "start": sample(half, LATENT)["x"][0]},
        "euler": sample(full, torch.zeros_like(LATENT)),
    }


# --- AUTOMATIC1111 and Forge ---


def start_webui(host: str, data: str) -> None:
    """Import as much of a WebUI as its samplers need, in its own order."""
    sys.argv = ["webui.py", *FLAGS[host], "--data-dir", data]
    if host == "forge":
        importlib.import_module("modules_forge.initialization").initialize_forge()
    importlib.import_module("modules.import_hook")
    importlib.import_module("modules.shared_init").initialize()
    importlib.import_module("modules.processing")


def a1111() -> dict:
    from ldm.models.diffusion.ddpm import DDPM
    from modules import launch_utils, paths, sd_models, shared
    from modules.models.sd3 import sd3_impls, sd3_model
    from omegaconf import OmegaConf

    class Compvis(torch.nn.Module):
        """A model of one of the host's files of settings, with the schedule that the host gives it."""

        is_sdxl, v_posterior = False, 0.0

        def __init__(self, file):
            super().__init__()
            settings = OmegaConf.load(file).model.params
            self.parameterization = settings.get("parameterization", "eps")
            self.model = self.network = Network()
            given = {"linear_start": settings.linear_start, "linear_end": settings.linear_end}
            DDPM.register_schedule(self, timesteps=settings.timesteps, **given)
            self.alphas_cumprod_original = self.alphas_cumprod

        def apply_model(self, x, t, cond):
            return self.network(x, t)

    class Inner(sd3_impls.BaseModel):
        def __init__(self, shift):
            torch.nn.Module.__init__(self)
            self.diffusion_model, self.model_sampling = Network(), sd3_impls.ModelSamplingDiscreteFlow(shift)

    class SD3(sd3_model.SD3Inferencer):
        is_sdxl = False

        def __init__(self):
            torch.nn.Module.__init__(self)
            shift = inspect.signature(sd3_model.SD3Inferencer.__init__).parameters["shift"].default
            self.model = Inner(shift)
            self.network = self.model.diffusion_model

    old = Path(paths.paths["Stable Diffusion"]) / "configs" / "stable-diffusion"
    zsnr = Compvis(old / "v2-inference-v.yaml")
    shared.opts.data["sd_noise_schedule"] = "Zero Terminal SNR"
    sd_models.apply_alpha_schedule_override(zsnr)
    models = {
        "eps": Compvis(Path(paths.script_path) / "configs" / "v1-inference.yaml"),
        "v": Compvis(old / "v2-inference-v.yaml"),
        "zsnr": zsnr,
        "sd3": SD3(),
    }
    given = {"crossattn": torch.zeros(1, 1, 1), "vector": torch.zeros(1, 1)}
    return {
        "host": f"AUTOMATIC1111 {launch_utils.git_tag()}",
        "noise": webui_noise(),
        "models": {
            name: webui_model(model, model.network, lambda wrap: lambda x, sigma: wrap(x, sigma, cond=given))
            for name, model in models.items()
        },
    }


def forge() -> dict:
    import backend
    import diffusers
    from backend.modules import k_prediction
    from backend.patcher.unet import UnetPatcher
    from modules_forge import forge_version

    files = Path(next(iter(backend.__path__))) / "huggingface"

    def discrete(name):
        """The scheduler of one of the architectures whose settings Forge brings along."""
        settings = json.loads((files / name / "scheduler" / "scheduler_config.json").read_text())
        return getattr(diffusers, settings["_class_name"]).from_config(settings)

    def loaded(scheduler=None, predictor=None):
        unet = UnetPatcher.from_model(Network(), scheduler, None, predictor)
        return SimpleNamespace(is_sdxl=False, forge_objects=SimpleNamespace(unet=unet))

    zsnr = loaded(discrete("stabilityai/stable-diffusion-2-1"))
    levels = zsnr.forge_objects.unet.model.predictor
    levels.set_sigmas(k_prediction.rescale_zero_terminal_snr_sigmas(levels.sigmas))
    models = {
        "eps": loaded(discrete("runwayml/stable-diffusion-v1-5")),
        "v": loaded(discrete("stabilityai/stable-diffusion-2-1")),
        "zsnr": zsnr,
        # As its engines of SD 3 and Flux-dev make them.
        "sd3": loaded(predictor=k_prediction.PredictionDiscreteFlow(shift=3.0)),
        "flux": loaded(predictor=k_prediction.PredictionFlux()),
    }

    def around(model):
        inner = model.forge_objects.unet.model
        x0_of = lambda x, sigma: inner.apply_model(x, sigma, c_crossattn=torch.zeros(1, 1, 1))  # noqa: E731
        return webui_model(model, inner.diffusion_model, lambda wrap: x0_of)

    return {
        "host": f"Forge {forge_version.version}",
        "noise": webui_noise(),
        "models": {name: around(model) for name, model in models.items()},
    }


def webui_noise() -> dict:
    from modules import rng

    rows = rng.ImageRNG((4, 8, 8), SEEDS).next()
    return {str(seed): numbers(row)[:8] for seed, row in zip(SEEDS, rows, strict=True)}


def webui_model(model, network: Network, x0_of) -> dict:
    """`x0_of(wrap)` is the host's model around the network, `wrap` the one that its sampler made."""
    from modules import rng, sd_models, sd_samplers, shared

    sd_models.model_data.sd_model, sd_models.model_data.was_loaded_at_least_once = model, True
    wrap = sd_samplers.create_sampler("Euler", model).model_wrap
    plain = {
        "eta": None, "is_hr_pass": False, "sampler_noise_scheduler_override": None, "cfg_scale": 1.0,
        "s_churn": 0.0, "s_tmin": 0.0, "s_tmax": 0.0, "s_noise": 1.0, "denoising_strength": 0.5,
    }  # fmt: skip

    def settings(scheduler, steps):
        draws = rng.ImageRNG((4, 2, 2), [0])  # Forge's Euler always draws, and then adds nothing
        return SimpleNamespace(**plain, scheduler=scheduler, steps=steps, rng=draws, extra_generation_params={})

    def sampler():
        """The host's Euler, and what it calls in place of the host's guided model."""
        made = sd_samplers.create_sampler("Euler", model)
        made.model_wrap_cfg = Pull(padded_cond_uncond=False, padded_cond_uncond_v0=False)
        return made, made.model_wrap_cfg

    def plan(scheduler, steps):
        return numbers(sampler()[0].get_sigmas(settings(scheduler, steps), steps))

    def txt2img(sgm=False):
        shared.opts.data["sgm_noise_multiplier"] = sgm
        made, pull = sampler()
        return walk(pull, made.sample(settings("Simple", 4), NOISE.clone(), None, None))

    def img2img():
        made, pull = sampler()
        made.sample_img2img(settings("Simple", 1), LATENT.clone(), NOISE.clone(), None, None, steps=1)
        return {"sigmas": [*pull.sigmas, 0.0], "start": numbers(pull.xs[0])}

    names = ["Automatic", "Simple", "SGM Uniform", "Turbo"]
    if not hasattr(model, "forge_objects"):
        names.remove("Turbo")
    elif not hasattr(model.forge_objects.unet.model.predictor, "log_sigmas"):
        names = ["Simple"]  # Forge asks a flow model of row numbers, as if they were its timesteps
    return {
        **levels(wrap.sigmas, wrap.sigmas[0], wrap.sigmas[-1]),
        "schedules": {f"{name} {n}": plan(name, n) for name in names for n in STEPS},
        **denoised(network, wrap.sigmas, x0_of(wrap)),
        "pure": txt2img()["x"][0],
        "pure_sgm": txt2img(sgm=True)["x"][0],
        "img2img": img2img(),
        "euler": txt2img(),
    }


# --- the file ---


def written(value, depth: int = 0) -> str:
    """JSON with one line for each list; floats as `repr` gives them."""
    if not isinstance(value, dict):
        return json.dumps(value, allow_nan=False)
    pad = " " * (depth + 1)
    lines = [f"{pad}{json.dumps(key)}: {written(entry, depth + 1)}" for key, entry in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


@torch.no_grad()
def inside(host: str, path: str) -> None:
    """Record the host whose folder is the current one and whose Python this is."""
    sys.path.insert(0, os.getcwd())
    with tempfile.TemporaryDirectory() as data:
        if host != "comfyui":
            start_webui(host, data)
        found = {"comfyui": comfyui, "a1111": a1111, "forge": forge}[host]()
    given = {"x": numbers(X), "noise": numbers(NOISE), "latent": numbers(LATENT)}
    told = {"host": found.pop("host"), "torch": torch.__version__, "given": given, **found}
    Path(path).write_text(written(told) + "\n", encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["inside", host, path]:
            inside(host, path)
        case [host, *into] if host in HOSTS and len(into) < 2:
            print(record(host, Path(into[0] if into else HERE)))
        case _:
            sys.exit(__doc__)
