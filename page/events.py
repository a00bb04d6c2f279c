"""One way to listen to a page's events in gradio 3.41, 4.40 and the newest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any


def listen(
    trigger: Callable[..., Any],
    answer: Callable[..., Any] | None,
    inputs: Sequence[Any] = (),
    outputs: Sequence[Any] = (),
    js: str | None = None,
    latest: bool = False,
    queue: bool = False,
) -> Any:
    """Call `answer` with the inputs' values at each event, and `js` in the page before it.

    It shows no progress, and is not offered as an API of its own. `latest`: of the events that come
    while one is answered the last alone is kept, where gradio knows how. Without `queue` it does not
    wait for a host's other work.
    """
    known = inspect.signature(trigger).parameters
    options: dict[str, Any] = {"show_progress": "hidden", "queue": queue}
    options |= {"api_visibility": "private"} if "api_visibility" in known else {"api_name": False}
    if js:
        options["js" if "js" in known else "_js"] = js
    if latest:
        options |= {k: v for k, v in {"trigger_mode": "always_last", "concurrency_limit": None}.items() if k in known}
    return trigger(answer, inputs=list(inputs), outputs=list(outputs), **options)
