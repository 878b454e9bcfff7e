"""Anthropic's official client against a server: messages, streams, tools, thoughts, errors."""

import copy
import json
import time

import anthropic
import pytest

from serve import Engine
from serve.http.anthropic_body import CountBody, MessagesBody, in_anthropic_words, parse_messages
from serve.http.errors import ApiError
from serve.parsers import form_of

from .conftest import CHAT, post, serving

# Short, as the context has 64 tokens. The comment says the form of calls and of thoughts.
TEMPLATE = """{# <tool_call> "arguments" </think> #}{% for m in messages %}{{ m.role[0] }}{{ m.content }}
{%- for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{{ m.reasoning_content }}
{% endfor %}{% if tools %}T{% endif %}{% if enable_thinking %}<think>{% endif %}"""
# The official client has no temperature of its own, so it is in `extra_body` there, and plain in a raw body.
ASKED = {"model": "tiny", "max_tokens": 12, "messages": CHAT["messages"], "extra_body": {"temperature": 0}}
HI = ASKED | {"messages": [{"role": "user", "content": "Hi"}]}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [7]}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOL = {"name": "f", "description": "Adds.", "input_schema": SCHEMA}


@pytest.fixture(scope="module")
def client(port):
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{port}", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def thinker(cfg, params, tokenizer):
    """A client of a model with a chat template that has tools and a switch for thinking."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    sizes = {"max_rows": 2, "page_size": 8, "num_pages": 80, "prefill_chunk": 16, "decode_steps": 5}
    engine = Engine(cfg.replace(max_length=256), params, tokenizer, **sizes)
    with serving(engine) as port:
        with anthropic.Anthropic(base_url=f"http://127.0.0.1:{port}", api_key="k", max_retries=0) as client:
            yield client


def raw(fields):
    """The body that the client sends."""
    return {key: value for key, value in fields.items() if key != "extra_body"} | fields.get("extra_body", {})


def chat(switches=(), template=None, kind=MessagesBody, **fields):
    """The chat request that a request of the Messages API becomes, without what is not set."""
    given = raw(HI) if kind is MessagesBody else {"model": "tiny", "messages": HI["messages"]}
    body = parse_messages(json.dumps(given | fields).encode(), kind).chat_body(
        list(switches), form_of(template)
    )
    return body.model_dump(exclude_none=True)


def test_a_message_is_the_answer_of_chat_completions(client, port):
    message = client.messages.create(**ASKED, stop_sequences=["never"])
    _, answer = post(port, CHAT | {"max_tokens": 12, "temperature": 0})
    [choice] = answer["choices"]
    assert [(block.type, block.text) for block in message.content] == [("text", choice["message"]["content"])]
    assert (message.role, message.type, message.model) == ("assistant", "message", "tiny")
    assert message.stop_reason == {"stop": "end_turn", "length": "max_tokens"}[choice["finish_reason"]]
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == answer["usage"]["prompt_tokens"]
    assert usage.output_tokens == answer["usage"]["completion_tokens"]
    counted = client.messages.count_tokens(model="tiny", messages=ASKED["messages"])
    assert counted.input_tokens == answer["usage"]["prompt_tokens"]


def test_a_stream_adds_up_to_the_whole_message(client):
    whole = client.messages.create(**ASKED)
    with client.messages.stream(**ASKED) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    assert final.stop_reason == whole.stop_reason
    total = lambda usage: (usage.input_tokens + usage.cache_read_input_tokens, usage.output_tokens)
    assert total(final.usage) == total(whole.usage)
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and kinds[-2] == "message_delta"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1


def test_events_have_their_names_and_pings_between(make_engine, monkeypatch):
    from serve.http import anthropic_reply

    monkeypatch.setattr(anthropic_reply, "_PING_SECONDS", 0.1)
    engine = make_engine()
    step = engine.step
    engine.step = lambda: time.sleep(0.3) or step()
    with serving(engine) as port:
        import httpx

        text = httpx.post(
            f"http://127.0.0.1:{port}/v1/messages", json=raw(ASKED) | {"stream": True}, timeout=20
        ).text
    events = [part.split("\n") for part in text.strip().split("\n\n")]
    for name, data in events:
        assert name == "event: " + json.loads(data.removeprefix("data: "))["type"]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names[:2] == ["message_start", "ping"] and names.count("ping") > 2
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_stop_sequences_and_a_full_context_are_said(client):
    text = client.messages.create(**ASKED).content[0].text
    stop = text[2:4]
    message = client.messages.create(**ASKED, stop_sequences=[stop, "never"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert "".join(block.text for block in message.content) == text[: text.index(stop)]
    ends = set()
    for _ in range(8):  # until one does not end by itself
        message = client.messages.create(**HI | {"max_tokens": 5000, "extra_body": {"temperature": 1}})
        ends.add(message.stop_reason)
        assert message.usage.output_tokens < 64
    assert "model_context_window_exceeded" in ends and "max_tokens" not in ends


def test_a_system_prompt_and_blocks_reach_the_template_as_messages():
    blocks = [
        {"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "kind."},
    ]
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "A"}]},
        {"role": "user", "content": "B"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "text", "text": "C", "citations": None},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "ü"}, "caller": None},
                {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "7"}]},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    calls = [
        {"id": id, "type": "function", "function": {"name": "f", "arguments": text}}
        for id, text in (("t1", '{"a": "ü"}'), ("t2", "{}"))
    ]
    assert chat(system=blocks, messages=turns)["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "A\n\nB"},
        {"role": "assistant", "content": "C", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t1", "content": "7"},
        {"role": "tool", "tool_call_id": "t2", "content": ""},
        {"role": "user", "content": "So?"},
    ]
    last = chat(messages=[*HI["messages"], {"role": "assistant", "content": "The answer is ("}])
    assert last["continue_final_message"] is True


def test_tools_choices_thoughts_and_forms_become_those_of_a_chat():
    tool = {"type": "function", "function": {"name": "f", "description": "Adds.", "parameters": SCHEMA}}
    of = lambda choice, **more: chat(tools=[TOOL], tool_choice={"type": choice} | more)
    assert of("auto")["tools"] == [tool]
    assert [of(name)["tool_choice"] for name in ("auto", "any", "none")] == ["auto", "required", "none"]
    assert of("tool", name="f")["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert of("any", disable_parallel_tool_use=True)["parallel_tool_calls"] is False
    thinking = {"type": "enabled", "budget_tokens": 5}
    found = chat(["enable_thinking"], thinking=thinking, output_config={"effort": "low"})
    assert (found["thinking_budget"], found["reasoning_effort"]) == (5, "low")
    assert found["chat_template_kwargs"] == {"enable_thinking": True}
    off = {"type": "disabled"}
    assert chat(["thinking"], thinking=off)["chat_template_kwargs"] == {"thinking": False}
    assert "chat_template_kwargs" not in chat(thinking=off)
    with pytest.raises(ApiError, match="no switch"):
        chat(template="</think>", thinking=off)
    form = chat(output_config={"format": {"type": "json_schema", "schema": SCHEMA}})["response_format"]
    assert form["json_schema"]["schema_"] == SCHEMA
    assert "stop" not in chat(kind=CountBody)
    for given, shown in (
        ("no such setting.", ": no such setting."),
        ("reasoning_effort='low' is wrong.", "='low' is wrong."),
    ):
        refused = in_anthropic_words(ApiError(400, given, "reasoning_effort"))
        assert refused.message == f"output_config.effort{shown}"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_thought_and_a_required_call_are_blocks(thinker, streamed):
    """The thought ends with its budget and then the grammar of calls holds, so that a random model gets there."""
    choice = {"type": "any", "disable_parallel_tool_use": True}
    thinking = {"type": "enabled", "budget_tokens": 4}
    options = {
        "model": "tiny",
        "max_tokens": 220,
        "tools": [TOOL],
        "tool_choice": choice,
        "thinking": thinking,
    }
    options |= {"messages": HI["messages"]}

    def send(**more):
        if not streamed:
            return thinker.messages.create(**options | more)
        with thinker.messages.stream(**options | more) as stream:
            return stream.get_final_message()

    message = send()
    assert [block.type for block in message.content] == ["thinking", "tool_use"]
    thought, call = message.content
    assert thought.thinking and "think" not in thought.thinking and thought.signature == ""
    assert (call.name, call.input, message.stop_reason) == ("f", {"a": 7}, "tool_use") and call.id
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "8"}
    said = {"role": "assistant", "content": message.content}
    again = send(
        messages=[*HI["messages"], said, {"role": "user", "content": [result]}],
        thinking=thinking | {"display": "omitted"},
    )
    assert [block.type for block in again.content] == ["tool_use"]


def test_an_answer_goes_on_from_the_assistants_last_words(thinker):
    said = {"role": "assistant", "content": "The answer is"}
    message = thinker.messages.create(**HI | {"messages": [*HI["messages"], said]})
    off = thinker.messages.create(
        **HI | {"messages": [*HI["messages"], said], "thinking": {"type": "disabled"}}
    )
    count = lambda each: each.usage.input_tokens + each.usage.cache_read_input_tokens
    assert message.content == off.content and count(message) == count(off)
    assert not message.content[0].text.startswith("The answer is")


def image(kind="image"):
    return [
        {"role": "user", "content": [{"type": kind, "source": {"type": "url", "url": "file:///etc/passwd"}}]}
    ]


USE = {"type": "tool_use", "id": "x", "name": "f", "input": {}}
BAD = {
    "max_tokens": [{"max_tokens": 0}, {"max_tokens": 2**31}, {"max_tokens": True}, {"max_tokens": "9"}],
    '"image" is not served': [{"messages": image()}],
    '"document" is not served': [{"messages": image("document")}],
    "messages": [
        {"messages": []}, {"messages": [{"role": "tool", "content": "x"}]}, {"messages": "hi"}, {"messages": [5]},
        {"messages": [{"role": "user", "content": []}]}, {"messages": [{"role": "user", "content": [{"type": [1]}]}]},
        {"messages": [{"role": "user", "content": [USE]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        {"messages": [*HI["messages"], {"role": "assistant", "content": [USE]}]},
        {"messages": [{"role": "user", "content": "hi"}] * 3000},
    ],
    "tool_result.content": [
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x" * 5000, "content": 5}]}]},
    ],
    "system": [{"system": 5}, {"system": [{"type": "image"}]}],
    "tool_choice": [
        {"tool_choice": {"type": "any"}}, {"tool_choice": {"type": "tool"}}, {"tool_choice": {"type": "robot"}},
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}},
        {"tools": [TOOL], "tool_choice": {"type": "any", "name": "f"}},
    ],
    "tools": [{"tools": [{"type": "web_search_20250305", "name": "x"}]}, {"tools": [TOOL] * 129}],
    "thinking": [
        {"thinking": {"type": "enabled"}}, {"thinking": {"type": "enabled", "budget_tokens": 12}},
        {"thinking": {"type": "adaptive", "budget_tokens": 2}},
    ],
    "output_config.effort": [{"output_config": {"effort": "minimal"}}],
    "output_config.format": [{"output_config": {"format": {"type": "json_schema", "schema": {"type": "robot"}}}}],
    "stop_sequences": [{"stop_sequences": ["x"] * 17}, {"stop_sequences": [""]}, {"stop_sequences": "x"}],
    "temperature": [{"temperature": 1.5}, {"temperature": True}],
    "top_": [{"top_p": 0}, {"top_k": -1}, {"top_k": 1.5}],
    "stream": [{"stream": "yes"}],
    "mcp_servers": [{"mcp_servers": [{"url": "http://x"}]}],
    "temprature": [{"temprature": 1}],
}  # fmt: skip


def test_malformed_requests_are_refused_in_anthropics_form_and_by_name(port):
    for words, changes in BAD.items():
        for change in changes:
            status, answer = post(port, raw(ASKED) | change, "/v1/messages")
            assert status == (413 if len(json.dumps(change)) > 20_000 else 400), (change, answer)
            assert set(answer) == {"type", "error"} and answer["type"] == "error", answer
            error = answer["error"]
            assert len(error["message"]) < 1000, error["message"]
            if status == 400:
                assert error["type"] == "invalid_request_error" and words in error["message"], (
                    change,
                    answer,
                )
    for body in (b"", b"[]", b'{"a": NaN}', b"[" * 5000):
        assert post(port, body, "/v1/messages")[1]["error"]["type"] == "invalid_request_error"


def test_the_official_client_raises_the_right_errors(client, port, make_engine):
    with pytest.raises(anthropic.BadRequestError, match="tokens"):
        client.messages.create(**ASKED | {"messages": [{"role": "user", "content": "x " * 100}]})
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(**ASKED | {"model": "claude"})
    assert post(port, b"", "/v1/messages/batches")[1]["error"]["type"] == "not_found_error"
    assert post(port, b" " * 30_000, "/v1/messages")[1]["error"]["type"] == "request_too_large"
    counted = client.messages.count_tokens(model="tiny", messages=[{"role": "user", "content": "x " * 1000}])
    assert counted.input_tokens > 1000  # more than the context has
    engine = make_engine()
    with serving(engine, api_key="k") as locked:
        url = f"http://127.0.0.1:{locked}"
        for key in ({"api_key": "k"}, {"auth_token": "k"}):
            with anthropic.Anthropic(base_url=url, max_retries=0, **key) as right:
                assert right.messages.create(**ASKED).usage.output_tokens
        with anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as wrong:
            with pytest.raises(anthropic.AuthenticationError, match="Incorrect API key"):
                wrong.messages.create(**ASKED)


def test_a_failing_step_is_an_error_of_the_stream(make_engine):
    engine = make_engine()
    step = engine.step

    def failing():
        engine.step = step
        raise RuntimeError("the device is on fire")

    with serving(engine) as port:
        with anthropic.Anthropic(base_url=f"http://127.0.0.1:{port}", api_key="k", max_retries=0) as client:
            for stream in (False, True):
                engine.step = failing
                with pytest.raises(anthropic.APIError, match="the device is on fire"):
                    list(client.messages.create(**ASKED, stream=stream))
            assert client.messages.create(**ASKED).content
