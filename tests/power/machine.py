"""A machine whose power can be cut: a User-Mode Linux kernel on this one's file tree.

Its root is the host's, read-only; `shared` is the host's directory of that name, writable; the
disk is an image. SIGKILL is the power cut: what the kernel inside had not written to the disk is
lost, what it had written is there.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
INIT = """#!/bin/bash
export PATH={path}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/tmp LC_ALL=C.UTF-8
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/shm; mount -t tmpfs shm /dev/shm; mount -t tmpfs run /run
mount -t tmpfs tmpfs /mnt; mkdir /mnt/shared; mount -t hostfs none /mnt/shared -o {shared}
mount -t tmpfs tmpfs /tmp; mkdir -p {shared} /tmp/disk /tmp/mount; mount --move /mnt/shared {shared}
mkdir -p /run/modules/lib/modules; ln -s /usr/lib/uml/modules/$(uname -r) /run/modules/lib/modules/
modprobe -d /run/modules fuse
[ -e /dev/fuse ] || mknod /dev/fuse c 10 229
[ -e /dev/ubda ] || mknod /dev/ubda b 98 0
ip link set lo up
mount /dev/ubda /tmp/disk
cd {root}
{script}
sync; halt -f -p
"""


class Machine:
    """One machine: its disk and the directory it shares with the host."""

    def __init__(self, base: Path, disk_bytes: int = 2 << 30) -> None:
        self.shared, self._disk, self._process = base / "shared", base / "disk.img", None
        self.shared.mkdir()
        self._disk.touch()
        os.truncate(self._disk, disk_bytes)
        subprocess.run(["mkfs.ext4", "-q", str(self._disk)], check=True)

    def power_on(self, script: str) -> None:
        """Start it; `script` runs as root with the checkout as its directory."""
        for path in self.shared.iterdir():
            path.unlink()
        init = self.shared / "init"
        path = Path(sys.executable).parent
        init.write_text(INIT.format(path=path, shared=self.shared, root=ROOT, script=script))
        init.chmod(0o755)
        with (self.shared.parent / "console").open("wb") as console:
            self._process = subprocess.Popen(
                ["linux.uml", "mem=2G", "rootfstype=hostfs", "rootflags=/", "ro", f"init={init}",
                 "con=null", "con0=null,fd:1", "con1=null", "quiet", f"ubd0={self._disk}"],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
            )  # fmt: skip

    def cut_power(self) -> None:
        """Stop it at once, with all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait_until(self, condition, seconds: float, what: str) -> None:
        """Wait for something on the outside, while the machine runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            console = (self.shared.parent / "console").read_text(errors="replace")
            assert self._process.poll() is None, f"the machine stopped before {what}: {console}"
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s: {console}"
            threading.Event().wait(0.02)
