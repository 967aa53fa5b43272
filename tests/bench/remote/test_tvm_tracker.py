"""Programs that are no TVM tracker, on a socket; test_tvm_rpc.py runs a tracker."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from loopback_ssh import free_port
from vitrim.bench.remote.tvm_tracker import MAGIC, free_boards
from vitrim.core.errors import InputError


@pytest.fixture
def listener(request: pytest.FixtureRequest) -> Iterator[int]:
    """Yield the port of a program that sends these bytes to a client and closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def respond() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(request.param)
                connection.shutdown(socket.SHUT_WR)
                # Closing with unread data would reset the connection.
                while connection.recv(1024):
                    pass

        threading.Thread(target=respond, daemon=True).start()
        yield int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("listener", "why"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "another program listens there"),
        (b"", "it closed the connection"),
        (struct.pack("<ii", MAGIC, 1 << 30), "another program listens there"),
        (struct.pack("<ii", MAGIC, 2) + b"{}", "it does not list its boards"),
        (struct.pack("<ii", MAGIC, 7) + b"[0, {}]", "server_info"),
        (struct.pack("<ii", MAGIC, 3) + b"no!", "Expecting value"),
    ],
    indirect=["listener"],
)
def test_another_program_is_distinguished_from_a_tracker(listener: int, why: str) -> None:
    with pytest.raises(InputError, match="no TVM tracker responds there") as caught:
        free_boards("127.0.0.1", listener, "rpi4")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_port_without_a_program_is_reported() -> None:
    with pytest.raises(
        InputError,
        match=r"no TVM tracker responds there \(.*refused\); "
        r"start one: python -m tvm\.exec\.rpc_tracker",
    ):
        free_boards("127.0.0.1", free_port(), "rpi4")
