"""Kernels, one folder an operation.

A folder's `__init__` has the public function and the table of implementations, and reference.py the definition in plain
jnp. Pallas kernels are in tpu*.py, those of libraries in gpu_libraries.py, tpu_splash.py and third_party.py, and sharded.py splits the operation
over a mesh. All choose by choice.py, split by mesh.py and run for the platform of backend.py.
"""
