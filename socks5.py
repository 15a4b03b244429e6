#!/usr/bin/env python3
"""A SOCKS5 proxy server in one file that needs nothing but Python's standard library.

Run it:

    python3 socks5.py                          # listen on 127.0.0.1:1080, for this host only
    python3 socks5.py -b :: --users FILE       # listen everywhere, for the users in FILE
    python3 socks5.py --allow '*:443'          # allow port 443 and nothing else

Embed it, and override a hook:

    class OnlyWeb(socks5.Socks5RequestHandler):
        def authorize(self, destination):
            return destination.port in (80, 443)

    with socks5.Socks5Server(("127.0.0.1", 1080), OnlyWeb) as server:
        server.serve_forever()

The conversation:

    client                                    server
    VER NMETHODS METHODS                  ->          RFC 1928 section 3
                                          <-          VER METHOD
    VER ULEN UNAME PLEN PASSWD            ->          RFC 1929 section 2, if there are users
                                          <-          VER STATUS
    VER CMD RSV ATYP DST.ADDR DST.PORT    ->          RFC 1928 section 4
                                          <-          VER REP RSV ATYP BND.ADDR BND.PORT
    bytes                                <->  bytes

An error before the request closes the connection. After the request, the client gets exactly
one reply (for BIND, a second one says whether the peer has connected). After "succeeded", it gets
the target's bytes and then the target's end: a close is passed on as a close, and a reset as a
reset. Sections are those of RFC 1928 unless another RFC is named.

The rooms of this file. Each one uses only those above it, with one exception: the handler calls
the server:

    vocabulary       the numbers of the RFCs
    failures         exceptions, and the reply for each
    frames           the bytes of the protocol, both ways
    rules            who may go where; users; Settings
    threads          threads that are used again
    dialing          a name to addresses, and addresses to one connected socket
    relaying         bytes between two sockets, in two threads
    associations     datagrams, for UDP ASSOCIATE
    handler          one conversation, from the first byte to the line in the log
    server           accepting, limits, deadlines, closing
    log and systemd  lines that never block; systemd's messages and sockets
    service          signals and worker processes
    command line     options and main()

Start reading at `Socks5RequestHandler.handle`: it is the table of contents of a session. What
happens when ...

    a side closes, or resets         Relay.pass_on_end, Relay.break_off
    client, target, resolver silent  check_deadline
    a name has to be looked up       permitted
    a login fails                    log_in
    a balancer connects              read_balancer_header
    a session ends; sockets close    finish
    a datagram comes                 Association.relay_up, Association.relay_down
    descriptors are used up          get_request
    a limit is reached               has_room_for, admit_user
    a signal comes                   Service, Workers
    the settings are read again      reload

To change what the server does, override the hooks of `Socks5RequestHandler`: `select_method`,
`authenticate`, `authorize`, `connect`, `do_CONNECT`, `do_BIND`, `do_UDP_ASSOCIATE` and
`log_message`; and to choose who may connect, the server's `verify_request`, as in any
``socketserver``.
"""

import argparse
import array
import collections
import contextlib
import enum
import errno
import functools
import hmac
import io
import ipaddress
import itertools
import logging
import os
import queue
import re
import select
import selectors
import shlex
import signal
import socket
import socketserver
import stat
import struct
import sys
import threading
import time
from typing import (Any, Callable, Deque, Dict, Iterable, Iterator, List, Mapping, NamedTuple,
                    NoReturn, Optional, Set, Tuple)

if sys.platform != "win32":
    import fcntl
    import pwd
    import resource

__all__ = ["Address", "AddressType", "Command", "Method", "ProtocolError", "Reply", "Request",
           "RequestError", "Settings", "Socks5RequestHandler", "Socks5Server", "load_users", "main"]
__version__ = "0.3"

log = logging.getLogger("socks5")
NOTICE = 25  # level of the log for what an operator has asked for
NEVER = float("inf")  # a deadline that never comes; also "no limit"
IS_LINUX = sys.platform.startswith("linux")
UNIX_FAMILY = getattr(socket, "AF_UNIX", None)
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)  # epoll: a descriptor


def log_failure(what: str, error: BaseException) -> None:
    """Log an unexpected exception: its type only, because its text may hold anything."""
    log.error("%s error=%s", what, type(error).__name__, exc_info=log.isEnabledFor(logging.DEBUG))


def escape(value: object) -> str:
    """Return `value` as one word of ASCII for the log: bytes in hex, "-" if it is empty."""
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text.encode("unicode_escape").decode("ascii").replace(" ", "\\x20") or "-"


def describe(error: BaseException) -> str:
    """Return what `error` says to a user, without the number that OSError has before it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


# ---- vocabulary --------------------------------------------------------------------------

class Method(enum.IntEnum):
    """Authentication methods (section 3)."""
    NO_AUTHENTICATION_REQUIRED = 0x00
    GSSAPI = 0x01
    USERNAME_PASSWORD = 0x02
    NO_ACCEPTABLE_METHODS = 0xFF


class Command(enum.IntEnum):
    """Commands of a request (section 4)."""
    CONNECT = 0x01
    BIND = 0x02
    UDP_ASSOCIATE = 0x03


COMMANDS = {"connect": Command.CONNECT, "udp": Command.UDP_ASSOCIATE, "bind": Command.BIND}


class AddressType(enum.IntEnum):
    """Forms of an address in a frame (section 5)."""
    IPV4 = 0x01
    DOMAIN_NAME = 0x03
    IPV6 = 0x04


class Reply(enum.IntEnum):
    """Replies to a request (section 6)."""
    SUCCEEDED = 0x00
    GENERAL_FAILURE = 0x01
    NOT_ALLOWED = 0x02
    NETWORK_UNREACHABLE = 0x03
    HOST_UNREACHABLE = 0x04
    CONNECTION_REFUSED = 0x05
    TTL_EXPIRED = 0x06
    COMMAND_NOT_SUPPORTED = 0x07
    ADDRESS_TYPE_NOT_SUPPORTED = 0x08


# ---- failures: they travel up to the handler, which turns them into bytes ----------------

class ProtocolError(Exception):
    """The session ends before a request. `end` and `error` are for the log."""

    def __init__(self, end: str, answer: bytes = b"", error: str = "") -> None:
        super().__init__(end)
        self.end, self.answer, self.error = end, answer, error


class RequestError(Exception):
    """The request is refused with `reply`."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.name)
        self.reply = reply


REPLIES: Dict[Optional[int], Reply] = {
    errno.EACCES: Reply.NOT_ALLOWED,  # by a packet filter of this host
    errno.EPERM: Reply.NOT_ALLOWED,
    errno.ENETUNREACH: Reply.NETWORK_UNREACHABLE,
    errno.EAFNOSUPPORT: Reply.NETWORK_UNREACHABLE,  # this host has no IPv6
    errno.EADDRNOTAVAIL: Reply.NETWORK_UNREACHABLE,
    errno.EHOSTUNREACH: Reply.HOST_UNREACHABLE,
    errno.ECONNREFUSED: Reply.CONNECTION_REFUSED,
    errno.ETIMEDOUT: Reply.TTL_EXPIRED,  # closest code; also used by Tor and Dante
}


def reply_for(error: Exception) -> Reply:
    """Return the reply that tells a client about `error` (section 6)."""
    if isinstance(error, RequestError):
        return error.reply
    if isinstance(error, socket.gaierror):  # an unknown name; its errno is not one of `errno`
        return Reply.HOST_UNREACHABLE
    if isinstance(error, socket.timeout):  # it has no errno
        return Reply.TTL_EXPIRED
    return REPLIES.get(getattr(error, "errno", None), Reply.GENERAL_FAILURE)


# ---- frames: each is drawn as the RFC draws it -------------------------------------------

def read_exactly(stream: Any, count: int) -> bytes:
    """Return `count` bytes. Raises ProtocolError if the stream ends before."""
    data: bytes = stream.read(count)
    if len(data) < count:
        raise ProtocolError("client-left")
    return data


def read_counted(stream: Any) -> bytes:
    return read_exactly(stream, read_exactly(stream, 1)[0])


OTHER_PROTOCOLS = {  # by first byte: its name for the log, and what its client gets
    0x16: ("tls", b""), 0x04: ("socks4", b"\x00\x5b" + bytes(6)),  # "rejected or failed"
    **dict.fromkeys(b"GPCHODT", ("http", (  # GET, POST, CONNECT, ...
        b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n"
        b"This is a SOCKS5 proxy, not an HTTP proxy.\r\n"
        b"In your program, set it as SOCKS host (version 5), not as HTTP proxy.\r\n")))}


def read_version(stream: Any, version: int, others: Mapping[int, Tuple[str, bytes]] = {}) -> None:
    """Read VER alone: a client of another protocol may never send a second byte."""
    first = read_exactly(stream, 1)[0]
    if first != version:
        name, answer = others.get(first, (f"0x{first:02x}", b""))
        raise ProtocolError("not-socks5", answer, name)


# +----+----------+----------+     +----+--------+
# |VER | NMETHODS | METHODS  |     |VER | METHOD |     section 3
# +----+----------+----------+     +----+--------+
# | 1  |    1     | 1 to 255 |     | 1  |   1    |
# +----+----------+----------+     +----+--------+
def read_methods(stream: Any) -> bytes:
    """Return the methods that the client offers, one byte each."""
    read_version(stream, 5, OTHER_PROTOCOLS)
    return read_counted(stream)


# +----+------+----------+------+----------+     +----+--------+
# |VER | ULEN |  UNAME   | PLEN |  PASSWD  |     |VER | STATUS |     RFC 1929 section 2
# +----+------+----------+------+----------+     +----+--------+
# | 1  |  1   | 1 to 255 |  1   | 1 to 255 |     | 1  |   1    |
# +----+------+----------+------+----------+     +----+--------+
def read_credentials(stream: Any) -> Tuple[bytes, bytes]:
    read_version(stream, 1)
    return read_counted(stream), read_counted(stream)


FAMILIES = {  # by ATYP: the address family, and the number of bytes of an ADDR
    int(AddressType.IPV4): (socket.AF_INET, 4), int(AddressType.IPV6): (socket.AF_INET6, 16)}


class Address(NamedTuple):
    """A host and a port. `host` is an IP literal, or a name decoded with surrogateescape."""
    host: str
    port: int

    # +------+----------+------+
    # | ATYP |   ADDR   | PORT |     section 5: ADDR is 4 or 16 octets, or one octet of
    # +------+----------+------+     length and a name
    # |  1   | Variable |  2   |
    # +------+----------+------+
    @classmethod
    def read(cls, stream: Any) -> "Address":
        """Read from a frame. Raises RequestError if the address type is unknown."""
        kind = read_exactly(stream, 1)[0]
        if kind == AddressType.DOMAIN_NAME:
            host = read_counted(stream).decode("utf-8", "surrogateescape")
        elif kind in FAMILIES:
            family, size = FAMILIES[kind]
            host = socket.inet_ntop(family, read_exactly(stream, size))
        else:
            raise RequestError(Reply.ADDRESS_TYPE_NOT_SUPPORTED)
        return cls(host, int.from_bytes(read_exactly(stream, 2), "big"))

    def pack(self) -> bytes:
        """Return the bytes for a frame. `host` must be an IP literal: OSError otherwise."""
        kind = AddressType.IPV6 if ":" in self.host else AddressType.IPV4
        return b"%c%b%b" % (kind, socket.inet_pton(FAMILIES[kind][0], self.host),
                            self.port.to_bytes(2, "big"))

    @classmethod
    def of(cls, sockaddr: Any) -> "Address":
        """Convert a sockaddr. IPv4-mapped IPv6 becomes IPv4; a Unix path becomes 0.0.0.0:0."""
        if not isinstance(sockaddr, tuple):
            return UNSPECIFIED
        host = sockaddr[0].partition("%")[0]
        is_mapped = host.startswith("::ffff:") and "." in host
        return cls(host[len("::ffff:"):] if is_mapped else host, sockaddr[1])

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


UNSPECIFIED = Address("0.0.0.0", 0)


# +----+-----+-------+------+----------+----------+
# |VER | CMD |  RSV  | ATYP | DST.ADDR | DST.PORT |     section 4
# +----+-----+-------+------+----------+----------+
# | 1  |  1  | X'00' |  1   | Variable |    2     |
# +----+-----+-------+------+----------+----------+
class Request(NamedTuple):
    """A command and its destination. `command` may be a number that `Command` lacks."""
    command: int
    destination: Address

    @classmethod
    def read(cls, stream: Any) -> "Request":
        """Read a whole frame. The command is judged later."""
        read_version(stream, 5)
        command, _reserved = read_exactly(stream, 2)
        return cls(command, Address.read(stream))


# +----+-----+-------+------+----------+----------+
# |VER | REP |  RSV  | ATYP | BND.ADDR | BND.PORT |     section 6
# +----+-----+-------+------+----------+----------+
# | 1  |  1  | X'00' |  1   | Variable |    2     |
# +----+-----+-------+------+----------+----------+
def pack_reply(reply: Reply, bound: Address = UNSPECIFIED) -> bytes:
    """Return a reply; `bound` is the server's address as the target sees it."""
    return b"\x05%c\x00%b" % (reply, bound.pack())


