#!/usr/bin/env python3
"""An echo server, to try a proxy with: what it is sent comes back.

    python3 echo_server.py          # TCP and UDP on 127.0.0.1:7777

A TCP client is echoed to until it has finished sending, and then hung up on, so that a
half-close can be watched on its way there and back. A UDP datagram is sent back as it came.
"""

import argparse
import contextlib
import socketserver
import sys
import threading
from typing import List, Optional

BUFFER = 64 * 1024  # octets


class EchoRequestHandler(socketserver.BaseRequestHandler):
    """One TCP client."""

    def handle(self) -> None:
        """Echo until the client's end, or until it is gone."""
        with contextlib.suppress(OSError):
            for octets in iter(lambda: self.request.recv(BUFFER), b""):
                self.request.sendall(octets)


class EchoServer(socketserver.ThreadingTCPServer):
    """Echoes over TCP."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024


class DatagramRequestHandler(socketserver.BaseRequestHandler):
    """One UDP datagram."""

    def handle(self) -> None:
        """Send it back."""
        octets, sock = self.request
        with contextlib.suppress(OSError):
            sock.sendto(octets, self.client_address)


class DatagramEchoServer(socketserver.UDPServer):
    """Echoes over UDP."""

    max_packet_size = 64 * 1024


def announce(line: str) -> None:
    """Print `line`, if anybody can read it."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def serve(tcp: EchoServer, udp: DatagramEchoServer) -> None:
    """Serve over both until Ctrl-C."""
    announce("Echoing TCP and UDP on %s port %d ..." % (*tcp.server_address[:2],))
    threading.Thread(target=udp.serve_forever, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        tcp.serve_forever()
    udp.shutdown()
    announce("Interrupted, ending.")


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="echo_server.py", description="Echo what is sent, over TCP and UDP.")
    parser.add_argument("port", nargs="?", type=int, default=7777,
                        help="port to serve on, 0 for any that is free (default: %(default)s)")
    parser.add_argument("-b", "--bind", metavar="ADDRESS", default="127.0.0.1",
                        help="address to serve on (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        tcp = EchoServer((args.bind, args.port), EchoRequestHandler)
        udp = DatagramEchoServer(tcp.server_address[:2], DatagramRequestHandler)
    except (OSError, OverflowError) as error:
        print("echo_server.py: cannot serve on %s port %d: %s" % (args.bind, args.port, error),
              file=sys.stderr)
        return 1
    with tcp, udp:
        serve(tcp, udp)
    return 0


if __name__ == "__main__":
    sys.exit(main())
