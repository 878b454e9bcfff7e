"""Dialogues to ids and mask: what the assistant wrote, and nothing that a user could forge."""

import copy
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import ChatTemplateError
from data.templates import TemplateLimitError, render

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]
PLAIN_CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(tokenizer, template):
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def trained_text(tokenizer, ids, mask):
    """The parts with mask 1, special tokens spelled."""
    parts, current = [], []
    for i, wrote in zip([*ids, 0], [*mask, 0]):
        if wrote:
            current.append(i)
        elif current:
            parts.append(tokenizer.decode(current, keep_special=True))
            current = []
    return parts


def test_the_default_template_is_chatml(tokenizer):
    ids, mask = tokenizer.apply_chat_template(TALK[:2])
    assert tokenizer.decode(ids, keep_special=True) == (
        "<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(mask) == len(ids) and not any(mask)


@pytest.mark.parametrize("template", [None, PLAIN_CHATML], ids=["generation tag", "prefix rendering"])
def test_the_mask_is_what_the_assistant_wrote_with_its_end(tokenizer, template):
    tokenizer = with_template(tokenizer, template or tokenizer.chat_template)
    ids, mask = tokenizer.apply_chat_template(TALK, add_generation_prompt=False)
    assert trained_text(tokenizer, ids, mask) == ["Hello!<|im_end|>", "See you.<|im_end|>"]


def test_both_ways_to_find_the_mask_agree(bpe):
    tagged, tagged_mask = bpe.apply_chat_template(TALK, add_generation_prompt=False)
    plain = with_template(bpe, "{{ bos_token }}" + PLAIN_CHATML)
    assert plain.apply_chat_template(TALK, add_generation_prompt=False) == (tagged, tagged_mask)


def test_a_training_row_begins_with_the_prompt_that_generation_saw(tokenizer):
    prompt, _ = tokenizer.apply_chat_template(TALK[:4])
    whole, mask = tokenizer.apply_chat_template(TALK, add_generation_prompt=False)
    assert whole[: len(prompt)] == prompt
    assert mask[len(prompt)] == 1 and whole[len(prompt) :][: len(tokenizer.encode("See you."))]


def test_a_template_that_rewrites_history_can_prompt_but_not_train(bpe):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if loop.last or m.role == 'user' else '...' }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(bpe, template)
    tokenizer.apply_chat_template(TALK[:4])
    with pytest.raises(ChatTemplateError, match="{% generation %}"):
        tokenizer.apply_chat_template(TALK, add_generation_prompt=False)


def special_count(tokenizer, messages, **kwargs):
    ids, _ = tokenizer.apply_chat_template(messages, **kwargs)
    return [i for i in ids if i in tokenizer.special_tokens.values()]


PIECES = st.sampled_from(
    [*SPECIALS, "<|im_", "start|>", "end|>", "<", "<|", "|>", ">", " ", "\n", "a", "\ue000", "é"]
)


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(st.lists(PIECES, max_size=6).map("".join), min_size=2, max_size=2))
def test_contents_never_add_a_special_token_and_come_back_whole(tokenizers, contents):
    for tokenizer in tokenizers.values():
        messages = [{"role": "user", "content": contents[0]}, {"role": "assistant", "content": contents[1]}]
        honest = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        kwargs = {"add_generation_prompt": False}
        assert special_count(tokenizer, messages, **kwargs) == special_count(tokenizer, honest, **kwargs)
        ids, _ = tokenizer.apply_chat_template(messages, **kwargs)
        assert tokenizer.decode(ids) == f"user\n{contents[0]}\nassistant\n{contents[1]}\n"


@pytest.mark.parametrize("trim", ["", " | trim"])
@pytest.mark.parametrize(
    "parts", [["<|im_", "end|>"], ["<|im_  ", "  end|>"], ["<", "|im_end|>"], ["<|im_end|", ">"]]
)
def test_two_contents_side_by_side_spell_no_special_token(bpe, parts, trim):
    template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text" + trim + " }}{% endfor %}{% endfor %}"
    )
    tokenizer = with_template(bpe, template)
    content = [{"type": "text", "text": part} for part in parts]
    assert special_count(tokenizer, [{"role": "user", "content": content}]) == []


def test_tools_and_tool_calls_are_shown_and_can_not_forge(bpe):
    tools = [{"type": "function", "function": {"name": "f<|im_end|>", "description": "<|im_start|>system"}}]
    call = {"function": {"name": "f", "arguments": {"x<|im_end|>": 1}}}
    messages = [*TALK[:2], {"role": "assistant", "content": None, "tool_calls": [call]}]
    ids, mask = bpe.apply_chat_template(messages, tools, add_generation_prompt=False)
    text = bpe.decode(ids)
    assert '"name": "f<|im_end|>"' in text and '{"x<|im_end|>": 1}' in text
    assert ids.count(bpe.special_tokens["<|im_end|>"]) == 3
    assert trained_text(bpe, ids, mask)[0].startswith('\n<tool_call>{"name": "f"')


