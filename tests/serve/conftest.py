"""A tiny model, a tokenizer trained on a few sentences, and one compiled engine that the tests share."""

import contextlib
import http.client
import json
import shutil
import threading

import jax
import openai
import pytest

JSON = {"Content-Type": "application/json"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "What is two plus two?"}]}
SENTENCES = [
    "The engine serves many requests at once, and each of them gets its own tokens.",
    "A page holds sixteen tokens; when pages run out, the youngest request waits again.",
    "What is the capital of France? Paris. What is two plus two? Four.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "Größe, naïve, 東京, 🙂 and other characters take several bytes.",
] * 3


@pytest.fixture(scope="session")
def tokenizer():
    from data import train_tokenizer

    return train_tokenizer("bpe", SENTENCES, 320)


@pytest.fixture(scope="session")
def cfg(tokenizer):
    from model import decoder

    # Four rows of the embedding belong to no token, as where an embedding is padded to a round size.
    return decoder(tokenizer.vocab_size + 4, 32, 2, 4, 2, 8, 48, max_length=64, tied_head=False)


@pytest.fixture(scope="session")
def params(cfg):
    from model import init

    return init(cfg, jax.random.key(0))


@pytest.fixture(scope="session")
def make_engine(cfg, params, tokenizer):
    """Engines of one size, which share their compiled programs. 24 pages are too few for four long rows."""
    from serve import Engine

    def make(params=params, **options):
        sizes = {"max_rows": 4, "page_size": 4, "num_pages": 24, "prefill_chunk": 16, "decode_steps": 5}
        buckets = {"row_buckets": (1, 4), "chunk_buckets": (16,), "context_buckets": (24, 64)}
        return Engine(cfg, params, tokenizer, **(sizes | buckets | options))

    return make


@pytest.fixture(scope="session")
def shared_engine(make_engine):
    engine = make_engine()
    engine.warmup()
    return engine


@pytest.fixture
def engine(shared_engine):
    """The shared engine, idle before and after, with every page free."""
    assert not shared_engine.has_work
    yield shared_engine
    stats = shared_engine.stats
    assert (stats.running, stats.waiting, stats.pages_free) == (0, 0, stats.pages)


@contextlib.contextmanager
def serving(engine, embedder=None, **options):
    """A server in a thread; gives its port."""
    from serve.http.connections import ServerConfig, bind, make_server
    from serve.http.server import make_app

    config = ServerConfig(**({"model_name": "tiny", "max_waiting": 8} | options))
    sock = bind("127.0.0.1", 0)
    ready = threading.Event()
    server = make_server(make_app(engine, config, embedder), config, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    assert ready.wait(20)
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_CHROMIUM_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
)


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[*_CHROMIUM_OPTIONS, "--no-first-run"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens pages; afterwards there must have been no error on any, but for answers with an error status.

    `route(page)` runs before the page is loaded.
    """
    errors, contexts = [], []

    def open_url(url, width=1000, height=700, route=None, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        if route is not None:
            route(page)
        page.goto(url)
        return page

    yield open_url
    for context in contexts:
        context.close()
    assert [e for e in errors if "the server responded with a status of 4" not in e] == []


@pytest.fixture(scope="module")
def server(make_engine):
    engine = make_engine()
    engine.warmup()
    with serving(engine, max_body_bytes=20_000, header_seconds=1.0, body_seconds=1.0) as port:
        yield engine, port


@pytest.fixture(scope="module")
def port(server):
    return server[1]


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(port, body, path="/v1/chat/completions", headers=None, method="POST"):
    """(status, JSON) of one request; the body is sent as it is when it is bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, raw, {"Content-Type": "application/json"} | (headers or {}))
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer
