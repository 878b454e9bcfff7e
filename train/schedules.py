"""Learning-rate schedules: a linear warmup, then one of three ways to end. Each is a variant of `config.schedule`."""

from __future__ import annotations

import dataclasses

import optax

from configs.typed import check_at_least


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Half a cosine from the peak down to `final_fraction` of it. Loshchilov and Hutter 2016, arXiv:1608.03983."""

    warmup_steps: int = 100
    final_fraction: float = 0.1  # learning rate at the last step, as a share of the peak

    def __post_init__(self):
        check_at_least(0, warmup_steps=self.warmup_steps)

    def after_warmup(self, peak: float, steps: int) -> optax.Schedule:
        return optax.cosine_decay_schedule(peak, steps, alpha=self.final_fraction)


@dataclasses.dataclass(frozen=True)
class WSD:
    """Warmup, stable, decay: the peak until the last `decay_steps`, then linear. Hu et al. 2024, arXiv:2404.06395."""

    warmup_steps: int = 100
    decay_steps: int = 0  # steps of the final linear decay; 0: a fifth of all steps
    final_fraction: float = 0.1  # learning rate at the last step, as a share of the peak

    def __post_init__(self):
        check_at_least(0, warmup_steps=self.warmup_steps, decay_steps=self.decay_steps)

    def after_warmup(self, peak: float, steps: int) -> optax.Schedule:
        decay = min(self.decay_steps or max((steps + self.warmup_steps) // 5, 1), steps)
        fall = optax.linear_schedule(peak, peak * self.final_fraction, decay)
        return optax.join_schedules([optax.constant_schedule(peak), fall], [steps - decay])


@dataclasses.dataclass(frozen=True)
class Constant:
    """The peak until the end."""

    warmup_steps: int = 100

    def __post_init__(self):
        check_at_least(0, warmup_steps=self.warmup_steps)

    def after_warmup(self, peak: float, steps: int) -> optax.Schedule:
        return optax.constant_schedule(peak)


Schedule = Cosine | WSD | Constant


def learning_rate(schedule: Schedule, peak: float, steps: int) -> optax.Schedule:
    """The learning rate at each of `steps` steps, counted from 0."""
    warmup = min(schedule.warmup_steps, steps)
    after = schedule.after_warmup(peak, max(steps - warmup, 1))
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])
