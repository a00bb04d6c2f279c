"""The English locale says what the schemas say, word for word, so that translators have one file to begin with.

`TURBODISTILL_WRITE=1 pytest tests/nodes/test_locales.py` writes it anew.
"""

import asyncio
import json
import os
import re
from pathlib import Path

import pytest
import turbodistill

LOCALE = Path(turbodistill.__file__).parent / "locales" / "en"


# What means something in vue-i18n's messages, by which the front end translates: {name} is filled in, @ links to
# another, | parts singular from plural. Meant as they are, they stand in a literal: {'|'}.
SYNTAX = re.compile(r"[{}@|]")
LITERAL = re.compile(r"\{'[{}@|]'\}")


def told(**words):
    """What there is to say: the words that are not empty, as messages."""
    message = {name: SYNTAX.sub(r"{'\g<0>'}", text) if isinstance(text, str) else text for name, text in words.items()}
    return {name: text for name, text in message.items() if text}


def words_of(schema):
    """A node's schema as ComfyUI's front end looks it up: inputs by their id, outputs by their place."""
    inputs = {i.id: told(name=i.display_name or i.id, tooltip=i.tooltip) for i in schema.inputs}
    outputs = {str(k): told(name=o.display_name, tooltip=o.tooltip) for k, o in enumerate(schema.outputs)}
    return told(
        display_name=schema.display_name, description=schema.description, inputs=told(**inputs), outputs=told(**outputs)
    )


@pytest.fixture(scope="module")
def schemas(nodes):
    extension = asyncio.run(turbodistill.comfy_entrypoint())
    return [cls.define_schema() for cls in asyncio.run(extension.get_node_list())]


def test_the_locale_is_the_schemas_words(schemas):
    expected = {schema.node_id: words_of(schema) for schema in schemas}
    file = LOCALE / "nodeDefs.json"
    if os.environ.get("TURBODISTILL_WRITE"):
        file.write_text(json.dumps(expected, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert json.loads(file.read_text(encoding="utf-8")) == expected


def test_every_input_has_a_tooltip(schemas):
    assert [f"{schema.node_id}.{i.id}" for schema in schemas for i in schema.inputs if not i.tooltip] == []


def test_no_word_is_syntax_to_the_front_end():
    for file in LOCALE.glob("*.json"):
        texts = re.findall(r': "((?:[^"\\]|\\.)*)"', file.read_text(encoding="utf-8"))
        assert texts and [text for text in texts if SYNTAX.search(LITERAL.sub("", text))] == [], file.name
