"""Several nodes in one process, with a control socket for tests: kill, revive, faults.

The socket (mode 0600) takes one JSON object per line and answers with one:
`{"command": "status" | "kill" | "revive" | "fault" | "spans", "nodes": [id...], "fault": ...}`.
A kill closes listener and connections at once and flushes nothing, as SIGKILL would.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import trio

from network.control import Reply
from network.control import serve as serve_control
from network.errors import InvalidArgument
from network.runtime import Listener, RawStream, Runtime, SystemRuntime
from node.config import NodeConfig, load_identity
from node.peer import Node

log = logging.getLogger(__name__)

NOMINAL_BYTES_PER_S = 8_000_000
"""`slow=F` limits each connection to this rate divided by F."""


@dataclass(slots=True)
class Fault:
    """How a node misbehaves on purpose."""

    stall: bool = False
    slow: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Read `none`, `stall` or `slow=F`; raises InvalidArgument."""
        if text == "none":
            return cls()
        if text == "stall":
            return cls(stall=True)
        name, _, factor = text.partition("=")
        try:
            value = float(factor)
        except ValueError:
            value = 0.0
        if name != "slow" or not 1 <= value <= 1000:
            raise InvalidArgument(f"fault must be none, stall or slow=FACTOR, not {text!r}")
        return cls(slow=value)

    async def suffer(self, count: int) -> None:
        """Wait as long as moving `count` bytes should take."""
        if self.stall:
            await trio.sleep_forever()
        if self.slow > 1:
            await trio.sleep(count * self.slow / NOMINAL_BYTES_PER_S)


class _FaultyStream:
    def __init__(self, inner: RawStream, fault: Callable[[], Fault]) -> None:
        self._inner = inner
        self._fault = fault

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._fault().suffer(len(data))
        await self._inner.send_all(data)

    async def receive_into(self, target: memoryview) -> int:
        count = await self._inner.receive_into(target)
        await self._fault().suffer(count)
        return count

    def has_input(self) -> bool:
        return self._inner.has_input()

    def abort(self) -> None:
        self._inner.abort()


class _FaultyListener:
    def __init__(self, inner: Listener, fault: Callable[[], Fault]) -> None:
        self._inner = inner
        self._fault = fault

    @property
    def port(self) -> int:
        return self._inner.port

    async def accept(self) -> RawStream:
        return _FaultyStream(await self._inner.accept(), self._fault)

    def close(self) -> None:
        self._inner.close()


@dataclass(slots=True)
class _Hosted:
    directory: Path
    config: NodeConfig
    node_id: str
    fault: Fault = field(default_factory=Fault)
    node: Node | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    stopped: trio.Event = field(default_factory=trio.Event)

    @property
    def state(self) -> str:
        if self.node is None:
            return "down"
        if self.fault.stall:
            return "stalled"
        return "slow" if self.fault.slow > 1 else "up"


class Host:
    """Runs the nodes of several directories; use `run` once."""

    def __init__(self, directories: list[Path], runtime: Runtime | None = None) -> None:
        self._runtime = runtime or SystemRuntime()
        self._hosted: dict[str, _Hosted] = {}
        for directory in directories:
            identity = load_identity(directory)
            hosted = _Hosted(directory, NodeConfig.load(directory), str(identity.id))
            self._hosted[hosted.node_id] = hosted

    async def run(self, control: Path | None, on_ready: Callable[[], None]) -> None:
        """Serve until cancelled, then stop every node cleanly."""
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as starting:
                for hosted in self._hosted.values():
                    starting.start_soon(self._start, hosted, nursery)
            if control is not None:

                async def answer(request: Reply) -> Reply:
                    return await self._command(request, nursery)

                await nursery.start(serve_control, control, answer)
            on_ready()
            await trio.sleep_forever()

    async def _start(self, hosted: _Hosted, nursery: trio.Nursery) -> None:
        """Start one node and wait until the satellite knows it."""
        listener = await self._runtime.listen(hosted.config.listen_host, hosted.config.listen_port)
        node = Node(hosted.directory, hosted.config, load_identity(hosted.directory), self._runtime)
        hosted.node, hosted.scope, hosted.stopped = node, trio.CancelScope(), trio.Event()
        ready = trio.Event()

        async def run() -> None:
            killed = False
            try:
                with hosted.scope:
                    await node.run(_FaultyListener(listener, lambda: hosted.fault), ready.set)
                killed = True
            finally:
                if killed:
                    node.store.close()
                else:
                    node.stop_cleanly()
                hosted.node = None
                hosted.stopped.set()

        nursery.start_soon(run)
        with trio.move_on_after(20):
            await ready.wait()

    async def _command(
        self, request: dict[str, object], nursery: trio.Nursery
    ) -> dict[str, object]:
        names = request.get("nodes")
        wanted = [str(name) for name in names] if isinstance(names, list) else list(self._hosted)
        unknown = [name for name in wanted if name not in self._hosted]
        if unknown:
            raise InvalidArgument(f"node {unknown[0]} is not hosted here")
        chosen = [self._hosted[name] for name in wanted]
        match request.get("command"):
            case "status":
                return {"nodes": [self._describe(item) for item in chosen]}
            case "kill":
                for item in chosen:
                    item.scope.cancel()
                for item in chosen:
                    if item.node is not None:
                        await item.stopped.wait()
                return {"nodes": [self._describe(item) for item in chosen]}
            case "revive":
                for item in chosen:
                    item.fault = Fault()
                    if item.node is None:
                        await self._start(item, nursery)
                return {"nodes": [self._describe(item) for item in chosen]}
            case "fault":
                fault = Fault.parse(str(request.get("fault")))
                for item in chosen:
                    item.fault = fault
                return {"nodes": [self._describe(item) for item in chosen]}
            case "spans":
                return {
                    "spans": {
                        item.node_id: item.node.store.spans()
                        for item in chosen
                        if item.node is not None
                    }
                }
            case other:
                raise InvalidArgument(f"unknown command {other!r}")

    def _describe(self, hosted: _Hosted) -> dict[str, object]:
        found: dict[str, object] = {"id": hosted.node_id, "state": hosted.state}
        if hosted.node is not None:
            status = asdict(hosted.node.status())
            del status["node_id"]
            found |= status
        return found