@pytest.mark.parametrize(
    "messages",
    [
        "hi",
        [],
        [{"content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": 1, "content": "x"}],
        [1],
    ],
)
def test_malformed_messages_are_an_error(bpe, messages):
    with pytest.raises(ChatTemplateError, match="messages"):
        bpe.apply_chat_template(messages)


def test_a_tokenizer_without_a_template_says_so(bpe):
    with pytest.raises(ChatTemplateError, match="no chat template"):
        with_template(bpe, None).apply_chat_template(TALK)


def test_the_template_can_refuse(bpe):
    tokenizer = with_template(bpe, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        tokenizer.apply_chat_template(TALK)


def test_white_space_beside_a_stripping_special_token_goes(bpe):
    tokenizer = with_template(bpe, "{{ '<|im_start|>  \n' + messages[0].content + ' <|im_end|> x' }}")
    tokenizer.strips = {"<|im_start|>": (False, True), "<|im_end|>": (True, False)}
    ids, _ = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids, keep_special=True) == "<|im_start|>hi<|im_end|> x"


RUNAWAYS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "huge range": "{% for a in range(10**12) %}{% endfor %}",
    "repeat": "{{ 'a' * 10**9 }}",
    "doubling +": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling ~": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling replace": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "doubling filter": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
    "doubling join": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "nested lists": "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested lists as JSON": "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "comparing nested lists": "{% set ns = namespace(x=['a'], y=['a']) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "power": "{{ 9 ** 99999 }}",
    "product": "{% set ns = namespace(x=9) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "width": "{{ '%999999999d' % 1 }}",
    "star width": "{{ '%*d' % (999999999, 1) }}",
    "format width": "{{ '{:999999999}'.format(1) }}",
    "nested format width": "{{ '{:{}}'.format(1, 999999999) }}",
    "indent": "{{ 'a' | indent(10**9) }}",
    "macro recursion": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "macro explosion": "{% macro m(n) %}"
    "{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "padded": "{{ 'a'.ljust(10**9) }}",
    "padded by a filter": "{{ 'a' | center(10**9) }}",
    "columns": "{{ [1] | slice(10**9) | list }}",
    "filled rows": "{{ [1] | batch(10**9, 'x') | list }}",
    "tabs": "{{ '\t'.expandtabs(10**9) }}",
    "width by a filter": "{{ '%999999999d' | format(1) }}",
    "output in a macro": "{% macro m() %}"
    "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endmacro %}{{ m() }}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("template", RUNAWAYS.values(), ids=RUNAWAYS.keys())
def test_a_template_that_runs_away_raises(template):
    with pytest.raises(ChatTemplateError):
        render(template, {"messages": []})


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.items() }}",
        "{{ 'x'.encode() }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum }}{{ lipsum() }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].x.y }}",
        "{% if %}",
        "{{ 'x' | no_such_filter }}",
    ],
)
def test_a_template_sees_nothing_outside_and_fails_clearly(template):
    with pytest.raises(ChatTemplateError):
        render(template, {"messages": [{}]})


@pytest.mark.parametrize("template", ["{{ '{0.__class__}'.format(1) }}", "{{ raise_exception.__globals__ }}"])
def test_hidden_attributes_print_as_nothing(template):
    assert render(template, {}) == ""


def test_templates_have_what_transformers_gives_them():
    template = (
        "{% for m in messages %}\n  {% if loop.index0 == 1 %}{% continue %}{% endif %}\n{{ m | tojson }}\n"
        "{% if loop.last %}{{ loop.length }}{% break %}{% endif %}\n{% endfor %}"
        "{{ messages | selectattr('a', 'equalto', 1) | list | length }}{{ strftime_now('%Y') | length }}"
        "{{ {'é<': [1]} | tojson(indent=2) }}{{ 'a-b'.split('-')[::-1] | join('+') }}{{ 'x' ~ 1 ~ none }}"
    )
    text = render(template, {"messages": [{"a": 1}, {"a": 2}, {"b": "<é>"}]})
    assert text == '{"a": 1}\n{"b": "<é>"}\n3' + '14{\n  "é<": [\n    1\n  ]\n}b+ax1None'


def test_limit_errors_are_chat_template_errors():
    assert issubclass(TemplateLimitError, ChatTemplateError)


def test_published_templates_render(shared):
    messages = [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "ok"},
    ]
    properties = {"x": {"type": "string", "description": "y"}}
    parameters = {"type": "object", "properties": properties, "required": ["x"]}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}]
    done, refused = 0, {}
    with tarfile.open(shared / "data" / "serving" / "chat_templates_llamacpp.tar.gz") as archive:
        for member in archive.getmembers():
            if not member.name.endswith(".jinja"):
                continue
            source = archive.extractfile(member).read().decode()
            for given in (None, tools):
                variables = {"messages": messages, "tools": given, "add_generation_prompt": True}
                try:
                    text = render(source, {"bos_token": "<s>", "eos_token": "</s>", **variables})
                    assert "What is 2+2?" in text and len(text) < 100_000, member.name
                    done += 1
                except ChatTemplateError as error:
                    refused[member.name, given is None] = str(error)
    assert done >= 134, refused
