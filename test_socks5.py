"""Tests of socks5.py and echo_server.py, in the order of their rooms: python -m unittest

Sockets are real and on loopback, ports are free ones, frames are literal bytes in hex. A test
leaves no thread, no descriptor and no ResourceWarning behind: the first cleanup that each test
registers, and so the last that runs, checks that.
"""

import argparse
import calendar
import collections
import contextlib
import errno
import gc
import inspect
import io
import itertools
import logging
import os
import queue
import random
import re
import select
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
    import fcntl
    import pwd
    import resource
except ImportError:  # Windows
    fcntl = pwd = resource = None

HERE = os.path.dirname(os.path.abspath(__file__))
PATIENCE = 10  # seconds after which a test that waits for something fails
MEBIBYTE = 1 << 20
NO_ROUTE = ("255.255.255.255", 1)  # the kernel refuses it at once: ENETUNREACH or EACCES
USERS = {"alice": "secret", "b\u00fcb": "\u20ac", "x" * 255: "y" * 255}
LOGIN = "05 01 02 01 05 61 6c 69 63 65 06 73 65 63 72 65 74"  # alice, secret
REFUSED = " 00 01 00 00 00 00 00 00"  # the rest of each reply to a request that failed
POSIX_ONLY = unittest.skipUnless(os.name == "posix", "processes and signals as POSIX has them")
LINUX_ONLY = unittest.skipUnless(sys.platform.startswith("linux"), "needs Linux")

logging.getLogger("socks5").propagate = False
logging.getLogger("socks5").addHandler(logging.NullHandler())
LOGIN_PAUSE = socks5.Socks5RequestHandler.login_pause  # seconds, the default
SWEEP_INTERVAL = socks5.SWEEP_INTERVAL
socks5.Socks5RequestHandler.login_pause = 0  # seconds; the test of the pause sets its own
if hasattr(gc, "freeze"):  # from Python 3.7: each test collects garbage, but not the modules
    gc.collect()
    gc.freeze()


# ---- tools -------------------------------------------------------------------------------

def octets(text):
    """Return the bytes that `text` shows in hex; "|" and spaces separate."""
    return bytes.fromhex(text.replace("|", " "))


def port_of(number):
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
    pieces = bytearray()
    while len(pieces) < count:
        piece = sock.recv(count - len(pieces))
        if not piece:
            raise AssertionError("ended after %r" % pieces)
        pieces += piece
    return bytes(pieces)


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def wait_until(condition, what=""):
    """Wait for `what`, which no descriptor and no lock announces."""
    until = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise AssertionError("waited in vain for " + (what or inspect.getsource(condition)))
        time.sleep(0.001)


def children(process):
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
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(bytes(MEBIBYTE))


def failing(owner, names, errors, concerns=lambda *args: True):
    """Return a patch: methods of `owner` raise `errors`, one a call; None raises nothing."""
    def broken(real):
        def fail(*args, **kwargs):
            error = errors.pop(0) if errors and concerns(*args) else None
            if error:
                raise error
            return real(*args, **kwargs)
        return fail
    return mock.patch.multiple(
        owner, **{name: broken(getattr(owner, name)) for name in names.split()})


def breaking(methods, peer, error):
    """Return a patch of socket: these methods of a socket that is connected to `peer` raise."""
    where = peer.getsockname()

    def is_connected(sock, *args):
        with contextlib.suppress(OSError):
            return sock.getpeername() == where
    return failing(socket.socket, methods, [error] * 1000, is_connected)


def descriptors():
    listing = "/proc/self/fd"
    return len(os.listdir(listing)) if os.path.isdir(listing) else 0


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


def fields(line):
    return dict(word.split("=", 1) for word in line.split(" ") if "=" in word)


def hooked(**hooks):
    return type("Handler", (socks5.Socks5RequestHandler,), hooks)


def resolver(*addresses, ask=lambda name: None):
    """Return a patch: each name is at `addresses`. `ask` hears it first, and may wait or raise."""
    real = socket.getaddrinfo

    def getaddrinfo(name, *args, **kwargs):
        if isinstance(name, str):  # a test's own question: socks5.py asks with bytes
            return real(name, *args, **kwargs)
        ask(name)
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
        self.sendall(octets(frame))

    def hear(self, frame):
        """Read as many bytes as `frame` shows, and compare them; "??" is any byte."""
        said = read_count(self, len(octets(frame.replace("??", "00"))))
        expected = frame.replace(" ", "").replace("??", "..")
        if not re.match(expected + "$", said.hex()):
            raise AssertionError("%s is not %s" % (said.hex(), expected))
        return said

    def greet(self):
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
        """Fail for a thread, a descriptor or a ResourceWarning that the test leaves behind."""
        until = time.monotonic() + PATIENCE / 2
        for thread in set(threading.enumerate()) - threads:
            thread.join(max(0, until - time.monotonic()))
        gc.collect()
        caught.__exit__(None, None, None)
        self.assertEqual([str(each.message) for each in self.warnings
                          if issubclass(each.category, ResourceWarning)], [])
        self.assertEqual(set(threading.enumerate()) - threads, set())
        self.assertEqual(descriptors(), count)

    def patch(self, patch):
        patch.start()
        self.addCleanup(patch.stop)

    def thread(self, function, *args):
        """Run `function` in a thread that is joined at the end."""
        thread = threading.Thread(target=function, args=args, name=repr(function), daemon=True)
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
        listener = self.own(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
        listener.bind((host, 0))
        listener.listen(backlog)
        return listener

    def serve(self, handler=socks5.Socks5RequestHandler, host="127.0.0.1", address=None,
              kind=socks5.Socks5Server, **settings):
        """Return a server of the class `kind` that serves, on a free port unless `address` says."""
        server = kind(address or (host, 0), handler, **settings)
        self.thread(server.serve_forever, 0.005)
        self.addCleanup(self.stop, server)
        return server

    def serve_hook(self, connect, **settings):
        """Return a server whose hook `connect` is this function without arguments."""
        return self.serve(hooked(connect=lambda *_: connect()), **settings)

    def stop(self, server):
        """End `server` and its sessions; all of them have been logged afterwards."""
        ended = []
        self.thread(lambda: ended.append((server.shutdown(), server.server_close()))).join(PATIENCE)
        self.assertTrue(ended, "waited in vain for the sessions to end")

    def echo(self):
        server = echo_server.EchoServer(("127.0.0.1", 0), echo_server.EchoRequestHandler)
        server.daemon_threads = False
        self.thread(server.serve_forever, 0.005)
        self.addCleanup(self.stop, server)
        return server.server_address[1]

    def client(self, server, source=None):
        """Return a client that is connected to `server`, or to a server on a port."""
        host, port = ("127.0.0.1", server) if isinstance(server, int) else server.server_address[:2]
        client = Client.to(("127.0.0.1" if host == "::" else host, port), source)
        self.addCleanup(client.close)
        return client

    def tunnel(self, server=None):
        """Return the two ends of a relay: the client's socket and the target's."""
        listener = self.listen()
        client = self.client(self.serve() if server is None else server).greet()
        self.assertEqual(client.ask(listener.getsockname()[1]), Reply.SUCCEEDED)
        return client, self.own(listener.accept()[0])

    def pair(self):
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
        source.sendall(b"ping")
        self.assertEqual(read_count(sink, 4), b"ping")

    def check_relay(self, client, target):
        self.check_one_way(client, target)
        self.check_one_way(target, client)

    def check_echo(self, client, port):
        """Check that `client`, which has greeted, reaches the echo server on `port`."""
        self.assertEqual(client.ask(port), Reply.SUCCEEDED)
        self.check_relay(client, client)

    def talk(self, server, *pieces):
        """Return what `server` says to a client that sends `pieces`, in hex, and then its end."""
        with self.client(server) as client:
            with contextlib.suppress(OSError):  # the server may have hung up
                for piece in pieces:
                    client.say(piece)
                client.shutdown(socket.SHUT_WR)
            return read_all(client)[0]

    def file(self, content, mode=0o600):
        handle, path = tempfile.mkstemp()
        self.addCleanup(os.remove, path)
        os.close(handle)
        self.write(path, content)
        os.chmod(path, mode)
        return path

    def write(self, path, content):
        with open(path, "wb") as file:
            file.write(content)

    def folder(self):
        path = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, path)
        os.chmod(path, 0o755)
        return path

    def connecting(self, action):
        """Return a patch: another thread connects to `action(sock, address)`, or to `address`."""
        mine, real = threading.current_thread(), socket.socket.connect

        def connect(sock, address):
            if threading.current_thread() is not mine:
                address = action(sock, address[:2]) or address
            return real(sock, address)
        return mock.patch.object(socket.socket, "connect", connect)

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
        with self.client(server, source) as client:
            with contextlib.suppress(OSError):
                client.say("05 02 00 02")
                return client.recv(1) == b"\5"
            return False

    def slow_tunnel(self, server):
        """Return the ends of a relay whose client has little room for what it does not read."""
        client, listener = self.own(Client()), self.listen()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        client.connect(server.server_address)
        client.greet().ask(listener.getsockname()[1])
        return client, self.own(listener.accept()[0])

    @contextlib.contextmanager
    def jumping_clock(self):
        """Give a function that moves time.monotonic by some seconds."""
        real, ahead = time.monotonic, []
        with mock.patch("time.monotonic", lambda: real() + sum(ahead)):
            yield ahead.append

    def check_progress(self, server, count, progress):
        """Check that `progress` renews the deadlines, a minute each, of `count` sessions."""
        with self.jumping_clock() as jump:
            for _ in range(3):
                jump(40)
                progress()
                wait_until(lambda: [float(live["idle"]) < 30 for live in self.report(server)[0]]
                           == [True] * count)


@POSIX_ONLY
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


# ---- vocabulary --------------------------------------------------------------------------

RFC_REPLIES = [
    "succeeded", "general SOCKS server failure", "connection not allowed by ruleset",
    "Network unreachable", "Host unreachable", "Connection refused", "TTL expired",
    "Command not supported", "Address type not supported"]


class VocabularyTest(TestCase):
    def test_numbers_are_the_rfc_s(self):
        for kind, numbers in [(Reply, range(len(RFC_REPLIES))), (socks5.Command, [1, 2, 3]),
                              (socks5.AddressType, [1, 3, 4]), (socks5.Method, [0, 1, 2, 255])]:
            self.assertEqual(list(map(int, kind)), list(numbers))

    @unittest.skipIf(sys.flags.optimize > 1, "-OO removes docstrings")
    def test_public_names_exist(self):
        for name in socks5.__all__:
            self.assertTrue(getattr(socks5, name).__doc__, name)


# ---- frames ------------------------------------------------------------------------------

FRAMES = [  # reader, bytes, what they mean
    (socks5.read_methods, "05 00", b""),
    (socks5.read_methods, "05 01 00", b"\0"),
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
    (socks5.Request.read, "05 09 ee 03 01 78 00 00", (9, ("x", 0))),
]


class FramesTest(TestCase):
    def test_whole_and_cut(self):
        for read, frame, meaning in FRAMES:
            whole = octets(frame)
            with self.subTest(frame=frame[:40]):
                stream = io.BytesIO(whole + b"rest")
                self.assertEqual((read(stream), stream.read()), (meaning, b"rest"))
                for end in range(0, len(whole), 1 if len(whole) < 100 else 40):
                    with self.assertRaisesRegex(socks5.ProtocolError, "client-left"):
                        read(io.BytesIO(whole[:end]))

    def test_addresses_of_sockets(self):
        for sockaddr, text in [
                (("127.0.0.1", 80), "127.0.0.1:80"), (("::1", 80, 0, 0), "[::1]:80"),
                (("fe80::1%lo", 80, 0, 1), "[fe80::1]:80"),
                (("::ffff:10.0.0.1", 80, 0, 0), "10.0.0.1:80"), ("", "0.0.0.0:0")]:
            self.assertEqual(str(Address.of(sockaddr)), text)


# ---- rules -------------------------------------------------------------------------------

ALLOWED, DENIED = Reply.TTL_EXPIRED, Reply.NOT_ALLOWED  # what RuleHandler answers
RULE_USERS = {"alice": "x", "Alice": "x", "bob": "x", "a@b": "x"}


class RuleHandler(socks5.Socks5RequestHandler):
    """Say what the rules say about a destination, and dial nothing."""

    def connect(self, destination):
        self.permitted(destination, time.monotonic() + PATIENCE)
        raise socks5.RequestError(ALLOWED)


class RulesTest(TestCase):
    def ask(self, server, host, *answers, port=80, user=None, **look_up):
        """Return the reply about `host`, which is at `answers`; `line` is then the session's."""
        with self.logged() as lines, Client.to(server.server_address) as client:
            client.log_in(user, "x") if user else client.greet()
            with resolver(*answers, **look_up):
                reply = client.ask(port, host)
            reset(client)
            self.line = self.session_line(lines)
        return reply

    def test_forms(self):
        server = self.serve(RuleHandler)
        for rule, yes, no in [  # questions: an address, a port, a name that is there, a user
                ("*", [("10.0.0.1", 80, "a.example"), ("::1", 0)], []),
                ("*:80", [("10.0.0.1", 80)], [("10.0.0.1", 81)]),
                ("*:80-82", [("10.0.0.1", 80), ("10.0.0.1", 82)],
                 [("10.0.0.1", 79), ("10.0.0.1", 83)]),
                ("10.0.0.1", [("10.0.0.1", 80), ("10.0.0.1", 80, "a.example")],
                 [("10.0.0.2", 80), ("::1", 80), ("10.0.0.2", 80, "a.example")]),
                ("10.0.0.0/8:80", [("10.255.0.1", 80)], [("11.0.0.1", 80), ("10.0.0.1", 8)]),
                ("10.0.0.0/8", [("::ffff:10.0.0.1", 80), ("::ffff:10.0.0.1", 80, "a.example")], []),
                ("2001:db8::1", [("2001:db8::1", 80)], [("2001:db8::", 80)]),
                ("[2001:db8::]:1", [("2001:db8::", 1)], [("2001:db8::1", 80)]),
                ("2001:db8::/32", [("2001:db8:ffff::", 80)], [("10.0.0.1", 80)]),
                ("[2001:db8::/32]:80", [("2001:db8::", 80)], [("2001:db8::", 8)]),
                ("a.example", [("10.0.0.1", 80, "A.Example.")],
                 [("10.0.0.1", 80, "b.a.example"), ("10.0.0.1", 80),
                  ("10.0.0.1", 80, "aa.example")]),
                ("A.EXAMPLE.:80", [("::1", 80, "a.example")], [("::1", 8, "a.example")]),
                ("*.example", [("::1", 80, name) for name in (
                    "example", "a.example", "b.a.example.")],
                 [("::1", 80, "anexample"), ("::1", 80, "example.com"), ("10.0.0.1", 80)]),
                ("alice@*", [("::1", 1, "", "alice")],
                 [("::1", 1, "", "bob"), ("::1", 1, "", "Alice")]),
                ("alice@a.example", [("::1", 1, "a.example", "alice")],
                 [("::1", 1, "a.example", "bob")]),
                ("a@b@10.0.0.1:22", [("10.0.0.1", 22, "", "a@b")],
                 [("10.0.0.1", 22, "", "bob")])]:
            for verb, ifyes, ifno in (("allow ", ALLOWED, DENIED), ("deny ", DENIED, ALLOWED)):
                server.settings = socks5.Settings(
                    rules=[verb + rule], users=RULE_USERS if "@" in rule else None)
                for expected, questions in ((ifyes, yes), (ifno, no)):
                    for question in questions:
                        address, port, name, user = (question + ("", None))[:4]
                        with self.subTest(verb + rule, question=question):
                            self.assertEqual(self.ask(server, name or address, (address, port),
                                                      port=port, user=user), expected)

    def test_bad_rules_are_quoted_and_explained(self):
        no_ip, no_host, no_port = "HOST: .* does not appear", "not an address, a", "neither PORT"
        for why, *rules in [
                (no_host, "", ":80", "a b", "a*.example", "*.*.example", "*.", "a..b"),
                (r"\(names in other scripts: xn--", "b\u00fccher.example", "\u2024"),
                (no_port, "a:", "a:http", "a:\u0668\u0660", "a:80-\u0669", "a:-1", "a:1-",
                 "a:8*", "a:*8"),
                ("no USER before @", "@a"), ("HOST: .*host bits", "10.0.0.1/8"),
                ("FIRST is greater than LAST", "a:2-1", "a:65536", "a:1-65536"),
                (no_ip, "10.0.0.256", "10.0.0.0/33", "::g", "192.168.", "0x7f000001",
                 "0X7f000001", "[::1", "[::1]80"),
                ("HOST: ", "fe80::1%eth0", "fe80::%1/64", "[fe80::1%eth0]:80"),
                ("IPv4-mapped addresses are not", "::ffff:10.0.0.1", "::ffff:10.0.0.0/104")]:
            for rule in rules:
                with self.subTest(rule=rule), self.assertRaisesRegex(
                        ValueError, re.escape("allow " + rule) + ": not .*" + why):
                    socks5.Settings(rules=["deny *", "allow " + rule])
        with self.assertRaisesRegex(ValueError, "no allow or deny"):
            socks5.Settings(rules=["permit *"])

    def test_first_match_decides_if_possible_without_a_look_up(self):
        server = self.serve(RuleHandler)
        for rules, host, expected, text in [
                ([], "10.0.0.1", ALLOWED, "-"), (["deny 10.0.0.2"], "10.0.0.1", ALLOWED, "-"),
                (["allow 10.0.0.2"], "10.0.0.1", DENIED, "default"),
                (["deny 10.0.0.2", "allow 10.0.0.3"], "10.0.0.1", DENIED, "default"),
                (["allow 10.0.0.3", "deny 10.0.0.2"], "10.0.0.1", DENIED, "default"),
                (["deny 10.0.0.1", "allow *"], "10.0.0.1", DENIED, "deny:10.0.0.1"),
                (["allow *", "deny 10.0.0.1"], "10.0.0.1", ALLOWED, "-"),
                (["deny *"], "a.example", DENIED, "deny:*"),
                (["allow *:443"], "a.example", DENIED, "default"),
                (["allow other.example", "allow alice@*"], "a.example", DENIED, "default")]:
            with self.subTest(rules):
                server.settings = socks5.Settings(rules=rules)
                reply = self.ask(server, host, ask=mock.Mock(side_effect=AssertionError))
                self.assertEqual((reply, self.line["rule"]), (expected, text))

    def test_what_is_denied_unasked(self):
        here, afar = ("127.0.0.1", "::1"), ("10.9.9.9", "::ffff:10.9.9.9")
        class Server(socks5.Socks5Server):
            def get_request(self):
                return super().get_request()[0], (client, 5)

        for client in here + afar:
            server = self.serve(RuleHandler, kind=Server)
            for host, rule, denied in [
                    ("169.254.169.254", "169.254.0.0/16", here + afar),
                    ("fe80::1", "fe80::/10", here + afar),
                    ("fe80:0:0:1::1", "fe80::/10", here + afar),
                    ("febf:ffff::", "fe80::/10", here + afar), ("fec0::", "", ()),
                    ("127.0.0.1", "127.0.0.0/8", afar), ("127.255.0.1", "127.0.0.0/8", afar),
                    ("::1", "::1", afar), ("0.0.0.0", "0.0.0.0", afar), ("::", "::", afar),
                    ("10.0.0.1", "", ())]:
                with self.subTest(host=host, client=client):
                    server.settings = socks5.Settings()
                    expected = (DENIED, "built-in:" + rule) if client in denied else (ALLOWED, "-")
                    for question in ((host,), ("a.example", (host, 80))):
                        reply = self.ask(server, *question)
                        self.assertEqual((reply, self.line["rule"]), expected)
                    server.settings = socks5.Settings(rules=["allow " + host])
                    self.assertEqual(self.ask(server, host), ALLOWED)
                    server.settings = socks5.Settings(rules=["deny " + host, "allow *"])
                    self.assertEqual(self.ask(server, host), DENIED)

    def test_only_addresses_that_passed_are_dialed(self):
        good, dead = self.listen().getsockname(), self.dead("127.0.0.3")
        server, seen = self.serve(), []
        for rule, addresses, reply, dialed, text in [
                ("deny 127.0.0.2", [("127.0.0.2", good[1]), good], 0, [good], "-"),
                ("allow 127.0.0.3", [good, dead], 5, [dead], "-"),
                ("deny 127.0.0.0/8", [good], 2, [], "deny:127.0.0.0/8"),
                ("deny SECRET.example", [good], 2, [], "deny:SECRET.example"),
                ("allow *.example", [good], 0, [good], "-"),
                ("allow *.other", [good], 2, [], "default")]:
            server.settings = socks5.Settings(rules=[rule])
            del seen[:]
            with self.subTest(rule), self.connecting(lambda _, address: seen.append(address)):
                self.assertEqual(self.ask(server, "Secret.EXAMPLE.", *addresses), reply)
                self.assertEqual((seen, self.line["rule"]), (dialed, text))
                self.assertEqual((self.line["reached"], self.line["end"]), (
                    "%s:%d" % good, "client-reset") if not reply else ("-", "refused"))


# ---- users -------------------------------------------------------------------------------

class UsersTest(TestCase):
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
                (b"", ": no users"), (b"# alice:hunter2\n", ": no users"),
                (b"a:b\nhunter2\n", ", line 2: password"), (b":hunter2", ", line 1: username"),
                (b"hunter2:", ", line 1: password"), (b"a:b\n\na:hunter2", ", line 3: this user"),
                (b"a" * 256 + b":hunter2", ", line 1: username"),
                (b"a:" + b"hunter2" * 37, ", line 1: password"),
                (b"\xc3\xbc" * 128 + b":hunter2", ", line 1: username"),
                (b"a:hunter2" + b"\xc3\xbc" * 128, ", line 1: password"),
                (b"a:\xffhunter2", ", line 1: not UTF-8")]:
            path = self.file(content)
            with self.subTest(content=content[:20]), self.assertRaisesRegex(
                    ValueError, "^" + re.escape(path + message)) as caught:
                socks5.load_users(path)
            self.assertNotIn("hunter2", str(caught.exception))

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
    LIMITS = ("max_sessions", "max_per_client", "max_per_user")

    def test_good(self):
        for settings in [
                {}, {"users": {"\u00fc" * 127: "y" * 255}}, {"commands": []},
                {"udp_ports": range(4000, 4002), "udp_advertise": "2001:db8::1"},
                dict.fromkeys(self.LIMITS, 1), dict.fromkeys(("idle_timeout",) + self.LIMITS),
                dict.fromkeys(self.TIMES, 1), dict.fromkeys(self.TIMES, 0.001),
                dict.fromkeys(self.TIMES, float("inf"))]:
            with self.subTest(settings):
                socks5.Settings(**settings)

    def test_bad(self):
        for names, values, why in [
                (["users"], [{"": "x"}, {"x" * 256: "x"}, {"\u00fc" * 128: "x"}], "username: not"),
                (["users"], [{"x": ""}, {"x": "y" * 256}, {"x": "\u00fc" * 128}],
                 "password of 'x': not 1 to 255 bytes$"),
                (["clients", "proxy_from"], [["10.0.0.1/8"]], "10.0.0.1/8 has host bits"),
                (["clients", "proxy_from"], [["::ffff:10.0.0.1"]], "::ffff:.* zones and IPv4-map"),
                (["clients", "proxy_from"], [["a.example"], ["b\u00fccher"], ["fe80::1%lo"]], ""),
                (["commands"], [["connect", "associate"], ["CONNECT"]], "known are connect, udp"),
                (["udp_advertise", "source"], ["localhost", "fe80::1%lo", ""], "not an IP address"),
                (["udp_ports"], [[-1], [65536]], "a port is 0 to 65535"),
                (self.TIMES, [0, -0.5, float("nan")], "0.001 or more, not "),
                (self.LIMITS, [0, -1], "1 or more, not ")]:
            for name, value in itertools.product(names, values):
                with self.subTest(name, value=value), self.assertRaisesRegex(
                        ValueError, "^%s: %s" % (name.replace("clients", "client"), why)):
                    socks5.Settings(**{name: value})

    def test_server_has_the_same_defaults(self):
        parameters = inspect.signature(socks5.Socks5Server).parameters
        self.assertEqual({name: parameters[name].default for name in socks5.DEFAULTS},
                         socks5.DEFAULTS)