# +----+------+------+----------+----------+----------+
# |RSV | FRAG | ATYP | DST.ADDR | DST.PORT |   DATA   |     section 7
# +----+------+------+----------+----------+----------+
# | 2  |  1   |  1   | Variable |    2     | Variable |
# +----+------+------+----------+----------+----------+
class Datagram(NamedTuple):
    """`data` to or from `address`; `fragment` is 0 for a datagram that stands alone."""
    fragment: int
    address: Address
    data: bytes

    @classmethod
    def read(cls, stream: Any) -> "Datagram":
        """Read a frame, which ends with the stream."""
        fragment = read_exactly(stream, 3)[2]
        return cls(fragment, Address.read(stream), stream.read())

    def pack(self) -> bytes:
        return b"\0\0%c%b%b" % (self.fragment, self.address.pack(), self.data)


# "PROXY TCP4 192.0.2.1 198.51.100.1 40400 1080\r\n"       version 1 of HAProxy's PROXY protocol
#
# +-----------+-----+-----+-----+-------+-------+-------+-------+------+
# | SIGNATURE | VER | FAM | LEN |  SRC  |  DST  | SPORT | DPORT | TLVs |     version 2; LEN is
# |           | CMD |     |     |       |       |       |       |      |     that of what follows
# +-----------+-----+-----+-----+-------+-------+-------+-------+------+
# |    12     |  1  |  1  |  2  | 4, 16 | 4, 16 |   2   |   2   | Var. |
# +-----------+-----+-----+-----+-------+-------+-------+-------+------+
PROXY_LINE = re.compile(r"PROXY (?:UNKNOWN(?: .*)?|TCP([46]) (\S+) \S+ (\d{1,5}) \S+)\r\n")

PROXY_BLOCKS = {  # by FAM: what follows LEN
    0x11: (socket.AF_INET, "!4s4xH2x"), 0x21: (socket.AF_INET6, "!16s16xH2x")}


def read_proxy_header(stream: Any) -> Optional[Address]:
    """Return a balancer's client, None for a health check. Raises ProtocolError."""
    first = read_exactly(stream, 1)
    try:
        if first == b"P":
            match = PROXY_LINE.fullmatch("P" + stream.readline(106).decode("ascii"))
            if not match or int(match.group(3) or 0) > 65535:
                raise ValueError
            version, host, port = match.groups()
            if not version:
                return None
            family = socket.AF_INET if version == "4" else socket.AF_INET6
            return Address.of((socket.inet_ntop(family, socket.inet_pton(family, host)), int(port)))
        if first != b"\r":
            raise ValueError
        signature, command, kind, length = struct.unpack("!11sBBH", read_exactly(stream, 15))
        if signature != b"\n\r\n\0\r\nQUIT\n" or command not in (0x20, 0x21) or length > 4096:
            raise ValueError
        body = read_exactly(stream, length)
        if command == 0x20 or kind not in PROXY_BLOCKS:  # LOCAL, or neither TCP4 nor TCP6
            return None
        family, layout = PROXY_BLOCKS[kind]
        packed, port = struct.unpack_from(layout, body)
        return Address.of((socket.inet_ntop(family, packed), port))
    except (OSError, ValueError, struct.error):
        raise ProtocolError("not-proxy") from None


# ---- rules: who may connect, where they may go, and for how long -------------------------
#
# The first rule that matches a destination decides. Rules apply to each resolved address,
# together with the requested name. An IPv4-mapped IPv6 address counts as the IPv4 address.

NAME = re.compile(r"(?:[!-\-/-~]{1,63}\.)*[!-\-/-~]{1,63}\.?")  # labels of printable ASCII


@functools.lru_cache(maxsize=1024)
def parse_ip(host: str) -> Any:
    """Return an IP literal as an address of `ipaddress`, None for anything else."""
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except (OSError, ValueError):  # ValueError for a NUL and for surrogates
        return None
    ip: Any = ipaddress.ip_address(packed)
    return ip if ip.version == 4 else ip.ipv4_mapped or ip


def encode_name(host: str) -> bytes:
    """Return `host` in lower case, for the resolver. Raises OSError if it is no name.

    CPython up to 3.11 cuts a string at a NUL: it would resolve ``localhost\\0.example`` as
    localhost, past the rules. Names in other scripts come as ``xn--...``.
    """
    if not NAME.fullmatch(host):
        raise OSError(errno.EHOSTUNREACH, "invalid name")
    return host.lower().encode()


def parse_network(what: str, text: str) -> Any:
    """Return a network of `ipaddress`. Raises ValueError, which begins with `what`."""
    try:
        network: Any = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if "%" in text or network.version == 6 and network.network_address.ipv4_mapped:
        raise ValueError(f"{what}: {text}: zones and IPv4-mapped addresses are not supported")
    return network


def is_loopback(host: str) -> bool:
    ip = parse_ip(host)
    return host == "localhost" if ip is None else bool(ip.is_loopback)


def covers(networks: List[Any], host: str) -> bool:
    ip = parse_ip(host) if networks else None
    return ip is not None and any(ip in network for network in networks)


def split_ports(text: str) -> Tuple[str, str]:
    """Return the host without brackets, and the ports behind its colon, ``*`` if there are none."""
    match = re.fullmatch(r"(?:\[(.*)\]|([^:\[]*))(?::([^:]*))?", text)
    if not match:  # IPv6 needs brackets before a port
        return text, "*"
    bracketed, plain, ports = match.groups()
    return bracketed or plain or "", "*" if ports is None else ports


def parse_ports(text: str) -> range:
    """Return the ports of PORT, FIRST-LAST or ``*``. Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", "0-65535" if text == "*" else text)
    if not match:
        raise ValueError(f"{text!r} is neither PORT nor FIRST-LAST")
    first, last = int(match.group(1)), int(match.group(2) or match.group(1))
    if not first <= last <= 65535:
        raise ValueError(f"{text}: FIRST is greater than LAST, or LAST than 65535")
    return range(first, last + 1)


def parse_rule_host(host: str) -> Tuple[Any, bytes]:
    """Return (network, b"") or (None, name): see `Rule`. Raises ValueError."""
    if host == "*":
        return None, b""
    last = host.rstrip(".").rpartition(".")[2]
    if set(host) & set(":/%") or last.isdigit() or last[:2] in ("0x", "0X"):
        return parse_network("HOST", host), b""
    is_suffix = host.startswith("*.")
    try:
        name = encode_name(host[2:] if is_suffix else host).rstrip(b".")
    except OSError:
        name = b""
    if not name or b"*" in name:
        raise ValueError(f"{host!r} is not an address, a network, a name or *.name "
                         "(names in other scripts: xn--...)")
    return None, b"." + name if is_suffix else name


class Rule(NamedTuple):
    """Allow or deny `user` ("" is all) to go to `ports` of `network`, or of `name` if that is None.

    A `name` of b"" is any host; one that begins with a dot is a domain and all names below it.
    """
    text: str  # for the log
    allows: bool
    user: str
    network: Any
    name: bytes
    ports: range

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Parse ``allow [USER@]HOST[:PORT[-PORT]]`` or ``deny ...``. Raises ValueError."""
        verb, _, rest = text.partition(" ")
        user, at, where = rest.rpartition("@")
        host, ports = split_ports(where)
        try:
            if verb not in ("allow", "deny") or (at and not user):
                raise ValueError("no allow or deny, or no USER before @")
            network, name = parse_rule_host(host)
            return cls(f"{verb}:{rest}", verb == "allow", user, network, name, parse_ports(ports))
        except ValueError as error:
            raise ValueError(f"{text}: not [USER@]HOST[:PORT[-PORT]]: {error}") from None

    def matches(self, user: str, name: bytes, ip: Any, port: int) -> bool:
        """Return True if the rule is for `user`, who asked for `name` (b"" for an IP literal).

        Before the look-up, `ip` is None. Then an allow rule for a network matches, so that the
        name is resolved and judged again; a deny rule for a network does not.
        """
        if port not in self.ports or self.user not in ("", user):
            return False
        if self.network is not None:
            return self.allows if ip is None else ip in self.network
        return self.name in (b"", name) or (
            self.name.startswith(b".") and (b"." + name).endswith(self.name))


def built_in(*networks: str) -> List[Rule]:
    return [Rule.parse("deny " + network)._replace(text="built-in:" + network)
            for network in networks]


LINK_LOCAL = built_in("169.254.0.0/16", "fe80::/10")  # a cloud's metadata service is there
OWN_HOST = built_in("127.0.0.0/8", "::1", "0.0.0.0", "::")  # the last two are loopback, too
ALLOW_OTHERS, DENY_OTHERS = [Rule.parse(verb + " *")._replace(text="default")
                             for verb in ("allow", "deny")]


def check_credential(what: str, text: str) -> bytes:
    """Return `text` as bytes. Raises ValueError if RFC 1929 cannot carry it; does not quote it."""
    data = text.encode()
    if not 1 <= len(data) <= 255:
        raise ValueError(what + ": not 1 to 255 bytes")
    return data


def load_users(path: str) -> Dict[str, str]:
    """Return passwords by name, from a UTF-8 file with a line ``name:password`` for each user.

    Blank lines and lines that begin with ``#`` are skipped. Raises OSError, or ValueError with
    the file and the line number, but not the line.
    """
    users: Dict[str, str] = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if not text.strip() or text.startswith("#"):
                    continue
                name, _, password = text.partition(":")
                check_credential("username", name)
                check_credential("password", password)
                if name in users:
                    raise ValueError("this user has a line above")
            except ValueError as error:
                what = "not UTF-8" if isinstance(error, UnicodeError) else error
                raise ValueError(f"{path}, line {number}: {what}") from None
            users[name] = password
    if not users:
        raise ValueError(f"{path}: no users in this file")
    return users


def check_least(name: str, value: Optional[float], least: float) -> float:
    """Return `value`, NEVER for None. Raises ValueError if it is less than `least`."""
    if value is not None and not value >= least:
        raise ValueError(f"{name}: {least:g} or more, not {value}")
    return NEVER if value is None else value


class Settings:
    """Settings for new sessions. Raises ValueError if one is invalid.

    `users`: passwords by name; None for no login. `rules`: where clients may go, each
    ``allow [USER@]HOST[:PORT[-PORT]]`` or ``deny ...``. `clients`: networks whose clients are
    accepted; none for all. `proxy_from`: networks of balancers, whose connections begin with a
    PROXY header. `commands`: the commands to serve. `max_sessions`, `max_per_client`,
    `max_per_user`: how many at a time, of all clients and of each one; None for no limit.

    Seconds: `connect_timeout` to resolve and reach a destination, `handshake_timeout` from
    accepting a client to its complete request, `idle_timeout` without data in either direction
    (None for no limit), `linger` without data once one side has closed, `bind_timeout` for BIND to
    wait for a connection, `udp_timeout` without datagrams.

    `udp_ports`: ports to which clients send datagrams; 0 for a free one. `udp_advertise`: the
    address to which they send them, if it is not the one where they connected. `source`: the
    address from which targets are dialed and datagrams are sent.
    """

    def __init__(self, *, users: Optional[Mapping[str, str]] = None, rules: Iterable[str] = (),
                 clients: Iterable[str] = (), commands: Iterable[str] = tuple(COMMANDS),
                 proxy_from: Iterable[str] = (), max_sessions: Optional[int] = None,
                 max_per_client: Optional[int] = None, max_per_user: Optional[int] = None,
                 connect_timeout: float = 10.0, handshake_timeout: float = 10.0,
                 idle_timeout: Optional[float] = None, linger: float = 60.0,
                 bind_timeout: float = 60.0, udp_timeout: float = 300.0,
                 udp_ports: Iterable[int] = (0,), udp_advertise: Optional[str] = None,
                 source: Optional[str] = None) -> None:
        self.connect_timeout = check_least("connect_timeout", connect_timeout, 0.001)
        self.handshake_timeout = check_least("handshake_timeout", handshake_timeout, 0.001)
        self.idle_timeout = check_least("idle_timeout", idle_timeout, 0.001)
        self.linger = check_least("linger", linger, 0.001)
        self.bind_timeout = check_least("bind_timeout", bind_timeout, 0.001)
        self.udp_timeout = check_least("udp_timeout", udp_timeout, 0.001)
        self.max_sessions = check_least("max_sessions", max_sessions, 1)
        self.max_per_client = check_least("max_per_client", max_per_client, 1)
        self.max_per_user = check_least("max_per_user", max_per_user, 1)
        self.users = None if users is None else {
            check_credential("users: username", name):
            check_credential(f"users: password of {name!a}", password)
            for name, password in users.items()}
        self.rules = [Rule.parse(rule) for rule in rules]
        self.clients = [parse_network("client", client) for client in clients]
        self.proxy_from = [parse_network("proxy_from", balancer) for balancer in proxy_from]
        self.udp_ports, names = list(udp_ports), set(commands)
        if not names <= set(COMMANDS):
            raise ValueError(f"commands: known are {', '.join(COMMANDS)}")
        self.commands = {COMMANDS[name].name for name in names}
        if not all(0 <= port <= 65535 for port in self.udp_ports):
            raise ValueError("udp_ports: a port is 0 to 65535")
        self.udp_advertise, self.source = udp_advertise, source
        for name, host in ("udp_advertise", udp_advertise), ("source", source):
            if host is not None and parse_ip(host) is None:
                raise ValueError(f"{name}: not an IP address: {host}")
        others = DENY_OTHERS if any(rule.allows for rule in self.rules) else ALLOW_OTHERS
        self.rules_for_local = self.rules + LINK_LOCAL + [others]
        self.rules_for_remote = self.rules + LINK_LOCAL + OWN_HOST + [others]

    def rules_for(self, client: str) -> List[Rule]:
        """Return all rules for a client at this address, the built-in ones included."""
        return self.rules_for_local if is_loopback(client) else self.rules_for_remote


