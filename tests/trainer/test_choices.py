"""The syntax of sd-dynamic-prompts, by the examples of its public documentation: what may come, and how often."""

import random
from collections import Counter

import pytest
from turbodistill.trainer.data.choices import LONGEST, alternative, check_choices, expand, literal
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.prompts import draw_prompts


def drawn(line, seeds=400):
    return Counter(expand(line, random.Random(seed)) for seed in range(seeds))


ICE = "ice cream of "
PAIRS = [("chocolate", "vanilla"), ("chocolate", "strawberry"), ("vanilla", "strawberry")]
PAIRS += [(b, a) for a, b in PAIRS]
ONE = ["chocolate", "vanilla", "strawberry"]


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        (
            "{summer|autumn|winter|spring} is coming",
            {f"{s} is coming" for s in ("summer", "autumn", "winter", "spring")},
        ),
        (ICE + "{2$$chocolate|vanilla|strawberry}", {f"{ICE}{a}, {b}" for a, b in PAIRS}),
        (ICE + "{2$$ and $$chocolate|vanilla|strawberry}", {f"{ICE}{a} and {b}" for a, b in PAIRS}),
        (
            ICE + "{1-2$$ and $$chocolate|vanilla|strawberry}",
            {f"{ICE}{a} and {b}" for a, b in PAIRS} | {ICE + a for a in ONE},
        ),
        ("{-2$$chocolate|vanilla|strawberry}", {f"{a}, {b}" for a, b in PAIRS} | {*ONE}),
        (
            "a ring of {{rose|yellow|white} gold|platinum}",
            {f"a ring of {m}" for m in ("rose gold", "yellow gold", "white gold", "platinum")},
        ),
        ("{2$$ and $$A|B|C}", {"A and B", "A and C", "B and A", "B and C", "C and A", "C and B"}),
        ("{2$$|$$ a | b }", {"a|b", "b|a"}),  # a | may part, too; blanks around an alternative do not count
        ("{2$$$$a|b}", {"ab", "ba"}),
        ("{0-1$$a|b} fox", {"fox", "a fox", "b fox"}),
        ("{9-2$$a|b}", {"a, b", "b, a"}),
    ],
)
def test_the_documentation_s_examples(line, allowed):
    assert set(drawn(line)) == allowed


def test_more_than_there_are_is_all_and_an_open_end_too():
    for line in ("{4$$chocolate|vanilla|strawberry}", "{1-$$chocolate|vanilla|strawberry}"):
        found = drawn(line)
        numbers = {text.count(",") + 1 for text in found}
        assert numbers == ({3} if line[1] == "4" else {1, 2, 3})
        assert all(len(set(text.split(", "))) == len(text.split(", ")) for text in found)


def test_weights_are_how_often():
    found = drawn("{0.5::summer|0.1::autumn|0.3::winter|0.1::spring}", 4000)
    for name, share in (("summer", 0.5), ("autumn", 0.1), ("winter", 0.3), ("spring", 0.1)):
        assert abs(found[name] / 4000 - share) < 0.03  # more than four standard deviations
    found = drawn("{ 2::red | 3::blue | 1:: green | white }", 4000)  # 1 where none is written
    assert set(found) == {"red", "blue", "green", "white"}
    for name, share in (("red", 2 / 7), ("blue", 3 / 7), ("green", 1 / 7), ("white", 1 / 7)):
        assert abs(found[name] / 4000 - share) < 0.035


def test_of_several_with_weights_the_heavier_come_first_and_none_twice():
    found = drawn("{2$$8::a|1::b|1::c}", 4000)
    assert set(found) == {"a, b", "a, c", "b, a", "b, c", "c, a", "c, b"}
    # a first: 8/10; a second: b or c first (2/10) and then a of the nine tenths left (8/9).
    first = sum(n for text, n in found.items() if text[0] == "a") / 4000
    second = sum(n for text, n in found.items() if text[-1] == "a") / 4000
    assert abs(first - 0.8) < 0.03 and abs(second - 0.2 * 8 / 9) < 0.03
    assert set(drawn("{0::a|b|0::c}")) == {"b"} and set(drawn("{3$$0::a|b|2::c}")) == {"b, c", "c, b"}
    assert set(drawn("x {0::a|0::b}")) == {"x"}


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        (r"\{a|b\}", {"{a|b}"}),
        (r"a \{ fox", {"a { fox"}),
        (r"{a\|b|c} | d", {"a|b | d", "c | d"}),
        (r"{\{a\}|b}", {"{a}", "b"}),
        (r"\(series\), |_|, \||/", {r"\(series\), |_|, \||/"}),  # of tags, and of A1111's weights
        (r"snake\__case\__", {"snake__case__"}),
        ("{12:30|a::b}", {"12:30", "a::b"}),
        ("$5 {a|b}$$", {"$5 a$$", "$5 b$$"}),
        ("(word:1.2) [a|b] {c}", {"(word:1.2) [a|b] c"}),
    ],
)
def test_letters_that_are_meant_as_they_are(line, allowed):
    check_choices([line])
    assert set(drawn(line, 60)) == allowed


@pytest.mark.parametrize(
    "text", ["a {red|blue} fox", "{{}", r"\{", "^__^", "__colour__", r"\__a___", "${x=y}", "{2$$a|b}", r"a\ {b}\ "]
)
def test_a_literal_is_drawn_as_it_was(text):
    check_choices([literal(text)])
    assert set(drawn(literal(text), 20)) == {text.strip()}


@pytest.mark.parametrize("text", ["a|b", "{a|b}|c", r"a\|b", "{a{b|c}}", "a", "|"])
def test_an_alternative_is_one(text):
    allowed = set(drawn(text, 60)) if text[0] != "|" else {"|"}
    made = set(drawn(f"{{{alternative(text)}|-}}", 200))
    assert made == {each.replace(r"\|", "|") for each in allowed} | {"-"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("In ${season}, I wear", "has a variable, which is not read"),
        ("${season=!__season__}", "has a variable"),
        ("${season:summer}", "has a variable"),
        ("{@red|blue}", "names a sampler"),
        ("a {~red|blue}", "names a sampler"),
        (r"a \{red|blue} fox", "has a brace without its other one"),
    ],
)
def test_what_is_not_read_is_refused_in_words(line, told):
    with pytest.raises(DataError, match=told):
        check_choices([line])


def test_plain_choices_are_drawn_as_they_always_were():
    """Pairs on disk go on with the prompts that they were begun with."""
    lines = ["a {red|blue|green} {fox|owl}, {photo|oil {sketch|painting}}"]
    draws, expected = random.Random(7), []
    for _ in range(12):  # one draw where each choice ends
        colour, animal = draws.choice(["red", "blue", "green"]), draws.choice(["fox", "owl"])
        inner = draws.choice(["sketch", "painting"])
        expected.append(f"a {colour} {animal}, {draws.choice(['photo', f'oil {inner}'])}")
    assert draw_prompts(lines, 12, seed=7) == expected


def test_a_prompt_that_gets_too_long_is_told():
    options = "|".join(["a" * 40] * 2000)
    assert len(expand(f"{{2$${options}}}", random.Random(0))) == 82
    for line in (f"{{2000$${options}}}", f"{{99$${'-' * 900}$${options}}}", "a" * LONGEST + "{b}"):
        with pytest.raises(DataError, match=r"letters as it is drawn: give at most 65,536"):
            expand(line, random.Random(0))
    many = "{" + "|".join(f"tag {k}" for k in range(20_000)) + "}"
    assert draw_prompts([many], 3) == draw_prompts([many], 3)  # longer than a prompt, and drawn as one
