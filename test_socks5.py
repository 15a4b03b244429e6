"""Tests of socks5.py and echo_server.py, in the order of their rooms: python -m unittest

Sockets are real and on loopback, ports are free ones, octets are literal. A test leaves no
thread and no descriptor behind: the first cleanup that each registers, and so the last that
runs, says so.
"""

import collections
import contextlib
import errno
import hashlib
import io
import ipaddress
import logging
import os
import queue
import random
import re
import selectors
import shutil
import signal
import socket
import socketserver
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

try:
    import resource
except ImportError:  # Windows
    resource = None

HERE = os.path.dirname(os.path.abspath(__file__))
PATIENCE = 30  # seconds after which a test that waits in vain fails
MEBIBYTE = 1 << 20
NO_ROUTE = ("255.255.255.255", 1)  # what the kernel refuses at once: ENETUNREACH or EACCES

logging.getLogger("socks5").propagate = False
logging.getLogger("socks5").addHandler(logging.NullHandler())
socks5.LOGIN_PAUSE = 0  # but for the test that is about it


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

    def dead(self, host="127.0.0.1"):
        """An address that refuses: nobody listens, and nobody else is given the port."""
        sock = self.own(socket.socket())
        sock.bind((host, 0))
        return sock.getsockname()

    def stop(self, server):
        """End `server` and its sessions, so that all of them have been logged."""
        server.shutdown()
        server.server_close()


def resolver(*addresses, error=None):
    """A stand-in for getaddrinfo that answers socks5.py with `addresses`, or fails."""
    real = socket.getaddrinfo

    def getaddrinfo(name, *args, **kwargs):
        if isinstance(name, str):  # a test's own question
            return real(name, *args, **kwargs)
        if error:
            raise error
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

DATAGRAMS = [  # octets, how many of them are the header, what they mean
    ("00 00 00 01 7f 00 00 01 00 35 | 61 62", 10, (0, ("127.0.0.1", 53), b"ab")),
    ("00 00 00 01 7f 00 00 01 00 35", 10, (0, ("127.0.0.1", 53), b"")),
    ("00 00 81 03 01 78 ff ff | 00", 8, (129, ("x", 65535), b"\0")),
    ("00 00 00 04 20 01 0d b8 00 00 00 00 00 00 00 00 00 00 00 01 00 01 | ff", 22,
     (0, ("2001:db8::1", 1), b"\xff")),
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
                with self.subTest(frame=frame[:40], end=end), self.assertRaisesRegex(
                        socks5.ProtocolError, "client-left"):
                    read(io.BufferedReader(io.BytesIO(octets(frame)[:end])))

    def test_datagrams(self):
        for frame, header, meaning in DATAGRAMS:
            with self.subTest(frame=frame):
                self.assertEqual(socks5.Datagram.read(io.BytesIO(octets(frame))), meaning)
                self.assertEqual(socks5.Datagram.read(
                    io.BufferedReader(OneAtATime(octets(frame)))), meaning)
                for end in range(header):
                    with self.assertRaises(socks5.ProtocolError):
                        socks5.Datagram.read(io.BytesIO(octets(frame)[:end]))
                if meaning[1][0] != "x":  # which nothing that we send contains
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

class RulesTest(TestCase):
    def test_forms(self):
        for rule, yes, no in [
                ("*", [("", "a.example", "10.0.0.1", 80), ("", "", "::1", 0)], []),
                ("*:80", [("", "", "10.0.0.1", 80)], [("", "", "10.0.0.1", 81)]),
                ("*:80-82", [("", "", "10.0.0.1", port) for port in (80, 81, 82)],
                 [("", "", "10.0.0.1", port) for port in (79, 83)]),
                ("10.0.0.1", [("", "", "10.0.0.1", 80), ("", "a.example", "10.0.0.1", 80)],
                 [("", "", "10.0.0.2", 80), ("", "", "::1", 80)]),
                ("10.0.0.0/8:80", [("", "", "10.255.0.1", 80)],
                 [("", "", "11.0.0.1", 80), ("", "", "10.0.0.1", 8)]),
                ("2001:db8::1", [("", "", "2001:db8::1", 80)], [("", "", "2001:db8::", 80)]),
                ("[2001:db8::]:1", [("", "", "2001:db8::", 1)], [("", "", "2001:db8::1", 80)]),
                ("2001:db8::/32", [("", "", "2001:db8:ffff::", 80)], [("", "", "10.0.0.1", 80)]),
                ("[2001:db8::/32]:80", [("", "", "2001:db8::", 80)], [("", "", "2001:db8::", 8)]),
                ("a.example", [("", "A.Example.", "10.0.0.1", 80)],
                 [("", "b.a.example", "10.0.0.1", 80), ("", "", "10.0.0.1", 80),
                  ("", "10.0.0.1", "10.0.0.1", 80), ("", "aa.example", "10.0.0.1", 80)]),
                ("A.EXAMPLE.:80", [("", "a.example", "::1", 80)], [("", "a.example", "::1", 8)]),
                ("b\u00fccher.example", [("", "xn--bcher-kva.example", "::1", 80),
                                         ("", "b\u00fccher.example", "::1", 80)], []),
                ("*.example", [("", name, "::1", 80) for name in (
                    "example", "a.example", "b.a.example.")],
                 [("", "anexample", "::1", 80), ("", "example.com", "::1", 80),
                  ("", "", "10.0.0.1", 80)]),
                ("alice@*", [("alice", "", "::1", 1)], [("", "", "::1", 1), ("bob", "", "::1", 1)]),
                ("a@b@10.0.0.1:22", [("a@b", "", "10.0.0.1", 22)], [("b", "", "10.0.0.1", 22)])]:
            for answer, questions in ((True, yes), (False, no)):
                for user, host, ip, port in questions:
                    with self.subTest(rule=rule, host=host, ip=ip, port=port):
                        self.assertIs(socks5.Rule.read("deny " + rule).matches(
                            user, socks5.plain_name(host) if host else b"",
                            ipaddress.ip_address(ip), port), answer)

    def test_bad_rules_are_quoted_and_explained(self):
        for rule, why in [
                ("", "HOST"), (":80", "HOST"), ("a:", "HOST"), ("a:http", "HOST"), ("@a", "HOST"),
                ("[::1", "HOST"), ("[::1]80", "HOST"), ("a b", "no address"), ("a:70000", "ports"),
                ("a:2-1", "ports"), ("10.0.0.1/8", "host bits"), ("10.0.0.256", "not appear"),
                ("10.0.0.0/33", "not appear"), ("::g", "not appear"),
                ("192.168.", "not appear"), ("0x7f000001", "not appear"), ("\u2024", "no address"),
                ("a*.example", "no address"), ("*.*.example", "no address"), ("*.", "no address"),
                ("a..b", "no address"),
                ("::ffff:10.0.0.1", "IPv4"), ("::ffff:10.0.0.0/104", "IPv4")]:
            with self.subTest(rule=rule), self.assertRaises(ValueError) as caught:
                socks5.Rule.read("allow " + rule)
            self.assertIn(repr("allow " + rule), str(caught.exception))
            self.assertIn(why, str(caught.exception))
        with self.assertRaises(ValueError):
            socks5.Rule.read("permit *")

    def decide(self, rules, host, client="10.9.9.9"):
        """What the rules say to a client about an IP literal: whether it may, and which rule."""
        rules = socks5.complete([socks5.Rule.read(rule) for rule in rules], client)
        rule = next(rule for rule in rules if rule.matches("", b"", ipaddress.ip_address(host), 80))
        return rule.allows, rule.text

    def test_first_match_decides(self):
        for rules, allowed, text in [
                ([], True, "default"), (["deny 10.0.0.2"], True, "default"),
                (["allow 10.0.0.2"], False, "default"),
                (["deny 10.0.0.1", "allow *"], False, "deny:10.0.0.1"),
                (["allow *", "deny 10.0.0.1"], True, "allow:*")]:
            self.assertEqual(self.decide(rules, "10.0.0.1"), (allowed, text))

    def test_what_is_denied_unasked(self):
        for host, local, remote in [
                ("169.254.169.254", False, False), ("fe80::1", False, False),
                ("127.0.0.1", True, False), ("127.255.0.1", True, False), ("::1", True, False),
                ("0.0.0.0", True, False), ("::", True, False), ("10.0.0.1", True, True)]:
            for client, allowed in [("127.0.0.1", local), ("::1", local), ("10.9.9.9", remote)]:
                with self.subTest(host=host, client=client):
                    expected = "default" if allowed else "built-in:"
                    self.assertEqual(self.decide([], host, client)[0], allowed)
                    self.assertTrue(self.decide([], host, client)[1].startswith(expected))
                    self.assertTrue(self.decide(["allow " + host], host, client)[0])
                    self.assertFalse(self.decide(["deny " + host, "allow *"], host, client)[0])


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
                (b"\xef\xbb\xbf# no:body\na:b", {"a": "b"}),
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
                     "a\x7f", "::1%\0.example", "::1%\udcff", "a\u3000b", "\udcff",
                     "a" * 64, "\u00fc" * 100, "b\u00fc\0cher"]:
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

    def test_a_single_address(self):
        listener = self.listen()
        sock = self.dial(listener.getsockname(), seconds=float("inf"))
        self.assertEqual(sock.getpeername(), listener.getsockname())
        with self.assertRaises(ConnectionRefusedError):
            self.dial(self.dead())
        with self.assertRaises(socket.timeout):
            self.dial(self.black_hole(), seconds=0.05)

    def test_losers_are_closed(self):
        listener, attempts = self.listen(), []
        winner = self.dial(self.black_hole(), self.black_hole(), listener.getsockname(),
                           prepare=attempts.append)
        self.assertEqual([sock.fileno() for sock in attempts], [-1, -1, winner.fileno()])

    def test_families_take_turns(self):
        attempts = []

        def fail(address, prepare, patience):
            attempts.append(address[1][0])
            raise OSError

        with mock.patch.object(socks5, "start_attempt", fail), self.assertRaises(OSError):
            self.dial(("::1", 1), ("::2", 1), ("127.0.0.1", 1))
        self.assertEqual(attempts, ["::1", "127.0.0.1", "::2"])

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


# ---- threads -----------------------------------------------------------------------------

