"""Run Hugging Face models over large datasets on a Ray cluster, each row exactly once.

>>> import hfbatch
>>> spec = hfbatch.JobSpec.load("jobs/embed.yaml")
>>> result = hfbatch.run(spec)                                                   # doctest: +SKIP
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hfbatch._version import __version__

if TYPE_CHECKING:
    from hfbatch.errors import SpecError
    from hfbatch.predict.run import JobResult, run
    from hfbatch.spec.job import JobSpec

# Where the package `kernels` is installed, transformers downloads kernels from the Hub and runs them, for some
# models at import, whatever its own switch says. No code is loaded from the Hub unless the user asks for it.
os.environ.setdefault("USE_HUB_KERNELS", "NO")
if os.environ["USE_HUB_KERNELS"].upper() not in ("1", "ON", "YES", "TRUE"):
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # importing it fails as if it were not installed

__all__ = ["JobResult", "JobSpec", "SpecError", "__version__", "run"]

_HOMES = {
    "JobSpec": "hfbatch.spec.job",
    "JobResult": "hfbatch.predict.run",
    "run": "hfbatch.predict.run",
    "SpecError": "hfbatch.errors",
}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use, which keeps `hfbatch --help` fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hfbatch' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
