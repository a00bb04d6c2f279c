"""An extension of the tests' own: looks at the loaded model, and does to it what other extensions could do."""

import hashlib
import importlib
from pathlib import Path

import networks  # the Lora extension's
from modules import script_callbacks, sd_models
from modules.sd_models import model_data


def network():
    """The UNet that is loaded, whichever host this is."""
    model = model_data.sd_model
    objects = getattr(model, "forge_objects_original", None)
    return objects.unet.model.diffusion_model if objects else model.model.diffusion_model


def state() -> dict:
    """What a training must leave as it was: weights, their flags, hooks; and which LoRAs are applied."""
    weights = hashlib.sha256()
    for _, tensor in sorted(network().state_dict().items()):
        weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    modules = list(network().modules())
    return {
        "weights": weights.hexdigest(),
        "flags": "".join(str(int(p.requires_grad)) for p in network().parameters()),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "forwards": sum("forward" in vars(m) for m in modules),
    }


def matched() -> dict:
    """How many layers of the UNet each LoRA of the last generation changes, by its name."""
    applied = getattr(model_data.sd_model, "forge_objects_after_applying_lora", None)
    if applied is None:
        return {net.name: len(net.modules) for net in networks.loaded_networks}
    if hasattr(applied.unet, "lora_patches"):
        return {Path(key[0]).stem: len(changes) for key, changes in applied.unet.lora_patches.items()}
    return {net.name: len(applied.unet.patches) for net in networks.loaded_networks}  # of one, in Forge's kin


def fail() -> dict:
    """The UNet's next pass with gradients fails."""
    import torch

    def once(*_):
        if torch.is_grad_enabled():
            hook.remove()
            raise RuntimeError("a fault of another extension")

    hook = network().register_forward_pre_hook(once)
    return {}


def switch(title: str) -> dict:
    """Load another checkpoint now, without the host's lock, as a careless extension would."""
    info = next(info for info in sd_models.checkpoints_list.values() if info.name_for_extra == title)
    if hasattr(sd_models, "forge_model_reload"):
        model_data.forge_loading_parameters = model_data.forge_loading_parameters | {"checkpoint_info": info}
        sd_models.forge_model_reload()
    else:
        sd_models.load_model(info)
    return {"loaded": model_data.sd_model.sd_checkpoint_info.name_for_extra}


def spare_what_is_nought() -> None:
    """Forge's autoencoder has full size, but its residual parts add nothing (checkpoint.py): most of its time."""
    for name in ("backend.nn.vae", "ldm_patched.ldm.modules.diffusionmodules.model"):  # of Forge and Neo; of reForge
        try:
            block = importlib.import_module(name).ResnetBlock
        except ImportError:  # AUTOMATIC1111's is small
            continue
        spare(block)


def spare(block: type) -> None:
    whole = block.forward

    def forward(self, x, temb):
        if temb is not None or self.conv2.weight.any() or self.conv2.bias.any():
            return whole(self, x, temb)
        return x if self.in_channels == self.out_channels else self.nin_shortcut(x)

    block.forward = forward


def open_routes(_page, app) -> None:
    for function in (state, matched, fail):
        app.get(f"/inspector/{function.__name__}")(function)
    app.get("/inspector/switch")(switch)


spare_what_is_nought()
script_callbacks.on_app_started(open_routes)
