"""Model folders and files that anybody may have made: whatever they claim, they are refused at once."""

import json
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from model import load
from model.families import FAMILIES
from model.formats.huggingface import load_config

from .conftest import GOLDENS
from .test_families import config_of

SECONDS = 2.0  # on a busy machine; each takes a few milliseconds
BAD = (None, 0, -1, 2**31 - 1, 2**40, 1e300, float("nan"), "x", [], {}, [[]], True, "9" * 5000)


def leaves(saved, path=()):
    for key, value in saved.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def changed(saved, path, value):
    copy = json.loads(json.dumps(saved))
    node = copy
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    "name", sorted({"deepseek_v3_mtp", "falcon_rw", "blt", "falcon_h1", "recurrent_gemma", "t5"})
)
def test_any_value_of_any_key_gives_a_model_or_an_error_in_no_time(name):
    check_all_values(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDENS.glob("*/logits.npz")))
def test_any_value_of_any_key_of_any_family_gives_a_model_or_an_error_in_no_time(name):
    check_all_values(name)


def check_all_values(name):
    saved = config_of(GOLDENS / name)
    family = FAMILIES[saved["model_type"]]
    for path in leaves(saved):
        for value in BAD:
            start = time.monotonic()
            try:
                family.read_config(changed(saved, path, value))
            except ValueError:
                pass
            assert time.monotonic() - start < SECONDS, (path, value)


# golden folder -> what its config.json claims, and what the error says
CLAIMS = [
    (
        "llama_tied",
        {"num_hidden_layers": 2**31 - 1},
        "num_hidden_layers=2147483647 is not an integer from 1 to 4096",
    ),
    ("llama_tied", {"num_hidden_layers": 4096}, "has 4096 layers, but only 38 tensors"),
    (
        "llama_tied",
        {"num_attention_heads": 2**30, "num_key_value_heads": 2**30},
        "num_attention_heads=1073741824 is more",
    ),
    (
        "llama_tied",
        {"head_dim": 2**30},
        r"head_dim=1073741824, but the largest of its tensors has 2988 numbers",
    ),
    ("llama_tied", {"vocab_size": 2**31 - 1}, "vocab_size=2147483647, but the largest"),
    ("llama_tied", {"hidden_size": 2**31 - 1, "head_dim": 6}, "width=2147483647, but the largest"),
    ("llama_tied", {"intermediate_size": 2**31 - 1}, "width=2147483647, but the largest"),
    ("llama_tied", {"max_position_embeddings": 2**31 - 1, "hidden_size": 38}, "would be"),
    ("mixtral", {"num_local_experts": 100_000}, "has 400000 experts in all layers, but only"),
    ("gpt_oss", {"num_local_experts": 2**31 - 1}, "num_experts=2147483647, but the largest"),
    ("deepseek_v3_mtp", {"num_nextn_predict_layers": 2**31 - 1}, "is not an integer from 0 to 64"),
    ("deepseek_v3_mtp", {"n_routed_experts": 100_000, "n_group": 1}, "experts in all layers, but only"),
    ("glm4_moe_mtp", {"num_nextn_predict_layers": 64, "num_hidden_layers": 4096}, "layers, but only"),
    ("gpt2", {"n_positions": 2**31 - 1}, "positions.length=2147483647, but the largest"),
    ("bert", {"type_vocab_size": 2**31 - 1}, "token_types=2147483647, but the largest"),
    ("mamba", {"state_size": 2**31 - 1}, "state_dim=2147483647, but the largest"),
    ("mamba2", {"conv_kernel": 2**31 - 1}, "conv_width=2147483647, but the largest"),
    ("t5", {"relative_attention_num_buckets": 2**31 - 1}, "buckets=2147483647"),
    ("t5", {"num_layers": 4096}, "layers, but only"),
    ("blt", {"encoder_hash_byte_group_vocab": 2**31 - 1}, "buckets=2147483647"),
    ("rwkv7", {"decay_low_rank_dim": 2**31 - 1}, "decay_rank=2147483647, but the largest"),
    ("qwen3_next", {"linear_key_head_dim": 2**31 - 1}, "key_dim=2147483647, but the largest"),
    ("qwen2_moe", {"mlp_only_layers": list(range(300_000))}, "lacks|no place"),
    ("falcon_rw", {"num_attention_heads": None}, "num_attention_heads=71 is more than the width of 32"),
]


