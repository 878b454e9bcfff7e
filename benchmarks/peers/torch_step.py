"""The peer of `benchmarks.train_step`: the same step in PyTorch with transformers' model, in the peer's own venv.

Reads a line with a number of steps, takes them and answers with a line of JSON, until its input ends.
"""

import argparse
import json
import resource
import sys
import time

import torch
import transformers


def llama(options):
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=options.length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def mixture(options):
    config = transformers.MixtralConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=options.length,
        tie_word_embeddings=True,
        use_cache=False,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    config._experts_implementation = "eager"  # a loop over experts
    return transformers.MixtralForCausalLM(config)


def mamba2(options):
    config = transformers.Mamba2Config(
        vocab_size=4096,
        hidden_size=512,
        num_hidden_layers=14,
        expand=2,
        num_heads=16,
        head_dim=64,
        state_size=64,
        n_groups=1,
        chunk_size=128,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.Mamba2ForCausalLM(config)


MODELS = {"llama": llama, "moe": mixture, "mamba2": mamba2}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = MODELS[options.model](options)
    forward = torch.compile(model) if options.compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, 4096, (options.rows, options.length))

    def step():
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    start = time.perf_counter()
    loss = step()
    first = time.perf_counter() - start
    say(seconds=first, loss=loss, parameters=sum(p.numel() for p in model.parameters()))
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - start)
        say(seconds=seconds, loss=loss)


def say(**answer):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(answer | {"peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
