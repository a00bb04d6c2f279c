"""TurboDistill: turn the diffusion checkpoint you have loaded into its own one-step Turbo.

The public API is what `dir(turbodistill)` lists: `Config`, `load_model`, `read_prompts`, `make_pairs`, `estimate`,
`distill`, `Step`, `use_student`, `scheduler_of`, `load_student`, `sample`, `to_image`, `evaluate`, `__version__`. Each
is imported when it is first asked for, so that importing this file does no work: ComfyUI finds its door here, and
pytest imports it too.
"""

WEB_DIRECTORY = "./web"  # ComfyUI's front-end extension and help pages

# Public name -> its module, and its name there.
PUBLIC = {
    "Config": ("trainer.config", "Config"),
    "load_model": ("trainer.pipeline.load", "load_model"),
    "read_prompts": ("trainer.data.prompts", "read_prompts"),
    "make_pairs": ("trainer.data.pairs", "make_pairs"),
    "estimate": ("trainer.run.estimate", "estimate"),
    "distill": ("trainer.run.run", "run"),
    "Step": ("trainer.loop.distill", "Step"),
    "use_student": ("trainer.pipeline.use", "use_student"),
    "scheduler_of": ("trainer.pipeline.stock", "scheduler_of"),
    "load_student": ("generate.load", "load_student"),
    "sample": ("generate.sample", "sample"),
    "to_image": ("trainer.data.images", "to_image"),
    "evaluate": ("measure.bench", "evaluate"),
    "__version__": ("core.version", "VERSION"),
}
__all__ = list(PUBLIC)


def __getattr__(name: str):
    from importlib import import_module

    if name not in PUBLIC:
        raise AttributeError(f"turbodistill has no {name!r}: its public names are {', '.join(PUBLIC)}")
    module, there = PUBLIC[name]
    return getattr(import_module(f".{module}", __name__), there)


def __dir__() -> list[str]:
    return sorted(PUBLIC)


async def comfy_entrypoint():
    """What ComfyUI (0.3.50 or later) calls to get the nodes."""
    from .nodes.extension import TurboDistillExtension

    return TurboDistillExtension()