DEFAULTS: Dict[str, Any] = dict(Settings.__init__.__kwdefaults__ or {})


# ---- threads: used again for the next job ------------------------------------------------


class NoThreadError(OSError):
    """No thread could be started."""


def start_thread(function: Callable[..., None], *args: Any) -> threading.Thread:
    """Call `function` in a new thread. Raises NoThreadError."""
    try:
        thread = threading.Thread(target=function, args=args, name="socks5", daemon=True)
        thread.start()
    except RuntimeError:
        raise NoThreadError(errno.EAGAIN, "no thread available") from None
    return thread


class ThreadCache:
    """Threads that are used again: starting one costs more than the rest of a short session."""

    most_idle = 256  # threads that wait for another job; the others end
    make_queue: Any = getattr(queue, "SimpleQueue", queue.Queue)  # SimpleQueue is new in 3.7

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: List[Any] = []  # queues, one for each thread that waits for a job
        self.threads: Set[threading.Thread] = set()

    def start(self, function: Callable[..., None], *args: Any) -> Any:
        """Call `function` in a thread; return a lock that is released when it has returned."""
        done = threading.Lock()
        done.acquire()
        with self.lock:
            jobs = self.idle.pop() if self.idle else None
        if jobs is None:
            jobs = self.make_queue()  # a Thread would keep its arguments, and with them a session
            start_thread(self.work, jobs)
        jobs.put((function, args, done))
        return done

    def work(self, jobs: Any) -> None:
        with self.lock:
            self.threads.add(threading.current_thread())
        for function, args, done in iter(jobs.get, None):
            try:
                function(*args)
            except Exception as error:
                log_failure("thread failed", error)
            finally:
                done.release()
            del function, args  # an idle thread must not keep a session in memory
            with self.lock:
                if len(self.idle) >= self.most_idle:
                    break
                self.idle.append(jobs)
        with self.lock:
            self.threads.discard(threading.current_thread())

    def close(self) -> None:
        """End the idle threads, and the others when they have done their job; wait for them."""
        with self.lock:
            self.most_idle = 0
            for jobs in self.idle:
                jobs.put(None)
            threads = list(self.threads)
        for thread in threads:
            thread.join()


# ---- dialing: a name to addresses, addresses to one connected socket ---------------------
#
# One at a time, each dead address would cost about two minutes. So the next attempt
# starts when the last one has failed or has had a quarter of a second, and the first one to
# connect wins (RFC 8305, "Happy Eyeballs"). One deadline covers all of it. If all attempts
# fail, the error of the first one that failed counts.

ATTEMPT_DELAY = 0.25  # seconds before the next attempt (RFC 8305 section 5)
MOST_ATTEMPTS = 4     # under way at a time: each takes a descriptor
MOST_ADDRESSES = 32   # of a name that are judged and dialed

Candidate = Tuple[int, Tuple[Any, ...]]  # a family, and a sockaddr: what ``connect`` takes for it


def look_up(name: bytes, port: int) -> List[Candidate]:
    """Return the addresses of `name`, best first. The system's resolver knows no deadline."""
    answers = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [(answer[0], answer[4]) for answer in answers[:MOST_ADDRESSES]]


def interleave(candidates: List[Candidate]) -> List[Candidate]:
    """Return the families in turn, that of the first candidate first (RFC 8305 section 4)."""
    first = [candidate for candidate in candidates if candidate[0] == candidates[0][0]]
    other = [candidate for candidate in candidates if candidate[0] != candidates[0][0]]
    turns = itertools.zip_longest(first, other)
    return [candidate for turn in turns for candidate in turn if candidate]


def set_options(sock: socket.socket, options: List[Tuple[int, int, Any]]) -> None:
    """Set `options`, until the system refuses one."""
    try:
        for option in options:
            sock.setsockopt(*option)
    except OSError:
        pass


def start_attempt(candidate: Candidate, source: Optional[str],
                  seconds: float) -> Tuple[socket.socket, bool]:
    """Return a socket, and True if it has connected within `seconds`. Raises OSError."""
    sock = socket.socket(candidate[0], socket.SOCK_STREAM)
    try:
        if source:
            if (sock.family == socket.AF_INET6) != (":" in source):
                raise OSError(errno.ENETUNREACH, "not of the family of the source address")
            if IS_LINUX:  # IP_BIND_ADDRESS_NO_PORT: `connect` chooses a port, which targets share
                set_options(sock, [(socket.IPPROTO_IP, 24, 1)])
            sock.bind((source, 0))
        sock.settimeout(seconds)
        sock.connect(candidate[1])
        return sock, True
    except OSError as error:
        if isinstance(error, (BlockingIOError, socket.timeout)) and error.errno != errno.ETIMEDOUT:
            return sock, False
        sock.close()
        raise


def wait_for(socks: Iterable[socket.socket], seconds: float) -> List[Tuple[socket.socket, int]]:
    """Return those of `socks` that connect or fail within `seconds`, each with its errno or 0."""
    with Selector() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_WRITE)
        ready: List[Any] = [key.fileobj for key, _ in selector.select(seconds)]
    return [(sock, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) for sock in ready]


def dial(candidates: List[Candidate], deadline: float, source: Optional[str],
         closing: threading.Event, failures: List[Tuple[Candidate, OSError]]) -> socket.socket:
    """Return a socket connected to one of `candidates` by `deadline` (monotonic clock).

    Its timeout is undefined: set one. Each attempt that fails is added to `failures`. Raises
    OSError, soon if `closing` is set.
    """
    waiting = interleave(candidates)
    pending: Dict[socket.socket, Candidate] = {}  # attempts under way, oldest first
    def give_up(sock: socket.socket, error: OSError) -> None:
        failures.append((pending.pop(sock), error))
        sock.close()
    try:
        while (waiting or pending) and time.monotonic() < deadline and not closing.is_set():
            is_first = not pending  # alone, it waits in connect(): a selector costs more
            seconds = max(0.001, min(ATTEMPT_DELAY, deadline - time.monotonic()))
            if waiting:
                candidate = waiting.pop(0)
                if len(pending) == MOST_ATTEMPTS:
                    give_up(next(iter(pending)), socket.timeout("timed out"))
                try:
                    sock, is_ready = start_attempt(candidate, source, seconds if is_first else 0)
                except OSError as error:
                    failures.append((candidate, error))
                    continue
                if is_ready:
                    return sock
                pending[sock] = candidate
            for sock, code in () if is_first else wait_for(pending, seconds):
                if not code:
                    del pending[sock]
                    return sock
                give_up(sock, OSError(code, os.strerror(code)))
    finally:
        for sock in pending:
            sock.close()
    raise failures[0][1] if failures else socket.timeout("timed out")


# ---- relaying: two flows, each in a thread, joined when both have ended ------------------
#
# A relay that ends at the first close loses what is on its way in the other direction. So a
# close is passed on as a half-close, and the other flow goes on, until the other side closes too
# or there has been no data for `linger` seconds. Both sockets are set to send a reset when they
# close, so even a killed server leaves resets, and a truncated transfer is not mistaken for a
# complete one. After a flow has half-closed its sink, that socket closes normally.
# Nothing is queued: a flow reads again when its sink has taken everything, so a slow reader
# slows the writer down.
#
# To end a relay, another thread sets flags and wakes the flows. Where shutdown() wakes no recv(),
# or send() takes no timeout (Windows), a call waits for a SLICE at most; then the flow looks
# at its flags. CPython waits in select() before the call, so no byte is lost.

SMALL_BUFFER = 2 * 1024     # bytes, for an idle flow
LARGE_BUFFER = 1024 * 1024  # bytes, for the busiest; in between, each is 8 times the last
SEND_TIMEOUT = 0.25         # seconds for which send() waits before `is_stopped` is checked


def existing(*options: Tuple[int, str, Any]) -> List[Tuple[int, int, Any]]:
    return [(level, getattr(socket, name), value)
            for level, name, value in options if hasattr(socket, name)]


def seconds_option(name: str, seconds: float) -> List[Tuple[int, int, Any]]:
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    return existing((socket.SOL_SOCKET, name, value))


TCP_OPTIONS = existing(  # small pieces are sent at once, urgent bytes stay in line, and an idle
    # peer that no longer answers is noticed after 60 + 4 * 15 seconds
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1), (socket.SOL_SOCKET, "SO_OOBINLINE", 1),
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 60), (socket.IPPROTO_TCP, "TCP_KEEPALIVE", 60),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 15), (socket.IPPROTO_TCP, "TCP_KEEPCNT", 4))
LINGER = struct.Struct("hh" if sys.platform == "win32" else "ii")
RESET_AT_CLOSE = existing((socket.SOL_SOCKET, "SO_LINGER", LINGER.pack(1, 0)))
CLEAN_CLOSE = existing((socket.SOL_SOCKET, "SO_LINGER", LINGER.pack(0, 0)))
SEND_TIMES_OUT = seconds_option("SO_SNDTIMEO", SEND_TIMEOUT)


def needs_slices() -> bool:
    """Return True if a send() cannot be ended, or if shutdown() does not wake a recv()."""
    if sys.platform != "win32" and SEND_TIMES_OUT:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.setsockopt(*SEND_TIMES_OUT[0])
            return False
    return True


SLICE = SEND_TIMEOUT if needs_slices() else None  # seconds, for ``settimeout``
RELAY_OPTIONS = RESET_AT_CLOSE + ([] if SLICE else SEND_TIMES_OUT)


def receive(sock: socket.socket, buffer: Any, owner: Any) -> int:
    """Return how many bytes came: 0 at the end, or when a slice is over and `owner.is_over`."""
    while True:
        try:
            return sock.recv_into(buffer)
        except socket.timeout as error:
            if error.errno:  # ETIMEDOUT, which is the same class: the peer no longer answers
                raise
            if owner.is_over:
                return 0


def wake(sock: socket.socket) -> None:
    """Wake the thread that receives from `sock`, unless it wakes by itself."""
    if SLICE is None:
        with contextlib.suppress(OSError):  # it has no peer any more
            sock.shutdown(socket.SHUT_RD)


class Flow:
    """One direction of a relay."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source, self.sink = source, sink
        self.current = source  # the socket of the current system call: which side failed
        self.sent = 0  # bytes


class Relay:
    """Two flows, each in a thread. The client's first bytes may be in the buffer of `reader`."""

    clean = ("client-closed", "target-closed")  # ends that lose nothing
    is_stopped = False  # by `stop`: both flows end without sending what is left

    def __init__(self, client: socket.socket, target: socket.socket, reader: Any) -> None:
        for sock in (client, target):
            set_options(sock, RELAY_OPTIONS)
        self.reader = reader
        self.up, self.down = Flow(client, target), Flow(target, client)
        self.ends: List[str] = []  # as in the log; two threads append to it
        self.first_end_at = NEVER  # monotonic clock

    @property
    def end(self) -> str:
        """The first end that is not clean, otherwise the first one, "" while both flows run."""
        unclean = [end for end in self.ends if end not in self.clean]
        return (unclean + self.ends + [""])[0]

    @property
    def is_over(self) -> bool:
        """True after an end that is not clean: each flow sends what it holds, and ends."""
        return self.end not in ("", *self.clean)

    def run(self, threads: ThreadCache, reply: bytes) -> None:
        """Send `reply`, and relay until both flows have ended. NoThreadError: nothing was sent."""
        self.down.sent = -len(reply)  # do not count the reply
        up_ended = threads.start(self.carry, self.up, self.reader.peek)
        try:
            self.carry(self.down, lambda: reply)
        finally:
            up_ended.acquire()

    def carry(self, flow: Flow, first: Callable[[], bytes]) -> None:
        """Send what `first` returns, copy, and pass on the end of the source, or break off."""
        try:
            self.send(flow, memoryview(first()))
            buffer = bytearray(SMALL_BUFFER)
            while not self.is_stopped:
                count = receive(flow.source, buffer, self)
                if not count:
                    break
                self.send(flow, memoryview(buffer)[:count])
                if count == len(buffer) < LARGE_BUFFER:
                    buffer = bytearray(8 * count)
                elif count < len(buffer) // 8:  # the flow has become quiet
                    buffer = bytearray(SMALL_BUFFER)
            if not self.is_over:
                self.pass_on_end(flow)
        except Exception as error:
            self.break_off(flow, error)

    def send(self, flow: Flow, data: memoryview) -> None:
        """Send all of `data`. Raises OSError, also if the relay is stopped."""
        flow.current = flow.sink
        while data:
            if self.is_stopped:
                raise ConnectionAbortedError
            try:
                count = flow.sink.send(data)
            except (BlockingIOError, socket.timeout) as error:  # SEND_TIMEOUT or a slice is over
                if error.errno == errno.ETIMEDOUT:
                    raise
                code = flow.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:  # the source has been reset while its sink takes nothing
                    flow.current = flow.source
                    raise OSError(code, os.strerror(code)) from None
                continue
            flow.sent += count
            data = data[count:]
        flow.current = flow.source

    def pass_on_end(self, flow: Flow) -> None:
        """Half-close the sink. The other flow goes on until it ends, too, or `linger` runs out.

        Raises OSError if the source was reset.
        """
        # The kernel reports a reset once, perhaps to the other thread, and this one sees an end of
        # file. After a reset, getpeername() fails. It also fails after two clean ends, so the
        # failure counts only if no clean end came before.
        try:
            flow.source.getpeername()
        except OSError:
            if self.end not in self.clean:
                raise
        self.note("client-closed" if flow is self.up else "target-closed")
        flow.current = flow.sink
        flow.sink.shutdown(socket.SHUT_WR)
        set_options(flow.sink, CLEAN_CLOSE)  # the kernel still delivers what the sink has not read

    def break_off(self, flow: Flow, error: Exception) -> None:
        """Note why the relay breaks, and wake the other flow, which sends what it has received.

        `finish` then closes both sockets with a reset, so the other side gets one, too.
        """
        if isinstance(error, OSError):
            side = "client" if flow.current is self.up.source else "target"
            self.note(side + ("-lost" if isinstance(error, TimeoutError) else "-reset"))
        else:
            self.stop("error")
            log_failure("relay failed", error)
        wake(self.up.source)
        wake(self.down.source)

    def note(self, end: str) -> None:
        self.first_end_at = min(self.first_end_at, time.monotonic())
        self.ends.append(end)

    def stop(self, end: str) -> None:
        """Let both flows end with a reset, for the reason `end`, once they are woken."""
        self.note(end)
        self.is_stopped = True

    @property
    def phase(self) -> str:
        return "linger" if self.ends else "idle"

    @property
    def counts(self) -> Dict[str, int]:
        """Bytes relayed: `up` from the client, `down` from the target."""
        return {"up": self.up.sent, "down": max(0, self.down.sent)}


