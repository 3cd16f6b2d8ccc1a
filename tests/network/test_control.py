"""The control socket: what an asker may do to it."""

import contextlib
import json
import socket

import trio

from network import control


async def ask(path, data):
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(data)
        received = bytearray()
        while not received.endswith(b"\n"):
            part = await stream.receive_some()
            if not part:
                break
            received += part
        return bytes(received)


async def test_an_asker_that_leaves_or_talks_nonsense_ends_nothing_else(tmp_path):
    path = tmp_path / "socket"
    release = trio.Event()

    async def answer(request):
        if request["command"] == "slow":
            await release.wait()
        return {"said": "x" * 500_000}

    async with trio.open_nursery() as nursery:
        await nursery.start(control.serve, path, answer)
        with socket.socket(socket.AF_UNIX) as gone:  # leaves before its long answer is sent
            gone.connect(str(path))
            gone.sendall(b'{"command": "slow"}\n')
        await trio.testing.wait_all_tasks_blocked()
        release.set()
        for nonsense in (b"\n", b"[1]\n", b"{}\n", b"nonsense\n", b"\xff\n"):
            assert "error" in json.loads(await ask(path, nonsense))
        with contextlib.suppress(trio.BrokenResourceError):  # closed, politely or not: no answer
            assert await ask(path, b"x" * (control.LINE_BYTES_MAX + 100_000)) == b""
        assert len(await ask(path, b'{"command": "quick"}\n')) > 500_000
        nursery.cancel_scope.cancel()
    assert not path.exists()
