"""The gateway's balancing policies on a trace of real use: time to first token over simulated replicas.

Each replica reads prompts one after another, 8,000 tokens a second, and keeps the 2,500 blocks of 512 tokens that it
used last; answers take no time. A policy is told what the gateway's is told: that a request is sent, that its first
token came and that it ended, and never how long an answer is or what a replica's cache truly holds. The policies
are the product's own (`pierhead.routing`), which the gateway uses; two that are only written here show what others do.
"""

from __future__ import annotations

import bisect
import heapq
import json
import random
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import balancing_real
import harness
from pierhead.routing.balance import CacheAware, Job, LeastTokens, Policy, PowerOfTwo, RoundRobin

TRACE = harness.ROOT.parent / "shared" / "data" / "mooncake_synthetic_trace.jsonl"
REPLICAS, SPEED, BLOCKS, BLOCK, FASTER = 8, 8000.0, 2500, 512, 1.1


@dataclass(frozen=True)
class Request:
    """A line of the trace: ``at`` seconds, ``tokens`` of prompt, its blocks."""

    at: float
    tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What a run came to; seconds of wall time are spent in the policy alone."""

    first: list[float]
    read: list[int]  # tokens read by each replica
    policy_s: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.first)

    @property
    def p95(self) -> float:
        return sorted(self.first)[int(0.95 * len(self.first))]

    @property
    def load_ratio(self) -> float:
        return max(self.read) / statistics.fmean(self.read)


def load(path: Path) -> list[Request]:
    """The trace, or an end with a word about what is missing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [Request(row["timestamp"] / 1000, row["input_length"], tuple(row["hash_ids"])) for row in rows]
    except OSError as exc:
        raise SystemExit(
            f"cannot read the trace {path}: {exc.strerror}.\nIt is synthetic_trace.jsonl of kvcache-ai/Mooncake "
            "(FAST25-release/traces). Name it with: bench/balancing.py --trace PATH"
        ) from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise SystemExit(f"{path} is no trace of Mooncake's: {exc!r}") from exc


class Replica:
    """A serial reader of prompts with an LRU of blocks."""

    def __init__(self, capacity: int) -> None:
        self.queue: deque[int] = deque()
        self.busy = False
        self.read = 0
        self._capacity = capacity
        self._held: OrderedDict[int, None] = OrderedDict()

    def uncached(self, request: Request) -> int:
        """Tokens that must be read for ``request``; its blocks are held afterwards."""
        held, known = self._held, 0
        for block in request.blocks:
            if block not in held:
                break
            known += 1
        for block in request.blocks:
            held[block] = None
            held.move_to_end(block)
            if len(held) > self._capacity:
                held.popitem(last=False)
        tokens = max(0, request.tokens - known * BLOCK)
        self.read += tokens
        return tokens


def replay(
    trace: Sequence[Request], policy: Policy, replicas: int = REPLICAS, faster: float = FASTER, capacity: int = BLOCKS
) -> Outcome:
    """Play ``trace`` through ``policy``."""
    names = [f"r{i}" for i in range(replicas)]
    places = {name: Replica(capacity) for name in names}
    for name in names:
        policy.add(name)
    events: list[tuple[float, int, int]] = [(r.at / faster, 1, i) for i, r in enumerate(trace)]  # ends come first
    heapq.heapify(events)
    jobs = [Job(r.tokens, r.blocks, BLOCK) for r in trace]
    first = [0.0] * len(trace)
    spent = 0.0

    def begin(place: Replica, now: float) -> None:
        if place.queue and not place.busy:
            place.busy = True
            i = place.queue.popleft()
            heapq.heappush(events, (now + place.uncached(trace[i]) / SPEED, 0, i))

    while events:
        now, kind, i = heapq.heappop(events)
        job = jobs[i]
        clock = time.perf_counter()
        if kind:
            policy.dispatch(job, policy.choose(job, names, now), now)
        else:
            policy.first_token(job, now)
            policy.done(job, now)
        spent += time.perf_counter() - clock
        place = places[job.replica]
        if kind:
            place.queue.append(i)
        else:
            first[i] = now - trace[i].at / faster
            place.busy = False
        begin(place, now)
    return Outcome(first, [place.read for place in places.values()], spent)


# --- what others do --------------------------------------------------------------------------------------------------


