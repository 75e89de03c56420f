"""The model card: base model and training, training data, metrics, and usage."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping
from typing import Any

from hfbatch.pages.training import figures
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.tasks import task_class

MOST_LABELS = 50
"""Maximum number of labels that the card lists, the most frequent ones."""
TEMPLATE = """---
{{ card_data }}
---

# {{ model_name | text }}

{{ m.model.name | text }} fine-tuned for {{ m.task }} ({{ m.method }}) with hfbatch {{ m.hfbatch }}.

## How to use it

Over a dataset:

{{ command | fenced("bash") }}

In Python:

```python
{% if m.task == "embedding" %}
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({{ where | tojson }})
{% else %}
from transformers import {{ auto_class }}, AutoProcessor

model = {{ auto_class }}.from_pretrained({{ where | tojson }})
processor = AutoProcessor.from_pretrained({{ where | tojson }})  # or the tokenizer, where there is nothing else
{% endif %}
```

## Evaluation

Measured on {{ "{:,}".format(m.data.rows.eval.rows) }} rows, each once. The baseline is a prediction without a model; before is
the model before its first step.

| metric | baseline | before | this model |
|---|---:|---:|---:|
{% for one in table %}
| {{ one.name | text }} | {{ one.baseline | figure }} | {{ one.before | figure }} | {{ (one.best if one.merged is none else one.merged) | figure }} |
{% endfor %}

## Training data

{{ "{:,}".format(m.data.rows.train.rows) }} rows, {{ "{:,}".format(m.data.rows.train.truncated) }} of them truncated; \
the fingerprint of the data is `{{ m.data.digest }}`.
{% if labels %}

| label | rows |
|---|---:|
{% for label, rows in labels %}
| {{ label | text }} | {{ "{:,}".format(rows) }} |
{% endfor %}
{% endif %}

## Training

Best step {{ "{:,}".format(m.best.step) }}; {{ "{:,}".format(m.trainable) }} of {{ "{:,}".format(m.weights) }} weights trained; \
fingerprint of the training `{{ m.fingerprint }}`.

{{ spec | fenced("yaml") }}

Versions: {% for name, version in m.versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last else "." }}{% endfor %}

"""


def model_card(metrics: Mapping[str, Any], name: str, where: str, auto_class: str) -> str:
    """Renders the text of README.md.

    :param metrics: the content of metrics.json.
    :param name: name of the model.
    :param where: the folder or Hub name that it is loaded from.
    :param auto_class: the transformers class that loads it.
    """
    from huggingface_hub import EvalResult, ModelCardData
    from jinja2 import Environment, StrictUndefined

    results = [
        EvalResult(
            task_type=metrics["task"],
            dataset_type="parquet",
            dataset_name=f"evaluation rows, data {metrics['data']['digest'][:12]}",
            metric_type=one["name"],
            metric_value=one["best"] if one["merged"] is None else one["merged"],
        )
        for one in figures(metrics)
    ]
    data = ModelCardData(
        model_name=" ".join(name.split()),
        base_model=metrics["model"]["name"] if metrics["model"]["hub"] else None,
        library_name="transformers",
        pipeline_tag=metrics["task"],
        tags=["hfbatch", metrics["method"]],
        eval_results=results,
    )
    # The result is Markdown; jinja2's autoescaping is for HTML.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # noqa: S701
    environment.filters.update(figure=_figure, text=as_markdown, fenced=fenced)
    return environment.from_string(TEMPLATE).render(
        card_data=data.to_yaml(),
        model_name=name,
        where=where,
        auto_class=auto_class,
        command=command_of(metrics, where),
        m=metrics,
        table=figures(metrics),
        labels=sorted(metrics["data"]["labels"].items(), key=lambda one: -one[1])[:MOST_LABELS],
        spec=FinetuneSpec.model_validate(metrics["spec"]).to_yaml(),
    )


def command_of(metrics: Mapping[str, Any], where: str) -> str:
    """Returns a shell command that predicts with the model. :param where: the folder or Hub name of the model."""
    return shlex.join(
        ["hfbatch", "predict", metrics["task"], "INPUT", "OUTPUT", "--model", where, *flags_of(metrics)]
    )


def flags_of(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the flags with which prediction reads the training's columns, and predicts as in its evaluation."""
    inputs = {column.name for column in task_class(metrics["task"]).inputs}
    mapped = metrics["spec"]["train"]["columns"].items()
    columns = [("words" if name == "tokens" else name, column) for name, column in mapped]
    flags = [part for name, column in columns if name in inputs for part in ("--column", f"{name}={column}")]
    if metrics["task"] == "token-classification":
        flags += ["--param", "aggregation_strategy=first"]
    if metrics["task"] == "question-answering" and metrics["data"]["labels"].get("unanswerable"):
        flags += ["--param", "handle_impossible_answer=true"]
    return flags


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def as_markdown(text: str) -> str:
    """Escapes text for one line of Markdown: no markup, HTML or table separators."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    escaped = html.escape(" ".join(printable.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#|~$!])", r"\\\1", escaped)


def fenced(text: str, language: str) -> str:
    """Returns text as a code block with a fence that the text does not contain."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(longest + 1, 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
