"""Our nodes over stand-ins of ComfyUI, toy checkpoints, and student files of them."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from turbodistill.core.card import StudentCard, fingerprint, read_student
from turbodistill.core.student import Student, student_bytes
from turbodistill.trainer.run import training
from turbodistill.trainer.run.state_file import read_state


@pytest.fixture(scope="session")
def comfyui():
    """The package `stand_ins`, by its path."""
    place = Path(__file__).with_name("stand_ins") / "__init__.py"
    spec = importlib.util.spec_from_file_location("turbodistill_stand_ins", place)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its files import each other
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nodes(comfyui):
    """Our modules: nodes.patcher, nodes.load and so on; ComfyUI's stand-ins are importable as long as this lives."""
    with comfyui.installed() as modules:
        yield modules


@pytest.fixture
def model_of(comfyui):
    """A toy denoiser -> the MODEL that ComfyUI would make of it."""

    def build(toy, **settings):
        schedule = toy.schedule
        if toy.prediction == "flow":
            space = comfyui.model_sampling(comfyui.CONST, comfyui.ModelSamplingDiscreteFlow, schedule.shift)
            # A flow model is told sigma here, the toy its unshifted timestep.
            settings.setdefault("process_timestep", lambda t: schedule.timestep(t / 1000) / 1000)
        else:
            reading = {"eps": comfyui.EPS, "v": comfyui.V_PREDICTION, "x0": comfyui.X0}[toy.prediction]
            space = comfyui.model_sampling(reading, comfyui.ModelSamplingDiscrete)
            settings.setdefault("process_timestep", lambda t: t / 1000)
        return comfyui.ModelPatcher(comfyui.BaseModel(toy.backbone, space, **settings))

    return build


@pytest.fixture
def loaded(toys, model_of):
    """A toy denoiser -> its MODEL as ComfyUI loads it: in inference mode, its weights asking for gradients."""

    def load(prediction="eps", make=toys.conv, **settings):
        with torch.inference_mode():
            toy = make(prediction, **settings)
            for module in toy.backbone.modules():
                for name, weight in module._parameters.items():
                    module._parameters[name] = torch.nn.Parameter(weight.clone())
            return model_of(toy)

    return load


@pytest.fixture
def clip_of(comfyui, toys):
    """A CLIP for the toys."""
    return lambda seed=0: comfyui.Text(toys.TEXT, seed)


@pytest.fixture
def student_of(toys):
    """A toy teacher -> a student of it that has learnt something."""

    def build(teacher, rank=4, **settings):
        student = Student(teacher, rank, **settings)
        if student.lora:
            toys.nudge(student.lora)
        else:
            with torch.no_grad():
                for weight in student.backbone.parameters():
                    weight.add_(torch.randn_like(weight), alpha=0.1)
        return student

    return build


def card_of(student: Student) -> StudentCard:
    lora = student.lora
    return StudentCard(
        kind="lora" if lora else "full",
        base_model="toy",
        base_hash=fingerprint(student.teacher.backbone),
        architecture="toy",
        prediction=student.prediction,
        base_prediction=student.teacher.prediction,
        timesteps=(student.start_timestep,),
        guidance=4.0,
        resolution=(8, 8),
        rank=lora.rank if lora else 0,
        alpha=lora.alpha if lora else 0.0,
    )


@pytest.fixture
def saved(tmp_path):
    """A student -> the path of its file, as the trainer writes it but in full precision."""

    def save(student, name="student.safetensors"):
        path = tmp_path / name
        path.write_bytes(student_bytes(student, card_of(student), torch.float32))
        return path

    return save


# --- training in ComfyUI ---


@pytest.fixture
def places(comfyui, tmp_path, monkeypatch):
    """ComfyUI's folders, empty: input, output, temp, and of models."""
    found = {name: tmp_path / name for name in ("input", "output", "temp")}
    models = {name: tmp_path / "models" / name for name in ("loras", "checkpoints", "diffusion_models")}
    for path in (*found.values(), *models.values()):
        path.mkdir(parents=True)
    monkeypatch.setattr(comfyui.server, "PLACES", found)
    monkeypatch.setattr(comfyui.server, "FOLDERS", models)
    return SimpleNamespace(**found, **models)


