"""The daemon's control socket: status, sync, unmount; one JSON line each way.

Sockets lie in one runtime directory per user, named after the daemon's pid, so that
`dcsfs status` finds every mount.
"""

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from network import control
from network.control import Reply
from network.errors import InvalidArgument, Unavailable

Command = control.Answer


def runtime_directory() -> Path:
    """Where this user's control sockets are; made on demand."""
    if os.getuid() == 0:
        path = Path("/run/dcsfs")
    else:
        base = os.environ.get("XDG_RUNTIME_DIR")
        path = Path(base) / "dcsfs" if base else Path(f"/tmp/dcsfs-{os.getuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


async def serve(
    path: Path, commands: dict[str, Command], task_status: trio.TaskStatus[None]
) -> None:
    """Answer requests until cancelled; see `network.control.serve`."""

    async def answer(request: dict[str, Any]) -> Reply:
        return await commands[request["command"]](request)

    await control.serve(path, answer, task_status)


def ask(endpoint: Path, command: str, timeout_s: float = 30.0, **arguments: object) -> Reply:
    """Send one request and wait for its answer; raises Unavailable, or the daemon's refusal."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect(str(endpoint))
            sock.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            data = b""
            while not data.endswith(b"\n"):
                received = sock.recv(65536)
                if not received:
                    raise Unavailable("the mount's process ended before it answered")
                data += received
    except OSError as error:
        raise Unavailable(f"the mount's process does not answer: {error}") from error
    reply: Reply = json.loads(data)
    if "error" in reply:
        raise InvalidArgument(str(reply["error"]))
    return reply


@dataclass(frozen=True, slots=True)
class FoundMount:
    """A live mount of this user."""

    socket: Path
    status: Reply


def find_mounts() -> list[FoundMount]:
    """All mounts of this user that answer within 10 s; leftovers of dead daemons are removed."""
    paths = sorted(runtime_directory().glob("*.sock"))
    with ThreadPoolExecutor(max(1, len(paths))) as pool:  # one that hangs delays nobody else
        return [found for found in pool.map(_ask_mount, paths) if found is not None]


def _ask_mount(path: Path) -> FoundMount | None:
    try:
        return FoundMount(path, ask(path, "status", 10.0))
    except (Unavailable, InvalidArgument):
        if not Path(f"/proc/{path.stem}").exists():
            path.unlink(missing_ok=True)
        return None


def find_mount(mountpoint: Path) -> FoundMount:
    """The mount at or above a path; raises InvalidArgument."""
    wanted = Path(os.path.abspath(mountpoint))
    best: FoundMount | None = None
    for item in find_mounts():
        point = Path(item.status["mountpoint"])
        if (wanted == point or point in wanted.parents) and (
            best is None or len(point.parts) > len(Path(best.status["mountpoint"]).parts)
        ):
            best = item
    if best is None:
        raise InvalidArgument(f"{mountpoint} is not on a dcsfs mount of this user")
    return best
