"""Two mounts go apart, both go on, and come together: whatever a program had saved is there."""

import os
import random

import pytest

from network.messages import Kind
from tests.dcsfs.test_filesystem import CALLER, bucket_world, mounted, read_file
from tests.dcsfs.test_shared import cuttable, until

PLACES = (b"", b"d0", b"d1")


@pytest.fixture(autouse=True)
def _world_directory(tmp_path):
    (tmp_path / "world").mkdir()


class Side:
    """One mount's user: random work on files whose content is never the same twice."""

    def __init__(self, mount, places, tag, seed, files=()):
        self.mount, self.places, self.tag = mount, places, tag
        self.random = random.Random(seed)
        self.files = dict(files)
        """(place, name) -> content, as this user has left it."""
        self.made = set()
        self.count = 0

    def _content(self):
        self.count += 1
        token = b"%s %d " % (self.tag, self.count)
        content = token * self.random.choice((1, 300, 20_000))
        self.made.add(content)
        return content

    async def _write(self, place, name, content, *, truncate=True):
        fs = self.mount.filesystem
        flags = os.O_WRONLY | (os.O_TRUNC if truncate else 0)
        handle, _ = await fs.create(self.places[place], name, 0o644, flags, CALLER)
        await fs.write(handle, 0, content)
        await fs.flush(handle)
        fs.release(handle)

    async def step(self):
        r, fs = self.random, self.mount.filesystem
        place, there = r.randrange(3), r.randrange(3)
        name, other = b"n%d" % r.randrange(4), b"n%d" % r.randrange(4)
        here, to = (place, name), (there, other)
        match r.choice(("save", "save", "save aside", "unlink", "rename", "link")):
            case "save":
                content = self._content()
                await self._write(place, name, content)
                for key in self._same_file(here):
                    self.files[key] = content
                self.files[here] = content
            case "save aside":
                content = self._content()
                await self._write(place, b".new", content)
                await fs.rename(self.places[place], b".new", self.places[place], name, 0)
                self.files[here] = content
            case "unlink" if here in self.files:
                await fs.unlink(self.places[place], name)
                del self.files[here]
            case "rename" if here in self.files and to not in self._same_file(here):
                await fs.rename(self.places[place], name, self.places[there], other, 0)
                self.files[to] = self.files.pop(here)
            case "link" if here in self.files and to not in self.files:
                inode = await fs.directories.lookup(self.places[place], name)
                await fs.link(inode.number, self.places[there], other)
                self.files[to] = self.files[here]

    def _same_file(self, key):
        return [k for k, content in self.files.items() if content == self.files.get(key)]


async def contents(mount, places):
    """{(place, name): content} of everything in the places."""
    fs, found = mount.filesystem, {}
    for index, number in enumerate(places):
        for entry in await fs.directories.read(number):
            if entry.kind is Kind.FILE:
                inode = await fs.directories.lookup(number, entry.name)
                found[index, entry.name] = await read_file(fs, inode)
    return found


@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize("seed", range(5))
async def test_random_work_apart_keeps_what_either_side_saved(
    tmp_path, autojump_clock, seed, crashes
):
    async with bucket_world(tmp_path, seed=seed) as world:
        async with cuttable(world, tmp_path, "away") as (runtime, away):
            root = away.filesystem.root.number
            places = [root]
            for name in PLACES[1:]:
                made = await away.filesystem.create_node(root, name, Kind.DIRECTORY, 0o755, CALLER)
                places.append(made.number)
            one = Side(away, places, b"away", seed)
            for _ in range(20):
                await one.step()
            await away.drain()
            base = dict(one.files)
            assert await contents(away, places) == base
            one.made.clear()
            runtime.cut()
            for _ in range(25):
                await one.step()
            assert await contents(away, places) == one.files
            await away.filesystem.fsync(root)
            async with mounted(world, tmp_path, "stayed") as stayed:
                two = Side(stayed, places, b"stayed", seed + 1000, base)
                for _ in range(25):
                    await two.step()
                assert await contents(stayed, places) == two.files
                if not crashes:
                    runtime.is_cut = False
                    await until(lambda: away.volume.is_shared and not away.volume.has_backlog, 300)
                    await away.drain()
                    await stayed.drain()
                    await check(base, one, two, [away, stayed], places)
                else:
                    await stayed.drain()
        if crashes:
            async with mounted(world, tmp_path, "stayed") as stayed:
                async with mounted(world, tmp_path, "away") as away:
                    await away.drain()
                    await check(base, one, two, [away, stayed], places)


async def check(base, one, two, mounts, places):
    merged = await contents(mounts[0], places)
    assert merged == await contents(mounts[1], places)
    there = set(merged.values())
    for side in (one, two):
        for key, content in side.files.items():
            is_new = content in side.made
            is_kept_by_both = base.get(key) == one.files.get(key) == two.files.get(key)
            if is_new or is_kept_by_both:
                assert content in there, (side.tag, key, content[:12], sorted(merged))
    for key, content in merged.items():
        assert content in {*base.values(), *one.made, *two.made}, (key, content[:40])
