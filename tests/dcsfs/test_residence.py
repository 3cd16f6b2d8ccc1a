"""Inodes come and go in memory, and nobody can tell: handlers against a plain model of a tree."""

import errno
import os
import random
from contextlib import suppress

import pyfuse3
import pytest
import trio

from dcsfs.fs import directories as directories_module
from dcsfs.fs.errors import FsError
from dcsfs.fs.mounted import close_session
from dcsfs.fuse.operations import DOTS, FUSE_ROOT, DcsOperations
from network.messages import Kind
from tests.dcsfs.test_filesystem import CALLER, bucket_world, mounted

CTX = pyfuse3.RequestContext()


@pytest.fixture
def _small_pages(monkeypatch):
    monkeypatch.setattr(directories_module, "LISTED_ENTRIES_MAX", 8)
    monkeypatch.setattr(directories_module, "LIST_PAGE_ENTRIES_MAX", 4)
    monkeypatch.setattr(directories_module, "PAGE_ENTRIES", 3)


class Kernel:
    """What the kernel does with a mount: it calls by number, and counts its references."""

    def __init__(self, mount, monkeypatch, *, limit):
        self.mount = mount
        self.operations = DcsOperations(mount.filesystem, writeback_cache=False)
        self.residence = mount.filesystem.residence
        self.residence.limit = limit
        self.references = {}
        self.listed = []
        self.room = 0
        monkeypatch.setattr(pyfuse3, "readdir_reply", self._readdir_reply)

    def _readdir_reply(self, token, name, attributes, cookie):
        if self.room == 0:
            return False
        self.room -= 1
        self.listed.append((name, attributes.st_ino, cookie))
        if name not in (b".", b".."):  # fuse_direntplus_link in the kernel
            self._refer(attributes)
        return True

    def _refer(self, entry):
        self.references[entry.st_ino] = self.references.get(entry.st_ino, 0) + 1
        return entry.st_ino

    async def lookup(self, parent, name):
        return self._refer(await self.operations.lookup(parent, name, CTX))

    async def create(self, parent, name):
        info, entry = await self.operations.create(parent, name, 0o644, os.O_RDWR, CTX)
        await self.operations.release(info.fh)
        return self._refer(entry)

    async def make(self, parent, name, mode):
        return self._refer(await self.operations.mknod(parent, name, mode, 0, CTX))

    async def mkdir(self, parent, name):
        return self._refer(await self.operations.mkdir(parent, name, 0o755, CTX))

    async def link(self, number, parent, name):
        return self._refer(await self.operations.link(number, parent, name, CTX))

    async def unlink(self, parent, name):
        await self.operations.unlink(parent, name, CTX)

    async def rmdir(self, parent, name):
        await self.operations.rmdir(parent, name, CTX)

    async def rename(self, parent, name, new_parent, new_name):
        await self.operations.rename(parent, name, new_parent, new_name, 0, CTX)

    async def write(self, number, data):
        info = await self.operations.open(number, os.O_RDWR | os.O_TRUNC, CTX)
        await self.operations.write(info.fh, 0, data)
        await self.operations.release(info.fh)

    async def read(self, number):
        info = await self.operations.open(number, os.O_RDONLY, CTX)
        data = bytes(await self.operations.read(info.fh, 0, 1 << 20))
        await self.operations.release(info.fh)
        return data

    async def listing(self, number, page):
        """[(name, inode)] read in pages of so many entries, without the dots."""
        handle = await self.operations.opendir(number, CTX)
        self.listed, last = [], DOTS
        while True:
            self.room, before = page, len(self.listed)
            await self.operations.readdir(handle, last, None)
            if len(self.listed) == before:
                break
            last = self.listed[-1][2]
            self.residence.sweep()
        await self.operations.releasedir(handle)
        return [(name, inode) for name, inode, _ in self.listed]

    async def forget(self, number):
        count = self.references.pop(number, 0)
        if count:
            await self.operations.forget([(number, count)])


class Tree:
    """The reference: directories as dictionaries, files as [content, attribute]."""

    def __init__(self):
        self.directories = {FUSE_ROOT: {}}
        self.parents = {FUSE_ROOT: FUSE_ROOT}
        self.files = {}

    def names_of(self, number):
        return [n for d in self.directories.values() for n, child in d.items() if child == number]

    def is_below(self, directory, ancestor):
        while directory not in (ancestor, FUSE_ROOT):
            directory = self.parents[directory]
        return directory == ancestor


