"""Chat templates that format messages pass; those that reach further, or are built to blow up, are refused."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.formats import templates
from pierhead.formats.templates import check

pytestmark = pytest.mark.timeout(60)

# Short ones of our own, in the shape of those that the field's models have.
USUAL = {
    "im_start": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "turns": "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set prefix = messages[0]['content'] + '\n' -%}{%- set rest = messages[1:] -%}{%- else -%}"
    "{%- set rest = messages -%}{%- endif -%}{%- for m in rest -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Roles must alternate') }}"
    "{%- endif -%}{%- if m['content'] is string -%}{{ m['content'] | trim }}{%- elif m['content'] is iterable -%}"
    "{%- for item in m['content'] -%}{{ item['text'] | trim }}{%- endfor -%}{%- endif -%}{%- endfor -%}",
    "thinking": "{%- set ns = namespace(last=messages|length - 1, open=true) %}{%- for m in messages[::-1] %}"
    "{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.open and m.role == 'user' "
    "and not (m.content.startswith('<r>') and m.content.endswith('</r>')) %}{%- set ns.open = false %}"
    "{%- set ns.last = index %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{{ m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1] }}{%- if m.tool_calls %}"
    "{{ m.tool_calls[0].function.arguments | tojson }}{%- endif %}{%- endfor %}",
    "header": "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{{ 'Tools: ' + builtin | reject('equalto', 'x') | join(', ') }}{%- for t in tools %}"
    "{{ t | tojson(indent=4) }}{%- endfor %}{%- for name, value in call.arguments | items %}{{ name + '=' + value }}"
    "{%- if not loop.last %}, {% endif %}{%- endfor %}",
    "macro": "{%- macro kind(spec) %}{%- set names = {'string': 'str'} %}{%- if names[spec.type] is defined %}"
    "{{ names[spec.type] }}{%- elif spec.type == 'array' %}{{ 'list[' + kind(spec['items']) + ']' }}{%- endif %}"
    "{%- endmacro %}{% generation %}{{ kind(x) }}{% endgeneration %}{% for i in range(messages|length) %}{% if i > 3 %}"
    "{% break %}{% endif %}{{ messages[messages|length - 1 - i].get('content') }}{% endfor %}",
}


@pytest.mark.parametrize("text", USUAL.values(), ids=USUAL.keys())
def test_usual_templates_pass(text: str) -> None:
    assert check(text) == []


REACHING = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    r"{{ ''['\x5f\x5fclass\x5f\x5f'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr(x) }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|selectattr('a.__class__') }}",
    "{{ messages|map('attr', '__class__') }}",
    "{{ x['__cl' ~ 'ass__'] }}",
    "{{ x['__cl' + y] }}",
    "{{ x['%s' % y] }}",
    "{{ x[['__class', '__']|join] }}",
    "{{ x[''.join(y)] }}",
    "{% set a = '__cl' %}{% set b = 'ass__' %}{{ x[a ~ b] }}",
    "{{ lipsum.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ range.__class__ }}",
    "{{ loop._iterator }}",
    "{{ self._TemplateReference__context }}",
    "{{ joiner.mro() }}",
    "{% do x.__class__ %}",
    "{% macro m(a=''.__class__) %}{% endmacro %}",
    "{% if x.__class__ %}{% endif %}",
    "{% for x in ''.__class__.__subclasses__() %}{% endfor %}",
    "{{ {'a': [1, (x.__class__,)]} }}",
    "{{ x if y else z.gi_frame }}",
    "{% import 'x' as y %}",
    "{% from 'a' import b %}",
    "{% include '/etc/passwd' %}",
    "{% extends x %}",
    "{{ open('/etc/passwd') }}",
    "{{ x.system('id') }}",
    "{{ x.os.popen('id').read() }}",
    "{{ (x or y)('id') }}",
    "{{ x[0]() }}",
    "{{ x()() }}",
    "{{ '{0.a}'.format(x) }}",
    "{{ ''.format_map(x) }}",
]


@pytest.mark.parametrize("text", REACHING)
def test_what_reaches_beyond_its_messages_is_refused(text: str) -> None:
    assert [s for s, _ in check(text)][:1] == ["unsafe"]


BOMBS = [
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' | format(999999999, 1) }}",
    "{{ 'a' * 1000000000 }}",
    "{{ 'a' * 1000 * 1000 * 1000 }}",
    "{{ [0] * 99999999 }}",
    "{{ 2 ** 9999999 }}",
    "{{ x ** y }}",
    "{{ ''.ljust(999999999) }}",
    "{{ ''.zfill(n) }}",
    "{{ x | center(99999999) }}",
    "{{ x | indent(99999999) }}",
    "{% for i in range(999999999) %}a{% endfor %}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ range(1000 * 1000 * 1000) | list }}",
    "{% for i in range(9000) %}{% for j in range(9000) %}a{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set a = 'aa' %}" + "{% set a = a ~ a %}" * 40,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ 1" + "+1" * 5000 + " }}",
    "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "a" * 2_000_000,
]


@pytest.mark.parametrize("text", BOMBS, ids=lambda t: t[:40])
def test_what_is_built_to_blow_up_is_refused_in_time(text: str) -> None:
    began = time.monotonic()
    assert [s for s, _ in check(text)][:1] == ["unsafe"]
    assert time.monotonic() - began < 5


def test_the_largest_template_is_answered_in_time() -> None:
    began = time.monotonic()
    check(("{{ 'a' }}{% if x %}b{% endif %}" * templates.MAX_TEMPLATE)[: templates.MAX_TEMPLATE // 30 * 30])
    assert time.monotonic() - began < 10


def test_templates_of_go_are_not_taken_for_broken_ones() -> None:
    assert check("{{- if .System }}{{ .System }}{{ end }}{{ range .Messages }}{{ .Content }}{{ end }}") == []


def test_a_template_that_cannot_be_read_is_said() -> None:
    assert [s for s, _ in check("{% foo %}")] == ["warning"]


@given(
    st.lists(st.sampled_from([*USUAL.values(), *REACHING, "{{", "}}", "{%", "%}", "'", "(", "[", "x", " "]), max_size=6)
)
def test_any_text_is_answered(parts: list[str]) -> None:
    check("".join(parts))


@given(st.sampled_from(REACHING), st.sampled_from(list(USUAL.values())))
def test_it_is_found_anywhere_in_a_usual_template(bad: str, usual: str) -> None:
    assert any(s == "unsafe" for s, _ in check(usual + bad + usual))
