"""Makes losses.npz with TRL and OpenRLHF: losses of post-training and their gradients, float32, on random inputs.

    .venvs/goldens/bin/python tests/goldens/make_losses.py     (torch==2.13.0 trl==1.16.0 openrlhf==0.11.2)

The trainers are not built: their own loss methods are called on a stand-in that has the attributes that they read, with
a stand-in for the model that returns given log-probabilities. Keys are NAME/loss and NAME/grad_ARGUMENT; the gradient
is that of the mean loss.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections import defaultdict
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer

HERE = Path(__file__).parent
B, T, V = 6, 7, 11


def main() -> None:
    rng = np.random.default_rng(0)
    found = inputs(rng)
    leaf = lambda name: torch.tensor(found[name], requires_grad=found[name].dtype == np.float32)
    for name, run in (LOSSES | OPENRLHF).items():
        given = {key: leaf(key) for key in found if "/" not in key}
        loss = run(given)
        loss.backward()
        found[f"{name}/loss"] = loss.detach().numpy()
        found |= {
            f"{name}/grad_{key}": x.grad.numpy()
            for key, x in given.items()
            if x.requires_grad and x.grad is not None
        }
    np.savez_compressed(HERE / "losses.npz", **found)
    print(f"{len(LOSSES | OPENRLHF)} losses of trl {trl.__version__} and OpenRLHF 0.11.2")


def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows 2n and 2n + 1 are a pair where a loss wants pairs; padding is at the end of rows, as in a batch."""
    lengths = np.array([7, 4, 1, 5, 7, 3])
    mask = (np.arange(T) < lengths[:, None]).astype(np.float32)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    logprobs = -np.abs(normal(B, T))
    return {
        "mask": mask.astype(np.int64),
        "logprobs": logprobs,
        "old_logprobs": (logprobs + 0.3 * normal(B, T)).astype(np.float32),
        "ref_logprobs": (logprobs + 0.5 * normal(B, T)).astype(np.float32),
        "kl_logprobs": (logprobs + 0.4 * normal(B, T)).astype(np.float32),
        "desired": np.array([1, 0, 0, 1, 1, 0]),
        "advantages": normal(B),
        "token_advantages": normal(B, T),
        "values": normal(B, T),
        "old_values": normal(B, T),
        "returns": normal(B, T),
        "rewards": 2 * normal(B),
        "margins": np.abs(normal(B // 2)),
        "student_logits": 3 * normal(B, T, V),
        "teacher_logits": 3 * normal(B, T, V),
    }


def stand_in(**attributes) -> MagicMock:
    trainer = MagicMock()
    trainer.model.training = True
    trainer.accelerator.device = "cpu"
    trainer.accelerator.num_processes = 1
    for name in ("gather", "gather_for_metrics"):
        setattr(trainer.accelerator, name, lambda x: x)
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer.aux_loss_enabled = False
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def language_model(logprobs: torch.Tensor, mask: torch.Tensor):
    """A model whose output has the log-probabilities of given tokens."""
    zeros = torch.zeros_like(logprobs)
    output = types.SimpleNamespace(
        log_probs=logprobs * mask,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        log_sum_sq_probs=zeros,
    )
    return lambda **kwargs: output


def halves(x: torch.Tensor) -> torch.Tensor:
    """Rows in TRL's order: all chosen ones, then all rejected ones."""
    return torch.cat([x[0::2], x[1::2]])


def with_prompt(mask: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)


def dpo(kind: str, beta: float, label_smoothing: float = 0.0):
    def run(given):
        mask = halves(given["mask"])
        trainer = stand_in(
            loss_types=[kind], loss_weights=[1.0], beta=beta, label_smoothing=label_smoothing, ld_alpha=None
        )
        trainer.precompute_ref_logps, trainer.use_weighting, trainer.f_divergence_type = (
            False,
            False,
            "reverse_kl",
        )
        trainer.ref_model = language_model(halves(given["ref_logprobs"]), mask)
        model = language_model(halves(given["logprobs"]), mask)
        completion_mask = with_prompt(mask)
        batch = {"input_ids": torch.zeros_like(completion_mask), "completion_mask": completion_mask}
        batch["attention_mask"] = torch.ones_like(completion_mask)
        return trl.DPOTrainer._compute_loss(trainer, model, batch, False)

    return run


def kto(beta: float, desired: float, undesired: float):
    def run(given):
        mask = given["mask"]
        trainer = stand_in(
            beta=beta,
            desirable_weight=desired,
            undesirable_weight=undesired,
            loss_type="kto",
            calculate_KL=True,
        )
        trainer.precompute_ref_logps = False
        sums = iter([(given["kl_logprobs"] * mask).sum(-1), (given["ref_logprobs"] * mask).sum(-1)])
        trainer._compute_kl_logps = lambda model, batch: next(sums)
        trainer.ref_model = language_model(given["ref_logprobs"], mask)
        completion_mask = with_prompt(mask)
        batch = {"input_ids": torch.zeros_like(completion_mask), "completion_mask": completion_mask}
        batch |= {"attention_mask": torch.ones_like(completion_mask), "label": given["desired"]}
        return trl.KTOTrainer._compute_loss(trainer, language_model(given["logprobs"], mask), batch, False)

    return run


def sums(given, average: bool) -> tuple[torch.Tensor, torch.Tensor]:
    mask = given["mask"]
    total = (given["logprobs"] * mask).sum(-1)
    if average:
        total = total / mask.sum(-1)
    return total[0::2], total[1::2]


def cpo(kind: str, beta: float, gamma: float = 0.0, label_smoothing: float = 0.0, average: bool = False):
    def run(given):
        trainer = stand_in(
            alpha=0.0, beta=beta, simpo_gamma=gamma, label_smoothing=label_smoothing, loss_type=kind
        )
        return CPOTrainer.cpo_loss(trainer, *sums(given, average))[0].mean()

    return run


def orpo(beta: float):
    def run(given):
        chosen, rejected = sums(given, average=True)
        return (-chosen - ORPOTrainer.odds_ratio_loss(stand_in(beta=beta), chosen, rejected)[0]).mean()

    return run


def reward(margin: bool, centring: float | None):
    def run(given):
        trainer = stand_in(args=types.SimpleNamespace(center_rewards_coefficient=centring))
        output = types.SimpleNamespace(logits=halves(given["rewards"])[:, None])
        batch = {"attention_mask": torch.ones(B, T)} | ({"margin": given["margins"]} if margin else {})
        return trl.RewardTrainer.compute_loss(trainer, lambda **kwargs: output, batch)

    return run


def jsd(beta: float, temperature: float):
    def run(given):
        labels = torch.where(given["mask"] > 0, 0, -100)
        loss = GKDTrainer.generalized_jsd_loss
        return loss(given["student_logits"], given["teacher_logits"], labels, beta, temperature)

    return run


def grpo(kind: str, level: str = "token", beta: float = 0.0, low: float = 0.2, high: float = 0.28):
    def run(given):
        args = types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
        trainer = stand_in(
            args=args,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
        )
        trainer.beta, trainer.epsilon_low, trainer.epsilon_high, trainer.loss_type = beta, low, high, kind
        trainer.use_vllm, trainer._entropy_bonus_enabled, trainer.max_completion_length = False, False, 20
        trainer.current_gradient_accumulation_steps = 1
        zeros = torch.zeros(B, T)
        trainer._get_per_token_logps_and_entropies = lambda *a, **k: (given["logprobs"], zeros, None)
        mask = given["mask"]
        batch = {"prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0], "completion_ids": mask}
        batch |= {"completion_mask": mask, "num_items_in_batch": mask.sum()}
        batch |= {"advantages": given["advantages"], "old_per_token_logps": given["old_logprobs"].detach()}
        batch["ref_per_token_logps"] = given["ref_logprobs"].detach()
        return trl.GRPOTrainer._compute_loss(trainer, None, batch)

    return run


def _openrlhf():
    """The file of losses alone: the package imports deepspeed."""
    folder = Path(next(iter(importlib.util.find_spec("openrlhf").submodule_search_locations))) / "models"
    package = types.ModuleType("openrlhf_models")
    package.__path__ = [str(folder)]
    sys.modules["openrlhf_models"] = package
    utils = types.ModuleType("openrlhf_models.utils")
    utils.masked_mean = lambda x, mask, dim=None: (
        (x * mask).sum() / mask.sum() if dim is None else (x * mask).sum(dim) / mask.sum(dim)
    )
    sys.modules["openrlhf_models.utils"] = utils
    spec = importlib.util.spec_from_file_location("openrlhf_models.loss", folder / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ppo_policy(dual_clip: float | None):
    def run(given):
        loss = _openrlhf().PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.3, dual_clip=dual_clip)
        old = given["old_logprobs"].detach()
        found = loss(given["logprobs"], old, given["token_advantages"].detach(), action_mask=given["mask"])
        return found[0] if isinstance(found, tuple) else found

    return run


def ppo_value(clip: float | None):
    def run(given):
        loss = _openrlhf().ValueLoss(clip_eps=clip)
        found = loss(given["values"], given["old_values"].detach(), given["returns"].detach(), given["mask"])
        return found[0] if isinstance(found, tuple) else found

    return run


def pairwise(margin: bool):
    def run(given):
        chosen, rejected = given["rewards"][0::2], given["rewards"][1::2]
        return _openrlhf().PairWiseLoss()(chosen, rejected, given["margins"].detach() if margin else None)

    return run


LOSSES = {
    "dpo": dpo("sigmoid", 0.3),
    "hinge": dpo("hinge", 0.3),
    "ipo": dpo("ipo", 0.3),
    "dpo_averaged": dpo("sigmoid_norm", 2.0),
    "robust_dpo": dpo("robust", 0.3, 0.2),
    "cpo_smoothed": cpo("sigmoid", 0.3, label_smoothing=0.2),
    "simpo": cpo("simpo", 2.0, 0.8, average=True),
    "orpo": orpo(0.25),
    "kto": kto(0.3, 1.0, 1.5),
    "reward": reward(False, None),
    "reward_margin_centred": reward(True, 0.1),
    "forward_kl": jsd(0.0, 1.0),
    "reverse_kl": jsd(1.0, 1.0),
    "jsd": jsd(0.3, 2.0),
    "grpo": grpo("grpo"),
    "grpo_kl": grpo("grpo", beta=0.2),
    "dapo": grpo("dapo"),
    "dr_grpo": grpo("dr_grpo"),
    "gspo": grpo("grpo", level="sequence", low=0.05, high=0.1),
    "cispo": grpo("cispo", high=1.2),
}
OPENRLHF = {
    "ppo_policy": ppo_policy(None),
    "ppo_dual_clip": ppo_policy(1.5),
    "ppo_value": ppo_value(0.2),
    "ppo_value_plain": ppo_value(None),
    "pairwise": pairwise(False),
    "pairwise_margin": pairwise(True),
}

if __name__ == "__main__":
    main()
