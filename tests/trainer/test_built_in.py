"""The prompt lists that come with us: many, clean and decent; and which of them suits a model."""

import json
import math
import re

import pytest
from turbodistill.core import architecture
from turbodistill.trainer.data.built_in import LISTS, suggest
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.prompts import draw_prompts, find_prompts, read_prompts

# What is not in the lists: nakedness, minors where people are drawn for their looks, violence, living people's names.
INDECENT = """nude nudity naked nsfw sexy sexual erotic lingerie underwear panties bra bikini swimsuit cleavage breasts
breast nipples butt thighs thighhighs zettai loli shota child girl's schoolgirl student serafuku uniform_school teen
teenage toddler baby blood gore corpse gun rifle drug cigarette smoking bdsm bondage upskirt topless kiss kissing
seductive ass miniskirt navel midriff barefoot feet maid bunny succubus"""
WRITING = (
    "text words letters sign signs poster logo title caption writing watermark signature label newspaper banner quote"
)
QUALITY = "masterpiece best_quality score_9 absurdres highres amazing_quality"


@pytest.fixture(params=LISTS)
def name(request):
    return request.param


def templates(name):
    lines = LISTS[name].read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_each_makes_thousands_of_different_prompts(name):
    """Counted by hand: the product of the alternatives of each line, of which none holds another."""
    lines = templates(name)
    choices = [[part.split("|") for part in re.findall(r"\{([^{}]*)\}", line)] for line in lines]
    assert all(len(set(part)) == len(part) > 1 for found in choices for part in found)
    number = sum(math.prod(map(len, found)) for found in choices)
    assert (len(lines), number) == {"prose": (63, 11_703), "tags": (50, 271_042)}[name]
    assert min(math.prod(map(len, found)) for found in choices) >= 60
    drawn = draw_prompts(find_prompts(name).lines, 4096)
    assert len(set(drawn)) >= {"prose": 3200, "tags": 3900}[name]


def test_they_are_clean(name):
    lines = templates(name)
    assert len(set(lines)) == len(lines) and find_prompts(name).lines == lines
    drawn = draw_prompts(lines, 5000, seed=1)
    assert [p for p in drawn if set("{}|#_\\$") & set(p) or "  " in p or ",," in p or p != p.strip(" ,")] == []
    assert all(15 <= len(p) <= 260 for p in drawn)
    words = set(re.findall(r"[a-z0-9_']+", " ".join(lines).lower()))
    assert words & {*INDECENT.split(), *WRITING.split(), *QUALITY.split()} == set()


def test_tags_are_tags():
    for prompt in draw_prompts(templates("tags"), 2000):
        tags = prompt.split(", ")
        assert all(len(tag.split()) <= 4 and tag == tag.lower() for tag in tags), prompt
        assert 3 <= len(tags) <= 16 and len(set(tags)) == len(tags), prompt
        assert re.match(
            r"(1girl|1boy|[2346]\+?(girls|boys)|no humans|crowd|people|hand|close-up|silhouette|backl|chibi)", prompt
        )


def test_prose_has_its_articles():
    for prompt in draw_prompts(templates("prose"), 4000):
        assert not re.search(r"\b[Aa] [aeiou](?!ne\b|ni)\w*", prompt), prompt
        assert not re.search(r"\b[Aa]n [^aeiouAEIOU]", prompt), prompt
        assert re.search(r"[A-Za-z]{4}", prompt) and not re.search(r"\b(\w+) \1\b", prompt), prompt


def test_a_file_of_that_name_goes_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(read_prompts("tags")) == 50
    (tmp_path / "tags").write_text("a fox")
    assert read_prompts("tags") == ["a fox"] and len(read_prompts("prose")) == 63
    with pytest.raises(DataError, match="anything does not exist"):
        read_prompts("anything")


# --- which suits ---

BOORU = {"10_style": {"1girl": 900, "solo": 800, "long hair": 500, "blue_eyes": 300}, "5_more": {"smile": 200}}
SENTENCES = {
    "1_photos": {"a photograph of a red fox standing in deep snow": 12, "an old man smiles at the camera": 9, "fox": 2}
}


@pytest.mark.parametrize(
    ("name", "chosen", "words"),
    [
        ("illustriousXL_v01.safetensors", "tags", "since the model's name says illustrious"),
        ("waiNSFWIllustrious_v140.safetensors", "tags", "says wai"),
        ("NoobAI-XL-v1.1", "tags", "says Noob"),
        ("ponyDiffusionV6XL.safetensors", "tags", "says pony"),
        ("cagliostrolab/animagine-xl-4.0", "tags", "says animagine"),
        ("AnimeMix_v2", "tags", "says Anime"),
        ("sd_xl_base_1.0.safetensors", "prose", "nothing says that the model learnt tags"),
        ("realisticVisionV60", "prose", "nothing says"),
        ("animalPhotos.safetensors", "prose", "nothing says"),  # no anime
        ("ponytailFixer", "prose", "nothing says"),
        ("", "prose", "nothing is known of the model"),
    ],
)
def test_names_say_what_a_model_learnt(name, chosen, words):
    found = suggest(name)
    assert found.name == chosen and words in found.words
    assert found.words.startswith(f"prompts: the built-in list of {chosen}, since ")


def test_captions_count_before_names_and_the_kind_before_both():
    booru, sentences = ({"ss_tag_frequency": json.dumps(each)} for each in (BOORU, SENTENCES))
    assert suggest("photo", architecture.SDXL, booru).name == "tags"
    assert "metadata says that it learnt sentences" in suggest("ponyXL", architecture.SD1, sentences).words
    assert suggest("mine", architecture.SDXL, {"ss_sd_model_name": "animagine-xl-3.1.safetensors"}).name == "tags"
    for kind in (architecture.FLUX_DEV, architecture.SD3, architecture.CHROMA, architecture.LUMINA2):
        found = suggest("illustrious-flux", kind, booru)
        assert found.name == "prose" and f"models of its kind ({kind}) read sentences" in found.words
    assert suggest("pony", "some-unet", {}).name == "tags"


@pytest.mark.parametrize(
    "odd",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 9000,
        '{"a": 1}',
        '{"a": {"b": "c", "d": -1, "": 3}}',
        '{"a": {"x y z w": 1e999}}',
        "{}",
    ],
)
def test_odd_metadata_says_nothing(odd):
    assert suggest("pony", architecture.SDXL, {"ss_tag_frequency": odd}).why == "the model's name says pony"


def test_python_takes_the_list_that_suits_a_model(host, caplog):
    assert read_prompts("auto", host) == templates("prose")
    assert caplog.messages == ["prompts: the built-in list of prose, since nothing says that the model learnt tags"]
    host.name = "my-noobai-merge"
    assert read_prompts(model=host) == templates("tags") and "says noobai" in caplog.messages[-1]
