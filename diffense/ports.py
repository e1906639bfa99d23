"""Free TCP ports for a server that is about to start."""

import errno
import secrets
import socket
from collections.abc import Sequence, Set
from typing import Final

from diffense.errors import ServeError

# Below the ports of outgoing connections: else a probe of a port without a server could connect to itself.
FREE_PORTS: Final = range(20_000, 32_000)


def choose_ports(host: str, wanted: Sequence[int]) -> list[int]:
    """Check that the wanted ports of ``host`` are free and fill in free ones for 0.

    Raises:
        ServeError: a wanted port is in use or wanted twice, or the address is not this machine's.
    """
    twice = {port for port in wanted if port and list(wanted).count(port) > 1}
    if twice:
        raise ServeError(f"port {min(twice)} of {host} is wanted twice; give each service a port of its own")
    held: list[socket.socket] = []
    taken = {port for port in wanted if port}  # sockets that do not listen may share a port, so binding would not tell
    try:
        for port in wanted:
            probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
            held.append(probe)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            while not _bind(probe, host, port or _draw_port(taken)):
                if port:
                    raise ServeError(f"port {port} of {host} is already in use; choose another one")
            taken.add(probe.getsockname()[1])
        return [probe.getsockname()[1] for probe in held]
    finally:
        for probe in held:
            probe.close()


def _draw_port(taken: Set[int]) -> int:
    while (port := FREE_PORTS[secrets.randbelow(len(FREE_PORTS))]) in taken:
        pass
    return port


def _bind(probe: socket.socket, host: str, port: int) -> bool:
    """Bind; False when another process has the port."""
    try:
        probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return True
