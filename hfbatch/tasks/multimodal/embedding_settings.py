"""Settings of task embedding, from its params and the model's files, and the errors in them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hfbatch.data.filesystem import one_line
from hfbatch.tasks.text.long_texts import Frame, WindowParams
from hfbatch.tasks.text.prompts import PromptedTask, PromptParams
from hfbatch.tasks.text.sentence_files import Dense, Normalize, Recipe, misfitting, read_recipe
from hfbatch.tasks.tokens import length_faults, tokenize
from hfbatch.tasks.vector_precision import Precision, needs_ranges
from hfbatch.tasks.vision.image_encoder import TextOrImageTask, encode_images
from hfbatch.tasks.vision.vision import shapes_of

if TYPE_CHECKING:
    import torch


class EmbeddingParams(PromptParams):
    """Options for pooling the vectors of tokens or patches into one vector."""

    pooling: Literal["auto", "mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"] = (
        "auto"
    )
    """Pooling; auto follows the model's sentence-transformers files, else uses mean for texts, and for images the
    model's own vector (`pooler_output`)."""
    normalize: bool | Literal["auto"] = "auto"
    """Scale vectors to length 1; auto follows the model's sentence-transformers files."""
    truncate_dim: int | None = Field(default=None, ge=1)
    """Number of leading dimensions to keep, for models trained with Matryoshka loss."""
    windows: WindowParams | None = None
    """Windows over long texts, such as {size: 256, stride: 128, pool: mean}; null truncates them."""
    precision: Precision = "float32"
    """How vectors are stored. int8 and uint8: the place in the range of the dimension, in 256 steps; binary and ubinary: a bit
    for each dimension, whether it is above 0, eight in each int8 or uint8. As sentence-transformers' quantize_embeddings."""
    ranges: Literal["each", "common"] | list[list[float]] = "each"
    """int8, uint8: from rows of the first split, each: the minimum and the maximum of each dimension, as sentence-transformers;
    common: one range around 0, so that dot products of int8 are nearly in order. job.json then holds them as
    `fitted`. Or two lists: the minima and the maxima."""


