"""Jobs whose input is rendered from columns: their results are those of a column with the text, and the plan checks them."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hfbatch import JobSpec, SpecError
from hfbatch.predict.plan import make_plan
from hfbatch.predict.preview import preview
from hfbatch.spec.job import apply_overrides
from hfbatch.tasks import TASKS, task_class
from tests.jobs.here import job_here
from tests.jobs.tools import call, make_spec, read_output, read_rejects, sentences
from tests.models.multimodal import tiny_llava
from tests.models.text import CHAT_TEMPLATE, tiny_llama

TEMPLATE = "{{ title }}: {{ body }}{% if stars %} ({{ stars }} stars){% endif %}"
ROWS = 40
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("llama"), CHAT_TEMPLATE, max_position_embeddings=1024)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Rows with columns to render, with what the templates give of them, and with texts that no job is to read."""
    stars = [None if k % 3 == 0 else k % 5 for k in range(ROWS)]
    titles, bodies = sentences(ROWS, 1, most=1), sentences(ROWS, 2, most=2)
    bodies[3] = "{{ title }} {% endif %}"
    ready = [
        f"{title}: {body}" + (f" ({n} stars)" if n else "")
        for title, body, n in zip(titles, bodies, stars, strict=True)
    ]
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in ready
    ]
    columns = {"id": range(ROWS), "title": titles, "body": bodies, "stars": stars}
    return write(tmp_path / "in", {**columns, "text": ["other"] * ROWS, "ready": ready, "chats": chats})


def write(folder: Path, columns: dict[str, Any]) -> Path:
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=16)
    return folder


def faults_of(spec: JobSpec) -> str:
    with pytest.raises(SpecError) as caught:
        make_plan(spec)
    return "\n".join(caught.value.faults)


@pytest.mark.parametrize("engine", ["torch", "continuous"])
@pytest.mark.parametrize("param", ["template", "messages"])
def test_the_results_are_those_of_a_column_with_the_text(
    tmp_path: Path, books: Path, llama: str, engine: str, param: str
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEMPLATE}]
    given = TEMPLATE if param == "template" else messages
    ready = {"text": "ready"} if param == "template" else {"messages": "chats"}
    options = {"engine": engine, "output": {"keep": ["id"]}}
    specs = [
        make_spec("text-generation", llama, books, tmp_path / "a", params={param: given, **GREEDY}, **options),
        make_spec("text-generation", llama, books, tmp_path / "b", input={"columns": ready}, params=GREEDY, **options),
    ]  # fmt: skip
    for spec in specs:
        assert job_here(spec).exit_code == 0
    found, expected = (read_output(spec.output.path) for spec in specs)
    assert found.column_names == ["id", "generated_text"]
    assert found.equals(expected)
    assert len(found) == ROWS


def test_rows_with_nulls_are_rejected_and_all_columns_pass_through(tmp_path: Path, encoder: str) -> None:
    columns = {"id": range(4), "body": ["a", None, "b", "c"], "n": [1, 1, 0, None], "text": ["other"] * 4}
    source, template = write(tmp_path / "in", columns), "{{ body }} {{ 6 // n }}"
    spec = make_spec("embedding", encoder, source, tmp_path / "out", params={"template": template},
                     input={"filter": "id < 3"}, rejects={"max_fraction": 1})  # fmt: skip
    assert job_here(spec).exit_code == 0
    found = read_output(tmp_path / "out")
    assert found.drop_columns(["embedding"]).to_pylist() == [{"id": 0, "body": "a", "n": 1, "text": "other"}]
    rejects = read_rejects(tmp_path / "out")
    assert [(row["id"], row["body"], row["hfbatch_stage"]) for row in rejects] == [
        (1, None, "preprocess"), (2, "b", "preprocess"),
    ]  # fmt: skip
    assert [(row["hfbatch_error"], row["hfbatch_message"]) for row in rejects] == [
        ("NullInput", "column body is null"), ("ZeroDivisionError", "integer division or modulo by zero"),
    ]  # fmt: skip
    other = spec.model_copy(update={"params": {"template": "{{ body }}"}})
    assert f"params.template (there: {template!r}, now: '{{{{ body }}}}')" in faults_of(other)


