#!/usr/bin/env python3
"""An echo server to try a proxy with, and a load to measure a proxy with.

    python3 echo_server.py                              # TCP and UDP on 127.0.0.1:7777
    python3 echo_server.py --through 127.0.0.1:1080     # measure the SOCKS5 proxy there

The server sends back what it receives. It closes a TCP connection when the client has finished
sending, so a client sees whether the proxy passes on a half-close.

A measurement takes 17 seconds and needs a POSIX system. It starts an echo server on this host, in
a process of its own, applies the same load through the proxy and directly, and stops at the first
error. A load takes one step after the other, checks each byte, and has three figures: how much it
does in a second, and the milliseconds within which 50 and 99 percent of the steps end. The
password for --user comes from $SOCKS5_PASSWORD or from a prompt.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl-C during the imports

import contextlib
import getpass
import os
import re
import socket
import socketserver
import sys
import threading
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import Any, Callable, Iterator, List, Optional, Tuple

BLOCK = 64 * 1024  # bytes
TIMEOUT = 3.0  # seconds to wait for the proxy or for the echo server


# ---- echoing -----------------------------------------------------------------------------

class EchoRequestHandler(socketserver.BaseRequestHandler):
    """Serve one TCP client."""

    def handle(self) -> None:
        """Send back all data until the client has finished sending."""
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


class DatagramEchoServer(socketserver.UDPServer):
    """Echo over UDP."""

    max_packet_size = BLOCK

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Send a datagram back, unless it comes from our own port: its echoes would never stop."""
        with contextlib.suppress(OSError):
            if client_address[1] != self.server_address[1]:
                self.socket.sendto(request[0], client_address)


def serve(host: str, port: int) -> None:
    """Echo until Ctrl-C or SIGTERM. Raises OSError."""
    tcp = EchoServer((host or "127.0.0.1", port), EchoRequestHandler)
    udp = DatagramEchoServer(tcp.socket.getsockname(), socketserver.BaseRequestHandler)
    with contextlib.suppress(KeyboardInterrupt):
        announce("Echoing TCP and UDP on %s port %d ..." % tcp.socket.getsockname())
        threading.Thread(target=udp.serve_forever, daemon=True).start()
        tcp.serve_forever()


# ---- output ------------------------------------------------------------------------------