# ---- threads -----------------------------------------------------------------------------

class ThreadsTest(TestCase):
    def tunnels(self, server, count):
        for ends in [self.tunnel(server) for _ in range(count)]:
            for sock in ends:
                sock.close()
        self.assertTrue(server.drain(PATIENCE))

    def test_threads_are_reused(self):
        server, started = self.serve(), []
        real = threading.Thread.start
        with mock.patch.object(threading.Thread, "start", lambda thread: (
                started.append(thread), real(thread))):
            for _ in range(20):
                self.tunnels(server, 1)
        self.assertLess(len(started), 20)  # of 40 that 20 relays need

    def test_surplus_threads_end_and_nothing_is_remembered(self):
        def known():
            gc.collect()
            return [sum(issubclass(type(each), kind) for each in gc.get_objects())
                    for kind in (threading.Thread, socks5.Flow)]

        with mock.patch.object(socks5.ThreadCache, "most_idle", 3):
            server = self.serve()
            threads, flows = known()
            for _ in range(2):
                self.tunnels(server, 8)
                wait_until(lambda: known() == [threads + 3, flows], "all but three threads to end")

    def test_failure_costs_a_thread_nothing(self):
        class Server(socks5.Socks5Server):
            def handle_error(self, request, client_address):
                threads.add(threading.current_thread())
                raise ZeroDivisionError("hunter2")

        server, threads = self.serve(hooked(select_method=None), kind=Server), set()
        for _ in range(5):
            with self.logged() as lines, Client.to(server.server_address) as client:
                client.say("05 01 00")
                self.assertEqual(read_all(client)[0], b"")
                wait_until(lambda lines=lines: "thread failed error=ZeroDivisionError" in lines)
            self.assertNotIn("hunter2", "".join(lines))
        self.assertLess(len(threads), 5)

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

    def test_closing_ends_a_thread_that_is_busy(self):
        threads, gate = socks5.ThreadCache(), threading.Event()
        threads.start(gate.wait, PATIENCE)
        wait_until(lambda: threads.threads)
        closing = self.thread(threads.close)
        gate.set()
        closing.join(2)
        self.assertFalse(closing.is_alive())


# ---- dialing -----------------------------------------------------------------------------

class DialTest(TestCase):
    def dial(self, *addresses, **settings):
        client = self.client(self.serve(**settings)).greet()
        with resolver(*addresses):
            return client.ask(80, "x.example")

    def test_names(self):
        server = self.serve()
        for host, asked in [
                ("localhost", b"localhost"), ("Example.COM.", b"example.com."),
                ("_dmarc.example", b"_dmarc.example"), ("xn--bcher-kva.a", b"xn--bcher-kva.a"),
                ("a" * 63 + ".example", b"a" * 63 + b".example")]:
            client = self.client(server).greet()
            with self.subTest(host), mock.patch("socket.getaddrinfo",
                                                side_effect=socket.gaierror) as getaddrinfo:
                self.assertEqual(client.ask(81, host), 4)
                self.assertEqual(getaddrinfo.call_args[0], (asked, 81))

    def test_odd_names_and_literals_are_not_looked_up(self):
        port, server = self.dead()[1], self.serve()
        with mock.patch("socket.getaddrinfo", side_effect=AssertionError):
            for host in ("", ".", "a..b", ".a", "a b", " ", "localhost\0.example", "\0", "a\tb",
                         "a\x7f", "::1%\0.example", "::1%\udcff", "a\u3000b", "\udcff", "a" * 64,
                         "b\u00fccher.example", "b\u00fc\0cher", "\ufdfa" * 85, "127.0.0.1"):
                host = host.encode("utf-8", "surrogateescape")
                with self.subTest(host), Client.to(server.server_address) as client:
                    self.assertEqual(client.greet().ask(port, host),
                                     5 if host == b"127.0.0.1" else 4)
            self.assertEqual(self.client(server).greet().ask(port), 5)

    def test_mapped_address_is_dialed_as_ipv4(self):
        target, server = self.listen(), self.serve(source="127.0.0.1")
        for where in ("04" + " 00" * 10 + " ff ff 7f 00 00 01",
                      "03 10" + b"::ffff:127.0.0.1".hex()):
            client = self.client(server).greet()
            client.sendall(octets("05 01 00" + where) + port_of(target.getsockname()[1]))
            self.assertEqual(client.read_reply(), (0, self.own(target.accept()[0]).getpeername()))

    def test_next_address(self):
        holes, dead = [self.black_hole() for _ in range(6)], self.dead()
        for first, delay, least in [  # a failure starts it at once, silence after a delay
                ([dead], PATIENCE, 0), ([dead, NO_ROUTE, dead], PATIENCE, 0),
                (holes[:1], 0.1, 0.09), (holes[:2], 0.05, 0.09), (holes, 0.02, 0.1)]:
            for host in ["127.0.0.1"] + ["::1"] * has_ipv6():
                listener = self.listen(host)
                with self.subTest(first=first, host=host), self.within(6), \
                        mock.patch.object(socks5, "ATTEMPT_DELAY", delay):
                    start = time.monotonic()
                    self.assertEqual(self.dial(*first, listener.getsockname()[:2],
                                               connect_timeout=2 * PATIENCE), 0)
                    self.own(listener.accept()[0])
                    self.assertGreaterEqual(time.monotonic() - start, least * (host < ":"))

    def test_silence_costs_a_quarter_of_a_second(self):
        hole, listener = self.black_hole(), self.listen()
        start = time.monotonic()
        self.assertEqual(self.dial(hole, listener.getsockname()), 0)
        self.own(listener.accept()[0])
        self.assertTrue(0.24 <= time.monotonic() - start < 2.4)

    def test_first_error_counts_and_otherwise_the_deadline(self):
        hole, other, dead = self.black_hole(), self.black_hole(), self.dead()
        self.patch(mock.patch.multiple(socks5, ATTEMPT_DELAY=0.02, SWEEP_INTERVAL=PATIENCE))
        for addresses, reply, least in [
                ([dead, NO_ROUTE], [5], 0), ([NO_ROUTE, dead], [2, 3], 0),
                ([hole, dead], [5], 0.09), ([hole], [6], 0.09), ([hole, other], [6], 0.09)]:
            start = time.monotonic()
            with self.subTest(addresses), self.within(6):
                self.assertIn(self.dial(*addresses, connect_timeout=0.1), reply)
                self.assertGreaterEqual(time.monotonic() - start, least)

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
            wait_until(lambda count=count: descriptors() == count, "the attempts to be closed")
        with self.assertRaises(BlockingIOError):  # nobody went on after the success
            later.accept()

    def test_many_addresses(self):
        for addresses, reply in (([self.dead()] * 40, 5), ([self.black_hole()] * 40, 6)):
            opened, client = [], self.client(self.serve(connect_timeout=0.5)).greet()
            before = descriptors()
            with mock.patch.object(socks5, "ATTEMPT_DELAY", 0.005), resolver(*addresses), \
                    self.connecting(lambda *_, opened=opened: opened.append(descriptors())):
                self.assertEqual(client.ask(80, "x.example"), reply)
            self.assertEqual(len(opened), 32)
            self.assertLessEqual(max(opened), before + 4)

    def test_a_dial_that_reaches_itself_is_refused(self):
        def turn_to_itself(sock, address):
            if address == hole:
                return address
            sock.bind(("127.0.0.1", 0))
            return sock.getsockname()

        hole = self.black_hole()
        self.patch(mock.patch.multiple(socks5, ATTEMPT_DELAY=0.02, SWEEP_INTERVAL=PATIENCE))
        with self.connecting(turn_to_itself):
            self.assertEqual(self.client(self.serve()).greet().ask(9), 5)
            self.assertEqual(self.dial(hole, ("127.0.0.1", 9), connect_timeout=0.2), 5)

    @unittest.skipUnless(has_ipv6(), "no IPv6 on this host")
    def test_families_take_turns(self):
        def connect(sock, address):
            attempts.append(address[0])
            raise OSError(errno.EHOSTUNREACH, "")

        attempts = []
        with self.connecting(connect):
            self.assertEqual(self.dial(("::1", 1), ("::2", 1), ("::3", 1), ("127.0.0.1", 1),
                                       ("::4", 1)), 4)
        self.assertEqual(attempts, ["::1", "127.0.0.1", "::2", "::3", "::4"])

    @LINUX_ONLY
    def test_targets_see_the_source_and_the_other_family_is_refused(self):
        bound, listener, server = [], self.listen(), self.serve(source="127.0.0.2")
        port = listener.getsockname()[1]
        with self.connecting(lambda sock, _: bound.append(sock.getsockname())), \
                resolver(("::1", port, 0, 0), ("127.0.0.1", port)):
            for host in "127.0.0.1", "a.example":  # its address of the other family is left out
                self.assertEqual(self.client(server).greet().ask(port, host), Reply.SUCCEEDED)
                self.assertEqual(self.own(listener.accept()[0]).getpeername()[0], "127.0.0.2")
        self.assertEqual(bound, [("127.0.0.2", 0)] * 2)  # IP_BIND_ADDRESS_NO_PORT
        with failing(socket.socket, "setsockopt", [OSError(errno.ENOPROTOOPT, "")],
                     lambda sock, level, name, *_: (level, name) == (socket.IPPROTO_IP, 24)):
            self.assertEqual(self.client(server).greet().ask(port), Reply.SUCCEEDED)
        for source, address in (("127.0.0.2", "04" + "00" * 15 + "01"), ("::1", "01 7f 00 00 01")):
            client = self.client(self.serve(source=source)).greet()
            client.say("05 01 00" + address + "00 09")
            self.assertEqual(client.read_reply()[0], Reply.NETWORK_UNREACHABLE)

    def test_errors_of_the_system(self):
        for count, (call, error, reply) in itertools.product((1, 2), [
                ("__init__", errno.EMFILE, 1), ("__init__", errno.EAFNOSUPPORT, 3),
                ("connect", errno.ETIMEDOUT, 6)]):
            client = self.client(self.serve(connect_timeout=PATIENCE)).greet()
            with self.within(6), resolver(*[("127.0.0.1", 1)] * count), mock.patch.object(
                    socket.socket, call, side_effect=OSError(error, "")):
                self.assertEqual(client.ask(80, "x.example"), reply)


class LookUpTest(SweepTestCase):
    """A resolver that hangs until the event `answer` is set, but for "x" and "slow"."""

    def setUp(self):
        super().setUp()
        self.answer, self.target = threading.Event(), self.listen().getsockname()
        self.patch(resolver(self.target, ask=lambda name: name == b"x" or self.answer.wait(
            0.1 if name == b"slow" else PATIENCE)))

    def stop(self, server):
        self.answer.set()
        super().stop(server)

    def test_sessions_keep_their_places_until_the_resolver_is_back(self):
        for command in ("01", "02"):
            for limit in ("max_sessions", "max_per_client", "max_per_user"):
                self.answer.clear()
                server = self.serve(users=USERS, connect_timeout=0.05, **{limit: 1})

                def serves(server=server):
                    with Client.to(server.server_address) as client:
                        with contextlib.suppress(AssertionError, ConnectionError):
                            return client.log_in().ask(80, "x") == 0

                with self.subTest(limit, command=command), self.within(6):
                    with Client.to(server.server_address) as client:
                        self.assertEqual(client.log_in().ask(80, "hangs", command), 6)
                        self.assertEqual(read_all(client), (b"", "end"))
                    self.assertFalse(serves())
                    self.answer.set()
                    wait_until(serves, "the resolver's answer to make room")

    def test_others_are_served_and_closing_waits(self):
        server = self.serve(connect_timeout=0.5)
        clients = [self.client(server).greet() for _ in range(70)]
        with self.within(6):
            for number, client in enumerate(clients):
                client.say("05 0%d 00 03 05 68 61 6e 67 73 00 50" % (number % 2 + 1))
            self.assertEqual(self.client(server).greet().ask(80, "x"), 0)
            self.assertEqual({client.read_reply()[0] for client in clients}, {6})
        closing = self.thread(server.server_close)
        closing.join(0.1)
        self.assertTrue(closing.is_alive())
        self.stop(server)

    def test_late_answer_is_of_no_use(self):
        for command, interval in itertools.product(("01", "02"), (0.02, PATIENCE)):
            dialed = mock.Mock(return_value=None)
            with mock.patch.object(socks5, "SWEEP_INTERVAL", interval), \
                    self.connecting(dialed), self.ending("refused") as lines:
                client = self.client(self.serve(connect_timeout=0.05)).greet()
                self.assertEqual(client.ask(80, "slow", command), 6)
                client.close()
                self.assertEqual(self.session_line(lines)["reply"], "TTL_EXPIRED")
            self.assertFalse(dialed.called)


# ---- relaying ----------------------------------------------------------------------------

NOT_THIS = hooked(authorize=lambda _, destination: destination.host != "127.0.0.3")
SIDES = ["client", "target"]  # the ends of a relay, as `tunnel` returns them
BULK = pattern(1000003) * 8   # bytes for a busy flow; no buffer's size divides its period
READ, SEND = "recv recv_into", "send sendall"
QUICK = socks5.RESET_AT_CLOSE + socks5.seconds_option("SO_SNDTIMEO", 0.05) * (not socks5.SLICE)


class Sliced:
    """Tests that run a second time as on Windows: each call of a session's sockets times out."""

    def setUp(self):
        super().setUp()
        self.patch(mock.patch.multiple(socks5, SLICE=0.01, RELAY_OPTIONS=socks5.RESET_AT_CLOSE))


class RelayTest(SweepTestCase):
    def setUp(self):
        super().setUp()
        self.patch(mock.patch.object(socks5, "RELAY_OPTIONS", QUICK))

    def test_half_closes(self):
        content = pattern(MEBIBYTE)
        for first in (0, 1):
            with self.subTest(SIDES[first]), self.ending(SIDES[first] + "-closed"):
                ends = self.tunnel()
                ends[first].sendall(b"ab")
                ends[first].send(b"X", socket.MSG_OOB)  # an urgent byte stays in its place
                ends[first].sendall(b"cd")
                ends[first].shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(ends[1 - first]), (b"abXcd", "end"))
                self.send(ends[1 - first], content, close=True)
                self.assertEqual(read_all(ends[first]), (content, "end"))

    def test_resets(self):
        def half_close(ours, other):
            other.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(ours), (b"", "end"))

        def move(source, sink, content=b"half of a file"):
            self.send(source, content)
            self.assertEqual(read_count(sink, len(content)), content)

        server = self.serve()
        for first in (0, 1):
            for name, prepare in [
                    ("at once", lambda ours, other: None), ("after a half-close", half_close),
                    ("after it has sent", move),
                    ("after it has read", lambda ours, other: move(other, ours)),
                    ("after both", lambda ours, other: (move(ours, other), move(other, ours))),
                    ("after much", lambda ours, other: move(ours, other, BULK))]:
                with self.subTest(SIDES[first] + " " + name), self.ending(SIDES[first] + "-reset"):
                    ends = self.tunnel(server)
                    prepare(ends[first], ends[1 - first])
                    reset(ends[first])
                    self.assertEqual(read_all(ends[1 - first]), (b"", "reset"))

    def test_reset_while_the_other_side_takes_nothing(self):
        for side, end in enumerate(("client-reset", "target-reset")):
            with self.subTest(end), self.ending(end), self.within(8):
                server = self.serve()
                ends = self.tunnel(server)
                fill(ends[side])
                reset(ends[side])
                self.assertTrue(server.drain(8))
                self.assertEqual(read_all(ends[1 - side])[1], "reset")

    def test_reset_by_a_client_that_does_not_wait_for_the_reply(self):
        (ours, theirs), has_reset = self.pair(), threading.Event()
        with self.logged() as lines:
            client = self.client(self.serve_hook(lambda: has_reset.wait(PATIENCE) and ours))
            client.say("05 01 00 05 01 00 01 7f 00 00 01 00 50" + b"half of a file".hex())
            client.hear("05 00")
            reset(client)
            has_reset.set()
            self.assertEqual(read_all(theirs)[1], "reset")
            self.assertEqual(self.session_line(lines)["down"], "0")  # not minus the reply

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
        real, looks = socket.socket.getpeername, []

        def getpeername(sock):
            looks.append(threading.Event())
            looks[-1].wait(PATIENCE)
            return real(sock)

        for first in (0, 1):
            with self.subTest(SIDES[first]), self.ending(SIDES[first] + "-closed"):
                ends = self.tunnel()
                with mock.patch.object(socket.socket, "getpeername", getpeername):
                    for count in (1, 2):  # both flows have read an end, and look for a reset
                        ends[first if count == 1 else 1 - first].shutdown(socket.SHUT_WR)
                        wait_until(lambda count=count: len(looks) == count)
                    for end in (ends[1 - first], ends[first]):
                        looks.pop(0).set()
                        self.assertEqual(read_all(end), (b"", "end"))

    def test_both_directions_with_slow_readers(self):
        with self.logged() as lines:
            ends, read = self.tunnel(), []
            up, down = fill(ends[0]), fill(ends[1])
            self.assertLess(max(len(up), len(down)), 64 * MEBIBYTE)  # in the kernel, in no queue
            # while fill() waits, the server's send() takes nothing until its time is up
            for end in ends:
                end.shutdown(socket.SHUT_WR)
            thread = self.thread(lambda: read.append(read_all(ends[1])))
            self.assertTrue(read_all(ends[0]) == (down, "end"))
            thread.join(PATIENCE)
            self.assertTrue(read == [(up, "end")])
            line = self.session_line(lines)
        self.assertEqual((line["up"], line["down"]), (str(len(up)), str(len(down))))

    def test_buffers_grow_and_shrink_again_and_again(self):
        (ours, target), sizes = self.pair(), [0]

        class Recorder(socket.socket):
            def recv_into(self, buffer, *args):
                sizes.append(len(buffer))
                return super().recv_into(buffer, *args)

        recorder = Recorder(fileno=ours.detach())
        client = self.client(self.serve_hook(lambda: recorder)).greet()
        client.ask(80)
        for _ in range(2):
            del sizes[:-1]
            self.send(target, BULK).join(0.1)  # then it has to wait
            self.assertTrue(read_count(client, len(BULK)) == BULK)
            for _ in range(20):
                self.check_one_way(target, client)
            self.assertGreaterEqual(max(sizes), 64 * 1024)
            self.assertLessEqual(max(sizes), MEBIBYTE)
            self.assertLessEqual(max(sizes[0], sizes[-1]), 4096)  # what an idle session costs

    def test_flow_that_fails_ends_the_relay(self):
        server = self.serve()
        lost = OSError(errno.ETIMEDOUT, "")  # the peer has vanished: it answers no probes
        for first in (0, 1):
            for methods, error, end in [
                    (READ, lost, "-lost"), (SEND, lost, "-lost"), (READ, MemoryError(), None),
                    (SEND, ConnectionResetError(errno.ECONNRESET, ""), "-reset")]:
                with self.subTest(SIDES[first], methods=methods, error=error), \
                        self.logged() as lines, self.within(6):
                    ends = self.tunnel(server)
                    sender = first if methods == READ else 1 - first
                    with breaking(methods, ends[first], error):
                        with contextlib.suppress(ConnectionError):  # it may be that quick
                            ends[sender].sendall(b"x")
                        self.assertEqual(read_all(ends[1 - sender])[1], "reset")
                        line = self.session_line(lines)
                    self.assertEqual(line["end"], SIDES[first] + end if end else "error")
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

        def connect(handler, destination):
            target = socks5.Socks5RequestHandler.connect(handler, destination)
            sockets.extend([handler.connection, target])
            return target

        listener = self.listen()
        for passed in {}, {"address": listener.getsockname(), "listener": listener}:
            self.check_relay(*self.tunnel(self.serve(hooked(connect=connect), **passed)))
        for sock in sockets:
            self.assertTrue(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            if not socks5.SLICE:
                wait = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)
                self.assertAlmostEqual(struct.unpack("ll", wait)[1], 50000, delta=10000)  # QUICK
            if hasattr(socket, "TCP_KEEPCNT"):
                idle, interval, count = (sock.getsockopt(socket.IPPROTO_TCP, option) for option in (
                    socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT))
                self.assertLessEqual(idle + interval * count, 120)

    def test_reader_of_any_size_loses_nothing(self):
        content = pattern(7680)
        for size in (1, 1024, 65536):
            with self.subTest(size):
                listener, client = self.listen(), self.client(self.serve(hooked(rbufsize=size)))
                client.sendall(octets("05 01 00 05 01 00 01 7f 00 00 01") + port_of(
                    listener.getsockname()[1]) + content)  # in one segment
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(self.own(listener.accept()[0])), (content, "end"))

    def test_relay_that_is_stopped_never_looks_complete(self):
        seen = []

        def run(end, reader, settings):
            ending = threading.Event()

            def finish(handler):
                ending.set()
                time.sleep(0.05)  # what shows before the sockets are closed?
                socks5.Socks5RequestHandler.finish(handler)

            server = self.serve(hooked(finish=finish), **settings)
            ends = self.tunnel(server) if settings else self.slow_tunnel(server)
            if end == "linger-timeout":
                ends[reader].shutdown(socket.SHUT_WR)
            self.thread(flood, ends[1 - reader])
            for count in itertools.count() if end == "server-closed" else ():
                ends[reader].recv(4096)  # this reader is slow, and not stuck
                if ending.wait(0.02):
                    break
                if count == 5:
                    self.thread(self.stop, server)
            ending.wait(PATIENCE)
            seen.append((end, read_all(ends[reader])[1]))

        rows = [("idle-timeout", 0, {"idle_timeout": 0.1}), ("linger-timeout", 1, {"linger": 0.1}),
                ("idle-timeout", 1, {"idle_timeout": 0.1}), ("linger-timeout", 0, {"linger": 0.1}),
                ("server-closed", 0, {})]
        with self.logged() as lines, self.within(8):
            for thread in [self.thread(run, *row) for row in rows]:
                thread.join(PATIENCE)
            wait_until(lambda: len(lines) == len(rows))
        self.assertEqual(sorted(seen), sorted((fields(line)["end"], "reset") for line in lines))

    @unittest.skipUnless(sys.platform == "linux", "the progress of a slow reader shows on Linux")
    def test_what_keeps_deadlines_away(self):
        server = self.serve(idle_timeout=60, linger=60)
        up, down = self.tunnel(server), self.tunnel(server)
        size = 65536 if socks5.SLICE is None else 2 * MEBIBYTE  # a selector wants much more room
        slow = [self.slow_tunnel(server) for _ in range(2)]
        slow[1][0].shutdown(socket.SHUT_WR)  # this one lingers
        for _, target in slow:
            self.send(target, BULK * 2, close=True)

        def progress():
            for source, sink in (up, down[::-1]):  # in one direction only
                self.check_one_way(source, sink)
            for client, _ in slow:
                read_count(client, size)

        self.check_progress(server, 4, progress)
        for client, _ in slow:
            self.assertTrue(read_all(client) == ((BULK * 2)[3 * size:], "end"))

    def test_what_the_kernel_has_taken_outlives_linger(self):
        with self.ending("linger-timeout") as lines:
            client, target = self.slow_tunnel(self.serve(linger=0.1))
            self.send(target, BULK[:200000], close=True)
            self.assertEqual(self.session_line(lines)["down"], "200000")
            self.assertTrue(read_all(client) == (BULK[:200000], "end"))

    def test_systems_that_need_slices(self):
        with failing(socket.socket, "setsockopt", [OSError(errno.EINVAL, "")]):
            self.assertTrue(socks5.needs_slices())  # 32 bits, with times of 64


