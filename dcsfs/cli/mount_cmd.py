"""`dcsfs mount` and `dcsfs umount`; `mount.dcsfs` and `umount.fuse.dcsfs` call them."""

import fcntl
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import trio

from dcsfs import control
from dcsfs.access import load_access
from dcsfs.cli.common import find_access, parse_address
from dcsfs.fs.mounted import CACHE_BYTES_DEFAULT, VolumeOptions
from dcsfs.fuse.mount import MountDaemon, MountOptions, is_mount_point, unmount_kernel
from network.errors import DcsError, InvalidArgument, Unavailable
from network.limits import UMOUNT_PROGRESS_DEADLINE_S
from network.process import (
    cap_memory,
    first_error,
    notify_service_manager,
    raise_descriptor_limit,
    shield_from_memory_pressure,
)
from network.units import format_size, parse_size

KERNEL_OPTIONS = frozenset({
    "noatime", "atime", "nodiratime", "diratime", "relatime", "norelatime", "dev", "nodev",
    "suid", "nosuid", "exec", "noexec", "sync", "async", "dirsync",
})  # fmt: skip
IGNORED_OPTIONS = frozenset({
    "rw", "_netdev", "nofail", "auto", "noauto", "user", "nouser", "users", "defaults",
})  # fmt: skip
READY_TIMEOUT_S = 60.0


def parse_options(values: tuple[str, ...]) -> dict[str, str]:
    """`-o a=b,c` as a dictionary; flags have an empty value."""
    found: dict[str, str] = {}
    for value in values:
        for item in value.split(","):
            if item:
                name, _, argument = item.partition("=")
                found[name] = argument
    return found


def build_options(
    address: str, mountpoint: Path, values: dict[str, str], access: Path | None
) -> tuple[MountOptions, Path]:
    """Check all options; raises InvalidArgument for an unknown one, naming it."""
    bucket, subtree = parse_address(address)
    values = dict(values)
    access_path = find_access(Path(values.pop("access")) if "access" in values else access)
    if not mountpoint.is_dir():
        raise InvalidArgument(f"mount point {mountpoint} does not exist or is not a directory")
    if os.path.ismount(mountpoint):
        raise InvalidArgument(f"something is mounted on {mountpoint} already")
    sync = values.pop("sync", "local") or "sync"
    if sync not in ("local", "network", "sync"):
        raise InvalidArgument(f"sync must be local or network, not {sync!r}")
    read_only = values.pop("ro", None) is not None
    exclusive = values.pop("exclusive", None) is not None
    cache_dir = values.pop("cache_dir", "")
    cache_size = values.pop("cache_size", "")
    volume = VolumeOptions(
        Path(cache_dir).absolute() if cache_dir else default_cache(bucket, read_only),
        parse_size(cache_size) if cache_size else CACHE_BYTES_DEFAULT,
        read_only=read_only,
        sync_to_network=sync == "network",
        is_exclusive=exclusive and not read_only,
    )
    stock_wait = values.pop("stock_wait", None) is not None
    allow_other = values.pop("allow_other", None) is not None or os.getuid() == 0
    kernel = {name for name in values if name in KERNEL_OPTIONS}
    unknown = [
        name
        for name in values
        if name not in KERNEL_OPTIONS | IGNORED_OPTIONS and not name.startswith("x-")
    ]
    if unknown:
        raise InvalidArgument(f"mount option {unknown[0]!r} is unknown")
    kernel -= {"sync", "async", "dirsync", "atime", "diratime"}
    kernel |= {"nodev"} if "dev" not in kernel else set()
    kernel |= {"nosuid"} if "suid" not in kernel else set()
    options = MountOptions(
        bucket, subtree, mountpoint.absolute(), volume, allow_other, exclusive, stock_wait,
        frozenset(kernel),
    )  # fmt: skip
    return options, access_path


def default_cache(bucket: str, read_only: bool) -> Path:
    """Where the cache of a bucket goes by default; read-only mounts get one of their own."""
    base = Path("/var/cache/dcsfs") if os.getuid() == 0 else Path.home() / ".cache" / "dcsfs"
    return base / (f"{bucket}.ro.{os.getpid()}" if read_only else bucket)


