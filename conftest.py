"""For a checkout whose packages are not installed: pytest then finds no entry point of theirs. And no test reaches
beyond this machine, or depends on whether Ctrl-C was ignored where the tests were started."""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest_plugins = ["apt.testing.pytest_plugin"]

CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8914, 0x1
NAMES = {"", "localhost", socket.gethostname()}
"""Host names that may be looked up: they are this machine."""

ALONE = pytest.StashKey[bool]()

attempts: list[str] = []
"""Where the running test was refused to go."""


def pytest_configure(config: pytest.Config) -> None:
    """For the whole process, and for good."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # the background job of a shell; its children too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[ALONE] = _leave_the_network()
    sys.addaudithook(_refuse)


def pytest_report_header(config: pytest.Config) -> str:
    alone = "in a network namespace, child processes too" if config.stash[ALONE] else "Python's sockets of this process"
    return f"network: loopback only ({alone})"


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """Fails a test that tried, even where what was refused was then passed over."""
    attempts.clear()
    yield
    assert not attempts, f"reached beyond this machine: {attempts}"


def _leave_the_network() -> bool:
    """Move this process, and with it every child that it starts, to a network of its own that has loopback alone.
    False where the system does not offer that, or not to this user."""
    if sys.platform != "linux":
        return False
    if [name for _, name in socket.if_nameindex()] == ["lo"]:
        return True  # a worker of pytest-xdist, or already so
    import fcntl

    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    return True


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook: what goes through Python's sockets to anywhere else is refused, and remembered."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        sender, address = arguments[:2]
        if sender.family == getattr(socket, "AF_UNIX", None) or address is None or _is_here(address[0]):
            return
        where = str(address)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        if arguments[0] is None or _is_here(arguments[0]):
            return
        where = str(arguments[0])
    else:
        return
    attempts.append(where)
    raise OSError(errno.ENETUNREACH, f"{os.strerror(errno.ENETUNREACH)}: tests reach no other machine", where)


def _is_here(host: str | bytes) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return name in NAMES
