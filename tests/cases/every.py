"""Every task with a tiny model, rows, and transformers' own answers."""

from tests.cases import audio, images, multimodal, questions, text, vision

CASES = {
    **text.CASES, **vision.CASES, **images.CASES, **audio.CASES, **questions.CASES, **multimodal.CASES
}  # fmt: skip
EXPORTABLE = {
    "embedding", "feature-extraction", "fill-mask", "image-classification", "image-feature-extraction",
    "multi-vector-embedding", "question-answering", "sparse-embedding", "text-classification", "text-ranking", "token-classification", "zero-shot-classification",
}  # fmt: skip
"""Tasks that need no more of a model than its outputs."""
