"""`python -m data.quality train|train-ngram|score`: models that judge text, and what they say of some.

    python -m data.quality train --positive books/ --negative crawl.jsonl.gz --out=runs/quality
    python -m data.quality train-ngram wiki.jsonl --calibrate crawl.jsonl.gz --out=runs/ngrams
    python -m data.quality score page.txt --classifier=runs/quality --ngrams=runs/ngrams

Texts are plain files, JSONL, Parquet, folders of these, and text datasets. The stages QualityClassifier, HarmClassifier
and NgramPerplexity of a curation take the folders that training writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable

from configs.commands import Commands
from configs.files import atomic_write, remove_leftovers
from configs.typed import ConfigError
from data import storage
from data.quality import ngram_lm, perplexity
from data.quality.classifier import load_classifier, model_file
from data.quality.training import PICTURE, REPORT, ClassifierConfig, train_classifier
from data.tokenizer.texts import read_texts

_SHOWN = 20  # texts that `score` prints


def main(argv: list[str] | None = None) -> int:
    return _commands().run(argv)


def _commands() -> Commands:
    commands = Commands("python -m data.quality", __doc__)

    train = commands.add(
        "train",
        _train,
        "A classifier of good against other text: model.npz, report.json and report.png.",
    )
    train.add_argument("--positive", nargs="+", required=True, help="what to keep: files, folders, datasets")
    train.add_argument("--negative", nargs="+", required=True, help="what to drop")
    train.add_argument("--out", required=True, help="the folder to write")
    train.add_argument("--max_texts", type=int, help="of each set, the first ones; none: all")
    _settings(train, ClassifierConfig)

    ngram = commands.add("train-ngram", _train_ngram, "An n-gram model of texts: ngrams.npz and report.json.")
    ngram.add_argument("texts", nargs="+", help="files, folders or text datasets")
    ngram.add_argument("--out", required=True, help="the folder to write")
    ngram.add_argument(
        "--calibrate", nargs="+", default=[], help="texts like those to be filtered, for head and tail"
    )
    _settings(ngram, ngram_lm.NgramConfig)

    score = commands.add("score", _score, "What models say of texts, one a line.")
    score.add_argument("texts", nargs="+")
    score.add_argument("--classifier", help="a folder of `train`")
    score.add_argument("--ngrams", help="a folder of `train-ngram`")
    for parser in (train, ngram, score):
        parser.add_argument("--text_field", default="text", help="of JSONL and Parquet")
    return commands


def _settings(parser: argparse.ArgumentParser, cls: type) -> None:
    for field in dataclasses.fields(cls):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)


def _config(options: argparse.Namespace, cls: type):
    return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})


def _train(options: argparse.Namespace) -> int:
    config = _config(options, ClassifierConfig)
    positive, negative = (
        itertools.islice(read_texts(paths, options.text_field), options.max_texts)
        for paths in (options.positive, options.negative)
    )
    folder = storage.local(options.out, "--out")
    report = train_classifier(positive, negative, folder, config)
    test = report["texts"]["test"]
    print(
        f"area under ROC {report['area_under_roc']:.4f}, calibration error {report['calibration_error']:.3f} "
        f"on {test['positive']} positive and {test['negative']} negative held-out texts"
    )
    print("\nmin_score  positives kept  negatives kept")
    for row in report["thresholds"]:
        print(f"{row['min_score']:9.4f}{row['positives_kept']:15.1%}{row['negatives_kept']:16.1%}")
    print(f"\nfor:      {' '.join(report['words_for'])}\nagainst:  {' '.join(report['words_against'])}")
    print(f"\n{folder}: the model, {REPORT} and {PICTURE}")
    return 0


def _train_ngram(options: argparse.Namespace) -> int:
    config = _config(options, ngram_lm.NgramConfig)
    folder = storage.local(options.out, "--out")
    remove_leftovers(folder)

    def texts() -> Iterable[str]:
        return read_texts(options.texts, options.text_field)

    model = ngram_lm.train_ngrams(texts, config, lambda line: print(line, file=sys.stderr, flush=True))
    report = {"config": dataclasses.asdict(config), "ngrams": [len(keys) for keys in model.ngrams]}
    if options.calibrate:
        found = perplexity.percentiles(model, list(read_texts(options.calibrate, options.text_field)))
        model = dataclasses.replace(model, percentiles=found)
        report |= {"head": found[0], "tail": found[1]}
        print(f"head: perplexity up to {found[0]:.1f}; tail: above {found[1]:.1f}")
    ngram_lm.save_ngrams(model, folder / perplexity.NGRAMS)
    atomic_write(folder / REPORT, json.dumps(report, indent=2) + "\n")
    print(
        f"{folder}: " + ", ".join(f"{count:,} {n}-grams" for n, count in enumerate(report["ngrams"], start=1))
    )
    return 0


def _score(options: argparse.Namespace) -> int:
    if not options.classifier and not options.ngrams:
        raise ConfigError("nothing to score with: give --classifier=FOLDER, --ngrams=FOLDER or both.")
    texts = list(itertools.islice(read_texts(options.texts, options.text_field), _SHOWN))
    for text in texts:
        said = {}
        if options.classifier:
            model = load_classifier(model_file(options.classifier, "score"))
            said["score"] = round(float(model.scores([text])[0]), 4)
        if options.ngrams:
            ngrams = ngram_lm.load_ngrams(perplexity.ngram_file(options.ngrams))
            said |= {name: round(x, 4) for name, x in perplexity.measure(ngrams, [text])[0].items()}
        facts = "  ".join(f"{name} {value}" for name, value in said.items())
        print(f"{facts}  {' '.join(text.split())[:80]}")
    if len(texts) == _SHOWN:
        print(f"(the first {_SHOWN})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
