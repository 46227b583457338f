"""Imported before any library: what users set for libraries and terminals is put aside, here and in child processes."""

import os

OF_TERMINALS = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
for name in [*os.environ]:
    if name.startswith(("HF_", "TRANSFORMERS_")) or name in OF_TERMINALS:
        del os.environ[name]
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
# Two processes would wait for each other's threads, and tensors this small are faster without.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
