"""MinHash deduplication with datasketch, one process: prints seconds and the ids that go. Called by
benchmarks/deduplication.py, in its virtual environment."""

import json
import re
import sys
import time
from pathlib import Path

from datasketch import MinHash, MinHashLSH

WORD = re.compile(r"\w+")


def shingles(text):
    words = WORD.findall(text.lower())
    return [" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))]


def main(folder, out, bands, rows):
    began = time.perf_counter()
    lsh = MinHashLSH(num_perm=int(bands) * int(rows), params=(int(bands), int(rows)))
    gone = []
    with open(out, "w") as kept:
        for file in sorted(Path(folder).iterdir()):
            for line in open(file, encoding="utf-8"):
                row = json.loads(line)
                signature = MinHash(num_perm=int(bands) * int(rows))
                signature.update_batch(shingles(row["text"]))
                if lsh.query(signature):
                    gone.append(row["id"])
                else:
                    lsh.insert(row["id"], signature)
                    kept.write(line)
    print(json.dumps({"seconds": time.perf_counter() - began, "gone": gone}))


main(*sys.argv[1:])
