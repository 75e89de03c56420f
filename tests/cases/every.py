"""Every task with a tiny model, rows, and transformers' own answers."""

from tests.cases import audio, multimodal, pictures, questions, text, vision

CASES = {
    **text.CASES, **vision.CASES, **pictures.CASES, **audio.CASES, **questions.CASES, **multimodal.CASES
}  # fmt: skip
