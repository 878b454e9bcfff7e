"""Bytes that a compiled TPU program moves to and from main memory in one run, read out of its text.

XLA's own count has the body of a loop once and knows a kernel by what that tells it. Here bodies count as often as they
run. An operation reads its operands and writes its results, but for what is sliced out of an operand or put into it in
place, of which only the slice moves; arrays in fast memory (`S(1)`) move when they are copied there or back. Layouts
count as they lie, filled up to whole tiles.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

KINDS = ("products", "kernels", "collectives", "copies", "others")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What has no work of its own: names for parts of what is there, ends of what began before, and loops' own state.
IDLE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "partition-id")
IDLE += ("replica-id", "while", "call", "conditional", "opt-barrier", "async-update")
PREVIOUS = (
    "bitcast",
    "get-tuple-element",
    "reshape",
)  # inside a fusion they are another name of their operand
SLICES = ("dynamic-slice", "slice", "gather")
BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "bf16": 16,
    "f16": 16,
    "s16": 16,
    "u16": 16,
    "s64": 64,
    "u64": 64,
    "f64": 64,
}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
BITS |= {"s32": 32, "u32": 32, "f32": 32}


@dataclasses.dataclass(frozen=True)
class Operation:
    name: str
    results: str  # shapes, as the text has them
    kind: str
    inner: str  # the operands, or a parameter's number, or a constant
    rest: str  # what follows
    is_root: bool

    @property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.inner))

    @property
    def is_kernel(self) -> bool:
        return "tpu_custom_call" in self.rest

    @property
    def is_collective(self) -> bool:
        return self.kind.removesuffix("-start") in COLLECTIVES

    @property
    def is_mark(self) -> bool:
        """It sets memory aside, or says something of its operand."""
        return self.kind == "custom-call" and not self.is_kernel

    def called(self, attribute: str) -> str:
        found = re.search(attribute + r"=%([\w.\-]+)", self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Traffic:
    moved: float  # bytes of main memory, read and written
    by_kind: dict[str, float]  # of them, by KINDS
    wanted: float  # bytes if each product, kernel and collective read its operands and wrote its results once


def traffic(text: str) -> Traffic:
    """Of one run of the program on one device."""
    program = _Program(text)
    moved, wanted = collections.Counter(), 0.0
    for operation, times in program.runs(program.entry):
        kind = program.kind(operation)
        moved[kind] += times * program.bytes_of(operation, main_memory=True)
        if kind in ("products", "kernels"):
            wanted += times * program.bytes_of(operation, main_memory=False)
        for collective in program.collectives(operation):
            both = [collective.results, *(program.named[name].results for name in collective.operands)]
            moved["collectives"] += times * sum(_size(shapes, main_memory=True) for shapes in both)
            wanted += times * sum(_size(shapes, main_memory=False) for shapes in both)
    return Traffic(float(sum(moved.values())), {kind: float(moved[kind]) for kind in KINDS}, wanted)


def _parsed(line: str) -> Operation | None:
    head = re.match(r"\s*(ROOT )?%([\w.\-]+) = ", line)
    if not head:
        return None
    end = _closing(line, head.end()) if line[head.end()] == "(" else line.index(" ", head.end())
    kind = re.match(r" ([\w\-]+)", line[end:])
    if not kind:
        return None
    begin = end + kind.end()
    stop = _closing(line, begin)
    results, inner = line[head.end() : end], line[begin + 1 : stop - 1]
    does = "bitcast" if is_idle_transpose(line) else kind[1]
    return Operation(head[2], results, does, inner, line[stop:], bool(head[1]))


def is_idle_transpose(line: str) -> bool:
    """Whether it is a transpose that leaves the axes as they are, as gathers end with."""
    found = re.search(r" transpose\(.*dimensions=\{([\d,]*)\}", line)
    axes = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return found is not None and axes == sorted(axes)


def _closing(line: str, begin: int) -> int:
    """The place after the bracket that closes the one at `begin`."""
    depth = 0
    for match in re.finditer(r"[()]", line[begin:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return begin + match.end()
    raise ValueError(f"No closing bracket in {line[:120]!r}.")


def _arrays(shapes: str) -> list[str]:
    return [found[0] for found in ARRAY.finditer(shapes)]


def _size(shapes: str, main_memory: bool) -> float:
    """Bytes of arrays: of those in main memory, with what fills up their tiles; or of all, without it."""
    total = 0.0
    for dtype, dims, layout in ARRAY.findall(shapes):
        sizes = [int(n) for n in dims.split(",") if n]
        if not sizes:
            continue  # a number has a memory of its own
        if main_memory:
            if re.search(r"S\(\d", layout):
                continue
            tile = re.search(r"T\(([\d,]+)\)", layout)
            minor = [int(n) for n in layout.split(":")[0].split(",") if n]
            for axis, size in zip(minor, reversed(tile[1].split(",")) if tile else (), strict=False):
                sizes[axis] = -(-sizes[axis] // int(size)) * int(size)
        total += math.prod(sizes) * BITS.get(dtype, 8) / 8
    return total


class _Program:
    def __init__(self, text: str):
        self.operations: dict[str, list[Operation]] = {}
        self.named: dict[str, Operation] = {}
        self.entry = within = ""
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(" "):
                within = line.removeprefix("ENTRY ").split()[0].lstrip("%")
                self.entry = within if line.startswith("ENTRY") else self.entry
                self.operations[within] = []
            elif operation := _parsed(line):
                self.operations[within].append(operation)
                self.named[operation.name] = operation
        self._seen: set[str] = set()

    def runs(self, computation: str, times: int = 1):
        """(each operation, how often it runs), with those of loops' bodies."""
        for operation in self.operations[computation]:
            if operation.kind == "while":
                yield from self.runs(operation.called("body"), times * self._turns(operation))
            elif operation.kind in ("call", "async-start") and operation.called("(?:to_apply|calls)"):
                yield from self.runs(operation.called("(?:to_apply|calls)"), times)
            else:
                yield operation, times

    def _turns(self, loop: Operation) -> int:
        """Of a scan's loop, which counts from zero to the constant that its condition compares with."""
        condition = self.operations[loop.called("condition")]
        ends = [int(one.inner) for one in condition if one.kind == "constant" and one.results[1:6] == "32[]{"]
        if len(ends) != 1:
            raise ValueError(
                f"Loop {loop.name} ends by {len(ends)} constants, not one: its turns can't be read."
            )
        return ends[0]

    @functools.cache  # noqa: B019
    def _inside(self, computation: str) -> frozenset[str]:
        """Kinds of the operations of a fused computation, and of those that it fuses."""
        kinds = set()
        for operation in self.operations.get(computation, ()):
            kinds.add("kernel" if operation.is_kernel else operation.kind)
            kinds |= self._inside(operation.called("calls"))
        return frozenset(kinds)

    def kind(self, operation: Operation) -> str:
        inside = self._inside(operation.called("calls")) | {operation.kind}
        if operation.is_kernel or "kernel" in inside:
            return "kernels"
        if inside & {"convolution", "dot"}:
            return "products"
        return "copies" if inside & {"copy", "copy-start", "transpose", "slice-start"} else "others"

    def collectives(self, operation: Operation):
        """Those of a fusion, or the operation itself; one that other work runs beside is in several, and told once."""
        inside = [operation]
        for one in inside:
            inside += self.operations.get(one.called("calls"), ())
            channel = re.search(r"channel_id=(\d+)", one.rest)
            if one.kind.removesuffix("-start") in COLLECTIVES and channel and channel[1] not in self._seen:
                self._seen.add(channel[1])
                yield one

    def bytes_of(self, operation: Operation, main_memory: bool) -> float:
        """What an operation reads and writes, but for its collectives."""
        if operation.kind in IDLE or operation.kind.endswith("-done"):
            return 0
        if operation.is_collective or operation.is_mark:
            return 0
        size = functools.partial(_size, main_memory=main_memory)
        operands = [self.named[name].results for name in operation.operands]
        if operation.kind == "copy-start":
            return size(operands[0]) + size(_arrays(operation.results)[0])
        if operation.kind == "slice-start":
            target = _arrays(operation.results)[1]
            return _size(target, main_memory=False) + size(target)
        if fused := operation.called("calls"):
            read = sum(min(size(shapes), self._read(fused, k)) for k, shapes in enumerate(operands))
            return read + self._written(fused, operation.results, main_memory)
        if operation.kind in SLICES:
            return 2 * size(operation.results)
        if operation.kind == "dynamic-update-slice":
            return 2 * size(operands[1])
        return sum(map(size, operands)) + size(operation.results)

    @functools.cache  # noqa: B019
    def _read(self, computation: str, parameter: int) -> float:
        """Of a parameter of a fused computation, inf where all of it is read."""
        operations = self.operations[computation]
        names = {one.name for one in operations if one.kind == "parameter" and int(one.inner) == parameter}
        read = 0.0
        for one in operations:
            for place, operand in enumerate(one.operands):
                if operand not in names:
                    continue
                if one.kind in PREVIOUS:
                    names.add(one.name)
                elif one.kind in SLICES and place == 0:
                    read += _size(one.results, main_memory=False)
                elif fused := one.called("calls"):
                    read += self._read(fused, place)
                    names |= {one.name} if self._origin(one).name in names else set()
                elif not (one.kind == "tuple" or one.is_collective or one.is_mark):
                    read += 0.0 if one.kind == "dynamic-update-slice" and place == 0 else math.inf
        return read

    def _written(self, fused: str, results: str, main_memory: bool) -> float:
        """By a fused computation, whose results are said where it is called."""
        root = self._root(fused)
        roots = [self.named[name] for name in root.operands] if root.kind == "tuple" else [root]
        written = 0.0
        for one, shape in zip(roots, _arrays(results), strict=False):
            one = self._origin(one)
            if one.kind == "dynamic-update-slice":
                update = _size(self.named[one.operands[1]].results, main_memory=False)
                written += min(update, _size(shape, main_memory))
            elif not (one.kind == "parameter" or one.is_collective or one.is_mark):
                written += _size(shape, main_memory)
        return written

    def _origin(self, one: Operation) -> Operation:
        """What an operation inside a fusion is another name of; itself, where it does something."""
        while True:
            if one.kind in PREVIOUS:
                one = self.named[one.operands[0]]
            elif (
                one.kind == "fusion"
                and (inner := self._origin(self._root(one.called("calls")))).kind == "parameter"
            ):
                one = self.named[one.operands[int(inner.inner)]]
            else:
                return one

    def _root(self, computation: str) -> Operation:
        return next(one for one in self.operations[computation] if one.is_root)