def folder_with(tmp_path, name, **claims):
    """The golden weights beside a config that claims something else."""
    for file in (GOLDENS / name).glob("model*"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(config_of(GOLDENS / name) | claims))
    return tmp_path


@pytest.mark.parametrize(
    "name, claims, message", CLAIMS, ids=[f"{name} {str(claims)[:40]}" for name, claims, _ in CLAIMS]
)
def test_what_the_weights_cannot_hold_is_refused_before_anything_is_made(name, claims, message, tmp_path):
    folder = folder_with(tmp_path, name, **claims)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert time.monotonic() - start < SECONDS and "config.json" in str(caught.value)


@pytest.mark.slow
def test_the_refusals_take_little_memory(tmp_path):
    """All of them in a process of its own, whose memory is bounded."""
    program = (
        "import re, resource, sys\n"
        "from model import load\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))\n"
        "for folder in sys.argv[1:]:\n"
        "    try: load(folder)\n"
        "    except ValueError: continue\n"
        "    raise SystemExit(f'{folder} was read')\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])  # ru_maxrss has the parent's\n"
    )
    folders = []
    for i, (name, claims, _) in enumerate(CLAIMS):
        (tmp_path / str(i)).mkdir()
        folders.append(str(folder_with(tmp_path / str(i), name, **claims)))
    command = [sys.executable, "-c", program, *folders]
    run = subprocess.run(command, capture_output=True, text=True, cwd=GOLDENS.parents[1])
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) < 2 * 2**20  # KiB


@pytest.mark.parametrize(
    "text, message",
    [
        (b"[" * 100_000, "not JSON"),
        (b'{"model_type": "llama", "hidden_size": ' + b"9" * 100_000 + b"}", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"model_type": ["llama"]}', "model_type=.*is not known"),
        (b'{"model_type": "' + b"x" * 10_000 + b'"}', "is not known"),
        (b'{"model_type": "llama", "quantization_config": [1]}', "quant_method='None' is not supported"),
        (b'{"model_type": "gemma3", "text_config": []}', "needs a text_config"),
    ],
)
def test_a_config_that_is_no_config_is_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        load_config(tmp_path)
    assert time.monotonic() - start < SECONDS and len(str(caught.value)) < 2000


def header_file(path, entries):
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def test_many_names_with_one_of_them_twice_are_refused_at_once(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(GOLDENS / "llama_tied")))
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [f'"t{i}":{entry}' for i in range(60_000)]
    header_file(tmp_path / "model.safetensors", ("{" + ",".join([*names, names[-1]]) + "}").encode())
    start = time.monotonic()
    with pytest.raises(ValueError, match="the name 't59999' is there twice"):
        load(tmp_path)
    assert time.monotonic() - start < 5  # half a second on a quiet machine, to read 60,000 names


def test_many_empty_tensors_are_no_layers(tmp_path):
    """Names enough for all layers, without a number in them."""
    saved = config_of(GOLDENS / "llama_tied") | {"num_hidden_layers": 4000, "head_dim": 2**20}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    empty = {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(4000)]
    header_file(tmp_path / "model.safetensors", dict.fromkeys(names, empty))
    start = time.monotonic()
    with pytest.raises(ValueError, match="but the largest of its tensors has 0 numbers"):
        load(tmp_path)
    assert time.monotonic() - start < SECONDS


def test_many_layers_of_two_kinds_in_turns_are_looked_at_in_no_time(tmp_path):
    """Each kind is looked at once, however often it begins anew."""
    kinds = ["sliding_attention", "full_attention"] * 2000
    saved = config_of(GOLDENS / "gemma2") | {"num_hidden_layers": 4000, "layer_types": kinds}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    entries = {
        f"model.layers.{i}.self_attn.q_proj.weight": {
            "dtype": "F32",
            "shape": [1],
            "data_offsets": [4 * i, 4 * i + 4],
        }
        for i in range(4000)
    }
    entries["whole"] = {"dtype": "F32", "shape": [10_000], "data_offsets": [16_000, 56_000]}
    header_file(tmp_path / "model.safetensors", entries)
    with open(tmp_path / "model.safetensors", "ab") as file:
        file.write(bytes(56_000))
    start = time.monotonic()
    with pytest.raises(ValueError, match="lacks 40002 tensors"):
        load(tmp_path)
    assert time.monotonic() - start < 4 * SECONDS


