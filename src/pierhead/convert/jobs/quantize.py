"""Quantizes a GGUF file with llama-quantize and measures perplexity; runs in an environment of its own.

Standalone on purpose (standard library, ik-llama-cpp-python and numpy only). Arguments: the folder to read, the folder
to write, and what to do as JSON; each line of its output is a JSON object.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)")
_FALLBACK = re.compile(r"(\d+) of (\d+) tensor\(s\) required fallback")


_lines = os.fdopen(os.dup(1), "w", encoding="utf-8")  # ours alone: what llama.cpp writes to stdout goes to stderr


def say(**line: Any) -> None:
    """One line of output."""
    print(json.dumps(line), file=_lines, flush=True)


class Refused(Exception):
    """What a person can act on."""


def main() -> int:
    """Do what the third argument says."""
    os.dup2(2, 1)
    source, target, told = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    try:
        say(result=(quantize if told["do"] == "quantize" else perplexity)(source, target, told))
    except Refused as exc:
        say(error=str(exc))
        return 1
    return 0


def quantize(source: Path, target: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Write the new file; how many tensors there are, and for how many another type had to be taken."""
    package: Any = importlib.import_module("ik_llama_cpp.quantize")
    argv = [str(package.find_quantize_bin())]
    argv += ["--allow-requantize"] if told["allow_requantize"] else []
    argv += ["--pure"] if told["pure"] else []
    argv += ["--leave-output-tensor"] if told["keep_output"] else []
    argv += ["--imatrix", str(target / told["imatrix"]), "--hide-imatrix"] if told["imatrix"] else []
    argv += [str(source / told["file"]), str(target / told["out"]), told["type"], str(told["threads"])]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    found = {"tensors": 0, "fallbacks": 0}
    words: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        if tensor := _TENSOR.search(line):
            found["tensors"] = int(tensor[2])
            say(progress=int(tensor[1]) / int(tensor[2]), text=tensor[3])
        elif fallback := _FALLBACK.search(line):
            found["fallbacks"] = int(fallback[1])
        words = [*words[-30:], line.strip()]
    if process.wait() or not (target / told["out"]).is_file():
        sys.stderr.write("\n".join(words) + "\n")
        raise Refused(reason(words))
    return found


def reason(words: list[str]) -> str:
    """What llama-quantize said of a failure, in one line."""
    telling = [w for w in words if "error" in w.lower() or "failed" in w.lower() or "not " in w.lower()]
    text = (telling or words or ["it said nothing"])[0 if telling else -1]
    return f"llama.cpp's quantizer refused: {text[:400]}"


def perplexity(source: Path, target: Path, told: dict[str, Any]) -> dict[str, Any]:
    """What two models make of the same text: perplexities, and how often both think the same token likeliest."""
    numpy: Any = importlib.import_module("numpy")
    text = (target / told["text"]).read_text(encoding="utf-8")
    files = (source / told["file"], target / told["out"])
    (old, top_old), (new, top_new) = (score(file, text, told, turn) for turn, file in enumerate(files))
    change = new - old
    return {
        "tokens": len(old),
        "before": float(numpy.exp(old.mean())),
        "after": float(numpy.exp(new.mean())),
        "error": float(change.std() / len(change) ** 0.5),
        "same_top": float((top_old == top_new).mean()),
    }


def score(file: Path, text: str, told: dict[str, Any], turn: int) -> tuple[Any, Any]:
    """For each scored token its surprise in nats, and which token was likeliest in its place."""
    numpy: Any = importlib.import_module("numpy")
    llama: Any = importlib.import_module("ik_llama_cpp._internals")
    try:
        model = llama.IkModel(str(file))
    except RuntimeError as exc:
        raise Refused("its engine cannot load this model") from exc
    tokens = model.tokenize(text)
    size = told["context"]
    if len(tokens) < size:
        raise Refused(f"the text has {len(tokens)} tokens; it needs {size} or more")
    try:
        context = llama.IkContext(model, n_ctx=size, n_threads=told["threads"], flash_attn=False)
    except RuntimeError as exc:
        raise Refused("there is no room for the context") from exc
    windows = min((len(tokens) - size) // (size // 2) + 1, told["windows"])
    surprises: list[float] = []
    tops: list[int] = []
    for i in range(windows):
        for surprise, top in window(numpy, llama, context, tokens[i * (size // 2) :][:size]):
            surprises.append(surprise)
            tops.append(top)
        say(progress=(turn + (i + 1) / windows) / 2, text="perplexity")
    return numpy.array(surprises), numpy.array(tops)


def window(numpy: Any, llama: Any, context: Any, tokens: list[int]) -> Iterator[tuple[float, int]]:
    """The second half of one window: each token has at least half a window before it."""
    context.kv_cache_clear()
    batch = llama.make_batch_range(tokens, pos_start=0)
    half = len(tokens) // 2
    try:
        for i in range(half - 1, len(tokens)):
            batch.logits[i] = 1
        if context.decode(batch):
            raise Refused("its engine could not run this model")
        for i in range(half - 1, len(tokens) - 1):
            row = context.get_logits(i)
            if not row:
                raise Refused("this model gives no logits: perplexity is for models that write")
            logits = numpy.ctypeslib.as_array(row, (context.model.n_vocab,)).astype(numpy.float64)
            top = logits.max()
            yield float(top + numpy.log(numpy.exp(logits - top).sum()) - logits[tokens[i + 1]]), int(logits.argmax())
    finally:
        llama.C.llama_batch_free(batch)


if __name__ == "__main__":
    sys.exit(main())
