"""Which NVIDIA GPUs this machine has, by asking nvidia-smi; decides nothing."""

from __future__ import annotations

import subprocess

from pierhead.engines.builds import Gpu
from pierhead.errors import RuntimeUnavailable

QUERY = ("--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader")
HINT = "It needs an NVIDIA GPU with its driver (`nvidia-smi` lists it), or an engine that runs on the CPU."
_TIMEOUT = 20.0


def read_gpus(program: str = "nvidia-smi") -> tuple[Gpu, ...]:
    """The GPUs; RuntimeUnavailable when there is none, or nobody who could tell. Blocks."""
    try:
        done = subprocess.run(
            [program, *QUERY], capture_output=True, text=True, timeout=_TIMEOUT, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as exc:
        raise RuntimeUnavailable("no NVIDIA GPU can be seen here: there is no nvidia-smi", hint=HINT) from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise RuntimeUnavailable(f"nvidia-smi does not answer: {exc}", hint=HINT) from exc
    found = parse(done.stdout) if done.returncode == 0 else ()
    if not found:
        said = " ".join((done.stderr or done.stdout).split())[:300]
        raise RuntimeUnavailable(f"no NVIDIA GPU can be seen here: {said or 'nvidia-smi lists none'}", hint=HINT)
    return found


def parse(text: str) -> tuple[Gpu, ...]:
    """The lines of the query; a name may have commas, the other two have none."""
    parts = [line.rsplit(",", 2) for line in text.splitlines()]
    return tuple(Gpu(*(word.strip() for word in p)) for p in parts if len(p) == 3 and all(word.strip() for word in p))
