"""Pull and push of a large artifact against skopeo, the machine's limit and one hash of the file.

Needs Debian's docker-registry and skopeo, and root to drop caches (without root the caches stay warm, and it says so).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import harness
from pierhead.config import SourceSettings
from pierhead.events import ignore
from pierhead.refs import parse
from pierhead.registry.client import Registry
from pierhead.registry.credentials import Login
from pierhead.registry.name import image_name
from pierhead.registry.push import push_blob
from pierhead.registry.transfer import pull_blob
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


class Artifact:
    """One layer of random bytes with a config and a manifest."""

    def __init__(self, folder: Path, size: int) -> None:
        self.file, self.size = folder / "weights", size
        running = hashlib.sha256()
        with self.file.open("wb") as out:
            for start in range(0, size, 1 << 20):
                block = os.urandom(min(1 << 20, size - start))
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
        """The product's way of a blob: registry client, landing, store."""
        from pierhead.sources.base import RemoteFile
        from pierhead.sources.landing import Progress, landing

        store = Store.open(root)
        file = RemoteFile("weights", self.digest, self.size, self.digest)
        settings = SourceSettings()
        async with (
            Registry(image_name(parse(where)), settings, Login()) as client,
            landing(store, file, Progress(ignore, "bench", "weights", self.size)) as sink,
        ):
            await pull_blob(client, self.digest, self.size, 0, sink.write_all, settings.registry_connections)
            await sink.commit()


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


def pusher(name: str, artifact: Artifact, where: str, copy: list[str]) -> Callable[[], object]:
    """One push by one of the two."""
    if name == "push":
        return lambda: asyncio.run(artifact.push(where))
    return lambda: program([*copy, f"docker://{where}"])


def measure(folder: Path, size: int, rounds: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    times: dict[str, list[float]] = {
        n: [] for n in ("pull", "skopeo pull", "limit", "push", "skopeo push", "link", "sha256")
    }
    figures: dict[str, float] = {}
    artifact = Artifact(folder, size)
    copy = ["skopeo", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]
    with registry(folder) as host:
        where = f"{host}/bench/model:v1"
        asyncio.run(artifact.push(where))
        program([*copy, f"docker://{where}", f"oci:{folder}/layout:v1"])
        blob = f"/v2/bench/model/blobs/{artifact.digest}"
        root, out, layout = folder / "store", folder / "out", folder / "pulled"
        pulls: dict[str, Callable[[], object]] = {
            "pull": lambda: asyncio.run(artifact.pull(where, root)),
            "skopeo pull": lambda: program([*copy, f"docker://{where}", f"oci:{layout}:v1"]),
            "limit": lambda: program([sys.executable, "-c", LIMIT, host, blob, str(out)]),
        }
        for number in range(rounds):
            for name in turned(pulls, number):
                before = counters()
                times[name].append(timed(pulls[name]))
                if name == "pull":
                    read, written = (b - a for a, b in zip(before, counters(), strict=True))
                    figures |= {"written_per_byte": written / size, "read_per_byte": read / size}
                shutil.rmtree(root, ignore_errors=True)
                shutil.rmtree(layout, ignore_errors=True)
                out.unlink(missing_ok=True)
    linked = folder / "linked"
    hashes: dict[str, Callable[[], object]] = {
        "link": lambda: Store.open(linked).adopt_file(artifact.file, link=True),
        "sha256": lambda: program(["openssl", "dgst", "-sha256", str(artifact.file)]),
    }
    for number in range(rounds):
        for name in turned({"push": None, "skopeo push": None}, number):
            # a registry of its own each time: one that has the bytes would not take them again
            fresh = folder / "fresh"
            fresh.mkdir()
            with registry(fresh) as host:
                times[name].append(
                    timed(pusher(name, artifact, f"{host}/bench/other:v1", [*copy, f"oci:{folder}/layout:v1"]))
                )
            shutil.rmtree(fresh)
        for name in turned(hashes, number):
            times[name].append(timed(hashes[name]))
            shutil.rmtree(linked, ignore_errors=True)
    median = {name: statistics.median(found) for name, found in times.items()}
    figures |= {
        "pull_vs_skopeo": median["skopeo pull"] / median["pull"],
        "push_vs_skopeo": median["skopeo push"] / median["push"],
        "pull_vs_limit": median["limit"] / median["pull"],
        "package_vs_sha256": median["link"] / median["sha256"],
    }
    return figures, times


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
