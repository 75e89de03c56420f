"""The model card: what the model is, learnt from what, how well it does, how to use it."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping
from typing import Any

from hfbatch.finetune_spec import FinetuneSpec
from hfbatch.tasks import task_class
from hfbatch.train.report import figures

MOST_LABELS = 50
"""Labels that the card counts; the commonest of more."""
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

## How well it does

Measured on {{ "{:,}".format(m.data.rows.eval.rows) }} rows, each once. The baseline is a guess without a model; before is
the model before its first step.

| metric | baseline | before | this model |
|---|---:|---:|---:|
{% for one in table %}
| {{ one.name | text }} | {{ one.baseline | figure }} | {{ one.before | figure }} | {{ (one.best if one.merged is none else one.merged) | figure }} |
{% endfor %}

## What it has learnt from

{{ "{:,}".format(m.data.rows.train.rows) }} rows, {{ "{:,}".format(m.data.rows.train.truncated) }} of them cut to the length limit; \
the fingerprint of the data is `{{ m.data.digest }}`.
{% if labels %}

| label | rows |
|---|---:|
{% for label, rows in labels %}
| {{ label | text }} | {{ "{:,}".format(rows) }} |
{% endfor %}
{% endif %}

## How it was trained

Best step {{ "{:,}".format(m.best.step) }}; {{ "{:,}".format(m.trainable) }} of {{ "{:,}".format(m.weights) }} weights trained; \
fingerprint of the training `{{ m.fingerprint }}`.

{{ spec | fenced("yaml") }}

Versions: {% for name, version in m.versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last else "." }}{% endfor %}

"""


def model_card(metrics: Mapping[str, Any], name: str, where: str, auto_class: str) -> str:
    """The text of README.md.

    :param metrics: the content of metrics.json.
    :param name: what to call the model.
    :param where: the folder, or the Hub name, that it is loaded from.
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
    # Text for a file of Markdown, not for a page: jinja2's escaping is for the latter.
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
    """The command that predicts with the model, for a shell. :param where: the folder or Hub name of the model."""
    return shlex.join(
        ["hfbatch", "predict", metrics["task"], "INPUT", "OUTPUT", "--model", where, *flags_of(metrics)]
    )


def flags_of(metrics: Mapping[str, Any]) -> list[str]:
    """What makes the task read the columns of the training, and answer as the model was measured."""
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
    """Text as Markdown that shows it in one line: nothing in it is markup, HTML or the end of a table's cell."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    escaped = html.escape(" ".join(printable.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#|~$!])", r"\\\1", escaped)


def fenced(text: str, language: str) -> str:
    """Text as a block of code, which nothing in it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(longest + 1, 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