class LeastRequests(LeastTokens):
    """The replica with the fewest requests open; equals by lot."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._dice = random.Random(seed)

    def choose(self, job: Job, among: Sequence[str], now: float) -> str:
        return min(among, key=lambda r: (self.loads[r].requests, self._dice.random()))


class BoundedHash(LeastTokens):
    """Consistent hashing of the first block, passing over who has 1.25 times the mean of open requests."""

    def choose(self, job: Job, among: Sequence[str], now: float) -> str:
        ring = (
            sorted((_hash(f"{name}#{i}"), name) for name in among for i in range(100)) if not self._ring else self._ring
        )
        self._ring = ring
        most = 1.25 * (sum(x.requests for x in self.loads.values()) + 1) / len(among)
        start = bisect.bisect(ring, (_hash(str(job.chain[0])), ""))
        for i in range(len(ring)):
            name = ring[(start + i) % len(ring)][1]
            if self.loads[name].requests + 1 <= max(1.0, most):
                return name
        return among[0]

    _ring: list[tuple[int, str]] = []


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


# --- the runs --------------------------------------------------------------------------------------------------------

Make = Callable[[], Policy]
POLICIES: dict[str, Make] = {
    "cache (default)": lambda: CacheAware(BLOCKS),
    "cache, told nothing of its size": lambda: CacheAware(10**9),
    "cache, told half of its size": lambda: CacheAware(BLOCKS // 2),
    "least": LeastTokens,
    "p2c": lambda: PowerOfTwo(random.Random(0).random),
    "round-robin": RoundRobin,
    "least requests (not ours)": LeastRequests,
    "bounded hash of the first block (not ours)": BoundedHash,
}


def variants(trace: list[Request]) -> dict[str, tuple[list[Request], int, float]]:
    """The trace in other shapes, to see whether a policy fits only one: (trace, replicas, how much faster)."""
    dice = random.Random(5)
    half = len(trace) // 2
    mean = trace[-1].at / len(trace)
    at, steady = 0.0, list[Request]()
    for request in trace:
        at += dice.expovariate(1 / mean)
        steady.append(replace(request, at=at))
    return {
        "4 replicas, 0.55 x": (trace, 4, 0.55),
        "16 replicas, 2.2 x": (trace, 16, 2.2),
        "first half": (trace[:half], 8, FASTER),
        "second half": ([replace(r, at=r.at - trace[half].at) for r in trace[half:]], 8, FASTER),
        "every second request by lot, 2.2 x": ([r for r in trace if dice.random() < 0.5], 8, 2.2),
        "arrivals drawn anew": (steady, 8, FASTER),
        "0.8 x": (trace, 8, 0.8),
        "1.3 x": (trace, 8, 1.3),
    }


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--trace", type=Path, default=TRACE, help="Mooncake's synthetic_trace.jsonl")
    parser.add_argument("--real", action="store_true", help="two real llama.cpp replicas behind the gateway instead")
    options = parser.parse_args()
    if options.real:
        rows, figures = balancing_real.measure(options.quick)
        head = ("policy", "TTFT mean s", "median s", "of the prompts from cache")
        harness.report("Two llama.cpp replicas, six conversations", rows, head, figures, options.json)
        return
    trace = load(options.trace)
    results = {name: replay(trace, make()) for name, make in POLICIES.items()}
    ours, turn = results["cache (default)"], results["round-robin"]
    figures = {
        "ttft_mean_s": ours.mean,
        "ttft_p95_s": ours.p95,
        "max_load_ratio": ours.load_ratio,
        "ttft_vs_round_robin": ours.mean / turn.mean,
        "policy_us": ours.policy_s / len(trace) * 1e6,
    }
    rows = [
        (
            name,
            f"{out.mean:.2f}",
            f"{out.p95:.1f}",
            f"{out.load_ratio:.3f}",
            f"{1 - sum(out.read) / sum(r.tokens for r in trace):.0%}",
            f"{out.policy_s / len(trace) * 1e6:.0f}",
        )
        for name, out in results.items()
    ]
    head = ("policy", "TTFT mean s", "p95 s", "load max/mean", "from cache", "µs a request")
    harness.report("Balancing: Mooncake's synthetic trace over 8 replicas", rows, head, figures, options.json)
    if options.quick or options.json:
        return
    rows = []
    for name, (requests, replicas, faster) in variants(trace).items():
        outs = [
            replay(requests, make(), replicas, faster)
            for make in (lambda: CacheAware(BLOCKS), lambda: CacheAware(10**9), BoundedHash, RoundRobin)
        ]
        rows.append((name, *(f"{out.mean:.2f} / {out.load_ratio:.2f}" for out in outs)))
    head = ("variant", "cache", "size unknown", "bounded hash", "round-robin")
    harness.report("The same with other shapes: TTFT mean s / load max/mean", rows, head, {}, False)


if __name__ == "__main__":
    main()
