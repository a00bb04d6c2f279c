"""Choices in prompts: drawn by the seed, every alternative, nested ones, and none."""

import random

import pytest
from turbodistill.demo.files import PROMPTS
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.prompts import ANYTHING, draw_prompts, expand, prompt_lines, read_prompts


def test_every_alternative_comes_and_nothing_else_changes():
    made = draw_prompts(["a {red|blue} fox, {photo|oil painting}"], 40, seed=3)
    assert len(made) == 40
    assert set(made) == {f"a {c} fox, {k}" for c in ("red", "blue") for k in ("photo", "oil painting")}


def test_the_same_seed_draws_the_same():
    lines = ["{a|b|c|d} {e|f|g|h}"]
    assert draw_prompts(lines, 20, seed=1) == draw_prompts(lines, 20, seed=1) != draw_prompts(lines, 20, seed=2)
    assert draw_prompts(lines, 20, seed=1)[:5] == draw_prompts(lines, 5, seed=1)


def test_lines_come_in_turn():
    assert draw_prompts(["{one|one}", "two"], 4) == ["one", "two", "one", "two"]


def test_lines_without_choices_stay_as_they_are():
    lines = ["a fox", "an owl (2 of them)"]
    assert draw_prompts(lines, 3) == [*lines, lines[0]]


@pytest.mark.parametrize("line", ["a {red|blue fox", "a red|blue} fox", "a {red|{dark|light} blue fox"])
def test_half_a_choice_is_told(line):
    with pytest.raises(DataError, match=r"has a brace without its other one: write choices as \{red\|blue\}"):
        prompt_lines(f"an owl\n{line}")


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("a {red|{dark|light} blue} fox", {"a red fox", "a dark blue fox", "a light blue fox"}),
        ("a {|big} fox", {"a fox", "a big fox"}),
        ("fox {|at dusk}, photo", {"fox, photo", "fox at dusk, photo"}),
        ("fox {|at dusk}", {"fox", "fox at dusk"}),
        ("{}fox", {"fox"}),
        ("an open { brace", {"an open { brace"}),
    ],
)
def test_nested_empty_and_broken_choices(line, allowed):
    assert {expand(line, random.Random(seed)) for seed in range(40)} == allowed


@pytest.mark.parametrize(("path", "least"), [(ANYTHING, 300), (PROMPTS, 20)], ids=["anything", "demo"])
def test_the_built_in_prompts_are_many_and_clean(path, least):
    made = draw_prompts(read_prompts(path), 500)
    assert len(set(made)) >= least
    assert [p for p in made if set("{}|#") & set(p) or "  " in p or p != p.strip() or not p] == []


def test_only_the_ends_of_lines_end_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa\u2028b\r\nc\x85d\x0ce\rf\n".encode())
    assert read_prompts(f' "{path}" ') == ["a\u2028b", "c\x85d\x0ce", "f"]
    path.write_bytes("a fox".encode("utf-16-le"))
    with pytest.raises(DataError, match="is no UTF-8 text: save it as plain text in UTF-8"):
        read_prompts(path)
