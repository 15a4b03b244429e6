"""Tests of socks5.py and echo_server.py, in the order of their rooms: python -m unittest

Sockets are real and on loopback, ports are free ones, frames are literal bytes in hex. A test
leaves no thread, no descriptor and no ResourceWarning behind: the first cleanup that each test
registers, and so the last that runs, checks that.
"""

import argparse
import collections
import contextlib
import errno
import gc
import io
import logging
import os
import queue
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from unittest import mock

import echo_server
import socks5
from socks5 import Address, Reply

try:
    import pwd
    import resource
except ImportError:  # Windows
    pwd = resource = None

HERE = os.path.dirname(os.path.abspath(__file__))
PATIENCE = 30  # seconds after which a test that waits for something fails
MEBIBYTE = 1 << 20
NO_ROUTE = ("255.255.255.255", 1)  # the kernel refuses it at once: ENETUNREACH or EACCES
USERS = {"alice": "secret", "b\u00fcb": "\u20ac", "x" * 255: "y" * 255}
LOGIN = "05 01 02 01 05 61 6c 69 63 65 06 73 65 63 72 65 74"  # alice, secret
REFUSED = " 00 01 00 00 00 00 00 00"  # the rest of each reply to a request that failed
LINUX_ONLY = unittest.skipUnless(sys.platform.startswith("linux"), "needs Linux")

logging.getLogger("socks5").propagate = False
logging.getLogger("socks5").addHandler(logging.NullHandler())
socks5.LOGIN_PAUSE = 0  # seconds; the test of the pause sets its own
if hasattr(gc, "freeze"):  # from Python 3.7: each test collects garbage, but not the modules
    gc.collect()
    gc.freeze()


# ---- tools -------------------------------------------------------------------------------

def octets(text):
    """Return the bytes that `text` shows in hex; "|" and spaces separate."""
    return bytes.fromhex(text.replace("|", " "))


def port_of(number):
    """Return a port as it stands in a frame."""
    return number.to_bytes(2, "big")


def pattern(count):
    """Return `count` bytes in which a lost or a doubled piece shows."""
    numbers = range(count // 8 + 1)
    return struct.pack(">%dQ" % len(numbers), *numbers)[:count]


def read_all(sock):
    """Return what arrives until the end, and whether that was an "end" or a "reset"."""
    pieces = []
    try:
        for piece in iter(lambda: sock.recv(MEBIBYTE), b""):
            pieces.append(piece)
    except ConnectionResetError:
        return b"".join(pieces), "reset"
    return b"".join(pieces), "end"


def read_count(sock, count):
    """Return exactly `count` bytes."""
    pieces = bytearray()
    while len(pieces) < count:
        piece = sock.recv(count - len(pieces))
        if not piece:
            raise AssertionError("ended after %r" % pieces)
        pieces += piece
    return bytes(pieces)


def reset(sock):
    """Close `sock` with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def wait_until(condition):
    """Wait for something that no descriptor and no lock announces."""
    until = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise AssertionError("waited in vain")
        time.sleep(0.001)


def children(process):
    """Return the child processes of the process with this ID."""
    with open("/proc/%d/task/%d/children" % (process, process)) as listing:
        return [int(child) for child in listing.read().split()]


def fill(sock):
    """Send until the other end has taken nothing for 0.1 seconds; return what was sent."""
    content, sent = pattern(MEBIBYTE), 0
    sock.settimeout(0.1)
    with contextlib.suppress(socket.timeout):
        while sent < 64 * MEBIBYTE:
            sent += sock.send(content[sent % MEBIBYTE:])
    sock.settimeout(PATIENCE)
    return (content * (sent // MEBIBYTE + 1))[:sent]


def flood(sock):
    """Send until the connection breaks."""
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(bytes(MEBIBYTE))


def breaking(methods, peer, error):
    """Return a patch of socket: these methods of a socket that is connected to `peer` raise."""
    where = peer.getsockname()

    def is_connected(sock):
        try:
            return sock.getpeername() == where
        except OSError:
            return False

    def broken(real):
        def method(sock, *args):
            if is_connected(sock):
                raise error
            return real(sock, *args)
        return method
    return mock.patch.multiple(
        socket.socket, **{name: broken(getattr(socket.socket, name)) for name in methods})


def failing(owner, name, errors, concerns=lambda *args: True):
    """Return a patch of `owner.name` that raises `errors`, one a call; None raises nothing."""
    real = getattr(owner, name)

    def fail(*args, **kwargs):
        error = errors.pop(0) if errors and concerns(*args) else None
        if error:
            raise error
        return real(*args, **kwargs)
    return mock.patch.object(owner, name, fail)


def descriptors():
    """Return how many descriptors this process has, where the system lists them."""
    listing = "/proc/self/fd"
    return len(os.listdir(listing)) if os.path.isdir(listing) else 0


def has_ipv6():
    """Return whether this host has ::1."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
        return True
    except OSError:
        return False


def fields(line):
    """Return the name=value words of a log line as a dict."""
    return dict(word.split("=", 1) for word in line.split(" ") if "=" in word)


def hooked(**hooks):
    """Return a handler with these methods; a Mock gets their arguments without the handler."""
    return type("Handler", (socks5.Socks5RequestHandler,), hooks)


def resolver(*addresses, error=None):
    """Return a patch of getaddrinfo that answers socks5.py with `addresses`, or raises."""
    real = socket.getaddrinfo

    def getaddrinfo(name, *args, **kwargs):
        if isinstance(name, str):  # a test's own question: socks5.py asks with bytes
            return real(name, *args, **kwargs)
        if error:
            raise error
        return [(socket.AF_INET6 if ":" in address[0] else socket.AF_INET,
                 socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for address in addresses]
    return mock.patch("socket.getaddrinfo", getaddrinfo)


class Client(socket.socket):
    """A SOCKS5 client whose frames are literal."""

    @classmethod
    def to(cls, address, source=None):
        """Return a client that is connected to `address`, from the address `source`."""
        client = cls(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        client.settimeout(PATIENCE)
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if source:
                client.bind((source, 0))
            client.connect(address[:2])
        except BaseException:
            client.close()
            raise
        return client

    def say(self, frame):
        """Send the bytes that `frame` shows in hex."""
        self.sendall(octets(frame))

    def hear(self, frame):
        """Read as many bytes as `frame` shows, and compare them; "??" is any byte."""
        said = read_count(self, len(octets(frame.replace("??", "00"))))
        expected = frame.replace(" ", "").replace("??", "..")
        if not re.match(expected + "$", said.hex()):
            raise AssertionError("%s is not %s" % (said.hex(), expected))
        return said

    def greet(self):
        """Agree on no authentication; return the client."""
        self.say("05 01 00")
        self.hear("05 00")
        return self

    def log_in(self, user="alice", password="secret", status="00"):
        """Log in with text or bytes, and hear `status`; return the client."""
        self.say("05 01 02 01")
        for word in (user, password):
            word = word if isinstance(word, bytes) else word.encode()
            self.sendall(bytes([len(word)]) + word)
        self.hear("05 02 01" + status)
        return self

    def ask(self, port, host="127.0.0.1", command="01"):
        """Ask for an IPv4 host, or a name, and a port; return the code of the reply."""
        name = host if isinstance(host, bytes) else host.encode()
        where = octets("03") + bytes([len(name)]) + name
        if isinstance(host, str):
            with contextlib.suppress(OSError):
                where = octets("01") + socket.inet_pton(socket.AF_INET, host)
        self.sendall(octets("05" + command + "00") + where + port_of(port))
        return self.read_reply()[0]

    def read_reply(self):
        """Return a reply's code, and its address as a host and a port."""
        _, code, _, kind = self.hear("05 ?? 00 ??")
        family, size = {1: (socket.AF_INET, 4), 4: (socket.AF_INET6, 16)}[kind]
        host = socket.inet_ntop(family, read_count(self, size))
        return code, (host, int.from_bytes(read_count(self, 2), "big"))

    def bind_for(self, address="01 7f 00 00 01 00 00"):
        """Ask for a connection from `address`, in hex; return where the server listens."""
        self.say("05 02 00" + address)
        code, where = self.read_reply()
        if code:
            raise AssertionError("BIND was refused: %d" % code)
        return where


class TestCase(unittest.TestCase):
    """Servers, targets and clients that are closed at the end."""

    def setUp(self):
        caught = warnings.catch_warnings(record=True)
        self.warnings = caught.__enter__()
        warnings.simplefilter("always", ResourceWarning)
        self.addCleanup(self.check_nothing_left, caught,
                        set(threading.enumerate()), descriptors())

    def check_nothing_left(self, caught, threads, count):
        """Fail for a thread, a descriptor or a ResourceWarning that the test leaves behind.

        An abandoned look-up has a moment to end: less than an idle thread would stay.
        """
        for thread in set(threading.enumerate()) - threads:
            thread.join(5)
        gc.collect()
        caught.__exit__(None, None, None)
        self.assertEqual([str(each.message) for each in self.warnings
                          if issubclass(each.category, ResourceWarning)], [])
        self.assertEqual(set(threading.enumerate()) - threads, set())
        self.assertEqual(descriptors(), count)

    def patch(self, patch):
        """Apply `patch` until the end."""
        patch.start()
        self.addCleanup(patch.stop)

    def thread(self, function, *args):
        """Run `function` in a thread that is joined at the end."""
        thread = threading.Thread(target=function, args=args)
        thread.start()
        self.addCleanup(thread.join, PATIENCE)
        return thread

    def send(self, sock, content, close=False, end=False):
        """Send `content` in a thread, which may then close `sock` or end its direction."""
        return self.thread(lambda: (sock.sendall(content), close and sock.close(),
                                    end and sock.shutdown(socket.SHUT_WR)))

    def own(self, sock):
        """Return `sock`, which waits no longer than PATIENCE and is closed at the end."""
        sock.settimeout(PATIENCE)
        self.addCleanup(sock.close)
        return sock

    def listen(self, host="127.0.0.1", backlog=128):
        """Return a listening socket."""
        listener = self.own(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
        listener.bind((host, 0))
        listener.listen(backlog)
        return listener

    def serve(self, handler=socks5.Socks5RequestHandler, host="127.0.0.1", address=None,
              kind=socks5.Socks5Server, **settings):
        """Return a server of the class `kind` that serves, on a free port unless `address` says."""
        server = kind(address or (host, 0), handler, **settings)
        self.addCleanup(server.server_close)
        self.thread(server.serve_forever, 0.02)
        self.addCleanup(server.shutdown)
        return server

    def serve_hook(self, connect, **settings):
        """Return a server whose hook `connect` is this function without arguments."""
        return self.serve(hooked(connect=lambda *_: connect()), **settings)

    def stop(self, server):
        """End `server` and its sessions; all of them have been logged afterwards."""
        server.shutdown()
        server.server_close()

    def echo(self):
        """Return the port of an echo server."""
        server = echo_server.EchoServer(("127.0.0.1", 0), echo_server.EchoRequestHandler)
        server.daemon_threads = False
        self.addCleanup(server.server_close)
        self.thread(server.serve_forever, 0.02)
        self.addCleanup(server.shutdown)
        return server.server_address[1]

    def client(self, server, source=None):
        """Return a client that is connected to `server`, or to a server on a port."""
        address = ("127.0.0.1", server) if isinstance(server, int) else server.server_address
        client = Client.to(address, source)
        self.addCleanup(client.close)
        return client

    def tunnel(self, server=None):
        """Return the two ends of a relay: the client's socket and the target's."""
        listener = self.listen()
        client = self.client(self.serve() if server is None else server).greet()
        self.assertEqual(client.ask(listener.getsockname()[1]), Reply.SUCCEEDED)
        return client, self.own(listener.accept()[0])

    def pair(self):
        """Return two sockets that are connected over TCP."""
        listener = self.listen()
        ours = self.own(socket.create_connection(listener.getsockname()))
        return ours, self.own(listener.accept()[0])

    def black_hole(self):
        """Return the address of a listener that answers no SYN, because its backlog is full."""
        listener = self.listen(backlog=0)
        for _ in range(4):
            sock = self.own(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        return listener.getsockname()

    def dead(self, host="127.0.0.1"):
        """Return an address that refuses: nobody listens, and nobody else gets the port."""
        sock = self.own(socket.socket())
        sock.bind((host, 0))
        return sock.getsockname()

    def datagrams(self, host="127.0.0.1", port=0):
        """Return a socket for datagrams."""
        sock = self.own(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET,
                                      socket.SOCK_DGRAM))
        sock.bind((host, port))
        return sock

    def web_server(self):
        """Return the port of a page that says "page", once."""
        listener = self.listen()

        def answer():
            with listener.accept()[0] as sock:
                while b"\r\n\r\n" not in sock.recv(65536):
                    pass
                sock.sendall(b"HTTP/1.0 200 OK\r\n\r\npage")

        self.thread(answer)
        return listener.getsockname()[1]

    def check_one_way(self, source, sink):
        """Check that bytes go from `source` to `sink`."""
        source.sendall(b"ping")
        self.assertEqual(read_count(sink, 4), b"ping")

    def check_relay(self, client, target):
        """Check that bytes go both ways."""
        self.check_one_way(client, target)
        self.check_one_way(target, client)

    def check_echo(self, client, port):
        """Check that `client`, which has greeted, reaches the echo server on `port`."""
        self.assertEqual(client.ask(port), Reply.SUCCEEDED)
        self.check_relay(client, client)

    def file(self, content, mode=0o600):
        """Return the path of a file with this content, which is removed at the end."""
        handle, path = tempfile.mkstemp()
        self.addCleanup(os.remove, path)
        os.close(handle)
        self.write(path, content)
        os.chmod(path, mode)
        return path

    def write(self, path, content):
        """Give a file new content."""
        with open(path, "wb") as file:
            file.write(content)

    @contextlib.contextmanager
    def within(self, seconds):
        """Fail if the block takes longer: each test of a deadline has an upper bound."""
        start = time.monotonic()
        yield
        self.assertLess(time.monotonic() - start, seconds)

    @contextlib.contextmanager
    def logged(self, level="INFO"):
        """Give a list that fills with the messages that socks5.py logs in the block."""
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logger = logging.getLogger("socks5")
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(level)
        try:
            yield lines
        finally:
            logger.setLevel(before)
            logger.removeHandler(handler)

    @contextlib.contextmanager
    def ending(self, end):
        """Check that the first session that ends in the block, or soon, has `end` in the log."""
        with self.logged() as lines:
            yield lines
            self.assertEqual(self.session_line(lines)["end"], end)

    def session_line(self, lines):
        """Return the fields of the first session line, once it is there."""
        wait_until(lambda: any(line.startswith("session ") for line in lines))
        return fields(next(line for line in lines if line.startswith("session ")))


class Clock:
    """A stand-in for time.monotonic that can jump, and knows which threads have looked at it."""

    def __init__(self):
        self.real = time.monotonic
        self.ahead = 0  # seconds
        self.looks = []  # threads
        self.at_next_look = {}  # functions to call, by thread

    def __call__(self):
        thread = threading.current_thread()
        self.looks.append(thread)
        self.at_next_look.pop(thread, int)()
        return self.real() + self.ahead

    def jump(self, seconds):
        self.ahead += seconds


class SweepTestCase(TestCase):
    """Tests of servers that look at their deadlines often."""

    def setUp(self):
        super().setUp()
        self.patch(mock.patch.object(socks5, "SWEEP_INTERVAL", 0.02))

    def report(self, server):
        """Return what `server` says of its live sessions, and its totals."""
        with self.logged() as lines:
            server.report()
        return ([fields(line) for line in lines if line.startswith("live ")],
                fields(next(line for line in lines if line.startswith("totals "))))

    def is_served(self, server, source=None):
        """Return whether a client gets an answer; it leaves then."""
        with Client.to(("127.0.0.1", server.server_address[1]), source) as client:
            client.settimeout(8)
            with contextlib.suppress(OSError):
                client.say("05 01 00")
                return client.recv(2) == octets("05 00")
            return False

    def serve_in(self, handler=socks5.Socks5RequestHandler, **settings):
        """Return a server that serves, and the thread that accepts and sweeps."""
        threads = []

        class Server(socks5.Socks5Server):
            def serve_forever(self, *args):
                threads.append(threading.current_thread())
                super().serve_forever(*args)

        server = self.serve(handler, kind=Server, **settings)
        wait_until(lambda: threads)
        return server, threads[0]

    def slow_tunnel(self, server):
        """Return the ends of a relay whose client has little room for what it does not read."""
        client, listener = self.own(Client()), self.listen()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        client.connect(server.server_address)
        client.greet().ask(listener.getsockname()[1])
        return client, self.own(listener.accept()[0])

    def check_sweeping(self, server):
        """Fail unless `server` still accepts, serves, and ends a silent client in time."""
        self.assertTrue(self.is_served(server))
        server.settings = socks5.Settings(handshake_timeout=0.05)
        client = self.client(server)
        client.settimeout(8)
        self.assertEqual(read_all(client), (b"", "end"))


@unittest.skipUnless(os.name == "posix", "signals and descriptors as POSIX has them")
class CommandTestCase(TestCase):
    """Tests of commands in a process of their own."""

    def start(self, *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, descriptors=None,
              **options):
        """Return a Python that runs `command`, perhaps with few descriptors."""
        def prepare():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if descriptors:
                resource.setrlimit(resource.RLIMIT_NOFILE, descriptors)

        options.setdefault("preexec_fn", prepare)
        process = subprocess.Popen(
            (sys.executable,) + command, cwd=HERE, stdout=stdout, stderr=stderr,
            universal_newlines=True, **options)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                self.addCleanup(stream.close)
        self.addCleanup(process.wait, PATIENCE)
        self.addCleanup(process.kill)
        return process

    def port(self, process):
        """Return the port in the first line that `process` prints."""
        return int(re.search(r" port (\d+) ", process.stdout.readline()).group(1))

    def serve_command(self, *options, **settings):
        """Start `socks5.py` with `options` on a free port; return the process and the port."""
        process = self.start("socks5.py", *options, "0", **settings)
        return process, self.port(process)

    def run_to_end(self, *command, **settings):
        """Return the exit status of `command`, and what it says on stderr."""
        process = self.start(*command, **settings)
        err = process.communicate(timeout=PATIENCE)[1]
        self.assertNotIn("Traceback", err or "")
        return process.returncode, err


# ---- vocabulary --------------------------------------------------------------------------

RFC_REPLIES = [
    "succeeded", "general SOCKS server failure", "connection not allowed by ruleset",
    "Network unreachable", "Host unreachable", "Connection refused", "TTL expired",
    "Command not supported", "Address type not supported"]


class VocabularyTest(TestCase):
    def test_numbers_and_phrases_are_the_rfc_s(self):
        self.assertEqual([(int(reply), reply.phrase) for reply in Reply],
                         list(enumerate(RFC_REPLIES)))
        self.assertEqual(list(map(int, socks5.Command)), [1, 2, 3])
        self.assertEqual(list(map(int, socks5.AddressType)), [1, 3, 4])
        self.assertEqual(list(map(int, socks5.Method)), [0, 1, 2, 255])

    @unittest.skipIf(sys.flags.optimize > 1, "-OO removes docstrings")
    def test_public_names_exist(self):
        for name in socks5.__all__:
            self.assertTrue(getattr(socks5, name).__doc__, name)


# ---- failures ----------------------------------------------------------------------------

class FailuresTest(TestCase):
    def test_reply_for(self):
        for error, reply in [
                (OSError(errno.EACCES, ""), 2), (OSError(errno.EPERM, ""), 2),
                (OSError(errno.ENETUNREACH, ""), 3), (OSError(errno.EHOSTUNREACH, ""), 4),
                (socket.gaierror(socket.EAI_NONAME, "unknown"), 4),
                (socket.gaierror(errno.ECONNREFUSED, "a number of another series"), 4),
                (OSError(errno.ECONNREFUSED, ""), 5), (ConnectionRefusedError(), 1),
                (OSError(errno.ETIMEDOUT, ""), 6), (socket.timeout("timed out"), 6),
                (socks5.RequestError(Reply.NOT_ALLOWED), 2),
                (OSError(errno.EMFILE, ""), 1), (OSError("Connection refused"), 1),
                (ValueError("Connection refused"), 1)]:
            with self.subTest(error=repr(error)):
                self.assertEqual(socks5.reply_for(error), reply)


# ---- frames ------------------------------------------------------------------------------

FRAMES = [  # reader, bytes, what they mean
    (socks5.read_methods, "05 00", b""),
    (socks5.read_methods, "05 01 00", b"\0"),
    (socks5.read_methods, "05 03 00 01 02", b"\0\1\2"),
    (socks5.read_methods, "05 ff" + " 80" * 255, b"\x80" * 255),
    (socks5.read_credentials, "01 05 61 6c 69 63 65 02 70 77", (b"alice", b"pw")),
    (socks5.read_credentials, "01 00 00", (b"", b"")),
    (socks5.read_credentials, "01 ff" + " ff" * 255 + " ff" + " 00" * 255,
     (b"\xff" * 255, b"\0" * 255)),
    (Address.read, "01 7f 00 00 01 04 38", ("127.0.0.1", 1080)),
    (Address.read, "04 20 01 0d b8 00 00 00 00 00 00 00 00 00 00 00 01 ff ff",
     ("2001:db8::1", 65535)),
    (Address.read, "03 0b 65 78 61 6d 70 6c 65 2e 63 6f 6d 01 bb", ("example.com", 443)),
    (Address.read, "03 00 00 50", ("", 80)),
    (Address.read, "03 03 61 00 62 00 50", ("a\0b", 80)),
    (Address.read, "03 02 c3 bc 00 00", ("\u00fc", 0)),
    (Address.read, "03 01 ff 00 50", ("\udcff", 80)),
    (Address.read, "03 ff" + " 61" * 255 + " 00 50", ("a" * 255, 80)),
    (socks5.Request.read, "05 01 00 01 0a 00 00 01 00 16", (1, ("10.0.0.1", 22))),
    (socks5.Request.read, "05 03 00 03 01 78 00 00", (3, ("x", 0))),
    (socks5.Request.read, "05 09 ee 03 01 78 00 00", (9, ("x", 0))),
]

DATAGRAMS = [  # bytes, how many of them are the header, what they mean
    ("00 00 00 01 7f 00 00 01 00 35 | 61 62", 10, (0, ("127.0.0.1", 53), b"ab")),
    ("00 00 00 01 7f 00 00 01 00 35", 10, (0, ("127.0.0.1", 53), b"")),
    ("00 00 81 03 01 78 ff ff | 00", 8, (129, ("x", 65535), b"\0")),
    ("00 00 00 04 20 01 0d b8 00 00 00 00 00 00 00 00 00 00 00 01 00 01 | ff", 22,
     (0, ("2001:db8::1", 1), b"\xff")),
]


class OneAtATime(io.RawIOBase):
    """A stream that gives one byte for each read."""

    def __init__(self, content):
        super().__init__()
        self.content = iter(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        for byte in self.content:
            buffer[0] = byte
            return 1
        return 0


class FramesTest(TestCase):
    def test_whole_byte_by_byte_and_cut(self):
        for read, frame, meaning in FRAMES:
            whole = octets(frame)
            with self.subTest(frame=frame[:40]):
                stream = io.BufferedReader(io.BytesIO(whole + b"rest"))
                self.assertEqual(read(stream), meaning)
                self.assertEqual(stream.read(), b"rest")
                self.assertEqual(read(io.BufferedReader(OneAtATime(whole))), meaning)
                for end in range(0, len(whole), 1 if len(whole) < 100 else 40):
                    with self.assertRaisesRegex(socks5.ProtocolError, "client-left"):
                        read(io.BufferedReader(io.BytesIO(whole[:end])))

    def test_datagrams(self):
        for frame, header, meaning in DATAGRAMS:
            with self.subTest(frame=frame):
                self.assertEqual(socks5.Datagram.read(io.BytesIO(octets(frame))), meaning)
                self.assertEqual(socks5.Datagram.read(
                    io.BufferedReader(OneAtATime(octets(frame)))), meaning)
                for end in range(header):
                    with self.assertRaises(socks5.ProtocolError):
                        socks5.Datagram.read(io.BytesIO(octets(frame)[:end]))
                if meaning[1][0] != "x":  # the server sends no names
                    fragment, address, data = meaning
                    self.assertEqual(socks5.Datagram(fragment, Address(*address), data).pack(),
                                     octets(frame))

    def test_broken_in_mid_frame(self):
        ours, theirs = socket.socketpair()
        with ours, theirs, mock.patch.object(
                socket.SocketIO, "readinto", side_effect=ConnectionResetError):
            stream = ours.makefile("rb")
            with stream, self.assertRaisesRegex(socks5.ProtocolError, "client-left"):
                socks5.read_methods(stream)

    def test_addresses_of_sockets(self):
        for sockaddr, text in [
                (("127.0.0.1", 80), "127.0.0.1:80"), (("::1", 80, 0, 0), "[::1]:80"),
                (("fe80::1%lo", 80, 0, 1), "[fe80::1]:80"),
                (("::ffff:10.0.0.1", 80, 0, 0), "10.0.0.1:80"), ("", "0.0.0.0:0")]:
            self.assertEqual(str(Address.of(sockaddr)), text)


# ---- rules -------------------------------------------------------------------------------

ALLOWED, DENIED = Reply.TTL_EXPIRED, Reply.NOT_ALLOWED  # what RuleHandler answers
RULE_USERS = {"alice": "x", "bob": "x", "a@b": "x"}


class RuleHandler(socks5.Socks5RequestHandler):
    """Say what the rules say about a destination, and dial nothing."""

    def connect(self, destination):
        self.permitted(destination, time.monotonic() + PATIENCE)
        raise socks5.RequestError(ALLOWED)


class ServerFromAfar(socks5.Socks5Server):
    """A server whose clients seem to come from an address that is not this host's."""

    address = ("10.9.9.9", 5)

    def get_request(self):
        return super().get_request()[0], self.address


class RulesTestCase(TestCase):
    """Tests of what a client may reach."""

    def serve_to(self, address, *args, **settings):
        """Return a server to which all clients seem to come from `address`."""
        return self.serve(*args, kind=type("Server", (ServerFromAfar,), {"address": address}),
                          **settings)

    def ask(self, server, host, *answers, port=80, user=None):
        """Return the reply about `host`, which is at `answers`; `line` is then the session's."""
        with self.logged() as lines, Client.to(server.server_address) as client:
            client.log_in(user, "x") if user else client.greet()
            with resolver(*answers):
                reply = client.ask(port, host)
            reset(client)
            self.line = self.session_line(lines)
        return reply


class RulesTest(RulesTestCase):
    def ask_about(self, server, address, port, name="", user=None):
        """Return the reply about an address, or about a name that is there."""
        return self.ask(server, name or address, (address, port), port=port, user=user)

    def test_forms(self):
        server = self.serve(RuleHandler)
        for rule, yes, no in [  # questions: as `ask_about` takes them
                ("*", [("10.0.0.1", 80, "a.example"), ("::1", 0)], []),
                ("*:80", [("10.0.0.1", 80)], [("10.0.0.1", 81)]),
                ("*:80-82", [("10.0.0.1", port) for port in (80, 81, 82)],
                 [("10.0.0.1", port) for port in (79, 83)]),
                ("10.0.0.1", [("10.0.0.1", 80), ("10.0.0.1", 80, "a.example")],
                 [("10.0.0.2", 80), ("::1", 80), ("10.0.0.2", 80, "a.example")]),
                ("10.0.0.0/8:80", [("10.255.0.1", 80)], [("11.0.0.1", 80), ("10.0.0.1", 8)]),
                ("2001:db8::1", [("2001:db8::1", 80)], [("2001:db8::", 80)]),
                ("[2001:db8::]:1", [("2001:db8::", 1)], [("2001:db8::1", 80)]),
                ("2001:db8::/32", [("2001:db8:ffff::", 80)], [("10.0.0.1", 80)]),
                ("[2001:db8::/32]:80", [("2001:db8::", 80)], [("2001:db8::", 8)]),
                ("a.example", [("10.0.0.1", 80, "A.Example.")],
                 [("10.0.0.1", 80, "b.a.example"), ("10.0.0.1", 80),
                  ("10.0.0.1", 80, "aa.example")]),
                ("A.EXAMPLE.:80", [("::1", 80, "a.example")], [("::1", 8, "a.example")]),
                ("b\u00fccher.example", [("::1", 80, "xn--bcher-kva.example"),
                                         ("::1", 80, "b\u00fccher.example")], []),
                ("*.example", [("::1", 80, name) for name in (
                    "example", "a.example", "b.a.example.")],
                 [("::1", 80, "anexample"), ("::1", 80, "example.com"), ("10.0.0.1", 80)]),
                ("alice@*", [("::1", 1, "", "alice")], [("::1", 1, "", "bob")]),
                ("alice@a.example", [("::1", 1, "a.example", "alice")],
                 [("::1", 1, "a.example", "bob")]),
                ("a@b@10.0.0.1:22", [("10.0.0.1", 22, "", "a@b")],
                 [("10.0.0.1", 22, "", "bob")])]:
            for verb, ifyes, ifno in (("allow ", ALLOWED, DENIED), ("deny ", DENIED, ALLOWED)):
                server.settings = socks5.Settings(
                    rules=[verb + rule], users=RULE_USERS if "@" in rule else None)
                for expected, questions in ((ifyes, yes), (ifno, no)):
                    for question in questions:
                        with self.subTest(verb + rule, question=question):
                            self.assertEqual(self.ask_about(server, *question), expected)

    def test_bad_rules_are_quoted_and_explained(self):
        for rule, why in [
                ("", "HOST"), (":80", "HOST"), ("a:", "HOST"), ("a:http", "HOST"), ("@a", "HOST"),
                ("[::1", "HOST"), ("[::1]80", "HOST"), ("a b", "not an address, a network"),
                ("a:70000", "ports"),
                ("a:2-1", "ports"), ("10.0.0.1/8", "did you mean 10.0.0.0/8?"),
                ("10.0.0.256", "does not appear"),
                ("10.0.0.0/33", "does not appear"), ("::g", "does not appear"),
                ("192.168.", "does not appear"),
                ("0x7f000001", "does not appear"), ("0X7f000001", "does not appear"),
                ("\u2024", "not an address, a network"), ("a*.example", "not an address"),
                ("*.*.example", "not an address, a network"), ("*.", "not an address"),
                ("a..b", "not an address, a network"),
                ("::ffff:10.0.0.1", "IPv4"), ("::ffff:10.0.0.0/104", "IPv4")]:
            with self.subTest(rule=rule), self.assertRaises(ValueError) as caught:
                socks5.Settings(rules=["deny *", "allow " + rule])
            self.assertIn(repr("allow " + rule), str(caught.exception))
            self.assertIn(why, str(caught.exception))
        with self.assertRaises(ValueError):
            socks5.Settings(rules=["permit *"])

    def test_first_match_decides(self):
        server = self.serve(RuleHandler)
        for rules, expected, text in [
                ([], ALLOWED, "-"), (["deny 10.0.0.2"], ALLOWED, "-"),
                (["allow 10.0.0.2"], DENIED, "default"),
                (["deny 10.0.0.2", "allow 10.0.0.3"], DENIED, "default"),
                (["allow 10.0.0.3", "deny 10.0.0.2"], DENIED, "default"),
                (["deny 10.0.0.1", "allow *"], DENIED, "deny:10.0.0.1"),
                (["allow *", "deny 10.0.0.1"], ALLOWED, "-")]:
            with self.subTest(rules):
                server.settings = socks5.Settings(rules=rules)
                self.assertEqual((self.ask(server, "10.0.0.1"), self.line["rule"]),
                                 (expected, text))

    def test_what_is_denied_unasked(self):
        here, afar, mapped = ("127.0.0.1", 5), ("10.9.9.9", 5), ("::ffff:10.9.9.9", 5, 0, 0)
        for client in (here, ("::1", 5, 0, 0), afar, mapped):
            server = self.serve_to(client, RuleHandler)
            for host, rule, from_here, from_afar in [
                    ("169.254.169.254", "169.254.0.0/16", DENIED, DENIED),
                    ("fe80::1", "fe80::/10", DENIED, DENIED),
                    ("fe80:0:0:1::1", "fe80::/10", DENIED, DENIED),
                    ("febf:ffff::", "fe80::/10", DENIED, DENIED), ("fec0::", "", ALLOWED, ALLOWED),
                    ("127.0.0.1", "127.0.0.0/8", ALLOWED, DENIED),
                    ("127.255.0.1", "127.0.0.0/8", ALLOWED, DENIED),
                    ("::1", "::1", ALLOWED, DENIED), ("0.0.0.0", "0.0.0.0", ALLOWED, DENIED),
                    ("::", "::", ALLOWED, DENIED), ("10.0.0.1", "", ALLOWED, ALLOWED)]:
                expected = from_afar if client in (afar, mapped) else from_here
                with self.subTest(host=host, client=client):
                    server.settings = socks5.Settings()
                    text = "built-in:" + rule if expected == DENIED else "-"
                    for question in ((host,), ("a.example", (host, 80))):
                        self.assertEqual((self.ask(server, *question), self.line["rule"]),
                                         (expected, text))
                    server.settings = socks5.Settings(rules=["allow " + host])
                    self.assertEqual(self.ask(server, host), ALLOWED)
                    server.settings = socks5.Settings(rules=["deny " + host, "allow *"])
                    self.assertEqual(self.ask(server, host), DENIED)

    def test_mapped_addresses_are_ipv4(self):
        server = self.serve(RuleHandler, rules=["deny 127.0.0.0/8"])
        reply = self.ask(server, "a.example", ("::ffff:127.0.0.1", 9, 0, 0))
        self.assertEqual((reply, self.line["rule"]), (DENIED, "deny:127.0.0.0/8"))
        self.assertEqual(self.ask(server, "::ffff:127.0.0.1"), DENIED)
        self.assertEqual(self.ask(server, "::ffff:169.254.169.254"), DENIED)
        with Client.to(server.server_address) as client:
            client.greet().say("05 01 00 04" + " 00" * 10 + " ff ff a9 fe a9 fe 00 50")
            client.hear("05 02" + REFUSED)


class PermissionTest(RulesTestCase):
    """Rules, as they meet the dialing."""

    @contextlib.contextmanager
    def dialed(self):
        """Give a list of the addresses to which other threads connect in the block."""
        addresses, mine = [], threading.current_thread()

        def watch(real):
            def connect(sock, address):
                if threading.current_thread() is not mine:
                    addresses.append(address[:2])
                return real(sock, address)
            return connect

        with mock.patch.multiple(socket.socket, connect=watch(socket.socket.connect),
                                 connect_ex=watch(socket.socket.connect_ex)):
            yield addresses

    def test_only_addresses_that_passed_are_dialed(self):
        good, dead = self.listen().getsockname(), self.dead("127.0.0.3")
        server = self.serve()
        for rule, addresses, reply, dialed, text in [
                ("deny 127.0.0.2", [("127.0.0.2", good[1]), good], 0, [good], "-"),
                ("allow 127.0.0.3", [good, dead], 5, [dead], "-"),
                ("deny 127.0.0.0/8", [good], 2, [], "deny:127.0.0.0/8"),
                ("deny SECRET.example", [good], 2, [], "deny:SECRET.example")]:
            server.settings = socks5.Settings(rules=[rule])
            with self.subTest(rule), self.dialed() as seen:
                self.assertEqual(self.ask(server, "Secret.EXAMPLE.", *addresses), reply)
                self.assertEqual((seen, self.line["rule"]), (dialed, text))
                self.assertEqual((self.line["reached"], self.line["end"]), (
                    "%s:%d" % good, "client-reset") if not reply else ("-", "refused"))

    def test_name_that_is_allowed_is_reached(self):
        server = self.serve(rules=["allow *.example"])
        target = self.listen().getsockname()
        self.assertEqual(self.ask(server, "a.example", target), 0)
        self.assertEqual(self.ask(server, "a.other", target), 2)

    def test_no_second_look_up(self):
        answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)] for address in (
            self.listen().getsockname(), ("169.254.169.254", 80))]
        client = self.client(self.serve()).greet()
        with mock.patch("socket.getaddrinfo", side_effect=answers) as getaddrinfo:
            self.assertEqual(client.ask(80, "x"), 0)
        self.assertEqual(getaddrinfo.call_count, 1)

    def test_names_that_nothing_allows_are_not_looked_up(self):
        for rules, text in ((["deny *"], "deny:*"), (["allow other.example", "allow alice@*"],
                                                     "default"), (["allow *:443"], "default")):
            with self.subTest(rules), mock.patch("socket.getaddrinfo", side_effect=AssertionError):
                client = self.client(self.serve(rules=rules)).greet()
                with self.logged() as lines:
                    self.assertEqual(client.ask(80, "a.example"), 2)
                    client.close()
                    self.assertEqual(self.session_line(lines)["rule"], text)


# ---- users -------------------------------------------------------------------------------

class UsersFileTest(TestCase):
    def test_good_files(self):
        for content, users in [
                (b"alice:secret", {"alice": "secret"}),
                (b"\xef\xbb\xbfalice:a:b \r\n\r\n  \n# no:body\nb\xc3\xbcb:\xe2\x82\xac\n",
                 {"alice": "a:b ", "b\u00fcb": "\u20ac"}),
                (b"\xef\xbb\xbf# no:body\na:b", {"a": "b"}),
                ("a:1\n\ufeffb:2\n\ufeff#c:3".encode(),  # no byte order marks: not the first line
                 {"a": "1", "\ufeffb": "2", "\ufeff#c": "3"}),
                (b"alice:pass#word # 1\nal#ice:#\n", {"alice": "pass#word # 1", "al#ice": "#"}),
                (b"a" * 255 + b":" + b"b" * 255, {"a" * 255: "b" * 255})]:
            with self.subTest(content[:20]):
                self.assertEqual(socks5.load_users(self.file(content)), users)

    def test_bad_files(self):
        for content, message in [
                (b"", "no users"), (b"# alice:hunter2\n", "no users"),
                (b"a:b\nhunter2\n", "line 2"), (b":hunter2", "line 1"), (b"hunter2:", "line 1"),
                (b"a" * 256 + b":hunter2", "line 1"), (b"a:" + b"hunter2" * 37, "line 1"),
                (b"\xc3\xbc" * 128 + b":hunter2", "line 1"),
                (b"a:hunter2" + b"\xc3\xbc" * 128, "line 1"),
                (b"a:b\n\na:hunter2", "line 3"), (b"a:\xffhunter2", "line 1")]:
            path = self.file(content)
            with self.subTest(content=content[:20]), self.assertRaises(ValueError) as caught:
                socks5.load_users(path)
            self.assertIn(message, str(caught.exception))
            self.assertIn(path, str(caught.exception))
            self.assertNotIn("hunter2", str(caught.exception))


class UsersTest(TestCase):
    def test_names_that_are_not_utf_8(self):
        for handler, status, failed, user in [
                (socks5.Socks5RequestHandler, "01", ["\\udcff"], "-"),
                (hooked(authenticate=lambda _, name, password: name == b"\xff"), "00", [],
                 "\\udcff")]:
            with self.subTest(status), self.logged() as lines:
                self.client(self.serve(handler, users=USERS)).log_in(
                    b"\xff", b"secret", status).close()
                self.assertEqual(self.session_line(lines)["user"], user)
                self.assertEqual([fields(line)["user"] for line in lines
                                  if line.startswith("login failed")], failed)


# ---- settings ----------------------------------------------------------------------------

class SettingsTest(TestCase):
    TIMES = ("connect_timeout", "handshake_timeout", "idle_timeout", "linger", "bind_timeout",
             "udp_timeout")

    def test_good(self):
        for settings in [
                {}, {"users": {"\u00fc" * 127: "y" * 255}}, {"idle_timeout": None},
                {"max_sessions": 1, "max_per_client": 1}, {"commands": []},
                {"udp_ports": range(4000, 4002), "udp_advertise": "2001:db8::1"},
                dict.fromkeys(self.TIMES, 1), dict.fromkeys(self.TIMES, 0.001),
                dict.fromkeys(self.TIMES, float("inf"))]:
            with self.subTest(settings):
                socks5.Settings(**settings)

    def test_bad(self):
        rows = [(ValueError, "users", users, "users" if users == {} else "") for users in (
            {}, {"": "x"}, {"x": ""}, {"x" * 256: "x"}, {"x": "x" * 256}, {"\u00fc" * 128: "x"},
            {"x": "\u00fc" * 128})]
        for name, value, names in [
                ("rules", ["deny"], "deny"), ("clients", ["10.0.0.1/8"], "10.0.0.1/8"),
                ("clients", ["::ffff:10.0.0.1"], "IPv4"), ("clients", ["a.example"], "a.example"),
                ("commands", ["connect", "associate"], "associate"),
                ("commands", ["CONNECT"], "CONNECT"), ("udp_advertise", "localhost", "localhost"),
                ("udp_advertise", "fe80::1%lo", "fe80::1%lo")]:
            rows.append((ValueError, name, value, names))
        for name in self.TIMES:
            rows += [(TypeError, name, value, name) for value in ("5", [5])]
            rows += [(TypeError, name, None, name)] * (name != "idle_timeout")
            rows += [(ValueError, name, value, name) for value in (0, -0.5, float("nan"))]
        for name in ("max_sessions", "max_per_client"):
            rows += [(TypeError, name, value, name) for value in ("5", 1.5)]
            rows += [(ValueError, name, value, name) for value in (0, -1)]
        rows += [(ValueError, "udp_ports", [port], "udp_ports") for port in (-1, 65536)]
        rows += [(TypeError, "udp_ports", [port], "udp_ports") for port in ("x", 1.5)]
        rows += [(TypeError, "users", users, "users") for users in ({b"a": "b"}, {"a": b"b"})]
        rows += [(TypeError, name, [5], "5") for name in ("clients", "proxy_from")]
        for error, name, value, names in rows:
            with self.subTest(name, value=value), self.assertRaises(error) as caught:
                socks5.Settings(**{name: value})
            self.assertIn(names, str(caught.exception))


# ---- threads -----------------------------------------------------------------------------

class ThreadsTest(TestCase):
    def session(self, server):
        """Have a short session, which is over when this returns."""
        with Client.to(server.server_address) as client:
            client.say("05 01 02")
            client.hear("05 ff")
        server.drain(PATIENCE)

    def sessions_at_once(self, server, count):
        """Have `count` sessions at the same time, which are over when this returns."""
        clients = [self.client(server).greet() for _ in range(count)]
        for client in clients:
            client.close()
        server.drain(PATIENCE)

    def test_threads_are_reused(self):
        server, started = self.serve(), []
        real = threading.Thread.start
        with mock.patch.object(threading.Thread, "start", lambda thread: (
                started.append(thread), real(thread))):
            for _ in range(20):
                for sock in self.tunnel(server):
                    sock.close()
                server.drain(PATIENCE)
        self.assertLess(len(started), 20)  # of 40 that 20 relays need

    def test_surplus_threads_leave_though_there_is_work(self):
        with mock.patch.object(socks5, "IDLE_TIME", 0.2), self.within(6):
            server = self.serve()
            count = threading.active_count()
            self.sessions_at_once(server, 8)
            wait_until(lambda: self.session(server) or threading.active_count() < count + 4)

    def test_threads_are_forgotten(self):
        def known():
            gc.collect()
            return sum(issubclass(type(each), threading.Thread) for each in gc.get_objects())

        with mock.patch.multiple(socks5, IDLE_TIME=0.01, SWEEP_INTERVAL=0.02), self.within(10):
            server = self.serve()
            count = known()
            self.sessions_at_once(server, 10)
            wait_until(lambda: known() <= count)

    def test_thread_that_is_taken_at_the_last_moment(self):
        with mock.patch.object(socks5, "IDLE_TIME", 0.001):
            server = self.serve()
            for number in range(100):
                self.session(server)
                time.sleep(0.0008 + number % 10 * 0.00005)

    def test_failure_costs_a_thread_nothing(self):
        threads = []

        class Handler(socks5.Socks5RequestHandler):
            def select_method(self, offered):
                threads.append(threading.current_thread())
                raise ValueError

        class Server(socks5.Socks5Server):
            def handle_error(self, request, client_address):
                raise ZeroDivisionError("hunter2")

        server = self.serve(Handler, kind=Server)
        for _ in range(5):
            with self.logged() as lines, Client.to(server.server_address) as client:
                client.say("05 01 00")
                self.assertEqual(read_all(client)[0], b"")
                wait_until(lambda lines=lines: any("thread failed" in line for line in lines))
            self.assertIn("thread failed error=ZeroDivisionError", lines)
            self.assertNotIn("hunter2", "".join(lines))
        self.assertLess(len(set(threads)), 5)

    def test_none_is_left_when_a_server_is_closed(self):
        before = set(threading.enumerate())
        server = self.serve()
        self.sessions_at_once(server, 5)
        self.tunnel(server)
        with self.within(6):  # idle threads would stay for ten seconds
            self.stop(server)
            wait_until(lambda: set(threading.enumerate()) <= before)

    def test_thread_may_leave_at_any_moment_of_the_closing(self):
        threads = []

        class Handler(socks5.Socks5RequestHandler):
            def select_method(self, offered):
                threads.append(threading.current_thread())
                return 255

        def trace(frame, event, _):
            if frame.f_globals.get("__name__") != "socks5":
                return None
            if event == "line":
                lines.append(frame)
                if len(lines) == number:
                    threads[0].join(0.2)  # it has nothing to do: it leaves, or is to be told so
            return trace

        with mock.patch.object(socks5, "IDLE_TIME", 0.02):
            for number in range(1, 100):
                lines, threads[:] = [], []
                server = socks5.Socks5Server(("127.0.0.1", 0), Handler)
                self.addCleanup(server.server_close)
                with Client.to(server.server_address) as client:
                    server.handle_request()
                    client.say("05 01 02")
                    client.hear("05 ff")
                server.drain(PATIENCE)
                before = sys.gettrace()
                sys.settrace(trace)
                try:
                    server.server_close()
                finally:
                    sys.settrace(before)
                if len(lines) < number:  # it has waited before each line
                    break

    def test_importing_leaves_the_interpreter_alone(self):
        def state():
            return (sys.getswitchinterval(), threading.active_count(),
                    os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None)

        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(0.0125)
        usual = threading.stack_size(MEBIBYTE)  # each call sets it, and returns what it was
        before = state()
        with mock.patch.dict(sys.modules):
            del sys.modules["socks5"]
            self.assertIsNot(__import__("socks5"), socks5)
        self.assertEqual((threading.stack_size(usual), state()), (MEBIBYTE, before))


# ---- dialing -----------------------------------------------------------------------------

class DialTest(TestCase):
    def dial(self, *addresses, **settings):
        """Return the reply to a request for a name that is at `addresses`."""
        client = self.client(self.serve(**settings)).greet()
        with resolver(*addresses):
            return client.ask(80, "x.example")

    def test_names(self):
        for host, asked in [
                ("localhost", b"localhost"), ("example.com.", b"example.com."),
                ("_dmarc.example", b"_dmarc.example"), ("b\u00fccher.example",
                                                        b"xn--bcher-kva.example"),
                ("a" * 63 + ".example", b"a" * 63 + b".example")]:
            client = self.client(self.serve()).greet()
            with self.subTest(host), mock.patch("socket.getaddrinfo",
                                                side_effect=socket.gaierror) as getaddrinfo:
                self.assertEqual(client.ask(81, host), 4)
                self.assertEqual(getaddrinfo.call_args[0], (asked, 81))

    def test_odd_names_and_literals_are_not_looked_up(self):
        port, server = self.dead()[1], self.serve()
        with mock.patch("socket.getaddrinfo", side_effect=AssertionError):
            for host in ("", ".", "a..b", ".a", "a b", " ", "localhost\0.example", "\0", "a\tb",
                         "a\x7f", "::1%\0.example", "::1%\udcff", "a\u3000b", "\udcff", "a" * 64,
                         "\u00fc" * 100, "b\u00fc\0cher", "127.0.0.1"):
                host = host.encode("utf-8", "surrogateescape")
                with self.subTest(host), Client.to(server.server_address) as client:
                    self.assertEqual(client.greet().ask(port, host),
                                     5 if host == b"127.0.0.1" else 4)
            self.assertEqual(self.client(server).greet().ask(port), 5)

    def test_second_address(self):
        hosts = ["127.0.0.1", "127.0.0.1", *(["::1"] if has_ipv6() else [])]
        for host, first in zip(hosts, (self.dead(), self.black_hole(), self.dead())):
            listener = self.listen(host)
            self.assertEqual(self.dial(first, listener.getsockname()[:2]), 0)
            self.own(listener.accept()[0])

    def test_a_failure_starts_the_next_attempt_at_once(self):
        target = self.listen().getsockname()
        with mock.patch.object(socks5, "ATTEMPT_DELAY", PATIENCE), self.within(6):
            self.assertEqual(self.dial(self.dead(), NO_ROUTE, self.dead(), target,
                                       connect_timeout=2 * PATIENCE), 0)

    def test_silence_starts_the_next_attempt_after_a_delay(self):
        target = self.listen().getsockname()
        with mock.patch.object(socks5, "ATTEMPT_DELAY", 0.1), self.within(6):
            start = time.monotonic()
            self.assertEqual(self.dial(self.black_hole(), self.black_hole(), target), 0)
            self.assertGreaterEqual(time.monotonic() - start, 0.19)

    def test_first_error_counts(self):
        self.assertEqual(self.dial(self.dead(), NO_ROUTE), 5)
        self.assertNotIn(self.dial(NO_ROUTE, self.dead()), (0, 5))

    def test_deadline(self):
        hole = self.black_hole()  # the last row: a failure while an earlier attempt is pending
        for addresses in ([hole], [hole, self.black_hole()], [hole, self.dead()]):
            with self.within(6), mock.patch.object(socks5, "ATTEMPT_DELAY", 0.02):
                start = time.monotonic()
                self.assertEqual(self.dial(*addresses, connect_timeout=0.1), 6)
                self.assertGreaterEqual(time.monotonic() - start, 0.09)
        with self.within(6):
            self.assertEqual(self.client(self.serve(connect_timeout=0.1)).greet().ask(hole[1]), 6)

    def test_deadline_that_passes_during_the_look_up(self):
        class SlowList(list):
            def __iter__(self):
                time.sleep(0.1)
                return super().__iter__()

        for addresses in ([self.black_hole()], [self.black_hole(), self.black_hole()]):
            answer = SlowList((socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
                              for address in addresses)
            client = self.client(self.serve(connect_timeout=0.05)).greet()
            with mock.patch("socket.getaddrinfo", return_value=answer), self.within(6):
                self.assertEqual(client.ask(80, "x.example"), 6)

    def test_deadline_that_has_passed_before_the_look_up(self):
        answer = threading.Event()
        before = set(threading.enumerate())
        self.addCleanup(wait_until, lambda: not set(threading.enumerate()) - before)
        client = self.client(self.serve(hooked(connect=lambda handler, destination: (
            handler.permitted(destination, time.monotonic() - 1))))).greet()
        self.addCleanup(answer.set)
        with mock.patch("socket.getaddrinfo", lambda *_, **__: answer.wait(PATIENCE) and []):
            with self.within(6):
                self.assertEqual(client.ask(80, "x.example"), 6)

    def test_attempts_that_fail_or_lose_are_closed(self):
        later, target = self.listen(), self.listen().getsockname()
        later.settimeout(0)
        for addresses, reply in [
                ([self.dead(), NO_ROUTE, self.black_hole(), target, later.getsockname()], 0),
                ([self.black_hole(), self.black_hole()], 6)]:
            client = self.client(self.serve(connect_timeout=PATIENCE if not reply else 0.1)).greet()
            before = descriptors()
            with mock.patch.object(socks5, "ATTEMPT_DELAY", 0.05), resolver(*addresses):
                self.assertEqual(client.ask(80, "x.example"), reply)
            count = before + (before and not reply)  # the target's, nothing else
            wait_until(lambda count=count: descriptors() == count)
        with self.assertRaises(BlockingIOError):  # nobody went on after the success
            later.accept()

    def test_many_attempts_that_fail_hold_one_descriptor_at_a_time(self):
        peak, real = [], socket.socket.connect

        def connect(sock, address):
            peak.append(descriptors())
            real(sock, address)

        client, addresses = self.client(self.serve()).greet(), [self.dead() for _ in range(40)]
        before = descriptors()
        with resolver(*addresses), \
                mock.patch.object(socket.socket, "connect", connect):
            self.assertEqual(client.ask(80, "x.example"), 5)
        self.assertEqual(len(peak), 40)
        self.assertLess(max(peak), before + 10)

    def test_dial_with_many_addresses_is_hung_up_on_at_once(self):
        server, asked, address = self.serve(), threading.Event(), self.black_hole()
        client = self.client(server).greet()

        def getaddrinfo(*args, **kwargs):
            asked.set()
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)] * 40

        with mock.patch("socket.getaddrinfo", getaddrinfo):
            client.say("05 01 00 03 09 78 2e 65 78 61 6d 70 6c 65 00 50")
            asked.wait(PATIENCE)
            with self.within(1):
                server.server_close()

    @unittest.skipUnless(has_ipv6(), "no IPv6 on this host")
    def test_families_take_turns(self):
        attempts = []

        def connect(sock, address):
            attempts.append(address[0])
            raise OSError(errno.EHOSTUNREACH, "")

        client = self.client(self.serve()).greet()
        with resolver(("::1", 1), ("::2", 1), ("::3", 1), ("127.0.0.1", 1), ("::4", 1)), \
                mock.patch.multiple(socket.socket, connect=connect, connect_ex=connect):
            self.assertEqual(client.ask(80, "x.example"), 4)
        self.assertEqual(attempts, ["::1", "127.0.0.1", "::2", "::3", "::4"])

    def test_descriptors_exhausted(self):
        for count in (1, 2):
            client = self.client(self.serve(connect_timeout=PATIENCE)).greet()
            with self.within(6), resolver(*[("127.0.0.1", 1)] * count), mock.patch.object(
                    socket.socket, "__init__", side_effect=OSError(errno.EMFILE, "")):
                self.assertEqual(client.ask(80, "x.example"), 1)


class LookUpTest(TestCase):
    def setUp(self):
        super().setUp()
        before = set(threading.enumerate())  # a look-up that was left behind ends later
        self.addCleanup(wait_until, lambda: not set(threading.enumerate()) - before)
        self.seen = collections.Counter()  # look-ups that are under way, and the most that were

    @contextlib.contextmanager
    def look_ups(self, limit, wait=lambda: None, error=None):
        """Allow `limit` look-ups, each of which takes as long as `wait` and finds a dead end."""
        lock, dead = threading.Lock(), self.dead()

        def getaddrinfo(*args, **kwargs):
            with lock:
                self.seen["now"] += 1
                self.seen["most"] = max(self.seen["now"], self.seen["most"])
            wait()
            with lock:
                self.seen["now"] -= 1
            if error:
                raise error
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", dead)]

        with mock.patch("socket.getaddrinfo", getaddrinfo), \
                mock.patch.object(socks5, "MAX_LOOK_UPS", limit, create=True):
            yield

    def ask_at_once(self, server, count):
        """Return the replies to `count` clients that ask for a name at the same time."""
        clients = [self.client(server).greet() for _ in range(count)]
        for client in clients:
            client.say("05 01 00 03 01 78 00 50")
        return [client.read_reply()[0] for client in clients]

    def test_resolver_that_hangs(self):
        answer = threading.Event()
        self.addCleanup(answer.set)
        with self.look_ups(2, lambda: answer.wait(PATIENCE)), self.logged() as lines:
            server = self.serve(connect_timeout=0.2)
            with self.within(6):
                self.assertEqual(self.ask_at_once(server, 6), [6] * 6)
                self.assertEqual(self.ask_at_once(server, 2), [6] * 2)
            self.assertEqual(self.seen["most"], 2)  # those that were left behind count
            self.assertTrue(any(line.startswith("waiting for a look-up") for line in lines), lines)
            answer.set()
            wait_until(lambda: not self.seen["now"])
            self.assertEqual(self.ask_at_once(server, 2), [5] * 2)

    def test_burst_is_served_in_turn(self):
        with self.look_ups(2, lambda: time.sleep(0.02)), self.within(10):
            server = self.serve(connect_timeout=PATIENCE)
            self.assertEqual(self.ask_at_once(server, 12), [5] * 12)
        self.assertEqual(self.seen["most"], 2)

    def test_failures_make_room(self):
        server = self.serve(connect_timeout=2)
        for error, reply in ((socket.gaierror(-2, "unknown"), 4), (MemoryError(), 1)):
            with self.look_ups(1, error=error), self.within(6):
                for _ in range(3):
                    self.assertEqual(self.ask_at_once(server, 1), [reply])

    def test_no_thread_for_a_look_up(self):
        with self.look_ups(1), self.within(6), self.logged() as lines:
            server = self.serve(connect_timeout=2)
            clients = [self.client(server).greet() for _ in range(2)]
            with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError):
                self.assertEqual(clients[0].ask(80, "x"), 1)
            clients[0].close()
            self.assertEqual(self.session_line(lines)["end"], "refused")
            self.assertEqual(clients[1].ask(80, "x"), 5)


