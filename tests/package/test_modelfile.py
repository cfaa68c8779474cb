"""Modelfiles: every instruction, texts over many lines, and clear words about what is wrong."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.errors import UsageError
from pierhead.package.modelfile import is_go_template, parse

pytestmark = pytest.mark.timeout(30)

WHOLE = '''
# a comment
FROM ./model.gguf
ADAPTER style.gguf
adapter second.gguf
TEMPLATE """{% for m in messages %}
{{ m.content }}
{% endfor %}"""
SYSTEM """You are
a pirate."""
PARAMETER num_ctx 4096
PARAMETER temperature 0.3
PARAMETER stop "<|end|>\\n"
PARAMETER stop STOP
LICENSE """
Apache
"""
LICENSE MIT
MESSAGE user Hello
MESSAGE assistant """Ahoy
there"""
'''


def test_every_instruction_is_read() -> None:
    made = parse(WHOLE)

    assert (made.source, made.adapters) == ("./model.gguf", ["style.gguf", "second.gguf"])
    assert made.template == "{% for m in messages %}\n{{ m.content }}\n{% endfor %}"
    assert made.system == "You are\na pirate."
    assert made.context == 4096
    assert made.parameters == {"sampling.temp": "0.3", "antiprompt": ["<|end|>\n", "STOP"]}
    assert made.licenses == ["\nApache\n", "MIT"]
    assert made.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Ahoy\nthere"}]


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("FROM a\nFORM b", 2, "FORM"),
        ("FROM a\n\nPARAMETER num_cxt 5", 3, "num_cxt"),
        ("FROM a\nPARAMETER num_ctx many", 2, "many"),
        ("FROM a\nPARAMETER temperature", 2, "temperature"),
        ('FROM a\nSYSTEM """never', 2, "no end"),
        ('FROM a\nSYSTEM """x""" y', 2, "y"),
        ("FROM a\nFROM b", 2, "second"),
        ("FROM", 1, "nothing"),
        ("SYSTEM x", 1, "no FROM"),
        ("FROM a\nMESSAGE boss hi", 2, "boss"),
        ("FROM a\nTEMPLATE {{ .Prompt }}{{ .Tools }}", 2, "Go"),
        ("FROM a\nTEMPLATE {{ if .Thinking }}x{{ end }}", 2, "Go"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, line: int, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert f"line {line} " in caught.value.message
    assert word in caught.value.message
    assert caught.value.hint


def test_a_close_word_is_suggested() -> None:
    with pytest.raises(UsageError) as caught:
        parse("FROM a\nPARAMETER temprature 1")
    assert "temperature" in (caught.value.hint or "")


def test_a_go_template_that_means_the_same_in_jinja_becomes_jinja() -> None:
    made = parse("FROM a\nTEMPLATE {{ if .System }}S: {{ .System }} {{ end }}{{ .Prompt }}")

    assert "{%" in made.template
    assert ".Prompt" not in made.template


def test_a_go_template_is_passed_over_where_a_chat_template_is_given_elsewhere() -> None:
    assert parse("FROM a\nTEMPLATE {{ .Prompt }}", template_elsewhere=True).template == ""


@pytest.mark.parametrize("text", ["{{ messages[0].content }}", "{% if x %}{{ .5 }}{% endif %}", "plain", "{{ bos }}"])
def test_jinja_is_not_taken_for_go(text: str) -> None:
    assert not is_go_template(text)


@given(st.text(alphabet=st.sampled_from([*'FROM PARAMETER SYSTEM"\n\\ #{.}', "é"]), max_size=200))
def test_any_text_ends_in_a_modelfile_or_an_error_with_a_line(text: str) -> None:
    for given_text in (text, f"FROM a\n{text}"):
        with contextlib.suppress(UsageError):
            parse(given_text)
