"""Wildcard files as sd-dynamic-prompts has them, by the examples of its documentation, and what is refused of them."""

import json
import random
import sys

import pytest
from turbodistill.trainer.data.choices import expand
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.pairs import pairs_recipe
from turbodistill.trainer.data.prompts import draw_prompts, find_prompts, read_prompts
from turbodistill.trainer.data.wildcards import Wildcards

SEASONS = ("summer", "autumn", "winter", "spring")


@pytest.fixture
def write(tmp_path):
    """A wildcard file's lines, below tmp_path/wildcards."""

    def write(name, *lines):
        path = tmp_path / "wildcards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return write


@pytest.fixture
def comes(tmp_path):
    """What may come of a line."""

    def comes(line, seeds=300):
        (made,) = Wildcards([tmp_path / "wildcards"]).put_into([line])
        return {expand(made, random.Random(seed)) for seed in range(seeds)}

    return comes


def test_a_wildcard_is_a_line_of_its_file(write, comes):
    write("season.txt", "# seasons.txt", "", *SEASONS)
    assert comes("__season__ is coming") == {f"{season} is coming" for season in SEASONS}
    write("season.txt", "summer", "{autumn|fall}", "winter", "spring")
    assert comes("__season__ is coming") == {f"{season} is coming" for season in (*SEASONS, "fall")}


def test_several_of_a_wildcard_are_different_ones(write, comes):
    flavours = ("chocolate", "vanilla", "strawberry")
    write("flavours.txt", *flavours)
    two = {f"{a}, {b}" for a in flavours for b in flavours if a != b}
    assert comes("{2$$__flavours__}") == two
    assert comes("{2$$ and $$ __flavours__ }") == {text.replace(",", " and") for text in two}
    twice = comes("{2$$__flavours__|__flavours__}")  # each drawn by itself
    assert twice == two | {f"{a}, {a}" for a in flavours}


def test_wildcards_lie_in_wildcards_and_folders(write, comes):
    write("people_of_the_world.txt", "__asia__", "__africa__")
    write("africa.txt", "Zimbabwean", "Namibian", "Basotho")
    write("asia.txt", "Nepali")
    write("clothing/tops.txt", "linen shirt", "sweater, __colours*__")
    write("colours-cold.txt", "blue", "green")
    write("colours-warm.txt", "red", "yellow")
    assert comes("__people_of_the_world__") == {"Zimbabwean", "Namibian", "Basotho", "Nepali"}
    colours = {"blue", "green", "red", "yellow"}
    assert comes("my shirt is __colours*__") == {f"my shirt is {colour}" for colour in colours}
    assert comes("__clothing/tops__") == comes(r"__clothing\tops__")
    assert comes("__clothing/tops__") == {"linen shirt", *(f"sweater, {colour}" for colour in colours)}


def test_patterns_mean_folders_as_they_say(write, comes):
    for name in ("artists/a", "artists/dutch/b", "artists/dutch/old/c", "other/dutch/d"):
        write(f"{name}.txt", name[-1])
    assert comes("__artists/**__") == {"a", "b", "c"} and comes("__artists/*__") == {"a"}
    assert comes("__*/dutch/*__") == {"b", "d"} and comes("__**/dutch/**__") == {"b", "c", "d"}


def test_lines_may_have_weights_and_bars(write, comes):
    write("a.txt", "3::red", "blue", "x|y", "{p|q} r", r"\{s\}", "@_@")
    assert comes("__a__") == {"red", "blue", "x|y", "p r", "q r", "{s}", "@_@"}
    (made,) = Wildcards([]).put_into(["a fox"])
    assert made == "a fox"
    write("odd.txt", "2$$ and $$", "@_@")  # what would mean something where a choice begins
    assert comes("__odd__!") == {"2$$ and $$!", "@_@!"}


def test_the_first_folder_goes_before(tmp_path, write):
    write("a.txt", "first")
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("second")
    (other / "b.txt").write_text("third")
    both = Wildcards([tmp_path / "wildcards", tmp_path / "missing", other])
    assert both.put_into(["__a__ __b__"]) == ["{first} {third}"]