# ---- relaying ----------------------------------------------------------------------------

NOT_THIS = hooked(authorize=lambda _, destination: destination.host != "127.0.0.3")
SIDES = ["client", "target"]  # the ends of a relay, as `tunnel` returns them
BULK = pattern(1000003) * 8   # bytes for a busy flow; no buffer's size divides its period


READ, SEND = ["recv", "recv_into"], ["send", "sendall"]


class RelayTest(SweepTestCase):
    def test_half_closes(self):
        content = pattern(MEBIBYTE)
        for first in (0, 1):
            with self.subTest(SIDES[first]), self.ending(SIDES[first] + "-closed"):
                ends = self.tunnel()
                ends[first].shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(ends[1 - first]), (b"", "end"))
                self.send(ends[1 - first], content, close=True)
                self.assertEqual(read_all(ends[first]), (content, "end"))

    def test_resets(self):
        def half_close(ours, other):
            other.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(ours), (b"", "end"))

        def move(source, sink, content=b"half of a file"):
            self.send(source, content)
            self.assertEqual(read_count(sink, len(content)), content)

        for first in (0, 1):
            for name, prepare in [
                    ("at once", lambda ours, other: None), ("after a half-close", half_close),
                    ("after it has sent", move),
                    ("after it has read", lambda ours, other: move(other, ours)),
                    ("after both", lambda ours, other: (move(ours, other), move(other, ours))),
                    ("after much", lambda ours, other: move(ours, other, BULK))]:
                with self.subTest(SIDES[first] + " " + name), self.ending(SIDES[first] + "-reset"):
                    ends = self.tunnel()
                    prepare(ends[first], ends[1 - first])
                    reset(ends[first])
                    self.assertEqual(read_all(ends[1 - first]), (b"", "reset"))

    def test_reset_by_a_client_that_does_not_wait_for_the_reply(self):
        (ours, theirs), has_reset = self.pair(), threading.Event()
        client = self.client(self.serve_hook(lambda: has_reset.wait(PATIENCE) and ours))
        client.say("05 01 00 05 01 00 01 7f 00 00 01 00 50" + b"half of a file".hex())
        client.hear("05 00")
        reset(client)
        has_reset.set()
        self.assertEqual(read_all(theirs)[1], "reset")

    def test_answer_before_a_reset_that_the_sending_thread_was_told_of(self):
        for early in ("", "78" * 1000):  # with these, both flows break
            (ours, theirs), answer = self.pair(), b"413 Too Large"
            theirs.sendall(answer)
            reset(theirs)
            with self.assertRaises(OSError):
                while True:  # until the error has been reported: what recv() sees is an end
                    ours.send(b"x")
            with self.subTest(len(early)), self.ending("target-reset"):
                client = self.client(self.serve_hook(lambda ours=ours: ours)).greet()
                client.say("05 01 00 01 7f 00 00 01 00 50" + early)
                client.hear("05 00 00 01 7f 00 00 01 ?? ??")
                self.assertEqual(read_all(client), (answer, "reset"))

    def test_ends_that_cross_are_clean(self):
        real = socket.socket.getpeername

        def getpeername(sock):
            time.sleep(0.1)  # the other flow ends meanwhile
            return real(sock)

        for first in (0, 1):
            with self.subTest(SIDES[first]), self.logged() as lines:
                ends = self.tunnel()
                with mock.patch.object(socket.socket, "getpeername", getpeername):
                    ends[first].shutdown(socket.SHUT_WR)
                    time.sleep(0.03)  # so that the flows look in this order
                    ends[1 - first].shutdown(socket.SHUT_WR)
                    self.assertEqual([read_all(end) for end in ends], [(b"", "end")] * 2)
                    self.assertEqual(self.session_line(lines)["end"], SIDES[first] + "-closed")

    def test_hundreds_of_clean_ends_at_once(self):
        server, listener = self.serve(), self.listen()
        barrier, said = threading.Barrier(2), []

        def converse(sock, count):
            barrier.wait(PATIENCE)
            sock.sendall(bytes(count))
            sock.shutdown(socket.SHUT_WR)
            said.append((bytes(count), "end") == read_all(sock))
            sock.close()

        counts = [0, 1, 1000] * 70
        self.thread(lambda: [converse(self.own(listener.accept()[0]), count) for count in counts])
        for count in counts:
            client = self.client(server).greet()
            client.ask(listener.getsockname()[1])
            converse(client, count)
        wait_until(lambda: len(said) == 2 * len(counts))
        self.assertTrue(all(said))

    def test_both_directions_at_once(self):
        up, down, read = BULK, BULK[3:] + BULK, {}
        with self.logged() as lines:
            ends = self.tunnel()
            threads = [self.thread(lambda end=end: read.update({end: read_all(end)}))
                       for end in ends]
            for end, content in zip(ends, (up, down)):
                self.thread(lambda end=end, content=content: (
                    end.sendall(content), end.shutdown(socket.SHUT_WR)))
            for thread in threads:
                thread.join(PATIENCE)
            self.assertTrue(read[ends[0]] == (down, "end") and read[ends[1]] == (up, "end"))
            line = self.session_line(lines)
        self.assertEqual((line["up"], line["down"]), (str(len(up)), str(len(down))))

    def test_slow_reader_slows_the_writer_down(self):
        rows = []
        for reader in (0, 1):
            ends = self.tunnel()
            rows.append((reader, ends, fill(ends[1 - reader])))
        time.sleep(4 * socks5.SEND_TIMEOUT)  # for so long, the server can send nothing
        for reader, ends, sent in rows:
            with self.subTest(SIDES[reader]):
                self.assertLess(len(sent), 64 * MEBIBYTE)  # the kernel holds it, nobody queues it
                ends[1 - reader].close()
                self.assertTrue(read_all(ends[reader]) == (sent, "end"))

    def test_buffers_grow_and_shrink(self):
        (ours, target), sizes = self.pair(), []

        class Recorder(socket.socket):
            def recv(self, size, *args):
                sizes.append(size)
                return super().recv(size, *args)

            def recv_into(self, buffer, *args):
                sizes.append(len(buffer))
                return super().recv_into(buffer, *args)

        recorder = Recorder(fileno=ours.detach())
        with mock.patch("os.pipe", side_effect=OSError(errno.EMFILE, "")):  # nor is it spliced
            client = self.client(self.serve_hook(lambda: recorder)).greet()
            client.ask(80)
            sent = fill(target)
            self.assertTrue(read_count(client, len(sent)) == sent)
            for _ in range(20):
                self.check_one_way(target, client)
        self.assertLessEqual(sizes[0], 4096)  # what an idle session costs
        self.assertGreaterEqual(max(sizes), 64 * 1024)
        self.assertLessEqual(max(sizes), MEBIBYTE)
        self.assertLessEqual(sizes[-1], 4096)

    def test_flow_that_fails_ends_the_relay(self):
        lost = OSError(errno.ETIMEDOUT, "")  # the peer has vanished: it answers no probes
        for first in (0, 1):
            for methods, error, end in [
                    (READ, lost, "-lost"), (SEND, lost, "-lost"), (READ, MemoryError(), None),
                    (SEND, ConnectionResetError(errno.ECONNRESET, ""), "-reset")]:
                with self.subTest(SIDES[first], methods=methods, error=error), \
                        self.logged() as lines, self.within(6):
                    ends = self.tunnel()
                    sender = first if methods == READ else 1 - first
                    with breaking(methods, ends[first], error):
                        with contextlib.suppress(ConnectionError):  # it may be that quick
                            ends[sender].sendall(b"x")
                        self.assertEqual(read_all(ends[1 - sender])[1], "reset")
                        line = self.session_line(lines)
                    self.assertEqual(line["end"], end and SIDES[first] + end or line["end"])
                    self.assertFalse([each for each in lines if each.startswith("thread failed")])

    def test_no_thread_for_the_second_flow(self):
        for command in ("01", "02"):
            errors = [None] + [RuntimeError("can't start new thread")] * 9  # the session's is first
            with self.subTest(command), self.logged() as lines:
                server, listener = self.serve(), self.listen()
                with failing(threading.Thread, "start", errors):
                    client = self.client(server).greet()
                    if command == "01":
                        code = client.ask(listener.getsockname()[1])
                        other = self.own(listener.accept()[0])
                    else:
                        other = self.own(socket.create_connection(client.bind_for()))
                        code = client.read_reply()[0]
                    self.assertEqual(code, Reply.GENERAL_FAILURE)
                    client.close()
                    self.assertEqual(read_all(other)[0], b"")
                    line = self.session_line(lines)
                self.assertEqual((line["reply"], line["end"]), ("GENERAL_FAILURE", "no-thread"))
                self.tunnel(server)  # it goes on

    def test_sockets_are_tuned(self):
        sockets = []

        class Handler(socks5.Socks5RequestHandler):
            def connect(self, destination):
                sockets.extend([self.connection, super().connect(destination)])
                return sockets[1]

        client, target = self.tunnel(self.serve(Handler))
        self.check_one_way(client, target)  # so the relay has begun
        for sock in sockets:
            self.assertTrue(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            if hasattr(socket, "TCP_KEEPCNT"):
                idle, interval, count = (sock.getsockopt(socket.IPPROTO_TCP, option) for option in (
                    socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT))
                self.assertLessEqual(idle + interval * count, 120)

    def test_reader_of_any_size_loses_nothing(self):
        content = pattern(7680)
        for size in (1024, 8192, 65536, -1):  # -1 is what socketserver has
            for command in ("01", "02"):
                with self.subTest(size, command=command):
                    listener = self.listen()
                    client = self.client(self.serve(hooked(rbufsize=size)))
                    client.settimeout(8)
                    client.sendall(octets("05 01 00 05" + command + "00 01 7f 00 00 01") + port_of(
                        listener.getsockname()[1]) + content)  # in one segment
                    client.shutdown(socket.SHUT_WR) if command == "01" else None
                    client.hear("05 00")
                    code, where = client.read_reply()
                    self.assertEqual(code, Reply.SUCCEEDED)
                    if command == "01":
                        target = self.own(listener.accept()[0])
                        self.assertTrue(read_all(target) == (content, "end"))
                    else:
                        target = self.own(socket.create_connection(where))
                        target.settimeout(8)
                        self.assertEqual(read_count(target, len(content)), content)

    def test_urgent_byte_is_passed_on_in_its_place(self):
        for first in (0, 1):
            with self.subTest(SIDES[first]):
                ends = self.tunnel()
                ends[first].sendall(b"ab")
                ends[first].send(b"X", socket.MSG_OOB)
                ends[first].sendall(b"cd")
                ends[first].shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(ends[1 - first]), (b"abXcd", "end"))

    def test_relay_that_is_stopped_never_looks_complete(self):
        rows, seen = [], []
        for end, reader, settings in [
                ("idle-timeout", 0, {"idle_timeout": 0.1}), ("linger-timeout", 1, {"linger": 0.1}),
                ("idle-timeout", 1, {"idle_timeout": 0.1}), ("linger-timeout", 0, {"linger": 0.1}),
                ("server-closed", 0, {})]:
            ending, has_read = threading.Event(), threading.Event()

            class Handler(socks5.Socks5RequestHandler):
                def finish(self, ending=ending, has_read=has_read):
                    ending.set()
                    has_read.wait(0.2)  # what shows before the sockets are closed?
                    super().finish()

            server = self.serve(Handler, **settings)
            rows.append((end, reader, server, self.tunnel(server), ending, has_read))

        def read(end, reader, server, ends, ending, has_read):
            ending.wait(PATIENCE)
            seen.append(read_all(ends[reader])[1])
            has_read.set()

        with self.logged() as lines, self.within(8):
            for row in rows:
                end, reader, _, ends = row[:4]
                if end == "linger-timeout":
                    ends[reader].shutdown(socket.SHUT_WR)
                self.thread(flood, ends[1 - reader])
            threads = [self.thread(read, *row) for row in rows]
            time.sleep(0.1)  # until the last sender is stuck
            rows[-1][2].server_close()
            for thread in threads:
                thread.join(PATIENCE)
            wait_until(lambda: len(lines) == len(rows))
        self.assertEqual(seen, ["reset"] * len(rows))
        self.assertEqual(sorted(fields(line)["end"] for line in lines),
                         sorted(row[0] for row in rows))

    @unittest.skipUnless(hasattr(socket, "SO_SNDTIMEO"), "no time limit for send() here")
    def test_stuck_sender_can_be_stopped_where_send_takes_no_timeout(self):
        real = socket.socket.setsockopt

        def setsockopt(sock, level, option, *value):
            if (level, option) == (socket.SOL_SOCKET, socket.SO_SNDTIMEO):
                raise OSError(errno.EINVAL, "")  # a 32-bit system with times of 64 bits
            real(sock, level, option, *value)

        with mock.patch.object(socket.socket, "setsockopt", setsockopt), self.within(8), \
                self.logged() as lines:
            server = self.serve(idle_timeout=0.2)
            threads = [self.thread(flood, self.tunnel(server)[reader]) for reader in (0, 1)]
            for thread in threads:
                thread.join(PATIENCE)
            wait_until(lambda: len(lines) == 2)
        self.assertEqual([fields(line)["end"] for line in lines], ["idle-timeout"] * 2)

    def test_stop_is_noticed_though_the_reader_is_slow(self):
        server, ends = self.serve(), []
        client, target = self.slow_tunnel(server)

        def read():
            with contextlib.suppress(ConnectionResetError):
                while client.recv(4096):
                    time.sleep(0.02)
                ends.append("end")

        threads = [self.thread(flood, target), self.thread(read)]
        time.sleep(0.1)  # until the sender is stuck, but for what the reader takes
        with self.within(6):
            self.stop(server)
            for thread in threads:
                thread.join(PATIENCE)
        self.assertEqual(ends, [])

    @unittest.skipUnless(sys.platform == "linux", "the progress of a slow reader shows on Linux")
    def test_what_keeps_deadlines_away(self):
        server = self.serve(idle_timeout=1, linger=1)
        up, down = self.tunnel(server), self.tunnel(server)
        slow = [self.slow_tunnel(server) for _ in range(3)]
        slow[1][0].shutdown(socket.SHUT_WR)  # this one lingers
        contents = BULK, BULK, BULK[:1500000]  # of the last, the relay has nothing left to send
        for (_, target), content in zip(slow, contents):
            self.send(target, content, close=True)
        received, start = [0, 0, 0], time.monotonic()
        while time.monotonic() < start + 1.4:
            for source, sink in (up, down[::-1]):  # in one direction only
                self.check_one_way(source, sink)
            for number, (client, _) in enumerate(slow):
                received[number] += len(client.recv(4096))
            time.sleep(0.01)  # this is what makes it slow
        for number, (client, _) in enumerate(slow):
            with self.subTest(number):
                rest = contents[number][received[number]:]
                self.assertTrue(rest)
                self.assertTrue(read_all(client) == (rest, "end"))


