"""ComfyUI finds its door here; importing this file does no work and imports nothing."""

WEB_DIRECTORY = "./web"  # front-end extension and help pages


async def comfy_entrypoint():
    """What ComfyUI (0.3.50 or later) calls to get the nodes."""
    from .nodes.extension import TurboDistillExtension

    return TurboDistillExtension()
