"""Run any Hugging Face model over a Parquet dataset on a Ray cluster, exactly once.

>>> import hfbatch
>>> spec = hfbatch.JobSpec.load("jobs/embed.yaml")
>>> result = hfbatch.run(spec)                                                   # doctest: +SKIP
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfbatch.errors import SpecError
    from hfbatch.job import JobResult, run
    from hfbatch.spec import JobSpec

# transformers would fetch kernels from the Hub, and run them, wherever the package `kernels` is installed: for some
# models at their import, whatever its own switch says. No code comes from there unless the user asks for it.
os.environ.setdefault("USE_HUB_KERNELS", "NO")
if os.environ["USE_HUB_KERNELS"].upper() not in ("1", "ON", "YES", "TRUE"):
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # an import of it fails, as if it were not there

__version__ = "0.1.0"
__all__ = ["JobResult", "JobSpec", "SpecError", "__version__", "run"]

_HOMES = {
    "JobSpec": "hfbatch.spec",
    "JobResult": "hfbatch.job",
    "run": "hfbatch.job",
    "SpecError": "hfbatch.errors",
}


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used, so that `hfbatch --help` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hfbatch' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
