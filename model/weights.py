"""Weights of linear maps, arrays or quantized ones, and their product.

A quantized weight replaces an array among the parameters, with the same shape and axes. It is frozen: a product has a
gradient for x, not for the weight. LLM.int8(), Dettmers et al. 2022,
arXiv:2208.07339; QLoRA (NF4), Dettmers et al. 2023, arXiv:2305.14314; MXFP4, OCP Microscaling Formats 1.0, 2023.
"""

# I inputs, O outputs, M rows, E experts

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from model.kernels import mesh
from model.kernels.derivatives import differentiable
from model.kernels.grouped_matmul import grouped_matmul
from model.kernels.grouped_matmul.quantized import QUANTIZED_GROUPED_MATMUL, quantized_grouped_matmul
from model.kernels.grouped_matmul.sharded import Split, grouped_on_mesh
from model.kernels.quantized_matmul import QUANTIZED_MATMUL, QuantizedMatrix, quantized_matmul
from model.kernels.quantized_matmul.formats import Kind, widen
from model.packed import Packed

BITS = {"int8": 8, "fp8": 8, "int4": 4, "uint4": 4, "mxfp4": 4, "nf4": 4}


@flax.struct.dataclass
class Quantized:
    """Values of few bits, with a scale for each block of inputs of an output.

    Along an input axis there is a scale for each block, along other axes a scale for each value; blocks run along the
    last input axis first. So layers and experts can be sliced, and a mesh splits values and scales in the same way.
    """

    values: jax.Array  # the parameter's shape, the format's dtype
    scales: jax.Array  # float32 or float16, or uint8 with `scale_steps`
    kind: Kind = flax.struct.field(pytree_node=False)
    # input axes, counted from the last axis (negative)
    inputs: tuple[int, ...] = flax.struct.field(pytree_node=False)
    # float32, what one unit of 8-bit scales stands for: one for all scales of an output (double quantization)
    scale_steps: jax.Array | None = None
    offsets: jax.Array | None = None  # of uint4, like its scales: value times scale plus offset

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def float_scales(self) -> jax.Array:
        """The scales, float32; no gradient."""
        scales = self.scales.astype(jnp.float32)
        return jax.lax.stop_gradient(scales if self.scale_steps is None else scales * self.scale_steps)

    @property
    def block(self) -> int:
        """The number of inputs that share a scale."""
        return math.prod(self.shape[i] // self.scales.shape[i] for i in self.inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed values and the scales."""
        steps = 0 if self.scale_steps is None else self.scale_steps.size * 4
        offsets = 0 if self.offsets is None else self.offsets.size * self.offsets.dtype.itemsize
        scales = self.scales.size * self.scales.dtype.itemsize
        return self.values.size * BITS[self.kind] // 8 + scales + offsets + steps

    def dense(self, dtype: Any) -> jax.Array:
        """The dequantized array."""
        grid = [(n, size // n) for n, size in zip(self.scales.shape, self.shape, strict=True)]
        by_block = lambda scales: scales.reshape([part for n, _ in grid for part in (n, 1)])
        values = widen(self.values, self.kind).reshape([part for pair in grid for part in pair])
        values *= by_block(self.float_scales)
        if self.offsets is not None:
            values += by_block(self.offsets.astype(jnp.float32))
        return values.reshape(self.shape).astype(dtype)

    def matrix(self) -> QuantizedMatrix:
        """The weight as [I, O], with all input axes in one and all others in one."""
        places = [i % self.ndim for i in self.inputs]
        order = places + [i for i in range(self.ndim) if i not in places]
        inputs = math.prod(self.shape[i] for i in places)
        blocks = math.prod(self.scales.shape[i] for i in places)
        flat = lambda part, rows: part.transpose(order).reshape(rows, -1)
        scales = self.scales if self.scale_steps is None else self.float_scales
        offsets_NO = None if self.offsets is None else flat(self.offsets, blocks)
        return QuantizedMatrix(flat(self.values, inputs), flat(scales, blocks), self.kind, offsets_NO)

    def product(self, x_MI: jax.Array) -> jax.Array:
        """x times the weight as a matrix, [M, O], summed in float32."""
        return quantized_matmul(x_MI, self.matrix())

    def rows(self, index: jax.Array, dtype: Any) -> jax.Array:
        """Of a weight [outputs, inputs] some outputs, dequantized: indices [...] to [..., inputs]."""
        picked = jax.tree.map(lambda part: jnp.take(part, index, axis=0), self)
        return dataclasses.replace(picked, inputs=(-1,)).dense(dtype)

    def of_outputs(self, last: slice) -> Quantized:
        """A slice of the last axis, which is not an input."""
        return jax.tree.map(lambda part: part[..., last], self)

    def double_quantized(self) -> Quantized:
        """With scales of 8 bits, as in QLoRA (there a step is for 256 scales, here for those of an output).

        A scale is off by half a step at most, 1/510 of the output's largest.
        """
        steps = jnp.max(self.scales, axis=self.inputs, keepdims=True) / 255
        units = jnp.round(self.scales / jnp.where(steps > 0, steps, 1))
        return dataclasses.replace(self, scales=units.astype(jnp.uint8), scale_steps=steps)


Weight = jax.Array | Quantized | Packed


def dense(weight: Weight, dtype: Any) -> jax.Array:
    """The weight as an array."""
    return weight.dense(dtype) if isinstance(weight, (Quantized, Packed)) else jnp.asarray(weight, dtype)


def take_rows(weight: Weight, index: jax.Array, dtype: Any) -> jax.Array:
    """Of a weight [V, D] some rows: indices [...] to [..., D]."""
    if isinstance(weight, (Quantized, Packed)):
        return weight.rows(index, dtype)
    return jnp.take(weight, index, axis=0).astype(dtype)


def matmul(x: jax.Array, weight: Weight, spec: str, dtype: Any = None) -> jax.Array:
    """`jnp.einsum(spec, x, weight)` in `dtype` or that of `x`; with a quantized weight, summed in float32.

    The quantized kernel multiplies rows by all inputs of a weight. For another `spec`, and on a mesh of several
    devices, it is the plain product with the dequantized array.
    """
    if not isinstance(weight, (Quantized, Packed)):
        return jnp.einsum(spec, x, weight, preferred_element_type=dtype)
    x = x if dtype is None else x.astype(dtype)
    (x_axes, w_axes), y_axes = spec.split("->")[0].split(","), spec.split("->")[1]
    inputs = "".join(w_axes[i] for i in weight.inputs)
    outputs = "".join(letter for letter in w_axes if letter not in inputs)
    is_map = (
        set(inputs) <= set(x_axes) - set(y_axes)
        and not set(outputs) & set(x_axes)
        and set(outputs) <= set(y_axes)
    )
    if not is_map or mesh.ways(tuple(mesh.mesh_axes())) > 1:
        QUANTIZED_MATMUL.require_plain("it runs on one device" if is_map else f"it has no product {spec}")
        return jnp.einsum(spec, x, weight.dense(x.dtype), preferred_element_type=dtype)
    sizes = dict(zip(x_axes + w_axes, x.shape + weight.shape))
    rows = "".join(letter for letter in x_axes if letter not in inputs)
    x_MI = jnp.einsum(f"{x_axes}->{rows}{inputs}", x).reshape(-1, math.prod(sizes[i] for i in inputs))
    y = weight.product(x_MI).reshape([sizes[letter] for letter in rows + outputs])
    return jnp.einsum(f"{rows}{outputs}->{y_axes}", y)


def grouped_product(
    split: Split, x_MI: jax.Array, weight: Weight, sizes_E: jax.Array, names: tuple[str | None, str | None]
) -> jax.Array:
    """`grouped_on_mesh` of a weight [E, I, O].

    On one device the grouped kernel reads 8-bit weights with one scale an output; others are dequantized first.
    """
    if not isinstance(weight, (Quantized, Packed)):
        return grouped_on_mesh(split, x_MI, weight, sizes_E, names)
    if (
        isinstance(weight, Quantized)
        and not split.axes
        and BITS[weight.kind] == 8
        and weight.scales.shape[1] == 1
    ):
        return _grouped(x_MI, weight.values, weight.float_scales[:, 0], sizes_E)
    QUANTIZED_GROUPED_MATMUL.require_plain("it takes 8-bit weights with one scale an output, on one device")
    return grouped_on_mesh(split, x_MI, weight.dense(x_MI.dtype), sizes_E, names)


def _grouped_forward(x_MI: jax.Array, *weight: jax.Array) -> tuple[jax.Array, tuple]:
    return quantized_grouped_matmul(x_MI, *weight), weight


def _grouped_tangent(saved: tuple, moved: tuple) -> jax.Array:
    return quantized_grouped_matmul(moved[0], *saved)


def _grouped_backward(saved: tuple, d_MO: jax.Array) -> tuple:
    w_EIO, scales_EO, sizes_E = saved
    wide_EIO = (w_EIO.astype(jnp.float32) * scales_EO[:, None]).astype(d_MO.dtype)
    return grouped_matmul(d_MO, wide_EIO, sizes_E, transposed=True), None, None, None


_grouped = differentiable(_grouped_forward, _grouped_tangent, _grouped_backward)


def scale_axes(names: tuple[Any, ...], scales: Any) -> tuple[Any, ...]:
    """The axes of a weight's scales, logical or of a mesh: the weight's, or None if one scale is for a whole axis."""
    return tuple(None if n == 1 else name for name, n in zip(names, scales.shape, strict=True))


def shardings_like(params: Any, shardings: Any) -> Any:
    """The shardings of a tree with quantized weights, from those of dense parameters; scales are split like weights."""

    def of_leaf(leaf: Any, sharding: Any) -> Any:
        if not is_quantized(leaf) or is_quantized(sharding):
            return sharding

        def of_scales(scales: Any) -> Any:
            if scales is None or not isinstance(sharding, NamedSharding):
                return None if scales is None else sharding
            spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
            return NamedSharding(sharding.mesh, PartitionSpec(*scale_axes(spec, scales)))

        return dataclasses.replace(
            leaf,
            values=sharding,
            scales=of_scales(leaf.scales),
            scale_steps=of_scales(leaf.scale_steps),
            offsets=of_scales(leaf.offsets),
        )

    return jax.tree.map(of_leaf, params, shardings, is_leaf=is_quantized)


def in_whole_bytes(params: Any) -> Any:
    """int4 arrays on CPUs as int8, with the same bytes.

    JAX compares the layouts of int4 wrongly when it calls a program that was compiled ahead of time.
    """

    def of_leaf(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.dtype != jnp.int4 or next(iter(x.devices())).platform != "cpu":
            return x
        return jax.device_put(x.astype(jnp.int8), x.sharding)

    return jax.tree.map(of_leaf, params)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of parameters is quantized; also an `is_leaf` for `jax.tree.map`."""
    return isinstance(leaf, (Quantized, Packed))
