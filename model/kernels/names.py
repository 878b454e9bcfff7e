"""Names of values for remat policies (`jax.ad_checkpoint.checkpoint_name`)."""

ATTENTION = "attention"  # outputs of queries, and the log-sum-exps of their scores