# ---- associations ------------------------------------------------------------------------

class PausingLock:
    """A lock that pauses when it is released, so that other threads come first."""

    def __init__(self, real=threading.RLock):
        self.lock = real()

    def __enter__(self):
        self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()
        time.sleep(0.0005)


class AssociationTest(SweepTestCase):
    def associate(self, server, port=0, address="01 00 00 00 00"):
        control = self.client(server).greet()
        control.sendall(octets("05 03 00" + address) + port_of(port))
        code, where = control.read_reply()
        self.assertEqual(code, Reply.SUCCEEDED)
        client = self.datagrams(where[0])
        client.connect(where)
        return control, client

    def frame(self, sock, data, fragment="00"):
        host, port = sock.getsockname()[:2]
        return octets("00 00" + fragment + ("04" if ":" in host else "01")) + socket.inet_pton(
            sock.family, host) + port_of(port) + data

    def named(self, name, data):
        return octets("00 00 00 03") + bytes([len(name)]) + name + port_of(53) + data

    def check(self, client, target, data=b"ping"):
        """Check that `data`, and nothing else, goes from `client` to `target` and back."""
        client.send(self.frame(target, data))
        received, source = target.recvfrom(65536)
        self.assertEqual(received, data)
        target.sendto(data[::-1], source)
        self.assertEqual(client.recv(65536), self.frame(target, data[::-1]))
        return source

    def wait_for_dropped(self, server, count):
        wait_until(lambda: [live["dropped"] for live in self.report(server)[0]] == [str(count)])

    @contextlib.contextmanager
    def names(self, target, gate=None):
        """Let names be those of `target`, after 5 ms and once `gate` is set; list them."""
        asked = []
        self.addCleanup(gate.set if gate else int)
        with resolver(target.getsockname(), ask=lambda name: (
                asked.append(name), time.sleep(0.005), gate and gate.wait(PATIENCE))):
            yield asked

    def test_families_and_sizes(self):
        count = 1 + has_ipv6()
        targets = [self.datagrams(host) for host in ("127.0.0.1", "::1")[:count]]
        for host, reached in [("127.0.0.1", "127.0.0.1"), ("::1", "::1"),
                              ("::", "127.0.0.1")][:2 * count - 1]:
            with self.subTest(host):
                server = self.serve(host=host)
                _, client = self.associate(server)
                self.assertEqual(client.getsockname()[0], reached)
                for target in targets:
                    for size in (0, 1, 1500, 65507 - 22):
                        self.check(client, target, pattern(65536)[:size])

    def test_strangers_change_nothing_and_other_ports_are_counted(self):
        target, stranger, server = self.datagrams(), self.datagrams("127.0.0.2"), self.serve()
        _, client = self.associate(server)
        relay = client.getpeername()
        stranger.sendto(self.frame(target, b"before"), relay)
        self.datagrams().sendto(b"no datagram of SOCKS", relay)
        source = self.check(client, target)
        stranger.sendto(self.frame(target, b"after"), relay)
        self.datagrams().sendto(self.frame(target, b"another port"), relay)
        stranger.sendto(b"unasked", ("127.0.0.1", source[1]))
        self.check(client, target)
        self.assertEqual(select.select([stranger], [], [], 0)[0], [])
        self.wait_for_dropped(server, 2)  # what came from the client's host

    def test_port_that_was_announced(self):
        target = self.datagrams()
        for address, is_heeded in [
                ("01 00 00 00 00", True), ("01 7f 00 00 01", True), ("04" + "00" * 16, True),
                ("01 7f 00 00 02", False), ("04" + "00" * 15 + "01", False), ("03 01 78", False)]:
            with self.subTest(address):
                server, other = self.serve(), self.datagrams()
                _, client = self.associate(server, other.getsockname()[1], address)
                if is_heeded:
                    client.send(self.frame(target, b"another port"))
                    self.wait_for_dropped(server, 1)
                    other.connect(client.getpeername())
                self.check(other if is_heeded else client, target)

    def test_what_is_dropped(self):
        server, target = self.serve(), self.datagrams()
        whole = self.frame(target, b"")
        bad = [whole[:end] for end in range(len(whole))]
        bad += [self.frame(target, b"x", fragment) for fragment in ("01", "7f", "80", "ff")]
        bad += [octets("00 00 00" + rest) for rest in [
            "02 7f 00 00 01 00 35", "03 00 00 35", "03 02 61 00 00 35",
            "01 7f 00 00 01 00 00 ff"]]
        _, client = self.associate(server)
        for datagram in bad:
            client.send(datagram)
        target.sendto(bytes(65507), self.check(client, target))  # no room for a header
        self.check(client, target)
        self.wait_for_dropped(server, len(bad) + 1)

    def test_datagrams_wait_for_the_look_up_of_their_name(self):
        for names, each, is_slow in [(40, 1, False), (1, 30, False), (40, 1, True), (12, 5, True)]:
            gate = threading.Event() if is_slow else None
            target, server, other = self.datagrams(), self.serve(), self.datagrams()
            with mock.patch("threading.RLock", PausingLock):
                _, client = self.associate(server)
            with self.subTest(names, is_slow=is_slow), self.names(target, gate) as asked:
                sent = [(b"n%d" % name, b"%d" % number)
                        for number in range(each) for name in range(names)]
                for name, number in sent:
                    client.send(self.named(name, name + b" " + number))
                    time.sleep(0.0002)
                self.check(client, other)  # others go on
                if is_slow:
                    wait_until(lambda: len(asked) >= socks5.LOOK_UPS)
                    self.assertEqual(len(asked), socks5.LOOK_UPS)
                    gate.set()
                arrived = [tuple(target.recv(100).split()) for _ in sent]
                self.assertEqual(sorted(arrived, key=lambda each: each[0]),
                                 sorted(sent, key=lambda each: each[0]))  # in order by name
                self.assertEqual(sorted(asked), sorted({name for name, _ in sent}))
                self.wait_for_dropped(server, 0)
                count = str(len(sent) + 1)
                wait_until(lambda server=server, count=count: (
                    self.report(server)[0][0]["datagrams_up"] == count))

    def test_oldest_of_too_many_that_wait_are_dropped(self):
        gate, target, server = threading.Event(), self.datagrams(), self.serve()
        with mock.patch.object(socks5, "MOST_WAITING", 5), self.names(target, gate) as asked:
            _, client = self.associate(server)
            for number in range(8):
                client.send(self.named(b"slow", b"%d" % number))
            self.wait_for_dropped(server, 3)
            gate.set()
            self.assertEqual([target.recv(9) for _ in range(5)], [b"3", b"4", b"5", b"6", b"7"])
            self.assertEqual(asked, [b"slow"])

    def test_session_keeps_its_place_until_its_look_ups_are_back(self):
        gate, target, server = threading.Event(), self.datagrams(), self.serve(max_per_client=1)
        with self.names(target, gate) as asked, self.ending("client-closed") as lines:
            control, client = self.associate(server)
            for number in range(3 * socks5.LOOK_UPS):
                client.send(self.named(b"n%d" % number, b""))
            wait_until(lambda: len(asked) == socks5.LOOK_UPS)
            control.close()
            self.session_line(lines)  # the client need not wait
            self.assertFalse(self.is_served(server))
            gate.set()
            wait_until(lambda: self.is_served(server))
        self.assertEqual(len(asked), socks5.LOOK_UPS)  # and no further ones were started

    def test_route_is_found_anew_after_a_while(self):
        judged, places, is_allowed = [], [self.datagrams(), self.datagrams()], [True]
        server = self.serve(hooked(authorize=lambda *args: judged.append(args) or is_allowed[0]))
        (_, client), gate = self.associate(server), threading.Event()

        def reached():
            dropped = self.report(server)[0][0]["dropped"]
            client.send(self.named(b"x", b"ping"))
            wait_until(lambda: select.select(places, [], [], 0)[0]
                       or self.report(server)[0][0]["dropped"] != dropped)
            return [places.index(place) for place in select.select(places, [], [], 0)[0]
                    if place.recv(9)]

        with self.jumping_clock() as jump:
            with self.names(places[0]) as asked:
                self.assertEqual([reached(), reached()], [[0], [0]])
                self.assertEqual((len(asked), len(judged)), (1, 1))
            with self.names(places[1], gate) as asked:
                jump(61)
                self.assertEqual([reached(), reached()], [[0], [0]])  # the old route serves
                wait_until(lambda: len(asked) == 1)
                gate.set()
                wait_until(lambda: reached() == [1])
                is_allowed[0] = False
                self.assertEqual(reached(), [1])
                jump(61)
                wait_until(lambda: not reached())
                self.assertEqual([reached(), reached()], [[], []])  # a refusal is remembered
                self.assertEqual((len(asked), len(judged)), (1, 3))
                is_allowed[0] = True
                jump(61)
                self.assertEqual(reached(), [1])
                self.assertEqual((len(asked), len(judged)), (2, 4))

    def test_addresses_of_a_name(self):
        four, six = self.datagrams(), has_ipv6() and self.datagrams("::1")
        here = four.getsockname()
        rows = [("the next if one fails", four, [NO_ROUTE, here], {})]
        if six:
            rows += [("IPv4 first", four, [six.getsockname(), here], {}),
                     ("IPv6 if there is no other", six, [six.getsockname()], {}),
                     ("IPv6 if IPv4 fails", six, [NO_ROUTE, six.getsockname()], {}),
                     ("IPv6 source", six, [here] * 9 + [six.getsockname()], {"source": "::1"})]
        for name, target, addresses, settings in rows:
            server = self.serve(**settings)
            _, client = self.associate(server)
            with self.subTest(name):
                with resolver(*[NO_ROUTE] * 4, here):  # only four are tried, and none remembered
                    client.send(self.named(b"x", b"lost"))
                    self.wait_for_dropped(server, 1)
                for _ in range(3):  # the first of them has to be looked up
                    with resolver(*addresses):
                        client.send(self.named(b"x", b"ping"))
                        data, source = target.recvfrom(100)
                    self.assertEqual(data, b"ping")
                    target.sendto(b"pong", source)
                    self.assertEqual(client.recv(100), self.frame(target, b"pong"))
                self.wait_for_dropped(server, 1)

    def test_datagram_that_is_too_much_goes_to_no_other_address(self):
        target, server, asked = self.datagrams(), self.serve(), []
        _, client = self.associate(server)
        errors = [None, BlockingIOError(errno.EAGAIN, ""), None, OSError(errno.EMSGSIZE, ""), None]
        with failing(socket.socket, "sendto", errors), resolver(
                target.getsockname(), self.datagrams().getsockname(), ask=asked.append):
            for number, is_lost in enumerate(map(bool, errors[:]), 1):
                client.send(self.named(b"x", b"%d" % number))
                if is_lost:
                    self.wait_for_dropped(server, number // 2)
                else:
                    self.assertEqual(target.recv(100), b"%d" % number)
        self.assertEqual(len(asked), 1)

    def test_rules_for_each_datagram(self):
        good, bad = self.datagrams(), self.datagrams()
        rule = "127.0.0.1:%d" % bad.getsockname()[1]
        with self.logged() as lines:
            control, client = self.associate(self.serve(NOT_THIS, rules=["deny " + rule]))
            client.send(self.frame(bad, b"x"))
            client.send(octets("00 00 00 01 7f 00 00 03 00 35"))
            self.check(client, good)
            self.assertEqual(select.select([bad], [], [], 0)[0], [])
            control.close()
            line = self.session_line(lines)
        self.assertEqual((line["dropped"], line["rule"]), ("2", "deny:" + rule))

    def test_ends(self):
        for end, leave in [("client-closed", lambda server, control: control.close()),
                           ("client-closed", lambda _, control: control.shutdown(socket.SHUT_WR)),
                           ("client-reset", lambda server, control: reset(control)),
                           ("server-closed", lambda server, control: self.stop(server)),
                           ("udp-timeout", lambda server, control: None),
                           ("client-lost", lambda _, control: (
                               self.patch(breaking(READ, control, OSError(errno.ETIMEDOUT, ""))),
                               flood(control)))]:
            for counts in [(0, 0, 0, 0), (6, 4, 2, 1)]:
                with self.subTest(end, counts=counts), self.within(6), self.ending(end) as lines:
                    server = self.serve(udp_timeout=0.05 if end == "udp-timeout" else 60)
                    target = self.datagrams()
                    control, client = self.associate(server)
                    control.sendall(b"what nobody has to say here")
                    if any(counts):
                        self.check(client, target)
                        client.send(self.frame(target, b"up"))
                        target.recv(9)
                    leave(server, control)
                    if end in ("server-closed", "udp-timeout"):
                        self.assertEqual(read_all(control), (b"", "end"))
                self.assertIn(
                    " command=UDP_ASSOCIATE destination=0.0.0.0:0 reached=- reply=SUCCEEDED rule=- "
                    "up=%d down=%d datagrams_up=%d datagrams_down=%d dropped=0 " % counts, lines[0])

    def test_datagrams_of_either_direction_keep_it_open(self):
        server = self.serve(udp_timeout=60, idle_timeout=0.1, handshake_timeout=0.1)
        target, other = self.datagrams(), self.datagrams()
        (_, sender), (_, receiver) = self.associate(server), self.associate(server)
        source = self.check(receiver, other)

        def progress():
            sender.send(self.frame(target, b"up"))
            self.assertEqual(target.recv(100), b"up")
            other.sendto(b"down", source)
            self.assertEqual(receiver.recv(100), self.frame(other, b"down"))

        self.check_progress(server, 2, progress)

    def test_ports_and_address(self):
        port = self.datagrams().getsockname()[1]
        with self.datagrams() as free:
            ports = [port, free.getsockname()[1]]
        server = self.serve(udp_ports=ports, udp_advertise="127.0.0.1")
        _, client = self.associate(server)
        self.assertEqual(client.getpeername()[1], ports[1])
        for settings, reply in [
                ({"udp_ports": ports}, "05 01" + REFUSED),
                ({"source": "192.0.2.1"}, "05 03" + REFUSED),
                ({"udp_advertise": "2001:db8::1"},
                 "05 00 00 04 20 01 0d b8 00 00 00 00 00 00 00 00 00 00 00 01 ?? ??")]:
            with self.subTest(settings):
                client = self.client(self.serve(**settings)).greet()
                client.say("05 03 00 01 00 00 00 00 00 00")
                client.hear(reply)

    @LINUX_ONLY
    def test_datagrams_come_from_the_source(self):
        target, server = self.datagrams(), self.serve(source="127.0.0.2")
        _, client = self.associate(server)
        client.send(octets("00 00 00 04" + "00" * 15 + "01 00 09"))  # of the other family
        self.assertEqual(self.check(client, target)[0], "127.0.0.2")
        self.wait_for_dropped(server, 1)

    def test_hook_that_raises(self):
        with self.logged() as lines:
            server = self.serve(hooked(authorize=mock.Mock(side_effect=KeyError)))
            control, client = self.associate(server)
            client.send(octets("00 00 00 03 01 78 00 35"))  # in a look-up
            self.wait_for_dropped(server, 1)
            client.send(octets("00 00 00 01 7f 00 00 01 00 35"))
            self.assertEqual(read_all(control), (b"", "reset"))
            self.assertEqual(self.session_line(lines)["end"], "error")
            self.stop(server)
            self.assertEqual(sum("error=KeyError" in line for line in lines), 2)

    def test_no_thread_for_a_look_up(self):
        server, target = self.serve(), self.datagrams()
        _, client = self.associate(server)
        self.check(client, target)  # the association has its own threads by now
        with resolver(target.getsockname()):
            with mock.patch("threading.Thread.start", side_effect=RuntimeError("limit")):
                for count in range(1, 2 * socks5.LOOK_UPS):
                    client.send(self.named(b"x", b"ping"))
                    self.wait_for_dropped(server, count)
            client.send(self.named(b"x", b"pong"))  # none of them takes up a place
            self.assertEqual(target.recv(100), b"pong")

    @unittest.skipUnless(has_ipv6(), "no IPv6 on this host")
    def test_ipv6_destination_without_ipv6(self):
        server, target = self.serve(), self.datagrams()
        errors = [OSError(errno.EAFNOSUPPORT, "")] * 9
        with resolver(("::1", 53, 0, 0)), failing(
                socket.socket, "__init__", errors,
                lambda sock, family=-1, *args: family == socket.AF_INET6):
            _, client = self.associate(server)
            for count in (1, 2):
                client.send(self.named(b"x", b""))
                self.wait_for_dropped(server, count)
            self.check(client, target)

    def test_oldest_hosts_and_routes_are_forgotten(self):
        targets = [self.datagrams("127.0.0.%d" % number) for number in range(1, 6)]
        with mock.patch.object(socks5, "MOST_KNOWN", 3), self.names(targets[0]) as asked:
            _, client = self.associate(self.serve())
            for _ in range(2):  # the second time, four routes are known since
                client.send(self.named(b"x", b"x"))
                targets[0].recv(100)
                for target in targets[1:4]:
                    source = self.check(client, target)
            self.assertEqual(asked, [b"x", b"x"])
            client.send(self.frame(targets[1], b"young again"))
            targets[1].recv(100)
            targets[2].sendto(b"young again", source)
            client.recv(100)
            self.check(client, targets[4])  # so the fourth one is forgotten
            for target in targets:
                target.sendto(b"late", source)
            for target in (targets[1], targets[2], targets[4]):
                self.assertEqual(client.recv(100), self.frame(target, b"late"))
            self.check(client, targets[0])  # and nothing else has come

    def test_burst(self):
        gate, target, other = threading.Event(), self.datagrams(), self.datagrams()
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        if target.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < 1 << 22:
            self.skipTest("this system grants no buffer for bursts")
        server = self.serve(hooked(authorize=lambda _, destination: (
            destination.port == target.getsockname()[1] or gate.wait(PATIENCE))))
        _, client = self.associate(server)
        client.send(self.frame(other, b""))  # which holds the relay up
        for number in range(1000):
            client.send(self.frame(target, b"%1400d" % number))
        gate.set()
        self.assertEqual([int(target.recv(2000)) for _ in range(1000)], list(range(1000)))

    def test_flood(self):
        server, target = self.serve(), self.datagrams()
        (control, client), tunnel, over = self.associate(server), self.tunnel(server), []
        frame = self.frame(target, bytes(100))

        def flood_association():
            while not over:
                with contextlib.suppress(OSError):  # the system's buffer may be full
                    client.send(frame)

        self.thread(flood_association)
        self.addCleanup(over.append, True)
        target.recv(200)
        with self.within(6):
            for _ in range(20):
                self.check_relay(*tunnel)
            with self.ending("client-closed"):
                control.close()


# ---- BIND --------------------------------------------------------------------------------

ANY_IPV4, LOOPBACK_IPV4 = "01" + " 00" * 6, "01 7f 00 00 01 00 00"
ANY_IPV6, LOOPBACK_IPV6 = "04" + " 00" * 18, "04" + " 00" * 15 + "01 00 00"


class BindTest(SweepTestCase):
    def setUp(self):
        super().setUp()
        self.patch(mock.patch.object(socks5, "BIND_INTERVAL", 0.05))

    def peer(self, address, host="127.0.0.1"):
        sock = self.own(socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET))
        sock.bind((host, 0))
        sock.connect(address)
        return sock

    def check_bound(self, client, where, peer):
        """Check the second reply, and that a relay follows as CONNECT has it."""
        self.assertEqual(client.read_reply(), (Reply.SUCCEEDED, peer.getsockname()[:2]))
        with self.assertRaises(ConnectionRefusedError):
            self.peer(where, peer.getsockname()[0])
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(read_all(peer), (b"question", "end"))
        peer.sendall(b"answer")
        peer.close()
        self.assertEqual(read_all(client), (b"answer", "end"))

    def test_peers(self):
        rows = [  # the client's host, whom it names, where it waits; who is rejected, who is not
            ("127.0.0.1", LOOPBACK_IPV4, "127.0.0.1", "127.0.0.2", "127.0.0.1"),
            ("127.0.0.1", "03 01 78 00 15", "127.0.0.1", "127.0.0.3", "127.0.0.2"),  # a name
            ("127.0.0.1", ANY_IPV4, "127.0.0.1", "127.0.0.4", "127.0.0.3"),  # what the rules allow
            ("127.0.0.1", ANY_IPV6, "127.0.0.1", "127.0.0.4", "127.0.0.3"),
            ("127.0.0.2", LOOPBACK_IPV4, "127.0.0.1", "127.0.0.2", "127.0.0.1")]
        if has_ipv6():
            rows += [
                ("::1", LOOPBACK_IPV6, "::1", None, "::1"), ("::1", ANY_IPV6, "::1", None, "::1"),
                ("127.0.0.1", LOOPBACK_IPV6, "::1", None, "::1"),
                ("::1", LOOPBACK_IPV4, "127.0.0.1", "127.0.0.2", "127.0.0.1")]
        for host, address, expected, wrong, right in rows:
            with self.subTest(host, address=address), self.logged() as lines, \
                    resolver(("127.0.0.1", 0), ("127.0.0.2", 0)):
                server = self.serve(host=host, rules=["deny 127.0.0.4:1-65535"])  # any port but 0
                client = self.client(server).greet()
                where = client.bind_for(address)
                self.assertEqual(where[0], expected)
                if wrong:
                    self.assertEqual(read_all(self.peer(where, wrong))[0], b"")
                peer = self.peer(where, right)
                reached = ("[%s]:%d" if ":" in right else "%s:%d") % peer.getsockname()[:2]
                self.check_bound(client, where, peer)
                line = self.session_line(lines)
                self.assertEqual(
                    [line[each] for each in ("command", "reached", "reply", "up", "down", "end")],
                    ["BIND", reached, "SUCCEEDED", "8", "6", "client-closed"])

    def test_refused(self):
        server = self.serve(NOT_THIS, rules=["deny 127.0.0.1", "deny *:25"])
        unknown = mock.Mock(side_effect=socket.gaierror(socket.EAI_NONAME, "unknown"))
        for host, port, replies in [
                ("127.0.0.1", 80, [Reply.NOT_ALLOWED]), ("127.0.0.3", 80, [Reply.NOT_ALLOWED]),
                ("x", 25, [Reply.NOT_ALLOWED]), ("x", 80, [Reply.HOST_UNREACHABLE]),
                (*NO_ROUTE, list(Reply)[1:]), ("224.0.0.1", 80, list(Reply)[1:])]:
            with self.subTest(host, port=port), self.within(6), resolver(ask=unknown):
                client = self.client(server).greet()
                self.assertIn(client.ask(port, host, "02"), replies)
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(client), (b"", "end"))

    def test_the_deadlines_of_others_are_not_its(self):
        server = self.serve(connect_timeout=0.05, handshake_timeout=0.05, idle_timeout=0.05)
        client = self.client(server).greet()
        where = client.bind_for()
        for _ in range(2):
            self.assertEqual(read_all(self.client(server)), (b"", "end"))  # which came later
        self.peer(where)
        self.assertEqual(client.read_reply()[0], Reply.SUCCEEDED)

    def test_waits_that_end(self):
        for end, early, leave in [
                ("client-left", 0, socket.socket.close), ("client-left", 0, reset),
                ("client-left", 0, lambda client: client.shutdown(socket.SHUT_WR)),
                ("refused", 1, socket.socket.close),  # what it has sent hides its end
                ("refused", 0, lambda client: client.hear("05 06" + REFUSED)),  # and stays
                ("server-closed", 0, lambda client: self.stop(server))]:  # noqa: B023
            with self.subTest(end, leave=leave), self.within(6), self.logged() as lines, \
                    mock.patch.object(socks5, "REFUSAL_TIMEOUT", 0.05):
                server = self.serve(bind_timeout=0.05 if end == "refused" else 60)
                client = self.client(server).greet()
                where = client.bind_for(LOOPBACK_IPV4)
                client.sendall(bytes(early))
                leave(client)
                self.assertEqual(self.session_line(lines)["end"], end)
                with self.assertRaises(ConnectionRefusedError):
                    self.peer(where, "127.0.0.2")  # not from `where` itself

    def test_peer_that_comes_after_the_deadline(self):
        with mock.patch.multiple(socks5, BIND_INTERVAL=PATIENCE, REFUSAL_TIMEOUT=2 * PATIENCE):
            client = self.client(self.serve(bind_timeout=0.05)).greet()
            where = client.bind_for(LOOPBACK_IPV4)
            client.hear("05 06" + REFUSED)
            self.assertEqual(read_all(self.peer(where)), (b"", "end"))

    def test_commands_that_are_served(self):
        for commands, replies in [("connect", "77"), ("connect,udp", "70"), ("bind", "07")]:
            server = self.serve(commands=commands.split(","))
            for command, reply in zip(("02", "03"), replies):
                with self.subTest(commands, command=command):
                    client = self.client(server).greet()
                    self.assertEqual(client.ask(80, command=command), int(reply))

    def test_early_data(self):
        def some(count):
            return lambda client: client.sendall(pattern(count)) or pattern(count)

        server = self.serve()
        for first, send in [(0, some(0)), (0, some(9)), (1500, some(9000)), (0, fill)]:
            with self.subTest(first, send=send):
                client = self.client(server).greet()
                where = client.bind_for(LOOPBACK_IPV4 + pattern(first).hex())
                early = pattern(first) + send(client)
                self.assertLess(len(early), 64 * MEBIBYTE)
                before = time.process_time()
                time.sleep(0.04)  # whoever looks for more must not do it all the time
                self.assertLess(time.process_time() - before, 0.03)
                peer = self.peer(where)
                self.assertEqual(client.read_reply()[0], Reply.SUCCEEDED)
                self.send(client, b"end")
                self.assertTrue(read_count(peer, len(early) + 3) == early + b"end")

    def test_peers_that_are_gone(self):
        gone, real, server = threading.Event(), socket.socket.accept, self.serve()
        aborted = [ConnectionAbortedError(errno.ECONNABORTED, "")]

        def accept(sock):
            if sock.getsockname() == server.server_address:
                return real(sock)
            if aborted:
                raise aborted.pop()
            accepted = real(sock)
            gone.wait(PATIENCE)
            return accepted

        client = self.client(server).greet()
        with self.ending("target-reset"), mock.patch.object(socket.socket, "accept", accept):
            peer = self.peer(client.bind_for())
            name = peer.getsockname()
            reset(peer)
            gone.set()
            self.assertEqual(client.read_reply(), (Reply.SUCCEEDED, name))
            self.assertEqual(read_all(client), (b"", "reset"))


