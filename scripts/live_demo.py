"""The interactive demo: a test network and a mount until Ctrl-C, with live status."""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from network.units import format_size

BIN = Path(sys.executable).parent


def dcsfs(*arguments: str) -> str:
    """Run the command line of this checkout."""
    return subprocess.run(
        [str(BIN / "dcsfs"), *arguments], check=True, capture_output=True, text=True
    ).stdout


def table(directory: str, point: Path) -> Table:
    """The current state."""
    net = json.loads(dcsfs("testnet", "status", "--json", "--dir", directory))
    mount = json.loads(dcsfs("status", "--json", str(point)))
    states = [node["state"] for node in net["nodes"]]
    found = Table(title=f"dcs://photos on {point}   (Ctrl-C stops and removes everything)")
    found.add_column("what")
    found.add_column("now")
    found.add_row("nodes", ", ".join(f"{states.count(s)} {s}" for s in sorted(set(states))))
    found.add_row("stored on nodes", format_size(sum(n["stored_bytes"] or 0 for n in net["nodes"])))
    found.add_row("waiting for the network", format_size(mount["dirty_bytes"]))
    found.add_row("sent to nodes", format_size(mount["sent_bytes"]))
    found.add_row("segments", str(mount["segments"]))
    found.add_row("read from nodes, verified", format_size(mount["received_bytes"]))
    found.add_row("try", f"cp -a /usr/share/doc {point}/")
    found.add_row("and", f"{BIN}/dcsfs testnet kill --dir {directory} --count 30")
    return found


def main() -> None:
    """Start, show, clean up."""
    base = Path(tempfile.mkdtemp(prefix="dcsfs-demo-", dir="/var/tmp"))
    directory, point = str(base / "net"), base / "photos"
    point.mkdir()
    console = Console()
    try:
        console.print("starting 110 storage nodes and a satellite ...")
        dcsfs("testnet", "up", "--dir", directory)
        grant = f"{directory}/access.grant"
        dcsfs("mb", "--access", grant, "dcs://photos")
        options = f"access={grant},cache_dir={base / 'cache'}"
        subprocess.run(
            ["mount", "-t", "dcsfs", "photos", str(point), "-o", options], check=True, cwd="/"
        )
        with Live(table(directory, point), console=console) as live:
            while True:
                threading.Event().wait(1.0)
                live.update(table(directory, point))
    except KeyboardInterrupt:
        console.print("stopping ...")
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            dcsfs("umount", "--detach", str(point))
        with contextlib.suppress(subprocess.CalledProcessError):
            dcsfs("testnet", "down", "--dir", directory)
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