@unittest.skipUnless(hasattr(os, "splice"), "no splice here: Linux, from Python 3.10")
class SpliceTest(SweepTestCase):
    def test_flow_that_is_bulky_quiet_and_bulky_again(self):
        with mock.patch("os.splice", wraps=os.splice) as splice:
            client, target = self.tunnel()
            count = descriptors()
            for _ in range(2):
                calls, bulks = splice.call_count, 0
                while splice.call_count == calls and bulks < 20:  # the relay may be quick enough
                    self.send(target, BULK)
                    self.assertTrue(read_count(client, len(BULK)) == BULK)
                    bulks += 1
                self.assertGreater(splice.call_count, calls)
                for _ in range(20):
                    self.check_one_way(target, client)
                self.assertEqual(descriptors(), count)  # the pipe has been given back

    def test_refused(self):
        rows = [("os.splice", errno.EINVAL, accepted) for accepted in (0, 1, 4, 5)]
        for name, code, accepted in rows + [("os.pipe", errno.EMFILE, 0),
                                            ("fcntl.fcntl", errno.EPERM, 0)]:
            module, function = name.split(".")
            errors = [None] * accepted + [OSError(code, "refused")] + [None] * 99
            calls, owner = [], __import__(module)
            with self.subTest(name, accepted=accepted), failing(
                    owner, function, errors, lambda *args, calls=calls: not calls.append(args)):
                client, target = self.tunnel()
                self.send(target, BULK, close=True)
                self.assertTrue(read_all(client) == (BULK, "end"))
                self.assertEqual(len(calls), accepted + 1)

    def test_half_close_in_the_middle(self):
        with mock.patch("os.splice", wraps=os.splice) as splice:
            client, target = self.tunnel()
            self.send(target, BULK * 2)
            received = read_count(client, len(BULK))
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(target), (b"", "end"))
            received += read_count(client, len(BULK))
            target.close()
            self.assertEqual(read_all(client), (b"", "end"))
            self.assertTrue(splice.called)
        self.assertTrue(received == BULK * 2)

    def test_bytes_that_were_spliced_are_counted_and_resets_told_apart(self):
        for source in (0, 1):
            for breaker in (0, 1):
                with self.subTest(SIDES[source], breaker=SIDES[breaker]), \
                        mock.patch("os.splice", wraps=os.splice) as splice, \
                        self.logged() as lines:
                    ends, count = self.tunnel(), 0
                    while not splice.called and count < 20:  # the relay may be quick enough
                        self.send(ends[source], BULK)
                        self.assertTrue(read_count(ends[1 - source], len(BULK)) == BULK)
                        count += 1
                    self.assertTrue(splice.called)
                    reset(ends[breaker])
                    self.assertEqual(read_all(ends[1 - breaker]), (b"", "reset"))
                    line = self.session_line(lines)
                    self.assertEqual(line["end"], SIDES[breaker] + "-reset")
                    self.assertEqual(line["down" if source else "up"], str(count * len(BULK)))


# ---- associations ------------------------------------------------------------------------

class AssociationTest(SweepTestCase):
    def associate(self, server, port=0):
        """Return a control connection, and a client's socket that is connected to the server's."""
        control = self.client(server).greet()
        control.sendall(octets("05 03 00 01 00 00 00 00") + port_of(port))
        code, where = control.read_reply()
        self.assertEqual(code, Reply.SUCCEEDED)
        client = self.datagrams(where[0], port)
        client.connect(where)
        return control, client

    def frame(self, sock, data, fragment="00"):
        """Return the datagram of a client for `sock`."""
        host, port = sock.getsockname()[:2]
        return octets("00 00" + fragment + ("04" if ":" in host else "01")) + socket.inet_pton(
            sock.family, host) + port_of(port) + data

    def named(self, name, port, data):
        """Return the datagram of a client for a name."""
        return octets("00 00 00 03") + bytes([len(name)]) + name + port_of(port) + data

    def check(self, client, target, data=b"ping"):
        """Check that `data`, and nothing else, goes from `client` to `target` and back."""
        client.send(self.frame(target, data))
        received, source = target.recvfrom(65536)
        self.assertEqual(received, data)
        target.sendto(data[::-1], source)
        self.assertEqual(client.recv(65536), self.frame(target, data[::-1]))
        return source

    def wait_for_dropped(self, server, count):
        """Wait until the only session of `server` has dropped so many datagrams."""
        wait_until(lambda: [live["dropped"] for live in self.report(server)[0]] == [str(count)])

    def test_empty_and_longest(self):
        server, target = self.serve(), self.datagrams()
        _, client = self.associate(server)
        for size in (0, 1, 1500, 65507 - 10):
            self.check(client, target, pattern(65536)[:size])
        source = self.check(client, target)
        target.sendto(bytes(65507), source)  # no room for a header
        self.check(client, target)
        self.wait_for_dropped(server, 1)

    @unittest.skipUnless(has_ipv6(), "no IPv6 on this host")
    def test_families(self):
        four, six = self.datagrams(), self.datagrams("::1")
        for host, reached in [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")]:
            with self.subTest(host):
                server = self.serve(host=host)
                _, client = self.associate(
                    server.server_address[1] if host == "::" else server)
                self.assertEqual(client.getsockname()[0], reached)
                self.check(client, four)
                self.check(client, six)

    def test_stranger_changes_nothing(self):
        target, stranger = self.datagrams(), self.datagrams("127.0.0.2")
        _, client = self.associate(self.serve())
        relay = client.getpeername()
        stranger.sendto(self.frame(target, b"before"), relay)
        self.datagrams().sendto(b"no datagram of SOCKS", relay)
        source = self.check(client, target)
        stranger.sendto(self.frame(target, b"after"), relay)
        self.datagrams().sendto(self.frame(target, b"another port"), relay)
        stranger.sendto(b"unasked", ("127.0.0.1", source[1]))
        self.check(client, target)
        stranger.setblocking(False)
        with self.assertRaises(BlockingIOError):
            stranger.recv(100)

    def test_port_that_was_announced(self):
        with self.datagrams() as sock:
            port = sock.getsockname()[1]
        target = self.datagrams()
        _, client = self.associate(self.serve(), port)
        self.datagrams().sendto(self.frame(target, b"another port"), client.getpeername())
        self.check(client, target)

    def test_what_is_dropped(self):
        server, target = self.serve(), self.datagrams()
        whole = self.frame(target, b"")
        bad = [whole[:end] for end in range(len(whole))]
        bad += [self.frame(target, b"x", fragment) for fragment in ("01", "7f", "80", "ff")]
        bad += [octets("00 00 00" + rest) for rest in [
            "02 7f 00 00 01 00 35", "03 00 00 35", "03 02 61 00 00 35",
            "01 7f 00 00 01 00 00 ff"]]
        with self.logged() as lines:
            control, client = self.associate(server)
            for datagram in bad:
                client.send(datagram)
            self.check(client, target)
            self.wait_for_dropped(server, len(bad))
            control.close()
            server.drain(PATIENCE)
            self.assertEqual(self.session_line(lines)["dropped"], str(len(bad)))

    def test_log(self):
        with self.logged() as lines:
            control, client = self.associate(self.serve())
            target = self.datagrams()
            source = self.check(client, target, b"12345")
            self.check(client, target, b"123")
            target.sendto(b"more", source)
            client.recv(100)
            control.close()
            self.session_line(lines)
        self.assertRegex(lines[0], (
            r"^session client=127\.0\.0\.1:\d+ user=- command=UDP_ASSOCIATE "
            r"destination=0\.0\.0\.0:0 reached=- reply=SUCCEEDED rule=- up=8 "
            r"down=12 datagrams_up=2 datagrams_down=3 dropped=0 "
            r"seconds=\d+\.\d{3} end=client-closed$"))

    def test_names_do_not_stall(self):
        answer, asked = threading.Event(), []
        server, target = self.serve(), self.datagrams()
        port = target.getsockname()[1]
        real = socket.getaddrinfo

        def getaddrinfo(name, *args, **kwargs):
            if isinstance(name, str):
                return real(name, *args, **kwargs)
            asked.append(name)
            if name == b"slow":
                answer.wait(PATIENCE)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", target.getsockname())]

        self.addCleanup(answer.set)
        _, client = self.associate(server)
        with mock.patch("socket.getaddrinfo", getaddrinfo):
            client.send(self.named(b"slow", port, b"slow"))
            for number in range(3 * socks5.LOOKUPS):
                for name in (b"fast", b"n%03d" % number):
                    client.send(self.named(name, port, name))
                    self.assertEqual(target.recv(100), name)
            self.assertLess(asked.count(b"fast"), socks5.LOOKUPS)  # it became known
            self.check(client, target)
            for _ in range(socks5.LOOKUPS + 20):
                client.send(self.named(b"slow", port, b"slow"))
            self.check(client, target)
            self.wait_for_dropped(server, 21)
            wait_until(lambda: asked.count(b"slow") == socks5.LOOKUPS)
            answer.set()
            for _ in range(socks5.LOOKUPS):
                self.assertEqual(target.recv(100), b"slow")

    def test_addresses_of_a_name(self):
        four, six = self.datagrams(), has_ipv6() and self.datagrams("::1")
        port = four.getsockname()[1]
        rows = [("the next if one fails", four, [NO_ROUTE, ("127.0.0.1", port)])]
        if six:
            rows += [
                ("IPv4 first", four, [("::1", port, 0, 0), ("127.0.0.1", port)]),
                ("IPv6 if there is no other", six, [six.getsockname()]),
                ("IPv6 if IPv4 fails", six, [NO_ROUTE, six.getsockname()])]
        for name, target, addresses in rows:
            with self.subTest(name), resolver(*addresses):
                server = self.serve()
                _, client = self.associate(server)
                for _ in range(3):  # the first of them has to be looked up
                    client.send(self.named(b"x", port, b"ping"))
                    target.settimeout(8)
                    data, source = target.recvfrom(100)
                    self.assertEqual(data, b"ping")
                    target.sendto(b"pong", source)
                    self.assertEqual(client.recv(100), self.frame(target, b"pong"))
                self.assertEqual(self.report(server)[0][0]["dropped"], "0")

    def test_rules_for_each_datagram(self):
        good, bad = self.datagrams(), self.datagrams()
        rule = "127.0.0.1:%d" % bad.getsockname()[1]

        with self.logged() as lines:
            control, client = self.associate(self.serve(NOT_THIS, rules=["deny " + rule]))
            client.send(self.frame(bad, b"x"))
            client.send(octets("00 00 00 01 7f 00 00 03 00 35"))
            self.check(client, good)
            bad.setblocking(False)
            with self.assertRaises(BlockingIOError):
                bad.recv(100)
            control.close()
            line = self.session_line(lines)
        self.assertEqual((line["dropped"], line["rule"]), ("2", "deny:" + rule))

    def test_several_at_once(self):
        server, target = self.serve(), self.datagrams()
        clients = [self.associate(server)[1] for _ in range(20)]
        for number, client in enumerate(clients):
            client.send(self.frame(target, b"%d" % number))
        for _ in clients:
            data, source = target.recvfrom(100)
            target.sendto(data + b"!", source)
        for number, client in enumerate(clients):
            self.assertEqual(client.recv(100), self.frame(target, b"%d!" % number))

    def test_end_with_the_control_connection(self):
        server, target = self.serve(), self.datagrams()
        for leave, end in [(socket.socket.close, "client-closed"), (reset, "client-reset"),
                           (lambda control: control.shutdown(socket.SHUT_WR), "client-closed")]:
            for _ in range(10):  # which thread notices it first is chance
                with self.ending(end):
                    control, client = self.associate(server)
                    control.sendall(b"what nobody has to say here")
                    self.check(client, target)
                    leave(control)

    def test_client_that_leaves_before_the_reply(self):
        class Handler(socks5.Socks5RequestHandler):
            def do_UDP_ASSOCIATE(self, destination):
                with contextlib.suppress(ConnectionResetError):
                    self.connection.recv(1)
                self.connection.shutdown(socket.SHUT_WR)
                super().do_UDP_ASSOCIATE(destination)

        with self.ending("client-reset"):
            client = self.client(self.serve(Handler)).greet()
            client.say("05 03 00 01 00 00 00 00 00 00")
            client.shutdown(socket.SHUT_WR)

    def test_client_that_has_vanished(self):
        with self.logged() as lines, self.within(6):
            control, _ = self.associate(self.serve())
            with breaking(READ, control, OSError(errno.ETIMEDOUT, "")):
                control.sendall(b"x")
                self.assertEqual(self.session_line(lines)["end"], "client-lost")

    def test_timeout(self):
        with self.ending("udp-timeout"), self.within(6):
            control, _ = self.associate(self.serve(udp_timeout=0.1))
            self.assertEqual(read_all(control), (b"", "end"))

    def test_datagrams_of_either_direction_keep_it_open(self):
        server = self.serve(udp_timeout=0.4, idle_timeout=0.1, handshake_timeout=0.1)
        target, other = self.datagrams(), self.datagrams()
        (_, sender), (_, receiver) = self.associate(server), self.associate(server)
        source = self.check(receiver, other)
        for sock in (target, receiver):
            sock.settimeout(8)
        start = time.monotonic()
        while time.monotonic() < start + 0.6:
            sender.send(self.frame(target, b"up"))
            self.assertEqual(target.recv(100), b"up")
            other.sendto(b"down", source)
            self.assertEqual(receiver.recv(100), self.frame(other, b"down"))
            time.sleep(0.02)

    def test_ports_and_address(self):
        port = self.datagrams().getsockname()[1]
        with self.datagrams() as free:
            ports = [port, free.getsockname()[1]]
        server = self.serve(udp_ports=ports, udp_advertise="127.0.0.1")
        _, client = self.associate(server)
        self.assertEqual(client.getpeername()[1], ports[1])
        client = self.client(server).greet()
        client.say("05 03 00 01 00 00 00 00 00 00")
        client.hear("05 01" + " 00 01 00 00 00 00 00 00")
        client = self.client(self.serve(udp_advertise="2001:db8::1")).greet()
        client.say("05 03 00 01 00 00 00 00 00 00")
        client.hear("05 00 00 04 20 01 0d b8 00 00 00 00 00 00 00 00 00 00 00 01 ?? ??")

    def test_hook_that_raises(self):
        for address in ("01 7f 00 00 01 00 35", "03 01 78 00 35"):  # here, and in a look-up
            with self.subTest(address), self.logged() as lines:
                server = self.serve(hooked(authorize=mock.Mock(side_effect=KeyError)))
                control, client = self.associate(server)
                client.send(octets("00 00 00" + address))
                self.assertEqual(read_all(control), (b"", "reset"))
                self.assertEqual(self.session_line(lines)["end"], "error")
                self.stop(server)
                self.assertTrue(any("error=KeyError" in line for line in lines))

    def test_no_thread_for_a_look_up(self):
        server, target = self.serve(), self.datagrams()
        port = target.getsockname()[1]
        _, client = self.associate(server)
        self.check(client, target)  # the association has its own threads by now
        with mock.patch("threading.Thread.start", side_effect=RuntimeError("limit")):
            for count in range(1, 2 * socks5.LOOKUPS):
                client.send(self.named(b"x", port, b"ping"))
                self.wait_for_dropped(server, count)
        self.check(client, target)
        with resolver(target.getsockname()):  # none of them takes up a place
            client.send(self.named(b"x", port, b"ping"))
            self.assertEqual(target.recv(100), b"ping")

    @unittest.skipUnless(has_ipv6(), "no IPv6 on this host")
    def test_ipv6_destination_without_ipv6(self):
        server, target, real = self.serve(), self.datagrams(), socket.socket.__init__

        def init(sock, family=-1, *args, **kwargs):
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "")
            real(sock, family, *args, **kwargs)

        with mock.patch.object(socket.socket, "__init__", init), resolver(("::1", 53, 0, 0)):
            _, client = self.associate(server)
            for count in (1, 2):
                client.send(self.named(b"x", 53, b""))
                self.wait_for_dropped(server, count)
            self.check(client, target)

    def test_only_so_many_destinations_are_remembered(self):
        asked, targets = [], [self.datagrams("127.0.0.%d" % number) for number in range(1, 7)]
        real, port = socket.getaddrinfo, targets[0].getsockname()[1]

        def getaddrinfo(name, *args, **kwargs):
            asked.append(name)
            return real("127.0.0.1" if isinstance(name, bytes) else name, *args, **kwargs)

        def is_known():
            count = asked.count(b"x")
            client.send(self.named(b"x", port, b"x"))
            self.assertEqual(targets[0].recv(100), b"x")
            return asked.count(b"x") == count

        with mock.patch.object(socks5, "DESTINATIONS", 2), \
                mock.patch("socket.getaddrinfo", getaddrinfo):
            _, client = self.associate(self.serve())
            wait_until(is_known)
            self.check(client, targets[0])
            self.assertTrue(is_known())  # two are remembered
            for target in targets:
                source = self.check(client, target)
            for target in targets:  # the last of them is known
                target.sendto(b"late", source)
            answers = [client.recv(100)]
            while answers[-1] != self.frame(targets[-1], b"late"):
                answers.append(client.recv(100))
            self.assertLessEqual(len(answers), 2)
            self.assertFalse(is_known())

    def test_threads_lose_no_count(self):
        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        sys.setswitchinterval(1e-6)
        target, sent = self.datagrams(), 0
        port = target.getsockname()[1]
        with resolver(target.getsockname()), \
                mock.patch.object(socks5, "LOOKUPS", 32):  # so that none has to be dropped
            server = self.serve()
            _, client = self.associate(server)
            for burst in range(40):
                for number in range(8):  # each in a thread of its own
                    client.send(self.named(b"n%d-%d" % (burst, number), port, b"x"))
                    client.send(self.frame(target, b"x"))
                for _ in range(16):
                    _, source = target.recvfrom(100)
                    target.sendto(b"y", source)
                    client.recv(100)
                    sent += 1
            counts = ["up", "down", "datagrams_up", "datagrams_down", "dropped"]
            expected = [str(sent)] * 4 + ["0"]
            wait_until(lambda: [self.report(server)[0][0][name] for name in counts] == expected)

    def test_commands_that_are_served(self):
        for commands, replies in [("connect", "77"), ("connect,udp", "70"), ("bind", "07")]:
            server = self.serve(commands=commands.split(","))
            for command, reply in zip(("02", "03"), replies):
                with self.subTest(commands, command=command):
                    client = self.client(server).greet()
                    self.assertEqual(client.ask(80, command=command), int(reply))


# ---- BIND --------------------------------------------------------------------------------

ANY_IPV4, LOOPBACK_IPV4 = "01" + " 00" * 6, "01 7f 00 00 01 00 00"
ANY_IPV6, LOOPBACK_IPV6 = "04" + " 00" * 18, "04" + " 00" * 15 + "01 00 00"


class BindTest(SweepTestCase):
    def peer(self, address, host="127.0.0.1"):
        """Return a peer that connects from `host`."""
        sock = self.own(socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET))
        sock.bind((host, 0))
        sock.connect(address)
        return sock

    def check_bound(self, client, peer):
        """Check the second reply, and that a relay follows as CONNECT has it."""
        self.assertEqual(client.read_reply(), (Reply.SUCCEEDED, peer.getsockname()[:2]))
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(read_all(peer), (b"question", "end"))
        peer.sendall(b"answer")
        peer.close()
        self.assertEqual(read_all(client), (b"answer", "end"))

    def test_peers(self):
        rows = [  # what it is, whom the client names, where it is to wait, from where a peer is
                  # rejected, from where it is not
            ("an address", LOOPBACK_IPV4, "127.0.0.1", "127.0.0.2", "127.0.0.1"),
            ("a name", "03 01 78 00 15", "127.0.0.1", "127.0.0.3", "127.0.0.2"),
            ("any that the rules allow", ANY_IPV4, "127.0.0.1", "127.0.0.4", "127.0.0.3"),
            ("another one's ::", ANY_IPV6, "127.0.0.1", "127.0.0.4", "127.0.0.3"),
            ("reached elsewhere", LOOPBACK_IPV4, "127.0.0.1", "127.0.0.2", "127.0.0.1")]
        if has_ipv6():
            rows += [
                ("IPv6", LOOPBACK_IPV6, "::1", None, "::1"),
                ("IPv6, any", ANY_IPV6, "::1", None, "::1"),
                ("of IPv6 for a client of IPv4", LOOPBACK_IPV6, "::1", None, "::1"),
                ("of IPv4 for a client of IPv6", LOOPBACK_IPV4, "127.0.0.1", "127.0.0.2",
                 "127.0.0.1")]
        for name, address, expected, wrong, right in rows:
            host = "127.0.0.2" if "elsewhere" in name else (
                "::1" if name.startswith("IPv6") or name.endswith("IPv6") else "127.0.0.1")
            with self.subTest(name), self.logged() as lines, \
                    resolver(("127.0.0.1", 0), ("127.0.0.2", 0)):
                client = self.client(self.serve(host=host, rules=["deny 127.0.0.4"])).greet()
                where = client.bind_for(address)
                self.assertEqual(where[0], expected)
                if wrong:
                    self.assertEqual(read_all(self.peer(where, wrong))[0], b"")
                peer = self.peer(where, right)
                reached = ("[%s]:%d" if ":" in right else "%s:%d") % peer.getsockname()[:2]
                self.check_bound(client, peer)
                line = self.session_line(lines)
                self.assertEqual(
                    [line[each] for each in ("command", "reached", "reply", "up", "down", "end")],
                    ["BIND", reached, "SUCCEEDED", "8", "6", "client-closed"])

    def test_port_is_closed_once_the_peer_is_there(self):
        client = self.client(self.serve()).greet()
        where = client.bind_for()
        peer = self.peer(where)
        self.assertEqual(client.read_reply()[0], Reply.SUCCEEDED)
        with self.assertRaises(ConnectionRefusedError):
            self.peer(where)
        self.check_relay(client, peer)

    def test_refused(self):
        server = self.serve(NOT_THIS, rules=["deny 127.0.0.1", "deny *:25"])
        for host, port, replies in [
                ("127.0.0.1", 80, [Reply.NOT_ALLOWED]), ("127.0.0.3", 80, [Reply.NOT_ALLOWED]),
                ("x", 25, [Reply.NOT_ALLOWED]), ("x", 80, [Reply.HOST_UNREACHABLE]),
                (*NO_ROUTE, list(Reply)[1:])]:
            with self.subTest(host, port=port), self.within(6), \
                    resolver(error=socket.gaierror(socket.EAI_NONAME, "unknown")):
                client = self.client(server).greet()
                self.assertIn(client.ask(port, host, "02"), replies)
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(client), (b"", "end"))

    def test_timeout(self):
        with self.ending("refused"), self.within(6):
            client = self.client(self.serve(bind_timeout=0.1)).greet()
            client.bind_for()
            client.hear("05 06 00 01 00 00 00 00 00 00")
            client.close()

    def test_look_up_has_a_deadline(self):
        answer = threading.Event()
        with self.within(6), mock.patch(
                "socket.getaddrinfo", side_effect=lambda *args, **kwargs: answer.wait(PATIENCE)):
            client = self.client(self.serve(connect_timeout=0.1)).greet()
            self.assertEqual(client.ask(80, "x", "02"), Reply.TTL_EXPIRED)
            answer.set()

    def test_no_other_deadline_ends_the_wait(self):
        server = self.serve(handshake_timeout=0.1, connect_timeout=0.1, idle_timeout=0.1)
        client = self.client(server).greet()
        where = client.bind_for()
        for _ in range(2):
            self.assertEqual(read_all(self.client(server)), (b"", "end"))  # which came later
        self.peer(where)
        self.assertEqual(client.read_reply()[0], Reply.SUCCEEDED)

    def test_client_that_leaves(self):
        for leave, early in [(socket.socket.close, 0), (reset, 0), (socket.socket.close, 1),
                             (socket.socket.close, 5000), (reset, 1)]:
            with self.subTest(leave, early=early), self.logged() as lines, self.within(6):
                client = self.client(self.serve()).greet()
                where = client.bind_for(LOOPBACK_IPV4 + " 01" * early)
                client.sendall(bytes(early))
                leave(client)
                self.assertEqual(self.session_line(lines)["end"], "client-left")
                with self.assertRaises(ConnectionRefusedError):
                    self.peer(where)

    def test_early_data(self):
        for first, second in [(0, 0), (5, 0), (0, 9), (5, 9), (1500, 9), (1500, 9000)]:
            with self.subTest(first, second=second):
                data = pattern(first + second)
                client = self.client(self.serve()).greet()
                where = client.bind_for(LOOPBACK_IPV4 + data[:first].hex())
                client.sendall(data[first:])
                peer = self.peer(where)
                self.assertEqual(client.read_reply()[0], Reply.SUCCEEDED)
                client.sendall(b"end")
                self.assertEqual(read_count(peer, len(data) + 3), data + b"end")

    def test_early_data_is_limited_and_costs_no_time(self):
        for send in (lambda client: client.send(b"x") and b"x", fill):
            with self.subTest(send):
                client = self.client(self.serve()).greet()
                where = client.bind_for()
                sent = send(client)
                self.assertLess(len(sent), 64 * MEBIBYTE)
                before = time.process_time()
                time.sleep(0.2)  # whoever asks whether there is more must not do it all the time
                self.assertLess(time.process_time() - before, 0.03)
                peer = self.peer(where)
                self.assertEqual(client.read_reply()[0], Reply.SUCCEEDED)
                self.assertTrue(read_count(peer, len(sent)) == sent)

    def test_aborted_connection_is_skipped(self):
        client = self.client(self.serve()).greet()
        where, errors = client.bind_for(), [ConnectionAbortedError(errno.ECONNABORTED, "")]
        with failing(socket.socket, "accept", errors, lambda sock: sock.getsockname() == where):
            self.check_bound(client, self.peer(where))
        self.assertFalse(errors)

    def test_peer_that_is_gone_before_the_second_reply(self):
        gone, real = threading.Event(), socket.socket.accept

        def accept(sock):
            accepted = real(sock)
            if sock.getsockname() == where:
                gone.wait(PATIENCE)
            return accepted

        with self.ending("target-reset"):
            client = self.client(self.serve()).greet()
            where = client.bind_for()
            with mock.patch.object(socket.socket, "accept", accept):
                peer = self.peer(where)
                name = peer.getsockname()
                reset(peer)
                gone.set()
                self.assertEqual(client.read_reply(), (Reply.SUCCEEDED, name))
                self.assertEqual(read_all(client), (b"", "reset"))

    def test_reset(self):
        for breaker in (0, 1):
            with self.subTest(SIDES[breaker]), self.ending(SIDES[breaker] + "-reset"):
                client = self.client(self.serve()).greet()
                ends = client, self.peer(client.bind_for())
                self.assertEqual(client.read_reply()[0], Reply.SUCCEEDED)
                reset(ends[breaker])
                self.assertEqual(read_all(ends[1 - breaker]), (b"", "reset"))


