"""Chat templates in a sandbox: Jinja as transformers runs it, bounded in steps, time, and size.

A template comes with a downloaded model and is code. It sees no attribute that leads out (jinja2's immutable
sandbox), and every loop turn, call, operator and printed value is counted, so that it ends or raises.
"""

from __future__ import annotations

import contextvars
import datetime
import functools
import json
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, cast

import jinja2
import jinja2.filters
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE = 1 << 20  # characters of a template
MAX_CHARS = 1 << 24  # characters of any one value, and of all output
MAX_STEPS = 500_000  # loop turns, calls, operators and printed values; also parts of any one nested value
MAX_SECONDS = 5.0  # of CPU time of the rendering thread
MAX_DIGITS_BITS = 4096  # of an integer product

MAX_WIDTH = 10_000  # of what is padded, wrapped or laid out in columns
MAX_MATCHED = 1 << 16  # characters of a text that is gone through with Jinja's slower patterns

_FILTERS = (
    "abs attr batch capitalize center count d default dictsort e escape filesizeformat first float forceescape format "
    "groupby indent int items join last length list lower map max min pprint random reject rejectattr replace reverse "
    "round safe select selectattr slice sort string striptags sum title trim truncate unique upper urlencode urlize "
    "wordcount wordwrap xmlattr"
).split()
STRING_METHODS = frozenset(
    "capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii isdecimal isdigit "
    "isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix "
    "removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title "
    "upper zfill".split()
)
_PADDING_METHODS = frozenset("center expandtabs ljust rjust zfill".split())


class ChatTemplateError(ValueError):
    """A chat template or its messages: what is wrong with which."""


class TemplateLimitError(ChatTemplateError):
    """The template ran away: more steps, time or text than a chat template can need."""


def render(source: str, variables: Mapping[str, Any], marks: tuple[str, str] = ("", "")) -> str:
    """The text of a chat template. `marks` are put around what is inside `{% generation %}`.

    Raises TemplateLimitError when it runs away, ChatTemplateError for everything else that goes wrong.
    """
    budget = _Budget(marks)
    token = _BUDGET.set(budget)
    output: list[str] = []
    try:
        for piece in _compile(source).generate(variables):
            budget.size += len(piece)
            budget.fits(budget.size)
            output.append(piece)
    except RecursionError as error:
        raise TemplateLimitError("the chat template recurses without end") from error
    except ChatTemplateError:
        raise
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
    ) as error:
        raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error
    finally:
        _BUDGET.reset(token)
    return "".join(output)


def uses_generation_tag(source: str) -> bool:
    """Whether the template itself marks what the assistant wrote."""
    return re.search(r"{%[-+]?\s*generation\b", source) is not None


@functools.lru_cache(maxsize=32)
def variables_of(source: str) -> frozenset[str]:
    """The variables that a template reads and does not only set itself."""
    _compile(source)  # raises ChatTemplateError for what is no template
    return frozenset(jinja2.meta.find_undeclared_variables(_Environment().parse(source)))


class _Budget:
    """What one rendering has used up."""

    def __init__(self, marks: tuple[str, str]):
        self.marks, self.steps, self.size = marks, 0, 0
        self.deadline = time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TemplateLimitError(f"the chat template takes more than {MAX_STEPS} steps")
        if self.steps % 64 == 0 and time.thread_time() > self.deadline:
            raise TemplateLimitError(f"the chat template takes more than {MAX_SECONDS} seconds")

    def fits(self, size: int) -> None:
        if size > MAX_CHARS:
            raise TemplateLimitError(f"the chat template makes a value of more than {MAX_CHARS} characters")


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar("chat_template_budget")


