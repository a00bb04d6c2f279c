"""The student: the teacher's own weights plus LoRA, or a full trainable copy of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .architecture import architecture_of
from .card import CardError, StudentCard, fingerprint, header, read_card, read_student
from .denoiser import Cond, Denoiser
from .exclusive import exclusive, frozen
from .fit import Base, check_fit
from .lora import LoRA, check_match, quantised
from .naming import is_diffusers, of_an_adapter, to_single_file, without_adapter
from .sampling import sample_euler, sample_few_step, sigmas_of
from .schedule import Schedule, trailing_timesteps
from .sharded import sharded_like, whole

PREDICTIONS = ("inherit", "x0")


class Student(Denoiser):
    """A denoiser that makes x0 in one step, over a frozen teacher that shares its weights.

    `rank` > 0 trains a LoRA on the teacher's backbone; the teacher is the same tensors with the
    LoRA off. `rank` 0 trains a full copy. `prediction` says what the backbone predicts: `inherit`
    the teacher's eps, v or flow, `x0` the picture itself. `start_timestep` is that of pure noise,
    and the first of a few-step schedule. One of `guidance_steps` has the teacher's guidance baked in
    and no more: it is sampled as the teacher is, in so many steps where no other number is given.
    """

    def __init__(
        self,
        teacher: Denoiser,
        rank: int = 16,
        alpha: float | None = None,
        targets: str = "all",
        prediction: str = "inherit",
        start_timestep: int | None = None,
        guidance_steps: int = 0,
    ):
        if prediction not in PREDICTIONS:
            raise ValueError(f"student prediction is {prediction!r}: use one of {', '.join(PREDICTIONS)}")
        self.teacher = teacher
        self.schedule: Schedule = teacher.schedule
        self.prediction = teacher.prediction if prediction == "inherit" else prediction
        self.start_timestep = self.schedule.timesteps - 1 if start_timestep is None else start_timestep
        self.guidance_steps = guidance_steps
        self.lora: LoRA | None = None
        self.trained_steps: int | None = None  # the most that a file says it was trained for
        with exclusive(teacher.backbone):
            if rank > 0:
                self.backbone = teacher.backbone
                self.lora = LoRA(teacher.backbone, rank, alpha, targets, teacher.device)
                self._network = teacher
            else:
                check_copyable(teacher.backbone)
                self.backbone = copy.deepcopy(teacher.backbone)
                self._network = teacher.with_backbone(self.backbone)

    @property
    def device(self) -> torch.device:
        return self._network.device

    @property
    def trained(self) -> nn.Module:
        """The module whose parameters are trained: the LoRA, or the copy."""
        return self.backbone if self.lora is None else self.lora

    @contextmanager
    def training(self) -> Iterator[None]:
        """Freeze the teacher, let the student's parameters take gradients; restore every flag at the end."""
        flags = [(p, p.requires_grad) for p in self.trained.parameters()]
        with frozen(self.teacher.backbone):
            self.trained.requires_grad_(True)
            try:
                yield
            finally:
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """The shared backbone acts as the student within."""
        if self.lora is None:
            yield
            return
        with exclusive(self.backbone):
            before, self.lora.enabled = self.lora.enabled, True
            try:
                yield
            finally:
                self.lora.enabled = before

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The LoRA is merged into the shared weights within: for many pictures in a row, with the model for oneself.

        The base's own weights are kept beside the merged ones: twice the memory. The teacher is away meanwhile.
        Quantised weights, and those of eight bits, have no room for it: it stays beside them.
        """
        if self.lora is None or any(quantised(p) or p.element_size() < 2 for p in self.backbone.parameters()):
            yield
            return
        with self.lora.folded(self.backbone):
            yield

    def output(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        with self.switched_on():
            return self._network.output(x, sigma, cond)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """Noisy x (B, C, H, W) at sigma (B,) -> x0 (B, C, H, W)."""
        return self.schedule.to_x0(self.prediction, x, self.output(x, sigma, cond), sigma)

    def sigmas(self, steps: int) -> Tensor:
        """Sigmas (steps + 1,) of the student's own schedule: trailing from its start timestep."""
        return sigmas_of(self.schedule, trailing_timesteps(steps, self.start_timestep, self.schedule.timesteps))

    @torch.no_grad()
    def generate(
        self, noise: Tensor, cond: Cond, steps: int | None = None, sampler: Callable[..., Tensor] = sample_euler
    ) -> Tensor:
        """Unit noise (B, C, H, W) -> latents (B, C, H, W) in `steps`; a row's picture is its noise's alone.

        By default in one step, or with guidance alone in its own number, by `sampler`.
        """
        sigmas = self.sigmas(steps or self.guidance_steps or 1)
        x = self.schedule.add_noise(torch.zeros_like(noise), noise, sigmas[:1].to(noise))
        model = lambda x, s: self(x, s, cond)  # noqa: E731
        if self.guidance_steps:
            return sampler(model, x, sigmas)
        return sample_few_step(model, x, sigmas, schedule=self.schedule)

    def release(self) -> None:
        """Take the LoRA's hooks out of the shared backbone."""
        if self.lora is not None:
            with exclusive(self.backbone):
                self.lora.remove()


def check_copyable(backbone: nn.Module) -> None:
    """Raise ValueError for a backbone of which no full copy can be trained."""
    if any(of_an_adapter(name) for name, _ in backbone.named_parameters()):
        raise ValueError(
            "rank 0 trains a full copy, but the model carries a LoRA: fuse it into the weights and unload it "
            "(pipe.fuse_lora(), pipe.unload_lora_weights()), or give a rank of 1 or more"
        )
    weights = dict(backbone.named_parameters())
    packed = [name for name, weight in weights.items() if quantised(weight) or name.endswith(".scale_weight")]
    if packed:
        raise ValueError(
            f"rank 0 trains a full copy, but {len(packed)} of the model's weights are quantised ({packed[0]}): give a "
            "rank of 1 or more, or load a file of the model that is not quantised"
        )


