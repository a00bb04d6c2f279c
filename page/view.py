"""A run's snapshot as HTML: where it is, its warnings, its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

WARNINGS = 3  # the newest that are shown

# Mid tones and currentColor, so that every theme of a host fits.
STYLE = """<style>
.turbodistill-run { font-size: 14px; line-height: 1.4; font-variant-numeric: tabular-nums; }
.turbodistill-run > div { margin: 4px 0; }
.turbodistill-run .status { font-weight: 600; font-size: 15px; }
.turbodistill-run .bar { height: 8px; border-radius: 4px; overflow: hidden; background: rgb(128 128 128 / 25%); }
.turbodistill-run .bar > div { height: 100%; border-radius: 4px; background: #3d94e0; transition: width 0.4s; }
.turbodistill-run[data-state=done] .bar > div, .turbodistill-run[data-state=stopped] .bar > div { background: #35a86b; }
.turbodistill-run[data-state=failed] .bar > div { background: #d6546c; }
.turbodistill-run[data-state=cancelled] .bar > div { background: #888; }
.turbodistill-run .bar.unknown > div { width: 30%; animation: turbodistill-moves 1.6s infinite alternate ease-in-out; }
@keyframes turbodistill-moves { from { margin-left: 0; } to { margin-left: 70%; } }
.turbodistill-run .quiet { opacity: 0.75; font-size: 13px; overflow-wrap: anywhere; }
.turbodistill-box { padding: 6px 10px; border-radius: 4px; border-left: 4px solid #888; background: rgb(128 128 128 / 12%); overflow-wrap: anywhere; }
.turbodistill-box.bad { border-color: #d6546c; background: rgb(214 84 108 / 12%); }
.turbodistill-box.warn { border-color: #c9a11f; background: rgb(201 161 31 / 12%); }
.turbodistill-box.good { border-color: #35a86b; background: rgb(53 168 107 / 12%); }
.turbodistill-charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 12px; }
.turbodistill-charts figure { margin: 0; min-width: 0; }
.turbodistill-charts svg { display: block; width: 100%; height: auto; }
.turbodistill-charts figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; padding-left: 8px; font-size: 12px; }
.turbodistill-charts figcaption em { font-style: normal; font-weight: 600; }
.turbodistill-charts figcaption b { font-weight: 600; }
.turbodistill-charts figcaption i { display: inline-block; width: 10px; height: 10px; margin-right: 4px; border-radius: 2px; }
.turbodistill-flip { display: flex; align-items: center; gap: 10px; margin: 4px 0; }
.turbodistill-flip input { flex: 1; accent-color: #3d94e0; }
.turbodistill-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 10px; }
.turbodistill-cards[hidden] { display: none; }
.turbodistill-cards.loose { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); }
.turbodistill-cards figure { margin: 0; min-width: 0; }
.turbodistill-cards .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
.turbodistill-cards .picture { position: relative; }
.turbodistill-cards .picture img { display: block; width: 100%; max-width: none; height: auto; margin: 0 !important; border-radius: 3px; }
.turbodistill-cards .picture img[src^="data:image/png"] { image-rendering: pixelated; }
.turbodistill-cards .picture span { position: absolute; left: 3px; bottom: 3px; padding: 0 5px; border-radius: 3px; background: rgb(0 0 0 / 65%); color: #fff; font-size: 11px; }
.turbodistill-cards figcaption { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; font-size: 12px; opacity: 0.8; }
.turbodistill-hidden { display: none !important; }
</style>"""  # noqa: E501 - a line a rule


def box(text: str, kind: str = "") -> str:
    """Words in a frame: `bad`, `warn`, `good` or neither; "" stays empty."""
    words = escape(text.encode("utf-8", "replace").decode())  # names of files need not be UTF-8
    return f'<div class="turbodistill-box {kind}">{words}</div>' if text else ""


def status(snapshot: Mapping[str, Any]) -> str:
    """Where a run is: words, bar, figures, error, warnings, memory, what came of it."""
    state, share = snapshot["state"], snapshot["share"]
    parts = [f'<div class="status">{escape(snapshot["headline"])}</div>']
    if share is not None:
        parts.append(f'<div class="bar"><div style="width:{100 * share:.1f}%"></div></div>')
    elif state == "working":
        parts.append('<div class="bar unknown"><div></div></div>')
    if snapshot["figures"]:
        parts.append(f"<div>{escape(snapshot['figures'])}</div>")
    parts.append(box(snapshot["error"], "bad"))
    parts.append(box(snapshot["result"], "good"))
    parts += [box(text, "warn") for text in snapshot["warnings"][-WARNINGS:]]
    parts += [f'<div class="quiet">{escape(text)}</div>' for text in (snapshot["memory"], _on(snapshot)) if text]
    return f'<div class="turbodistill-run" data-state="{state}">{"".join(parts)}</div>'


def idle(checkpoint: str, refusal: str = "") -> str:
    """What stands there before the first run; `refusal` says why there can be none."""
    loaded = f"Loaded: {escape(checkpoint)}." if checkpoint else "No checkpoint is loaded: choose one first."
    words = escape(refusal) or "Nothing runs. What runs is shown here, whichever page it was begun in."
    return (
        f'<div class="turbodistill-run" data-state="before"><div>{loaded}</div><div class="quiet">{words}</div></div>'
    )


def pictures(snapshot: Mapping[str, Any]) -> str:
    """The previews, teacher beside student, the newest in front; before the first one the newest teacher pictures."""
    previews = snapshot["previews"]
    if not previews:
        loose = "".join(f"<figure>{_picture(url)}</figure>" for url in snapshot["pictures"])
        return f'<div class="turbodistill-cards loose">{loose}</div>' if loose else ""
    last = len(previews) - 1
    grids = "".join(_cards(preview, hidden=k < last) for k, preview in enumerate(previews))
    names = [f"update {preview['update']} ({k + 1} of {last + 1})" for k, preview in enumerate(previews)]
    return f"<div>{_slider(names) if last else ''}{grids}</div>"


def _slider(names: list[str]) -> str:
    """Shows one of the grids beside it; in the page alone, so that no picture is sent twice."""
    turn = (
        "const all = this.parentNode.parentNode.querySelectorAll('.turbodistill-cards');"
        "all.forEach((grid, k) => { grid.hidden = k != this.value; });"
        "this.nextElementSibling.textContent = this.dataset.names.split('|')[this.value];"
    )
    last = len(names) - 1
    return (
        f'<div class="turbodistill-flip"><input type="range" min="0" max="{last}" value="{last}" step="1" '
        f'aria-label="Earlier previews" data-names="{"|".join(names)}" oninput="{escape(turn)}">'
        f"<span>{names[-1]}</span></div>"
    )


def _cards(preview: Mapping[str, Any], hidden: bool) -> str:
    cards = []
    for k, url in enumerate(preview["student"]):
        teacher = _picture(preview["teacher"][k], "teacher") if k < len(preview["teacher"]) else ""
        prompt = escape(preview["prompts"][k])
        seed = f"\nseed {preview['seeds'][k]}" if preview["seeds"] else ""
        cards.append(
            f'<figure><div class="pair">{teacher}{_picture(url, "student")}</div>'
            f'<figcaption title="{prompt}{seed}">{prompt}</figcaption></figure>'
        )
    return f'<div class="turbodistill-cards"{" hidden" * hidden}>{"".join(cards)}</div>'


def _picture(url: str, words: str = "") -> str:
    caption = f"<span>{words}</span>" if words else ""
    return f'<div class="picture"><img src="{url}" alt="{words or "picture"}">{caption}</div>'


def _on(snapshot: Mapping[str, Any]) -> str:
    return f"{snapshot['checkpoint']}, {snapshot['width']} x {snapshot['height']} pixels"
