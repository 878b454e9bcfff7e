"""Every regular expression of data/ takes time in proportion to the text, on texts that nearly match over and over."""

import importlib
import itertools
import pkgutil
import random
import re
import time

import pytest

import data

PIECES = (
    "a", "a.", "a@", "-", "<", "<meta ", "<title>", "```", "$", "{{", "[[", "<ref>", "'''", "((", '"', "&", "\\",
    "\\frac{",
    "http://", "www.", "0", "1.", "1,", "[", "[1]", " ", "\n", "\t", "\u00e9", "\u4e2d", "!", "...", "\u2014", "|", "=",
    "#", "*", "/", "{", "}", "]", "(", ")", "<!--", "-->", "<math>", "</", "x=", "_", "^", "A", "%20", ":", ";", "'",
    "\r\n", "-----BEGIN ", "charset=", "WARC/1.0\r\n", "1 ", "a b ",
)  # fmt: skip
AT_THE_START = {"_MEDIA", "_CATEGORY"}  # of wikitext: only `match` is asked of them
PAIRS = random.Random(0).sample(list(itertools.permutations(PIECES, 2)), 25)


def patterns():
    """(module and name, pattern) of all that are compiled when a module of data/ is imported."""
    for module in pkgutil.walk_packages(data.__path__, "data."):
        if not module.name.endswith("__main__") and ".confined" not in module.name:
            for name, value in vars(importlib.import_module(module.name)).items():
                held = value.values() if isinstance(value, dict) else value
                for each in held if isinstance(held, (tuple, list)) else [held]:
                    if isinstance(each, re.Pattern) and name not in AT_THE_START:
                        yield f"{module.name}.{name}", each


@pytest.mark.parametrize("part", range(4))
def test_no_pattern_goes_back_over_the_text_again_and_again(part):
    found = dict.fromkeys(patterns())
    assert len(found) > 60
    for name, pattern in list(found)[part::4]:
        for piece in (*PIECES, *("".join(pair) for pair in PAIRS)):
            text = piece * (12_000 // len(piece))
            began = time.process_time()
            for _ in pattern.finditer(text.encode() if isinstance(pattern.pattern, bytes) else text):
                pass
            # A pattern that is quadratic takes a second and more, a linear one a few thousandths.
            assert time.process_time() - began < 0.5, (name, piece)