class ThreadCacheTest(TestCase):
    def setUp(self):
        super().setUp()
        self.cache = socks5.ThreadCache()
        self.addCleanup(self.leave)

    def leave(self):
        self.cache.close()
        for thread in self.cache.threads:
            thread.join(PATIENCE)

    def run_job(self, job=lambda: None):
        """The thread that did `job`, which is idle again."""
        threads, idle = [], len(self.cache.idle)
        self.cache.start("socks5 test", lambda: (threads.append(threading.current_thread()),
                                                 job()))()
        while len(self.cache.idle) < max(idle, 1):
            time.sleep(0.001)  # nothing else tells when it has become idle
        return threads[0]

    def test_threads_are_reused(self):
        first = self.run_job()
        self.assertIs(self.run_job(), first)
        self.assertEqual(self.cache.threads, {first})

    def test_name_says_what_a_thread_does(self):
        names = []
        thread = self.run_job(lambda: names.append(threading.current_thread().name))
        self.assertEqual((names, thread.name), (["socks5 test"], "socks5 idle"))

    def test_newest_idle_thread_is_taken_first(self):
        done = [threading.Event(), threading.Event()]
        waits = [self.cache.start(str(number), done[number].wait) for number in range(2)]
        for number in (1, 0):
            done[number].set()
            waits[number]()
            while len(self.cache.idle) < 2 - number:
                time.sleep(0.001)
        newest = self.cache.idle[-1]
        self.run_job()
        self.assertIs(self.cache.idle[-1], newest)

    def test_a_job_that_raises_costs_nothing(self):
        def fail():
            raise ZeroDivisionError("hunter2")

        with self.assertLogs("socks5", "ERROR") as logs:
            first = self.run_job(fail)
        self.assertEqual(logs.output, ["ERROR:socks5:thread failed error=ZeroDivisionError"])
        self.assertIs(self.run_job(), first)

    def test_idle_threads_leave(self):
        with mock.patch.object(socks5, "IDLE_TIME", 0.01):
            waits = [self.cache.start(str(number), lambda: None) for number in range(100)]
            for wait in waits:
                wait()
            for thread in list(self.cache.threads):
                thread.join(PATIENCE)
        self.assertEqual(self.cache.idle, [])
        self.cache.forget_dead()
        self.assertEqual(self.cache.threads, set())

    def test_thread_that_is_taken_at_the_last_moment(self):
        cache, done = self.cache, threading.Event()
        late = iter([lambda: cache.start("late", done.set)])

        class LateQueue(queue.Queue):
            def get(self, block=True, timeout=None):
                for start in late:  # once
                    start()
                    raise queue.Empty
                return super().get(block, timeout)

        with mock.patch.object(socks5, "TaskQueue", LateQueue):
            first = self.run_job()
            self.assertTrue(done.wait(PATIENCE))
        self.assertEqual(cache.threads, {first})

    def test_importing_leaves_the_interpreter_alone(self):
        self.assertEqual(subprocess.check_output(
            [sys.executable, "-c", "import sys, threading; a = sys.getswitchinterval(); "
             "import socks5; print(sys.getswitchinterval() == a, threading.stack_size(), "
             "threading.active_count())"], cwd=HERE), b"True 0 1\n")


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

    def test_reset_by_a_client_that_does_not_wait_for_the_reply(self):
        listener, has_reset = self.listen(), threading.Event()

        class Handler(socks5.Socks5RequestHandler):
            def connect(self, destination):
                target = super().connect(destination)
                has_reset.wait(PATIENCE)
                return target

        client = self.client(self.serve(Handler))
        client.sendall(octets("05 01 00 05 01 00 01 7f 00 00 01")
                       + struct.pack(">H", listener.getsockname()[1]) + b"half of a file")
        target = self.own(listener.accept()[0])
        reset(client)
        has_reset.set()
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

    def test_end_that_follows_our_own_is_no_reset(self):
        has_ended = threading.Event()

        class Target(socket.socket):
            def shutdown(self, how):  # is done, but its thread does not know yet
                super().shutdown(how)
                has_ended.wait(PATIENCE)

        (client, proxy), (ours, theirs) = self.pair(), self.pair()
        target = self.own(Target(fileno=ours.detach()))
        relay = socks5.Relay(proxy, target, proxy.recv)
        self.thread(relay.carry, relay.up, relay.down)
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(read_all(theirs), (b"", "end"))
        theirs.close()
        relay.carry(relay.down, relay.up)
        has_ended.set()
        self.assertFalse(relay.broken)

    def test_answer_before_a_reset_is_delivered(self):
        ours, theirs = self.pair()
        theirs.sendall(b"413 Too Large")
        reset(theirs)  # because it has not read what it was sent: the sender hears of it
        with self.assertRaises(OSError):
            while True:
                ours.send(b"x")
        client, proxy = self.pair()
        relay = socks5.Relay(proxy, ours, proxy.recv)
        relay.break_off(relay.up, ConnectionResetError())
        relay.carry(relay.down, relay.up)
        self.assertEqual(read_count(client, 13), b"413 Too Large")

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

    def test_buffers_shrink(self):
        pieces, sizes = iter([2048, 16384, 100, 100, 0]), []

        class Source:
            def recv_into(self, buffer):
                sizes.append(len(buffer))
                return next(pieces)

        flow = socks5.Flow(Source(), mock.Mock(), lambda count: bytes(count))
        flow.may_splice = False
        flow.copy()
        self.assertEqual(sizes, [16384, 16384, 131072, 2048, 2048])

    def test_peer_that_has_vanished(self):
        ours, theirs = self.pair()
        relay = socks5.Relay(ours, theirs, ours.recv)
        relay.break_off(relay.down, OSError(errno.ETIMEDOUT, ""))
        self.assertEqual((relay.end, relay.broken), ("target-lost", True))

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
        server = self.serve()
        self.tunnel(server)
        session, = server.sessions
        for sock in session.sockets:
            self.assertIsNone(sock.gettimeout())
            self.assertTrue(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            if hasattr(socket, "TCP_KEEPCNT"):
                idle, interval, count = (sock.getsockopt(socket.IPPROTO_TCP, option) for option in (
                    socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT))
                self.assertLessEqual(idle + interval * count, 120)


@unittest.skipUnless(hasattr(os, "splice"), "no splice here: Linux, from Python 3.10")
class SpliceTest(TestCase):
    def send(self, sock, content):
        """Send `content` from another thread."""
        return self.thread(sock.sendall, content)

    def send_all(self, sock, content):
        """The same, and close."""
        self.thread(lambda: (sock.sendall(content), sock.close()))

    def spliced(self):
        """os.splice, counted."""
        return mock.patch("os.splice", wraps=os.splice)

    def test_flow_that_is_bulky_quiet_and_bulky_again(self):
        content = pattern(16 * MEBIBYTE)
        with self.spliced() as splice:
            client, target = self.tunnel()
            calls, count = [0], descriptors()
            for _ in range(2):
                self.send(target, content)
                self.assertEqual(read_count(client, len(content)), content)
                calls.append(splice.call_count)
                target.sendall(b"last")
                self.assertEqual(read_count(client, 4), b"last")
                for _ in range(20):
                    target.sendall(b"ping")
                    self.assertEqual(read_count(client, 4), b"ping")
                self.assertEqual(descriptors(), count)  # the pipe has been given back
            self.assertLess(calls[0], calls[1])
            self.assertLess(calls[1], calls[2])
    def test_refused_in_mid_flow(self):
        content, real = pattern(16 * MEBIBYTE), os.splice
        for refused in (1, 2, 5, 6):
            calls = []

            def splice(*args, calls=calls, refused=refused):
                calls.append(args)
                if len(calls) == refused:
                    raise OSError(errno.EINVAL, "refused")
                return real(*args)

            with self.subTest(refused), mock.patch("os.splice", splice):
                client, target = self.tunnel()
                self.send_all(target, content)
                self.assertEqual(read_all(client), (content, "end"))
            self.assertEqual(len(calls), refused)

    def test_pipe_refused(self):
        content = pattern(16 * MEBIBYTE)
        for name, code in (("os.pipe", errno.EMFILE), ("fcntl.fcntl", errno.EPERM)):
            with self.subTest(name), mock.patch(name, side_effect=OSError(code, "")) as refusal:
                client, target = self.tunnel()
                self.send_all(target, content)
                self.assertEqual(read_all(client), (content, "end"))
            self.assertEqual(refusal.call_count, 1)

    def test_half_close_in_the_middle(self):
        content = pattern(32 * MEBIBYTE)
        with self.spliced() as splice:
            client, target = self.tunnel()
            self.send(target, content)
            received = read_count(client, 8 * MEBIBYTE)
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(target), (b"", "end"))
            received += read_count(client, 24 * MEBIBYTE)
            target.close()
            self.assertEqual(read_all(client), (b"", "end"))
            self.assertTrue(splice.called)
        self.assertEqual(hashlib.sha256(received).digest(), hashlib.sha256(content).digest())

    def test_reset_in_the_middle(self):
        for breaker in ("client", "target"):
            with self.subTest(breaker), self.spliced() as splice:
                client, target = self.tunnel()
                content = pattern(8 * MEBIBYTE)
                self.send(target, content)
                received = read_count(client, len(content))
                self.assertTrue(splice.called)
                self.assertEqual(received, content)
                reset(client if breaker == "client" else target)
                self.assertEqual(read_all(target if breaker == "client" else client),
                                 (b"", "reset"))


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
    ("bind, and the client leaves", None, GREET + "05 02 00 01 7f 00 00 01 PP PP",
     "05 00 05 00 00 01 7f 00 00 01 ?? ?? 05 01" + REFUSED),
    ("UDP associate", None, GREET + "05 03 00 01 00 00 00 00 00 00",
     "05 00 05 00 00 01 7f 00 00 01 ?? ??"),
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
        digits = text.replace(" ", "").replace("??", "..")
        pairs = [digits[i:i + 2] for i in range(0, len(digits), 2)]
        if exact:
            return "^" + "".join(pairs) + "$"
        return "^" + "".join("(?:" + pair for pair in pairs) + ")?" * len(pairs) + "$"

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


class LoggedTestCase(TestCase):
    """Tests that look at the log."""

    def log_of(self, converse, level="INFO", **settings):
        """The log lines of the sessions that `converse(server)` has."""
        with self.assertLogs("socks5", level) as logs:
            server = self.serve(**settings)
            converse(server)
            self.stop(server)
        return [record.getMessage() for record in logs.records]

    def fields(self, line):
        """The words after the name of the event."""
        return dict(word.split("=", 1) for word in line.split(" ") if "=" in word)


class HandlerTest(LoggedTestCase):
    def test_bound_address_is_the_socket_s(self):
        listener = self.listen()
        _, reply = self.request(self.serve(), listener.getsockname()[1])
        port = self.own(listener.accept()[0]).getpeername()[1]
        self.assertEqual(reply, octets("05 00 00 01 7f 00 00 01") + struct.pack(">H", port))

    @unittest.skipUnless(has_ipv6(), "no IPv6 on this host")
    def test_ipv6_all_the_way(self):
        listener = self.listen("::1")
        client = self.client(self.serve(host="::"))
        client.sendall(octets("05 01 00 05 01 00 04" + " 00" * 15 + " 01")
                       + struct.pack(">H", listener.getsockname()[1]))
        target = self.own(listener.accept()[0])
        self.assertEqual(read_count(client, 24), octets("05 00 05 00 00 04" + " 00" * 15 + " 01")
                         + struct.pack(">H", target.getpeername()[1]))

    @unittest.skipUnless(has_ipv6(), "no IPv6 on this host")
    def test_both_families_are_served_and_logged_as_they_are(self):
        def converse(server):
            client = self.own(socket.create_connection(("127.0.0.1", server.server_address[1])))
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(client), (b"", "end"))

        line = self.log_of(converse, host="::")[0]
        self.assertRegex(line, r"client=127\.0\.0\.1:\d+ ")

    def test_replies(self):
        for name, error, reply in [
                ("refused", OSError(errno.ECONNREFUSED, ""), 5),
                ("out of descriptors", OSError(errno.EMFILE, ""), 1),
                ("rule", socks5.RequestError(Reply.NOT_ALLOWED), 2),
                ("end of another stream", EOFError(), 1),
                ("end of another conversation", socks5.ProtocolError("client-left"), 1),
                ("bug", ZeroDivisionError("hunter2"), 1)]:
            class Handler(socks5.Socks5RequestHandler):
                def connect(self, destination, error=error):
                    raise error

            with self.subTest(name):
                def converse(server, reply=reply):
                    client, answer = self.request(server, 80)
                    self.assertEqual(answer, bytes([5, reply]) + octets("00 01" + " 00" * 6))
                    client.shutdown(socket.SHUT_WR)
                    self.assertEqual(read_all(client), (b"", "end"))

                lines = self.log_of(converse, handler=Handler)
                self.assertIn("reply=%s " % Reply(reply).name, lines[0])
                self.assertNotIn("hunter2", "".join(lines))
                self.assertEqual("session failed" in "".join(lines), not isinstance(
                    error, (OSError, socks5.RequestError)))

    def test_login_that_cannot_be_checked(self):
        class Handler(socks5.Socks5RequestHandler):
            def authenticate(self, username, password):
                raise OSError("the directory does not answer")

        def converse(server):
            client = self.client(server)
            client.sendall(octets(LOGIN))
            self.assertEqual(read_all(client)[0], octets("05 02"))

        lines = self.log_of(converse, handler=Handler, users=USERS)
        self.assertIn("end=error", lines[0])
        self.assertIn("session failed", lines[1])

    def test_logins_are_compared_in_constant_time(self):
        session = mock.Mock(settings=socks5.Settings(users={"alice": "secret"}))
        for user, password, known in [(b"alice", b"secret", True), (b"alice", b"x", False),
                                      (b"bob", b"secret", False), (b"bob", b"", False)]:
            with mock.patch("hmac.compare_digest", wraps=socks5.hmac.compare_digest) as compare:
                self.assertIs(socks5.Socks5RequestHandler.authenticate(session, user, password),
                              known)
            self.assertEqual(compare.call_count, 1)

    def test_any_socket_of_a_hook_will_do(self):
        listener = self.listen()

        class Handler(socks5.Socks5RequestHandler):
            def connect(self, destination):
                return socket.create_connection(listener.getsockname(), timeout=0.01)

        server = self.serve(Handler)
        self.request(server, 80)
        session, = server.sessions
        self.assertEqual([sock.gettimeout() for sock in session.sockets], [None, None])

    def test_no_timeout_at_all(self):
        listener, never = self.listen(), float("inf")
        server = self.serve(connect_timeout=never, handshake_timeout=never, linger=never)
        with resolver(self.dead(), listener.getsockname()):
            client = self.client(server)
            client.sendall(octets("05 01 00 05 01 00 03 01 78 00 50"))
            self.assertEqual(read_count(client, 4), octets("05 00 05 00"))

    def test_black_hole(self):
        host, port = self.black_hole()
        _, reply = self.request(self.serve(connect_timeout=0.2), port, host)
        self.assertEqual(reply[1], Reply.TTL_EXPIRED)

    def test_name_with_a_dead_first_address(self):
        listener = self.listen()
        with resolver(self.dead(), listener.getsockname()):
            client = self.client(self.serve())
            client.sendall(octets("05 01 00 05 01 00 03 01 78 00 50"))
            self.assertEqual(read_count(client, 4), octets("05 00 05 00"))

    def test_unknown_name(self):
        with resolver(error=socket.gaierror(-2, "unknown")):
            client = self.client(self.serve())
            client.sendall(octets("05 01 00 05 01 00 03 01 78 00 50"))
            self.assertEqual(read_count(client, 4), octets("05 00 05 04"))

    def test_refusal_arrives_though_the_client_still_sends(self):
        with mock.patch.object(socks5, "REFUSAL_TIMEOUT", PATIENCE):
            client = self.client(self.serve())
            client.sendall(octets("05 01 00 05 04 00 01 7f 00 00 01 00 50") + bytes(100000))
            self.assertEqual(read_all(client), (octets("05 00 05 07 00 01" + " 00" * 6), "end"))
            for _ in range(3):  # nobody has closed: that would have been a reset
                client.sendall(bytes(1000))
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(client), (b"", "end"))

    def test_refused_client_that_stays_is_left(self):
        with mock.patch.multiple(socks5, REFUSAL_TIMEOUT=0.1, SWEEP_INTERVAL=0.02):
            client = self.client(self.serve())
            client.sendall(octets("05 01 02"))
            self.assertEqual(read_all(client), (octets("05 ff"), "end"))
            with self.assertRaises(OSError):
                while True:  # until it is told that nobody is there any more
                    client.send(b"x")

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
            client.sendall(octets("05 01 02 01 01 61 01 62" + request))
            self.assertEqual(read_count(client, 6), octets("05 02 01 00 05" + reply))
            client.close()
        self.stop(server)
        self.assertEqual(sorted(map(repr, calls)), sorted(map(repr, [
            b"\2", (b"a", b"b"), Address("127.0.0.1", 22), ("session", "refused"),
            b"\2", (b"a", b"b"), Address("127.0.0.1", 80), ("session", "refused")])))

    def test_clients_are_chosen_by_verify_request(self):
        class Server(socks5.Socks5Server):
            def verify_request(self, request, client_address):
                return False

        with mock.patch.object(socks5, "Socks5Server", Server):
            client = self.client(self.serve())
        self.assertEqual(read_all(client), (b"", "end"))