def _sized(value: Any) -> Any:
    """`value`, once it is known to be small when spelled out: nested lists can be exponentially large."""
    if isinstance(value, (str, list, tuple, dict, set)):
        size, parts, stack = 0, 0, [value]
        while stack:
            item = stack.pop()
            size, parts = size + len(item) + 1, parts + 1
            if parts > MAX_STEPS:
                raise TemplateLimitError(f"the chat template makes a value of more than {MAX_STEPS} parts")
            _BUDGET.get().fits(size)
            if isinstance(item, Mapping):
                stack += [
                    part
                    for pair in item.items()
                    for part in pair
                    if isinstance(part, (str, list, tuple, dict))
                ]
            elif not isinstance(item, str):
                stack += [part for part in item if isinstance(part, (str, list, tuple, dict, set))]
    return value


def _counted(iterable: Iterable[Any]) -> Iterator[Any]:
    for item in iterable:
        _BUDGET.get().step()
        yield item


def _joined(values: Iterable[Any], separator: str = "") -> str:
    parts, size = [], 0
    for value in values:
        parts.append(value if isinstance(value, str) else str(_sized(value)))
        size += len(parts[-1]) + len(separator)
        _BUDGET.get().fits(size)
    return separator.join(parts)


def replaced(text: str, old: str, new: str, count: int = -1) -> str:
    """`text.replace`, once the result is known to be small; inside `render` alone."""
    text, old, new = str(_sized(text)), str(old), str(new)
    times = text.count(old) if count < 0 else min(text.count(old), count)
    _BUDGET.get().fits(len(text) + times * max(len(new) - len(old), 0))
    return text.replace(old, new, count)


