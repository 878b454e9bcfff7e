"""The official client and hostile ones against a real server."""

import contextlib
import http.client
import json
import socket
import threading
import time

import openai
import pytest

from serve import Request, SamplingParams

from .conftest import CHAT, JSON, post

KEY = "sk-test-ключ"


def wait_until_idle(engine, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stats = engine.stats
        if not engine.has_work and stats.pages_free == stats.pages:
            return True
        time.sleep(0.02)
    return False


def expected(make_engine, tokenizer, **params):
    prompt, _ = tokenizer.apply_chat_template(CHAT["messages"])
    [out] = make_engine().generate([Request(prompt, SamplingParams(**params), detokenize=True)])
    return out


def test_a_chat_completion_is_what_the_engine_generates(client, make_engine, tokenizer):
    out = expected(make_engine, tokenizer, max_tokens=12, temperature=0)
    answer = client.chat.completions.create(**CHAT, max_tokens=12, temperature=0)
    [choice] = answer.choices
    assert (choice.message.content, choice.message.role) == (out.text, "assistant")
    assert choice.finish_reason == out.finish_reason and answer.model == "tiny"
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert usage == (out.prompt_tokens, len(out.tokens), out.prompt_tokens + len(out.tokens))
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"


def test_a_stream_adds_up_to_the_whole_answer(client):
    options = CHAT | {"max_completion_tokens": 20, "temperature": 1.0, "seed": 5, "n": 2}
    whole = client.chat.completions.create(**options)
    texts, reasons, usage, roles = ["", ""], [None, None], [], []
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        usage.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            roles.append(choice.delta.role)
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage[:-1] == [None] * (len(usage) - 1)
    counts = [
        (each.prompt_tokens, each.completion_tokens, each.total_tokens) for each in (usage[-1], whole.usage)
    ]
    assert counts[0] == counts[1]
    assert roles.count("assistant") == 2


def test_seeds_reproduce_and_stop_strings_stop(client):
    options = CHAT | {"max_tokens": 24, "seed": -3, "extra_body": {"ignore_eos": True}}
    first, second = (client.chat.completions.create(**options).choices[0].message.content for _ in range(2))
    assert first == second
    stop = next(first[i : i + 2] for i in range(5, 30) if "\ufffd" not in first[i : i + 2])
    [choice] = client.chat.completions.create(**options, stop=[stop, "never"]).choices
    assert choice.message.content == first[: first.index(stop)] and choice.finish_reason == "stop"
    text = ""
    for chunk in client.chat.completions.create(**options, stop=stop, stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text == first[: first.index(stop)]


def test_logprobs_of_a_chat_are_the_engines(client, make_engine, tokenizer):
    out = expected(make_engine, tokenizer, max_tokens=6, temperature=0, logprobs=3, ignore_eos=True)
    options = CHAT | {"max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    options["extra_body"] = {"ignore_eos": True}
    content = client.chat.completions.create(**options).choices[0].logprobs.content
    assert [place.logprob for place in content] == pytest.approx(out.model_logprobs, abs=1e-5)
    assert b"".join(bytes(place.bytes) for place in content).decode(errors="replace") == out.text
    assert all(
        place.top_logprobs[0].token == place.token and len(place.top_logprobs) == 3 for place in content
    )
    streamed = []
    for chunk in client.chat.completions.create(**options, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [place.logprob for place in streamed] == pytest.approx(out.model_logprobs, abs=1e-5)


def test_completions_take_text_tokens_and_lists_of_both(client, make_engine, tokenizer):
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("What is", "def add(")]
    params = SamplingParams(max_tokens=7, temperature=0, logprobs=2)
    outputs = make_engine().generate([Request(p, params, detokenize=True) for p in ids])
    options = {"model": "tiny", "max_tokens": 7, "temperature": 0}
    for prompt in (["What is", "def add("], ids):
        answer = client.completions.create(prompt=prompt, **options)
        assert [choice.text for choice in answer.choices] == [out.text for out in outputs]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    for prompt in ("What is", ids[0]):
        [choice] = client.completions.create(prompt=prompt, logprobs=2, **options).choices
        assert choice.text == outputs[0].text
        assert choice.logprobs.token_logprobs == pytest.approx(outputs[0].model_logprobs, abs=1e-5)
        assert choice.logprobs.text_offset[0] == 0 and len(choice.logprobs.top_logprobs[0]) == 2
    text = "".join(
        c.choices[0].text for c in client.completions.create(prompt="What is", stream=True, **options)
    )
    assert text == outputs[0].text


def test_models_health_and_unknown_names(client, port):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(**(CHAT | {"model": "gpt-4"}))
    assert post(port, b"", "/health", method="GET") == (200, {"status": "ok"})
    assert post(port, b"", "/v1/nothing", method="GET")[0] == 404
    assert post(port, b"", "/v1/chat/completions", method="GET")[0] == 405


CALLS = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}]
NESTED_TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": json.loads('{"a":' * 400 + "1" + "}" * 400)},
}