SlicedRelayTest, SlicedAssociationTest, SlicedBindTest = (
    type("Sliced" + test.__name__, (Sliced, test), {})
    for test in (RelayTest, AssociationTest, BindTest))


# ---- handler -----------------------------------------------------------------------------

ASK, OPEN = "05 01 00 01 7f 00 00 01 PP PP", "05 00 00 01 7f 00 00 01 ?? ??"
TO = "05 01 00 05 01 00 01 7f 00 00 01"  # what a client says to get to a port of this host
NOT_HTTP = (b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n"
            b"This is a SOCKS5 proxy, not an HTTP proxy.\r\n"
            b"In your program, set it as SOCKS host (version 5), not as HTTP proxy.\r\n").hex()

CONVERSATIONS = [  # what it is, users, what the client sends, what the server answers
    ("connect, IPv4", None, "05 01 00" + ASK, "05 00" + OPEN),
    ("connect, a name", None, "05 01 00 05 01 00 03 09 6c 6f 63 61 6c 68 6f 73 74 PP PP 21",
     "05 00" + OPEN + "21"),
    ("a literal as a name; the reserved byte is ignored", None,
     "05 01 00 05 01 ff 03 09 31 32 37 2e 30 2e 30 2e 31 PP PP 21", "05 00" + OPEN + "21"),
    ("a method of several", None, "05 03 01 02 00" + ASK, "05 00" + OPEN),
    ("no method", None, "05 00", "05 ff"),
    ("no acceptable method", None, "05 02 01 02", "05 ff"),
    ("login", USERS, LOGIN + ASK + "21", "05 02 01 00" + OPEN + "21"),
    ("login, not ASCII", USERS, "05 01 02 01 04 62 c3 bc 62 03 e2 82 ac" + ASK,
     "05 02 01 00" + OPEN),
    ("login, 255 bytes", USERS, "05 01 02 01 ff" + "78" * 255 + "ff" + "79" * 255 + ASK,
     "05 02 01 00" + OPEN),
    ("login is not optional", USERS, "05 01 00" + ASK, "05 ff"),
    ("login among several methods", USERS, "05 02 00" + LOGIN[6:] + ASK, "05 02 01 00" + OPEN),
    ("wrong password", USERS, "05 01 02 01 05 61 6c 69 63 65 06 73 65 63 72 65 54", "05 02 01 01"),
    ("another user's password", USERS, "05 01 02 01 04 62 c3 bc 62 06 73 65 63 72 65 74" + ASK,
     "05 02 01 01"),
    ("unknown user, no password", USERS, "05 01 02 01 03 62 6f 62 00", "05 02 01 01"),
    ("login of another version", USERS, "05 01 02 05" + LOGIN[11:], "05 02"),
    ("command 0", None, "05 01 00 05 00 00 01 7f 00 00 01 PP PP", "05 00 05 07" + REFUSED),
    ("command 255, a name", None, "05 01 00 05 ff 00 03 01 78 00 50", "05 00 05 07" + REFUSED),
    ("address type 0", None, "05 01 00 05 01 00 00 7f 00 00 01 PP PP", "05 00 05 08" + REFUSED),
    ("an empty name", None, "05 01 00 05 01 00 03 00 00 50", "05 00 05 04" + REFUSED),
    ("SOCKS4", None, "04 01 00 50 7f 00 00 01 00", "00 5b 00 00 00 00 00 00"),
    ("HTTP", None, "47 45 54 20 2f 20 48 54 54 50 2f 31 2e 30 0d 0a 0d 0a", NOT_HTTP),
    ("TLS", None, "16 03 01 02 00 01 00", ""),
    ("a request of another version", None, "05 01 00 04 01 00 01", "05 00"),
]


class ConversationTest(TestCase):
    def test_whole_in_pieces_and_cut(self):
        port, servers = port_of(self.echo()).hex(), {0: self.serve(), 1: self.serve(users=USERS)}
        for name, users, sent, answer in CONVERSATIONS:
            whole = sent.replace(" ", "").replace("PPPP", port)
            answer, server = answer.replace(" ", "").replace("??", ".."), servers[bool(users)]
            step = 2 if len(whole) < 200 else 80  # digits
            places = range(0, len(whole), step)
            for pieces in [whole], [whole[start:start + step] for start in places]:
                with self.subTest(name, pieces=len(pieces)):
                    self.assertRegex(self.talk(server, *pieces).hex(), "^%s$" % answer)
            for end in places:
                with self.subTest(name, end=end):
                    said = self.talk(server, whole[:end]).hex()
                    self.assertRegex(said, "^%s$" % answer[:len(said)])


class HandlerTest(TestCase):
    def test_bound_address_is_the_socket_s(self):
        server = self.serve(host="::" if has_ipv6() else "127.0.0.1")
        for host, frame in [("127.0.0.1", "01 7f 00 00 01"),
                            ("::1", "04" + "00" * 15 + "01")][:1 + has_ipv6()]:
            with self.subTest(host), self.logged() as lines:
                listener = self.listen(host)
                client = self.own(Client.to((host, server.server_address[1]))).greet()
                client.sendall(octets("05 01 00" + frame) + port_of(listener.getsockname()[1]))
                target = self.own(listener.accept()[0])
                self.assertEqual(client.read_reply(), (Reply.SUCCEEDED, target.getpeername()[:2]))
                name = str(Address(*client.getsockname()[:2]))
                client.close()
                target.close()
                self.assertEqual(self.session_line(lines)["client"], name)

    def test_replies_to_what_a_hook_raises(self):
        for error, reply, shown in [
                *[(OSError(getattr(errno, name), "it is\nso"), reply, "it_is_so")
                  for name, reply in [
                      ("EACCES", 2), ("EPERM", 2), ("ENETUNREACH", 3), ("EAFNOSUPPORT", 3),
                      ("EADDRNOTAVAIL", 3), ("EHOSTUNREACH", 4), ("ECONNREFUSED", 5),
                      ("ETIMEDOUT", 6), ("EMFILE", 1)]],
                (socket.gaierror(-2, "unknown"), 4, "unknown"), (EOFError(), 1, "-"),
                (socket.gaierror(errno.ECONNREFUSED, "another series"), 4, "another_series"),
                (OSError("Connection refused"), 1, "Connection_refused"),
                (socket.timeout("timed out"), 6, "timed_out"), (MemoryError(), 1, "-"),
                (socks5.RequestError(Reply.NOT_ALLOWED), 2, "-"),
                (socks5.ProtocolError("client-left"), 1, "-"),
                (ZeroDivisionError("hunter2"), 1, "-")]:
            with self.subTest(error=error), self.logged() as lines:
                server = self.serve_hook(mock.Mock(side_effect=error))
                self.assertEqual(self.talk(server, TO + "00 50"),
                                 octets("05 00 05 %02x" % reply + REFUSED))
                self.stop(server)
                foreseen = isinstance(error, (OSError, socks5.RequestError))
                end = "refused" if foreseen else "error"
                self.assertRegex(lines.pop(0), " reply=%s .* error=%s end=%s$" % (
                    Reply(reply).name, shown, end))
                self.assertEqual([fields(line)["error"] for line in lines],
                                 [] if foreseen else [type(error).__name__])
                self.assertNotIn("hunter2", "".join(lines))

    def test_each_login_is_compared_once_and_in_constant_time(self):
        server, calls = self.serve(users=USERS), []
        with mock.patch("hmac.compare_digest", lambda a, b: calls.append(a) or a == b):
            for login in [("alice", "secret", "00"), ("alice", "x", "01"), ("bob", "x", "01"),
                          ("bob", "", "01"), ("Alice", "secret", "01")]:
                self.client(server).log_in(*login)
        self.assertEqual(len(calls), 5)

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
            for frame, answer in [("05 01 00 05 04 00 01 7f 00 00 01 00 50",
                                   "05 00 05 07" + REFUSED), ("47", NOT_HTTP)]:
                client = self.client(self.serve())
                client.sendall(octets(frame) + bytes(100000))
                self.assertEqual(read_all(client), (octets(answer), "end"))
                for _ in range(3):  # the server has not closed: that would have been a reset
                    client.sendall(bytes(1000))

    def test_refused_client_that_stays_is_closed(self):
        for frame, answer in [("05 01 02", "05 ff"), ("04", "00 5b" + "00" * 6),
                              ("05 01 00 05 04 00 01 7f 00 00 01 00 50", "05 00 05 07" + REFUSED)]:
            with self.subTest(answer), self.within(6), self.logged() as lines, \
                    mock.patch.multiple(socks5, REFUSAL_TIMEOUT=0.05, SWEEP_INTERVAL=0.02):
                client = self.client(self.serve(handshake_timeout=PATIENCE))
                client.say(frame)
                self.assertEqual(read_all(client), (octets(answer), "end"))
                self.assertGreaterEqual(float(self.session_line(lines)["seconds"]), 0.05)

    def test_hooks(self):
        class Handler(socks5.Socks5RequestHandler):
            def select_method(self, offered):
                calls.append(offered)
                return 2 if 2 in offered else 0  # a login is optional here

            def authenticate(self, username, password):
                calls.append((username, password))
                return True

            def authorize(self, destination):
                calls.append((self.user, self.client_address[0], destination))
                return destination.port != 22

            def do_BIND(self, destination):
                raise socks5.RequestError(Reply.NETWORK_UNREACHABLE)

            def log_message(self, level, event, fields):
                calls.append((event, fields["end"]))

        closed = ("session", "refused")
        for said, heard, expected in [
                ("05 01 02 01 01 61 01 62 05 01 00 01 7f 00 00 01 00 16", "05 02 01 00 05 02",
                 [b"\2", (b"a", b"b"), ("a", "127.0.0.1", ("127.0.0.1", 22)), closed]),
                ("05 01 00 05 02 00 01 7f 00 00 01 00 50", "05 00 05 03",
                 [b"\0", ("", "127.0.0.1", ("127.0.0.1", 80)), closed])]:
            calls, client = [], self.client(self.serve(Handler, users=USERS))
            client.say(said)
            client.hear(heard + REFUSED)
            client.close()
            wait_until(lambda calls=calls: closed in calls)
            self.assertEqual(calls, expected)


# ---- log ---------------------------------------------------------------------------------

PROXIED = {"proxy_from": ["127.0.0.1"]}
SIGNATURE = "0d 0a 0d 0a 00 0d 0a 51 55 49 54 0a"
LOCAL = SIGNATURE + "20 00 00 00"
UNKNOWN = b"PROXY UNKNOWN".hex()  # without the end of the line
HEALTH_CHECKS = [UNKNOWN + "0d 0a", LOCAL]


def header_for(host):
    """Return the header of a balancer for a client at this address, in hex."""
    return ("PROXY TCP%d %s ::1 40400 1080\r\n" % (6 if ":" in host else 4, host)).encode().hex()


class LogTest(SweepTestCase):
    def test_why_a_session_ended(self):
        refused = TO + port_of(self.dead()[1]).hex()
        for sent, reply, error, end in [
                ("05", "-", "-", "client-left"), ("05 01 00 05", "-", "-", "client-left"),
                *[("%02x" % first, "-", "http", "not-socks5") for first in b"GPCHODT"],
                ("04", "-", "socks4", "not-socks5"), ("16", "-", "tls", "not-socks5"),
                ("00", "-", "0x00", "not-socks5"), ("05 01 00 04 01", "-", "0x04", "not-socks5"),
                ("05 01 02", "-", "-", "no-acceptable-method"),
                ("05 01 00 05 01 00 02", "ADDRESS_TYPE_NOT_SUPPORTED", "-", "refused"),
                (refused, "CONNECTION_REFUSED", "Connection_refused", "refused"),
                ("05 01 00 05 04 00 01" + "00" * 6, "COMMAND_NOT_SUPPORTED", "-", "refused")]:
            with self.subTest(sent=sent), self.logged() as lines:
                self.talk(self.serve(), sent)
                line = self.session_line(lines)
                self.assertEqual((line["reply"], line["error"], line["end"]), (reply, error, end))

    def test_probes_are_logged_at_debug_and_counted(self):
        named = header_for("192.0.2.1")
        for settings, said, is_probe in [
                ({}, "", True), ({}, "05", False), (PROXIED, "", True), (PROXIED, named, True),
                (PROXIED, named + "05", False), (PROXIED, HEALTH_CHECKS[0], True),
                (PROXIED, HEALTH_CHECKS[1] + "05 01 02", True)]:
            for level in "INFO", "DEBUG":
                with self.subTest(settings=settings, said=said), self.logged(level) as lines:
                    server = self.serve(users=USERS, **settings)
                    client = self.client(server)
                    client.say(said)
                    if level == "DEBUG" and not said:
                        reset(client)
                    client.close()
                    wait_until(lambda server=server: (
                        self.report(server)[1].get("client-left") == "1"))
                    self.assertEqual(len([line for line in lines if line.startswith("session ")]),
                                     int(level == "DEBUG" or not is_probe))

    def test_session_line_and_verbose_log(self):
        listener, dead, steps = self.listen(), self.dead(), []
        port, user = listener.getsockname()[1], "al ice"

        class Handler(socks5.Socks5RequestHandler):
            def log_message(self, level, event, fields):
                steps.append((level, event))
                super().log_message(level, event, fields)

        for level in "INFO", "DEBUG":
            steps.clear()
            with self.logged(level) as lines, resolver(
                    ("127.0.0.5", port), dead, ("127.0.0.1", port)):
                server = self.serve(Handler, users={user: "hunter2"}, **PROXIED,
                                    rules=["deny 127.0.0.5", "allow 127.0.0.0/8"])
                client = self.client(server)
                client.say(header_for("192.0.2.1"))
                client.log_in(user, "hunter2")
                self.assertEqual(client.ask(port, "x.example"), Reply.SUCCEEDED)
                target = self.own(listener.accept()[0])
                bound = "127.0.0.1:%d" % target.getpeername()[1]
                self.check_relay(client, target)
                self.check_one_way(target, client)
                target.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(client), (b"", "end"))
                client.close()
                self.stop(server)
            self.assertRegex(lines.pop(), (
                r"^session client=192\.0\.2\.1:40400 user=al\\x20ice command=CONNECT "
                r"destination=x.example:%d reached=127\.0\.0\.1:%d reply=SUCCEEDED rule=- "
                r"up=4 down=8 seconds=\d+\.\d{3} error=- end=target-closed$") % (port, port))
            self.assertEqual((steps.pop(), len(lines)), ((logging.INFO, "session"), len(steps)))
            self.assertEqual({step[0] for step in steps}, {logging.DEBUG} if lines else set())
        start = "client=192.0.2.1:40400 "
        self.assertTrue(all(start in line and "hunter2" not in line for line in lines[1:]))
        shown = [line.replace(start, "") for line in lines]
        self.assertRegex(shown.pop(0), r"^balancer client=127\.0\.0\.1:\d+ header=192.0.2.1:40400$")
        self.assertRegex(shown.pop(), r"^closed first=target-closed seconds=\d+\.\d+$")
        self.assertEqual(shown, [
            "methods offered=02 chosen=02", "login user=al\\x20ice",
            "request command=CONNECT destination=x.example:%d" % port,
            "resolved name=x.example address=127.0.0.5 denied=deny:127.0.0.5",
            "resolved name=x.example address=127.0.0.1 denied=-",
            "resolved name=x.example address=127.0.0.1 denied=-",
            "attempt failed address=127.0.0.1:%d error=Connection_refused" % dead[1],
            "connected reached=127.0.0.1:%d bound=%s" % (port, bound)])

    def test_nothing_from_the_network_can_forge_a_line(self):
        name = b"x\r\nsession \x1b[31m client=6.6.6.6:1 \xe2\x80\xae\xff\\\0 end=fine"
        with self.ending("refused") as lines:
            client = self.client(self.serve()).greet()
            self.assertEqual(client.ask(80, name), Reply.HOST_UNREACHABLE)
            client.close()
        self.assertRegex(lines[0], r"^[!-~ ]*$")
        self.assertEqual(len(lines[0].split(" ")), 13)
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
    def test_handshake_has_one_deadline(self):
        header = octets(header_for("192.0.2.1"))
        for settings, early, drops in [
                ({}, b"", b""), ({}, b"", octets("05 ff") + bytes(250)), (PROXIED, b"", header),
                (PROXIED, octets(LOCAL)[:9], b""), (PROXIED, header, octets("05 ff") + bytes(250))]:
            with self.subTest(early + drops[:2]), self.within(6), self.logged() as lines:
                client = self.client(self.serve(handshake_timeout=0.15, **settings))
                client.sendall(early)
                rest = list(drops)
                said, until = client.settimeout(0.01), time.monotonic() + PATIENCE
                with contextlib.suppress(ConnectionError):
                    while said is None and time.monotonic() < until:
                        client.sendall(bytes([rest.pop(0)] if rest else []))
                        with contextlib.suppress(socket.timeout):  # on to the next drop
                            said = client.recv(1)
                line = self.session_line(lines)
                self.assertEqual((line["end"], bool(rest)), ("handshake-timeout", bool(drops)))
                self.assertGreaterEqual(float(line["seconds"]), 0.15)

    def test_hook_that_comes_back_too_late_changes_nothing(self):
        (ours, theirs), early, listener = self.pair(), {"handshake_timeout": 0.05}, self.listen()
        for hook, late in itertools.product(("authorize", "connect"), (
                mock.Mock(side_effect=ConnectionRefusedError), mock.Mock(return_value=ours),
                mock.Mock(side_effect=ZeroDivisionError))):
            may_go_on = threading.Event()
            with self.subTest(hook, late=late), self.within(6), self.logged() as lines:
                server = self.serve(hooked(**{hook: lambda *_, late=late, may_go_on=may_go_on: (
                    may_go_on.wait(PATIENCE) and late())}), connect_timeout=0.1, **early)
                client = self.client(server).greet()
                self.assertEqual(client.ask(listener.getsockname()[1]), Reply.TTL_EXPIRED)
                self.assertEqual(read_all(client), (b"", "end"))
                may_go_on.set()
                client.close()
                self.stop(server)
                line, = [fields(line) for line in lines if line.startswith("session client")]
                self.assertEqual((line["reply"], line["error"], line["end"]),
                                 ("TTL_EXPIRED", "timed_out", "refused"))
        self.assertEqual(read_all(theirs)[0], b"")
        listener.setblocking(False)
        with self.assertRaises(BlockingIOError):  # no dial came after the answer
            listener.accept()

    def test_failed_login_costs_a_pause(self):
        self.assertEqual(LOGIN_PAUSE, 1.0)
        for pause in (0.2, 2 * PATIENCE):
            with self.subTest(pause), self.logged("DEBUG") as lines, self.within(6), \
                    mock.patch.object(socks5, "REFUSAL_TIMEOUT", 0.1):
                server = self.serve(hooked(login_pause=pause), users=USERS, handshake_timeout=0.1)
                guess = self.client(server)
                guess.say("05 01 02 01 05 61 6c 69 63 65 07 68 75 6e 74 65 72 32")
                guess.hear("05 02")
                wait_until(lambda lines=lines: len(lines) > 1)  # at once
                client = " client=127.0.0.1:%d" % guess.getsockname()[1]
                self.assertEqual(lines[1], "login failed%s user=alice" % client)
                if pause > 1:
                    self.client(server).log_in()  # others are served in the meantime
                    guess.setblocking(False)
                    with self.assertRaises(BlockingIOError):
                        guess.recv(1)
                    guess.settimeout(PATIENCE)
                    self.stop(server)  # without waiting for the pause
                self.assertEqual(read_all(guess), (octets("01 01"), "end"))
                wait_until(lambda lines=lines, start="session" + client: (  # it stays
                    start in "".join(lines)))
                line, = [fields(line) for line in lines if "session" + client in line]
                self.assertEqual(line["user"], "-")
                if pause < 1:
                    self.assertEqual(line["end"], "login-failed")
                    self.assertGreaterEqual(float(line["seconds"]), 0.3)
                self.assertNotRegex("".join(lines), "hunter2|secret")

    def test_deadlines_are_checked_twice_a_second(self):
        self.assertEqual(SWEEP_INTERVAL, 0.5)


