"""Checks the files of a model other than its weights: invalid JSON, code from other repositories, layouts.

Reads the files only. Nothing that they name is downloaded, imported or run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfbatch.hub.jsonfiles import is_pointer, pointer_fault, read_json, read_object

ADAPTER_CONFIG, TOKENIZER_CONFIG = "adapter_config.json", "tokenizer_config.json"
MERGE = (
    "merge the two once: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), save the tokenizer "
    "there too, and give that folder"
)
"""What to do with an adapter that cannot be used as it is."""
OBJECTS = (
    "config.json",
    ADAPTER_CONFIG,
    "generation_config.json",
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "model.safetensors.index.json",
)
"""Files that have to hold a JSON object."""
TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm")
"""Endings of the files that are read whole; weights are not."""
ATTENTION = frozenset(
    ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
)
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""Attention implementations that need a separate library, and its module."""
LIBRARIES: dict[str, dict[str, str]] = {
    "aqlm": {"aqlm": "aqlm[gpu,cpu]"},
    "auto-round": {"auto_round": "auto-round"},
    "awq": {"gptqmodel": "gptqmodel"},
    "bitnet": {},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "fbgemm_fp8": {"fbgemm_gpu": "fbgemm-gpu"},
    "fouroversix": {"fouroversix": "fouroversix"},
    "fp8": {},
    "fp_quant": {"fp_quant": "fp-quant"},
    "gemma": {},
    "gptq": {"gptqmodel": "gptqmodel", "optimum": "optimum"},
    "higgs": {"flute": "flute-kernel", "fast_hadamard_transform": "fast_hadamard_transform"},
    "hqq": {"hqq": "hqq"},
    "mxfp4": {},
    "mxfp8": {},
    "quanto": {"optimum.quanto": "optimum-quanto"},
    "quark": {"quark": "amd-quark"},
    "sinq": {"sinq": "sinq"},
    "spqr": {"spqr_quant": "spqr_quant[gpu]"},
    "torchao": {"torchao": "torchao"},
    "vptq": {"vptq": "vptq"},
}
"""Quantisation methods that transformers loads, with the requirements of each: module to package."""
KERNELS = ("eetq", "metal", "nvfp4")
"""Quantisation methods whose kernels are only on the Hub."""
_SIZES = re.compile(
    r"(size|dim|d_model|n_embd|heads|n_head|channels|experts|num_labels|positions|embeddings)$"
)
_LAYERS = re.compile(r"(layers?|blocks)$")
MOST_LAYERS, LARGEST = 10_000, 1 << 31