FULL_PREFIX = "model.diffusion_model."


def _full_names(backbone: nn.Module) -> dict[str, str]:
    """Parameter and buffer names of a backbone -> those of a single-file checkpoint."""
    names = list(backbone.state_dict())
    table = to_single_file(names) if is_diffusers(names) else {n: n for n in names}
    return {n: FULL_PREFIX + file_name for n, file_name in table.items()}


def _lora_style(student: Student) -> str:
    """How the layers are named in a LoRA file, so that every host and diffusers read it.

    Kohya's LoRAs of Stable Diffusion 1 and 2 have diffusers' names, those of XL the single file's; and hosts know
    diffusers' names of UNets with two layers a block alone, as these have.
    """
    names = {without_adapter(name) for name in _full_names(student.backbone).values()}
    two_layers = f"{FULL_PREFIX}input_blocks.3.0.op.weight" in names
    xl = f"{FULL_PREFIX}label_emb.0.0.weight" in names
    return "diffusers" if two_layers and not xl else student.teacher.lora_style


def student_bytes(student: Student, card: StudentCard, dtype: torch.dtype = torch.float16) -> bytes:
    """A student file: a LoRA, or the whole backbone in single-file names, with the card in its header.

    Raises ValueError for weights that are no numbers, or too large for `dtype`.
    """
    if student.lora is not None:
        tensors = student.lora.export(student.backbone, _lora_style(student), dtype)
    else:
        names = _full_names(student.backbone)
        own = student.backbone.state_dict().items()
        tensors = {names[k]: whole(v.detach()).to(dtype).cpu().contiguous() for k, v in own}
    broken = [k for k, v in tensors.items() if not v.isfinite().all()]
    if broken:
        raise ValueError(
            f"{len(broken)} of the student's {len(tensors)} weights are no numbers in {dtype}, the first is {broken[0]}"
            ": the training has diverged. Lower lr, and go on from an earlier student or begin anew"
        )
    return save(tensors, card.to_metadata())


def load_weights(student: Student, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """A student file's tensors into `module`: what the student trains, or a copy of that.

    Raises ValueError if a name or a shape does not fit.
    """
    if isinstance(module, LoRA):
        module.load(student.backbone, tensors)
        return
    names = _full_names(student.backbone)
    _check_full(student.backbone, {k: v.shape for k, v in tensors.items()})
    own = module.state_dict()
    module.load_state_dict({k: sharded_like(tensors[v], own[k]) for k, v in names.items()})


def _check_full(backbone: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError if tensors of these names and shapes are no full student of this backbone.

    A whole checkpoint is one, too: its text encoder and autoencoder are not looked at.
    """
    names, own = _full_names(backbone), backbone.state_dict()
    check_match("student", [n for n in shapes if n.startswith(FULL_PREFIX)] or shapes, names.values())
    for name, there in names.items():
        if tuple(shapes[there]) != tuple(own[name].shape):
            raise ValueError(
                f"{there} in the file has shape {tuple(shapes[there])}, this model's has {tuple(own[name].shape)}: it "
                "was made for another base"
            )


def full_weights(backbone: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """A full student's tensors by the backbone's own names; raises CardError for those of another."""
    try:
        _check_full(backbone, {k: v.shape for k, v in tensors.items()})
    except ValueError as error:
        raise CardError(f"{path} does not fit this model: {error}") from None
    return {name: tensors[there] for name, there in _full_names(backbone).items()}


def check_student(card: StudentCard, teacher: Denoiser, path: str | Path) -> str:
    """What does not fit between a student's card and its base, in words or ""; raises CardError as `check_fit`."""
    shapes = {name: parameter.shape for name, parameter in teacher.backbone.named_parameters()}
    base = Base(architecture_of(shapes), teacher.prediction, (fingerprint(teacher.backbone),))
    return "\n".join(check_fit(card, base, path))


def load_student(path: str | Path, teacher: Denoiser) -> tuple[Student, StudentCard, str]:
    """A student file over its loaded base model: the student, its card, and a warning in words or "".

    The warning says that the base is not the one the student was made for. Raises CardError for a
    file that cannot be read, and for one that does not fit this architecture or prediction.
    """
    with exclusive(teacher.backbone):  # or its hash would be that of another student's weights
        return _load_student(path, teacher)


def _load_student(path: str | Path, teacher: Denoiser) -> tuple[Student, StudentCard, str]:
    card = read_card(path)
    warning = check_student(card, teacher, path)
    prediction = "inherit" if card.prediction == card.base_prediction else "x0"
    student: Student | None = None
    try:
        # By the file's header first: what does not fit is not read, and no copy is made for it.
        if not card.rank:
            _check_full(teacher.backbone, header(path)[1])
        steps = len(card.timesteps)
        own = steps if card.guidance_only else 0
        student = Student(teacher, card.rank, card.alpha, card.targets, prediction, card.timesteps[0], own)
        if student.lora:
            student.lora.check(student.backbone, header(path)[1])
        load_weights(student, student.trained, read_student(path)[0])
        student.trained_steps = None if card.guidance_only else steps
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        if student:
            student.release()
        words = str(error) if isinstance(error, CardError) else f"{path} does not fit this model: {error}"
        raise CardError(words) from None
    return student, card, warning
