"""Task zero-shot-audio-classification: scores of labels that the user names. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Example, Features, Params
from hfbatch.tasks.parts.audio import SoundLabelTask


class ZeroShotAudioClassificationParams(Params):
    """The labels, and how they are put to the model."""

    candidate_labels: list[str] = Field(min_length=1)
    """The labels to choose among."""
    hypothesis_template: str = "This is a sound of {}."
    """The caption that is compared with the recording, with the label in place of {}."""


class ZeroShotAudioClassification(SoundLabelTask):
    """Labels named by the user, best first, for each recording.

    CLAP hears a part of a long recording that it chooses at random: here by the job's seed and the row's place.
    """

    name = "zero-shot-audio-classification"
    summary = "Scores of labels that you name for a recording, by a model such as CLAP"
    auto_class = "AutoModel"
    pipeline = "zero_shot_audio_classification.ZeroShotAudioClassificationPipeline"
    keeps = ("logits", "candidate_labels")
    outputs: ClassVar[Mapping[str, str]] = {"label": "list<string>, best first", "score": "list<float32>"}
    Params = ZeroShotAudioClassificationParams
    EXAMPLE = Example({"audio": ["bell.wav", "rain.flac"]}, {"candidate_labels": ["a bell", "rain"]})

    params: ZeroShotAudioClassificationParams

    def check(self) -> list[str]:
        """Faults: a template without a place for the label, and what the pipeline refuses."""
        if "{}" in self.params.hypothesis_template:
            return super().check()
        return ["params.hypothesis_template has no {} for the label; write such as 'This is a sound of {}.'"]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Model inputs of each row, made with the row's own seed."""
        from hfbatch.tasks.parts.sampling import row_seeds

        made = []
        for k, seed in enumerate(row_seeds(self.seed, places)):
            with seeded(int(seed)):
                row = {name: array.slice(k, 1) for name, array in columns.items()}
                made.append(super().preprocess(row, places.slice(k, 1)))
        cut = [one.cut for one in made if one.cut is not None]
        return Features(pa.concat_tables([one.table for one in made]), np.concatenate(cut))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """NumPy's global random numbers begin at a seed, and go on as before afterwards."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
