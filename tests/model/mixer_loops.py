"""The papers' recurrences read as plain float64 loops over the tokens of one document, to hold the mixers to."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def rms_norm(x, eps, scale=1.0):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def convolve(x, taps, bias=0.0):
    """x [T, ...]; the last tap meets the token itself."""
    K, y = len(taps), np.zeros_like(x)
    for t in range(len(x)):
        y[t] = bias + sum(taps[K - 1 - lag] * x[t - lag] for lag in range(min(K, t + 1)))
    return y


def linear(p, name, x):
    return np.tensordot(x, p[name], 1) + p.get(f"{name}_bias", 0)


def mamba2(spec, p, x):
    T, group = len(x), spec.num_heads // spec.num_groups
    x = x * spec.in_multiplier
    z, x, B, C, dt = (
        linear(p, f"in_{n}", x) * m for n, m in zip(("z", "x", "B", "C", "dt"), spec.multipliers)
    )
    x, B, C = (
        silu(convolve(v, p[f"conv_{n}"], p.get(f"conv_{n}_bias", 0))) for n, v in zip("xBC", (x, B, C))
    )
    dt = np.clip(softplus(dt + p["dt_bias"]), spec.dt_min, spec.dt_max)
    y = np.zeros_like(x)
    for h in range(spec.num_heads):
        state = np.zeros((spec.head_dim, spec.state_dim))
        for t in range(T):
            decay = np.exp(-np.exp(p["A_log"][h]) * dt[t, h])
            state = decay * state + dt[t, h] * np.outer(x[t, h], B[t, h // group])
            y[t, h] = state @ C[t, h // group] + p["D"][h] * x[t, h]
    if not spec.norm_before_gate or spec.norm_eps is None:
        y = y * silu(z)
    if spec.norm_eps is not None:
        grouped = y.reshape(T, spec.num_groups, -1)
        y = rms_norm(grouped, spec.norm_eps).reshape(y.shape) * p["norm"].reshape(y.shape[1:])
        y = y * silu(z) if spec.norm_before_gate else y
    return (np.tensordot(y, p["o"], 2) + p.get("o_bias", 0)) * spec.out_multiplier


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def delta_state(q, k, v, log_decay, beta):
    """One head: q, k [T, K], v [T, V], log_decay [T, K] or [T, 1], beta [T]."""
    state, o = np.zeros((k.shape[1], v.shape[1])), np.zeros_like(v)
    for t in range(len(q)):
        state = np.exp(log_decay[t])[:, None] * state
        state = state + np.outer(k[t], beta[t] * (v[t] - k[t] @ state))
        o[t] = q[t] @ state
    return o


def gated_delta_net(spec, p, x):
    q, k, v = (silu(convolve(linear(p, n, x), p[f"conv_{n}"])) for n in "qkv")
    beta = sigmoid(linear(p, "b", x)) * (2 if spec.negative_eigenvalues else 1)
    log_decay = -np.exp(p["A_log"]) * softplus(linear(p, "a", x) + p["dt_bias"])
    y = np.zeros_like(v)
    for h in range(spec.num_heads):
        g = h // (spec.num_heads // spec.num_key_heads)
        query = unit(q[:, g]) / np.sqrt(spec.key_dim)
        y[:, h] = delta_state(query, unit(k[:, g]), v[:, h], log_decay[:, h, None], beta[:, h])
    y = rms_norm(y, spec.norm_eps, p["norm"]) * silu(linear(p, "z", x))
    return np.tensordot(y, p["o"], 2)


def kimi_delta_attention(spec, p, x):
    q, k, v = (silu(convolve(linear(p, n, x), p[f"conv_{n}"])) for n in "qkv")
    beta, shift = sigmoid(linear(p, "b", x)), linear(p, "f_b", linear(p, "f_a", x))
    rate, shift = np.exp(p["A_log"])[:, None], shift + p["dt_bias"].reshape(shift.shape[1:])
    bound = spec.decay_lower_bound
    log_decay = -rate * softplus(shift) if bound is None else bound * sigmoid(rate * shift)
    y = np.zeros_like(v)
    for h in range(spec.num_heads):
        query = unit(q[:, h]) / np.sqrt(spec.head_dim)
        y[:, h] = delta_state(query, unit(k[:, h]), v[:, h], log_decay[:, h], beta[:, h])
    y = rms_norm(y, spec.norm_eps, p["norm"]) * sigmoid(linear(p, "g_b", linear(p, "g_a", x)))
    return np.tensordot(y, p["o"], 2)


def mamba(spec, p, x):
    z, x = linear(p, "in_z", x), linear(p, "in_x", x)
    x = silu(convolve(x, p["conv"], p.get("conv_bias", 0)))
    chosen = {name: x @ p[name] for name in ("dt_low", "B", "C")}
    if spec.norm is not None:
        norms = {name: p.get(f"{name}_norm", {"scale": 1.0})["scale"] for name in chosen}
        chosen = {name: rms_norm(value, spec.norm.eps, norms[name]) for name, value in chosen.items()}
    dt = softplus(chosen["dt_low"] @ p["dt"] + p["dt_bias"])
    state, y = np.zeros((spec.width, spec.state_dim)), np.zeros_like(x)
    A = -np.exp(p["A_log"]).reshape(state.shape)
    for t in range(len(x)):
        state = np.exp(A * dt[t][:, None]) * state
        state = state + np.outer(dt[t] * x[t], chosen["B"][t])
        y[t] = state @ chosen["C"][t] + p["D"] * x[t]
    return (y * silu(z)) @ p["o"] + p.get("o_bias", 0)


def rglru(spec, p, x):
    y, x = linear(p, "y", x), convolve(linear(p, "x", x), p["conv"], p["conv_bias"])
    y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    gate = lambda name: sigmoid(np.einsum("thi,hic->thc", x, p[name]) + p[f"{name}_bias"])
    decay = np.exp(-8 * gate("a_gate") * softplus(p["a"].reshape(x.shape[1:])))
    inputs, h = x * gate("x_gate"), np.zeros_like(x)
    h[0] = inputs[0]
    for t in range(1, len(x)):
        h[t] = decay[t] * h[t - 1] + np.sqrt(1 - decay[t] ** 2) * inputs[t]
    return np.tensordot(h * y, p["o"], 2) + p["o_bias"]


def retention(spec, p, x):
    q, k, v, z = (linear(p, name, x) for name in ("q", "k", "v", "z"))
    half = spec.key_dim // 2
    angle = np.outer(np.arange(len(x)), spec.rope.theta ** (-np.arange(half) / half))[:, None]
    rotate = lambda u: np.concatenate(
        [
            u[..., :half] * np.cos(angle) - u[..., half:] * np.sin(angle),
            u[..., half:] * np.cos(angle) + u[..., :half] * np.sin(angle),
        ],
        axis=-1,
    )
    q, k, y = rotate(q) / np.sqrt(spec.key_dim), rotate(k), np.zeros_like(v)
    for h in range(spec.num_heads):
        for t in range(len(x)):
            weights = [(1 - 2.0 ** (-5 - h)) ** (t - s) * (q[t, h] @ k[s, h]) for s in range(t + 1)]
            y[t, h] = weights @ v[: t + 1, h]
    return np.tensordot(rms_norm(y, spec.norm_eps, p["norm"]) * silu(z), p["o"], 2)


def token_shift(x, share):
    before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    return x + (before - x) * share


def rwkv7_values(p, x):
    return linear(p | {"v_bias": 0}, "v", token_shift(x, p["x_v"]))


def rwkv7(spec, p, x, v_first=None):
    mixed, heads = {name: token_shift(x, p[f"x_{name}"]) for name in "rwkvag"}, p["r"].shape[1:]
    p = p | {name: p[name].reshape(heads) for name in ("k_k", "k_a", "r_k", "norm", "norm_bias")}
    low = lambda name, f: (
        np.tensordot(f(mixed[name] @ p[f"{name}_a"]), p[f"{name}_b"], 1) + p.get(f"{name}_bias", 0)
    )
    same = lambda u: u
    r, k = np.tensordot(mixed["r"], p["r"], 1), np.tensordot(mixed["k"], p["k"], 1)
    v, w, a, g = rwkv7_values(p, x), low("w", np.tanh), sigmoid(low("a", same)), low("g", sigmoid)
    if v_first is not None:
        v = v + (v_first - v) * sigmoid(low("v", same))
    decay = np.exp(-np.exp(-softplus(-w) - 0.5))
    erase = k * p["k_k"]
    erase = erase / np.linalg.norm(erase, axis=-1, keepdims=True)
    k = k * (1 + (a - 1) * p["k_a"])
    y = np.zeros_like(v)
    for h in range(spec.num_heads):
        state = np.zeros((spec.head_dim, spec.head_dim))  # values by keys, as in the paper
        for t in range(len(x)):
            change = np.diag(decay[t, h]) - np.outer(erase[t, h], erase[t, h] * a[t, h])
            state = state @ change + np.outer(v[t, h], k[t, h])
            y[t, h] = state @ r[t, h]
    y = y - y.mean(-1, keepdims=True)
    y = rms_norm(y, spec.norm_eps, p["norm"]) + p["norm_bias"]
    y = y + (r * k * p["r_k"]).sum(-1, keepdims=True) * v
    return np.tensordot(y * g, p["o"], 2)


def rwkv7_channel_mix(spec, p, x):
    return np.maximum(token_shift(x, p["x_k"]) @ p["k"], 0) ** 2 @ p["o"]
