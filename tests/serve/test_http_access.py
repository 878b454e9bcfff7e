"""Who reaches the server, how connections end, and what it answers when it stops."""

import asyncio
import gzip
import http.client
import json
import socket
import threading
import time

import openai
import pytest

from serve import Request, SamplingParams
from serve.http.loop import EngineLoop

from .conftest import CHAT, JSON, post, serving

KEY = "sk-test-ключ"


def test_every_route_but_health_and_the_page_needs_the_key(make_engine):
    with serving(make_engine(), api_key=KEY) as port:
        for path, method in (
            ("/v1/models", "GET"),
            ("/metrics", "GET"),
            ("/v1/completions", "POST"),
            ("/x", "GET"),
        ):
            for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY.encode()}):
                status, answer = post(port, b"", path, header, method)
                assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        right = {"Authorization": b"Bearer " + KEY.encode()}
        assert post(port, b"", "/v1/models", right, "GET")[0] == 200
        assert post(port, CHAT | {"max_tokens": 1}, headers=right)[0] == 200
        assert post(port, b"", "/health", method="GET")[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 200 and b"<html" in response.read()
        assert "unsafe-inline" not in response.headers["Content-Security-Policy"]
        connection.close()


def test_ready_says_whether_a_new_request_would_be_taken(make_engine):
    engine = make_engine()
    step, gate = engine.step, threading.Event()
    engine.step = lambda: gate.wait(60) and step()
    ready = lambda: post(port, b"", "/ready", method="GET")
    with serving(engine, api_key="k", max_waiting=0) as port:
        assert ready() == (200, {"status": "ready"})
        body = CHAT | {"max_tokens": 1, "n": engine.config.max_rows}
        thread = threading.Thread(target=post, args=(port, body), kwargs={"headers": {"X-Api-Key": "k"}})
        thread.start()
        while not engine.has_work:
            time.sleep(0.005)
        status, answer = ready()
        assert status == 503 and "4 are the most" in answer["reason"]
        gate.set()
        thread.join(20)
        assert ready()[0] == 200

        def ends():
            raise SystemExit("the driver is gone")

        engine.step = ends
        assert post(port, CHAT, headers={"X-Api-Key": "k"})[0] == 500
        status, answer = ready()
        assert status == 503 and "the driver is gone" in answer["reason"]


def test_a_server_that_drains_is_not_ready_and_finishes_its_answers(make_engine):
    loop = EngineLoop(make_engine(), 0)
    assert loop.unready == "the engine's thread does not run."

    async def run():
        loop.start()
        before = loop.unready
        [ticket] = loop.submit({"a": Request([5], SamplingParams(max_tokens=20, ignore_eos=True))})
        loop.drain()
        while not (out := await ticket.next()).finished:
            pass
        after = loop.unready
        await loop.stop()
        return before, after, out.finish_reason

    assert asyncio.run(run()) == (None, "the server is stopping.", "length")


def test_answers_under_way_finish_when_the_server_is_told_to_stop(make_engine):
    engine, got = make_engine(), []
    with serving(engine) as port:
        body = CHAT | {"max_tokens": 25, "ignore_eos": True}
        thread = threading.Thread(target=lambda: got.append(post(port, body)))
        thread.start()
        while not engine.has_work:
            time.sleep(0.005)
    thread.join(20)
    [(status, answer)] = got
    assert status == 200 and answer["usage"]["completion_tokens"] == 25


@pytest.mark.parametrize(
    "headers,status",
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:8000"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[bad"}, 403),
        ({"Host": "localhost:1", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost:1", "Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "192.168.1.5"}, 200),
    ],
)
def test_pages_of_other_sites_do_not_reach_a_server_without_a_key(port, headers, status):
    assert post(port, CHAT | {"max_tokens": 1}, headers=headers)[0] == status
    assert post(port, b"", "/v1/models", method="GET", headers=headers)[0] == status