# ---- associations: datagrams, as long as the control connection stays --------------------
#
# Datagrams of strangers are dropped: the client's must come from its host and port, and answers
# from hosts to which it has sent something. They are not logged, and counted only if they come from
# another port of the client's host. One thread serves all three sockets. Names are looked up in
# other threads: while a resolver hangs, only datagrams to new names wait.

LOOK_UPS = 8         # names of one association that are looked up at the same time
MOST_WAITING = 256   # datagrams of one association that wait for a look-up
MOST_KNOWN = 4096    # destinations, and hosts, that one association remembers; older ones go
ROUTE_TIME = 60.0    # seconds after which a destination is looked up and judged anew
DATAGRAM_OPTIONS = existing(  # room for bursts; the system caps it
    (socket.SOL_SOCKET, "SO_RCVBUF", 1 << 22), (socket.SOL_SOCKET, "SO_SNDBUF", 1 << 22))

Route = Tuple[List[Any], float]  # the sockaddrs to try (none: refused), and when it expires


def open_outside(source: Optional[str]) -> socket.socket:
    """Return a datagram socket at the address `source`, or for both families. Raises OSError."""
    family = socket.AF_INET if source and ":" not in source else socket.AF_INET6
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, source is not None)
    except OSError:  # this host has no IPv6
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.bind((source or "", 0))
    except OSError:
        sock.close()
        raise
    return sock


class Association:
    """Datagrams between a client, at the socket `inside`, and its targets, at `outside`.

    `client` is the client's address; if its port is 0, the first datagram sets it. `find_routes`
    returns the sockaddrs to try for a destination, or raises, perhaps in several threads at once.
    Hold `lock`, an RLock, to close the sockets. The rest is the interface of `Relay`.
    """

    phase = "udp"
    no_route: Route = ([], 0.0)

    def __init__(self, lock: Any, control: socket.socket, inside: socket.socket,
                 outside: socket.socket, client: Address,
                 find_routes: Callable[[Address], List[Any]]) -> None:
        self.control, self.inside, self.outside = control, inside, outside
        for sock in (inside, outside):
            set_options(sock, DATAGRAM_OPTIONS)
        self.client, self.find_routes = client, find_routes
        self.client_sockaddr: Any = None
        self.lock = lock  # for what follows
        self.counts = {"up": 0, "down": 0, "datagrams_up": 0, "datagrams_down": 0, "dropped": 0}
        self.routes: "collections.OrderedDict[Address, Route]" = collections.OrderedDict()
        self.hosts: "collections.OrderedDict[str, None]" = collections.OrderedDict()
        self.waiting: Deque[Datagram] = collections.deque()  # for a look-up
        self.look_ups: Dict[Address, Any] = {}  # under way; a lock is released at the end of each
        self.end = ""

    def run(self, threads: ThreadCache, reply: bytes) -> None:
        """Send `reply` to the client, and relay datagrams until the control connection ends."""
        self.threads = threads
        set_options(self.control, RESET_AT_CLOSE)
        self.control.sendall(reply)
        with Selector() as selector:
            for sock, relay in ((self.control, None), (self.inside, self.relay_up),
                                (self.outside, self.relay_down)):
                sock.setblocking(False)
                selector.register(sock, selectors.EVENT_READ, relay)
            while not self.end:
                for key, _ in selector.select(SLICE):
                    if key.data:
                        self.relay_burst(key.fileobj, key.data)
                    else:
                        self.read_control()
        if self.end != "error":
            set_options(self.control, CLEAN_CLOSE)

    def read_control(self) -> None:
        """Read the control connection; only EOF or an error matters."""
        try:
            if not self.control.recv(SMALL_BUFFER):
                self.stop("client-closed")
        except BlockingIOError:
            pass
        except OSError as error:
            self.stop("client-lost" if isinstance(error, TimeoutError) else "client-reset")

    def relay_burst(self, sock: Any, relay: Callable[[bytes, Any], None]) -> None:
        for _ in range(32):  # datagrams; then it is the turn of the other sockets
            try:
                data, source = sock.recvfrom(65535)
            except OSError:  # no datagram is left
                return
            self.attempt(relay, data, source)
        time.sleep(0)  # let other threads run: this may be a flood

    def attempt(self, relay: Callable[..., None], *args: Any) -> None:
        """Call `relay`; count a datagram that it cannot relay."""
        try:
            relay(*args)
        except (OSError, ProtocolError, RequestError):
            with self.lock:
                self.counts["dropped"] += 1

    def relay_up(self, data: bytes, source: Any) -> None:
        """Relay a datagram from the client. Raises an error for one that cannot be relayed."""
        host, port = Address.of(source)
        if host != self.client.host:  # a stranger: not relayed, not counted, not logged
            return
        datagram = Datagram.read(io.BytesIO(data))
        if datagram.fragment or port != (self.client.port or port):
            raise OSError("a fragment, or not of the client's port")
        self.client, self.client_sockaddr = Address(host, port), source
        if time.monotonic() < self.routes.get(datagram.address, self.no_route)[1]:
            self.send(datagram)
        elif parse_ip(datagram.address.host) is None:
            self.send_to_name(datagram)
        else:
            self.remember(self.routes, datagram.address, self.find(datagram.address))
            self.send(datagram)

    def find(self, destination: Address) -> Route:
        """Find out where datagrams to `destination` go. Raises OSError."""
        try:
            sockaddrs = self.find_routes(destination)[:MOST_ATTEMPTS]
        except RequestError:
            sockaddrs = []
        if self.outside.family == socket.AF_INET:
            sockaddrs = [sockaddr for sockaddr in sockaddrs if ":" not in sockaddr[0]]
        else:
            sockaddrs = [sockaddr if ":" in sockaddr[0] else ("::ffff:" + sockaddr[0], sockaddr[1])
                         for sockaddr in sockaddrs]
        return sockaddrs, time.monotonic() + ROUTE_TIME

    def remember(self, table: Any, key: Any, value: Any) -> None:
        with self.lock:
            table[key] = value
            table.move_to_end(key)
            if len(table) > MOST_KNOWN:
                table.popitem(last=False)

    def send(self, datagram: Datagram) -> None:
        """Send to the first address of its route that takes it. Raises OSError if none does."""
        sockaddrs = self.routes.get(datagram.address, self.no_route)[0]
        for sockaddr in sockaddrs:
            try:
                with self.lock:
                    self.outside.sendto(datagram.data, sockaddr)
                    self.remember(self.hosts, Address.of(sockaddr).host, None)
                    self.counts["up"] += len(datagram.data)
                    self.counts["datagrams_up"] += 1
                    return
            except OSError as error:
                if isinstance(error, BlockingIOError) or error.errno == errno.EMSGSIZE:
                    raise  # a full buffer, or too large: no other address would help
        if sockaddrs:
            self.routes.pop(datagram.address, None)
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    def send_to_name(self, datagram: Datagram) -> None:
        """Use the old route of a name, or let `datagram` wait, until a look-up is over."""
        destination = datagram.address
        with self.lock:
            if destination not in self.look_ups and len(self.look_ups) < LOOK_UPS and not self.end:
                self.look_ups[destination] = self.threads.start(self.look_up, destination)
            if self.routes.get(destination, self.no_route)[0]:
                return self.send(datagram)
            if len(self.waiting) == MOST_WAITING:
                self.waiting.popleft()
                self.counts["dropped"] += 1
            return self.waiting.append(datagram)

    def look_up(self, destination: Address) -> None:
        """Look `destination` up, and send what waits for it. Queue the other datagrams again."""
        route = None
        try:
            with contextlib.suppress(OSError):  # an old route still serves
                route = self.find(destination)
        finally:
            with self.lock:  # the waiting datagrams go first
                if route:
                    self.remember(self.routes, destination, route)
                del self.look_ups[destination]
                waiting, self.waiting = self.waiting, collections.deque()
                for datagram in waiting:
                    is_found = datagram.address == destination
                    self.attempt(self.send if is_found else self.send_to_name, datagram)

    def relay_down(self, data: bytes, source: Any) -> None:
        address = Address.of(source)
        with self.lock:
            if address.host in self.hosts:
                self.hosts.move_to_end(address.host)
                self.inside.sendto(Datagram(0, address, data).pack(), self.client_sockaddr)
                self.counts["down"] += len(data)
                self.counts["datagrams_down"] += 1

    def stop(self, end: str) -> None:
        self.end = self.end or end

    def wait_for_look_ups(self) -> None:
        """Wait for the look-ups that are under way: the system's resolver knows no deadline."""
        self.stop("error")  # no effect if `run` has set an end
        with self.lock:
            look_ups = list(self.look_ups.values())
        for look_up_ended in look_ups:
            look_up_ended.acquire()


# ---- handler: one conversation -----------------------------------------------------------

REFUSAL_TIMEOUT = 2.0  # seconds for a refused client to read the answer and close
BIND_INTERVAL = 0.25   # seconds after which BIND checks if the client has left


def peer_user(sock: socket.socket) -> Optional[int]:
    """Return the user ID of the client of a Unix socket, None if the system does not tell."""
    if not IS_LINUX:
        return None
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    return int(struct.unpack("iII", credentials)[1])


def account_name(number: Optional[int]) -> str:
    try:
        return "" if number is None else pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def open_inside(kind: int, here: Any, ports: Iterable[int]) -> socket.socket:
    """Return a socket bound to one of `ports` at the address of `here`. Raises OSError."""
    host = Address.of(here).host
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    failure = OSError(errno.EADDRINUSE, "no ports")
    for port in ports:
        try:
            sock.bind((here[0], port, *here[2:]) if ":" in host else (host, port))
            return sock
        except OSError as error:
            failure = error
    sock.close()
    raise failure


def reason_of(error: Exception) -> str:
    """Return the system's words for `error`, as one word; "" if it has none."""
    return "_".join(describe(error).split()) if isinstance(error, OSError) else ""


class ClientReader(io.RawIOBase):
    """What the client sends, for a BufferedReader, until it leaves or `is_over` is set."""

    is_over = False

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return 0 if self.is_over else receive(self.sock, buffer, self)
        except OSError:
            return 0


class Phase(NamedTuple):
    """What a session does, since when and until when (monotonic clock).

    CONNECT: handshake, connect, idle; linger, once one side has closed. BIND: handshake, connect,
    bind, idle, linger. UDP ASSOCIATE: handshake, connect, udp. Once refused: refusal, and no other.
    After `hang_up`: closing.
    """
    name: str
    since: float
    deadline: float