# ---- handler -----------------------------------------------------------------------------

ASK, OPEN = "05 01 00 01 7f 00 00 01 PP PP", "05 00 00 01 7f 00 00 01 ?? ??"
TO = "05 01 00 05 01 00 01 7f 00 00 01"  # what a client says to get to a port of this host

CONVERSATIONS = [  # what it is, users, what the client sends, what the server answers
    ("connect, IPv4", None, "05 01 00" + ASK, "05 00" + OPEN),
    ("connect, payload in the same segment", None, "05 01 00" + ASK + "68 65 6c 6c 6f",
     "05 00" + OPEN + "68 65 6c 6c 6f"),
    ("connect, a name", None, "05 01 00 05 01 00 03 09 6c 6f 63 61 6c 68 6f 73 74 PP PP 21",
     "05 00" + OPEN + "21"),
    ("connect, a literal as a name", None,
     "05 01 00 05 01 00 03 09 31 32 37 2e 30 2e 30 2e 31 PP PP 21", "05 00" + OPEN + "21"),
    ("a method of several", None, "05 03 01 02 00" + ASK, "05 00" + OPEN),
    ("the reserved byte is ignored", None, "05 01 00 05 01 ff 01 7f 00 00 01 PP PP",
     "05 00" + OPEN),
    ("no method", None, "05 00", "05 ff"),
    ("no acceptable method", None, "05 02 01 02", "05 ff"),
    ("no acceptable method, and a request", None, "05 01 02" + ASK, "05 ff"),
    ("login", USERS, LOGIN + ASK + "21", "05 02 01 00" + OPEN + "21"),
    ("login, not ASCII", USERS, "05 01 02 01 04 62 c3 bc 62 03 e2 82 ac" + ASK,
     "05 02 01 00" + OPEN),
    ("Latin-1 instead of UTF-8", USERS, "05 01 02 01 03 62 fc 62 01 80", "05 02 01 01"),
    ("login, 254 of 255 bytes", USERS, "05 01 02 01 fe" + "78" * 254 + "ff" + "79" * 255,
     "05 02 01 01"),
    ("login, 255 bytes", USERS, "05 01 02 01 ff" + "78" * 255 + "ff" + "79" * 255 + ASK,
     "05 02 01 00" + OPEN),
    ("login is not optional", USERS, "05 01 00" + ASK, "05 ff"),
    ("login among several methods", USERS, "05 02 00" + LOGIN[6:] + ASK, "05 02 01 00" + OPEN),
    ("wrong password", USERS, "05 01 02 01 05 61 6c 69 63 65 06 73 65 63 72 65 54" + ASK,
     "05 02 01 01"),
    ("a prefix of the password", USERS, "05 01 02 01 05 61 6c 69 63 65 05 73 65 63 72 65" + ASK,
     "05 02 01 01"),
    ("another user's password", USERS, "05 01 02 01 04 62 c3 bc 62 06 73 65 63 72 65 74" + ASK,
     "05 02 01 01"),
    ("unknown user", USERS, "05 01 02 01 03 62 6f 62 06 73 65 63 72 65 74" + ASK, "05 02 01 01"),
    ("unknown user, no password", USERS, "05 01 02 01 03 62 6f 62 00", "05 02 01 01"),
    ("no user, no password", USERS, "05 01 02 01 00 00", "05 02 01 01"),
    ("login of another version", USERS, "05 01 02 05 05", "05 02"),
    ("bind, and the client leaves", None, "05 01 00 05 02 00 01 7f 00 00 01 PP PP",
     "05 00 05 00 00 01 7f 00 00 01 ?? ?? 05 01" + REFUSED),
    ("UDP associate", None, "05 01 00 05 03 00 01 00 00 00 00 00 00",
     "05 00 05 00 00 01 7f 00 00 01 ?? ??"),
    ("command 0", None, "05 01 00 05 00 00 01 7f 00 00 01 PP PP", "05 00 05 07" + REFUSED),
    ("command 255, a name", None, "05 01 00 05 ff 00 03 01 78 00 50", "05 00 05 07" + REFUSED),
    ("address type 0", None, "05 01 00 05 01 00 00 7f 00 00 01 PP PP", "05 00 05 08" + REFUSED),
    ("address type 255", None, "05 01 00 05 01 00 ff 7f 00 00 01 PP PP", "05 00 05 08" + REFUSED),
    ("address type 2", None, "05 01 00 05 01 00 02 7f 00 00 01 PP PP", "05 00 05 08" + REFUSED),
    ("an empty name", None, "05 01 00 05 01 00 03 00 00 50", "05 00 05 04" + REFUSED),
    ("a name with a NUL", None,
     "05 01 00 05 01 00 03 0b 6c 6f 63 61 6c 68 6f 73 74 00 78 PP PP", "05 00 05 04" + REFUSED),
    ("a name that is no text", None, "05 01 00 05 01 00 03 02 ff fe 00 50",
     "05 00 05 04" + REFUSED),
    ("SOCKS4", None, "04 01 00 50 7f 00 00 01 00", ""),
    ("HTTP", None, "47 45 54 20 2f 20 48 54 54 50 2f 31 2e 30 0d 0a 0d 0a", ""),
    ("TLS", None, "16 03 01 02 00 01 00", ""),
    ("a request of another version", None, "05 01 00 04 01 00 01", "05 00"),
]


class ConversationTest(TestCase):
    def setUp(self):
        super().setUp()
        self.port = port_of(self.echo()).hex()
        self.servers = {False: self.serve(), True: self.serve(users=USERS)}

    def fill(self, frame):
        return octets(frame.replace(" ", "").replace("PPPP", self.port))

    def talk(self, users, pieces):
        """Return what the server says, in hex, to a client that sends `pieces` and its end."""
        with Client.to(self.servers[bool(users)].server_address) as client:
            with contextlib.suppress(OSError):  # the server may have hung up
                for piece in pieces:
                    client.sendall(piece)
                client.shutdown(socket.SHUT_WR)
            return read_all(client)[0].hex()

    def test_whole_and_byte_by_byte(self):
        for name, users, sent, answer in CONVERSATIONS:
            whole = self.fill(sent)
            step = 1 if len(whole) < 100 else 40
            for pieces in ([whole], [whole[start:start + step]
                                     for start in range(0, len(whole), step)]):
                with self.subTest(name, pieces=len(pieces)):
                    self.assertRegex(self.talk(users, pieces), "^%s$" % answer.replace(
                        " ", "").replace("??", ".."))

    def test_cut_after_each_byte(self):
        for name, users, sent, answer in CONVERSATIONS:
            whole = self.fill(sent)
            pairs = re.findall("..", answer.replace(" ", "").replace("??", ".."))
            beginning = "^" + "(?:".join([""] + pairs) + ")?" * len(pairs) + "$"
            for end in range(0, len(whole), 1 if len(whole) < 100 else 40):
                with self.subTest(name, end=end):
                    self.assertRegex(self.talk(users, [whole[:end]]), beginning)


class HandlerTest(TestCase):
    def test_bound_address_is_the_socket_s(self):
        server = self.serve(host="::" if has_ipv6() else "127.0.0.1")
        for host, frame in [("127.0.0.1", "01 7f 00 00 01"), ("::1", "04" + "00" * 15 + "01")]:
            if host == "::1" and not has_ipv6():
                continue
            with self.subTest(host), self.logged() as lines:
                listener = self.listen(host)
                client = self.own(Client.to((host, server.server_address[1]))).greet()
                client.sendall(octets("05 01 00" + frame) + port_of(listener.getsockname()[1]))
                target = self.own(listener.accept()[0])
                self.assertEqual(client.read_reply(), (Reply.SUCCEEDED, target.getpeername()[:2]))
                shown = ("[%s]:%d" if ":" in host else "%s:%d") % client.getsockname()[:2]
                client.close()
                target.close()
                self.assertEqual(self.session_line(lines)["client"], shown)

    def test_replies_to_what_a_hook_raises(self):
        for error, reply in [
                (OSError(errno.ECONNREFUSED, ""), 5), (OSError(errno.EMFILE, ""), 1),
                (socks5.RequestError(Reply.NOT_ALLOWED), 2), (EOFError(), 1), (MemoryError(), 1),
                (socks5.ProtocolError("client-left"), 1), (ZeroDivisionError("hunter2"), 1)]:
            with self.subTest(error=error), self.logged() as lines:
                server = self.serve_hook(mock.Mock(side_effect=error))
                client = self.client(server)
                client.say(TO + "00 50")
                client.hear("05 00 05 %02x" % reply + REFUSED)
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(client), (b"", "end"))
                self.stop(server)
                foreseen = isinstance(error, (OSError, socks5.RequestError))
                line = self.session_line(lines)
                self.assertEqual((line["reply"], line["end"]), (
                    Reply(reply).name, "refused" if foreseen else "error"))
                self.assertEqual([fields(line)["error"] for line in lines if "failed" in line],
                                 [] if foreseen else [type(error).__name__])
                self.assertNotIn("hunter2", "".join(lines))

    def test_login_that_cannot_be_checked(self):
        error = OSError("the directory does not answer")
        with self.logged() as lines:
            server = self.serve(hooked(authenticate=mock.Mock(side_effect=error)), users=USERS)
            client = self.client(server)
            client.say(LOGIN)
            self.assertEqual(read_all(client)[0], octets("05 02"))
            self.stop(server)
        self.assertEqual(self.session_line(lines)["end"], "error")
        self.assertIn("error=OSError", "".join(lines))

    def test_each_login_is_compared_once_and_in_constant_time(self):
        calls = []
        server = self.serve(users=USERS)
        with mock.patch("hmac.compare_digest",
                        lambda *pair: calls.append(pair) or pair[0] == pair[1]):
            for login in [("alice", "secret", "00"), ("alice", "x", "01"), ("bob", "x", "01"),
                          ("bob", "", "01")]:
                self.client(server).log_in(*login)
        self.assertEqual(len(calls), 4)

    def test_any_socket_of_a_hook_will_do(self):
        for name, timeout, pair in [("timeout", 0.01, self.pair()), ("no blocking", 0, self.pair()),
                                    ("no host", 0.01, socket.socketpair())]:
            ours, theirs = map(self.own, pair)
            ours.settimeout(timeout)
            bound = ("0.0.0.0", 0) if name == "no host" else ours.getsockname()
            with self.subTest(name):
                client = self.client(self.serve_hook(lambda ours=ours: ours)).greet()
                client.say("05 01 00 01 7f 00 00 01 00 50")
                self.assertEqual(client.read_reply(), (Reply.SUCCEEDED, bound))
                time.sleep(0.05)  # several times the timeout that the hook has left
                self.check_relay(client, theirs)
                theirs.close()
                self.assertEqual(read_all(client), (b"", "end"))

    def test_no_timeout_at_all(self):
        listener, never = self.listen(), float("inf")
        server = self.serve(connect_timeout=never, handshake_timeout=never, idle_timeout=never,
                            linger=never, bind_timeout=never, udp_timeout=never)
        for addresses in ([listener.getsockname()], [self.dead(), listener.getsockname()]):
            with resolver(*addresses):
                self.assertEqual(self.client(server).greet().ask(80, "x"), Reply.SUCCEEDED)
        self.client(server).greet().bind_for()
        self.assertEqual(self.client(server).greet().ask(0, "0.0.0.0", "03"), Reply.SUCCEEDED)

    def test_refusal_arrives_though_the_client_still_sends(self):
        with mock.patch.object(socks5, "REFUSAL_TIMEOUT", PATIENCE):
            client = self.client(self.serve())
            client.sendall(octets("05 01 00 05 04 00 01 7f 00 00 01 00 50") + bytes(100000))
            self.assertEqual(read_all(client), (octets("05 00 05 07" + REFUSED), "end"))
            for _ in range(3):  # the server has not closed: that would have been a reset
                client.sendall(bytes(1000))
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(client), (b"", "end"))

    def test_refused_client_that_stays_is_closed(self):
        for frame, answer in [("05 01 02", "05 ff"),
                              (TO.replace("05 01 00 01", "05 04 00 01") + "00 50",
                               "05 00 05 07" + REFUSED)]:
            with self.subTest(answer), self.within(6), self.logged() as lines, \
                    mock.patch.multiple(socks5, REFUSAL_TIMEOUT=0.05, SWEEP_INTERVAL=0.02):
                client = self.client(self.serve(handshake_timeout=PATIENCE))
                client.say(frame)
                self.assertEqual(read_all(client), (octets(answer), "end"))
                with self.assertRaises(OSError):
                    while True:  # until the reset that says that the server has closed
                        client.send(b"x")
                self.assertGreaterEqual(float(self.session_line(lines)["seconds"]), 0.05)

    def test_hooks(self):
        calls = []

        class Handler(socks5.Socks5RequestHandler):
            def select_method(self, offered):
                calls.append(offered)
                return socks5.Method.USERNAME_PASSWORD

            def authenticate(self, username, password):
                calls.append((username, password))
                return True

            def authorize(self, destination):
                calls.append(destination)
                return destination.port != 22

            def do_BIND(self, destination):
                raise socks5.RequestError(Reply.NETWORK_UNREACHABLE)

            def log_message(self, level, event, fields):
                calls.append((event, fields["end"]))

        server = self.serve(Handler)
        for request, reply in [("05 01 00 01 7f 00 00 01 00 16", "02"),
                               ("05 02 00 01 7f 00 00 01 00 50", "03")]:
            client = self.client(server)
            client.say("05 01 02 01 01 61 01 62" + request)
            client.hear("05 02 01 00 05" + reply)
            client.close()
        self.stop(server)
        self.assertEqual(sorted(map(repr, calls)), sorted(map(repr, [
            b"\2", (b"a", b"b"), Address("127.0.0.1", 22), ("session", "refused"),
            b"\2", (b"a", b"b"), Address("127.0.0.1", 80), ("session", "refused")])))


# ---- log ---------------------------------------------------------------------------------

class LogTest(TestCase):
    def test_session_line(self):
        listener = self.listen()
        port = listener.getsockname()[1]
        with resolver(("127.0.0.1", port)), self.logged() as lines:
            server = self.serve(users=USERS)
            client = self.client(server).log_in()
            self.assertEqual(client.ask(port, "localhost"), Reply.SUCCEEDED)
            client.sendall(b"12345")
            target = self.own(listener.accept()[0])
            self.assertEqual(read_count(target, 5), b"12345")
            target.sendall(b"123")
            target.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(client), (b"123", "end"))
            client.close()
            self.assertEqual(read_all(target), (b"", "end"))
            self.stop(server)
        self.assertEqual(len(lines), 1)
        self.assertRegex(lines[0], (
            r"^session client=127\.0\.0\.1:\d+ user=alice command=CONNECT "
            r"destination=localhost:%d reached=127\.0\.0\.1:%d reply=SUCCEEDED rule=- "
            r"up=5 down=3 seconds=\d+\.\d{3} end=target-closed$") % (port, port))

    def test_why_a_session_ended(self):
        for sent, reply, end in [
                ("", "-", "client-left"), ("05", "-", "client-left"),
                ("05 01 00 05", "-", "client-left"), ("47", "-", "not-socks5"),
                ("05 01 00 04 01 00", "-", "not-socks5"), ("05 01 02", "-", "no-acceptable-method"),
                ("05 01 00 05 01 00 02", "ADDRESS_TYPE_NOT_SUPPORTED", "refused"),
                ("05 01 00 05 04 00 01 00 00 00 00 00 00", "COMMAND_NOT_SUPPORTED", "refused")]:
            with self.subTest(sent=sent), self.logged() as lines:
                client = self.client(self.serve())
                client.say(sent)
                client.shutdown(socket.SHUT_WR)
                read_all(client)
                line = self.session_line(lines)
                self.assertEqual((line["reply"], line["end"]), (reply, end))

    def test_failed_login_has_a_line_and_no_password(self):
        with self.logged("DEBUG") as lines:
            server = self.serve(users=USERS)
            client = self.client(server)
            client.say("05 01 02 01 05 61 6c 69 63 65 07 68 75 6e 74 65 72 32")
            client.shutdown(socket.SHUT_WR)
            read_all(client)
            self.stop(server)
        self.assertRegex(lines[0], r"^login failed client=127\.0\.0\.1:\d+ user=alice$")
        line = self.session_line(lines)
        self.assertEqual((line["user"], line["end"]), ("-", "login-failed"))
        self.assertNotRegex("".join(lines), "hunter2|secret")

    def test_nothing_from_the_network_can_forge_a_line(self):
        name = b"x\r\nsession \x1b[31m client=6.6.6.6:1 \xe2\x80\xae\xff\\\0 end=fine"
        with self.ending("refused") as lines:
            client = self.client(self.serve()).greet()
            self.assertEqual(client.ask(80, name), Reply.HOST_UNREACHABLE)
            client.close()
        self.assertRegex(lines[0], r"^[!-~ ]*$")
        self.assertEqual(len(lines[0].split(" ")), 12)
        self.assertIn(r"destination=[x\r\nsession\x20\x1b[31m\x20client=6.6.6.6:1\x20", lines[0])

    def test_traceback_at_debug_only(self):
        for level, expected in (("INFO", False), ("DEBUG", True)):
            with self.assertLogs("socks5", level) as logs:
                server = self.serve(hooked(authorize=mock.Mock(side_effect=ZeroDivisionError)))
                self.assertEqual(self.client(server).greet().ask(80), Reply.GENERAL_FAILURE)
                self.stop(server)
            self.assertEqual([bool(record.exc_info) for record in logs.records
                              if record.levelname == "ERROR"], [expected])


# ---- server ------------------------------------------------------------------------------

class DeadlineTest(SweepTestCase):
    def test_silent_client(self):
        with self.within(6), self.logged() as lines:
            client = self.client(self.serve(handshake_timeout=0.1))
            self.assertEqual(read_all(client), (b"", "end"))
            line = self.session_line(lines)
            self.assertEqual(line["end"], "handshake-timeout")
            self.assertGreaterEqual(float(line["seconds"]), 0.1)

    def test_dripping_client(self):
        client = self.client(self.serve(handshake_timeout=0.15))
        client.settimeout(0.01)
        drops = iter(octets("05 ff") + bytes(255))
        with self.within(6), contextlib.suppress(ConnectionError):
            while True:
                try:
                    client.sendall(bytes([next(drops)]))
                    if not client.recv(1):
                        break
                except socket.timeout:
                    pass  # and on to the next drop, as long as there is one

    def test_handshake_timeout_ends_with_the_request(self):
        may_connect, (ours, target) = threading.Event(), self.pair()
        server = self.serve_hook(lambda: may_connect.wait(PATIENCE) and ours,
                                 handshake_timeout=0.1)
        client = self.client(server)
        client.say(TO + "00 50")
        self.assertEqual(read_all(self.client(server)), (b"", "end"))  # a client that came later
        may_connect.set()
        client.hear("05 00" + OPEN)
        self.assertEqual(read_all(self.client(server)), (b"", "end"))
        self.check_relay(client, target)

    def test_idle_relay_is_reset_and_never_looks_complete(self):
        real = socket.socket.shutdown

        def shutdown(sock, how):
            real(sock, how)
            time.sleep(0.05)  # so that a thread that this wakes acts first

        with self.within(6), self.ending("idle-timeout"), \
                mock.patch.object(socket.socket, "shutdown", shutdown):
            client, target = self.tunnel(self.serve(idle_timeout=0.1))
            self.assertEqual(read_all(client), (b"", "reset"))
            self.assertEqual(read_all(target), (b"", "reset"))

    def test_linger(self):
        with self.within(6), self.ending("linger-timeout"):
            client, target = self.tunnel(self.serve(linger=0.1))
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(target), (b"", "end"))
            self.assertEqual(read_all(client), (b"", "reset"))

    def test_failed_login_is_answered_later(self):
        with mock.patch.object(socks5, "LOGIN_PAUSE", 2 * PATIENCE), self.logged() as lines:
            server = self.serve(users=USERS)
            guess = self.client(server)
            guess.say("05 01 02 01 01 61 01 62")
            guess.hear("05 02")
            wait_until(lambda: any(line.startswith("login failed ") for line in lines))
            self.client(server).log_in()  # others are served in the meantime
            guess.setblocking(False)
            with self.assertRaises(BlockingIOError):
                guess.recv(1)
            guess.settimeout(PATIENCE)
            with self.within(6):
                self.stop(server)  # without waiting for the pause
            self.assertEqual(read_all(guess), (octets("01 01"), "end"))

    def test_failed_login_has_a_deadline_of_its_own(self):
        with mock.patch.multiple(socks5, LOGIN_PAUSE=0.2, REFUSAL_TIMEOUT=0.1), \
                self.within(6), self.logged() as lines:
            guess = self.client(self.serve(users=USERS, handshake_timeout=0.1))
            guess.say("05 01 02 01 01 61 01 62")
            self.assertEqual(read_all(guess), (octets("05 02 01 01"), "end"))
            line = self.session_line(lines)  # though the client stays
        self.assertEqual(line["end"], "login-failed")
        self.assertGreaterEqual(float(line["seconds"]), 0.3)

    def test_pause_of_the_whole_process_moves_each_deadline(self):
        clock = Clock()
        with mock.patch("time.monotonic", clock), self.logged() as lines:
            def ended():
                return [line for line in lines if line.startswith("session ")]

            server, sweeper = self.serve_in(
                idle_timeout=0.5, handshake_timeout=0.5, udp_timeout=0.5)
            client, target = self.tunnel(server)
            silent, control = self.client(server), self.client(server).greet()
            self.assertEqual(control.ask(0, "0.0.0.0", "03"), Reply.SUCCEEDED)
            wait_until(lambda: len(self.report(server)[0]) == 3)
            looks = clock.looks.count(sweeper)
            clock.at_next_look[sweeper] = lambda: clock.jump(PATIENCE / 2)
            wait_until(lambda: clock.looks.count(sweeper) > looks + 10)  # several sweeps
            self.assertEqual(ended(), [])
            self.check_one_way(client, target)
            with self.within(6):  # the deadlines have moved, and are still there
                for sock in (silent, control, client):
                    read_all(sock)
                wait_until(lambda: len(ended()) == 3)


class LimitsTest(SweepTestCase):
    HOSTS = ["127.0.0.1", "::"] if has_ipv6() else ["127.0.0.1"]

    def test_clients_that_are_served(self):
        for host in self.HOSTS:
            for clients, served in [(["127.0.0.0/8"], True), (["10.0.0.0/8", "127.0.0.1"], True),
                                    (["10.0.0.0/8", "::1"], False)]:
                with self.subTest(host, clients=clients), self.logged() as lines:
                    server = self.serve(host=host, clients=clients)
                    client = self.client(server.server_address[1])
                    with contextlib.suppress(OSError):  # the server may have closed already
                        client.say("05 01 02")
                        self.assertEqual(client.recv(2), octets("05 ff") if served else b"")
                    client.close()
                    self.stop(server)
                    self.assertRegex(lines[0], r"^session " if served else
                                     r"^client refused client=127\.0\.0\.1:\d+$")

    def test_limits(self):
        for setting in ("max_sessions", "max_per_client"):
            with self.subTest(setting):
                server = self.serve(**{setting: 2})
                tunnel, silent = self.tunnel(server), self.client(server)
                for _ in range(3):  # who says nothing counts
                    self.assertFalse(self.is_served(server))
                silent.close()
                wait_until(lambda server=server: self.is_served(server))
                server.settings = socks5.Settings(**{setting: 1})
                wait_until(lambda server=server: not self.is_served(server))
                tunnel[0].sendall(b"x")  # a limit that is lowered ends nobody
                self.assertEqual(read_count(tunnel[1], 1), b"x")

    def test_limit_is_each_client_s(self):
        for host in self.HOSTS:
            with self.subTest(host), self.logged() as lines:
                server = self.serve(host=host, max_per_client=1)
                self.client(server.server_address[1]).greet()
                self.assertFalse(self.is_served(server))
                self.assertTrue(self.is_served(server, "127.0.0.2"))
                self.assertRegex("\n".join(lines), (
                    r"(?m)^too many sessions of a client client=127\.0\.0\.1:\d+$"))

    def test_warnings_of_a_kind_are_a_line_each_interval(self):
        for kind, settings, owner, name, error in [
                ("client refused client=", {"clients": ["10.0.0.0/8"]}, None, "", None),
                ("too many sessions client=", {"max_sessions": 1}, None, "", None),
                ("too many sessions of a client client=", {"max_per_client": 1}, None, "", None),
                ("no thread for a client", {}, threading.Thread, "start", RuntimeError("limit")),
                ("not accepting", {}, socket.socket, "accept",
                 OSError(errno.EMFILE, "limit"))]:
            clock, errors = Clock(), []
            with self.subTest(kind), mock.patch("time.monotonic", clock), mock.patch.multiple(
                    socks5, WARNING_INTERVAL=PATIENCE, EXHAUSTION_PAUSE=0.01, IDLE_TIME=0), \
                    failing(owner or mock.Mock(), name or "unused", errors):
                server = self.serve(**settings)
                if "too many" in kind:
                    self.tunnel(server)
                with self.logged("WARNING") as lines:
                    for clients, jump in [(4, 0.9), (2, 0.2), (1, 1.1), (1, 0)]:
                        for _ in range(clients):
                            errors += [error]
                            self.assertEqual(self.is_served(server), "accepting" in kind)
                        clock.jump(jump * PATIENCE)
                if "no thread" in kind:
                    self.assertTrue(self.is_served(server))
                self.assertEqual(len(lines), 3, lines)
                for line, suppressed in zip(lines, [None, "5", None]):
                    self.assertTrue(line.startswith(kind), line)
                    self.assertEqual(fields(line).get("suppressed"), suppressed, line)


