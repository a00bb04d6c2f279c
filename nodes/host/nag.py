"""Negative prompts at cfg 1, by ComfyUI's own Normalized Attention Guidance (NAG, arXiv 2505.21179)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

SINCE = "0.15"  # of ComfyUI: it has the node, and Flux and its kin listen to it


def with_nag(model) -> tuple[Any, Heard]:
    """A clone of the MODEL that moves away from the negative prompt at cfg 1, and whether its attention did so.

    It takes the node's own defaults; a MODEL that comes through such a node keeps its values. Raises ValueError for a
    ComfyUI that has no such node.
    """
    if model.model_options.get("disable_cfg1_optimization"):
        return model, Heard(needed=False)
    try:
        from comfy_extras.nodes_nag import NAGuidance
    except ImportError:
        raise ValueError(
            "negative is connected, and at cfg 1 it needs ComfyUI's Normalized Attention Guidance, which this ComfyUI "
            f"is too old for: update ComfyUI to {SINCE} or later, or disconnect negative"
        ) from None
    values = {i.id: i.default for i in NAGuidance.define_schema().inputs if getattr(i, "default", None) is not None}
    patched = NAGuidance.execute(model, **values).args[0]
    heard = Heard()
    patched.set_model_attn1_output_patch(heard)
    return patched, heard


class Heard:
    """A patch of attention's outputs that changes nothing: it notes whether NAG could compare both prompts there."""

    def __init__(self, needed: bool = True):
        self.needed, self.passes, self.both = needed, 0, False

    def __call__(self, out: Tensor, extra_options: dict[str, Any]) -> Tensor:
        self.passes += 1
        self.both = self.both or {0, 1} <= set(extra_options.get("cond_or_uncond") or ())
        return out

    def check(self) -> None:
        """Raise ValueError if the negative prompt did nothing to the picture."""
        if not self.needed or self.both:
            return
        if not self.passes:
            raise ValueError(
                "negative is connected, but this model's network has no place for Normalized Attention Guidance, so "
                "that at cfg 1 it would do nothing: disconnect it"
            )
        raise ValueError(
            "negative is connected, but the two prompts did not fit into one pass, in which Normalized Attention "
            "Guidance compares them: give prompts of about the same length, without areas or masks, or free memory"
        )
