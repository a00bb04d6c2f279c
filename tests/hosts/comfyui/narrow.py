"""A narrow Flux in ComfyUI, whose own detection takes the widths of the one Flux there is; and what it trains with."""

import comfy.model_detection
import comfy.model_patcher
import torch

detected = comfy.model_detection.detect_unet_config


def narrow(weights, prefix, *told, **more):
    """ComfyUI's own detection, but Flux's widths are the file's."""
    config = detected(weights, prefix, *told, **more)
    if config and config.get("image_model") == "flux":
        hidden, width = weights[f"{prefix}txt_in.weight"].shape
        config |= {
            "hidden_size": hidden,
            "context_in_dim": width,
            "num_heads": 2,
            "axes_dim": [hidden // 8, 3 * hidden // 16, 3 * hidden // 16],
        }
    return config


comfy.model_detection.detect_unet_config = narrow


class Text:
    """As a CLIP: seeded states (1, 7, width) and a pooled vector (1, pooled) for every prompt."""

    layer_idx = None

    def __init__(self, width, pooled):
        self.sizes, cpu = (width, pooled), torch.device("cpu")
        self.patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(2, 2), cpu, cpu)

    def tokenize(self, text):
        return sum(map(ord, text))

    def encode_from_tokens_scheduled(self, tokens):
        width, pooled = self.sizes
        generator = torch.Generator().manual_seed(tokens)
        states = torch.randn(1, 7, width, generator=generator)
        return [[states, {"pooled_output": torch.randn(1, pooled, generator=generator)}]]


class Pictures:
    """As a VAE: a picture is the first channels of its latent, eight times as large."""

    latent_channels = 16

    def spacial_compression_encode(self):
        return 8

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1)


class TextAndPictures:
    CATEGORY = "tests"
    RETURN_TYPES = ("CLIP", "VAE")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        whole = ("INT", {"default": 0, "max": 10**6})
        return {"required": {"width": whole, "pooled": whole}}

    def make(self, width: int, pooled: int):
        return Text(width, pooled), Pictures()


# No literal dictionary: whoever indexes node packs by reading their files would take this for one of our nodes.
NODE_CLASS_MAPPINGS = dict(TestsTextAndPictures=TextAndPictures)