class ServerTest(SweepTestCase):
    def test_close_resets_busy_relays(self):
        server, ends, threads = self.serve(), [], []
        for _ in range(10):
            client, target = self.tunnel(server)
            threads += [self.thread(flood, target), self.thread(
                lambda client=client: ends.append(read_all(client)[1]))]
        self.stop(server)
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(ends, ["reset"] * 10)

    def test_close_while_an_attempt_is_about_to_begin(self):
        port, real, waiting = self.black_hole()[1], socket.socket.connect, threading.Event()

        def wait_for_hang_up():
            waiting.set()
            wait_until(lambda: server.fileno() == -1)
            time.sleep(0.1)  # nothing outside tells that the server has hung up on the session

        class Before(socks5.Socks5RequestHandler):
            def connect(self, destination):
                wait_for_hang_up()
                return super().connect(destination)

        def connect(sock, address):  # the session has this socket, which is not connecting yet
            if address[1] == port:
                wait_for_hang_up()
            return real(sock, address)

        for handler in (Before, socks5.Socks5RequestHandler):
            waiting.clear()
            with self.subTest(handler.__name__), self.ending("server-closed"), mock.patch.object(
                    socket.socket, "connect", real if handler is Before else connect):
                server = self.serve(handler, connect_timeout=float("inf"))
                self.client(server).sendall(octets(TO) + port_of(port))
                self.assertTrue(waiting.wait(PATIENCE))
                with self.within(6):
                    self.stop(server)

    def test_close_in_every_phase(self):
        nowhere, target = (port_of(sockaddr[1]).hex() for sockaddr in (
            self.black_hole(), self.listen().getsockname()))
        for name, frame, answer, end in [
                ("silent", "", "", "server-closed"),
                ("in the middle of a request", "05 01 00 05", "05 00", "server-closed"),
                ("connecting", TO + nowhere, "05 00", "server-closed"),
                ("refusing", "05 01 02", "05 ff", "no-acceptable-method"),
                ("relaying", TO + target, "05 00" + OPEN, "server-closed"),
                ("waiting for a peer", "05 01 00 05 02 00 01 7f 00 00 01 00 00", "05 00" + OPEN,
                 "server-closed"),
                ("relaying datagrams", "05 01 00 05 03 00 01 00 00 00 00 00 00", "05 00" + OPEN,
                 "server-closed")]:
            with self.subTest(name), mock.patch.object(socks5, "REFUSAL_TIMEOUT", PATIENCE), \
                    self.ending(end):
                server = self.serve(handshake_timeout=PATIENCE, connect_timeout=PATIENCE)
                client = self.client(server)
                client.say(frame)
                client.hear(answer)
                asked = len(octets(frame)) > 4
                wait_until(lambda server=server, asked=asked: any(
                    (live["command"] != "-") == asked for live in self.report(server)[0]))
                with self.within(6):
                    self.stop(server)

    def test_close_before_a_session_has_begun(self):
        begun, may_go_on = threading.Event(), threading.Event()

        class Handler(socks5.Socks5RequestHandler):
            def setup(self):
                begun.set()
                may_go_on.wait(PATIENCE)
                super().setup()

        server = self.serve(Handler)
        client = self.client(server)
        self.assertTrue(begun.wait(PATIENCE))
        server.shutdown()
        closing = self.thread(server.server_close)
        wait_until(lambda: server.fileno() == -1)
        may_go_on.set()
        with self.within(6):
            closing.join(PATIENCE)
        self.assertEqual(read_all(client)[0], b"")

    @unittest.skipUnless(os.name == "posix", "elsewhere another program could take the port")
    def test_restart_on_the_same_port_at_once(self):
        server = self.serve()
        client = self.client(server)
        client.say("47")
        self.assertEqual(read_all(client), (b"", "end"))
        client.close()
        self.stop(server)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(server.server_address)
            self.skipTest("the system forgot the closed connection, which should hold the port")
        with socks5.Socks5Server(server.server_address) as again:
            self.assertEqual(again.server_address, server.server_address)

    def test_report(self):
        server = self.serve()
        with self.logged() as lines:
            client, target = self.tunnel(server)
            client.sendall(bytes(7))
            read_count(target, 7)
            target.sendall(bytes(3))
            target.close()
            self.assertEqual(read_all(client), (bytes(3), "end"))
            client.close()
            self.client(server).close()
            wait_until(lambda: len(lines) == 2)
        client, target = self.tunnel(server)
        client.sendall(b"12345")
        self.assertEqual(read_count(target, 5), b"12345")
        wait_until(lambda: [live["up"] for live in self.report(server)[0]] == ["5"])
        with self.logged(socks5.NOTICE) as lines:
            server.report()
        self.assertRegex(lines[0], (
            r"^live client=127\.0\.0\.1:\d+ user=- command=CONNECT destination=127\.0\.0\.1:\d+ "
            r"reached=127\.0\.0\.1:\d+ reply=SUCCEEDED rule=- up=5 down=0 seconds=\d+\.\d{3} "
            r"idle=\d+\.\d{3} phase=\w+$"))
        self.assertEqual([fields(line) for line in lines[1:]], [
            {"live": "1", "sessions": "2", "up": "7", "down": "3", "target-closed": "1",
             "client-left": "1"}])

    def test_seconds_and_idle_count_from_the_right_moment(self):
        def check(shown, least, most):
            self.assertTrue(least - 0.001 <= float(shown) <= most + 0.001, (least, shown, most))

        server, now, before = self.serve(), time.monotonic, time.monotonic()
        listener, client = self.listen(), self.client(server)
        wait_until(lambda: self.report(server)[0])
        begun = now()
        time.sleep(0.05)
        self.assertEqual(client.greet().ask(listener.getsockname()[1]), Reply.SUCCEEDED)
        target = self.own(listener.accept()[0])
        time.sleep(0.05)
        sent = now()
        self.check_one_way(client, target)
        wait_until(lambda: float(self.report(server)[0][0]["idle"]) <= now() - sent)
        seen = now()
        time.sleep(0.05)
        start, (live,), end = now(), self.report(server)[0], now()
        check(live["seconds"], start - begun, end - before)
        check(live["idle"], start - seen, end - sent)
        with self.logged() as lines:
            client.close()
            target.close()
            check(self.session_line(lines)["seconds"], end - begun, now() - before)

    def test_drain(self):
        server = self.serve()
        with self.within(6):
            server.drain(PATIENCE)  # nobody is there
        client, target = self.tunnel(server)
        with self.within(6):
            server.drain(0)
            start = time.monotonic()
            server.drain(0.1)
            self.assertGreaterEqual(time.monotonic() - start, 0.09)
        server.shutdown()
        thread = self.thread(server.drain, PATIENCE)
        self.check_relay(client, target)  # the session goes on
        with self.ending("client-closed"):
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(target), (b"", "end"))
            self.check_one_way(target, client)
            target.close()
        with self.within(6):
            thread.join(PATIENCE)
        self.assertEqual(self.report(server)[0], [])

    def test_three_hundred_tunnels(self):
        if resource:
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            if 0 <= limits[1] < 2000:
                self.skipTest("too few descriptors")
            self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            resource.setrlimit(resource.RLIMIT_NOFILE, (2000, limits[1]))
        server, listener, tunnels = self.serve(), self.listen(), []
        for _ in range(300):
            client = self.client(server).greet()
            self.assertEqual(client.ask(listener.getsockname()[1]), Reply.SUCCEEDED)
            tunnels.append((client, self.own(listener.accept()[0])))
        for client, _ in tunnels:
            client.sendall(b"ping")
        for _, target in tunnels:
            self.assertEqual(read_count(target, 4), b"ping")
            target.sendall(b"pong")
        for client, _ in tunnels:
            self.assertEqual(read_count(client, 4), b"pong")
            client.close()

    def test_three_hundred_short_sessions(self):
        listener, server = self.listen(), self.serve()
        frame = octets(TO) + port_of(listener.getsockname()[1]) + b"ping"
        for _ in range(300):
            with Client.to(server.server_address) as client:
                client.sendall(frame)
                client.shutdown(socket.SHUT_WR)
                with listener.accept()[0] as target:
                    self.assertEqual(read_all(target), (b"ping", "end"))
                    target.sendall(b"pong")
                self.assertEqual(read_all(client)[0][-4:], b"pong")
        server.shutdown()
        server.drain(PATIENCE)
        self.assertEqual(self.report(server), ([], {
            "live": "0", "sessions": "300", "up": "1200", "down": "1200",
            "client-closed": "300"}))


class FaultTest(SweepTestCase):
    """Nothing that a session does, and no exception, ends the server, its sweep or its end."""

    def test_what_a_hook_does_wrong_costs_its_session_only(self):
        def divide(*args):
            return 1 // 0

        to = TO + "00 50"
        for hook, fault, frame, answer, error in [
                ("connect", lambda *args: None, to, "05 00 05 01" + REFUSED, "TypeError"),
                ("connect", lambda *args: "socket", to, "05 00 05 01" + REFUSED, "TypeError"),
                ("setup", lambda *args: None, to, "", "AttributeError"),  # no super().setup()
                ("setup", divide, to, "", "ZeroDivisionError"),
                ("log_message", divide, "05 01 02", "05 ff", "ZeroDivisionError")]:
            faults, real = [fault], getattr(socks5.Socks5RequestHandler, hook)

            def faulty(*args, faults=faults, real=real):
                return (faults.pop() if faults else real)(*args)

            with self.subTest(hook, error=error), self.logged() as lines, \
                    mock.patch.object(socks5, "REFUSAL_TIMEOUT", 0.05):
                server, thread = self.serve_in(
                    type("Handler", (socks5.Socks5RequestHandler,), {hook: faulty}))
                client = self.client(server)  # it stays: the sweep has to end it
                with contextlib.suppress(ConnectionError):
                    client.say(frame)
                    self.assertEqual(read_count(client, len(octets(answer))), octets(answer))
                wait_until(lambda lines=lines: any(
                    line.startswith("session failed ") for line in lines))
                self.check_sweeping(server)
                with self.within(6):
                    server.drain(PATIENCE)
                    self.stop(server)
                    thread.join(PATIENCE)
                self.assertEqual([fields(line)["error"] for line in lines
                                  if line.startswith("session failed ")], [error])

    def test_relay_whose_failure_cannot_be_logged_ends(self):
        def fail(record):
            raise MemoryError

        for side in (0, 1):
            server = self.serve()
            ends = self.tunnel(server)
            with self.subTest(SIDES[side]), breaking(READ, ends[side], MemoryError()), \
                    mock.patch.object(logging.getLogger("socks5"), "filter", fail), \
                    self.within(6):
                ends[side].sendall(b"x")
                self.assertEqual([read_all(end)[1] for end in ends], ["reset"] * 2)
                server.drain(PATIENCE)
                self.stop(server)

    def test_place_of_a_user_is_free_again_if_finish_fails(self):
        server, port = self.serve(users=USERS, max_per_user=1), self.echo()
        with failing(socks5.Socks5RequestHandler, "state", [MemoryError()]):
            for _ in range(2):
                with self.client(server).log_in() as client:
                    self.assertEqual(client.ask(port), Reply.SUCCEEDED)
                server.drain(PATIENCE)

    @LINUX_ONLY
    def test_client_whose_acceptance_fails_is_closed(self):
        server, failures = self.serve(), [MemoryError()]
        with failing(socket.socket, "setsockopt", failures,
                     lambda sock, *args: sock.getsockname() == server.server_address):
            self.assertEqual(read_all(self.client(server))[0], b"")
        self.assertEqual(failures, [])
        with self.within(6):
            self.client(server).greet().close()
            server.drain(PATIENCE)

    def check_error(self, owner, name, error):
        """Fail if `error`, raised once by this method, ends the accepting or the sweeping."""
        clock, errors = Clock(), []
        with self.logged("WARNING") as lines, mock.patch("time.monotonic", clock), \
                mock.patch.object(socks5, "EXHAUSTION_PAUSE", 0.01), failing(
                owner, name, errors, lambda it, *args: it is clock or (
                    it.fileno() == server.fileno())):
            server, thread = self.serve_in()
            errors.append(error)
            clock.at_next_look[thread] = lambda: clock.jump(0)
            self.is_served(server)
            wait_until(lambda: not errors)
            self.assertTrue(self.is_served(server))
            if isinstance(error, MemoryError):
                self.check_sweeping(server)
                self.assertIn("MemoryError", "".join(lines))
            else:  # an aborted connection is its client's affair
                self.assertEqual(bool(lines), error.errno != errno.ECONNABORTED)
            with self.within(6):
                self.stop(server)

    def test_no_exception_ends_the_sweeping_or_the_accepting(self):
        for owner, name in [(Clock, "jump"), (socks5.Socks5Server, "verify_request"),
                            (socket.socket, "accept")]:
            with self.subTest(name):
                self.check_error(owner, name, MemoryError())
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM,
                       errno.ECONNABORTED):
            with self.subTest(number):
                self.check_error(socket.socket, "accept", OSError(number, ""))


# ---- embedding ---------------------------------------------------------------------------

class EmbeddingTest(SweepTestCase):
    def test_running_serves_in_a_thread_until_the_block_ends(self):
        for error in (None, ZeroDivisionError):
            threads, ended = threading.active_count(), contextlib.ExitStack()
            if error:
                ended.enter_context(self.assertRaises(error))
            with self.subTest(error=error), self.logged() as lines:
                with ended, socks5.Socks5Server(("127.0.0.1", 0)).running() as server:
                    client, target = self.tunnel(server)
                    self.check_one_way(client, target)
                    if error:
                        raise error
                self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))
                self.assertEqual(self.session_line(lines)["end"], "server-closed")
                self.assertEqual(threading.active_count(), threads)
                with self.assertRaises(ConnectionRefusedError):
                    Client.to(server.server_address)

    def test_running_stops_at_once(self):
        times = []
        for _ in range(4):  # one of them is not disturbed by what else this host does
            with socks5.Socks5Server(("127.0.0.1", 0)).running() as server:
                self.client(server)
                self.tunnel(server)
                start = time.monotonic()
            times.append(time.monotonic() - start)
        self.assertLess(min(times), 0.3)  # serve_forever() alone may wait for 0.5

    def test_clients_are_chosen_by_verify_request(self):
        class Server(socks5.Socks5Server):
            def verify_request(self, request, client_address):
                return client_address[0] == "127.0.0.2"  # and the limits apply all the same

        server = self.serve(kind=Server, max_sessions=1)
        self.assertFalse(self.is_served(server))
        self.client(server, "127.0.0.2").greet()
        self.assertFalse(self.is_served(server, "127.0.0.2"))

    def test_connect_through_another_server(self):
        upstream = self.serve(users=USERS)

        class Handler(socks5.Socks5RequestHandler):
            def connect(self, destination):
                name, port = destination.host.encode(), destination.port.to_bytes(2, "big")
                sock = socket.create_connection(upstream.server_address,
                                                self.settings.connect_timeout)
                try:
                    sock.sendall(b"\x05\x01\x02\x01\x05alice\x06secret"
                                 b"\x05\x01\x00\x03" + bytes([len(name)]) + name + port)
                    code = read_count(sock, 14)[5]
                    if code:
                        raise socks5.RequestError(Reply(code))
                except BaseException:
                    sock.close()
                    raise
                return sock

        server = self.serve(Handler)
        client, content = self.client(server).greet(), pattern(MEBIBYTE)
        self.assertEqual(client.ask(self.echo(), "localhost"), Reply.SUCCEEDED)
        self.thread(lambda: (client.sendall(content), client.shutdown(socket.SHUT_WR)))
        self.assertEqual(read_all(client), (content, "end"))
        self.assertEqual(self.client(server).greet().ask(self.dead()[1]), Reply.CONNECTION_REFUSED)

    def test_connect_from_another_address_to_what_the_rules_allow(self):
        class Handler(socks5.Socks5RequestHandler):
            def connect(self, destination):
                deadline = time.monotonic() + self.settings.connect_timeout
                _, address = self.permitted(destination, deadline)[0]
                return socket.create_connection(address[:2], source_address=("127.0.0.9", 0))

        listener = self.listen()
        port = listener.getsockname()[1]
        server = self.serve(Handler, rules=["deny 127.0.0.5"])
        with resolver(("127.0.0.5", port), ("127.0.0.1", port)):
            self.assertEqual(self.client(server).greet().ask(port, "x"), Reply.SUCCEEDED)
        self.assertEqual(self.own(listener.accept()[0]).getpeername()[0], "127.0.0.9")
        self.assertEqual(self.client(server).greet().ask(port, "127.0.0.5"), Reply.NOT_ALLOWED)

    def test_record_of_users_and_destinations(self):
        seen = []

        class Handler(socks5.Socks5RequestHandler):
            def select_method(self, offered):  # a login is optional here
                return 2 if 2 in offered else 0

            def authorize(self, destination):
                seen.append((self.user, self.client_address, *destination))
                return False

        server = self.serve(Handler, users=USERS)
        for client, user, host in [(self.client(server).log_in(), "alice", "a.example"),
                                   (self.client(server, "127.0.0.3").greet(), "", "127.0.0.1")]:
            self.assertEqual(client.ask(80, host), Reply.NOT_ALLOWED)
            self.assertEqual(seen.pop(), (user, client.getsockname(), host, 80))

    def test_settings_that_change_are_for_new_sessions(self):
        server, port = self.serve(), self.echo()
        old = self.client(server).greet()
        server.settings = socks5.Settings(rules=["deny *"])
        self.assertEqual(self.client(server).greet().ask(port), Reply.NOT_ALLOWED)
        self.assertEqual(old.ask(port), Reply.SUCCEEDED)


# ---- doors: paths, systemd's sockets, balancers, sources ---------------------------------

ME = pwd.getpwuid(os.getuid()).pw_name if os.name == "posix" else ""
NOBODY, NAMELESS = 65534, 4000000123  # the second one has no name, and more than 31 bits
SIGNATURE = "0d 0a 0d 0a 00 0d 0a 51 55 49 54 0a"
ADDRESSES = " c0 00 02 01 c6 33 64 01 9d d0 04 38"  # 192.0.2.1:40400 to 198.51.100.1:1080
ADDRESSES_6 = " 20 01 0d b8" + "00" * 11 + "01 20 01 0d b8" + "00" * 11 + "02 9d d0 04 38"
LINE = ("50 52 4f 58 59 20 54 43 50 34 20 31 39 32 2e 30 2e 32 2e 31 20 31 39 38 2e 35 31 2e 31 "
        "30 30 2e 31 20 34 30 34 30 30 20 31 30 38 30 0d 0a")  # version 1, with ADDRESSES
LINE_6 = ("50 52 4f 58 59 20 54 43 50 36 20 32 30 30 31 3a 64 62 38 3a 3a 31 20 32 30 30 31 3a 64 "
          "62 38 3a 3a 32 20 34 30 34 30 30 20 31 30 38 30 0d 0a")
UNKNOWN = "50 52 4f 58 59 20 55 4e 4b 4e 4f 57 4e"  # without the end of the line
BLOCK = SIGNATURE + "21 11 00 0c" + ADDRESSES
LOCAL = SIGNATURE + "20 00 00 00"
HEADERS = [  # what a balancer sends, and client= in the log; None is the balancer itself
    (LINE, "192.0.2.1:40400"),
    (LINE_6, "[2001:db8::1]:40400"),
    (UNKNOWN + "0d 0a", None),
    (UNKNOWN + "20" + "66" * 91 + "0d 0a", None),  # 107 bytes
    (BLOCK, "192.0.2.1:40400"),
    (SIGNATURE + "21 21 00 24" + ADDRESSES_6, "[2001:db8::1]:40400"),
    (SIGNATURE + "21 21 00 24" + "00" * 10 + "ff ff c0 00 02 01" + "00" * 16 + "9d d0 04 38",
     "192.0.2.1:40400"),
    (SIGNATURE + "21 11 00 13" + ADDRESSES + "04 00 04 00 00 00 00", "192.0.2.1:40400"),  # a TLV
    (SIGNATURE + "21 11 10 00" + ADDRESSES + "00" * 4084, "192.0.2.1:40400"),  # 4,096 bytes
    (LOCAL, None),
    (SIGNATURE + "20 11 00 0c" + ADDRESSES, None), (SIGNATURE + "21 00 00 00", None),
    (SIGNATURE + "21 31 00 d8" + "2f" * 216, None)]  # a path
NO_HEADERS = [
    "05 01 00", b"GET / HTTP/1.0\r\n\r\n", b"PROXY\r\n", b"PROXY \r\n", b"PROXY \xff\r\n",
    b"PROXY TCP4\r\n", b"PROXY TCP4 192.0.2.1 198.51.100.1 40400\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.1 40400 1080\n", b"PROXYTCP4 192.0.2.1 1.1.1.1 1 1 1\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.1 65536 1080\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.1 -1 1080\r\n", b"PROXY TCP4 ::1 ::1 40400 1080\r\n",
    b"PROXY TCP6 192.0.2.1 198.51.100.1 40400 1080\r\n", b"PROXY TCP4 example 1.1.1.1 1 1\r\n",
    b"PROXY TCP4 192.0.2.1\x00 198.51.100.1 40400 1080\r\n",
    b"PROXY UDP4 192.0.2.1 198.51.100.1 40400 1080\r\n",
    UNKNOWN + "20" + "66" * 92 + "0d 0a", UNKNOWN + "20" + "66" * 93,  # 108 and 107 bytes
    SIGNATURE[:-2] + "0b 21 11 00 0c" + ADDRESSES, SIGNATURE + "11 11 00 0c" + ADDRESSES,
    SIGNATURE + "22 11 00 0c" + ADDRESSES, SIGNATURE + "21 11 10 01",
    SIGNATURE + "21 11 00 0b" + ADDRESSES[:-3], SIGNATURE + "21 21 00 23" + ADDRESSES_6[:-3]]
HAPROXY = """
defaults
    mode tcp
    retries 3
    option redispatch 1
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    timeout check 10s
listen socks5
    bind fd@%d
    balance roundrobin
    option tcp-check
    tcp-check connect default
    tcp-check send-binary 05020002
    tcp-check expect rbinary ^050[02]
    default-server check inter 50ms rise 1 fall 3 send-proxy-v2 check-send-proxy
    server a 127.0.0.1:%d
    server b 127.0.0.1:%d
"""
FORKER = """
import os, socket, sys, threading, traceback
import socks5

def give(*descriptors):
    os.environ.update(LISTEN_FDS=str(len(descriptors)), LISTEN_PID=str(os.getpid()))
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, 50 + number)
    for number in range(len(descriptors)):
        os.dup2(50 + number, 3 + number)

def bound(family, kind, address, listens=True):
    sock = socket.socket(getattr(socket, family), getattr(socket, kind))
    sock.bind(address)
    if listens:
        sock.listen(1)
    return sock.detach()

answers = []
for setup, arguments in eval(sys.argv[1]):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 2)
        threading.Timer(20, os._exit, [98]).start()  # it serves, against expectation
        try:
            exec(setup)
            os._exit(socks5.main(arguments))
        except SystemExit as error:
            os._exit(error.code)
        except BaseException:
            traceback.print_exc()
        os._exit(99)
    os.close(writing)
    answers.append((os.waitpid(child, 0)[1] >> 8, os.read(reading, 65536).decode()))
    os.close(reading)
print(answers)
"""


class DoorTestCase(CommandTestCase):
    """Tests with paths, and with sockets that are passed to a process."""

    def folder(self):
        """Return the path of a folder that other accounts can enter; it is removed at the end."""
        path = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, path)
        os.chmod(path, 0o755)
        return path

    def knock(self, path, user=None):
        """Return a client that is connected to `path`, as the account with the number `user`."""
        client = Client(socket.AF_UNIX)
        self.own(client)

        def connect():
            if user is not None:
                os.setgroups([])
                os.setuid(user)
            client.connect(path)

        if user is None:
            connect()
        else:
            subprocess.check_call(["true"], preexec_fn=connect, close_fds=False, cwd="/")
        return client

    def serve_path(self, **settings):
        """Return the path of a server that serves, for all accounts."""
        path = os.path.join(self.folder(), "socks5.sock")
        self.serve(address=path, mode=0o666, **settings)
        return path

    def check_errors(self, *rows):
        """Call ``main`` for rows of code to run before, arguments, status, and part of stderr.

        One interpreter forks for all of them, which saves seconds.
        """
        process = self.start("-c", FORKER, repr([row[:2] for row in rows]))
        out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual(err, "")
        for row, (status, err) in zip(rows, eval(out.splitlines()[-1])):
            with self.subTest(row):
                self.assertNotIn("Traceback", err)
                self.assertIn(row[3], err)
                self.assertEqual(status, row[2])

    def pass_on(self, sock, *options, limit=None, **environment):
        """Start `socks5.py` with `sock` as its descriptor 3, as systemd does."""
        def prepare():
            if sock:
                os.dup2(sock.fileno(), 3)
                os.set_inheritable(3, True)
                environment.setdefault("LISTEN_PID", str(os.getpid()))
                os.environ["LISTEN_FDS"] = "1"
            os.environ.update(environment)
            if limit:
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        return self.start("socks5.py", *options, preexec_fn=prepare, close_fds=False)

    def end(self, process):
        """End `process` with SIGTERM; return what it said on stderr."""
        process.terminate()
        err = process.communicate(timeout=PATIENCE)[1]
        self.assertEqual(process.returncode, 0)
        self.assertNotIn("Traceback", err)
        return err


@unittest.skipUnless(hasattr(socket, "SO_PEERCRED"), "the kernel does not name the peer")
class PathTest(DoorTestCase):
    def test_a_client_is_its_login_name_unless_it_logs_in(self):
        port, data = self.echo(), b"x" * 100000
        for settings, greet, user in (
                ({"rules": ["allow %s@127.0.0.1" % ME], "clients": ["192.0.2.0/24"]},
                 Client.greet, ME),
                ({"users": USERS, "rules": ["deny %s@*" % ME, "allow alice@*"]},
                 Client.log_in, "alice")):
            with self.subTest(user=user), self.logged() as lines:
                client = greet(self.knock(self.serve_path(**settings)))
                self.assertEqual(client.ask(port), Reply.SUCCEEDED)  # on loopback: it is local
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(client), (data, "end"))
                line = self.session_line(lines)
                self.assertEqual((line["client"], line["user"], line["end"]),
                                 ("unix:" + ME, user, "client-closed"))

    @unittest.skipIf(os.getuid(), "needs root, for other accounts")
    def test_rules_and_limits_for_each_account(self):
        name = pwd.getpwuid(NOBODY).pw_name
        port, clients = self.echo(), []
        with self.logged() as lines:
            path = self.serve_path(rules=["deny root@*", "allow %s@*" % name,
                                          "allow %d@*" % NAMELESS], max_per_client=1)
            for user, reply in (None, 2), (NOBODY, 0), (NAMELESS, 0):
                clients.append(self.knock(path, user).greet())
                self.assertEqual(clients[-1].ask(port), reply)
            self.assertEqual(self.knock(path, NOBODY).recv(1), b"")
            for client in clients:
                client.close()
            wait_until(lambda: sum(line.startswith("session ") for line in lines) == 3)
        self.assertIn("too many sessions of a client client=unix:" + name, lines)
        self.assertEqual({line["client"] + " " + line["user"] for line in map(fields, lines)
                          if "user" in line}, {
            "unix:{0} {0}".format(user) for user in ("root", name, NAMELESS)})

    def test_only_CONNECT_is_served_and_only_if_enabled(self):
        port = self.echo()
        for commands, replies in (["connect", "udp", "bind"], [0, 7, 7]), (["udp"], [7, 7, 7]):
            path = self.serve_path(commands=commands)
            self.assertEqual([self.knock(path).greet().ask(port, command=command)
                              for command in ("01", "02", "03")], replies)

    def test_mode_start_line_curl_and_end(self):
        for options, mode in ((), 0o600), (("--workers", "2", "--mode", "0660"), 0o660):
            path = os.path.join(self.folder(), "socks5.sock")
            process = self.start("socks5.py", "-b", path, *options)
            line = process.stdout.readline()
            self.assertEqual(line, "Serving SOCKS5 on %s (curl -x socks5h://localhost%s, "
                             "ssh -L 1080:%s HOST) ...\n" % (path, path, path))
            status = os.stat(path)
            self.assertTrue(stat.S_ISSOCK(status.st_mode))
            self.assertEqual(stat.S_IMODE(status.st_mode), mode)
            if shutil.which("curl"):  # before 7.84, it takes the path for a part of the name
                curl = shlex.split(re.search(r"\((curl [^,]*),", line).group(1))
                page = subprocess.run(
                    curl + ["-sS", "http://127.0.0.1:%d/" % self.web_server()],
                    stdout=subprocess.PIPE, timeout=PATIENCE)
                self.assertEqual(page.stdout, b"page")
            self.assertIn("client=unix:" + ME, self.end(process))
            self.assertFalse(os.path.exists(path))

    def test_what_stands_at_the_path(self):
        folder = self.folder()
        paths = {name: os.path.join(folder, name) for name in
                 ("live", "stale", "file", "folder", "link", "datagrams", "gone/x", "x" * 108)}
        for name, kind in (("live", socket.SOCK_STREAM), ("stale", socket.SOCK_STREAM),
                           ("datagrams", socket.SOCK_DGRAM)):
            sock = self.own(socket.socket(socket.AF_UNIX, kind))
            sock.bind(paths[name])
            if name == "live":
                sock.listen(1)
            elif name == "stale":
                sock.close()
        with open(paths["file"], "w"):
            os.mkdir(paths["folder"])
        os.symlink("stale", paths["link"])
        in_use, before = "Address already in use", os.listdir(folder)
        self.check_errors(*[
            ("", ["-b", paths[name]], 1, "cannot listen on %s: %s" % (paths[name], reason))
            for name, reason in [
                ("live", in_use), ("file", in_use), ("folder", in_use), ("link", in_use),
                ("datagrams", ""), ("gone/x", "No such file"),
                ("x" * 108, "AF_UNIX path too long")]])
        self.assertEqual(os.listdir(folder), before)
        server = socks5.Socks5Server(paths["stale"])  # which is removed
        os.rename(paths["stale"], paths["stale"] + "2")
        successor = socks5.Socks5Server(paths["stale"])
        server.server_close()  # its path is no longer its own
        self.assertTrue(os.path.exists(paths["stale"]))
        successor.server_close()
        self.assertFalse(os.path.exists(paths["stale"]))

    def test_usage_errors(self):
        path, control = os.path.join(self.folder(), "s"), "without access control"
        missing = "del socket.SO_PEERCRED"
        users = self.file(b"alice:secret\n")
        self.check_errors(
            ("", ["-b", path, "--mode", "0666"], 2, "listen on %s %s" % (path, control)),
            ("", ["-b", path, "--mode", "rw"], 2, "--mode: not permissions like 0660"),
            ("", ["-b", path, "1080"], 2, "is a path: do not give a port"),
            (missing, ["-b", path, "--deny", "bob@*"], 2, "--users"),  # would fail open
            (missing, ["-b", path, "--allow", "bob@*"], 2, "--users"),
            ("", ["-b", path, "--users", users, "--allow", "bob@*"], 2, "no such user"),
            ("", ["-b", "127.0.0.1", "--proxy-from", "127.0.0.1", "0"], 2, control),
            ("", ["--proxy-from", "10.0.0.1/8", "--open", "0"], 2, "did you mean 10.0.0.0/8?"),
            ("", ["--source", "localhost", "0"], 2, "source: not an IP address"),
            ("", ["--max-per-user", "0", "0"], 2, "--max-per-user: not a number from 1"))
        self.assertFalse(os.path.exists(path))


