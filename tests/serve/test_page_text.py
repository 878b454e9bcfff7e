"""Markdown and formulas of the chat page, in a real browser; markdown-it-py says what Markdown means."""

import re

import pytest
from markdown_it import MarkdownIt

from serve.page import chat_page

SHOW = """(text) => {
  const body = document.createElement("div");
  showMarkdown(body, text);
  const spelled = (node) => {
    if (node.nodeType === 3) return node.data.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
    const inner = [...node.childNodes].map(spelled).join(""), tag = node.tagName.toLowerCase();
    if (node.className === "code-bar") return "";
    if (node.className === "code" || node.className === "table") return inner;
    const start = tag === "a" ? ` href="${node.getAttribute("href")}"` : tag === "ol" && node.start !== 1 ? ` start="${node.start}"` : "";
    return tag === "hr" || tag === "br" ? `<${tag}>` : `<${tag}${start}>${inner}</${tag}>`;
  };
  return [...body.childNodes].map(spelled).join("");
}"""  # noqa: E501
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])

TEXTS = [
    "hello", "a\nb\n\nc", "# One\n## Two ##\n### Three\ntext", "Title\n===\nSub\n---\nx", "***\n---\n___",
    "#no heading", "#", "####### seven", "text\n# H", "text\n- item", "text\n2. item", "text\n1. item",
    "  leading\n   spaces",
    "> a\n> b\n\n> c", "> a\nlazy\n\nnot", "> # H\n> - x\n>   - y\n> ```\n> code\n> ```", "> > nested\n> back",
    "- a\n- b\n- c", "- a\n\n- b", "- a\n  - b\n    - c\n- d", "1. a\n2. b\n   - x\n   - y\n3. c", "3) x\n4) y",
    "- a\n\n  para\n- b", "* a\n+ b", "- a\n\n\n- b\n\ntext", "1. one\n\n   ```py\n   x = 1\n   ```\n2. two",
    "- a\n   b\n- c", "-\n- b", "1.\n2. x", "- a\n-\n- c", "> - a\n> - b\n\ntext", "- a\n\n  > q\n\n- b",
    "- x\n***\n- y", "10. ten\n11. eleven", "- a\n  ```\n  x\n  ```\n- b", "* * *", "-- x",
    "**Note:** x\n\n1. **A**: b\n2. **C**: d",
    "```py\na < b\n```", "~~~\nx\n```\n~~~", "```\nunclosed\ncode", "    indented\n\n    more\ntext",
    "``a ` b`` and `c`", "`unclosed and ``x`", "`` ` ``", "`a`` b`", "**bold** and *em* and ***both***",
    "__b__ _e_ snake_case_word and 2*3*4", "**a *b* c**", "*a **b** c*", "**a*", "*a**", "a * b * c", "**bold**text",
    "\\*not\\* \\# \\\\", "*foo*bar*", "**foo*bar**baz*", "_foo_bar_", "foo***bar***baz", "*(**foo**)*", "*\\**",
    "**Gomphocarpus (*G. p*, syn. *A. p*)**", "Hello *w\norld*", "**“quoted”**x", "中文**加粗**文字", "~~gone~~",
    "[a](http://x.y) and [b](<http://x.y/b> \"t\")", "<http://a.b/c>", "[un](closed", "[a] (b)", "[x](http://a.b/c_(d))",
    "- [link](http://a.b)\n- `code`", "[a **b** c](http://x.y)", "5 < 6 && 7 > 3", "<b>hi</b> & <script>x</script>",
    "a\\\nb", "| a | b |\n|---|:-:|\n| 1 | 2 |\n| 3 |", "a | b\n--|--\n`x` | **y**\n\nafter", "| a |\n| - |\n| 1 |",
    "not | table\ntext", "| a \\| b | c |\n|---|---|\n| 1 | 2 |",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(browser):
    """The page with a server that knows its model's name only."""
    body, policy = chat_page()
    page = browser.new_page()

    def answer(route):
        if route.request.url.endswith("/v1/models"):
            route.fulfill(json={"data": [{"id": "tiny"}]})
        else:
            headers = {"Content-Security-Policy": policy, "Content-Type": "text/html; charset=utf-8"}
            route.fulfill(body=body, headers=headers)

    page.route("**/*", answer)
    page.goto("http://localhost:9/")
    yield page
    page.close()


def plain(html):
    """HTML without the differences that no reader sees."""
    html = re.sub(r' (title|style|class)="[^"]*"', "", html).replace("&quot;", '"').replace(" />", ">")
    html = html.replace("<s>", "<del>").replace("</s>", "</del>").replace("<br>\n", "<br>")
    html = re.sub(r">\s+<", "><", html.replace("\n</code>", "</code>")).replace("<tbody></tbody>", "")
    html = re.sub(r"(<li>|<blockquote>)\n", r"\1", html)
    return re.sub(r"\n(</li>|<ul>|<ol|<pre>|<blockquote>|<p>)", r"\1", html).strip()


@pytest.mark.parametrize("text", TEXTS)
def test_markdown_means_what_commonmark_says(page, text):
    assert plain(page.evaluate(SHOW, text)) == plain(MARKDOWN.render(text))


def test_an_answer_that_streams_in_ends_as_the_whole_and_keeps_finished_blocks(page):
    script = """(text) => {
      const streamed = document.createElement("div"), whole = document.createElement("div");
      let first = null, kept = true;
      for (let i = 1; i <= text.length; i++) {
        showMarkdown(streamed, text.slice(0, i));
        if (i > 40) { first ||= streamed.firstChild; kept &&= first === streamed.firstChild; }
      }
      showMarkdown(whole, text);
      return [streamed.innerHTML === whole.innerHTML, kept, whole.childNodes.length];
    }"""
    text = "A **first** paragraph.\n\n" + "\n\n".join(TEXTS[:40]) + "\n\n$$\nx^2\n$$"
    same, kept, blocks = page.evaluate(script, text)
    assert same and kept and blocks > 40


HOSTILE = {
    "stars": "*a " * 40_000,
    "pairs": "**a** " * 40_000,
    "nested emphasis": "*" * 40_000 + "a" + "*" * 40_000,
    "brackets": "[" * 40_000 + "]" * 40_000,
    "links": "[](" * 40_000,
    "ticks": "a".join("`" * i for i in range(1, 400)),
    "dollars": "$a " * 40_000,
    "quotes": ">" * 40_000,
    "lists": "\n".join("  " * i + "- a" for i in range(600)),
    "urls": "http://" * 40_000,
    "parentheses": "http://a" + ")" * 40_000,
    "groups": "$$\n" + "{" * 3000 + "}" * 3000 + "\n$$",
    "fractions": "$" + "\\frac{" * 2000 + "$",
    "tables": "a|" * 40_000 + "\n" + "-|" * 40_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_holds_the_page_up(page, name):
    script = """(text) => {
      const start = performance.now(), body = document.createElement("div");
      showMarkdown(body, text);
      const spent = performance.now() - start;
      let deepest = 0, level = [body];
      for (; level.length; deepest++) level = level.flatMap((element) => [...element.children]);
      return [spent, deepest];
    }"""
    milliseconds, deepest = page.evaluate(script, HOSTILE[name])
    assert milliseconds < 5000 and deepest < 100


def test_no_text_becomes_a_script_or_loads_anything(page):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    text = (
        "<img src=http://evil.example/a> ![b](http://evil.example/c) [x](javascript:alert(1)) "
        "[y](data:text/html,z) <javascript:alert(2)> [z](http://a.b/?q=<script>) `<b>` $\\text{<i>}$\n\n"
        "```html\n<img src=x onerror=alert(1)>\n```\n\n<script>document.title='owned'</script>"
    )
    made, links = page.evaluate(
        """(text) => {
          const body = document.createElement("div");
          document.body.append(body);
          showMarkdown(body, text);
          const found = [body.querySelectorAll("img, script, iframe, i, b").length, [...body.querySelectorAll("a")].map((a) => a.href)];
          body.remove();
          return found;
        }""",  # noqa: E501
        text,
    )
    page.wait_for_timeout(100)
    assert made == 0 and asked == [] and page.title() != "owned"
    assert links and all(link.startswith("http://") for link in links)


FORMULAS = {
    "x^2": "<msup><mi>x</mi><mn>2</mn></msup>",
    "x_{i}^{2}": "<msubsup><mi>x</mi><mi>i</mi><mn>2</mn></msubsup>",
    r"\frac{a}{12}": "<mfrac><mi>a</mi><mn>12</mn></mfrac>",
    r"\frac12": "<mfrac><mn>1</mn><mn>2</mn></mfrac>",
    r"\sqrt[3]{x}": "<mroot><mi>x</mi><mn>3</mn></mroot>",
    r"a \le b": "<mrow><mi>a</mi><mo>≤</mo><mi>b</mi></mrow>",
    r"\sum_{i=1}^n i": "<mrow><munderover><mo>∑</mo><mrow><mi>i</mi><mo>=</mo><mn>1</mn></mrow><mi>n</mi></munderover>"
    "<mi>i</mi></mrow>",
    r"\int_0^1": "<msubsup><mo>∫</mo><mn>0</mn><mn>1</mn></msubsup>",
    r"\mathbb{R}^n": "<msup><mi>ℝ</mi><mi>n</mi></msup>",
    r"\mathbf{x}": "<mi>𝐱</mi>",
    r"\hat{\beta}": "<mover><mi>β</mi><mo>^</mo></mover>",
    r"f'(x)": "<mrow><msup><mi>f</mi><mo>′</mo></msup><mo>(</mo><mi>x</mi><mo>)</mo></mrow>",
    r"\text{if } x": "<mrow><mtext>if </mtext><mi>x</mi></mrow>",
    r"\begin{pmatrix} a & b \\ c & d \end{pmatrix}": "<mrow><mo>(</mo><mtable><mtr><mtd><mi>a</mi></mtd><mtd><mi>b</mi>"
    "</mtd></mtr><mtr><mtd><mi>c</mi></mtd><mtd><mi>d</mi></mtd></mtr></mtable><mo>)</mo></mrow>",
    r"\left\{ x \right.": "<mrow><mo>{</mo><mi>x</mi></mrow>",
    r"\lim_{x \to 0} x": "<mrow><munder><mi>lim</mi><mrow><mi>x</mi><mo>→</mo><mn>0</mn></mrow></munder>"
    "<mi>x</mi></mrow>",
}


@pytest.mark.parametrize("source", FORMULAS)
def test_a_formula_is_mathml(page, source):
    shown = page.evaluate("(text) => formula(text, true).firstChild.firstChild.outerHTML", source)
    assert re.sub(r' [\w-]+="[^"]*"', "", shown) == FORMULAS[source]


@pytest.mark.parametrize(
    "source", [r"\unknown{x}", "{x", "x^", r"\begin{matrix} a", r"\left( x", "}", r"\constructor"]
)
def test_a_formula_that_can_not_be_read_is_shown_as_it_was_written(page, source):
    name, text = page.evaluate(
        "(t) => { const e = formula(t, false); return [e.tagName, e.textContent]; }", source
    )
    assert (name, text) == ("CODE", source)


def test_formulas_stand_apart_from_prices_and_code(page):
    count = "(text) => { const e = document.createElement('div'); showMarkdown(e, text); return [e.querySelectorAll('math').length, e.textContent]; }"  # noqa: E501
    assert page.evaluate(count, "It costs $5 and $10, or US$3.") == [0, "It costs $5 and $10, or US$3."]
    assert page.evaluate(count, "`$x$` and\n\n```\n$$x$$\n```")[0] == 0
    assert page.evaluate(count, r"$x$, \(y\), \[z\] and $$w$$")[0] == 4
    assert page.evaluate(count, "$$\nx\n$$\n\ntext\n\n\\[\ny\n\\]")[0] == 2
    assert page.evaluate(count, "\\$x$ and $ y$")[0] == 0