class EmbeddingSettings(PromptedTask, TextOrImageTask):
    """Base class of task embedding, with everything that does not depend on rows."""

    Params = EmbeddingParams

    params: EmbeddingParams

    @property
    def unused(self) -> tuple[str, ...]:
        """The pooler, unless it computes the vectors of images."""
        return () if self.encodes == ("image",) and not self.poolings else super().unused

    def column_faults(self, present: set[str]) -> list[str]:
        """Also returns an error for a prompt or windows with images."""
        for name, given in (("prompt", self.prompt), ("windows", self.params.windows)):
            if present == {"image"} and given:
                return [f"params.{name} is for texts, and input has images; leave it out"]
        return super().column_faults(present)

    @cached_property
    def recipe(self) -> Recipe:
        """Settings from the model's sentence-transformers files."""
        return read_recipe(self.model)

    @cached_property
    def limit(self) -> int | None:
        """Maximum tokens of a row."""
        return self.max_length or self.own_limit

    @cached_property
    def poolings(self) -> tuple[str, ...]:
        """Poolings whose results are concatenated; empty to use the vector that the model itself computes."""
        if self.params.pooling != "auto":
            return (self.params.pooling,)
        return () if "image" in self.encodes and not self.recipe.found else self.recipe.poolings

    @cached_property
    def steps(self) -> tuple[Normalize | Dense, ...]:
        """Modules applied to the pooled vector before truncation."""
        if self.params.normalize is False:
            return tuple(step for step in self.recipe.steps if not isinstance(step, Normalize))
        return self.recipe.steps

    @cached_property
    def prompt_tokens(self) -> int:
        """Number of tokens at the start of each row excluded from pooling."""
        if self.recipe.include_prompt or not self.prompt:
            return 0
        ids = tokenize(self.tokenizer, self._cased([self.prompt]), max_length=self.limit).table["input_ids"][
            0
        ]
        tokens = ids.as_py()
        return len(tokens) - (1 if tokens and tokens[-1] in self.tokenizer.all_special_ids else 0)

    @cached_property
    def frame(self) -> Frame | None:
        """The windows over long texts; None if texts are truncated, or have no limit."""
        windows = self.params.windows
        if windows is None or (size := windows.size or self.limit) is None:
            return None
        prompt = self._cased([self.prompt])[0]
        return Frame.of(self.tokenizer, prompt, size, windows.stride)

    @property
    def unit(self) -> bool:
        """Whether vectors have length 1, unless they are truncated."""
        return self.params.normalize is True or self.steps[-1:] == (Normalize(),)

    @cached_property
    def full_dimension(self) -> int | None:
        """Dimension of vectors before truncation; None if the config does not specify it."""
        for step in reversed(self.recipe.steps):
            if isinstance(step, Dense):
                return step.out_features
        if "image" in self.encodes:
            return shapes_of(self, self.pixels, self._see)["vectors"][1]
        hidden = getattr(self.config.get_text_config(), "hidden_size", None)
        return None if hidden is None else int(hidden) * len(self.poolings)

    @cached_property
    def dimension(self) -> int:
        """Dimension of the vectors."""
        full = self.full_dimension or 0
        wanted = self.params.truncate_dim or self.recipe.truncate_dim or full
        return min(wanted, full)

    def check(self) -> list[str]:
        """Returns errors in the sentence-transformers files and in params."""
        where = f"model {self.model.name!r}"
        faults = [f"{where}: {fault}" for fault in self.recipe.faults]
        if "image" in self.encodes:
            faults += self._image_faults(where)
            if faults:
                return faults
        if self.full_dimension is None:
            faults.append(f"{where}: its config has no hidden_size; choose a text encoder for task embedding")
        if "text" in self.encodes:
            faults += length_faults(self.max_length, self.tokenizer, self.config)
            faults += self._window_faults(where) if not faults else []
        return faults + self._dense_faults(where) + self._param_faults(where)

    @property
    def shortened(self) -> bool:
        """Whether truncation of dimensions reduces vectors to a length below 1."""
        return (
            self.full_dimension is not None
            and self.dimension < self.full_dimension
            and Normalize() in self.steps
        )

    def _image_faults(self, where: str) -> list[str]:
        """Returns errors of a model whose images give no vector. :param where: the model."""
        if len(self.encodes) == 2 and self.params.pooling != "auto":
            return [f"{where} computes vectors itself; leave params.pooling {self.params.pooling!r} out"]
        try:
            _ = self.full_dimension
        except KeyError:
            return [f"{where} computes no vector of an image itself; set params.pooling to mean or cls"]
        except (RuntimeError, TypeError, ValueError) as error:
            return [f"{where} returns no vectors that can be pooled ({one_line(error)})"]
        return []

    def _dense_faults(self, where: str) -> list[str]:
        """Returns errors for Dense modules that do not take what they are given."""
        size = int(getattr(self.config.get_text_config(), "hidden_size", None) or 0) * len(self.poolings)
        return [
            f"{where}: its Dense module {step.folder!r} takes {step.in_features} numbers, "
            f"gets {given}; leave params.pooling at auto"
            for step, given in misfitting(self.recipe.steps, size)
        ]

    def _param_faults(self, where: str) -> list[str]:
        """Returns errors in prompts, dimensions and ranges."""
        faults, params = self.prompt_faults(), self.params
        if params.truncate_dim and self.full_dimension and params.truncate_dim > self.full_dimension:
            faults.append(
                f"params.truncate_dim {params.truncate_dim} is more than the "
                f"{self.full_dimension} dimensions of {where}; set at most {self.full_dimension}"
            )
        ranges = params.ranges
        if ranges != "each" and not needs_ranges(params.precision):
            faults.append(
                f"params.ranges are for precision int8 and uint8, not for {params.precision}; leave them out"
            )
        elif isinstance(ranges, list) and self.full_dimension and [*map(len, ranges)] != [self.dimension] * 2:
            sizes = ", ".join(str(len(row)) for row in ranges)
            faults.append(
                f"params.ranges has {len(ranges)} lists of {sizes} numbers, and vectors have {self.dimension} dimensions; give one "
                "list with the minimum of each and one with the maximum"
            )
        elif isinstance(ranges, list) and any(low > high for low, high in zip(*ranges, strict=False)):
            faults.append("params.ranges has a minimum above its maximum; give the list of the minima first")
        return faults

    def _window_faults(self, where: str) -> list[str]:
        """Returns errors in windows over texts."""
        windows = self.params.windows
        if windows is None:
            return []
        if self.frame is None:
            return [f"{where} has no maximum length; set params.windows.size"]
        faults = []
        if self.limit and self.frame.size > self.limit:
            faults.append(
                f"params.windows.size {windows.size} is more than the {self.limit} tokens of a row; set at most {self.limit}, or "
                "raise batch.max_length"
            )
        if windows.pool == "none" and not self.tokenizer.is_fast:
            faults.append(
                f"{where} has a tokenizer without offsets, from which spans come; set params.windows.pool to mean"
            )
        if windows.pool != "none" and self.shortened and self.params.normalize == "auto":
            faults.append(
                "params.windows pools vectors of length 1, and truncate_dim shortens them; set params.normalize to true"
            )
        return faults or self.frame.faults()

    def notes(self) -> list[str]:
        """Returns notes on defaults without sentence-transformers files, and on unused prompts."""
        notes = []
        if not self.recipe.found:
            normalized = "normalized" if self.params.normalize is True else "not normalized"
            pooling = f"{'+'.join(self.poolings)} pooling" if self.poolings else "the model's own vectors"
            notes.append(f"no sentence-transformers files beside the model: {pooling}, {normalized}")
        notes += self.prompt_notes()
        if self.shortened and self.params.normalize == "auto":
            notes.append(
                "truncate_dim reduces normalized vectors to a length below 1; params.normalize: true corrects that"
            )
        if self.fits:
            notes.append(
                f"precision {self.params.precision} takes the ranges of the dimensions from rows of the first split, for the "
                "whole job; queries need the same, which job.json then holds: params.ranges"
            )
        return notes

    @property
    def ranges(self) -> list[list[float]] | None:
        """Minimum and maximum of each dimension, for int8 and uint8; None if they are not known yet."""
        given = self.params.ranges
        return given if isinstance(given, list) else (self.settings.fitted or {}).get("ranges")

    @property
    def fits(self) -> bool:
        """Whether the ranges of the dimensions are needed and not known yet."""
        return needs_ranges(self.params.precision) and self.ranges is None

    def _see(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"vectors": encode_images(model, inputs, self.poolings)}
