"""What every optimizer checks of its settings."""

from __future__ import annotations

from configs.typed import check_at_least


class Checked:
    """For dataclasses with these fields. ConfigError: one is below 0, or no number."""

    peak_lr: float
    weight_decay: float
    clip_norm: float  # global gradient norm; 0: no clipping

    def __post_init__(self):
        check_at_least(0, peak_lr=self.peak_lr, weight_decay=self.weight_decay, clip_norm=self.clip_norm)
