"""A satellite's directory: configuration, identity, database."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from network.errors import InvalidArgument
from network.files import write_durably
from network.identity import Identity
from network.redundancy import RedundancyScheme

CONFIG_NAME = "satellite.json"
IDENTITY_NAME = "identity.key"
DATABASE_NAME = "satellite.db"


@dataclass(frozen=True, slots=True)
class SatelliteConfig:
    """What `dcs-satellite setup` writes and `run` reads."""

    listen_host: str
    listen_port: int
    redundancy: str

    def __post_init__(self) -> None:
        RedundancyScheme.parse(self.redundancy)
        if not 0 < self.listen_port < 65536:
            raise InvalidArgument(f"port {self.listen_port} is out of range")

    @property
    def scheme(self) -> RedundancyScheme:
        """The redundancy scheme of new segments."""
        return RedundancyScheme.parse(self.redundancy)

    def save(self, directory: Path) -> None:
        """Write the configuration durably."""
        write_durably(directory / CONFIG_NAME, json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read it; raises InvalidArgument, for unknown keys too."""
        try:
            values = json.loads((directory / CONFIG_NAME).read_text())
            return cls(**values)
        except FileNotFoundError as error:
            raise InvalidArgument(
                f"{directory} is not a satellite directory; run `dcs-satellite setup` first"
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise InvalidArgument(f"{directory / CONFIG_NAME} cannot be used: {error}") from error


def load_identity(directory: Path) -> Identity:
    """Read the satellite's identity; raises InvalidArgument."""
    try:
        return Identity.decode((directory / IDENTITY_NAME).read_bytes())
    except OSError as error:
        raise InvalidArgument(f"cannot read {directory / IDENTITY_NAME}: {error}") from error


def setup(directory: Path, config: SatelliteConfig, entropy64: bytes) -> Identity:
    """Make a satellite directory, or update its configuration and keep its identity."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (directory / IDENTITY_NAME).exists():
        write_durably(directory / IDENTITY_NAME, Identity.generate(entropy64).encode())
    config.save(directory)
    return load_identity(directory)
