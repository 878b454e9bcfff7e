"""The data card as one self-contained HTML page, with its figures beside it as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.files import atomic_write
from data.card.facts import gather

_WIDTH, _HEIGHT = 260, 90


def write_card(workdir: Path) -> Path:
    """Writes `card.html` and `card.json` into the workdir of a curation; returns the page's path."""
    facts = gather(workdir)
    atomic_write(workdir / "card.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return atomic_write(workdir / "card.html", render(facts, workdir.name))


def render(facts: dict[str, Any], name: str) -> str:
    """The page; all text from documents is escaped."""
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True)
    environment.filters |= {"histogram": histogram, "percent": percent, "count": count}
    template = environment.get_template("card.html")
    return template.render(name=name, flow=_flow(facts["stages"]), **facts)


def _flow(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each stage's bar: how much is left of what came in, and what went, by reason, widest first."""
    start = max(stages[0]["characters_out"], 1)
    documents = max(stages[0]["documents_in"], 1)
    rows = []
    for stage in stages:
        reasons = sorted(stage["dropped"].items(), key=lambda item: (-item[1], item[0]))
        gone = sum(stage["dropped"].values())
        rows.append(
            {
                **stage,
                "share": stage["characters_out"] / start,
                "document_share": stage["documents_out"] / documents,
                "gone": gone,
                "reasons": [(reason, n, n / max(gone, 1)) for reason, n in reasons],
            }
        )
    return rows


def histogram(facts: dict[str, Any]) -> Any:
    """An SVG of two overlaid histograms: what the stage kept, what it dropped. Each is scaled to its own
    highest bar."""
    import markupsafe

    bars = []
    for key, colour in (("kept", "var(--kept)"), ("dropped", "var(--gone)")):
        counts = facts[key]
        top = max([*counts, 1])
        width = _WIDTH / max(len(counts), 1)
        for i, value in enumerate(counts):
            height = _HEIGHT * value / top
            bars.append(
                f'<rect x="{i * width:.2f}" y="{_HEIGHT - height:.2f}" width="{width:.2f}" height="{height:.2f}" '
                f'fill="{colour}" fill-opacity="0.55"><title>{key}: {value:,}</title></rect>'
            )
    if not facts["edges"]:
        return markupsafe.Markup("")
    low, high = (number(facts["edges"][i]) for i in (0, -1))
    axis = (
        f'<line x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}" stroke="currentColor" stroke-opacity="0.4"/>'
        f'<text x="0" y="{_HEIGHT + 13}">{low}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 13}" text-anchor="end">{high}</text>'
    )
    return markupsafe.Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 16}">{"".join(bars)}{axis}</svg>')


def percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or share == 0 else f"{share:.2g}"


def count(value: int | float) -> str:
    """1234567 as 1.23 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (limit if unit != 'k' else 1e3):.3g} {unit}"
    return f"{value:,}"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
