"""What a picture's own metadata says it was made with: A1111's infotext, or ComfyUI's graph."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

LARGEST = 2**22  # letters of a text in a picture
MOST_NODES = 20_000  # of a graph, and as many links
DEEPEST = 100  # nodes between a sampler and its text
USER_COMMENT, EXIF = 0x9286, 0x8769
TAGS = (0x010E, 0x010F, 0x0110)  # ImageDescription, Make and Model, in which ComfyUI's nodes write WebP's graph

NEGATIVE = re.compile(r"^Negative prompt:", re.MULTILINE)
SETTINGS = re.compile(r"^Steps: \d+, .*", re.MULTILINE | re.DOTALL)
NETWORK = re.compile(r"<[A-Za-z]{2,20}:[^<>\n]*>")  # <lora:name:1>, which is no word of the prompt
SETTING = re.compile(r"(Steps|CFG scale|Sampler): ([^,\n]{1,60})")

# The inputs of ComfyUI's nodes that hold the text of a prompt, the fullest first, and those that lead to one.
TEXTS = ("t5xxl", "text_g", "text", "prompt", "positive_prompt", "value", "string", "text_l", "clip_l")
LEADS = ("conditioning", "conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from", "cond", "cond1")
# Classes -> their widgets in order, for a graph as the page keeps it, which names none.
WIDGETS = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name"),
    "KSamplerAdvanced": ("", "noise_seed", "", "steps", "cfg", "sampler_name"),
    "SamplerCustom": ("", "noise_seed", "", "cfg"),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps"),
    "CFGGuider": ("cfg",),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("", "", "", "", "", "", "text_g", "text_l"),
    "CLIPTextEncodeFlux": ("clip_l", "t5xxl"),
    "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",),
}


@dataclass(frozen=True)
class MadeWith:
    """The prompt of a picture, and how it was sampled; empty where it does not say."""

    prompt: str = ""
    negative: str = ""
    steps: str = ""
    cfg: str = ""
    sampler: str = ""


def read_made_with(image: Image.Image) -> MadeWith | None:
    """What an opened picture says it was made with; None where it says nothing. No pixel is decoded."""
    texts = {name: text for name, text in image.info.items() if isinstance(text, str) and len(text) <= LARGEST}
    if image.format != "PNG":
        texts |= _of_exif(image)
    if found := of_infotext(texts.get("parameters", "")):
        return found
    return of_graph(texts.get("prompt", "")) or of_graph(texts.get("workflow", ""))


def _of_exif(image: Image.Image) -> dict[str, str]:
    """The texts in the EXIF of a JPEG or WebP, by the names that they have in a PNG."""
    exif = image.getexif()
    comment = exif.get_ifd(EXIF).get(USER_COMMENT)
    texts = {"parameters": _comment(comment) if isinstance(comment, bytes) else str(comment or "")}
    for tag in TAGS:
        name, colon, text = str(exif.get(tag) or "").partition(":")
        if colon and name.lower() in ("prompt", "workflow"):
            texts[name.lower()] = text
    return {name: text for name, text in texts.items() if len(text) <= LARGEST}


def _comment(raw: bytes) -> str:
    """EXIF's UserComment: eight bytes name its encoding, but not the order of UTF-16's bytes."""
    kind, text = raw[:8], raw[8 : 2 * LARGEST]
    if kind != b"UNICODE\0":
        return (text if kind == b"ASCII\0\0\0" else raw).decode("utf-8", "replace").strip("\0")
    big = text[::2].count(0) >= text[1::2].count(0)  # of plain letters the high byte is 0
    return text.decode("utf-16-be" if big else "utf-16-le", "replace").strip("\0\ufeff")


def of_infotext(text: str) -> MadeWith | None:
    """A1111's infotext: the prompt, `Negative prompt:` and another, and a line of settings that begins with Steps."""
    settings = [match.start() for match in SETTINGS.finditer(text)]
    written, about = (text[: settings[0]], text[settings[0] :]) if settings else (text, "")
    parted = NEGATIVE.search(written)
    prompt = _plain(written[: parted.start()] if parted else written)
    found = dict(reversed(SETTING.findall(about)))  # of several of a name the first
    negative = _plain(written[parted.end() :]) if parted else ""
    given = (found.get(name, "").strip() for name in ("Steps", "CFG scale", "Sampler"))
    return MadeWith(prompt, negative, *given) if prompt else None


def _plain(text: str) -> str:
    """A prompt on one line, without the extra networks in it and the commas that they leave."""
    words = " ".join(NETWORK.sub("", text).split())
    return re.sub(r"\s*,(?:\s*,)+", ",", words).strip(" ,")


