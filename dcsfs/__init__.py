"""The uplink of dcsfs: library, mount and command line.

    access = dcsfs.load_access(Path("photos.grant"))
    async with dcsfs.open_project(access) as project:
        async with project.open_bucket("photos") as bucket:
            await bucket.write_file("2026/cat.jpg", data)

Everything here runs under trio. Errors are `network.errors.DcsError` and its subclasses.
"""

from dcsfs.access import AccessGrant, load_access, parse_access
from dcsfs.library import Bucket, FileInfo, Project, open_project

__all__ = [
    "AccessGrant",
    "Bucket",
    "FileInfo",
    "Project",
    "load_access",
    "open_project",
    "parse_access",
]
