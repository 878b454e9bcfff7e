"""Names of values that remat's policies know (`jax.ad_checkpoint.checkpoint_name`)."""

ATTENTION = "attention"  # outputs of queries, and the log-sum-exps of their scores
