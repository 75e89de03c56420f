"""What a process that forks builds once for all its forks; to be imported after all else."""

from __future__ import annotations

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("bert")  # compiles the expressions for all models, and keeps them
# A collection in a fork, as a training ends with, would look at all that the first process has imported, and copy it.
gc.collect()
gc.freeze()
