"""A race of two replicas for one answer: the second starts when the first has not begun in time; the loser is cut."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pierhead.gateway.dialects.base import Reply
from pierhead.gateway.faults import Fault
from pierhead.gateway.outgoing import Outgoing
from pierhead.gateway.planned import Planned
from pierhead.routing.balance import Job

if TYPE_CHECKING:
    from pierhead.gateway.upstream import Answer, Receiver, Target, UpstreamConnection


class Runner:
    """One of the two. What it receives goes on to the request once it has won, and to nobody before."""

    def __init__(self, race: Race, target: Target, job: Job | None, conn: UpstreamConnection, made: Outgoing) -> None:
        self._race = race
        self.target = target
        self.job = job
        self.conn = conn
        self.made = made

    def on_whole(self, answer: Answer, body: bytes) -> None:
        if self._race.take(self, answer.head.status < 500):
            self._race.goal.on_whole(answer, body)

    def on_head(self, answer: Answer) -> None:
        if self._race.take(self, answer.head.status < 500):
            self._race.goal.on_head(answer)

    def on_piece(self, piece: bytes) -> None:
        self._race.goal.on_piece(piece)

    def on_end(self) -> None:
        self._race.goal.on_end()

    def on_lost(self, reason: str, pristine: bool) -> None:
        if self._race.take(self, False):
            self._race.goal.on_lost(reason, pristine)


class Race:
    """The first sign of either decides: who answers has won, and who fails has lost while the other still runs."""

    def __init__(self, goal: Hedged, after: float) -> None:
        self.goal = goal
        self.first: Runner | None = None
        self.second: Runner | None = None
        self.over = False
        self._winner: Runner | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(after, self._late)

    def _late(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self.goal.join(self))

    def take(self, runner: Runner, good: bool) -> bool:
        """Whether what ``runner`` brings is the request's answer."""
        if self._winner is None:
            first, second = self.first, self.second
            assert first is not None
            loser = second if runner is first else first
            self._winner = runner if good or loser is None else loser
            self.stop()
            if second is not None:
                self.goal.decided(first, second, self._winner, failed=not good)
        return runner is self._winner

    def stop(self) -> None:
        """It is decided, or nobody wants the answer any more."""
        self.over = True
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()


class Hedged(Planned):
    """A request that may be sent to a second replica; off unless the route's settings say after how long."""

    _race: Race | None = None

    def _receiver(self, conn: UpstreamConnection) -> Receiver:
        """Who gets the answer on ``conn``: the request itself, or a runner of a race that begins now."""
        entry, made = self._entry, self._outgoing
        if self._ticket is None or entry is None or made is None or self._target is None:
            return self
        after = entry.lane.settings.hedge_after
        if after <= 0 or not entry.lane.chooses:
            return self
        self._race = race = Race(self, after)
        race.first = Runner(race, self._target, self._ticket.job, conn, made)
        return race.first

    async def join(self, race: Race) -> None:
        """Start the second runner, if a slot of another replica is free."""
        entry, ticket, first = self._entry, self._ticket, race.first
        assert entry is not None
        assert ticket is not None
        assert first is not None
        job = first.job
        rival = Job(job.tokens, job.chain, job.block_tokens) if job is not None else None
        target = entry.lane.rival(ticket, first.target, rival)
        if target is None:
            return
        try:
            made = await self._make(target)
            conn = await target.connect() if isinstance(made, Outgoing) else None
        except (Fault, OSError):
            entry.lane.ended(target, False)
            conn, made = None, None
        except BaseException:
            entry.lane.leave(target, rival)
            raise
        if conn is None or race.over or not isinstance(made, Outgoing):
            if conn is not None:
                conn.close()
            entry.lane.leave(target, rival)
            return
        race.second = second = Runner(race, target, rival, conn, made)
        self._begin(conn, made, second)

    async def _make(self, target: Target) -> Outgoing | Reply:
        """What ``target`` gets."""
        raise NotImplementedError

    def _begin(self, conn: UpstreamConnection, made: Outgoing, receiver: Receiver) -> None:
        """Send ``made`` on ``conn``."""
        raise NotImplementedError

    def decided(self, first: Runner, second: Runner, winner: Runner, *, failed: bool) -> None:
        """Let the loser go; the request is the winner's from now on."""
        entry, ticket = self._entry, self._ticket
        assert entry is not None
        assert ticket is not None
        loser = second if winner is first else first
        loser.conn.close()
        entry.lane.ended(loser.target, False if failed else None)
        if winner is first:
            entry.lane.leave(second.target, second.job)
            return
        self._vacate()
        ticket.job = second.job
        self._seat = second.target
        self._claim(second.target)
        self._conn, self._outgoing, self._pooled = second.conn, second.made, False
        if not self._client.writing_paused:  # it may have been when that was sent, and nobody told it since
            second.conn.resume()
        if self._stats is not None:
            self._stats.retries += 1

    def _drop(self) -> None:
        super()._drop()
        race, self._race = self._race, None
        if race is None or race.over:
            return
        race.stop()
        if race.second is not None and self._entry is not None:
            race.second.conn.close()
            self._entry.lane.leave(race.second.target, race.second.job)