def layout_faults(model: str, names: Collection[str], folder: Path | None = None) -> list[str]:
    """Returns the fault of a folder that holds another kind of model. :param names: names of its files."""
    inner = sorted(name for name in names if re.fullmatch(r"0_\w+/config\.json", name))
    if "config.json" not in names and inner:
        return [_old_layout(model, inner[0].partition("/")[0])]
    if ADAPTER_CONFIG in names:
        base = folder and (read_object(folder / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
        of = repr(base) if isinstance(base, str) else "its base model"
        what = "is an adapter" if "config.json" not in names else "has an adapter beside its weights"
        return [f"model {model!r} {what} ({ADAPTER_CONFIG}), which works only with {of}; {MERGE}"]
    if "config.json" not in names:
        return [f"model {model!r} has no config.json; is it a transformers model?"]
    return []


def file_faults(
    model: str, folder: Path, names: Collection[str], trust_remote_code: bool = False
) -> list[str]:
    """Checks the files that are read beside the weights; returns their faults.

    :param model: name of the model, for errors.
    :param names: names of the files in the folder.
    """
    faults = []
    for name in sorted(names):
        if name.count("/") > 1 or not name.endswith(TEXTS):
            continue
        if is_pointer(folder / name):
            faults.append(pointer_fault(model, name))
        elif name in OBJECTS or name == "modules.json" or re.fullmatch(r"\d+_\w+/config\.json", name):
            faults += _json_faults(model, folder, name)
    if faults:
        return faults
    config = read_object(folder / "config.json") or {}
    faults += [*_size_faults(model, config), *_quantisation_faults(model, config, trust_remote_code)]
    faults += _code_faults(model, folder)
    return list(dict.fromkeys(faults))


def _json_faults(model: str, folder: Path, name: str) -> list[str]:
    """Returns the fault of a file that is not JSON, has the wrong structure or is of an older layout."""
    try:
        found = read_json(folder / name)
    except ValueError as error:
        return [f"model {model!r}: {name} is not JSON ({error}); download it again"]
    if name != "modules.json":
        kind = type(found).__name__
        return [] if isinstance(found, dict) else [f"model {model!r}: {name} holds a {kind}, not an object"]
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and isinstance(one.get("type"), str) and isinstance(one.get("path", ""), str)
        for one in found
    ):
        return [f'model {model!r}: modules.json holds no list of objects with "type" and "path"']
    outside = [one["path"] for one in found if one.get("path") and not is_inside(one["path"])]
    if outside:
        return [
            f"model {model!r}: modules.json names the folder {outside[0]!r}, which is not in the model's own"
        ]
    own = [one for one in found if one["type"].startswith("sentence_transformers.")]
    below = [one["path"] for one in own if one["type"].endswith(".Transformer") and one.get("path")]
    return [_old_layout(model, below[0])] if below else []


def is_inside(path: str) -> bool:
    """Returns whether a relative path stays inside its folder."""
    return not Path(path).is_absolute() and ".." not in Path(path).parts


def _old_layout(model: str, inner: str) -> str:
    return (
        f"model {model!r} has its transformer in the folder {inner}, as old versions of sentence-transformers wrote it; "
        f"save it again once: SentenceTransformer({model!r}).save(folder), and give that folder"
    )


def _size_faults(model: str, config: dict[str, Any]) -> Iterator[str]:
    """Yields faults of impossible sizes, with which building the model would exhaust the memory."""
    for name, value in _values(config):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        key = name.rpartition(".")[2]
        limit = MOST_LAYERS if _LAYERS.search(key) else LARGEST if _SIZES.search(key) else None
        if limit is not None and not value <= limit:
            yield f"model {model!r}: config.json has {name} {value!r}, which no model has (at most {limit:,}); fix the file"
        if key in ("hidden_size", "d_model", "n_embd", "num_attention_heads") and value < 1:
            yield f"model {model!r}: config.json has {name} {value!r}; it has to be 1 or more: fix the file"


def _quantisation_faults(model: str, config: dict[str, Any], trust_remote_code: bool) -> Iterator[str]:
    """Yields faults of settings of quantised weights that contradict each other, or whose library this machine does not have."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for given in (part.get("quantization_config") for part in parts):
        if given is None:
            continue
        if contradiction := _contradiction(given):
            yield (
                f"model {model!r}: config.json has a quantization_config with {contradiction}; download the file again, or give the "
                "model without quantisation"
            )
            continue
        method = str(given.get("quant_method") or "bitsandbytes")  # which older files do not name
        method = method.removesuffix("_4bit").removesuffix("_8bit")
        if method in KERNELS:
            yield (
                f"model {model!r}: its weights are quantised by {method}, whose kernels transformers fetches from the Hub and "
                "runs; hfbatch does not: give the model without quantisation, or quantised by another method"
            )
        elif method not in LIBRARIES:
            if not trust_remote_code:
                yield (
                    f"model {model!r}: config.json has quantization_config.quant_method {method!r}, which transformers does "
                    f"not load (it loads: {', '.join(LIBRARIES)}); give the model without quantisation"
                )
        else:
            lacking = [package for module, package in LIBRARIES[method].items() if not _is_there(module)]
            if lacking:
                yield (
                    f"model {model!r}: its weights are quantised by {method}, which needs {' and '.join(lacking)}; run "
                    f"`pip install {' '.join(lacking)}` on every node, or give the model without quantisation"
                )


def _contradiction(given: Any) -> str:
    """Returns which settings of quantised weights cannot hold together; empty if they can."""
    if not isinstance(given, dict):
        return f"{given!r} in place of an object"
    method, flags = given.get("quant_method"), {}
    for name in ("load_in_8bit", "load_in_4bit"):
        if given.get(name) not in (None, False, True):
            return f"{name} {given[name]!r}, which is neither true nor false"
        flags[name] = bool(given.get(name))
    if all(flags.values()):
        return "load_in_8bit and load_in_4bit, both true: weights are in one of them"
    if method is not None and not isinstance(method, str):
        return f"quant_method {method!r}, which is no name"
    flag = next((name for name, on in flags.items() if on), None)
    named = method is None or method.startswith("bitsandbytes")
    if flag and not named:
        return f"quant_method {method!r} and {flag} true, which is of bitsandbytes"
    if named and not flag:
        return f"quant_method {method!r}, and neither load_in_8bit nor load_in_4bit true"
    kind = given.get("bnb_4bit_quant_type", "fp4")
    return "" if kind in ("fp4", "nf4") else f"bnb_4bit_quant_type {kind!r}, which is neither fp4 nor nf4"


def _code_faults(model: str, folder: Path) -> Iterator[str]:
    """Yields faults of names of code and models elsewhere that transformers would download and run unasked."""
    config = read_object(folder / "config.json") or {}
    for name, value in _values(config):
        key, given = name.rpartition(".")[2], str(value)
        where = f"model {model!r}: config.json has {name} {value!r}"
        if ATTENTION & set(name.split(".")) and isinstance(value, str):
            kind = given.rpartition("|")[2]
            if "/" in kind or ":" in kind:
                yield (
                    f"{where}, code on the Hub; hfbatch does not download and run such code: remove {key!r} from "
                    "config.json, and transformers uses its own attention"
                )
            elif kind in FLASH and not _is_there(FLASH[kind]):
                yield (
                    f"{where}, which needs the package flash-attn; install it on every node, or remove {key!r} from "
                    "config.json"
                )
        elif isinstance(value, str) and re.match(r"(hf[-_]hub|local-dir):", given):
            yield f"{where}, which timm would fetch; give a model that has all its files in its own folder"
        elif "model_args" in name.split(".") and re.match(r"pretrained|checkpoint", key) and value:
            yield f"{where}, with which timm would load other weights than the model's own; remove it from config.json"
    for file in ("processor_config.json", "audio_tokenizer_config.json"):
        for name, value in _values(read_object(folder / file) or {}):
            if name.rpartition(".")[2] == "audio_tokenizer_name_or_path":
                yield (
                    f"model {model!r}: {file} has {name} {value!r}, another model that would be fetched; hfbatch reads the "
                    "files of the model alone: choose a model without it"
                )


def _values(values: dict[str, Any], of: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every plain value of a nested object, with its full name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _values(value, f"{of}{name}.")
        elif isinstance(value, list):
            yield from _values({str(at): one for at, one in enumerate(value)}, f"{of}{name}.")
        else:
            yield f"{of}{name}", value


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
