"""Start, stop, damage and describe a test network that lives in one directory.

`testnet.json` is the description; what is up is asked of the processes. The peers run as
separate programs (`python -m satellite`, `python -m node`): this package never imports them.
"""

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcsfs import control
from network.errors import InvalidArgument, Unavailable
from network.files import write_durably
from network.redundancy import RedundancyScheme

READY_TIMEOUT_S = 90.0
NODES_MAX = 1000
_SHARE_STEP_BYTES = 65552


@dataclass(frozen=True, slots=True)
class Settings:
    """What `testnet up` was asked for the first time."""

    nodes: int
    redundancy: str
    capacity: str
    processes: int

    def __post_init__(self) -> None:
        scheme = RedundancyScheme.parse(self.redundancy)
        if not scheme.success <= self.nodes <= NODES_MAX:
            raise InvalidArgument(
                f"redundancy {scheme} needs at least {scheme.success} nodes (and at most "
                f"{NODES_MAX} can be started), not {self.nodes}"
            )
        if not 1 <= self.processes <= 64:
            raise InvalidArgument("processes must be between 1 and 64")


class TestNetwork:
    """One test network, by its directory."""

    __test__ = False  # for pytest: not a test class

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._path = self.directory / "testnet.json"

    @property
    def exists(self) -> bool:
        """Whether `up` has completed its set-up here."""
        return self._path.exists()

    def load(self) -> dict[str, Any]:
        """The description; raises InvalidArgument."""
        try:
            values: dict[str, Any] = json.loads(self._path.read_text())
        except OSError as error:
            raise InvalidArgument(
                f"{self.directory} holds no test network; run `dcsfs testnet up` first"
            ) from error
        return values

    def _save(self, values: dict[str, Any]) -> None:
        write_durably(self._path, json.dumps(values, indent=2).encode(), 0o644)

    def _control(self, process: int) -> Path:
        name = hashlib.sha256(str(self.directory).encode()).hexdigest()[:12]
        return control.runtime_directory() / f"testnet-{name}-{process}.ctl"

    def set_up(self, settings: Settings) -> None:
        """Make directories, identities, the project and its key; nothing is started."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        satellite_dir = self.directory / "satellite"
        address = _run(
            "satellite", "setup", "--listen", f"127.0.0.1:{port}",
            "--redundancy", settings.redundancy, str(satellite_dir),
        ).strip()  # fmt: skip
        api_key = (satellite_dir / "api.key").read_bytes()
        write_durably(self.directory / "api.key", api_key)
        if not (self.directory / "passphrase").exists():
            write_durably(self.directory / "passphrase", secrets.token_urlsafe(24).encode() + b"\n")
        places = []
        for number in range(settings.nodes):
            host = f"127.{20 + number // 250}.{number % 250 + 1}.1"
            places.append((self.directory / "nodes" / f"{number:03d}", f"{host}:{port}"))
        lines = _run(
            "node", "setup", "--satellite", address, "--capacity", settings.capacity,
            *[f"{folder}={listen}" for folder, listen in places],
        ).split()  # fmt: skip
        nodes = [
            {
                "id": line.partition("@")[0], "address": listen, "pid": None,
                "storage_dir": str(folder), "state": "down",
            }
            for line, (folder, listen) in zip(lines, places, strict=True)
        ]  # fmt: skip
        groups = [
            [node["id"] for node in nodes[i :: settings.processes]]
            for i in range(settings.processes)
        ]
        self._save(
            {
                "satellite": {"address": address, "pid": None, "dir": str(satellite_dir)},
                "redundancy": settings.redundancy,
                "processes": [{"pid": None, "nodes": group} for group in groups if group],
                "nodes": nodes,
            }
        )

    def start(self) -> None:
        """Start what is down; returns when the satellite knows every node that was started."""
        values = self.load()
        self._start_satellite(values)
        pending = []
        for number, process in enumerate(values["processes"]):
            if not _is_alive(process["pid"], "node"):
                pending.append((process, self._spawn_host(values, number)))
        for process, child in pending:
            process["pid"] = child.pid
            _wait_ready(child, self.directory / "node.log")
        self._save(values)
        self.revive(None)

    def _start_satellite(self, values: dict[str, Any]) -> None:
        if _is_alive(values["satellite"]["pid"], "satellite"):
            return
        child = _spawn(
            self.directory / "satellite.log", "satellite", "run", values["satellite"]["dir"]
        )
        _wait_ready(child, self.directory / "satellite.log")
        values["satellite"]["pid"] = child.pid
        self._save(values)

    def _spawn_host(self, values: dict[str, Any], number: int) -> "subprocess.Popen[bytes]":
        wanted = set(values["processes"][number]["nodes"])
        folders = [node["storage_dir"] for node in values["nodes"] if node["id"] in wanted]
        return _spawn(
            self.directory / "node.log",
            "node", "host", "--control", str(self._control(number)), *folders,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """The description with live states and each node's own counts."""
        values = self.load()
        live: dict[str, dict[str, Any]] = {}
        for number, process in enumerate(values["processes"]):
            if _is_alive(process["pid"], "node"):
                for item in self._ask(number, "status")["nodes"]:
                    live[item["id"]] = item | {"pid": process["pid"]}
        for node in values["nodes"]:
            found = live.get(node["id"], {"state": "down"})
            node["state"] = found["state"]
            node["pid"] = found.get("pid") if found["state"] != "down" else None
            for name in ("stored_bytes", "pieces", "served_bytes", "received_bytes", "syncs"):
                node[name] = found.get(name)
        if not _is_alive(values["satellite"]["pid"], "satellite"):
            values["satellite"]["pid"] = None
        self._save(values)
        return values

    def _ask(self, process: int, command: str, **arguments: object) -> dict[str, Any]:
        return control.ask(self._control(process), command, 120.0, **arguments)

    def _by_process(self, values: dict[str, Any], names: list[str]) -> dict[int, list[str]]:
        known = {
            name: number
            for number, process in enumerate(values["processes"])
            for name in process["nodes"]
        }
        grouped: dict[int, list[str]] = {}
        for name in names:
            if name not in known:
                raise InvalidArgument(f"node {name} is not in this test network")
            grouped.setdefault(known[name], []).append(name)
        return grouped

    def kill_nodes(self, names: list[str]) -> None:
        """Kill nodes hard; a process whose nodes are all down gets SIGKILL."""
        values = self.status()
        for number, group in self._by_process(values, names).items():
            process = values["processes"][number]
            if not _is_alive(process["pid"], "node"):
                continue
            up = {n["id"] for n in values["nodes"] if n["state"] != "down"}
            if not (up & set(process["nodes"])) - set(group):
                _kill(process["pid"])
                process["pid"] = None
            else:
                self._ask(number, "kill", nodes=group)
        self._save(values)
        self.status()

    def choose(self, count: int, seed: int) -> list[str]:
        """`count` nodes that are up, the same for the same seed; raises InvalidArgument."""
        names = [n["id"] for n in self.status()["nodes"] if n["state"] != "down"]
        if count > len(names):
            raise InvalidArgument(f"only {len(names)} nodes are up")
        return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())[
            :count
        ]

    def kill_satellite(self) -> None:
        """SIGKILL the satellite."""
        values = self.load()
        if _is_alive(values["satellite"]["pid"], "satellite"):
            _kill(values["satellite"]["pid"])
        values["satellite"]["pid"] = None
        self._save(values)

    def revive(self, names: list[str] | None) -> None:
        """Start nodes again, without faults; None: all of them, and the satellite."""
        values = self.load()
        if names is None:
            self._start_satellite(values)
        wanted = names if names is not None else [node["id"] for node in values["nodes"]]
        for number, group in self._by_process(values, wanted).items():
            process = values["processes"][number]
            if not _is_alive(process["pid"], "node"):
                child = self._spawn_host(values, number)
                process["pid"] = child.pid
                _wait_ready(child, self.directory / "node.log")
                self._save(values)
                others = [name for name in process["nodes"] if name not in group]
                if others:
                    self._ask(number, "kill", nodes=others)
            else:
                self._ask(number, "revive", nodes=group)
        self.status()

    def revive_satellite(self) -> None:
        """Start the satellite again, if it does not run."""
        self._start_satellite(self.load())

    def fault(self, names: list[str], fault: str) -> None:
        """Make nodes stall, be slow, or behave."""
        values = self.load()
        for number, group in self._by_process(values, names).items():
            self._ask(number, "fault", nodes=group, fault=fault)
        self.status()

    def corrupt(self, names: list[str]) -> int:
        """Flip one byte in every share that the nodes store; returns how many."""
        values = self.load()
        folders = {node["id"]: Path(node["storage_dir"]) for node in values["nodes"]}
        count = 0
        for number, group in self._by_process(values, names).items():
            spans = self._ask(number, "spans", nodes=group)["spans"]
            for name, items in spans.items():
                for file, offset, size in items:
                    path = folders[name] / "pieces" / f"{file:08d}.log"
                    count += _damage(path, offset, size)
        return count

    def stop(self) -> None:
        """Stop everything cleanly."""
        values = self.load()
        pids = [process["pid"] for process in values["processes"]]
        for pid in [*pids, values["satellite"]["pid"]]:
            if _is_alive(pid):
                os.kill(pid, signal.SIGTERM)
        for pid in [*pids, values["satellite"]["pid"]]:
            _wait_dead(pid, 20.0)
        for process in values["processes"]:
            process["pid"] = None
        values["satellite"]["pid"] = None
        for node in values["nodes"]:
            node["state"], node["pid"] = "down", None
        self._save(values)