@LINUX_ONLY
class SystemdTest(DoorTestCase):
    def test_it_serves_on_each_family_and_speaks_to_systemd(self):
        path, port, started = self.own(socket.socket(socket.AF_UNIX)), self.echo(), []
        path.bind(os.path.join(self.folder(), "inherited"))
        os.chmod(path.getsockname(), 0o600)
        path.listen(9)
        for listener, workers in ((path, "1"), (self.listen(), "2"),
                                  (self.listen("::1" if has_ipv6() else "127.0.0.1"), "1")):
            told = self.own(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            told.bind(os.path.join(self.folder(), "notify"))
            listener.setblocking(False)  # which this process may do, and the other inherits
            process = self.pass_on(listener, "--workers", workers, "-q",
                                   NOTIFY_SOCKET=told.getsockname())
            started.append((listener, told, process))
        for listener, told, process in started:
            with self.subTest(listener):
                self.assertEqual(told.recv(1000), b"READY=1")
                process.send_signal(signal.SIGHUP)
                self.assertRegex(told.recv(1000), rb"^RELOADING=1\nMONOTONIC_USEC=\d+\Z")
                self.assertEqual(told.recv(1000), b"READY=1")
                client = (Client.to(listener.getsockname()) if listener is not path
                          else self.knock(path.getsockname()))
                self.assertEqual(client.greet().ask(port), Reply.SUCCEEDED)
                client.close()
                self.assertTrue(os.get_blocking(listener.fileno()))  # otherwise accept() spins
                self.assertIn("settings reloaded", self.end(process))
                self.assertEqual(told.recv(1000), b"STOPPING=1")
                told.setblocking(False)
                self.assertRaises(BlockingIOError, told.recv, 1)  # no worker has spoken
        self.assertTrue(os.path.exists(path.getsockname()))

    def test_another_process_is_meant_and_nobody_listens_to_it(self):
        process = self.pass_on(self.listen(), "-q", "0", LISTEN_PID="1",
                               NOTIFY_SOCKET=os.path.join(self.folder(), "gone"))
        self.client(self.port(process)).greet().close()
        self.end(process)

    def test_what_is_passed_must_be_one_listening_stream_socket(self):
        tcp, udp, unix = ("give(bound('AF_INET', 'SOCK_STREAM', ('127.0.0.1', 0)))",
                          "give(bound('AF_INET', 'SOCK_DGRAM', ('127.0.0.1', 0), False))",
                          "give(bound('AF_UNIX', 'SOCK_%s', %r))")
        folder = self.folder()
        path, one = os.path.join(folder, "s"), "descriptor 3 is not a listening stream socket"
        both = tcp.replace("give(", "one = ", 1)[:-1] + "; give(one, one)"
        self.check_errors(
            (both, [], 2, "systemd passed 2 sockets, and not 1"),
            ("give()", [], 2, "systemd passed 0 sockets"),
            ("give(); os.environ['LISTEN_FDS'] = 'x'", [], 2, "systemd passed x sockets"),
            ("give(os.open('/dev/null', os.O_RDWR))", [], 2, "descriptor 3 is not a"),
            ("give(2); os.close(3)", [], 2, "descriptor 3 is not a"), (udp, [], 2, one),
            (tcp.replace(", 0))", ", 0), False)"), [], 2, one),
            (unix % ("SEQPACKET", path), [], 2, one),
            (unix % ("STREAM", "\0" + path), [], 2, one),
            (tcp, ["1080"], 2, "systemd passed a socket: do not give an address or a port"),
            (tcp, ["-b", "127.0.0.1"], 2, "systemd passed a socket"),
            (tcp.replace("127.0.0.1", "0.0.0.0"), [], 2, "refusing to listen on 0.0.0.0"),
            ("os.umask(0); " + unix % ("STREAM", path + "2"), [], 2, "without access control"))

    def test_the_queue_is_left_to_the_successor(self):
        listener = self.listen()
        process = self.pass_on(listener, "-q", limit=20)  # enough for two sessions
        clients = [Client.to(listener.getsockname()).greet() for _ in range(2)]
        queued = self.own(Client.to(listener.getsockname()))
        process.stdout.readline()
        process.terminate()
        self.assertEqual(process.stdout.readline(), "Shutting down.\n")
        for client in clients:
            client.close()
        self.assertEqual(process.wait(PATIENCE), 0)
        successor, address = listener.accept()
        successor.close()
        self.assertEqual(address, queued.getsockname())

    def test_a_restart_loses_nobody(self):  # noqa: C901
        port, failures, stop = self.echo(), [], threading.Event()

        def load(listener, count):
            try:
                while not stop.is_set():
                    with Client.to(listener.getsockname()) as client:
                        if client.greet().ask(port):
                            raise AssertionError
                        client.say("61 62 63")
                        client.hear("61 62 63")
                    count.append(1)
            except Exception as error:
                failures.append(error)

        def start():
            return [self.pass_on(listener, "-q", "--workers", workers)
                    for listener, workers, _ in listeners]

        def has_served(more):
            return failures or all(len(count) >= least for (_, _, count), least in zip(
                listeners, more))
        listeners = [(self.listen(), workers, []) for workers in ("1", "2")]
        processes = start()
        self.addCleanup(stop.set)
        threads = [self.thread(load, listener, count)
                   for listener, _, count in listeners for _ in range(2)]
        wait_until(lambda: has_served([20, 20]))
        for process in processes:
            process.terminate()
        for process in processes:
            self.assertEqual(process.wait(PATIENCE), 0)
        before = [len(count) for _, _, count in listeners]
        processes = start()
        wait_until(lambda: has_served([count + 20 for count in before]))
        stop.set()
        for thread in threads:
            thread.join()
        for process in processes:
            self.end(process)
        self.assertEqual(failures, [])

    @unittest.skipUnless(shutil.which("systemd-socket-activate"), "no systemd-socket-activate")
    def test_under_systemd_socket_activate(self):
        path, port = os.path.join(self.folder(), "s"), self.echo()
        process = subprocess.Popen(
            ["systemd-socket-activate", "-l", path, sys.executable, "socks5.py", "--open"],
            cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait, PATIENCE)
        self.addCleanup(process.kill)
        self.assertIn(b"Listening", process.stderr.readline())
        client = self.knock(path).greet()
        self.assertEqual(client.ask(port), Reply.SUCCEEDED)
        client.close()
        process.terminate()
        self.assertIn(b"client=unix:" + ME.encode(), process.stderr.read())


@LINUX_ONLY
class BalancerTest(DoorTestCase):
    def behind(self, server, header):
        """Return a client whose connection begins with `header`."""
        client = self.client(server)
        client.sendall(header if isinstance(header, bytes) else octets(header))
        return client

    def header_for(self, host, port=40400):
        """Return a header of version 2 for an IPv4 client."""
        return octets(SIGNATURE + "21 11 00 0c") + socket.inet_aton(host) + octets(
            "c6 33 64 01") + port_of(port) + octets("04 38")

    def lines_of(self, server, lines):
        """Stop `server`; return the fields of its sessions' lines."""
        self.stop(server)
        return [fields(line) for line in lines if line.startswith("session ")]

    def test_each_header_names_the_client_and_no_remote_one_is_local(self):
        for header, name in HEADERS:
            data = octets(header + "05 01 00 05 01 00 01 7f 00 00 01 00 09")
            for step in 5000, 1 if len(data) < 100 else 40:
                with self.subTest(header=header[:80], step=step), self.logged() as lines:
                    server = self.serve(proxy_from=["127.0.0.1"])
                    client = self.client(server)
                    for start in range(0, len(data), step):  # what is pipelined is kept
                        client.sendall(data[start:start + step])
                    client.hear("05 00 05 02" + REFUSED)
                    line, = self.lines_of(server, lines)
                    self.assertEqual((line["client"], line["rule"]), (
                        name or "127.0.0.1:%d" % client.getsockname()[1],
                        "built-in:127.0.0.0/8"))

    def test_a_header_that_is_cut(self):
        for header in LINE, BLOCK:
            with self.logged() as lines:
                server = self.serve(proxy_from=["127.0.0.1"])
                for length in range(len(octets(header))):
                    client = self.behind(server, octets(header)[:length])
                    client.shutdown(socket.SHUT_WR)
                    self.assertEqual(read_all(client), (b"", "end"))
                    client.close()
                ends = {line["end"] for line in self.lines_of(server, lines)}
            self.assertEqual(ends, {"client-left"})
            self.assertEqual(len(lines), length + 1)  # and none about an exception

    def test_what_is_no_header_is_hung_up_on_at_once(self):
        with self.logged() as lines:
            server = self.serve(proxy_from=["127.0.0.1"])
            for header in NO_HEADERS:
                with self.subTest(header), self.within(6):
                    self.assertEqual(read_all(self.behind(server, header))[0], b"")
            ends = [line["end"] for line in self.lines_of(server, lines)]
        self.assertEqual(ends, ["not-proxy"] * len(NO_HEADERS))
        self.assertEqual(len(lines), len(NO_HEADERS))

    def test_the_handshake_has_one_deadline(self):
        with self.logged() as lines, self.within(6), mock.patch.object(
                socks5, "SWEEP_INTERVAL", 0.02):
            server = self.serve(proxy_from=["127.0.0.1"], handshake_timeout=0.1)
            clients = [self.behind(server, header)
                       for header in (octets(LINE)[:20], octets(BLOCK)[:20], BLOCK)]
            self.assertEqual([read_all(client)[0] for client in clients], [b""] * 3)
            ends = [line["end"] for line in self.lines_of(server, lines)]
        self.assertEqual(ends, ["handshake-timeout"] * 3)

    def test_from_elsewhere_a_header_is_another_protocol(self):
        with self.logged() as lines:
            server = self.serve(proxy_from=["127.0.0.1", "::1"])
            for header in LINE, BLOCK:
                client = self.client(server, "127.0.0.2")
                client.say(header)
                self.assertEqual(read_all(client)[0], b"")
            self.client(server, "127.0.0.2").greet()
            ends = [line["end"] for line in self.lines_of(server, lines)]
        self.assertEqual(sorted(ends), ["not-socks5"] * 2 + ["server-closed"])

    def test_clients_and_limits_are_those_of_the_true_client(self):
        with self.logged() as lines:
            server = self.serve(proxy_from=["127.0.0.1"], clients=["192.0.2.0/24"],
                                max_per_client=1)
            waiting = [self.client(server) for _ in range(2)]  # nobody knows yet whose they are
            self.behind(server, BLOCK).greet()
            for header in LINE, self.header_for("127.0.0.1"):
                self.assertEqual(read_all(self.behind(server, header))[0], b"")
            for number, client in enumerate(waiting, 2):
                client.sendall(self.header_for("192.0.2.%d" % number))
                client.greet()
            ends = [line["end"] for line in self.lines_of(server, lines)]
        self.assertEqual(sorted(ends), ["rejected"] * 2 + ["server-closed"] * 3)
        self.assertIn("client refused client=127.0.0.1:40400", lines)
        self.assertIn("too many sessions of a client client=192.0.2.1:40400", lines)

    def test_before_its_header_a_connection_counts_for_max_sessions(self):
        with self.logged() as lines:
            server = self.serve(proxy_from=["127.0.0.1"], max_sessions=1)
            self.client(server)
            wait_until(lambda: not server.drain(0))
            self.assertEqual(read_all(self.client(server, "127.0.0.2"))[0], b"")
            self.assertEqual(read_all(self.behind(server, BLOCK))[0], b"")
            self.assertRegex(lines[0], "^too many sessions client=127.0.0.2:")
            self.assertIn("rejected", [line["end"] for line in self.lines_of(server, lines)])

    def test_hooks_and_logins_see_the_true_client(self):
        asked = []

        class Handler(socks5.Socks5RequestHandler):
            def authorize(self, destination):
                asked.append(self.client_address)
                return True

        class Server(socks5.Socks5Server):
            def verify_request(self, request, client_address):
                asked.append(client_address)
                return super().verify_request(request, client_address)

        with self.logged() as lines, Server(
                ("127.0.0.1", 0), Handler, users=USERS,
                proxy_from=["127.0.0.0/8"]).running() as server:
            client = self.behind(server, LINE).log_in()
            self.assertEqual(client.ask(9), Reply.NOT_ALLOWED)
            self.behind(server, self.header_for("192.0.2.7")).log_in("a", "b", "01")
        self.assertEqual(asked, [("192.0.2.1", 40400)] * 2 + [("192.0.2.7", 40400)])
        self.assertIn("login failed client=192.0.2.7:40400 user=a", lines)

    def test_a_health_check_is_logged_at_debug_level_unless_it_asks(self):
        for header in LOCAL, UNKNOWN + "0d 0a":
            for level, count in ("INFO", 1), ("DEBUG", 2):
                with self.subTest(header=header, level=level), self.logged(level) as lines:
                    server = self.serve(proxy_from=["127.0.0.1"])
                    self.behind(server, header).greet().close()
                    self.behind(server, header).greet().ask(9)
                    self.assertEqual(len(self.lines_of(server, lines)), count)

    def test_BIND_and_UDP(self):
        plain = self.serve(proxy_from=["127.0.0.1"])
        header = self.header_for("127.0.0.1")
        self.assertEqual(self.behind(plain, header).greet().ask(9, command="02"), 7)
        self.assertEqual(self.behind(plain, header).greet().ask(9, command="03"), 7)
        target, sender = self.datagrams(), self.datagrams()
        server = self.serve(proxy_from=["127.0.0.1"], udp_advertise="127.0.0.9")
        self.assertEqual(self.behind(server, header).greet().ask(9, command="02"), 7)
        client = self.behind(server, header).greet()
        client.say("05 03 00 01 00 00 00 00 00 00")
        code, (host, port) = client.read_reply()
        self.assertEqual((code, host), (Reply.SUCCEEDED, "127.0.0.9"))
        frame = octets("00 00 00 01 7f 00 00 01") + port_of(target.getsockname()[1])
        sender.sendto(frame + b"ping", (host, port))  # the socket is on all addresses
        data, outside = target.recvfrom(100)
        target.sendto(data[::-1], outside)
        self.assertEqual(sender.recv(100), frame + b"gnip")

    @unittest.skipUnless(shutil.which("haproxy"), "no haproxy")
    def test_two_instances_behind_haproxy(self):
        served, door, port = [], self.listen(), self.echo()

        def visit():
            client = self.client(door.getsockname()[1], "127.0.0.2").greet()
            self.assertEqual(client.ask(port), Reply.SUCCEEDED)
            client.close()

        handler = hooked(authorize=lambda handler, _: not served.append(handler.server))
        servers = [self.serve(handler, proxy_from=["127.0.0.1"], clients=["127.0.0.2"])
                   for _ in range(2)]
        path = self.file((HAPROXY % (door.fileno(), servers[0].server_address[1],
                                     servers[1].server_address[1])).encode())
        with self.logged("DEBUG") as lines:
            process = subprocess.Popen(
                ["haproxy", "-db", "-f", path], pass_fds=[door.fileno()],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.addCleanup(process.wait, PATIENCE)
            self.addCleanup(process.kill)
            wait_until(lambda: len(lines) >= 4)  # health checks
            self.assertEqual({fields(line)["end"] for line in lines}, {"client-left"})
            for _ in range(4):
                visit()
            self.assertEqual(set(served), set(servers))
            self.stop(servers[0])
            for _ in range(4):
                visit()
            self.assertEqual(served[4:], [servers[1]] * 4)
            stranger = self.client(door.getsockname()[1])
            stranger.say("05 01 00")
            self.assertEqual(read_all(stranger)[0], b"")
            self.stop(servers[1])
        clients = [fields(line)["client"] for line in lines if "command=CONNECT" in line]
        self.assertEqual([client.partition(":")[0] for client in clients], ["127.0.0.2"] * 8)
        self.assertTrue(any(line.startswith("client refused client=127.0.0.1:")
                            for line in lines))


@LINUX_ONLY
class SourceTest(DoorTestCase):
    def test_targets_see_the_source(self):
        ports, connect = [], socket.socket.connect

        def connecting(sock, address):
            if sock.getsockname()[0] == "127.0.0.2":
                ports.append(sock.getsockname()[1])
            return connect(sock, address)
        listener = self.listen()
        server = self.serve(source="127.0.0.2")
        port = listener.getsockname()[1]
        with mock.patch.object(socket.socket, "connect", connecting), resolver(
                ("::1", port, 0, 0), ("127.0.0.1", port)):
            for host in "127.0.0.1", "a.example":  # its address of the other family is left out
                client = self.client(server).greet()
                client.sendall(octets("05 01 00 03") + bytes([len(host)]) + host.encode()
                               + port_of(port))
                code, (bound, _) = client.read_reply()
                self.assertEqual((code, bound), (Reply.SUCCEEDED, "127.0.0.2"))
                self.assertEqual(self.own(listener.accept()[0]).getpeername()[0], "127.0.0.2")
        self.assertEqual(ports, [0, 0])  # IP_BIND_ADDRESS_NO_PORT

    def test_the_other_family_is_refused(self):
        for source, address in (("127.0.0.2", "04" + "00" * 15 + "01"), ("::1", "01 7f 00 00 01")):
            client = self.client(self.serve(source=source)).greet()
            client.say("05 01 00" + address + "00 09")
            self.assertEqual(client.read_reply()[0], Reply.NETWORK_UNREACHABLE)

    def test_datagrams_come_from_the_source(self):
        sender, target = self.datagrams(), self.datagrams()
        with self.logged() as lines:
            client = self.client(self.serve(source="127.0.0.2")).greet()
            client.say("05 03 00 01 00 00 00 00 00 00")
            inside = client.read_reply()[1]
            port = port_of(target.getsockname()[1])
            sender.sendto(octets("00 00 00 04" + "00" * 15 + "01") + port + b"lost", inside)
            sender.sendto(octets("00 00 00 01 7f 00 00 01") + port + b"ping", inside)
            data, source = target.recvfrom(100)
            self.assertEqual((data, source[0]), (b"ping", "127.0.0.2"))
            client.close()
            self.assertEqual(self.session_line(lines)["dropped"], "1")

    def test_max_per_user(self):
        port = self.echo()
        with self.logged() as lines:
            server = self.serve(users=USERS, max_per_user=1)
            first, second = (self.client(server).log_in() for _ in range(2))
            self.assertEqual(first.ask(port), Reply.SUCCEEDED)  # one that only logs in is none
            self.assertEqual(second.ask(port), Reply.NOT_ALLOWED)
            other = self.client(server).log_in("b\u00fcb", "\u20ac")
            self.assertEqual(other.ask(port), Reply.SUCCEEDED)
            first.close()
            wait_until(lambda: any("end=client-closed" in line for line in lines))
            # The refused client is still connected, and counts no more than one that has left.
            self.assertEqual(self.client(server).log_in().ask(port), Reply.SUCCEEDED)
        self.assertIn("too many sessions of a user client=127.0.0.1:%d user=alice"
                      % second.getsockname()[1], lines)

    def test_balancers_and_the_source_are_reloaded(self):
        listener = self.listen()
        path = self.file(b"--client 127.0.0.0/8")
        process, port = self.serve_command("@" + path)

        def reload(text, answer):
            with open(path, "w") as file:
                file.write(text)
            process.send_signal(signal.SIGHUP)
            self.assertIn(answer, next(line for line in process.stderr if "reload" in line))
        self.client(port).greet().close()
        options = "--proxy-from 127.0.0.1\n--source 127.0.0.2\n--allow 127.0.0.1\n"
        reload(options + "--client 192.0.2.0/24", "settings reloaded")
        client = self.client(port)
        client.say(BLOCK)
        self.assertEqual(client.greet().ask(listener.getsockname()[1]), Reply.SUCCEEDED)
        target = self.own(listener.accept()[0])
        self.assertEqual(target.getpeername()[0], "127.0.0.2")
        target.close()
        reload(options, "reload failed, keeping the current settings: refusing to listen")
        client.close()
        process.terminate()
        self.assertIn("client=192.0.2.1:40400", process.communicate(timeout=PATIENCE)[1])


# ---- command line ------------------------------------------------------------------------

SEES_WORKERS = hasattr(os, "fork") and os.path.exists(
    "/proc/self/task/%d/children" % os.getpid())


class Captured(BaseException):
    """The settings that `main` made. It is no Exception, so that nothing catches it."""


class Service:
    """A `socks5.py` that runs: its process, its port, and what it has printed."""

    def __init__(self, process, file, count=1):
        self.process, self.file, self.count = process, file, count

    def text(self):
        """Return what it has printed and logged until now."""
        return os.pread(self.file.fileno(), MEBIBYTE, 0).decode()  # leaves the writers' offset

    def wait_for(self, what, times=1):
        """Wait until `what` has been printed so many times; return its last line."""
        wait_until(lambda: self.text().count(what) >= times)
        return [line for line in self.text().splitlines() if what in line][-1]

    @property
    def port(self):
        """The port in the first line."""
        return int(re.search(r" port (\d+) ", self.wait_for("Serving SOCKS5")).group(1))

    def workers(self):
        """Return the child processes."""
        return children(self.process.pid)

    def everybody(self):
        """Return the process IDs of the first process and its workers."""
        return [self.process.pid] + (self.workers() if self.count > 1 else [])

    def end(self, *numbers):
        """Send signals, if any; return the exit status."""
        for number in numbers:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)


def in_each_mode(test):
    """Return a test that runs `test` for a server alone, and for one with two workers."""
    def tests(self):
        for workers in (1, 2)[:1 + SEES_WORKERS]:
            with self.subTest(workers=workers):
                test(self, workers)
    return tests


class ServiceTestCase(CommandTestCase):
    """Tests of main() in this process, as far as that is possible, and in others."""

    def main(self, *options):
        """Run main(), which must end before it listens; return status, stdout and stderr."""
        with contextlib.ExitStack() as stack:
            for name in ("signal.signal", "signal.pthread_sigmask", "signal.set_wakeup_fd",
                         "sys.setswitchinterval", "threading.stack_size", "logging.basicConfig",
                         "resource.setrlimit"):  # main() believes that the process is its own
                stack.enter_context(mock.patch(name))
            for logger in (logging.getLogger(), logging.getLogger("socks5")):
                stack.enter_context(mock.patch.object(logger, "handlers", list(logger.handlers)))
                stack.callback(logger.setLevel, logger.level)
            stack.enter_context(mock.patch.object(logging, "raiseExceptions", True))
            stack.enter_context(mock.patch.object(
                socket.socket, "listen", side_effect=AssertionError("this is not refused")))
            said = [stack.enter_context(io.TextIOWrapper(
                tempfile.TemporaryFile(),  # noqa: SIM115
                encoding="utf-8", errors="backslashreplace"))
                for _ in range(2)]
            stack.enter_context(contextlib.redirect_stdout(said[0]))
            stack.enter_context(contextlib.redirect_stderr(said[1]))
            try:
                status = socks5.main(list(options))
            except SystemExit as end:
                status = end.code
            for file in said:
                file.seek(0)
            return (status, said[0].read(), said[1].read())

    def settings_of(self, *options):
        """Return the arguments of the Settings that main() makes of `options`."""
        def capture(settings, **kwargs):
            real(settings, **kwargs)
            raise Captured(kwargs)

        real = socks5.Settings.__init__
        capture.__kwdefaults__ = real.__kwdefaults__
        with mock.patch.object(socks5.Settings, "__init__", capture):
            try:
                self.fail("refused: %r" % (self.main(*options),))
            except Captured as captured:
                return self.plain(dict(real.__kwdefaults__, **captured.args[0]))

    def plain(self, settings):
        """Return `settings` with a list for each iterable."""
        return {name: list(value) if isinstance(value, (tuple, range)) else value
                for name, value in settings.items()}

    def parser(self):
        """Return the parser that main() uses."""
        def capture(parser, *args, **kwargs):
            raise Captured(parser)

        with mock.patch("argparse.ArgumentParser.parse_known_args", capture):
            try:
                self.main()
            except Captured as captured:
                return captured.args[0]

    def check_usage_error(self, *options):
        """Check that `options` are refused in two lines; return the message."""
        status, out, err = self.main(*options)
        self.assertEqual((status, out), (2, ""), err)
        found = re.match(r"socks5\.py: error: (.+)\nsee socks5\.py --help\n$", err)
        self.assertTrue(found, err)
        return found.group(1)

    def service(self, *options, workers=1, before="", output=None, **settings):
        """Return a `socks5.py` on a free port; the code `before` runs before it is imported."""
        file = (tempfile.TemporaryFile() if output is None  # noqa: SIM115
                else io.FileIO(output, "w", closefd=False))
        self.addCleanup(file.close)
        command = ["-c", before + "\nimport socks5, sys\nsys.exit(socks5.main())"]
        process = self.start(
            *(command if before else ["socks5.py"]), "--workers", str(workers), *options, "0",
            **dict({"stdout": file, "stderr": file}, **settings))
        service = Service(process, file, workers)
        if output is None:
            service.wait_for("Serving SOCKS5")  # signals are obeyed from then on
        if workers == 2:
            wait_until(lambda: len(service.workers()) == 2)
        return service

    def be_refused(self, port):
        """Have a session that leaves one line in the log."""
        with Client.to(("127.0.0.1", port)) as client:
            client.say("05 01 02")
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(client), (octets("05 ff"), "end"))

    def refuses(self, port):
        """Return whether nobody listens on `port`."""
        if os.path.exists("/proc/net/tcp"):  # or else each look keeps a queue from being empty
            with open("/proc/net/tcp") as file:
                return ":%04X 00000000:0000 0A " % port not in file.read()
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            return True
        return False

    def runs(self, process):
        """Return whether a thread of `process` is not suspended."""
        folder = "/proc/%d/task" % process
        for thread in os.listdir(folder):
            with open("%s/%s/stat" % (folder, thread)) as file:
                if file.read().rpartition(")")[2].split()[0] != "T":
                    return True
        return False

    def suspend(self, processes):
        """Suspend `processes`: a thread that still runs could accept a client."""
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        wait_until(lambda: not any(map(self.runs, processes)))


class CommandLineTest(ServiceTestCase):
    def test_start_line_and_interrupt(self):
        for address, url in [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")][:1 + has_ipv6()]:
            service = self.service("--drain", "0", "-b", address)
            service.wait_for("Serving SOCKS5", 2)  # in the log, and then on stdout
            self.assertRegex(
                service.text().splitlines()[1], r"^Serving SOCKS5 on %s port (\d+) "
                r"\(socks5h://%s:\1\) \.\.\.$" % (address, re.escape(url)))
            client = self.own(Client.to((address, service.port))).greet()
            self.assertEqual(service.end(signal.SIGINT), 0)
            self.assertEqual(read_all(client), (b"", "end"))
            self.assertRegex(service.text(), r"\nShutting down\.\n")
            self.assertRegex(service.text(),
                             r"(?m)^\S+.* INFO session client=.* end=server-closed$")

    def test_address_that_cannot_be_listened_on(self):
        taken = self.listen().getsockname()[1]
        for address, port in (("127.0.0.1", taken), ("192.0.2.1", 0), ("2001:db8::1", 0),
                              ("nobody.invalid", 0), ("\u00fc..x", 0), ("\udcff", 0)):
            with self.subTest(ascii(address)):
                status, out, err = self.main("--open", "-b", address, str(port))
                self.assertEqual((status, out), (1, ""))
                self.assertRegex(err, r"^socks5\.py: cannot listen on %s port %d: .+\n$" % (
                    re.escape(ascii(address)[1:-1]), port))

    def test_open_proxy_is_refused(self):
        for address in ("0.0.0.0", "::", "192.0.2.1", "localhost.example", "my.localhost", ""):
            with self.subTest(address):
                self.assertEqual(
                    self.check_usage_error("-b", address, "0"), "refusing to listen on %s without "
                    "access control: add --users, --client or --open" % address)

    def test_what_is_no_open_proxy(self):
        users = self.file(b"alice:secret")
        for options in ([], ["-b", "localhost"], ["-b", "127.0.0.2"], ["-b", "::1"],
                        ["-b", "0.0.0.0", "--open"], ["-b", "::", "--users", users],
                        ["-b", "0.0.0.0", "--client", "10.0.0.0/8"]):
            with self.subTest(options):
                self.settings_of(*options)

    def test_options_become_settings(self):
        defaults = self.plain(socks5.Settings.__init__.__kwdefaults__)
        self.assertEqual(self.settings_of(), defaults)
        self.assertEqual(self.settings_of(
            "-b", "::1", "--connect-timeout", "1", "--handshake-timeout", "2",
            "--idle-timeout", "3", "--linger", "4.5", "--allow", "a:1", "--deny", "b",
            "--allow", "alice@c", "--client", "10.0.0.0/8", "--client", "::1", "--max-sessions",
            "6", "--max-per-client", "7", "--bind-timeout", "8", "--udp-timeout", "9",
            "--udp-ports", "10-12", "--udp-advertise", "192.0.2.1", "--commands", "udp,bind",
            "--users", self.file(b"alice:secret"), "5"), dict(
                defaults, users={"alice": "secret"}, commands=["udp", "bind"],
                rules=["allow a:1", "deny b", "allow alice@c"], clients=["10.0.0.0/8", "::1"],
                max_sessions=6, max_per_client=7, connect_timeout=1, handshake_timeout=2,
                idle_timeout=3, linger=4.5, bind_timeout=8, udp_timeout=9,
                udp_ports=[10, 11, 12], udp_advertise="192.0.2.1"))

    def test_usage_errors(self):
        for options in (
                ["65536"], ["-1"], ["x"], ["1", "2"], ["--client", "::ffff:10.0.0.0/104"],
                ["--client", "x"], ["--commands", "connect,associate"], ["--udp-ports", "2-1"],
                ["--udp-ports", "0-1"], ["--udp-ports", "x"], ["--udp-advertise", "a b"],
                ["--drain", "-1"], ["--users", ""], ["--users", os.path.join(HERE, "none")],
                ["--users", HERE], ["--linger", "0"], ["--linger", "nan"],
                ["--idle-timeout", "inf"], ["--connect-timeout", "x"], ["-q", "-v"],
                ["--no-such"], ["--workers", "0"], ["--workers", "many"], ["--deny", "a:"],
                ["--max-sessions", "0"], ["--max-per-client", "0"], ["--max-per-client", "1.5"],
                ["--handshake", "5"], ["--ope"], ["@" + HERE], ["@" + os.path.join(HERE, "none")]):
            with self.subTest(options):
                self.check_usage_error(*options)

    def test_errors_show_the_right_command(self):
        for options, hint in [
                (["0.0.0.0"], ": socks5.py -b 0.0.0.0 1080"),
                (["[::1]"], ": socks5.py -b ::1 1080"),
                (["10.0.0.1:80"], ": socks5.py -b 10.0.0.1 80"),
                (["[::1]:80"], ": socks5.py -b ::1 80"),
                (["-b", "localhost:80"], ": socks5.py -b localhost 80"),
                (["-b", "[::1]:80"], ": socks5.py -b ::1 80"),
                (["-p", "80"], ": socks5.py 1080"), (["--port=80"], ": socks5.py 1080"),
                (["1", "hunter2"], "more than one port"), (["--no-such=hunter2"], "--no-such"),
                (["-Ualice:hunter2"], "unknown option -U"),
                (["--no-such", "hunter2"], "unknown option --no-such"),
                (["hunter2"], "argument port: not a number from 0 to 65535")]:
            with self.subTest(options):
                self.assertRegex(self.check_usage_error(*options), re.escape(hint) + "$")

    def test_usage_error_of_a_process(self):
        status, err = self.run_to_end("socks5.py", "--no-such")
        self.assertEqual(status, 2)
        self.assertRegex(err, r"^socks5\.py: error: .*--no-such.*\nsee socks5\.py --help\n$")

    def test_version_and_help(self):
        for option in ("--version", "--help"):
            status, out, err = self.main(option)
            self.assertEqual((status, err), (0, ""))
            self.assertIn("socks5.py", out)

    def test_bad_users_file(self):
        path = self.file(b"alice:secret\nhunter2\n")
        error = self.check_usage_error("--users", path)
        self.assertIn("%s, line 2" % path, error)
        self.assertNotIn("hunter2", error)

    def test_users_file_that_others_can_read(self):
        for mode, warnings_ in ((0o600, 0), (0o640, 0), (0o604, 1), (0o644, 1)):
            path = self.file(b"alice:secret\n", mode)
            with self.subTest(oct(mode)), self.logged("WARNING") as lines:
                self.settings_of("--users", path)
                self.assertEqual(
                    lines, ["%s is world-readable: chmod o-r %s" % (path, path)] * warnings_)

    def test_users_in_rules(self):
        users = ["--users", self.file(b"alice:secret\n")]
        for options in (["--allow", "alice@*"], users + ["--allow", "bob@*"]):
            self.assertIn("no such user", self.check_usage_error(*options))
        listens = "this is not refused"
        for options in (["--deny", "alice@*"], users + ["--deny", "bob@*"]):
            with self.subTest(options), self.logged("WARNING") as lines:
                with self.assertRaisesRegex(AssertionError, listens):
                    self.main(*options)
                self.assertEqual(["no such user" in line for line in lines], [True])
        with self.logged("WARNING") as lines, self.assertRaisesRegex(AssertionError, listens):
            self.main(*users, "--deny", "alice@*")
        self.assertEqual(lines, [])

    def test_rule_that_may_lack_brackets(self):
        for rule, meant in (("::1:80", "[::1]:80"), ("alice@::1:443", "[::1]:443"), ("::1", None),
                            ("[::1]:80", None), ("alice@::443", None), ("2001:db8::443", None),
                            ("127.0.0.1:80", None), ("a.example:80", None)):
            with self.subTest(rule), self.logged("WARNING") as lines:
                with self.assertRaisesRegex(AssertionError, "this is not refused"):
                    self.main("--users", self.file(b"alice:secret\n"), "--deny", rule)
                self.assertEqual([line.rpartition(" ")[2] for line in lines], [meant] * bool(meant))

    def test_options_from_a_file(self):
        with tempfile.TemporaryDirectory() as folder:
            users = os.path.join(folder, "my #users")
            self.write(users, b"alice:secret")
            self.write(users.replace(" ", ""), b"bob:secret")
            for content, settings in (
                    ("# a comment\n\n--deny '10.0.0.0/8'  # mine\n--linger 3",
                     {"rules": ["deny 10.0.0.0/8"], "linger": 3}),
                    ("--udp-timeout 7#seconds", None),  # no word begins there
                    ("--users %s" % users.replace(" ", ""), {"users": {"bob": "secret"}}),
                    ("--udp-timeout 7 #seconds", {"udp_timeout": 7}),
                    ("\t#--linger 2\n--deny\n b", {"rules": ["deny b"]}),
                    ("--deny\nb 0\n--linger 2", {"rules": ["deny b"], "linger": 2}),
                    ("--users '%s' # mine" % users, {"users": {"alice": "secret"}}),
                    ('--users "%s"' % users, {"users": {"alice": "secret"}}),
                    ("--users %s" % users.replace(" ", "\\ "), {"users": {"alice": "secret"}})):
                path = self.file(content.encode())
                with self.subTest(content):
                    if settings is None:
                        self.check_usage_error("@" + path)
                        continue
                    made = self.settings_of("@" + path)
                    self.assertEqual({name: made[name] for name in settings}, settings)

    def test_bad_file_of_options(self):
        path = self.file(b"")
        for content in (b"--deny 'x", b"--linger 0", b"\xff", b"--deny a:", b"--no-such",
                        b"alice:hunter2", b"@" + os.fsencode(path)):
            self.write(path, content)
            with self.subTest(content):
                self.assertNotIn("hunter2", self.check_usage_error("@" + path))

    def test_unknown_option_is_named(self):
        path = self.file(b"--linger 3\n--alow *:25\n")
        self.assertIn("%s, line 2: unknown option --alow" % path,
                      self.check_usage_error("@" + path))
        self.assertIn("unknown option --alow", self.check_usage_error("--alow", "*:25"))

    @unittest.skipUnless(os.path.isdir("/proc/self"), "no /proc to read a process's limits from")
    def test_options_of_a_process(self):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        options = self.file(b"-q\n--deny 127.0.0.0/8\n")
        service = self.service("@" + options, "--drain", "0", descriptors=(64, hard))
        self.assertEqual(self.client(service.port).greet().ask(1), Reply.NOT_ALLOWED)
        with open("/proc/%d/limits" % service.process.pid) as file:
            self.assertRegex(file.read(), r"Max open files +%d +%d " % (hard, hard))
        self.assertEqual(service.end(signal.SIGINT), 0)
        self.assertNotIn("session", service.text())

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full to be a full disk")
    def test_full_disk(self):
        with open("/dev/full", "w") as full:
            service = self.service("--drain", "0", stderr=full)
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                port = sock.getsockname()[1]
            process = self.start("socks5.py", "--drain", "0", str(port), stdout=full,
                                 env=dict(os.environ, PYTHONUNBUFFERED=""))
        wait_until(lambda: not self.refuses(port))
        for each in (service.port, service.port, port):
            self.be_refused(each)  # at the end of each session its line cannot be written
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 0)
        service.process.terminate()
        service.process.wait(PATIENCE)

    def test_log_line_that_cannot_be_written(self):
        service = self.service("--drain", "0", before=(
            "import io, sys\n"
            "class Full(io.TextIOWrapper):\n"
            "    def write(self, text):\n"
            "        if ' session ' in text:\n"
            "            raise OSError(28, 'No space left on device')\n"
            "        return super().write(text)\n"
            "sys.stderr = Full(sys.stderr.detach(), line_buffering=True)\n"))
        self.be_refused(service.port)
        self.assertEqual(service.end(signal.SIGTERM), 0)
        self.assertNotIn("Logging error", service.text())

    @unittest.skipUnless(os.path.isdir("/proc/self"), "no /proc to read a process's time from")
    def test_descriptors_exhausted_and_recovered(self):
        service = self.service("-q", "--handshake-timeout", str(2 * PATIENCE),
                               descriptors=(38, 38))
        tunnels = [self.tunnel(service.port) for _ in range(9)]  # each takes no more than two
        clients = [self.client(service.port) for _ in range(40)]
        service.wait_for("WARNING not accepting")
        before = self.cpu_seconds(service.process)
        time.sleep(0.3)  # this is the time that is measured
        self.assertLess(self.cpu_seconds(service.process) - before, 0.05)
        queued = clients.pop()
        for client in (*clients, *sum(tunnels, ())):
            client.close()
        queued.greet()
        self.client(service.port).greet()

    def cpu_seconds(self, process):
        """Return the CPU time that `process` has used."""
        with open("/proc/%d/stat" % process.pid) as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


