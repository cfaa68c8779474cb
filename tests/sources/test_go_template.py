"""Templates of Ollama's become Jinja that prints the same prompt, or are left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pierhead.sources.go_template import to_jinja

CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
CHATML_TURNS = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
LLAMA3 = """{{ if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>{{ end }}{{ if .Prompt }}<|start_header_id|>user<|end_header_id|>

{{ .Prompt }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>

{{ .Response }}<|eot_id|>"""
GEMMA = """<start_of_turn>user
{{ if .System }}{{ .System }} {{ end }}{{ .Prompt }}<end_of_turn>
<start_of_turn>model
{{ .Response }}<end_of_turn>
"""
MISTRAL = "[INST] {{ if .System }}{{ .System }} {{ end }}{{ .Prompt }} [/INST]"
BY_ROLE = """{{ range .Messages }}
{{- if eq .Role "system" }}S:{{ .Content }}
{{- else if eq .Role "user" }}U:{{ .Content }}
{{- else }}A:{{ .Content }}{{ end }};{{ end -}}   A:"""

ASKED = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]


def render(template: str, chat: list[tuple[str, str]], *, answer: bool = True) -> str:
    made = to_jinja(template)
    assert made is not None
    messages = [{"role": role, "content": content} for role, content in chat]
    return ImmutableSandboxedEnvironment().from_string(made).render(messages=messages, add_generation_prompt=answer)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (
            CHATML,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
            "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            CHATML_TURNS,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
            "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            LLAMA3,
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
            "\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            GEMMA,
            "<start_of_turn>user\nBe brief. Hi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
            "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (MISTRAL, "[INST] Be brief. Hi [/INST]Hello[INST] Why? [/INST]"),
        (BY_ROLE, "S:Be brief.;U:Hi;A:Hello;U:Why?;A:"),
    ],
)
def test_well_known_shapes_print_what_ollama_prints(template: str, prompt: str) -> None:
    assert render(template, ASKED) == prompt


def test_neighbours_of_one_role_become_one_message_as_ollama_does() -> None:
    chat = [("system", "a"), ("system", "b"), ("user", "c"), ("user", "d")]
    assert render(CHATML_TURNS, chat) == (
        "<|im_start|>system\na\n\nb<|im_end|>\n<|im_start|>user\nc\n\nd<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(BY_ROLE, chat) == "S:a\n\nb;U:c\n\nd;A:"


def test_without_a_prompt_for_an_answer_the_last_turn_is_whole() -> None:
    assert render(CHATML, ASKED[:3], answer=False).endswith("assistant\nHello<|im_end|>\n")
    assert render(CHATML_TURNS, ASKED[:3], answer=False).endswith("assistant\nHello<|im_end|>\n")


def test_what_the_user_writes_is_never_read_as_a_template() -> None:
    nasty = "{{ 1 + 1 }}{% for x in y %}{# no #}\\n\"'"
    assert nasty in render(CHATML_TURNS, [("user", nasty)])
    assert render('{{ .Prompt }}{% raw %}{# a #}"\\t', [("user", "x")]) == 'x{% raw %}{# a #}"\\t'


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ .Tools }}",
        "no tags at all",
        '{{ .Prompt }}{{ template "x" }}',
        "{{ if .Prompt }}{{ .Prompt }}",
        "{{ .Prompt }}{{ end }}",
        "{{ if .Prompt }}x{{ else }}y{{ else }}z{{ end }}{{ .Prompt }}",
        "{{ $x := .Prompt }}{{ .Prompt }}",
        "{{ .Prompt | printf }}",
        "{{ range .Messages }}{{ range .ToolCalls }}{{ end }}{{ end }}",
        "{{ range .Messages }}{{ .Content }}{{ end }}{{ .Prompt }}",
        "{{ range .Messages }}{{ .System }}{{ end }}",
        "{{ .Content }}",
        "{{ if .Response }}{{ .Response }}{{ end }}{{ .Prompt }}",
        "{{ .Prompt }}{{ unclosed",
        "{{/* a comment */}}{{ .Prompt }}",
        "{{ if .Prompt }}" * 20 + "x" + "{{ end }}" * 20,
        "{{ .Prompt }}" * 500,
    ],
)
def test_a_template_that_is_not_understood_is_left_alone(template: str) -> None:
    assert to_jinja(template) is None


@given(st.text(alphabet='{}-. \n%#"\\abif end', max_size=80), st.text(max_size=20))
def test_any_text_is_printed_exactly_or_left_alone(text: str, prompt: str) -> None:
    template = text + "{{ .Prompt }}"
    if to_jinja(template) is not None and "{{" not in text:
        assert render(template, [("user", prompt)]) == text + prompt
