"""Budgets close a thought exactly, and a grammar begins after it: with drafts, in a batch, at any temperature."""

import copy
import json

import numpy as np
import openai
import pytest

from serve import Request, RequestError, SamplingParams, Thinking
from serve.grammar import GrammarCompiler
from serve.http.api import ChatBody, parse_body
from serve.http.chat_prompt import chat_prompt, template_arguments
from serve.http.errors import ApiError
from serve.parsers import form_of
from serve.request import Grammar
from serve.thinking import ThoughtMatcher, Vocabulary

from .conftest import serving

SIZE = 320
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["count"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMAR = Grammar("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def tags(tokenizer):
    return tuple(tokenizer.encode("<t>")), tuple(tokenizer.encode("</t>"))


@pytest.fixture(scope="module")
def new_matcher(tokenizer, tags):
    words, compiler = Vocabulary(tokenizer, SIZE), GrammarCompiler(tokenizer, SIZE)

    def make(budget, grammar=None, started=True):
        thinking = Thinking(tags[1], () if started else tags[0], budget)
        inner = None if grammar is None else compiler.compile(grammar)
        return ThoughtMatcher(thinking, words, inner, tokenizer.eos_ids)

    return make


def allowed(matcher, after=()):
    return set(np.flatnonzero(np.unpackbits(matcher.mask(after).view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_used_up_budget_closes_the_thought_and_then_comes_what_the_grammar_says(
    make_engine, tokenizer, tags, drafts, temperature
):
    engine, end = make_engine(draft_tokens=drafts), list(tags[1])

    def request(budget, grammar=None, seed=0):
        thinking = None if budget is None else Thinking(tags[1], budget=budget)
        return Request(
            tokenizer.encode("x = 1; <t>"),
            SamplingParams(
                max_tokens=48,
                temperature=temperature,
                seed=seed,
                thinking=thinking,
                grammar=grammar,
                ignore_eos=grammar is None,
            ),
        )

    requests = [request(0), request(5), request(11, GRAMMAR), request(4, GRAMMAR, 1), request(None)]
    told = engine.generate(requests)
    for out, budget in zip(told[:4], (0, 5, 11, 4), strict=True):
        assert out.tokens[budget : budget + len(end)] == end
    for out, budget in ((told[2], 11), (told[3], 4)):
        answer = tokenizer.decode([t for t in out.tokens[budget + len(end) :] if t not in tokenizer.eos_ids])
        assert out.finish_reason == "stop" and 0 <= json.loads(answer)["count"] <= 99
    plain = engine.generate([request(None)])[0]
    assert told[4].tokens == plain.tokens  # the batch changes nothing
    assert told[1].tokens[:5] == plain.tokens[:5]  # the budget changes nothing before it is used up


def test_a_thought_may_begin_or_be_left_out(new_matcher, tokenizer, tags):
    matcher = new_matcher(3, GRAMMAR, started=False)
    opening = {tags[0][0], tokenizer.encode("{")[0]}
    assert allowed(matcher) >= opening and tokenizer.encode("z")[0] not in allowed(matcher)
    matcher.accept(tags[0])
    assert not allowed(matcher) & set(tokenizer.eos_ids) and len(allowed(matcher)) > SIZE - 10
    matcher = new_matcher(3, GRAMMAR, started=False)
    matcher.accept(tokenizer.encode('{"count":7}'))
    assert matcher.complete and matcher.error is None and allowed(matcher) == set(tokenizer.eos_ids)


def test_the_end_counts_in_whatever_tokens_it_comes(new_matcher, tokenizer):
    matcher = new_matcher(50, GRAMMAR)
    single = [tokenizer.encode(letter)[-1] for letter in "hm</t>"]
    assert tokenizer.decode(single) == "hm</t>"
    matcher.accept(single)
    assert not matcher.complete
    spaces = tokenizer.encode("\n")
    assert tokenizer.encode("{")[0] in allowed(matcher) and spaces[0] in allowed(matcher)
    matcher.accept([*spaces, *tokenizer.encode('{"count":12}')])
    assert matcher.complete


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("grammar", [None, GRAMMAR])
@pytest.mark.parametrize("budget", [None, 0, 4])
def test_masks_and_validity_of_drafts_say_the_same(new_matcher, tokenizer, budget, grammar, started):
    rng = np.random.default_rng(3)
    for _ in range(8):
        matcher, output = new_matcher(budget, grammar, started), []
        while len(output) < 14:
            draft = rng.integers(4, SIZE, 4).tolist()
            choices = sorted(allowed(matcher) - set(tokenizer.eos_ids))
            if not choices:
                break
            draft[0] = int(rng.choice(choices))
            if rng.random() < 0.5 and (more := sorted(allowed(matcher, draft[:1]) - set(tokenizer.eos_ids))):
                draft[1] = int(rng.choice(more))
            wanted = 0
            while wanted < 4 and draft[wanted] in allowed(matcher, draft[:wanted]):
                wanted += 1
            assert matcher.valid(draft) == wanted, (output, draft)
            matcher.accept(draft[:1])
            output += draft[:1]


def test_what_can_not_be_is_refused(engine, make_engine, tokenizer):
    with pytest.raises(RequestError, match="thinking.end is empty"):
        Thinking(())
    with pytest.raises(RequestError, match="budget=-1"):
        Thinking((5,), budget=-1)
    for sampling, words in (
        (SamplingParams(thinking=Thinking((10**6,))), "names the token 1000000"),
        (SamplingParams(thinking=Thinking((5,)), bad_words_ids=((5,),)), "could forbid the tokens"),
    ):
        with pytest.raises(RequestError, match=words):
            engine.submit(Request([5], sampling))


ASKED = [{"role": "user", "content": "So?"}]
TURNS = "{% for m in messages %}{{ m.content }};{% endfor %}"
THINKS = TURNS + "<think>{# </think> #}"
MAY_THINK = TURNS + "{# <think></think> #}{{ enable_thinking }}"


def thinking_of(tokenizer, template, **fields):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    body = parse_body(json.dumps({"model": "tiny", "messages": ASKED} | fields).encode(), ChatBody)
    form = form_of(template)
    found = chat_prompt(body, template_arguments(body, tokenizer, form), tokenizer, form).thinking
    texts = lambda ids: tokenizer.decode(list(ids), keep_special=True)
    return found and (texts(found.start), texts(found.end), found.budget)


def test_what_requests_say_of_thoughts_reaches_the_engine(tokenizer):
    of = lambda template, **fields: thinking_of(tokenizer, template, **fields)
    assert of(THINKS) is None and of(MAY_THINK) is None
    assert of(THINKS, thinking_budget=7) == ("", "</think>", 7) == of(THINKS, thinking_token_budget=7)
    assert of(MAY_THINK, thinking_budget=0) == ("<think>", "</think>", 0)
    assert of(THINKS, reasoning_effort="low") == ("", "</think>", 1024)
    assert of(THINKS, reasoning_effort="high") is None
    form = {"response_format": {"type": "json_object"}}
    assert of(THINKS, **form) == ("", "</think>", None) and of(MAY_THINK, **form)[2] is None
    assert of(MAY_THINK, reasoning_effort="none", **form) is None  # no thought, so the grammar begins at once
    for fields, param in (
        ({"thinking_budget": 3, "thinking_token_budget": 4}, "thinking_budget"),
        ({"thinking_budget": -1}, "thinking_budget"),
    ):
        with pytest.raises(ApiError, match=param):
            of(THINKS, **fields)
    with pytest.raises(ApiError, match="no thought between tags"):
        of(TURNS, thinking_budget=3)


def test_a_client_gets_a_thought_of_its_budget_and_then_what_it_asked_for(make_engine, tokenizer):
    engine = make_engine(draft_tokens=3)
    engine.tokenizer = copy.copy(tokenizer)
    engine.tokenizer.chat_template = THINKS
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    with serving(engine) as port:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(
                model="tiny",
                messages=ASKED,
                max_tokens=40,
                temperature=0,
                response_format=schema,
                extra_body={"thinking_budget": 6},
            )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "stop" and 0 <= json.loads(message.content)["count"] <= 99
    assert message.reasoning_content and "</think>" not in message.reasoning_content
