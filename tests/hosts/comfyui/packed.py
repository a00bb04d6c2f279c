"""A narrow Flux whose weights are quantised, as files and as the MODELs that ComfyUI's loaders make of them."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import comfy.sd
import folder_paths
import torch
from safetensors.torch import load_file, save_file

PREFIX = "model.diffusion_model."


class Missing(Exception):
    """This ComfyUI has no such node or format."""


def load(path, **options):
    """The MODEL of a checkpoint."""
    return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False, model_options=options)[
        0
    ]


def wide(name, weight):
    """Whether it is a matrix of a block, which files have quantised."""
    return "_blocks." in name and name.endswith(".weight") and weight.ndim == 2


def plain_float8(flux, place):
    """As weight_dtype of *Load Diffusion Model* makes it."""
    return load(flux, dtype=torch.float8_e4m3fn)


def scaled_float8(flux, place):
    """Files with one scale a matrix, in their older form, which every ComfyUI reads."""
    packed = {f"{PREFIX}scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, weight in load_file(flux).items():
        packed[name] = weight
        if name.endswith(".weight") and weight.ndim == 2:
            scale = weight.float().abs().max() / 448
            packed[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            packed[name.removesuffix("weight") + "scale_weight"] = scale
    path = Path(place, "scaled.safetensors")
    save_file(packed, path)
    return load(path)


def quantised(kind):
    """Newer files, which say of each matrix how it is quantised."""

    def make(flux, place):
        try:
            from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
        except ImportError:
            raise Missing(kind) from None
        if kind not in QUANT_ALGOS:
            raise Missing(kind)
        packed, layout = {}, QUANT_ALGOS[kind]["comfy_tensor_layout"]
        about = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
        for name, weight in load_file(flux).items():
            if wide(name, weight):
                packed |= QuantizedTensor.from_float(weight.bfloat16(), layout).state_dict(name)
                packed[name.removesuffix("weight") + "comfy_quant"] = about.clone()
            else:
                packed[name] = weight
        path = Path(place, f"{kind}.safetensors")
        save_file({name: value.contiguous() for name, value in packed.items()}, path)
        return load(path)

    return make


def gguf_nodes():
    """The node pack ComfyUI-GGUF, from the folder GGUF_PATH or ComfyUI's custom_nodes; its package gguf with it."""
    folders = [Path(os.environ["GGUF_PATH"])] if os.environ.get("GGUF_PATH") else []
    folders += [Path(place, "ComfyUI-GGUF") for place in folder_paths.get_folder_paths("custom_nodes")]
    found = next((folder / "__init__.py" for folder in folders if (folder / "__init__.py").exists()), None)
    if found is None or importlib.util.find_spec("gguf") is None:
        raise Missing("GGUF")
    if "comfyui_gguf" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "comfyui_gguf", found, submodule_search_locations=[str(found.parent)]
        )
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules["comfyui_gguf"].NODE_CLASS_MAPPINGS


def gguf(kind):
    """As *Unet Loader (GGUF)* gives it: a tensor class of its own, which stays packed."""

    def make(flux, place):
        folder_paths.add_model_folder_path("diffusion_models", str(place))
        loader = gguf_nodes()["UnetLoaderGGUF"]
        import gguf

        packing, path = gguf.GGMLQuantizationType[kind], Path(place, f"{kind}.gguf")
        writer = gguf.GGUFWriter(path, "flux")
        for name, weight in load_file(flux).items():
            values = weight.float().numpy()
            fits = wide(name, weight) and weight.shape[1] % 32 == 0
            packed = gguf.quants.quantize(values, packing) if fits else values
            writer.add_tensor(name.removeprefix(PREFIX), packed, raw_dtype=packing if fits else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return loader().load_unet(path.name)[0]

    return make


KINDS = {
    "float8 (weight_dtype)": plain_float8,
    "float8, scaled": scaled_float8,
    "float8_e4m3fn": quantised("float8_e4m3fn"),
    "mxfp8": quantised("mxfp8"),
    "nvfp4": quantised("nvfp4"),
    "int8_tensorwise": quantised("int8_tensorwise"),
    "GGUF Q8_0": gguf("Q8_0"),
    "GGUF Q4_0": gguf("Q4_0"),
}
