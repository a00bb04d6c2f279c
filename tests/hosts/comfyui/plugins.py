"""Run by ComfyUI's own Python, without its server: what other nodes do to a student's picture, and to a distillation.

    python plugins.py COMFYUI CLONE SD15 CONTROLNET FLUX

The last three are narrow checkpoints and a ControlNet. Prints a line of JSON, {"plugs": {row: {"sample": ...,
"distil": ...}}, "quantised": the same, "negative": what One-Step Sample's own does}, of the rows that this ComfyUI has:
what was found, or in "refused" the words.
"""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from inside import arguments

# isort: split

import comfy.controlnet
import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import narrow
import packed
import torch
from packed import Missing
from plugs import CALLS, ROWS
from turbodistill.core.card import StudentCard, read_student
from turbodistill.core.denoiser import Guidance, guided
from turbodistill.core.student import Student
from turbodistill.nodes.host import embedded, patcher
from turbodistill.nodes.host.denoiser import ModelDenoiser, conditions
from turbodistill.nodes.host.save import save_merged
from turbodistill.nodes.host.training import ComfyUIHost, trainable
from turbodistill.nodes.sample import OneStepSample
from turbodistill.trainer.config import Config
from turbodistill.trainer.data.pairs import load_pairs, make_pairs, pairs_key
from turbodistill.trainer.run.events import Finished
from turbodistill.trainer.run.run import run

sd15, controlnet, flux = arguments
OneStepSample.hidden = SimpleNamespace(prompt={}, unique_id="1")
PROMPTS = ["a red fox", "a blue owl"]
CONFIG = Config(
    **{"pairs": 4, "pair_steps": 2, "pair_sampler": "euler", "guidance": 3.0, "batch_size": 2, "rank": 2, "updates": 2},
    **{"regression_updates": 1, "adversarial_ramp": 1, "gradient_checkpointing": False, "targets": "attention"},
)
CFG = 3.0


class Pictures(narrow.Pictures):
    latent_channels = 4


@dataclass
class Base:
    """A model as loaders give it, a student of it, and what it makes by itself."""

    model: Any
    clip: Any
    vae: Any
    channels: int
    size: int  # of a latent of 64 pixels
    student: Any = None  # tensors and card
    plain: Any = None

    def text(self, prompt):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))

    def latent(self):
        return {"samples": torch.zeros(1, self.channels, self.size, self.size)}


def small_student(model):
    """Tensors and card of a student that changes the picture."""
    with trainable(model) as trained:
        denoiser = ModelDenoiser(trained)
        torch.manual_seed(1)
        student = Student(denoiser, rank=2)
        with torch.no_grad():
            for branch in student.lora.each():
                branch.up.normal_(std=0.02)
        tensors = {k: v.clone() for k, v in student.lora.export(denoiser.backbone, dtype=torch.float32).items()}
        student.release()
        predicts = denoiser.prediction
    about = {"base_model": "tests", "architecture": "tests", "guidance": 4.0, "resolution": (64, 64), "kind": "lora"}
    about |= {"rank": 2, "alpha": 2.0, "timesteps": (999,), "base_hash": patcher.model_hash(model)}
    return tensors, StudentCard(prediction=predicts, base_prediction=predicts, **about)


def make_base(name):
    if name == "demo":
        return Base(*embedded.load(), 4, 16, read_student(embedded.STUDENT))
    if name == "sd15":
        model, clip, vae, channels = packed.load(sd15), narrow.Text(768, 768), Pictures(), 4
    else:
        model, clip, vae, channels = packed.load(flux), narrow.Text(48, 32), narrow.Pictures(), 16
    return Base(model, clip, vae, channels, 8, small_student(model))


# --- One-Step Sample ---


def pictures(base, model, positive=None, negative=None):
    """A student's latents in one step, and in four."""
    given = {"positive": base.text(PROMPTS[0]) if positive is None else positive, "latent_image": base.latent()}
    given |= {"seed": 1, "denoise": 1.0, "model": model}
    made = []
    for steps in (1, 4):
        torch.manual_seed(0)  # some patches draw from the global generator
        made.append(OneStepSample.execute(**given, steps=steps, negative=negative)[0]["samples"])
    return made


def far(found, expected):
    """The largest difference, in standard deviations of what was expected."""
    assert found.isfinite().all()
    return float((found - expected).abs().max() / expected.std())


def sampled(base, plugged, **inputs):
    """How far the plug moves a student's picture of one step, and of four."""
    tensors, card = base.student
    plain, _ = patcher.with_student(base.model, tensors, card, 1.0, "student")
    model, _ = patcher.with_student(plugged, tensors, card, 1.0, "student")
    return [far(*both) for both in zip(pictures(base, model, **inputs), pictures(base, plain), strict=True)]


# --- Distill ---


def own_x0(model, x, sigma, texts):
    """Guided x0 by ComfyUI's own sampling, from the conditioning to the network."""
    conds = {name: comfy.sampler_helpers.convert_cond(text) for name, text in texts.items()}
    conds = comfy.samplers.process_conds(model.model, x, conds, x.device)
    model.pre_run()
    torch.manual_seed(0)
    given = conds["negative"], conds["positive"], CFG, model.model_options
    x0 = comfy.samplers.sampling_function(model.model, x, sigma, *given)
    model.cleanup()
    return x0