class Schedule:
    """Random operations on both; what one refuses the other must refuse, too."""

    def __init__(self, kernel, seed):
        self.kernel, self.tree, self.random = kernel, Tree(), random.Random(seed)

    async def step(self):
        r, tree, kernel = self.random, self.tree, self.kernel
        here, there = r.choice(list(tree.directories)), r.choice(list(tree.directories))
        name, other = b"n%d" % r.randrange(24), b"n%d" % r.randrange(24)
        child = tree.directories[here].get(name)
        match r.choice(("create", "create", "create", "mkdir", "unlink", "rmdir", "rename", "link",
                        "write", "look", "list", "forget", "xattr")):  # fmt: skip
            case "create" if child is None:
                number = await kernel.create(here, name)
                tree.directories[here][name], tree.files[number] = number, [b"", None]
            case "mkdir" if child is None and len(tree.directories) < 6:
                number = await kernel.mkdir(here, name)
                tree.directories[here][name], tree.directories[number] = number, {}
                tree.parents[number] = here
            case "unlink" if child in tree.files:
                await kernel.unlink(here, name)
                del tree.directories[here][name]
                if not tree.names_of(child):
                    del tree.files[child]
                    await kernel.forget(child)
            case "rmdir" if child in tree.directories:
                await self._rmdir(here, name, child)
            case "rename" if child is not None and there != child:
                await self._rename(here, name, child, there, other)
            case "link" if child in tree.files and other not in tree.directories[there]:
                assert await kernel.link(child, there, other) == child
                tree.directories[there][other] = child
            case "write" if child in tree.files:
                data = r.randbytes(r.randrange(3000))
                await kernel.write(child, data)
                tree.files[child][0] = data
            case "xattr" if child in tree.files:
                tree.files[child][1] = b"%d" % r.randrange(99)
                await kernel.operations.setxattr(
                    child, b"user.a", tree.files[child][1], pyfuse3.RequestContext()
                )
            case "forget" if child in tree.files:
                await kernel.forget(child)
            case "list":
                found = await kernel.listing(here, r.choice((1, 2, 5, 100)))
                assert sorted(found) == sorted(tree.directories[here].items())
            case _:
                await self.check(here, name)

    async def _rmdir(self, here, name, child):
        if self.tree.directories[child]:
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await self.kernel.rmdir(here, name)
            assert caught.value.errno == errno.ENOTEMPTY
            return
        await self.kernel.rmdir(here, name)
        del self.tree.directories[here][name], self.tree.directories[child]
        await self.kernel.forget(child)

    async def _rename(self, here, name, child, there, other):
        tree, target = self.tree, self.tree.directories[there].get(other)
        is_directory = child in tree.directories
        if is_directory and tree.is_below(there, child):
            return
        if target is not None and (is_directory or target in tree.directories):
            if not (is_directory and target in tree.directories and target != child):
                return
            if tree.directories[target]:
                with pytest.raises(pyfuse3.FUSEError) as caught:
                    await self.kernel.rename(here, name, there, other)
                assert caught.value.errno == errno.ENOTEMPTY
                return
            del tree.directories[target]
        await self.kernel.rename(here, name, there, other)
        if target == child:
            return
        del tree.directories[here][name]
        tree.directories[there][other] = child
        if is_directory:
            tree.parents[child] = there
        if target is not None and target in tree.files and not tree.names_of(target):
            del tree.files[target]
            await self.kernel.forget(target)

    async def check(self, here, name):
        child = self.tree.directories[here].get(name)
        if child is None:
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await self.kernel.lookup(here, name)
            assert caught.value.errno == errno.ENOENT
            return
        assert await self.kernel.lookup(here, name) == child
        if child not in self.tree.files:
            return
        content, attribute = self.tree.files[child]
        found = await self.kernel.operations.getattr(child, CTX)
        assert (found.st_size, found.st_nlink) == (len(content), len(self.tree.names_of(child)))
        assert await self.kernel.read(child) == content
        if attribute is not None:
            assert await self.kernel.operations.getxattr(child, b"user.a", CTX) == attribute


@pytest.mark.usefixtures("_small_pages")
@pytest.mark.parametrize("seed", range(8))
async def test_a_random_tree_stays_true_with_hardly_an_inode_in_memory(
    tmp_path, autojump_clock, monkeypatch, seed
):
    async with bucket_world(tmp_path, seed=seed) as world, mounted(world, tmp_path) as mount:
        kernel = Kernel(mount, monkeypatch, limit=3)
        schedule = Schedule(kernel, seed)
        for number in range(500):
            await schedule.step()
            if number % 7 == 0:
                kernel.residence.sweep()
            if number % 29 == 28:
                await mount.drain()
        await mount.drain()
        for directory, names in list(schedule.tree.directories.items()):
            for name in names:
                await schedule.check(directory, name)
        assert kernel.residence.evicted > 100
        for number in list(kernel.references):
            await kernel.forget(number)
        assert not mount.volume.parted
        for _ in range(3):
            kernel.residence.sweep()
        assert len(mount.volume.inodes) <= 3


