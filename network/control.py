"""A process's control socket: one JSON object on a line, answered with one, for its own user only.

The mount's daemon and the host of test nodes serve one each.
"""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from network.errors import DcsError, InvalidArgument
from network.limits import RPC_DEADLINE_S

LINE_BYTES_MAX = 1 << 20
Reply = dict[str, Any]
Answer = Callable[[dict[str, Any]], Awaitable[Reply]]
"""Raises DcsError, OSError or KeyError for what it refuses; the asker gets {"error": text}."""


async def serve(path: Path, answer: Answer, task_status: trio.TaskStatus[None]) -> None:
    """Answer requests until cancelled; the socket (mode 0600) is removed at the end.

    An asker that goes away or sends nothing ends its own connection and nothing else.
    """
    path.unlink(missing_ok=True)
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(path))
    path.chmod(0o600)
    sock.listen(16)
    task_status.started()

    async def converse(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                with trio.fail_after(RPC_DEADLINE_S):
                    line = await _receive_line(stream)
                if line is None:
                    return
                reply = await _reply_to(line, answer)
                with trio.fail_after(RPC_DEADLINE_S):
                    await stream.send_all(json.dumps(reply).encode() + b"\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                return

    try:
        await trio.serve_listeners(converse, [trio.SocketListener(sock)])
    finally:
        path.unlink(missing_ok=True)


async def _receive_line(stream: trio.SocketStream) -> bytes | None:
    """A request; None when the asker left or the line is too long."""
    data = bytearray()
    while not data.endswith(b"\n"):
        received = await stream.receive_some()
        if not received or len(data) > LINE_BYTES_MAX:
            return None
        data += received
    return bytes(data)


async def _reply_to(line: bytes, answer: Answer) -> Reply:
    try:
        request = json.loads(line)
        if not isinstance(request, dict):
            raise InvalidArgument("a request is a JSON object")
        return await answer(request)
    except (DcsError, OSError) as error:
        return {"error": str(error)}
    except (ValueError, KeyError, TypeError) as error:
        return {"error": f"malformed request: {error!r}"}