class Socks5RequestHandler(socketserver.BaseRequestHandler):
    """One client's session. Override its hooks and pass the class to the server.

    Hooks may read `client_address` (("127.0.0.1", 0) for a Unix socket); `user`, the name of a
    checked login, or of the account behind a Unix socket if there are no users, otherwise "";
    `account`, the account behind a Unix socket, otherwise ""; `settings`, as they were when the
    client was accepted; and `server`. They may call `permitted` and `own_socket`. Other methods
    and attributes may change.

    In `authorize`, `connect` and `do_*`, a RequestError is answered with its reply, and an OSError
    by its errno. Any other exception is logged, and ends this session only. For UDP ASSOCIATE,
    `authorize` is called for each new destination of a datagram, for a name in another thread. Such
    an error drops the datagram, and in another thread, so does any other exception.
    """

    server: "Socks5Server"
    rbufsize = 1024    # bytes, more than 0: frames need a buffer, and few have more than 513
    login_pause = 1.0  # seconds before a failed login is answered; slows down guessing
    is_probe = True    # the client has not sent a byte, or is a balancer's health check

    def setup(self) -> None:
        self.started = time.monotonic()
        self.connection: socket.socket = self.request
        if SLICE:
            self.connection.settimeout(SLICE)
        self.reader = ClientReader(self.connection)
        self.rfile = io.BufferedReader(self.reader, self.rbufsize)
        self.lock = threading.RLock()  # for `sockets`, `reply` and an association
        self.sockets = {self.connection}  # `finish` closes them
        self.relay: Any = None  # a Relay or an Association
        self.last_progress: Any = None
        self.client = Address.of(self.client_address)
        self.client_name: Any = self.client  # for the log
        self.account = self.user = ""
        self.command = self.rule = self.end = self.error = ""  # as in the log, like the next ones
        self.destination: Any = ""
        self.reached: Any = ""
        self.reply: Optional[Reply] = None
        accepted = self.server.connections[self.connection]
        self.settings, self.is_proxied = accepted.settings, accepted.is_balancer
        self.rules = self.settings.rules_for(self.client.host)
        self.start_phase("handshake", self.settings.handshake_timeout)

    def handle(self) -> None:
        """Hold the conversation. Here, and in `carry_out`, failures become bytes."""
        with self.server.lock:
            self.server.sessions.add(self)  # from here on the server watches the deadlines
        try:
            self.identify_client()
            self.negotiate()
            try:
                request = Request.read(self.rfile)
            except RequestError as error:
                return self.refuse_request(error, "refused")
        except ProtocolError as error:
            return self.refuse(error.answer, error.end, error.error)
        return self.carry_out(request)

    def finish(self) -> None:
        """Close the session's sockets, and log it. It counts in the limits until its look-ups end.

        Another thread never closes them: `hang_up` wakes the session's threads. Other sockets are
        closed where they were opened, and a rejected client by `shutdown_request`.
        """
        try:
            # A close() with unread bytes of the client would send a reset, which can destroy the
            # answer to a refused client: so wait for it to close. `hang_up` ends the wait.
            while self.phase.name == "refusal" and self.rfile.read1(SMALL_BUFFER):
                pass
            self.set_end("error")  # nothing else was set: an exception has ended the session
            with self.lock:
                for sock in self.sockets:
                    sock.close()
                self.sockets.clear()
            is_routine = self.is_probe and self.end == "client-left"
            self.log_message(logging.DEBUG if is_routine else logging.INFO, "session",
                             {**self.state(), "error": self.error, "end": self.end})
            if isinstance(self.relay, Association):
                self.relay.wait_for_look_ups()
        finally:
            self.server.session_ended(self)

    # -- the client, and negotiation

    def identify_client(self) -> None:
        """Learn who the client is, from the system or from a balancer's header."""
        if self.server.address_family == UNIX_FAMILY:
            self.account = account_name(peer_user(self.connection))
            self.client_name = "unix:" + self.account
            self.user = "" if self.settings.users else self.account
        self.is_probe = not self.rfile.peek(1)
        if self.is_proxied:
            self.is_probe = not (self.read_balancer_header() and self.rfile.peek(1))

    def read_balancer_header(self) -> bool:
        """Learn from a balancer's header who the client is; return False for a health check.

        Rules, limits, `verify_request` and the log are then about this client, not the balancer. It
        is local only if the balancer is on this host, too: loopback elsewhere is not loopback here.
        """
        is_local_balancer = is_loopback(self.client.host)
        client = read_proxy_header(self.rfile)
        self.debug("balancer", header=client or "health check")
        self.rules = self.settings.rules_for_remote
        if client is None:  # a health check: if clients are limited, everything is denied
            self.rules = [DENY_OTHERS] if self.settings.clients else self.rules
        else:
            self.client_address = tuple(client)
            self.client = self.client_name = client
            if is_local_balancer:
                self.rules = self.settings.rules_for(self.client.host)
        if not self.server.admit_client(self.connection, client):
            raise ProtocolError("rejected")
        return client is not None

    def negotiate(self) -> None:
        """Agree on a method (section 3). If it needs a password, let the client log in."""
        offered = read_methods(self.rfile)
        method = self.select_method(offered)
        self.debug("methods", offered=offered, chosen=bytes([method]))
        if method == Method.NO_ACCEPTABLE_METHODS:
            raise ProtocolError("no-acceptable-method", b"\x05\xff")
        self.send(b"\x05%c" % method)
        if method == Method.USERNAME_PASSWORD:
            self.log_in()

    def select_method(self, offered: bytes) -> int:
        """Return the `Method` to use, given those `offered`, one byte each (section 3)."""
        has_users = self.settings.users is not None
        method = Method.USERNAME_PASSWORD if has_users else Method.NO_AUTHENTICATION_REQUIRED
        return method if method in offered else Method.NO_ACCEPTABLE_METHODS

    def log_in(self) -> None:
        """Check a login (RFC 1929). A wrong password costs a pause and the connection."""
        username, password = read_credentials(self.rfile)
        user = username.decode("utf-8", "surrogateescape")
        if not self.authenticate(username, password):
            self.log_message(logging.WARNING, "login failed",
                             {"client": self.client_name, "user": user})
            self.start_phase("refusal", self.login_pause + REFUSAL_TIMEOUT)
            self.server.closing.wait(self.login_pause)
            raise ProtocolError("login-failed", b"\x01\x01")
        self.user = user
        self.debug("login", user=user)
        self.send(b"\x01\x00")

    def authenticate(self, username: bytes, password: bytes) -> bool:
        """Return True for the credentials of a user; it takes as long for an unknown one."""
        expected = (self.settings.users or {}).get(username)
        return hmac.compare_digest(expected or b"", password) and expected is not None

    def send(self, answer: bytes) -> None:
        """Send `answer`. A client that has left is noticed by the next read."""
        with contextlib.suppress(OSError):
            self.connection.sendall(answer)

    # -- the request and its reply

    def carry_out(self, request: Request) -> None:
        """Call ``do_COMMAND``. A failure is answered, too, with exactly one reply."""
        is_known = request.command in COMMANDS.values()
        self.command = Command(request.command).name if is_known else str(request.command)
        self.destination = request.destination
        self.debug("request", command=self.command, destination=self.destination)
        self.start_phase("connect", self.settings.connect_timeout)
        try:
            if not self.is_served():
                raise RequestError(Reply.COMMAND_NOT_SUPPORTED)
            if self.user and not self.server.admit_user(self):
                raise RequestError(Reply.NOT_ALLOWED)
            is_udp = self.command == "UDP_ASSOCIATE"  # each datagram has a destination
            if not is_udp and not self.authorize(request.destination):
                raise RequestError(Reply.NOT_ALLOWED)
            if self.end:  # the hook took too long, and the server has answered
                raise socket.timeout("timed out")
            getattr(self, "do_" + self.command)(request.destination)
        except (RequestError, OSError) as error:
            self.refuse_request(error, "refused")
        except Exception as error:
            self.refuse_request(error, "error")
            raise

    def is_served(self) -> bool:
        """Return True if the command is enabled, and possible for this client."""
        # BIND and UDP ASSOCIATE need an IP address at which the client can reach this host. On a
        # Unix socket there is none. Behind a balancer, there is only `udp_advertise`, for UDP.
        is_possible = self.server.address_family != UNIX_FAMILY
        if self.is_proxied:
            is_possible = self.command == "UDP_ASSOCIATE" and bool(self.settings.udp_advertise)
        return self.command in self.settings.commands and (self.command == "CONNECT" or is_possible)

    def authorize(self, destination: Address) -> bool:
        """Return True if the client may go to `destination`, as it was requested."""
        return True

    def refuse_request(self, error: Exception, end: str) -> None:
        """Answer with the reply for `error`, unless there was one. The server calls it, too."""
        with self.lock:
            if self.reply is not None:
                return
            self.reply = reply_for(error)
            self.start_phase("refusal", REFUSAL_TIMEOUT)
        self.refuse(pack_reply(self.reply), end, reason_of(error))

    def refuse(self, answer: bytes, end: str, error: str) -> None:
        """Send `answer`, if there is one: the last bytes that the client gets."""
        self.set_end(end, error)
        if answer:
            self.start_phase("refusal", REFUSAL_TIMEOUT)
            self.send(answer)
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)

    # -- commands

    def do_CONNECT(self, destination: Address) -> None:
        """Connect to `destination`, and relay until both sides have closed (section 4)."""
        target = self.connect(destination)
        if isinstance(target, socket.socket):
            self.own_socket(target)
        if not isinstance(target, socket.socket) or hasattr(target, "unwrap"):
            raise TypeError(f"connect() returned a {type(target).__name__}")
        bound = Address.of(target.getsockname())
        with contextlib.suppress(OSError):  # it may be gone already
            self.reached = Address.of(target.getpeername())
        if self.reached == bound and bound.port:  # the socket has connected to itself
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        self.relay_to(target, bound)

    def connect(self, destination: Address) -> socket.socket:
        """Return a socket that is connected to `destination`; the session closes it.

        The default dials the permitted addresses. Whatever this method does, the client is
        answered when `connect_timeout` seconds have passed. Raises RequestError or OSError. Not
        for TLS sockets: two threads cannot share one, and TLS has no half-close. Relay through a
        ``socket.socketpair()`` instead.
        """
        deadline = time.monotonic() + self.settings.connect_timeout
        candidates = self.permitted(destination, deadline)
        failures: List[Tuple[Candidate, OSError]] = []
        try:
            return dial(candidates, deadline, self.settings.source, self.server.closing, failures)
        finally:
            for (_, sockaddr), error in failures:
                self.debug("attempt failed", address=Address.of(sockaddr), error=reason_of(error))

    def do_BIND(self, destination: Address) -> None:
        """Wait for `destination` to connect, and relay (section 4). There are two replies."""
        hosts: Set[str] = set()  # if it stays empty, all that the rules allow
        here = self.connection.getsockname()
        if destination.host not in ("0.0.0.0", "::"):
            peers = self.permitted(destination, self.phase.deadline)
            hosts = {Address.of(peer[1]).host for peer in peers}
            family, sockaddr = peers[0]
            if parse_ip(Address.of(sockaddr).host).is_multicast:  # it never connects
                raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((sockaddr[0], 9) + sockaddr[2:])  # sends nothing: only finds the way
                here = probe.getsockname()
        self.start_phase("bind", self.settings.bind_timeout)
        with open_inside(socket.SOCK_STREAM, here, [0]) as listener:
            listener.listen(8)
            self.send(pack_reply(Reply.SUCCEEDED, Address.of(listener.getsockname())))
            target = self.own_socket(self.accept(listener, hosts))
        self.relay_to(target, self.reached)

    def accept(self, listener: socket.socket, hosts: Set[str]) -> socket.socket:
        """Return a connection from one of `hosts`, or from any if it is empty. Raises OSError."""
        listener.settimeout(BIND_INTERVAL)
        while not self.end:
            if self.has_left():
                self.set_end("client-left")
                raise ConnectionResetError
            with contextlib.suppress(socket.timeout, ConnectionAbortedError):
                target, sockaddr = listener.accept()
                peer = Address.of(sockaddr)
                rule = self.deciding_rule(b"", parse_ip(peer.host), peer.port)
                if not self.end and (peer.host in hosts or rule.allows and not hosts):
                    self.reached = peer
                    return target
                target.close()
        raise socket.timeout("timed out")

    def has_left(self) -> bool:
        """Return True if the client has left. What it has sent stays in the kernel."""
        try:
            flags = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)
            return not self.connection.recv(1, flags)
        except (BlockingIOError, socket.timeout):
            return False
        except OSError:
            return True

    def do_UDP_ASSOCIATE(self, destination: Address) -> None:
        """Relay datagrams (section 7).

        Datagrams come from the port of `destination` if its host is the client's or unspecified.
        Otherwise, and for port 0, the first datagram sets the port.
        """
        settings, here = self.settings, self.connection.getsockname()
        if self.is_proxied:  # clients cannot reach the address to which the balancer connected
            here = ("::", 0, 0, 0) if ":" in (settings.udp_advertise or "") else ("0.0.0.0", 0)
        inside = self.own_socket(open_inside(socket.SOCK_DGRAM, here, settings.udp_ports))
        outside = self.own_socket(open_outside(settings.source))
        names_client = destination.host in ("0.0.0.0", "::", self.client.host)
        client = self.client._replace(port=destination.port if names_client else 0)
        host, port = Address.of(inside.getsockname())
        relay = Association(self.lock, self.connection, inside, outside, client, self.find_routes)
        self.run_relay(relay, Address(settings.udp_advertise or host, port))

    def relay_to(self, target: socket.socket, bound: Address) -> None:
        target.settimeout(SLICE)
        set_options(target, TCP_OPTIONS)
        self.debug("connected", reached=self.reached, bound=bound)
        relay = Relay(self.connection, target, self.rfile)
        self.run_relay(relay, bound)
        if relay.ends:
            seconds = round(relay.first_end_at - self.started, 3)
            self.debug("closed", first=relay.ends[0], seconds=seconds)

    def run_relay(self, relay: Any, bound: Address) -> None:
        with self.lock:
            if self.reply is not None:  # the server has answered, because it took too long
                set_options(self.connection, CLEAN_CLOSE)
                return
            self.relay, self.reply = relay, Reply.SUCCEEDED
        self.reader.is_over = True  # the relay receives by itself
        if self.end:  # `hang_up` came before there was a relay to stop
            relay.stop(self.end)
        try:
            relay.run(self.server.threads, pack_reply(Reply.SUCCEEDED, bound))
        except NoThreadError:
            self.relay = self.reply = None
            self.reader.is_over = False
            set_options(self.connection, CLEAN_CLOSE)
            self.set_end("no-thread")
            raise
        except OSError:  # the reply could not be sent
            self.set_end("client-reset")
            raise
        self.set_end(relay.end)

    # -- destinations

    def permitted(self, destination: Address, deadline: float) -> List[Candidate]:
        """Return the addresses of `destination` that the rules allow, best first.

        A name is looked up if a rule might allow it. Then each address is judged: denied ones are
        left out. Raises RequestError if none is left, OSError if the name cannot be resolved by
        `deadline` (monotonic clock).
        """
        ip = parse_ip(destination.host)
        name = encode_name(destination.host) if ip is None else b""
        rule = self.deciding_rule(name, ip, destination.port)
        if ip is not None and rule.allows:
            host = str(ip) if ":" in destination.host else destination.host  # mapped: IPv4
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return [(family, (host, destination.port))]
        allowed = []
        for candidate in look_up(name, destination.port) if rule.allows else ():
            address = Address.of(candidate[1])
            rule = self.deciding_rule(name, parse_ip(address.host), address.port)
            self.debug("resolved", name=destination.host, address=address.host,
                       denied="" if rule.allows else rule.text)
            if rule.allows:
                allowed.append(candidate)
        if time.monotonic() > deadline:
            raise socket.timeout("timed out")
        if not allowed:
            self.rule = rule.text
            raise RequestError(Reply.NOT_ALLOWED)
        return allowed

    def deciding_rule(self, name: bytes, ip: Any, port: int) -> Rule:
        """Return the first rule that matches, see `Rule.matches`; the last one always does."""
        name = name.rstrip(b".")
        return next(rule for rule in self.rules if rule.matches(self.user, name, ip, port))

    def find_routes(self, destination: Address) -> List[Any]:
        """Return the sockaddrs to send to, IPv4 first: UDP does not show which one answers.

        If the datagrams are sent from an IPv6 address, IPv6 comes first.
        """
        if not self.authorize(destination):
            raise RequestError(Reply.NOT_ALLOWED)
        routes = [candidate[1] for candidate in self.permitted(destination, NEVER)]
        source = self.settings.source or ""
        return sorted(routes, key=lambda route: (":" in route[0]) != (":" in source))

    # -- deadlines and the end

    def own_socket(self, sock: socket.socket) -> socket.socket:
        """Own `sock`, and return it: `hang_up` wakes its thread, `finish` closes it."""
        with self.lock:
            self.sockets.add(sock)
        return sock

    def set_end(self, end: str, error: str = "") -> None:
        """Set the reason for the end of the session, unless it is already set."""
        if not self.end:
            self.end, self.error = end, error

    def start_phase(self, name: str, seconds: float) -> None:
        now = time.monotonic()
        self.phase = Phase(name, now, now + seconds)

    def check_deadline(self, now: float) -> None:
        """End a phase that has lasted too long. A relay's progress starts it anew.

        Hang up on a silent client. If the resolver or a target is silent, answer with reply 6; the
        session counts in the limits until the resolver returns, and `server_close` waits for it.
        """
        if self.relay and self.phase.name != "closing":
            progress = self.relay.end, self.counts
            if progress != self.last_progress:
                self.last_progress = progress
                phase, settings = self.relay.phase, self.settings
                self.start_phase(phase, {"idle": settings.idle_timeout, "linger": settings.linger,
                                         "udp": settings.udp_timeout}[phase])
        if now < self.phase.deadline:
            return
        if self.phase.name in ("connect", "bind"):
            self.refuse_request(socket.timeout("timed out"), "refused")
        else:  # handshake-timeout, idle-timeout, linger-timeout, udp-timeout
            self.hang_up(self.phase.name + "-timeout")

    def hang_up(self, end: str) -> None:
        """End the session by waking its threads. Call it again: a hook may open another socket."""
        self.set_end(end)
        self.start_phase("closing", NEVER)
        self.reader.is_over = True
        if self.relay:
            self.relay.stop(end)
        with self.lock:
            for sock in self.sockets:
                wake(sock)

    @property
    def counts(self) -> Dict[str, int]:
        return dict(self.relay.counts) if self.relay else {"up": 0, "down": 0}

    def state(self) -> Dict[str, object]:
        return {"client": self.client_name, "user": self.user, "command": self.command,
                "destination": self.destination, "reached": self.reached,
                "reply": "" if self.reply is None else self.reply.name, "rule": self.rule,
                **self.counts,
                "seconds": f"{time.monotonic() - self.started:.3f}"}

    def debug(self, event: str, **fields: object) -> None:
        """Log a step of the conversation at DEBUG. Nothing is computed when nobody reads it."""
        if log.isEnabledFor(logging.DEBUG):
            self.log_message(logging.DEBUG, event, {"client": self.client_name, **fields})

    def log_message(self, level: int, event: str, fields: Mapping[str, object]) -> None:
        """Log `event` with `fields`, each one word of ASCII: the network can forge no line."""
        if log.isEnabledFor(level):
            words = [f"{name}={escape(value)}" for name, value in fields.items()]
            log.log(level, "%s %s", event, " ".join(words))


