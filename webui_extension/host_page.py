"""The components of the host's own page, which its user has set: what of them our tab takes over."""

from __future__ import annotations

from typing import Any

from modules import shared

from ..page.take_over import READ

PAGE = "txt2img"
_found: dict[str, Any] = {}


def forget() -> None:
    """The page is built anew."""
    _found.clear()


def keep(component: Any, **about: Any) -> None:
    """Called by the host for each of its components, as it is made."""
    page, _, name = (about.get("elem_id") or "").partition("_")
    if page == PAGE and name in READ:
        _found[name] = component


def fields() -> dict[str, Any]:
    """The components by the names in READ; none where one was not made, or the user has hidden the page."""
    hidden = {str(label).lower() for label in getattr(shared.opts, "hidden_tabs", None) or ()}
    return dict(_found) if len(_found) == len(READ) and PAGE not in hidden else {}
