r"""Choices in a prompt, as sd-dynamic-prompts writes them: `{red|blue}`, `{2::red|blue}`, `{2$$ and $$a|b|c}`.

`\{`, `\}` and, in a choice, `\|` are the letters themselves.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from itertools import accumulate

from .files import DataError

LONGEST = 2**16  # letters of a prompt as it is drawn, or of a caption
LONGEST_LINE = 2**20  # of one with choices, the lines of its wildcards among them
COUNT = r"(?P<count>[0-9]{1,6}(?:-[0-9]{0,6})?|-[0-9]{1,6})\$\$(?:(?P<between>[^${}]{0,1000})\$\$)?"
TOKEN = re.compile(r"\\(?:[{}|]|__)|\{(?:" + COUNT + r")?|[|}]")
# The same, and at once a whole choice without another in it, without weights, numbers or letters that are escaped.
TOKEN_OR_PLAIN = re.compile(r"\{(?P<plain>[^{}\\:$]*)\}|" + TOKEN.pattern)
WEIGHT = re.compile(r"\s*([0-9]{1,6}(?:\.[0-9]{0,6})?|\.[0-9]{1,6})\s*::\s*")
COUNTED = re.compile(r"\{" + COUNT)
BAR = "\udfff"  # half a letter, which no prompt may have
BETWEEN = ", "  # what stands between several of a choice, unless it says so
# What sd-dynamic-prompts has besides. A variable's name begins with a letter.
SAMPLER = re.compile(r"(?<!\\)\{[@~]")
VARIABLE = re.compile(r"(?<!\\)\$\{\s*[A-Za-z_]\w*\s*[?:=}]")


def expand(line: str, draws: random.Random) -> str:
    """The line with one alternative of each choice, or as many as it says; an empty one leaves a word out.

    What is no choice stays as it is. Raises DataError for a prompt that gets too long.
    """
    parts: list[str] = []  # the text so far, of each choice that is open with how it began and with BAR between
    begun: list[int] = []  # where in it the choices that are open begin: they may hold others
    end = 0
    for token in TOKEN_OR_PLAIN.finditer(line):
        text, inside = token[0], bool(begun)
        parts.append(line[end : token.start()])
        end = token.end()
        if token["plain"] is not None:
            parts.append(draws.choice(token["plain"].split("|")))
        elif text[0] == "{":
            begun.append(len(parts))
            parts.append(text)
        elif text == "}" and inside:
            opening, *inner = parts[begun[-1] :]
            parts[begun.pop() :] = [_pick(opening, "".join(inner).split(BAR), draws)]
        elif text[0] == "\\" and (inside or text != r"\|"):
            parts.append(text[1:])
        else:
            parts.append(BAR if text == "|" and inside else text)
    whole = "".join((*parts, line[end:])).replace(BAR, "|")
    _check_drawn(len(whole))
    return re.sub(r" +(,|$)", r"\1", re.sub(r" {2,}", " ", whole)).strip()


def _pick(opening: str, given: list[str], draws: random.Random) -> str:
    """One of the alternatives, or as many as the choice says where it begins, each at most once."""
    if opening == "{" and not any("::" in option for option in given):
        return draws.choice(given)
    found = [WEIGHT.match(option) for option in given]
    options = [option[match.end() :] if match else option for option, match in zip(given, found, strict=True)]
    weights = [float(match[1]) if match else 1.0 for match in found] if any(found) else []
    several = COUNTED.fullmatch(opening)
    if several is None and not weights:
        return draws.choice(options)
    number = _number(several["count"], len(options), draws) if several else 1
    if weights:  # the first of exponential variables of these rates: drawn one after the other, none put back
        times = [draws.expovariate(weight) if weight else math.inf for weight in weights]
        possible = [k for k in range(len(options)) if weights[k]]
        chosen = [options[k] for k in sorted(possible, key=times.__getitem__)[:number]]
    else:
        chosen = draws.sample(options, number)
    if several is None:
        return "".join(chosen)
    between = BETWEEN if several["between"] is None else several["between"]
    _check_drawn(sum(map(len, chosen)) + len(between) * len(chosen))
    return between.join(text.strip() for text in chosen)


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
