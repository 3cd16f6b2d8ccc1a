"""A program that saves files the safe way, and says what it has been promised.

Run as `python writer.py DIRECTORY SEED`. One JSON line before each operation (`begin`: the path and
the digest it will have) and one after its fsync (`done`). Ends when the file system does.
"""

import hashlib
import json
import os
import random
import stat
import sys


def say(word: str, path: str, content: bytes | None) -> None:
    digest = None if content is None else hashlib.sha256(content).hexdigest()
    print(json.dumps([word, path, digest]), flush=True)
    if stat.S_ISREG(os.fstat(1).st_mode):
        os.fsync(1)  # the machine may stop at any moment: what was said must be known outside


def sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_at(path: str, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.pwrite(descriptor, data, offset)
    os.fsync(descriptor)
    os.close(descriptor)


def save(root: str, name: str, content: bytes) -> None:
    """Write aside, fsync, rename, fsync the directory."""
    write_at(f"{root}/.{name}.new", 0, content)
    os.rename(f"{root}/.{name}.new", f"{root}/{name}")
    sync_directory(root)


def main() -> None:
    root, chosen = sys.argv[1], random.Random(int(sys.argv[2]))
    while True:
        name = f"file{chosen.randrange(12)}"
        path = f"{root}/{name}"
        kind = chosen.choice(("save", "save", "patch", "append", "remove"))
        old = None
        if os.path.exists(path):
            with open(path, "rb") as handle:
                old = handle.read()
        data = chosen.randbytes(chosen.choice((10, 5000, 70_000, 400_000)))
        if kind == "remove":
            if old is None:
                continue
            say("begin", name, None)
            os.unlink(path)
            sync_directory(root)
            say("done", name, None)
            continue
        if kind == "save" or not old or len(old) > 3_000_000:
            say("begin", name, data)
            save(root, name, data)
            say("done", name, data)
            continue
        offset = len(old) if kind == "append" else chosen.randrange(len(old))
        new = old[:offset] + data + old[offset + len(data) :]
        say("begin", name, new)
        write_at(path, offset, data)
        sync_directory(root)
        say("done", name, new)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        print(json.dumps(["end", "", str(error)]), flush=True)