SlicedDeadlineTest = type("SlicedDeadlineTest", (Sliced, DeadlineTest), {})


class LimitsTest(SweepTestCase):
    HOSTS = ["127.0.0.1", "::"] if has_ipv6() else ["127.0.0.1"]

    def test_clients_that_are_served(self):
        for host in self.HOSTS:
            for clients, served in [(["127.0.0.0/8"], True), (["10.0.0.0/8", "127.0.0.1"], True),
                                    (["10.0.0.0/8", "::1"], False)]:
                with self.subTest(host, clients=clients), self.logged() as lines:
                    server = self.serve(host=host, clients=clients)
                    self.assertEqual(self.talk(server, "05 01 02"),
                                     octets("05 ff") if served else b"")
                    self.stop(server)
                    self.assertRegex(lines[0], r"^session " if served else
                                     r"^client refused client=127\.0\.0\.1:\d+$")

    def test_a_reload_never_mixes_two_settings(self):
        """Whenever they change, the answer is that of the ones at the time of accepting."""
        users, others = {"users": USERS}, {"clients": ["127.0.0.9"]}
        ask = TO + port_of(self.echo()).hex()
        rows = [(first, second, said) for one, two, said in [
            (users, others, ask), ({}, {"rules": ["deny *"]}, ask),
            (dict(users, **PROXIED), dict(others, **PROXIED), header_for("127.0.0.1") + ask),
            (dict(users, **PROXIED), others, header_for("127.0.0.9") + ask),
            (PROXIED, dict(users, rules=["deny *"], **PROXIED), header_for("127.0.0.1") + ask)]
            for first, second in [(one, two), (two, one)]]

        def changing(owner, name, is_before):
            def method(self, *args):
                server = getattr(self, "server", self)
                if is_before:
                    server.settings = server.next
                result = getattr(owner, name)(self, *args)
                server.settings = server.next
                return result
            return type("Changing", (owner,), {name: method})

        alone = [self.talk(self.serve(**first), said)[:4] for first, _, said in rows]
        self.assertEqual(alone, [octets(answer) for answer in (
            "05 ff", "", "05 00 05 00", "05 00 05 02", "05 ff", "", "05 ff", "", "05 00 05 00",
            "05 ff")])
        for name, is_before in [
                ("get_request", False), ("verify_request", True), ("verify_request", False),
                ("process_request", True), ("setup", True), ("setup", False),
                ("select_method", True), ("select_method", False)]:
            if hasattr(socks5.Socks5Server, name):
                server = self.serve(kind=changing(socks5.Socks5Server, name, is_before))
            else:
                server = self.serve(changing(socks5.Socks5RequestHandler, name, is_before))
            for (first, second, said), answer in zip(rows, alone):
                with self.subTest(name, is_before=is_before, first=first, second=second):
                    server.settings = socks5.Settings(**first)
                    server.next = socks5.Settings(**second)
                    self.assertEqual(self.talk(server, said)[:4], answer)

    def test_limits(self):
        for host in self.HOSTS:
            for setting, kind in [("max_sessions", "too many sessions"),
                                  ("max_per_client", "too many sessions of a client")]:
                with self.subTest(setting, host=host), self.logged() as lines:
                    server = self.serve(host=host, **{setting: 2})
                    silent, tunnel = self.client(server), self.tunnel(server)
                    for _ in range(3):  # a client that says nothing counts
                        self.assertFalse(self.is_served(server))
                    self.assertRegex("\n".join(lines), "(?m)^%s client=127.0.0.1:\\d+$" % kind)
                    self.assertEqual(self.is_served(server, "127.0.0.2"), "client" in kind)
                    silent.close()
                    wait_until(lambda server=server: self.is_served(server))
                    server.settings = socks5.Settings(**{setting: 1})
                    wait_until(lambda server=server: not self.is_served(server))
                    self.check_one_way(*tunnel)  # a limit that is lowered ends nobody

    def test_warnings_of_a_kind_are_a_line_each_interval(self):
        for kind, settings, owner, name, error in [
                ("client refused client=", {"clients": ["10.0.0.0/8"]}, mock.Mock(), "it", None),
                ("no thread for a client", {}, threading.Thread, "start", RuntimeError("limit")),
                ("not accepting", {}, socket.socket, "accept", OSError(errno.EMFILE, "limit"))]:
            errors = []
            with self.subTest(kind), mock.patch.multiple(
                    socks5, WARNING_INTERVAL=PATIENCE, EXHAUSTION_PAUSE=0.01), \
                    mock.patch.object(socks5.ThreadCache, "most_idle", 0), \
                    failing(owner, name, errors), self.jumping_clock() as jump:
                server = self.serve(**settings)
                with self.logged("WARNING") as lines:
                    for clients, pause in [(4, 0.9), (2, 0.2), (1, 1.1), (1, 0)]:
                        for _ in range(clients):
                            errors += [error]
                            self.assertEqual(self.is_served(server), "accepting" in kind)
                        jump(pause * PATIENCE)
                self.assertEqual(len(lines), 3, lines)
                for line, suppressed in zip(lines, [None, "5", None]):
                    self.assertTrue(line.startswith(kind), line)
                    self.assertEqual(fields(line).get("suppressed"), suppressed, line)

    def test_user_of_a_warning_cannot_forge_a_line_and_is_forgotten(self):
        port, name = self.echo(), "a\r\nsession end=fine"
        with self.logged() as lines:
            server = self.serve(users={name: "x"}, max_per_user=1)
            first, second = (self.client(server).log_in(name, "x") for _ in range(2))
            self.assertEqual((first.ask(port), second.ask(port)), (0, 2))
            self.assertRegex(lines[0], r"^too many sessions of a user client=127.0.0.1:\d+ "
                             r"user=a\\r\\nsession\\x20end=fine$")
        for client in first, second:
            client.close()
        wait_until(lambda: not server.connections)
        self.assertEqual(server.owners, {})
        server = self.serve(users={"127.0.0.1": "x"}, max_per_client=1, max_per_user=1)
        self.check_echo(self.client(server).log_in("127.0.0.1", "x"), port)  # named as its host


class ServerTest(SweepTestCase):
    def test_close_in_every_phase(self):
        class Handler(socks5.Socks5RequestHandler):
            def setup(self):
                begun.set()
                if name == "begins later":
                    wait_until(lambda: self.server.fileno() == -1)
                super().setup()

            def connect(self, destination):
                if name == "in a hook" and not socks5.SLICE:
                    self.own_socket(ours).recv(1)  # until the server ends the session
                return super().connect(destination)

        (ours, _), dead, listener = self.pair(), self.black_hole(), self.listen()
        nowhere, target = (port_of(each[1]).hex() for each in (dead, listener.getsockname()))
        for name, frame, answer, end in [
                ("begins later", "", "", "server-closed"), ("silent", "", "", "server-closed"),
                ("in the middle of a request", "05 01 00 05", "05 00", "server-closed"),
                ("in a hook", TO + nowhere, "05 00", "server-closed"),
                ("connecting", TO + nowhere, "05 00", "server-closed"),
                ("connecting to a name", "05 01 00 05 01 00 03 01 78 00 50", "05 00",
                 "server-closed"),
                ("refusing", "05 01 02", "05 ff", "no-acceptable-method"),
                ("relaying", TO + target, "05 00" + OPEN, "server-closed"),
                ("binding", "05 01 00 05 02 00 01" + "00" * 6, "05 00" + OPEN, "server-closed"),
                ("datagrams", "05 01 00 05 03 00 01" + "00" * 6, "05 00" + OPEN, "server-closed")]:
            begun = threading.Event()
            with self.subTest(name), mock.patch.object(socks5, "REFUSAL_TIMEOUT", PATIENCE), \
                    resolver(*[dead] * 40), self.ending(end):
                server = self.serve(Handler, handshake_timeout=PATIENCE, connect_timeout=PATIENCE)
                client = self.client(server)
                client.say(frame)
                client.hear(answer)
                self.assertTrue(begun.wait(PATIENCE))
                wait_until(lambda server=server, name=name, frame=frame: (
                    name == "begins later" or [len(frame) > 12] == [
                        live["command"] != "-" for live in self.report(server)[0]]))
                with self.within(3):
                    self.stop(server)

    @unittest.skipUnless(has_ipv6() and os.name == "posix", "no IPv6, or other names of zones")
    def test_zone_of_an_address(self):
        number, name = socket.if_nameindex()[0]
        with socks5.Socks5Server(("fe80::1%" + name, 0), bind_and_activate=False) as server:
            self.assertEqual(server.server_address[3], number)

    def test_report_and_its_times(self):
        server = self.serve(max_sessions=7, handshake_timeout=99)
        with self.jumping_clock() as jump:
            client, listener = self.client(server), self.listen()
            wait_until(lambda: self.report(server)[0])
            jump(30)
            self.assertEqual(client.greet().ask(listener.getsockname()[1]), Reply.SUCCEEDED)
            jump(30)
            self.check_one_way(client, self.own(listener.accept()[0]))
            wait_until(lambda: float(self.report(server)[0][0]["idle"]) < 10)
            jump(20)
            with self.logged(socks5.NOTICE) as lines:
                server.report()
        for name, least in ("seconds", 80), ("idle", 20):
            self.assertTrue(least <= float(fields(lines[0])[name]) < least + 5, lines)
        self.assertRegex(lines[0], (
            r"^live client=127\.0\.0\.1:\d+ user=- command=CONNECT destination=127\.0\.0\.1:\d+ "
            r"reached=127\.0\.0\.1:\d+ reply=SUCCEEDED rule=- up=4 down=0 seconds=\d+\.\d{3} "
            r"idle=\d+\.\d{3} phase=idle$"))
        self.assertEqual(lines[1:], ["totals pid=%d live=1 limit=7" % os.getpid()])

    def test_drain_and_totals(self):
        server = self.serve(max_sessions=7)
        self.assertTrue(server.drain(PATIENCE))  # nobody is there
        client, target = self.tunnel(server)
        start = time.monotonic()
        self.assertFalse(server.drain(0) or server.drain(0.1))
        self.assertGreaterEqual(time.monotonic() - start, 0.09)
        server.shutdown()
        thread = self.thread(server.drain, PATIENCE)
        self.check_relay(client, target)  # the session goes on
        with self.ending("client-closed"), self.within(6):
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(target), (b"", "end"))
            self.check_one_way(target, client)
            target.close()
            thread.join(PATIENCE)
        self.assertEqual(self.report(server), ([], {
            "pid": str(os.getpid()), "live": "0", "limit": "7", "sessions": "1", "up": "4",
            "down": "8", "client-closed": "1"}))


class FaultTest(SweepTestCase):
    def test_what_a_hook_does_wrong_costs_its_session_only(self):
        def divide(*args):
            return 1 // 0

        to, handler = TO + "00 50", socks5.Socks5RequestHandler
        set_up, ended_by = handler.setup, ["connect", "select_method", "authenticate"]
        for owner, hook, fault, frame, answer, error in [
                (handler, "connect", lambda *args: None, to, "05 00 05 01", "TypeError"),
                (handler, "setup", lambda *args: None, to, "", "AttributeError"),  # no super()
                (handler, "setup", divide, to, "", "ZeroDivisionError"),
                (handler, "setup", lambda self: divide(set_up(self)), to, "", "ZeroDivisionError"),
                *[(handler, "select_method", mock.Mock(side_effect=error), to, "", error.__name__)
                  for error in (OSError, socket.timeout, ZeroDivisionError)],
                (handler, "authenticate", divide, LOGIN, "05 02", "ZeroDivisionError"),
                (handler, "log_message", divide, "05 01 02", "05 ff", "ZeroDivisionError"),
                (socks5.Socks5Server, "verify_request", divide, "", "", "ZeroDivisionError")]:
            faults, real = [fault], getattr(owner, hook)

            def faulty(*args, faults=faults, real=real):
                return (faults.pop() if faults else real)(*args)

            with self.subTest(hook, error=error), self.logged() as lines, self.within(8), \
                    mock.patch.object(socks5, "REFUSAL_TIMEOUT", 0.05), \
                    mock.patch.object(owner, hook, faulty):
                server = self.serve(max_sessions=1, users=USERS if hook == "authenticate" else None)
                client = self.client(server)  # it stays: the sweep has to end it
                with contextlib.suppress(ConnectionError):
                    client.say(frame)
                    self.assertEqual(read_count(client, len(octets(answer))), octets(answer))
                wait_until(lambda lines=lines: any("session failed" in line for line in lines))
                wait_until(lambda server=server: self.is_served(server))
                self.assertTrue(server.drain(PATIENCE))
                self.assertEqual(self.report(server)[0], [])
                self.stop(server)
                self.assertRegex("\n".join(lines), (
                    r"(?m)^session failed client=127\.0\.0\.1:\d+ error=%s$" % error))
                self.assertEqual("end=error" in "".join(lines), hook in ended_by)

    def test_no_error_of_accept_ends_the_accepting(self):
        server, errors = socks5.Socks5Server(("127.0.0.1", 0)), []
        self.addCleanup(server.server_close)
        self.thread(server.accept_forever)
        self.addCleanup(setattr, server, "is_accepting", False)
        with self.logged("WARNING") as lines, failing(socket.socket, "accept", errors), \
                mock.patch.multiple(socks5, EXHAUSTION_PAUSE=0.02, WARNING_INTERVAL=PATIENCE):
            for error in [OSError(number, "no") for number in (
                    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM)] + [
                    MemoryError(), OSError(errno.ECONNABORTED, "")]:  # the last: without a pause
                errors += [error] * 4
                server.warnings.clear()
                with self.subTest(error=error):
                    start = time.monotonic()
                    self.assertTrue(self.is_served(server) and self.is_served(server))
                    self.assertEqual(errors, [])
                    pause = 0 if error.args[:1] == (errno.ECONNABORTED,) else 0.08
                    self.assertGreaterEqual(time.monotonic() - start, pause)
        self.assertEqual(
            lines, ["not accepting: no"] * 4 + ["accepting failed error=MemoryError"] * 4)

    @unittest.skipIf(socks5.SLICE, "shutdown() does not wake a thread here")
    def test_error_while_a_session_is_watched(self):
        errors = [MemoryError()]
        with self.logged("WARNING") as lines, failing(
                socket.socket, "shutdown", errors, lambda sock, how: how == socket.SHUT_RD):
            server = self.serve(handshake_timeout=0.05)
            self.client(server)
            wait_until(lambda: not errors)
            self.assertEqual(read_all(self.client(server)), (b"", "end"))  # the sweep goes on
            self.stop(server)
        self.assertEqual(lines, ["watching a session failed error=MemoryError"])


# ---- embedding ---------------------------------------------------------------------------

class EmbeddingTest(SweepTestCase):
    def test_running_serves_in_a_thread_until_the_block_ends(self):
        times, before = [], set(threading.enumerate())
        for error in (None, ZeroDivisionError, None):
            with self.subTest(error=error), self.logged() as lines:
                with contextlib.suppress(ZeroDivisionError), \
                        socks5.Socks5Server(("127.0.0.1", 0)).running() as server:
                    self.assertIsInstance(server, socks5.Socks5Server)
                    ends = self.tunnel(server)
                    self.check_relay(*ends)
                    start = time.monotonic()
                    if error:
                        raise error
                times.append(time.monotonic() - start)
                self.assertEqual(set(threading.enumerate()), before)
                self.assertEqual([read_all(end)[1] for end in ends], ["reset"] * 2)
                self.assertEqual(self.session_line(lines)["end"], "server-closed")
                with self.assertRaises(ConnectionRefusedError):
                    Client.to(server.server_address)
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
        class Handler(socks5.Socks5RequestHandler):
            def connect(self, destination):
                sock = self.own_socket(Client.to(upstream.server_address))
                code = sock.log_in().ask(destination.port, destination.host)
                if code:
                    raise socks5.RequestError(Reply(code))
                return sock

        upstream, server, content = self.serve(users=USERS), self.serve(Handler), pattern(MEBIBYTE)
        client = self.client(server).greet()
        self.assertEqual(client.ask(self.echo(), "localhost"), Reply.SUCCEEDED)
        self.send(client, content, end=True)
        self.assertEqual(read_all(client), (content, "end"))
        self.assertEqual(self.client(server).greet().ask(self.dead()[1]), Reply.CONNECTION_REFUSED)


# ---- doors: paths, systemd's sockets, balancers, sources ---------------------------------

ME = pwd.getpwuid(os.getuid()).pw_name if os.name == "posix" else ""
NOBODY, NAMELESS = 65534, 4000000123  # the second one has no name, and more than 31 bits
ADDRESSES = " c0 00 02 01 c6 33 64 01 9d d0 04 38"  # 192.0.2.1:40400 to 198.51.100.1:1080
ADDRESSES_6 = " 20 01 0d b8" + "00" * 11 + "01 20 01 0d b8" + "00" * 11 + "02 9d d0 04 38"
LINE = b"PROXY TCP4 192.0.2.1 198.51.100.1 40400 1080\r\n".hex()  # version 1
LINE_6 = b"PROXY TCP6 2001:db8::1 2001:db8::2 65535 1080\r\n".hex()
BLOCK = SIGNATURE + "21 11 00 0c" + ADDRESSES
HEADERS = [  # what a balancer sends, and client= in the log; None is the balancer itself
    (LINE, "192.0.2.1:40400"), (LINE_6, "[2001:db8::1]:65535"), (UNKNOWN + "0d 0a", None),
    (UNKNOWN + "20" + "66" * 91 + "0d 0a", None),  # 107 bytes
    (BLOCK, "192.0.2.1:40400"),
    (SIGNATURE + "21 21 00 24" + ADDRESSES_6, "[2001:db8::1]:40400"),
    (SIGNATURE + "21 21 00 24" + "00" * 10 + "ff ff c0 00 02 01" + "00" * 16 + "9d d0 04 38",
     "192.0.2.1:40400"),
    (SIGNATURE + "21 11 10 00" + ADDRESSES + "00" * 4084, "192.0.2.1:40400"),  # 4,096 bytes
    (LOCAL, None), (SIGNATURE + "20 11 00 0c" + ADDRESSES, None), (SIGNATURE + "21 00 00 00", None),
    (SIGNATURE + "21 31 00 d8" + "2f" * 216, None)]  # a path
NO_HEADERS = [
    "05 01 00", b"GET / HTTP/1.0\r\n\r\n", b"PROXY\r\n", b"PROXY \xff\r\n", b"PROXY TCP4\r\n",
    b"PROXY TCP4 192.0.2.1 1.1.1.1 1\r\n", b"PROXY TCP4 192.0.2.1 1.1.1.1 1 1\n",
    b"PROXYTCP4 192.0.2.1 1.1.1.1 1 1\r\n", b"PROXY TCP4 192.0.2.1 1.1.1.1 65536 1\r\n",
    b"PROXY TCP4 192.0.2.1 1.1.1.1 -1 1\r\n", b"PROXY TCP4 ::1 ::1 1 1\r\n",
    b"PROXY TCP6 192.0.2.1 1.1.1.1 1 1\r\n", b"PROXY TCP4 example 1.1.1.1 1 1\r\n",
    b"PROXY TCP4 192.0.2.1\x00 1.1.1.1 1 1\r\n", b"PROXY UDP4 192.0.2.1 1.1.1.1 1 1\r\n",
    UNKNOWN + "20" + "66" * 92 + "0d 0a", UNKNOWN + "20" + "66" * 93,  # 108 and 107 bytes
    SIGNATURE[:-2] + "0b 21 11 00 0c" + ADDRESSES, SIGNATURE + "11 11 00 0c" + ADDRESSES,
    SIGNATURE + "22 11 00 0c" + ADDRESSES, SIGNATURE + "21 11 10 01",
    SIGNATURE + "21 11 00 0b" + ADDRESSES[:-3], SIGNATURE + "21 21 00 23" + ADDRESSES_6[:-3]]
HAPROXY = """
listen socks5
    mode tcp
    bind fd@%d
    option redispatch 1
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    option tcp-check
    tcp-check connect default
    default-server check inter 50ms rise 1 fall 3 send-proxy-v2 check-send-proxy
    server a 127.0.0.1:%d
    server b 127.0.0.1:%d
"""
FAST = """import os, signal, socket, struct, sys, threading, socks5
def listen(sock, *count, real=socket.socket.listen):
    real(sock, *count)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 20000))
socket.socket.listen = listen  # accept() waits a shorter time for a client
socks5.TICK, socks5.SWEEP_INTERVAL, socks5.RESTART_PAUSE = 0.01, 0.02, 0.3
%s
sys.exit(socks5.main())"""


def command(before=""):
    """Return arguments of Python: a `socks5.py` with short pauses, and `before` before main()."""
    return "-S", "-c", FAST % before


def process_stat(path):
    """Return what /proc tells of a process or a thread, from its state on."""
    with open("/proc/%s/stat" % path) as file:
        return file.read().rpartition(")")[2].split()


def cpu_seconds(*processes):
    def used():
        return sum(int(ticks) for each in processes for ticks in process_stat(each.pid)[11:13])

    before = used()
    time.sleep(0.3)  # this is the time that is measured
    return (used() - before) / os.sysconf("SC_CLK_TCK")