BAD_CHATS = [
    {"temperature": -1},
    {"temperature": 2.5},
    {"temperature": "hot"},
    {"temperature": True},
    {"temperature": [0.5]},
    {"top_p": 0},
    {"top_p": 1.5},
    {"top_p": "0.5"},
    {"top_k": -2},
    {"top_k": 1.5},
    {"min_p": -0.1},
    {"min_p": 2},
    {"max_tokens": 0},
    {"max_tokens": -5},
    {"max_tokens": True},
    {"max_tokens": 1.5},
    {"max_tokens": "10"},
    {"max_tokens": 10**12},
    {"max_tokens": 5, "max_completion_tokens": 6},
    {"n": 0},
    {"n": True},
    {"n": 10**9},
    {"n": "2"},
    {"seed": 2**63},
    {"seed": 1.5},
    {"seed": True},
    {"stop": ["a", ""]},
    {"stop": ["x"] * 1000},
    {"stop": ["x" * 10_000]},
    {"stop": [1]},
    {"stop": {"a": "b"}},
    {"stop_token_ids": [10**6]},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [True]},
    {"logprobs": 1},
    {"top_logprobs": 2},
    {"logprobs": True, "top_logprobs": 21},
    {"logprobs": True, "top_logprobs": -1},
    {"stream": "yes"},
    {"stream": 1},
    {"stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": {"include_usage": "x"}},
    {"stream": True, "stream_options": []},
    {"messages": []},
    {"messages": "hello"},
    {"messages": None},
    {"messages": [1]},
    {"messages": [{}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": []}]},
    {"messages": [{"role": "wizard", "content": "hi"}]},
    {"messages": [{"role": ["user"], "content": "hi"}]},
    {"messages": [{"role": "user", "content": "hi", "spell": 1}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
        ]
    },
    {"messages": [{"role": "user", "content": "x " * 200}]},
    {"messages": [{"role": "user", "content": "hi"}] * 3000},
    {"model": None},
    {"model": 7},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
    {"tools": [{"type": "function", "function": {}}], "tool_choice": "none"},
    {"tools": [{"type": "custom", "custom": {"name": "f"}}], "tool_choice": "none"},
    {"tools": [NESTED_TOOL], "tool_choice": "none"},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"reasoning_effort": "none"},
    {"reasoning_effort": "enormous"},
    {"verbosity": "low"},
    {"messages": [{"role": "assistant", "tool_calls": []}]},
    {"messages": [{"role": "user", "tool_calls": CALLS}]},
    {"messages": [{"role": "user", "content": "hi", "tool_call_id": "c1"}]},
    {"messages": [{"role": "tool", "tool_call_id": "c1"}]},
    {"messages": [{"role": "user", "content": "hi", "reasoning_content": "Hm."}]},
    {"response_format": {"type": "yaml"}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "robot"}}}},
    {"structured_outputs": {"regex": "(", "choice": ["a"]}},
    {"structured_outputs": {"regex": "("}},
    {"structured_outputs": {"grammar": "start: nothing"}},
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"json": "{"}},
    {"min_tokens": -1},
    {"min_tokens": 5, "max_tokens": 2},
    {"logit_bias": {"5": 101}},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"999999": 1}},
    {"logit_bias": [1]},
    {"frequency_penalty": 2.5},
    {"repetition_penalty": 0},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"presence_penalty": False},
    {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
    {"temprature": 1},
]