@click.command()
@click.option("--access", type=click.Path(path_type=Path), help="Access grant file.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground until unmounted.")
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Mount options.")
@click.option("--ready-fd", type=int, hidden=True)
@click.argument("address", metavar="dcs://BUCKET[/PATH]")
@click.argument("mountpoint", type=click.Path(path_type=Path))
def mount(
    access: Path | None,
    foreground: bool,
    options: tuple[str, ...],
    ready_fd: int | None,
    address: str,
    mountpoint: Path,
) -> None:
    """Mount a bucket; returns once the mount point answers."""
    values = parse_options(options)
    if "remount" in values:
        _remount(mountpoint, "ro" in values)
        return
    built, access_path = build_options(address, mountpoint, values, access)
    load_access(access_path)
    if foreground or ready_fd is not None:
        _serve(built, access_path, ready_fd)
    else:
        _daemonize(access_path, options, address, mountpoint, built)


def _remount(mountpoint: Path, read_only: bool) -> None:
    """Change kernel and daemon, or neither; read-only once everything is on the network."""
    daemon = control.find_mount(mountpoint).socket
    if read_only:
        _remount_kernel(mountpoint, "ro")
        try:
            control.ask(daemon, "remount", 24 * 3600.0, read_only=True)
        except DcsError:
            _remount_kernel(mountpoint, "rw")
            raise
        return
    control.ask(daemon, "remount", read_only=False)
    _remount_kernel(mountpoint, "rw")


def _remount_kernel(mountpoint: Path, mode: str) -> None:
    command = ["mount", "-i", "-o", f"remount,{mode}", str(mountpoint)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split())
        raise InvalidArgument(f"{mountpoint} stays as it was: {reason}")


def _serve(options: MountOptions, access_path: Path, ready_fd: int | None) -> None:
    raise_descriptor_limit()
    shield_from_memory_pressure()
    cap_memory()
    daemon = MountDaemon(options, load_access(access_path))

    def report(text: str) -> None:
        nonlocal ready_fd
        if ready_fd is not None:
            os.write(ready_fd, text.encode() + b"\n")
            os.close(ready_fd)
            ready_fd = None

    def on_ready() -> None:
        notify_service_manager("READY=1\nSTATUS=mounted")
        report("ready")

    try:
        trio.run(daemon.run, on_ready)
    except BaseException as error:
        known = first_error(error)
        report(str(known) if known else f"unexpected failure: {error!r}")
        raise


def _daemonize(
    access_path: Path,
    options: tuple[str, ...],
    address: str,
    mountpoint: Path,
    built: MountOptions,
) -> None:
    cache_dir = built.volume.cache_dir
    try:
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = (cache_dir / "mount.log").open("ab")
    except OSError as error:
        raise InvalidArgument(f"cache directory {cache_dir}: {error.strerror}") from error
    receive, send = os.pipe()
    os.set_inheritable(send, True)
    extra = f"cache_dir={cache_dir}"
    command = [sys.executable, "-m", "dcsfs.cli.main", "mount", "--ready-fd", str(send)]
    command += ["--access", str(access_path.absolute())]
    for item in options:
        command += ["-o", item]
    command += ["-o", extra, address, str(mountpoint.absolute())]
    with log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
            start_new_session=True, pass_fds=(send,),
        )  # fmt: skip
    os.close(send)
    with os.fdopen(receive) as pipe:
        answer = pipe.read().strip()
    if answer != "ready":
        process.wait(READY_TIMEOUT_S)
        raise InvalidArgument(answer or f"the mount did not start; see {cache_dir / 'mount.log'}")
    process.returncode = 0  # it lives on: nobody waits for it
    if os.getuid() == 0:
        register_unmount_helper(address, mountpoint.absolute())