class PermissionTest(LoggedTestCase):
    """Rules, as a client meets them."""

    def ask(self, rules, host, *answers, users=None, client=None):
        """The reply to a request for the name `host`, its log line, and the addresses tried."""
        tried = []

        class Watched(socks5.Socks5RequestHandler):
            def setup(self):
                self.client_address = client or self.client_address
                super().setup()

            def adopt(self, sock):
                tried.append(sock)
                super().adopt(sock)

        def converse(server):
            name = host.encode()
            sock = self.client(server)
            sock.sendall(octets(LOGIN if users else GREET) + octets("05 01 00 03")
                         + bytes([len(name)]) + name + octets("00 50"))
            answer = read_count(sock, 6 if users else 4)
            self.reply = answer[-1]

        with resolver(*answers):
            line = self.fields(self.log_of(converse, handler=Watched, rules=rules, users=users)[0])
        return self.reply, line, len(set(tried))

    def test_only_addresses_that_passed_are_dialed(self):
        listener, dead = self.listen(), self.dead("127.0.0.3")
        good = listener.getsockname()
        reply, line, tried = self.ask(["deny 127.0.0.2", "deny ::1"], "mixed.example",
                                      ("127.0.0.2", good[1]), ("::1", good[1]), good)
        self.assertEqual((reply, tried, line["reached"]), (0, 1, "127.0.0.1:%d" % good[1]))
        reply, line, tried = self.ask(["allow 127.0.0.3"], "mixed.example", good, dead)
        self.assertEqual((reply, tried), (5, 1))

    def test_nothing_left(self):
        reply, line, tried = self.ask(["deny 127.0.0.0/8"], "a.example", ("127.0.0.1", 9))
        self.assertEqual((reply, tried, line["rule"]), (2, 0, "deny:127.0.0.0/8"))
        self.assertEqual((line["reply"], line["end"]), ("NOT_ALLOWED", "refused"))

    def test_mapped_addresses_are_unwrapped(self):
        reply, line, _ = self.ask(["deny 127.0.0.0/8"], "a.example", ("::ffff:127.0.0.1", 9, 0, 0))
        self.assertEqual((reply, line["rule"]), (2, "deny:127.0.0.0/8"))
        self.assertEqual(self.ask([], "::ffff:169.254.169.254")[0], 2)

    def test_names_as_asked(self):
        for rule in ("deny *.example", "deny SECRET.example"):
            reply, line, _ = self.ask([rule], "Secret.EXAMPLE.", ("127.0.0.1", 9))
            self.assertEqual((reply, line["rule"]), (2, rule.replace(" ", ":")))

    def test_no_second_look_up(self):
        listener = self.listen()
        answers = [listener.getsockname(), ("169.254.169.254", 80)]

        def getaddrinfo(name, *args, **kwargs):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", answers.pop(0))]

        client = self.client(self.serve())
        with mock.patch("socket.getaddrinfo", getaddrinfo):
            client.sendall(octets(GREET + "05 01 00 03 01 78 00 50"))
            self.assertEqual(read_count(client, 4), octets("05 00 05 00"))
        self.assertEqual(len(answers), 1)

    def test_names_that_nothing_allows_are_not_looked_up(self):
        for rules in (["deny *"], ["allow other.example", "allow alice@*"], ["allow *:443"]):
            with mock.patch.object(socks5, "look_up", side_effect=AssertionError):
                reply, line, _ = self.ask(rules, "a.example")
            self.assertEqual((reply, line["rule"]), (2, "default" if "allow" in rules[0]
                                                     else "deny:*"))

    def test_users(self):
        for rule, reply in (("allow alice@*", 5), ("allow bob@*", 2), ("deny alice@*", 2)):
            self.assertEqual(self.ask([rule], "a.example", self.dead(), users=USERS)[0], reply)

    def test_own_host_from_afar(self):
        dead = self.dead()
        for client, rules, reply in [(("127.0.0.1", 5), [], 5), (("192.0.2.1", 5), [], 2),
                                     (("::ffff:192.0.2.1", 5, 0, 0), [], 2),
                                     (("192.0.2.1", 5), ["allow 127.0.0.1"], 5)]:
            self.assertEqual(self.ask(rules, "a.example", dead, client=client)[0], reply)

    def test_rules_of_a_session_stay(self):
        def converse(server):
            client = self.client(server)
            client.sendall(octets(GREET))
            self.assertEqual(read_count(client, 2), octets("05 00"))
            server.settings = socks5.Settings(rules=["deny *"])
            client.sendall(octets("05 01 00 01 7f 00 00 01 00 00"))
            self.assertNotEqual(read_count(client, 2)[1], 2)
            client.close()
            self.assertEqual(self.request(server, 0)[1][1], 2)

        self.log_of(converse)


class AssociationTest(LoggedTestCase):
    def datagrams(self, host="127.0.0.1", port=0):
        """A socket for datagrams."""
        sock = self.own(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET,
                                      socket.SOCK_DGRAM))
        sock.bind((host, port))
        return sock

    def associate(self, server, port=0, control=None):
        """A control connection, and a client's socket that is connected to the relay's."""
        control = control or self.client(server)
        control.sendall(octets(GREET + "05 03 00 01 00 00 00 00") + struct.pack(">H", port))
        self.assertEqual(read_count(control, 5), octets("05 00 05 00 00"))
        family, size = {1: (socket.AF_INET, 4), 4: (socket.AF_INET6, 16)}[read_count(control, 1)[0]]
        host = socket.inet_ntop(family, read_count(control, size))
        client = self.datagrams(host, port)
        client.connect((host, struct.unpack(">H", read_count(control, 2))[0]))
        return control, client

    def to(self, sock, data, fragment="00"):
        """A datagram for `sock`."""
        host, port = sock.getsockname()[:2]
        kind = octets("04") if ":" in host else octets("01")
        return octets("00 00 " + fragment) + kind + socket.inet_pton(
            sock.family, host) + struct.pack(">H", port) + data

    def check(self, client, target, data=b"ping"):
        """That `data`, and nothing else, goes from `client` to `target` and back."""
        client.send(self.to(target, data))
        octets_, source = target.recvfrom(65536)
        self.assertEqual(octets_, data)
        target.sendto(data[::-1], source)
        self.assertEqual(client.recv(65536), self.to(target, data[::-1]))
        return source

    def wait_until(self, condition):
        """Wait for what nothing outside tells."""
        until = time.monotonic() + PATIENCE
        while not condition():
            self.assertLess(time.monotonic(), until)
            time.sleep(0.001)

    def test_octets(self):
        _, client = self.associate(self.serve())
        target = self.datagrams()
        port = "%04x" % target.getsockname()[1]
        client.send(octets("00 00 00 01 7f 00 00 01" + port + "70 69 6e 67"))
        data, source = target.recvfrom(100)
        self.assertEqual(data, b"ping")
        target.sendto(b"pong", source)
        self.assertEqual(client.recv(100), octets("00 00 00 01 7f 00 00 01" + port + "70 6f 6e 67"))

    def test_empty_and_biggest(self):
        _, client = self.associate(self.serve())
        target = self.datagrams()
        for size in (0, 1, 1500, 65507 - 10):
            self.check(client, target, pattern(65536)[:size])
        source = self.check(client, target)
        target.sendto(bytes(65507), source)  # no room for a header
        self.check(client, target)

    @unittest.skipUnless(has_ipv6(), "no IPv6 on this host")
    def test_families(self):
        four, six = self.datagrams(), self.datagrams("::1")
        for host in ("127.0.0.1", "::1"):
            _, client = self.associate(self.serve(host=host))
            self.check(client, four)
            self.check(client, six)
        server = self.serve(host="::")
        with self.own(socket.create_connection(("127.0.0.1", server.server_address[1]))) as control:
            _, client = self.associate(server, control=control)
            self.assertEqual(client.family, socket.AF_INET)
            self.check(client, six)

    def test_stranger_changes_nothing(self):
        target, stranger = self.datagrams(), self.datagrams("127.0.0.2")
        _, client = self.associate(self.serve())
        relay = client.getpeername()
        stranger.sendto(self.to(target, b"before"), relay)
        self.datagrams().sendto(b"no datagram of SOCKS", relay)
        source = self.check(client, target)
        stranger.sendto(self.to(target, b"after"), relay)
        self.datagrams().sendto(self.to(target, b"another port"), relay)
        stranger.sendto(b"unasked", ("127.0.0.1", source[1]))
        self.check(client, target)
        stranger.setblocking(False)
        with self.assertRaises(BlockingIOError):
            stranger.recv(100)

    def test_port_that_was_announced(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        target = self.datagrams()
        _, client = self.associate(self.serve(), port)
        self.datagrams().sendto(self.to(target, b"another port"), client.getpeername())
        self.check(client, target)

    def test_what_is_dropped(self):
        target = self.datagrams()
        whole = self.to(target, b"")
        bad = [whole[:end] for end in range(len(whole))]
        bad += [self.to(target, b"x", fragment) for fragment in ("01", "7f", "80", "ff")]
        bad += [octets("00 00 00") + rest for rest in (
            octets("02 7f 00 00 01 00 35"), octets("03 00 00 35"), octets("03 02 61 00 00 35"),
            octets("01 7f 00 00 01 00 00 ff"))]

        def converse(server):
            control, client = self.associate(server)
            for datagram in bad:
                client.send(datagram)
            self.check(client, target)
            self.wait_until(lambda: all(session.relay.counts["dropped"] == len(bad)
                                        for session in server.sessions))
            control.close()

        fields = self.fields(self.log_of(converse)[0])
        self.assertEqual(fields["dropped"], str(len(bad)))

    def test_log(self):
        def converse(server):
            control, client = self.associate(server)
            target = self.datagrams()
            self.check(client, target, b"12345")
            self.check(client, target, b"123")
            control.close()

        self.assertRegex(self.log_of(converse)[0], (
            r"^session client=127\.0\.0\.1:\d+ user=- command=UDP_ASSOCIATE "
            r"destination=0\.0\.0\.0:0 reached=- reply=SUCCEEDED rule=- up=8 "
            r"down=8 datagrams_up=2 datagrams_down=2 dropped=0 "
            r"seconds=\d+\.\d{3} end=client-closed$"))

    def test_names_do_not_stall(self):
        answer, asked = threading.Event(), []
        target = self.datagrams()
        port = struct.pack(">H", target.getsockname()[1])
        slow, fast = (octets("00 00 00 03 04") + name + port for name in (b"slow", b"fast"))
        real = socket.getaddrinfo

        def getaddrinfo(name, *args, **kwargs):
            if isinstance(name, str):
                return real(name, *args, **kwargs)
            asked.append(name)
            if name == b"slow":
                answer.wait(PATIENCE)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", target.getsockname())]

        server = self.serve()
        _, client = self.associate(server)
        with mock.patch("socket.getaddrinfo", getaddrinfo):
            client.send(slow + b"1")
            client.send(fast + b"2")
            self.assertEqual(target.recv(100), b"2")
            self.wait_until(lambda: list(server.sessions)[0].relay.routes)
            client.send(fast + b"3")  # it is known by now
            self.assertEqual(target.recv(100), b"3")
            self.check(client, target)
            for name in (b"n%03d" % number for number in range(3 * socks5.LOOKUPS)):
                client.send(octets("00 00 00 03 04") + name + port + name)
                self.assertEqual(target.recv(100), name)
            self.assertEqual(sorted(asked)[:2], [b"fast", b"n000"])
            self.assertEqual(asked.count(b"fast"), 1)
            for _ in range(socks5.LOOKUPS + 20):
                client.send(slow + b"4")
            self.check(client, target)
            self.assertLessEqual(asked.count(b"slow"), socks5.LOOKUPS)
            self.assertGreater(list(server.sessions)[0].relay.counts["dropped"], 10)
            answer.set()
            self.assertIn(target.recv(100), (b"1", b"4"))

    def test_rules_for_each_datagram(self):
        good, bad = self.datagrams(), self.datagrams()

        class NotTheNamed(socks5.Socks5RequestHandler):
            def authorize(self, destination):
                return destination.host != "127.0.0.3"

        def converse(server):
            control, client = self.associate(server)
            client.send(self.to(bad, b"x"))
            client.send(octets("00 00 00 01 7f 00 00 03 00 35"))
            self.check(client, good)
            bad.setblocking(False)
            with self.assertRaises(BlockingIOError):
                bad.recv(100)
            control.close()

        rule = "127.0.0.1:%d" % bad.getsockname()[1]
        fields = self.fields(self.log_of(converse, handler=NotTheNamed, rules=["deny " + rule])[0])
        self.assertEqual((fields["dropped"], fields["rule"]), ("2", "deny:" + rule))

    def test_several_at_once(self):
        server, target = self.serve(), self.datagrams()
        clients = [self.associate(server)[1] for _ in range(20)]
        for number, client in enumerate(clients):
            client.send(self.to(target, b"%d" % number))
        for _ in clients:
            data, source = target.recvfrom(100)
            target.sendto(data + b"!", source)
        for number, client in enumerate(clients):
            self.assertEqual(client.recv(100), self.to(target, b"%d!" % number))

    def test_end_with_the_control_connection(self):
        for leave, end in ((socket.socket.close, "client-closed"), (reset, "client-reset"),
                           (lambda control: control.shutdown(socket.SHUT_WR), "client-closed")):
            def converse(server, leave=leave):
                for _ in range(10):  # which thread hears of it first is chance
                    control, client = self.associate(server)
                    control.sendall(b"what nobody has to say here")
                    self.check(client, self.datagrams())
                    leave(control)
                    self.wait_until(lambda: not server.sessions)

            self.assertEqual({self.fields(line)["end"] for line in self.log_of(converse)}, {end})

    def test_timeout(self):
        def converse(server):
            control, client = self.associate(server)
            self.assertEqual(read_all(control), (b"", "end"))

        with mock.patch.object(socks5, "SWEEP_INTERVAL", 0.02):
            line = self.log_of(converse, udp_timeout=0.1)[0]
        self.assertEqual(self.fields(line)["end"], "idle-timeout")

    def test_ports_and_address(self):
        port = self.datagrams().getsockname()[1]
        with self.own(self.datagrams()) as free:
            ports = [port, free.getsockname()[1]]
        server = self.serve(udp_ports=ports, udp_advertise="127.0.0.1")
        _, client = self.associate(server)
        self.assertEqual(client.getpeername()[1], ports[1])
        control = self.client(server)
        control.sendall(octets(GREET + "05 03 00 01 00 00 00 00 00 00"))
        self.assertEqual(read_count(control, 12), octets("05 00 05 01 00 01" + " 00" * 6))
        control = self.client(self.serve(udp_advertise="2001:db8::1"))
        control.sendall(octets(GREET + "05 03 00 01 00 00 00 00 00 00"))
        self.assertEqual(read_count(control, 22), octets(
            "05 00 05 00 00 04 20 01 0d b8 00 00 00 00 00 00 00 00 00 00 00 01"))

    def test_hook_that_raises(self):
        class Broken(socks5.Socks5RequestHandler):
            def authorize(self, destination):
                raise KeyError

        for name in ("01 7f 00 00 01 00 35", "03 01 78 00 35"):  # here, and in a look-up
            def converse(server, name=name):
                control, client = self.associate(server)
                client.send(octets("00 00 00" + name))
                self.assertEqual(read_all(control), (b"", "reset"))

            lines = sorted(self.log_of(converse, handler=Broken))
            self.assertIn("end=error", lines[0])
            self.assertIn("error=KeyError", lines[1])

    def test_no_thread_for_a_look_up(self):
        def refuse(thread):
            raise RuntimeError("can't start new thread")

        server, target = self.serve(), self.datagrams()
        _, client = self.associate(server)
        self.check(client, target)  # the association has its own threads by now
        relay = list(server.sessions)[0].relay
        for count in range(1, 2 * socks5.LOOKUPS):
            with mock.patch("threading.Thread.start", refuse):
                client.send(octets("00 00 00 03 01 78 00 35"))
                self.wait_until(lambda: relay.counts["dropped"] == count)  # noqa: B023
        self.check(client, target)

    @unittest.skipUnless(has_ipv6(), "no IPv6 on this host")
    def test_ipv6_destination_without_ipv6(self):
        target = self.datagrams()

        def ipv4_only():
            return self.datagrams("0.0.0.0")

        with mock.patch.object(socks5, "open_outside", ipv4_only):
            server = self.serve()
            _, client = self.associate(server)
        with resolver(("::1", 53, 0, 0)):
            relay = list(server.sessions)[0].relay
            for count in (1, 2):
                client.send(octets("00 00 00 03 01 78 00 35"))
                self.wait_until(lambda: relay.counts["dropped"] == count)  # noqa: B023
        self.check(client, target)

    def test_known_names_stay_known(self):
        target, asked = self.datagrams(), []
        port = struct.pack(">H", target.getsockname()[1])
        real = socket.getaddrinfo

        def getaddrinfo(name, *args, **kwargs):
            if not isinstance(name, str):
                asked.append(name)
                name = "127.0.0.1"
            return real(name, *args, **kwargs)

        with mock.patch.object(socks5, "DESTINATIONS", 2), \
                mock.patch("socket.getaddrinfo", getaddrinfo):
            _, client = self.associate(self.serve())
            self.check(client, target)
            for _ in range(3):
                client.send(octets("00 00 00 03 01 78") + port + b"x")
                self.assertEqual(target.recv(100), b"x")
        self.assertEqual(asked, [b"x"])

    def test_only_so_many_destinations_are_remembered(self):
        with mock.patch.object(socks5, "DESTINATIONS", 2):
            server, targets = self.serve(), [self.datagrams() for _ in range(5)]
            _, client = self.associate(server)
            for target in targets:
                self.check(client, target)
            self.assertLessEqual(len(list(server.sessions)[0].relay.routes), 2)

    def test_commands_that_are_served(self):
        for commands, replies in (("connect", "77"), ("connect,udp", "70"), ("bind", "07")):
            server = self.serve(commands=commands.split(","))
            for command, reply in zip((2, 3), replies):
                client = self.client(server)
                client.sendall(octets(GREET + "05 0%d 00 01 7f 00 00 01 00 50" % command))
                self.assertEqual(read_count(client, 4), octets("05 00 05 0" + reply))
        for bad in ({"commands": ["CONNECT"]}, {"udp_advertise": "fe80::1%lo"},
                    {"udp_advertise": "localhost"}):
            with self.assertRaises(ValueError):
                socks5.Settings(**bad)


class BindTest(LoggedTestCase):
    def bind(self, server, address="01 7f 00 00 01 00 00"):
        """A client that has asked for `address` to connect, and where to."""
        client = self.client(server)
        client.sendall(octets(GREET + "05 02 00" + address))
        self.assertEqual(read_count(client, 5), octets("05 00 05 00 00"))
        family, size = {1: (socket.AF_INET, 4), 4: (socket.AF_INET6, 16)}[read_count(client, 1)[0]]
        host = socket.inet_ntop(family, read_count(client, size))
        return client, (host, struct.unpack(">H", read_count(client, 2))[0])

    def peer(self, address, host="127.0.0.1"):
        """A peer that connects from `host`."""
        sock = self.own(socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET))
        sock.bind((host, 0))
        sock.connect(address)
        return sock

    def check_relay(self, client, peer):
        """The second reply, and then a relay as CONNECT has it."""
        self.assertEqual(read_count(client, 10), octets("05 00 00 01") + socket.inet_aton(
            peer.getsockname()[0]) + struct.pack(">H", peer.getsockname()[1]))
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(read_all(peer), (b"question", "end"))
        peer.sendall(b"answer")
        peer.close()
        self.assertEqual(read_all(client), (b"answer", "end"))

    def test_right_peer(self):
        def converse(server):
            client, where = self.bind(server)
            peer = self.peer(where)
            peers.append("%s:%d" % peer.getsockname())
            self.check_relay(client, peer)
            with self.assertRaises(ConnectionRefusedError):
                self.peer(where)

        peers = []
        fields = self.fields(self.log_of(converse)[0])
        self.assertEqual([fields[name] for name in ("command", "reached", "reply", "up", "down")],
                         ["BIND", peers[0], "SUCCEEDED", "8", "6"])

    def test_wrong_peer(self):
        client, where = self.bind(self.serve())
        self.assertEqual(read_all(self.peer(where, "127.0.0.2"))[0], b"")
        self.check_relay(client, self.peer(where))

    def test_name(self):
        with resolver(("127.0.0.1", 0), ("127.0.0.2", 0)):
            client, where = self.bind(self.serve(), "03 01 78 00 15")
            self.assertEqual(read_all(self.peer(where, "127.0.0.3"))[0], b"")
            self.check_relay(client, self.peer(where, "127.0.0.2"))

    def test_any_peer_that_the_rules_allow(self):
        client, where = self.bind(self.serve(rules=["deny 127.0.0.2"]), "01 00 00 00 00 00 00")
        self.assertEqual(read_all(self.peer(where, "127.0.0.2"))[0], b"")
        self.check_relay(client, self.peer(where, "127.0.0.3"))

    def test_refused(self):
        client = self.client(self.serve(rules=["deny 127.0.0.1"]))
        client.sendall(octets(GREET + "05 02 00 01 7f 00 00 01 00 50"))
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(read_all(client), (octets("05 00 05 02 00 01" + " 00" * 6), "end"))

    def test_timeout(self):
        client, _ = self.bind(self.serve(bind_timeout=0.05))
        self.assertEqual(read_count(client, 10), octets("05 06 00 01" + " 00" * 6))

    def test_client_that_leaves(self):
        for leave, early in ((socket.socket.close, 0), (reset, 0), (socket.socket.close, 1),
                             (socket.socket.close, 5000), (reset, 1)):
            def converse(server, leave=leave, early=early):
                client, where = self.bind(server, "01 7f 00 00 01 00 00" + " 01" * early)
                client.sendall(bytes(early))
                leave(client)
                while server.sessions:
                    time.sleep(0.001)  # nothing else tells that the listener has been closed

            self.assertEqual(self.fields(self.log_of(converse)[0])["end"], "client-left")

    def test_server_that_is_closed(self):
        def converse(server):
            self.bind(server)

        self.assertEqual(self.fields(self.log_of(converse)[0])["end"], "server-closed")

    def test_early_data(self):
        for first, second in ((0, 0), (5, 0), (0, 9), (5, 9), (1500, 9), (5, MEBIBYTE)):
            data, server = pattern(first + second + 8)[:first + second], self.serve()
            client, where = self.bind(server, "01 7f 00 00 01 00 00" + data[:first].hex())
            sender = self.thread(lambda: (client.sendall(data[first:]),  # noqa: B023
                                          client.sendall(b"end")))  # noqa: B023
            if second < MEBIBYTE:
                sender.join(PATIENCE)
            else:
                while len(list(server.sessions)[0].early) < socks5.EARLY_LIMIT:
                    time.sleep(0.001)  # nothing outside tells how much has been kept
            peer = self.peer(where)
            self.assertEqual(read_count(client, 10)[:2], octets("05 00"))
            self.assertEqual(read_count(peer, len(data) + 3), data + b"end")
            sender.join(PATIENCE)
            self.assertLess(len(list(server.sessions)[0].early), 2 * socks5.EARLY_LIMIT)

    def test_reset(self):
        client, where = self.bind(self.serve())
        peer = self.peer(where)
        self.assertEqual(read_count(client, 10)[:2], octets("05 00"))
        reset(peer)
        self.assertEqual(read_all(client), (b"", "reset"))

    @unittest.skipUnless(has_ipv6(), "no IPv6 on this host")
    def test_ipv6(self):
        client, where = self.bind(self.serve(host="::1"), "04" + " 00" * 15 + "01 00 00")
        self.assertEqual(where[0], "::1")
        peer = self.peer(where, "::1")
        self.assertEqual(read_count(client, 22), octets("05 00 00 04" + " 00" * 15 + "01")
                         + struct.pack(">H", peer.getsockname()[1]))


