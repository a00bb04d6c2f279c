"""Choices in prompts: drawn by the seed, every alternative, nested ones, and none."""

import os
import random
import threading

import pytest
from turbodistill.demo.files import PROMPTS
from turbodistill.generate.generator import Generator
from turbodistill.generate.sample import sample
from turbodistill.trainer.data.captions import caption_of
from turbodistill.trainer.data.choices import LONGEST, check_choices, expand
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.pairs import make_pairs
from turbodistill.trainer.data.prompts import draw_prompts, drawn, prompt_lines, read_prompts
from turbodistill.trainer.run import run


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


HALF = "a \ud800 fox"


@pytest.mark.parametrize("read", [lambda text: draw_prompts([text], 1), prompt_lines, caption_of])
def test_half_a_letter_is_told_wherever_prompts_come_from(read):
    with pytest.raises(DataError, match=r"'a .ud800 fox' is no valid text: '.ud800' is half a letter"):
        read(HALF)


def test_nothing_begins_with_a_prompt_that_is_no_text(kit, host, tmp_path):
    student = kit.state(host, kit.config(), kit.pairs(host, kit.config(), tmp_path / "pairs")).student
    for prompts, words in (([HALF], "half a letter"), (["a fox", None], "prompt None is no text")):
        with pytest.raises(DataError, match=words):
            next(run.run(host, kit.config(), tmp_path / "run", prompts))
        with pytest.raises(DataError, match=words):
            next(make_pairs(host, kit.config(), prompts, tmp_path / "run"))
        with pytest.raises(DataError, match=words):
            next(sample(host, student, prompts))
    with pytest.raises(DataError, match="half a letter"):
        Generator(host).make(tmp_path / "none", HALF, [0], 1)
    assert not (tmp_path / "run").exists()


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
        ("{" * 20_000 + "fox" + "}" * 20_000, {"fox"}),
        ("an open { brace", {"an open { brace"}),
    ],
)
def test_nested_empty_and_broken_choices(line, allowed):
    assert {expand(line, random.Random(seed)) for seed in range(40)} == allowed


def test_the_demo_s_prompts_are_many_and_clean():
    made = draw_prompts(read_prompts(PROMPTS), 500)
    assert len(set(made)) >= 20
    assert [p for p in made if set("{}|#") & set(p) or "  " in p or p != p.strip() or not p] == []


def test_only_the_ends_of_lines_end_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa\u2028b\r\nc\x85d\x0ce\rf\n".encode())
    assert read_prompts(f' "{path}" ') == ["a\u2028b", "c\x85d\x0ce", "f"]
    path.write_bytes("a fox".encode("utf-16-le"))
    with pytest.raises(DataError, match="is no UTF-8 text: save it as plain text in UTF-8"):
        read_prompts(path)


def test_each_picture_draws_by_its_own_seed():
    prompts = ["a {red|blue} fox"] * 8
    assert drawn(prompts, range(3, 11))[5:] == drawn(prompts[:3], range(8, 11))
    assert set(drawn(prompts, range(8))) == {"a red fox", "a blue fox"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with named pipes")
def test_prompts_come_out_of_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("a fox\nan owl\n",))
    writer.start()
    assert read_prompts(pipe) == ["a fox", "an owl"]
    writer.join()
    with pytest.raises(DataError, match="/dev/null holds no prompt"):
        read_prompts("/dev/null")


def test_a_prompt_is_text_and_has_a_longest():
    check_choices(["a" * LONGEST])
    for take in (check_choices, lambda prompts: draw_prompts(prompts, 4)):
        with pytest.raises(DataError, match=r"prompt 'aaa.*\.\.\. has 65,537 letters: give at most 65,536"):
            take(["an owl", "a" * (LONGEST + 1)])
        with pytest.raises(DataError, match="prompt 5 is no text: give prompts as texts"):
            take(["an owl", 5])