# ---- workers -----------------------------------------------------------------------------

@unittest.skipUnless(SEES_WORKERS, "no fork, or no /proc to see workers in")
class WorkersTest(ServiceTestCase):
    def start_workers(self, *options, **settings):
        """Return a server with two workers that both run, and the workers."""
        service = self.service("-q", *options, workers=2, **settings)
        return service, service.workers()

    def replaced(self, service, workers):
        """Return whether other workers run now."""
        return len(service.workers()) == 2 and not set(service.workers()) & set(workers)

    def worker_of(self, service, client):
        """Return the worker that has the server's end of `client`."""
        with open("/proc/net/tcp") as file:
            ends = r":%04X \w+:%04X " % (service.port, client.getsockname()[1])
            inode = next(line for line in file if re.search(ends, line)).split()[9]
        for worker in service.workers():
            folder = "/proc/%d/fd" % worker
            for name in os.listdir(folder):
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(os.path.join(folder, name)) == "socket:[%s]" % inode:
                        return worker
        raise AssertionError("no worker has it")

    def test_workers_that_die(self):
        service, workers = self.start_workers()
        client, target = self.tunnel(service.port)
        target.sendall(b"half of a file")
        self.assertEqual(read_count(client, 14), b"half of a file")
        self.suspend(workers)
        queued = [self.client(service.port) for _ in range(20)]
        for each in queued:
            each.say("05 01 00")
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        self.assertEqual([read_all(client), read_all(target)], [(b"", "reset")] * 2)
        for each in queued:
            each.hear("05 00")
        for worker in workers:
            service.wait_for("WARNING worker died pid=%d " % worker)
        wait_until(lambda: self.replaced(service, workers))

    def test_worker_killed_under_load(self):
        service, workers = self.start_workers()
        echo, failed = self.echo(), []

        def converse():
            for _ in range(50):
                try:
                    with Client.to(("127.0.0.1", service.port)) as client:
                        self.assertEqual(client.greet().ask(echo), Reply.SUCCEEDED)
                        self.check_one_way(client, client)
                except (OSError, AssertionError):
                    failed.append(1)  # the dead worker served it

        threads = [self.thread(converse) for _ in range(4)]
        os.kill(workers[0], signal.SIGKILL)
        for thread in threads:
            thread.join(2 * PATIENCE)
        self.assertLessEqual(len(failed), len(threads))

    def test_worker_that_is_terminated_alone(self):
        service, _ = self.start_workers("--drain", str(2 * PATIENCE))
        client, target = self.tunnel(service.port)
        worker = self.worker_of(service, client)
        os.kill(worker, signal.SIGTERM)
        others = [self.client(service.port).greet() for _ in range(20)]
        self.check_relay(client, target)
        self.assertIn(worker, service.workers())
        client.close()
        target.close()
        for other in others:  # the first ones may have got in before the signal
            other.close()
        with self.within(10):
            wait_until(lambda: self.replaced(service, [worker]))
        self.client(service.port).greet().close()
        self.assertNotIn("Shutting down", service.text())
        self.assertEqual(service.end(signal.SIGTERM), 0)

    def test_drain_of_a_worker_alone_is_bounded(self):
        service, workers = self.start_workers("--drain", "0.1")
        client, target = self.tunnel(service.port)
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
        with self.within(6):
            self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))
            wait_until(lambda: self.replaced(service, workers))
        self.client(service.port).greet()

    def test_signal_ends_parent_and_workers(self):
        for numbers, to_all in (([signal.SIGTERM], False), ([signal.SIGINT], True)):
            with self.subTest(to_all=to_all):
                service, workers = self.start_workers("--drain", "0")
                client, target = self.tunnel(service.port)
                for worker in workers * to_all:  # a terminal sends it to all of them
                    os.kill(worker, *numbers)
                with self.within(6):
                    self.assertEqual(service.end(*numbers), 0)
                self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))
                self.assertEqual(service.text().count("Shutting down."), 1)
                for worker in workers:
                    with self.assertRaises(ProcessLookupError):
                        os.kill(worker, 0)

    def test_workers_end_with_a_parent_that_is_killed(self):
        ours, theirs = os.pipe()  # it ends when the last process has left
        self.addCleanup(os.close, ours)
        os.set_blocking(ours, False)
        try:
            service, workers = self.start_workers("--drain", str(2 * PATIENCE),
                                                  "--handshake-timeout", "1", pass_fds=[theirs])
        finally:
            os.close(theirs)
        for worker in workers:
            self.addCleanup(self.kill, worker)
        client, target = self.tunnel(service.port)
        silent = self.client(service.port).greet()
        service.process.kill()
        wait_until(lambda: self.refuses(service.port))
        self.assertEqual(read_all(silent), (b"", "end"))
        self.check_relay(client, target)
        with self.assertRaises(BlockingIOError):
            os.read(ours, 1)
        client.close()
        target.close()
        with self.within(10):
            wait_until(lambda: self.left(ours))

    def kill(self, process):
        """End a process that a failed test leaves behind."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    def left(self, pipe):
        """Return whether nobody can write to `pipe` any more."""
        with contextlib.suppress(BlockingIOError):
            return os.read(pipe, 1) == b""

    def test_pause_before_a_worker_is_replaced(self):
        later = self.file(b"")
        service, _ = self.start_workers(before=(
            "import os, time\n"
            "def monotonic(real=time.monotonic):\n"
            "    try:\n"
            "        return real() + 60 * os.path.getsize(%r)\n"
            "    except OSError:\n"  # the test is over, and the last worker is about to end
            "        return real() + 60\n"
            "time.monotonic = monotonic\n") % later)

        def pause_after_death():
            dead = service.workers()[-1]
            os.kill(dead, signal.SIGKILL)
            line = service.wait_for("WARNING worker died pid=%d " % dead)
            wait_until(lambda: self.replaced(service, [dead]))
            self.assertIn(" signal=9 exit=0 ", line)
            return line.rpartition("restart_in=")[2]

        # they die young, so each pause is longer than the last one
        self.assertEqual([pause_after_death() for _ in range(2)], ["0.1", "0.2"])
        start = time.monotonic()
        with self.within(10):
            self.assertEqual(pause_after_death(), "0.4")
        self.assertGreater(time.monotonic() - start, 0.35)
        self.write(later, b"1")  # a minute passes for the server
        self.assertEqual(pause_after_death(), "0.1")

    def test_process_that_cannot_be_started(self):
        # service() waits until there are two
        service = self.service("-q", workers=2, before=(
            "import errno, os, socks5\n"
            "def fork(failures=[0, 1], real=os.fork):\n"
            "    if failures and failures.pop(0):\n"
            "        raise BlockingIOError(errno.EAGAIN, 'full')\n"
            "    return real()\n"
            "os.fork = fork\n"
            "socks5.LONGEST_PAUSE = 0.2\n"))
        self.assertRegex(service.wait_for("WARNING"), " cannot start a worker: full$")
        self.client(service.port).greet()

    @unittest.skipUnless(hasattr(os, "sched_getaffinity"), "no choice of CPUs here")
    def test_auto_is_a_worker_for_each_cpu(self):
        cpus = sorted(os.sched_getaffinity(0))[:2]
        if len(cpus) < 2:
            self.skipTest("one CPU only")
        service = self.service(
            workers="auto", preexec_fn=lambda: os.sched_setaffinity(0, cpus))
        wait_until(lambda: len(service.workers()) == 2)
        workers = service.workers()
        if getattr(sys, "_is_gil_enabled", lambda: True)():  # or else nothing is gained by it
            wait_until(lambda: all(len(os.sched_getaffinity(worker)) == 1 for worker in workers))
            self.assertEqual(sorted(cpu for worker in workers
                                    for cpu in os.sched_getaffinity(worker)), cpus)
        self.client(service.port).greet()
        self.assertEqual(service.workers(), workers)
        service = self.service(
            workers="auto", preexec_fn=lambda: os.sched_setaffinity(0, cpus[:1]))
        self.client(service.port).greet()
        self.assertEqual(service.workers(), [])


# ---- signals -----------------------------------------------------------------------------

class SignalsTest(ServiceTestCase):
    @in_each_mode
    def test_sessions_may_end_by_themselves_and_stopping_needs_no_thread(self, workers):
        full = self.file(b"")
        service = self.service("-q", "--drain", str(2 * PATIENCE), workers=workers, before=(
            "import os, threading\n"
            "def start(thread, real=threading.Thread.start):\n"
            "    if os.path.getsize(%r):\n"
            "        raise RuntimeError(\"can't start new thread\")\n"
            "    real(thread)\n"
            "threading.Thread.start = start\n") % full)
        client, target = self.tunnel(service.port)
        self.check_relay(client, target)  # both of its threads run
        self.write(full, b"1")
        os.kill(service.process.pid, [signal.SIGTERM, signal.SIGINT][service.count - 1])
        service.wait_for("Shutting down.")
        wait_until(lambda: self.refuses(service.port))
        self.check_relay(client, target)
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(read_all(target), (b"", "end"))
        target.sendall(b"late")
        target.close()
        self.assertEqual(read_all(client), (b"late", "end"))
        with self.within(6):
            self.assertEqual(service.end(), 0)
        said = [line for line in service.text().splitlines()
                if "NoThreadError" not in line]  # of a worker that had not started all of its own
        self.assertEqual(len(said), 2, said)

    @in_each_mode
    def test_second_signal_ends_at_once(self, workers):
        service = self.service("-q", "--drain", str(2 * PATIENCE), workers=workers)
        client, target = self.tunnel(service.port)
        everybody = service.everybody()
        for each in everybody + everybody[1:]:  # systemd tells all of them: it is no second one
            with contextlib.suppress(ProcessLookupError):  # it had no session
                os.kill(each, signal.SIGTERM)
            service.wait_for("Shutting down.")
        self.check_relay(client, target)
        with self.within(15):
            self.assertEqual(service.end(signal.SIGINT), 0)
        self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))

    @in_each_mode
    def test_drain_is_bounded(self, workers):
        service = self.service("-q", "--drain", "0.2", workers=workers)
        client, target = self.tunnel(service.port)
        start = time.monotonic()
        with self.within(0.2 + 2 + 2):  # the last two are for a busy machine
            service.process.terminate()
            self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))
            self.assertGreaterEqual(time.monotonic() - start, 0.2)
            self.assertEqual(service.end(), 0)

    @in_each_mode
    def test_clients_in_the_queue_at_a_stop_are_served(self, workers):
        echo = self.echo()
        service = self.service("-q", "--drain", str(2 * PATIENCE), workers=workers)
        everybody = service.everybody()
        self.suspend(everybody)
        clients = [self.client(service.port) for _ in range(100)]
        for client in clients:
            client.say("05 01 00  05 01 00 01 7f 00 00 01")
            client.sendall(port_of(echo) + b"ping")
            client.shutdown(socket.SHUT_WR)
        service.process.terminate()
        for each in everybody:
            os.kill(each, signal.SIGCONT)
        for client in clients:
            said, end = read_all(client)
            self.assertEqual((said[:4], said[-4:], end),
                             (octets("05 00 05 00"), b"ping", "end"))
        self.assertEqual(service.end(), 0)

    @in_each_mode
    def test_reload(self, workers):
        users, options = self.file(b"alice:one"), self.file(b"")
        rules = b"-b 0.0.0.0\n--users %b\n--deny *" % os.fsencode(users)
        self.write(options, rules)
        service = self.service("-q", "@" + options, workers=workers)
        self.assertEqual(self.answers(service, "alice", "one"), {self.denied})
        self.write(users, b"alice:two")
        self.reload(service, "NOTICE settings reloaded")
        self.assertEqual(self.answers(service, "alice", "two"), {self.denied})
        for path, content, why in (
                (users, b"hunter2", "line 1"), (options, rules + b":", "HOST"),
                (options, b"--help", ""), (options, rules + b"\n--allow eve@*", "no such user"),
                (options, b"", "refusing to listen on 0.0.0.0"),
                (options, b"@" + os.fsencode(options), "")):
            with self.subTest(content):
                self.write(path, content)
                self.assertIn(why, self.reload(
                    service, "WARNING reload failed, keeping the current settings: "))
                self.assertEqual(self.answers(service, "alice", "two"), {self.denied})
                self.write(users, b"alice:two")
        self.assertNotIn("hunter2", service.text())
        self.write(options, rules[:-8])
        self.reload(service, "NOTICE settings reloaded")
        self.assertNotIn(self.denied, self.answers(service, "alice", "two"))

    def test_reload_after_a_user_in_a_rule_is_removed(self):
        users = self.file(b"alice:one\nbob:one")
        service = self.service("-q", "--users", users, "--deny", "bob@10.0.0.0/8", "--deny", "*",
                               before="import socks5\nsocks5.LOGIN_PAUSE = 0")
        self.assertEqual(self.answers(service, "bob", "one"), {self.denied})
        self.write(users, b"alice:one")
        self.assertIn(" WARNING ", self.reload(service, "no such user"))
        service.wait_for("NOTICE settings reloaded")
        self.assertEqual(self.answers(service, "bob", "one"), {octets("05 02 01 01")})
        self.assertEqual(self.answers(service, "alice", "one"), {self.denied})

    def test_stray_word_makes_a_reload_fail(self):
        options = self.file(b"--deny 127.0.0.1:1\n0")
        file = tempfile.TemporaryFile()  # noqa: SIM115
        self.addCleanup(file.close)
        service = Service(self.start("socks5.py", "-q", "@" + options, stdout=file, stderr=file),
                          file)
        service.wait_for("Serving SOCKS5")
        self.write(options, b"--deny 127.0.0.1 :1")
        self.assertIn("argument port", self.reload(service, "WARNING reload failed"))

    def reports(self, service):
        """Have `service` report; return the new lines."""
        before = service.text()
        service.process.send_signal(signal.SIGUSR1)
        service.wait_for("NOTICE totals", before.count("NOTICE totals") + service.count)
        return service.text()[len(before):]

    denied = octets("05 02 01 00 05 02")

    def reload(self, service, what):
        """Have `service` read its files, until it says `what`; return the line."""
        before = service.text().count(what)
        service.process.send_signal(signal.SIGHUP)
        line = service.wait_for(what, before + 1)
        self.reports(service)  # the workers, which obey in order, have read them too
        return line

    def answers(self, service, name, password):
        """Return what each worker says to a user who asks for a target: they take turns."""
        return {self.log_in(service.port, name, password) for _ in range(3 * service.count)}

    def log_in(self, port, name, password):
        """Return what is said to a user who asks for a target."""
        with Client.to(("127.0.0.1", port)) as client:
            client.sendall(b"\5\1\2\1%c%b%c%b" % (len(name), name.encode(),
                                                  len(password), password.encode()))
            client.say("05 01 00 01 7f 00 00 01 00 00")
            client.shutdown(socket.SHUT_WR)
            return read_all(client)[0][:6]

    @in_each_mode
    def test_report_and_reload_in_mid_traffic(self, workers):
        options = self.file(b"")
        service = self.service("-q", "@" + options, workers=workers)
        client, target = self.tunnel(service.port)
        lines = self.reports(service)
        self.assertEqual(lines.count("NOTICE live client=%s:%d " % client.getsockname()), 1)
        self.assertEqual(lines.count(" live=1"), 1)
        self.assertEqual(lines.count(" live=0"), service.count - 1)
        self.write(options, b"--deny 127.0.0.1")
        self.reload(service, "NOTICE settings reloaded")
        self.assertEqual({self.client(service.port).greet().ask(1)
                          for _ in range(3 * service.count)}, {Reply.NOT_ALLOWED})
        self.check_relay(client, target)

    @in_each_mode
    def test_signals_that_do_nothing(self, workers):
        def ignore():  # as nohup and a shell's background jobs have it
            signal.signal(signal.SIGINT, signal.SIG_IGN)

        service = self.service("-q", "--drain", str(2 * PATIENCE), preexec_fn=ignore,
                               workers=workers)
        client, target = self.tunnel(service.port)
        everybody = service.everybody()
        for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR2):
            with self.subTest(number):
                for process in everybody:
                    os.kill(process, number)
                for _ in range(2):  # the reports show that it was obeyed
                    self.reports(service)
                self.check_relay(client, target)
                self.client(service.port).greet()
                self.assertEqual(service.everybody(), everybody)
        service.process.terminate()
        service.wait_for("Shutting down.")
        for number in (signal.SIGCHLD, signal.SIGUSR2):
            service.process.send_signal(number)
        wait_until(lambda: self.refuses(service.port))
        self.check_relay(client, target)
        self.assertEqual(service.end(signal.SIGTERM), 0)

    @in_each_mode
    def test_report_to_all_processes_is_one_report(self, workers):
        service = self.service("-q", workers=workers)
        for process in service.everybody():
            os.kill(process, signal.SIGUSR1)
        service.wait_for("NOTICE totals", workers)
        self.reports(service)
        self.assertEqual(service.text().count("NOTICE totals"), 2 * workers)

    def test_second_signal_while_a_reload_is_stuck(self):
        users = self.file(b"alice:secret")
        service = self.service("--users", users, "--drain", "60")
        os.unlink(users)
        os.mkfifo(users)
        service.process.send_signal(signal.SIGHUP)
        writers = []
        wait_until(lambda: self.open_fifo(users, writers))  # and keep it from its end of file
        with self.within(2 + 4):
            while service.process.poll() is None:
                service.process.terminate()
                time.sleep(0.05)
        self.assertEqual(service.process.returncode, 0)

    def open_fifo(self, path, writers):
        """Return whether somebody reads the FIFO, and has a writer now."""
        with contextlib.suppress(OSError):
            writers.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            self.addCleanup(os.close, writers[-1])
        return writers

    def test_signals_while_starting(self):
        service = self.service(before=(
            "import argparse, os, signal, socket\n"
            "def interrupted(function):\n"
            "    def call(*args):\n"
            "        os.kill(os.getpid(), signal.SIGHUP)\n"
            "        os.kill(os.getpid(), signal.SIGUSR1)\n"
            "        return function(*args)\n"
            "    return call\n"
            "parser = argparse.ArgumentParser\n"
            "parser.parse_known_args = interrupted(parser.parse_known_args)\n"
            "socket.socket.listen = interrupted(socket.socket.listen)\n"))
        self.tunnel(service.port)

    def test_terminal_that_is_lost(self):
        import fcntl
        import pty
        import termios
        try:
            ours, theirs = pty.openpty()
        except OSError as error:
            self.skipTest(str(error))
        service = self.service(stdin=theirs, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(theirs)
        os.close(ours)
        self.assertEqual(service.end(), 0)

    @unittest.skipUnless(hasattr(os, "sched_setaffinity"), "no choice of CPUs here")
    def test_choice_of_cpu_that_is_refused(self):
        service = self.service("-q", before=(
            "import errno, os\n"
            "def refuse(*args):\n"
            "    raise OSError(errno.EINVAL, 'Invalid argument')\n"
            "os.sched_setaffinity = os.sched_setscheduler = refuse\n"))
        client, target = self.tunnel(service.port)
        content = pattern(8 * MEBIBYTE)
        self.thread(lambda: (client.sendall(content), client.shutdown(socket.SHUT_WR)))
        self.assertEqual(read_all(target), (content, "end"))

    def test_log_that_nobody_reads(self):
        for workers, drain, count in ((1, 0.1, 1), (2, 0.1, 1), (1, 60, 2), (2, 60, 2)):
            with self.subTest(workers=workers, signals=count):
                self.check_full_log(workers, drain, count)

    def check_full_log(self, workers, drain, count):
        """Check that sessions go on and that `count` signals end them in time."""
        pipe = ours, theirs = os.pipe()
        for descriptor in pipe:
            self.addCleanup(os.close, descriptor)
        service = self.service("--drain", str(drain), workers=workers, output=theirs)
        with open(ours, closefd=False) as file:
            port = int(re.search(r" port (\d+) ", file.readline()).group(1))
        self.fill(theirs)
        for _ in range(20):
            self.be_refused(port)
        if count == 1:
            self.check_dropped(ours, port, sessions=20)
            self.fill(theirs)
        client, target = self.tunnel(port)
        with self.within(drain % 60 + 2 + 4):
            service.process.terminate()
            if count > 1:
                wait_until(lambda: self.refuses(port))
                self.check_relay(client, target)
                service.process.terminate()
            self.assertEqual(service.process.wait(PATIENCE), 0)
        self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))

    def fill(self, pipe):
        """Fill a pipe whose other writers are idle: they share its mode."""
        os.set_blocking(pipe, False)
        for size in (65536, 4096, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(pipe, b"\n" * size)
        os.set_blocking(pipe, True)

    def check_dropped(self, pipe, port, sessions):
        """Read, and check that each of the `sessions`, and of further ones, is accounted for."""
        os.set_blocking(pipe, False)
        text = bytearray()

        def dropped():
            return sum(map(int, re.findall(b"log lines dropped count=(\\d+)", text)))

        def is_complete():
            with contextlib.suppress(BlockingIOError):
                for piece in iter(lambda: os.read(pipe, 65536), b""):
                    text.extend(piece)
            return dropped() and dropped() + text.count(b" session client=") == sessions

        def is_told():
            nonlocal sessions
            if is_complete():
                return True
            self.be_refused(port)  # the next line of each worker tells what it has dropped
            sessions += 1
            return False

        wait_until(is_told)
        count = dropped()
        self.assertLessEqual(count, 20)
        for _ in range(4):
            self.be_refused(port)
            sessions += 1
        wait_until(is_complete)
        self.assertEqual(dropped(), count)  # it is told once


# ---- floods ------------------------------------------------------------------------------

GREETINGS = ["05 01 00", "05 01 02", "05 02 00 02", "05 03 00 01 02", "05 ff 00 02" + " 80" * 253]
LOGINS = ["01 05 61 6c 69 63 65 06 73 65 63 72 65 74", "01 05 61 6c 69 63 65 01 78", "01 00 00"]
HOSTS = ["01 7f 00 00 01", "04" + " 00" * 10 + " ff ff 7f 00 00 01",  # by literal, and by name
         "03 09 6c 6f 63 61 6c 68 6f 73 74", "03 04 62 c3 bc 62",
         "03 09 31 32 37 2e 30 2e 30 2e 31"]
EDGES = octets("00 01 02 03 04 05 06 7f 80 fe ff")
REPLIED = (br"(?:\x05\x00\x00(?:\x01.{6}|\x04.{18}).*"  # more after "succeeded" only
           br"|\x05[\x01-\x08]\x00\x01.{6})?")
ANSWERS = {  # all that a client can be told to the end, by whether there are users
    False: re.compile(br"(?s)|\x05\xff|\x05\x00%b" % REPLIED),
    True: re.compile(br"(?s)|\x05\xff|\x05\x02(?:\x01\x01|\x01\x00%b)?" % REPLIED)}


def noise(rng, count):
    """Return `count` random bytes."""
    return bytes(rng.randrange(256) for _ in range(count))


def mutated(rng, sent):
    """Return `sent` with one thing wrong."""
    start = rng.randrange(len(sent) + 1)
    end = start + rng.choice([1, 1, 1, 2, 4, 16, 255])
    head, piece, rest = sent[:start], sent[start:end], sent[end:]
    return rng.choice([
        head + bytes(byte ^ 1 << rng.randrange(8) for byte in piece) + rest,
        head + noise(rng, len(piece)) + rest,
        head + bytes([rng.choice(EDGES)]) + sent[start + 1:],
        head + noise(rng, rng.randrange(1, 9)) + piece + rest,
        head + rest,
        head,
        head + piece + piece + rest,
        head + rest[:len(piece)] + piece + rest[len(piece):]])


def cut_up(rng, sent):
    """Return `sent` in pieces: one, a few, or one for each byte at the beginning."""
    few = [rng.randrange(len(sent) + 1) for _ in range(rng.randrange(5))]
    each = range(min(len(sent), 40))
    ends = sorted(each if rng.random() < 0.05 else few) + [len(sent)]
    return [sent[start:end] for start, end in zip([0] + ends, ends) if start < end]


class Conversation:
    """The conversation `number` of `seed`: what to send to which server, and how to leave."""

    def __init__(self, seed, number, port):
        rng = random.Random("%d %d" % (seed, number))
        self.users = rng.random() < 0.5
        login = self.users != (rng.random() < 0.05)
        frames = [
            octets(rng.choice(GREETINGS[int(login):])),
            octets(rng.choices(LOGINS, [8, 1, 1])[0]) if login else b"",
            bytes([5, rng.choices([1, 2, 3, rng.randrange(256)], [94, 2, 2, 2])[0], 0]),
            octets(rng.choice(HOSTS)) + port_of(port),
            noise(rng, rng.choice([0, 1, 10, 100, 1000]))]
        mutations = rng.choice([0, 0, 1, 1, 1, 2, 5, 20])
        if mutations > 1 and rng.random() < 0.3:
            rng.shuffle(frames)
        sent = b"".join(frames)
        for _ in range(mutations):
            sent = mutated(rng, sent)
        if rng.random() < 0.02:
            sent = noise(rng, rng.randrange(600))
        self.pieces = cut_up(rng, sent)
        self.leave = rng.choices(["half-close", "close", "reset", "stay"], [50, 29, 20, 1])[0]

    def __str__(self):
        return "users=%s %s %s" % (
            self.users, "|".join(piece.hex() for piece in self.pieces), self.leave)


class SessionCounter(logging.Handler):
    """Counts the session lines by their client, and keeps errors."""

    def __init__(self):
        super().__init__()
        self.clients = collections.Counter()
        self.errors = []  # the client, if it has one, and what is in the log

    def emit(self, record):
        text = self.format(record)
        if record.levelno >= logging.ERROR or record.exc_info:
            client = re.search(r"[0-9.]+:\d+|$", text + record.threadName).group()
            self.errors.append((client, text))
        elif text.startswith("session "):
            self.clients[re.search(r" client=(\S*)", text).group(1)] += 1


class FuzzTest(TestCase):
    """Conversations of all kinds; $FUZZ is how many, $SEED repeats those of another run."""

    count = int(os.environ.get("FUZZ") or 5000)
    clients = 12
    staying = 10  # clients that a thread leaves open until they are hung up on

    def setUp(self):
        super().setUp()
        self.seed = int(os.environ.get("SEED") or random.randrange(10**9))
        self.stay_on_one_cpu()
        self.port = self.echo()
        self.begun = []  # the client's address and the number of each conversation
        self.failures = []
        self.patch(mock.patch.multiple(
            socks5, LOGIN_PAUSE=0.001, REFUSAL_TIMEOUT=0.2, SWEEP_INTERVAL=0.05))
        self.log = SessionCounter()
        logger = logging.getLogger("socks5")
        self.addCleanup(logger.setLevel, logger.level)
        self.addCleanup(logger.removeHandler, self.log)
        logger.addHandler(self.log)
        logger.setLevel(logging.DEBUG)  # which brings the tracebacks
        self.patch(resolver(self.dead(), ("127.0.0.1", self.port)))

    def stay_on_one_cpu(self):
        """Stay there until the end: to wake each other elsewhere takes half of the time."""
        if hasattr(os, "sched_setaffinity"):
            cpus = os.sched_getaffinity(0)
            self.addCleanup(os.sched_setaffinity, 0, cpus)
            os.sched_setaffinity(0, {min(cpus)})

    def serve_loopback(self, users):
        """Return a server that reaches the echo server and no other program of this host."""
        port = self.port

        class Handler(socks5.Socks5RequestHandler):
            def connect(self, destination):
                if destination.port != port:
                    raise OSError(errno.ECONNREFUSED, "not the test's")
                return super().connect(destination)

        return self.serve(Handler, users=users, rules=["allow 127.0.0.0/8", "allow ::1", "deny *"],
                          handshake_timeout=1, connect_timeout=1, idle_timeout=1, linger=1,
                          bind_timeout=0.5, udp_timeout=0.5)

    def begin(self, server, number):
        """Return a client, for which the log is to have a line."""
        client = Client.to(server.server_address)
        self.begun.append(("%s:%d" % client.getsockname(), number))
        return client

    def check_end(self, talk, client):
        """Read what `client` is told until the server closes the connection."""
        with client:
            answer, end = read_all(client)
        if end == "end" and not ANSWERS[talk.users].fullmatch(answer):
            raise AssertionError("answer: %s" % answer.hex())
        if answer.startswith(b"\5\2\1\0") and octets(LOGINS[0]) not in b"".join(talk.pieces):
            raise AssertionError("logged in: %s" % answer.hex())

    def converse(self, talk, client):
        """Send the pieces, and leave, unless the client is to stay."""
        with contextlib.suppress(OSError):  # the server may have closed the connection
            for piece in talk.pieces:
                client.sendall(piece)
            if talk.leave == "half-close":
                client.shutdown(socket.SHUT_WR)
        if talk.leave == "half-close":
            self.check_end(talk, client)
        elif talk.leave == "reset":
            reset(client)
        elif talk.leave == "close":
            client.close()

    def have_conversations(self, servers, first):
        """Have each `clients`-th conversation, from the `first` on."""
        stayed = []
        for number in range(first, self.count, self.clients):
            if self.failures:
                break
            talk = Conversation(self.seed, number, self.port)
            with self.reported(number):
                client = self.begin(servers[talk.users], number)
                stayed += [(number, talk, client)] * (talk.leave == "stay")
                self.converse(talk, client)
            if len(stayed) > self.staying:
                self.see_off(*stayed.pop(0))
        for conversation in stayed:
            self.see_off(*conversation)

    def see_off(self, number, talk, client):
        """Wait until the server closes the connection of a client that stayed."""
        with client, self.reported(number):
            if not self.failures:  # after a failure, do not wait for further clients
                self.check_end(talk, client)

    @contextlib.contextmanager
    def reported(self, number):
        """Note an exception with the conversation's number: a thread has no test to fail."""
        try:
            yield
        except Exception as error:
            self.fail_later(number, repr(error))

    def fail_later(self, number, what):
        """Note a failure of a conversation; -1 is a well-behaved one."""
        talk = Conversation(self.seed, number, self.port) if number >= 0 else "well-behaved"
        self.failures.append("conversation %d: %s\n%s" % (number, talk, what))

    def check_well_behaved(self, server, head, answer):
        """Check that a tunnel still works. All other clients were in the queue before it."""
        client = self.own(self.begin(server, -1))
        client.sendall(octets(head + HOSTS[0]) + port_of(self.port) + b"ping")
        client.shutdown(socket.SHUT_WR)
        said, end = read_all(client)
        self.assertEqual((said[:len(octets(answer))], said[-4:], end),
                         (octets(answer), b"ping", "end"))
        client.close()

    def check_failures(self):
        """Fail if a conversation has failed, or if there is an error in the log."""
        numbers = dict(self.begun)
        for client, text in self.log.errors:
            self.fail_later(numbers.get(client, -1), text)
        if self.failures:
            self.fail("%d failures:\n\n%s" % (len(self.failures), "\n\n".join(self.failures[:3])))

    def check_session_lines(self):
        """Check that each conversation has one session line."""
        numbers = collections.defaultdict(list)  # a port may have been used again
        for client, number in self.begun:
            numbers[client].append(number)
        for client in sorted(numbers):
            if self.log.clients[client] != len(numbers[client]):
                self.fail_later(numbers[client][0], "%s: %d session lines, conversations %s" % (
                    client, self.log.clients[client], numbers[client]))
        self.check_failures()
        self.assertEqual(sum(self.log.clients.values()), len(self.begun))

    def test_random_conversations(self):
        servers = {users: self.serve_loopback(USERS if users else None) for users in (False, True)}
        with self.subTest(SEED=self.seed, FUZZ=self.count), contextlib.redirect_stderr(
                io.StringIO()) as stderr:
            threads = [self.thread(self.have_conversations, servers, first)
                       for first in range(self.clients)]
            for thread in threads:  # each wait in it is limited, and a failure ends it
                thread.join()
            self.check_failures()
            self.check_well_behaved(servers[False], "05 01 00 05 01 00", "05 00 05 00")
            self.check_well_behaved(servers[True], LOGIN + "05 01 00", "05 02 01 00 05 00")
            for server in servers.values():
                server.drain(PATIENCE)
                with self.logged("DEBUG") as lines:
                    server.report()
                self.assertRegex("\n".join(lines), r"(?m)^totals live=0 ")
                self.stop(server)
            self.check_session_lines()
            self.assertEqual(stderr.getvalue(), "")

    def test_conversations_depend_on_seed_and_number_only(self):
        first, again, other = (
            [str(Conversation(seed, number, self.port)) for number in range(20)]
            for seed in (1, 1, 2))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)


