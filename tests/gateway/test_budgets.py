"""Budgets: never overspent by two gateways, crashes or a clock that jumps; spent to the last token all the same."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pierhead.gateway import ledger as ledgers
from pierhead.gateway.account import Account
from pierhead.gateway.budgets import Budgets
from pierhead.gateway.faults import Fault
from pierhead.gateway.ledger import Ledger, MemoryLedger, Row, SqliteLedger, span
from pierhead.gateway.link import Budget, Price
from pierhead.gateway.prices import affordable, bound, cost, dearest
from pierhead.gateway.usage import Usage

ROW = Row("k", "tokens", "2027-01-31")


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    made: Ledger = MemoryLedger() if request.param == "memory" else SqliteLedger(tmp_path / "budgets.db")
    yield made
    made.close()


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_a_ledger_lends_slices_that_shrink_towards_the_end(ledger: Ledger) -> None:
    assert ledger.lease(ROW, 1000, 10, 500).granted == 125
    assert ledger.lease(ROW, 1000, 10, 50) == (50, 825)
    assert ledger.lease(ROW, 1000, 825, 825) == (825, 0)
    assert ledger.lease(ROW, 1000, 1, 1) == (0, 0)
    ledger.give_back(ROW, 7)
    assert ledger.lease(ROW, 1000, 8, 8) == (0, 7)
    assert ledger.lease(ROW, 1000, 7, 100) == (7, 0)
    assert ledger.used("k") == {("tokens", "2027-01-31"): 1000}
    assert ledger.used("other") == {}


def test_a_ledger_books_what_was_spent_beyond_a_loan(ledger: Ledger) -> None:
    ledger.lease(ROW, 100, 100, 100)
    ledger.give_back(ROW, -5)
    assert ledger.used("k") == {("tokens", "2027-01-31"): 105}
    assert ledger.lease(ROW, 100, 1, 1) == (0, -5)


def test_what_one_gateway_borrowed_another_does_not_get(tmp_path: Path) -> None:
    one, two = (SqliteLedger(tmp_path / "budgets.db") for _ in range(2))
    assert one.lease(ROW, 100, 60, 60).granted == 60
    assert two.lease(ROW, 100, 60, 60) == (0, 40)
    one.close()  # without giving back, as in a crash
    assert SqliteLedger(tmp_path / "budgets.db").lease(ROW, 100, 41, 41) == (0, 40)
    assert (tmp_path / "budgets.db").stat().st_mode & 0o777 == 0o600


def test_a_ledger_that_cannot_be_read_lends_nothing(tmp_path: Path) -> None:
    (tmp_path / "budgets.db").write_bytes(b"no database" * 1000)
    with pytest.raises(OSError, match=r"budgets\.db"):
        SqliteLedger(tmp_path / "budgets.db").lease(ROW, 100, 1, 1)


def test_old_spans_are_forgotten_after_a_year(tmp_path: Path) -> None:
    first = SqliteLedger(tmp_path / "budgets.db")
    first.lease(Row("k", "tokens", "2001-01-01"), 5, 5, 5)
    first.lease(Row("k", "tokens", span("day", time.time()).label), 5, 5, 5)
    first.close()
    second = SqliteLedger(tmp_path / "budgets.db")
    assert len(second.used("k")) == 1
    second.close()


def test_days_and_months_are_those_of_the_calendar_in_utc() -> None:
    assert span("day", 1709164799) == ("2024-02-28", 1709078400, 1709164800)
    assert span("day", 1709164800).label == "2024-02-29"
    assert span("month", 1709164800) == ("2024-02", 1706745600, 1709251200)
    assert span("month", 1735689599) == ("2024-12", 1733011200, 1735689600)


# --- prices -----------------------------------------------------------------------------------------------------------


def test_money_is_counted_in_whole_millionths_and_rounded_up() -> None:
    price = Price("m", input=3_000_000, output=15_000_000, cached=300_000)
    assert cost(price, Usage(1000, 100, 400, True)) == 600 * 3 + 120 + 1500
    assert cost(Price("m", 75_000, 0), Usage(1, 0, 0, True)) == 1
    assert bound(price, 1000, 100) == 3000 + 1500
    assert affordable(price, 1000, 3000 + 1500) == 100
    assert affordable(price, 1000, 2999) < 0
    assert affordable(Price("m", 0, 0), 10, 0) > 10**9
    assert dearest([price, Price("n", 1, 99_000_000)]) == Price("", 3_000_000, 99_000_000, 300_000)
    assert dearest([price, None]) is None


# --- accounts ---------------------------------------------------------------------------------------------------------


def new_account(ledger: Ledger, amount: int, unit: Any = "tokens") -> Account:
    account = Account(ledger, "k", Budget(amount, unit, "day"))
    return account


async def take(account: Account, least: int, most: int, patience: float = 5.0) -> int:
    await account.fill(least, most, time.monotonic() + patience)
    amount = min(most, account.available)
    account.reserve(amount)
    account.wake(False)
    return amount


async def test_a_budget_of_a_hundred_is_used_by_a_hundred() -> None:
    ledger = MemoryLedger()
    account = new_account(ledger, 100, "requests")
    for _ in range(100):
        assert await take(account, 1, 1) == 1
        account.settle(account._epoch, 1, 1)
    with pytest.raises(Fault) as caught:
        await take(account, 1, 1)
    assert (caught.value.status, caught.value.code) == (402, "budget_exceeded")
    assert "renews" in (caught.value.hint or "")
    assert 0 < int(dict(caught.value.headers)[b"retry-after"]) <= 86400


async def test_the_last_answer_is_clamped_to_what_is_left() -> None:
    account = new_account(MemoryLedger(), 100)
    assert await take(account, 10, 90) == 90
    account.settle(account._epoch, 90, 90)
    assert await take(account, 5, 50) == 10
    account.settle(account._epoch, 10, 10)
    with pytest.raises(Fault):
        await take(account, 1, 1)


async def test_who_finds_all_reserved_waits_for_others_to_settle() -> None:
    account = new_account(MemoryLedger(), 100)
    assert await take(account, 100, 100) == 100
    second = asyncio.create_task(take(account, 60, 60))
    third = asyncio.create_task(take(account, 60, 60))
    await asyncio.sleep(0.05)
    assert not second.done()
    account.settle(account._epoch, 100, 30)
    assert await second == 60
    account.settle(account._epoch, 60, 60)
    with pytest.raises(Fault, match="used up"):
        await third


async def test_nobody_waits_for_ever() -> None:
    account = new_account(MemoryLedger(), 100)
    await take(account, 100, 100)
    with pytest.raises(Fault) as caught:
        await take(account, 1, 1, patience=0.05)
    assert (caught.value.status, caught.value.code) == (429, "budget_reserved")
    account.settle(account._epoch, 100, 0)
    assert await take(account, 100, 100) == 100


async def test_a_request_that_leaves_while_it_leases_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = MemoryLedger()
    real, slow = ledger.lease, asyncio.Event()
    loop = asyncio.get_running_loop()

    def lease(row: Row, limit: int, least: int, want: int) -> ledgers.Lease:
        asyncio.run_coroutine_threadsafe(slow.wait(), loop).result(5)
        return real(row, limit, least, want)

    monkeypatch.setattr(ledger, "lease", lease)
    account = new_account(ledger, 100)
    gone = asyncio.create_task(take(account, 100, 100))
    await asyncio.sleep(0.02)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    slow.set()
    await loop.shutdown_default_executor()
    await asyncio.sleep(0)
    assert await take(account, 100, 100) == 100


async def test_what_lies_idle_goes_back_for_others(tmp_path: Path) -> None:
    one, two = (Budgets(SqliteLedger(tmp_path / "b.db")) for _ in range(2))
    shares = [room.shares("k", (Budget(1000),))[0] for room in (one, two)]
    mine, theirs = (share.account for share in shares)
    await take(mine, 100, 100)
    mine.settle(mine._epoch, 100, 40)
    for _ in range(20):
        one.sweep()
        if one._resting is not None:
            await one._resting
    assert mine.available == 0
    assert await take(theirs, 960, 960) == 960
    theirs.settle(theirs._epoch, 960, 1)
    await two.close()
    assert one.ledger.used("k") == {("tokens", span("day", time.time()).label): 41}


async def test_a_thousand_at_once_spend_what_a_hundred_may() -> None:
    """Each reserves ten times what it uses, so many wait for others; exactly as many are served as there is for."""
    ledger = MemoryLedger()
    account = new_account(ledger, 100 * 10 + 90)
    served = 0

    async def one() -> bool:
        nonlocal served
        try:
            await account.fill(100, 100, time.monotonic() + 30)
        except Fault:
            return False
        _, epoch, amount = account.reserve(100)
        account.wake(False)
        await asyncio.sleep(0)
        served += 1
        account.settle(epoch, amount, 10)
        return True

    done = await asyncio.gather(*(one() for _ in range(1000)))
    assert sum(done) == served == 100


class Spending(RuleBasedStateMachine):
    """Two gateways over one file; ``spent`` is the truth, in which a crash spends all that was reserved."""

    LIMIT = 100

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="budgets-")
        self.loop = asyncio.new_event_loop()
        self.now = 1_800_000_000.0
        clock = SimpleNamespace(
            time=lambda: self.now, monotonic=time.monotonic, strftime=time.strftime, gmtime=time.gmtime
        )
        self.patch = mock.patch("pierhead.gateway.account.time", clock)
        self.patch.start()
        self.rooms = [self.room(), self.room()]
        self.open: list[list[Any]] = [[], []]
        self.spent: dict[str, int] = {}

    def room(self) -> tuple[Budgets, tuple[Account, ...]]:
        room = Budgets(SqliteLedger(Path(self.folder.name) / "b.db"))
        shares = room.shares("k", (Budget(self.LIMIT), Budget(self.LIMIT * 3, "tokens", "month")))
        self.shares = (*getattr(self, "shares", ()), *shares)
        return room, tuple(share.account for share in shares)

    @rule(which=st.integers(0, 1), least=st.integers(1, 20), more=st.integers(0, 60))
    def ask(self, which: int, least: int, more: int) -> None:
        _, accounts = self.rooms[which]
        most = least + more
        try:
            short = False
            for account in accounts:
                short |= not self.loop.run_until_complete(account.fill(least, most, 0.0))
        except Fault:
            return
        have = min(a.available for a in accounts)
        if have >= most or (short and have >= least):
            labels = [(a.unit, a.label) for a in accounts]
            assert [label for _, label in labels] == [span("day", self.now).label, span("month", self.now).label]
            amount = min(have, most)
            self.open[which].append((amount, labels, [a.reserve(amount) for a in accounts]))

    @rule(which=st.integers(0, 1), share=st.floats(0, 1), last=st.booleans())
    def settle(self, which: int, share: float, last: bool) -> None:
        if self.open[which]:
            amount, labels, claims = self.open[which].pop(-1 if last else 0)
            used = int(amount * share)
            self._book(labels, used)
            for account, epoch, reserved in claims:
                account.settle(epoch, reserved, used)

    def _book(self, labels: list[tuple[str, str]], used: int) -> None:
        for _, label in labels:
            self.spent[label] = self.spent.get(label, 0) + used

    @rule(which=st.integers(0, 1))
    def crash(self, which: int) -> None:
        for amount, labels, _ in self.open[which]:
            self._book(labels, amount)
        self.open[which] = []
        self.rooms[which][0].ledger.close()
        self.rooms[which] = self.room()

    @rule(which=st.integers(0, 1))
    def end_well(self, which: int) -> None:
        while self.open[which]:
            self.settle(which, 0.5, True)
        self.loop.run_until_complete(self.rooms[which][0].close())
        self.rooms[which] = self.room()

    @rule(which=st.integers(0, 1))
    def rest(self, which: int) -> None:
        for account in self.rooms[which][1]:
            if not account.reserved:
                self.loop.run_until_complete(account.rest())

    @rule(seconds=st.sampled_from([-90000, -40000, -5, 5, 40000, 90000, 2_700_000]))
    def jump(self, seconds: int) -> None:
        self.now += seconds

    @invariant()
    def nothing_is_overspent(self) -> None:
        if not hasattr(self, "spent"):
            return
        held = dict(self.spent)
        for claims in self.open:
            for amount, labels, _ in claims:
                for _, label in labels:
                    held[label] = held.get(label, 0) + amount
        for label, amount in held.items():
            assert amount <= self.LIMIT * (3 if len(label) == 7 else 1), label

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.stop()
            for room, _ in self.rooms:
                room.ledger.close()
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            self.folder.cleanup()


Spending.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
if isinstance(Account.settle, FunctionType):  # else it is compiled, and its clock cannot be another's
    TestSpending = Spending.TestCase


def test_the_ledger_is_sound_on_disk(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "b.db")
    ledger.lease(ROW, 10, 1, 1)
    ledger.close()
    with sqlite3.connect(tmp_path / "b.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
