"""What benchmarks of the embedded model share that train on from the student that comes with the clone."""

from __future__ import annotations

import argparse
from typing import Any

import turbodistill as td
from turbodistill.core.card import StudentCard
from turbodistill.demo.files import STUDENT


def settings(card: StudentCard, args: argparse.Namespace, **more: Any) -> td.Config:
    """Half of `args.updates` are regression, on `args.pairs` pairs; `card` is the shipped student's."""
    return td.Config(
        rank=card.rank, alpha=card.alpha, targets=card.targets, init_student=str(STUDENT), pairs=args.pairs,
        pair_steps=8, guidance=card.guidance, updates=args.updates, regression_updates=args.updates // 2,
        discriminator_warmup=min(50, args.updates // 2), adversarial_ramp=50, lr=4e-4, evaluate_every=0,
        preview_every=0, **more,
    )  # fmt: skip
