"""What is no model to distil: what makes each such file, and the words that it is refused with."""

from __future__ import annotations

import gzip
import io
import zipfile

import torch
from safetensors.torch import save

Shapes = dict[str, tuple[int, ...]]
UNET = {
    "input_blocks.0.0.weight": (64, 4, 3, 3),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (64, 768),
}


def whole(shapes, prefix="model.diffusion_model."):
    return {prefix + name: shape for name, shape in shapes.items()}


def channels(count, text=768):
    other = {"input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (64, text)}
    return whole(UNET | other | {"input_blocks.0.0.weight": (64, count, 3, 3)})


FLUX = {
    "double_blocks.0.img_attn.qkv.weight": (96, 32),
    "img_in.weight": (32, 64),
    "vector_in.in_layer.weight": (32, 8),
    "guidance_in.in_layer.weight": (32, 8),
}

# Names and shapes of a file's weights -> the words.
FILES: list[tuple[Shapes, str]] = [
    (channels(9), "is an inpainting model, which needs a picture"),
    (channels(9, 2048), "is an inpainting model"),
    (channels(8), "is a model that edits pictures .*InstructPix2Pix"),
    (channels(5, 1024), "is a depth-to-image model"),
    (channels(7, 1024), "is an upscaler .*x4"),
    (channels(3), "is a model with 3 channels in, where 4 are usual"),
    (channels(4, 1280), "is the refiner of Stable Diffusion XL"),
    (channels(4, 1024) | whole({"label_emb.0.0.weight": (64, 2048)}), "is Stable Diffusion unCLIP"),
    (channels(4, 640), r"holds a UNet that attends to text of width 640: .*\(768\)"),
    (whole({"input_blocks.0.0.weight": (64, 4, 3, 3)}), "holds a UNet that attends to no text"),
    (channels(8, 1024) | whole({"input_blocks.1.1.time_stack.0.attn1.to_k.weight": (4, 4)}), "is a video model"),
    (channels(4, 2048) | {"edm_mean": (1, 4, 1, 1)}, "is Playground 2.5, whose noise levels"),
    (channels(4, 2048) | {"edm_vpred.sigma_max": ()}, "predicts v over EDM's noise levels"),
    (whole(FLUX | {"img_in.weight": (32, 384)}), "is an inpainting model .Flux Fill"),
    (whole(FLUX | {"img_in.weight": (32, 128)}), "control kind .Canny or Depth"),
    (whole(FLUX | {"double_stream_modulation_img.lin.weight": (4, 4)}), "is FLUX.2: it is not loaded here"),
    (whole(FLUX | {"txt_in.individual_token_refiner.blocks.0.norm1.weight": (4,)}), "is a video model .Hunyuan"),
    (whole({"head.modulation": (1, 2, 8), "blocks.0.ffn.0.weight": (8, 8)}), "is a video model .Wan"),
    (whole({"patchify_proj.weight": (8, 8)}), "is a video model .LTX"),
    ({"blocks.0.attn.qkv_x.weight": (8, 8)}, "is a video model .Mochi"),
    ({"net.blocks.0.self_attn.q_proj.weight": (8, 8)}, "is a model of Cosmos' kind"),
    ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)}, "a motion module of AnimateDiff"),
    ({"early_stream_modulations.image.lin.weight": (4, 4)}, "is FLUX.3"),
    ({"double_stream_blocks.0.block.adaLN_modulation.1.bias": (4,)}, "is HiDream"),
    ({"double_layers.0.attn.w1q.weight": (4, 4)}, "is AuraFlow"),
    ({"clip_txt_mapper.weight": (1536, 1280)}, "is Stable Cascade"),
    ({"blocks.0.cross_attn.kv_linear.weight": (4, 4)}, "is PixArt"),
    ({"mlp_t5.0.weight": (4, 4)}, "is HunyuanDiT"),
    ({"txtfusion.projector.weight": (4, 4)}, "is Krea 2"),
    ({"txt_in.text_norm.weight": (4,)}, "is Qwen-Image 2.1"),
    ({"lora_unet_down_blocks_0.lora_down.weight": (4, 320)}, "is a LoRA, not a model: give the model that it bel"),
    ({"diffusion_model.input_blocks.1.1.attn2.to_k.lora_A.weight": (4, 768)}, "is a LoRA"),
    ({"unet.down_blocks.0.attn1.to_q.lora.down.weight": (4, 320)}, "is a LoRA"),
    ({"lora_unet_mid.hada_w1_a": (4, 4)}, "is a LoRA|is a LyCORIS"),
    ({"lycoris_mid.lokr_w1": (4, 4)}, "is a LyCORIS"),
    ({"mid.oft_blocks": (4, 4, 4)}, "is a LyCORIS"),
    ({"mid.diff": (4, 4)}, "is a LyCORIS"),
    ({"control_model.input_blocks.0.0.weight": (4, 4, 3, 3)}, "is a ControlNet"),
    (
        {
            "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        },
        "is a ControlNet",
    ),
    ({"controlnet_blocks.0.weight": (4, 4), "transformer_blocks.0.attn.to_q.weight": (4, 4)}, "is a ControlNet"),
    ({"image_proj.proj.weight": (4, 4), "ip_adapter.1.to_k_ip.weight": (4, 4)}, "is an IP-Adapter"),
    ({"adapter.body.0.resnets.0.block1.weight": (4, 4)}, "is a T2I-Adapter"),
    ({"body.0.block1.weight": (4, 4, 3, 3), "conv_in.weight": (4, 4, 3, 3)}, "is a T2I-Adapter"),
    ({"emb_params": (8, 768)}, "is an embedding .textual inversion"),
    ({"clip_l": (8, 768), "clip_g": (8, 1280)}, "is an embedding"),
    ({"<my-cat>": (768,)}, "is an embedding"),
    ({"first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)}, "is an autoencoder .VAE. alone: give the model"),
    ({"decoder.conv_in.weight": (8, 4, 3, 3), "encoder.conv_in.weight": (8, 3, 3, 3)}, "is an autoencoder"),
    ({"encoder.down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "is an autoencoder"),
    ({"decoder.middle.0.residual.0.gamma": (8, 1, 1, 1)}, "is an autoencoder"),
    ({"text_model.encoder.layers.0.mlp.fc1.weight": (8, 8)}, "is a text encoder alone"),
    ({"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (8, 8)}, "is a text encoder"),
    ({"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}, "is a text encoder"),
    ({"model.layers.0.self_attn.q_proj.weight": (8, 8)}, "is a text encoder"),
    ({"vision_model.encoder.layers.0.mlp.fc1.weight": (8, 8)}, "is an image encoder"),
    ({"model.1.sub.0.RDB1.conv1.0.weight": (8, 8, 3, 3)}, "is an upscaler .ESRGAN"),
    ({"body.0.rdb1.conv1.weight": (8, 8, 3, 3), "conv_first.weight": (8, 3, 3, 3)}, "is an upscaler .ESRGAN"),
    ({"layers.0.residual_group.blocks.0.norm1.weight": (8,)}, "is an upscaler"),
    ({"transformer_blocks.0.attn.to_q.weight": (8, 8)}, "is a part of a diffusers folder: give the folder"),
    ({"cap_embedder.1.weight": (3840, 2560), "all_x_embedder.2-1.weight": (3840, 64)}, "is a part of a diffusers"),
    ({"model_ema.diffusion_modelinput_blocks00weight": (8, 4, 3, 3)}, "only the moving average .EMA."),
    ({"a": (1,), "b": (1,)}, "is of a kind that is not known .its weights are called a, b.: load a model"),
    ({}, "is of a kind that is not known .its weights are called none"),
    (channels(4) | {"a.weight.absmax": (4,)}, "holds quantised weights .by bitsandbytes.: give it in float16"),
    (
        channels(4) | whole({"a.weight.quant_state.bitsandbytes__nf4": (4,)}),
        "holds quantised weights .in 4 bits, by bitsandbytes.",
    ),
    (whole(FLUX | {"img_in.scale_weight": (1,)}), "holds quantised weights .in scaled fp8."),
    (whole(FLUX | {"scaled_fp8": (0,)}), "in scaled fp8"),
    ({"transformer_blocks.0.qweight": (4, 4)}, "in 4 bits, by Nunchaku"),
]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.safetensors", b"")
    return buffer.getvalue()


SOUND = save({"a": torch.zeros(1000)})
# A file's bytes -> the words.
BROKEN: list[tuple[bytes, str]] = [
    (b"", "is no complete safetensors file: it is empty, get it again"),
    (SOUND[:500], "is no complete safetensors file .* get it again"),
    (SOUND[:5], "is no complete safetensors file"),
    (SOUND + b"more", "is no complete safetensors file"),
    (b"GGUF\x03\0\0\0" + bytes(100), "is a GGUF file, whose weights are quantised"),
    (b"<!DOCTYPE html><html>login</html>", "is a web page, not the file: download it again"),
    (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, .* git lfs pull"),
    (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
    (zipped(), "is a zip archive: unpack it"),
    (b"PK\x03\x04" + bytes(50), "is no complete safetensors file"),
    (gzip.compress(SOUND), "is no complete safetensors file"),
    (bytes(1000), "is no complete safetensors file"),
    (b"\xff" * 1000, "is no complete safetensors file"),
]
# The class of a folder's pipeline -> the words.
FOLDERS = [
    ("StableDiffusionInpaintPipeline", "StableDiffusionInpaintPipeline, an inpainting model"),
    ("StableDiffusionXLImg2ImgPipeline", "the refiner of Stable Diffusion XL"),
    ("StableVideoDiffusionPipeline", "a video model"),
    ("FluxFillPipeline", "an inpainting model"),
    ("StableDiffusionControlNetPipeline", "a model with a ControlNet"),
    ("StableDiffusionUpscalePipeline", "an upscaler"),
    ("StableDiffusionInstructPix2PixPipeline", "a model that edits pictures"),
    ("MyPipeline", "MyPipeline, another kind of model: give one that makes pictures of text"),
]
