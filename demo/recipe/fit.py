"""The loop shared by the three trainings of the recipe: AdamW, EMA, progress, resumable."""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


def arguments(description: str, minutes: float) -> argparse.ArgumentParser:
    """The options that each training of the recipe takes."""
    from .dataset import BUILD

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUILD, help="where the data lies and the result goes")
    parser.add_argument("--minutes", type=float, default=minutes, help="training time; a resumed run counts on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-4)
    return parser


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    path: Path,
    minutes: float,
    lr: float,
    ema: float = 0.999,
    decay_from: float = 0.7,
    save_every: float = 120.0,
) -> nn.Module:
    """Train `model` for `minutes` in all, over any number of runs, and return its EMA.

    `loss(model, step)` gives a scalar. The learning rate warms up over 200 steps, stays, and
    falls linearly to zero over the last part of the time, so that more minutes can be added
    later. State goes to `path` every `save_every` seconds, whole or not at all.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    step, spent = 0, 0.0
    if path.exists():
        state = torch.serialization.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]

    def save() -> None:
        part = path.with_suffix(".part")
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"step": step, "spent": spent}, part)
        os.replace(part, path)

    total = minutes * 60
    saved = begun = time.monotonic()
    before, smooth = spent, None
    with tqdm(total=round(total), initial=round(spent), desc=path.stem, unit="s") as bar:
        while spent < total:
            progress = spent / total
            scale = min(1.0, (step + 1) / 200, max(0.0, (1 - progress) / (1 - decay_from)))
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            value = loss(model, step)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            step += 1
            with torch.no_grad():
                keep = min(ema, (1 + step) / (10 + step))
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 1 - keep)
            smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
            spent = before + time.monotonic() - begun
            bar.set_postfix(step=step, loss=f"{smooth:.4f}", refresh=False)
            bar.update(round(spent) - bar.n)
            if time.monotonic() - saved > save_every:
                save()
                saved = time.monotonic()
    save()
    return average.eval()