def announce(text: str) -> None:
    """Print `text`. If stdout is a full disk or a closed pipe, go on without it."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def complain(text: str) -> None:
    """Print an error."""
    print("echo_server.py: error: " + text, file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """Return the text of `error`, without its number."""
    return getattr(error, "strerror", None) or str(error) or "end of input"


def check(is_right: bool, problem: str) -> None:
    """Raise ConnectionError with the text `problem`, unless `is_right`."""
    if not is_right:
        raise ConnectionError(problem)


# ---- measuring: one session --------------------------------------------------------------

@contextlib.contextmanager
def connect(way: Namespace) -> Iterator[socket.socket]:
    """Give a connection to `way.target`, and close it afterwards. Raises OSError.

    It goes through the proxy at `way.through`, or directly if that is None.
    """
    with socket.create_connection(way.through or way.target, timeout=TIMEOUT) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if way.through:
            greet(sock, os.fsencode(way.user), os.fsencode(way.password))
            request(sock, *way.target)
        yield sock


def greet(sock: socket.socket, user: bytes, password: bytes) -> None:
    """Agree on a method, and log in if `user` is not empty. Raises OSError."""
    method = b"\2" if user else b"\0"
    sock.sendall(b"\5\1" + method)
    try:
        answer = receive(sock, 2)
    except OSError as error:
        raise ConnectionError("%s: no SOCKS5 server there?" % reason(error)) from error
    check(answer[:1] == b"\5", "it answered %r: no SOCKS5 server there?" % answer)
    check(answer[1:] == method, "the proxy accepts no login: leave out --user" if user else
          "the proxy requires a login: add --user NAME")
    if user:
        check(max(len(user), len(password)) < 256, "user or password longer than 255 bytes")
        sock.sendall(b"\1%c%b%c%b" % (len(user), user, len(password), password))
        check(receive(sock, 2)[1:] == b"\0", "the proxy rejected the user or the password")


def request(sock: socket.socket, host: str, port: int) -> None:
    """Ask the proxy to connect to an IPv4 address and a port. Raises OSError."""
    sock.sendall(b"\5\1\0\1" + socket.inet_aton(host) + port.to_bytes(2, "big"))
    reply = receive(sock, 4)
    check(reply[1] == 0, "the proxy answered CONNECT with reply %d" % reply[1])
    receive(sock, 18 if reply[3] == 4 else 6)  # an IPv6 or an IPv4 address, and a port


def receive(sock: socket.socket, count: int) -> bytes:
    """Return exactly `count` bytes. Raises OSError if the connection ends before."""
    data = sock.recv(count)
    check(data != b"", "connection closed")
    return data if len(data) == count else data + receive(sock, count - len(data))


def echo(sock: socket.socket, data: bytes) -> float:
    """Send `data`, receive it, and return the seconds it took. Raises OSError."""
    begin = time.perf_counter()
    sock.sendall(data)
    check(receive(sock, len(data)) == data, "bytes changed on the way")
    return time.perf_counter() - begin


# ---- measuring: loads --------------------------------------------------------------------

# A load yields the seconds that each step took, until `end`, and at least once. Raises OSError.

def until(end: float) -> Iterator[float]:
    """Yield the time until it is `end`, at least once."""
    yield time.perf_counter()
    while time.perf_counter() < end:
        yield time.perf_counter()


def open_sessions(way: Namespace, end: float) -> Iterator[float]:
    """Open a session, send 64 bytes there and back, close it."""
    for begin in until(end):
        with connect(way) as sock:
            echo(sock, os.urandom(64))
        yield time.perf_counter() - begin


def exchange(way: Namespace, end: float, size: int = 64, ahead: int = 0) -> Iterator[float]:
    """Send `size` bytes there and back over one session, with `ahead` more of them on the way."""
    data = os.urandom(size)
    with connect(way) as sock:
        sock.sendall(ahead * data)
        for _ in until(end):
            yield echo(sock, data)


def hold_sessions(way: Namespace, end: float) -> Iterator[float]:
    """Hold sessions open, and send 64 bytes there and back over one after the other."""
    with contextlib.ExitStack() as held:
        socks = [held.enter_context(connect(way)) for _ in range(way.sessions)]
        for _ in until(end):
            for sock in socks:
                yield echo(sock, os.urandom(64))


MEASURES: List[Tuple[str, float, Any]] = [  # the name, the size of a step, the load
    ("sessions/s", 1, open_sessions), ("round trips/s", 1, exchange),
    ("MiB/s each way", BLOCK / 2**20, lambda way, end: exchange(way, end, BLOCK, 3)),
    ("round trips/s, {} held", 1, hold_sessions)]


# ---- measuring: the table ----------------------------------------------------------------

@contextlib.contextmanager
def forked_target() -> Iterator[Any]:
    """Fork a process that echoes until the `with` block or this process ends. Give its address."""
    check(hasattr(os, "fork"), "measuring needs a POSIX system")
    import resource  # missing on Windows
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 10240), hard))  # macOS grants no more
    target = EchoServer(("127.0.0.1", 0), EchoRequestHandler)
    ended, alive = os.pipe()
    if not os.fork():
        os.close(alive)  # only this process's parent has it now
        threading.Thread(target=target.serve_forever, daemon=True).start()
        os._exit(len(os.read(ended, 1)))
    try:
        yield target.server_address
    finally:
        os.close(alive)
        os.wait()


def show(figure: float) -> str:
    """Return `figure` with three digits, or all digits of a larger one."""
    return format(round(figure), ",") if figure >= 100 else "%.3g" % figure


def run(name: str, load: Callable[..., Iterator[float]], way: Namespace) -> List[float]:
    """Return the seconds of each step, in ascending order. Raises OSError."""
    try:
        return sorted(load(way, time.perf_counter() + way.seconds))
    except OSError as error:
        path = "through the proxy" if way.through else "directly"
        raise ConnectionError("%s %s: %s" % (name, path, reason(error))) from error


def measure(way: Namespace) -> None:
    """Measure the proxy, and print two rows for each load. Raises OSError."""
    way.password = way.user and (os.environ.get("SOCKS5_PASSWORD") or getpass.getpass())
    with forked_target() as way.target:
        with connect(way) as sock:  # so that the error is short if the proxy does not work at all
            echo(sock, b"x")
        announce("%41s%9s%9s" % ("", "p50 ms", "p99 ms"))
        for name, size, load in MEASURES:
            name, direct = name.format(way.sessions), Namespace(**dict(vars(way), through=None))
            both = [run(name, load, each) for each in (way, direct)]
            rates = [size * len(times) / sum(times) for times in both]
            for path, times, rate in zip(("through", "directly"), both, rates):
                p50, p99 = (1000 * times[len(times) * part // 100] for part in (50, 99))
                announce("%-24s%-9s%8s%9s%9s  %s" % (name, path, show(rate), show(p50), show(p99),
                                                     "#" * round(18 * rate / max(rates))))


# ---- command line ------------------------------------------------------------------------

def number(text: str, low: int = 0) -> int:
    """Read a number from `low` to 65535, for argparse."""
    if not text.isdecimal() or not low <= int(text) <= 65535:
        raise ArgumentTypeError("%r is not a number from %d to 65535" % (text, low))
    return int(text)


def address(text: str) -> Tuple[str, int]:
    """Read the address of a proxy, for argparse."""
    match = re.match(r"(?:socks5h?://)?\[?([^][/@]+?)\]?:(\d+)/?$", text)
    if not match:
        raise ArgumentTypeError("%r is not HOST:PORT or socks5h://HOST:PORT" % text)
    return match.group(1), number(match.group(2))


def parse(argv: Optional[List[str]]) -> Namespace:
    """Return the options of the command line."""
    parser = ArgumentParser(prog="echo_server.py", description="Echo, or measure a SOCKS5 proxy.")
    add = parser.add_argument
    add("port", nargs="?", type=number, default=7777, help="port to listen on (default: 7777)")
    add("-b", "--bind", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--through", metavar="PROXY", type=address, help="measure the proxy at HOST:PORT or URL")
    add("--user", metavar="NAME", help="log in to the proxy, with $SOCKS5_PASSWORD or a prompt")
    add("--seconds", metavar="S", type=number, help="length of each load (default: 2)")
    add("--sessions", metavar="N", type=lambda n: number(n, 1), help="to hold (default: 500)")
    args = parser.parse_args(argv)
    for name, default in (("user", ""), ("seconds", 2), ("sessions", 500)):
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not args.through:
            parser.error("--%s needs --through" % name)
    return args


def main(argv: Optional[List[str]] = None) -> None:
    """Run the command and exit, with status 1 after an error or if a measurement ends early."""
    args, status = parse(argv), 1
    try:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)
        measure(args) if args.through else serve(args.bind, args.port)
        status = 0
    except Exception as error:
        task = "measure through" if args.through else "listen on"
        complain("cannot %s %s port %d: %s" % (
            task, *(args.through or (args.bind, args.port)), reason(error)))
    finally:
        os._exit(status)  # at once, so that no second Ctrl-C shows a traceback


if __name__ == "__main__":
    main()