class DoorTestCase(CommandTestCase):
    """Tests with paths, and with sockets that are passed to a process."""

    def knock(self, path, user=None):
        client = self.own(Client(socket.AF_UNIX))
        if user is None:
            client.connect(path)
        else:
            subprocess.check_call(["true"], close_fds=False, cwd="/", preexec_fn=lambda: (
                os.setgroups([]), os.setuid(user), client.connect(path)))
        return client

    def serve_path(self, **settings):
        path = os.path.join(self.folder(), "socks5.sock")
        self.serve(address=path, mode=0o666, **settings)
        return path

    def pass_on(self, sock, *options, here=False, limit=256, **environment):
        """Start `socks5.py` with `sock` as its descriptor 3, as systemd does.

        If `here`, fork this process instead, and call main(), which must end.
        """
        def prepare():
            os.dup2(sock.fileno(), 3)
            os.set_inheritable(3, True)
            os.environ.update(dict({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"},
                                   **environment))
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            if here:
                signal.alarm(PATIENCE)  # or else nothing would end it
                try:
                    with open(2, "w", closefd=False) as sys.stderr:
                        socks5.main(list(options))
                except SystemExit as end:
                    os._exit(end.code)
        return self.start(*command(), *options, preexec_fn=prepare, close_fds=False)


@unittest.skipUnless(hasattr(socket, "SO_PEERCRED"), "the kernel does not name the peer")
class PathTest(DoorTestCase):
    def test_a_client_is_its_login_name_unless_it_logs_in(self):
        port, data, addresses = self.echo(), b"x" * 100000, []
        handler = hooked(authorize=lambda session, _: not addresses.append(
            (session.client_address, session.account)))
        for settings, greet, user in (
                ({"rules": ["allow %s@127.0.0.1" % ME], "clients": ["192.0.2.0/24"],
                  "max_per_user": 1}, Client.greet, ME),
                ({"users": USERS, "rules": ["deny %s@*" % ME, "allow alice@*"]},
                 Client.log_in, "alice")):
            with self.subTest(user=user), self.logged() as lines:
                path = self.serve_path(handler=handler, **settings)
                client = greet(self.knock(path))
                self.assertEqual(client.ask(port), Reply.SUCCEEDED)  # on loopback: it is local
                if "max_per_user" in settings:
                    self.assertEqual(greet(self.knock(path)).ask(port), Reply.NOT_ALLOWED)
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(client), (data, "end"))
                line = self.session_line(lines)
                self.assertEqual((line["client"], line["user"], line["end"]),
                                 ("unix:" + ME, user, "client-closed"))
        self.assertEqual(addresses, [(("127.0.0.1", 0), ME)] * 2)
        with self.ending("no-acceptable-method") as lines, self.knock(path) as client:
            client.say("05 01 00")
            client.hear("05 ff")
            client.close()
            self.assertEqual(self.session_line(lines)["user"], "-")  # before the login

    def test_an_account_name_with_a_percent_sign_stays_itself(self):
        port = self.echo()
        for name, reply in ("alice%evil", 2), ("%x", 2), ("alice", 0):
            with self.subTest(name), self.logged() as lines, mock.patch.object(
                    pwd, "getpwuid", return_value=mock.Mock(pw_name=name)):
                with self.knock(self.serve_path(rules=["allow alice@*"])) as client:
                    self.assertEqual(client.greet().ask(port), reply)
                self.assertEqual(self.session_line(lines)["user"], name)

    def test_accounts_are_counted_by_number_and_their_names_keep_nobody_waiting(self):
        def getpwuid(number, real=pwd and pwd.getpwuid):
            calls.append(number)
            return (len(calls) > 1 or may_go_on.wait(PATIENCE)) and real(number)

        calls, may_go_on, path = [], threading.Event(), self.serve_path(max_per_client=2)
        with self.logged() as lines, mock.patch("pwd.getpwuid", getpwuid):
            slow = self.knock(path)
            wait_until(lambda: calls)
            second, third = self.knock(path), self.knock(path)
            self.assertEqual(read_all(third), (b"", "end"))
            self.assertEqual(lines, [
                "too many sessions of a client client=unix:%d" % os.getuid()])
            second.greet()
            may_go_on.set()
            slow.greet()

    @unittest.skipUnless(hasattr(os, "getuid") and not os.getuid(), "needs root, for accounts")
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
            wait_until(lambda: {
                "unix:{0} user={0}".format(user) for user in ("root", name, NAMELESS)} == set(
                    re.findall("client=(unix:.+ user=.+) command", "\n".join(lines))))
        self.assertIn("too many sessions of a client client=unix:%d" % NOBODY, lines)

    def test_mode_start_line_and_curl(self):
        path = os.path.join(self.folder(), "socks5.sock")
        socks5.Socks5Server(path).server_close()  # leaves a file of another mode
        relative = os.path.relpath(path, HERE)
        process = self.start(*command(), "-b", relative, "--workers", "2", "--mode", "0660")
        line = process.stdout.readline()
        self.assertEqual(line, "Serving SOCKS5 on %s (curl -x socks5h://localhost%s, "
                         "ssh -L 1080:%s HOST) ...\n" % (relative, path, path))
        self.assertEqual(os.stat(path).st_mode, stat.S_IFSOCK | 0o660)
        if shutil.which("curl"):  # before 7.84, it takes the path for a part of the name
            self.assertEqual(b"page", subprocess.check_output("%s -sS http://127.0.0.1:%d/" % (
                re.search(r"\((curl [^,]*),", line).group(1), self.web_server()), shell=True))
        with self.knock(path).greet() as client, self.knock(path).greet() as other:
            self.assertEqual((client.ask(9, command="02"), other.ask(9, command="03")), (7, 7))
        process.terminate()
        self.assertIn("client=unix:" + ME, process.communicate(timeout=PATIENCE)[1])
        process = self.start("socks5.py", "-b", path, "--drain", str(2 * PATIENCE))
        process.stdout.readline()
        process.terminate()  # it waits for no client
        process.communicate(timeout=PATIENCE)

    def test_what_stands_at_the_path(self):
        folder = self.folder()
        paths = {name: os.path.join(folder, name) for name in
                 ("live", "full", "stale", "file", "folder", "link", "gone/x", "x" * 108)}
        for name in "live", "full", "stale":
            sock = self.own(socket.socket(socket.AF_UNIX))
            sock.bind(paths[name])
            if name != "stale":
                sock.listen(0)
        sock.close()
        self.knock(paths["full"])
        os.mkdir(paths["folder"])
        open(paths["file"], "w").close()  # noqa: SIM115
        os.symlink("stale", paths["link"])
        before = os.listdir(folder)
        for name in "live", "full", "file", "folder", "link", "gone/x", "x" * 108:
            with self.subTest(name), self.assertRaises(OSError):
                socks5.Socks5Server(paths[name])
        self.assertEqual(os.listdir(folder), before)
        for _ in range(2):  # the socket file that the first one has left is stale, too
            socks5.Socks5Server(paths["stale"]).server_close()
        self.assertEqual(os.stat(paths["stale"]).st_mode, stat.S_IFSOCK | 0o600)
        self.assertEqual(os.listdir(folder), before)

    def test_a_socket_that_does_not_listen_yet_is_not_stale(self):
        path, chmod, others = self.folder() + "/s", os.chmod, []

        def start_another(*args):
            chmod(*args)
            others.append(args)
            with mock.patch.object(os, "chmod", chmod), self.assertRaises(OSError):
                socks5.Socks5Server(path).server_close()

        with mock.patch.object(os, "chmod", start_another):
            self.addCleanup(socks5.Socks5Server(path).server_close)
        self.assertEqual(len(others), 1)
        self.knock(path)