def _damage(path: Path, offset: int, size: int) -> int:
    count = 0
    with path.open("r+b") as handle:
        for start in range(offset, offset + size, _SHARE_STEP_BYTES):
            position = start + min(_SHARE_STEP_BYTES, offset + size - start) // 2
            handle.seek(position)
            byte = handle.read(1)
            handle.seek(position)
            handle.write(bytes([byte[0] ^ 0xFF]))
            count += 1
    return count


def _run(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InvalidArgument(done.stderr.strip() or f"{module} failed")
    return done.stdout


def _spawn(log_path: Path, module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    with log_path.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            start_new_session=True, cwd="/",
        )  # fmt: skip


def _wait_ready(child: "subprocess.Popen[bytes]", log_path: Path) -> None:
    assert child.stdout is not None
    line = child.stdout.readline()
    child.stdout.close()
    if line.strip() != b"ready":
        child.wait(10)
        tail = log_path.read_text(errors="replace").strip().splitlines()[-1:]
        raise Unavailable(f"a process of the test network did not start: {' '.join(tail)}")
    child.returncode = 0  # it lives on: nobody waits for it


def _is_alive(pid: int | None, *modules: str) -> bool:
    """Whether a process of ours (of these modules, if any is named) still has this number.

    After a reboot others have it: the description outlives the machine's processes.
    """
    if not pid:
        return False
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return command[1:2] == [b"-m"] and command[2].decode() in (modules or ("satellite", "node"))


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    _wait_dead(pid, 10.0)


def _wait_dead(pid: int | None, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while _is_alive(pid) and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid or 0, os.WNOHANG)
        time.sleep(0.02)  # noqa: TID251 -- a command line, not the event loop
    if _is_alive(pid):
        os.kill(pid or 0, signal.SIGKILL)
