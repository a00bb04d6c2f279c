"""Prompts in the metadata of somebody's pictures, as A1111 and ComfyUI write it."""

import json
import os

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.infotext import MadeWith, of_graph, of_infotext
from turbodistill.trainer.data.prompts import draw_prompts, find_prompts, read_prompts

INFOTEXT = """a red fox, (sharp:1.2), <lora:style:0.8>, in a {forest}
on moss <hypernet:x:1>
Negative prompt: blurry, text,
worst quality
Steps: 28, Sampler: Euler a, Schedule type: Karras, CFG scale: 6.5, Seed: 1, Size: 512x512, Model: toy"""


def save(path, **texts):
    about = PngInfo()
    for name, text in texts.items():
        about.add_itxt(name, text) if name == "itxt" else about.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=about)
    return path


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


PLAIN = {
    "3": node("KSampler", seed=1, steps=20, cfg=8.0, sampler_name="euler", positive=["6", 0], negative=["7", 0],
              latent_image=["5", 0], model=["4", 0]),
    "4": node("CheckpointLoaderSimple", ckpt_name="toy.safetensors"),
    "5": node("EmptyLatentImage", width=8, height=8, batch_size=1),
    "6": node("CLIPTextEncode", text="an owl\nat night", clip=["4", 1]),
    "7": node("CLIPTextEncode", text="bad", clip=["4", 1]),
}  # fmt: skip


def test_an_infotext_is_prompt_negative_and_settings():
    found = of_infotext(INFOTEXT)
    assert found == MadeWith(
        "a red fox, (sharp:1.2), in a {forest} on moss", "blurry, text, worst quality", "28", "6.5", "Euler a"
    )
    assert of_infotext("a fox") == MadeWith("a fox")
    assert of_infotext("a fox\nSteps: 4, Seed: 2") == MadeWith("a fox", steps="4")
    assert of_infotext("the Negative prompt: as words\nNegative prompt: real").negative == "real"
    for nothing in ("", "Negative prompt: a\nSteps: 1, Seed: 2", "Steps: 1, Sampler: x", "<lora:a:1>"):
        assert of_infotext(nothing) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "an owl at night"),
        ({"6": node("CLIPTextEncodeSDXL", text_g="an elk", text_l="a small elk")}, "an elk"),
        ({"6": node("CLIPTextEncodeFlux", clip_l="bee", t5xxl="a bee on a flower", guidance=3.5)}, "a bee on a flower"),
        ({"6": node("CLIPTextEncode", text=["9", 0]), "9": node("PrimitiveStringMultiline", value="a cod")}, "a cod"),
        ({"6": node("FluxGuidance", conditioning=["9", 0]), "9": node("CLIPTextEncode", text="a hen")}, "a hen"),
        (
            {"6": node("ConditioningCombine", conditioning_1=["9", 0], conditioning_2=["7", 0]),
             "9": node("CLIPTextEncode", text="a pig")},
            "a pig, bad",
        ),
        (
            {"3": {**PLAIN["3"], "inputs": PLAIN["3"]["inputs"] | {"positive": ["9", 0], "negative": ["9", 1]}},
             "9": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], strength=1.0)},
            "an owl at night",
        ),
        (
            {"3": node("SamplerCustomAdvanced", guider=["9", 0], sigmas=["10", 0], sampler=["11", 0], noise=["12", 0]),
             "9": node("BasicGuider", conditioning=["6", 0]), "10": node("BasicScheduler", steps=4),
             "11": node("KSamplerSelect", sampler_name="euler")},
            "an owl at night",
        ),
        ({"6": node("Reroute", anything=["9", 0]), "9": node("CLIPTextEncode", text="a yak")}, "a yak"),
        ({"6": node("Reroute", anything=["6", 0])}, None),  # a graph that leads back to itself
        ({"6": node("ConditioningZeroOut", conditioning=["7", 0])}, None),
        ({"3": node("KSampler", positive=["77", 0], cfg=1.0)}, None),
        ({"3": node("KSampler", positive="a text", cfg=1.0)}, None),
    ],
)  # fmt: skip
def test_a_graph_is_followed_from_its_sampler(change, expected):
    found = of_graph(json.dumps(PLAIN | change))
    assert (found.prompt if found else None) == expected


def test_a_graph_says_how_it_was_sampled():
    assert of_graph(json.dumps(PLAIN)) == MadeWith("an owl at night", "bad", "20", "8", "euler")
    guided = PLAIN | {
        "3": node("SamplerCustomAdvanced", guider=["9", 0], sigmas=["10", 0], sampler=["11", 0]),
        "9": node("CFGGuider", positive=["6", 0], negative=["7", 0], cfg=5.5),
        "10": node("BasicScheduler", steps=4), "11": node("KSamplerSelect", sampler_name="euler"),
    }  # fmt: skip
    assert of_graph(json.dumps(guided)) == MadeWith("an owl at night", "bad", "4", "5.5", "euler")
    two = PLAIN | {str(k): node("KSampler", positive=["9", 0], cfg=1.0) for k in (20, 21)}
    two["9"] = node("CLIPTextEncode", text="most")
    assert of_graph(json.dumps(two)).prompt == "most"


