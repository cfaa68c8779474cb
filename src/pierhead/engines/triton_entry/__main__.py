"""The program that runs inside a replica: NVIDIA's tritonserver over a model repository made of links; no Pierhead.

Standalone on purpose (standard library only): the same text runs in a sandbox and in a container, behind the bridge.
The server is the one of the wheel ``nvidia-pytriton``, or that of NVIDIA's image.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections import deque
from typing import Any, NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
NATIVE = "/opt/tritonserver"
KEPT = 400  # lines of its log that are searched for the reason of a failure
_FAILED = re.compile(r"failed to load '([^']*)'(?: version \d+)?: (.*?)\"?$")
_POLL = re.compile(r"Poll failed for model directory '([^']*)': (.*?)\"?$")
_PARSE = re.compile(r"Error parsing text-format \S+: (.*)$")
_OTHER = re.compile(r"^(?:E\d{4} \S+ \d+ \S+\] \"?|error: )(.*?)\"?$")
_STUCK = re.compile(r"Failed to preinitialize Python stub: (.*)$")  # after which the server waits for ever
_NOISE = ("CudaDriverHelper", "NVML", "failed to load all models", "unable to get number of CUDA")


class Server(NamedTuple):
    """Where a tritonserver is; ``backends`` may have to be put together (``stub``), ``env`` is what it needs."""

    program: str
    backends: str
    stub: str
    env: dict[str, str]


def main() -> int:
    """Make the repository, run the server to its end; its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--settings", required=True)
    parser.add_argument("--port", required=True)
    parser.add_argument("--metrics-port", required=True)
    args = parser.parse_args()
    settings: dict[str, Any] = json.loads(args.settings)
    with tempfile.TemporaryDirectory(prefix="triton-") as work:
        try:
            server = find(work)
            backends = backends_of(server, work)
            repository = os.path.join(work, "models")
            for model in settings["models"]:
                write(model, args.model_dir, repository, os.listdir(backends))
        except (OSError, LookupError, ValueError) as exc:
            say(str(exc))
            return 1
        prefix = f"pierhead-{os.getpid()}-"
        command = [
            server.program,
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            "--http-address=127.0.0.1",
            f"--http-port={args.port}",
            f"--metrics-port={args.metrics_port}",
            f"--backend-config=python,shm-region-prefix-name={prefix}",
            "--allow-grpc=false",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in settings["load"]),
            *settings["flags"],
        ]
        try:
            return run(command, {**os.environ, **server.env})
        finally:
            for left in glob.glob(f"/dev/shm/{prefix}*"):  # noqa: S108  # of a server that was killed
                os.unlink(left)


# --- the server ---------------------------------------------------------------------------------------------------


