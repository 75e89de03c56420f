"""The program: registers the commands, one module for each group, in the order of `hfbatch --help`.

Each command reads its flags, then imports what it needs, so that help and errors appear immediately.
"""

from __future__ import annotations

from hfbatch.cli import finetune, outputs, predict, run_batch, serve, tools
from hfbatch.cli.terminal import App

app = App(
    help="Run Hugging Face models over large datasets on a Ray cluster, each row exactly once.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
COMMANDS = (
    predict.run,
    predict.predict,
    predict.embed,
    finetune.finetune,
    predict.plan,
    predict.preview,
    serve.serve,
    run_batch.run_batch,
    outputs.status,
    outputs.verify,
    outputs.report,
    tools.tasks,
    tools.engines,
    tools.cache,
    tools.quantize,
    tools.docs,
    tools.schema,
    tools.attention,
    tools.doctor,
    tools.demo,
)
for command in COMMANDS:
    app.command()(command)
