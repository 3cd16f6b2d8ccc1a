"""Ask the kernel for one thing more than pyfuse3 can: that it leaves the umask to us.

The kernel applies the umask before it asks for a new file, also where a default access control
list should decide alone (acl(5)). FUSE_DONT_MASK in the answer to INIT stops that; pyfuse3 hands
no way to set it on (docs/decisions/0010). So the first request and its answer go through a pair
of sockets in the descriptor's place, and the flag is set in the answer on its way.
"""

import logging
import os
import select
import socket
import struct

log = logging.getLogger(__name__)

DONT_MASK = 1 << 6
"""FUSE_DONT_MASK of linux/fuse.h, protocol 7.12."""
INIT_WAIT_S = 1.0
"""The kernel sends INIT with the mount: it is there already, and the loop does not stand still."""
_REQUEST_BYTES_MAX = 1 << 20
_INIT_OPCODE = 26
_IN_HEADER = struct.Struct("=IIQQIIIHH")
"""struct fuse_in_header: length, opcode, unique, and what does not matter here."""
_OUT_HEADER = struct.Struct("=IiQ")
"""struct fuse_out_header: length, error, unique."""
_INIT = struct.Struct("=IIII")
"""How fuse_init_in and fuse_init_out begin: major, minor, read-ahead, flags."""


class Handshake:
    """The exchange of one session; `begin` after the mount, before requests are served."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._device = -1
        self._ours: socket.socket | None = None
        self._unique = 0

    def begin(self) -> bool:
        """Take INIT from the kernel and put it where the session reads; False leaves all as it is.

        Raises nothing: without it files are made with the umask applied by the kernel.
        """
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if not poll.poll(INIT_WAIT_S * 1000):
            log.warning("the kernel has sent no INIT: it keeps the umask")
            return False
        self._device = os.dup(self._descriptor)
        request = os.read(self._device, _REQUEST_BYTES_MAX)
        _, opcode, self._unique, *_ = _IN_HEADER.unpack_from(request)
        assert opcode == _INIT_OPCODE, "the kernel's first request is INIT"
        theirs, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.dup2(theirs.fileno(), self._descriptor, inheritable=False)
        theirs.close()
        self._ours.setblocking(False)
        self._ours.send(request)
        return True

    def end(self) -> bool:
        """Hand the answer on, if it is there, and put the kernel's descriptor back in its place.

        Called before each wait for a request, until it returns True. Raises OSError when the
        kernel does not take the answer.
        """
        assert self._ours is not None
        try:
            answer = bytearray(self._ours.recv(_REQUEST_BYTES_MAX))
        except BlockingIOError:
            return False
        _, error, unique = _OUT_HEADER.unpack_from(answer)
        if unique != self._unique:
            return False  # a notification: there is nothing yet that the kernel could forget
        if not error:
            major, minor, read_ahead, flags = _INIT.unpack_from(answer, _OUT_HEADER.size)
            flags |= DONT_MASK
            _INIT.pack_into(answer, _OUT_HEADER.size, major, minor, read_ahead, flags)
        os.dup2(self._device, self._descriptor, inheritable=False)
        os.write(self._descriptor, answer)
        self.close()
        return True

    def close(self) -> None:
        """Give up what the exchange needed; the session's own descriptor stays."""
        if self._ours is not None:
            self._ours.close()
            os.close(self._device)
            self._ours = None
