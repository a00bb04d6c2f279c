"""An extension of the tests' own: looks at the loaded model, and does to it what other extensions could do."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path

import networks  # the Lora extension's
from modules import script_callbacks, sd_models
from modules.sd_models import model_data


def network():
    """The UNet that is loaded, whichever host this is."""
    model = model_data.sd_model
    objects = getattr(model, "forge_objects_original", None)
    return objects.unet.model.diffusion_model if objects else model.model.diffusion_model


def autoencoder():
    """The autoencoder that is loaded."""
    model = model_data.sd_model
    objects = getattr(model, "forge_objects_original", None)
    return objects.vae.first_stage_model if objects else model.first_stage_model


def bits(module) -> str:
    """A hash of a module's weights."""
    weights = hashlib.sha256()
    for _, tensor in sorted(module.state_dict().items()):
        weights.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return weights.hexdigest()


def state() -> dict:
    """What a training must leave as it was: weights, their flags, hooks; and which LoRAs are applied."""
    modules = list(network().modules())
    return {
        "weights": bits(network()),
        "autoencoder": bits(autoencoder()),
        "flags": "".join(str(int(p.requires_grad)) for part in (network(), autoencoder()) for p in part.parameters()),
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


def decoder() -> dict:
    """How far our decoder's pictures are from the host's; its gradient's length, and what a step along it gives."""
    import torch

    (backend,) = [m for name, m in sys.modules.items() if name.endswith("webui_extension.host_backend")]
    with backend._ours().trainable(model_data.sd_model, 64, 64) as host:
        torch.manual_seed(0)
        x = torch.randn(2, *host.latent_shape).mul(0.5).requires_grad_(True)
        made = host.decoder(x)
        gap = (made.detach().clamp(0, 1) - host.decode(x.detach())).abs().max()
        weights = torch.randn_like(made)
        (slope,) = torch.autograd.grad((made * weights).sum(), x)
        step = 1e-2 * slope / slope.norm()
        with torch.no_grad():
            up, down = (float((host.decoder(y) * weights).double().sum()) for y in (x + step, x - step))
    return {"gap": float(gap), "slope": float(slope.norm()), "difference": (up - down) / 2e-2}


def eye() -> dict:
    """What the embedded vision transformer sees of a picture of its own size, by the host's own transformers."""
    import torch

    (loop,) = [m for name, m in sys.modules.items() if name.endswith("trainer.loop.pixel_backbone")]
    eye = loop.load_vision("embedded")
    picture = torch.linspace(0, 1, 3 * 224 * 224).reshape(1, 3, 224, 224).square()
    mean, std = (torch.tensor(x)[:, None, None] for x in (eye.mean, eye.std))
    with torch.no_grad():
        seen = eye.network((picture - mean) / std)
    return {"seen": seen.last_hidden_state.flatten()[::997].tolist()}


def update(again: bool) -> dict:
    """An update of 256 pixels that is judged by pictures: its memory beside what is told, and seconds of its parts."""
    import turbodistill

    (backend,) = [m for name, m in sys.modules.items() if name.endswith("webui_extension.host_backend")]
    file = Path(turbodistill.__file__).parent / "tests" / "hosts" / "one_update.py"
    spec = importlib.util.spec_from_file_location("one_update", file)
    one_update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(one_update)
    settings = {"pixel_backbone": "embedded", "pixel_size": 224, "rank": 16, "batch_size": 1, "precision": "float32"}
    settings |= {"regression_updates": 0, "discriminator_warmup": 0, "updates": 9, "gradient_checkpointing": again}
    with backend._ours().trainable(model_data.sd_model, 256, 256) as host:
        return one_update.measured(host, turbodistill.Config(**settings))


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
    for function in (state, matched, fail, decoder, eye, update):
        app.get(f"/inspector/{function.__name__}")(function)
    app.get("/inspector/switch")(switch)


spare_what_is_nought()
script_callbacks.on_app_started(open_routes)