def test_they_lie_beside_the_prompts(tmp_path, write):
    write("colour.txt", "red", "blue")
    (tmp_path / "mine.txt").write_text("a __colour__ fox\n")
    assert read_prompts(tmp_path / "mine.txt") == ["a {red|blue} fox"]
    made = draw_prompts(read_prompts(tmp_path / "mine.txt"), 40, seed=3)
    assert set(made) == {"a red fox", "a blue fox"}
    assert made[:10] == draw_prompts(read_prompts(tmp_path / "mine.txt"), 10, seed=3)


def test_a_changed_wildcard_makes_other_pairs(tmp_path, write, kit, host):
    (tmp_path / "mine.txt").write_text("a __colour__ fox\n")

    def recipe(*lines):
        write("colour.txt", *lines)
        return pairs_recipe(host, kit.config(), find_prompts(tmp_path / "mine.txt").lines)["prompts"]

    assert recipe("red", "blue") == recipe("# others", "red", "", "blue") != recipe("red", "green")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("__colours__", r"no wildcard __colours__ in .*wildcards, the nearest is __colour__: write colours\.txt there"),
        ("__nothing/like/it__", r"there are 4 others: .* or \\__nothing/like/it__ for the letters"),
        ("__col?r__ __col[o]r__", None),  # no pattern of ours: letters
        ("__x*__", "no wildcard __x\\*__"),
        ("__../../etc/passwd__", r"leads out of its folder: name a file in .*wildcards"),
        ("__/etc/passwd__", "leads out of its folder"),
        (r"__..\secret__", "leads out of its folder"),
        ("__clothing/../colour__", "leads out of its folder"),
        ("__loop__", r"lead back to themselves \(loop -> round -> loop\)"),
        ("__self*__", r"lead back to themselves \(self -> self\)"),
        ("__empty__", r"empty\.txt holds no line"),
        ("__clothes(season=winter)__", "has a variable, which is not read"),
        ("__@colour__", "names a sampler by its first letter"),
        ("__~colour__", "names a sampler by its first letter"),
        ("__broken__", r"wildcard broken: prompt '\{a' has a brace without its other one"),
        ("__*a*b*c*d*e*f*g*h*i__", r"more than 8 \*"),
    ],
)
def test_what_cannot_be_is_told(write, comes, tmp_path, line, told):
    (tmp_path / "secret.txt").write_text("password")
    for name, value in (("colour", "red"), ("loop", "__round__"), ("round", "a __loop__"), ("broken", "{a")):
        write(f"{name}.txt", value)
    if "self" in line:
        write("self.txt", "__self*__")
    if "empty" in line:
        write("empty.txt", "# nothing")
    if told is None:
        assert comes(line, 5) == {line}
        return
    with pytest.raises(DataError, match=told):
        comes(line, 1)


def test_where_there_is_no_folder_that_is_told(comes):
    with pytest.raises(
        DataError, match=r"no wildcard __colour__ in .*wildcards, there is none at all: write colour.txt"
    ):
        comes("a __colour__ fox")
    with pytest.raises(DataError, match="in any folder: none is known here"):
        Wildcards([]).put_into(["a __colour__ fox"])


@pytest.mark.parametrize("line", ["^__^", "a __ b", "^__^ smile, >__<", "____", "__ a __", r"\__colour__", "a_b__c"])
def test_letters_stay_letters(write, comes, line):
    write("colour.txt", "red")
    assert comes(line, 3) == {line.replace("\\", "")}


def test_hidden_files_and_links_to_folders_are_none(write, comes, tmp_path):
    write(".hidden.txt", "a")
    write(".cache/b.txt", "b")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("c")
    (tmp_path / "wildcards" / "linked").symlink_to(tmp_path / "elsewhere")
    for name in (".hidden", ".cache/b", "linked/c"):
        with pytest.raises(DataError, match="there is no wildcard"):
            comes(f"__{name}__", 1)


