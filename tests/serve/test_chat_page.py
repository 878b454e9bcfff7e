"""The chat page in a real browser."""

import json
import re
import shutil
import time

import pytest

from serve import Request, SamplingParams

from .conftest import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGS = "--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --no-first-run".split()
STEP_SECONDS = 0.12  # of the slowed engine, so that a test can look at an answer while it comes

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def slow_engine(make_engine):
    engine = make_engine()
    engine.warmup()
    original = engine.step

    def step():
        time.sleep(STEP_SECONDS)
        return original()

    engine.step = step
    return engine


@pytest.fixture(scope="module")
def url(slow_engine):
    with serving(slow_engine) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def open_page(browser):
    """Opens pages; afterwards there must have been no error on any, but for answers with an error status."""
    errors, contexts = [], []

    def open_url(url, width=1000, height=700, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield open_url
    for context in contexts:
        context.close()
    assert [e for e in errors if "the server responded with a status of 4" not in e] == []


def settings(page, **values):
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Settings").click()


def ask(page, text):
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def letters(text):
    return re.sub(r"[\s`]", "", text)


def shown(page):
    return letters(page.locator(".assistant .body").last.text_content())


def wait_until_done(page):
    page.locator("#send").wait_for(state="visible")


def test_an_answer_streams_in_and_shows_its_tokens_per_second(open_page, url, make_engine, tokenizer):
    dialogue = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi\nyou"}]
    prompt, _ = tokenizer.apply_chat_template(dialogue)
    params = SamplingParams(max_tokens=24, temperature=0)
    [out] = make_engine().generate([Request(prompt, params, detokenize=True)])
    page = open_page(url)
    assert page.locator("h1").text_content() == "tiny" or page.wait_for_function(
        "() => document.title.startsWith('tiny')"
    )
    settings(page, system="Be.", temperature=0, max=24)
    box = page.get_by_label("Message")
    box.fill("Hi")
    box.press("Shift+Enter")
    box.press_sequentially("you")
    assert box.input_value() == "Hi\nyou"
    box.press("Enter")
    page.wait_for_function("() => document.querySelector('.busy .body')?.textContent.length > 0")
    early = shown(page)
    wait_until_done(page)
    assert (
        shown(page) == letters(out.text)
        and early != shown(page)
        and shown(page).startswith(early.rstrip("\ufffd"))
    )
    facts = page.locator(".assistant .facts").text_content()
    assert re.search(
        r"^24 tokens · \d+\.\d tokens/s · first after \d\.\d\d s · cut at the token limit$", facts
    )
    assert page.locator(".user").inner_text() == "Hi\nyou" and box.input_value() == ""


def test_stop_ends_the_answer_on_the_page_and_in_the_engine(open_page, url, slow_engine):
    page = open_page(url)
    settings(page, temperature=0)
    before = slow_engine.stats.generated_tokens
    ask(page, "Hi")
    page.wait_for_function("() => document.querySelector('.busy .body')?.textContent.length > 0")
    page.get_by_role("button", name="Stop").click()
    wait_until_done(page)
    text = shown(page)
    assert "stopped" in page.locator(".facts").text_content()
    end = time.monotonic() + 5
    while slow_engine.has_work and time.monotonic() < end:
        time.sleep(0.02)
    assert not slow_engine.has_work and 0 < slow_engine.stats.generated_tokens - before < 30
    assert shown(page) == text
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".message").count() == 0 and page.locator("#welcome").is_visible()


def test_an_error_is_shown_and_the_question_is_there_to_be_sent_again(open_page, url):
    page = open_page(url)
    settings(page, max=5000)
    ask(page, "Hi")
    failure = page.get_by_role("alert")
    failure.wait_for()
    assert "give max_tokens of at most" in failure.text_content()
    assert page.get_by_label("Message").input_value() == "Hi"
    settings(page, max=3)
    page.get_by_role("button", name="Send").click()
    page.locator(".assistant").nth(1).locator(".facts").wait_for()
    wait_until_done(page)
    assert page.get_by_role("alert").count() == 1


def test_a_server_with_a_key_asks_for_it(open_page, make_engine):
    with serving(make_engine(), api_key="secret") as port:
        page = open_page(f"http://127.0.0.1:{port}/")
        page.locator("#settings").wait_for(state="visible")
        assert "API key" in page.locator("#welcome").text_content()
        page.locator("#key").fill("secret")
        page.locator("#max").fill("3")
        page.locator("#max").press("Tab")
        page.wait_for_function("() => document.title.startsWith('tiny')")
        ask(page, "Hi")
        page.locator(".facts").wait_for()


def test_a_phone_shows_everything_within_its_width(open_page, url):
    page = open_page(url, 360, 640, color_scheme="dark", has_touch=True, is_mobile=True)
    for label in ("Settings", "New chat", "Send"):
        box = page.get_by_role("button", name=label).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] >= 30
    settings(page, temperature=0, max=3)
    ask(page, "W" * 30)
    page.locator(".facts").wait_for()
    wait_until_done(page)
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for part in ("#system", "#temperature", "#max", "#key", ".user", ".assistant"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 60  # dark, as the phone asks for


def test_markup_in_an_answer_is_shown_as_text_and_code_as_code(open_page, url):
    script = "<script>document.title='owned'</script>"
    answer = "Use `a < b`:\n\n```html\n<img src=x onerror=alert(1)>\n\n<b>\n```\n" + script
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": part}, "finish_reason": None}], "usage": None}
        for part in re.findall(r"(?s).{1,7}", answer)
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page = open_page(url)
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )
    ask(page, "<img src=y onerror=alert(2)>")
    wait_until_done(page)
    page.wait_for_function("() => document.querySelectorAll('.assistant pre').length === 1")
    assert page.locator(".assistant pre code").text_content() == "<img src=x onerror=alert(1)>\n\n<b>"
    assert page.locator(".assistant p code").text_content() == "a < b"
    assert script in page.locator(".assistant").text_content()
    assert page.locator("#dialogue img, #dialogue script, #dialogue b").count() == 0
    assert page.locator(".user").text_content() == "<img src=y onerror=alert(2)>"
    assert page.title() != "owned"
