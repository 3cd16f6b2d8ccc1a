"""Every sentence of docs/semantics.md, on a real mount. A docstring is the sentence it shows."""

import concurrent.futures
import ctypes
import errno
import fcntl
import mmap
import os
import subprocess
import sys
import tempfile
import time

import pytest

from tests.mount.acl import ANYBODY, acl_value, compare_with_local_disk
from tests.mount.conftest import Mount

MIB = 1 << 20
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def point(net):
    mount = Mount(net, net.bucket("semantics"))
    mount.mount()
    yield mount.point
    mount.umount()


@pytest.fixture
def here(point, request):
    directory = point / request.node.name
    directory.mkdir()
    return directory


def renameat2(source, target, flags):
    libc = ctypes.CDLL(None, use_errno=True)
    at = ctypes.c_int(-100)
    if libc.renameat2(at, os.fsencode(source), at, os.fsencode(target), ctypes.c_uint(flags)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


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


def raises(code):
    return pytest.raises(OSError, match=os.strerror(code))


def run(program, *arguments):
    """A program of its own, in Python; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stdout.strip()


def test_excl(here):
    """Of many processes that create one name with O_EXCL, exactly one succeeds."""
    program = (
        "import os,sys\n"
        "try: os.open(sys.argv[1], os.O_CREAT | os.O_EXCL | os.O_WRONLY); print('made')\n"
        "except FileExistsError: print('exists')"
    )
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: run(program, here / "one"), range(6)))
    assert sorted(found) == ["exists"] * 5 + ["made"]


def test_append(here):
    """O_APPEND writes of several processes all land, each at what was then the end."""
    program = (
        "import os,sys\n"
        "fd = os.open(sys.argv[1], os.O_CREAT | os.O_APPEND | os.O_WRONLY)\n"
        "for _ in range(50): os.write(fd, sys.argv[2].encode() * 10)"
    )
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda letter: run(program, here / "log", letter), "abc"))
    text = (here / "log").read_text()
    lines = [text[i : i + 10] for i in range(0, len(text), 10)]
    assert sorted(lines) == sorted(["a" * 10] * 50 + ["b" * 10] * 50 + ["c" * 10] * 50)


def test_atomic_rename(here):
    """A rename replaces its target atomically: a reader finds the old file or the new one."""
    (here / "target").write_text("0")
    program = (
        "import sys,pathlib\n"
        "seen = set()\n"
        "while True:\n"
        "    text = pathlib.Path(sys.argv[1]).read_text()\n"
        "    seen.add(text)\n"
        "    if text == 'end': break\n"
        "print(' '.join(sorted(seen)))"
    )

    def replace(writer):
        for number in range(500):
            (here / f"new {writer}").write_text(str(number))
            (here / f"new {writer}").rename(here / "target")

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(run, program, here / "target") for _ in range(2)]
        for writer in [pool.submit(replace, number) for number in range(3)]:
            writer.result()
        (here / "new").write_text("end")
        (here / "new").rename(here / "target")
        for reader in readers:
            assert set(reader.result().split()) <= {"end", *map(str, range(500))}


def test_rename_flags(here):
    """RENAME_NOREPLACE is EEXIST on an existing target, RENAME_EXCHANGE swaps, others EINVAL."""
    (here / "a").write_text("a")
    (here / "b").mkdir()
    with raises(errno.EEXIST):
        renameat2(here / "a", here / "b", NOREPLACE)
    renameat2(here / "a", here / "b", EXCHANGE)
    assert (here / "b").read_text() == "a"
    assert (here / "a").is_dir()
    with raises(errno.EINVAL):
        renameat2(here / "a", here / "c", WHITEOUT)


def test_rename_directory(here):
    """A directory may be renamed onto an empty one; onto any other it is ENOTEMPTY."""
    for name in ("from", "empty", "full", "full/child"):
        (here / name).mkdir()
    with raises(errno.ENOTEMPTY):
        (here / "from").rename(here / "full")
    (here / "from").rename(here / "empty")
    assert sorted(path.name for path in here.iterdir()) == ["empty", "full"]


def test_unlinked(here):
    """An open file can be read, written and cut after its last name is gone."""
    with (here / "file").open("w+b", buffering=0) as handle:
        handle.write(b"before")
        (here / "file").unlink()
        handle.write(b" and after")
        handle.truncate(10)
        assert os.pread(handle.fileno(), 100, 0) == b"before and"
        assert os.fstat(handle.fileno()).st_nlink == 0


def test_links(here):
    """Hard links share content, attributes and extended attributes; st_nlink counts them."""
    (here / "a").write_text("text")
    (here / "b").hardlink_to(here / "a")
    (here / "b").chmod(0o600)
    os.setxattr(here / "b", "user.x", b"1")
    (here / "b").write_text("longer text")
    assert (here / "a").read_text() == "longer text"
    info = (here / "a").stat()
    assert (info.st_mode & 0o777, info.st_nlink) == (0o600, 2)
    assert info.st_ino == (here / "b").stat().st_ino
    assert os.getxattr(here / "a", "user.x") == b"1"


def test_directory_links(here):
    """A directory's st_nlink is 2 and one more for each directory in it."""
    (here / "a").mkdir()
    (here / "b").mkdir()
    (here / "file").touch()
    assert here.stat().st_nlink == 4
    (here / "a").rmdir()
    assert here.stat().st_nlink == 3


def test_long_names(here):
    """Names of 255 bytes and symbolic links of 4,095 bytes are good; longer ones ENAMETOOLONG."""
    (here / ("n" * 255)).touch()
    with raises(errno.ENAMETOOLONG):
        (here / ("n" * 256)).touch()
    target = ("t" * 254 + "/") * 16
    (here / "link").symlink_to(target[:4095])
    assert os.readlink(here / "link") == target[:4095]
    with raises(errno.ENAMETOOLONG):
        (here / "longer").symlink_to(target + "tttttttttttttttttt")


def test_listing(here):
    """A listing during which entries are removed shows each of the others exactly once."""
    for number in range(3000):
        (here / f"{number:04}").touch()
    seen = []
    with os.scandir(here) as entries:
        for position, entry in enumerate(entries):
            seen.append(entry.name)
            if position % 3 == 0:
                (here / entry.name).unlink()
    assert sorted(seen) == [f"{number:04}" for number in range(3000)]


def test_renaming_while_listing(here):
    """A program that renames each file that it reads in a directory comes to the end."""
    for number in range(3000):
        (here / f"{number:04}").touch()
    seen = 0
    with os.scandir(here) as entries:
        for entry in entries:
            seen += 1
            assert seen <= 3000
            (here / entry.name).rename(here / f"new {entry.name}")
            (here / f"beside {entry.name}").touch()
    assert seen == 3000
    assert len(os.listdir(here)) == 6000


class Directory:
    """A directory stream of the C library: os.listdir leaves out the dots, and cannot go back."""

    class Entry(ctypes.Structure):
        _fields_ = (
            ("number", ctypes.c_uint64), ("offset", ctypes.c_int64), ("length", ctypes.c_ushort),
            ("kind", ctypes.c_ubyte), ("name", ctypes.c_char * 256),
        )  # fmt: skip

    def __init__(self, path):
        LIBC.fdopendir.restype = ctypes.c_void_p
        LIBC.readdir.restype = ctypes.POINTER(self.Entry)
        self.stream = ctypes.c_void_p(LIBC.fdopendir(os.open(path, os.O_RDONLY)))

    def rest(self):
        """(name, inode number) of what has not been read yet."""
        found = []
        while entry := LIBC.readdir(self.stream):
            found.append((entry.contents.name, entry.contents.number))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        LIBC.closedir(self.stream)


def test_dots(here):
    """A listing begins with `.` and `..`; after rewinddir it shows what is new."""
    (here / "below").mkdir()
    root, new = here.parent, here / "below" / "new"
    dots = [(b".", (here / "below").stat().st_ino), (b"..", here.stat().st_ino)]
    with Directory(here / "below") as directory:
        assert directory.rest() == dots
        new.touch()
        LIBC.rewinddir(directory.stream)
        assert directory.rest() == [*dots, (b"new", new.stat().st_ino)]
    with Directory(here) as directory:
        assert directory.rest()[1] == (b"..", root.stat().st_ino)
    with Directory(root) as directory:
        dots = [(b".", root.stat().st_ino), (b"..", root.stat().st_ino)]
        assert directory.rest()[:2] == dots


def test_inode_numbers(here):
    """An inode number is not used again."""
    seen = set()
    for _ in range(50):
        (here / "file").touch()
        seen.add((here / "file").stat().st_ino)
        (here / "file").unlink()
    assert len(seen) == 50


def test_file_handle(net, mount_of):
    """A file handle (name_to_handle_at, NFS) stays good when the bucket is mounted anew."""
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


def test_holes(here):
    """Holes read as zeros and count no blocks."""
    with (here / "sparse").open("wb") as handle:
        handle.seek(1 << 40)
        handle.write(b"end")
    info = (here / "sparse").stat()
    assert info.st_size == (1 << 40) + 3
    assert info.st_blocks <= 16
    with (here / "sparse").open("rb") as handle:
        assert handle.read(MIB) == bytes(MIB)


def test_growing(here):
    """Truncating a file to a greater size adds zeros, also where bytes had been before."""
    (here / "file").write_bytes(b"x" * 100_000)
    os.truncate(here / "file", 10)
    os.truncate(here / "file", 100_000)
    assert (here / "file").read_bytes() == b"x" * 10 + bytes(99_990)


def test_suid(here):
    """Writing to a file and giving it away clear set-user-ID, and set-group-ID if executable."""
    (here / "tool").write_text("x")
    (here / "tool").chmod(0o6755)
    os.chown(here / "tool", 1000, 1000)
    assert (here / "tool").stat().st_mode & 0o7777 == 0o755
    (here / "tool").chmod(0o6777)
    program = (
        "import os,sys\nfd = os.open(sys.argv[1], os.O_WRONLY)\n"
        "os.setgid(1234); os.setuid(1234); os.write(fd, b'y')"
    )
    run(program, here / "tool")
    assert (here / "tool").stat().st_mode & 0o7777 == 0o777


def test_setgid_directory(here):
    """In a set-group-ID directory new files get its group, and new directories the bit too."""
    (here / "shared").mkdir()
    os.chown(here / "shared", 0, 4321)
    (here / "shared").chmod(0o2775)
    (here / "shared" / "file").touch()
    (here / "shared" / "sub").mkdir()
    assert (here / "shared" / "file").stat().st_gid == 4321
    info = (here / "shared" / "sub").stat()
    assert (info.st_gid, info.st_mode & 0o2000) == (4321, 0o2000)


def test_direct(here):
    """O_DIRECT is accepted with any offset, length and alignment."""
    data = os.urandom(300_001)
    fd = os.open(here / "file", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    assert os.pwrite(fd, data, 7) == len(data)
    assert os.pread(fd, len(data), 7) == data
    os.close(fd)


def test_mmap(here):
    """Shared mappings work, between the processes of one machine."""
    (here / "file").write_bytes(bytes(10_000))
    with (here / "file").open("r+b") as handle, mmap.mmap(handle.fileno(), 10_000) as memory:
        memory[5000:5005] = b"hello"
        memory.flush()
    assert run("import sys; print(open(sys.argv[1],'rb').read()[5000:5005])", here / "file") == (
        "b'hello'"
    )


def test_times(here):
    """Times have nanoseconds, from 1677 to 2262; what lies outside becomes the nearest of these."""
    (here / "file").touch()
    os.utime(here / "file", ns=(-1_234_567_891, 4_102_444_800_123_456_789))
    info = (here / "file").stat()
    assert (info.st_atime_ns, info.st_mtime_ns) == (-1_234_567_891, 4_102_444_800_123_456_789)
    os.utime(here / "file", ns=(-(2**70), 2**70))
    info = (here / "file").stat()
    assert (info.st_atime_ns, info.st_mtime_ns) == (-(2**63), 2**63 - 1)


def test_some_times(here):
    """UTIME_OMIT leaves a time as it is, O_TRUNC sets mtime also where nothing is cut."""
    (here / "file").touch()
    os.utime(here / "file", ns=(1, 4_102_444_800_123_456_789))
    subprocess.run(["touch", "-a", "-d", "2001-02-03", here / "file"], check=True)
    assert (here / "file").stat().st_mtime_ns == 4_102_444_800_123_456_789
    os.utime(here / "file", ns=(1, 1))
    os.close(os.open(here / "file", os.O_WRONLY | os.O_TRUNC))
    assert (here / "file").stat().st_mtime_ns > 1


def tick():
    """Until file times are later ones: the kernel counts them in ticks of up to 10 ms."""
    time.sleep(0.02)  # noqa: TID251 -- a test of another process


def test_which_times(here):
    """Writing changes mtime and ctime, chmod ctime alone, a new name the directory's mtime."""
    file = here / "file"
    file.write_text("x")
    os.utime(file, ns=(0, 0))
    first = file.stat()
    tick()
    file.chmod(0o600)
    second = file.stat()
    assert second.st_mtime_ns == 0
    assert second.st_ctime_ns > first.st_ctime_ns
    tick()
    with file.open("a") as handle:
        handle.write("y")
    third = file.stat()
    assert third.st_mtime_ns > 0
    assert third.st_ctime_ns > second.st_ctime_ns
    before = here.stat()
    tick()
    (here / "other").touch()
    assert here.stat().st_mtime_ns > before.st_mtime_ns


def test_times_do_not_go_back(here):
    """A file is not older after `touch` than before: all times are of the kernel's clock."""
    file = here / "file"
    last = 0
    for number in range(300):
        file.write_text(str(number))
        written = file.stat().st_mtime_ns
        os.utime(file)
        touched = file.stat().st_mtime_ns
        assert last <= written <= touched
        last = touched


def test_atime(here):
    """Reading does not change st_atime."""
    (here / "file").write_text("x")
    os.utime(here / "file", ns=(1, 2))
    assert (here / "file").read_text() == "x"
    assert (here / "file").stat().st_atime_ns == 1


def test_xattrs(here):
    """Extended attributes (user, trusted, security) hold 64 KiB; XATTR_CREATE and REPLACE work."""
    (here / "file").touch()
    value = os.urandom(65536)
    for name in ("user.a", "trusted.b", "security.c"):
        os.setxattr(here / "file", name, value)
        assert os.getxattr(here / "file", name) == value
    with raises(errno.EEXIST):
        os.setxattr(here / "file", "user.a", b"", os.XATTR_CREATE)
    with raises(errno.ENODATA):
        os.setxattr(here / "file", "user.d", b"", os.XATTR_REPLACE)
    assert sorted(os.listxattr(here / "file")) == ["security.c", "trusted.b", "user.a"]


def test_foreign_namespaces(here):
    """Attributes of other namespaces are EOPNOTSUPP, and one without a name EINVAL."""
    (here / "file").touch()
    for name in ("nothing", "user", "security", "other.name", "system.other", "users.name"):
        with raises(errno.EOPNOTSUPP):
            os.setxattr(here / "file", name, b"value")
        with raises(errno.EOPNOTSUPP):
            os.removexattr(here / "file", name)
    with raises(errno.EINVAL):
        os.setxattr(here / "file", "user.", b"value")
    with raises(errno.EINVAL):
        os.removexattr(here / "file", "user.")
    assert os.listxattr(here / "file") == []


def test_acl(here):
    """POSIX ACLs keep step with the mode; default ACLs are inherited, in the umask's place."""
    before = os.umask(0o077)
    try:
        compare_with_local_disk(here)
        (here / "plain").touch(0o666)
        assert (here / "plain").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
    os.setxattr(here / "file", "system.posix_acl_access", acl_value(
        (1, 6, ANYBODY), (2, 4, 1234), (4, 0, ANYBODY), (16, 4, ANYBODY), (32, 0, ANYBODY),
    ))  # fmt: skip
    program = (
        "import os,sys\nos.chdir(sys.argv[1]); os.setgroups([]); os.setgid(int(sys.argv[2]))\n"
        "os.setuid(int(sys.argv[2]))\n"
        "try: os.open('file', os.O_RDONLY); print('may')\n"
        "except PermissionError: print('may not')"
    )
    assert run(program, here, 1234) == "may"
    assert run(program, here, 1235) == "may not"


def test_special_files(here):
    """FIFOs, sockets and device nodes can be made."""
    os.mkfifo(here / "fifo")
    os.mknod(here / "socket", 0o140600)
    os.mknod(here / "null", 0o020600, os.makedev(1, 3))
    assert (here / "fifo").is_fifo()
    assert (here / "socket").is_socket()
    assert (here / "null").stat().st_rdev == os.makedev(1, 3)


def test_nameless_files(here):
    """O_TMPFILE is EOPNOTSUPP; programs then make a file with a name and remove it."""
    with raises(errno.EOPNOTSUPP):
        os.open(here, os.O_TMPFILE | os.O_RDWR, 0o600)
    with tempfile.TemporaryFile(dir=here) as file:
        file.write(b"content")
        assert os.listdir(here) == []


def test_fallocate(here):
    """fallocate is EOPNOTSUPP; posix_fallocate of the C library writes zeros instead."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (here / "file").open("wb") as handle:
        size = ctypes.c_int64(100_000)
        assert libc.fallocate(handle.fileno(), 0, ctypes.c_int64(0), size) == -1
        assert ctypes.get_errno() == errno.EOPNOTSUPP
        os.posix_fallocate(handle.fileno(), 0, 100_000)
    assert (here / "file").stat().st_size == 100_000


def test_seek_hole(here):
    """SEEK_DATA and SEEK_HOLE take the whole file for data."""
    with (here / "file").open("w+b") as handle:
        handle.truncate(MIB)
        assert os.lseek(handle.fileno(), 0, os.SEEK_DATA) == 0
        assert os.lseek(handle.fileno(), 0, os.SEEK_HOLE) == MIB


def test_copy_file_range(here):
    """copy_file_range works; the bytes pass through this machine."""
    data = os.urandom(500_000)
    (here / "from").write_bytes(data)
    with (here / "from").open("rb") as source, (here / "to").open("wb") as target:
        copied = 0
        while count := os.copy_file_range(source.fileno(), target.fileno(), 1 << 20):
            copied += count
    assert copied == len(data)
    assert (here / "to").read_bytes() == data


def test_locks(here):
    """flock and fcntl locks hold between the processes of one machine."""
    program = (
        "import fcntl,sys\n"
        "with open(sys.argv[1], 'r+') as f:\n"
        "    try: getattr(fcntl, sys.argv[2])(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print('got')\n"
        "    except OSError: print('busy')"
    )
    (here / "file").touch()
    for name in ("flock", "lockf"):
        with (here / "file").open("r+") as handle:
            getattr(fcntl, name)(handle, fcntl.LOCK_EX)
            assert run(program, here / "file", name) == "busy"
        assert run(program, here / "file", name) == "got"


def test_space(here, net):
    """statfs shows the bucket's quota, or 1 PiB of free space if it has none."""
    found = os.statvfs(here)
    assert found.f_bavail * found.f_frsize == 1 << 50
    assert found.f_namemax == 255
    bucket = net.bucket("space")
    mount = Mount(net, bucket)
    net.satellite("quota", bucket, "64MiB")
    mount.mount()
    (mount.point / "f").write_bytes(os.urandom(16 * MIB))
    mount.sync()
    found = os.statvfs(mount.point)
    assert found.f_blocks * found.f_frsize == 64 * MIB
    assert found.f_bavail * found.f_frsize == 48 * MIB
    mount.umount()


def test_quota(here, net):
    """What does not fit in the quota is EDQUOT; overwriting what is there is always good."""
    bucket = net.bucket("quota")
    mount = Mount(net, bucket)
    net.satellite("quota", bucket, "4MiB")
    mount.mount()
    data = os.urandom(4 * MIB)
    (mount.point / "f").write_bytes(data)
    with raises(errno.EDQUOT):
        (mount.point / "g").write_bytes(b"more")
    with (mount.point / "f").open("r+b") as handle:
        handle.write(b"over")
        os.fsync(handle.fileno())
    mount.sync()
    (mount.point / "f").unlink()
    mount.sync()
    (mount.point / "g").write_bytes(b"more")
    assert "no limit" in net.satellite("quota", bucket, "none")
    mount.umount()


def test_quota_exclusive(here, net):
    """With -o exclusive what does not fit in the quota is ENOSPC, at fsync or close."""
    bucket = net.bucket("quota-exclusive")
    net.satellite("quota", bucket, "4MiB")
    mount = Mount(net, bucket)
    mount.mount(",exclusive")
    data = os.urandom(4 * MIB)
    (mount.point / "f").write_bytes(data)
    mount.sync()
    with raises(errno.ENOSPC), (mount.point / "g").open("wb") as handle:
        handle.write(data)
    (mount.point / "g").unlink()
    with (mount.point / "g").open("wb") as handle:
        handle.write(data)
        with raises(errno.ENOSPC):
            os.fsync(handle.fileno())
    (mount.point / "g").unlink()
    assert (mount.point / "f").read_bytes() == data
    mount.umount()