class LogTest(LoggedTestCase):
    def test_session_line(self):
        listener = self.listen()
        port = listener.getsockname()[1]

        def converse(server):
            client = self.client(server)
            client.sendall(octets(LOGIN + "05 01 00 03 09 6c 6f 63 61 6c 68 6f 73 74")
                           + struct.pack(">H", port) + b"12345")
            target = self.own(listener.accept()[0])
            self.assertEqual(read_count(target, 5), b"12345")
            target.sendall(b"123")
            target.shutdown(socket.SHUT_WR)
            self.assertEqual(len(read_all(client)[0]), 4 + 10 + 3)
            client.close()
            self.assertEqual(read_all(target), (b"", "end"))

        with resolver(("127.0.0.1", port)):
            lines = self.log_of(converse, users=USERS)
        self.assertEqual(len(lines), 1)
        self.assertRegex(lines[0], (
            r"^session client=127\.0\.0\.1:\d+ user=alice command=CONNECT "
            r"destination=localhost:%d reached=127\.0\.0\.1:%d reply=SUCCEEDED rule=- "
            r"up=5 down=3 seconds=\d+\.\d{3} end=target-closed$") % (port, port))

    def test_why_a_session_ended(self):
        for sent, reply, end in [
                ("", "-", "client-left"), ("05", "-", "client-left"),
                ("05 01 00 05", "-", "client-left"), ("47", "-", "not-socks5"),
                ("05 01 02", "-", "no-acceptable-method"),
                ("05 01 00 05 04 00 01 00 00 00 00 00 00", "COMMAND_NOT_SUPPORTED", "refused")]:
            def converse(server, sent=sent):
                client = self.client(server)
                client.sendall(octets(sent))
                client.shutdown(socket.SHUT_WR)
                read_all(client)

            with self.subTest(sent=sent):
                fields = self.fields(self.log_of(converse)[0])
                self.assertEqual((fields["reply"], fields["end"]), (reply, end))

    def test_resets_are_told_apart(self):
        for breaker in ("client", "target"):
            def converse(server, breaker=breaker):
                client, target = self.tunnel(server)
                reset(client if breaker == "client" else target)
                read_all(target if breaker == "client" else client)

            self.assertEqual(self.fields(self.log_of(converse)[0])["end"], breaker + "-reset")

    def test_failed_login_has_a_line_and_no_password(self):
        def converse(server):
            client = self.client(server)
            client.sendall(octets("05 01 02 01 05 61 6c 69 63 65 07 68 75 6e 74 65 72 32"))
            client.shutdown(socket.SHUT_WR)
            read_all(client)

        lines = self.log_of(converse, level="DEBUG", users=USERS)
        self.assertRegex(lines[0], r"^login failed client=127\.0\.0\.1:\d+ user=alice$")
        self.assertIn("end=login-failed", lines[1])
        self.assertNotIn("hunter2", "".join(lines))
        self.assertNotIn("secret", "".join(lines))

    def test_failed_login_is_answered_later(self):
        with mock.patch.object(socks5, "LOGIN_PAUSE", 2 * PATIENCE):
            server = self.serve(users=USERS)
            with self.assertLogs("socks5", "WARNING"):
                guess = self.client(server)
                guess.sendall(octets("05 01 02 01 01 61 01 62"))
                self.assertEqual(read_count(guess, 2), octets("05 02"))
                client = self.client(server)  # others are served in the meantime
                client.sendall(octets(LOGIN))
                self.assertEqual(read_count(client, 4), octets("05 02 01 00"))
                while not any(session.phase == "refusal" for session in list(server.sessions)):
                    time.sleep(0.001)  # nothing outside tells when a session is that far
            guess.setblocking(False)
            with self.assertRaises(BlockingIOError):
                guess.recv(1)
            self.stop(server)  # without waiting for the pause
            guess.setblocking(True)
            self.assertEqual(read_all(guess), (octets("01 01"), "end"))

    def test_nothing_from_the_network_can_forge_a_line(self):
        name = b"x\r\nsession \x1b[31m client=6.6.6.6:1 \xe2\x80\xae\xff\\\0 end=fine"

        def converse(server):
            client = self.client(server)
            client.sendall(octets("05 01 00 05 01 00 03") + bytes([len(name)]) + name + b"\0\x50")
            client.shutdown(socket.SHUT_WR)
            read_all(client)

        line = self.log_of(converse)[0]
        self.assertRegex(line, r"^[!-~ ]*$")
        self.assertEqual(len(line.split(" ")), 12)
        self.assertIn(r"destination=[x\r\nsession\x20\x1b[31m\x20client=6.6.6.6:1\x20", line)
        self.assertEqual(self.fields(line)["end"], "refused")

    def test_traceback_at_debug_only(self):
        class Handler(socks5.Socks5RequestHandler):
            def authorize(self, destination):
                raise ZeroDivisionError

        def converse(server):
            client, _ = self.request(server, 80)
            client.close()

        for level, expected in (("INFO", False), ("DEBUG", True)):
            with self.assertLogs("socks5", level) as logs:
                server = self.serve(Handler)
                converse(server)
                self.stop(server)
            self.assertEqual(any(record.exc_info for record in logs.records), expected)
            self.assertEqual(len([r for r in logs.records if r.levelname == "ERROR"]), 1)


# ---- server ------------------------------------------------------------------------------

