"""What the kernel remembers of a mount, and how it is made to ask again."""

import ctypes
import os
import subprocess
import sys
import threading

import pytest

pytestmark = pytest.mark.mount

AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400
LIBC = ctypes.CDLL(None, use_errno=True)


class FileHandle(ctypes.Structure):
    """struct file_handle of name_to_handle_at(2): what an NFS server gives to its clients."""

    _fields_ = (("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_char * 128))


def handle_of(path):
    handle, mount_id = FileHandle(128, 0, b""), ctypes.c_int()
    name = os.fsencode(path)
    done = LIBC.name_to_handle_at(
        AT_FDCWD, name, ctypes.byref(handle), ctypes.byref(mount_id), AT_SYMLINK_FOLLOW
    )
    assert done == 0, os.strerror(ctypes.get_errno())
    return handle


def open_handle(point, handle):
    """The content of what a handle stands for; raises OSError."""
    directory = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = LIBC.open_by_handle_at(directory, ctypes.byref(handle), os.O_RDONLY)
        if found < 0:
            raise OSError(ctypes.get_errno(), "open_by_handle_at")
    finally:
        os.close(directory)
    with os.fdopen(found, "rb") as file:
        return file.read()


def test_programs_notice_nothing_of_a_second_mount(net, mount_of):
    bucket = net.bucket("working-directory")
    first, second = mount_of(bucket), mount_of(bucket, "-b")
    first.mount()
    work = first.point / "a" / "b"
    (work / "tmpfs").mkdir(parents=True)
    (work / "file").write_text("content")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(work / "tmpfs")], check=True)
    (work / "tmpfs" / "inside").write_text("x")
    program = (
        "import os, sys\n"
        "os.chdir(sys.argv[1]); os.listdir('.'); os.stat('file'); handle = open('file')\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "assert os.getcwd() == sys.argv[1], os.getcwd()\n"
        "assert os.readlink(f'/proc/self/fd/{handle.fileno()}') == sys.argv[1] + '/file'\n"
        "assert handle.read() == open('file').read() == 'content'\n"
        "open('new', 'w').close(); print('well')"
    )
    command = [sys.executable, "-c", program, str(work)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as worker:
        threading.Timer(60, worker.kill).start()
        assert worker.stdout.readline() == "ready\n"
        second.mount()
        assert (work / "tmpfs" / "inside").exists()
        assert worker.communicate("go\n")[0] == "well\n"
    (second.point / "a" / "b" / "file").unlink()  # what was known is asked for again
    assert not (work / "file").exists()
    subprocess.run(["umount", str(work / "tmpfs")], check=True)


def test_a_file_handle_is_good_after_the_kernel_and_the_mount_have_forgotten(net, mount_of):
    mount = mount_of(net.bucket("handles"))
    mount.mount()
    deep = mount.point / "one" / "two"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"content")
    (deep / "gone").write_bytes(b"x")
    file, gone = handle_of(deep / "file"), handle_of(deep / "gone")
    (deep / "gone").unlink()
    assert open_handle(mount.point, file) == b"content"
    mount.umount()
    mount.mount()
    assert open_handle(mount.point, file) == b"content"
    with pytest.raises(OSError, match="open_by_handle_at"):
        open_handle(mount.point, gone)
    assert (deep / "file").read_bytes() == b"content"
