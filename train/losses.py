"""Losses of post-training as plain functions of arrays, under the names and symbols of their papers.

Log-probabilities are in nats and float32. "Sums" are log-probabilities of a completion, summed over its tokens;
"averages" are these sums divided by the number of tokens. Preference losses return one number a pair, token losses
one number a token, which is 0 outside the mask; nothing is averaged over a batch here.
"""

# B sequences or pairs, T tokens, V vocabulary

from __future__ import annotations

import jax
import jax.numpy as jnp

log_sigmoid = jax.nn.log_sigmoid


# Preferences


def dpo(
    chosen: jax.Array,
    rejected: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Direct preference optimization: -log sigmoid(beta * delta). Rafailov et al. 2023, arXiv:2305.18290.

    delta is the policy's log-ratio to the reference for the chosen completion, minus that for the rejected one.
    Label smoothing e gives conservative DPO: (1 - e) L(delta) + e L(-delta).

    Args:
      chosen, rejected, ref_chosen, ref_rejected: [B] sums.

    Returns:
      [B].
    """
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)
    return _smoothed(beta * delta, label_smoothing)


def robust_dpo(
    chosen: jax.Array,
    rejected: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> jax.Array:
    """rDPO: an unbiased estimate of DPO's loss if a share `label_smoothing` of the labels is flipped.

    Chowdhury et al. 2024, arXiv:2403.00409. Arguments and result as in `dpo`; label_smoothing below 0.5.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    kept, flipped = -log_sigmoid(margin), -log_sigmoid(-margin)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(
    chosen: jax.Array, rejected: jax.Array, ref_chosen: jax.Array, ref_rejected: jax.Array, beta: float = 0.1
) -> jax.Array:
    """max(0, 1 - beta * delta), with the delta of `dpo`. SLiC, Zhao et al. 2023, arXiv:2305.10425; [B] sums to [B]."""
    return jax.nn.relu(1 - beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def ipo(
    chosen: jax.Array, rejected: jax.Array, ref_chosen: jax.Array, ref_rejected: jax.Array, beta: float = 0.1
) -> jax.Array:
    """(delta - 1 / (2 beta))^2. Azar et al. 2023, arXiv:2310.12036, equation 17.

    The arguments are [B] averages, as in the authors' own runs; with sums the loss would grow with the length.
    """
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (delta - 1 / (2 * beta)) ** 2


def kto(
    policy: jax.Array,
    reference: jax.Array,
    desired: jax.Array,
    kl: jax.Array,
    beta: float = 0.1,
    desired_weight: float = 1.0,
    undesired_weight: float = 1.0,
) -> jax.Array:
    """Kahneman-Tversky optimization of completions that are labelled singly. Ethayarajh et al. 2024, arXiv:2402.01306.

    Args:
      policy, reference: [B] sums.
      desired: [B] bool.
      kl: the reference point z, in nats: `kto_reference_point`. It has no gradient.

    Returns:
      [B]: w_d (1 - sigmoid(beta (r - z))) for desired completions, w_u (1 - sigmoid(beta (z - r))) for others.
    """
    kl = jax.lax.stop_gradient(kl)
    surplus = beta * (policy - reference - kl)
    good = desired_weight * jax.nn.sigmoid(-surplus)
    bad = undesired_weight * jax.nn.sigmoid(surplus)
    return jnp.where(desired, good, bad)


def kto_reference_point(policy: jax.Array, reference: jax.Array, weights: jax.Array) -> jax.Array:
    """z = max(0, mean of policy - reference), from completions that belong to other prompts; no gradient.

    Args:
      policy, reference: [B] sums of the mismatched completions.
      weights: [B]; 0 leaves a row out.
    """
    mean = jnp.sum((policy - reference) * weights) / jnp.maximum(jnp.sum(weights), 1e-9)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def orpo(
    chosen: jax.Array, rejected: jax.Array, beta: float = 0.1, nll: jax.Array | None = None
) -> jax.Array:
    """Odds ratio preference optimization, without a reference. Hong et al. 2024, arXiv:2403.07691.

    Args:
      chosen, rejected: [B] averages.
      nll: [B], the supervised part; default: -chosen.

    Returns:
      [B]: nll - beta * log sigmoid(log odds of chosen - log odds of rejected).
    """
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return (-chosen if nll is None else nll) - beta * log_sigmoid(log_odds)


def simpo(
    chosen: jax.Array,
    rejected: jax.Array,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """-log sigmoid(beta (chosen - rejected) - gamma), of [B] averages, without a reference.

    Meng et al. 2024, arXiv:2405.14734. `gamma` is the target margin in nats (not divided by beta).
    """
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def cpo(chosen: jax.Array, rejected: jax.Array, beta: float = 0.1, label_smoothing: float = 0.0) -> jax.Array:
    """-log sigmoid(beta (chosen - rejected)), of [B] sums: DPO without a reference. Xu et al. 2024, arXiv:2401.08417.

    The paper adds the mean loss of the chosen completions.
    """
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def _smoothed(margin: jax.Array, label_smoothing: float) -> jax.Array:
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, stable at both ends. Mächler 2012, "Accurately computing log(1 - exp(-|a|))".

    At 0 and above, where a probability is 1, x is taken as -1e-6.
    """
    x = jnp.minimum(x, -1e-6)
    near = x > -0.6931472
    # each branch gets an argument that is safe for it, so that the gradient of the other is finite
    small = jnp.log(-jnp.expm1(jnp.where(near, x, -0.5)))
    large = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    return jnp.where(near, small, large)


# Rewards


def reward_model(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0, centring: float = 0.0
) -> jax.Array:
    """Bradley-Terry: -log sigmoid(r_c - r_r - margin) + centring * (r_c + r_r)^2.

    Margins: Touvron et al. 2023, arXiv:2307.09288; centring: Eisenstein et al. 2023, arXiv:2312.09244.

    Args:
      chosen, rejected: [B] rewards.
      margin: [B] or a number: by how much the chosen one shall be better.

    Returns:
      [B].
    """
    return -log_sigmoid(chosen - rejected - margin) + centring * (chosen + rejected) ** 2


def process_reward(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Binary cross-entropy of each step of a solution. Lightman et al. 2023, arXiv:2305.20050.

    Args:
      logits: [B, T], log-odds that the steps up to this token are right.
      labels: [B, T], probability that they are; 0 or 1 for labels by hand, a share for labels from rollouts.
      mask: [B, T], 1 at the last token of each labelled step.

    Returns:
      [B, T].
    """
    # outside the mask it may be anything, and must not reach the gradient
    logits = jnp.where(mask > 0, logits, 0.0)
    loss = -labels * log_sigmoid(logits) - (1 - labels) * log_sigmoid(-logits)
    return jnp.where(mask > 0, loss, 0.0)


# Policy gradients


def ppo_policy(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> jax.Array:
    """Clipped surrogate, -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = exp(logprobs - old_logprobs).

    Schulman et al. 2017, arXiv:1707.06347. A higher `clip_high`: DAPO, Yu et al. 2025, arXiv:2503.14476. With
    `dual_clip` c > 1 the loss of a negative advantage is at most -c A: Ye et al. 2019, arXiv:1912.09729.

    Args:
      logprobs, old_logprobs, mask: [B, T].
      advantages: [B, T] or [B].
      clip_high: default: `clip_low`.

    Returns:
      [B, T].
    """
    advantages = _by_token(advantages, logprobs)
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    gain = _clipped_gain(
        log_ratio, advantages, clip_low, clip_low if clip_high is None else clip_high, dual_clip
    )
    return jnp.where(mask > 0, -gain, 0.0)


def ppo_value(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, clip: float | None = 0.2
) -> jax.Array:
    """0.5 max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2), [B, T] each; None: not clipped."""
    values, old_values, returns = (jnp.where(mask > 0, x, 0.0) for x in (values, old_values, returns))
    loss = (values - returns) ** 2
    if clip is not None:
        clipped = old_values + jnp.clip(values - old_values, -clip, clip)
        loss = jnp.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * loss


def grpo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    ref_logprobs: jax.Array | None = None,
    beta: float = 0.0,
) -> jax.Array:
    """Group relative policy optimization: `ppo_policy` plus beta * KL to the reference, averaged over each sequence.

    Shao et al. 2024, arXiv:2402.03300. DAPO averages the same tokens over the whole batch, and Dr. GRPO divides their
    sum by a constant length: take `ppo_policy` and reduce it so.

    Args:
      logprobs, old_logprobs, mask, ref_logprobs: [B, T].
      advantages: [B] or [B, T].

    Returns:
      [B]; 0 for a sequence without tokens.
    """
    loss = ppo_policy(logprobs, old_logprobs, advantages, mask, clip_low, clip_high)
    if beta:
        if ref_logprobs is None:
            raise ValueError("grpo with beta needs ref_logprobs, the log-probabilities of the reference.")
        loss += beta * kl_k3(jnp.where(mask > 0, logprobs, 0.0), jnp.where(mask > 0, ref_logprobs, 0.0))
    return jnp.sum(loss, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def gspo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> jax.Array:
    """Group sequence policy optimization: one ratio a sequence, exp(mean of the tokens' log-ratios), clipped.

    Zheng et al. 2025, arXiv:2507.18071.

    Args:
      logprobs, old_logprobs, mask: [B, T].
      advantages: [B].

    Returns:
      [B].
    """
    tokens = jnp.sum(mask, axis=-1)
    log_ratio = jnp.sum(_log_ratio(logprobs, old_logprobs, mask), axis=-1) / jnp.maximum(tokens, 1)
    return jnp.where(tokens > 0, -_clipped_gain(log_ratio, advantages, clip_low, clip_high), 0.0)


def cispo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    max_ratio: float = 5.0,
    min_ratio: float = 0.0,
) -> jax.Array:
    """-stop_gradient(clip(rho)) A log-probability: the weight is clipped, and every token keeps its gradient.

    MiniMax 2025, arXiv:2506.13585.

    Args:
      logprobs, old_logprobs, mask: [B, T].
      advantages: [B] or [B, T].

    Returns:
      [B, T].
    """
    weight = jnp.clip(jnp.exp(_log_ratio(logprobs, old_logprobs, mask)), min_ratio, max_ratio)
    loss = -jax.lax.stop_gradient(weight) * _by_token(advantages, logprobs) * logprobs
    return jnp.where(mask > 0, loss, 0.0)


def reinforce(logprobs: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """-A log-probability, [B, T]; Williams 1992. With `rloo_advantages` it is RLOO, Ahmadian et al. 2024."""
    return jnp.where(mask > 0, -_by_token(advantages, logprobs) * logprobs, 0.0)


def _clipped_gain(
    log_ratio: jax.Array, advantages: jax.Array, low: float, high: float, dual: float | None = None
) -> jax.Array:
    """min(rho A, clip(rho, 1 - low, 1 + high) A), and at least dual A where A is negative.

    Where the gain no longer depends on rho, neither does its gradient: a rho that overflows is not in it.
    """
    top = 1 + high if dual is None else jnp.where(advantages < 0, dual, 1 + high)
    constant = (log_ratio > jnp.log(top)) & ((advantages >= 0) | (dual is not None))
    ratio = jnp.exp(jnp.where(constant, 0.0, log_ratio))
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)
    return jnp.where(constant, top * advantages, gain)


def _log_ratio(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Zero outside the mask, where the difference may be anything."""
    return jnp.where(mask > 0, logprobs - old_logprobs, 0.0)


def _by_token(advantages: jax.Array, like: jax.Array) -> jax.Array:
    return advantages[..., None] if advantages.ndim < like.ndim else advantages


# Kullback-Leibler divergence from samples of the policy. Schulman 2020, "Approximating KL divergence"


def kl_k1(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """log policy - log reference: unbiased. As a loss its gradient is 0 in expectation."""
    return logprobs - reference


def kl_k2(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """Half the squared log-ratio: biased but never negative. As a loss its gradient is right on policy."""
    return 0.5 * (logprobs - reference) ** 2


def kl_k3(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """exp(-lr) - 1 + lr, lr = log policy - log reference: unbiased and never negative; its gradient is biased."""
    log_ratio = reference - logprobs
    return jnp.expm1(log_ratio) - log_ratio


# Distillation


def jsd(
    student_logits: jax.Array, teacher_logits: jax.Array, beta: float = 0.5, temperature: float = 1.0
) -> jax.Array:
    """Generalized Jensen-Shannon divergence: beta KL(teacher || M) + (1 - beta) KL(student || M) in nats.

    M = beta teacher + (1 - beta) student. At the ends it is the limit that trains: beta = 0 is the forward
    KL(teacher || student), beta = 1 the reverse KL(student || teacher). GKD, Agarwal et al. 2023, arXiv:2306.13649.

    Args:
      student_logits, teacher_logits: [..., V] logits or log-probabilities.
      temperature: divides both.

    Returns:
      [...]: one number a token.
    """
    student = jax.nn.log_softmax(student_logits / temperature, axis=-1)
    teacher = jax.nn.log_softmax(teacher_logits / temperature, axis=-1)
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    # -inf in both, of tokens that neither may say, would be NaN in the gradient of the mixture
    student, teacher = jnp.maximum(student, -1e30), jnp.maximum(teacher, -1e30)
    mixture = jnp.logaddexp(student + jnp.log1p(-beta), teacher + jnp.log(beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def top_k_kl(student_logprobs: jax.Array, teacher_logprobs: jax.Array, tail_floor: float = 1e-6) -> jax.Array:
    """KL(teacher || student) over a teacher's k likeliest tokens and one more outcome for all others, in nats.

    Args:
      student_logprobs, teacher_logprobs: [..., k], both of the teacher's k tokens.
      tail_floor: the least probability of the others.

    Returns:
      [...]: one number a token. It is at most the KL of the whole distributions.
    """
    student_tail = _tail(student_logprobs, tail_floor)
    teacher_tail = _tail(teacher_logprobs, tail_floor)
    tail = jnp.exp(teacher_tail) * (teacher_tail - student_tail)
    return _kl(teacher_logprobs, student_logprobs) + tail


def hidden_mse(student_hidden: jax.Array, teacher_hidden: jax.Array) -> jax.Array:
    """Mean squared difference over the last axis: [..., D] to [...]. FitNets, Romero et al. 2014, arXiv:1412.6550."""
    return jnp.mean((student_hidden - teacher_hidden) ** 2, axis=-1)


def _kl(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(p || q) of log-probabilities; a p of 0 adds nothing, also where q is 0."""
    p, q = jnp.maximum(p, -1e4), jnp.maximum(q, -1e30)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _tail(logprobs: jax.Array, floor: float) -> jax.Array:
    """The log-probability of all other tokens."""
    return jnp.log(jnp.maximum(1 - jnp.sum(jnp.exp(logprobs), axis=-1), floor))
