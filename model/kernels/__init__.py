"""Kernels, one folder an operation.

A folder's `__init__` has the public function and the table of implementations, reference.py the definition in plain jnp,
tpu*.py the Pallas kernels, gpu.py and third_party.py those of libraries, and sharded.py how a mesh splits the operation.
All choose by choice.py, split by mesh.py and run for the platform of backend.py.
"""
