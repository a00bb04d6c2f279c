"""comfy_api.latest: how nodes are declared and run."""

from __future__ import annotations

import enum
from types import SimpleNamespace

import torch


class Socket:
    """An input or output of a node; a setting that its kind does not have is refused."""

    io_type, settings = "", ()

    def __init__(self, id=None, **given):
        stray = given.keys() - set(self.settings)
        if stray:
            raise TypeError(f"a socket of type {self.io_type} has no {', '.join(sorted(stray))}")
        self.id = id
        for name in self.settings:
            setattr(self, name, given.get(name))


def kind(io_type, *widget):
    inputs = ("display_name", "optional", "tooltip", "lazy", *widget)
    return SimpleNamespace(
        Input=type("Input", (Socket,), {"io_type": io_type, "settings": inputs}),
        Output=type(
            "Output", (Socket,), {"io_type": io_type, "settings": ("display_name", "tooltip", "is_output_list")}
        ),
    )


class Schema:
    def __init__(
        self,
        node_id,
        display_name=None,
        category="sd",
        inputs=(),
        outputs=(),
        hidden=None,
        description="",
        is_output_node=False,
    ):
        self.node_id, self.display_name, self.category, self.description = node_id, display_name, category, description
        self.inputs, self.outputs, self.hidden = list(inputs), list(outputs), list(hidden or [])
        self.is_output_node = is_output_node

    def validate(self):
        names = [socket.id for socket in self.inputs + self.outputs]
        if len(names) != len(set(names)):
            raise ValueError(f"ids must be unique among inputs and outputs: {names}")


class Hidden(enum.Enum):
    prompt = "PROMPT"
    unique_id = "UNIQUE_ID"
    extra_pnginfo = "EXTRA_PNGINFO"


class ComfyNode:
    hidden = None

    @classmethod
    def define_schema(cls):
        raise NotImplementedError

    @classmethod
    def execute(cls, **inputs):
        raise NotImplementedError

    @classmethod
    def run(cls, *, prompt=None, unique_id="1", extra_pnginfo=None, **inputs):
        """As the executor does: in inference mode, on a clone of the class that holds the hidden inputs."""
        asked = {name.value for name in cls.define_schema().hidden}
        held = {"PROMPT": prompt, "UNIQUE_ID": unique_id, "EXTRA_PNGINFO": extra_pnginfo}
        hidden = SimpleNamespace(**{h.name: held.get(h.value) if h.value in asked else None for h in Hidden})
        with torch.inference_mode():
            return type(cls.__name__, (cls,), {"hidden": hidden}).execute(**inputs)


class NodeOutput:
    def __init__(self, *args, ui=None):
        self.args, self.ui = args, ui

    def __getitem__(self, index):
        return self.args[index]


class ExecutionBlocker:
    """In place of an output: nodes that take it do not run."""

    def __init__(self, message):
        self.message = message


class ComfyExtension:
    async def get_node_list(self):
        raise NotImplementedError


class PreviewImage:
    def __init__(self, image, animated=False, cls=None):
        self.image, self.cls = image, cls


class PreviewText:
    def __init__(self, value):
        self.value = value


WIDGET = ("default", "socketless", "force_input")
SOCKETS = (
    {
        "Int": kind("INT", *WIDGET, "min", "max", "step", "control_after_generate", "display_mode"),
        "Float": kind("FLOAT", *WIDGET, "min", "max", "step", "round", "display_mode"),
        "String": kind("STRING", *WIDGET, "multiline", "placeholder", "dynamic_prompts"),
        "Boolean": kind("BOOLEAN", *WIDGET, "label_on", "label_off"),
        "Combo": kind("COMBO", *WIDGET, "options", "control_after_generate", "upload", "image_folder", "remote"),
    }
    | {
        name: kind(name.upper())
        for name in ("Model", "Clip", "Vae", "Conditioning", "Latent", "Image", "Mask", "Sigmas", "Sampler", "Noise")
    }
    | {"ClipVision": kind("CLIP_VISION")}
)
