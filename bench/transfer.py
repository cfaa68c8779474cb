"""Pull and push of a large artifact against skopeo, the oras client, the machine's limit and one hash of the file.

Needs Debian's docker-registry and skopeo, and root to drop caches (without root the caches stay warm, and it says so).
The oras client is installed once, into a virtual environment in the cache folder. Every round runs all of them, each
time beginning with another; a ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import http.server
import json
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import harness
from pierhead.config import SourceSettings
from pierhead.events import ignore
from pierhead.package.build import package
from pierhead.package.inputs import detect, single
from pierhead.package.recipe import Recipe
from pierhead.paths import resolve
from pierhead.refs import parse
from pierhead.registry.client import Registry
from pierhead.registry.credentials import Login
from pierhead.registry.name import image_name
from pierhead.registry.publish import push_model
from pierhead.registry.push import push_blob
from pierhead.sources.pull import pull
from pierhead.store.layout import Store
from pierhead.store.media import GGUF

LIMIT = """
import hashlib, http.client, os, sys
host, path, target = sys.argv[1:]
connection = http.client.HTTPConnection(host)
connection.request("GET", path)
reply, running, buffer = connection.getresponse(), hashlib.sha256(), memoryview(bytearray(1 << 20))
fd = os.open(target, os.O_WRONLY | os.O_CREAT)
while count := reply.readinto(buffer):
    running.update(buffer[:count])
    os.write(fd, buffer[:count])