async def test_what_is_in_use_or_not_committed_is_never_evicted(
    tmp_path, autojump_clock, monkeypatch
):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as mount:
        kernel = Kernel(mount, monkeypatch, limit=0)
        staged = await kernel.create(FUSE_ROOT, b"staged")
        for _ in range(3):
            assert kernel.residence.sweep() == 0
        await mount.drain()
        opened = await kernel.operations.open(staged, os.O_RDWR, CTX)
        for _ in range(3):
            assert kernel.residence.sweep() == 0
        await kernel.operations.release(opened.fh)
        began = kernel.residence.begin()
        mount.volume.get(staged)
        for _ in range(3):
            assert kernel.residence.sweep() == 0
        kernel.residence.end(began)
        kernel.residence.sweep()
        assert staged not in mount.volume.inodes
        assert mount.volume.parted == {staged: 1}


async def test_a_file_handle_outlives_the_mount(tmp_path, autojump_clock, monkeypatch):
    """An NFS server asks a mount that has just begun for `.` in inodes it never heard of."""
    async with bucket_world(tmp_path) as world:
        async with mounted(world, tmp_path) as mount:
            kernel = Kernel(mount, monkeypatch, limit=100)
            deep = FUSE_ROOT
            for number in range(70):  # more levels than one answer holds
                deep = await kernel.mkdir(deep, b"level %d" % number)
            number = await kernel.create(deep, b"file")
            await kernel.write(number, b"content")
            gone = await kernel.create(FUSE_ROOT, b"gone")
            await kernel.unlink(FUSE_ROOT, b"gone")
            await mount.drain()
            await close_session(mount)
        async with mounted(world, tmp_path, "other") as mount:
            kernel = Kernel(mount, monkeypatch, limit=100)
            assert await kernel.lookup(number, b".") == number
            assert await kernel.read(number) == b"content"
            assert await kernel.lookup(deep, b"file") == number
            above = await kernel.lookup(deep, b"..")
            assert await kernel.lookup(above, b"level 69") == deep
            for wrong in (gone, 2**40, 2**63 - 1):
                with pytest.raises(pyfuse3.FUSEError) as caught:
                    await kernel.lookup(wrong, b".")
                assert caught.value.errno == errno.ESTALE
            subtree = await mount.filesystem.directories.lookup(
                mount.filesystem.root.number, b"level 0"
            )
            await mount.filesystem.create_node(
                mount.filesystem.root.number, b"outside", Kind.FILE, 0o644, CALLER
            )
            await mount.drain()
        async with mounted(world, tmp_path, "third") as mount:
            outside = await mount.filesystem.directories.lookup(
                mount.filesystem.root.number, b"outside"
            )
            mount.filesystem.root = await mount.filesystem.directories.lookup(
                mount.filesystem.root.number, b"level 0"
            )
            assert mount.filesystem.root.number == subtree.number
            del mount.volume.inodes[outside.number]
            kernel = Kernel(mount, monkeypatch, limit=100)
            assert await kernel.lookup(number, b".") == number
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await kernel.lookup(outside.number, b".")
            assert caught.value.errno == errno.ESTALE


async def test_the_root_of_a_subtree_mount_stays(tmp_path, autojump_clock, monkeypatch):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as mount:
        fs = mount.filesystem
        top = await fs.create_node(fs.root.number, b"top", Kind.DIRECTORY, 0o755, CALLER)
        fs.root = top
        kernel = Kernel(mount, monkeypatch, limit=0)
        number = await kernel.create(FUSE_ROOT, b"f")
        await mount.drain()
        for _ in range(3):
            kernel.residence.sweep()
        assert mount.volume.parted == {number: 1}
        assert await kernel.lookup(FUSE_ROOT, b"f") == number
        assert await kernel.listing(FUSE_ROOT, 5) == [(b"f", number)]
        for _ in range(3):
            kernel.residence.sweep()
        assert (await kernel.operations.getattr(number, CTX)).st_ino == number