BAD_COMPLETIONS = [
    {"prompt": None},
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": [True]},
    {"prompt": [1.5]},
    {"prompt": [-1]},
    {"prompt": [10**6]},
    {"prompt": ["a"] * 17},
    {"prompt": ["a", 5]},
    {"prompt": {"a": 1}},
    {"prompt": "a", "best_of": 4},
    {"prompt": "a", "echo": True, "stream": True},
    {"prompt": "a", "echo": "yes"},
    {"prompt": "a", "max_tokens": 0},
    {"prompt": "a", "suffix": "b"},
    {"prompt": "a", "logprobs": 6},
    {"prompt": "a", "logprobs": True},
    {"prompt": "a" * 15_000},
    {"prompt": [5] * 64},
    {},
]

BAD_BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"5",
    b"\xff\xfe",
    b"[" * 5000,
    b'{"a":' * 3000,
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud83d"}]}',
    b'{"model": "tiny", "temperature": NaN, "messages": [{"role": "user", "content": "a"}]}',
    b'{"model": "tiny", "temperature": -Infinity, "messages": [{"role": "user", "content": "a"}]}',
    b'{"model": "tiny", "temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}',
    b'{"model": "tiny", "max_tokens": ' + b"9" * 5000 + b', "messages": [{"role": "user", "content": "a"}]}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}]} trailing',
]


@pytest.mark.parametrize(
    "path,change,code",
    [
        ("/v1/chat/completions", {"max_tokens": 0}, None),
        ("/v1/chat/completions", {"max_completion_tokens": -5}, None),
        ("/v1/chat/completions", {"max_tokens": 10**12}, "context_length_exceeded"),
        ("/v1/completions", {"prompt": []}, None),
        ("/v1/completions", {"prompt": [5] * 64}, "context_length_exceeded"),
    ],
)
def test_the_code_on_which_clients_shorten_prompts_is_for_prompts_that_are_too_long(
    server, path, change, code
):
    body = CHAT if path.endswith("chat/completions") else {"model": "tiny"}
    status, answer = post(server[1], body | change, path)
    assert (status, answer["error"]["code"]) == (400, code), answer


def test_more_than_fifty_malformed_requests_get_a_reason_and_the_server_answers_the_next(server, client):
    engine, port = server
    cases = [("/v1/chat/completions", CHAT | change) for change in BAD_CHATS]
    cases += [("/v1/completions", {"model": "tiny"} | change) for change in BAD_COMPLETIONS]
    cases += [("/v1/chat/completions", raw) for raw in BAD_BODIES]
    assert len(cases) > 50
    for path, body in cases:
        status, answer = post(port, body, path)
        shown = str(body)[:200]
        assert status in ((400, 413) if len(json.dumps(body, default=str)) > 20_000 else (400,)), (
            shown,
            answer,
        )
        error = answer["error"]
        assert error["type"] == "invalid_request_error" and len(error["message"]) > 10, shown
        assert len(error["message"]) < 1000 and set(error) == {"message", "type", "param", "code"}, shown
    assert wait_until_idle(engine)
    assert client.chat.completions.create(**CHAT, max_tokens=2).usage.completion_tokens > 0


