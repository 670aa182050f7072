"""No test reaches another machine: see the conftest.py of the checkout."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

ELSEWHERE = ("192.0.2.1", 80)
"""Set aside for documents (RFC 5737): nobody answers there, wherever this is run."""


@pytest.fixture
def tried(request: pytest.FixtureRequest, no_network: None) -> list[str]:
    """What was refused; this test may."""
    conftest = next(plugin for plugin in request.config.pluginmanager.get_plugins() if hasattr(plugin, "_is_here"))
    found: list[str] = conftest.attempts
    request.addfinalizer(found.clear)
    return found


def test_another_machine_is_out_of_reach(tried: list[str]) -> None:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as sender, pytest.raises(OSError, match="no other machine"):
            sender.connect(ELSEWHERE)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender, pytest.raises(OSError, match="no other machine"):
        sender.sendto(b"x", ELSEWHERE)
    with pytest.raises(OSError, match="no other machine"):
        socket.create_connection(("example.org", 80), timeout=1)
    assert tried == [*[str(ELSEWHERE)] * 3, "example.org"]


def test_this_machine_is_in_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"here")
            assert accepted.recv(4) == b"here"
    one, two = socket.socketpair()
    one.close(), two.close()
    assert socket.getaddrinfo("localhost", 80)


def test_child_processes_have_no_network_either(request: pytest.FixtureRequest) -> None:
    header = request.config.hook.pytest_report_header(config=request.config, start_path=request.path)
    if not any("child processes too" in str(line) for line in header):
        pytest.skip("this user may not make a network namespace")
    connect = f"import socket; socket.create_connection({ELSEWHERE}, timeout=20)"
    done = subprocess.run([sys.executable, "-S", "-c", connect], capture_output=True, text=True)
    assert "Network is unreachable" in done.stderr
