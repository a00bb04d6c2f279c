"""How layers are named in a LoRA file, whatever the layout of the network, and whatever else it carries."""

import pytest
import torch
from turbodistill.core.lora import LoRA, adaptable
from turbodistill.core.naming import to_single_file
from turbodistill.core.student import Student


def inputs(toys, denoiser, batch=2):
    return toys.picture(batch), denoiser.schedule.sigma(torch.linspace(500, 999, batch)), toys.cond(batch)


def test_lora_keys_of_stable_diffusion_1_are_kohya_s_in_every_layout(toys):
    """As kohya writes them, by diffusers' names: a single-file UNet's layers are called the same."""
    unet = toys.small_unet()
    own = LoRA(unet, rank=2)
    names = own.file_names(unet, "diffusers")
    assert f"lora_unet_{own.names[5].replace('.', '_')}" == names[5] and not any("input_blocks" in n for n in names)
    table = to_single_file([n for n, _ in unet.named_parameters()])
    single = Renamed({table[f"{n}.weight"].removesuffix(".weight"): m for n, m in unet.named_modules() if adaptable(m)})
    other = LoRA(single, rank=2)
    assert set(other.file_names(single, "diffusers")) == set(names)
    own.remove()
    tensors = own.export(unet, "diffusers", torch.float32)
    other.load(single, tensors)
    assert all(torch.equal(v, tensors[k]) for k, v in other.export(single, "diffusers", torch.float32).items())


class Renamed(torch.nn.Module):
    """Layers under other names."""

    def __init__(self, layers):
        super().__init__()
        for name, layer in layers.items():
            *path, last = name.split(".")
            parent = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, torch.nn.Module())
                parent = parent._modules[part]
            parent.add_module(last, layer)


class WithAdapter(torch.nn.Module):
    """A layer and the LoRA that peft has put around it, by peft's names."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A = torch.nn.ModuleDict({"style": torch.nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"style": torch.nn.Linear(2, layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["style"](self.lora_A["style"](x))


def test_a_teacher_s_own_lora_is_neither_adapted_nor_named(toys):
    teacher = toys.conv()
    bare = LoRA(teacher.backbone, rank=2)
    names = bare.file_names(teacher.backbone)
    bare.remove()
    teacher.backbone.text = WithAdapter(teacher.backbone.text)
    student = Student(teacher, rank=2)
    assert student.lora.file_names(teacher.backbone) == names
    toys.nudge(student.lora)
    x, sigma, cond = inputs(toys, teacher)
    expected = student(x, sigma, cond)
    with student.merged():
        assert torch.allclose(student(x, sigma, cond), expected, atol=1e-4)
    student.release()
    with pytest.raises(ValueError, match="rank 0 trains a full copy, but the model carries a LoRA"):
        Student(teacher, rank=0)