class DeadlineTest(LoggedTestCase):
    def setUp(self):
        super().setUp()
        patch = mock.patch.object(socks5, "SWEEP_INTERVAL", 0.02)
        patch.start()
        self.addCleanup(patch.stop)

    def test_silent_client(self):
        def converse(server):
            self.assertEqual(read_all(self.client(server)), (b"", "end"))

        line = self.log_of(converse, handshake_timeout=0.1)[0]
        self.assertEqual(self.fields(line)["end"], "handshake-timeout")

    def test_dripping_client(self):
        client = self.client(self.serve(handshake_timeout=0.3))
        client.settimeout(0.01)
        drops = iter(octets("05 ff") + bytes(255))
        with contextlib.suppress(ConnectionError):
            while True:
                try:
                    client.sendall(bytes([next(drops)]))
                    if not client.recv(1):
                        break
                except socket.timeout:
                    pass  # and on to the next drop, as long as there is one

    def test_handshake_timeout_does_not_end_a_relay(self):
        with mock.patch.object(socks5.Socks5RequestHandler, "check_deadline", autospec=True,
                               side_effect=socks5.Socks5RequestHandler.check_deadline) as check:
            client, target = self.tunnel(self.serve(handshake_timeout=0.2))
            swept = check.call_count
            deadline = time.monotonic() + 0.3
            while check.call_count < swept + 2 or time.monotonic() < deadline:
                client.sendall(b"x")
                self.assertEqual(read_count(target, 1), b"x")

    def test_idle_relay_is_reset(self):
        def converse(server):
            client, target = self.tunnel(server)
            self.assertEqual(read_all(client), (b"", "reset"))
            self.assertEqual(read_all(target), (b"", "reset"))

        line = self.log_of(converse, idle_timeout=0.1)[0]
        self.assertEqual(self.fields(line)["end"], "idle-timeout")

    def test_relay_knows_of_its_end_before_its_threads_wake(self):
        server, known, real = self.serve(idle_timeout=0.1), [], socks5.wake

        def wake(sock, how):
            known.extend(session.relay.broken for session in server.sessions)
            real(sock, how)

        client, target = self.tunnel(server)
        with mock.patch.object(socks5, "wake", wake):
            read_all(client)
        self.assertEqual(set(known), {True})

    def test_linger(self):
        def converse(server):
            client, target = self.tunnel(server)
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(target), (b"", "end"))
            self.assertEqual(read_all(client), (b"", "reset"))

        line = self.log_of(converse, linger=0.1)[0]
        self.assertEqual(self.fields(line)["end"], "linger-timeout")

    def test_peer_that_takes_nothing_cannot_pin_a_thread(self):
        def converse(server):
            client, target = self.tunnel(server)
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while True:  # until the relay has ended under it
                    target.sendall(bytes(MEBIBYTE))
            self.assertEqual(read_all(client)[1], "reset")

        line = self.log_of(converse, linger=0.2)[0]
        self.assertEqual(self.fields(line)["end"], "linger-timeout")

    def test_flood_cannot_outlive_a_deadline(self):
        client, target = self.tunnel(self.serve(linger=0.2))
        target.shutdown(socket.SHUT_WR)  # and it reads nothing, so there is no progress
        with self.assertRaises(ConnectionError):
            while True:
                client.sendall(bytes(MEBIBYTE))

    @unittest.skipUnless(sys.platform == "linux", "the progress of a slow reader shows on Linux")
    def test_slow_reader_makes_progress(self):
        listener = self.listen()
        server = self.serve(linger=0.5)
        client = self.own(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        client.connect(server.server_address)
        client.sendall(octets("05 01 00 05 01 00 01 7f 00 00 01")
                       + struct.pack(">H", listener.getsockname()[1]))
        target = self.own(listener.accept()[0])
        read_count(client, 12)
        client.shutdown(socket.SHUT_WR)
        content = pattern(8 * MEBIBYTE)
        self.thread(lambda: (target.sendall(content), target.close()))
        received, slow_until = 0, time.monotonic() + 2
        while time.monotonic() < slow_until:  # four times `linger`
            received += len(client.recv(4096))
            time.sleep(0.01)  # this is what makes it slow
        self.assertEqual(received + len(read_all(client)[0]), len(content))


class ServerTest(LoggedTestCase):
    def test_close_resets_relays_and_waits(self):
        def converse(server):
            client, target = self.tunnel(server)
            self.stop(server)
            self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))

        self.assertEqual(self.fields(self.log_of(converse)[0])["end"], "server-closed")

    def test_close_resets_busy_relays(self):
        for _ in range(10):
            server = self.serve()
            client, target = self.tunnel(server)
            ends = []

            def send(target=target):
                with contextlib.suppress(OSError):
                    while True:
                        target.sendall(bytes(MEBIBYTE))

            def receive(client=client, ends=ends):
                try:
                    while client.recv(MEBIBYTE):
                        pass
                    ends.append("end")
                except ConnectionResetError:
                    ends.append("reset")

            threads = [self.thread(send), self.thread(receive)]
            self.stop(server)
            for thread in threads:
                thread.join(PATIENCE)
            self.assertEqual(ends, ["reset"])

    def test_close_while_an_attempt_is_about_to_begin(self):
        host, port = self.black_hole()

        class BeforeAdopt(socks5.Socks5RequestHandler):
            def connect(self, destination):
                self.wait_for_hang_up()
                return super().connect(destination)

            def wait_for_hang_up(self):
                self.phase = "here"
                while not self.hung_up:
                    time.sleep(0.001)

        class AfterAdopt(BeforeAdopt):
            connect = socks5.Socks5RequestHandler.connect

            def adopt(self, sock):
                super().adopt(sock)
                self.wait_for_hang_up()

        for handler in (BeforeAdopt, AfterAdopt):
            with self.assertLogs("socks5", "INFO") as logs:
                server = self.serve(handler, connect_timeout=float("inf"))
                client = self.client(server)
                client.sendall(octets(GREET + "05 01 00 01") + socket.inet_aton(host)
                               + struct.pack(">H", port))
                while not any(session.phase == "here" for session in list(server.sessions)):
                    time.sleep(0.001)  # nothing outside tells when a session is that far
                self.stop(server)
            self.assertIn("end=server-closed", logs.output[0])

    def test_close_in_every_phase(self):
        listener, (host, port) = self.listen(), self.black_hole()
        head = octets("05 01 00 05 01 00 01") + socket.inet_aton(host)
        for phase, sent in [("handshake", b""), ("handshake", b"\5\1\0\5"),
                            ("connect", head + struct.pack(">H", port)),
                            ("connect", head + struct.pack(">H", listener.getsockname()[1])),
                            ("refusal", octets("05 01 02"))]:
            with self.subTest(phase), mock.patch.object(
                    socks5, "REFUSAL_TIMEOUT", PATIENCE), socks5.Socks5Server(
                        ("127.0.0.1", 0), connect_timeout=PATIENCE,
                        handshake_timeout=PATIENCE) as server:
                client = self.client(server)
                client.sendall(sent)
                server.handle_request()
                while not any(session.phase == phase for session in list(server.sessions)):
                    time.sleep(0.001)  # nothing outside tells when a session is that far
            self.assertEqual(server.sessions, set())
            self.assertFalse(any(thread.is_alive() for thread in server.cache.threads))

    def test_close_before_a_session_has_begun(self):
        may_begin = threading.Event()

        class Handler(socks5.Socks5RequestHandler):
            def setup(self):
                may_begin.wait(PATIENCE)
                super().setup()

        server = self.serve(Handler)
        client = self.client(server)
        while not server.cache.threads:
            time.sleep(0.001)  # nothing outside tells when it has been accepted
        server.shutdown()
        closing = self.thread(server.server_close)
        while not server.closed:
            time.sleep(0.001)
        may_begin.set()
        closing.join(PATIENCE)
        self.assertEqual(read_all(client), (b"", "end"))

    def test_thread_that_cannot_be_started_costs_its_client_only(self):
        start = threading.Thread.start
        failures = iter([RuntimeError("can't start new thread")])

        def fail_once(thread):
            for failure in failures:
                raise failure
            start(thread)

        with self.assertLogs("socks5", "ERROR") as logs:
            server = self.serve()
            with mock.patch("threading.Thread.start", fail_once):
                self.assertEqual(read_all(self.client(server)), (b"", "end"))
            self.tunnel(server)
        self.assertIn("error=RuntimeError", logs.output[0])

    def test_second_thread_that_cannot_be_started(self):
        listener = self.listen()
        server = self.serve()
        with mock.patch.object(socks5.Relay, "run", side_effect=RuntimeError("no new thread")):
            client, reply = self.request(server, listener.getsockname()[1])
            self.assertEqual(reply[1], Reply.SUCCEEDED)
            self.assertEqual(read_all(client), (b"", "reset"))

    def test_clients_wait_where_there_is_no_room(self):
        server = self.serve()
        server.room = 1
        first, target = self.tunnel(server)
        with self.assertLogs("socks5", "WARNING") as logs:
            second = self.client(server)
            second.sendall(octets(GREET))
            while not logs.output:
                time.sleep(0.001)  # nothing outside tells that it has to wait
        self.assertIn("clients have to wait", logs.output[0])
        first.close()
        target.close()
        self.assertEqual(read_count(second, 2), octets("05 00"))

    @unittest.skipUnless(resource, "no limits to raise")
    def test_clients_that_are_served(self):
        for clients, served in [(["127.0.0.0/8"], True), (["10.0.0.0/8", "127.0.0.1"], True),
                                (["10.0.0.0/8", "::1"], False)]:
            def converse(server, served=served):
                client = self.client(server)
                with contextlib.suppress(OSError):  # it may have been closed already
                    client.sendall(octets("05 01 02"))
                self.assertEqual(read_all(client)[0], octets("05 ff") if served else b"")

            line = self.log_of(converse, clients=clients)[0]
            self.assertRegex(line, r"^session " if served else
                             r"^client refused client=127\.0\.0\.1:\d+$")

    def test_limits(self):
        for setting in ("max_sessions", "max_per_client"):
            with self.assertLogs("socks5", "WARNING") as logs, \
                    mock.patch.object(socks5, "WARNING_INTERVAL", PATIENCE):
                server = self.serve(**{setting: 2})
                tunnels = [self.tunnel(server) for _ in range(2)]
                for _ in range(3):
                    self.assertEqual(read_all(self.client(server))[0], b"")
                for sock in tunnels.pop():
                    sock.close()
                while len(server.guests) > 1:
                    time.sleep(0.001)  # nothing outside tells when a session has left
                tunnels.append(self.tunnel(server))
                self.stop(server)
            self.assertEqual(len(logs.output), 1)
            self.assertRegex(logs.output[0], r"too many sessions.* client=127\.0\.0\.1:\d+$")

    def test_limit_is_each_client_s(self):
        server = self.serve(max_per_client=1)
        self.tunnel(server)
        with self.own(socket.socket()) as client:
            client.bind(("127.0.0.2", 0))
            client.connect(server.server_address)
            client.sendall(octets(GREET))
            self.assertEqual(read_count(client, 2), octets("05 00"))

    def test_report(self):
        def converse(server):
            self.client(server).close()
            client, target = self.tunnel(server)
            client.sendall(b"12345")
            self.assertEqual(read_count(target, 5), b"12345")
            while not server.totals or not any(
                    session.relay and session.relay.up.octets for session in server.sessions):
                time.sleep(0.001)  # the sender's thread counts after the receiver has read
            server.report()

        lines = self.log_of(converse, level=socks5.NOTICE)
        self.assertRegex(lines[0], (
            r"^live client=127\.0\.0\.1:\d+ user=- command=CONNECT destination=127\.0\.0\.1:\d+ "
            r"reached=127\.0\.0\.1:\d+ reply=SUCCEEDED rule=- up=5 down=0 seconds=\d+\.\d{3} "
            r"idle=\d+\.\d{3} phase=\w+$"))
        self.assertEqual(lines[1:], ["totals live=1 sessions=1 up=0 down=0 client-left=1"])

    def test_drain(self):
        server = self.serve()
        server.drain(PATIENCE)  # nobody is there
        client, target = self.tunnel(server)
        server.drain(0)
        self.assertEqual(len(server.sessions), 1)
        thread = self.thread(server.drain, PATIENCE)
        client.close()
        target.close()
        thread.join(PATIENCE)
        self.assertFalse(thread.is_alive() or server.guests)

    def test_six_hundred_tunnels(self):
        socks5.raise_descriptor_limit()
        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 4000:
            self.skipTest("too few descriptors")
        port, server = self.echo(), self.serve()
        clients = [self.request(server, port)[0] for _ in range(600)]
        for client in clients:
            client.sendall(b"ping")
        for client in clients:
            self.assertEqual(read_count(client, 4), b"ping")
            client.close()

    def test_a_thousand_short_sessions(self):
        port, server = self.echo(), self.serve()
        for _ in range(1000):
            client, _ = self.request(server, port)
            client.sendall(b"ping")
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(client), (b"ping", "end"))
            client.close()
        self.stop(server)
        self.assertEqual(server.sessions, set())


# ---- command line ------------------------------------------------------------------------

class CommandTestCase(TestCase):
    """Tests of commands in a process of their own."""

    def start(self, *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, descriptors=None):
        """A Python that runs `command`, perhaps with few descriptors."""
        def prepare():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if descriptors:
                resource.setrlimit(resource.RLIMIT_NOFILE, descriptors)

        process = subprocess.Popen(
            (sys.executable,) + command, cwd=HERE, stdout=stdout, stderr=stderr,
            universal_newlines=True, preexec_fn=prepare)
        for stream in (process.stdout, process.stderr):
            if stream:
                self.addCleanup(stream.close)
        self.addCleanup(process.wait, PATIENCE)
        self.addCleanup(process.kill)
        return process

    def port(self, process):
        """The port in the first line that `process` prints."""
        return int(re.search(r" port (\d+) ", process.stdout.readline()).group(1))

    def open_tunnel(self, port):
        """A client of the server on `port`, relayed to a target."""
        listener = self.listen()
        client = self.own(socket.create_connection(("127.0.0.1", port)))
        client.sendall(octets(GREET + "05 01 00 01 7f 00 00 01")
                       + struct.pack(">H", listener.getsockname()[1]))
        self.assertEqual(read_count(client, 12)[:4], octets("05 00 05 00"))
        return client, self.own(listener.accept()[0])

    def file(self, content, mode=0o600):
        """The path of a file with this content, which is there until the end."""
        handle, path = tempfile.mkstemp()
        self.addCleanup(os.remove, path)
        os.write(handle, content)
        os.close(handle)
        os.chmod(path, mode)
        return path

    def run_to_end(self, *command, **settings):
        """The exit status of `command`, and what it says."""
        process = self.start(*command, **settings)
        err = process.communicate(timeout=PATIENCE)[1]
        self.assertNotIn("Traceback", err)
        return process.returncode, err


