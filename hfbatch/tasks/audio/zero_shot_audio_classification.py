"""Task zero-shot-audio-classification: scores user-defined labels for a recording."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.audio.audio import AudioLabelTask
from hfbatch.tasks.base import Example, Features, Params


class ZeroShotAudioClassificationParams(Params):
    """The candidate labels and the caption template."""

    candidate_labels: list[str] = Field(min_length=1)
    """Candidate labels."""
    hypothesis_template: str = "This is a sound of {}."
    """The caption that is compared with the recording; {} is replaced with the label."""


class ZeroShotAudioClassification(AudioLabelTask):
    """Returns user-defined labels, best first, for each recording.

    CLAP takes a random part of a long recording, here chosen by the job's seed and the row's position.
    """

    name = "zero-shot-audio-classification"
    summary = "Scores of labels that you define for a recording, by a model such as CLAP"
    auto_class = "AutoModel"
    pipeline = "zero_shot_audio_classification.ZeroShotAudioClassificationPipeline"
    keeps = ("logits", "candidate_labels")
    outputs: ClassVar[Mapping[str, str]] = {"label": "list<string>, best first", "score": "list<float32>"}
    Params = ZeroShotAudioClassificationParams
    EXAMPLE = Example({"audio": ["bell.wav", "rain.flac"]}, {"candidate_labels": ["a bell", "rain"]})

    params: ZeroShotAudioClassificationParams

    def check(self) -> list[str]:
        """Returns errors for a template without {}, and errors of the pipeline."""
        if "{}" in self.params.hypothesis_template:
            return super().check()
        return ["params.hypothesis_template has no {} for the label; use one such as 'A recording of {}.'"]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns the model inputs of each row, made with the row's own seed."""
        from hfbatch.tasks.generation.sampling import row_seeds

        made = []
        for k, seed in enumerate(row_seeds(self.seed, places)):
            with seeded(int(seed)):
                row = {name: array.slice(k, 1) for name, array in columns.items()}
                made.append(super().preprocess(row, places.slice(k, 1)))
        cut = [one.cut for one in made if one.cut is not None]
        return Features(pa.concat_tables([one.table for one in made]), np.concatenate(cut))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds NumPy's global random state inside the context, and restores it afterwards."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
