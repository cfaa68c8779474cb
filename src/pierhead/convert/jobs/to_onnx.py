"""Exports a Hugging Face model to ONNX with Optimum, and compares both; runs in an environment of its own.

Standalone on purpose. Arguments: the folder to read, the folder to write, and what to do as JSON; each line of its
output is a JSON object.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # isolated as this program runs, it would not look beside itself
_lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
_TEXTS = ("The harbour was quiet.", "Who took the last boat, and why did nobody say a word about it until the morning?")


def say(**line: Any) -> None:
    """One line of output."""
    print(json.dumps(line), file=_lines, flush=True)


def main() -> int:
    """Export as the third argument says."""
    os.dup2(2, 1)
    source, target, told = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    out = target / told["out"]
    say(progress=0.05, text="loading")
    exporters: Any = importlib.import_module("optimum.exporters.onnx")
    options: dict[str, Any] = {"library_name": "transformers", "local_files_only": True, "trust_remote_code": False}
    options |= {"opset": told["opset"]} if told["opset"] else {}
    try:
        source = importlib.import_module("view").view(source, target)
        exporters.main_export(
            model_name_or_path=str(source), output=out, task=told["task"], do_validation=False, **options
        )
    except Exception as exc:  # the last stop of this program: the exporter's reason becomes ours
        sys.stderr.write(f"{type(exc).__name__}: {exc}\n")
        say(error=f"the exporter refused: {' '.join(str(exc).split())[:500] or type(exc).__name__}")
        return 1
    say(progress=0.8, text="comparing")
    say(result={"difference": difference(source, out, told["task"]), "files": beside(source, out)})
    return 0


def beside(source: Path, out: Path) -> list[str]:
    """What belongs to a model beyond its weights (pooling, licence, readme) comes along."""
    made: list[str] = []
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        weights = file.suffix in (".safetensors", ".bin", ".gguf", ".onnx", ".h5", ".msgpack", ".pt")
        if file.is_file() and not weights and not name.name.endswith(".index.json") and not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / name)
            made.append(str(name))
    return made


def difference(source: Path, out: Path, task: str) -> float | None:
    """The largest difference of any number between both models' answers; None for models that are not asked so."""
    if not (out / "model.onnx").is_file():
        return None
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    runtime: Any = importlib.import_module("onnxruntime")
    classes = {
        "feature-extraction": transformers.AutoModel,
        "text-classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
    }
    if task not in classes:
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    model = classes[task].from_pretrained(str(source), local_files_only=True).eval()
    session = runtime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    largest = 0.0
    for text in _TEXTS:
        given = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = model(**given)[0].numpy()
        found = session.run(None, {k: v.numpy() for k, v in given.items() if k in wanted})[0]
        largest = max(largest, float(abs(expected - found).max()))
    return largest


if __name__ == "__main__":
    sys.exit(main())
