#!/usr/bin/env python3
"""An echo server, to try a proxy with: what it is sent comes back. And a load, to measure one.

    python3 echo_server.py                              # TCP and UDP on 127.0.0.1:7777
    python3 echo_server.py --through 127.0.0.1:1080     # measure the SOCKS5 proxy there

A TCP client is echoed to until it has finished sending, and then hung up on, so that a
half-close can be watched on its way there and back. A UDP datagram is sent back as it came.

Measuring starts an echo server of its own, and does the same work through the proxy and
directly, each octet checked. The password of --user comes from $SOCKS5_PASSWORD or a prompt.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import getpass
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

BUFFER = 64 * 1024  # octets
PROCESSES = os.cpu_count() or 1  # one Python could not keep a proxy busy


class EchoRequestHandler(socketserver.BaseRequestHandler):
    """One TCP client."""

    def handle(self) -> None:
        """Echo until the client's end, or until it is gone."""
        with contextlib.suppress(OSError):
            for octets in iter(lambda: self.request.recv(BUFFER), b""):
                self.request.sendall(octets)


class EchoServer(socketserver.ThreadingTCPServer):
    """Echoes over TCP."""

    allow_reuse_address = os.name == "posix"
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
    announce("Echoing TCP and UDP on %s port %d ..." % tcp.socket.getsockname()[:2])
    threading.Thread(target=udp.serve_forever, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        tcp.serve_forever()
    udp.shutdown()
    announce("Interrupted, ending.")


# ---- measuring a proxy -------------------------------------------------------------------

CONNECT, UDP_ASSOCIATE = b"\1", b"\3"


class Path(NamedTuple):
    """The way to the target: through `proxy`, or directly if that is None."""

    target: Tuple[str, int]
    proxy: Optional[Tuple[str, int]] = None
    user: bytes = b""
    password: bytes = b""

    def connect(self) -> socket.socket:
        """A socket connected to the target; OSError if there is none to be had."""
        sock = socket.create_connection(self.proxy or self.target, timeout=30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.proxy:
            self.ask(sock, CONNECT, pack(self.target))
        return sock

    @contextlib.contextmanager
    def associate(self) -> Iterator[Tuple[socket.socket, bytes]]:
        """A socket for datagrams, and the header that they need; OSError if there is none."""
        with contextlib.ExitStack() as socks:
            where, header = self.target, b""
            if self.proxy:
                control = socks.enter_context(socket.create_connection(self.proxy, timeout=30))
                where = self.ask(control, UDP_ASSOCIATE, pack(("0.0.0.0", 0)))
                header = b"\0\0\0" + pack(self.target)
            family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
            sock = socks.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            sock.connect(where)
            sock.settimeout(1)
            yield sock, header

    def ask(self, sock: socket.socket, command: bytes, address: bytes) -> Tuple[str, int]:
        """The conversation of RFC 1928 and RFC 1929; the address in the reply."""
        sock.sendall(b"\5\1\2" if self.user else b"\5\1\0")
        expect(sock, b"\5\2" if self.user else b"\5\0")
        if self.user:
            sock.sendall(b"\1%c%b%c%b" % (len(self.user), self.user,
                                          len(self.password), self.password))
            expect(sock, b"\1\0")
        sock.sendall(b"\5" + command + b"\0" + address)
        expect(sock, b"\5\0\0")
        family, length = {b"\4": (socket.AF_INET6, 16)}.get(receive(sock, 1), (socket.AF_INET, 4))
        host = socket.inet_ntop(family, receive(sock, length))
        return host, int.from_bytes(receive(sock, 2), "big")


def pack(address: Tuple[str, int]) -> bytes:
    """An IPv4 address as SOCKS5 has it."""
    return b"\1" + socket.inet_aton(address[0]) + address[1].to_bytes(2, "big")


def receive(sock: socket.socket, count: int) -> bytes:
    """Exactly `count` octets; OSError if the end comes first."""
    octets = b""
    while len(octets) < count:
        piece = sock.recv(count - len(octets))
        if not piece:
            raise ConnectionError("ended too early")
        octets += piece
    return octets


def expect(sock: socket.socket, octets: bytes) -> None:
    """Receive just `octets`; OSError if it is something else."""
    if receive(sock, len(octets)) != octets:
        raise ConnectionError("not what was expected")


def ping(sock: socket.socket) -> float:
    """The seconds that 64 octets take there and back."""
    octets, before = os.urandom(64), time.perf_counter()
    sock.sendall(octets)
    expect(sock, octets)
    return time.perf_counter() - before


Result = Tuple[List[float], int]  # figures, and how many failures there were


def measure_sessions(path: Path, seconds: float, count: int) -> Result:
    """The seconds that each session takes: connect, a round trip, close."""
    figures, failures, end = [], 0, time.monotonic() + seconds
    while time.monotonic() < end:
        before = time.perf_counter()
        try:
            with path.connect() as sock:
                ping(sock)
            figures.append(time.perf_counter() - before)
        except OSError:
            failures += 1
    return figures, failures


def measure_pings(path: Path, seconds: float, count: int) -> Result:
    """The seconds that each round trip takes over a standing session."""
    figures: List[float] = []
    try:
        with path.connect() as sock:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                figures.append(ping(sock))
    except OSError:
        return figures, 1
    return figures, 0


def measure_datagrams(path: Path, seconds: float, count: int) -> Result:
    """The seconds that each datagram takes there and back; failures are those that got lost."""
    figures: List[float] = []
    lost, end = 0, time.monotonic() + seconds
    with contextlib.suppress(OSError), path.associate() as (sock, header):
        while time.monotonic() < end:
            octets, before = header + os.urandom(64), time.perf_counter()
            sock.send(octets)
            try:
                while sock.recv(BUFFER) != octets:
                    pass  # one that had been given up
                figures.append(time.perf_counter() - before)
            except socket.timeout:
                lost += 1
    return figures, lost


def measure_flow(path: Path, seconds: float, count: int) -> Result:
    """The MiB that come back of a steady flow, there and back at once."""
    block, received = os.urandom(BUFFER), 0
    try:
        with path.connect() as sock:
            sender = threading.Thread(target=send_for, args=(sock, block, seconds))
            sender.start()
            while True:
                octets = receive_block(sock, len(block))
                if octets != block[:len(octets)]:
                    raise ConnectionError("not what was sent")
                received += len(octets)
                if len(octets) < len(block):
                    break
            sender.join()
    except OSError:
        return [received / 2**20], 1
    return [received / 2**20], 0


def send_for(sock: socket.socket, block: bytes, seconds: float) -> None:
    """Send `block` again and again, and then an end."""
    end = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while time.monotonic() < end:
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)


def receive_block(sock: socket.socket, count: int) -> bytes:
    """`count` octets, or fewer at the end."""
    pieces = []
    while count:
        piece = sock.recv(count)
        if not piece:
            break
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def measure_held(path: Path, seconds: float, count: int) -> Result:
    """How many of `count` sessions were open at once, and echoed."""
    with contextlib.ExitStack() as held:
        socks, figures = [], []
        for _ in range(count):
            with contextlib.suppress(OSError):
                socks.append(held.enter_context(path.connect()))
        for sock in socks:
            with contextlib.suppress(OSError):
                figures.append(ping(sock))
    return figures, count - len(figures)


Measure = Callable[[Path, float, int], Result]


def alone(measure: Measure, path: Path, seconds: float, count: int) -> Result:
    """The result of `measure`, in a process that leaves Ctrl-C to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return measure(path, seconds, count)


def in_parallel(measure: Measure, path: Path, seconds: float, count: int) -> Result:
    """The results of `measure` in several processes, as one."""
    with concurrent.futures.ProcessPoolExecutor(PROCESSES) as pool:
        shares = [count // PROCESSES + (number < count % PROCESSES) for number in range(PROCESSES)]
        work = functools.partial(alone, measure, path, seconds)
        results = list(pool.map(work, shares))
    return [figure for figures, _ in results for figure in figures], sum(f for _, f in results)


def summarize(path: Path, seconds: float, count: int) -> Dict[str, float]:
    """All the figures for `path`."""
    def progress(what: str, measure: Measure) -> Result:
        print("%s: %s ..." % ("through" if path.proxy else "directly", what),
              file=sys.stderr, flush=True)
        return in_parallel(measure, path, seconds, count)

    sessions, failed = progress("short sessions", measure_sessions)
    pings, failed_pings = progress("round trips", measure_pings)
    datagrams, lost = progress("datagrams", measure_datagrams)
    flows, failed_flows = progress("flows", measure_flow)
    held, failed_held = progress("%d sessions held" % count, measure_held)
    pings.sort()
    return {
        "sessions/s": len(sessions) / seconds,
        "round trips/s": len(pings) / seconds,
        "p50 ms": 1e3 * pings[len(pings) // 2] if pings else 0,
        "p99 ms": 1e3 * pings[len(pings) * 99 // 100] if pings else 0,
        "datagrams/s": len(datagrams) / seconds,
        "datagrams sent": len(datagrams) + lost,
        "datagrams lost": lost,
        "MiB/s each way": sum(flows) / seconds,
        "sessions held": len(held),
        "failures": failed + failed_pings + failed_flows + failed_held,
    }


def raise_descriptor_limit() -> None:
    """Take all the descriptors that we may have, to hold sessions open."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # as on Windows, and macOS
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def measure(args: argparse.Namespace) -> int:
    """Measure the proxy, print a table; the exit status is 1 if anything failed."""
    raise_descriptor_limit()
    password = b""
    if args.user:
        password = (os.environ.get("SOCKS5_PASSWORD") or getpass.getpass()).encode()
    target = subprocess.Popen([sys.executable, os.path.abspath(__file__), "0"],
                              stdout=subprocess.PIPE, universal_newlines=True)
    try:
        port = int(target.stdout.readline().split()[-2])  # type: ignore[union-attr]
        direct = Path(("127.0.0.1", port))
        through = direct._replace(proxy=args.through, user=args.user.encode(), password=password)
        through.connect().close()
        tables = [summarize(path, args.seconds, args.sessions) for path in (through, direct)]
    except OSError as error:
        print("echo_server.py: no way through %s port %d: %s" % (*args.through, error),
              file=sys.stderr)
        return 1
    finally:
        target.terminate()
        target.wait()
        target.stdout.close()  # type: ignore[union-attr]
    print("%-16s%12s%12s%12s" % ("", "through", "directly", "ratio"))
    for name, figure in tables[0].items():
        other = tables[1][name]
        ratio = "%12.2f" % (figure / other) if other else ""
        print("%-16s%12.5g%12.5g%s" % (name, figure, other, ratio))
    return int(tables[0]["failures"] > 0)


# ---- command line ------------------------------------------------------------------------

def address(text: str) -> Tuple[str, int]:
    """A host and a port, for argparse."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="echo_server.py", allow_abbrev=False,
        description="Echo what is sent, over TCP and UDP; or measure a SOCKS5 proxy.")
    add: Any = parser.add_argument
    add("port", nargs="?", type=int, default=7777,
        help="port to serve on, 0 for any that is free (default: %(default)s)")
    add("-b", "--bind", metavar="ADDRESS", default="127.0.0.1",
        help="address to serve on (default: %(default)s)")
    add("--through", metavar="HOST:PORT", type=address, help="measure the proxy there")
    add("--user", metavar="NAME", default="", help="log in there; password: $SOCKS5_PASSWORD")
    add("--seconds", metavar="S", type=float, default=3.0,
        help="how long to measure each thing (default: %(default)g)")
    add("--sessions", metavar="N", type=int, default=500,
        help="how many sessions to hold open (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.through:
        try:
            return measure(args)
        except KeyboardInterrupt:
            announce("Interrupted, ending.")
            return 1
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
