"""Tests of socks5.py and echo_server.py, in the order of their rooms: python -m unittest

Sockets are real and on loopback, ports are free ones, octets are literal. A test leaves no
thread and no descriptor behind: the first cleanup that each registers, and so the last that
runs, says so.
"""

import contextlib
import errno
import hashlib
import io
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import echo_server
import socks5
from socks5 import Address, Reply

HERE = os.path.dirname(os.path.abspath(__file__))
PATIENCE = 30  # seconds after which a test that waits in vain fails
MEBIBYTE = 1 << 20
NO_ROUTE = ("255.255.255.255", 1)  # what the kernel refuses at once: ENETUNREACH or EACCES

logging.getLogger("socks5").propagate = False
logging.getLogger("socks5").addHandler(logging.NullHandler())


# ---- tools -------------------------------------------------------------------------------

def octets(text):
    """The octets that `text` shows in hex."""
    return bytes.fromhex(text.replace("|", " "))


def pattern(count):
    """`count` octets in which a lost or a doubled piece shows."""
    return b"".join(struct.pack(">Q", number) for number in range(count // 8))


def read_all(sock):
    """What arrives until the end, and whether that was an "end" or a "reset"."""
    pieces = []
    try:
        for piece in iter(lambda: sock.recv(MEBIBYTE), b""):
            pieces.append(piece)
    except ConnectionResetError:
        return b"".join(pieces), "reset"
    return b"".join(pieces), "end"


def read_count(sock, count):
    """Exactly `count` octets."""
    pieces = b""
    while len(pieces) < count:
        piece = sock.recv(count - len(pieces))
        if not piece:
            raise AssertionError("ended after %r" % pieces)
        pieces += piece
    return pieces


def reset(sock):
    """Close `sock` with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def descriptors():
    """The descriptors of this process, where the system lists them."""
    listing = "/proc/self/fd"
    return len(os.listdir(listing)) if os.path.isdir(listing) else 0


def has_ipv6():
    """Whether ::1 can be served on."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
        return True
    except OSError:
        return False


class OneAtATime(io.RawIOBase):
    """A stream that gives an octet a read."""

    def __init__(self, content):
        super().__init__()
        self.content = iter(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        for octet in self.content:
            buffer[0] = octet
            return 1
        return 0


class TestCase(unittest.TestCase):
    """Servers, targets and clients that are closed at the end."""

    def setUp(self):
        self.addCleanup(self.check_nothing_left, set(threading.enumerate()), descriptors())

    def check_nothing_left(self, threads, count):
        self.assertEqual(set(threading.enumerate()) - threads, set())
        self.assertEqual(descriptors(), count)

    def thread(self, function, *args):
        """Run `function` in a thread that is joined at the end."""
        thread = threading.Thread(target=function, args=args)
        thread.start()
        self.addCleanup(thread.join, PATIENCE)
        return thread

    def own(self, sock):
        """`sock`, closed at the end; it waits no longer than PATIENCE."""
        sock.settimeout(PATIENCE)
        self.addCleanup(sock.close)
        return sock

    def listen(self, host="127.0.0.1", backlog=128):
        """A listening socket."""
        listener = self.own(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
        listener.bind((host, 0))
        listener.listen(backlog)
        return listener

    def serve(self, handler=socks5.Socks5RequestHandler, host="127.0.0.1", **settings):
        """A server that serves."""
        server = socks5.Socks5Server((host, 0), handler, **settings)
        self.addCleanup(server.server_close)
        self.thread(server.serve_forever, 0.02)
        self.addCleanup(server.shutdown)
        return server

    def echo(self):
        """The port of an echo server."""
        server = echo_server.EchoServer(("127.0.0.1", 0), echo_server.EchoRequestHandler)
        server.daemon_threads = False
        self.addCleanup(server.server_close)
        self.thread(server.serve_forever, 0.02)
        self.addCleanup(server.shutdown)
        return server.server_address[1]

    def client(self, server):
        """A socket connected to `server`."""
        host, port = server.server_address[:2]
        return self.own(socket.create_connection((host, port)))

    def request(self, server, port, host="127.0.0.1"):
        """A client that has asked for IPv4 `host` and `port`, and the reply."""
        client = self.client(server)
        client.sendall(octets("05 01 00"))
        self.assertEqual(read_count(client, 2), octets("05 00"))
        client.sendall(octets("05 01 00 01") + socket.inet_aton(host) + struct.pack(">H", port))
        return client, read_count(client, 10)

    def tunnel(self, server=None):
        """The two ends of a relay: the client's socket and the target's."""
        listener = self.listen()
        client, reply = self.request(server or self.serve(), listener.getsockname()[1])
        self.assertEqual(reply[:4], octets("05 00 00 01"))
        return client, self.own(listener.accept()[0])

    def black_hole(self):
        """The address of a listener that answers no SYN: its backlog is full."""
        listener = self.listen(backlog=0)
        for _ in range(4):
            sock = self.own(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        return listener.getsockname()

    def dead(self):
        """An address that refuses: nobody listens, and nobody else is given the port."""
        sock = self.own(socket.socket())
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()

    def stop(self, server):
        """End `server` and its sessions, so that all of them have been logged."""
        server.shutdown()
        server.server_close()


def resolver(*addresses):
    """A stand-in for getaddrinfo that answers with `addresses`."""
    def getaddrinfo(name, port, **kwargs):
        return [(socket.AF_INET6 if ":" in address[0] else socket.AF_INET,
                 socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for address in addresses]
    return mock.patch("socket.getaddrinfo", getaddrinfo)


# ---- vocabulary --------------------------------------------------------------------------

class VocabularyTest(TestCase):
    def test_numbers_and_phrases_are_the_rfc_s(self):
        self.assertEqual([(int(reply), reply.phrase) for reply in Reply], [
            (0, "succeeded"), (1, "general SOCKS server failure"),
            (2, "connection not allowed by ruleset"), (3, "Network unreachable"),
            (4, "Host unreachable"), (5, "Connection refused"), (6, "TTL expired"),
            (7, "Command not supported"), (8, "Address type not supported")])
        self.assertEqual(list(map(int, socks5.Command)), [1, 2, 3])
        self.assertEqual(list(map(int, socks5.AddressType)), [1, 3, 4])
        self.assertEqual(list(map(int, socks5.Method)), [0, 1, 2, 255])

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
                (socket.gaierror(errno.ECONNREFUSED, "not what it seems"), 4),
                (OSError(errno.ECONNREFUSED, ""), 5), (ConnectionRefusedError(), 1),
                (OSError(errno.ETIMEDOUT, ""), 6), (socket.timeout("timed out"), 6),
                (socks5.RequestError(Reply.NOT_ALLOWED), 2),
                (OSError(errno.EMFILE, ""), 1), (OSError("Connection refused"), 1),
                (ValueError("Connection refused"), 1)]:
            with self.subTest(error=repr(error)):
                self.assertEqual(socks5.reply_for(error), reply)


# ---- frames ------------------------------------------------------------------------------

FRAMES = [  # reader, octets, what they mean
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


class FramesTest(TestCase):
    def test_whole(self):
        for read, frame, meaning in FRAMES:
            with self.subTest(frame=frame[:40]):
                stream = io.BufferedReader(io.BytesIO(octets(frame) + b"rest"))
                self.assertEqual(read(stream), meaning)
                self.assertEqual(stream.read(), b"rest")

    def test_octet_by_octet(self):
        for read, frame, meaning in FRAMES:
            with self.subTest(frame=frame[:40]):
                self.assertEqual(read(io.BufferedReader(OneAtATime(octets(frame)))), meaning)

    def test_cut_after_each_octet(self):
        for read, frame, _ in FRAMES:
            for end in range(len(octets(frame))):
                with self.subTest(frame=frame[:40], end=end), self.assertRaises(EOFError):
                    read(io.BufferedReader(io.BytesIO(octets(frame)[:end])))

    def test_broken_in_mid_frame(self):
        ours, theirs = socket.socketpair()
        with ours, theirs, mock.patch.object(
                socket.SocketIO, "readinto", side_effect=ConnectionResetError):
            stream = ours.makefile("rb")
            with stream, self.assertRaises(EOFError):
                socks5.read_methods(stream)

    def test_other_versions(self):
        for read, frame in [(socks5.read_methods, "04"), (socks5.read_methods, "47"),
                            (socks5.read_credentials, "05"), (socks5.Request.read, "01")]:
            with self.subTest(frame=frame), self.assertRaises(socks5.ProtocolError) as caught:
                read(io.BytesIO(octets(frame)))
            self.assertEqual(caught.exception.answer, b"")

    def test_unknown_address_types(self):
        for kind in ("00", "02", "05", "ff"):
            with self.assertRaises(socks5.RequestError) as caught:
                Address.read(io.BytesIO(octets(kind)))
            self.assertEqual(caught.exception.reply, 8)

    def test_pack(self):
        for address, frame in [
                (("127.0.0.1", 1080), "01 7f 00 00 01 04 38"),
                (("::1", 65535), "04" + " 00" * 15 + " 01 ff ff")]:
            self.assertEqual(Address(*address).pack(), octets(frame))
            self.assertEqual(socks5.pack_reply(Reply.SUCCEEDED, Address(*address)),
                             octets("05 00 00") + octets(frame))

    def test_addresses_of_sockets(self):
        for sockaddr, text in [
                (("127.0.0.1", 80), "127.0.0.1:80"), (("::1", 80, 0, 0), "[::1]:80"),
                (("fe80::1%lo", 80, 0, 1), "[fe80::1]:80"),
                (("::ffff:10.0.0.1", 80, 0, 0), "10.0.0.1:80"), ("", "0.0.0.0:0")]:
            self.assertEqual(str(Address.of(sockaddr)), text)


# ---- rules -------------------------------------------------------------------------------

class UsersFileTest(TestCase):
    def load(self, content):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "users")
            with open(path, "wb") as file:
                file.write(content)
            return socks5.load_users(path)

    def test_good_files(self):
        for content, users in [
                (b"alice:secret", {"alice": "secret"}),
                (b"\xef\xbb\xbfalice:a:b \r\n\r\n  \n# no:body\nb\xc3\xbcb:\xe2\x82\xac\n",
                 {"alice": "a:b ", "b\u00fcb": "\u20ac"}),
                (b"a" * 255 + b":" + b"b" * 255, {"a" * 255: "b" * 255})]:
            self.assertEqual(self.load(content), users)

    def test_bad_files(self):
        for content, message in [
                (b"", "no users"), (b"# alice:hunter2\n", "no users"),
                (b"a:b\nhunter2\n", "line 2"), (b":hunter2", "line 1"), (b"hunter2:", "line 1"),
                (b"a" * 256 + b":hunter2", "line 1"), (b"a:" + b"hunter2" * 37, "line 1"),
                (b"a:b\n\na:hunter2", "line 3"), (b"a:\xffhunter2", "line 1")]:
            with self.subTest(content=content[:20]), self.assertRaises(ValueError) as caught:
                self.load(content)
            self.assertIn(message, str(caught.exception))
            self.assertNotIn("hunter2", str(caught.exception))


# ---- dialing -----------------------------------------------------------------------------

class DialTest(TestCase):
    def dial(self, *addresses, **settings):
        deadline = time.monotonic() + settings.pop("seconds", PATIENCE)
        return self.own(socks5.dial([(socket.AF_INET6 if ":" in address[0] else socket.AF_INET,
                                      address) for address in addresses], deadline, **settings))

    def test_names(self):
        for host, name in [
                ("localhost", b"localhost"), ("example.com.", b"example.com."),
                ("_dmarc.example", b"_dmarc.example"), ("b\u00fccher.example",
                                                        b"xn--bcher-kva.example"),
                ("a" * 63 + ".example", b"a" * 63 + b".example")]:
            self.assertEqual(socks5.encode_name(host), name)

    def test_odd_names(self):
        for host in ["", ".", "a..b", ".a", "a b", " ", "localhost\0.example", "\0", "a\tb",
                     "a\x7f", "a\u3000b", "\udcff", "a" * 64, "\u00fc" * 100, "b\u00fc\0cher"]:
            with self.subTest(host=ascii(host)), self.assertRaises(socks5.RequestError) as caught:
                socks5.resolve(Address(host, 80), time.monotonic() + PATIENCE)
            self.assertEqual(caught.exception.reply, Reply.HOST_UNREACHABLE)

    def test_literals_are_not_looked_up(self):
        with mock.patch("socket.getaddrinfo", side_effect=AssertionError):
            for host, family in [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)]:
                self.assertEqual(socks5.resolve(Address(host, 80), 0), [(family, (host, 80))])

    def test_slow_resolver_is_left_behind(self):
        answer, before = threading.Event(), set(threading.enumerate())
        with mock.patch("socket.getaddrinfo", lambda *args, **kwargs: answer.wait(PATIENCE) and []):
            with self.assertRaises(socket.timeout):
                socks5.resolve(Address("slow.example", 80), time.monotonic() + 0.05)
        answer.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(PATIENCE)

    def test_resolver_failure_travels_up(self):
        with mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(-2, "unknown")):
            with self.assertRaises(socket.gaierror):
                socks5.resolve(Address("nobody.example", 80), time.monotonic() + PATIENCE)

    def test_interleave(self):
        four, six = socket.AF_INET, socket.AF_INET6
        self.assertEqual(
            socks5.interleave([(six, "a"), (six, "b"), (six, "c"), (four, "d"), (six, "e")]),
            [(six, "a"), (four, "d"), (six, "b"), (six, "c"), (six, "e")])

    def test_second_address_when_the_first_is_dead(self):
        listener = self.listen()
        sock = self.dial(self.dead(), listener.getsockname())
        self.assertEqual(sock.getpeername(), listener.getsockname())
        self.assertTrue(sock.gettimeout())  # own() set it; dial() gives a blocking socket

    def test_second_address_when_the_first_is_silent(self):
        listener = self.listen()
        sock = self.dial(self.black_hole(), listener.getsockname())
        self.assertEqual(sock.getpeername(), listener.getsockname())

    def test_a_failure_starts_the_next_attempt_at_once(self):
        listener = self.listen()
        with mock.patch.object(socks5, "ATTEMPT_DELAY", 2 * PATIENCE):
            self.dial(self.dead(), NO_ROUTE, self.dead(), listener.getsockname())

    def test_first_error_counts(self):
        with self.assertRaises(ConnectionRefusedError):
            self.dial(self.dead(), NO_ROUTE)
        with self.assertRaises(OSError) as caught:
            self.dial(NO_ROUTE, self.dead())
        self.assertNotEqual(caught.exception.errno, errno.ECONNREFUSED)

    def test_deadline(self):
        with self.assertRaises(socket.timeout):
            self.dial(self.black_hole(), self.black_hole(), seconds=0.3)

    def test_descriptors_exhausted(self):
        nothing_to_wait_for = mock.patch.object(socks5, "winner", side_effect=AssertionError)
        with mock.patch("socket.socket", side_effect=OSError(errno.EMFILE, "")):
            with nothing_to_wait_for, self.assertRaises(OSError) as caught:
                self.dial(("127.0.0.1", 1), ("127.0.0.1", 2))
        self.assertEqual(caught.exception.errno, errno.EMFILE)

    @unittest.skipUnless(has_ipv6(), "no IPv6 on this host")
    def test_both_families(self):
        listener = self.listen("::1")
        sock = self.dial(self.dead(), ("::1", listener.getsockname()[1]))
        self.assertEqual(sock.family, socket.AF_INET6)


# ---- relaying ----------------------------------------------------------------------------

class RelayTest(TestCase):
    def test_client_half_closes_and_the_answer_comes_later(self):
        client, target = self.tunnel()
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(read_all(target), (b"", "end"))
        content = pattern(MEBIBYTE)
        self.thread(lambda: (target.sendall(content), target.close()))
        self.assertEqual(read_all(client), (content, "end"))

    def test_target_half_closes_and_the_client_goes_on(self):
        client, target = self.tunnel()
        target.shutdown(socket.SHUT_WR)
        self.assertEqual(read_all(client), (b"", "end"))
        content = pattern(MEBIBYTE)
        self.thread(lambda: (client.sendall(content), client.shutdown(socket.SHUT_WR)))
        self.assertEqual(read_all(target), (content, "end"))

    def test_reset_by_the_target(self):
        client, target = self.tunnel()
        target.sendall(b"half of a file")
        self.assertEqual(read_count(client, 14), b"half of a file")
        reset(target)
        self.assertEqual(read_all(client), (b"", "reset"))

    def test_reset_by_the_client(self):
        client, target = self.tunnel()
        client.sendall(b"half of a file")
        self.assertEqual(read_count(target, 14), b"half of a file")
        reset(client)
        self.assertEqual(read_all(target), (b"", "reset"))

    def test_reset_after_a_half_close(self):
        client, target = self.tunnel()
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(read_all(target), (b"", "end"))
        reset(target)
        self.assertEqual(read_all(client), (b"", "reset"))

    def test_reset_that_the_sending_thread_was_told_of(self):
        ours, theirs = self.pair()
        reset(theirs)
        with self.assertRaises(OSError):
            while True:  # until the error has been reported, and so used up
                ours.send(b"x")
        self.assertEqual(ours.recv(1), b"")  # it looks like an end
        client, proxy = self.pair()
        relay = socks5.Relay(proxy, ours, proxy.recv)
        relay.carry(relay.down, relay.up)
        self.assertEqual((relay.end, relay.broken), ("target-reset", True))
        client.setblocking(False)
        with self.assertRaises(BlockingIOError):  # no end was passed on
            client.recv(1)

    def test_answer_before_a_reset_is_delivered(self):
        client, target = self.tunnel()
        content = pattern(MEBIBYTE)
        self.thread(target.sendall, content)
        received = read_count(client, MEBIBYTE)
        reset(target)
        self.assertEqual(received, content)
        self.assertEqual(read_all(client), (b"", "reset"))

    def pair(self):
        """Two sockets, connected over TCP."""
        listener = self.listen()
        ours = self.own(socket.create_connection(listener.getsockname()))
        return ours, self.own(listener.accept()[0])

    def test_both_directions_at_once(self):
        client, target = self.tunnel()
        content = pattern(32 * MEBIBYTE)
        digests = {}

        def send(sock):
            sock.sendall(content)
            sock.shutdown(socket.SHUT_WR)

        def receive(sock):
            digests[sock] = hashlib.sha256(read_all(sock)[0]).hexdigest()

        threads = [self.thread(work, sock) for work in (send, receive)
                   for sock in (client, target)]
        for thread in threads:
            thread.join(PATIENCE)
        expected = hashlib.sha256(content).hexdigest()
        self.assertEqual(digests, {client: expected, target: expected})

    def test_slow_reader_slows_the_writer_down(self):
        client, target = self.tunnel()
        content, sent = pattern(MEBIBYTE), 0
        target.settimeout(0.5)
        with contextlib.suppress(socket.timeout):
            while sent < 64 * MEBIBYTE:
                sent += target.send(content[sent % MEBIBYTE:])
        self.assertLess(sent, 64 * MEBIBYTE)  # the kernel holds it, nobody queues it
        target.close()
        received = read_all(client)
        self.assertEqual((len(received[0]), received[1]), (sent, "end"))
        self.assertEqual(received[0], (content * (sent // MEBIBYTE + 1))[:sent])

    def test_buffers_grow(self):
        client, target = self.tunnel()
        self.thread(lambda: (target.sendall(pattern(8 * MEBIBYTE)), target.close()))
        sizes = set()
        real = socks5.Flow.pass_on
        with mock.patch.object(socks5.Flow, "pass_on", autospec=True, side_effect=lambda flow, some:
                               (sizes.add(len(some)), real(flow, some))):
            read_all(client)
        self.assertGreater(max(sizes), socks5.SMALL_BUFFER)
        self.assertLessEqual(max(sizes), socks5.LARGE_BUFFER)

    def test_hooks_socket_of_another_family(self):
        ours, theirs = socket.socketpair()
        self.own(theirs)

        class Handler(socks5.Socks5RequestHandler):
            def connect(self, destination):
                return ours

        client, reply = self.request(self.serve(Handler), 80)
        self.assertEqual(reply, octets("05 00 00 01 00 00 00 00 00 00"))
        client.sendall(b"ping")
        self.assertEqual(read_count(theirs, 4), b"ping")
        theirs.close()
        self.assertEqual(read_all(client), (b"", "end"))

    def test_sockets_are_tuned(self):
        client, target = self.tunnel(self.serve())
        del client, target
        with socket.socket() as sock:
            socks5.tune(sock)
            self.assertTrue(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            if hasattr(socket, "TCP_KEEPCNT"):
                idle, interval, count = (sock.getsockopt(socket.IPPROTO_TCP, option) for option in (
                    socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT))
                self.assertLessEqual(idle + interval * count, 120)


# ---- handler -----------------------------------------------------------------------------

USERS = {"alice": "secret", "b\u00fcb": "\u20ac", "x" * 255: "y" * 255}
GREET, ASK, OPEN = "05 01 00", "05 01 00 01 7f 00 00 01 PP PP", "05 00 00 01 7f 00 00 01 ?? ??"
LOGIN = "05 01 02 | 01 05 61 6c 69 63 65 06 73 65 63 72 65 74"
REFUSED = " 00 01 00 00 00 00 00 00"

CONVERSATIONS = [  # what it is, users, what the client sends, what it is sent back
    ("connect, IPv4", None, GREET + ASK, "05 00" + OPEN),
    ("connect, payload in the same segment", None, GREET + ASK + "68 65 6c 6c 6f",
     "05 00" + OPEN + "68 65 6c 6c 6f"),
    ("connect, a name", None, GREET + "05 01 00 03 09 6c 6f 63 61 6c 68 6f 73 74 PP PP 21",
     "05 00" + OPEN + "21"),
    ("connect, a literal as a name", None,
     GREET + "05 01 00 03 09 31 32 37 2e 30 2e 30 2e 31 PP PP 21", "05 00" + OPEN + "21"),
    ("a method of several", None, "05 03 01 02 00" + ASK, "05 00" + OPEN),
    ("the reserved octet is not looked at", None, GREET + "05 01 ff 01 7f 00 00 01 PP PP",
     "05 00" + OPEN),
    ("no method", None, "05 00", "05 ff"),
    ("no method of ours", None, "05 02 01 02", "05 ff"),
    ("no method of ours, and a request", None, "05 01 02" + ASK, "05 ff"),
    ("login", USERS, LOGIN + ASK + "21", "05 02 01 00" + OPEN + "21"),
    ("login, not ASCII", USERS, "05 01 02 01 04 62 c3 bc 62 03 e2 82 ac" + ASK,
     "05 02 01 00" + OPEN),
    ("login, 255 octets", USERS, "05 01 02 01 ff" + "78" * 255 + "ff" + "79" * 255 + ASK,
     "05 02 01 00" + OPEN),
    ("login is not optional", USERS, "05 01 00" + ASK, "05 ff"),
    ("login of several methods", USERS, "05 02 00" + LOGIN[6:] + ASK, "05 02 01 00" + OPEN),
    ("wrong password", USERS, "05 01 02 01 05 61 6c 69 63 65 06 73 65 63 72 65 54" + ASK,
     "05 02 01 01"),
    ("password cut short", USERS, "05 01 02 01 05 61 6c 69 63 65 05 73 65 63 72 65" + ASK,
     "05 02 01 01"),
    ("unknown user", USERS, "05 01 02 01 03 62 6f 62 06 73 65 63 72 65 74" + ASK, "05 02 01 01"),
    ("unknown user, no password", USERS, "05 01 02 01 03 62 6f 62 00", "05 02 01 01"),
    ("nobody", USERS, "05 01 02 01 00 00", "05 02 01 01"),
    ("no users at all", {}, LOGIN, "05 02 01 01"),
    ("login of another version", USERS, "05 01 02 05 05", "05 02"),
    ("bind", None, GREET + "05 02 00 01 7f 00 00 01 PP PP", "05 00 05 07" + REFUSED),
    ("UDP associate", None, GREET + "05 03 00 01 00 00 00 00 00 00", "05 00 05 07" + REFUSED),
    ("command 0", None, GREET + "05 00 00 01 7f 00 00 01 PP PP", "05 00 05 07" + REFUSED),
    ("command 255, a name", None, GREET + "05 ff 00 03 01 78 00 50", "05 00 05 07" + REFUSED),
    ("address type 2", None, GREET + "05 01 00 02 7f 00 00 01 PP PP", "05 00 05 08" + REFUSED),
    ("an empty name", None, GREET + "05 01 00 03 00 00 50", "05 00 05 04" + REFUSED),
    ("a name with a NUL", None, GREET + "05 01 00 03 0b 6c 6f 63 61 6c 68 6f 73 74 00 78 PP PP",
     "05 00 05 04" + REFUSED),
    ("a name that is no text", None, GREET + "05 01 00 03 02 ff fe 00 50",
     "05 00 05 04" + REFUSED),
    ("SOCKS4", None, "04 01 00 50 7f 00 00 01 00", ""),
    ("HTTP", None, "47 45 54 20 2f 20 48 54 54 50 2f 31 2e 30 0d 0a 0d 0a", ""),
    ("TLS", None, "16 03 01 02 00 01 00", ""),
    ("a request of another version", None, GREET + "04 01 00 01", "05 00"),
]


class ConversationTest(TestCase):
    def setUp(self):
        super().setUp()
        self.port = struct.pack(">H", self.echo()).hex()
        self.servers = {}

    def fill(self, text):
        return octets(text.replace(" ", "").replace("PPPP", self.port))

    def talk(self, users, pieces):
        """What the server says to a client that sends `pieces` and its end."""
        key = repr(users)
        if key not in self.servers:
            self.servers[key] = self.serve(users=users)
        client = self.client(self.servers[key])
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):  # the server may have hung up
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        answer = read_all(client)[0]
        client.close()
        return answer

    def expect(self, text, exact=True):
        """A regular expression for an answer, or for the beginning of one."""
        pairs = text.replace(" ", "").replace("??", "..")
        pairs = [pairs[i:i + 2] for i in range(0, len(pairs), 2)]
        if exact:
            return "".join(pairs) + "$"
        return "(" * len(pairs) + ")?".join(pairs) + (")?" if pairs else "") + "$"

    def test_whole(self):
        for name, users, sent, answer in CONVERSATIONS:
            with self.subTest(name):
                self.assertRegex(self.talk(users, [self.fill(sent)]).hex(), self.expect(answer))

    def test_octet_by_octet(self):
        for name, users, sent, answer in CONVERSATIONS:
            with self.subTest(name):
                pieces = [bytes([octet]) for octet in self.fill(sent)]
                self.assertRegex(self.talk(users, pieces).hex(), self.expect(answer))

    def test_cut_after_each_octet(self):
        for name, users, sent, answer in CONVERSATIONS:
            whole = self.fill(sent)
            for end in {*range(min(len(whole), 40)), *range(len(whole) - 12, len(whole))}:
                with self.subTest(name, end=end):
                    said = self.talk(users, [whole[:max(end, 0)]]).hex()
                    self.assertRegex(said, self.expect(answer, exact=False))