def _join_filter(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    items = list(_counted(value))
    if attribute is not None:
        items = [item[attribute] for item in items]
    return _joined(items, str(d))


def _replace_filter(value: Any, old: str, new: str, count: int | None = None) -> str:
    return replaced(value, old, new, -1 if count is None else count)


def _indent_filter(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if len(width) > 64 if isinstance(width, str) else not 0 <= width <= 64:
        raise TemplateLimitError(f"indent wants a width up to 64, was given {width!r}")
    _BUDGET.get().fits(len(value) + 64 * (value.count("\n") + 1))
    return jinja2.filters.do_indent(value, width, first, blank)


def _narrow(name: str) -> Callable[..., Any]:
    """A Jinja filter, bounded by its first number, which says how much it makes."""
    function = getattr(jinja2.filters, f"do_{name}")

    @functools.wraps(function)
    def narrow(*args: Any, **kwargs: Any) -> Any:
        for number in (*args, *kwargs.values()):
            if isinstance(number, int) and abs(number) > MAX_WIDTH:
                raise TemplateLimitError(f"{name} wants numbers up to {MAX_WIDTH}, was given {number!r:.80}")
            if isinstance(number, str) and len(number) > MAX_MATCHED:
                raise TemplateLimitError(
                    f"{name} wants up to {MAX_MATCHED} characters, was given {len(number)}"
                )
        made = function(*args, **kwargs)
        return list(_counted(made)) if isinstance(made, types.GeneratorType) else made

    return narrow


def _format_filter(value: Any, *args: Any, **kwargs: Any) -> str:
    _check_widths(str(value))
    return jinja2.filters.do_format(value, *args, **kwargs)


def _check_widths(form: str) -> None:
    if re.search(r"%[^%a-zA-Z]*(\*|\d{4})", form):
        raise TemplateLimitError(f"a width in the format {form[:40]!r} is too large")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: unlike Jinja's own, it does not escape HTML."""
    if indent is not None and not 0 <= int(indent) <= 16:
        raise TemplateLimitError(f"tojson wants an indent up to 16, was given {indent!r}")
    return json.dumps(
        _sized(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the marks of filters that want the context
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _BUDGET.get().step()
        for value in (*args, *kwargs.values()):
            _sized(value)
        return _sized(function(*args, **kwargs))

    return bounded


def _raise_exception(message: Any) -> None:
    raise ChatTemplateError(f"the chat template refuses these messages: {message}")


def _strftime_now(form: str) -> str:
    if len(form) > 100:
        raise TemplateLimitError("strftime_now wants a format of up to 100 characters")
    return datetime.datetime.now().strftime(form)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote, put between the two marks."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        start, stop = _BUDGET.get().marks
        return start + caller() + stop


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # folding constants would run filters before anything counts
            cache_size=0,
            finalize=_finalize,
            extensions=[_Generation, loopcontrols],
        )
        own = {"tojson": _tojson, "join": _join_filter, "replace": _replace_filter, "indent": _indent_filter}
        own |= {
            name: _narrow(name) for name in ("batch", "center", "slice", "striptags", "wordwrap", "pprint")
        }
        own |= {name: _narrow(name) for name in ("urlize", "urlencode", "xmlattr")}
        own |= {"format": _format_filter}
        self.filters = {
            name: _bounded_filter({**self.filters, **own}[name]) for name in (*_FILTERS, "tojson")
        }
        self.filters |= {"_counted": _counted, "_joined": _joined, "_sized": _sized}
        self.globals.pop("lipsum", None)
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    concat = staticmethod(lambda parts: _joined(parts))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filter(cast(nodes.Expr, loop.iter), "_counted")
        for compare in tree.find_all(nodes.Compare):
            compare.expr = _filter(compare.expr, "_sized")
            for operand in compare.ops:
                operand.expr = _filter(operand.expr, "_sized")
        return cast(nodes.Template, _without_concat(tree))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in STRING_METHODS:
            return False  # such as encode: nothing here bounds its bytes
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and re.search(r"\d{4}|{[^}]*{", value.__self__):
            raise TemplateLimitError(f"a width in the format {value.__self__[:40]!r} may be too large")
        return wrapped

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _BUDGET.get().step()
        named = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}
        for value in (*args, *named.values()):
            _sized(value)
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, str):
            if __obj.__name__ == "replace":
                return replaced(__obj.__self__, *args, **named)
            if __obj.__name__ == "join":
                return _joined(*args, separator=__obj.__self__, **named)
        name = getattr(__obj, "__name__", None)
        if name in _PADDING_METHODS and isinstance(getattr(__obj, "__self__", None), str):
            if any(
                isinstance(number, int) and abs(number) > MAX_WIDTH for number in (*args, *named.values())
            ):
                raise TemplateLimitError(f"{name} wants a width up to {MAX_WIDTH}, was given {args!r:.80}")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _BUDGET.get()
        budget.step()
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
            _sized(right)
        elif operator == "**" and not (numbers and abs(right) <= 64 and abs(left) <= 1 << 32):
            raise TemplateLimitError("a power in the chat template is too large")
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > MAX_DIGITS_BITS:
                raise TemplateLimitError("a product in the chat template is too large")
        elif operator == "*" and not numbers:
            sequence, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(sequence, Sized) and isinstance(times, int):
                budget.fits(len(sequence) * times)
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            budget.fits(len(left) + len(right))
        return super().call_binop(context, operator, left, right)


@jinja2.pass_context  # and so never folded at compile time
def _finalize(context: Any, value: Any) -> str:
    budget = _BUDGET.get()
    budget.step()
    return value if isinstance(value, str) else str(_sized(value))


def _filter(expression: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(
        expression, name, [], [], None, None, lineno=expression.lineno, environment=expression.environment
    )


def _without_concat(node: nodes.Node) -> nodes.Node:
    """The tree with every `a ~ b` as a filter that counts."""
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, field, _without_concat(value))
        elif isinstance(value, list):
            setattr(node, field, [_without_concat(v) if isinstance(v, nodes.Node) else v for v in value])
    if isinstance(node, nodes.Concat):
        parts = nodes.List(node.nodes, lineno=node.lineno, environment=node.environment)
        return _filter(parts, "_joined")
    return node


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE:
        raise TemplateLimitError(
            f"the chat template has {len(source)} characters; {MAX_SOURCE} are the limit"
        )
    try:
        return _Environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"the chat template has a syntax error on line {error.lineno}: {error.message}"
        ) from error
    except RecursionError as error:
        raise TemplateLimitError("the chat template is nested too deeply") from error
