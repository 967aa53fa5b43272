"""The boards of a TVM tracker, read through its protocol without TVM, whose import takes seconds.

Both sides send a magic number, then JSON messages that begin with their length
(python/tvm/rpc/base.py and tracker.py of TVM 0.27).
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

from ...core.errors import InputError

MAGIC, SUMMARY, SUCCESS = 0x2F271, 6, 0
LONGEST_BYTES = 1 << 24


def free_boards(host: str, port: int, key: str, *, limit_s: float = 15.0) -> int:
    """Return how many boards are free under a key.

    Args:
        host: Host of the tracker.
        port: Port of the tracker.
        key: The key that the boards registered under.
        limit_s: Time limit in seconds.

    Raises:
        InputError: No tracker responds, or no board is registered under the key.
    """
    where = f"{host}:{port}"
    try:
        found = summary(host, port, limit_s)
        keys = [str(entry["key"]).removeprefix("server:") for entry in found["server_info"]]
        free = int(found["queue_info"].get(key, {}).get("free", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(
            f"{where}: no TVM tracker responds there ({error}); "
            f"start one: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port}"
        ) from None
    if key not in keys:
        known = f"it has {', '.join(sorted(set(keys)))}" if keys else "it has no boards at all"
        raise InputError(
            f"{where}: no board registered as {key!r} ({known}); start one there: "
            f"python -m tvm.exec.rpc_server --tracker {where} --key {key}"
        )
    return free


def summary(host: str, port: int, limit_s: float) -> dict[str, Any]:
    """Return the tracker's summary; raises OSError, ValueError or struct.error without one."""
    with socket.create_connection((host, port), timeout=limit_s) as connection:
        connection.sendall(struct.pack("<i", MAGIC))
        if struct.unpack("<i", _receive(connection, 4))[0] != MAGIC:
            raise ValueError("another program listens there")
        request = json.dumps([SUMMARY]).encode()
        connection.sendall(struct.pack("<i", len(request)) + request)
        size = struct.unpack("<i", _receive(connection, 4))[0]
        if not 0 < size <= LONGEST_BYTES:
            raise ValueError("another program listens there")
        response = json.loads(_receive(connection, size))
    if not isinstance(response, list) or len(response) < 2 or response[0] != SUCCESS:
        raise ValueError("it does not list its boards")
    found: dict[str, Any] = response[1]
    return found


def _receive(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            raise ValueError("it closed the connection")
        parts += part
    return bytes(parts)
