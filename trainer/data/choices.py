r"""Choices in a prompt, as sd-dynamic-prompts writes them: `{red|blue}`, `{2::red|blue}`, `{2$$ and $$a|b|c}`.

`\{`, `\}` and, in a choice, `\|` are the letters themselves.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from .files import DataError

LONGEST = 2**16  # letters of a prompt as it is drawn, or of a caption
LONGEST_LINE = 2**20  # of one with choices, the lines of its wildcards among them
COUNT = r"(?P<count>[0-9]{1,6}(?:-[0-9]{0,6})?|-[0-9]{1,6})\$\$(?:(?P<between>[^${}]{0,1000})\$\$)?"
TOKEN = re.compile(r"\\(?:[{}|]|__)|\{(?:" + COUNT + r")?|[|}]")
WEIGHT = re.compile(r"\s*([0-9]{1,6}(?:\.[0-9]{0,6})?|\.[0-9]{1,6})\s*::\s*")
BETWEEN = ", "  # what stands between several of a choice, unless it says so
# What sd-dynamic-prompts has besides. A variable's name begins with a letter.
SAMPLER = re.compile(r"(?<!\\)\{[@~]")
VARIABLE = re.compile(r"(?<!\\)\$\{\s*[A-Za-z_]\w*\s*[?:=}]")


class _Choice(NamedTuple):
    """A choice that is open, as far as it is read: how it began, how many of it are wanted, its alternatives."""

    opening: str
    number: str | None
    between: str
    options: list[str]


def expand(line: str, draws: random.Random) -> str:
    """The line with one alternative of each choice, or as many as it says; an empty one leaves a word out.

    What is no choice stays as it is. Raises DataError for a prompt that gets too long.
    """
    levels = [_Choice("", None, "", [""])]  # the text so far, and each choice that is open: choices may hold choices
    end = 0
    for token in TOKEN.finditer(line):
        text, inside = token[0], len(levels) > 1
        levels[-1].options[-1] += line[end : token.start()]
        _check_drawn(len(levels[-1].options[-1]))
        end = token.end()
        if text[0] == "{":
            between = BETWEEN if token["between"] is None else token["between"]
            levels.append(_Choice(text, token["count"], between, [""]))
        elif text == "}" and inside:
            chosen = _pick(levels.pop(), draws)
            levels[-1].options[-1] += chosen
        elif text == "|" and inside:
            levels[-1].options.append("")
        else:
            escaped = text[0] == "\\" and (inside or text != r"\|")
            levels[-1].options[-1] += text[1:] if escaped else text
    levels[-1].options[-1] += line[end:]
    whole = "".join(level.opening + "|".join(level.options) for level in levels)
    _check_drawn(len(whole))
    return re.sub(r" +(,|$)", r"\1", re.sub(r" {2,}", " ", whole)).strip()


def _pick(choice: _Choice, draws: random.Random) -> str:
    """One of the alternatives, or several, each at most once."""
    if choice.number is None and not any("::" in option for option in choice.options):
        return draws.choice(choice.options)
    found = [WEIGHT.match(option) for option in choice.options]
    options = [option[match.end() :] if match else option for option, match in zip(choice.options, found, strict=True)]
    weights = [float(match[1]) if match else 1.0 for match in found] if any(found) else []
    if choice.number is None and not weights:
        return draws.choice(options)
    number = 1 if choice.number is None else _number(choice.number, len(options), draws)
    if weights:  # the first of exponential variables of these rates: drawn one after the other, none put back
        times = [draws.expovariate(weight) if weight else math.inf for weight in weights]
        possible = [k for k in range(len(options)) if weights[k]]
        chosen = [options[k] for k in sorted(possible, key=times.__getitem__)[:number]]
    else:
        chosen = draws.sample(options, number)
    if choice.number is None:
        return "".join(chosen)
    _check_drawn(sum(map(len, chosen)) + len(choice.between) * len(chosen))
    return choice.between.join(text.strip() for text in chosen)


def _number(count: str, most: int, draws: random.Random) -> int:
    """How many are drawn for `2`, `1-3`, `-3` or `1-`, of so many at most."""
    low, dash, high = count.partition("-")
    if not dash:
        return min(int(low), most)
    first, last = sorted((min(int(low or 1), most), min(int(high or most), most)))
    return draws.randint(first, last)


def _check_drawn(letters: int) -> None:
    if letters > LONGEST:
        raise DataError(f"a prompt gets {letters:,} letters as it is drawn: give at most {LONGEST:,}")


def literal(text: str) -> str:
    """A text as a prompt in which nothing is a choice."""
    return re.sub(r"[{}]|__", r"\\\g<0>", text)


def alternative(text: str) -> str:
    """A line as one alternative of a choice: a | in it that parts nothing is that letter."""
    parts, depth, end = [], 0, 0
    for token in TOKEN.finditer(text):
        depth += {"{": 1, "}": -1}.get(token[0][0], 0)
        parts += [text[end : token.start()], r"\|" if token[0] == "|" and depth == 0 else token[0]]
        end = token.end()
    return "".join(parts) + text[end:]


def check_choices(prompts: Sequence[str]) -> None:
    """Raise DataError for half a choice, for what sd-dynamic-prompts knows and we do not, and as `check_texts`."""
    check_texts(prompts)
    for prompt in prompts:
        braces = [token[0][0] for token in TOKEN.finditer(prompt) if token[0][0] in "{}"]
        depths = list(accumulate(1 if brace == "{" else -1 for brace in braces))
        if depths and (min(depths) < 0 or depths[-1]):
            raise DataError(
                f"prompt {prompt[:80]!r} has a brace without its other one: write choices as "
                "{red|blue}, or leave it out; \\{ is the letter"
            )
        if VARIABLE.search(prompt):
            raise DataError(
                f"prompt {prompt[:80]!r} has a variable, which is not read: write its choice where it stands, or $\\{{ "
                "for the letters"
            )
        if SAMPLER.search(prompt):
            raise DataError(
                f"prompt {prompt[:80]!r} names a sampler by {{@ or {{~: one is drawn at random in any case. Leave the "
                "letter out, or write a blank before it"
            )


def check_texts(prompts: Sequence[str]) -> None:
    """Raise DataError for what no text encoder can read: no text, too long, or half a letter (a lone surrogate)."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise DataError(f"prompt {prompt!r:.80} is no text: give prompts as texts")
        most = LONGEST_LINE if "{" in prompt else LONGEST
        if len(prompt) > most:
            raise DataError(f"prompt {prompt[:40]!r}... has {len(prompt):,} letters: give at most {most:,}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            half = prompt[error.start]
            raise DataError(
                f"prompt {prompt[:80]!r} is no valid text: {half!r} is half a letter, or a byte that is not UTF-8. "
                "Type that letter again"
            ) from None