PAGE = {
    "nodes": [
        {"id": 1, "type": "CLIPTextEncode", "mode": 0, "inputs": [{"name": "clip", "link": 9}],
         "widgets_values": ["a {red|blue} ant"]},
        {"id": 2, "type": "CLIPTextEncode", "mode": 0, "inputs": [], "widgets_values": ["no"]},
        {"id": 3, "type": "KSampler", "mode": 0, "widgets_values": [5, "fixed", 12, 7.0, "ddim", "karras", 1.0],
         "inputs": [{"name": "positive", "link": 1}, {"name": "negative", "link": 2}, {"name": "model", "link": None}]},
    ],
    "links": [[1, 1, 0, 3, 1, "CONDITIONING"], [2, 2, 0, 3, 2, "CONDITIONING"], [9, 8, 1, 1, 0, "CLIP"]],
}  # fmt: skip


def test_a_graph_as_the_page_keeps_it():
    assert of_graph(json.dumps(PAGE)) == MadeWith("a {red|blue} ant", "no", "12", "7", "ddim")
    bypassed = json.loads(json.dumps(PAGE))
    bypassed["nodes"][2]["mode"] = 4
    assert of_graph(json.dumps(bypassed)) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "7", "NaN", "[" * 100_000, '{"a": ' * 100_000, '{"1": {"inputs": 3}}', '{"1": null}'),
        '{"nodes": [1, {}], "links": 4}',
        '{"nodes": [{"id": 1, "inputs": [{"link": 1}]}], "links": [[1], [1, {}, 2, 3], "x"]}',
    ],
)
def test_what_is_no_graph_says_nothing(text):
    assert of_graph(text) is None


def test_a_deep_graph_ends():
    deep = {str(k): node("Reroute", way=[str(k + 1), 0]) for k in range(10, 5000)}
    deep["1"] = node("KSampler", positive=["10", 0], cfg=1.0)
    assert of_graph(json.dumps(deep)) is None
    wide = {str(k): node("ConditioningCombine", conditioning_1=[str(k + 1), 0], conditioning_2=[str(k + 1), 0])
            for k in range(10, 60)}  # fmt: skip
    wide |= {"60": node("CLIPTextEncode", text="a rat"), "1": deep["1"]}
    assert of_graph(json.dumps(wide)).prompt == "a rat"


def test_a_folder_s_pictures_give_their_prompts(tmp_path):
    save(tmp_path / "a.png", parameters=INFOTEXT)
    save(tmp_path / "b.png", prompt=json.dumps(PLAIN), workflow=json.dumps(PAGE))
    (tmp_path / "below").mkdir()
    save(tmp_path / "below" / "c.png", workflow=json.dumps(PAGE))
    save(tmp_path / "d.png", parameters=INFOTEXT)  # once
    save(tmp_path / "e.png", title="nothing")
    save(tmp_path / "f.png", prompt="{" * 9000)
    (tmp_path / "g.png").write_bytes(b"no picture")
    (tmp_path / "h.txt").write_text("a caption")
    found = find_prompts(tmp_path)
    assert draw_prompts(found.lines, 3) == [
        "a red fox, (sharp:1.2), in a {forest} on moss", "an owl at night", "a {red|blue} ant"
    ]  # fmt: skip
    told, _, advice = found.words.partition(". ")
    assert told == (f"3 prompts of 4 pictures in {tmp_path}; 3 have none that can be read, and are left out")
    # Two of four have each of these; of the others there is none that two have.
    assert advice == (
        "Most were made with 28 steps, guidance 6.5, sampler Euler a, negative prompt 'blurry, text, worst quality': "
        "the teacher pairs can be made so too"
    )
    assert draw_prompts(read_prompts(tmp_path / "below" / "c.png"), 2) == ["a {red|blue} ant"] * 2


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_jpeg_and_webp_have_it_in_exif(tmp_path, kind, order):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "ein Fuchs über Moos\nNegative prompt: x\nSteps: 4, Seed: 1".encode(
        order
    )
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{kind.lower()}", exif=exif)
    assert find_prompts(tmp_path).lines == ["ein Fuchs über Moos"]


def test_comfyui_s_webp_has_its_graph_in_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(PLAIN)
    exif[0x010F] = "workflow:" + json.dumps(PAGE)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=exif)
    assert find_prompts(tmp_path / "a.webp").lines == ["an owl at night"]


def test_pictures_without_a_prompt_are_told(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"none of its 1 pictures says the prompt that it was made with"):
        find_prompts(tmp_path)
    with pytest.raises(DataError, match=r"none of its 1 pictures"):
        find_prompts(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"b\.png does not exist"):
        find_prompts(tmp_path / "b.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(DataError, match=r"pipe\.png is no regular file"):
            find_prompts(tmp_path / "pipe.png")


def test_a_picture_s_wildcards_and_half_letters_are_no_prompts_of_ours(tmp_path):
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards" / "colour.txt").write_text("red")
    save(tmp_path / "a.png", parameters="a __colour__ {fox")
    save(tmp_path / "b.png", parameters="a" * 70_000)
    found = find_prompts(tmp_path)
    assert draw_prompts(found.lines, 1) == ["a __colour__ {fox"] and "1 have none" in found.words


def test_what_is_told_of_them_can_be_printed(tmp_path):
    odd = node("KSampler", positive=["6", 0], sampler_name="euler\ud800\x1b[2J", steps=20, cfg=7.0)
    graph = {"3": odd, "6": node("CLIPTextEncode", text="an owl")}
    save(tmp_path / "a.png", prompt=json.dumps(graph))
    told = find_prompts(tmp_path).words
    assert "sampler euler??[2J" in told
    told.encode()