def find(work: str) -> Server:
    """The server of NVIDIA's image or of the wheel; LookupError when neither is here."""
    if os.access(f"{NATIVE}/bin/tritonserver", os.X_OK):
        return Server(f"{NATIVE}/bin/tritonserver", f"{NATIVE}/backends", "", {})
    found = importlib.util.find_spec("pytriton")
    if found is None or not found.submodule_search_locations:
        raise LookupError("there is no tritonserver here: neither NVIDIA's image nor the wheel nvidia-pytriton")
    home = os.path.join(next(iter(found.submodule_search_locations)), "tritonserver")
    site = os.path.dirname(os.path.dirname(home))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = os.path.join(home, "python_backend_stubs", version, "triton_python_backend_stub")
    if not os.path.isfile(stub):
        raise LookupError(f"nvidia-pytriton has no Python backend for Python {version}")
    python = environment(work, site, version)
    own = str(sysconfig.get_config_var("LIBDIR") or "")
    libraries = [
        os.path.join(sys.base_prefix, "lib"),
        own,
        "/opt/engine/lib",
        os.path.join(site, "nvidia_pytriton.libs"),
    ]
    env = {
        "PATH": os.pathsep.join((python, os.environ.get("PATH", os.defpath))),
        "LD_LIBRARY_PATH": os.pathsep.join(p for p in libraries if os.path.isdir(p)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    check(stub, env)
    return Server(os.path.join(home, "bin", "tritonserver"), os.path.join(home, "backends"), stub, env)


def check(stub: str, env: dict[str, str]) -> None:
    """Whether the Python backend's program runs here; it says how it is used, and ends with 1. LookupError if not."""
    tried = subprocess.run(
        [stub], env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False, errors="replace"
    )
    if tried.returncode != 1:
        said = " ".join(tried.stderr.split())[-300:]
        raise LookupError(
            f"Triton's Python backend cannot run in this Python, which must have its shared library: {said}"
        )


def environment(work: str, site: str, version: str) -> str:
    """The programs' folder of a Python environment whose packages are in ``site``.

    The Python inside the Python backend minds no PYTHONPATH: it takes the packages that belong to the first
    ``python3`` on PATH.
    """
    place = os.path.join(work, "environment")
    base = os.path.realpath(sys.executable)
    os.makedirs(os.path.join(place, "bin"))
    os.makedirs(os.path.join(place, "lib", f"python{version}"))
    with open(os.path.join(place, "pyvenv.cfg"), "w", encoding="utf-8") as file:
        file.write(f"home = {os.path.dirname(base)}\nversion = {version}\n")
    os.symlink(base, os.path.join(place, "bin", "python3"))
    os.symlink(site, os.path.join(place, "lib", f"python{version}", "site-packages"))
    return os.path.join(place, "bin")


def backends_of(server: Server, work: str) -> str:
    """The backends' folder; the wheel's lacks the part of the Python backend that fits this Python."""
    if not server.stub:
        return server.backends
    place = os.path.join(work, "backends")
    for name in os.listdir(server.backends):
        os.makedirs(os.path.join(place, name))
        link_all(os.path.join(server.backends, name), os.path.join(place, name))
    os.symlink(server.stub, os.path.join(place, "python", os.path.basename(server.stub)))
    return place


# --- the repository -----------------------------------------------------------------------------------------------


def write(model: dict[str, Any], model_dir: str, repository: str, backends: list[str]) -> None:
    """One model of the repository: links to the model's files, and a configuration that says what was wanted."""
    place = os.path.join(repository, model["name"])
    os.makedirs(place)
    for inside, source in model["files"].items():
        target = os.path.join(place, inside)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.path.join(model_dir, source), target)
    config = os.path.join(place, "config.pbtxt")
    text = ""
    if os.path.islink(config):
        with open(config, encoding="utf-8") as file:
            text = file.read()
        os.unlink(config)
    text = merged(text, model["config"])
    versions = [name for name in os.listdir(place) if name.isdigit()]
    if not versions:
        os.mkdir(os.path.join(place, "1"))  # an ensemble has a version, too, which no store keeps: it is empty
    onnx = backend_of(text) == "onnxruntime" or (not backend_of(text) and holds(place, versions, "model.onnx"))
    if onnx and "onnxruntime" not in backends:
        text = python_for_onnx(place, versions, text, model.get("threads", 0))
    with open(config, "w", encoding="utf-8") as file:
        file.write(text)


def holds(place: str, versions: list[str], name: str) -> bool:
    """Whether a version of a model has this file, from which Triton, too, tells the backend."""
    return any(os.path.lexists(os.path.join(place, version, name)) for version in versions)


def python_for_onnx(place: str, versions: list[str], text: str, threads: int) -> str:
    """Let the Python backend serve an ONNX model where the server has no backend for it."""
    for version in versions:
        os.symlink(os.path.join(HERE, "onnx_model.py"), os.path.join(place, version, "model.py"))
    filename = re.search(r'^\s*default_model_filename\s*:\s*"([^"]*)"', text, re.MULTILINE)
    values = {"onnx_file": filename[1] if filename else "model.onnx", "threads": str(threads)}
    kept = without(text, ("platform", "backend", "default_model_filename", "optimization"))
    for key, value in values.items():
        kept += f"parameters {{ key: {json.dumps(key)} value: {{ string_value: {json.dumps(value)} }} }}\n"
    return f'backend: "python"\n{kept}'


def backend_of(text: str) -> str:
    """The backend that a configuration names, in today's word or the old one."""
    found = re.search(r'^\s*(?:backend|platform)\s*:\s*"([a-z]+)', text, re.MULTILINE)
    return found[1] if found else ""


def merged(text: str, wanted: dict[str, str]) -> str:
    """A configuration with some of its top-level fields as they are wanted."""
    kept = without(text, tuple(wanted))
    return (kept.rstrip() + "\n" if kept.strip() else "") + "".join(f"{line}\n" for line in wanted.values())


def without(text: str, names: tuple[str, ...]) -> str:
    """The text format of a message without these top-level fields, be they scalars, messages or lists."""
    out: list[str] = []
    at = 0
    while at < len(text):
        end = field_end(text, at)
        name = re.match(r"\s*(?:#[^\n]*\n\s*)*(\w+)", text[at:end])
        if name is None or name[1] not in names:
            out.append(text[at:end])
        at = end
    return "".join(out)


def field_end(text: str, at: int) -> int:
    """Where the field that begins at ``at`` ends: at a line's end outside of quotes and brackets."""
    depth, quote, seen = 0, "", False
    while at < len(text):
        char = text[at]
        at += 1
        if quote:
            at += char == "\\"
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char == "#":
            at = (text.find("\n", at) + 1 or len(text)) - 1
        elif char in "{[<":
            depth += 1
        elif char in "}]>":
            depth -= 1
        elif char == "\n" and depth <= 0 and seen and not opens(text, at):
            break
        seen = seen or not char.isspace()
    return at


def opens(text: str, at: int) -> bool:
    """Whether the value of the field before stands on the next line."""
    rest = text[at:].lstrip()
    before = text[:at].rstrip()
    return rest[:1] in ("{", "[") or before.endswith(":")


def link_all(source: str, target: str) -> None:
    """Links to everything that is in a folder."""
    for name in os.listdir(source):
        os.symlink(os.path.join(source, name), os.path.join(target, name))


# --- running it ---------------------------------------------------------------------------------------------------


def run(command: list[str], env: dict[str, str]) -> int:
    """The server from its start to its end, its words passed on; the last line says why where it fails."""
    libc = ctypes.CDLL(None)
    server = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=lambda: libc.prctl(1, signal.SIGKILL),  # it does not outlive us
    )
    ending = False

    def end(_number: int, _frame: object) -> None:
        nonlocal ending
        ending = True
        server.terminate()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines: deque[str] = deque(maxlen=KEPT)
    assert server.stdout is not None
    for line in server.stdout:
        if not line.startswith(("|", "+")):  # its tables are as wide as a page is long
            sys.stderr.write(line)
            sys.stderr.flush()
            lines.append(line.rstrip())
        if _STUCK.search(line):
            server.kill()
    code = server.wait()
    if code and not ending:
        say(reason(list(lines)) or f"tritonserver ended with status {code}")
    return 0 if ending and code >= 0 else code if code >= 0 else 128 - code


def reason(lines: list[str]) -> str:
    """Why it did not start, in Triton's own words: the models it could not load, else its first error."""
    found: dict[str, str] = {}
    parse = ""
    for line in lines:
        if said := _PARSE.search(line) or _STUCK.search(line):
            parse = parse or said[1]
        for pattern in (_POLL, _FAILED):
            said = pattern.search(line)
            if said and (said[1] not in found):
                found[said[1]] = said[2].replace("\\n", " ").strip()
    told = "; ".join(f"{os.path.basename(name)}: {why}" for name, why in found.items())
    if parse:
        told = f"{told} ({parse})" if told else parse
    if told:
        return f"the model could not be loaded: {told}"[:900]
    others = [said[1] for line in lines if (said := _OTHER.match(line)) and not any(n in said[1] for n in _NOISE)]
    return others[-1][:900] if others else ""


def say(text: str) -> None:
    """The last word of a program that cannot go on."""
    print(f"engine: {text}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
