"""Trains byte-level BPE with `tokenizers` or rustbpe on a JSONL file of texts; run by benchmarks.tokenizer_training."""

import argparse
import base64
import json
import resource
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=("tokenizers", "rustbpe"))
    parser.add_argument("texts")
    parser.add_argument("--vocab_size", type=int, required=True)
    parser.add_argument("--pattern", required=True)
    options = parser.parse_args()
    with open(options.texts, encoding="utf-8") as file:
        texts = (json.loads(line) for line in file)
        start = time.perf_counter()
        train = {"tokenizers": train_tokenizers, "rustbpe": train_rustbpe}[options.peer]
        tokens = train(texts, options)
        seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak, cpu = used.ru_maxrss * 1024, used.ru_utime + used.ru_stime
    encoded = [base64.b64encode(token).decode() for token in tokens()]
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak, "tokens": encoded}))


def train_tokenizers(texts, options):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(options.pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    printable = [b for b in range(256) if chr(b) in alphabet]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return lambda: [bytes(byte_of[c] for c in token) for token in backend.get_vocab()]


def train_rustbpe(texts, options):
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, options.vocab_size, pattern=options.pattern)
    return lambda: [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()]


if __name__ == "__main__":
    main()
