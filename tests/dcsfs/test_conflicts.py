"""Two mounts go apart, both go on, and come together: whatever a program had saved is there."""

import os
import random

import pytest

from dcsfs.fs.mounted import close_session
from network.messages import Kind
from tests.dcsfs.test_filesystem import CALLER, bucket_world, mounted, read_file
from tests.dcsfs.test_shared import cuttable, until

TOP = b"."
"""How the user below calls the bucket's root."""


class Side:
    """One mount's user: random work on files whose content is never the same twice.

    There is one level of directories; a file is known by its directory's name and its own.
    """

    def __init__(self, mount, tag, seed, places=(), files=()):
        self.mount, self.tag = mount, tag
        self.random = random.Random(seed)
        self.places = dict(places)
        """Name of a directory -> its inode's number."""
        self.files = dict(files)
        """(directory, name) -> content, as this user has left it."""
        self.made = set()
        self.count = 0

    def _content(self):
        self.count += 1
        token = b"%s %d " % (self.tag, self.count)
        content = token * self.random.choice((1, 300, 20_000))
        self.made.add(content)
        return content

    async def _write(self, place, name, content):
        fs = self.mount.filesystem
        flags = os.O_WRONLY | os.O_TRUNC
        handle, _ = await fs.create(self.places[place], name, 0o644, flags, CALLER)
        await fs.write(handle, 0, content)
        await fs.flush(handle)
        fs.release(handle)

    async def step(self):
        r, fs = self.random, self.mount.filesystem
        place, there = r.choice(sorted(self.places)), r.choice(sorted(self.places))
        name, other = b"n%d" % r.randrange(4), b"n%d" % r.randrange(4)
        here, to = (place, name), (there, other)
        directory = b"d%d" % r.randrange(5)
        match r.choice(("save", "save", "save", "save aside", "save aside", "unlink", "rename",
                        "link", "mkdir", "rmdir", "move")):  # fmt: skip
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
            case "mkdir" if directory not in self.places:
                made = await fs.create_node(
                    self.places[TOP], directory, Kind.DIRECTORY, 0o755, CALLER
                )
                self.places[directory] = made.number
            case "rmdir" if directory in self.places and not self._in(directory):
                await fs.rmdir(self.places[TOP], directory)
                del self.places[directory]
            case "move" if directory in self.places and not self._in(there) and there != TOP:
                await self._move(directory, there)

    async def _move(self, directory, to):
        """Rename a directory over an empty one."""
        if directory == to:
            return
        top = self.places[TOP]
        await self.mount.filesystem.rename(top, directory, top, to, 0)
        self.places[to] = self.places.pop(directory)
        for name in self._in(directory):
            self.files[to, name] = self.files.pop((directory, name))

    def _in(self, directory):
        return [name for place, name in self.files if place == directory]

    def _same_file(self, key):
        return [k for k, content in self.files.items() if content == self.files.get(key)]


async def contents(mount, number=None, prefix=TOP):
    """{(directory, name): content} of every file there is."""
    fs, found = mount.filesystem, {}
    for entry in await fs.directories.read(number or fs.root.number):
        inode = await fs.directories.lookup(number or fs.root.number, entry.name)
        if inode.is_directory:
            found |= await contents(mount, inode.number, entry.name)
        else:
            found[prefix, entry.name] = await read_file(fs, inode)
    return found


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize("seed", range(5))
async def test_random_work_apart_keeps_what_either_side_saved(
    tmp_path, autojump_clock, seed, crashes, leaves
):
    """One mount is cut off, or dies, and another one works, and maybe leaves, before it is back."""
    async with bucket_world(tmp_path, seed=seed) as world:
        async with cuttable(world, tmp_path, "away") as (runtime, away):
            root = away.filesystem.root.number
            one = Side(away, b"away", seed, {TOP: root})
            for _ in range(30):
                await one.step()
            await away.drain()
            base, places = dict(one.files), dict(one.places)
            assert await contents(away) == base
            one.made.clear()
            runtime.cut()
            for _ in range(30):
                await one.step()
            assert await contents(away) == one.files
            await away.filesystem.fsync(root)
            async with mounted(world, tmp_path, "stayed") as stayed:
                two = Side(stayed, b"stayed", seed + 1000, places, base)
                for name in sorted(places):
                    if name != TOP:
                        await stayed.filesystem.directories.lookup(root, name)
                for _ in range(30):
                    await two.step()
                assert await contents(stayed) == two.files
                if crashes or leaves:
                    await stayed.drain()
                if leaves:
                    await close_session(stayed)
                elif not crashes:
                    await come_back(runtime, away)
                    await stayed.drain()
                    await check(base, one, two, [away, stayed])
            if leaves and not crashes:
                await come_back(runtime, away)
                async with mounted(world, tmp_path, "stayed") as stayed:
                    await check(base, one, two, [away, stayed])
        if leaves and crashes:
            async with mounted(world, tmp_path, "away", is_exclusive=bool(seed % 2)) as away:
                await away.drain()
                await until(lambda: not away.volume.is_shared, 60)
                if seed % 2:
                    await close_session(away)
                async with mounted(world, tmp_path, "stayed") as stayed:
                    await check(base, one, two, [away, stayed])
        elif crashes:
            async with mounted(world, tmp_path, "stayed") as stayed:
                async with mounted(world, tmp_path, "away") as away:
                    await away.drain()
                    await check(base, one, two, [away, stayed])


async def come_back(runtime, away):
    runtime.is_cut = False
    assert away.volume.has_backlog
    await until(lambda: not away.volume.has_backlog, 300)
    await away.drain()


async def check(base, one, two, mounts):
    merged = await contents(mounts[0])
    assert merged == await contents(mounts[1])
    there = set(merged.values())
    for side in (one, two):
        for key, content in side.files.items():
            is_new = content in side.made
            is_kept_by_both = base.get(key) == one.files.get(key) == two.files.get(key)
            if is_new or is_kept_by_both:
                assert content in there, (side.tag, key, content[:12], sorted(merged))
    for key, content in merged.items():
        assert content in {*base.values(), *one.made, *two.made}, (key, content[:40])