@unittest.skipUnless(os.name == "posix", "signals and descriptors as POSIX has them")
class CommandLineTest(CommandTestCase):
    def test_start_line_and_interrupt(self):
        for address, url in [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")][:1 + has_ipv6()]:
            process = self.start("socks5.py", "--drain", "0", "-b", address, "0")
            line = process.stdout.readline()
            self.assertRegex(line, r"^Serving SOCKS5 on %s port (\d+) \(socks5h://%s:\1\) \.\.\.$"
                             % (address, re.escape(url)))
            port = int(line.split()[5])
            client = self.own(socket.create_connection((address, port)))
            client.sendall(octets("05 01 00"))
            self.assertEqual(read_count(client, 2), octets("05 00"))
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
            self.assertEqual((process.returncode, out), (0, "Interrupted, ending.\n"))
            self.assertRegex(err, r"^\S+ \S+ INFO session client=.* end=server-closed\n$")

    def test_port_in_use(self):
        taken = str(self.listen().getsockname()[1])
        status, err = self.run_to_end("socks5.py", taken)
        self.assertEqual(status, 1)
        self.assertRegex(err, r"^socks5\.py: cannot serve on 127\.0\.0\.1 port %s: .+\n$" % taken)

    def test_address_that_is_not_ours(self):
        for address in ("192.0.2.1", "2001:db8::1", "nobody.invalid", "\u00fc..x", "\udcff"):
            status, err = self.run_to_end("socks5.py", "--open", "-b", address, "0")
            self.assertEqual((status, err.count("\n")), (1, 1), err)

    def test_open_proxy_is_refused(self):
        for address in ("0.0.0.0", "::", "192.0.2.1", ""):
            status, err = self.run_to_end("socks5.py", "-b", address, "0")
            self.assertEqual(status, 2)
            self.assertIn("--users", err)
            self.assertIn("--open", err)

    def test_open_proxy_on_demand(self):
        process = self.start("socks5.py", "--open", "-b", "0.0.0.0", "0")
        self.own(socket.create_connection(("127.0.0.1", self.port(process))))

    def test_options_become_settings(self):
        arguments = ["-b", "::1", "--connect-timeout", "1", "--handshake-timeout", "2",
                     "--idle-timeout", "3", "--linger", "4.5", "--allow", "a:1", "--deny", "b",
                     "--allow", "c", "--client", "10.0.0.0/8", "--max-sessions", "6",
                     "--max-per-client", "7", "--bind-timeout", "8", "--udp-timeout", "9",
                     "--udp-ports", "10-12", "--udp-advertise", "192.0.2.1", "--commands", "udp",
                     "5"]
        with mock.patch.object(socks5, "Settings") as settings:
            for argv in ([], arguments):
                socks5.read_settings(socks5.make_parser().parse_args(argv))
        self.assertEqual([call for call in settings.mock_calls if not call[0]], [
            mock.call(users=None, rules=[], clients=[], commands=["connect", "udp", "bind"],
                      max_sessions=None, max_per_client=None, connect_timeout=10,
                      handshake_timeout=10, idle_timeout=None, linger=60, bind_timeout=60,
                      udp_timeout=300, udp_ports=(0,), udp_advertise=None),
            mock.call(users=None, rules=["allow a:1", "deny b", "allow c"],
                      clients=["10.0.0.0/8"], commands=["udp"], max_sessions=6, max_per_client=7,
                      connect_timeout=1, handshake_timeout=2, idle_timeout=3, linger=4.5,
                      bind_timeout=8, udp_timeout=9, udp_ports=range(10, 13),
                      udp_advertise="192.0.2.1")])

    def test_terminate(self):
        process = self.start("socks5.py", "--drain", "0", "0")
        listener = self.listen()
        with socket.create_connection(("127.0.0.1", self.port(process))) as client:
            client.sendall(octets(GREET + "05 01 00 01 7f 00 00 01")
                           + struct.pack(">H", listener.getsockname()[1]))
            read_count(client, 12)
            process.terminate()
            self.assertEqual(read_all(client), (b"", "reset"))
        self.assertEqual(process.communicate(timeout=PATIENCE)[0], "Interrupted, ending.\n")
        self.assertEqual(process.returncode, 0)

    @unittest.skipUnless(os.path.isdir("/proc/self"), "no /proc to read a process's limits from")
    def test_descriptor_limit_is_raised(self):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        process = self.start("socks5.py", "0", descriptors=(64, hard))
        self.port(process)
        with open("/proc/%d/limits" % process.pid) as file:
            self.assertRegex(file.read(), r"Max open files +%d +%d " % (hard, hard))

    def test_usage_errors(self):
        for arguments in (["65536"], ["-1"], ["--client", "::ffff:10.0.0.0/104"],
                          ["--commands", "connect,associate"], ["--udp-ports", "2-1"],
                          ["--udp-ports", "80"], ["--udp-advertise", "me"], ["--drain", "-1"],
                          ["x"], ["--users", ""], ["--linger", "0"],
                          ["--linger", "nan"], ["--idle-timeout", "inf"],
                          ["--connect-timeout", "x"], ["-q", "-v"], ["--no-such"],
                          ["--workers", "0"], ["--users", os.path.join(HERE, "none")],
                          ["--users", HERE]):
            with self.subTest(arguments):
                self.assertEqual(self.run_to_end("socks5.py", *arguments)[0], 2)

    def test_version_and_help(self):
        for option in ("--version", "--help"):
            process = self.start("socks5.py", option)
            self.assertIn("socks5", process.communicate(timeout=PATIENCE)[0])
            self.assertEqual(process.returncode, 0)

    def test_bad_users_file(self):
        path = self.file(b"alice:secret\nhunter2\n")
        status, err = self.run_to_end("socks5.py", "--users", path, "0")
        self.assertEqual(status, 2)
        self.assertIn("%s, line 2" % path, err)
        self.assertNotIn("hunter2", err)

    def test_users(self):
        for mode, warning in ((0o600, False), (0o644, True)):
            path = self.file(b"alice:secret\n", mode)
            process = self.start("socks5.py", "-q", "--drain", "0", "-b", "0.0.0.0",
                                 "--users", path, "0")
            client = self.own(socket.create_connection(("127.0.0.1", self.port(process))))
            client.sendall(octets(LOGIN))
            self.assertEqual(read_count(client, 4), octets("05 02 01 00"))
            process.send_signal(signal.SIGINT)
            self.assertEqual("chmod o-r" in process.communicate(timeout=PATIENCE)[1], warning)

    def test_users_in_rules(self):
        path = self.file(b"alice:secret\n")
        for arguments in (["--allow", "alice@*"], ["--users", path, "--deny", "bob@*"]):
            status, err = self.run_to_end("socks5.py", *arguments)
            self.assertEqual(status, 2)
            self.assertIn("no such user", err)

    def test_clients_are_a_decision(self):
        process = self.start("socks5.py", "-b", "0.0.0.0", "--client", "10.0.0.0/8", "0")
        client = self.own(socket.create_connection(("127.0.0.1", self.port(process))))
        self.assertEqual(read_all(client)[0], b"")
        self.assertIn("client refused", process.stderr.readline())

    def test_options_from_a_file(self):
        good = self.file(b"# a comment\n\n--deny '127.0.0.0/8'  # mine\n-q\n")
        process = self.start("socks5.py", "@" + good, "0")
        client = self.own(socket.create_connection(("127.0.0.1", self.port(process))))
        client.sendall(octets(GREET + "05 01 00 01 7f 00 00 01 00 50"))
        self.assertEqual(read_count(client, 4), octets("05 00 05 02"))
        loop = self.file(b"")
        for content in (b"--deny 'x", b"--linger 0", b"\xff", b"--deny a:", b"--no-such",
                        b"alice:hunter2", b"@" + os.fsencode(loop)):
            with open(loop, "wb") as file:
                file.write(content)
            with self.subTest(content=content):
                status, err = self.run_to_end("socks5.py", "@" + loop, "0")
                self.assertEqual((status, "socks5.py: error: " in err), (2, True), err)
                self.assertNotIn("hunter2", err)
        self.assertEqual(self.run_to_end("socks5.py", "@" + HERE)[0], 2)

    def test_quiet(self):
        process = self.start("socks5.py", "-q", "0")
        self.own(socket.create_connection(("127.0.0.1", self.port(process)))).close()
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.communicate(timeout=PATIENCE)[1], "")

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full to be a full disk")
    def test_full_disk(self):
        with open("/dev/full", "w") as full:
            process = self.start("socks5.py", "0", stderr=full)
            status, err = self.run_to_end("-c", "import socks5; socks5.announce('')", stdout=full)
        self.assertEqual((status, err), (0, ""))
        port = self.port(process)
        for _ in range(2):  # the first session's line could not be written
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(octets("05 01 02"))
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(client), (octets("05 ff"), "end"))

    @unittest.skipUnless(os.path.isdir("/proc/self"), "no /proc to read a process's time from")
    def test_descriptors_exhausted_and_recovered(self):
        process = self.start("socks5.py", "-q", "--handshake-timeout", str(2 * PATIENCE), "0",
                             descriptors=(32, 32))
        address = ("127.0.0.1", self.port(process))
        clients = [self.own(socket.create_connection(address)) for _ in range(60)]
        self.assertIn("clients have to wait", process.stderr.readline())
        before = self.cpu_seconds(process)
        time.sleep(1)  # this is the second that is measured
        self.assertLess(self.cpu_seconds(process) - before, 0.5)
        queued = clients.pop()
        for client in clients:
            client.close()
        queued.sendall(octets(GREET))
        self.assertEqual(read_count(queued, 2), octets("05 00"))
        with socket.create_connection(address) as client:
            client.sendall(octets(GREET))
            self.assertEqual(read_count(client, 2), octets("05 00"))

    def cpu_seconds(self, process):
        with open("/proc/%d/stat" % process.pid) as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def children(process):
    """The child processes of `process`."""
    with open("/proc/%d/task/%d/children" % (process.pid, process.pid)) as file:
        return [int(child) for child in file.read().split()]


@unittest.skipUnless(hasattr(os, "fork") and os.path.exists(
    "/proc/self/task/%d/children" % os.getpid()), "no fork, or no /proc to see workers in")
class WorkersTest(CommandTestCase):
    def start_workers(self, *options, count=2):
        """A server with workers, its port, and the workers."""
        process = self.start("socks5.py", "-q", "--workers", str(count), *options, "0")
        port = self.port(process)
        while len(children(process)) < count:
            time.sleep(0.001)  # nothing outside tells when they have been started
        return process, port, children(process)

    def runs(self, process):
        """Whether a thread of `process` has not been stopped."""
        folder = "/proc/%d/task" % process
        for thread in os.listdir(folder):
            with open("%s/%s/stat" % (folder, thread)) as file:
                if file.read().rpartition(")")[2].split()[0] != "T":
                    return True
        return False

    def test_clients_in_the_queue_of_workers_that_die_are_served(self):
        process, port, workers = self.start_workers()
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        while any(self.runs(worker) for worker in workers):
            time.sleep(0.001)  # a thread that has not stopped yet would accept a client
        queued = [self.own(socket.create_connection(("127.0.0.1", port))) for _ in range(20)]
        for client in queued:
            client.sendall(octets(GREET))
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        for client in queued:
            self.assertEqual(read_count(client, 2), octets("05 00"))
        self.assertIn("has died", process.stderr.readline())
        while len(children(process)) < len(workers):
            time.sleep(0.001)  # until both have been replaced
        self.assertFalse(set(children(process)) & set(workers))

    def test_worker_killed_under_load(self):
        _, port, workers = self.start_workers()
        port_of_echo, failed = self.echo(), []

        def converse():
            for _ in range(50):
                try:
                    with socket.create_connection(("127.0.0.1", port)) as client:
                        client.settimeout(PATIENCE)
                        client.sendall(octets(GREET + "05 01 00 01 7f 00 00 01")
                                       + struct.pack(">H", port_of_echo) + b"ping")
                        read_count(client, 16)
                except (OSError, AssertionError):
                    failed.append(1)  # one that the dead worker was serving

        threads = [self.thread(converse) for _ in range(4)]
        os.kill(workers[0], signal.SIGKILL)
        for thread in threads:
            thread.join(2 * PATIENCE)
        self.assertLessEqual(len(failed), len(threads))

    def test_signal_ends_parent_and_workers(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            process, port, workers = self.start_workers("--drain", "0")
            client, target = self.open_tunnel(port)
            process.send_signal(number)
            self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))
            out, err = process.communicate(timeout=PATIENCE)
            self.assertEqual((process.returncode, out, err), (0, "Interrupted, ending.\n", ""))
            for worker in workers:
                with self.assertRaises(ProcessLookupError):
                    os.kill(worker, 0)

    def test_interrupt_from_the_terminal(self):
        process, port, workers = self.start_workers("--drain", "0")
        client, target = self.open_tunnel(port)
        for each in (*workers, process.pid):  # a terminal sends it to all of them
            os.kill(each, signal.SIGINT)
        self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))
        self.assertEqual(process.wait(PATIENCE), 0)

    def test_workers_end_with_a_parent_that_is_killed(self):
        process, port, _ = self.start_workers(
            "--drain", str(2 * PATIENCE), "--handshake-timeout", "1")
        client, target = self.open_tunnel(port)
        silent = self.own(socket.create_connection(("127.0.0.1", port)))
        process.kill()
        with self.assertRaises(OSError):
            while True:  # until a worker has noticed
                socket.create_connection(("127.0.0.1", port)).close()
        self.assertEqual(read_all(silent), (b"", "end"))
        client.sendall(b"ping")
        self.assertEqual(read_count(target, 4), b"ping")
        client.close()
        target.close()
        self.assertEqual(process.stdout.read(), "")  # whose end comes when all have left

    def test_pause_grows_while_workers_die_at_once(self):
        service = socks5.Service(None, 1, 0, None)
        for descriptor in service.pipe:
            self.addCleanup(os.close, descriptor)
        pauses = []
        with mock.patch.object(service, "start_missing", lambda: pauses.append(service.pause)), \
                mock.patch("os.waitpid", lambda process, options: (process, 9)):
            for age in [0] * 7 + [60, 0]:
                service.workers = {process: (0, time.monotonic() - age) for process in (1, 2)}
                service.replace_dead()
        self.assertEqual(pauses, [0.1, 0.2, 0.4, 0.8, 1.6, 3, 3, 0.1, 0.2])

    def test_process_that_cannot_be_started(self):
        service = socks5.Service(None, 2, 0, None)
        for descriptor in service.pipe:
            self.addCleanup(os.close, descriptor)
        with mock.patch("os.fork", side_effect=[1, BlockingIOError(errno.EAGAIN, "full"), 2]), \
                mock.patch("signal.alarm") as alarm, self.assertLogs("socks5") as logs:
            service.start_missing()
            self.assertEqual((list(service.workers), alarm.call_count), ([1], 1))
            service.start_missing()
        self.assertEqual([number for number, _ in service.workers.values()], [0, 1])
        self.assertEqual([record.getMessage() for record in logs.records],
                         ["no worker can be started: full"])

    @unittest.skipUnless(hasattr(os, "sched_getaffinity"), "no choice of CPUs here")
    def test_each_worker_stays_on_one_cpu(self):
        _, port, workers = self.start_workers()
        self.open_tunnel(port)
        for worker in workers:
            while len(os.sched_getaffinity(worker)) > 1:
                time.sleep(0.001)  # until it has come that far


