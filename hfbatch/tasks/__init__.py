"""One file per task: columns to features, features to output columns.

A new task is one new file here with a subclass of `Task`, and its line in `TASKS`.
"""

from importlib import import_module

from hfbatch.errors import SpecError
from hfbatch.tasks.base import Task

TASKS = {
    "audio-classification": "hfbatch.tasks.audio_classification:AudioClassification",
    "automatic-speech-recognition": "hfbatch.tasks.speech_recognition:SpeechRecognition",
    "depth-estimation": "hfbatch.tasks.depth_estimation:DepthEstimation",
    "embedding": "hfbatch.tasks.embedding:Embedding",
    "feature-extraction": "hfbatch.tasks.feature_extraction:FeatureExtraction",
    "fill-mask": "hfbatch.tasks.fill_mask:FillMask",
    "image-classification": "hfbatch.tasks.image_classification:ImageClassification",
    "image-segmentation": "hfbatch.tasks.image_segmentation:ImageSegmentation",
    "object-detection": "hfbatch.tasks.object_detection:ObjectDetection",
    "question-answering": "hfbatch.tasks.question_answering:QuestionAnswering",
    "summarization": "hfbatch.tasks.seq2seq:Summarization",
    "text-classification": "hfbatch.tasks.text_classification:TextClassification",
    "text-generation": "hfbatch.tasks.text_generation:TextGeneration",
    "text-ranking": "hfbatch.tasks.text_ranking:TextRanking",
    "text2text-generation": "hfbatch.tasks.seq2seq:Text2TextGeneration",
    "token-classification": "hfbatch.tasks.token_classification:TokenClassification",
    "translation": "hfbatch.tasks.seq2seq:Translation",
    "zero-shot-classification": "hfbatch.tasks.zero_shot_classification:ZeroShotClassification",
    "zero-shot-image-classification": "hfbatch.tasks.zero_shot_image_classification:ZeroShotImageClassification",
    "zero-shot-object-detection": "hfbatch.tasks.zero_shot_object_detection:ZeroShotObjectDetection",
}
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}


def task_class(name: str) -> type[Task]:
    """The class of a task, by its name or an old alias. :raises SpecError: for an unknown name."""
    home = TASKS.get(ALIASES.get(name, name))
    if home is None:
        raise SpecError(f"unknown task {name!r}; choose one of: {', '.join(TASKS)}")
    module, _, attribute = home.partition(":")
    return getattr(import_module(module), attribute)
