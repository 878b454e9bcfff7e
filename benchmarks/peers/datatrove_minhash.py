"""MinHash deduplication with datatrove, all four of its steps: prints seconds and the ids that go. Called by
benchmarks/deduplication.py, in its virtual environment."""

import gzip
import json
import sys
import time
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


def main(folder, out, bands, rows, workers):
    config = MinhashConfig(n_grams=5, num_buckets=int(bands), hashes_per_bucket=int(rows))
    files = len(list(Path(folder).iterdir()))
    reader = JsonlReader(folder)

    def run(name, steps, tasks):
        # A step of its own folder: datatrove takes the tasks that it finds finished there for done.
        LocalPipelineExecutor(
            steps, tasks=tasks, workers=min(int(workers), tasks), logging_dir=f"{out}/logs/{name}"
        ).run()

    began = time.perf_counter()
    run(
        "signatures", [reader, MinhashDedupSignature(output_folder=f"{out}/signatures", config=config)], files
    )
    run("buckets", [MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config)], int(bands))
    run("clusters", [MinhashDedupCluster(f"{out}/buckets", f"{out}/clusters", config=config)], 1)
    dropped = JsonlWriter(f"{out}/dropped")
    run(
        "filter",
        [reader, MinhashDedupFilter(f"{out}/clusters", exclusion_writer=dropped), JsonlWriter(f"{out}/kept")],
        files,
    )
    seconds = time.perf_counter() - began
    gone = [json.loads(line)["id"] for file in Path(f"{out}/dropped").iterdir() for line in gzip.open(file)]
    print(json.dumps({"seconds": seconds, "gone": gone}))


if __name__ == "__main__":
    main(*sys.argv[1:])
