"""One function over many items, by processes of this machine or of a Ray cluster: daft runs both.

Results come in the order of the items and do not depend on who made them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from configs.typed import ConfigError


@dataclasses.dataclass(frozen=True)
class Workers:
    """Who does the work. The result is the same to the bit for every choice."""

    runner: Literal["local", "ray"] = "local"
    processes: int = 0  # at most; 0: one for each core
    min_megabytes: int = (
        32  # of text for each process: for less, starting one (some seconds) costs more than it brings
    )
    ray_address: str | None = None  # of a cluster; None: the one of the environment, or a new local one

    def __post_init__(self):
        if self.processes < 0:
            raise ValueError(f"processes={self.processes}: wanted 0 (one for each core) or more")


def map_items(
    workers: Workers, function: Callable[[Any], Any], items: Sequence[Any], megabytes: float
) -> Iterator[Any]:
    """`function(item)` for each item, in order, as they are done. `megabytes`: about how much text is in all of them.

    Items, results and the function (one of a module) are pickled where other processes work. What the function
    raises is raised here: a ConfigError as it is, others with the trace of the worker.
    """
    worth = int(megabytes // workers.min_megabytes) if workers.min_megabytes else len(items)
    processes = min(workers.processes or _cores(), worth, len(items))
    if not items or (workers.runner == "local" and processes <= 1):
        yield from map(function, items)
        return
    daft = _daft(workers)
    frame = daft.from_pydict({"item": [pickle.dumps((function, item)) for item in items]})
    frame = frame.into_partitions(len(items)) if workers.runner == "ray" else frame.into_batches(1)
    call = _remote(daft, max(processes, 1))(daft.col("item"))
    for batch in frame.select(call.alias("result")).to_arrow_iter():
        for value in batch.column("result").to_pylist():
            result = pickle.loads(value)
            if isinstance(result, _Failure):
                raise ConfigError(result.message)
            yield result


@dataclasses.dataclass(frozen=True)
class _Failure:
    message: str


def _remote(daft: Any, processes: int) -> Any:
    @daft.cls(use_process=True, max_concurrency=processes)
    class Worker:
        @daft.method(return_dtype=daft.DataType.binary())
        def call(self, item: bytes) -> bytes:
            return _call(item)

    return Worker().call


def _call(item: bytes) -> bytes:
    function, argument = pickle.loads(item)
    try:
        return pickle.dumps(function(argument))
    except ConfigError as error:
        return pickle.dumps(_Failure(str(error)))


def _daft(workers: Workers) -> Any:
    os.environ.setdefault("DO_NOT_TRACK", "true")  # before the import, which reports home
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
    import daft

    if workers.runner == "local":
        if daft.get_or_infer_runner_type() != "native":
            daft.set_runner_native()
        return daft
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            'workers.runner="ray" needs ray, which is not installed: pip install "crucible-lm[ray]"'
        ) from error
    if not ray.is_initialized():
        address = workers.ray_address or os.environ.get("RAY_ADDRESS")
        count = None if address else workers.processes or _cores()
        ray.init(address=address, num_cpus=count, include_dashboard=False, logging_level=logging.ERROR)
    daft.set_runner_ray(noop_if_initialized=True)
    return daft


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