def passes(base, model):
    """x0 of one conditional pass and of a guided one, of the MODEL as it trains, and ComfyUI's own guided x0."""
    denoiser = ModelDenoiser(model)
    patcher.load(model)
    torch.manual_seed(3)
    sigma = denoiser.schedule.sigma(torch.tensor([900.0]))
    x = torch.randn(1, base.channels, base.size, base.size) * sigma.clamp(max=14)
    texts = {"positive": base.text(PROMPTS[0]), "negative": base.text("")}
    cond, uncond = (conditions(model, text, x) for text in texts.values())
    with torch.no_grad():
        one = denoiser(x, sigma, cond)
        torch.manual_seed(0)
        both = guided(denoiser, x, sigma, cond, uncond, Guidance(CFG))
        own = own_x0(model, x, sigma, texts)
    return one, both, own


def hosted(base, model, trained=None):
    host = ComfyUIHost(model, base.clip, base.vae, "tests", 64, 64, trained)
    return host.sampled_by(None, None, CONFIG)


def distilled(base, model, place):
    """The pairs, the hash and the student of a MODEL, by the steps of Teacher Pairs and Distill."""
    host = hosted(base, model)
    key = pairs_key(host, CONFIG, PROMPTS)
    patcher.load(model)
    torch.manual_seed(0)
    for _ in make_pairs(host, CONFIG, PROMPTS, place / "pairs"):
        pass
    pairs = load_pairs(place / "pairs").latents[torch.arange(CONFIG.pairs)]
    with trainable(model) as trained:
        host = hosted(base, model, trained)
        assert pairs_key(host, CONFIG, PROMPTS) == key, "Distill would take the pairs for another model's"
        *_, finished = run(host, CONFIG, place / "run", PROMPTS, pairs_folder=place / "pairs")
    assert isinstance(finished, Finished)
    tensors, card = read_student(finished.path)
    assert card.base_hash == host.base_hash
    learnt = [bool(value.any()) for name, value in tensors.items() if "lora_up" in name]
    return {"hash": card.base_hash, "pairs": pairs, "learnt": sum(learnt) / len(learnt)}


def whole(base, model):
    """Everything of a distillation of this MODEL."""
    with tempfile.TemporaryDirectory() as place:
        made = distilled(base, model, Path(place))
    one, both, own = passes(base, model)
    return made | {"one": one, "own": far(both, own)}


def distil(base, plugged):
    """What the plug does to a distillation."""
    if base.plain is None:
        base.plain = whole(base, base.model)
    found, plain = whole(base, plugged), base.plain
    told = {name: found[name] for name in ("learnt", "own")} | {"hash": found["hash"] != plain["hash"]}
    return told | {name: far(found[name], plain[name]) for name in ("pairs", "one")}


# --- The rows ---


def attempt(look, *given, **inputs):
    """What was found, or the words of a refusal."""
    try:
        return look(*given, **inputs)
    except ValueError as error:
        return {"refused": str(error)}


def look_at(label, base, plug):
    """Both columns of a row."""
    plugged = plug(base)
    inputs = {"negative": base.text("a green cat")} if label == "NAGuidance" else {}
    told = {"sample": attempt(sampled, base, plugged, **inputs), "calls": len(CALLS)}
    told["distil"] = attempt(distil, base, plugged)
    CALLS.clear()
    return told


def look_at_controlnet(base):
    """A ControlNet is on the conditioning: Distill takes prompts alone."""
    net = comfy.controlnet.load_controlnet(controlnet)
    text = base.text(PROMPTS[0])
    apply = import_module("nodes").ControlNetApplyAdvanced().apply_controlnet
    positive, _ = apply(text, text, net, torch.ones(1, 64, 64, 3), 1.0, 0.0, 1.0)
    x = base.latent()["samples"]
    return {
        "sample": attempt(sampled, base, base.model, positive=positive),
        "distil": attempt(conditions, base.model, positive, x),
        "calls": 0,
    }


def bits(model):
    """A hash of the weights' numbers as they are kept, packed or not."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.model.diffusion_model.named_parameters()):
        raw = getattr(weight, "_qdata", weight).detach().as_subclass(torch.Tensor)
        digest.update(name.encode() + raw.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_on(base, model):
    """A distillation over quantised weights."""
    with tempfile.TemporaryDirectory() as place:
        before = bits(model)
        made = distilled(base, model, Path(place))
        patcher.load(model)
        return {"learnt": made["learnt"], "same": bits(model) == before}


def student_on(base, model):
    """How far a student of the unquantised model moves the quantised one's picture, and is from its own there."""
    tensors, card = base.student
    student, _ = patcher.with_student(model, tensors, card, 1.0, "student")
    plain, _ = patcher.with_student(base.model, tensors, card, 1.0, "student")
    made, without, own = (pictures(base, each)[0] for each in (student, model, plain))
    return [far(made, without), far(made, own)]


def look_at_quantised(base, make):
    """Both columns of a row."""
    with tempfile.TemporaryDirectory() as place:
        model = make(flux, place)
        told = {"sample": attempt(student_on, base, model), "distil": attempt(train_on, base, model)}
        path, card = Path(place, "whole.safetensors"), base.student[1]
        told["whole"] = attempt(save_merged, path, model, None, None, card)
        del model
        comfy.model_management.unload_all_models()
    return told


told, bases = {"plugs": {}, "quantised": {}}, {}
with torch.inference_mode():
    for label, (name, plug) in ROWS.items():
        if name not in bases:
            bases[name] = make_base(name)
        try:
            told["plugs"][label] = look_at(label, bases[name], plug)
        except Missing:
            continue
    told["plugs"]["ControlNet"] = look_at_controlnet(bases["sd15"])
    base = bases["demo"]
    told["negative"] = attempt(sampled, base, base.model, negative=base.text("a green cat"))
    for label, make in packed.KINDS.items():
        try:
            told["quantised"][label] = look_at_quantised(bases["flux"], make)
        except Missing:
            continue
print(json.dumps(told))
