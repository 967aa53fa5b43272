"""Programs that are no tracker, on a real socket; the tracker itself is asked in
test_bench_tvm_rpc.py.
"""

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
    """The port of a program that sends these bytes to whoever connects, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            link, _ = server.accept()
            with link, contextlib.suppress(OSError):
                link.sendall(request.param)
                link.shutdown(socket.SHUT_WR)
                # Hanging up with words unread would reset the connection.
                while link.recv(1024):
                    pass

        threading.Thread(target=answer, daemon=True).start()
        yield int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("listener", "why"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "another program listens there"),
        (b"", "it ended the connection"),
        (struct.pack("<ii", MAGIC, 1 << 30), "another program listens there"),
        (struct.pack("<ii", MAGIC, 2) + b"{}", "it does not tell its boards"),
        (struct.pack("<ii", MAGIC, 7) + b"[0, {}]", "server_info"),
        (struct.pack("<ii", MAGIC, 3) + b"no!", "Expecting value"),
    ],
    indirect=["listener"],
)
def test_another_program_is_told_from_a_tracker(listener: int, why: str) -> None:
    with pytest.raises(InputError, match="no TVM tracker answers there") as caught:
        free_boards("127.0.0.1", listener, "rpi4")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nobody_is_told() -> None:
    with pytest.raises(
        InputError,
        match=r"no TVM tracker answers there \(.*refused\); start one: python -m tvm\.exec\.rpc_tracker",
    ):
        free_boards("127.0.0.1", free_port(), "rpi4")
