"""The JSON Schema of the specs, for editors and other programs that read or write specs."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.spec.job import JobSpec, ServeSpec, Spec

DIALECT = "https://json-schema.org/draft/2020-12/schema"
KINDS: dict[str, type[Spec]] = {"job": JobSpec, "finetune": FinetuneSpec, "serve": ServeSpec}
"""The kinds of spec by the name that `hfbatch schema` takes."""


def json_schema(kind: str | None = None) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a spec.

    It describes the complete form of a spec and the shorthands, such as a plain string for `model`. A key without a
    value, which specs accept as well, does not validate.

    :param kind: one of KINDS; None: a schema that accepts all of them.
    """
    if kind is not None:
        return {"$schema": DIALECT, **KINDS[kind].model_json_schema()}
    references, merged = models_json_schema([(spec, "validation") for spec in KINDS.values()])
    return {
        "$schema": DIALECT,
        "title": "hfbatch spec",
        "description": "A job, a fine-tuning job or an endpoint of hfbatch.",
        "anyOf": [references[spec, "validation"] for spec in KINDS.values()],
        **merged,
    }
