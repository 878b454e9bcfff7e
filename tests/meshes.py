"""What a test of a mesh asserts beside equal values: that each device has less to compute and less to move."""

import jax


def compiled(function, *arguments):
    """The program for these arguments, which runs on them: `function` is jitted, arrays may be only shapes."""
    return function.lower(*arguments).compile()


def assert_divided(
    alone: jax.stages.Compiled, split: jax.stages.Compiled, flops: float, nbytes: float
) -> None:
    """A device's flops and bytes in `split` are at most these shares of those of `alone`, which does the same work.

    Shares leave room for what a mesh adds: arrays that are gathered and reduced, and small ones that are whole
    on each device. The compiler counts the body of a loop (scanned blocks, interpreted kernels) once.
    """
    counts = [program.cost_analysis() for program in (alone, split)]
    share = {name: counts[1][name] / counts[0][name] for name in ("flops", "bytes accessed")}
    assert share["flops"] <= flops < 1 and share["bytes accessed"] <= nbytes < 1, share