def of_graph(text: str) -> MadeWith | None:
    """ComfyUI's graph as JSON, as it was run or as the page keeps it: the prompt that most of its samplers have."""
    try:
        nodes = _nodes(json.loads(text)) if text else {}
    except (ValueError, RecursionError):
        return None
    found: dict[str, MadeWith] = {}
    counts: dict[str, int] = {}
    for node in nodes.values():
        if prompt := _plain(_prompt_of(nodes, node, "positive")):
            counts[prompt] = counts.get(prompt, 0) + 1
            negative = _plain(_prompt_of(nodes, node, "negative"))
            given = (_setting(nodes, node, name) for name in ("steps", "cfg", "sampler_name"))
            found.setdefault(prompt, MadeWith(prompt, negative, *given))
    return found[max(counts, key=counts.__getitem__)] if counts else None


@dataclass(frozen=True)
class _Node:
    kind: str
    inputs: Mapping[str, Any]  # values, and links as (node, output)


def _nodes(graph: Any) -> dict[str, _Node]:
    """The nodes of either kind of graph by their ids; raises ValueError for what is none."""
    if not isinstance(graph, dict):
        raise ValueError("no graph")
    listed = graph.get("nodes")
    if isinstance(listed, list):
        return _of_page(listed, graph.get("links"))
    made = {}
    for key, node in list(graph.items())[:MOST_NODES]:
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict):
            inputs = {name: _link(value) for name, value in node["inputs"].items()}
            made[key] = _Node(str(node.get("class_type")), inputs)
    return made


def _link(value: Any) -> Any:
    if isinstance(value, list):
        is_link = len(value) == 2 and isinstance(value[0], (str, int)) and isinstance(value[1], int)
        return (str(value[0]), value[1]) if is_link else None
    return value


def _of_page(listed: list[Any], linked: Any) -> dict[str, _Node]:
    """The nodes of a graph as the page keeps it: links by number, widgets in order."""
    rows = linked[:MOST_NODES] if isinstance(linked, list) else []
    links = {row[0]: (str(row[1]), row[2]) for row in rows if isinstance(row, list) and len(row) > 2 and _plainly(row)}
    made = {}
    for node in listed[:MOST_NODES]:
        if not isinstance(node, dict) or node.get("mode") in (2, 4):  # muted or bypassed
            continue
        kind, inputs = str(node.get("type")), {}
        values = node.get("widgets_values")
        if isinstance(values, list):
            names = WIDGETS.get(kind, ("text",) if "TextEncode" in kind else ())
            inputs = {name: value for name, value in zip(names, values, strict=False) if name}
        for each in node["inputs"] if isinstance(node.get("inputs"), list) else ():
            if isinstance(each, dict) and isinstance(each.get("link"), int) and each["link"] in links:
                inputs[str(each.get("name"))] = links[each["link"]]
        made[str(node.get("id"))] = _Node(kind, inputs)
    return made


def _plainly(row: list[Any]) -> bool:
    return isinstance(row[0], int) and isinstance(row[1], (int, str)) and isinstance(row[2], int)


def _prompt_of(nodes: Mapping[str, _Node], node: _Node, side: str) -> str:
    """The text of a sampler's positive or negative conditioning; "" for a node that is no sampler."""
    inputs = node.inputs
    if isinstance(guider := inputs.get("guider"), tuple) and guider[0] in nodes:
        inputs = nodes[guider[0]].inputs
        link = inputs.get(side, inputs.get("conditioning") if side == "positive" else None)
    elif "positive" in inputs and {"cfg", "steps", "latent_image", "sampler_name"} & set(inputs):
        link = inputs.get(side)
    else:
        return ""
    return _followed(nodes, link, side, 0, set())


def _followed(nodes: Mapping[str, _Node], link: Any, side: str, depth: int, seen: set[Any]) -> str:
    """The texts that a link leads to, upstream; each once."""
    if not isinstance(link, tuple) or link[0] not in nodes or link in seen or depth > DEEPEST:
        return ""
    seen.add(link)
    node = nodes[link[0]]
    if "ZeroOut" in node.kind:
        return ""
    for name in TEXTS:
        value = node.inputs.get(name)
        text = value if isinstance(value, str) else _followed(nodes, value, side, depth + 1, seen)
        if text.strip():
            return text
    paired = "positive" in node.inputs and "negative" in node.inputs  # such as a ControlNet's
    leads = (("positive", "negative")[link[1]],) if paired and link[1] in (0, 1) else LEADS
    ways = [node.inputs[name] for name in leads if name in node.inputs]
    if not ways:  # a reroute, or a node that is not known: on where only one way leads
        ways = [value for value in node.inputs.values() if isinstance(value, tuple)]
        ways = ways if len(ways) == 1 else []
    texts = (_followed(nodes, way, side, depth + 1, seen) for way in ways)
    return ", ".join(dict.fromkeys(text for text in texts if text.strip()))


def _setting(nodes: Mapping[str, _Node], node: _Node, name: str) -> str:
    """A setting of a sampler, its own or of the nodes that are linked to it."""
    for each in (node, *(nodes[v[0]] for v in node.inputs.values() if isinstance(v, tuple) and v[0] in nodes)):
        value = each.inputs.get(name)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return f"{value:g}" if isinstance(value, float) else str(value)[:60]
    return ""
