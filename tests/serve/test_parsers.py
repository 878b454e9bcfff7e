"""Reasoning and tool calls are read out of answers: what published chat templates write is read back."""

import json
import random
import tarfile

import pytest

from data.templates import render
from serve.grammar import GrammarCompiler
from serve.parsers import form_of
from serve.parsers.grammar import call_grammar
from serve.request import Grammar

ARGUMENTS = [
    {"city": "Zürich", "days": [1, 2], "deep": {"a": None, "b": 'x"}]\\'}},
    {},
    {"text": "</tool_call> ; [TOOL_CALLS] \n ```"},
]
NAMES = ("get_weather", "add", "f")
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}}
    for name in NAMES
]


def parts(form, answer, prompt="", tools=NAMES, cuts=()):
    """(reasoning, content, [(name, arguments)]) of an answer that comes in pieces."""
    parser = form.parser(prompt, tools)
    pieces = []
    for start, stop in zip([0, *cuts], [*cuts, len(answer)], strict=True):
        pieces += parser.push(answer[start:stop])
    pieces += parser.finish()
    calls = []
    for piece in pieces:
        if piece.kind != "call":
            continue
        if piece.name is not None:
            assert piece.index == len(calls)
            calls.append([piece.name, ""])
        calls[piece.index][1] += piece.text
    text = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content")}
    return text["reasoning"], text["content"], [tuple(call) for call in calls]


def in_all_cuts(form, answer, **options):
    """`parts` of the answer, which must not depend on how it is cut."""
    whole = parts(form, answer, **options)
    assert parts(form, answer, cuts=range(1, len(answer)), **options) == whole
    for seed in range(20):
        chosen = random.Random(seed)
        cuts = sorted(chosen.sample(range(1, len(answer)), min(5, len(answer) - 1)))
        assert parts(form, answer, cuts=cuts, **options) == whole
    return whole


@pytest.fixture(scope="module")
def template(shared):
    """The text of a published chat template."""
    archive = tarfile.open(shared / "data" / "serving" / "chat_templates_llamacpp.tar.gz")
    yield lambda name: archive.extractfile(f"{name}.jinja").read().decode()
    archive.close()


