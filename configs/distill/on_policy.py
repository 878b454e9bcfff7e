"""On-policy distillation with `python -m rl`: give config.init_from (the student) and config.algorithm.teacher.

Own prompts in place of tasks: --config.prompts=prompts.jsonl
"""

from configs.rl import sums


def get_config():
    config = sums.get_config()
    config.algorithm = {"kind": "OnPolicyDistillation", "teacher": "runs/teacher"}
    return config
