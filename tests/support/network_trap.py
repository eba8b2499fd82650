"""Runs commands where every road to the network ends in a trap, and tells what came along it.

    python network_trap.py PROXY_PORT ENVIRONMENT_JSON COMMANDS_JSON

Runs as root of its own user, network and mount namespace (`unshare --user --map-root-user --net --mount`).
There the loopback interface is all there is, names are asked of a listener on 127.0.0.1:53, and a second
listener sits where the environment's proxy is said to be. Neither answers anything useful. Prints one JSON
object: each command's exit status and output, the names asked for, the first line sent to the proxy.
"""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1
_REFUSED_FLAGS = 0x8185


def main() -> None:
    port, environment, commands = int(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    _loopback_up()
    _resolve_at_loopback()
    asked: list[str] = []
    proxied: list[str] = []
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind(("127.0.0.1", 53))
    proxy = socket.create_server(("127.0.0.1", port))
    threading.Thread(target=_trap_names, args=(names, asked), daemon=True).start()
    threading.Thread(target=_trap_proxy, args=(proxy, proxied), daemon=True).start()
    done = [
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        for command in commands
    ]
    ran = [{"status": one.returncode, "out": one.stdout, "err": one.stderr} for one in done]
    print(json.dumps({"ran": ran, "asked": asked, "proxied": proxied}))


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


def _resolve_at_loopback() -> None:
    folder = Path(tempfile.mkdtemp())
    for name, text in (
        ("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n"),
        ("nsswitch.conf", "hosts: files dns\n"),
    ):
        (folder / name).write_text(text)
        target = Path("/etc", name).resolve()
        if name == "resolv.conf" or target.is_file():
            subprocess.run(["mount", "--bind", str(folder / name), str(target)], check=True)


def _trap_names(listener: socket.socket, asked: list[str]) -> None:
    """Notes each question and refuses it, so that nobody waits."""
    while True:
        packet, sender = listener.recvfrom(4096)
        labels, place = [], 12
        while place < len(packet) and packet[place]:
            labels.append(packet[place + 1 : place + 1 + packet[place]].decode("ascii", "replace"))
            place += 1 + packet[place]
        asked.append(".".join(labels))
        listener.sendto(packet[:2] + _REFUSED_FLAGS.to_bytes(2, "big") + packet[4:], sender)


def _trap_proxy(listener: socket.socket, proxied: list[str]) -> None:
    """Notes the first line of each connection and hangs up."""
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(5)
            try:
                line = connection.recv(4096).split(b"\r\n")[0].decode("latin-1")
            except OSError:
                line = ""
            proxied.append(line)


if __name__ == "__main__":
    main()
