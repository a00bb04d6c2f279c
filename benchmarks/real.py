"""What a one-step student of a real checkpoint is worth: one command for whoever has a GPU, and a file to send in.

    python benchmarks/real.py MODEL        # .safetensors file, diffusers folder or owner/name; goes on where it stopped
    python benchmarks/real.py --dry-run    # the embedded model in a minute, with judges of random weights, anywhere

Distils with the default settings (or those of `--config`), then makes pictures of a public list of prompts,
PartiPrompts (arXiv 2206.10789; or `--prompts`), of the same noise: by the teacher in its own steps, by the teacher in
one, by the student in one. Each is judged by CLIP score (arXiv 2104.08718), by PickScore (2305.01569), by ImageReward
(2304.05977) where the package image-reward is installed, and by KID (1801.01401), on CLIP's features, to the teacher's
pictures; the teacher's own from other noise tells how near that can be. Needs turbodistill[demo], and the hub once.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import turbodistill as td
from torch import Tensor
from tqdm import tqdm
from turbodistill.core.denoiser import Guidance
from turbodistill.core.student import load_student
from turbodistill.demo.files import PROMPTS
from turbodistill.measure.evaluate import Arm, make_pictures, measure_time, student_arm, teacher_arm
from turbodistill.measure.metrics import kid
from turbodistill.trainer.data.files import write_whole
from turbodistill.trainer.loop.precision import as_sampled
from turbodistill.trainer.run.events import Finished, PairsMade

CLIP, PICKSCORE = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1"
QUICK = {
    "pairs": 16, "pair_steps": 4, "updates": 4, "regression_updates": 2, "discriminator_warmup": 1, "batch_size": 2,
    "adversarial_ramp": 1, "evaluate_every": 0, "preview_every": 0,
}  # fmt: skip
Pictures = list[Tensor]


class Clip:
    """A network of CLIP's kind: features of pictures and texts, and how well a picture shows its text."""

    def __init__(self, network: Any, processor: Any, device: torch.device):
        self.network, self.processor, self.device = network.to(device).eval(), processor, device

    @classmethod
    def named(cls, name: str, device: torch.device) -> Clip:
        """One of the hub."""
        from transformers import AutoModel, AutoProcessor

        processor = name if name != PICKSCORE else "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # which it was tuned from
        return cls(AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(processor), device)

    @torch.no_grad()
    def features(self, pictures: Pictures) -> Tensor:
        """Pictures (3, H, W) in [0, 1] -> features (N, d) of length 1."""
        images = [td.to_image(picture) for picture in pictures]
        parts = [
            self.network.get_image_features(
                **self.processor(images=images[k : k + 16], return_tensors="pt").to(self.device)
            )
            for k in range(0, len(images), 16)
        ]
        return torch.cat([_unit(part) for part in parts])

    @torch.no_grad()
    def score(self, pictures: Pictures, prompts: Sequence[str]) -> float:
        """100 times the mean cosine between pictures and their prompts."""
        told = {"return_tensors": "pt", "padding": True, "truncation": True}
        texts = [
            _unit(
                self.network.get_text_features(**self.processor(text=list(prompts[k : k + 64]), **told).to(self.device))
            )
            for k in range(0, len(prompts), 64)
        ]
        return float(100 * (self.features(pictures) * torch.cat(texts)).sum(1).mean())


def _unit(given: Any) -> Tensor:
    """Features of length 1, whatever this version of transformers wraps them in."""
    features = getattr(given, "pooler_output", given)
    return (features / features.norm(dim=1, keepdim=True)).float().cpu()