@unittest.skipUnless(resource, "descriptors as POSIX has them")
class FloodTest(ServiceTestCase):
    silent = 3000
    needed = 8000  # descriptors of the server, which keeps two for each session
    patience = 1.5  # seconds of the server

    def take_descriptors(self):
        """Have as many descriptors as the flood needs, until the end of the test."""
        soft, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < self.needed:
            self.skipTest("no more than %d descriptors to be had" % hard)
        if soft != resource.RLIM_INFINITY and soft < self.needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (self.needed, hard))
            self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)

    def has_heard(self, sock):
        """Return whether `sock` has something to read, if only an end."""
        try:
            sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True

    def test_three_thousand_silent_clients(self):
        self.take_descriptors()
        service, echo = self.service("--handshake-timeout", str(self.patience)), self.echo()
        flood, start, port = [], time.monotonic(), service.port
        while len(flood) < self.silent:
            flood += [self.client(port) for _ in range(500)]
            with self.client(port).greet() as client:  # the last in the queue: it is empty then
                self.check_echo(client, echo)
        heard = [sock for sock in flood if self.has_heard(sock)]
        if time.monotonic() - start < self.patience:
            self.assertEqual(heard, [])
        for sock in flood:
            self.assertEqual(read_all(sock), (b"", "end"))
        self.assertEqual(service.end(signal.SIGINT), 0)
        ends = re.findall(" end=(.+)", service.text())
        self.assertEqual(ends.count("handshake-timeout"), self.silent)
        self.assertEqual(len(ends), self.silent + len(range(0, self.silent, 500)))


# ---- echo_server.py ----------------------------------------------------------------------

POSIX_ONLY = unittest.skipIf(os.name == "nt", "starts processes as only POSIX can")
SOON = 10  # seconds; subprocess.TimeoutExpired says which command takes longer


class EchoTestCase(CommandTestCase):
    def finish(self, process):
        """Return the exit status, the output and the last error of `process`.

        Its children have ended, too, because they share its stderr.
        """
        out, err = process.communicate(timeout=SOON)
        self.assertNotIn("Traceback", err)
        return process.returncode, out, err.rpartition("echo_server.py: ")[2]


@POSIX_ONLY
class EchoServerTest(EchoTestCase):
    def test_tcp_and_udp(self):
        address = ("127.0.0.1", self.port(self.start("echo_server.py", "0")))
        client = self.own(socket.create_connection(address))
        content = pattern(MEBIBYTE)
        self.send(client, content, end=True)
        self.assertEqual(read_all(client), (content, "end"))
        with self.datagrams() as sock:
            for datagram in (b"", b"ping", bytes(9000)):
                sock.sendto(datagram, address)
                self.assertEqual(sock.recv(65536), datagram)

    def test_signals_end_it(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            process = self.start("echo_server.py", "0")
            self.port(process)
            process.send_signal(number)
            self.assertEqual(self.finish(process), (0, "", ""))
        with contextlib.redirect_stdout(mock.Mock(write=mock.Mock(side_effect=OSError))):
            echo_server.announce("to a full disk")

    def test_datagrams_from_its_own_port_are_ignored(self):
        with echo_server.DatagramEchoServer(("127.0.0.1", 0), None) as server, \
                self.datagrams() as client:
            server.socket.sendto(b"from itself", server.server_address)
            client.sendto(b"from a client", server.server_address)
            server.handle_request()
            server.handle_request()
            self.assertEqual(client.recv(100), b"from a client")
            server.socket.setblocking(False)
            self.assertRaises(BlockingIOError, server.socket.recv, 100)  # no echo to itself

    def test_a_client_without_a_thread_costs_one_line(self):
        with echo_server.EchoServer(("127.0.0.1", 0), None) as server:
            client = self.own(socket.create_connection(server.server_address))
            with mock.patch("threading.Thread.start", side_effect=RuntimeError("no thread")), \
                    contextlib.redirect_stderr(io.StringIO()) as err:
                server.handle_request()
            self.assertEqual(err.getvalue(),
                             "echo_server.py: error: client rejected: no thread\n")
            self.assertEqual(read_all(client), (b"", "end"))

    def test_errors(self):
        taken, dead = (str(address[1]) for address in (self.listen().getsockname(), self.dead()))
        proxy = "is not HOST:PORT or socks5h://HOST:PORT"
        cases = [
            (2, "--through :1080", "argument --through: ':1080' " + proxy),
            (2, "--through http://x:80", "argument --through: 'http://x:80' " + proxy),
            (2, "--through x:99999", "argument --through: '99999' is not a number from 0 to 65535"),
            (2, ":80", "argument port: ':80' is not a number from 0 to 65535"),
            (2, "--sessions 0", "argument --sessions: '0' is not a number from 1 to 65535"),
            (2, "--seconds 2", "--seconds needs --through"),
            (1, taken, "cannot listen on 127.0.0.1 port %s: Address already in use" % taken),
            (1, "-b " + os.fsdecode(b"\xff"), "cannot listen on "),
            (1, "--through a..b:80", "cannot measure through a..b port 80: "),
            (1, "--through [::ffff:127.0.0.1]:" + dead, "cannot measure through ::ffff:127.0.0.1")]
        processes = [self.start("echo_server.py", *options.split()) for _, options, _ in cases]
        for (status, _, problem), process in zip(cases, processes):
            found, out, error = self.finish(process)
            self.assertEqual((found, out, error.count("\n")), (status, "", 1))
            self.assertIn("error: " + problem, error)


@POSIX_ONLY
class MeasuringTest(EchoTestCase):
    def measure(self, port, *options, **settings):
        """Start a measurement, as short as possible, through the proxy on `port`."""
        return self.start("echo_server.py", "--through", "socks5h://127.0.0.1:%d/" % port,
                          "--seconds", "0", *options,
                          env=dict(os.environ, SOCKS5_PASSWORD="secret"), **settings)

    def check_error(self, problem, port, *options):
        """Check that a measurement ends with one line, before the first figure."""
        status, out, error = self.finish(self.measure(port, *options))
        self.assertEqual((status, out, error), (
            1, "", "error: cannot measure through 127.0.0.1 port %d: %s\n" % (port, problem)))

    def test_table(self):
        server = self.serve(users={"alice": "secret"})
        process = self.measure(server.server_address[1], "--user", "alice", "--sessions", "21",
                               descriptors=(20, 200))
        status, out, err = self.finish(process)
        self.assertEqual((status, err), (0, ""))
        rows = [(line[:24].strip(), *line[24:].split()) for line in out.splitlines()[1:]]
        self.assertEqual([row[0] for row in rows[::2]], [
            "sessions/s", "round trips/s", "MiB/s each way", "round trips/s, 21 held"])
        self.assertEqual([row[1] for row in rows], 4 * ["through", "directly"])
        for through, directly in zip(rows[::2], rows[1::2]):
            self.assertEqual(max(through[5:] + directly[5:]), 18 * "#")
            for figure in through[2:5] + directly[2:5]:
                self.assertGreater(float(figure.replace(",", "")), 0)

    def test_figures(self):
        def load(way, end):
            yield from (number / 1000 for number in range(100 if way.through else 50, 0, -1))

        with mock.patch.multiple(echo_server, MEASURES=[("x/s", 2, load)], connect=mock.MagicMock(),
                                 echo=mock.Mock(), forked_target=mock.MagicMock()), \
                contextlib.redirect_stdout(io.StringIO()) as out:
            echo_server.measure(argparse.Namespace(through=("", 1), user="", sessions=1, seconds=0))
        self.assertEqual([line.split() for line in out.getvalue().splitlines()[1:]], [
            ["x/s", "through", "39.6", "51", "100", 9 * "#"],
            ["x/s", "directly", "78.4", "26", "50", 18 * "#"]])
        self.assertEqual([echo_server.show(figure) for figure in (12345.6, 999.6, 7.8912, 0.01234)],
                         ["12,346", "1,000", "7.89", "0.0123"])
        self.assertEqual(len(list(echo_server.until(end=0))), 1)

    def test_a_proxy_that_does_not_work(self):
        login = self.serve(users={"alice": "other"}).server_address[1]
        self.check_error("Connection refused", self.dead()[1])
        self.check_error("the proxy requires a login: add --user NAME", login)
        self.check_error("the proxy rejected the user or the password", login, "--user", "alice")
        self.check_error("user or password longer than 255 bytes", login, "--user", 256 * "x")
        self.check_error("the proxy accepts no login: leave out --user",
                         self.serve().server_address[1], "--user", os.fsdecode(b"\xff"))
        self.check_error("the proxy answered CONNECT with reply 2", self.serve(
            hooked(authorize=lambda *_: False)).server_address[1])

    def talk(self, said, function, *args):
        """Call `function` with a socket, to a peer that says this and ends. Return the peer."""
        ours, peer = map(self.own, socket.socketpair())
        peer.sendall(said)
        peer.shutdown(socket.SHUT_WR)
        function(ours, *args)
        self.assertEqual(ours.recv(2), b"x")  # nothing less and nothing more was read
        return peer

    def test_answers(self):
        for answer, problem in ((b"HTTP/1.0 400", "it answered b'HT'"), (b"", "connection closed")):
            with self.assertRaisesRegex(ConnectionError, "^%s: no SOCKS5 server there.$" % problem):
                self.talk(answer, echo_server.greet, b"", b"")
        silent, _ = map(self.own, socket.socketpair())
        silent.settimeout(0.01)
        with self.assertRaisesRegex(ConnectionError, "^timed out: no SOCKS5 server there.$"):
            echo_server.greet(silent, b"", b"")
        for reply in ("05 00 00 01" + 6 * "00", "05 00 00 04" + 18 * "00"):
            peer = self.talk(octets(reply + "78"), echo_server.request, "127.0.0.1", 80)
            self.assertEqual(peer.recv(20), octets("05 01 00 01 7f 00 00 01 00 50"))
        for data, problem in ((b"", "connection closed"), (b"?", "bytes changed on the way")):
            with self.assertRaisesRegex(ConnectionError, "^%s$" % problem):
                self.talk(data, echo_server.echo, b"x")

    def test_an_error_names_the_load(self):
        server = self.serve(max_sessions=5)
        status, out, error = self.finish(self.measure(server.server_address[1], "--sessions", "9"))
        self.assertEqual((status, out.count("\n")), (1, 7))
        self.assertIn(": round trips/s, 9 held through the proxy: ", error)

    def test_measuring_without_fork(self):
        process = self.start("-c", "import os; del os.fork; import echo_server; "
                             "echo_server.main(['--through', '127.0.0.1:1'])")
        self.assertIn(": measuring needs a POSIX system\n", self.finish(process)[2])

    def test_no_process_is_left(self):
        for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 1),
                               (signal.SIGINT, 1)):
            sessions = queue.Queue()
            server = self.serve(hooked(authorize=lambda *args, sessions=sessions: (
                not sessions.put(args))))
            process = self.measure(server.server_address[1], "--seconds", "99")
            for _ in range(3):  # the load has begun
                sessions.get(timeout=SOON)
            process.send_signal(number)
            self.assertEqual(self.finish(process)[::2], (status, ""))


# ---- README ------------------------------------------------------------------------------

def readme(section=""):
    """Return the text of README.md, or of the section with this title."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = file.read()
    return re.search(r"(?ms)^## %s\n(.+?)(?=^## |\Z)" % section, text).group(1) if section else text


def blocks(kind):
    """Return what stands between ``` and ```."""
    return re.findall(r"^```%s\n(.+?)^```" % kind, readme(), re.MULTILINE | re.DOTALL)


class ReadmeTest(ServiceTestCase):
    def rows(self):
        """Return the first and the last cell of each row about an option, by its long name."""
        found = {}
        for row in re.findall(r"^\| (`.*--.+) \|$", readme("Options"), re.MULTILINE):
            cells = re.split(r"(?<!\\) \| ?", row)
            found[re.search(r"--[\w-]+", cells[0]).group()] = cells[0], cells[-1].strip("` |")
        return found

    def test_options_are_those_of_the_command(self):
        rows = self.rows()
        actions = {action.option_strings[-1]: action for action in self.parser()._actions
                   if action.option_strings and action.help != argparse.SUPPRESS}
        self.assertEqual(set(rows), set(actions))
        for name, action in actions.items():
            described = re.findall(r"(?<![\w-])--?[a-z][\w-]*", rows[name][0])
            self.assertEqual(set(described), set(action.option_strings))
            if action.metavar:
                self.assertIn(action.metavar, rows[name][0])
        self.assertTrue(re.search(r"(?m)^\| `port` \|.* `?1080`? \|$", readme("Options")))
        self.assertEqual((socks5.HOST, socks5.PORT), ("127.0.0.1", 1080))

    def test_defaults_are_those_of_the_command(self):
        parser, rows = self.parser(), self.rows()
        for action in parser._actions:
            default = parser.get_default(action.dest)
            if action.option_strings and action.nargs is None and default not in (None, [], ()):
                with self.subTest(action.dest):
                    said = rows[action.option_strings[-1]][1]
                    if action.dest == "udp_ports":
                        self.assertEqual((list(default), said), ([0], "any that is free"))
                    elif action.dest == "mode":
                        self.assertEqual(said, "0%o" % default)
                    elif isinstance(default, (tuple, list)):
                        self.assertEqual(said, ",".join(default))
                    else:
                        self.assertEqual(
                            said, default if isinstance(default, str) else "%g" % default)

    def test_defaults_are_those_of_settings(self):
        rows, defaults = self.rows(), socks5.Settings.__init__.__kwdefaults__
        for name, default in defaults.items():
            if isinstance(default, float):
                self.assertEqual(float(rows["--" + name.replace("_", "-")][1]), default)
            self.assertRegex(readme("Embedding"), r"\b%s\b" % name)
        said = re.findall(r"\b(\w+)=([\d.]+|None)\b", readme("Embedding"))
        self.assertEqual([(name, value) for name, value in said if name in defaults
                          and value not in (repr(defaults[name]), "%g" % (defaults[name] or 0))],
                         [])

    def test_usage(self):
        with mock.patch.dict(os.environ, COLUMNS="80"):
            usage = self.parser().format_usage()
        usage = " ".join(usage.replace("usage: ", "").split())
        self.assertTrue(usage in " ".join(readme().split()), usage)

    def test_hooks_exist(self):
        hooks = {"select_method", "authenticate", "authorize", "connect", "do_CONNECT", "do_BIND",
                 "do_UDP_ASSOCIATE", "log_message", "verify_request"}
        named = set(re.findall(r"^\| `(\w+)\(", readme("Embedding"), re.MULTILINE))
        self.assertLessEqual(hooks, named)
        for name in named:
            self.assertTrue(hasattr(socks5.Socks5RequestHandler, name)
                            or hasattr(socks5.Socks5Server, name), name)

    def test_replies_are_named(self):
        self.assertEqual(
            re.findall(r"^\| `?(\d)`? (?:\| )?(.+?) \|", readme("Replies"), re.MULTILINE),
            [(str(code), phrase) for code, phrase in enumerate(RFC_REPLIES)])

    def test_ends_are_named(self):
        table = readme("The log").partition("| `end=` |")[2].partition("\n\n")[0]
        named = [end.strip(" `") for row in re.findall(r"^\| (.+?) \| \S", table, re.MULTILINE)
                 for end in row.split(",")]
        self.assertEqual(sorted(named), sorted(socks5.ENDS))
        self.assertTrue(all(socks5.ENDS.values()))

    def test_examples_of_rules_are_accepted(self):
        users = self.file(b"alice:secret\nbob:secret")
        examples = [example for example in re.findall(r"`(-[^`\n]+)`", readme("Who may go where"))
                    if re.search(r"--(allow|deny|client) [^\[\s]*\d|--allow alice", example)]
        self.assertGreaterEqual(len(examples), 5)
        for example in examples:
            with self.subTest(example):
                settings = self.settings_of(*example.replace("FILE", users).split())
                self.assertTrue(settings["rules"] or settings["clients"])

    def test_files_of_options_are_accepted(self):
        files = [block for block in blocks(r"\w*") if re.search(r"(?m)^--[a-z]+ \S", block)
                 and not re.search(r"(?m)^\w", block)]
        self.assertTrue(files)
        users = self.file(b"alice:secret")
        for content in files:
            content = re.sub(r"(?m)^(--users) \S+", r"\1 " + users, content)
            self.settings_of("@" + self.file(content.encode()))

    def test_fail2ban_filter(self):
        (pattern_,) = re.findall(r"^failregex = (.+)$", readme(), re.MULTILINE)
        pattern_ = pattern_.replace("<HOST>", r"(?P<host>[\w.:]+?)")
        service = self.service("-q", "-b", "::" if has_ipv6() else "0.0.0.0",
                               "--users", self.file(b"alice:secret"))
        for host in ("127.0.0.1", "::1")[:1 + has_ipv6()]:
            client = self.own(Client.to((host, service.port)))
            client.sendall(octets("05 01 02 01 17") + b"user=x client=6.6.6.6:1" + b"\1x")
            address = "client=%s" % ("[::1]" if ":" in host else host)
            line = service.wait_for("login failed " + address)
            self.assertEqual(re.search(pattern_, line).group("host"), host)
            with_no_date = line[line.index(" WARNING"):]
            self.assertEqual(re.search(pattern_, with_no_date).group("host"), host)

    def test_embedding_examples(self):
        here, real, replies = threading.current_thread(), socks5.Socks5Server.serve_forever, []

        def serve_once(server, *args, **kwargs):
            if threading.current_thread() is not here:
                return real(server, *args, **kwargs)
            self.thread(real, server, 0.02)
            replies.append(self.client(server).greet().ask(22))
            server.shutdown()
            return None

        names = {"__name__": "example"}
        with mock.patch.object(socks5.Socks5Server, "serve_forever", serve_once):
            for block in blocks("python"):
                exec(block.replace("1080", "0"), names)
        self.assertEqual(set(replies), {Reply.NOT_ALLOWED})  # for OnlyWeb

    @unittest.skipUnless(socks5.__doc__, "no docstrings with -OO")
    def test_docstring_example_is_the_same(self):
        example = re.search(r"^    class .+?serve_forever\(\)$", socks5.__doc__,
                            re.MULTILINE | re.DOTALL).group()
        self.assertIn(re.sub("^    ", "", example, flags=re.MULTILINE), readme())

    @unittest.skipUnless(shutil.which("nc") and shutil.which("curl"), "no nc or no curl here")
    def test_first_commands(self):
        ports = {}
        block = next(block for block in blocks("sh") if "nc -N" in block)
        for command, output in re.findall(r"^(\w.+?)(?: +#.*)?\n# (.+\n)", block, re.MULTILINE):
            for known, actual in ports.items():
                command, output = command.replace(known, actual), output.replace(known, actual)
            if " port " not in output:  # it is a client
                said = subprocess.check_output(command, shell=True, timeout=PATIENCE,
                                               universal_newlines=True)
                self.assertEqual(said.rstrip(), output.rstrip())
                continue
            words = [word for word in command.split()[1:] if not word.isdigit()]
            line = self.start("-u", *words, "0").stdout.readline()
            known, actual = (re.search(r" port (\d+) ", text).group(1) for text in (output, line))
            ports[known] = actual
            self.assertEqual(line.replace(actual, known), output)
        self.assertGreaterEqual(len(ports), 2)


# ---- Makefile and .ci/run ----------------------------------------------------------------

def run_script(*command, **settings):
    """Return the exit status and the output of a command, once all its processes have ended."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, timeout=SOON,
                          **settings)
    return done.returncode, done.stdout


@POSIX_ONLY
@unittest.skipUnless(shutil.which("make") and shutil.which("nc"), "no make or no nc here")
class MakefileTest(TestCase):
    def make(self, target, options="", python=sys.executable):
        """Return the exit status and the output of make in the checkout."""
        return run_script("make", target, "PYTHON=" + python, "ARGS=" + options, cwd=HERE)

    def test_help(self):
        with open(os.path.join(HERE, "Makefile")) as file:
            (targets,) = re.findall(r"^\.PHONY: help (.+)$", file.read(), re.MULTILINE)
        status, out = self.make("help")
        self.assertEqual((status, "$" in out), (0, False))
        self.assertEqual(re.findall(r"^  make (\S+)\t ", out, re.MULTILINE)[1:], targets.split())

    def test_servers_are_started_and_stopped(self):
        for target, options, status, line in [
                ("demo", "", 0, "received hello\n"),
                ("bench", "--seconds 0 --sessions 3", 0, "round trips/s, 3 held   directly"),
                ("bench", "--sessions none", 2, "'none' is not a number")]:
            found, out = self.make(target, options)
            self.assertEqual((found, line in out), (status, True), out)

    def test_a_server_that_does_not_start(self):
        for target in ("bench", "demo"):
            status, out = self.make(target, python="sh -c '[ $$0 != socks5.py ] && echo $$0'")
            self.assertEqual((status, "received" in out, "echo_server.py\n" in out),
                             (2, False, False))

    def test_interrupted_bench(self):
        with tempfile.TemporaryDirectory() as folder, subprocess.Popen(
                ["make", "PYTHON=" + sys.executable, "bench"], cwd=HERE, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, preexec_fn=os.setsid,
                env=dict(os.environ, TMPDIR=folder)) as process:
            self.assertIn(b"p50 ms", process.stdout.readline())
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=SOON)  # until all processes have ended
            self.assertNotEqual(process.returncode, 0)
            self.assertEqual(os.listdir(folder), [])


@POSIX_ONLY
@unittest.skipUnless(shutil.which("bash"), "no bash here")
class CiTest(TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        for name in (".ci", "bin"):
            os.mkdir(os.path.join(self.folder, name))
        shutil.copy(os.path.join(HERE, ".ci", "run"), os.path.join(self.folder, ".ci", "run"))
        for name in ("bash", "dirname", "grep", "head", "ls", "sort"):
            os.symlink(shutil.which(name), os.path.join(self.folder, "bin", name))

    def command(self, name, script):
        """Make `script` the command `name`."""
        path = os.path.join(self.folder, "bin", name)
        self.write(path, b"#!/bin/sh\n" + os.fsencode(script))
        os.chmod(path, 0o755)

    def check(self, part, *expected):
        """Check the exit status and the last line of .ci/run."""
        status, out = run_script("bash", os.path.join(self.folder, ".ci", "run"), part, env=dict(
            os.environ, PATH=os.path.join(self.folder, "bin")))
        self.assertEqual((status, out.splitlines()[-1]), expected)

    def test_each_python_once(self):
        self.check("pythons", 1, "0 passed, 1 failed")  # to find none is a failure
        for name in ("python3", "python3.9", "python3.x"):
            os.symlink(os.path.realpath(sys.executable), os.path.join(self.folder, "bin", name))
        self.write(os.path.join(self.folder, "test_it.py"), b"""if True:
            import sys, unittest
            class Test(unittest.TestCase):
                def test(self):
                    self.assertIn("error::ResourceWarning", sys.warnoptions)""")
        self.check("pythons", 0, "1 passed, 0 failed")
        for name in ("python3.19", "python3.20t", "python3.6-config"):
            self.command(name, "case $1 in -c) echo $0;; -W) exit 1;; esac")
        self.check("pythons", 1, "1 passed, 2 failed")

    def test_the_test_command_is_readme_s(self):
        (command,) = [block.strip() for block in blocks("sh") if "unittest" in block]
        name, _, arguments = command.partition(" ")
        self.command(name, "[ \"$*\" = '%s' ]" % arguments)
        self.check("readme", 0, "1 passed, 0 failed")
        self.command(name, "false")
        self.check("readme", 1, "0 passed, 1 failed")

    def test_usage(self):
        self.check("x", 2, "usage: .ci/run [readme|pythons|check|tools]")


# ---- clients of others -------------------------------------------------------------------

class ClientsTest(TestCase):
    def run_client(self, *command, **settings):
        """Return what `command`, with the port of a server for {}, prints."""
        port = self.serve(**settings).server_address[1]
        return subprocess.check_output([word.format(port) for word in command],
                                       stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       timeout=PATIENCE)

    @unittest.skipUnless(shutil.which("curl"), "no curl here")
    def test_curl(self):
        for proxy, host, users in [
                ("socks5://127.0.0.1:{}", "127.0.0.1", None),
                ("socks5h://127.0.0.1:{}", "localhost", None),
                ("socks5h://alice:secret@127.0.0.1:{}", "localhost", USERS)]:
            url = "http://%s:%d/" % (host, self.web_server())
            self.assertEqual(self.run_client("curl", "-s", "-x", proxy, url, users=users), b"page")

    @unittest.skipUnless(shutil.which("ssh") and shutil.which("nc"), "no ssh or no nc here")
    def test_ssh_by_proxy_command(self):
        listener, banners = self.listen(), []

        def answer():
            with listener.accept()[0] as sock:
                sock.sendall(b"SSH-2.0-nobody\r\n")
                banners.append(sock.recv(8))

        thread = self.thread(answer)
        with self.assertRaises(subprocess.CalledProcessError):  # that was not an ssh server
            self.run_client("ssh", "-F", "none", "-o", "BatchMode=yes", "-o",
                            "ProxyCommand=nc -X 5 -x 127.0.0.1:{} %h %p",
                            "-p", str(listener.getsockname()[1]), "127.0.0.1", "true")
        thread.join(PATIENCE)
        self.assertEqual(banners, [b"SSH-2.0-"])

    def socksify(self, script, server):
        """Return what `script` prints where socks.conf is README's and names `server`."""
        config = re.search(r"(?ms)^route \{.+?^\}\n", readme()).group().replace(
            "1080", str(server.server_address[1]))
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "socks.conf"), "w") as file:
                file.write(config)
            return subprocess.check_output(
                ["sh", "-c", script], cwd=folder, stderr=subprocess.DEVNULL, timeout=PATIENCE,
                env=dict(os.environ, SOCKS_CONF="socks.conf", SOCKS_AUTOADD_LANROUTES="no"))

    @unittest.skipUnless(shutil.which("socksify") and shutil.which("nc"), "no socksify or nc here")
    def test_dns_query(self):
        query = re.search(r"(?ms)^printf '.+?od .+?$", readme()).group()
        with self.own(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            sock.bind(("127.0.0.1", 0))

            def answer():
                query, client = sock.recvfrom(100)
                sock.sendto(query + bytes([192, 0, 2, 7]), client)

            self.thread(answer)
            said = self.socksify(query.replace(
                "192.0.2.53 53", "127.0.0.1 %d" % sock.getsockname()[1]), self.serve())
        self.assertEqual(said.split(), [b"192", b"0", b"2", b"7"])

    def serve_file(self, listener):
        """Serve active FTP: connect to the client to deliver a file."""
        sock = self.own(listener.accept()[0])
        sock.sendall(b"220 hello\r\n")
        answers = {b"USER": b"331", b"PASS": b"230", b"TYPE": b"200", b"EPRT": b"200",
                   b"QUIT": b"221"}
        commands = sock.makefile("rb")
        self.addCleanup(commands.close)
        for line in commands:
            command, _, argument = line.strip().partition(b" ")
            if command == b"EPRT":
                _, _, host, port, _ = argument.decode().split("|")
            if command == b"RETR":
                sock.sendall(b"150 here it comes\r\n")
                with socket.create_connection((host, int(port))) as data:
                    data.sendall(b"content of " + argument)
                sock.sendall(b"226 done\r\n")
            else:
                sock.sendall(answers.get(command, b"502") + b" so\r\n")

    @unittest.skipUnless(shutil.which("socksify") and shutil.which("tnftp"),
                         "no socksify or tnftp here")
    def test_active_ftp(self):
        listener = self.listen()
        self.thread(self.serve_file, listener)
        said = self.socksify(
            "printf 'user a b\nbinary\nget one two\nquit\n' |"
            " HOME=. socksify tnftp -A -n -P %d 127.0.0.1 >/dev/null; cat two"
            % listener.getsockname()[1], self.serve())
        self.assertEqual(said, b"content of one")


if __name__ == "__main__":
    unittest.main()
