"""Everything that touches ComfyUI's own objects: how a MODEL is patched, and how it is sampled."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import torch
from torch import Tensor

from ...core.architecture import SD2, architecture_of
from ...core.card import CardError, StudentCard, fingerprint, header
from ...core.clip_skip import OWN
from ...core.families import SamplingRecipe, by_files, lcm_boundary, of_card, recognise
from ...core.fit import Base, check_fit
from ...core.lora import PARTS, PEFT_PARTS, check_match
from .patches import patches_hash

log = logging.getLogger(__name__)
KEY = "turbodistill.sampling"  # the MODEL's attachment that says how it is sampled
PREFIX = "diffusion_model."


def lcm_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
    """x0 from eps with LCM's boundary scalings, as a method of ComfyUI's model sampling."""
    return lcm_boundary(x, comfy.model_sampling.EPS.calculate_denoised(self, sigma, output, x), self.timestep(sigma))


READINGS = {
    "eps": comfy.model_sampling.EPS.calculate_denoised,
    "v": comfy.model_sampling.V_PREDICTION.calculate_denoised,
    "flow": comfy.model_sampling.CONST.calculate_denoised,
    "x0": comfy.model_sampling.X0.calculate_denoised,
    "lcm": lcm_denoised,
}


def with_sampling(model, sampling: SamplingRecipe):
    """A clone of the MODEL whose output is read as `sampling` says, and which carries it for the samplers."""
    patched = model.clone()
    patched.set_attachments(KEY, sampling)
    current = model.get_model_object("model_sampling")
    old = getattr(current, "as_loaded", current)  # of two such nodes in a row the last counts
    changed: dict[str, Any] = {}
    if sampling.prediction != "inherit":
        changed["calculate_denoised"] = READINGS[sampling.prediction]
    if sampling.shift != 1000:
        changed["timestep"] = lambda self, sigma: sampling.network_timestep(old.timestep(sigma))
    if changed or old is not current:
        # The schedule stays the model's own, buffers and all: only the reading of the output differs.
        new = copy.copy(old)
        new.__class__ = type("OneStepSampling", (type(old),), changed | {"as_loaded": old})
        patched.add_object_patch("model_sampling", new)
    return patched


def sampling_of(model) -> SamplingRecipe:
    """How the MODEL is sampled: what was attached to it, else as an ordinary Turbo."""
    return model.attachments.get(KEY) or SamplingRecipe("one-step model")


def base_weights(patcher, prefix: str = PREFIX) -> dict[str, Tensor]:
    """A MODEL's own weights, as they were before any patch, by single-file names.

    A quantised one is whole, of its true shape, where ComfyUI's own list has the packed numbers and their scales.
    """
    model, kept = patcher.model, {name: entry.weight for name, entry in patcher.backup.items()}
    found = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    listed = patcher.model_state_dict(prefix)
    return {name.removeprefix(prefix): kept.get(name, value) for name, value in found if name in listed}


def model_hash(patcher, prefix: str = PREFIX) -> str:
    """The fingerprint of a MODEL's weights, and of all that nodes have put on it, if anything is."""
    found = fingerprint(base_weights(patcher, prefix))
    names = sorted(name for name in patcher.patches if name.startswith(prefix))
    patches = patches_hash(patcher)
    if not (names or patches):
        return found
    digest = hashlib.sha256((found + patches).encode())
    for name in {names[i * len(names) // 16]: None for i in range(16 if names else 0)}:
        for patch in patcher.patches[name]:
            for part in _patch(name, patch):
                digest.update(part)
    return digest.hexdigest()[:16]


def _patch(name: str, patch: Sequence[Any]) -> Iterator[bytes]:
    """What a patch of a weight does, as bytes: a LoRA's, a LyCORIS's, or another model's with its own patches."""
    strength, change, base, *_ = patch
    yield f"{name} {strength} {base}".encode()
    for tensor in _tensors(getattr(change, "weights", change[:1] if isinstance(change, list) else change)):
        yield tensor.detach().flatten()[:64].half().cpu().numpy().tobytes()
    for further in change[1:] if isinstance(change, list) else ():
        yield from _patch(name, further)


def clip_hash(clip) -> str:
    """The same of a CLIP, with the layer that it stops at and how it cuts texts into tokens."""
    options = getattr(clip, "tokenizer_options", None) or ""
    return model_hash(clip.patcher, "") + hashlib.sha256(f"{clip.layer_idx}{options}".encode()).hexdigest()[:8]


def clip_skip(layer: int | None, architecture: str) -> int:
    """The layer that a CLIP stops at (-1, -2, ...; None is the model's own), as `core.clip_skip` counts; 0 is unknown.

    ComfyUI counts the whole of Stable Diffusion 2's, of which diffusers leaves the last layer out.
    """
    own = OWN.get(architecture, 0)
    if layer is None or not own:
        return own
    if not layer:
        return 0
    return -layer - (architecture == SD2)


def _tensors(value) -> Iterator[Tensor]:
    """The tensors in a patch, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def prediction_of(model) -> str:
    """What the MODEL's network predicts, in the card's words, or "unknown"."""
    space = model.get_model_object("model_sampling")
    reading = getattr(type(getattr(space, "as_loaded", space)), "calculate_denoised", None)
    return next((name for name, known in READINGS.items() if known is reading), "unknown")


def with_student(model, tensors: Mapping[str, Tensor], card: StudentCard, strength: float, path: str):
    """A clone of the MODEL with a student's weights, sampled as its card says; and a warning in words, or "".

    Raises CardError for a student of another architecture or prediction type.
    """
    warning = check_student(model, {name: value.shape for name, value in tensors.items()}, card, strength, path)
    if warning:
        log.warning(warning)
    patched = _with_lora(model, tensors, strength) if card.kind == "lora" else _with_full(model, tensors, strength)
    return with_sampling(patched, of_card(card)), warning


def check_student(model, shapes: Mapping[str, Sequence[int]], card: StudentCard, strength: float, path: str) -> str:
    """What does not fit between a student whose tensors have these shapes and the MODEL, in words; raises CardError."""
    # Made with what is patched onto it, or without.
    base = Base(architecture(model), prediction_of(model), (model_hash(model), fingerprint(base_weights(model))))
    warning = "\n".join(check_fit(card, base, path, weight=strength))
    try:
        (_check_lora if card.kind == "lora" else _check_full)(model, shapes)
    except (ValueError, IndexError) as error:
        raise CardError(f"{path} does not fit the connected model: {error} Its base is {card.base_model}.") from None
    return warning


def true_shapes(model) -> dict[str, tuple[int, ...]]:
    """The shapes of a MODEL's weights by name, before any patch."""
    return {PREFIX + name: tuple(weight.shape) for name, weight in base_weights(model).items()}


def _check_lora(model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError if tensors of these names and shapes are no LoRA for the MODEL."""
    table = comfy.lora.model_lora_keys_unet(model.model, {})
    parts = PEFT_PARTS if any(key.endswith(PEFT_PARTS) for key in shapes) else PARTS
    names = {key.removesuffix(f".{part}") for key in shapes for part in parts if key.endswith(f".{part}")}
    known = names.intersection(table)
    if not names or known != names:
        stray = sorted(names - known)[:2]
        raise ValueError(f"{len(known)} of its {len(names)} layers are in this model (not: {stray}).")
    check_match("LoRA", shapes, [f"{name}.{part}" for name in names for part in parts])
    weights = true_shapes(model)
    for name in sorted(names):
        own = _shape_at(weights, table[name])
        down, up = shapes[f"{name}.{parts[0]}"], shapes[f"{name}.{parts[1]}"]
        if (up[0], *down[1:]) != own:
            raise ValueError(f"{name} is for a layer of shape {(up[0], *down[1:])}, here it is {own}.")


def _shape_at(weights: Mapping[str, tuple[int, ...]], place: Any) -> tuple[int, ...]:
    """The shape at a place in ComfyUI's table: a weight, or (name, None or (dimension, start, size) of a part, ...)."""
    if isinstance(place, str):
        return weights[place]
    shape = list(weights[place[0]])
    if place[1] is not None:
        dimension, _, size = place[1]
        shape[dimension] = size
    return tuple(shape)


def _with_lora(model, tensors: Mapping[str, Tensor], strength: float):
    table = comfy.lora.model_lora_keys_unet(model.model, {})
    patched = model.clone()
    patched.add_patches(comfy.lora.load_lora(dict(tensors), table, log_missing=False), strength)
    return patched


def _own(names: Mapping[str, Any]) -> dict[str, Any]:
    """Of a whole student, which may hold text encoder and autoencoder as well, what is the network's."""
    return {k.removeprefix("model."): v for k, v in names.items() if k.startswith(f"model.{PREFIX}")}


def _check_full(model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError if tensors of these names and shapes are no whole student of the MODEL."""
    weights, given = true_shapes(model), _own(shapes)
    check_match("student", given, weights)
    for name, shape in given.items():
        if tuple(shape) != weights[name]:
            raise ValueError(f"{name} has shape {tuple(shape)}, here it is {weights[name]}.")


def _with_full(model, tensors: Mapping[str, Tensor], strength: float):
    patched = model.clone()
    patched.add_patches({name: (value,) for name, value in _own(tensors).items()}, strength, 1 - strength)
    return patched


def sigmas_for(model, timesteps: Sequence[int]) -> Tensor:
    """Sigmas (n + 1,) of the MODEL's own schedule at timesteps of 1000, with the final 0; a flow by its recipe."""
    return sampling_of(model).sigmas(model.get_model_object("model_sampling").sigmas, timesteps)


class Space:
    """ComfyUI's model sampling with `add_noise` in core's words."""

    def __init__(self, space):
        self.space = space

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x0, noise (B, ...), one level sigma (B,) -> the noisy input (B, ...)."""
        return self.space.noise_scaling(sigma[0], noise, x0)


class FewStep(comfy.samplers.KSAMPLER):
    """A model's sampler: core's few-step sampler, or its Euler, as `sampling` says."""

    def __init__(self, sampling: SamplingRecipe):
        super().__init__(self.steps)
        self.sampling = sampling

    def max_denoise(self, model_wrap, sigmas) -> bool:
        return not self.sampling.exact and super().max_denoise(model_wrap, sigmas)

    @torch.no_grad()
    def steps(self, model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
        """Noise x (B, C, H, W) at sigmas[0], sigmas (n + 1,) -> latents (B, C, H, W)."""
        schedule = Space(model.inner_model.inner_model.model_sampling)
        return self.sampling.sample(model, x, sigmas, extra_args, callback, schedule=schedule)


def euler(model, steps: int) -> tuple[Any, Tensor]:
    """What a teacher is sampled with: ComfyUI's Euler sampler, and sigmas of its `normal` scheduler."""
    space = model.get_model_object("model_sampling")
    return comfy.samplers.ksampler("euler"), comfy.samplers.calculate_sigmas(space, "normal", steps)


def load(model) -> None:
    """Bring the MODEL to where it computes."""
    comfy.model_management.load_models_gpu([model])


def files(folder: str) -> list[str]:
    """Names of the files in one of ComfyUI's model folders."""
    return folder_paths.get_filename_list(folder)


def file_path(folder: str, name: str) -> str | None:
    """Where such a file lies; None if it has gone."""
    return folder_paths.get_full_path(folder, name)


FOLDERS = ("loras", "checkpoints", "diffusion_models")  # of weight files


def sampling_by_files(names: Sequence[str], model) -> SamplingRecipe | None:
    """How the first of these files of the MODEL is sampled that says so: by a student's card, or as a known family."""
    given = [(path, name) for name in names for folder in FOLDERS if (path := file_path(folder, name))]
    known = {name for _, name in given}
    made_of, predicts = architecture(model), prediction_of(model)
    if found := by_files(given, made_of, predicts):
        return found[1]
    return recognise(*(n for n in names if n not in known), architectures=[made_of], prediction=predicts)


def metadata(names: Sequence[str]) -> dict[str, str]:
    """What these files of the MODEL say of themselves, of one key what the last says: that nearest the checkpoint."""
    paths = [path for name in names for folder in FOLDERS if (path := file_path(folder, name))]
    return {key: value for path in paths for key, value in header(path)[0].items()}


def architecture(model) -> str:
    """What a card calls the MODEL's architecture: by its weights, else as ComfyUI does."""
    kind = type(model.model.model_config)  # of the class: an instance has None for whatever it is asked
    shapes = {name.removeprefix(PREFIX): shape for name, shape in true_shapes(model).items()}
    return getattr(kind, "architecture", architecture_of(shapes) or kind.__name__)


def title(model) -> str:
    """What a MODEL is called that no file of the graph gave."""
    return getattr(type(model.model.model_config), "title", type(model.model).__name__)


# For what factors between pixels and latent an empty latent was made: it then fits a model of another (Flux.2).
RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")


def fitting(model, latent: dict) -> Tensor:
    """The latent's samples (B, C, H, W), an empty one's with the MODEL's number of channels and factor.

    Raises ValueError if a picture's latent has another number of channels.
    """
    taken = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters  # older cores have no ratios
    ratios = {name: latent[name] for name in RATIOS if name in latent and name in taken}
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
    wanted = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != wanted:
        raise ValueError(
            f"the latent has {samples.shape[1]} channels, this model wants {wanted}: encode the picture with the VAE "
            "that belongs to the model"
        )
    return samples


def sample(model, positive, latent: dict, seed: int, sigmas: Tensor, sampler, negative=None, cfg: float = 1.0) -> dict:
    """Run ComfyUI's own sampling, with its previews and progress; the latent dict with new samples.

    Some nodes' patches (Self-Attention Guidance) ask for a negative at cfg 1, too: without one it is the positive.
    """
    samples = fitting(model, latent)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive, "negative": positive if negative is None else negative})
    guider.set_cfg(cfg)
    out = guider.sample(
        noise,
        samples,
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    rest = {name: value for name, value in latent.items() if name not in RATIOS}
    return rest | {"samples": out.to(comfy.model_management.intermediate_device())}
