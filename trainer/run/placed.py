"""What a training leaves on the device of the model that it trains on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ...core.eight_bits import in_eight_bits
from ...core.exclusive import exclusive
from ..config import INT8, Config
from ..host import Host


@contextmanager
def placed(host: Host, config: Config) -> Iterator[None]:
    """Within, the device holds what the settings leave there, as they leave it; everything is put back at the end."""
    backbone = host.denoiser.backbone
    with ExitStack() as stack:
        if config.offload:
            stack.enter_context(host.aside(decodes=config.decodes))
        if config.base_precision == INT8:
            packing = in_eight_bits(backbone)
            with exclusive(backbone):
                stack.enter_context(packing)
        try:
            yield
        finally:
            with exclusive(backbone):
                stack.close()