def test_the_plan_reports_what_is_wrong(tmp_path: Path, books: Path, encoder: str, llama: str) -> None:
    def faults(params: dict[str, Any], task: str = "text-generation", **mapped: str) -> str:
        name = encoder if task == "embedding" else llama
        return faults_of(
            make_spec(task, name, books, tmp_path / "out", input={"columns": mapped}, params=params)
        )

    shown = faults({"template": "Say {{ titel }} {{ body }}"}, "embedding")
    assert shown == (
        "params.template names the column 'titel', which is not in input (has: id, title, body, stars, text, ready, "
        "chats): Say {{ titel }} {{ body }}"
    )
    assert "params.template, line 1 of the template: Expected an expression" in faults(
        {"template": "{% if %}"}
    )
    both = faults({"template": "{{ titel }}", "max_new_tokens": 0})
    assert "params.max_new_tokens" in both
    assert "'titel'" in both
    assert "'text'" not in both
    chat = [{"role": "user", "content": "{{ a }}\n{{ b|random }}"}]
    assert "params.messages, line 2 of the template: No filter named 'random'" in faults({"messages": chat})
    assert "gives the input 'text' of the task; leave text out of input.columns" in faults(
        {"template": "{{ body }}"}, text="body"
    )
    assert "leave messages out of input.columns" in faults({"template": "{{ body }}"}, messages="chats")
    chat = [{"role": "user", "content": "{{ body }}"}]
    assert "params.template and params.messages both give" in faults({"template": "a", "messages": chat})
    parts = [{"role": "user", "content": [{"type": "image"}]}]
    assert "write each content as one text" in faults({"messages": parts})
    assert "unknown key 'params.messages'" in faults({"messages": chat}, "embedding")
    assert "params.messages" in faults({"messages": []})
    plain = tiny_llama(tmp_path / "plain")
    assert "no chat template" in faults_of(
        make_spec("text-generation", plain, books, tmp_path / "out", params={"messages": chat})
    )


def test_columns_that_cannot_be_printed_or_have_the_name_of_the_text(tmp_path: Path, encoder: str) -> None:
    source = write(tmp_path / "in", {"id": [1], "photo": [b"1"], "hfbatch_text": ["a"]})
    spec = make_spec("embedding", encoder, source, tmp_path / "out", params={"template": "{{ photo }}"})
    shown = faults_of(spec)
    assert "params.template names the column 'photo', which is binary and no text" in shown
    assert "input has a column 'hfbatch_text'" in shown


def test_a_preview_shows_the_text_beside_the_output(tmp_path: Path, books: Path, llama: str) -> None:
    arguments = ["preview", "text-generation", str(books), "-m", llama, "--rows", "2", "--json"]
    options = ["--param", "max_new_tokens=2", "--param", "do_sample=false"]
    shown = call(
        *arguments, *options, "--param", "template=Q: {{ title }}\nA:", "--set", "model.dtype=float32"
    )
    assert shown.exit_code == 0, shown.output
    first = json.loads(shown.stdout)["rows"][0]
    text = first["input"]["hfbatch_text"]
    assert text == f"Q: {sentences(ROWS, 1, most=1)[0]}\nA:"
    assert first["output"]["generated_text"].startswith(text)


def test_the_command_line_takes_a_template_as_it_is_written() -> None:
    for text in (
        "Q: is it {{ text }}?",
        "a\n\n b {{ c }}",
        "12",
        "[x]",
        "{{ a }}",
        '"{{ a }}" is by whom?',
        "ü 🙂",
    ):
        assert apply_overrides({}, [f"params.template={text}"]) == {"params": {"template": text}}
    assert apply_overrides({}, [r'params.template="a\n{{ b }}"']) == {"params": {"template": "a\n{{ b }}"}}


def test_images_stand_where_the_messages_say(tmp_path: Path) -> None:
    images = []
    for k in range(3):
        file = BytesIO()
        Image.new("RGB", (32, 32), (60 * k, 200 - 60 * k, 30)).save(file, "PNG")
        images.append(file.getvalue())
    asked = [f"Is it {name}" for name in ("red", "green", "blue")]
    parts = [
        [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image", "text": ""}]}]
        for text in asked
    ]
    columns = {"id": range(3), "image": images, "name": ["red", "green", "blue"], "chats": parts}
    source, model = write(tmp_path / "in", columns), tiny_llava(tmp_path / "llava")
    content = [{"type": "text", "text": "Is it {{ name }}"}, {"type": "image"}]
    given = {"messages": [{"role": "user", "content": content}], **GREEDY}
    rendered = make_spec("image-text-to-text", model, source, "-", params=given)
    read = make_spec(
        "image-text-to-text", model, source, "-", params=GREEDY, input={"columns": {"messages": "chats"}}
    )
    found, expected = ([one["output"] for one in preview(spec).rows] for spec in (rendered, read))
    assert found == expected
    assert len(found) == 3


def test_tasks_that_read_a_text_have_the_param() -> None:
    have = {name for name in TASKS if "template" in task_class(name).Params.model_fields}
    read = {name for name in TASKS if "string" in [column.wants for column in task_class(name).inputs]}
    assert have == read
    assert have > {"embedding", "text-classification", "translation", "summarization", "question-answering"}
    chats = {name for name in TASKS if "messages" in task_class(name).Params.model_fields}
    assert chats == {"text-generation", "image-text-to-text", "any-to-any"}
