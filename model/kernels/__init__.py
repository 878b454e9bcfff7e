"""Kernels, one file each: the reference in plain jnp and the public function that picks."""
