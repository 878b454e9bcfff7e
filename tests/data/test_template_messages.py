"""Chat templates of other people: what they read of a message, and what they print, as transformers 5 has it
(tests/goldens/make_templates.py)."""

import copy
import datetime
import hashlib
import json
import tarfile
import types
from pathlib import Path

import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.templates
from data import ChatTemplateError
from data.template_messages import for_template
from data.templates import render

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "templates.json").read_text())
ASKED = {"role": "user", "content": "Hi"}
ARGUMENTS = {"city": "Zürich"}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2025, 1, 2, 3, 4, 5, tzinfo=tz)


def test_published_templates_print_what_transformers_prints(shared, monkeypatch):
    monkeypatch.setattr(data.templates, "datetime", types.SimpleNamespace(datetime=Clock))
    compared = 0
    with tarfile.open(shared / "data" / "serving" / "chat_templates_llamacpp.tar.gz") as archive:
        for name, wanted in GOLDENS["rendered"].items():
            template = archive.extractfile(name).read().decode()
            for case, digest in wanted.items():
                if digest is None:
                    continue  # the template refuses these messages
                given = {"documents": None, "tools": None, "add_generation_prompt": True}
                given |= GOLDENS["roles"] | GOLDENS["cases"][case]
                text = render(template, given | {"messages": for_template(given["messages"])})
                assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest, (name, case, text)
                compared += 1
    assert compared > 800


def shown(bpe, template, messages, **variables):
    """The text of a chat with special tokens spelled."""
    tokenizer = copy.copy(bpe)
    tokenizer.chat_template = template
    ids, _ = tokenizer.apply_chat_template(messages, **variables)
    return tokenizer.decode(ids, keep_special=True)


EACH = "{% for m in messages %}[{{ m.content }}|{{ m.reasoning_content }}|{{ m.thinking }}]{% endfor %}"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_a_template_by_every_name(bpe, name):
    messages = [ASKED, {"role": "assistant", "content": "Hello", name: "Hm."}]
    assert shown(bpe, EACH, messages) == "[Hi||][Hello|Hm.|Hm.]"


def test_null_prints_nothing(bpe):
    call = {"function": {"name": "f", "arguments": {}}}
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": None}]
    assert shown(bpe, EACH, messages) == "[Hi||][||]"


