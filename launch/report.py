"""report.html: one self-contained page on a whole lifecycle, and report.json with the same figures."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any

import configs
from launch.figures import gather, score
from launch.stages import StageRecord
from train.metrics import clock

MODELS = ("pretrain", "sft", "dpo", "rl")
BLUE, ORANGE = "#2563eb", "#ea580c"


def write_report(workdir: Path, records: dict[str, StageRecord]) -> Path:
    """Write both files; returns the page's path."""
    figures = gather(workdir, records)
    configs.atomic_write(workdir / "report.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return configs.atomic_write(workdir / "report.html", render(figures))


def render(figures: dict[str, Any]) -> str:
    sections = [
        ("Scores after each stage", _scores(figures)),
        ("Learning curves", _curves(figures)),
        ("What the models write", _samples(figures)),
        ("What each stage cost", _costs(figures)),
        ("Configs", _configs(figures)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    return _PAGE.format(tiles=_tiles(figures), body=body, finished=_text(figures["finished_at"]))


def _tiles(figures: dict[str, Any]) -> str:
    tiles = [("whole life", clock(figures["seconds"])), ("peak memory", _gib(figures["peak_memory"]))]
    bits = {
        m: score(figures, "pretrain", m)
        for m in ("bits per byte", "gzip -9 bits per byte", "bzip2 -9 bits per byte")
    }
    values = [row["value"] for row in bits.values() if row]
    if len(values) == len(bits):
        ours, gzip, bzip2 = values
        tiles.append((f"bits per byte of held-out text; gzip {gzip:.2f}, bzip2 {bzip2:.2f}", f"{ours:.2f}"))
    before, after = (score(figures, stage, "accuracy") for stage in ("sft", "rl"))
    if before and after:
        gain = 100 * (after["value"] - before["value"])
        value = f"{before['value']:.0%} &rarr; {after['value']:.0%}"
        tiles.append((f"exact match, fine-tuned to RL: {gain:+.0f} points", value))
    return "".join(f"<div class=tile><b>{value}</b><span>{_text(name)}</span></div>" for name, value in tiles)


def _scores(figures: dict[str, Any]) -> str:
    lines = list(dict.fromkeys((row["name"], row["metric"]) for row in figures["scores"]))
    stages = [m for m in MODELS if any(row["stage"] == m for row in figures["scores"])]
    rows = []
    for name, metric in lines:
        cells = [score(figures, stage, metric, name) for stage in stages]
        counts = {str(cell["n"]) for cell in cells if cell and cell.get("n")}
        shown = "".join(f"<td>{_value(cell)}</td>" for cell in cells)
        rows.append(
            f"<tr><th>{_text(name)}</th><td>{_text(metric)}</td>{shown}<td>{', '.join(sorted(counts))}</td></tr>"
        )
    head = "".join(f"<th>{stage}</th>" for stage in stages)
    note = (
        "<p class=note>&plusmn; is one standard error. Held-out text and problems are in no training set.</p>"
    )
    return f"<table><tr><th>what</th><th>metric</th>{head}<th>n</th></tr>{''.join(rows)}</table>{note}"


def _value(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "&ndash;"
    error = f" <small>&plusmn; {cell['stderr']:.3f}</small>" if cell.get("stderr") is not None else ""
    return f"{cell['value']:.3f}{error}"


def _curves(figures: dict[str, Any]) -> str:
    charts = []
    for stage, splits in figures["curves"].items():
        if stage == "rl":
            charts.append(_chart("rl: reward", splits, {"reward": ("train", BLUE)}))
            series = {"correct": ("train", BLUE), "accuracy": ("validation", ORANGE)}
            charts.append(_chart("rl: share of right answers", splits, series))
            charts.append(_chart("rl: length of answers, tokens", splits, {"length": ("train", BLUE)}))
            charts.append(
                _chart(
                    "rl: KL(sampler || trainer), nats a token",
                    splits,
                    {"mismatch_kl": ("train", BLUE)},
                    log=True,
                )
            )
        else:
            charts.append(_chart(f"{stage}: loss", splits, {"loss": ("train", BLUE)}, validation="loss"))
        if stage == "dpo":
            charts.append(
                _chart(
                    "dpo: share of pairs ranked right",
                    splits,
                    {"accuracy": ("train", BLUE)},
                    validation="accuracy",
                )
            )
    return f"<div class=charts>{''.join(charts)}</div>"


def _chart(
    title: str, splits: dict, series: dict[str, tuple[str, str]], validation: str = "", log: bool = False
) -> str:
    """An SVG of metrics over steps; `series` maps a metric to its split and colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [(metric, split, colour) for metric, (split, colour) in series.items()]
    if validation:
        lines.append((validation, "validation", ORANGE))
    with plt.rc_context(
        {"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure, axes = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
        for metric, split, colour in lines:
            points = [(r["step"], r[metric]) for r in splits.get(split, []) if r.get(metric) is not None]
            if points:
                label = f"{metric} ({split})" if len(lines) > 1 else metric
                marker = "o" if len(points) < 15 else None
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    label=label,
                    marker=marker,
                    markersize=3,
                    linewidth=1.4,
                )
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        if log:
            axes.set_yscale("log")
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = out.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def _samples(figures: dict[str, Any]) -> str:
    parts = []
    trained = figures["samples"].get("pretrain", {}).get("training", [])
    if trained:
        shown = "".join(f"<p><b>{_text(s['prompt'])}</b>{_text(s['completion'])}</p>" for s in trained)
        parts.append(f"<h3>The pretrained model goes on with text</h3><div class=sample>{shown}</div>")
    parts.append("<h3>Held-out problems, the same ones after each stage</h3>" + _problem_table(figures))
    return "".join(parts)


def _problem_table(figures: dict[str, Any]) -> str:
    stages = [m for m in MODELS if figures["samples"].get(m, {}).get("tasks")]
    answers: dict[str, dict[str, dict]] = {}
    for stage in stages:
        for samples in figures["samples"][stage]["tasks"].values():
            for sample in samples:
                if "question" in sample:  # the others are of held-out text
                    answers.setdefault(sample["question"], {})[stage] = sample
    rows = []
    for question, by_stage in answers.items():
        cells = "".join(f"<td>{_answer(by_stage.get(stage))}</td>" for stage in stages)
        gold = next(iter(by_stage.values()))["expected"]
        rows.append(f"<tr><td>{_text(question)}</td>{cells}<td><code>{_text(gold)}</code></td></tr>")
    head = "".join(f"<th>{stage}</th>" for stage in stages)
    return f"<table><tr><th>question</th>{head}<th>right answer</th></tr>{''.join(rows)}</table>"


def _answer(sample: dict | None) -> str:
    if sample is None:
        return "&ndash;"
    mark, name = ("&#10003;", "right") if sample["correct"] else ("&#10007;", "wrong")
    return f"<span class={name}>{mark}</span> <code>{_text(sample['completion'])}</code>"


def _costs(figures: dict[str, Any]) -> str:
    rows = []
    for stage in figures["stages"]:
        rate, mfu = (stage["figures"].get(key) for key in ("tokens_per_second", "mfu"))
        cells = [
            clock(stage["seconds"]),
            _gib(stage["peak_memory"]),
            f"{rate:,.0f}" if rate else "&ndash;",
            f"{mfu:.1%}" if mfu else "&ndash;",
            str(stage["attempts"]),
        ]
        rows.append(f"<tr><th>{stage['name']}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    head = "<tr><th>stage</th><th>time</th><th>peak memory</th><th>tokens/s</th><th>MFU</th><th>attempts</th></tr>"
    machine = figures["machine"]
    note = (
        f"{_text(figures['mfu_formula'])}; on a CPU the peak is the measured rate of a float32 matrix product. "
        f"Tokens/s of rl include sampling and verifying. Machine: {_text(machine['platform'])}, {machine['cores']} "
        f"cores, {_gib(machine['memory'])}. Time counts all attempts."
    )
    return f"<table>{head}{''.join(rows)}</table><p class=note>{note}</p>"


def _configs(figures: dict[str, Any]) -> str:
    return "".join(
        f"<details><summary>{stage['name']}</summary>"
        f"<pre>{_text(json.dumps(stage['config'], indent=1))}</pre></details>"
        for stage in figures["stages"]
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _text(value: Any) -> str:
    return html.escape(str(value))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Crucible: the life of a model</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1060px; margin: 0 auto;
  padding: 1.5rem 1rem 4rem; }}
h1 {{ margin-bottom: 0; }} h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }}
.note, header p {{ color: #666; font-size: .9em; }} small {{ color: #777; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: .8rem; margin-top: 1.2rem; }}
.tile {{ border: 1px solid #ddd; border-radius: 8px; padding: .8rem 1rem; }}
.tile b {{ display: block; font-size: 1.6rem; }} .tile span {{ color: #666; font-size: .88em; }}
section {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #eee; vertical-align: top; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(310px, 1fr)); gap: .5rem; }}
figure {{ margin: 0; }} figure svg {{ width: 100%; height: auto; }}
.sample {{ background: #f6f6f6; border-radius: 8px; padding: .5rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }}
code, pre {{ font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }}
pre {{ background: #f6f6f6; padding: 1rem; }}
.right {{ color: #15803d; }} .wrong {{ color: #b91c1c; }}
</style></head><body><header><h1>The life of a model</h1><p>Crucible, finished {finished}</p></header>
<div class="tiles">{tiles}</div>{body}</body></html>
"""
