#!/usr/bin/env python3
"""An echo server to try a proxy with, and a load to measure a proxy with.

    python3 echo_server.py                              # TCP and UDP on 127.0.0.1:7777
    python3 echo_server.py --through 127.0.0.1:1080     # measure the SOCKS5 proxy there

The server sends back what it receives. It closes a TCP connection when the client has finished
sending, so that a half-close shows on its way there and back.

A measurement starts an echo server of its own on this host, applies the same load through the
proxy and directly, and checks each byte. The password for --user comes from $SOCKS5_PASSWORD
or from a prompt.
"""

import argparse
import contextlib
import functools
import getpass
import json
import os
import queue
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Tuple

BLOCK = 64 * 1024  # bytes


class EchoRequestHandler(socketserver.BaseRequestHandler):
    """Serve one TCP client."""

    def handle(self) -> None:
        """Send back what arrives until the client has finished sending."""
        with contextlib.suppress(OSError):
            for data in iter(lambda: self.request.recv(BLOCK), b""):
                self.request.sendall(data)


class EchoServer(socketserver.ThreadingTCPServer):
    """Echo over TCP, with a thread for each client."""

    allow_reuse_address = os.name == "posix"
    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print one line if no thread can be started for a client."""
        complain("client rejected: %s" % sys.exc_info()[1])


class DatagramRequestHandler(socketserver.BaseRequestHandler):
    """Serve one UDP datagram."""

    def handle(self) -> None:
        """Send it back."""
        data, sock = self.request
        with contextlib.suppress(OSError):
            sock.sendto(data, self.client_address)


class DatagramEchoServer(socketserver.UDPServer):
    """Echo over UDP."""

    max_packet_size = BLOCK

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Ignore datagrams from the port that we listen on: their echoes would never stop."""
        return bool(client_address[1] != self.server_address[1])


def announce(text: str) -> None:
    """Print `text`. If stdout is a full disk or a closed pipe, go on without it."""
    try:
        print(text, flush=True)
    except OSError:  # Python would write the rest again at exit, and report a second error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str) -> int:
    """Print an error, and return the exit status."""
    print("echo_server.py: error: " + text, file=sys.stderr, flush=True)
    return 1


def reason(error: Exception) -> str:
    """Return what `error` says, without its number."""
    return getattr(error, "strerror", None) or str(error) or "end of input"


def serve(host: str, port: int) -> int:
    """Echo until Ctrl-C or SIGTERM, which raise KeyboardInterrupt. Raises OSError."""
    tcp = EchoServer((host, port), EchoRequestHandler)
    udp = DatagramEchoServer(tcp.socket.getsockname(), DatagramRequestHandler)
    announce("Echoing TCP and UDP on %s port %d ..." % tcp.socket.getsockname())
    threading.Thread(target=udp.serve_forever, daemon=True).start()
    tcp.serve_forever()
    return 0


# ---- measuring: what one process does ----------------------------------------------------

TIMEOUT = 3.0  # seconds to wait for the proxy or the echo server


class Path(NamedTuple):
    """A way to the target: through `proxy`, or directly if that is None."""

    target: Tuple[str, int]
    proxy: Optional[Tuple[str, int]] = None
    user: str = ""
    password: str = ""

    @contextlib.contextmanager
    def connect(self) -> Iterator[socket.socket]:
        """Connect to the target, and close at the end of the `with` block. Raises OSError."""
        with socket.create_connection(self.proxy or self.target, timeout=TIMEOUT) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.proxy:
                self.negotiate(sock)
            yield sock

    def negotiate(self, sock: socket.socket) -> None:
        """Log in and ask for the target, as in RFC 1928 and RFC 1929. Raises OSError."""
        user, password = os.fsencode(self.user), os.fsencode(self.password)
        if max(len(user), len(password)) > 255:
            raise ConnectionError("the user or the password has more than 255 bytes")
        method = b"\2" if user else b"\0"
        sock.sendall(b"\5\1" + method)
        expect(sock, b"\5" + method, "the proxy does not select method %d" % method[0])
        if user:
            sock.sendall(b"\1%c%b%c%b" % (len(user), user, len(password), password))
            expect(sock, b"\1\0", "the proxy rejects the user or the password")
        host, port = self.target
        sock.sendall(b"\5\1\0\1" + socket.inet_aton(host) + port.to_bytes(2, "big"))
        reply = receive(sock, 4)
        if reply[1]:
            raise ConnectionError("the proxy answers CONNECT with reply %d" % reply[1])
        receive(sock, 18 if reply[3] == 4 else 6)  # an IPv6 or an IPv4 address, and a port


def receive(sock: socket.socket, count: int) -> bytes:
    """Return exactly `count` bytes. Raises OSError if the connection ends before."""
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionError("connection closed")
        data += piece
    return data


