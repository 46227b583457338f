"""What some tests want of the machine: marks that skip them where it is not there, and say so."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

# Kernels are interpreted only where there is no GPU: see conftest.py.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is pretended by Triton's interpreter")
compiles_loops = pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="there is no g++ with Python's headers to compile with",
)
