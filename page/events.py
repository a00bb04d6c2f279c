"""One way to listen to a page's events in gradio 3.41, 4.40 and the newest."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ..trainer.checks import foreign


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
    wait for a host's other work. Other sites' pages are refused: gradio takes their requests, too.
    """
    known = inspect.signature(trigger).parameters
    options: dict[str, Any] = {"show_progress": "hidden", "queue": queue}
    options |= {"api_visibility": "private"} if "api_visibility" in known else {"api_name": False}
    if js:
        options["js" if "js" in known else "_js"] = js
    if latest:
        options |= {k: v for k, v in {"trigger_mode": "always_last", "concurrency_limit": None}.items() if k in known}
    return trigger(answer and from_own_pages(answer), inputs=list(inputs), outputs=list(outputs), **options)


def from_own_pages(answer: Callable[..., Any]) -> Callable[..., Any]:
    """The answer to an event; raises gr.Error for one that another site's page has sent."""

    def guarded(asked: gr.Request, *values: Any) -> Any:  # gradio fills in what is annotated so
        request: Any = asked.request
        # Gradio 3 believes a body that says what request it is in: no page of ours does.
        if words := "not by a body's own words" if request is None else foreign(request.headers):
            raise gr.Error(words)
        return answer(*values)

    return guarded


def asking(button: str, place: str) -> str:
    """JavaScript that presses a button which nobody sees, by its id: once a second while `place` is looked at.

    Never before it has the answer to the last, whose `stamp` lies in `place`. So it goes on after a sleep, or when the
    program is restarted.
    """
    script = """() => {
  const asks = window.turbodistillAsks ??= {};
  clearInterval(asks["BUTTON"]);
  let [stamp, asked] = ["", 0];
  asks["BUTTON"] = setInterval(() => {
    const found = document.querySelector("#BUTTON");
    const button = found?.querySelector("button") ?? found;
    const place = document.querySelector("#PLACE");
    if (!button || !place?.offsetParent || document.hidden) return;
    const now = place.querySelector("[data-stamp]")?.dataset.stamp ?? "";
    if (now === stamp && Date.now() - asked < 15000) return;
    [stamp, asked] = [now, Date.now()];
    button.click();
  }, 1000);
}"""
    return script.replace("BUTTON", button).replace("PLACE", place)


def stamp() -> str:
    """HTML that tells the page that its question was answered."""
    return f'<i data-stamp="{time.time()}"></i>'