@pytest.fixture
def server(comfyui, nodes, monkeypatch):
    """ComfyUI's server, just started: our routes are open, no run is known, nobody has pressed Cancel."""
    started = comfyui.server.PromptServer()
    monkeypatch.setattr(comfyui.server.PromptServer, "instance", started)
    monkeypatch.setattr(comfyui.server.Interrupt, "pressed", False)
    for known in ("_panels", "_stopped"):
        monkeypatch.setattr(nodes.panel, known, {})
    nodes.panel.open_routes()
    return started


QUICK: dict[str, Any] = {
    "head_channels": 8, "regression_updates": 0, "discriminator_warmup": 0, "adversarial_ramp": 0, "lr": 1e-2,
    "lr_decay": 0.0, "precision": "float32", "preview_every": 0, "evaluate_every": 0, "taps": "blocks.1",
}  # fmt: skip


@dataclasses.dataclass
class Graph:
    """A workflow that trains: what its nodes share, and each with values that make it quick."""

    nodes: SimpleNamespace
    model: Any
    clip: Any
    vae: Any
    file: str = "toy.safetensors"

    def run(self, node, unique_id, **inputs):
        prompt = {"1": {"inputs": {"ckpt_name": self.file}}, unique_id: {"inputs": {"model": ["1", 0]}}}
        shared = {"model": self.model, "clip": self.clip, "vae": self.vae}
        return node.run(prompt=prompt, unique_id=unique_id, **shared | inputs)

    def pairs(self, **changes):
        small = {"prompts": WORDS, "width": 16, "height": 16, "at_once": 4}
        small |= {"pairs": 12, "pair_steps": 2, "pair_sampler": "euler", "guidance": 2.0, "seed": 0}
        return self.run(self.nodes.data.TeacherPairs, "2", **small | changes)[0]

    def settings(self, **changes):
        node = self.nodes.distill.AdvancedSettings
        return node.run(**{i.id: i.default for i in node.define_schema().inputs} | QUICK | changes)[0]

    def distill(self, pairs, name="my-turbo", advanced=(), **changes):
        small = {"pairs": pairs, "name": name, "settings": self.settings(**dict(advanced))}
        small |= {"rank": 2, "updates": 3, "batch_size": 4, "gradient_checkpointing": True}
        return self.run(self.nodes.distill.Distill, "3", **small | changes)

    def save(self, student, name="my-turbo", **changes):
        node = self.nodes.distill.SaveStudent
        return node.run(**{"student": student, "name": name, "save_as": node.LORA} | changes)

    def at_pass(self, number, act):
        """Do something just before a pass of the network, the first being 1; returns the hook's handle."""
        passes = iter(range(1, 10**6))

        def look(*_):
            if next(passes) == number:
                act()

        return self.model.model.diffusion_model.register_forward_pre_hook(look)


WORDS = ["fox", "owl", "elk", "ant", "bee", "cod", "emu", "yak", "a very long prompt"]


@pytest.fixture
def graph(nodes, comfyui, toys, loaded, clip_of, places, server):
    """The workflow over a toy checkpoint, loaded as ComfyUI does."""
    return Graph(nodes, loaded(make=toys.row), clip_of(), comfyui.Pictures())


def bits(model):
    return {name: weight.clone() for name, weight in model.model.state_dict().items()}


def same(one, other):
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def hooks(model):
    """How many there are in the MODEL's network, of any kind, and forwards put over a class's own."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = list(model.model.modules())
    return sum(len(getattr(m, kind)) for m in modules for kind in kinds) + sum("forward" in vars(m) for m in modules)


def folder(places, name="my-turbo"):
    """Where a training keeps everything."""
    return places.output / "turbodistill" / "runs" / name


def tensors(places, name="my-turbo"):
    return read_student(folder(places, name) / training.BEST)[0]


def state(places, name="my-turbo"):
    return read_state(folder(places, name) / training.STATE)


def x0(model, comfyui):
    """What a MODEL makes of some noise, as ComfyUI's sampling would call it."""
    with model.loaded() as network, torch.no_grad():
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        return network.apply_model(14 * noise, torch.tensor([14.0, 14.0]), torch.ones(2, 3, 6))


@pytest.fixture(scope="session")
def kit():
    """The functions above: tests are no package, and nothing can import a conftest."""
    tools = {f.__name__: f for f in (bits, same, hooks, folder, tensors, state, x0)}
    return SimpleNamespace(**tools, words=WORDS, quick=QUICK)
