"""Run by ComfyUI's own Python, without its server: our adapter on weights that are streamed to the GPU (dynamic VRAM).

    python dynamic.py COMFYUI CLONE CHECKPOINT

There is no GPU here: the device is torch's "meta", which has shapes and places but no numbers, and the memory that
weights are streamed through is a stand-in. All else is ComfyUI's own. Prints a line of JSON.
"""

import json

from inside import arguments

# isort: split

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from turbodistill.core import lora
from turbodistill.core.denoiser import Cond
from turbodistill.core.features import TeacherFeatures
from turbodistill.core.student import Student
from turbodistill.nodes.host import denoiser as adapter
from turbodistill.nodes.host.patcher import model_hash
from turbodistill.nodes.host.training import trainable

(checkpoint,) = arguments
GPU = torch.device("meta")


class Memory:
    """What weights are streamed through, as comfy-aimdo's: a copy would free it twice."""

    def __init__(self, size, device):
        self.used = 0

    def alloc(self, size):
        self.used += size
        return (self, self.used - size, size)

    def __deepcopy__(self, memo):
        raise AssertionError("the memory that weights are streamed through was copied")

    def prioritize(self):
        pass

    def loaded_size(self):
        return 0

    def free_memory(self, size):
        return 0


class HostBuffer:
    size = 0

    def __init__(self, *_):
        pass


comfy.model_patcher.comfy_aimdo.model_vbar.ModelVBAR = Memory
comfy.model_patcher.comfy_aimdo.host_buffer.HostBuffer = HostBuffer
comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic  # as main.py does where there is a GPU
lora.autocasts = lambda device: False  # there is none of this device
comfy.model_management.get_free_memory = lambda dev=None, torch_free_too=False: (2**40, 0) if torch_free_too else 2**40
comfy.model_management.soft_empty_cache = lambda force=False: None
comfy.model_management.pinned_hostbuf_size = lambda size: 0


def state(model):
    """Where every weight lies, and which tensor it is."""
    return {n: (p.device.type, p.data_ptr(), id(p)) for n, p in model.model.diffusion_model.named_parameters()}


with torch.inference_mode():
    model, *_ = comfy.sd.load_checkpoint_guess_config(
        checkpoint, output_vae=False, output_clip=False, model_options={"load_device": GPU}
    )
    # Noise levels are numbers, which the device has none of: as they were read.
    levels = adapter.levels_of(model)
    adapter.levels_of = lambda _model: levels
    comfy.model_management.load_models_gpu([model])
    streamed = sum(hasattr(m, "_v") for m in model.model.modules())
    before, named = state(model), model_hash(model)
    with trainable(model) as trained:
        told = {"dynamic": [model.is_dynamic(), trained.is_dynamic()], "streamed": streamed}
        told["on"] = sorted({p.device.type for p in trained.model.diffusion_model.parameters()})
        denoiser = adapter.ModelDenoiser(trained)
        x = torch.zeros(2, 4, 8, 8, device=GPU)
        cond, sigma = Cond(torch.zeros(2, 7, 768, device=GPU)), torch.ones(2, device=GPU)
        student, features = Student(denoiser, rank=2), TeacherFeatures(denoiser)
        with student.training():
            x0 = student(x, sigma, cond)
            (x0.square().mean() + sum(m.square().mean() for m in features(x0, sigma, cond))).backward()
        told["branches"] = len(student.lora.each())
        told["taught"] = sum(b.up.grad is not None and b.up.grad.device == GPU for b in student.lora.each())
        student.release()
        full = Student(denoiser, rank=0)
        with full.training():
            full(x, sigma, cond).square().mean().backward()
        told["full"] = all(p.grad is not None for p in full.backbone.parameters())
    after = state(model)
    told["alone"] = all(after[name] == place for name, place in before.items() if place[0] == "cpu")
    told["hash"] = model_hash(model) == named
    comfy.model_management.load_models_gpu([model])  # and it is sampled again
    told["again"] = state(model).keys() == before.keys()
    model.cached_patcher_init = None
    try:
        with trainable(model):
            pass
    except ValueError as error:
        told["refused"] = str(error)
print(json.dumps(told))