# ---- server: accepting, limits, deadlines, closing ---------------------------------------

SWEEP_INTERVAL = 0.5     # seconds between two checks of the deadlines
EXHAUSTION_PAUSE = 0.1   # seconds before accepting is tried again
WARNING_INTERVAL = 1.0   # seconds between two warnings of a kind
ACCEPT_TIMEOUT = 0.2     # seconds for which accept() waits before `is_accepting` is checked
NO_TIMEOUT = seconds_option("SO_RCVTIMEO", 0) if IS_LINUX else []  # an accepted socket inherits it
LISTENER_OPTIONS = (  # a Unix socket takes the first one only
    seconds_option("SO_RCVTIMEO", ACCEPT_TIMEOUT) if IS_LINUX else []) + TCP_OPTIONS


def session_limit() -> float:
    """Return how many sessions this process has descriptors for: most need two."""
    if sys.platform == "win32":
        return NEVER
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # 16 for log, resolver and listening
    return NEVER if limit == resource.RLIM_INFINITY else max(1, (limit - 16) // 2)


def remove_stale_socket(path: str) -> None:
    """Remove the socket at `path` if nobody listens on it any more. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            probe.settimeout(1)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


class Connection:
    """What the server knows of an accepted connection."""

    def __init__(self, settings: Settings, is_balancer: bool) -> None:
        self.settings = settings  # at the time of accepting; valid for the whole session
        self.is_balancer = is_balancer  # one that has not sent its header yet
        self.owners: List[Any] = []  # the limits in which it counts: of a client and of a user


class Socks5Server(socketserver.ThreadingTCPServer):
    """A SOCKS5 proxy that serves each client in a thread of its own.

    `server_address` is a host and a port, or the path of a Unix socket; ``::`` listens on both
    families. `mode` is for the permissions of the path. `listener` is a socket that listens
    already. The other arguments are those of ``socketserver`` and of `Settings`. Assign other
    Settings to `settings` at any time: they apply to new sessions. Raises OSError or ValueError.

    ``serve_forever`` also checks the deadlines, every `poll_interval` seconds; leave that at one
    second or less. ``server_close``, or the end of a ``with`` block, ends the sessions and waits
    for their threads; it may have to wait for the system's resolver, which cannot be interrupted.
    `running` does all of that for you.

    Besides what ``socketserver`` documents, `drain`, `report` and `running` are there to be
    called. Other methods and attributes may change.

    For thousands of sessions, call `prepare_process` first, or do what it does.
    """

    allow_reuse_address = os.name == "posix"  # elsewhere it lets others take the port
    request_queue_size = 1024
    is_accepting = True
    is_inherited = False

    def __init__(self, server_address: Any,
                 RequestHandlerClass: Callable[..., Any] = Socks5RequestHandler, *,
                 bind_and_activate: bool = True, mode: int = 0o600,
                 listener: Optional[socket.socket] = None,
                 users: Optional[Mapping[str, str]] = None, rules: Iterable[str] = (),
                 clients: Iterable[str] = (), commands: Iterable[str] = tuple(COMMANDS),
                 proxy_from: Iterable[str] = (), max_sessions: Optional[int] = None,
                 max_per_client: Optional[int] = None, max_per_user: Optional[int] = None,
                 connect_timeout: float = 10.0, handshake_timeout: float = 10.0,
                 idle_timeout: Optional[float] = None, linger: float = 60.0,
                 bind_timeout: float = 60.0, udp_timeout: float = 300.0,
                 udp_ports: Iterable[int] = (0,), udp_advertise: Optional[str] = None,
                 source: Optional[str] = None) -> None:
        arguments = locals()  # the settings again, by name: help() and type checkers show them
        self.settings = Settings(**{name: arguments[name] for name in DEFAULTS})
        self.lock = threading.Lock()  # for what follows
        self.connections: Dict[Any, Connection] = {}  # by socket
        self.owners: "collections.Counter[Any]" = collections.Counter()  # of connections
        self.sessions: Set[Socks5RequestHandler] = set()
        self.totals: "collections.Counter[str]" = collections.Counter()
        self.connection_closed = threading.Condition(self.lock)
        self.threads = ThreadCache()
        self.session_limit = session_limit()
        self.next_sweep = time.monotonic()
        self.warnings: Dict[str, Tuple[float, int]] = {}  # when each may be logged; how many wait
        self.closing = threading.Event()
        self.mode = mode
        self.verify_request = functools.partial(  # type: ignore[method-assign]
            self.verify_safely, self.verify_request)
        if isinstance(server_address, str):
            self.address_family = UNIX_FAMILY or socket.AF_INET
        elif ":" in server_address[0]:  # getaddrinfo() keeps the zone of a link-local address
            self.address_family = socket.AF_INET6
            server_address = socket.getaddrinfo(
                server_address[0], server_address[1], socket.AF_INET6, socket.SOCK_STREAM)[0][4]
        super().__init__(server_address, RequestHandlerClass, bind_and_activate and not listener)
        if listener:
            self.socket.close()
            self.socket, self.is_inherited = listener, True
            self.socket.setblocking(True)
            set_options(self.socket, LISTENER_OPTIONS)

    # -- accepting

    def server_bind(self) -> None:
        """Bind the socket to an address, or to a path that has the permissions `mode`."""
        set_options(self.socket, LISTENER_OPTIONS)  # clients' sockets inherit them
        path: Any = self.server_address
        if not isinstance(path, str):
            if path[0] == "::":
                with contextlib.suppress(AttributeError, OSError):
                    self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            return super().server_bind()
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:  # another server that starts here must not take this socket for a stale one
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_stale_socket(path)
            self.socket.bind(path)
            os.chmod(path, self.mode)
            return self.socket.listen(self.request_queue_size)
        finally:
            os.close(folder)

    def accept_forever(self) -> None:
        """Accept clients while `is_accepting`, then the queued ones, and stop listening."""
        # Workers share a socket. Linux wakes one of them for a client if they wait in accept(), and
        # all of them if they wait in a selector.
        accept_one: Any = self._handle_request_noblock  # type: ignore[attr-defined]
        if not IS_LINUX:  # Linux has SO_RCVTIMEO
            self.socket.settimeout(ACCEPT_TIMEOUT)
        while self.is_accepting:
            try:
                accept_one()
            except Exception as error:
                log_failure("accepting failed", error)
                time.sleep(EXHAUSTION_PAUSE)
        if not self.is_inherited:  # systemd keeps such a socket, and its queue, for the next server
            self.timeout = 0  # so handle_request() returns if the queue is empty
            for _ in range(self.request_queue_size):
                self.handle_request()
        self.socket.close()

    def close_queue(self) -> None:
        """Let no client enter the queue any more: close() would reset it. It tries again later."""
        if IS_LINUX and not self.is_inherited:
            steps = ((0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 1, 0, 0x02),  # SYN without ACK?
                     (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0))  # then drop the packet
            program = array.array("B", b"".join(struct.pack("HBBI", *step) for step in steps))
            option = struct.pack("HP", len(steps), program.buffer_info()[0])
            set_options(self.socket, [(socket.SOL_SOCKET, 26, option)])  # SO_ATTACH_FILTER

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept a client. Raises OSError if there is none.

        If descriptors are used up, log that, pause, and raise OSError: clients wait in the queue. A
        session that cannot open a socket answers with reply 1.
        """
        try:
            if len(self.connections) >= self.session_limit:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            request, client_address = super().get_request()
        except (BlockingIOError, socket.timeout, ConnectionAbortedError):  # no client, or it left
            raise
        except OSError as error:
            time.sleep(EXHAUSTION_PAUSE)  # socketserver would try again at once
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.warn("not accepting: %s", error.strerror)
            raise
        set_options(request, NO_TIMEOUT)
        is_path, settings = self.address_family == UNIX_FAMILY, self.settings
        client_address = ("127.0.0.1", 0) if is_path else client_address
        is_balancer = not is_path and covers(settings.proxy_from, Address.of(client_address).host)
        self.connections[request] = Connection(settings, is_balancer)
        return request, client_address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return True if a client may connect from this address.

        It is called for a balancer when its connection is accepted, and again for its client.
        """
        connection = self.connections[request]
        networks = connection.settings.clients
        if (not networks or self.address_family == UNIX_FAMILY or connection.is_balancer
                or covers(networks, Address.of(client_address).host)):
            return True
        self.warn("client refused client=%s", Address.of(client_address))
        return False

    def verify_safely(self, verify_request: Callable[[Any, Any], bool], request: Any,
                      client_address: Any) -> bool:
        """Call `verify_request`. If it raises, reject this client only."""
        try:
            return verify_request(request, client_address)
        except Exception:
            self.handle_error(request, client_address)
            return False

    def process_request(self, request: Any, client_address: Any) -> None:
        client = Address.of(client_address)
        if not (self.connections[request].is_balancer or self.has_room_for(request, client)):
            return self.shutdown_request(request)
        try:
            self.threads.start(self.process_request_thread, request, client_address)
        except NoThreadError:
            self.warn("no thread for a client client=%s", client)
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        if request.fileno() >= 0:
            super().shutdown_request(request)
        with self.connection_closed:
            connection = self.connections.pop(request, None)
            for owner in connection.owners if connection else ():
                self.owners[owner] -= 1
                if not self.owners[owner]:
                    del self.owners[owner]
            self.connection_closed.notify_all()

    # -- limits

    def admit(self, request: Any, owner: Tuple[str, Any], limit: float, who: object) -> bool:
        """Return True, and count the connection for `owner`, if that has fewer than `limit`."""
        with self.lock:
            if self.owners[owner] < limit:
                self.owners[owner] += 1
                self.connections[request].owners.append(owner)
                return True
        self.warn(f"too many sessions of a {owner[0]} client=%s", who)
        return False

    def has_room_for(self, request: Any, client: Optional[Address]) -> bool:
        """Return True, and count the connection, if no limit is reached; see `admit_client`."""
        settings = self.connections[request].settings
        who: Any = client
        host: Any = client and client.host
        if self.address_family == UNIX_FAMILY:  # not by name: its look-up may take long
            who = host = f"unix:{peer_user(request)}"
        if len(self.connections) > settings.max_sessions:
            self.warn("too many sessions client=%s", who)
            return False
        return not client or self.admit(request, ("client", host), settings.max_per_client, who)

    def admit_client(self, request: Any, client: Optional[Address]) -> bool:
        """Return True if the client of a balancer may connect. None is a health check."""
        self.connections[request].is_balancer = False
        is_welcome = client is None or self.verify_request(request, tuple(client))
        return is_welcome and self.has_room_for(request, client)

    def admit_user(self, session: Socks5RequestHandler) -> bool:
        """Return True, and count `session`, if its user has fewer sessions than `max_per_user`."""
        who = f"{session.client_name} user={escape(session.user)}"
        return self.admit(session.connection, ("user", session.user),
                          session.settings.max_per_user, who)

    # -- watching

    def session_ended(self, session: Socks5RequestHandler) -> None:
        with self.lock:
            self.sessions.discard(session)
            for name, count in {"sessions": 1, **session.counts, session.end: 1}.items():
                self.totals[name] += count

    def service_actions(self) -> None:
        """Check the deadlines; ``serve_forever`` calls it often. Never raise."""
        now = time.monotonic()
        if now >= self.next_sweep:
            self.next_sweep = now + SWEEP_INTERVAL
            self.for_each_session(Socks5RequestHandler.check_deadline, now)

    def for_each_session(self, action: Callable[..., None], *args: Any) -> None:
        """Call `action` with each session. One that fails must not keep it from the others."""
        with self.lock:
            sessions = list(self.sessions)
        for session in sessions:
            try:
                action(session, *args)
            except Exception as error:
                self.warn("watching a session failed error=%s", type(error).__name__)

    def warn(self, message: str, *args: object) -> None:
        """Log a warning, one of a kind in WARNING_INTERVAL seconds; the next counts the others."""
        due, suppressed = self.warnings.get(message, (0.0, 0))
        if time.monotonic() < due:
            self.warnings[message] = due, suppressed + 1
            return
        self.warnings[message] = time.monotonic() + WARNING_INTERVAL, 0
        if suppressed:
            message, args = message + " suppressed=%d", (*args, suppressed)
        log.warning(message, *args)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1] or Exception()
        log_failure(f"session failed client={Address.of(client_address)}", error)

    def report(self) -> None:
        """Log each live session, and the totals of the ended ones."""
        with self.lock:
            sessions, totals = list(self.sessions), dict(self.totals)
        for session in sessions:
            session.log_message(NOTICE, "live", {
                **session.state(), "idle": f"{time.monotonic() - session.phase.since:.3f}",
                "phase": session.phase.name})
        limit = min(self.session_limit, self.settings.max_sessions)
        fields = {"pid": os.getpid(), "live": len(sessions), "limit": limit, **totals}
        log.log(NOTICE, "totals %s", " ".join(f"{name}={value}" for name, value in fields.items()))

    # -- closing

    def drain(self, seconds: float) -> bool:
        """Return True once no connection is left, False after `seconds`.

        Call ``shutdown`` before, or new clients keep coming.
        """
        with self.connection_closed:
            return self.connection_closed.wait_for(lambda: not self.connections, seconds)

    def hang_up(self, seconds: float) -> None:
        """End all sessions, and wait until no connection is left, for up to `seconds`."""
        self.closing.set()
        until = time.monotonic() + seconds
        while self.connections and time.monotonic() < until:
            self.for_each_session(Socks5RequestHandler.hang_up, "server-closed")
            self.drain(0.05)

    def server_close(self) -> None:
        """Stop listening, end the sessions, and wait for their threads."""
        super().server_close()
        self.hang_up(NEVER)
        self.threads.close()

    @contextlib.contextmanager
    def running(self) -> Iterator["Socks5Server"]:
        """Serve in a thread for the length of a ``with`` block, and then close the server."""
        thread = start_thread(self.serve_forever, 0.05)
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


# ---- log and systemd: lines that never block, readiness, inherited sockets ---------------

def write_unless_stuck(descriptor: int, text: str) -> None:
    """Write `text`. Raises OSError if that fails, or would block."""
    data = text.encode("utf-8", "backslashreplace")
    piece = getattr(select, "PIPE_BUF", len(data))  # a pipe takes that much when poll() says so
    while data:
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            if not poll.poll(0):
                raise BlockingIOError
        data = data[os.write(descriptor, data[:piece]):]


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Write the log to stderr. Lines that would block are dropped, and counted."""

    dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            lines = self.format(record) + "\n"
            if self.dropped:
                lines += f"WARNING log lines dropped count={self.dropped}\n"
            write_unless_stuck(self.stream.fileno(), lines)
            self.dropped = 0
        except Exception:  # a reader that does not read, or a full disk
            self.dropped += 1


def announce(line: str) -> None:
    """Print `line`. A full disk or a closed pipe must not stop the server."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # None, if there is no stdout
        write_unless_stuck(sys.stdout.fileno(), line + "\n")


def notify(state: str) -> None:
    """Tell systemd the state of the service, if it wants to know (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


def inherited_socket() -> Optional[socket.socket]:
    """Return the listening socket that systemd has passed, if any. Raises OSError or ValueError."""
    count, process = (os.environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_PID"))
    if process != str(os.getpid()):
        return None
    if count != "1":
        raise ValueError(f"systemd passed {count or 'no'} sockets, expected 1")
    sock = socket.socket(fileno=3)
    if (not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            or isinstance(sock.getsockname(), bytes)):
        raise ValueError("descriptor 3 does not listen on an address or a path: use ListenStream=")
    family = sock.getsockopt(socket.SOL_SOCKET, 39)  # Linux's SO_DOMAIN
    return socket.socket(family, fileno=sock.detach())  # CPython 3.6 takes it for IPv4


# ---- service: signals and worker processes -----------------------------------------------

TICK = 0.1           # seconds between two looks at signals, deadlines and workers
RESTART_PAUSE = 1.0  # seconds before a worker that has died is replaced
HANG_UP_TIME = 1.0   # seconds for sessions to end once the drain is over
LAST_RESORT = 2.0    # seconds after the drain until workers that are stuck are killed
SIGHUP, SIGUSR1, SIGUSR2 = [getattr(signal, "SIG" + name, None) for name in ("HUP", "USR1", "USR2")]
STOP_SIGNALS: Set[Any] = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGBREAK", None)} - {None}
OTHER_SIGNALS: Set[Any] = {SIGHUP, SIGUSR1, SIGUSR2} - {None}  # each system lacks some


def usable_cpus() -> List[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def stay_on_one_cpu(number: int) -> None:
    """Run this process on one CPU, chosen by `number`, and without preempting itself."""
    # Only one thread at a time has the interpreter: on other CPUs, threads would wake in vain. On
    # one CPU, SCHED_BATCH stops a thread that a packet wakes from preempting it.
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    if has_gil and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # it is an optimisation
            cpus = usable_cpus()
            os.sched_setaffinity(0, {cpus[number % len(cpus)]})
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def catch_signals() -> Deque[int]:
    """Return a queue that gets the number of each signal that comes."""
    signals: Deque[int] = collections.deque()
    for number in STOP_SIGNALS | OTHER_SIGNALS:
        # a script's shell ignores SIGINT for a command with &
        if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: signals.append(number))
    return signals


class Service:
    """A process that serves until signals stop it.

    The first SIGTERM or SIGINT drains: the process ends when no session is left, or after
    `drain_seconds`. The second one resets the sessions at once. SIGHUP reads the settings again.
    SIGUSR1 logs the live sessions and totals.
    """

    parent = 0  # process ID, in a worker
    end_at = NEVER  # when to end the sessions that are left

    def __init__(self, server: Socks5Server, signals: Deque[int], drain_seconds: float,
                 read_settings: Callable[[], Settings]) -> None:
        self.server, self.signals, self.drain_seconds = server, signals, drain_seconds
        self.read_settings = read_settings
        self.has_terminal = os.isatty(0)

    def run(self, number: Optional[int] = None) -> None:
        """Serve on a CPU chosen by `number`; return when it is over. Raises NoThreadError."""
        stay_on_one_cpu(os.getpid() if number is None else number)
        acceptor = start_thread(self.server.accept_forever)
        while time.monotonic() < self.end_at and (
                acceptor.is_alive() or self.server.connections):
            if self.parent and os.getppid() != self.parent:  # it has died
                self.parent = os.getppid()
                self.stop()
            self.tick(self.server.service_actions)
        self.server.hang_up(HANG_UP_TIME)

    def tick(self, work: Callable[[], None]) -> None:
        """Obey the signals that have come, call `work`, and sleep. Never raise."""
        try:
            while self.signals:
                self.obey(self.signals.popleft())
            work()
        except Exception as error:
            log_failure("service failed", error)
        time.sleep(TICK)

    def obey(self, number: int) -> None:
        if number == SIGUSR1:
            self.server.report()
        elif number == SIGHUP and os.isatty(0) == self.has_terminal:
            self.reload()
        elif number == SIGUSR2 or not self.parent:  # SIGHUP: the terminal (or ssh) is gone
            self.stop()

    def reload(self) -> bool:
        """Read the settings for new sessions. If they are invalid, keep all, and return False.

        Live sessions keep theirs. The address, the port, `--mode`, `--workers`, `--drain`, `-q` and
        `-v` stay.
        """
        interval = sys.getswitchinterval()
        sys.setswitchinterval(0.005)  # parsing many rules must not stop the sessions
        try:
            self.server.settings = self.read_settings()
            log.log(NOTICE, "settings reloaded")
            return True
        except (OSError, ValueError, TypeError, RecursionError, SystemExit) as error:  # by --help
            log.warning("reload failed, keeping the current settings: %s", describe(error))
            return False
        finally:
            sys.setswitchinterval(interval)

    def stop(self) -> None:
        """Stop accepting. End the sessions after `drain_seconds`; if called again, at once."""
        seconds = self.drain_seconds if self.server.is_accepting else 0
        self.end_at = min(self.end_at, time.monotonic() + seconds)
        if self.server.is_accepting and not self.parent:
            announce("Shutting down.")
            notify("STOPPING=1")
            self.server.close_queue()
        self.server.is_accepting = False


class Workers(Service):
    """The parent of processes that serve. It replaces dead ones, and passes on signals.

    A terminal or systemd sends each signal to all processes. So workers ignore SIGTERM and SIGINT:
    their parent sends SIGUSR2 for each, which means the same to a worker. It kills workers that are
    stuck. It keeps the listening socket open: if a worker dies, the others serve its queue.
    """

    start_at = 0.0  # when to start the missing workers

    def __init__(self, count: int, *args: Any) -> None:
        super().__init__(*args)
        self.missing = list(range(count))  # numbers of the workers to start
        self.processes: Dict[int, int] = {}  # numbers of the workers, by process ID

    def run(self, number: Optional[int] = None) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it were ignored, waitpid() would fail
        while (self.server.is_accepting or self.processes) and (
                time.monotonic() < self.end_at + LAST_RESORT):
            if time.monotonic() >= self.end_at:
                self.tell(SIGUSR2)  # again: two signals may have become one
            self.tick(self.replace)
        self.tell(signal.SIGKILL)  # workers that are stuck

    def obey(self, number: int) -> None:
        if number == SIGUSR1:
            self.tell(SIGUSR1)
        elif number == SIGHUP and os.isatty(0) == self.has_terminal:
            if self.reload():
                self.tell(SIGHUP)
        else:
            self.stop()
            self.server.socket.close()
            self.tell(SIGUSR2)

    def tell(self, number: Any) -> None:
        for process in self.processes:
            os.kill(process, number)

    def replace(self) -> None:
        """Forget dead workers, and start the missing ones."""
        process = -1
        while self.processes and process:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process in self.processes:  # process 1 of a container gets other ones, too
                self.missing.append(self.processes.pop(process))
                if self.server.is_accepting:
                    self.start_at = time.monotonic() + RESTART_PAUSE
                    log.warning("worker %s pid=%d signal=%d exit=%d", "died" if status else "ended",
                                process, os.WTERMSIG(status), os.WEXITSTATUS(status))
        if self.server.is_accepting and time.monotonic() >= self.start_at:
            self.start_at = time.monotonic() + RESTART_PAUSE
            self.start_missing()

    def start_missing(self) -> None:
        parent = os.getpid()
        # CPython forgets a signal that comes to the new process before it has begun to run.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS | OTHER_SIGNALS)
        try:
            while self.missing:
                process = os.fork()
                if not process:
                    self.serve_as_worker(self.missing[-1], parent)
                self.processes[process] = self.missing.pop()
        except OSError as error:
            self.server.warn("cannot start a worker: %s", error.strerror)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS | OTHER_SIGNALS)

    def serve_as_worker(self, number: int, parent: int) -> None:
        try:
            worker = Service(self.server, self.signals, self.drain_seconds, self.read_settings)
            worker.parent = parent
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS | OTHER_SIGNALS)
            worker.run(number)
            os._exit(0)  # the interpreter's own end would wait for threads
        except Exception as error:
            log_failure("worker failed", error)
        finally:
            os._exit(1)


# ---- command line ------------------------------------------------------------------------

HOST, PORT = "127.0.0.1", 1080
LISTEN_PATIENCE = 1.0  # seconds to wait for an address that a server is about to release


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError for a usage error, and reads a file as a shell does."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def convert_arg_line_to_args(self, line: str) -> List[str]:
        return shlex.split(line, comments=True)


def typed(convert: Callable[[str], Any], accepted: str) -> Callable[[str], Any]:
    """Return `convert` for argparse. The message of an error says what is `accepted`."""
    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{accepted}, not {text!r}") from None
    return converted


def worker_count(text: str) -> int:
    number = len(usable_cpus()) if text == "auto" else int(text)
    if number < 1:
        raise ValueError
    return number


def add_access_options(parser: argparse.ArgumentParser) -> None:
    number = typed(int, "a whole number")
    add = parser.add_argument_group("who may use it").add_argument
    add("--users", metavar="FILE", help="require a login; FILE has a line name:password per user")
    add("--client", metavar="NETWORK", dest="clients", action="append",
        help="accept clients from NETWORK only; repeatable")
    add("--open", action="store_true", help="serve everybody, even on an address that other "
        "machines can reach (default: refuse to start)")
    add("--proxy-from", metavar="NETWORK", action="append",
        help="expect a PROXY header from balancers in NETWORK; repeatable")
    add("--max-sessions", metavar="N", type=number, help="reject connections above N, in each "
        "worker (default: the descriptor limit; further connections queue)")
    add("--max-per-client", metavar="N", type=number, help="reject connections above N from one "
        "address, in each worker (default: no limit)")
    add("--max-per-user", metavar="N", type=number, help="refuse requests of a user above N "
        "sessions, in each worker (default: no limit)")
    add = parser.add_argument_group("where they may go").add_argument
    add("--allow", metavar="RULE", dest="rules", action="append", type="allow {}".format,
        help="allow RULE, [USER@]HOST[:PORT[-PORT]]; the first --allow or --deny that matches "
        "decides, and with any --allow, the rest is denied")
    add("--deny", metavar="RULE", dest="rules", action="append", type="deny {}".format,
        help="deny RULE; after all rules, link-local addresses are denied, and to clients on other "
        "hosts, the loopback addresses of this host")
    add("--commands", metavar="LIST", type=lambda text: text.split(","),
        help="SOCKS commands to serve (default: %s)" % ",".join(COMMANDS))
    add("--source", metavar="ADDRESS",
        help="address to dial targets from (default: the system chooses)")


def add_serving_options(parser: argparse.ArgumentParser) -> None:
    add: Any = parser.add_argument_group("serving").add_argument
    add("port", nargs="?", help=f"port to listen on; 0 picks a free one (default: {PORT})")
    add("-b", "--bind", metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 is all IPv4, :: is everything, and PATH with a slash "
        f"is a Unix socket (default: {HOST})")
    add("--mode", metavar="MODE", default=0o600,
        type=typed(lambda text: int(text, 8), "permissions such as 0660"),
        help="permissions of a Unix socket (default: 0600)")
    add("--workers", metavar="N", type=typed(worker_count, "1 or more, or auto"), default=1,
        help="processes that serve; auto is one per CPU (default: %(default)s)")
    add("--drain", metavar="S", type=typed(float, "a number of seconds"), default=5.0,
        help="seconds for sessions to finish after SIGTERM or Ctrl-C (default: %(default)g)")


def make_parser() -> Parser:
    """Return the parser of the command line. Defaults of settings are those of `Settings`."""
    parser = Parser(
        prog="socks5.py", description="A SOCKS5 proxy server (RFC 1928, RFC 1929).",
        epilog="@FILE stands for the options in FILE, one per line; # starts a comment.",
        allow_abbrev=False, fromfile_prefix_chars="@")
    parser.set_defaults(**dict(DEFAULTS, rules=[], clients=[], proxy_from=[]))
    parser.add_argument("--version", action="version", version="socks5.py " + __version__)
    add_serving_options(parser)
    add_access_options(parser)
    add: Any = parser.add_argument_group("timeouts in seconds").add_argument
    for option, meaning in (
            ("--handshake-timeout", "from accepting a client to its complete request"),
            ("--connect-timeout", "to resolve and reach a destination"),
            ("--idle-timeout", "without data in either direction"),
            ("--linger", "without data, once one side has closed"),
            ("--bind-timeout", "for BIND to wait for a connection"),
            ("--udp-timeout", "without datagrams in either direction")):
        default = DEFAULTS[option[2:].replace("-", "_")]
        add(option, metavar="S", type=typed(float, "a number of seconds"),
            help=f"{meaning} (default: {'never' if default is None else format(default, 'g')})")
    add = parser.add_argument_group("datagrams").add_argument
    add("--udp-ports", metavar="FIRST-LAST", type=typed(parse_ports, "PORT or FIRST-LAST"),
        help="ports that clients send datagrams to (default: any free port)")
    add("--udp-advertise", metavar="ADDRESS",
        help="address that clients send datagrams to (default: where they connected)")
    add = parser.add_argument_group("logging").add_mutually_exclusive_group().add_argument
    add("-q", "--quiet", dest="level", action="store_const", const=NOTICE, default=logging.INFO,
        help="do not log sessions")
    add("-v", "--verbose", dest="level", action="store_const", const=logging.DEBUG,
        help="log each step of each session, and tracebacks")
    return parser


def check_rule(rule: Rule, users: Optional[Mapping[str, str]], is_path: bool) -> None:
    """Warn of a likely mistake. Raises ValueError if this system cannot tell the user of `rule`."""
    host = rule.text.partition(":")[2].rpartition("@")[2]
    address, _, port = host.rpartition(":")
    if port.isdecimal() and ":" in address and parse_ip(address) is not None:
        log.warning("%s is for the address %s and all ports; for one port, write [%s]:%s",
                    rule.text, host, address, port)
    if not rule.user or rule.user in (users or {}):
        return
    if users is not None or not is_path:
        log.warning("%s: no such user%s", rule.text, " without --users" if users is None else "")
    elif not IS_LINUX:
        raise ValueError(f"{rule.text}: this system does not tell who uses a Unix socket")
    else:
        try:
            number = int(rule.user) if rule.user.isdecimal() else pwd.getpwnam(rule.user).pw_uid
            if account_name(number) != rule.user:
                log.warning("%s: this account is known as %s", rule.text, account_name(number))
        except KeyError:
            log.warning("%s: no such account", rule.text)


def read_settings(args: argparse.Namespace, address: Any, mode: int) -> Settings:
    """Return the settings for a server at `address`, a path with the permissions `mode` or a host.

    Raises OSError, or ValueError if the settings are invalid or leave the server open by mistake.
    """
    users = None if args.users is None else load_users(args.users)
    if users is not None and os.name == "posix" and os.stat(args.users).st_mode & stat.S_IROTH:
        log.warning("%s is world-readable: chmod o-r %s", args.users, args.users)
    is_path = isinstance(address, str)
    is_open = mode & 0o006 if is_path else not args.clients and (
        args.proxy_from or not is_loopback(address[0]))
    if users is None and not args.open and is_open:
        where = ascii(address)[1:-1] if is_path else address[0]
        what = "--users or --open" if is_path else "--users, --client or --open"
        if not is_path and not parse_ip(where):
            what += " (for a Unix socket, write a path with a slash)"
        raise ValueError(f"refusing to listen on {where} without access control: add {what}")
    try:
        settings = Settings(**dict({name: getattr(args, name) for name in DEFAULTS}, users=users))
        if settings.source:
            open_outside(settings.source).close()
    except OSError as error:
        raise ValueError(f"--source {args.source}: {error.strerror}") from None
    except ValueError as error:
        setting = re.sub("^[a-z_]+:", lambda name: name.group().replace("_", "-"), str(error))
        raise ValueError("--" + setting) from None
    for rule in settings.rules:
        check_rule(rule, users, is_path)
    return settings


def prepare_process(level: int) -> None:
    """Set up the log, and what a process with thousands of threads needs."""
    logging.addLevelName(NOTICE, "NOTICE")
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(level=level, handlers=[LogHandler()], datefmt="%Y-%m-%dT%H:%M:%S",
                        format="%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s")
    threading.stack_size(256 * 1024)  # bytes
    sys.setswitchinterval(1)  # second: each thread that waits for the interpreter wakes that often
    if sys.platform != "win32":
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(OSError, ValueError):  # macOS promises more than it grants
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def choose_address(args: argparse.Namespace, listener: Optional[socket.socket]) -> Any:
    """Return the address to listen on: a path, or a host and a port. Raises ValueError."""
    if listener:
        if args.bind is not None or args.port is not None:
            raise ValueError("systemd passed a socket: do not give an address or a port")
        return listener.getsockname()
    host = HOST if args.bind is None else args.bind
    if "/" in host or os.sep in host:
        if args.port is not None:
            raise ValueError(f"{host} is a path: do not give a port")
        if UNIX_FAMILY is None or sys.platform == "win32":
            raise ValueError(f"{host}: Unix sockets are not available on this system")
        return host
    host, ports = split_ports(host)
    if ports != "*":
        raise ValueError(f"the port is an argument of its own: socks5.py -b {host} {ports}")
    port = str(PORT) if args.port is None else args.port
    if not port.isdecimal() or int(port) > 65535:  # argparse would check it before unknown options
        raise ValueError(f"{port!r} is not a port from 0 to 65535 (an address: -b ADDRESS)")
    return host, int(port)


def open_server(address: Any, mode: int, listener: Optional[socket.socket]) -> Socks5Server:
    """Return a server that listens; wait a little for its address. Raises SystemExit."""
    until = time.monotonic() + LISTEN_PATIENCE
    while True:
        try:
            return Socks5Server(address, mode=mode, listener=listener)
        except (OSError, TypeError, ValueError, OverflowError) as error:  # bad addresses, too
            is_taken = getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EWOULDBLOCK)
            if not is_taken or time.monotonic() > until:
                where = address if isinstance(address, str) else "%s port %d" % address[:2]
                hint = " (a Unix socket needs a slash: ./NAME)" * isinstance(error, socket.gaierror)
                sys.exit(f"socks5.py: cannot listen on {ascii(where)[1:-1]}: "
                         f"{describe(error)}{hint}")
        time.sleep(TICK)


