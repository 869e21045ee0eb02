"""Free ports."""

import socket


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port of this machine, at one of its addresses, that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
