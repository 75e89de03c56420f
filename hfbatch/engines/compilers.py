"""What torch.compile needs on a machine besides torch. Imports nothing of it, so that the plan can ask."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

INSTALL = "apt-get install g++ python3-dev"


def missing_to_compile() -> list[str]:
    """Returns what this machine lacks: torch compiles C++ that includes the headers of Python, for GPUs too."""
    compiler = os.environ.get("CXX", "g++")  # as torch chooses it
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = [] if shutil.which(compiler) else [f"the C++ compiler {compiler}"]
    return missing if header.exists() else [*missing, f"the headers of Python ({header})"]
