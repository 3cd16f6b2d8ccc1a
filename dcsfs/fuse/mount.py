"""The mount daemon: a volume, the FUSE session, the control socket, and their orderly end."""

import ctypes
import logging
import os
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from dcsfs import control
from dcsfs.access import AccessGrant
from dcsfs.fs.errors import FsError
from dcsfs.fs.filesystem import FileSystem
from dcsfs.fs.mounted import Mounted, VolumeOptions, close_session, open_volume
from dcsfs.fs.residence import SWEEP_INTERVAL_S
from dcsfs.fs.state import Inode
from dcsfs.fuse import readiness
from dcsfs.fuse.kernelcaches import FuseKernelCaches
from dcsfs.fuse.operations import DcsOperations
from dcsfs.uplink.inspect import describe_placement
from network.control import Reply
from network.errors import InvalidArgument, NotFound
from network.limits import CACHE_SPACE_DEADLINE_S, UMOUNT_PROGRESS_DEADLINE_S
from network.process import notify_service_manager
from network.rpc import ConnectionPool
from network.runtime import Runtime, SystemRuntime, with_deadline

log = logging.getLogger(__name__)

READ_AHEAD_KIB = 4096
"""128 KiB reads become 1 MiB reads: half again as fast (perf notes, FUSE)."""
MAX_TASKS = 16


@dataclass(frozen=True, slots=True)
class MountOptions:
    """Everything `dcsfs mount` knows."""

    bucket: str
    subtree: str
    mountpoint: Path
    volume: VolumeOptions
    allow_other: bool
    exclusive: bool
    stock_wait: bool
    """Leave waiting for requests to pyfuse3 (docs/decisions/0007)."""
    kernel_options: frozenset[str]
    """Generic options handed to the kernel: noatime, nosuid, dev and so on."""