@pytest.mark.parametrize(
    "file", ["../../etc/passwd", "/etc/passwd", "sub/model.safetensors", "..", "a\0.safetensors", 5]
)
def test_an_index_names_files_beside_it(file, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(GOLDENS / "llama_tied")))
    index = {"weight_map": {"model.norm.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="wanted a .safetensors file beside it|which is not there|null byte"):
        load(tmp_path)


LENGTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
GGUF_CLAIMS = [
    ({"llama.attention.head_count": 2**31 - 1, "llama.attention.head_count_kv": 1}, "key_length|head"),
    (
        {"llama.attention.key_length": 2**31 - 2, "llama.attention.value_length": 2**31 - 2},
        "dimension_count is 6",
    ),
    (
        {
            f"llama.{key}": 2**31 - 2
            for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")
        },
        "head_dim=2147483646, but the largest of its tensors",
    ),
    ({"llama.block_count": 38}, "lacks"),
    ({"llama.context_length": 2**31 - 1, "llama.block_count": 2**31 - 1}, "block_count is 2147483647"),
    ({"llama.feed_forward_length": 2**31 - 1}, "width=2147483647, but the largest of its tensors"),
    ({"split.count": 65535, "split.no": 0}, "is part 1 of 65535 of a model; wanted the name"),
    ({"split.count": 2, "split.no": 5}, "split.no and split.count are"),
    ({"split.count": "many"}, "split.no and split.count are"),
]


@pytest.mark.parametrize("claims, message", GGUF_CLAIMS, ids=[str(claims)[:50] for claims, _ in GGUF_CLAIMS])
def test_what_a_gguf_file_cannot_hold_is_refused_before_anything_is_made(claims, message, tmp_path):
    from model.formats.gguf import container
    from model.formats.gguf.container_writer import write

    file = container.read(GOLDENS / "llama_tied.gguf")
    tensors = {name: file.raw(name).view("<f4").reshape(of.shape) for name, of in file.tensors.items()}
    kinds = {name: ("F32", values.shape) for name, values in tensors.items()}
    write(tmp_path / "model.gguf", file.metadata | claims, kinds, tensors.__getitem__)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model.gguf")
    assert time.monotonic() - start < SECONDS


def raw_gguf(metadata=b"", tensors=b"", count=0, keys=0, tail=b"\0" * 64):
    return struct.pack("<4sIQQ", b"GGUF", 3, count, keys) + metadata + tensors + tail


def string(text):
    return struct.pack("<Q", len(text)) + text


GGUF_BYTES = [
    (raw_gguf(count=2**63), "tensor count is 9223372036854775808, more than"),
    (raw_gguf(keys=2**63), "metadata count is 9223372036854775808, more than"),
    (
        raw_gguf(string(b"a") + struct.pack("<IIQ", 9, 4, 2**62), keys=1),
        "length of array 'a' is 4611686018427387904",
    ),
    (
        raw_gguf(string(b"a") + struct.pack("<IIQ", 9, 8, 2**60), keys=1),
        "length of array 'a' is 1152921504606846976",
    ),
    (
        raw_gguf(string(b"a") + struct.pack("<IQ", 8, 2**63), keys=1),
        "length of value of 'a' is 9223372036854775808",
    ),
    (raw_gguf(string(b"a") + struct.pack("<IIQ", 9, 9, 1), keys=1), "arrays of arrays are not read"),
    (
        raw_gguf(tensors=string(b"t") + struct.pack("<I4QIQ", 4, *[2**40] * 4, 0, 0), count=1),
        "which no array has",
    ),
    (
        raw_gguf(tensors=string(b"t") + struct.pack("<IQIQ", 1, 8, 0, 2**40), count=1),
        "at byte .* but the file has",
    ),
    (
        raw_gguf(tensors=string(b"t") + struct.pack("<IQIQ", 1, 8, 0, 2**64 - 32), count=1),
        "at byte .* but the file has",
    ),
    (raw_gguf(tensors=string(b"t") + struct.pack("<I", 2**31), count=1), "dimensions of 't' are 2147483648"),
    (raw_gguf(tensors=(string(b"t") + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2, count=2), "'t' is there twice"),
]


@pytest.mark.parametrize("content, message", GGUF_BYTES, ids=[message[:40] for _, message in GGUF_BYTES])
def test_a_gguf_header_that_lies_is_refused(content, message, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model.gguf")
    assert time.monotonic() - start < SECONDS


def test_a_folder_that_is_honest_is_read():
    """None of the bounds is in the way of a real one."""
    assert np.isfinite(np.asarray(load(GOLDENS / "qwen3_next")[1]["embedding"])).all()