def test_lines_that_multiply_are_bounded(write, comes):
    """Ten in ten in ten ...: three hundred bytes that would be a terabyte."""
    write("a0.txt", *"0123456789")
    for k in range(1, 12):
        write(f"a{k}.txt", *[f"__a{k - 1}__"] * 10)
    with pytest.raises(DataError, match=r"has more than 1,048,576 letters"):
        comes("__a11__", 1)
    assert comes("__a3__") == {*"0123456789"}
    write("long.txt", *["a" * 60_000] * 10)
    with pytest.raises(DataError, match=r"'__long__ __long__' has more than 1,048,576 letters with the lines of its"):
        comes("__long__ __long__", 1)
    for k in range(30):
        write(f"b{k}.txt", f"__b{k + 1}__")
    with pytest.raises(DataError, match="more than 20 deep"):
        comes("__b0__", 1)


def test_all_prompts_together_are_bounded(tmp_path, write):
    write("a.txt", *["a" * 60_000] * 17)
    with pytest.raises(DataError, match=r"more than 67,108,864 letters: use fewer prompts"):
        Wildcards([tmp_path / "wildcards"]).put_into(["__a__"] * 70)


ARTISTS = {
    "clothing": ["T-shirt", "Pants"],
    "artists": {"finnish": ["Akseli Gallen-Kallela", "Eero Järnefelt"], "dutch": ["Piet Mondrian"]},
    "1234": 5678,
    "flurp": 12345,
}


def test_lists_of_json_files_are_wildcards(write, comes):
    write("example.json", json.dumps(ARTISTS))
    write("sub/more.json", json.dumps({"hats": ["beret"]}))
    write("clothing.txt", "Shoes")  # a text file goes before
    assert comes("by __artists/finnish__") == {"by Akseli Gallen-Kallela", "by Eero Järnefelt"}
    assert comes("__artists/*__") == {"Akseli Gallen-Kallela", "Eero Järnefelt", "Piet Mondrian"}
    assert comes("__clothing__") == {"Shoes"} and comes("__sub/hats__") == {"beret"}
    with pytest.raises(DataError, match="there is no wildcard __flurp__"):
        comes("__flurp__", 1)
    write("broken.json", "[" * 100_000)
    assert comes("__clothing__") == {"Shoes"}  # lists are read where no text file will do
    with pytest.raises(DataError, match=r"broken\.json is no JSON"):
        comes("__artists/dutch__", 1)


def test_lists_of_yaml_files_are_wildcards(write, comes):
    pytest.importorskip("yaml", reason="needs PyYAML: pip install pyyaml")
    write("example.yaml", "clothing:", "  - T-shirt", "  - '{2::red|blue} hat'", "1234: 5678", "artists:",
          "  dutch:", "    - Piet Mondrian", "    - >", "      Rembrandt", "      van Rijn")  # fmt: skip
    assert comes("__clothing__") == {"T-shirt", "red hat", "blue hat"}
    assert comes("__artists/dutch__") == {"Piet Mondrian", "Rembrandt van Rijn"}
    bomb = [
        "a0: &a0 {x: [lol]}",
        *(f"a{k}: &a{k} {{{', '.join(f'y{n}: *a{k - 1}' for n in range(9))}}}" for k in range(1, 9)),
    ]
    write("example.yaml", *bomb)
    with pytest.raises(DataError, match=r"example\.yaml holds more than 100,000 values"):
        comes("__clothing__", 1)
    write("example.yaml", "a: !!python/object/apply:os.system [echo]")
    with pytest.raises(DataError, match=r"example\.yaml is no YAML"):
        comes("__a__", 1)


def test_without_pyyaml_that_is_told(write, comes, monkeypatch):
    write("example.yaml", "a: [b]")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(DataError, match=r"example\.yaml needs PyYAML .*: or save each list as a \.txt file"):
        comes("__a__", 1)