@pytest.fixture(scope="module")
def open_server(make_engine):
    options = {
        "api_key": "k",
        "open_metrics": True,
        "aliases": ("gpt-x",),
        "cors_origins": ("https://a.example",),
    }
    with serving(make_engine(), **options) as port:
        yield port


def raw(port, request):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(request)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def test_head_and_absolute_targets_are_answered_as_the_paths_they_mean(port):
    head = raw(port, b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and head.endswith(b"\r\n\r\n")
    full = raw(port, b"GET http://localhost/v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert full.startswith(b"HTTP/1.1 200") and b'"tiny"' in full
    evil = raw(
        port, b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    assert evil.startswith(b"HTTP/1.1 403")
    bad = raw(port, b"GET http://[x/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert bad.startswith(b"HTTP/1.1 404")


def test_an_encoded_body_is_refused_as_that(port):
    body = gzip.compress(json.dumps(CHAT).encode())
    status, answer = post(port, body, headers={"Content-Encoding": "gzip"})
    assert status == 415 and "gzip" in answer["error"]["message"]


def test_an_idle_connection_outlives_a_clients_pause(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    for pause in (6, 0):
        connection.request("GET", "/health")
        sock = connection.sock
        assert json.loads(connection.getresponse().read()) == {"status": "ok"} and connection.sock is sock
        time.sleep(pause)
    connection.close()


def test_metrics_can_be_open_and_other_names_and_sites_let_in(open_server):
    port = open_server
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "gpt-x"]
        assert client.chat.completions.create(**(CHAT | {"model": "gpt-x"}), max_tokens=1).usage
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answers = {}
    for path, method, headers in [
        ("/metrics", "GET", {}),
        ("/v1/models", "GET", {}),
        ("/v1/models", "OPTIONS", {"Origin": "https://a.example"} | asked),
        ("/v1/models/", "OPTIONS", {"Origin": "https://b.example"} | asked),
    ]:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        response.read()
        answers[path, method] = response.status, response.getheader("Access-Control-Allow-Origin")
    connection.close()
    assert list(answers.values()) == [(200, None), (401, None), (200, "https://a.example"), (403, None)]


def test_a_client_that_leaves_within_its_body_costs_one_line(port, caplog):
    with socket.create_connection(("127.0.0.1", port)) as sock:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(head + b"Content-Length: 100\r\n\r\n{")
        time.sleep(0.3)
    end = time.monotonic() + 5
    while not caplog.records and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.2)
    [record] = caplog.records
    assert "left after 1 bytes" in record.getMessage() and record.exc_info is None


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_longer_than_the_drain_ends_with_an_error(make_engine, stream, caplog):
    engine = make_engine()
    step, answers = engine.step, []

    def slow_step():
        time.sleep(0.5)
        return step()

    engine.step = slow_step

    def send(port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = CHAT | {"max_tokens": 24, "ignore_eos": True, "stream": stream}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
        response = connection.getresponse()
        answers.append((response.status, response.read().decode()))

    with serving(engine, drain_seconds=1) as port:
        thread = threading.Thread(target=send, args=(port,))
        thread.start()
        time.sleep(1)
    thread.join(10)
    [(status, text)] = answers
    assert status == (200 if stream else 503) and "the server is stopping" in text
    assert not stream or text.endswith("data: [DONE]\n\n")
    assert not [record for record in caplog.records if record.exc_info]


def test_extras_that_ask_for_nothing_pass(port):
    extras = {"repetition_penalty": 1.0, "chat_template_kwargs": {}}
    assert post(port, CHAT | {"max_tokens": 1} | extras)[0] == 200


def test_a_stream_that_takes_too_long_ends_with_an_error(make_engine):
    engine = make_engine()
    step = engine.step

    def slow_step():
        time.sleep(0.5)
        return step()

    engine.step = slow_step
    with serving(engine, request_seconds=1.0) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = CHAT | {"max_tokens": 30, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
        text = connection.getresponse().read().decode()
        connection.close()
    assert "no answer within 1 s." in text and text.endswith("data: [DONE]\n\n")
