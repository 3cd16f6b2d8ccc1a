"""A whole network in one trio run: satellite, nodes, pools, on the memory runtime."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from network.identity import Identity, PeerAddress
from network.ids import NodeID
from network.macaroon import Macaroon
from network.rpc import ConnectionPool
from network.testing.memory import MemoryRuntime
from node import config as node_config
from node.config import NodeConfig
from node.peer import Node
from satellite.config import SatelliteConfig
from satellite.db.database import Database
from satellite.metabase import buckets
from satellite.peer import Satellite

SATELLITE_HOST = "10.0.0.1"
SATELLITE_PORT = 7777


@dataclass
class RunningNode:
    node: Node
    directory: Path
    scope: trio.CancelScope
    host: str
    port: int


@dataclass
class Planet:
    """Everything a test may touch."""

    runtime: MemoryRuntime
    directory: Path
    nursery: trio.Nursery
    redundancy: str
    satellite_identity: Identity
    satellite: Satellite | None = None
    database: Database | None = None
    satellite_scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    nodes: list[RunningNode] = field(default_factory=list)
    api_key: bytes = b""

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(self.satellite_identity.id, SATELLITE_HOST, SATELLITE_PORT)

    def node_by_id(self, node_id: NodeID) -> RunningNode:
        return next(item for item in self.nodes if item.node.identity.id == node_id)

    async def start_satellite(self) -> None:
        config = SatelliteConfig(SATELLITE_HOST, SATELLITE_PORT, self.redundancy)
        self.database = Database(self.directory / "satellite.db", self.runtime)
        self.satellite = Satellite(config, self.satellite_identity, self.database, self.runtime)
        self.satellite_scope = trio.CancelScope()
        listener = await self.runtime.listen(SATELLITE_HOST, SATELLITE_PORT)
        self.runtime.fault(SATELLITE_HOST, SATELLITE_PORT).refuse = False

        async def run(satellite=self.satellite, scope=self.satellite_scope) -> None:
            with scope:
                await satellite.run(listener)

        self.nursery.start_soon(run)

    async def stop_satellite(self) -> None:
        self.satellite_scope.cancel()
        self.runtime.cut(SATELLITE_HOST, SATELLITE_PORT)
        await trio.testing.wait_all_tasks_blocked(0.001)
        self.database.close()

    async def start_node(self, number: int) -> RunningNode:
        directory = self.directory / f"node{number}"
        host, port = f"10.1.{number}.1", 7000
        config = NodeConfig(host, port, str(self.address), 1 << 33)
        identity = node_config.setup(directory, config, self.runtime.random_bytes(64))
        node = Node(directory, config, identity, self.runtime)
        running = RunningNode(node, directory, trio.CancelScope(), host, port)
        self.runtime.fault(host, port).refuse = False
        listener = await self.runtime.listen(host, port)
        ready = trio.Event()

        async def run() -> None:
            with running.scope:
                await node.run(listener, ready.set)

        self.nursery.start_soon(run)
        await ready.wait()
        return running

    def kill_node(self, running: RunningNode) -> None:
        """As SIGKILL would: connections gone, nothing flushed."""
        running.scope.cancel()
        self.runtime.cut(running.host, running.port)

    def pool(self) -> ConnectionPool:
        return ConnectionPool(self.runtime)


@asynccontextmanager
async def planet(
    directory: Path, nodes: int = 12, redundancy: str = "4/5/8/10", seed: int = 0
) -> AsyncIterator[Planet]:
    """Start a satellite with a project and `nodes` nodes; stop everything at the end."""
    runtime = MemoryRuntime(seed)
    async with trio.open_nursery() as nursery:
        world = Planet(
            runtime, directory, nursery, redundancy, Identity.generate(runtime.random_bytes(64))
        )
        await world.start_satellite()
        head, secret = runtime.random_bytes(32), runtime.random_bytes(32)

        def write(tx) -> None:
            project = buckets.create_project(tx, "test", runtime.random_bytes(16), 0)
            buckets.create_key(tx, project, head, secret, "test", 0)

        await world.database.write(write)
        world.api_key = Macaroon.mint(head, secret).encode()
        for number in range(nodes):
            world.nodes.append(await world.start_node(number))
        yield world
        nursery.cancel_scope.cancel()
    world.database.close()
    for running in world.nodes:
        running.node.store.close()
