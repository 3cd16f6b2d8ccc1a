"""The programs run on the mounts of `tests/mount`."""

from tests.mount.conftest import mount_of, net

__all__ = ["mount_of", "net"]
