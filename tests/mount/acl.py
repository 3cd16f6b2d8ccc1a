"""Access control lists as the kernel takes them, and a story told with them."""

import errno
import os
import shutil
import struct
import tempfile
from pathlib import Path

ANYBODY = 0xFFFFFFFF


def acl_value(*entries):
    """(tag, permissions, id) triples as the kernel wants them."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def acl_story(root):
    """What a schedule of ACL calls leads to: modes, lists and errors."""
    found = []

    def note(path):
        listed = {n: os.getxattr(path, n).hex() for n in os.listxattr(path) if "posix" in n}
        found.append((path.name, oct(path.stat().st_mode), listed))

    access, default = "system.posix_acl_access", "system.posix_acl_default"
    base = ((1, 6, ANYBODY), (4, 4, ANYBODY), (32, 0, ANYBODY))
    named = ((1, 7, ANYBODY), (2, 6, 1234), (4, 5, ANYBODY), (8, 7, 77), (16, 7, ANYBODY))
    file, folder = root / "file", root / "folder"
    file.touch()
    os.setxattr(file, access, acl_value(*named, (32, 1, ANYBODY)))
    note(file)
    file.chmod(0o640)
    note(file)
    os.setxattr(file, access, acl_value(*base))
    note(file)
    folder.mkdir()
    os.setxattr(folder, default, acl_value(*named, (32, 5, ANYBODY)))
    os.close(os.open(folder / "made", os.O_CREAT | os.O_WRONLY, 0o666))
    note(folder / "made")
    os.mkdir(folder / "sub", 0o755)
    note(folder / "sub")
    os.symlink("made", folder / "link")
    os.mkfifo(folder / "fifo", 0o600)
    note(folder / "fifo")
    os.removexattr(folder, default)
    note(folder)
    for path, name, value in (
        (file, default, acl_value(*base)),
        (file, access, acl_value((1, 6, ANYBODY))),
        (file, access, b"nonsense"),
    ):
        try:
            os.setxattr(path, name, value)
            found.append("accepted")
        except OSError as error:
            found.append(error.errno)
    return found


def compare_with_local_disk(here):
    mine = acl_story(here)
    assert mine[1][1] == oct(0o100640)
    assert mine[3][1] == oct(0o100664)
    local = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        theirs = acl_story(local)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return  # a local disk without ACLs: nothing to compare
    finally:
        shutil.rmtree(local)
    assert mine == theirs
