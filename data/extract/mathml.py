r"""MathML as LaTeX: the author's own TeX where the page carries it, else built from presentation MathML.

`<msup><mi>x</mi><mn>2</mn></msup>` is `x^{2}`. Letters and signs stay as they are in Unicode (\u2264, \u03b1).
"""

from __future__ import annotations

import re
from typing import Any

_TEX_ENCODINGS = ("application/x-tex", "latex", "tex", "text/x-tex")
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp lim max min sup inf "
    "det gcd arg dim ker".split()
)
_ACCENTS = {
    "\u00af": "bar",
    "\u203e": "bar",
    "^": "hat",
    "~": "tilde",
    "\u2192": "vec",
    "\u02d9": "dot",
    ".": "dot",
}
_MAX_DEPTH = 100


def latex_of(element: Any) -> str:
    """LaTeX without dollars of an lxml <math> element; empty where there is nothing in it."""
    for annotation in element.iter("annotation"):
        if (annotation.get("encoding") or "").strip().lower() in _TEX_ENCODINGS:
            return tidy("".join(annotation.itertext()))
    if alternative := element.get("alttext"):
        return tidy(alternative)
    return tidy(_convert(element, 0))


def tidy(latex: str) -> str:
    r"""Without comments, without the \displaystyle that wikis put around everything, on one line."""
    latex = re.sub(r"(?<!\\)%[^\n]*(?=\n)", "", latex).strip()
    while match := re.fullmatch(r"\{?\\(?:displaystyle|textstyle)\b\s*(.*)", latex, re.S):
        inner = match[1]
        latex = (inner[:-1] if latex.startswith("{") and inner.endswith("}") else inner).strip()
    return re.sub(r"\s+", " ", latex)


def _convert(element: Any, depth: int) -> str:
    if not isinstance(element.tag, str) or depth > _MAX_DEPTH:
        return ""
    tag = element.tag.rsplit("}", 1)[-1].rsplit(":", 1)[-1].lower()
    if tag in ("annotation", "annotation-xml", "mphantom"):
        return ""
    children = [] if tag in _LEAVES else [_convert(child, depth + 1) for child in element]
    if tag in _LEAVES:
        return _leaf(tag, "".join(element.itertext()).strip())
    shape = _SHAPES.get(tag)
    if shape is not None and len(children) >= shape[0]:
        return shape[1](children)
    if tag == "mfenced":
        opening, closing = element.get("open", "("), element.get("close", ")")
        return opening + (element.get("separators", ",")[:1] or " ").join(children) + closing
    return _joined([element.text or "", *children]) if tag not in _ROWS else _ROWS[tag](children)


def _leaf(tag: str, text: str) -> str:
    if tag == "mi" and len(text) > 1 and text.isascii() and text.isalpha():
        return f"\\{text}" if text in _FUNCTIONS else f"\\mathrm{{{text}}}"
    if tag in ("mtext", "ms"):
        return f"\\text{{{text}}}" if text else " "
    if tag == "mspace":
        return " "
    return {"\u2061": "", "\u2062": "", "\u2063": "", "{": "\\{", "}": "\\}", "\u2212": "-"}.get(text, text)


def _joined(parts: list[str]) -> str:
    r"""One after the other, with a space where a command would run into a letter: \sin x."""
    out = ""
    for part in filter(None, map(str.strip, parts)):
        out += (" " if re.search(r"\\[A-Za-z]+$", out) and part[:1].isalpha() else "") + part
    return out


def _over(c: list[str]) -> str:
    return f"\\{_ACCENTS[c[1]]}{{{c[0]}}}" if c[1] in _ACCENTS else f"{c[0]}^{{{c[1]}}}"


_LEAVES = ("mi", "mn", "mo", "mtext", "ms", "mspace")
_SHAPES = {
    "msup": (2, lambda c: f"{c[0]}^{{{c[1]}}}"),
    "msub": (2, lambda c: f"{c[0]}_{{{c[1]}}}"),
    "msubsup": (3, lambda c: f"{c[0]}_{{{c[1]}}}^{{{c[2]}}}"),
    "munder": (2, lambda c: f"{c[0]}_{{{c[1]}}}"),
    "mover": (2, _over),
    "munderover": (3, lambda c: f"{c[0]}_{{{c[1]}}}^{{{c[2]}}}"),
    "mfrac": (2, lambda c: f"\\frac{{{c[0]}}}{{{c[1]}}}"),
    "mroot": (2, lambda c: f"\\sqrt[{c[1]}]{{{c[0]}}}"),
}
_ROWS = {
    "msqrt": lambda c: f"\\sqrt{{{_joined(c)}}}",
    "mtr": lambda c: " & ".join(c),
    "mlabeledtr": lambda c: " & ".join(c[1:]),
    "mtable": lambda c: "\\begin{matrix} " + " \\\\ ".join(c) + " \\end{matrix}",
}
