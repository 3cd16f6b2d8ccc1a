"""Intervals, the write-back log and the clean cache."""

import os
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from dcsfs.cache import log as log_module
from dcsfs.cache.clean import RUN_RECORDS, CleanCache
from dcsfs.cache.intervals import IntervalMap
from dcsfs.cache.log import WriteLog
from network.errors import IntegrityError
from network.ids import ExtentID
from network.limits import RECORD_BYTES
from network.testing.memory import MemoryRuntime


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 90), st.integers(1, 30), st.integers(0, 9)),
        max_size=30,
    )
)
def test_intervals_match_a_naive_reference(operations):
    runs, reference = IntervalMap(), {}
    for number, (is_insert, start, length, inside) in enumerate(operations):
        end = start + length
        if is_insert:
            runs.insert(start, end, number, inside)
            reference |= {o: (number, inside + o - start) for o in range(start, end)}
        else:
            runs.clear(start, end)
            reference = {o: v for o, v in reference.items() if not start <= o < end}
        assert runs.total_bytes == len(reference)
        seen = {}
        for low, high, run in runs.cut(0, 130):
            assert low < high
            for offset in range(low, high):
                if run is not None:
                    seen[offset] = (run.source, run.source_offset + offset - run.start)
        assert seen == reference


class LogMachine(RuleBasedStateMachine):
    """The log against a list; a crash keeps what was synced and may tear the rest."""

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="dcsfs-log-"))
        self.runtime = MemoryRuntime()
        self.log = WriteLog(self.directory, b"k" * 32, self.runtime)
        self.records = []
        self.synced = 0
        self.trimmed = 0

    @rule(kind=st.integers(1, 9), payload=st.binary(max_size=3000))
    def append(self, kind, payload):
        position = self.log.append(kind, payload)
        self.records.append((position.sequence, kind, payload))
        assert bytes(self.log.read(position)) == payload

    @rule()
    def sync(self):
        trio.run(self.log.sync)
        self.synced = len(self.records)

    @rule(share=st.integers(0, 10))
    def trim(self, share):
        if self.records:
            upto = self.records[len(self.records) * share // 11][0]
            self.log.trim(upto)
            self.trimmed = max(self.trimmed, upto)

    @rule(torn=st.integers(0, 2000), seed=st.integers(0, 255))
    def crash(self, torn, seed):
        """Damage unsynced bytes at the end of the newest slab, then open again."""
        unsynced = len(self.records) - self.synced
        end = self.log._end
        current = self.log._current
        self.log.close()
        if unsynced and current is not None and torn:
            with current.path.open("r+b") as handle:
                size = min(torn, len(self.records[-1][2]) + 30)
                handle.seek(end - size)
                handle.write(bytes([seed]) * size)
        self.log = WriteLog(self.directory, b"k" * 32, self.runtime)
        found = [(p.sequence, kind, bytes(data)) for p, kind, data in self.log.replay()]
        kept = {item[0]: item for item in self.records}
        for item in found:
            assert kept.get(item[0]) == item
        numbers = [item[0] for item in found]
        assert numbers == sorted(numbers)
        for item in self.records[: self.synced]:
            assert item[0] <= self.trimmed or item in found
        self.trimmed = 0
        self.records = found
        self.synced = len(found)

    def teardown(self):
        self.log.close()


LogMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def _small_slabs():
    patch = pytest.MonkeyPatch()
    patch.setattr(log_module, "SLAB_BYTES", 64 * 1024)
    patch.setattr(log_module, "_RESERVE_MARGIN_BYTES", 8 * 1024)
    yield
    patch.undo()


TestLogModel = LogMachine.TestCase


async def test_log_of_another_key_is_refused_and_left_alone(tmp_path):
    runtime = MemoryRuntime()
    log = WriteLog(tmp_path, b"k" * 32, runtime)
    log.append(1, b"data")
    await log.sync()
    log.close()
    with pytest.raises(IntegrityError):
        WriteLog(tmp_path, b"x" * 32, runtime)
    again = WriteLog(tmp_path, b"k" * 32, runtime)
    assert [bytes(data) for _, _, data in again.replay()] == [b"data"]
    again.close()


async def test_log_holds_no_plaintext(tmp_path):
    log = WriteLog(tmp_path, b"k" * 32, MemoryRuntime())
    log.append(1, b"a very visible marker" * 20)
    await log.sync()
    assert all(b"visible" not in path.read_bytes() for path in tmp_path.iterdir())
    log.close()


async def test_one_sync_serves_concurrent_callers(tmp_path):
    log = WriteLog(tmp_path, b"k" * 32, MemoryRuntime())
    log.append(1, b"data")
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(log.sync)
    assert log.sync_count == 1
    log.close()


async def test_failed_sync_is_never_followed_by_success(tmp_path, monkeypatch):
    log = WriteLog(tmp_path, b"k" * 32, MemoryRuntime())
    log.append(1, b"data")

    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(log_module.os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output"):
        await log.sync()
    monkeypatch.undo()
    with pytest.raises(OSError, match="Input/output"):
        await log.sync()
    log.close()


async def test_clean_cache_keeps_evicts_and_survives_a_restart(tmp_path):
    runtime = MemoryRuntime()
    cache = CleanCache(tmp_path, 40 << 20, runtime)
    runs = {}
    for number in range(64):
        extent = ExtentID(number.to_bytes(16, "big"))
        size = (RUN_RECORDS * RECORD_BYTES, 70_000, 100)[number % 3]
        runs[extent] = os.urandom(size)
        await cache.put([(extent, 0, [memoryview(runs[extent])])])
    found = {extent: await cache.get(extent, 0) for extent in runs}
    assert all(found[extent] in (None, data) for extent, data in runs.items())
    kept = [extent for extent in runs if found[extent] is not None]
    assert len(kept) > 0
    last = list(runs)[-1]
    assert found[last] == runs[last]
    cache.close()
    again = CleanCache(tmp_path, 40 << 20, runtime)
    for extent in kept:
        assert await again.get(extent, 0) == runs[extent]
    extra = ExtentID(b"x" * 16)
    await again.put([(extra, 3, [memoryview(b"a" * 70_000), memoryview(b"b" * 10)])])
    assert await again.get(extra, 3) == b"a" * 70_000 + b"b" * 10
    for extent in kept:
        assert await again.get(extent, 0) in (None, runs[extent])
    again.close()


async def test_clean_cache_lets_go_of_what_was_not_read_for_longest(tmp_path):
    cache = CleanCache(tmp_path, 64 << 20, MemoryRuntime())
    data = os.urandom(RUN_RECORDS * RECORD_BYTES)
    names = [ExtentID(bytes([number]) * 16) for number in range(100)]
    for number, name in enumerate(names):
        await cache.put([(name, 0, [memoryview(data)])])
        assert await cache.get(names[0], 0) == data, number  # read again and again: it stays
    assert await cache.get(names[1], 0) is None
    assert await cache.get(names[-1], 0) == data
    cache.close()


async def test_clean_cache_slot_in_use_is_not_given_to_another_run(tmp_path):
    cache = CleanCache(tmp_path, 40 << 20, MemoryRuntime())
    disk = cache._disk
    first = disk.allocate(100)
    with disk.pinned(first):
        disk.release(first)
        assert disk.allocate(100).number != first.number
    assert disk.allocate(100).number == first.number
    cache.close()


async def test_clean_cache_skips_what_the_disk_is_too_slow_for(tmp_path, autojump_clock):
    class SlowDisk(MemoryRuntime):
        async def offload(self, function, *args):
            await trio.sleep(1)
            return function(*args)

    cache = CleanCache(tmp_path, 40 << 20, SlowDisk())
    run = os.urandom(RUN_RECORDS * RECORD_BYTES)
    names = [ExtentID(bytes([number]) * 16) for number in range(2)]
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(cache.put, [(name, 0, [memoryview(run)])])
    assert cache.skipped == 1
    found = [await cache.get(name, 0) for name in names]
    assert sorted(found, key=lambda item: item is None) == [run, None]
    cache.close()
