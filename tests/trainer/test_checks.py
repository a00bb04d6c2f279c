"""Names, sizes and paths are refused before work starts, with what would do."""

import dataclasses
import math

import pytest
from turbodistill.trainer.checks import check_inside, check_name, check_prompt_place, foreign
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.data.files import DataError, path_of
from turbodistill.trainer.sizes import check_size

# What no file may be called, on one system or another, or what leads elsewhere.
UNUSABLE = [
    "", " ", ".", "..", "a/b", "a\\b", "../x", ".hidden", " a", "a ", "a.", "a:b", "a?", "a*", 'a"b', "<a>", "a|b",
    "a\nb", "a\0b", "a\x7fb", "a\u2028b", "con", "CON.txt", "aux.safetensors", "nul", "Com1", "lpt9.x", "COM\u00b9",
    "CONIN$", "a" * 101, "\u00e4" * 51,
]  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_name_that_cannot_be_a_file_s_is_refused(name):
    with pytest.raises(ConfigError, match=r"name is .*: give|letters: give"):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["my-turbo", "My Turbo 2", "t\u00fcrbo", "\u6a21\u578b", "console", "a.b", "com10", "a" * 100]
)
def test_a_usable_name_is_taken(name):
    assert check_name(name) == name


@pytest.mark.parametrize("size", [(10**9, 64), (64, -64), (63, 64), (0, 64), (8, 64), (4104, 64)])
def test_a_size_that_nothing_can_make_is_refused(size):
    side = next(s for s in size if s != 64)
    with pytest.raises(ConfigError, match=rf"(width|height) is {side}: give a multiple of 8 from 16 to 4096"):
        check_size(*size)
    assert check_size(64, 4096) is None


@pytest.mark.parametrize(
    "field", [f for f in dataclasses.fields(Config) if type(f.default) in (int, float)], ids=lambda f: f.name
)
def test_every_number_has_bounds_that_hold(field):
    low, high = field.metadata["low"], field.metadata["high"]
    assert low <= field.default <= high and math.isfinite(high)
    for value in (low - 1, high + 1, 10**30, 2**63):
        with pytest.raises(ConfigError, match=f"{field.name} is .*: the (least|most) is"):
            Config(**{field.name: type(field.default)(value)})


def test_a_path_is_taken_without_its_quotes_and_blanks():
    for pasted in ('"C:\\my pictures"', " 'C:\\my pictures' ", "C:\\my pictures\n"):
        assert path_of(pasted) == "C:\\my pictures"
    assert path_of('"') == '"' and path_of("it's") == "it's" and path_of("") == ""


def test_paths_stay_below_the_folders_that_a_server_may_read(tmp_path):
    mine, outside = tmp_path / "mine", tmp_path / "mine-too"
    for folder in (mine, outside):
        folder.mkdir()
    (mine / "link").symlink_to(outside)
    for path in (mine, mine / "a" / "b.txt", mine / "link" / "x.txt", mine / "a" / ".." / "b.txt"):
        assert check_inside(path, [mine]) and check_inside(path, None)
    for path in (outside, mine / ".." / "mine-too", "/etc/passwd", "..", mine / ".."):
        assert check_inside(path, None)
        with pytest.raises(DataError, match="is outside the folders that this server may read"):
            check_inside(path, [mine])
    with pytest.raises(DataError, match="none"):
        check_inside(mine, [])


def test_only_files_of_prompts_are_read_for_others(tmp_path):
    for name in ("prompts.TXT", "config.json"):
        (tmp_path / name).write_text("a fox")
    assert check_prompt_place(tmp_path / "prompts.TXT", [tmp_path]).name == "prompts.TXT"
    assert check_prompt_place(tmp_path / "config.json", None)
    with pytest.raises(DataError, match=r"config.json is no file of prompts"):
        check_prompt_place(tmp_path / "config.json", [tmp_path])


OWN = {"host": "127.0.0.1:7860"}


@pytest.mark.parametrize(
    "headers",
    [
        {},  # a program
        {"origin": "http://127.0.0.1:7860"},
        {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:7860"},
        {"sec-fetch-site": "none"},  # typed into the address bar
        {"sec-fetch-site": "same-origin", "origin": "https://my.tunnel"},  # which does not pass Host
        {"origin": "https://my.proxy", "x-forwarded-host": "my.proxy"},
    ],
)
def test_programs_and_our_own_pages_may_ask(headers):
    assert foreign(OWN | headers) == ""


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:7861"},
        {"origin": "http://127.0.0.1:7860.evil.example"},
        {"origin": "null"},
        {"origin": "null", "host": ""},
        {"origin": ""},
        {"origin": "http://["},  # no address at all
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:7860"},
        {"sec-fetch-site": "odd"},
    ],
)
def test_other_sites_pages_may_not(headers):
    assert foreign(OWN | headers).startswith("not from")
