"""What a writer (writer.py) was promised, held against what is there after a crash.

Run as `python -m tests.crash.manifest DIRECTORY` it prints the digests of the files there.
"""

import hashlib
import json
import sys
from pathlib import Path


def digests(directory):
    """SHA-256 of each file of a directory, but for those that were being written aside."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(directory).iterdir()
        if not path.name.startswith(".")
    }


class Manifest:
    """What each file may be: what was promised last, or what was begun since."""

    def __init__(self):
        self.allowed = {}
        self.operations = 0

    def note(self, line):
        word, name, digest = json.loads(line)
        if word == "begin":
            self.allowed.setdefault(name, {None}).add(digest)
        elif word == "done":
            self.allowed[name] = {digest}
            self.operations += 1

    def check(self, directory):
        self.compare(digests(directory))

    def compare(self, found):
        """`found` is the digest of each file there is; what is allowed from here on is that."""
        for name, allowed in self.allowed.items():
            digest = found.get(name)
            assert digest in allowed, f"{name}: {digest} is none of {allowed}"
            self.allowed[name] = {digest}


if __name__ == "__main__":
    print(json.dumps(digests(sys.argv[1])))
