"""Options of task embedding, and the errors in them with a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hfbatch.data.filesystem import one_line
from hfbatch.tasks.base import Params
from hfbatch.tasks.text.long_texts import WindowParams
from hfbatch.tasks.text.sentence_files import Dense
from hfbatch.tasks.vector_precision import Precision, needs_ranges

if TYPE_CHECKING:
    from hfbatch.tasks.multimodal.embedding import Embedding


class EmbeddingParams(Params):
    """Options for pooling the vectors of tokens or patches into one vector."""

    pooling: Literal["auto", "mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"] = (
        "auto"
    )
    """Pooling; auto follows the model's sentence-transformers files, else uses mean for texts, and for images the
    model's own vector (`pooler_output`)."""
    normalize: bool | Literal["auto"] = "auto"
    """Scale vectors to length 1; auto follows the model's sentence-transformers files."""
    prompt: str | None = None
    """Text prepended to each row, such as "query: "."""
    prompt_name: str | None = None
    """Name of a prompt in the model's files; default: the model's default prompt, if it has one."""
    truncate_dim: int | None = Field(default=None, ge=1)
    """Number of leading dimensions to keep, for models trained with Matryoshka loss."""
    windows: WindowParams | None = None
    """Windows over long texts, such as {size: 256, stride: 128, pool: mean}; null truncates them."""
    precision: Precision = "float32"
    """How vectors are stored. int8 and uint8: the place in the range of the dimension, in 256 steps; binary and ubinary: a bit
    for each dimension, whether it is above 0, eight in each int8 or uint8. As sentence-transformers' quantize_embeddings."""
    ranges: Literal["each", "common"] | Annotated[list[list[float]], Field(min_length=2, max_length=2)] = (
        "each"
    )
    """int8, uint8: from rows of the first split, each: the minimum and the maximum of each dimension, as sentence-transformers;
    common: one range around 0, so that dot products of int8 are nearly in order. job.json then holds them as
    `settled.fitted.ranges`. Or two lists: the minima and the maxima."""


def image_faults(task: Embedding, where: str) -> list[str]:
    """Returns errors of a model whose images give no vector. :param where: the model."""
    if len(task.encodes) == 2 and task.params.pooling != "auto":
        return [f"{where} computes vectors itself; leave params.pooling {task.params.pooling!r} out"]
    try:
        _ = task.full_dimension
    except KeyError:
        return [f"{where} computes no vector of an image itself; set params.pooling to mean or cls"]
    except (RuntimeError, TypeError, ValueError) as error:
        return [f"{where} returns no vectors that can be pooled ({one_line(error)})"]
    return []


def dense_faults(task: Embedding, where: str) -> list[str]:
    """Returns errors for Dense modules that do not take what they are given."""
    faults = []
    size = int(getattr(task.config.get_text_config(), "hidden_size", None) or 0) * len(task.poolings)
    for step in task.recipe.steps:
        if isinstance(step, Dense):
            if size and step.in_features != size:
                faults.append(
                    f"{where}: its Dense module {step.folder!r} takes {step.in_features} numbers, "
                    f"gets {size}; leave params.pooling at auto"
                )
            size = step.out_features
    return faults


def param_faults(task: Embedding, where: str) -> list[str]:
    """Returns errors in prompts, dimensions and ranges."""
    faults = []
    params, prompts = task.params, task.recipe.prompts
    if params.prompt is not None and params.prompt_name is not None:
        faults.append("params.prompt and params.prompt_name are both set; leave one out")
    if params.prompt_name is not None and params.prompt_name not in prompts:
        has = ", ".join(sorted(prompts)) or "no prompts"
        faults.append(
            f"params.prompt_name {params.prompt_name!r} is not in {where} (has: {has}); use params.prompt"
        )
    if params.truncate_dim and task.full_dimension and params.truncate_dim > task.full_dimension:
        faults.append(
            f"params.truncate_dim {params.truncate_dim} is more than the "
            f"{task.full_dimension} dimensions of {where}; set at most {task.full_dimension}"
        )
    ranges = params.ranges
    if ranges != "each" and not needs_ranges(params.precision):
        faults.append(
            f"params.ranges are for precision int8 and uint8, not for {params.precision}; leave them out"
        )
    elif isinstance(ranges, list) and task.full_dimension and {*map(len, ranges)} != {task.dimension}:
        sizes = " and ".join(str(len(row)) for row in ranges)
        faults.append(
            f"params.ranges has {sizes} numbers, and vectors have {task.dimension} dimensions; give the minimum and the "
            "maximum of each"
        )
    return faults


def window_faults(task: Embedding, where: str) -> list[str]:
    """Returns errors in windows over texts."""
    windows = task.params.windows
    if windows is None:
        return []
    if task.frame is None:
        return [f"{where} has no maximum length; set params.windows.size"]
    faults = []
    if task.limit and task.frame.size > task.limit:
        faults.append(
            f"params.windows.size {windows.size} is more than the {task.limit} tokens of a row; set at most {task.limit}, or "
            "raise batch.max_length"
        )
    if windows.pool == "none" and not task.tokenizer.is_fast:
        faults.append(
            f"{where} has a tokenizer without offsets, from which spans come; set params.windows.pool to mean"
        )
    if windows.pool != "none" and task.shortened and task.params.normalize == "auto":
        faults.append(
            "params.windows pools vectors of length 1, and truncate_dim shortens them; set params.normalize to true"
        )
    return faults or task.frame.faults()
