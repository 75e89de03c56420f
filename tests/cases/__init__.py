"""Every task with a tiny model, rows, and transformers' own answers."""

from tests.cases import audio, pictures, questions, text, vision

CASES = {**text.CASES, **vision.CASES, **pictures.CASES, **audio.CASES, **questions.CASES}
