"""What a cache directory says of itself: `cache.json`."""

import json
from dataclasses import dataclass
from pathlib import Path

from network.errors import InvalidArgument
from network.files import write_durably
from network.runtime import Runtime

FILE_NAME = "cache.json"


@dataclass(frozen=True, slots=True)
class CacheIdentity:
    """A cache directory's id and the bucket it belongs to."""

    cache_id: bytes
    bucket_id: bytes
    wrapped_root_key: bytes
    """As the satellite keeps it, so that staged data can be read without the satellite."""


def load(directory: Path) -> CacheIdentity:
    """Read the file; raises InvalidArgument for a directory that is no cache, or is damaged."""
    try:
        values = json.loads((directory / FILE_NAME).read_text())
        return CacheIdentity(
            bytes.fromhex(values["cache_id"]),
            bytes.fromhex(values["bucket_id"]),
            bytes.fromhex(values.get("wrapped_root_key", "")),
        )
    except FileNotFoundError as error:
        raise InvalidArgument(f"{directory} is not a cache directory: no {FILE_NAME}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"cache directory {directory} is damaged: {error}") from error


def claim(
    directory: Path, bucket_id: bytes, wrapped_root_key: bytes, runtime: Runtime
) -> CacheIdentity:
    """The directory's identity, made at first use; InvalidArgument if it is another bucket's."""
    if (directory / FILE_NAME).exists():
        found = load(directory)
        if found.bucket_id != bucket_id:
            raise InvalidArgument(
                f"cache directory {directory} belongs to another bucket; choose another cache_dir"
            )
        if found.wrapped_root_key == wrapped_root_key:
            return found
        identity = CacheIdentity(found.cache_id, bucket_id, wrapped_root_key)
    else:
        identity = CacheIdentity(runtime.random_bytes(16), bucket_id, wrapped_root_key)
    values = {
        "version": 1,
        "cache_id": identity.cache_id.hex(),
        "bucket_id": bucket_id.hex(),
        "wrapped_root_key": wrapped_root_key.hex(),
    }
    write_durably(directory / FILE_NAME, json.dumps(values).encode())
    return identity
