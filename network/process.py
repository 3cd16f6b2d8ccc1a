"""What every long-running process of the project does the same way."""

import ctypes
import gc
import logging
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import click
import trio

from network.errors import DcsError

log = logging.getLogger(__name__)

OOM_SCORE_ADJUSTMENT = -500
MEMORY_CAP_BYTES_MIN = 2 << 30
"""Four times what a mount may take under load (512 MiB; docs/status.md)."""
_PR_SET_IO_FLUSHER = 57
EXIT_FAILURE = 1


def configure_logging(verbose: bool) -> None:
    """Log to stderr: warnings, or everything down to INFO."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def tune_interpreter() -> None:
    """Hand the interpreter lock over quickly, and collect garbage less often.

    At the default 5 ms a finished worker thread waits longer for the lock than it ran.
    """
    sys.setswitchinterval(0.0005)
    gc.set_threshold(50_000, 20, 50)  # the default 700 spends 4 % of a node's time in the collector


def tune_allocator() -> None:
    """Keep freed memory mapped: first touch of fresh pages costs more than the work on them.

    Piece data lives in buffers of 64 KiB to 32 MiB that come and go; by default glibc maps and
    unmaps each of them (measured: 0.75 GB/s for a first touch, 5 GB/s after).
    """
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((-3, 32 << 20), (-1, 48 << 20), (-2, 4 << 20), (-8, 2)):
        mallopt(parameter, value)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX


def raise_descriptor_limit() -> None:
    """Use as many descriptors as the hard limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def shield_from_memory_pressure() -> None:
    """For a process that writes back other programs' data: last to be killed, and never made to
    wait for its own write-back when it allocates memory (PR_SET_IO_FLUSHER, prctl(2)).

    Needs CAP_SYS_RESOURCE; without it nothing changes.
    """
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJUSTMENT))
    except OSError as error:
        log.info("OOM score stays as it is: %s", error)
    if ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        log.info("the IO flusher flag is not allowed here")


def cap_memory() -> None:
    """Let this process have half of the machine's memory, at least MEMORY_CAP_BYTES_MIN.

    What it caches is bounded far below; what is not, the names it knows, and mistakes, must not
    take a machine down whose kernel spares this process. Beyond the limit an allocation fails.
    Private writable memory counts, stacks of threads whole (RLIMIT_DATA, setrlimit(2)).
    """
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = max(half, MEMORY_CAP_BYTES_MIN)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def notify_service_manager(text: str) -> None:
    """Tell systemd, if it has started this process, what goes on (sd_notify(3)); never raises."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1.0)
            sock.sendto(text.encode(), address.replace("@", "\0", 1))
    except OSError as error:
        log.info("the service manager was not told: %s", error)


def kernel_version() -> tuple[int, int]:
    """The running Linux kernel's major and minor version; (0, 0) if its release says none."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


async def until_signalled(main: Callable[[], Awaitable[None]]) -> None:
    """Run `main`, cancelling it on SIGTERM or SIGINT."""
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        await main()
        nursery.cancel_scope.cancel()


def first_error(error: BaseException) -> DcsError | None:
    """The project's own error inside an exception or exception group, if that is what it is."""
    if isinstance(error, DcsError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = [first_error(item) for item in error.exceptions]
        if found and all(found):
            return found[0]
    return None


class ErrorGroup(click.Group):
    """A command group that prints the project's errors as a sentence, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; exit 1 for a DcsError."""
        tune_allocator()
        tune_interpreter()
        try:
            return super().invoke(ctx)
        except (DcsError, BaseExceptionGroup) as error:
            known = first_error(error)
            if known is None:
                raise
            click.echo(f"{ctx.info_name}: {known}", err=True)
            ctx.exit(EXIT_FAILURE)
