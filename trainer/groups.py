"""Groups of settings: by what they decide, and by which forms ask for them at once."""

from __future__ import annotations

import dataclasses

from .config import Config

# What forms ask for at once: what decides the pairs, what pictures need, what a training needs. All else is advanced.
OF_PAIRS = ("pairs", "pair_steps", "pair_sampler", "guidance", "seed")
OF_GUIDANCE = ("guidance_rescale", "guidance_start", "guidance_end")
OF_SIZES = ("sizes",)
OF_PROMPTS = ("negative_prompt", "prompt_prefix", "prompt_suffix", "bake_affixes")
OF_IMAGES = ("broken_pictures",)
OF_DISTILL = ("rank", "updates", "batch_size", "gradient_checkpointing")
OF_VRAM = ("vram",)
# What it takes a model that is ours alone for; hosts place and pack their models themselves.
OF_OWN = ("base_precision", "offload", "compile")
PLAIN_ONLY = OF_OWN
ASKED = OF_PAIRS + OF_SIZES + OF_GUIDANCE + OF_PROMPTS + OF_IMAGES + OF_DISTILL + OF_VRAM + PLAIN_ONLY
# A page stores widgets' values by their places: these came to the forms after those that are before them there.
OF_PIXELS = ("pixel_backbone", "pixel_size", "pixel_share", "pixel_crop", "pixel_decoder", "augment", "raw_pictures")
LATER = (*OF_PIXELS, "distillation_space", "fake_score_updates", "distillation_min_timestep", "renoise_max_timestep")
ADVANCED = (*(f.name for f in dataclasses.fields(Config) if f.name not in (*ASKED, *LATER)), *LATER)
