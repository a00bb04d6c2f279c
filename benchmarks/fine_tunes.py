"""The creator's case: minutes from a fine-tune to its own one-step student, by what the student begins from.

    python benchmarks/fine_tunes.py --folder fine_tunes      # hours on a CPU core; goes on where it stopped

Two teachers are made of the embedded model: one fine-tuned to real pictures of a single style, one with a LoRA merged
into it that learnt another style. A student of each begins from nothing, from the shipped student (which is another
model's), from a LoRA that consistency distillation (LCM, arXiv 2310.04378) made of the embedded model; and the shipped
student is tried as it is. Parity is a KID to real pictures of that style of at most 1.1 times that of the
teacher's own pictures of the same prompts and noise: the held-out pairs', every 25 updates. Minutes are of training.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
import turbodistill as td
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import trange
from turbodistill.core.card import fingerprint, read_card
from turbodistill.core.denoiser import Cond, Guidance, guided
from turbodistill.core.families import lcm_boundary
from turbodistill.core.losses import denoising
from turbodistill.core.schedule import expand
from turbodistill.core.student import Student, load_student
from turbodistill.demo.files import REFERENCE, STUDENT
from turbodistill.measure.evaluate import (
    Arm,
    Evaluator,
    Reference,
    load_reference,
    make_pictures,
    student_arm,
    teacher_arm,
)
from turbodistill.trainer.data.files import write_whole
from turbodistill.trainer.run.events import Finished, Selected
from turbodistill.trainer.run.scores import kernel_distance

GLOSSY, FLAT = "fluent", "noto"
PARITY = 1.1
LCM_STEPS, LCM_GUIDANCE = 50, 3.0


def host_of(weights: dict[str, Tensor] | None = None):
    """The embedded model, or another one of its shape."""
    host = td.load_model()
    if weights is not None:
        host.denoiser.backbone.load_state_dict(weights)
        host.base_hash = fingerprint(host.denoiser.backbone)
    return host


def of_style(reference: Reference, style: str) -> Reference:
    return reference.take([i for i, each in enumerate(reference.styles) if each == style])


def encoded(host, reference: Reference) -> tuple[Tensor, Cond]:
    latents = torch.cat([host.encode_images(part) for part in reference.images.split(64)])
    return latents, host.encode_text(list(reference.captions))


def fitted(host, network, parameters, reference: Reference, updates: int, lr: float) -> None:
    """The ordinary training of a diffusion model on real pictures; a tenth of the texts are left out, for guidance."""
    latents, cond = encoded(host, reference)
    both = Cond.cat([cond, host.encode_text([""])])
    optimizer = torch.optim.AdamW(parameters, lr)
    draws = torch.Generator().manual_seed(0)
    for _ in trange(updates, leave=False):
        rows = torch.randint(len(latents), (16,), generator=draws)
        texts = torch.where(torch.rand(16, generator=draws) < 0.1, len(latents), rows)
        sigma = host.denoiser.schedule.sigma(999 * torch.rand(16, generator=draws))
        noise = torch.randn(16, *host.latent_shape, generator=draws)
        loss = denoising(network, latents[rows], noise, sigma, both.rows(texts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def style_teacher(reference: Reference, updates: int) -> dict[str, Tensor]:
    """Weights of the embedded model, fine-tuned to one style."""
    host = host_of()
    network = host.denoiser.backbone.requires_grad_(True)
    fitted(host, host.denoiser, network.parameters(), of_style(reference, GLOSSY), updates, 1e-4)
    return {k: v.detach().clone() for k, v in network.state_dict().items()}


def lora_teacher(reference: Reference, updates: int) -> dict[str, Tensor]:
    """Weights of the embedded model with a LoRA of rank 8 merged into it, which learnt another style."""
    host = host_of()
    tuned = Student(host.denoiser, 8, None, "all", "inherit")
    with tuned.training():
        fitted(host, tuned, tuned.trained.parameters(), of_style(reference, FLAT), updates, 1e-3)
    with tuned.merged():
        return {k: v.detach().clone() for k, v in host.denoiser.backbone.state_dict().items()}


def lcm_lora(reference: Reference, updates: int, path: Path) -> None:
    """A LoRA by latent consistency distillation of the embedded model with guidance (section 4.2 and 4.3)."""
    host = host_of()
    student = Student(host.denoiser, 32, None, "all", "inherit")
    slow = copy.deepcopy(student.trained)
    latents, cond = encoded(host, reference)
    uncond, schedule = host.encode_text([""]), host.denoiser.schedule
    optimizer = torch.optim.AdamW(student.trained.parameters(), 3e-4)
    draws = torch.Generator().manual_seed(0)
    skip = schedule.timesteps // LCM_STEPS

    def consistency(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return lcm_boundary(x, student(x, schedule.sigma(t), cond.rows(rows)), t)

    with student.training():
        for _ in trange(updates, leave=False):
            rows = torch.randint(len(latents), (16,), generator=draws)
            t = (torch.randint(1, LCM_STEPS + 1, (16,), generator=draws) * skip - 1).float()
            sigma, after = schedule.sigma(t), schedule.sigma((t - skip).clamp(min=0))
            x = schedule.add_noise(latents[rows], torch.randn(16, *host.latent_shape, generator=draws), sigma)
            with torch.no_grad():  # a step of DDIM
                x0 = guided(host.denoiser, x, sigma, cond.rows(rows), uncond, Guidance(LCM_GUIDANCE))
                nearer = x0 + (x - x0) * expand(after / sigma, x)
                now = [p.clone() for p in student.trained.parameters()]
                for p, s in zip(student.trained.parameters(), slow.parameters(), strict=True):
                    p.copy_(s)
                target = consistency(nearer, (t - skip).clamp(min=0), rows)
                for p, n in zip(student.trained.parameters(), now, strict=True):
                    p.copy_(n)
            loss = F.huber_loss(consistency(x, t, rows), target, delta=1e-3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for s, p in zip(slow.parameters(), student.trained.parameters(), strict=True):
                s.data.lerp_(p.data, 0.05)
    assert student.lora
    save_file(student.lora.export(student.backbone, "kohya", torch.float16), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of everything; what is there is not made again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8.0, help="that a training gets at most")
    parser.add_argument("--tuning", type=int, default=300, help="updates of each teacher and of the LCM LoRA")
    parser.add_argument("--pairs", type=int, default=512)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    evaluator, card = Evaluator(load_reference(REFERENCE)), read_card(STUDENT)
    lcm = args.folder / "lcm-lora-emoji.safetensors"
    if not lcm.exists():
        lcm_lora(evaluator.known, args.tuning, lcm)
    starts = {"nothing": "", "the shipped student": str(STUDENT), "an LCM LoRA": str(lcm)}
    for title, style, make in (("fine-tune", GLOSSY, style_teacher), ("merged LoRA", FLAT, lora_teacher)):
        file = args.folder / f"{title.replace(' ', '-')}.safetensors"
        if not file.exists():
            save_file(make(evaluator.known, args.tuning), file)
        host = host_of(load_file(file))
        real, held = of_style(evaluator.known, style), of_style(evaluator.real, style)
        known = evaluator.network(real.images)[0]
        prompts = list(dict.fromkeys(real.captions))

        def kid(pictures: Tensor, known: Tensor = known) -> float:
            return 1000 * kernel_distance(evaluator.network(pictures)[0], known)

        def of_arm(arm: Arm, seed: int, host=host, held=held, kid=kid) -> float:
            captions = (held.captions * 100)[:96]
            return kid(torch.cat(list(make_pictures(host, arm, captions, seed))))

        wanted = statistics.mean(of_arm(teacher_arm(host, 50, Guidance(card.guidance)), seed) for seed in range(3))
        shipped, _, _ = load_student(STUDENT, host.denoiser)
        as_it_is = statistics.mean(of_arm(student_arm(shipped), seed) for seed in range(3))
        shipped.release()
        print(f"{title} to {style}: KID of the teacher {wanted:.0f}, of the shipped student as it is {as_it_is:.0f}")
        for name, start in starts.items():
            found = []
            for seed in range(args.seeds):
                place = args.folder / f"{title} from {name} {seed}".replace(" ", "-")
                note = place / "figures.json"
                if not note.exists():
                    figures = trained(host, card, start, seed, args, prompts, place, kid)
                    write_whole(note, json.dumps(figures).encode())
                found.append(json.loads(note.read_text()))
            reached = [each["minutes"] for each in found if each["minutes"] is not None]
            ratios = [each["best"] / each["teacher"] for each in found]
            line = f"  from {name:<20} parity in {len(reached)} of {len(found)}"
            line += f", after {spread(reached)} min" if reached else ""
            print(f"{line}; least KID {spread(ratios, '.2f')} times the teacher's", flush=True)


def spread(values: list[float], form: str = ".1f") -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def trained(host, card, start: str, seed: int, args, prompts, place: Path, kid) -> dict:
    """Train one student; minutes to parity (None if it was not reached), and the least KID."""
    config = td.Config(
        rank=card.rank, alpha=card.alpha, targets=card.targets, init_student=start, pairs=args.pairs, pair_steps=8,
        guidance=card.guidance, seed=seed, updates=100_000, minutes=args.minutes, lr=4e-4, regression_updates=100,
        discriminator_warmup=50, adversarial_ramp=50, evaluate_every=25, preview_every=0,
    )  # fmt: skip
    pairs = place.parent / f"pairs-{host.base_hash}-{seed}"
    scored: list[tuple[float, float]] = []  # minutes, KID
    spent, wanted = 0.0, 0.0

    def score(student: Tensor, teacher: Tensor) -> float:
        nonlocal wanted
        wanted = wanted or kid(host.decode(teacher))
        return kid(host.decode(student))

    for event in td.distill(host, config, place, prompts, score=score, pairs_folder=pairs):
        if isinstance(event, td.Step):
            spent = event.spent
        elif isinstance(event, Selected):
            scored.append((spent / 60, event.score))
        elif isinstance(event, Finished):
            break
    reached = [minutes for minutes, value in scored if value <= PARITY * wanted]
    best = min(value for _, value in scored)
    return {"minutes": min(reached, default=None), "best": best, "teacher": wanted, "scores": scored}


if __name__ == "__main__":
    main()
