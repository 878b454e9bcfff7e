"""Loading in parts: each device reads its own slice, and memory holds the parameters and one tensor, no more."""

import math
import os
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from benchmarks.loading import peak_memory, write_made_up
from model import MESH_AXES, load, load_config, logical_axes, save
from model.formats.checkpoint import CHUNK_BYTES, stored_arrays
from model.formats.convert import convert
from model.formats.lazy import Lazy, Sliced, Stacked, place
from model.formats.storage import load_lazily
from model.layout import relayout
from model.sharding import ShardingRules, named_sharding

from .conftest import GOLDENS, random_params, tiny


def counting(array, read):
    """A Lazy of `array` that notes what is asked of it."""

    class Noting(Lazy):
        def __getitem__(self, index):
            read.append(array[index].size)
            return super().__getitem__(index)

    return Noting(array.shape, array.dtype, lambda: array)


def test_a_stack_of_lazy_arrays_is_sliced_like_an_array():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(4, 6)).astype(np.float32) for _ in range(5)]
    stack = Stacked([Lazy(a.shape, a.dtype, lambda a=a: a) for a in arrays])
    wanted = np.stack(arrays)
    for index in [(slice(1, 4), slice(0, 2), slice(3, 6)), (slice(None),) * 3]:
        np.testing.assert_array_equal(stack[index], wanted[index])
    np.testing.assert_array_equal(np.asarray(stack.astype("bfloat16")), wanted.astype("bfloat16"))
    assert (stack.shape, stack.nbytes) == (wanted.shape, wanted.nbytes)


def test_each_device_reads_its_own_slice_alone():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", "tensor"))
    arrays = [np.arange(8 * 6, dtype=np.float32).reshape(8, 6) + i for i in range(3)]
    read = []
    placed = place(Stacked([counting(array, read) for array in arrays]), sharding)
    np.testing.assert_array_equal(placed, np.stack(arrays))
    assert sum(read) == 3 * 8 * 6 and max(read) == 8 * 6 / 8


@pytest.mark.parametrize("name", ["llama_untied_sharded", "mixtral", "gpt_neox", "mamba2"])
def test_a_model_on_eight_devices_is_the_model(name):
    cfg = load_config(GOLDENS / name)
    sizes = {"fsdp": 2}
    mesh = jax.make_mesh([sizes.get(axis, 1) for axis in MESH_AXES], MESH_AXES)
    rules = ShardingRules(vocab=())
    shardings = jax.tree.map(
        lambda names: named_sharding(mesh, rules, names),
        logical_axes(cfg),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    alone, split = load(GOLDENS / name)[1], load(GOLDENS / name, shardings=shardings)[1]
    jax.tree.map(np.testing.assert_array_equal, alone, split)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))


def test_what_is_loaded_lazily_is_saved_as_it_was(tmp_path):
    cfg = tiny()
    params = random_params(cfg)
    save(tmp_path / "model", cfg, params, format="huggingface")
    again_cfg, again = load_lazily(tmp_path / "model")
    for format in ("huggingface", "native", "gguf"):
        path = tmp_path / f"again.{format}"
        save(path, again_cfg, again, format=format)
        jax.tree.map(np.testing.assert_array_equal, load(path)[1], params)


@pytest.mark.parametrize("scan", [False, True])
def test_a_checkpoint_is_converted_without_reading_more_than_a_layer_at_once(scan, tmp_path, monkeypatch):
    cfg = tiny(layers=4, scan=scan, param_dtype="bfloat16")
    params = random_params(cfg)
    save(tmp_path / "native", cfg, params)
    read, of = [], Sliced.__array__
    monkeypatch.setattr(
        Sliced, "__array__", lambda self, *a, **k: read.append(self.shape) or of(self, *a, **k)
    )
    again_cfg, again = load_lazily(tmp_path / "native")
    save(tmp_path / "folder", again_cfg, again, format="huggingface")
    assert (
        max(math.prod(shape) for shape in read) == 61 * 24
    )  # the embedding; four layers of a map would be more
    save(tmp_path / "again", again_cfg, again)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "again")[1], params)
    assert stored_arrays(tmp_path / "again") == stored_arrays(tmp_path / "native")
    _, whole = relayout(cfg, params, scan=False)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "folder")[1], whole)
    again_cfg, again = load_lazily(tmp_path / "native", dtype="float32")
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert ours.dtype == np.float32 and ours.shape == theirs.shape
        np.testing.assert_array_equal(np.asarray(ours), theirs.astype(np.float32))
        np.testing.assert_array_equal(ours[(slice(0, 2),) + (slice(None),) * (theirs.ndim - 1)], theirs[:2])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("source", ["native", "huggingface", "gguf"])
@pytest.mark.parametrize("scan", [False, True])
def test_a_value_that_float16_can_not_hold_is_an_error_that_names_its_tensor(source, scan, tmp_path):
    cfg = tiny(layers=2, scan=scan, dtype="float32", param_dtype="float32")
    params = random_params(cfg)
    path = tmp_path / ("model.gguf" if source == "gguf" else "model")
    for largest, fits in [(65504, True), (-70000, False)]:
        keys, leaf = jax.tree_util.tree_leaves_with_path(params)[-1]
        changed = leaf.at[(0,) * leaf.ndim].set(largest)
        leaves, tree = jax.tree.flatten(params)
        save(path, cfg, jax.tree.unflatten(tree, [*leaves[:-1], changed]), source)
        for name in ("hf", "native", "x.gguf"):
            target = tmp_path / f"{fits}-{name}"
            arguments = path, target, "native" if name == "native" else None, "float16", lambda _: {}
            if fits:
                convert(*arguments)
                continue
            with pytest.raises(ValueError, match=f"{keys[-1].key} has the value 7e\\+04.*Use bfloat16"):
                convert(*arguments)
            assert not target.exists()


def test_a_merged_value_that_float16_can_not_hold_is_an_error_too(tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(GOLDENS / "adapters" / "llama_lora", adapter)
    saved = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    safetensors.numpy.save_file(
        {k: v * np.float32(1e4) for k, v in saved.items()}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="with its adapter has values that float16 can't hold.*Use bfloat16"):
        convert(GOLDENS / "llama_tied", tmp_path / "merged", dtype="float16", adapter=adapter)
    assert not (tmp_path / "merged").exists()


def test_what_is_unpacked_is_unpacked_once_for_all_devices():
    made = []
    make = lambda: made.append(1) or np.ones((16, 3), np.float32)
    array = Lazy((16, 3), np.dtype(np.float32), make, unpacked=True)
    mesh = jax.make_mesh((8,), ("x",))
    placed = place(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    assert len(made) == 1 and placed.addressable_shards[0].data.shape == (2, 3)


@pytest.mark.skipif(not os.path.isfile("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize("experts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_peak_memory_is_the_parameters_and_one_tensor(experts, tmp_path):
    total, largest = write_made_up(tmp_path / "model", 64 if experts else 16, experts)
    allowed = 20e6  # threads and buffers
    assert peak_memory(tmp_path / "model", "mesh", tmp_path) < total + largest + allowed
    assert peak_memory(tmp_path / "model", "convert", tmp_path / "copy") < largest + allowed / 2
    if experts:  # a native checkpoint is written in chunks, each beside its compressed form
        in_chunks = largest + allowed + 2 * CHUNK_BYTES
        assert peak_memory(tmp_path / "model", "native", tmp_path / "native") < in_chunks < total
