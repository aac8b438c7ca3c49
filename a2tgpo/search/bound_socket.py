"""Bind a server's address before the slow parts of the server are built."""

import socket

from a2tgpo.io.errors import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to `host` and `port` but does not listen yet. Port 0 selects any free port.

    Raises:
        ConfigError: with a one-line message, if the address does not exist or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: not an address of this machine ({error.strerror})") from None
    except UnicodeError:
        raise ConfigError(f"--host {host:.80}: not a host name") from None
    except OSError as error:
        where = f"--host {host} --port {port}"
        raise ConfigError(f"{where}: cannot listen ({error.strerror}); choose another port") from None
    return bound