def register_unmount_helper(source: str, mountpoint: Path) -> None:
    """Have umount(8) run umount.fuse.dcsfs, which waits for the network.

    Without an entry in utab, libmount 2.38 takes the type from statfs, which says just `fuse`,
    and looks for umount.fuse. umount itself removes the entry again.
    """
    directory = Path("/run/mount")
    directory.mkdir(exist_ok=True)
    escaped = str(mountpoint).replace("\\", "\\134").replace(" ", "\\040")
    line = f"SRC={source} TARGET={escaped} ROOT=/ OPTS=_netdev\n"
    with (directory / "utab.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (directory / "utab").open("a") as table:
            table.write(line)


@click.command()
@click.option("--detach", is_flag=True, help="Leave what is not sent for the next mount.")
@click.option(
    "--detach-after", type=click.FloatRange(0), metavar="SECONDS",
    help="Wait so long, then leave the rest for the next mount.",
)  # fmt: skip
@click.argument("mountpoint", type=click.Path(path_type=Path))
def umount(detach: bool, detach_after: float | None, mountpoint: Path) -> None:
    """Unmount after everything has reached the network."""
    found = control.find_mount(mountpoint)
    if Path(found.status["mountpoint"]) != mountpoint.absolute():
        if not is_mount_point(mountpoint):
            raise InvalidArgument(f"{mountpoint} is not a mount point")
        unmount_kernel(mountpoint)  # a bind mount inside: nothing ends with it
        return
    if not detach:
        detach = not _drain(found, math.inf if detach_after is None else detach_after)
    control.ask(found.socket, "unmount", detach=detach)
    unmount_kernel(mountpoint)
    _wait_for_exit(int(found.status["pid"]))


def _drain(found: control.FoundMount, patience_s: float) -> bool:
    """Wait for the network with a progress line; False when patience is at an end before it is.

    Raises Unavailable after a minute without progress.
    """
    progress = _Progress()
    level: tuple[int, int, int] | None = None
    began = since = time.monotonic()
    while True:
        values = control.ask(found.socket, "drain")
        if values["dirty_bytes"] == 0 and values["queue"] == 0:
            progress.end()
            return True
        mark = (values["dirty_bytes"], values["sent_bytes"], values["satellite_transactions"])
        if mark != level:
            level, since = mark, time.monotonic()
        progress.show(values["dirty_bytes"], values["queue"])
        waits = f"{values['dirty_bytes']} bytes wait in {values['cache_dir']}"
        if time.monotonic() - began > patience_s:
            progress.end()
            click.echo(f"{waits}; the next mount with this cache directory sends them", err=True)
            return False
        if time.monotonic() - since > UMOUNT_PROGRESS_DEADLINE_S:
            progress.end()
            raise Unavailable(
                f"no progress for {UMOUNT_PROGRESS_DEADLINE_S:g} s, still mounted: {waits} "
                f"({values['last_error'] or 'network does not answer'}); "
                "`dcsfs umount --detach` leaves them for the next mount"
            )
        time.sleep(0.1)  # noqa: TID251 -- a command line, not the event loop


class _Progress:
    """What is left to send: a line that changes on a terminal, one every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._began = self._shown_at = time.monotonic()
        self._first = -1
        self._is_open = False

    def show(self, left: int, operations: int) -> None:
        """`left` bytes and so many operations are not committed yet."""
        now = time.monotonic()
        self._first = max(self._first, left)
        if now - self._shown_at < (0.1 if self._is_terminal else 10.0):
            return
        self._shown_at = now
        rate = (self._first - left) / (now - self._began)
        text = f"waiting for the network: {format_size(left)} and {operations} changes to send"
        if rate > 0:
            text += f", {format_size(int(rate))}/s, {left / rate:.0f} s left"
        click.echo(
            f"\r\x1b[K{text}" if self._is_terminal else text, err=True, nl=not self._is_terminal
        )
        self._is_open = self._is_terminal

    def end(self) -> None:
        """Leave the line."""
        if self._is_open:
            click.echo("", err=True)


def _wait_for_exit(pid: int) -> None:
    deadline = time.monotonic() + 2 * UMOUNT_PROGRESS_DEADLINE_S
    while time.monotonic() < deadline and Path(f"/proc/{pid}/fd").exists():
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except (OSError, IndexError):
            return
        time.sleep(0.02)  # noqa: TID251 -- a command line, not the event loop
