"""What a method of a service is: a number, the types on both sides, a deadline."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from network.limits import RPC_DEADLINE_S

Request = TypeVar("Request")
Response = TypeVar("Response")


class StreamEnd:
    """Marks a streaming method: its handler replies itself, an error ends the connection."""


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Response]):
    """A method of a service; codes start at 16."""

    code: int
    request: type[Request]
    response: type[Response]
    deadline_s: float = RPC_DEADLINE_S
