"""Kernels, one folder an operation.

A folder's `__init__` has the public function and the table of implementations, and reference.py the definition in plain
jnp. Our Pallas kernels are in tpu*.py and gpu_*.py, those of libraries in third_party.py, gpu_libraries.py and
tpu_splash.py; sharded.py splits the operation over a mesh. All choose by choice.py, split by mesh.py and run for the
platform of backend.py.
"""