@unittest.skipUnless(hasattr(signal, "pthread_sigmask"), "signals as POSIX has them")
class SignalsTest(CommandTestCase):
    """Each signal, to a server alone, and to one with workers."""

    def each(self, *options):
        """A server alone, then one with workers: the process, its port, and how many serve."""
        for workers in (1, 2)[:1 + hasattr(os, "fork")]:
            process = self.start("socks5.py", "-q", "--workers", str(workers), *options, "0")
            yield process, self.port(process), workers

    def wait_for(self, process, what, times):
        """Read what `process` logs until so many lines say `what`; the lines."""
        lines = []
        while sum(what in line for line in lines) < times:
            lines.append(process.stderr.readline())
            self.assertTrue(lines[-1], lines)
        return lines

    def check_relays(self, client, target):
        """That octets go both ways."""
        for source, sink in ((client, target), (target, client)):
            source.sendall(b"ping")
            self.assertEqual(read_count(sink, 4), b"ping")

    def test_sessions_may_end_by_themselves(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            for process, port, _ in self.each("--drain", str(2 * PATIENCE)):
                client, target = self.open_tunnel(port)
                process.send_signal(number)
                self.assertEqual(process.stdout.readline(), "Interrupted, ending.\n")
                with self.assertRaises(OSError):
                    while True:  # those in the queue are turned away a moment later
                        socket.create_connection(("127.0.0.1", port)).close()
                self.check_relays(client, target)
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(target), (b"", "end"))
                target.sendall(b"late")
                target.close()
                self.assertEqual(read_all(client), (b"late", "end"))
                self.assertEqual(process.wait(PATIENCE), 0)
                self.assertEqual(process.stderr.read(), "")

    def test_signal_to_all_is_not_a_second_one(self):
        process, port, _ = list(self.each("--drain", str(2 * PATIENCE)))[-1]
        client, target = self.open_tunnel(port)
        everybody = [process.pid] + children(process)
        for each in everybody:
            os.kill(each, signal.SIGTERM)
        self.assertEqual(process.stdout.readline(), "Interrupted, ending.\n")
        for each in everybody[1:]:
            with contextlib.suppress(ProcessLookupError):  # it had nothing to wait for
                os.kill(each, signal.SIGTERM)
        self.check_relays(client, target)
        process.terminate()
        self.assertEqual((read_all(client)[1], process.wait(PATIENCE)), ("reset", 0))

    def test_second_signal_ends_at_once(self):
        for process, port, _ in self.each("--drain", str(2 * PATIENCE)):
            client, target = self.open_tunnel(port)
            process.terminate()
            self.assertEqual(process.stdout.readline(), "Interrupted, ending.\n")
            self.check_relays(client, target)
            process.terminate()
            self.assertEqual((read_all(client)[1], read_all(target)[1]), ("reset", "reset"))
            self.assertEqual(process.wait(PATIENCE), 0)

    def log_in(self, port, password):
        """What the server on `port` says to alice, who then asks for a target."""
        with self.own(socket.create_connection(("127.0.0.1", port))) as client:
            client.sendall(octets("05 01 02 01 05 61 6c 69 63 65") + bytes([len(password)])
                           + password + octets("05 01 00 01 7f 00 00 01 00 00"))
            client.shutdown(socket.SHUT_WR)
            return read_all(client)[0][:6]

    def test_reload(self):
        denied = octets("05 02 01 00 05 02")
        users = self.file(b"alice:one")
        options = self.file(b"--deny *")
        for process, port, workers in self.each("--users", users, "@" + options):
            readers = workers + (workers > 1)  # with workers, the parent reads them too
            for path, content in ((users, b"alice:one"), (options, b"--deny *")):
                self.write(path, content)
            process.send_signal(signal.SIGHUP)
            self.wait_for(process, "NOTICE settings have been read again", readers)
            self.assertEqual(self.log_in(port, b"one"), denied)
            self.write(users, b"alice:two")
            process.send_signal(signal.SIGHUP)
            self.wait_for(process, "NOTICE settings have been read again", readers)
            self.assertEqual(self.log_in(port, b"two"), denied)
            for path, content, why in (
                    (users, b"hunter2", "line 1"), (options, b"--deny *:", "HOST"),
                    (options, b"--help", "0"), (options, b"--allow bob@*", "no such user")):
                self.write(path, content)
                process.send_signal(signal.SIGHUP)
                line = self.wait_for(process, "WARNING settings are as before", 1)[-1]
                self.assertIn(why, line)
                self.assertNotIn("hunter2", line)
                self.assertEqual(self.log_in(port, b"two"), denied)
                self.write(users, b"alice:two")
            self.write(options, b"")
            process.send_signal(signal.SIGHUP)
            self.wait_for(process, "NOTICE settings have been read again", readers)
            self.assertNotEqual(self.log_in(port, b"two"), denied)

    def write(self, path, content):
        with open(path, "wb") as file:
            file.write(content)

    def test_reload_cannot_open_the_proxy(self):
        options = self.file(b"-b 0.0.0.0 --client 127.0.0.0/8")
        process = self.start("socks5.py", "@" + options, "0")
        self.port(process)
        self.write(options, b"")
        process.send_signal(signal.SIGHUP)
        self.assertIn("on 0.0.0.0 everybody could use", self.wait_for(
            process, "WARNING settings are as before", 1)[-1])

    def test_child_that_is_not_ours(self):
        for process, port, workers in self.each("--drain", str(2 * PATIENCE)):
            client, target = self.open_tunnel(port)
            before = children(process)
            self.send_sigchld(process, workers)
            self.assertEqual(children(process), before)
            process.terminate()
            self.assertEqual(process.stdout.readline(), "Interrupted, ending.\n")
            self.send_sigchld(process, 1)  # a worker without a session has ended
            self.check_relays(client, target)
            process.terminate()
            process.wait(PATIENCE)

    def send_sigchld(self, process, workers):
        """Send it, and wait until it has been obeyed: what has a lower number comes before."""
        process.send_signal(signal.SIGCHLD)
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            self.wait_for(process, "NOTICE totals", workers)

    def test_signals_while_starting(self):
        for number in (signal.SIGHUP, signal.SIGUSR1):
            process = self.start("-c", (
                "import os, socks5\n"
                "def announce(line, real=socks5.announce):\n"
                "    os.kill(os.getpid(), %d)\n"
                "    real(line)\n"
                "socks5.announce = announce\n"
                "socks5.main(['0'])") % number)
            self.open_tunnel(self.port(process))

    def test_reload_in_mid_traffic(self):
        options = self.file(b"")
        for process, port, workers in self.each("@" + options):
            client, target = self.open_tunnel(port)
            self.write(options, b"--deny 127.0.0.1")
            process.send_signal(signal.SIGHUP)
            self.wait_for(process, "read again", workers + (workers > 1))
            self.check_relays(client, target)
            with self.assertRaises(AssertionError):
                self.open_tunnel(port)
            self.write(options, b"")

    def test_report(self):
        for process, port, workers in self.each():
            client, _ = self.open_tunnel(port)
            process.send_signal(signal.SIGUSR1)
            lines = "".join(self.wait_for(process, "NOTICE totals", workers))
            self.assertEqual(lines.count("NOTICE live client=%s:%d " % client.getsockname()), 1)
            self.assertEqual(lines.count(" live=1"), 1)

    def test_terminal_that_is_lost(self):
        import fcntl
        import pty
        import termios
        try:
            ours, theirs = pty.openpty()
        except OSError as error:
            self.skipTest(str(error))
        process = subprocess.Popen(
            [sys.executable, "socks5.py", "0"], cwd=HERE, stdin=theirs, stdout=subprocess.PIPE,
            universal_newlines=True, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(theirs)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait, PATIENCE)
        self.port(process)
        os.close(ours)
        self.assertEqual(process.wait(PATIENCE), 0)


# ---- floods ------------------------------------------------------------------------------

GREETINGS = ["05 01 00", "05 01 02", "05 02 00 02", "05 03 00 01 02", "05 ff 00 02" + " 80" * 253]
LOGINS = ["01 05 61 6c 69 63 65 06 73 65 63 72 65 74", "01 05 61 6c 69 63 65 01 78", "01 00 00"]
HOSTS = ["01 7f 00 00 01", "04" + " 00" * 10 + " ff ff 7f 00 00 01",  # by literal, and by name
         "03 09 6c 6f 63 61 6c 68 6f 73 74", "03 04 62 c3 bc 62",
         "03 09 31 32 37 2e 30 2e 30 2e 31"]
EDGES = octets("00 01 02 03 04 05 06 7f 80 fe ff")
REPLIED = (br"(?:\x05\x00\x00(?:\x01.{6}|\x04.{18}).*"  # octets after "succeeded" only
           br"|\x05[\x01-\x08]\x00\x01.{6})?")
ANSWERS = {  # all that a client can be told to the end, by whether there are users
    False: re.compile(br"(?s)|\x05\xff|\x05\x00%b" % REPLIED),
    True: re.compile(br"(?s)|\x05\xff|\x05\x02(?:\x01\x01|\x01\x00%b)?" % REPLIED)}


def noise(rng, count):
    """`count` random octets."""
    return bytes(rng.randrange(256) for _ in range(count))


def mutated(rng, sent):
    """`sent` with one thing wrong."""
    start = rng.randrange(len(sent) + 1)
    end = start + rng.choice([1, 1, 1, 2, 4, 16, 255])
    head, piece, rest = sent[:start], sent[start:end], sent[end:]
    return rng.choice([
        head + bytes(octet ^ 1 << rng.randrange(8) for octet in piece) + rest,
        head + noise(rng, len(piece)) + rest,
        head + bytes([rng.choice(EDGES)]) + sent[start + 1:],
        head + noise(rng, rng.randrange(1, 9)) + piece + rest,
        head + rest,
        head,
        head + piece + piece + rest,
        head + rest[:len(piece)] + piece + rest[len(piece):]])


def cut_up(rng, sent):
    """`sent` in pieces: one, a few, or one for each octet at the beginning."""
    few = [rng.randrange(len(sent) + 1) for _ in range(rng.randrange(5))]
    each = range(min(len(sent), 40))
    ends = sorted(each if rng.random() < 0.05 else few) + [len(sent)]
    return [sent[start:end] for start, end in zip([0] + ends, ends) if start < end]


class Conversation:
    """The `number`-th one for `seed`: what to send to which server, and how to leave."""

    def __init__(self, seed, number, port):
        rng = random.Random("%d %d" % (seed, number))
        self.users = rng.random() < 0.5
        login = self.users != (rng.random() < 0.05)
        frames = [
            octets(rng.choice(GREETINGS[int(login):])),
            octets(rng.choices(LOGINS, [8, 1, 1])[0]) if login else b"",
            bytes([5, rng.choices([1, 2, 3, rng.randrange(256)], [94, 2, 2, 2])[0], 0]),
            octets(rng.choice(HOSTS)) + struct.pack(">H", port),
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
    """Counts the session lines by their client; keeps what is an error."""

    def __init__(self):
        super().__init__()
        self.clients = collections.Counter()
        self.errors = []  # the client, if it has one, and what is in the log

    def emit(self, record):
        text = self.format(record)
        if record.levelno >= logging.ERROR or record.exc_info:
            client = re.search(r"[0-9.]+:\d+|$", record.threadName).group()
            self.errors.append((client, text))
        elif text.startswith("session "):
            self.clients[re.search(r" client=(\S*)", text).group(1)] += 1


class FuzzTest(TestCase):
    """Conversations of all kinds; $FUZZ is how many, $SEED repeats those of another run."""

    count = int(os.environ.get("FUZZ") or 10000)
    clients = 12
    staying = 10  # clients that a thread leaves open until they are hung up on

    def setUp(self):
        super().setUp()
        self.seed = int(os.environ.get("SEED") or random.randrange(10**9))
        self.stay_on_one_cpu()
        self.port = self.echo()
        self.begun = []  # the client's address and the number of each conversation
        self.failures = []
        patch = mock.patch.multiple(
            socks5, LOGIN_PAUSE=0.001, REFUSAL_TIMEOUT=0.2, SWEEP_INTERVAL=0.05)
        patch.start()
        self.addCleanup(patch.stop)
        self.log = SessionCounter()
        logger = logging.getLogger("socks5")
        self.addCleanup(logger.setLevel, logger.level)
        self.addCleanup(logger.removeHandler, self.log)
        logger.addHandler(self.log)
        logger.setLevel(logging.DEBUG)  # which brings the tracebacks
        names = resolver(self.dead(), ("127.0.0.1", self.port))
        names.start()
        self.addCleanup(names.stop)

    def stay_on_one_cpu(self):
        """Stay there until the end: to wake each other elsewhere takes half of the time."""
        patch = mock.patch.object(socks5.Flow, "cpus", None)
        patch.start()
        self.addCleanup(patch.stop)
        if hasattr(os, "sched_setaffinity"):
            self.addCleanup(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        socks5.stay_on_one_cpu(0)

    def serve_loopback(self, users):
        """A server for the echo server only: no other program of this host is called on."""
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
        """A client, which the log is to have a line for."""
        client = socket.socket()
        try:
            client.settimeout(PATIENCE)
            client.connect(server.server_address)
            self.begun.append(("%s:%d" % client.getsockname(), number))
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            client.close()
            raise
        return client

    def check_end(self, talk, client):
        """Read what `client` is told until it is hung up on."""
        with client:
            answer, end = read_all(client)
        if end == "end" and not ANSWERS[talk.users].fullmatch(answer):
            raise AssertionError("answer: %s" % answer.hex())
        if answer.startswith(b"\5\2\1\0") and octets(LOGINS[0]) not in b"".join(talk.pieces):
            raise AssertionError("logged in: %s" % answer.hex())

    def converse(self, talk, client):
        """Send what is to be sent, and leave, unless it is to stay."""
        with contextlib.suppress(OSError):  # it may have been hung up on
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
        """A client thread's life: every so-manieth conversation."""
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
        """Wait until the server has lost its patience with a client that stayed."""
        with client, self.reported(number):
            if not self.failures:  # or else nobody wants to wait for more of them
                self.check_end(talk, client)

    @contextlib.contextmanager
    def reported(self, number):
        """What goes wrong, with the conversation's number: a thread has no test to fail."""
        try:
            yield
        except Exception as error:
            self.fail_later(number, repr(error))

    def fail_later(self, number, what):
        """Note what went wrong in a conversation; -1 is a well-behaved one."""
        talk = Conversation(self.seed, number, self.port) if number >= 0 else "well-behaved"
        self.failures.append("conversation %d: %s\n%s" % (number, talk, what))

    def check_well_behaved(self, server, head, answer):
        """A tunnel still works. As the last in the queue, this client has seen all others in."""
        client = self.own(self.begin(server, -1))
        client.sendall(octets(head + HOSTS[0]) + struct.pack(">H", self.port) + b"ping")
        client.shutdown(socket.SHUT_WR)
        said, end = read_all(client)
        self.assertEqual((said[:len(octets(answer))], said[-4:], end),
                         (octets(answer), b"ping", "end"))
        client.close()

    def check_failures(self):
        """Fail if a conversation has, or if there is an error in the log."""
        numbers = dict(self.begun)
        for client, text in self.log.errors:
            self.fail_later(numbers.get(client, -1), text)
        if self.failures:
            self.fail("%d failures:\n\n%s" % (len(self.failures), "\n\n".join(self.failures[:3])))

    def check_session_lines(self):
        """One for each conversation."""
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
            self.check_well_behaved(servers[False], GREET + "05 01 00", "05 00 05 00")
            self.check_well_behaved(servers[True], LOGIN + "05 01 00", "05 02 01 00 05 00")
            for server in servers.values():
                server.drain(PATIENCE)
                self.assertEqual((server.guests, server.sessions), ({}, set()))
                self.stop(server)
                self.assertEqual((server.guests, server.sessions), ({}, set()))
            self.check_session_lines()
            self.assertEqual(stderr.getvalue(), "")

    def test_conversations_depend_on_seed_and_number_only(self):
        first, again, other = (
            [str(Conversation(seed, number, self.port)) for number in range(100)]
            for seed in (1, 1, 2))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)


@unittest.skipUnless(resource, "descriptors as POSIX has them")
class FloodTest(CommandTestCase):
    silent = 3000
    needed = 8000  # descriptors of the server, which keeps two for each session

    def take_descriptors(self):
        """Have as many descriptors as the flood needs, until the end of the test."""
        soft, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < self.needed:
            self.skipTest("no more than %d descriptors to be had" % hard)
        if soft != resource.RLIM_INFINITY and soft < self.needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (self.needed, hard))
            self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)

    def readable(self, socks):
        """Those of `socks` that have something to read, if only an end."""
        with selectors.DefaultSelector() as selector:
            for sock in socks:
                selector.register(sock, selectors.EVENT_READ)
            return [key.fileobj for key, _ in selector.select(0)]

    def tunnel_through(self, address, port):
        """A client of the server at `address`, tunnelled to the echo server on `port`."""
        client = self.own(socket.create_connection(address))
        client.sendall(octets(GREET + "05 01 00 01 7f 00 00 01") + struct.pack(">H", port)
                       + b"ping")
        self.assertEqual(read_count(client, 16)[:4], octets("05 00 05 00"))
        return client

    def test_three_thousand_silent_clients(self):
        self.take_descriptors()
        with tempfile.TemporaryFile("w+") as log:  # a pipe would be full, and hold the server up
            self.flood(log)
            log.seek(0)
            ends = [line.rpartition(" end=")[2] for line in log.read().splitlines()]
        self.assertEqual(ends.count("handshake-timeout"), self.silent)
        self.assertEqual(len(ends), self.silent + len(range(0, self.silent, 500)) + 1)

    def flood(self, log):
        """Connect the silent clients, and see them served, passed over, and hung up on."""
        process = self.start("socks5.py", "--handshake-timeout", "6", "0", stderr=log)
        address, port = ("127.0.0.1", self.port(process)), self.echo()
        flood = []
        while len(flood) < self.silent:
            flood += [self.own(socket.create_connection(address)) for _ in range(500)]
            self.tunnel_through(address, port).close()  # the last in the queue: it is empty then
        client = self.tunnel_through(address, port)
        self.assertEqual(self.readable(flood), [])
        client.close()
        for sock in flood:
            self.assertEqual(read_all(sock), (b"", "end"))
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(PATIENCE), 0)


