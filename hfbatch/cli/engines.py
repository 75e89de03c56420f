"""The descriptions of engines that `hfbatch engines` shows, and the exported models that `hfbatch cache` shows."""

from __future__ import annotations

import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.filesize import decimal

from hfbatch.console.display import add, say, show
from hfbatch.console.display import table as headed
from hfbatch.engines import ENGINES
from hfbatch.engines.compilers import INSTALL, missing_to_compile
from hfbatch.engines.exports import cache_folder, cached_exports
from hfbatch.spec.engines import EngineSpec

if TYPE_CHECKING:
    from hfbatch.predict.quantize import Quantized


def list_engines() -> list[dict[str, Any]]:
    """The descriptions of all engines, and what each lacks on this machine."""
    sections = {
        get_args(kind.model_fields["name"].annotation)[0]: kind for kind in get_args(get_args(EngineSpec)[0])
    }
    return [
        {
            "name": name,
            "summary": " ".join((sections[name].__doc__ or "").split("\n\n")[0].split()),
            "dtypes": list(kind.dtypes),
            "gpus": kind.gpus,
            "missing": kind.missing(),
            "apart": kind.apart or None,
            "install": f"pip install 'hfbatch[{name}]'" if kind.missing() else None,
            "quantizations": {one: kind.missing(one) for one in kind.quantizations},
            "compile": missing_to_compile() if kind.compiles else None,
        }
        for name, kind in ENGINES.items()
    ]


def render_engines(engines: list[dict[str, Any]], console: Console) -> None:
    """Prints the list."""
    table = headed("engine", "description", "dtypes", "devices", "here")
    table.columns[0].no_wrap = True
    for engine in engines:
        add(
            table,
            (engine["name"], "bold"),
            engine["summary"],
            ", ".join(engine["dtypes"]),
            "GPU, CPU" if engine["gpus"] else "CPU",
            engine["install"] or (f"runs in {engine['apart']}" if engine["apart"] else "installed"),
        )
    show(console, table)
    for engine in engines:
        kinds = [
            f"{name} (needs {' and '.join(missing)})" if missing else name
            for name, missing in engine["quantizations"].items()
        ]
        say(console, f"engine.quantization of {engine['name']}: {', '.join(kinds) or 'none'}")
        if engine["compile"] is not None:
            needs = (
                f"needs {' and '.join(engine['compile'])}; {INSTALL}" if engine["compile"] else "true, false"
            )
            say(console, f"engine.compile of {engine['name']}: {needs}")
    if any(missing for engine in engines for missing in engine["quantizations"].values()):
        say(console, "pip install 'hfbatch[quantization]' installs what quantisation needs.")
    say(console, "`hfbatch docs engines` says which task runs on which engine.")


def render_quantized(found: Quantized, console: Console) -> None:
    """Prints what was written."""
    form = (
        f"{found.engine} graph, {found.quantization}" if ENGINES[found.engine].exports else found.quantization
    )
    say(
        console,
        f"{found.out}: {form}, {decimal(found.bytes)} of weights, {decimal(found.bytes_before)} before",
    )
    if found.guard:
        say(console, found.guard["summary"])


def list_exports() -> list[dict[str, Any]]:
    """The exported models in the cache of this machine, oldest first."""
    return [
        {
            "folder": str(folder),
            "engine": key["engine"],
            "model": key["model"],
            "auto_class": key["auto_class"],
            "quantization": key.get("quantization", "none"),  # absent from what an earlier version made
            "bytes": sum(path.stat().st_size for path in folder.iterdir()),
            "seconds": round(time.time() - folder.stat().st_mtime),
        }
        for folder, key in cached_exports().items()
    ]


def render_exports(exports: list[dict[str, Any]], console: Console) -> None:
    """Prints the list."""
    table = headed("engine", "model", "class", "quantization", "size", "age")
    for export in exports:
        age = timedelta(seconds=export["seconds"])
        add(
            table,
            export["engine"],
            export["model"][:12],
            export["auto_class"],
            export["quantization"],
            decimal(export["bytes"]),
            str(age),
        )
    if exports:
        show(console, table)
    total = decimal(sum(export["bytes"] for export in exports))
    say(console, f"{len(exports)} exported models, {total}, in {cache_folder()}")


def clear_exports() -> list[dict[str, Any]]:
    """Deletes the exported models of this machine; returns what they were."""
    exports = list_exports()
    for export in exports:
        folder = Path(export["folder"])
        # Renamed first: a job that looks for it now finds all of it or nothing.
        folder = folder.rename(folder.with_name(f"{folder.name}.deleted"))
        shutil.rmtree(folder)
    return exports