def serve(server: Socks5Server, args: argparse.Namespace, read: Callable[[], Settings]) -> None:
    """Serve until signals stop it, and end the process. Raises SystemExit if that fails."""
    service = Service(server, catch_signals(), args.drain, read)
    if args.workers > 1 and hasattr(os, "fork"):
        service = Workers(args.workers, server, service.signals, args.drain, read)
    elif args.workers > 1:
        log.warning("this system has no fork(): serving with one worker")
    address: Any = server.server_address
    if isinstance(address, str):
        path = os.path.abspath(address)
        announce(f"Serving SOCKS5 on {address} (curl -x socks5h://localhost{path}, "
                 f"ssh -L 1080:{path} HOST) ...")
    else:
        host, port = address[:2]
        announce(f"Serving SOCKS5 on {host} port {port} (socks5h://{Address(host, port)}) ...")
    notify("READY=1")
    try:
        service.run()
    except NoThreadError as error:
        sys.exit(f"socks5.py: cannot start: {describe(error)}")
    os._exit(0)  # the interpreter's own end would wait for threads


def main(argv: Optional[List[str]] = None) -> None:
    """Run the command, and end the process. Replaces its signal handlers, limits and log."""
    for number in OTHER_SIGNALS:  # until the service obeys them
        signal.signal(number, signal.SIG_IGN)
    parser, arguments = make_parser(), sys.argv[1:] if argv is None else argv
    try:
        args = parser.parse_args(arguments)
        if not args.drain >= 0:
            raise ValueError(f"--drain: 0 or more, not {args.drain:g}")
        prepare_process(args.level)
        listener = inherited_socket()
        address, mode = choose_address(args, listener), args.mode
        if listener and isinstance(address, str):
            mode = stat.S_IMODE(os.stat(address).st_mode)
        settings = read_settings(args, address, mode)
    except (OSError, ValueError, RecursionError) as error:
        print(f"socks5.py: error: {describe(error)}\nsee socks5.py --help", file=sys.stderr)
        sys.exit(2)
    server = open_server(address, mode, listener)
    server.settings = settings
    serve(server, args, lambda: read_settings(parser.parse_args(arguments), address, mode))


if __name__ == "__main__":
    main()