@pytest.mark.parametrize(
    "change,param,words",
    [
        ({"temperature": True}, "temperature", "valid number"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role", "'system'"),
        ({"top_p": 7}, "top_p", "above 0 and at most 1"),
        ({"temprature": 1}, "temprature", "Unrecognized request argument"),
        ({"max_tokens": 60}, "max_tokens", "give max_tokens of at most"),
        ({"n": 99}, "n", "16"),
    ],
)
def test_the_official_client_shows_which_field_was_wrong_and_why(client, change, param, words):
    extra = {"extra_body": change} if "temprature" in change else change
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.chat.completions.create(**(CHAT | extra))
    assert caught.value.param == param


def test_bodies_over_the_limit_are_refused_while_they_come(port):
    assert post(port, b" " * 30_000)[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    pieces = (b"x" * 4096 for _ in range(1000))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        connection.request("POST", "/v1/completions", pieces, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_other_content_types_are_refused(port):
    status, answer = post(port, CHAT, headers={"Content-Type": "text/plain"})
    assert status == 415 and "application/json" in answer["error"]["message"]


def test_slow_and_oversized_headers_and_slow_bodies_do_not_hold_a_connection(port):
    slow = socket.create_connection(("127.0.0.1", port), timeout=10)
    slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
    start = time.monotonic()
    assert slow.recv(100) == b"" and 0.5 < time.monotonic() - start < 5
    large = socket.create_connection(("127.0.0.1", port), timeout=10)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        large.sendall(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Large: " + b"x" * 1_000_000 + b"\r\n\r\n"
        )
    assert large.recv(20).startswith(b"HTTP/1.1 4")
    body = socket.create_connection(("127.0.0.1", port), timeout=10)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body.sendall(head + b"Content-Length: 50\r\n\r\n{")
    assert body.recv(20).startswith(b"HTTP/1.1 408")
    for connection in (slow, large, body):
        connection.close()


def test_a_client_that_goes_away_frees_its_place_before_and_after_the_first_token(server):
    engine, port = server
    body = json.dumps(CHAT | {"max_tokens": 30, "stream": True, "n": 8, "ignore_eos": True}).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    original, seen = engine.step, []

    def slow_step():
        time.sleep(0.15)
        seen.append(len(engine._sequences))
        return original()

    engine.step = slow_step
    try:
        for bytes_to_read in (0, 400):
            seen.clear()
            before = engine.stats.generated_tokens
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            connection.sendall(head.encode() + body)
            while not seen:
                time.sleep(0.01)
            received = 0
            while received < bytes_to_read:
                received += len(connection.recv(100))
            connection.close()
            assert wait_until_idle(engine)
            assert engine.stats.generated_tokens - before < 8 * 30 / 2
    finally:
        engine.step = original


def test_too_many_requests_get_503_with_retry_after(server, client):
    engine, port = server
    original = engine.step
    gate = threading.Event()
    engine.step = lambda: gate.wait(60) and original()
    got = []
    bodies = [CHAT | {"max_tokens": 2, "n": 6}] * 2  # as many as there are rows and places in the queue
    threads = [threading.Thread(target=lambda body=body: got.append(post(port, body)[0])) for body in bodies]
    try:
        for thread in threads:
            thread.start()
        refused = None
        for _ in range(20):  # until both are in; a probe that is let in before gets no answer and gives up
            with contextlib.suppress(TimeoutError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
                connection.request("POST", "/v1/chat/completions", json.dumps(CHAT | {"max_tokens": 1}), JSON)
                refused = connection.getresponse()
                error = json.loads(refused.read())
                break
        assert refused is not None and refused.status == 503
        assert int(refused.headers["Retry-After"]) > 0 and error["error"]["code"] == "overloaded"
    finally:
        gate.set()
        for thread in threads:
            thread.join(30)
        engine.step = original
    assert wait_until_idle(engine) and 200 in got
    assert client.chat.completions.create(**CHAT, max_tokens=2).choices


def test_a_failing_step_ends_its_requests_with_an_error_and_the_server_goes_on(server, client, caplog):
    engine, _ = server
    original = engine.step

    def failing():
        engine.step = original
        raise RuntimeError("the device is on fire")

    engine.step = failing
    with pytest.raises(openai.InternalServerError, match="the device is on fire"):
        client.chat.completions.create(**CHAT, max_tokens=4)
    engine.step = failing
    with pytest.raises(openai.APIError, match="the device is on fire"):
        list(client.chat.completions.create(**CHAT, max_tokens=4, stream=True))
    assert client.chat.completions.create(**CHAT, max_tokens=2).choices
    assert "the device is on fire" in caplog.text


def test_metrics_count_what_was_served(server, client):
    engine, port = server

    def values():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if not line.startswith("#")
        }

    assert wait_until_idle(engine)
    before = values()
    answer = client.chat.completions.create(**CHAT, max_tokens=9, extra_body={"ignore_eos": True})
    after = values()
    label = '{model_name="tiny"}'
    growth = {name: after[name] - before.get(name, 0) for name in after}
    assert growth[f"vllm:prompt_tokens_total{label}"] == answer.usage.prompt_tokens
    assert growth[f"vllm:generation_tokens_total{label}"] == 9
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert growth[f"vllm:{name}_count{label}"] == 1 and growth[f"vllm:{name}_sum{label}"] > 0
    assert growth[f"vllm:inter_token_latency_seconds_count{label}"] > 0
    assert growth['vllm:request_success_total{finished_reason="length",model_name="tiny"}'] == 1
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"vllm:{name}{label}"] == 0
    assert f"vllm:num_preemptions_total{label}" in after
