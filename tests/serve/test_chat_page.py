"""The chat page in a real browser."""

import re
import time

import pytest

from serve import Request, SamplingParams

from .conftest import serving

STEP_SECONDS = 0.12  # of the slowed engine, so that a test can look at an answer while it comes


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


def settings(page, **values):
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Settings").click()


def ask(page, text):
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def shown(page):
    return page.locator(".assistant .body").last.text_content()


def answer_of(page):
    """The last answer, as the page keeps it."""
    return page.evaluate("chat.messages[chat.messages.length - 1].content")


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
    early, early_answer = shown(page), answer_of(page)
    wait_until_done(page)
    assert answer_of(page) == out.text and out.text.startswith(early_answer) and early_answer != out.text
    assert early and shown(page) != early
    facts = page.locator(".assistant .facts").text_content()
    assert re.search(
        r"^24 tokens · \d+\.\d tokens/s · first after \d\.\d\d s · cut at the token limit$", facts
    )
    assert page.locator(".user .body").inner_text() == "Hi\nyou" and box.input_value() == ""


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