os.fsync(fd)
print(running.hexdigest())
"""


ORAS = "oras==0.2.43"
ORAS_PULL = """
import sys, oras.client
host, target, out = sys.argv[1:]
oras.client.OrasClient(hostname=host, insecure=True).pull(target=target, outdir=out)
"""
ORAS_PUSH = """
import os, sys, oras.client
host, target, file, kind = sys.argv[1:]
os.chdir(os.path.dirname(file))
oras.client.OrasClient(hostname=host, insecure=True).push(target=target, files=[f"{os.path.basename(file)}:{kind}"])
"""


def oras_python() -> str:
    """The interpreter of a virtual environment with the oras client; empty when it cannot be made."""
    folder = harness.ROOT / ".cache" / "oras"
    python = folder / "bin" / "python"
    uv = str(Path(sys.executable).with_name("uv"))
    try:
        if not (folder / "done").exists():
            subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, str(folder)], check=True)
            subprocess.run([uv, "pip", "install", "-q", "--python", str(python), ORAS], check=True)
            (folder / "done").touch()
    except (OSError, subprocess.CalledProcessError):
        print("the oras client cannot be installed: it is left out", file=sys.stderr)
        return ""
    return str(python)


class Failing(http.server.BaseHTTPRequestHandler):
    """Passes requests on to a registry; a fifth of them fail: an error, a broken connection, half of the body."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    dice = random.Random(20)
    failed = 0

    def do_GET(self) -> None:
        way = Failing.dice.choice(("503", "500", "break", "half")) if Failing.dice.random() < 0.2 else ""
        Failing.failed += bool(way)
        if way == "break":
            self.close_connection = True
            return
        if way.isdigit():
            self.send_response(int(way))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = http.client.HTTPConnection(self.upstream)
        passed = {name: self.headers[name] for name in ("Range", "Accept") if name in self.headers}
        connection.request("GET", self.path, headers=passed)
        reply = connection.getresponse()
        left = int(reply.headers["Content-Length"]) // (2 if way else 1)
        self.send_response(reply.status)
        for name in ("Content-Length", "Content-Range", "Content-Type", "Docker-Content-Digest"):
            if name in reply.headers:
                self.send_header(name, reply.headers[name])
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while left and (block := reply.read(min(left, 1 << 20))):
                self.wfile.write(block)
                left -= len(block)
        self.close_connection = bool(way)
        connection.close()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def failing(host: str) -> Iterator[str]:
    """A registry a fifth of whose requests fail."""
    Failing.upstream = host
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def drop_caches() -> bool:
    """Everything to disk, and nothing of it in memory."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def registry(folder: Path) -> Iterator[str]:
    """A docker-registry on a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    config = folder / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: '{folder}/registry'}}}}\nhttp: {{addr: '{host}'}}\n"
    )
    process = subprocess.Popen(
        ["docker-registry", "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def answers() -> bool:
        try:
            connection = http.client.HTTPConnection(host, timeout=1)
            connection.request("GET", "/v2/")
            return connection.getresponse().status == 200
        except OSError:
            return False

    try:
        harness.until(answers, 20)
        yield host
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def timed(work: Callable[[], object]) -> float:
    """Seconds of one run with cold caches."""
    drop_caches()
    begin = time.perf_counter()
    work()
    os.sync()
    return time.perf_counter() - begin


def gguf_header(size: int) -> bytes:
    """The beginning of a GGUF file of ``size`` bytes that is one tensor of whatever follows."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    key = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    start = 256
    tensor = text(b"blk.0.attn_k.weight") + struct.pack("<IQIQ", 1, size - start, 24, 0)  # bytes
    return (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + key + tensor).ljust(start, b"\0")


class Artifact:
    """One layer of random bytes with a config and a manifest."""

    def __init__(self, folder: Path, size: int) -> None:
        self.file, self.size = folder / "weights.gguf", size
        running = hashlib.sha256()
        with self.file.open("wb") as out:
            for start in range(0, size, 1 << 20):
                block = os.urandom(min(1 << 20, size - start))
                block = block if start else (head := gguf_header(size)) + block[len(head) :]
                running.update(block)
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        self.digest = "sha256:" + running.hexdigest()
        self.config = folder / "config"
        self.config.write_bytes(b"{}")
        empty = "sha256:" + hashlib.sha256(b"{}").hexdigest()
        kind = "application/vnd.docker.ai.model.config.v0.1+json"
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": {"mediaType": kind, "digest": empty, "size": 2},
                "layers": [{"mediaType": GGUF, "digest": self.digest, "size": size}],
            }
        ).encode()
        self.parts = [(empty, self.config, 2), (self.digest, self.file, size)]

    async def push(self, where: str) -> None:
        async with Registry(image_name(parse(where)), SourceSettings(), Login()) as client:
            for digest, path, size in self.parts:
                await push_blob(client, digest, path, size, lambda done: None)
            await client.put_manifest("v1", "application/vnd.oci.image.manifest.v1+json", self.manifest)

    async def pull(self, where: str, root: Path) -> None:
        """What ``pier pull`` does: manifest, blobs, header, scan, name."""
        paths = resolve({"PIERHEAD_HOME": str(root), "HOME": str(root)})
        store = Store.open(paths.store)
        made = await pull(f"oci://{where}", store=store, settings=SourceSettings(), paths=paths, env={})
        assert [f.digest for f in made.files] == [self.digest]


def counters() -> tuple[int, int]:
    """Bytes that this process's calls read and wrote, by the kernel's count."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(found["rchar"]), int(found["wchar"])


def program(argv: list[str]) -> None:
    """Run another program to its end, quietly."""
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def turned(names: Iterable[str], number: int) -> list[str]:
    """Each round begins with another one, so that none always comes first."""
    found = list(names)
    start = number % len(found)
    return found[start:] + found[:start]


CREATED = "2026-01-01T00:00:00Z"
COPY = ["skopeo", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]


class Measured:
    """Seconds of every round by name; ``ratio`` compares within rounds."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def add(self, name: str, work: Callable[[], object]) -> None:
        self.times.setdefault(name, []).append(timed(work))

    def ratio(self, over: str, under: str) -> float:
        pairs = zip(self.times[over], self.times[under], strict=True)
        return statistics.median(a / b for a, b in pairs)


def pulls(artifact: Artifact, host: str, folder: Path, oras: str) -> dict[str, Callable[[], object]]:
    """Who pulls, each into a place of its own below ``folder``."""
    where = f"{host}/bench/model:v1"
    blob = f"/v2/bench/model/blobs/{artifact.digest}"
    found: dict[str, Callable[[], object]] = {
        "pull": lambda: asyncio.run(artifact.pull(where, folder / "store")),
        "skopeo pull": lambda: program([*COPY, f"docker://{where}", f"oci:{folder}/skopeo:v1"]),
        "limit": lambda: program([sys.executable, "-c", LIMIT, host, blob, str(folder / "limit")]),
    }
    if oras:
        found["oras pull"] = lambda: program([oras, "-c", ORAS_PULL, host, where, str(folder / "oras")])
    return found


def pushes(artifact: Artifact, host: str, layout: Path, oras: str) -> dict[str, Callable[[], object]]:
    """Who pushes."""
    where = f"{host}/bench/other:v1"
    found: dict[str, Callable[[], object]] = {
        "push": lambda: asyncio.run(artifact.push(where)),
        "skopeo push": lambda: program([*COPY, f"oci:{layout}:v1", f"docker://{where}"]),
    }
    if oras:
        found["oras push"] = lambda: program([oras, "-c", ORAS_PUSH, host, where, str(artifact.file), GGUF])
    return found


def measure_pulls(artifact: Artifact, folder: Path, rounds: int, oras: str, measured: Measured) -> dict[str, float]:
    """All pulls from one registry; the bytes that ours reads and writes; a pull with failures."""
    figures: dict[str, float] = {}
    with registry(folder) as host:
        asyncio.run(artifact.push(f"{host}/bench/model:v1"))
        program([*COPY, f"docker://{host}/bench/model:v1", f"oci:{folder}/layout:v1"])
        for number in range(rounds):
            out = folder / "out"
            work = pulls(artifact, host, out, oras)
            for name in turned(work, number):
                out.mkdir()
                before = counters()
                measured.add(name, work[name])
                if name == "pull":
                    read, written = (b - a for a, b in zip(before, counters(), strict=True))
                    figures |= {"written_per_byte": written / artifact.size, "read_per_byte": read / artifact.size}
                shutil.rmtree(out)
        with failing(host) as troubled:
            root = folder / "troubled"
            begin = time.perf_counter()
            asyncio.run(artifact.pull(f"{troubled}/bench/model:v1", root))
            blob = Store.open(resolve({"PIERHEAD_HOME": str(root), "HOME": str(root)}).store).blob_path(artifact.digest)
            with blob.open("rb") as file:
                right = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest() == artifact.digest
            figures["pull_with_failures_ok"] = float(right and Failing.failed > 0)
            figures["pull_with_failures_s"] = time.perf_counter() - begin
            shutil.rmtree(root)
    return figures


def measure_pushes(artifact: Artifact, folder: Path, rounds: int, oras: str, measured: Measured) -> None:
    """Each push into a registry of its own: one that has the bytes would not take them again."""
    for number in range(rounds):
        for name in turned(pushes(artifact, "", folder, oras), number):
            fresh = folder / "fresh"
            fresh.mkdir()
            with registry(fresh) as host:
                measured.add(name, pushes(artifact, host, folder / "layout", oras)[name])
            shutil.rmtree(fresh)


def write_lora(path: Path) -> Path:
    """A LoRA for the artifact's one layer, as llama.cpp's converter writes them."""
    import gguf
    import numpy

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for part in ("lora_a", "lora_b"):
        writer.add_tensor(f"blk.0.attn_k.weight.{part}", numpy.ones((64, 64), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def measure_lora(artifact: Artifact, folder: Path) -> dict[str, float]:
    """Bytes that move when a LoRA is added to the model, on the disk and to a registry that has the model."""
    store = Store.open(folder / "styled")
    base = package(store, Recipe(name="base", base=detect(artifact.file), created=CREATED, link=True))
    lora = single(write_lora(folder / "style.gguf"), "lora", format="gguf")
    before = counters()
    package(store, Recipe(name="styled", base=base, created=CREATED, extras=(lora,)))
    moved = sum(counters()) - sum(before)
    fresh = folder / "fresh"
    fresh.mkdir()
    with registry(fresh) as host:

        def push(name: str) -> int:
            place = image_name(parse(f"oci://{host}/bench/model:{name}"))
            return asyncio.run(push_model(store, name, place, settings=SourceSettings(), env={}, listener=ignore)).sent

        push("base")
        sent = push("styled")
    shutil.rmtree(fresh)
    return {
        "lora_bytes": float((folder / "style.gguf").stat().st_size),
        "lora_moved_bytes": float(moved),
        "lora_sent_bytes": float(sent),
    }


def measure(folder: Path, size: int, rounds: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    measured, oras = Measured(), oras_python()
    artifact = Artifact(folder, size)
    figures = measure_pulls(artifact, folder, rounds, oras, measured)
    measure_pushes(artifact, folder, rounds, oras, measured)
    linked = folder / "linked"
    recipe = Recipe(name="mine", base=detect(artifact.file), created=CREATED, link=True)
    hashes: dict[str, Callable[[], object]] = {
        "link": lambda: package(Store.open(linked), recipe),
        "sha256": lambda: program(["openssl", "dgst", "-sha256", str(artifact.file)]),
    }
    for number in range(rounds):
        for name in turned(hashes, number):
            measured.add(name, hashes[name])
            shutil.rmtree(linked, ignore_errors=True)
    figures |= measure_lora(artifact, folder)
    figures |= {
        "pull_vs_skopeo": measured.ratio("skopeo pull", "pull"),
        "push_vs_skopeo": measured.ratio("skopeo push", "push"),
        "pull_vs_limit": measured.ratio("limit", "pull"),
        "package_vs_sha256": measured.ratio("link", "sha256"),
    }
    if oras:
        figures |= {"pull_vs_oras": measured.ratio("oras pull", "pull")}
        figures |= {"push_vs_oras": measured.ratio("oras push", "push")}
    return figures, measured.times


def main() -> None:
    options = harness.arguments(__doc__ or "")
    missing = [name for name in ("docker-registry", "skopeo", "openssl") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"install {', '.join(missing)} first")
    size, rounds = (256 << 20, 2) if options.quick else (2 << 30, 5)
    with tempfile.TemporaryDirectory(prefix="pier-transfer-") as name:
        figures, times = measure(Path(name), size, rounds)
    if not options.json and not os.access("/proc/sys/vm/drop_caches", os.W_OK):
        print("caches could not be dropped: run as root for cold ones", file=sys.stderr)
    rows = [
        (n, f"{statistics.median(t):.2f}", f"{size / statistics.median(t) / 1e6:,.0f}", f"{min(t):.2f}–{max(t):.2f}")
        for n, t in times.items()
    ]
    harness.report(
        f"{size >> 20} MiB on loopback, median of {rounds}", rows, ("what", "s", "MB/s", "range"), figures, options.json
    )


if __name__ == "__main__":
    main()
