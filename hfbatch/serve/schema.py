"""The request and the response of `/predict` as JSON Schema, from the inputs and outputs of the task."""

from __future__ import annotations

from typing import Any

from hfbatch.serve.rows import RowReader
from hfbatch.tasks.base import InputColumn


def predict_schema(reader: RowReader) -> dict[str, Any]:
    """What OpenAPI says of `/predict`."""
    inputs = {name: {"description": _wants(column)} for name, column in reader.inputs.items()}
    required = [name for name, column in reader.inputs.items() if column is None or column.required]
    row = {"type": "object", "properties": inputs, "required": required, "additionalProperties": False}
    outputs = {field.name: {"description": str(field.type)} for field in reader.task.output_fields()}
    reject = {
        "type": "object",
        "properties": {
            "row": {"type": "integer", "description": "position in the request, from 0"},
            **{name: {"type": "string"} for name in ("stage", "error", "message")},
        },
    }
    answer = {
        "rows": _array({"anyOf": [{"type": "object", "properties": outputs}, {"type": "null"}]}),
        "rejects": _array(reject),
    }
    return {
        "requestBody": {"required": True, **_content({"rows": _array(row)}, ["rows"])},
        "responses": {
            "200": {"description": "rows in the order of the request", **_content(answer, list(answer))}
        },
    }


def _wants(column: InputColumn | None) -> str:
    if column is None:
        return "a column of the template"
    return column.wants + ("; a `data:` URL with the bytes in base64" if column.files else "")


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _content(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": required}
    return {"content": {"application/json": {"schema": schema}}}