async def test_on_a_shared_bucket_an_evicted_inode_is_invalidated_and_loaded_as_it_is(
    tmp_path, autojump_clock, monkeypatch
):
    async with (
        bucket_world(tmp_path) as world,
        mounted(world, tmp_path) as first,
        mounted(world, tmp_path, "other") as second,
    ):
        dropped = []

        class Recording:
            async def drop(self, numbers):
                dropped.extend(numbers)

            async def drop_all(self, *, then):
                then()

        second.coherence.kernel = Recording()
        one = Kernel(first, monkeypatch, limit=100)
        number = await one.create(FUSE_ROOT, b"f")
        two = Kernel(second, monkeypatch, limit=0)
        assert await two.lookup(FUSE_ROOT, b"f") == number
        await trio.sleep(5)
        for _ in range(3):
            two.residence.sweep()
        assert second.volume.parted == {number: 1}
        dropped.clear()
        await one.operations.setxattr(number, b"user.a", b"1", pyfuse3.RequestContext())
        assert number in dropped
        assert await two.operations.getxattr(number, b"user.a", CTX) == b"1"
        await one.unlink(FUSE_ROOT, b"f")
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await two.operations.getattr(number, CTX)
            await two.operations.getxattr(number, b"user.b", CTX)
        assert caught.value.errno in (errno.ESTALE, errno.ENODATA)


@pytest.mark.usefixtures("_small_pages")
async def test_listing_a_large_directory_while_it_changes(tmp_path, autojump_clock, monkeypatch):
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as maker:
        kernel = Kernel(maker, monkeypatch, limit=1000)
        numbers = {b"f%03d" % n: await kernel.create(FUSE_ROOT, b"f%03d" % n) for n in range(40)}
        await maker.drain()
        await close_session(maker)
        async with mounted(world, tmp_path, "other") as mount:
            kernel = Kernel(mount, monkeypatch, limit=5)
            operations = kernel.operations
            assert mount.volume.root.is_large
            handle = await operations.opendir(FUSE_ROOT, CTX)
            seen, last = [], 0
            while True:
                kernel.listed, kernel.room = [], 4
                await operations.readdir(handle, last, None)
                if not kernel.listed:
                    break
                seen += [name for name, _, _ in kernel.listed]
                last = kernel.listed[-1][2]
                victim = b"f%03d" % len(seen)
                with suppress(pyfuse3.FUSEError, FsError):
                    await kernel.unlink(FUSE_ROOT, victim)
                await kernel.create(FUSE_ROOT, b"new%d" % len(seen))
                kernel.residence.sweep()
            assert seen[:2] == [b".", b".."]
            old = [name for name in seen if name in numbers]
            assert len(seen) == len(set(seen)) == len(old) + 2
            left = [name for name, _ in await kernel.listing(FUSE_ROOT, 7) if name in numbers]
            assert set(left) <= set(old)


@pytest.mark.parametrize("is_large", [False, True])
async def test_renaming_while_listing_comes_to_an_end(
    tmp_path, autojump_clock, monkeypatch, is_large, request
):
    if is_large:
        request.getfixturevalue("_small_pages")
    async with bucket_world(tmp_path) as world, mounted(world, tmp_path) as maker:
        kernel = Kernel(maker, monkeypatch, limit=1000)
        made = [await kernel.create(FUSE_ROOT, b"f%03d" % n) for n in range(40)]
        await maker.drain()
        await close_session(maker)
        async with mounted(world, tmp_path, "other") as mount:
            kernel = Kernel(mount, monkeypatch, limit=1000)
            assert mount.volume.root.is_large == is_large
            handle = await kernel.operations.opendir(FUSE_ROOT, CTX)
            seen, last = [], DOTS
            while len(seen) <= 40:
                kernel.listed, kernel.room = [], 4
                await kernel.operations.readdir(handle, last, None)
                if not kernel.listed:
                    break
                last = kernel.listed[-1][2]
                for name, number, _ in kernel.listed:
                    seen.append(number)
                    await kernel.rename(FUSE_ROOT, name, FUSE_ROOT, b"new " + name)
                    await kernel.create(FUSE_ROOT, b"beside " + name)
                if len(seen) in (3, 4):  # one that is still to come gets another name
                    await kernel.rename(FUSE_ROOT, b"f020", FUSE_ROOT, b"moved")
            assert len(seen) == len(set(seen))
            assert set(seen) == (set(made) - {made[20]} if is_large else set(made))
            names = [name for name, _ in await kernel.listing(FUSE_ROOT, 7)]
            assert len(names) == len(set(names)) == 40 + len(seen)
