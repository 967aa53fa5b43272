"""Who is registered at a TVM tracker: its protocol's one question, without TVM itself, whose import
takes seconds.

A magic number each way, then JSON messages behind their length (python/tvm/rpc/base.py and
tracker.py of TVM 0.27).
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
    """How many boards of the kind `key` are free now. Errors: InputError where no tracker answers,
    or none is registered under the key.
    """
    where = f"{host}:{port}"
    try:
        told = summary(host, port, limit_s)
        keys = [str(entry["key"]).removeprefix("server:") for entry in told["server_info"]]
        free = int(told["queue_info"].get(key, {}).get("free", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(
            f"{where}: no TVM tracker answers there ({error}); start one: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port}"
        ) from None
    if key not in keys:
        there = f"it has {', '.join(sorted(set(keys)))}" if keys else "it has no boards at all"
        raise InputError(
            f"{where}: no board registered as {key!r} ({there}); start one there: python -m tvm.exec.rpc_server --tracker {where} --key {key}"
        )
    return free


def summary(host: str, port: int, limit_s: float) -> dict[str, Any]:
    """The tracker's summary. Errors: OSError, ValueError or struct.error for whatever is no
    tracker.
    """
    with socket.create_connection((host, port), timeout=limit_s) as link:
        link.sendall(struct.pack("<i", MAGIC))
        if struct.unpack("<i", _take(link, 4))[0] != MAGIC:
            raise ValueError("another program listens there")
        question = json.dumps([SUMMARY]).encode()
        link.sendall(struct.pack("<i", len(question)) + question)
        size = struct.unpack("<i", _take(link, 4))[0]
        if not 0 < size <= LONGEST_BYTES:
            raise ValueError("another program listens there")
        answer = json.loads(_take(link, size))
    if not isinstance(answer, list) or len(answer) < 2 or answer[0] != SUCCESS:
        raise ValueError("it does not tell its boards")
    found: dict[str, Any] = answer[1]
    return found


def _take(link: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = link.recv(count - len(parts))
        if not part:
            raise ValueError("it ended the connection")
        parts += part
    return bytes(parts)