class MountDaemon:
    """One mount; `run` serves until it is unmounted."""

    def __init__(self, options: MountOptions, grant: AccessGrant) -> None:
        self._options = options
        self._grant = grant
        self._runtime: Runtime = SystemRuntime()
        self._mounted: Mounted | None = None
        self._operations: DcsOperations | None = None
        self._is_detaching = False

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Mount, serve, and after the unmount bring what is left to the network.

        `on_ready` is called once the mount point answers. Raises before that for whatever makes
        the mount impossible; the mount point is left free then.
        """
        pool = ConnectionPool(self._runtime)
        options = self._options
        async with open_volume(
            self._runtime, pool, self._grant, options.bucket, options.volume
        ) as mounted:
            self._mounted = mounted
            mounted.filesystem.root = await resolve_subtree(mounted.filesystem, options.subtree)
            operations = DcsOperations(
                mounted.filesystem,
                writeback_cache=options.exclusive and not options.volume.read_only,
            )
            self._operations = operations
            self._init_fuse(operations)
            descriptor = readiness.fuse_descriptor()
            assert descriptor is not None, "pyfuse3.init has opened /dev/fuse"
            if mounted.coherence is not None:
                mounted.coherence.kernel = FuseKernelCaches(mounted.filesystem, descriptor)
            try:
                await self._serve(on_ready)
            finally:
                pyfuse3.close(unmount=True)
            if not self._is_detaching:
                await self._finish()
        pool.close()

    def _init_fuse(self, operations: DcsOperations) -> None:
        options = self._options
        kernel = set(options.kernel_options)
        kernel |= {f"fsname=dcs://{options.bucket}", "subtype=dcsfs", "default_permissions"}
        if options.allow_other:
            kernel.add("allow_other")
        if options.volume.read_only:
            kernel.add("ro")
        try:
            pyfuse3.init(operations, str(options.mountpoint), kernel)
        except RuntimeError as error:
            raise InvalidArgument(
                f"cannot mount on {options.mountpoint}: {error} (is /dev/fuse there, and may "
                "this user mount?)"
            ) from error

    async def _serve(self, on_ready: Callable[[], None]) -> None:
        path = control.runtime_directory() / f"{os.getpid()}.sock"
        commands: dict[str, control.Command] = {
            "status": self._status,
            "sync": self._sync,
            "drain": self._drain_step,
            "unmount": self._unmount,
            "remount": self._remount,
            "stat": self._stat,
        }
        async with trio.open_nursery() as nursery:
            await nursery.start(control.serve, path, commands)

            async def answer_first() -> None:
                await trio.to_thread.run_sync(os.stat, self._options.mountpoint)
                await trio.to_thread.run_sync(self._raise_read_ahead)
                on_ready()

            nursery.start_soon(answer_first)
            waiter = None if self._options.stock_wait else readiness.install()
            nursery.start_soon(_unmount_on_signal, waiter)
            nursery.start_soon(self._sweep_forever)
            await pyfuse3.main(max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()

    async def _sweep_forever(self) -> None:
        assert self._mounted is not None
        while True:
            await trio.sleep(SWEEP_INTERVAL_S)
            self._mounted.filesystem.residence.sweep()

    def _raise_read_ahead(self) -> None:
        device = os.stat(self._options.mountpoint).st_dev
        path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        try:
            path.write_text(str(READ_AHEAD_KIB))
        except OSError as error:
            log.info("read-ahead stays as it is: %s", error)

    async def _finish(self) -> None:
        """After the unmount: flush, as long as that makes progress."""
        assert self._mounted is not None
        with trio.CancelScope(shield=True):
            if await self._drain_with_progress():
                await close_session(self._mounted)
            else:
                log.error(
                    "%d bytes are not on the network yet; they are safe in %s, and the next "
                    "mount with this cache directory sends them",
                    self._mounted.volume.dirty_bytes, self._options.volume.cache_dir,
                )  # fmt: skip

    async def _drain_with_progress(self) -> bool:
        """Flush everything; False after a minute without progress."""
        mounted = self._mounted
        assert mounted is not None
        done = trio.Event()

        async def drain() -> None:
            await mounted.drain()
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            level, since = self._progress_mark(), trio.current_time()
            while not done.is_set():
                with trio.move_on_after(1.0):
                    await done.wait()
                mark = self._progress_mark()
                if mark != level:
                    level, since = mark, trio.current_time()
                    notify_service_manager(
                        f"EXTEND_TIMEOUT_USEC={int(2e6 * UMOUNT_PROGRESS_DEADLINE_S)}\n"
                        f"STATUS={mounted.volume.dirty_bytes} bytes to send"
                    )
                if trio.current_time() - since > UMOUNT_PROGRESS_DEADLINE_S:
                    break
            nursery.cancel_scope.cancel()
        return done.is_set()

    def _progress_mark(self) -> tuple[int, int, int]:
        assert self._mounted is not None
        counters = self._mounted.client.counters
        return (
            self._mounted.volume.dirty_bytes,
            counters.sent_bytes,
            counters.satellite_transactions,
        )

    async def _status(self, request: dict[str, Any]) -> Reply:
        mounted, operations = self._mounted, self._operations
        assert mounted is not None
        assert operations is not None
        volume, counters = mounted.volume, mounted.client.counters
        writable = not volume.is_read_only
        return {
            "pid": os.getpid(),
            "mountpoint": str(self._options.mountpoint),
            "bucket": self._options.bucket,
            "read_only": mounted.filesystem.is_read_only,
            "exclusive": self._options.exclusive,
            "shared": volume.is_shared,
            "offline": volume.is_offline,
            "conflicts": list(mounted.writeback.conflicts.notes) if mounted.writeback else [],
            "cache_dir": str(self._options.volume.cache_dir),
            "cache_bytes": self._options.volume.cache_bytes,
            "clean_bytes": mounted.volume.clean.volume(),
            "log_bytes": volume.log.disk_bytes if writable else 0,
            "dirty_bytes": volume.dirty_bytes if writable else 0,
            "queue": volume.pending_operations if writable else 0,
            "sent_bytes": counters.sent_bytes,
            "received_bytes": counters.received_bytes,
            "segments": counters.segments,
            "satellite_transactions": counters.satellite_transactions,
            "log_syncs": volume.log.sync_count if writable else 0,
            "replayed_records": mounted.replayed,
            "bad_nodes": counters.bad_nodes,
            "slow_nodes": counters.slow_or_failed,
            "open_files": mounted.filesystem.open_handles,
            "inodes_in_memory": len(volume.inodes),
            "inodes_evicted": mounted.filesystem.residence.evicted,
            "disk_failure": str(volume.log.failure or "") if writable else "",
            "last_error": mounted.writeback.last_error if mounted.writeback else "",
            "recent_errors": operations.recent_errors,
        }

    async def _push_kernel_pages(self) -> None:
        """With its write-back cache the kernel may still hold what programs have written."""

        def push() -> None:
            descriptor = os.open(self._options.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
                    raise OSError(ctypes.get_errno(), "syncfs")
            finally:
                os.close(descriptor)

        if self._operations is not None and self._operations.enable_writeback_cache:
            # In a thread: it ends when this very process has answered the kernel's writes.
            await with_deadline(
                CACHE_SPACE_DEADLINE_S,
                "writing the kernel's pages",
                lambda: trio.to_thread.run_sync(push, abandon_on_cancel=True),
            )

    async def _sync(self, request: dict[str, Any]) -> Reply:
        assert self._mounted is not None
        await self._push_kernel_pages()
        if not await self._drain_with_progress():
            reason = self._mounted.writeback.last_error if self._mounted.writeback else ""
            raise InvalidArgument(
                f"no progress for {UMOUNT_PROGRESS_DEADLINE_S:g} s, "
                f"{self._mounted.volume.dirty_bytes} bytes wait in "
                f"{self._options.volume.cache_dir} (they are safe there): {reason}"
            )
        return await self._status(request)

    async def _drain_step(self, request: dict[str, Any]) -> Reply:
        """Ask for a flush and report at once, for progress lines."""
        assert self._mounted is not None
        if self._mounted.writeback is not None:
            self._mounted.writeback.demand()
        return await self._status(request)

    async def _unmount(self, request: dict[str, Any]) -> Reply:
        """Tell the daemon that the unmount is next, and whether it should flush after it."""
        self._is_detaching = bool(request.get("detach"))
        return await self._status(request)

    async def _remount(self, request: dict[str, Any]) -> Reply:
        assert self._mounted is not None
        read_only = bool(request.get("read_only"))
        if not read_only and self._mounted.volume.is_read_only:
            raise InvalidArgument("this mount was made read-only: unmount it and mount it again")
        if read_only:
            await self._sync(request)
        self._mounted.filesystem.is_read_only = read_only
        return await self._status(request)

    async def _stat(self, request: dict[str, Any]) -> Reply:
        """Extents of a path below the mount point, for `dcsfs stat`."""
        assert self._mounted is not None
        mounted = self._mounted
        inode = await resolve_subtree(mounted.filesystem, str(request["path"]))
        rows = await mounted.reader.rows_of(inode) if not inode.is_directory else []
        return {
            "inode": inode.number,
            "size": inode.size,
            "dirty_bytes": sum(layer.data.total_bytes for layer in inode.layers),
            **await describe_placement(mounted.client, rows, inode.placements),
        }


async def _unmount_on_signal(waiter: readiness.RequestWaiter | None) -> None:
    """SIGTERM and Ctrl-C end the FUSE session; the daemon then flushes and exits."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            if waiter is not None:
                waiter.close()
            pyfuse3.terminate()


async def resolve_subtree(filesystem: FileSystem, path: str) -> Inode:
    """Walk a path from the current root; raises NotFound."""
    inode = filesystem.root
    for part in path.strip("/").split("/"):
        if part:
            try:
                inode = await filesystem.directories.lookup(inode.number, os.fsencode(part))
            except FsError as error:
                raise NotFound(f"{path!r} does not exist in the bucket") from error
    return inode


def is_mount_point(path: Path) -> bool:
    """Whether a dcsfs mount, or a bind mount of a part of one, is at the path (proc(5))."""
    wanted = os.path.realpath(path)
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines():
        fields, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields.split()[4])
        if point == wanted and rest.startswith("fuse.dcsfs "):
            return True
    return False


def unmount_kernel(mountpoint: Path) -> None:
    """Detach the mount point in the kernel; raises InvalidArgument when it is busy."""
    command = ["umount", "-i", str(mountpoint)]
    if os.getuid() != 0:
        command = ["fusermount3", "-u", str(mountpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InvalidArgument(f"cannot unmount: {done.stderr.strip()}")