# ---- the echo server ---------------------------------------------------------------------

@unittest.skipUnless(os.name == "posix", "signals as POSIX has them")
class EchoServerTest(CommandTestCase):
    def test_tcp_and_udp(self):
        process = self.start("echo_server.py", "0")
        address = ("127.0.0.1", self.port(process))
        client = self.own(socket.create_connection(address))
        content = pattern(MEBIBYTE)
        self.thread(lambda: (client.sendall(content), client.shutdown(socket.SHUT_WR)))
        self.assertEqual(read_all(client), (content, "end"))
        with self.own(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            for datagram in (b"", b"ping", bytes(9000)):
                sock.sendto(datagram, address)
                self.assertEqual(sock.recv(65536), datagram)
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.communicate(timeout=PATIENCE), ("Interrupted, ending.\n", ""))
        self.assertEqual(process.returncode, 0)

    def test_port_in_use(self):
        taken = str(self.listen().getsockname()[1])
        status, err = self.run_to_end("echo_server.py", taken)
        self.assertEqual((status, err.count("\n")), (1, 1))

    def test_measuring(self):
        port = str(self.serve(users={"alice": "secret"}).server_address[1])
        with mock.patch.dict(os.environ, SOCKS5_PASSWORD="secret"):
            process = self.start("echo_server.py", "--through", "127.0.0.1:" + port,
                                 "--user", "alice", "--seconds", "0.2", "--sessions", "21")
            out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 0, err)
        table = {name.strip(): [float(figure) for figure in figures.split()]
                 for name, figures in re.findall(r"^(\w.{15})(.+)$", out, re.MULTILINE)}
        self.assertEqual((table["sessions held"], table["failures"]), ([21, 21, 1], [0, 0]))
        self.assertEqual(table["datagrams lost"], [0, 0])
        for name in ("sessions/s", "round trips/s", "p50 ms", "p99 ms", "datagrams/s",
                     "datagrams sent", "MiB/s each way"):
            through, directly, _ = table[name]
            self.assertGreater(min(through, directly), 0)

    def test_measuring_without_datagrams(self):
        port = str(self.serve(commands=["connect"]).server_address[1])
        process = self.start("echo_server.py", "--through", "127.0.0.1:" + port,
                             "--seconds", "0.1", "--sessions", "2")
        out, err = process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 0, err)
        self.assertRegex(out, r"(?m)^datagrams sent +0 ")

    def test_measuring_what_is_no_way_through(self):
        port = str(self.serve(users={"alice": "secret"}).server_address[1])
        for proxy, password in ((str(self.dead()[1]), "secret"), (port, "wrong")):
            with mock.patch.dict(os.environ, SOCKS5_PASSWORD=password):
                status, err = self.run_to_end("echo_server.py", "--user", "alice",
                                              "--through", "127.0.0.1:" + proxy)
            self.assertEqual((status, err.count("\n")), (1, 1))


# ---- README ------------------------------------------------------------------------------

def readme():
    """The text of README.md."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


class ReadmeTest(CommandTestCase):
    def test_options_are_those_of_the_command(self):
        table = re.findall(r"^\| `(.*-.+?)` \|", readme(), re.MULTILINE)
        described = {tuple(row.split(", ")) for row in table}
        defined = {tuple(name + (" " + action.metavar if action.metavar else "")
                         for name in action.option_strings)
                   for action in socks5.make_parser()._actions if action.option_strings}
        self.assertEqual(described, defined)

    def test_defaults_are_those_of_the_command(self):
        actions = socks5.make_parser()._actions
        defaults = {action.option_strings[-1]: action.default for action in actions
                    if action.option_strings and action.nargs is None and action.default}
        for option, default in defaults.items():
            row = re.search(r"^\| `.*%s [A-Z-]+` \|.*$" % option, readme(), re.MULTILINE).group()
            if option == "--udp-ports":
                continue  # whose default is no range
            self.assertIn(" %s |" % (default if isinstance(default, str) else "%g" % default), row)

    def test_usage(self):
        with mock.patch.dict(os.environ, COLUMNS="80"):
            usage = socks5.make_parser().format_usage()
        usage = " ".join(usage.replace("usage: ", "").split())
        self.assertIn(usage, " ".join(readme().split()))

    def test_hooks_exist_and_replies_are_named(self):
        for name in re.findall(r"^\| `(\w+)\(", readme(), re.MULTILINE):
            self.assertTrue(hasattr(socks5.Socks5RequestHandler, name)
                            or hasattr(socks5.Socks5Server, name), name)
        replies = re.findall(r"^\| (\d) (.+?) \|", readme(), re.MULTILINE)
        self.assertEqual(replies, [(str(int(reply)), reply.phrase) for reply in Reply])

    def test_wishes_are_options_that_exist(self):
        table = readme().partition("| wish | options |")[2].partition("\n\n")[0]
        rows = re.findall(r"`(-.+?)` \|$", table, re.MULTILINE)
        self.assertEqual(len(rows), 6)
        for options in rows:
            args = socks5.make_parser().parse_args(options.replace(" FILE", " x").split())
            self.assertTrue([socks5.Rule.read(rule) for rule in args.rules] or args.clients)

    def test_file_of_options(self):
        content = re.search(r"(?ms)^# python3 socks5.py @.+?^```", readme()).group()[:-3]
        args = socks5.make_parser().parse_args(["@" + self.file(content.encode())])
        self.assertEqual((args.bind, args.rules), ("0.0.0.0", ["deny *:25"]))

    def test_fail2ban_filter(self):
        (pattern,) = re.findall(r"^failregex = (.+)$", readme(), re.MULTILINE)
        pattern = pattern.replace("<HOST>", r"(?P<host>[\w.:]+?)")
        for host in ("127.0.0.1", "::1")[:1 + has_ipv6()]:
            users = self.file(b"alice:secret")
            process = self.start("socks5.py", "-b", host, "--users", users, "0")
            client = self.own(socket.create_connection((host, self.port(process))))
            client.sendall(octets("05 01 02 01 17") + b"user=x client=6.6.6.6:1" + b"\1x")
            line = process.stderr.readline().rstrip("\n")
            self.assertEqual(re.search(pattern, line).group("host"), host)
            with_no_date = line.partition(" WARNING")[1] + line.partition(" WARNING")[2]
            self.assertEqual(re.search(pattern, with_no_date).group("host"), host)

    def test_embedding_examples(self):
        blocks = re.findall(r"^```python\n(.+?)^```", readme(), re.MULTILINE | re.DOTALL)
        self.assertTrue(blocks)
        replies = []

        def serve_once(server):
            self.thread(socketserver.BaseServer.serve_forever, server, 0.02)
            replies.append(self.request(server, 22)[1][1])
            server.shutdown()

        with mock.patch.object(socks5.Socks5Server, "serve_forever", serve_once):
            for block in blocks:
                exec(block.replace("1080", "0"), {})
        self.assertEqual(replies, [Reply.NOT_ALLOWED] * len(blocks))

    def test_docstring_example_is_the_same(self):
        example = re.search(r"^    class .+?serve_forever\(\)$", socks5.__doc__,
                            re.MULTILINE | re.DOTALL).group()
        self.assertIn(re.sub("^    ", "", example, flags=re.MULTILINE), readme())

    @unittest.skipUnless(shutil.which("nc") and shutil.which("curl"), "no nc or no curl here")
    def test_first_commands(self):
        ports = {}
        block = re.search(r"^```sh\n(.+?)^```", readme(), re.MULTILINE | re.DOTALL).group(1)
        for command, output in re.findall(r"^(\w.+?)(?: +#.*)?\n# (.+\n)", block, re.MULTILINE):
            for known, real in ports.items():
                command, output = command.replace(known, real), output.replace(known, real)
            if " port " not in output:  # it is a client
                said = subprocess.check_output(command, shell=True, timeout=PATIENCE,
                                               universal_newlines=True)
                self.assertEqual(said.rstrip(), output.rstrip())
                continue
            words = [word for word in command.split()[1:] if not word.isdigit()]
            line = self.start("-u", *words, "0").stdout.readline()
            known, real = (re.search(r" port (\d+) ", text).group(1) for text in (output, line))
            ports[known] = real
            self.assertEqual(line.replace(real, known), output)
        self.assertEqual(len(ports), 3)


# ---- clients of others -------------------------------------------------------------------

class ClientsTest(TestCase):
    def run_client(self, *command, **settings):
        """What `command`, with the port of a server for {}, prints."""
        port = self.serve(**settings).server_address[1]
        return subprocess.check_output([word.format(port) for word in command],
                                       stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       timeout=PATIENCE)

    def web_server(self):
        """The port of a page that says "page"."""
        listener = self.listen()

        def answer():
            sock = self.own(listener.accept()[0])
            while b"\r\n\r\n" not in sock.recv(65536):
                pass
            sock.sendall(b"HTTP/1.0 200 OK\r\n\r\npage")
            sock.close()

        self.thread(answer)
        return listener.getsockname()[1]

    @unittest.skipUnless(shutil.which("curl"), "no curl here")
    def test_curl(self):
        for proxy, host, users in [
                ("socks5://127.0.0.1:{}", "127.0.0.1", None),
                ("socks5h://127.0.0.1:{}", "localhost", None),
                ("socks5h://alice:secret@127.0.0.1:{}", "localhost", USERS)]:
            url = "http://%s:%d/" % (host, self.web_server())
            self.assertEqual(self.run_client("curl", "-s", "-x", proxy, url, users=users), b"page")

    @unittest.skipUnless(shutil.which("nc"), "no nc here")
    def test_nc(self):
        said = self.run_client(
            "sh", "-c", "printf hello | nc -N -X 5 -x 127.0.0.1:{} 127.0.0.1 %d" % self.echo())
        self.assertEqual(said, b"hello")

    @unittest.skipUnless(shutil.which("ssh") and shutil.which("nc"), "no ssh or no nc here")
    def test_ssh_by_proxy_command(self):
        listener, banners = self.listen(), []

        def answer():
            with self.own(listener.accept()[0]) as sock:
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
        """What `script` prints in a folder whose socks.conf says to go through `server`."""
        config = re.search(r"(?ms)^route .+?^END", readme()).group().replace(
            "1080", str(server.server_address[1])).replace("END", "")
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
                octets_, client = sock.recvfrom(100)
                sock.sendto(octets_ + bytes([192, 0, 2, 7]), client)

            self.thread(answer)
            said = self.socksify(query.replace(
                "192.0.2.53 53", "127.0.0.1 %d" % sock.getsockname()[1]), self.serve())
        self.assertEqual(said.split(), [b"192", b"0", b"2", b"7"])

    def serve_file(self, listener):
        """A server of active FTP: it connects to the client to deliver a file."""
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
