"""A stack is a tuple of blocks; its parameters are grouped in runs, one for each block or one for equal neighbours.

A model's own blocks are the main stack. Encoders, patchers, and the local encoder and decoder of a byte-latent model
are other stacks, with their parameters under their names.
"""

# B batch, T tokens, D model width

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from model.blocks.block import Block, BlockModule
from model.blocks.common import Context, Report, TokenInfo
from model.blocks.norms import Norm
from model.blocks.remat import rematerialised


class Run(NamedTuple):
    """A group of parameters: one block, or equal neighbours, stacked along a leading axis for a scan."""

    name: str  # key of the group within its stack: "block_3", "run_0"
    block: Block
    layers: range  # numbers of the blocks


@dataclasses.dataclass(frozen=True)
class Stack:
    """Blocks that run in order."""

    name: str  # the key in parameters and cache; "" for the main stack, which has no key
    blocks: tuple[Block, ...]
    last_apart: bool = False  # with `scan`, the last block is a separate run

    def __post_init__(self):
        streams = {block.residual.copies: block.residual for block in self.blocks}
        if len(streams) > 1:
            differing = ", ".join(map(str, streams.values()))
            raise ValueError(
                f"the blocks of a stack share one residual stream, and these differ in its copies: {differing}. "
                "Give all of them HyperConnections with the same copies, or none."
            )

    def runs(self, scan: bool) -> list[Run]:
        """The runs in order; with `scan`, equal neighbours are one run."""
        if not scan:
            return [Run(f"block_{i}", block, range(i, i + 1)) for i, block in enumerate(self.blocks)]
        runs, start = [], 0
        apart = [False] * (len(self.blocks) - 1) + [self.last_apart]
        for (block, _), group in itertools.groupby(zip(self.blocks, apart)):
            count = len(list(group))
            runs.append(Run(f"run_{len(runs)}", block, range(start, start + count)))
            start += count
        return runs

    def part_of(self, tree: dict[str, Any] | None) -> dict[str, Any] | None:
        """The stack's part of a model's parameters, of their axes, or of a cache's layers."""
        return tree if tree is None or not self.name else tree[self.name]

    def as_part(self, part: dict[str, Any]) -> dict[str, Any]:
        """The inverse of `part_of`; merge it with the parts of other stacks."""
        return {self.name: part} if self.name else part


class StackModule(nn.Module):
    """A stack with a norm after its last block, and its parameters under the module's name."""

    stack: Stack
    ctx: Context
    final_norm: Norm | None = None
    role: str = "the last hidden state"  # width of the norm's input

    @nn.compact
    def __call__(self, x_BTD: jax.Array, states: dict | None, info: TokenInfo):
        """(x [B, T, D], the runs' new states, the blocks' `Report`)."""
        x_BTD, states, report = run_stack(self.ctx, self.stack, x_BTD, states, info)
        if self.final_norm is not None:
            x_BTD = self.final_norm.module(self.ctx, "final_norm", role=self.role)(x_BTD)
        return x_BTD, states, report.aux


class StackOutput(NamedTuple):
    """The output of the blocks, before the final norm."""

    before_last: jax.Array  # input of the last block; in a byte-latent model, input of the local encoder
    x_BTD: jax.Array  # output of the last block
    states: dict[str, Any]  # the new layers of the cache
    report: Report


def run_decoder(
    ctx: Context, stack: Stack, x_BTD: jax.Array, layers: dict | None, info: TokenInfo
) -> StackOutput:
    """As `run_stack`, with the input of the last run, for multi-token prediction."""
    *runs, last = stack.runs(ctx.scan)
    x, states, report = run_blocks(ctx, runs, stack.blocks[0].residual.begin(x_BTD), layers, info)
    info = dataclasses.replace(info, carry=report.carry)
    y, last_state, last_report = run_blocks(ctx, [last], x, layers, info)
    return StackOutput(x, stack.blocks[-1].residual.end(y), states | last_state, report.join(last_report))


def run_stack(
    ctx: Context, stack: Stack, x_BTD: jax.Array, states: dict | None, info: TokenInfo
) -> tuple[jax.Array, dict, Report]:
    """Runs all blocks of a stack, from the start of the residual stream to its end; see `run_blocks`."""
    x = stack.blocks[0].residual.begin(x_BTD)
    x, states, report = run_blocks(ctx, stack.runs(ctx.scan), x, states, info)
    return stack.blocks[-1].residual.end(x), states, report


def run_blocks(
    ctx: Context, runs: list[Run], x: jax.Array, states: dict | None, info: TokenInfo
) -> tuple[jax.Array, dict, Report]:
    """Runs the blocks; returns the residual stream, each run's new state, and the blocks' `Report`.

    Call it within a compact method: the runs become submodules of the calling module.
    """
    new_states, gathered = {}, Report({}, info.carry)
    for name, block, layers in runs:
        run = _run_module(ctx, name, block, len(layers))
        x, (new_states[name], report) = run(x, None if states is None else states[name], info)
        run_aux, carry = report
        if ctx.scan:
            run_aux = jax.tree.map(lambda a: a.sum(0), run_aux)
            carry = jax.tree.map(lambda c: c[-1], carry)
        gathered = gathered.join(Report(run_aux, carry))
        info = dataclasses.replace(info, carry=gathered.carry)
    return x, new_states, gathered


def _run_module(ctx: Context, name: str, block: Block, count: int):
    if not ctx.scan:
        return _traced_once(ctx.remat)(block, ctx, name=name)
    # states are scanned, `info` is not; flax accepts a tuple here, its types do not
    inputs: Any = (0, nn.broadcast)
    scanned = nn.scan(
        rematerialised(BlockModule, ctx.remat, scan=True),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=inputs,
        length=count,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(block, ctx, name=name)


@functools.cache
def _traced_once(remat: str) -> type[nn.Module]:
    """A block in a jit, so that equal blocks are traced and lowered once; the compiler sees each of them."""
    return nn.jit(rematerialised(BlockModule, remat, scan=False))