def expect(sock: socket.socket, data: bytes, problem: str = "bytes changed on the way") -> None:
    """Receive as many bytes as `data` has. Raises OSError if they are not `data`."""
    if receive(sock, len(data)) != data:
        raise ConnectionError(problem)


def echo(sock: socket.socket, data: bytes) -> float:
    """Send `data`, receive as much, and return the seconds that it took."""
    begin = time.perf_counter()
    sock.sendall(data)
    expect(sock, data)
    return time.perf_counter() - begin


def until(end: float) -> Iterator[None]:
    """Yield until `end`, and at least once."""
    yield
    while time.perf_counter() < end:
        yield


# A load appends the seconds of each step to `times`, until `end` or its first failure.

def open_sessions(times: List[float], path: Path, end: float, count: int) -> None:
    """Open a session, send 64 bytes there and back, close it."""
    for _ in until(end):
        with path.connect() as sock:
            times.append(echo(sock, os.urandom(64)))


def exchange(times: List[float], path: Path, end: float, count: int,
             size: int, ahead: int = 0) -> None:
    """Send `size` bytes there and back over one session, with `ahead` more of them on the way."""
    data = os.urandom(size)
    with path.connect() as sock:
        sock.sendall(ahead * data)
        for _ in until(end):
            times.append(echo(sock, data))


def hold_sessions(times: List[float], path: Path, end: float, count: int) -> None:
    """Open `count` sessions, and check at the end that each of them still echoes."""
    with contextlib.ExitStack() as held:
        socks = []
        for _ in range(count):
            socks.append(held.enter_context(path.connect()))
            times.append(echo(socks[-1], os.urandom(64)))
        for sock in socks:
            echo(sock, os.urandom(64))


def run_load(number: int, path: List[Any], seconds: float, count: int) -> None:
    """Run a load of MEASURES, and print its result for the parent process."""
    times: List[float] = []
    failures, begin = [], time.perf_counter()
    try:
        MEASURES[number][1](times, Path(*path), begin + seconds, count)
    except OSError as error:
        failures.append(reason(error))
    announce(json.dumps([times, time.perf_counter() - begin, failures]))


def work() -> NoReturn:
    """Run the loads that stdin asks for, each in a thread. Exit when stdin ends."""
    for line in sys.stdin:
        threading.Thread(target=run_load, args=json.loads(line), daemon=True).start()
    os._exit(0)  # without waiting for a thread


# ---- measuring: all processes, both paths, a table ---------------------------------------

Figure = Callable[[List[float], float], float]  # of the seconds of each step, and in all


def percentile(percent: int) -> Figure:
    """Return a function that finds this percentile of the steps, in milliseconds."""
    return lambda times, _: 1e3 * sorted(times)[len(times) * percent // 100] if times else 0


def rate(size: float) -> Figure:
    """Return a function that finds the steps in a second, multiplied by `size`."""
    return lambda times, seconds: size * len(times) / seconds


MEASURES: List[Tuple[str, Callable[..., None], Dict[str, Figure]]] = [  # name, load, figures
    ("sessions", open_sessions, {"sessions/s": rate(1)}),
    ("round trips", functools.partial(exchange, size=64),
     {"round trips/s": rate(1), "  p50 ms": percentile(50), "  p99 ms": percentile(99)}),
    ("stream", functools.partial(exchange, size=BLOCK, ahead=3),
     {"MiB/s each way": rate(BLOCK / 2**20)}),
    ("sessions held", hold_sessions, {"sessions held": lambda times, _: len(times)}),
]
PROCESSES = min(os.cpu_count() or 1, 4)  # they share one echo server: more would only wait


@contextlib.contextmanager
def start_worker() -> Iterator[Any]:
    """Give a process that runs `work`. Its stdin ends with the block, or with this process."""
    worker = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), "--worker"], universal_newlines=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,  # no Ctrl-C,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))  # nor on Windows
    try:
        yield worker
    finally:
        with contextlib.suppress(OSError):
            worker.stdin.close()  # type: ignore[union-attr]
        worker.wait()
        worker.stdout.close()  # type: ignore[union-attr]


Result = Tuple[List[float], float, int]  # seconds of each step, seconds in all, failures


def read_lines(streams: List[Any]) -> List[str]:
    """Return a line of each stream. A signal that comes just before a wait is noticed soon."""
    lines: Any = queue.Queue()
    for stream in streams:
        threading.Thread(target=lambda source: lines.put(source.readline()),
                         args=(stream,), daemon=True).start()
    found: List[str] = []
    while len(found) < len(streams):
        with contextlib.suppress(queue.Empty):
            found.append(lines.get(timeout=0.2))
    return found


