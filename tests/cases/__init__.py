"""Every task with a tiny model, rows, and transformers' own answers."""

from tests.cases import audio, multimodal, text, vision

CASES = {**text.CASES, **vision.CASES, **audio.CASES, **multimodal.CASES}