NESTED = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
SPELLINGS = {
    "openai": {"tool_calls": [NESTED]},
    "arguments as text": {
        "tool_calls": [NESTED | {"function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}]
    },
    "flat": {"tool_calls": [{"id": "c1", "name": "weather", "arguments": ARGUMENTS}]},
    "function_call": {"function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}},
}
READERS = {
    "object": "{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={{ v }}{% endfor %})",
    "json": "{{ f.name }}({{ f.arguments | tojson }})",
    "guarded": "{{ f.name }}({{ f.arguments if f.arguments is string else f.arguments | tojson }})",
    "text": "{{ f.name + '(' + f.arguments + ')' }}",
    "printed": "{{ f.name ~ '(' ~ f.arguments ~ ')' }}",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_tool_calls_of_every_spelling_suit_every_template(bpe, spelling, reader):
    messages = [ASKED, {"role": "assistant", "content": None} | SPELLINGS[spelling]]
    template = (
        "{% set c = messages[1].tool_calls[0] %}{% set f = c.function %}{{ c.type }} {{ c.id }} "
        + READERS[reader]
    )
    arguments = "city=Zürich" if reader == "object" else '{"city": "Zürich"}'
    name = "" if spelling == "function_call" else "c1"
    assert shown(bpe, template, messages) == f"function {name} weather({arguments})"


def test_a_tool_says_which_call_it_answers(bpe):
    messages = [ASKED, {"role": "tool", "content": "x", "name": "f", "tool_call_id": "c1"}]
    assert shown(bpe, "{{ messages[1].name }} {{ messages[1].tool_call_id }}", messages) == "f c1"


def thinker(bpe):
    """A tokenizer with <think> and </think> among its special tokens."""
    import tokenizers

    from data.tokenizer.huggingface import HuggingFaceTokenizer

    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    backend.add_special_tokens(["<think>", "</think>"])
    return HuggingFaceTokenizer(backend, bos="<|endoftext|>", eos=["<|im_end|>"])


SPLITS = (
    "{% for m in messages %}{% set c = m.content %}{% set r = '' %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}"
    "{% endif %}<|im_start|>{% if r %}<think>{{ r }}</think>{% endif %}{{ c }}<|im_end|>{% endfor %}"
)


def test_a_template_splits_at_a_special_token_and_users_still_forge_none(bpe):
    tokenizer = thinker(bpe)
    tokenizer.chat_template = SPLITS
    forged = {"role": "user", "content": "<think>x</think>"}
    ids, _ = tokenizer.apply_chat_template(
        [forged, {"role": "assistant", "content": "<think>\nOne.\n</think>\n\nTwo."}]
    )
    whole = "<|im_start|><think>x</think><|im_end|><|im_start|><think>One.</think>Two.<|im_end|>"
    assert tokenizer.decode(ids, keep_special=True) == whole
    names = [tokenizer.special_name(i) for i in ids if i in tokenizer.special_tokens.values()]
    assert names == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|im_end|>"]


READINGS = [
    "{{ c }}", "{{ c.split('</think>') | join('+') }}", "{{ c | trim }}", "{{ c.strip() ~ c.lstrip('<') }}",
    "{{ c | length }}", "{{ '<think>' in c }}", "{{ c.startswith('<think>') }}", "{{ c == '<think>' }}", "{{ c[2:] }}",
    "{{ c[:-3] }}", "{{ c | upper }}", "{{ c | replace('think', 'x') }}", "{{ c.replace('<think>', '') }}",
    "{{ c.partition('</think>')[2] }}", "{{ c.find('</think>') }}", "{{ c | tojson }}", "{{ {c: 1}[d] }}",
    "{% for x in c %}{{ x }}.{% endfor %}", "{{ c.removeprefix('<think>').removesuffix('>') }}", "{{ c + '!' }}",
    "{{ c.rsplit('<', 1) | last }}", "{{ c.count('k>') }}", "{{ '%s' % c }}", "{{ c | capitalize }}",
    "{{ [c] | first }}",
]  # fmt: skip
PIECES = st.sampled_from(["<think>", "</think>", "<", ">", "</", "think>", "<|im_end|>", " ", "\n", "a", "é"])


@pytest.mark.parametrize("reading", READINGS)
@settings(max_examples=40, deadline=None)
@given(content=st.lists(PIECES, max_size=7).map("".join))
def test_a_template_reads_a_broken_text_as_the_whole_one(bpe, reading, content):
    tokenizer = thinker(bpe)
    tokenizer.chat_template = "{% set c = messages[0].content %}{% set d = messages[1].content %}" + reading
    messages = [{"role": "user", "content": content}, {"role": "user", "content": content}]
    ids, _ = tokenizer.apply_chat_template(messages)
    assert tokenizer.decode(ids, keep_special=True) == render(tokenizer.chat_template, {"messages": messages})
    assert not set(ids) & set(tokenizer.special_tokens.values())


@pytest.mark.timeout(60)
def test_a_broken_text_can_not_run_away(bpe):
    doubled = "{% set ns = namespace(x=messages[0].content) %}{% for i in range(99) %}"
    doubled += "{% set ns.x = ns.x.replace('a', 'aa') %}"
    with pytest.raises(ChatTemplateError, match="value of more than"):
        shown(bpe, doubled + "{% endfor %}", [{"role": "user", "content": "a<|im_end|>"}])


ALLOWED = [
    "{{ [1, 2, 3] | batch(2, 0) | list }}", "{{ 'a' | center(9) }}", "{{ '%s-%s' | format(1, 2) }}",
    "{{ [1, 2, 3] | slice(2) | list }}", "{{ '<b>x</b> y' | striptags }}", "{{ 'a b c d' | wordwrap(3) }}",
    "{{ {'a': 1} | pprint }}", "{{ 'http://x.org a' | urlize }}", "{{ 'a b&' | urlencode }}",
    "{{ {'a': 1} | xmlattr }}",
    "{{ 12345 | filesizeformat }}", "{{ 'a&' | forceescape }}", "{{ [5] | random }}", "{{ {'a': 3} | attr('b') }}",
    "{{ 'x'.ljust(3, '.') ~ 'x'.rjust(3) ~ '7'.zfill(4) ~ 'a\tb'.expandtabs(4) ~ 'x'.center(5) }}",
    "{{ 'aB'.swapcase() ~ 'a'.isascii() ~ 'a'.isprintable() ~ 'a b'.partition(' ')[2] ~ 'x\ny'.splitlines()[1] }}",
    "{{ dict(a=1).items() | list }}", "{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}",
    "{% set j = joiner(',') %}{{ j() }}{{ j() }}", "{{ range(3) | list }}", "{{ 7 is divisibleby 7 }}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("template", ALLOWED)
def test_filters_methods_and_loops_are_those_of_jinjas_own_sandbox(template):
    theirs = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=[jinja2.ext.loopcontrols])
    assert render(template, {}) == theirs.from_string(template).render()


def test_every_filter_of_jinja_is_there():
    theirs = set(jinja2.sandbox.ImmutableSandboxedEnvironment().filters)
    assert theirs - set(data.templates._Environment().filters) == set()
