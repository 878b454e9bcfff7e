"""Where the time of a train step goes on this machine, by operation: a table, and a page with bars.

    python -m benchmarks.profile [--model=llama|moe|mamba2] [--rows=8] [--length=512] [--save=FILE.json]
                                 [--before=FILE.json] [--page=FILE.html]

The step is that of `benchmarks.train_step`. `--save` keeps the figures, and `--before` shows those of an earlier run
beside these. Seconds are of the thread that ran an operation; matrix products that Eigen spreads over threads are seen
when they are started, so what is left of the step is theirs ("products and waiting").
"""

from __future__ import annotations

import argparse
import collections
import gzip
import html
import json
import re
import tempfile
from pathlib import Path

import jax

from benchmarks.train_step import make_step, timed

PRODUCTS = "products and waiting"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("llama", "moe", "mamba2"), default="llama")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--top", type=int, default=25, help="operations shown")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    before = json.loads(options.before.read_text()) if options.before else None
    now = measure(options)
    if options.save:
        options.save.write_text(json.dumps(now, indent=1))
    rows = compared(now, before)[: options.top]
    print(f"step: {now['step']:.2f} s" + (f", before {before['step']:.2f} s" if before else ""))
    for name, seconds, earlier in rows:
        print(f"{seconds:8.3f} s" + (f" {earlier:8.3f} s" if before else "") + f"  {name}")
    if options.page:
        options.page.write_text(page(options, now, before, rows))
        print(f"{options.page} shows it as bars.")


def measure(options: argparse.Namespace) -> dict:
    """{"step": seconds, "operations": {name: seconds}} of a step that is compiled and has run once."""
    step, state, batch, _ = make_step(options)
    compiled = step.lower(state, batch).compile()
    state, _ = jax.block_until_ready(compiled(state, batch))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds, _ = timed(lambda: jax.block_until_ready(compiled(state, batch)))
        (file,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(file) as trace:
            events = json.load(trace)["traceEvents"]
    return {"step": seconds, "operations": by_operation(events, names_of(compiled.as_text()), seconds)}


def names_of(text: str) -> dict[str, str]:
    """For each instruction of a program: what it comes from in the model, and the shape it gives."""
    names = {}
    for line in text.splitlines():
        if m := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(?\w+\[[\d,]*\])", line):
            source = re.search(r'op_name="([^"]*)"', line)
            path = re.sub(r"(block)s?_\d+|\d+", r"\1", source[1]) if source else ""
            direction = "backward " if "transpose(" in path else ""
            names.setdefault(m[1], f"{direction}{'/'.join(path.split('/')[-3:])} {m[2].lstrip('(')}")
    return names


def by_operation(events: list[dict], names: dict[str, str], step: float) -> dict[str, float]:
    spent, spans = collections.Counter(), []
    for event in events:
        instruction = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and instruction:
            kind = re.sub(r"[.\d]+$", "", instruction)
            spent[f"{kind}: {names.get(instruction, '')}"] += event["dur"] / 1e6
            spans.append((event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6))
    return dict(spent) | {PRODUCTS: max(0.0, step - covered(spans))}


def covered(spans: list[tuple[float, float]]) -> float:
    """Seconds in which some span runs."""
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def compared(now: dict, before: dict | None) -> list[tuple[str, float, float]]:
    earlier = before["operations"] if before else {}
    names = now["operations"] | earlier
    rows = [(name, now["operations"].get(name, 0.0), earlier.get(name, 0.0)) for name in names]
    return sorted(rows, key=lambda row: -max(row[1:]))


def page(options: argparse.Namespace, now: dict, before: dict | None, rows: list) -> str:
    widest = max(max(row[1:]) for row in rows)
    bar = lambda seconds, kind: (
        f'<div class="{kind}" style="width:{85 * seconds / widest:.1f}%"></div><span>{seconds:.3f} s</span>'
    )
    lines = [
        f"<tr><td>{html.escape(name)}</td><td>{bar(seconds, 'now')}"
        + (f"<br>{bar(earlier, 'before')}" if before else "")
        + "</td></tr>"
        for name, seconds, earlier in rows
    ]
    title = f"One train step of {options.model}, {options.rows} rows of {options.length} tokens: {now['step']:.2f} s"
    if before:
        title += f" (grey: before, {before['step']:.2f} s)"
    return f"""<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px sans-serif;margin:2em}}td{{padding:2px 8px;vertical-align:top}}td:last-child{{width:45em}}
div{{height:12px;display:inline-block}}.now{{background:#3572a5}}.before{{background:#bbb}}span{{margin-left:6px}}</style>
<h1>{title}</h1><table>{"".join(lines)}</table>
"""


if __name__ == "__main__":
    main()