@LINUX_ONLY
class SystemdTest(DoorTestCase):
    def test_it_serves_on_each_family_and_speaks_to_systemd(self):
        path, port, started = self.own(Client(socket.AF_UNIX)), self.echo(), []
        folder = self.folder()
        path.bind(folder + "/inherited")
        os.chmod(path.getsockname(), 0o600)
        path.listen(9)
        for listener, workers, where in (
                (path, "1", folder + "/1"), (self.listen(), "2", "\0socks5-test-%d" % os.getpid()),
                (self.listen("::1" if has_ipv6() else "127.0.0.1"), "1", folder + "/3")):
            told = self.own(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            told.bind(where)
            listener.setblocking(False)  # the other process inherits that
            started.append((listener, told, self.pass_on(
                listener, "--workers", workers, "-q", "--mode", "0666",  # which is for `-b`
                NOTIFY_SOCKET=where.replace("\0", "@"))))
        for listener, told, _ in started:
            self.assertEqual(told.recv(1000), b"READY=1", listener)
            with (self.knock(path.getsockname()) if listener is path else
                  Client.to(listener.getsockname())) as client:
                self.assertEqual(client.greet().ask(port), Reply.SUCCEEDED)
        self.assertLess(cpu_seconds(*[each[2] for each in started]), 0.1)
        for _, told, process in started:
            process.send_signal(signal.SIGHUP)
            process.terminate()
            self.assertIn("settings reloaded", process.communicate(timeout=PATIENCE)[1])
            self.assertEqual((process.returncode, told.recv(1000)), (0, b"STOPPING=1"))
            told.setblocking(False)
            self.assertRaises(BlockingIOError, told.recv, 1)  # no worker has spoken
        self.assertTrue(os.path.exists(path.getsockname()))

    def test_what_is_passed_must_be_one_listening_socket(self):
        def bound(family, address, backlog=1):
            sock = self.own(socket.socket(family))
            sock.bind(address)
            return sock.listen(backlog) or sock if backlog else sock

        path = os.path.join(self.folder(), "s")
        tcp, lacks = self.listen(), "descriptor 3 does not listen on an address or a path"
        rows = [(tcp, ["--open"], {"LISTEN_FDS": "2"}, "systemd passed 2 sockets, expected 1"),
                (tcp, [], {"LISTEN_FDS": ""}, "systemd passed no sockets"),
                (self.datagrams(), [], {}, "error: "),
                (bound(socket.AF_INET, ("127.0.0.1", 0), 0), [], {}, lacks),
                (bound(socket.AF_UNIX, "\0" + path), [], {}, lacks),
                (tcp, ["1080"], {}, "systemd passed a socket: do not give an address or a port"),
                (tcp, ["-b", "::1"], {}, "systemd passed a socket"),
                (bound(socket.AF_INET, ("0.0.0.0", 0)), [], {}, "refusing to listen on 0.0.0.0"),
                (bound(socket.AF_UNIX, path), [], {}, "refusing to listen on " + path)]
        os.chmod(path, 0o666)
        for sock, options, environment, message in rows:
            with self.subTest(message, options=options):
                process = self.pass_on(sock, *options, here=True, **environment)
                err = process.communicate(timeout=PATIENCE)[1]
                self.assertRegex(err, r"^socks5\.py: error: .+\nsee socks5\.py --help\n$")
                self.assertIn(message, err)
                self.assertEqual(process.returncode, 2)

    def test_the_queue_is_left_to_the_successor(self):
        listener = self.listen()
        process = self.pass_on(listener, "-q", limit=20)  # enough for two sessions
        with Client.to(listener.getsockname()).greet(), Client.to(listener.getsockname()).greet():
            queued = self.own(Client.to(listener.getsockname()))
            process.stdout.readline()
            process.terminate()
            self.assertEqual(process.stdout.readline(), "Shutting down.\n")
        self.assertEqual(process.wait(PATIENCE), 0)
        late = self.own(Client.to(listener.getsockname()))  # the door is not shut for good
        for client in queued, late:
            successor, address = listener.accept()
            successor.close()
            self.assertEqual(address, client.getsockname())


@LINUX_ONLY
class BalancerTest(DoorTestCase):
    def behind(self, server, header):
        client = self.client(server)
        client.say(header)
        return client

    def refuse(self, server, header):
        self.assertEqual(read_all(self.behind(server, header))[0], b"")

    def lines_of(self, server, lines):
        self.stop(server)
        return [fields(line) for line in lines if line.startswith("session ")]

    def test_each_header_names_the_client_and_no_remote_one_is_local(self):
        for header, name in HEADERS:
            data = octets(header + "05 01 00 05 01 00 01 7f 00 00 01 00 09")
            for step in 5000, 1 if len(data) < 100 else 40:
                with self.subTest(header=header[:80], step=step), self.logged() as lines:
                    server = self.serve(**PROXIED)
                    client = self.client(server)
                    for start in range(0, len(data), step):  # what is pipelined is kept
                        client.sendall(data[start:start + step])
                    client.hear("05 00 05 02" + REFUSED)
                    line, = self.lines_of(server, lines)
                    self.assertEqual((line["client"], line["rule"]), (
                        name or "127.0.0.1:%d" % client.getsockname()[1],
                        "built-in:127.0.0.0/8"))

    def test_what_is_no_header_is_hung_up_on_at_once(self):
        rows = [(header, "not-proxy", "127.0.0.1") for header in NO_HEADERS]
        rows += [(octets(LINE)[:count], "not-proxy", None) for count in range(1, 46)]
        rows += [(octets(BLOCK)[:count], "client-left", None) for count in range(1, 28)]
        rows += [(header, "not-socks5", "127.0.0.2") for header in (LINE, BLOCK)]  # from elsewhere
        with self.logged("DEBUG") as lines:
            server = self.serve(proxy_from=["127.0.0.1", "::1"])
            for header, _, source in rows:
                with self.subTest(header), self.within(6), self.client(server, source) as client:
                    client.sendall(header if isinstance(header, bytes) else octets(header))
                    if not source:  # the header is cut
                        client.shutdown(socket.SHUT_WR)
                    is_http = header is LINE and source == "127.0.0.2"
                    self.assertEqual(read_all(client)[0][:4], b"HTTP" if is_http else b"")
            ends = [line["end"] for line in self.lines_of(server, lines)]
        self.assertEqual(sorted(ends), sorted(end for _, end, _ in rows))
        self.assertFalse([line for line in lines if "failed" in line])

    def test_clients_and_limits_are_those_of_the_true_client(self):
        with self.logged() as lines:
            server = self.serve(proxy_from=["127.0.0.1"], clients=["192.0.2.0/24"],
                                max_per_client=1)
            waiting = [self.client(server) for _ in range(2)]  # nobody knows yet whose they are
            self.behind(server, BLOCK).greet()
            mapped = b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 1\r\n".hex()
            for header in LINE, mapped, header_for("127.0.0.1"):
                self.refuse(server, header)
            for number, client in enumerate(waiting, 2):
                client.say(header_for("192.0.2.%d" % number))
                client.greet()
            self.assertEqual(sorted(line["end"] for line in self.lines_of(server, lines)),
                             ["rejected"] * 3 + ["server-closed"] * 3)
        self.assertIn("client refused client=127.0.0.1:40400", lines)
        self.assertIn("too many sessions of a client client=192.0.2.1:40400", lines)

    def test_hooks_and_logins_see_the_true_client(self):
        asked = []

        class Server(socks5.Socks5Server):
            def verify_request(self, request, client_address):
                asked.append(client_address)
                return super().verify_request(request, client_address)

        handler = hooked(authorize=lambda session, _: not asked.append(session.client_address))
        with self.logged() as lines:
            server = self.serve(handler, kind=Server, users=USERS, proxy_from=["127.0.0.0/8"])
            self.assertEqual(self.behind(server, LINE).log_in().ask(9), Reply.NOT_ALLOWED)
            self.behind(server, header_for("192.0.2.7")).log_in("a", "b", "01")
        self.assertEqual([client for client in asked if client[0] != "127.0.0.1"],
                         [("192.0.2.1", 40400)] * 2 + [("192.0.2.7", 40400)])
        self.assertEqual(len(asked), 5)  # `verify_request` is asked about the balancer, too
        self.assertIn("login failed client=192.0.2.7:40400 user=a", lines)

    def test_connections_without_a_client_count_for_max_sessions(self):
        for header in ["", *HEALTH_CHECKS]:
            with self.subTest(header), self.logged() as lines:
                server = self.serve(proxy_from=["127.0.0.1"], max_sessions=1)
                client = self.behind(server, header)
                wait_until(lambda server=server: not server.drain(0))
                if header:
                    client.greet()
                self.assertEqual(read_all(self.client(server, "127.0.0.2"))[0], b"")
                for last in [BLOCK, *HEALTH_CHECKS]:
                    self.refuse(server, last)
                self.assertRegex(lines[0], "^too many sessions client=127.0.0.2:")
                self.assertIn("rejected", [line["end"] for line in self.lines_of(server, lines)])

    def test_a_health_check_goes_nowhere_if_clients_are_limited(self):
        port = self.echo()
        for header in HEALTH_CHECKS:
            for clients, reply, rule in ([], 0, "-"), (["127.0.0.0/8"], 2, "default"):
                with self.subTest(header, clients=clients), self.logged() as lines:
                    server = self.serve(clients=clients, rules=["allow 127.0.0.1"], **PROXIED)
                    self.assertEqual(self.behind(server, header).greet().ask(port), reply)
                    line, = self.lines_of(server, lines)
                    self.assertEqual(line["rule"], rule)

    def test_BIND_and_UDP(self):
        for host, advertised in [("127.0.0.1", None), ("127.0.0.1", "127.0.0.9"),
                                 ("::1", "2001:db8::9")][:2 + has_ipv6()]:
            server = self.serve(proxy_from=["127.0.0.1"], udp_advertise=advertised)
            header, target, sender = header_for(host), self.datagrams(), self.datagrams(host)
            self.assertEqual(self.behind(server, header).greet().ask(9, command="02"), 7)
            client = self.behind(server, header).greet()
            client.say("05 03 00 01 00 00 00 00 00 00")
            code, (where, port) = client.read_reply()
            self.assertEqual((code, where), (0, advertised) if advertised else (7, "0.0.0.0"))
            if advertised:
                frame = octets("00 00 00 01 7f 00 00 01") + port_of(target.getsockname()[1])
                sender.sendto(frame + b"ping", (host, port))  # the socket is on all addresses
                data, outside = target.recvfrom(100)
                target.sendto(data[::-1], outside)
                self.assertEqual(sender.recv(100), frame + b"gnip")

    @unittest.skipUnless(shutil.which("haproxy"), "no haproxy")
    def test_two_instances_behind_haproxy(self):
        served, door, port = [], self.listen(), self.echo()
        handler = hooked(authorize=lambda handler, _: not served.append(handler.server))
        servers = [self.serve(handler, proxy_from=["127.0.0.1"], clients=["127.0.0.2"])
                   for _ in range(2)]
        path = self.file((HAPROXY % (door.fileno(), *(
            server.server_address[1] for server in servers))).encode())
        with self.logged("DEBUG") as lines:
            process = subprocess.Popen(
                ["haproxy", "-db", "-f", path], pass_fds=[door.fileno()],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.addCleanup(lambda: process.kill() or process.wait(PATIENCE))
            wait_until(lambda: sum("end=client-left" in line for line in lines) > 3)  # checks
            for number in range(8):
                if number == 4:
                    self.stop(servers[0])
                client = self.client(door.getsockname()[1], "127.0.0.2").greet()
                self.assertEqual(client.ask(port), Reply.SUCCEEDED)
                client.close()
            self.assertEqual((set(served[:4]), served[4:]), (set(servers), servers[1:] * 4))
            self.stop(servers[1])
        self.assertEqual(re.findall(r"session client=(.+):\d+ .* command=C", "\n".join(lines)),
                         ["127.0.0.2"] * 8)

    def test_loopback_of_a_balancer_elsewhere_is_not_ours(self):
        class Server(socks5.Socks5Server):
            def get_request(self):
                return super().get_request()[0], ("192.0.2.50", 5)

        server = self.serve(kind=Server, proxy_from=["127.0.0.1"])
        client = self.behind(server, header_for("127.0.0.1")).greet()
        self.assertEqual(client.ask(9), Reply.NOT_ALLOWED)


# ---- command line ------------------------------------------------------------------------

SEES_WORKERS = hasattr(os, "fork") and os.path.exists(
    "/proc/self/task/%d/children" % os.getpid())

USAGE_ERRORS = [  # options, and a part of the message
    ("65536", "'65536' is not a port from 0 to 65535 (an address: -b ADDRESS)"), ("-1", "-1"),
    ("1 2", "2"), ("0.0.0.0", "'0.0.0.0' is not a port"), ("stray", "'stray' is not a port"),
    ("--no-such", "--no-such"), ("--alow *:25", "--alow"), ("--ope", "--ope"),
    ("-q -v", "not allowed with"), ("--handshake 5", "--handshake"),
    ("-b localhost:80", "the port is an argument of its own: socks5.py -b localhost 80"),
    ("-b [::1]:80", "the port is an argument of its own: socks5.py -b ::1 80"),
    ("-b ./s 1080", "./s is a path: do not give a port"), ("-b ./s --mode rw", "argument --mode: "),
    ("--client x", "--client: "), ("--deny a:", "deny a:: not [USER@]HOST["),
    ("--proxy-from 10.0.0.1/8 --open", "--proxy-from: 10.0.0.1/8 has host bits set"),
    ("--commands connect,associate", "--commands: known are connect, udp, bind"),
    ("--udp-ports 2-1", "--udp-ports: PORT or FIRST-LAST, not '2-1'"),
    ("--udp-ports 0-65536", "not '0-65536'"), ("--udp-ports x", "PORT or FIRST-LAST, not 'x'"),
    ("--source foo", "--source: not an IP address: foo"), ("--source 192.0.2.1", "--source 192."),
    ("--drain -1", "--drain: 0 or more"), ("--drain nan", "--drain: 0 or more"),
    ("--linger nan", "--linger: 0.001 or more, not nan"), ("--idle-timeout x", "--idle-timeout"),
    ("--workers 0", "--workers: 1 or more"), ("--workers many", "argument --workers: "),
    ("--max-sessions 0", "--max-sessions: 1 or more, not 0"), ("--max-per-user 1.5", "-per-user: "),
    ("--users {bad}", "{bad}, line 2: "), ("--users {here}", "Is a directory"),
    ("--users ''", "No such file"), ("--users none/such", "none/such: No such file"),
    ("@{here}", "Is a directory"), ("@none/such", "none/such")]


class Captured(BaseException):
    """The end of main(). It is no Exception, so that nothing catches it."""


class Service:
    """A `socks5.py` that runs: its process, its port, and what it has printed."""

    def __init__(self, process, file, count=1):
        self.process, self.file, self.count = process, file, count

    def text(self):
        return os.pread(self.file.fileno(), MEBIBYTE, 0).decode()  # leaves the writers' offset

    def wait_for(self, what, times=1):
        """Wait until `what` has been printed so many times; return its last line."""
        try:
            wait_until(lambda: self.text().count(what) >= times)
        except AssertionError:
            raise AssertionError("waited for %r in:\n%s" % (what, self.text())) from None
        return [line for line in self.text().splitlines() if what in line][-1]

    @property
    def port(self):
        return int(re.search(r" port (\d+) ", self.wait_for("Serving SOCKS5")).group(1))

    def workers(self):
        return children(self.process.pid)

    def everybody(self):
        return [self.process.pid] + (self.workers() if self.count > 1 else [])

    def end(self, *numbers):
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


class ServiceTestCase(DoorTestCase):
    """Tests of main() in this process, as far as that is possible, and in others."""

    def main(self, *options):
        """Run main(), which must end before it listens; return status, stdout and stderr."""
        with mock.patch("signal.signal"), mock.patch("sys.setswitchinterval"), \
                mock.patch("threading.stack_size"), mock.patch("logging.basicConfig"), \
                mock.patch("resource.setrlimit"), mock.patch.object(
                    socket.socket, "listen", side_effect=AssertionError("this is not refused")), \
                contextlib.redirect_stdout(io.StringIO()) as out, \
                contextlib.redirect_stderr(io.StringIO()) as err:
            with self.assertRaises(SystemExit) as end:
                socks5.main(list(options))
            status = end.exception.code
            if isinstance(status, str):  # sys.exit() prints it
                status = print(status, file=sys.stderr) or 1
        return status, out.getvalue(), err.getvalue()

    def call_of(self, name, *options):
        """Return the arguments with which main() calls `name` for `options`; it ends there."""
        with mock.patch(name, autospec=True, side_effect=Captured) as called, \
                self.assertRaises(Captured):
            self.main(*options)
        return called.call_args

    def settings_of(self, *options):
        """Return the arguments, which are valid, of the Settings that main() makes of `options`."""
        settings = self.call_of("socks5.Settings", *options)[1]
        socks5.Settings(**settings)
        return settings

    def parser(self):
        return self.call_of("argparse.ArgumentParser.parse_known_args")[0][0]

    def check_usage_error(self, *options):
        """Check that `options` are refused in two lines; return the message."""
        status, out, err = self.main(*options)
        self.assertEqual((status, out), (2, ""), err)
        found = re.match(r"socks5\.py: error: (.+)\nsee socks5\.py --help\n$", err)
        self.assertTrue(found, err)
        return found.group(1)

    def service(self, *options, workers=1, before="", output=None, **settings):
        """Return a `socks5.py` on a free port with short pauses; see `command`."""
        file = io.FileIO(os.dup(output) if output else os.open(self.file(b""), os.O_RDWR), "r+")
        self.addCleanup(file.close)
        process = self.start(*command(before), "--workers", str(workers), *options, "0",
                             **dict({"stdout": file, "stderr": file}, **settings))
        service = Service(process, file, workers)
        if not output:
            service.wait_for("Serving SOCKS5")  # signals are obeyed from then on
        if workers == 2:
            wait_until(lambda: len(service.workers()) == 2)
        return service

    def refuses(self, port):
        if os.path.exists("/proc/net/tcp"):  # or else each look keeps a queue from being empty
            with open("/proc/net/tcp") as file:
                return ":%04X 00000000:0000 0A " % port not in file.read()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) != 0

    def suspend(self, processes):
        """Suspend `processes`: a thread that still runs could accept a client."""
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        wait_until(lambda: {process_stat("%d/task/%s" % (process, thread))[0]
                            for process in processes
                            for thread in os.listdir("/proc/%d/task" % process)} == {"T"})


class CommandLineTest(ServiceTestCase):
    def test_the_plain_command(self):
        for option in "--version", "--help":
            status, out, err = self.main(option)
            self.assertEqual((status, err), (0, ""))
            self.assertIn("socks5.py", out)
        process = self.start("socks5.py", "--drain", "0", "0", env=dict(  # systemd means another
            os.environ, TZ="Asia/Tokyo", LISTEN_FDS="1", LISTEN_PID="1", NOTIFY_SOCKET="/none"))
        client = self.client(self.port(process)).greet()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual(read_all(client), (b"", "end"))
        self.assertEqual((process.returncode, out), (0, "Shutting down.\n"))
        moment, = re.fullmatch(
            r"(.{19})\.\d{3}Z INFO session client=.* end=server-closed\n", err).groups()
        ago = time.time() - calendar.timegm(time.strptime(moment, "%Y-%m-%dT%H:%M:%S"))
        self.assertLess(abs(ago), 600)

    @LINUX_ONLY
    def test_file_of_options_limits_one_output_and_no_fork(self):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        address, url = ("::1", "[::1]") if has_ipv6() else ("127.0.0.1",) * 2
        service = self.service(
            "@" + self.file(b"\n--deny 127.0.0.0/8 --workers 2\n"), "--drain", "0",
            "-b", address, descriptors=(64, hard), before="del os.fork")
        client = self.own(Client.to((address, service.port))).greet()
        self.assertEqual(client.ask(1), Reply.NOT_ALLOWED)
        with open("/proc/%d/limits" % service.process.pid) as file:
            self.assertRegex(file.read(), r"Max open files +%d +%d " % (hard, hard))
        self.assertEqual(service.end(signal.SIGINT), 0)
        said = service.text().splitlines()  # stdout and stderr are one file: each line once
        self.assertRegex(said[0], " WARNING this system has no fork.*: serving with one worker$")
        self.assertRegex(said[1], r"^Serving SOCKS5 on %s port (\d+) "
                         r"\(socks5h://%s:\1\) \.\.\.$" % (address, re.escape(url)))
        self.assertRegex("\n".join(said[2:]), r"^Shutting down\.\n.+Z INFO session .+$")

    def test_address_that_cannot_be_listened_on(self):
        self.patch(mock.patch.multiple(socks5, LISTEN_PATIENCE=0.1, TICK=0.01))
        taken, start = self.listen().getsockname()[1], time.monotonic()
        for address, port in (("127.0.0.1", taken), ("192.0.2.1", 0), ("2001:db8::1", 0),
                              ("nobody.invalid", 0), ("\u00fc..x", 0), ("\udcff", 0)):
            with self.subTest(ascii(address)):
                status, out, err = self.main("--open", "-b", address, str(port))
                self.assertEqual((status, out), (1, ""))
                self.assertRegex(err, r"^socks5\.py: cannot listen on %s port %d: .+\n$" % (
                    re.escape(ascii(address)[1:-1]), port))
                self.assertGreater(time.monotonic() - start, 0.1)  # of the first one
        self.assertIn("(a Unix socket needs a slash: ./NAME)", self.main("--open", "-b", "s.x")[2])
        self.assertIn("socks5.py: cannot listen on %s: " % HERE, self.main("-b", HERE)[2])

    def test_address_that_is_free_a_moment_later(self):
        first = self.serve()
        client = self.client(first).greet()
        self.stop(first)
        client.close()  # the server has closed first: the system keeps its port for a minute
        taken = self.own(socket.socket())
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(first.server_address)
        taken.listen(1)
        path = self.folder()
        lock = os.open(path, os.O_RDONLY)  # another server starts there
        self.addCleanup(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        for free, options in [(taken.close, [str(first.server_address[1])]),
                              (lambda: fcntl.flock(lock, fcntl.LOCK_UN), ["-b", path + "/s"])]:
            with mock.patch("time.sleep", lambda seconds, free=free: free()), \
                    self.assertRaisesRegex(AssertionError, "this is not refused"):
                self.main(*options)

    def test_open_proxy_is_refused(self):
        for address in ("0.0.0.0", "::", "192.0.2.1", "localhost.example", "my.localhost", ""):
            with self.subTest(address):
                self.assertIn("refusing to listen on %s without access control: add --users, "
                              "--client or --open" % address,
                              self.check_usage_error("-b", address, "0"))
        self.assertIn("refusing", self.check_usage_error("--proxy-from", "127.0.0.1", "0"))
        for mode in "0666", "0602", "0604":
            self.assertIn("refusing", self.check_usage_error("-b", "./s", "--mode", mode))
        users = self.file(b"alice:secret")
        for options in ([], ["-b", "localhost"], ["-b", "127.0.0.2"], ["-b", "::1"],
                        ["-b", "0.0.0.0", "--open"], ["-b", "::", "--users", users],
                        ["-b", "0.0.0.0", "--client", "10.0.0.0/8"], ["-b", "./s"]):
            with self.subTest(options):
                self.settings_of(*options)

    def test_options_become_settings(self):
        defaults = dict(socks5.DEFAULTS, rules=[], clients=[], proxy_from=[])
        self.assertEqual(self.settings_of(), defaults)
        self.assertEqual(self.settings_of(
            *shlex.split(
                "-b ::1 --connect-timeout 1 --handshake-timeout 2 --idle-timeout 3 --linger 4.5 "
                "--allow a:1 --deny b --allow alice@c --client 10.0.0.0/8 --client ::1 "
                "--max-sessions 6 --max-per-client 7 --max-per-user 1 --bind-timeout 8 "
                "--udp-timeout 9 --udp-ports 10-12 --udp-advertise 192.0.2.1 --commands udp,bind "
                "--source 127.0.0.2 --proxy-from 10.0.0.1"),
            "--users", self.file(b"alice:secret"), "5"), dict(
                defaults, users={"alice": "secret"}, commands=["udp", "bind"],
                rules=["allow a:1", "deny b", "allow alice@c"], clients=["10.0.0.0/8", "::1"],
                max_sessions=6, max_per_client=7, max_per_user=1, connect_timeout=1,
                handshake_timeout=2, idle_timeout=3, linger=4.5, bind_timeout=8, udp_timeout=9,
                udp_ports=range(10, 13), udp_advertise="192.0.2.1", source="127.0.0.2",
                proxy_from=["10.0.0.1"]))

    def test_usage_errors(self):
        bad = self.file(b"alice:secret\nhunter2\n")
        for line, message in USAGE_ERRORS:
            options = [word.format(bad=bad, here=HERE) for word in shlex.split(line)]
            with self.subTest(line):
                said = self.check_usage_error(*options)
                self.assertIn(message.format(bad=bad), said)
                self.assertNotIn("hunter2", said)
        with mock.patch.object(socks5, "UNIX_FAMILY", None):
            self.assertEqual(self.check_usage_error("-b", "./s"),
                             "./s: Unix sockets are not available on this system")
        with mock.patch.object(socks5, "IS_LINUX", False):  # or else it would fail open
            self.assertIn("this system does not tell who uses a Unix socket",
                          self.check_usage_error("-b", "./s", "--deny", "bob@*"))

    def test_warnings(self):
        def getpwnam(name, real=pwd and pwd.getpwnam):
            return real(ME if name == "toor" else name)

        users, public = self.file(b"alice:secret\n", 0o640), self.file(b"alice:secret\n", 0o604)
        rows = [(["--users", users], None),
                (["--users", public], "%s is world-readable: chmod o-r %s" % (public, public)),
                (["--allow", "alice@*"], "allow:alice@*: no such user"),
                (["--deny", "alice@*"], "deny:alice@*: no such user"),
                (["--users", users, "--allow", "bob@*"], "allow:bob@*: no such user"),
                (["--users", users, "--deny", "Alice@*"], "deny:Alice@*: no such user"),
                (["--users", users, "--deny", "alice@::1:443"], "one port, write [::1]:443"),
                (["--deny", "::1:80"], "for one port, write [::1]:80"), (["--deny", "::1"], None),
                (["--deny", "[::1]:80"], None), (["--deny", "2001:db8::443"], None),
                (["--deny", "127.0.0.1:80"], None), (["--deny", "a.example:80"], None)]
        rows = [(options + ["0"], warning) for options, warning in rows]
        if hasattr(socket, "SO_PEERCRED"):  # where the kernel names the peer
            path, known = self.folder(), "deny:%s@*: this account is known as " + ME
            rows += [(["-b", path + "/s", "--deny", user + "@*"], warning and warning % user)
                     for user, warning in (
                         ("nosuch", "deny:%s@*: no such account"), (ME, None),
                         (str(NAMELESS), None), ("toor", known), (str(os.getuid()), known))]
        with mock.patch("pwd.getpwnam", getpwnam):
            for options, warning in rows:
                with self.subTest(options), self.logged("WARNING") as lines:
                    with self.assertRaisesRegex(AssertionError, "this is not refused"):
                        self.main(*options)
                    self.assertEqual([warning in line for line in lines], [True] * bool(warning))

    def test_options_from_a_file(self):
        folder, inner = self.folder(), self.file(b"--linger 9")
        users = folder + "/my #users"
        self.write(users, b"alice:secret")
        for content, settings in (
                ("# a comment\n\n--deny '10.0.0.0/8'  # mine\n--linger 3",
                 {"rules": ["deny 10.0.0.0/8"], "linger": 3}),
                ("\t#--linger 2\n--deny\n b", {"rules": ["deny b"]}),
                ("--deny\nb 0\n--linger 2", {"rules": ["deny b"], "linger": 2}),
                ("--users '%s' # mine" % users, {"users": {"alice": "secret"}}),
                ("--users " + re.sub("[ #]", r"\\\g<0>", users), {"users": {"alice": "secret"}}),
                ("--deny b\n@%s\n--deny c" % inner,
                 {"rules": ["deny b", "deny c"], "linger": 9})):
            with self.subTest(content):
                made = self.settings_of("@" + self.file(content.encode()))
                self.assertEqual({name: made[name] for name in settings}, settings)
        path = self.file(b"")
        for content, said in ((b"--deny 'x", "No closing quotation"), (b"\xff", ""),
                              (b"--linger 0", "--linger: 0.001 or more"),
                              (b"--alow *:25", "--alow"), (b"@" + os.fsencode(path), "")):
            self.write(path, content)
            with self.subTest(content):
                self.assertIn(said, self.check_usage_error("@" + path))

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full to be a full disk")
    def test_full_disk(self):
        path = self.folder()
        with open("/dev/full", "w") as full:
            process = self.start(*command(), "-b", path + "/s", stdout=full, stderr=full)
        for _ in range(3):  # at the end of a session, it cannot be logged
            with Client(socket.AF_UNIX) as client:
                wait_until(lambda client=client: client.connect_ex(path + "/s") == 0)
                client.say("05 01 02")
                client.hear("05 ff")
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 0)

    @unittest.skipUnless(os.path.isdir("/proc/self"), "no /proc to read a process's time from")
    def test_descriptors_exhausted_and_recovered(self):
        service = self.service("-q", "--handshake-timeout", str(2 * PATIENCE),
                               descriptors=(38, 38))
        tunnels = [self.tunnel(service.port) for _ in range(9)]  # each takes no more than two
        clients = [self.client(service.port) for _ in range(40)]
        service.wait_for("WARNING not accepting: Too many open files")
        self.assertLess(cpu_seconds(service.process), 0.07)
        queued = clients.pop()
        for client in (*clients, *sum(tunnels, ())):
            client.close()
        queued.greet()
        self.client(service.port).greet()


# ---- workers -----------------------------------------------------------------------------

@unittest.skipUnless(SEES_WORKERS, "no fork, or no /proc to see workers in")
class WorkersTest(ServiceTestCase):
    def start_workers(self, *options, **settings):
        service = self.service("-q", *options, workers=2, **settings)
        return service, service.workers()

    def replaced(self, service, workers):  # by others
        return len(service.workers()) == 2 and not set(service.workers()) & set(workers)

    def test_workers_that_die_or_cannot_be_started(self):
        service, workers = self.start_workers(preexec_fn=lambda: (  # as a parent may have it
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)), before=(  # waits until there are two
            "def fork(failures=[0, 1, 1], real=os.fork):\n"
            "    print('fork', socks5.time.monotonic(), flush=True)\n"
            "    if failures and failures.pop(0):\n"
            "        raise BlockingIOError(11, 'full')\n"
            "    return real()\n"
            "os.fork = fork\n"))
        self.assertRegex(service.wait_for("WARNING"), " cannot start a worker: full")
        client, target = self.tunnel(service.port)
        self.check_one_way(target, client)
        self.suspend(workers)
        queued = [self.client(service.port) for _ in range(20)]
        for each in queued:
            each.say("05 01 00")
        killed = time.monotonic()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        self.assertEqual([read_all(client), read_all(target)], [(b"", "reset")] * 2)
        for each in queued:
            each.hear("05 00")
        for worker in workers:
            self.assertIn(" signal=9 exit=0",
                          service.wait_for("WARNING worker died pid=%d " % worker))
        wait_until(lambda: self.replaced(service, workers))
        moments = list(map(float, re.findall("fork (.+)", service.text())))
        for soon, late in zip([*moments[1:3], killed], moments[2:5]):
            self.assertGreater(late - soon, 0.2)  # RESTART_PAUSE, but for what a fork takes

    def test_workers_that_are_told_to_drain(self):
        echo, (service, workers) = self.echo(), self.start_workers(
            "--drain", str(2 * PATIENCE), before=(
                "def waitpid(*args, others=[1], real=os.waitpid):\n"  # a child that is no worker
                "    return (others.pop(), 0) if others else real(*args)\n"
                "os.waitpid = waitpid\n"))
        client, target = self.tunnel(service.port)
        for worker in workers:
            for number in signal.SIGTERM, signal.SIGINT:  # for the parent only
                os.kill(worker, number)
            os.kill(worker, signal.SIGUSR2)
        wait_until(lambda: len(set(service.workers()) - set(workers)) == 1)
        self.check_relay(client, target)  # its worker has not ended, but accepts nobody
        others = [self.client(service.port).greet() for _ in range(9)]
        client.close()
        target.close()
        wait_until(lambda: self.replaced(service, workers))
        self.check_echo(others[0], echo)
        for said in "Shutting down", "service failed":
            self.assertNotIn(said, service.text())

    def test_worker_that_is_told_to_drain_before_it_has_begun(self):
        service, _ = self.start_workers(before=(
            "def fork(told=[], real=os.fork):\n"
            "    child = real()\n"
            "    if child and not told:\n"
            "        told.append(os.kill(child, signal.SIGUSR2))\n"
            "    return child\n"
            "os.fork = fork\n"))
        service.wait_for("WARNING worker ended pid=")

    def test_workers_end_with_a_parent_that_is_killed(self):
        service, workers = self.start_workers("--drain", "0.5")
        self.addCleanup(subprocess.call, "kill -9 %d %d 2>/dev/null" % tuple(workers), shell=True)
        client, target = self.tunnel(service.port)
        start = time.monotonic()
        service.process.kill()
        self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))
        self.assertGreater(time.monotonic() - start, 0.5)
        wait_until(lambda: not any(map(self.lives, workers)))

    def lives(self, process):
        """Return whether `process` has not ended, even if nobody has asked how it ended."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return process_stat(process)[0] != "Z"
        return False

    def test_worker_that_does_not_end_is_killed(self):
        service, workers = self.start_workers(
            "--drain", "0", before="socks5.LAST_RESORT = 0.2")
        self.suspend(workers)
        self.assertEqual(service.end(signal.SIGTERM), 0)
        wait_until(lambda: not any(map(self.lives, workers)))

    @in_each_mode
    def test_terminal_that_interrupts_once_and_is_lost(self, workers):
        def prepare():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.close(os.open(os.ttyname(0), os.O_RDWR))  # which makes it control the session

        def interrupt():
            ours.write(b"\3")  # Ctrl-C, which goes to all processes

        def hang_up():
            ours.close()  # SIGHUP stops it, and is no reload
            for each in service.everybody()[1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGHUP)

        rows = (interrupt, hang_up), (hang_up, lambda: service.end(signal.SIGINT))
        for first, second in rows:
            ours, theirs = [io.FileIO(end, "r+") for end in os.openpty()]
            self.addCleanup(ours.close)
            service = self.service("-q", "--drain", str(2 * PATIENCE), workers=workers,
                                   stdin=theirs, start_new_session=True, preexec_fn=prepare)
            theirs.close()
            client, target = self.tunnel(service.port)
            first()
            service.wait_for("Shutting down.")
            wait_until(lambda service=service: self.refuses(service.port))
            self.check_relay(client, target)
            second()
            self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))
            self.assertEqual(service.end(), 0)
            self.assertRegex(service.text(), r"^Serving .+\nShutting down\.\n$")

    @unittest.skipUnless(hasattr(os, "sched_getaffinity"), "no choice of CPUs here")
    def test_auto_is_a_worker_for_each_cpu(self):
        has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()  # or else nothing is gained by it
        for count in range(1, min(2, len(os.sched_getaffinity(0))) + 1):
            usable = sorted(os.sched_getaffinity(0))[:count]
            service = self.service(
                workers="auto", preexec_fn=lambda cpus=usable: os.sched_setaffinity(0, cpus))
            wait_until(lambda number=(0, 2)[count - 1], service=service: (
                len(service.workers()) == number))
            wait_until(lambda usable=usable, service=service: not has_gil or usable == sorted(
                cpu for each in service.workers() or [service.process.pid]
                for cpu in os.sched_getaffinity(each)))
            self.client(service.port).greet()


# ---- signals -----------------------------------------------------------------------------

class SignalsTest(ServiceTestCase):
    @in_each_mode
    def test_sessions_may_end_by_themselves_and_stopping_needs_no_thread(self, workers):
        full = self.file(b"")
        service = self.service(
            "-q", "--drain", str(2 * PATIENCE), workers=workers, preexec_fn=lambda: (
                signal.signal(signal.SIGINT, signal.SIG_IGN)), before=(  # as nohup has it
                "def start(thread, real=threading.Thread.start):\n"
                "    if os.path.getsize(%r):\n"
                "        raise RuntimeError(\"can't start new thread\")\n"
                "    real(thread)\n"
                "def refuse(*args):\n"
                "    raise OSError(22, 'Invalid argument')\n"
                "def interrupted(function):\n"  # by signals while it starts
                "    return lambda *args: (os.kill(os.getpid(), signal.SIGHUP), os.kill(\n"
                "        os.getpid(), signal.SIGUSR1), function(*args))[2]\n"
                "parser = socks5.argparse.ArgumentParser\n"
                "parser.parse_known_args = interrupted(parser.parse_known_args)\n"
                "socket.socket.listen = interrupted(socket.socket.listen)\n"
                "threading.Thread.start = start\n"
                "os.sched_setaffinity = os.sched_setscheduler = refuse\n") % full)
        client, target = self.tunnel(service.port)
        everybody = service.everybody()
        for process in everybody:
            for number in signal.SIGINT, signal.SIGCHLD:  # which do nothing here
                os.kill(process, number)
        self.reports(service)  # so they have been obeyed
        self.check_relay(client, target)  # both of its threads run
        self.assertEqual(service.everybody(), everybody)
        self.write(full, b"1")
        service.process.terminate()
        service.wait_for("Shutting down.")
        wait_until(lambda: self.refuses(service.port))
        service.process.send_signal(signal.SIGCHLD)
        self.check_relay(client, target)
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(read_all(target), (b"", "end"))
        target.sendall(b"late")
        target.close()
        self.assertEqual(read_all(client), (b"late", "end"))
        self.assertEqual(service.end(), 0)
        self.assertNotIn("ERROR", service.text().replace("ERROR worker failed error=NoThread", ""))

    @in_each_mode
    def test_second_signal_ends_at_once(self, workers):
        service = self.service("--drain", str(2 * PATIENCE), workers=workers, before=(
            "def kill(process, number, lost=[0, 0, 1, 1], real=os.kill):\n"
            "    if not (lost and lost.pop(0)):\n"  # two signals to a worker may become one
            "        real(process, number)\n"
            "os.kill = kill\n"))
        client, target = self.tunnel(service.port)
        for each in service.everybody()[1:]:  # systemd tells all of them
            os.kill(each, signal.SIGTERM)
        start = time.monotonic()
        service.process.terminate()
        if workers == 1:  # otherwise both signals come at once
            service.wait_for("Shutting down.")
            self.check_relay(client, target)
        self.assertEqual(service.end(signal.SIGINT), 0)
        self.assertLess(time.monotonic() - start, socks5.LAST_RESORT)
        self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))
        self.assertEqual(service.text().count(" end=server-closed"), 1)

    @in_each_mode
    def test_clients_in_the_queue_at_a_stop_are_served(self, workers):
        echo = self.echo()
        service = self.service("-q", "--drain", str(2 * PATIENCE), workers=workers)
        everybody = service.everybody()
        self.suspend(everybody)
        clients = [self.client(service.port) for _ in range(50)]
        for client in clients:
            client.sendall(octets("05 01 00 05 01 00 01 7f 00 00 01") + port_of(echo) + b"ping")
            client.shutdown(socket.SHUT_WR)
        service.process.terminate()
        for each in everybody:
            os.kill(each, signal.SIGCONT)
        for client in clients:
            said, end = read_all(client)
            self.assertEqual((said[:4] + said[-4:], end), (b"\5\0\5\0ping", "end"))
        self.assertEqual(service.end(), 0)

    @LINUX_ONLY
    def test_queue_that_is_empty_at_a_stop_takes_nobody(self):
        service = self.service(before=(
            "socks5.Socks5Server.handle_timeout = lambda server: (\n"
            "    print('empty', flush=True), socks5.time.sleep(%d))\n") % PATIENCE)
        service.process.terminate()
        service.wait_for("empty")
        with socket.socket() as sock, self.assertRaises(socket.timeout):
            sock.settimeout(0.2)
            sock.connect(("127.0.0.1", service.port))
        self.assertEqual(service.end(signal.SIGTERM), 0)

    @in_each_mode
    def test_reload_and_report_in_mid_traffic(self, workers):
        users, options = self.file(b"alice:one\nbob:one"), self.file(b"")
        rules = b"-b 0.0.0.0\n--users %b\n--deny bob@10.0.0.0/8" % os.fsencode(users)
        self.write(options, rules)
        service = self.service("-q", "@" + options, workers=workers,
                               before="socks5.Socks5RequestHandler.login_pause = 0")
        listener = self.listen()
        self.assertNotIn(self.denied, self.answers(service, "bob", "one"))
        client = self.client(service.port).log_in("alice", "one")
        self.assertEqual(client.ask(listener.getsockname()[1]), Reply.SUCCEEDED)
        target = self.own(listener.accept()[0])
        lines = self.reports(service)
        self.assertEqual([lines.count(what) for what in (
            "NOTICE live client=%s:%d " % client.getsockname(), " live=1", " live=0")],
            [1, 1, workers - 1])
        self.write(users, b"alice:two")
        self.write(options, rules + b"\n--deny *")
        self.reload(service, "NOTICE settings reloaded")
        service.wait_for("WARNING deny:bob@10.0.0.0/8: no such user")
        self.assertEqual(self.answers(service, "bob", "one"), {octets("05 02 01 01")})
        for path, content, why in (
                (users, b"hunter2", "line 1"), (options, rules + b":", "HOST"),
                (options, b"--help", ""), (options, b"--deny 127.0.0.1 :1", "unrecognized"),
                (options, b"@" + os.fsencode(options), ""),  # it reads itself
                (options, b"", "refusing to listen on 0.0.0.0"))[:8 - 2 * workers]:
            with self.subTest(content):
                self.write(path, content)
                self.assertIn(why, self.reload(
                    service, "WARNING reload failed, keeping the current settings: "))
                self.assertEqual(self.answers(service, "alice", "two"), {self.denied})
                self.write(users, b"alice:two")
        self.assertNotIn("hunter2", service.text())
        self.check_relay(client, target)

    def reports(self, service):
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
        self.reports(service)  # so the workers, which obey in order, have read them too
        return line

    def answers(self, service, name, password):
        found = set()
        for _ in range(3 * service.count):
            with self.client(service.port) as client:
                client.sendall(b"\5\1\2\1%c%b%c%b\5\1\0\1\x7f\0\0\1\0\0" % (
                    len(name), name.encode(), len(password), password.encode()))
                client.shutdown(socket.SHUT_WR)
                found.add(read_all(client)[0][:6])
        return found

    def test_log_that_nobody_reads(self):
        ours, theirs = os.pipe()
        for descriptor in ours, theirs:
            self.addCleanup(os.close, descriptor)
        service, text = self.service("--drain", "0.2", output=theirs, before=(
            "socks5.Socks5RequestHandler.authorize = lambda *_: (\n"
            "    socks5.log.info('x' * 65536) or True)\n")), bytearray()

        def fill():  # its other writers are idle: they share its mode
            os.set_blocking(theirs, False)
            for size in 4096, 1:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(theirs, b"\n" * size)
            os.set_blocking(theirs, True)

        def is_complete():
            with contextlib.suppress(BlockingIOError):
                for piece in iter(lambda: os.read(ours, 65536), b""):
                    text.extend(piece)
            dropped = sum(map(int, re.findall(b"log lines dropped count=(\\d+)", text)))
            return dropped and dropped + text.count(b" session client=") == 25

        with open(ours, closefd=False) as file:
            port = int(re.search(r" port (\d+) ", file.readline()).group(1))
        fill()
        for _ in range(20):
            self.assertEqual(self.talk(port, "05 01 02"), octets("05 ff"))
        os.set_blocking(ours, False)
        is_complete()
        for _ in range(5):
            self.talk(port, "05 01 02")  # the first line tells what has been dropped
        wait_until(is_complete)
        self.assertEqual(text.count(b"\nWARNING log lines dropped count="), 1)
        fill()
        os.read(ours, 4096)  # now there is room for a piece of a line
        client, target = self.tunnel(port)
        self.assertEqual(service.end(signal.SIGTERM), 0)
        self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))

    def test_reload_leaves_the_switch_interval(self):
        read_settings = mock.Mock(side_effect=[None, ValueError("x")])
        service = socks5.Service(mock.Mock(), [], 0, read_settings)
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(0.5)
        for result in True, False:
            self.assertEqual((service.reload(), sys.getswitchinterval()), (result, 0.5))


# ---- floods ------------------------------------------------------------------------------

GREETINGS = ["05 01 00", "05 01 02", "05 02 00 02", "05 03 00 01 02", "05 ff 00 02" + " 80" * 253]
LOGINS = ["01 05 61 6c 69 63 65 06 73 65 63 72 65 74", "01 05 61 6c 69 63 65 01 78", "01 00 00"]
HOSTS = ["01 7f 00 00 01", "04" + " 00" * 10 + " ff ff 7f 00 00 01",  # by literal, and by name
         "03 09 6c 6f 63 61 6c 68 6f 73 74", "03 04 62 c3 bc 62",
         "03 09 31 32 37 2e 30 2e 30 2e 31"]
REPLIED = (br"(?:\x05\x00\x00(?:\x01.{6}|\x04.{18}).*"  # more after "succeeded" only
           br"|\x05[\x01-\x08]\x00\x01.{6})?")
OTHERS = br"(?s)|\0\x5b\0{6}|HTTP/1\.0 400 .+|\x05\xff"  # SOCKS4, HTTP
ANSWERS = {  # all that a client can be told to the end, by whether there are users
    False: re.compile(OTHERS + br"|\x05\x00%b" % REPLIED),
    True: re.compile(OTHERS + br"|\x05\x02(?:\x01\x01|\x01\x00%b)?" % REPLIED)}


def noise(rng, count):
    return bytes(rng.randrange(256) for _ in range(count))


def mutated(rng, sent):
    start = rng.randrange(len(sent) + 1)
    end = start + rng.choice([1, 1, 1, 2, 4, 16, 255])
    head, piece, rest = sent[:start], sent[start:end], sent[end:]
    return head + rng.choice([
        bytes(byte ^ 1 << rng.randrange(8) for byte in piece) + rest,
        noise(rng, len(piece)) + rest, noise(rng, rng.randrange(1, 9)) + piece + rest, rest, b"",
        bytes([rng.choice([0, 1, 2, 3, 4, 5, 6, 127, 128, 254, 255])]) + rest, piece * 2 + rest])


def conversation(seed, number, port):
    """Return a random conversation: with which server, the pieces to send, and how to leave."""
    rng = random.Random("%d %d" % (seed, number))
    users = rng.random() < 0.5
    login = users != (rng.random() < 0.05)
    frames = [octets(rng.choice(GREETINGS[int(login):])),
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
    cuts = sorted(rng.randrange(len(sent) + 1) for _ in range(rng.randrange(5)))
    pieces = [sent[start:end] for start, end in zip([0] + cuts, cuts + [len(sent)])]
    return users, pieces, rng.choices(["half-close", "close", "reset"], [51, 29, 20])[0]


class FuzzTest(TestCase):
    """Conversations of all kinds; $FUZZ is how many, $SEED repeats those of another run."""

    count = int(os.environ.get("FUZZ") or 500)
    seed = int(os.environ.get("SEED") or random.randrange(10**9))

    def converse(self, servers, number):
        """Have a conversation, and check the answer unless the client leaves before."""
        users, pieces, leave = conversation(self.seed, number, self.port)
        with Client.to(servers[users].server_address) as client:
            self.begun["%s:%d" % client.getsockname()] += 1
            with contextlib.suppress(OSError):  # the server may have closed the connection
                for piece in pieces:
                    client.sendall(piece)
                if leave == "half-close":
                    client.shutdown(socket.SHUT_WR)
            if leave == "reset":
                reset(client)
            if leave == "half-close":
                answer, end = read_all(client)
                if end == "end" and not ANSWERS[users].fullmatch(answer) or (
                        answer.startswith(b"\5\2\1\0")
                        and octets(LOGINS[0]) not in b"".join(pieces)):
                    raise AssertionError("%s gets %s" % (pieces, answer.hex()))

    def test_random_conversations(self):
        def connect(session, destination):  # to no other program of this host
            if destination.port != self.port:
                raise OSError(errno.ECONNREFUSED, "not the test's")
            return socks5.Socks5RequestHandler.connect(session, destination)

        self.port, self.begun = self.echo(), collections.Counter()  # conversations, by client
        self.patch(mock.patch.multiple(socks5, REFUSAL_TIMEOUT=0.2, SWEEP_INTERVAL=0.05))
        self.patch(resolver(self.dead(), ("127.0.0.1", self.port)))
        with self.subTest(SEED=self.seed, FUZZ=self.count), self.logged("DEBUG") as lines, \
                contextlib.redirect_stderr(io.StringIO()) as stderr:
            servers = [self.serve(
                hooked(connect=connect), users=users, rules=["allow 127.0.0.0/8"], linger=1,
                handshake_timeout=1, connect_timeout=1, idle_timeout=1, bind_timeout=0.5,
                udp_timeout=0.5) for users in (None, USERS)]
            for number in range(self.count):
                self.converse(servers, number)
            for server, greet in zip(servers, (Client.greet, Client.log_in)):
                with self.client(server) as client:  # all others were in the queue before it
                    self.begun["%s:%d" % client.getsockname()] += 1
                    self.check_echo(greet(client), self.port)
            for server in servers:
                self.assertTrue(server.drain(PATIENCE))
                self.stop(server)
            self.assertEqual([line for line in lines if "failed " in line.partition("=")[0]
                              and not re.match("(?:login|attempt) failed", line)], [])
            ended = collections.Counter(fields(line)["client"] for line in lines
                                        if line.startswith("session "))
            self.assertEqual(ended, self.begun)
            self.assertEqual(stderr.getvalue(), "")


class FloodTest(ServiceTestCase):
    def test_silent_clients(self):
        service, echo, flood = self.service("--handshake-timeout", "0.6"), self.echo(), []
        for _ in range(4):
            flood += [self.client(service.port) for _ in range(50)]
            with self.client(service.port).greet() as client:  # the queue is empty then
                self.check_echo(client, echo)
        for sock in flood:
            self.assertEqual(read_all(sock), (b"", "end"))
        self.assertEqual(service.end(signal.SIGINT), 0)
        ends = collections.Counter(re.findall(" end=(.+)", service.text()))
        self.assertEqual(ends, {"handshake-timeout": 200, "client-closed": 4})


# ---- echo_server.py ----------------------------------------------------------------------

class EchoTestCase(CommandTestCase):
    def finish(self, process):
        """Return the exit status, the output and the last error of `process`.

        Its children have ended, too, because they share its stderr.
        """
        out, err = process.communicate(timeout=PATIENCE)
        self.assertNotIn("Traceback", err)
        return process.returncode, out, err.rpartition("echo_server.py: ")[2]


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
                sessions.get(timeout=PATIENCE)
            process.send_signal(number)
            self.assertEqual(self.finish(process)[::2], (status, ""))


# ---- README ------------------------------------------------------------------------------

def readme(section=""):
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = file.read()
    return re.search(r"(?ms)^## %s\n(.+?)(?=^## |\Z)" % section, text).group(1) if section else text


def blocks(kind):
    """Return what stands between ``` and ```, if `kind` is behind the first one."""
    found = re.findall(r"(?ms)^```(\w*)\n(.+?)^```", readme())
    return [text for word, text in found if word == kind]


def table(section, heading=""):
    """Return the cells of each row of the table in `section` whose first line has `heading`."""
    rows = readme(section).partition("| %s" % heading)[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row] for row in re.findall(
        r"^\| (.+?) \|(?: (.*?) \|)?(?: (.*?) \|)?$", rows, re.MULTILINE)]


MYPY = shutil.which("mypy", path=os.pathsep.join(
    [os.path.join(HERE, ".tools", "bin"), os.environ.get("PATH", "")]))


TYPED = """
import socket