def written(template, message, tools=TOOLS):
    """(prompt, answer): how a template writes an assistant's message after a question."""
    variables = {"tools": tools, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    asked = [{"role": "user", "content": "What now?"}]
    prompt = render(template, variables | {"messages": asked}).removesuffix(
        "<think>\n"
    )  # a dialogue has no thoughts
    whole = render(template, variables | {"messages": [*asked, message], "add_generation_prompt": False})
    assert whole.startswith(prompt), (prompt, whole)
    return prompt, whole[len(prompt) :]


CALLING = {
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", 3, "<|im_end|>"),
    "Qwen-Qwen3-0.6B": ("hermes", 3, "<|im_end|>"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("hermes", 3, "<|im_end|>"),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", 3, "<|im_end|>"),
    "ibm-granite-granite-4.0": ("hermes", 3, "<|end_of_text|>"),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama", 1, "<|eot_id|>"),
    "meta-llama-Llama-3.2-3B-Instruct": ("llama", 1, "<|eot_id|>"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", 3, "</s>"),
    "unsloth-mistral-Devstral-Small-2507": ("mistral", 3, "</s>"),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("mistral", 3, "</s>"),
    "llama-cpp-deepseek-r1": ("deepseek", 3, "<｜end▁of▁sentence｜>"),
    "openai-gpt-oss-120b": ("harmony", 1, "<|call|>"),
}


@pytest.mark.parametrize("name", CALLING)
def test_calls_that_a_published_template_writes_are_read_back(template, name):
    calls, most, end = CALLING[name]
    form = form_of(template(name))
    assert form.calls == calls
    for count in range(1, most + 1):
        made = [
            {
                "id": f"abcdefgh{i}",
                "type": "function",
                "function": {"name": NAMES[i], "arguments": ARGUMENTS[i]},
            }
            for i in range(count)
        ]
        message = {"role": "assistant", "content": "", "tool_calls": made}
        # this template hands a generator to `tojson` for its tools, which Python's has no form for
        tools = None if name == "llama-cpp-deepseek-r1" else TOOLS
        prompt, answer = written(template(name), message, tools)
        answer = answer.split(end)[0]
        reasoning, content, found = in_all_cuts(form, answer, prompt=prompt)
        assert [(name, json.loads(arguments)) for name, arguments in found] == [
            (call["function"]["name"], call["function"]["arguments"]) for call in made
        ], answer
        assert (reasoning, content) == ("", ""), answer


THINKING = (
    "Qwen-Qwen3-0.6B",
    "Qwen-QwQ-32B",
    "HuggingFaceTB-SmolLM3-3B",
    "ByteDance-Seed-OSS",
    "openai-gpt-oss-120b",
)


@pytest.mark.parametrize("name", THINKING)
def test_a_thought_is_taken_off_the_answer(template, name):
    form = form_of(template(name))
    prompt = render(
        template(name), {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True}
    )
    if form.calls == "harmony":
        thought = "<|channel|>analysis<|message|>Let me\nsee.<|end|>"
        answer = f"{thought}<|start|>assistant<|channel|>final<|message|>So **4**."
    else:
        begins = "" if prompt.rstrip().endswith(form.tags[0]) else form.tags[0]
        answer = f"{begins}\nLet me\nsee.\n{form.tags[1]}\n\nSo **4**."
    assert in_all_cuts(form, answer, prompt=prompt) == ("Let me\nsee.", "So **4**.", [])
    if form.calls != "harmony":
        closed = prompt + f"{form.tags[0]}\n\n{form.tags[1]}\n\n"
        assert in_all_cuts(form, "So.\n", prompt=closed) == ("", "So.\n", [])
        cut = answer[: answer.index("see.")]
        assert in_all_cuts(form, cut, prompt=prompt) == ("Let me", "", [])


def test_a_thought_may_come_before_calls(template):
    form = form_of(template("Qwen-Qwen3-0.6B"))
    answer = (
        '<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    )
    assert in_all_cuts(form, answer) == ("Hm.", "I look.", [("f", '{"a": 1}')])


@pytest.mark.parametrize(
    "name,answer",
    [
        ("Qwen-Qwen2.5-7B-Instruct", "No <tool_call> without an object, and < alone.\n"),
        ("Qwen-Qwen2.5-7B-Instruct", 'Text <tool_call>\n{"arguments": {"a": 1}}\n</tool_call> more'),
        ("Qwen-Qwen2.5-7B-Instruct", '<tool_call>{"name": '),
        ("meta-llama-Llama-3.2-3B-Instruct", '{"name": "unknown", "parameters": {}}'),
        ("meta-llama-Llama-3.2-3B-Instruct", '{"city": "Bern", "x": [1, {"name": "f"}]} '),
        ("meta-llama-Llama-3.2-3B-Instruct", '\n{"name": "f", oops}'),
        ("meta-llama-Llama-3.2-3B-Instruct", "Plain < text {}"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "A list [1, 2] and [TOOL"),
    ],
)
def test_what_is_no_call_stays_content_letter_by_letter(template, name, answer):
    assert in_all_cuts(form_of(template(name)), answer) == ("", answer, [])


def test_a_call_that_is_cut_off_keeps_what_came(template):
    form = form_of(template("Qwen-Qwen2.5-7B-Instruct"))
    answer = 'So:\n<tool_call>\n{"name": "f", "arguments": {"a": "b'
    assert in_all_cuts(form, answer) == ("", "So:", [("f", '{"a": "b')])


def test_arguments_come_out_while_they_come_in(template):
    form = form_of(template("Qwen-Qwen2.5-7B-Instruct"))
    parser = form.parser("", NAMES)
    parser.push('<tool_call>\n{"name": "f", "arguments": {"a": "')
    assert "".join(piece.text for piece in parser.push("some text")) == "some text"


def test_arguments_before_the_name_or_as_a_string_are_read_too(template):
    form = form_of(template("Qwen-Qwen2.5-7B-Instruct"))
    for written_call in (
        '{"arguments": {"a": 1}, "name": "f"}',
        '{"id": 5, "name": "f", "arguments": "{\\"a\\": 1}", "more": [1, "x"]}',
        '{ "name" : "f" , "arguments" : {"a": 1} }',
    ):
        assert in_all_cuts(form, f"<tool_call>{written_call}</tool_call>") == ("", "", [("f", '{"a": 1}')])
    assert in_all_cuts(form, '<tool_call>{"name": "f"}</tool_call>') == ("", "", [("f", "{}")])


@pytest.mark.parametrize(
    "name",
    ["Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "mistralai-Mistral-Nemo-Instruct-2407"],
)
def test_the_grammar_of_required_calls_takes_what_the_template_writes_and_nothing_else(
    template, name, tokenizer
):
    form = form_of(template(name))
    tools = [
        {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
        {"name": "f"},
    ]
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)

    def takes(answer, several=True, tags=None, started=False):
        lark = call_grammar(form.calls, tools, tokenizer.special_tokens, tags, started, several)
        matcher, ids = compiler.compile(Grammar("lark", lark)), tokenizer.encode(answer)
        if matcher.valid(ids) < len(ids):
            return False
        matcher.accept(ids)
        return matcher.complete

    def call(name, arguments):
        return {"id": "abcdefgh1", "type": "function", "function": {"name": name, "arguments": arguments}}

    def answer(*calls):
        return written(template(name), {"role": "assistant", "content": "", "tool_calls": list(calls)})[1]

    end = {"hermes": "<|im_end|>", "llama": "<|eot_id|>", "mistral": "</s>"}[form.calls]
    one = answer(call("add", {"a": 2})).split(end)[0].strip()
    if form.calls == "mistral":  # the model leaves the id out, which the template adds
        one = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 2}}]'
    assert takes(one) and takes(one, several=False)
    assert not takes(one.replace("2", '"x"')) and not takes(one.replace("add", "sub")) and not takes("Hello")
    thought = f"<think>Let me see.\n</think>\n\n{one}"
    assert takes(thought, tags=("<think>", "</think>")) and not takes(thought)
    assert takes(thought.removeprefix("<think>"), tags=("<think>", "</think>"), started=True)
    assert parts(form, one, tools=("add",))[2] == [("add", '{"a": 2}')]
