"""Makes tests/goldens/keys.json: what transformers makes of a golden checkpoint when one key of its config changes.

    .venvs/goldens/bin/python tests/goldens/make_keys.py [folder ...]   (all, or these alone; environment: see make.py)

Every key that a config.json has, or that transformers' code of the family names, gets other values, one at a time, and
the weights stay. Then either transformers computes the same ("same"), or its logits are other ("logits": a few of
them), or it refuses the config or breaks ("error"), or the weights do not fit ("weights": tensors are missing, left
over, or of another shape). Keys that only other families have are set too ("foreign").
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make import HERE, auto, logits  # beside this file

Case = list[Any]  # [[path, ...], value]; a path is a list of keys into nested objects

# One checkpoint of each family, and those of its variants that read other keys.
NAMES = (
    "llama_tied mistral_windowed qwen2_windowed qwen2 qwen3 gemma gemma2 gemma3_text olmo2 olmo3 granite smollm3 phi3 "
    "phi3_partial cohere starcoder2 gpt2 gpt_neox bloom mpt falcon_7b falcon_40b falcon_rw mixtral qwen2_moe qwen3_moe "
    "olmoe deepseek_v2 deepseek_v2_yarn deepseek_v3 glm4_moe gpt_oss llama4_text bert bert_bare bert_classes "
    "modernbert t5 flan_t5 blt mamba mamba2 jamba falcon_h1 recurrent_gemma qwen3_next dbrx"
).split()
ABSENT = {"absent": True}  # in place of a value: the key is not there
SKIPPED = "architectures model_type transformers_version dtype torch_dtype vocab_size".split()
SKIPPED += [
    "rescale_prenorm_residual"
]  # of the initial weights; transformers 5.23 rescales those that it has read too
CODE = (
    "_attn_implementation _attn_implementation_internal _experts_implementation to_dict get_text_config from_dict "
    "update save_pretrained get from_pretrained num_labels __class__ name_or_path to_diff_dict pruned_heads "
    "torchscript _output_attentions per_layer_type_rope architectures per_layer_config is_heterogeneous"
).split()
ACTIVATIONS = ("gelu", "relu")
STRINGS = {
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "scoring_func": ("softmax", "sigmoid"),
    "feed_forward_proj": ("gelu", "gated-relu"),
    "position_embedding_type": ("relative_key",),
    "norm_type": ("layernorm", "rmsnorm"),
    "time_step_rank": (4,),
    "mamba_d_head": (12,),
    "patching_mode": ("entropy", "space"),
}
# Other values where the usual ones say nothing.
VALUES: dict[str, tuple[Any, ...]] = {
    "sliding_window": (3, None),
    "attention_window_size": (2,),
    "local_attention_window_len": (3,),
    "attention_chunk_size": (3, None),
    "local_attention": (2,),
    "num_experts_per_tok": (1,),
    "moe_top_k": (1,),
    "max_window_layers": (0, 1),
    "query_pre_attn_scalar": (5,),
    "clip_qkv": (0.3, None),
    "softmax_scale": (0.9, None),
    "attn_logit_softcapping": (0.7, None),
    "final_logit_softcapping": (0.7, None),
    "logits_soft_cap": (0.7,),
    "time_step_limit": ([0.3, 0.4],),
    "topk_group": (2,),
    "n_group": (1, 3),
    "mlp_only_layers": ([], [0]),
    "no_rope_layers": ([1, 1, 1, 1, 1], [0, 1, 0, 1]),
    "layer_types": (
        ["full_attention"] * 4,
        ["sliding_attention"] * 5,
        ["full_attention", "sliding_attention"] * 2,
    ),
    "block_types": (["attention"], ["recurrent", "attention"]),
    "moe_layers": ([0], []),
    "is_decoder": (True,),
    "is_causal": (False,),
    "attn_scale": (0.9,),
    "floor_scale": (2,),
    "rope_theta": (77.0,),
    "moe_normalize_expert_weights": (2.0, None),
    "ffn_act_fn": ({"name": "gelu"}, {"name": "relu"}),
    "original_max_position_embeddings": (8, 64),
    "max_position_embeddings": (2000,),
    "partial_rotary_factor": (0.5,),
    "dense_act_fn": ("gelu", "silu"),
    "max_patch_length": (2,),
    "patching_threshold": (2.0,),
    "router_bias": (True,),
    "num_logits_to_keep": (1,),
}
# Said to be without effect in every family, and in no config above.
WITHOUT_EFFECT: dict[str, Any] = {
    "auto_map": {"AutoModel": "own.Model"}, "name_or_path": "x", "tokenizer_class": "T", "prefix": "x",
    "torchscript": True, "use_bfloat16": True, "remove_invalid_values": True, "finetuning_task": "x",
    "task_specific_params": {"a": {}}, "init_std": 0.3, "attn_dropout": 0.3, "resid_dropout": 0.3, "emb_dropout": 0.3,
    "ffn_dropout": 0.3, "dropout": 0.3, "router_z_loss_coef": 0.3, "unk_token_id": 3, "cls_token_id": 3,
    "sep_token_id": 3, "attn_implementation": "eager", "num_labels": 2, "model_max_length": 99,
    "attention_probs_dropout_prob": 0.3,
}  # fmt: skip
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = [
    {"rope_type": "linear", "factor": 3.0},
    {"type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN, "attention_factor": 1.4, "beta_fast": 8.0, "beta_slow": 2.0},
    {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
    {"factor": 3.0},
]  # fmt: skip


def main(wanted: list[str]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    file = HERE / "keys.json"
    found = json.loads(file.read_text()) if wanted and file.exists() else {}
    all_foreign = foreign_keys()
    for name in wanted or NAMES:
        found[name] = sweep(name, all_foreign)
        counts = {kind: len(cases) for kind, cases in found[name].items()}
        print(name, counts, flush=True)
        text = ",\n".join(f" {json.dumps(key)}: {_lines(value)}" for key, value in sorted(found.items()))
        file.write_text("{\n" + text + "\n}\n")


def _lines(kinds: dict[str, list[Case]]) -> str:
    """One case a line."""
    inside = [
        f'  "{kind}": [\n' + ",\n".join("   " + json.dumps(case) for case in cases) + "]"
        for kind, cases in kinds.items()
    ]
    return "{\n" + ",\n".join(inside) + "\n }"


def sweep(name: str, all_foreign: dict[str, Any]) -> dict[str, list[Case]]:
    saved = json.loads((HERE / name / "config.json").read_text())
    base, found = outcome(name, saved), {"same": [], "logits": [], "weights": [], "foreign": []}
    assert isinstance(base, np.ndarray)
    for edits in cases_of(name, saved):
        result = outcome(name, edited(saved, edits))
        if isinstance(result, str):
            found.get(result, []).append([edits])
        elif np.allclose(result, base, atol=2e-5, rtol=1e-5):
            found["same"].append([edits])
        else:
            found["logits"].append([edits, digest(result)])
    known = set(saved) | {key for key, _ in read_by_code(saved["model_type"])}
    known |= transformers.CONFIG_MAPPING[saved["model_type"]].attribute_map.keys()
    known |= {"type_vocab_size"}  # by which make.py chooses its inputs
    foreign = {key: value for key, value in all_foreign.items() if key not in known}
    for edits in without_effect(name, saved, base, [[[[key], value]] for key, value in foreign.items()]):
        found["foreign"].append([edits])
    return found


def without_effect(name: str, saved: dict, base: np.ndarray, cases: list) -> list:
    """Those of the cases that change nothing, found by halves."""
    result = outcome(name, edited(saved, [edit for case in cases for edit in case]))
    if not isinstance(result, str) and np.allclose(result, base, atol=2e-5, rtol=1e-5):
        return cases
    if len(cases) == 1:
        print("  not without effect:", name, cases, result if isinstance(result, str) else "")
        return []
    middle = len(cases) // 2
    return without_effect(name, saved, base, cases[:middle]) + without_effect(
        name, saved, base, cases[middle:]
    )


def edited(saved: dict, edits: list) -> dict:
    changed = json.loads(json.dumps(saved))
    for path, value in edits:
        node = changed
        for key in path[:-1]:
            node = node[key]
        if value == ABSENT:
            node.pop(path[-1], None)
        else:
            node[path[-1]] = value
    return changed


def cases_of(name: str, saved: dict) -> list:
    cases = [[[path, value]] for path, old in leaves(saved) for value in others(path[-1], old)]
    named = [(key, value) for key, value in read_by_code(saved["model_type"]) if key not in saved]
    cases += [[[[key], value]] for key, old in named for value in others(key, old)]
    cases += [[[["is_causal"], False]]]
    for alias, key in transformers.CONFIG_MAPPING[saved["model_type"]].attribute_map.items():
        cases += [
            [[[key], ABSENT], [[alias], value]] for value in (saved.get(key), *others(alias, saved.get(key)))
        ]
    if "rope_parameters" in saved:
        cases += rope_cases(saved)
    unique = {json.dumps(case): case for case in cases}
    return list(unique.values())


def rope_cases(saved: dict) -> list:
    """Keys of rotary positions in every place in which they can stand."""
    cases = [[[["partial_rotary_factor"], 0.5]], [[["rope_theta"], 77.0]]]
    cases += [[[["rope_parameters"], None], [["rope_theta"], 77.0]]]
    cases += [
        [[["rope_scaling"], SCALINGS[0]]],
        [[["rope_parameters"], None], [["rope_scaling"], SCALINGS[1]]],
    ]
    cases += [
        [[["rope_parameters"], None], [["rope_scaling"], scaling], [["rope_theta"], 77.0]]
        for scaling in (SCALINGS[0], SCALINGS[-1])
    ]
    nested = [kind for kind, part in saved["rope_parameters"].items() if isinstance(part, dict)]
    for path in [["rope_parameters", kind] for kind in nested] or [["rope_parameters"]]:
        cases += [[[path, scaling | {"rope_theta": 500.0}]] for scaling in SCALINGS]
        extras = {
            "partial_rotary_factor": 0.5,
            "mscale": 0.5,
            "factor": 3.0,
            "beta_fast": 3.0,
            "truncate": False,
        }
        cases += [[[[*path, key], value]] for key, value in extras.items()]
    return cases


def leaves(saved: dict, path: tuple[str, ...] = ()) -> list[tuple[list[str], Any]]:
    found = []
    for key, value in saved.items():
        if key in SKIPPED or key in ("id2label", "label2id"):
            continue
        if isinstance(value, dict) and value and key != "ffn_act_fn":
            found += leaves(value, (*path, key))
        else:
            found.append(([*path, key], value))
    return found


def others(key: str, value: Any) -> list[Any]:
    """Other values of a key."""
    if key in VALUES:
        given = VALUES[key]
    elif key in STRINGS:
        given = STRINGS[key]
    elif key in (
        "hidden_act",
        "hidden_activation",
        "activation",
        "activation_function",
        "classifier_activation",
    ):
        given = ACTIVATIONS
    elif isinstance(value, bool):
        given = (not value,)
    elif isinstance(value, int):
        given = (2 * value,) if value > 0 else (value + 1,)
    elif isinstance(value, float):
        given = (round(1.7 * value, 15),) if value else (0.3,)
    elif value is None:
        given = (3, True)
    elif isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        given = (value[::-1],)
    else:
        given = ()
    return [other for other in given if other != value]


def read_by_code(model_type: str) -> list[tuple[str, Any]]:
    """The keys that transformers' code of a family names, with what the family's class has for them."""
    module = model_type.removesuffix("_text")
    folder = Path(transformers.__file__).parent / "models" / module
    text = (folder / f"modeling_{module}.py").read_text() + (
        folder / f"configuration_{module}.py"
    ).read_text()
    names = set(re.findall(r"\bconfig\.([a-z]\w+)", text))
    names |= set(re.findall(r"getattr\((?:self\.)?config, \"(\w+)\"", text))
    names |= set(re.findall(r"kwargs\.(?:pop|get)\(\"(\w+)\"", text))
    kind = transformers.CONFIG_MAPPING[model_type]()
    values = [(name, getattr(kind, name, None)) for name in sorted(names - set(CODE) - set(SKIPPED))]
    return [(name, value) for name, value in values if not callable(value) and not hasattr(value, "to_dict")]


def foreign_keys() -> dict[str, Any]:
    """Of all families, each key with a value that no default is."""
    found: dict[str, Any] = {}
    for name in NAMES:
        saved = json.loads((HERE / name / "config.json").read_text())
        for key, value in saved.items():
            values = others(key, value)
            if key not in SKIPPED and not key.endswith("token_id") and values:
                found.setdefault(key, values[0])
    return dict(sorted((found | WITHOUT_EFFECT).items()))


def outcome(name: str, saved: dict) -> np.ndarray | str:
    with tempfile.TemporaryDirectory() as folder:
        for file in (HERE / name).glob("model*"):
            (Path(folder) / file.name).symlink_to(file)
        (Path(folder) / "config.json").write_text(json.dumps(saved))
        falcon = name in ("falcon_rw", "falcon_7b", "falcon_40b")  # eager adds ALiBi twice, see make.py
        attention = "sdpa" if falcon else "eager"
        try:
            with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
                model, loading = auto(name).from_pretrained(
                    folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )  # fmt: skip
                tied = set(getattr(model, "all_tied_weights_keys", {}))
                tied = {re.sub(r"^model\.", "", key) for key in tied} | tied
                missing = set(loading["missing_keys"]) - tied
                if missing or loading["unexpected_keys"] or loading["mismatched_keys"]:
                    return "weights"
                return few(logits(model.eval()))
        except Exception:
            return "error"


def few(found: dict[str, np.ndarray]) -> np.ndarray:
    """Numbers at the ends of a row from the start, of one that starts late, and of its first token."""
    if "classes" in found:
        return found["classes"][:2].ravel()
    values = found["logits" if "logits" in found else "hidden"]
    return np.concatenate([values[0, 12], values[1, 8], values[1, 1]])


def digest(values: np.ndarray) -> list[float]:
    return [float(f"{value:.7g}") for value in values[:: max(1, len(values) // 9)]]


if __name__ == "__main__":
    main(sys.argv[1:])