class Right(socks5.Socks5RequestHandler):
    def authenticate(self, username: bytes, password: bytes) -> bool:
        return (username, password) == (b"a", b"b")
    def authorize(self, destination: socks5.Address) -> bool:
        return self.user != "" and destination.port < self.settings.connect_timeout
    def connect(self, destination: socks5.Address) -> socket.socket:
        return self.own_socket(socket.create_connection((destination.host, destination.port)))

class Wrong(socks5.Socks5RequestHandler):
    def authorize(self, destination: socks5.Address) -> str:  # wrong
        return destination.hostname  # wrong
    def connect(self, destination: socks5.Address) -> None:  # wrong
        self.settings.conect_timeout  # wrong

with socks5.Socks5Server(("", 0), Right, users={"a": "b"}).running() as server:
    server.setings  # wrong
socks5.Socks5Server(("", 0), Wrong, idle_timout=1)  # wrong
"""


class ReadmeTest(ServiceTestCase):
    def test_options_and_defaults_are_those_of_the_command(self):
        parser = self.parser()
        rows = {re.search(r"--[\w-]+|port", row[0]).group(): (row[0], row[2].strip("`"))
                for row in table("Options", "option")}
        self.assertEqual((socks5.HOST, rows["port"][1]), (rows["--bind"][1], str(socks5.PORT)))
        self.assertEqual((list(parser.get_default("udp_ports")), rows["--udp-ports"][1]),
                         ([0], "any that is free"))
        options = {(action.option_strings or ["port"])[-1]: action for action in parser._actions}
        self.assertEqual(set(rows), set(options))
        for option, action in options.items():
            described, said = rows[option]
            self.assertEqual(set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", described)),
                             set(action.option_strings))
            self.assertIn(action.metavar or "", described)
            default = parser.get_default(action.dest)
            if option != "port" and action.nargs is None and default not in (None, [], (0,)):
                self.assertEqual(*((said, ",".join(default)) if action.dest == "commands" else (
                    float(said), float("%o" % default if action.dest == "mode" else default))))
        self.assertLessEqual({"--" + {"rules": "allow", "clients": "client"}.get(
            name, name).replace("_", "-") for name in socks5.DEFAULTS}, set(rows))

    def test_links(self):
        headings = re.findall(r"^##+ (.+)$", readme(), re.MULTILINE)
        self.assertEqual(set(re.findall(r"\]\(#(.+?)\)", readme()))
                         - {heading.lower().replace(" ", "-") for heading in headings}, set())

    def test_hooks_exist(self):
        hooks = {"select_method", "authenticate", "authorize", "connect", "do_CONNECT", "do_BIND",
                 "do_UDP_ASSOCIATE", "log_message", "verify_request"}
        self.assertLessEqual(hooks, set(re.findall(r"`(\w+)`", readme("Embedding"))))
        for name in hooks:
            self.assertTrue(hasattr(socks5.Socks5RequestHandler, name)
                            or hasattr(socks5.Socks5Server, name), name)

    def test_replies_are_named(self):
        named = [re.match(r"(\d) (.+)", row[0]) for row in table("It does not work", "what")]
        self.assertEqual([(int(match.group(1)), match.group(2)) for match in named if match],
                         list(enumerate(RFC_REPLIES))[1:])

    def test_ends_are_named(self):
        with open(socks5.__file__, encoding="utf-8") as file:
            words = set(re.findall(r'"(-?[a-z]+(?:-[a-z5]+)*)"', file.read()))
        suffixes = {"-lost": "client target", "-reset": "client target",
                    "-timeout": "handshake idle linger udp"}
        ends = {first + suffix for suffix, firsts in suffixes.items() for first in firsts.split()}
        self.assertLessEqual({*suffixes, "refused", "rejected", "error"}, words)
        ends |= {word for word in words if "-" in word[1:]} | {"refused", "rejected", "error"}
        named = [end for row in table("The log", "`end=`") for end in row[0].split(", ")]
        self.assertEqual(sorted(named), sorted(ends))

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
        (content,) = [block for block in blocks("") if block.startswith("--")]
        content = re.sub(r"(--users) \S+", r"\1 " + self.file(b"alice:secret"), content)
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

    def test_examples_of_embedding(self):
        found = re.search(r"(?ms)^    class .+?serve_forever\(\)$", socks5.__doc__ or "")  # -OO
        for text in blocks("python") + ([re.sub("(?m)^    ", "", found.group())] if found else []):
            ask = "refused = ask(server.server_address[1])  #"
            for old, new in [("1080", "0"), ("OnlyWeb) as", "OnlyWeb).running() as"),
                             ("server.serve_forever()", ask), ("# here,", ask)]:
                text = text.replace(old, new)
            names = {"__name__": "example", "socks5": socks5,
                     "ask": lambda port: self.client(port).greet().ask(22)}
            exec(text, names)
            self.assertEqual(names["refused"], Reply.NOT_ALLOWED)
            self.assertEqual(getattr(names.get("Recorder"), "asked", [("127.0.0.1", 22)]),
                             [Address("127.0.0.1", 22)])

    @unittest.skipUnless(MYPY, "no mypy here")
    def test_example_of_embedding_is_typed_and_mistakes_are_found(self):
        text = "".join(blocks("python")) + TYPED
        checked = subprocess.run(  # the cache is that of .ci/run
            [MYPY, "--strict", "--cache-dir", ".tools/mypy", "-c", text], cwd=HERE,
            stdout=subprocess.PIPE, universal_newlines=True)
        found = {int(number) for number in re.findall(r":(\d+): error:", checked.stdout)}
        self.assertEqual(found, {number for number, line in enumerate(text.splitlines(), 1)
                                 if "# wrong" in line}, checked.stdout)

    @unittest.skipUnless(shutil.which("nc") and shutil.which("od"), "no nc or no od here")
    def test_conversation(self):
        (commands,) = [block for block in blocks("sh") if "printf" in block]
        log = next(block for block in blocks("") if " DEBUG " in block).replace("\n  ", " ")
        service = self.service("-v", before="import socket; socket.getaddrinfo = (lambda name, "
                               "port, **options: [(2, 1, 6, '', ('127.0.0.1', port))])")
        echo = self.start("-u", "echo_server.py", "0").stdout.readline()
        port = int(re.search(r" port (\d+) ", echo).group(1))
        command = re.search(r"(?m)^printf .+", commands).group().replace(
            r"\36\141", "\\%o\\%o" % tuple(port_of(port))).replace("1080", str(service.port))
        answer = subprocess.check_output(command, shell=True, timeout=PATIENCE,
                                         universal_newlines=True)
        service.wait_for(" end=")

        def plain(text):
            """Return `text` without times, ports and white space at the ends of lines."""
            text = re.sub(r"\S+Z (?=DEBUG|INFO)|(?<=seconds=)[\d.]+| +$", "", text, flags=re.M)
            return re.sub(r"((?:127.0.0.1|localhost):|port )\d+", r"\1", text).splitlines()

        said = re.sub("7f 00 00 01 .. ..", "7f 00 00 01 a9 d0", answer)
        self.assertEqual(plain(service.text()), [
            *plain(commands)[1][2:].splitlines(), *plain("\n".join(re.findall("(?m)^2.+", log)))])
        self.assertEqual(plain(echo + said), [line[2:] for line in plain(commands)
                                              if line[:2] == "# "][1:])

    def test_figures_are_those_of_the_text(self):
        self.assertEqual((socks5.ATTEMPT_DELAY, socks5.ROUTE_TIME, socks5.MOST_KNOWN),
                         (0.25, 60, 4096))
        self.assertEqual((socks5.WARNING_INTERVAL, socks5.RESTART_PAUSE, socks5.LAST_RESORT),
                         (1, 1, 2))

    def test_pipx_can_run_the_file(self):
        self.assertLess(os.path.getsize(socks5.__file__), 125000)  # it is one argument of a command


# ---- Makefile and .ci/run ----------------------------------------------------------------

def run_script(*command, **settings):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, timeout=PATIENCE,
                          **settings)
    return done.returncode, done.stdout


@POSIX_ONLY
@unittest.skipUnless(shutil.which("make") and shutil.which("nc"), "no make or no nc here")
class MakefileTest(TestCase):
    def make(self, target, options="", python=sys.executable):
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
            process.communicate(timeout=PATIENCE)  # until all processes have ended
            self.assertNotEqual(process.returncode, 0)
            self.assertEqual(os.listdir(folder), [])


@POSIX_ONLY
@unittest.skipUnless(shutil.which("bash"), "no bash here")
class CiTest(TestCase):
    def setUp(self):
        super().setUp()
        self.root = self.folder()
        for name in (".ci", "bin"):
            os.mkdir(os.path.join(self.root, name))
        shutil.copy(os.path.join(HERE, ".ci", "run"), os.path.join(self.root, ".ci", "run"))
        for name in ("bash", "dirname", "grep", "head", "ls", "sort"):
            os.symlink(shutil.which(name), os.path.join(self.root, "bin", name))

    def command(self, name, script):
        """Make `script` the command `name`."""
        path = os.path.join(self.root, "bin", name)
        self.write(path, b"#!/bin/sh\n" + os.fsencode(script))
        os.chmod(path, 0o755)

    def check(self, part, *expected):
        """Check the exit status and the last line of .ci/run."""
        status, out = run_script("bash", os.path.join(self.root, ".ci", "run"), part, env=dict(
            os.environ, PATH=os.path.join(self.root, "bin")))
        self.assertEqual((status, out.splitlines()[-1]), expected)

    def test_each_python_once(self):
        self.check("pythons", 1, "0 passed, 1 failed")  # to find none is a failure
        for name in ("python3", "python3.9", "python3.x"):
            os.symlink(os.path.realpath(sys.executable), os.path.join(self.root, "bin", name))
        self.write(os.path.join(self.root, "test_it.py"), b"""if True:
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

SOCKS_CONF = """
route {
    from: 0.0.0.0/0 to: 0.0.0.0/0 via: 127.0.0.1 port = %d
    proxyprotocol: socks_v5
    protocol: tcp udp
    command: connect bind udpassociate
    method: none
}
"""


class ClientsTest(TestCase):
    def run_client(self, *command, **settings):
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
        listener = self.listen()

        def answer():
            with listener.accept()[0] as sock:
                sock.sendall(b"SSH-2.0-nobody\r\n")
                banners.append(sock.recv(8))

        banners, thread = [], self.thread(answer)
        with self.assertRaises(subprocess.CalledProcessError):  # that was not an ssh server
            self.run_client("ssh", "-F", "none", "-o", "BatchMode=yes", "-o",
                            "ProxyCommand=nc -X 5 -x 127.0.0.1:{} %h %p",
                            "-p", str(listener.getsockname()[1]), "127.0.0.1", "true")
        thread.join(PATIENCE)
        self.assertEqual(banners, [b"SSH-2.0-"])

    def socksify(self, script, server):
        """Return what `script` prints with Dante's client library set to use `server`."""
        path = self.file((SOCKS_CONF % server.server_address[1]).encode())
        with tempfile.TemporaryDirectory() as folder:
            return subprocess.check_output(
                ["sh", "-c", script], cwd=folder, stderr=subprocess.DEVNULL, timeout=PATIENCE,
                env=dict(os.environ, SOCKS_CONF=path, SOCKS_AUTOADD_LANROUTES="no"))

    @unittest.skipUnless(shutil.which("socksify") and shutil.which("nc"), "no socksify or nc here")
    def test_datagrams_of_socksify(self):
        sock = self.datagrams()

        def answer():
            question, client = sock.recvfrom(100)
            sock.sendto(question[::-1], client)

        self.thread(answer)
        said = self.socksify("printf ping | socksify nc -u -W 1 127.0.0.1 %d"
                             % sock.getsockname()[1], self.serve())
        self.assertEqual(said, b"gnip")

    @unittest.skipUnless(shutil.which("socksify") and shutil.which("tnftp"),
                         "no socksify or tnftp here")
    def test_active_ftp(self):
        listener = self.listen()
        def serve():  # it connects to the client to deliver a file
            sock = self.own(listener.accept()[0])
            sock.sendall(b"220 hello\r\n")
            with sock.makefile("rb") as commands:
                for line in commands:
                    command, _, argument = line.strip().partition(b" ")
                    if command == b"EPRT":
                        host, port = argument.decode().split("|")[2:4]
                    if command == b"RETR":
                        sock.sendall(b"150 here it comes\r\n")
                        with socket.create_connection((host, int(port))) as data:
                            data.sendall(b"content of " + argument)
                    sock.sendall((b"331" if command == b"USER" else b"200") + b" so\r\n")

        self.thread(serve)
        said = self.socksify(
            "printf 'user a b\nbinary\nget one two\nquit\n' | HOME=. socksify tnftp -A -n -P %d"
            " 127.0.0.1 >/dev/null; cat two" % listener.getsockname()[1], self.serve())
        self.assertEqual(said, b"content of one")


if __name__ == "__main__":
    unittest.main()
