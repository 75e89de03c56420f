"""Writes the files of sentence-transformers, which `tasks/text/sentence_files.py` reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfbatch.tasks.multimodal.embedding import Embedding
from hfbatch.tasks.text.sentence_files import Dense, Normalize


def write_sentence_files(
    task: Embedding, folder: Path, prompts: Mapping[str, str], default_prompt: str | None
) -> None:
    """Adds files to the folder of a transformers model, so that `SentenceTransformer` loads it with the same vectors.

    :param prompts: prompts by name.
    :param default_prompt: name of the prompt that is used by default.
    """
    import sentence_transformers

    types = ["sentence_transformers.base.modules.transformer.Transformer"]
    paths = [""]
    for number, module in enumerate(_modules(task), 1):
        name = "Dense" if isinstance(module, Dense) else type(module).__name__
        paths.append(f"{number}_{name}")
        target = folder / paths[-1]
        if isinstance(module, Dense):
            shutil.copytree(Path(task.model.folder) / module.folder, target)
            types.append("sentence_transformers.base.modules.dense.Dense")
        else:
            target.mkdir()
            module.save(str(target))
            types.append(f"{type(module).__module__}.{name}")
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(zip(paths, types, strict=True))
    ]
    limit = task.own_limit
    reading = {"do_lower_case": task.recipe.lowercase, **({"max_seq_length": limit} if limit else {})}
    general = {
        **(task.model.read_json("config_sentence_transformers.json") or {}),
        "__version__": {"sentence_transformers": sentence_transformers.__version__},
        "model_type": "SentenceTransformer",
        "prompts": dict(prompts),
        "default_prompt_name": default_prompt,
    }
    _write(folder / "modules.json", listed)
    _write(folder / "sentence_bert_config.json", reading)
    _write(folder / "config_sentence_transformers.json", general)


def _modules(task: Embedding) -> list[Any]:
    """Returns the modules after the transformer: those of sentence-transformers, but Dense as the task defines it."""
    from sentence_transformers.base.modules import Normalize as NormalizeModule
    from sentence_transformers.sentence_transformer.modules import Pooling

    size = int(task.config.get_text_config().hidden_size)
    steps = [step if isinstance(step, Dense) else NormalizeModule() for step in task.steps]
    if task.params.normalize is True and (not task.steps or not isinstance(task.steps[-1], Normalize)):
        steps.append(NormalizeModule())
    modes: Any = list(task.poolings)
    return [Pooling(size, modes, task.recipe.include_prompt), *steps]


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf8")