def tiny_clip(device: torch.device) -> Clip:
    """One of random weights, to see that everything runs."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 100}, vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip

    class Inputs(dict):
        def to(self, device: torch.device) -> Inputs:
            return Inputs({name: value.to(device) for name, value in self.items()})

    def processor(images: Any = None, text: Any = None, **_: Any) -> Inputs:
        if images is None:
            ids = torch.tensor([[ord(c) % 90 for c in f"{words:<8.8}"] + [99] for words in text])
            return Inputs(input_ids=ids, attention_mask=torch.ones_like(ids))
        pixels = [torch.tensor(list(i.resize((32, 32)).tobytes())).view(32, 32, 3).movedim(2, 0) / 255 for i in images]
        return Inputs(pixel_values=torch.stack(pixels))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Clip(CLIPModel(config), processor, device)


def judges(dry: bool, device: torch.device) -> dict[str, Callable[[Pictures, Sequence[str]], float]]:
    """What each judge is called -> pictures and their prompts to a mean score; more is better."""
    if dry:
        return {"CLIP score": tiny_clip(device).score}
    found = {"CLIP score": Clip.named(CLIP, device).score, "PickScore": Clip.named(PICKSCORE, device).score}
    if find_spec("ImageReward"):
        import ImageReward  # pyright: ignore[reportMissingImports]

        network = ImageReward.load("ImageReward-v1.0", device=str(device))

        def reward(pictures: Pictures, prompts: Sequence[str]) -> float:
            both = zip(prompts, map(td.to_image, pictures), strict=True)
            return statistics.mean(float(network.score(prompt, image)) for prompt, image in both)

        found["ImageReward"] = reward
    return found


def read_list(path: Path | None, dry: bool, count: int) -> list[str]:
    """Every n-th prompt of a list, so that all its kinds are there."""
    if dry:
        lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    elif path:
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        from huggingface_hub import hf_hub_download

        table = hf_hub_download("nateraw/parti-prompts", "PartiPrompts.tsv", repo_type="dataset")
        with open(table, encoding="utf-8", newline="") as file:
            lines = [row["Prompt"] for row in csv.DictReader(file, delimiter="\t")]
    lines = [line.strip() for line in lines if line.strip()]
    return lines[:: max(1, len(lines) // count)][:count]


def distilled(host: Any, config: td.Config, folder: Path) -> Path:
    """The student's file; a run that is there goes on."""
    from turbodistill.trainer.data.built_in import suggest
    from turbodistill.trainer.data.prompts import suggested

    prompts = suggested(suggest(host.name, host.architecture)).lines if host.architecture else td.read_prompts(PROMPTS)
    bar = tqdm(desc="distilling", unit="step")
    for event in td.distill(host, config, folder, prompts):
        if isinstance(event, (PairsMade, td.Step)):
            bar.set_description("pairs" if isinstance(event, PairsMade) else "training")
            bar.update()
        if isinstance(event, Finished):
            bar.close()
            return event.path
    raise AssertionError("a run ends with Finished")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="of which a student is made")
    parser.add_argument("--out", type=Path, default=Path("real"), help="folder of everything (default: real)")
    parser.add_argument("--config", type=Path, help="TOML file of settings (default: the default settings)")
    parser.add_argument("--prompts", type=Path, help="a text file, one a line (default: PartiPrompts, of the hub)")
    parser.add_argument("--count", type=int, default=200, help="prompts that are judged (default: 200)")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if bool(args.model) == args.dry_run:
        parser.error("give a model, or --dry-run")
    if not 8 <= args.count <= 100_000:
        parser.error(f"--count is {args.count}: give a whole number from 8 to 100000")
    count = 12 if args.dry_run else args.count
    prompts = read_list(args.prompts, args.dry_run, count)
    host = td.load_model(args.model)
    config = td.Config.from_toml(args.config) if args.config else td.Config(**(QUICK if args.dry_run else {}))
    path = distilled(host, config, args.out)
    most = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    student, card, _ = load_student(path, host.denoiser)
    given = host, config.pair_steps, Guidance.of(config), config.negative_prompt
    arms: dict[str, tuple[Arm, int]] = {
        f"teacher, {config.pair_steps} steps": (teacher_arm(*given), 0),
        "the same, other noise": (teacher_arm(*given), 1),
        "teacher, 1 step": (teacher_arm(host, 1, Guidance.of(config), config.negative_prompt), 0),
        "student, 1 step": (student_arm(student), 0),
    }
    device, context = host.denoiser.device, partial(as_sampled, config, host.denoiser)
    known = judges(args.dry_run, device)
    eye = tiny_clip(device) if args.dry_run else Clip.named(CLIP, device)
    figures: dict[str, dict[str, Any]] = {}
    first: Tensor | None = None
    for name, (arm, seed) in arms.items():
        batches = make_pictures(host, arm, prompts, seed, context)
        pictures = [picture for batch in tqdm(batches, desc=name) for picture in batch]
        features = eye.features(pictures)
        first = features if first is None else first
        figures[name] = {title: judge(pictures, prompts) for title, judge in known.items()}
        figures[name]["KID x 1000"] = asdict(kid(features, first)) if features is not first else None
        figures[name]["seconds"] = measure_time(host, arm, prompts[0], context=context).seconds
        for k, picture in enumerate(pictures[:16]):
            (args.out / name).mkdir(exist_ok=True)
            td.to_image(picture).save(args.out / name / f"{k:02d}.webp")
    student.release()
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    about = {"turbodistill": td.__version__, "torch": torch.__version__, "device": where, "model": host.name}
    about |= {"architecture": host.architecture, "base_hash": host.base_hash, "size": host.resolution}
    about |= {
        "prompts": len(prompts),
        "student": card.training | card.metrics,
        "peak GB": most / 2**30,
        "arms": figures,
    }
    write_whole(args.out / "real.json", json.dumps(about | {"settings": config.to_dict()}, indent=1).encode())
    print(json.dumps(about, indent=1))
    print(f"please send in {args.out / 'real.json'}, with pictures if you may show them")


if __name__ == "__main__":
    main()
