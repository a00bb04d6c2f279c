"""What stands in the way of distilling a pipeline, or of a student on it, in words and before anything is changed."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from ...core.lora import quantised
from ...core.precision import PRECISIONS
from .host import ModelError
from .kinds import PipelineKind, channels_of, network_of

# Networks that carry a student: nothing is written on a pipeline itself.
IN_USE: WeakSet[nn.Module] = WeakSet()
SANA = "SanaTransformer2DModel"


def check_pipeline(pipe: Any, kind: PipelineKind) -> Any:
    """The network of a pipeline on which a LoRA can stand; raises ModelError."""
    attribute, wanted = kind.network
    network, name = network_of(pipe, kind), type(pipe).__name__
    if network is None or getattr(pipe, "vae", None) is None:
        raise ModelError(
            f"this {name} has no {'vae' if network is not None else attribute}: load it with all its parts"
        )
    if wanted not in (base.__name__ for base in type(network).__mro__):
        raise ModelError(f"the {attribute} of this {name} is a {type(network).__name__}: it must be a {wanted}")
    _check_inputs(network, kind, pipe.vae, name)
    _check_weights(network, attribute)
    if any(getattr(m, "fused_projections", False) for m in network.modules()):
        raise ModelError(
            f"the attention of this {name} is fused, so that a LoRA of its parts would do nothing: call "
            "pipe.unfuse_qkv_projections()"
        )
    return network


def _check_inputs(network: Any, kind: PipelineKind, vae: Any, name: str) -> None:
    """Raise ModelError for a network that wants more than noise and text."""
    channels = channels_of(network, kind)
    own = vae.config.get("latent_channels") or vae.config.get("z_dim")
    if channels != own:
        raise ModelError(
            f"this {name} takes {channels} channels and its vae makes {own}: it wants a picture or a mask beside the "
            "latent, as those for inpainting and control do. Give the ordinary model"
        )
    if getattr(network, "encoder_hid_proj", None) is not None:
        raise ModelError(
            f"this {name} carries an IP-Adapter, whose picture a student never sees: pipe.unload_ip_adapter()"
        )
    # Latent consistency models, and Sana Sprint.
    if network.config.get("time_cond_proj_dim") or (kind.network[1] == SANA and network.config.get("guidance_embeds")):
        raise ModelError(f"the model of this {name} is distilled already (it takes a guidance scale): give its base")


def _check_weights(network: nn.Module, attribute: str) -> None:
    """Raise ModelError for weights that no LoRA can stand beside, or that are not there."""
    for weight in network.parameters():
        if weight.is_meta:
            raise ModelError(
                f"weights of the {attribute} are not in memory (sequential or group offload): call "
                "pipe.remove_all_hooks() or load the pipeline again, then pipe.to(...)"
            )
        if quantised(weight) or weight.dtype not in PRECISIONS.values():
            kind = type(weight).__name__ if quantised(weight) else str(weight.dtype).removeprefix("torch.")
            raise ModelError(
                f"the {attribute} is quantised ({kind}): load it in float32, bfloat16 or float16, without a "
                "quantization_config or layerwise casting"
            )


def check_free(network: nn.Module) -> None:
    """Raise ModelError for a network that carries a student."""
    if network in IN_USE:
        raise ModelError("the pipeline carries a student: call release() of what use_student returned first")


def check_trainable(pipe: Any, network: nn.Module, attribute: str) -> None:
    """Raise ModelError for a pipeline that only samples as it stands."""
    check_free(network)
    _check_texts(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and (hook := _moves(part)):
            raise ModelError(
                f"the {name} is moved for every pass ({hook}), and a training needs it to stay: call "
                "pipe.remove_all_hooks() or pipe.reset_device_map() or load the pipeline again, then pipe.to(...)"
            )
    if hooked := next((m for m in network.modules() if _registered(m)), None):
        raise ModelError(
            f"the {attribute} is changed by hooks of diffusers ({', '.join(_registered(hooked))}): switch them off, "
            f"such as by pipe.{attribute}.disable_cache(), or load the pipeline again"
        )
    devices = {weight.device for weight in network.parameters()}
    if len(devices) > 1:
        raise ModelError(f"the {attribute} lies on {len(devices)} devices: move it to one, pipe.to(...)")
    weight = next(network.parameters())
    if weight.dtype == torch.float16 and weight.device.type == "cpu":
        raise ModelError(
            f"the {attribute} is in float16, which has no room for a training's small gradients on a CPU: "
            "pipe.to(torch.bfloat16) or pipe.to(torch.float32)"
        )
    if any(p.is_inference() for p in network.parameters()):
        raise ModelError(
            f"the {attribute} was loaded in torch.inference_mode, where no gradient flows: load it outside"
        )


def _check_texts(pipe: Any) -> None:
    """Raise ModelError for a pipeline that cannot encode a prompt, or wants more than one."""
    name, spared = type(pipe).__name__, (*pipe._optional_components, "text_encoder_3", "tokenizer_3")
    parts = {key: part for key, part in pipe.components.items() if key.startswith(("text_encoder", "tokenizer"))}
    missing = [key for key, part in parts.items() if part is None and key not in spared]
    if missing or not any(part is not None for part in parts.values()):
        raise ModelError(f"this {name} has no {(missing or list(parts))[0]}: load it with all its parts")
    if pipe.config.get("requires_aesthetics_score"):
        raise ModelError(f"this {name} is a refiner, which begins from another model's picture: give that model")


def _moves(part: nn.Module) -> str:
    """What moves a component between devices; "" if nothing does."""
    if hasattr(part, "_hf_hook"):
        return f"accelerate's {type(part._hf_hook).__name__}"
    if getattr(part, "hf_device_map", None):
        return "a device map"
    return next((name for m in part.modules() for name in _registered(m) if "offload" in name), "")


def _registered(module: nn.Module) -> list[str]:
    """Names of diffusers' own hooks on a module."""
    return list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}))