def run_workers(workers: List[Any], number: int, path: Path, args: argparse.Namespace) -> Result:
    """Run a load in all workers, report failures, and return the results as one."""
    for worker in workers:  # the first one holds all sessions, so they are open at once
        task = [number, path, args.seconds, args.sessions if worker is workers[0] else 0]
        print(json.dumps(task), file=worker.stdin, flush=True)
    lines = read_lines([worker.stdout for worker in workers])
    if not all(lines):
        raise ChildProcessError("a measuring process has ended")
    times, seconds, failures = zip(*map(json.loads, lines))
    way = "through the proxy" if path.proxy else "directly"
    for failure in sum(failures, []):
        complain("%s %s: %s" % (MEASURES[number][0], way, failure))
    return sum(times, []), sum(seconds) / len(workers), len(sum(failures, []))


def format_row(name: str, through: float, directly: float) -> str:
    """Return a row of the table. A ratio of 1 means that the proxy costs nothing."""
    good, best = (directly, through) if name.endswith("ms") else (through, directly)
    ratio = good / best if best else 0
    return "%-16s%10.6g%10.6g%8.2f  %s" % (
        name, round(through, 3), round(directly, 3), ratio, "#" * min(round(30 * ratio), 34))


def print_table(results: List[List[Result]]) -> int:
    """Print the results of each measure on both paths. Return 1 if anything failed."""
    announce("                   through  directly   ratio  (1.00: as good as directly)")
    for (_, _, figures), both in zip(MEASURES, results):
        for name, figure in figures.items():
            announce(format_row(name, *(figure(times, seconds) for times, seconds, _ in both)))
    failures = [sum(both[place][2] for both in results) for place in (0, 1)]
    announce("failures        %10d%10d" % tuple(failures))
    return int(any(failures))


def measure(args: argparse.Namespace) -> int:
    """Measure the proxy and print a table. Return 1 if anything failed. Raises OSError."""
    raise_descriptor_limit()
    target = EchoServer(("127.0.0.1", 0), EchoRequestHandler)
    threading.Thread(target=target.serve_forever, daemon=True).start()
    direct = Path(target.socket.getsockname())
    password = args.user and (os.environ.get("SOCKS5_PASSWORD") or getpass.getpass())
    through = direct._replace(proxy=args.through, user=args.user, password=password)
    with through.connect():
        pass  # so one clear error is enough if the proxy does not work at all
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(start_worker()) for _ in range(PROCESSES)]
        results = []
        for number, (name, _, _) in enumerate(MEASURES):
            print(name + ": through the proxy, then directly ...", file=sys.stderr, flush=True)
            results.append([run_workers(workers, number, path, args) for path in (through, direct)])
    return print_table(results)


def raise_descriptor_limit() -> None:
    """Take as many descriptors as the system gives, to hold sessions open."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # there is no limit on Windows
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ---- command line ------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit."""
        complain(message)
        self.exit(2, "see echo_server.py --help\n")


def host(text: str) -> str:
    """Read a host name or an address, for argparse."""
    with contextlib.suppress(UnicodeError):
        if text.encode("idna"):
            return text
    raise argparse.ArgumentTypeError("%r is neither a host name nor an address" % text)


def port(text: str) -> int:
    """Read a port, for argparse."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError("%r is not a port from 0 to 65535" % text)
    return int(text)


def address(text: str) -> Tuple[str, int]:
    """Read HOST:PORT, for argparse."""
    name, _, number = text.rpartition(":")
    if not name:
        raise argparse.ArgumentTypeError("%r is not HOST:PORT" % text)
    return host(name.strip("[]")), port(number)


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog="echo_server.py", allow_abbrev=False,
                    description="Echo over TCP and UDP, or measure a SOCKS5 proxy on this host.")
    add: Any = parser.add_argument
    add("port", nargs="?", type=port, default=7777,
        help="port to listen on, 0 for any free one (default: %(default)s)")
    add("-b", "--bind", metavar="ADDRESS", type=host, default="127.0.0.1",
        help="address to listen on (default: %(default)s)")
    add("--through", metavar="HOST:PORT", type=address, help="measure the SOCKS5 proxy there")
    add("--user", metavar="NAME", default="",
        help="log in to the proxy; the password comes from $SOCKS5_PASSWORD or a prompt")
    add("--seconds", metavar="S", type=float, default=2.0,
        help="seconds for each measure on each path (default: %(default)g)")
    add("--sessions", metavar="N", type=int, default=500,
        help="sessions to hold open (default: %(default)s)")
    add("--worker", action="store_true", help=argparse.SUPPRESS)  # for start_worker
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command, and return its exit status."""
    args = make_parser().parse_args(argv)
    if args.worker:
        work()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return measure(args) if args.through else serve(args.bind, args.port)
    except KeyboardInterrupt:
        announce("Shutting down.")
        return 1 if args.through else 0
    except (EOFError, OSError) as error:
        task = ("measure through %s port %d" if args.through else "listen on %s port %d")
        return complain("cannot %s: %s" % (
            task % (args.through or (args.bind, args.port)), reason(error)))


if __name__ == "__main__":
    sys.exit(main())
