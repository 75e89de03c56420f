"""Every task with a tiny model, rows, and transformers' own answers."""

from tests.cases import audio, images, multimodal, questions, text, vision

CASES = {
    **text.CASES, **vision.CASES, **images.CASES, **audio.CASES, **questions.CASES, **multimodal.CASES
}  # fmt: skip
