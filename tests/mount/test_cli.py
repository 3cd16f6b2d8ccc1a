"""The command line and the library without a mount, on a real network."""

import os

import pytest
import trio

from dcsfs import load_access, open_project
from network.errors import NotFound
from tests.mount.conftest import dcsfs


def listing(root):
    """(relative path, kind and mode, link target or content) of everything below a directory."""
    found = []
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        if path.is_symlink():
            found.append((str(path.relative_to(root)), "link", os.readlink(path)))
        else:
            content = path.read_bytes() if path.is_file() else None
            found.append((str(path.relative_to(root)), oct(mode), content))
    return found


def test_recursive_copy_keeps_links_modes_and_empty_directories(net, tmp_path):
    source, back = tmp_path / "source", tmp_path / "back"
    (source / "empty").mkdir(parents=True)
    (source / "private" / "deep").mkdir(parents=True)
    (source / "private").chmod(0o700)
    (source / "private" / "deep" / "tool").write_bytes(b"#!/bin/sh\n")
    (source / "private" / "deep" / "tool").chmod(0o750)
    (source / "private" / "up").symlink_to("..")
    (source / "to-directory").symlink_to("private")
    (source / "dangling").symlink_to("nowhere")
    bucket = net.bucket("copies")
    dcsfs("cp", "-r", "--access", net.grant, source, f"dcs://{bucket}/tree")
    dcsfs("cp", "-r", "--access", net.grant, f"dcs://{bucket}/tree", back)
    assert listing(back) == listing(source)
    os.mkfifo(source / "pipe")
    done = dcsfs("cp", "-r", "--access", net.grant, source, f"dcs://{bucket}/tree")
    assert "left out" in done.stderr
    assert "pipe" in done.stderr


async def test_an_error_inside_the_block_comes_out_as_it_was_raised(net):
    bucket_name = net.bucket("errors")
    async with open_project(load_access(net.grant)) as project:
        with pytest.raises(NotFound):
            async with project.open_bucket(bucket_name) as bucket:
                await bucket.stat("nothing")
        with pytest.raises(ZeroDivisionError), trio.fail_after(30):
            async with project.open_bucket(bucket_name, read_only=True):
                raise ZeroDivisionError
