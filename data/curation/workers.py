"""One function over many items, by processes of this machine, or of a Ray cluster through daft.

Results come in the order of the items and do not depend on the process that made them. If a process dies (of a bug in
a library, of too much memory), its item is tried again; if that dies too, again with care: document by document, so
that the one that kills is known, dropped with its reason, and the rest goes on.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import pickle
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from configs.files import atomic_write
from configs.typed import ConfigError
from data.curation.child import Child, Died, Failed


@dataclasses.dataclass(frozen=True)
class Workers:
    """Who does the work. The result is the same to the bit for every choice."""

    runner: Literal["local", "ray"] = "local"
    processes: int = 0  # at most; 0: one for each core of this machine, or of the cluster
    min_megabytes: int = (
        32  # of text for each process: for less, starting one (some seconds) costs more than it brings
    )
    ray_address: str | None = None  # of a cluster; None: the one of the environment, or a new local one

    def __post_init__(self):
        if self.processes < 0:
            raise ValueError(f"processes={self.processes}: wanted 0 (one for each core) or more")


def map_items(
    workers: Workers,
    function: Callable[[Any], Any],
    items: Sequence[Any],
    megabytes: float,
    running: Path | None = None,
    what: str = "",
) -> Iterator[Any]:
    """`function(item)` for each item, in order, as they are done. `megabytes`: about how much text is in all of them.

    Items, results and the function (one of a module) are pickled where other processes work. What the function
    raises is raised here: a ConfigError as it is, others with the name of the item and the worker's traceback.

    `running`: a file that names the item that this process itself is at. If a run was killed at it, the next run gives
    that one to another process. `what` names items that have no `label`.
    """
    worth = int(megabytes // workers.min_megabytes) if workers.min_megabytes else len(items)
    if not items:
        return
    if workers.runner == "ray":
        yield from _on_ray(workers, function, items, what)
        return
    processes = min(workers.processes or _cores(), worth, len(items))
    if processes <= 1:
        yield from _here(function, items, running, what)
    else:
        yield from _in_processes(processes, function, items, what)


_idle: list[Child] = []  # started already, for the next call of map_items


def call_in_child(child: Child, function: Callable[[Any], Any], item: Any, what: str) -> Any:
    """`function(item)` in another process, whatever becomes of that.

    What kills it twice is found where the item can do without it: `item.without(place, reason)`. Raises ConfigError
    that names the item where it can't.
    """
    deaths, told = 0, set()
    while True:
        try:
            return child.call(function, item, careful=deaths >= 2)
        except Failed as error:
            raise RuntimeError(f"{_name(item, what)} failed:\n{error}") from None
        except Died as death:
            deaths += 1
            if deaths < 3:
                continue
            if death.place is None or death.place in told or not hasattr(item, "without"):
                raise ConfigError(
                    f"{_name(item, what)}: its worker died again and again ({death.how})"
                ) from None
            told.add(death.place)
            item = item.without(death.place, f"killed its worker ({death.how})")


def _here(
    function: Callable[[Any], Any], items: Sequence[Any], running: Path | None, what: str
) -> Iterator[Any]:
    if running is None:
        yield from map(function, items)
        return
    killer = running.read_text() if running.exists() else None
    for item in items:
        if _name(item, what) == killer:
            child = Child()
            try:
                yield call_in_child(child, function, item, what)
            finally:
                child.stop()
        else:
            atomic_write(running, _name(item, what))
            try:
                result = function(item)
            except Exception:  # it killed nothing
                running.unlink()
                raise
            yield result
    running.unlink(missing_ok=True)


def _in_processes(
    processes: int, function: Callable[[Any], Any], items: Sequence[Any], what: str
) -> Iterator[Any]:
    free: queue.SimpleQueue[Child] = queue.SimpleQueue()
    children = [_idle.pop() if _idle else Child() for _ in range(processes)]
    for child in children:
        free.put(child)

    def work(item: Any) -> Any:
        child = free.get()
        try:
            return call_in_child(child, function, item, what)
        finally:
            free.put(child)

    pool = ThreadPoolExecutor(processes)
    try:
        waiting: collections.deque[Future[Any]] = collections.deque(pool.submit(work, item) for item in items)
        while waiting:
            yield waiting.popleft().result()
        _idle.extend(children)
    except BaseException:
        for child in children:
            child.stop()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def stop_idle() -> None:
    """Ends the processes that wait for further items."""
    while _idle:
        _idle.pop().stop()


def _on_ray(
    workers: Workers, function: Callable[[Any], Any], items: Sequence[Any], what: str
) -> Iterator[Any]:
    daft, processes = _daft(workers)
    frame = daft.from_pydict({"item": [pickle.dumps((function, item, what)) for item in items]})
    frame = frame.into_partitions(len(items))
    call = _remote(daft, max(min(processes, len(items)), 1))(daft.col("item"))
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
    @daft.cls(max_concurrency=processes)
    class Worker:
        def __init__(self) -> None:
            self.child = Child()

        @daft.method(return_dtype=daft.DataType.binary())
        def call(self, item: bytes) -> bytes:
            function, argument, what = pickle.loads(item)
            try:
                return pickle.dumps(call_in_child(self.child, function, argument, what))
            except ConfigError as error:
                return pickle.dumps(_Failure(str(error)))

    return Worker().call


def _daft(workers: Workers) -> tuple[Any, int]:
    """daft with its runner on the cluster, and how many items that does at once."""
    os.environ.setdefault("DO_NOT_TRACK", "true")  # before the import, which reports home
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
    import daft

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
    return daft, workers.processes or int(ray.cluster_resources().get("CPU", 1))


def _name(item: Any, what: str) -> str:
    """What an error calls an item."""
    return getattr(item, "label", None) or what


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
