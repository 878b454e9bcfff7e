"""The demo's stages, each a few steps long."""

from configs.demo import get_config as demo


def get_config():
    c = demo()
    c.corpus.curation.sources = (
        {"kind": "PythonStdlib", "code": False, "topics": False, "max_bytes": 1_000_000},
    )
    c.corpus.curation.update(validation_fraction=0.2, test_fraction=0.2)
    c.corpus.tokenizer.vocab_size = 512
    c.corpus.tokenizer.task_problems = 50
    c.dialogues.update(dialogues=60, pairs=20, validation=20)
    c.pretrain.model.update(width=32, layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn_width=64)
    c.pretrain.data.update(seq_len=128, batch_size=4, validation_batches=1)
    c.pretrain.update(steps=20, validate_every=10)
    c.pretrain.samples.every = 10
    c.sft.update(steps=10)
    c.dpo.update(steps=6)
    for stage in (c.pretrain, c.sft, c.dpo):
        stage.log_every = 2
        stage.checkpoint.every = 2
    c.rl.update(problems=50, steps=4, evaluate_every=2, evaluate_problems=8)
    c.rl.rollout.update(prompts=4, group=4, seq_len=64)
    c.rl.algorithm.minibatches = 2
    c.rl.checkpoint.every = 1
    c.evals.tasks = ({**c.evals.tasks[0], "problems": 16},)
    return c
