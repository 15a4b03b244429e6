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
one reply (for BIND, one more when the peer has connected). After "succeeded", it gets the
target's bytes and then the target's end: a close is passed on as a close, and a reset as a
reset. Sections are those of RFC 1928 unless another RFC is named.

The rooms of this file. Each one uses only those above it, but for the handler, which also calls
the server:

    vocabulary    the numbers of the RFCs, and the values of end= in the log
    failures      exceptions, and the reply for each
    frames        the bytes of the protocol, both ways
    rules         who may go where; users; Settings
    threads       threads that are used again
    dialing       a name to addresses, and addresses to one connected socket
    relaying      bytes between two sockets, in two threads
    associations  datagrams, for UDP ASSOCIATE
    handler       one conversation, from the first byte to the line in the log
    server        accepting, limits, deadlines, closing
    service       signals and worker processes
    command line  options and main()

Start reading at `Socks5RequestHandler.handle`: it is the table of contents of a session. The
phases of a session:

    CONNECT        handshake, connect, idle; linger, once one side has closed
    BIND           handshake, bind, idle; linger, once one side has closed
    UDP ASSOCIATE  handshake, udp
    refused        handshake, refusal
    hung up on     closing, after any other phase

In connect and bind, the session's thread keeps the time limit itself. In the other phases, the
server checks it twice a second, and hangs up.

Each session owns its sockets. Only its own thread closes them: in `Socks5RequestHandler.finish`,
or sooner in `close_socket`. Another thread that ends the session calls shutdown() on them, which
wakes the session's threads.

Hooks of `Socks5RequestHandler` to override:

    select_method(offered)             choose one of the authentication methods offered
    authenticate(username, password)   check a login
    authorize(destination)             allow or refuse a destination
    connect(destination)               return a connected socket; chain proxies here
    do_CONNECT(destination)            carry out a command; also do_BIND, do_UDP_ASSOCIATE
    log_message(level, event, fields)  write the log

To choose who may connect, override the server's ``verify_request``, as in any ``socketserver``.

Not supported: GSSAPI, SOCKS4, encryption. SOCKS5 is clear text, passwords included: where others
can listen, carry it inside ssh or a VPN.
"""

import argparse
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
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Set, Tuple

if sys.platform != "win32":
    import fcntl
    import pwd
    import resource

__all__ = ["Address", "AddressType", "Command", "Method", "ProtocolError", "Reply", "Request",
           "RequestError", "Settings", "Socks5RequestHandler", "Socks5Server", "load_users", "main"]
__version__ = "0.2"

log = logging.getLogger("socks5")
TaskQueue: Any = getattr(queue, "SimpleQueue", queue.Queue)  # 3.6 has only the latter
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)  # needs no descriptor
NEVER = float("inf")  # as a number of seconds, or as a moment


def log_failure(what: str, error: BaseException) -> None:
    """Log an unexpected exception: its type only, because its text may hold anything."""
    log.error("%s error=%s", what, type(error).__name__,
              exc_info=log.isEnabledFor(logging.DEBUG))


# ---- vocabulary --------------------------------------------------------------------------

VERSION = 5        # of SOCKS
LOGIN_VERSION = 1  # of the username/password exchange (RFC 1929)


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


COMMAND_NAMES = {int(command): command.name for command in Command}
COMMANDS = {"connect": Command.CONNECT, "udp": Command.UDP_ASSOCIATE, "bind": Command.BIND}


class AddressType(enum.IntEnum):
    """Forms of an address in a frame (section 5)."""
    IPV4 = 0x01
    DOMAIN_NAME = 0x03
    IPV6 = 0x04


class Reply(enum.IntEnum):
    """Replies to a request (section 6), each with the RFC's `phrase` for it."""
    phrase: str

    def __new__(cls, value: int, phrase: str) -> "Reply":
        reply = int.__new__(cls, value)
        reply._value_, reply.phrase = value, phrase
        return reply

    SUCCEEDED = 0x00, "succeeded"
    GENERAL_FAILURE = 0x01, "general SOCKS server failure"
    NOT_ALLOWED = 0x02, "connection not allowed by ruleset"
    NETWORK_UNREACHABLE = 0x03, "Network unreachable"
    HOST_UNREACHABLE = 0x04, "Host unreachable"
    CONNECTION_REFUSED = 0x05, "Connection refused"
    TTL_EXPIRED = 0x06, "TTL expired"
    COMMAND_NOT_SUPPORTED = 0x07, "Command not supported"
    ADDRESS_TYPE_NOT_SUPPORTED = 0x08, "Address type not supported"


ENDS = {  # each value that end= can have in the log
    "client-closed": "both sides closed, the client first; for UDP, the client closed",
    "target-closed": "both sides closed, the target first",
    "client-reset": "the client reset its connection, and the target's was reset",
    "target-reset": "the target reset its connection, and the client's was reset",
    "client-lost": "the client has vanished: it no longer answers the kernel",
    "target-lost": "the target has vanished: it no longer answers the kernel",
    "client-left": "the client closed before its request was complete, or while BIND waited",
    "not-socks5": "the client speaks another protocol",
    "not-proxy": "a balancer in --proxy-from sent no valid PROXY header",
    "rejected": "the balancer's client is not in --client, or a limit is reached",
    "no-acceptable-method": "the client offers no authentication method that is allowed here",
    "login-failed": "wrong username or password",
    "refused": "the request was refused: see reply",
    "no-thread": "the system could not start a thread for the relay",
    "handshake-timeout": "--handshake-timeout passed before the request was complete",
    "idle-timeout": "--idle-timeout passed without data in either direction",
    "linger-timeout": "one side closed, and then --linger passed without data",
    "udp-timeout": "--udp-timeout passed without datagrams",
    "server-closed": "the server was stopped",
    "error": "a bug: another line names it, and -v shows where",
}


# ---- failures: they travel up to the handler, which turns them into bytes ----------------

class ProtocolError(Exception):
    """The session ends before a request: log `reason` as end=, send `answer`, if any, hang up."""

    def __init__(self, reason: str, answer: bytes = b"") -> None:
        super().__init__(reason)
        self.answer = answer


class RequestError(Exception):
    """The request fails with `reply`."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.phrase)
        self.reply = reply


REPLIES: Dict[Optional[int], Reply] = {
    errno.EACCES: Reply.NOT_ALLOWED,  # by a packet filter of this host
    errno.EPERM: Reply.NOT_ALLOWED,
    errno.ENETUNREACH: Reply.NETWORK_UNREACHABLE,
    errno.EHOSTUNREACH: Reply.HOST_UNREACHABLE,
    errno.ECONNREFUSED: Reply.CONNECTION_REFUSED,
    errno.ETIMEDOUT: Reply.TTL_EXPIRED,  # the closest code; also used by Tor and Dante
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
    """Return `count` bytes. Raises ProtocolError if the stream ends or breaks before."""
    try:
        data: bytes = stream.read(count)
    except OSError:
        data = b""
    if len(data) < count:
        raise ProtocolError("client-left")
    return data


def read_counted(stream: Any) -> bytes:
    """Return the bytes that follow a byte with their number."""
    return read_exactly(stream, read_exactly(stream, 1)[0])


def read_version(stream: Any, version: int) -> None:
    """Read VER alone: a client of another protocol may never send a second byte."""
    if read_exactly(stream, 1)[0] != version:
        raise ProtocolError("not-socks5")


# +----+----------+----------+     +----+--------+
# |VER | NMETHODS | METHODS  |     |VER | METHOD |     section 3
# +----+----------+----------+     +----+--------+
# | 1  |    1     | 1 to 255 |     | 1  |   1    |
# +----+----------+----------+     +----+--------+
def read_methods(stream: Any) -> bytes:
    """Return the methods that the client offers, one byte each."""
    read_version(stream, VERSION)
    return read_counted(stream)


# +----+------+----------+------+----------+     +----+--------+
# |VER | ULEN |  UNAME   | PLEN |  PASSWD  |     |VER | STATUS |     RFC 1929 section 2
# +----+------+----------+------+----------+     +----+--------+
# | 1  |  1   | 1 to 255 |  1   | 1 to 255 |     | 1  |   1    |
# +----+------+----------+------+----------+     +----+--------+
def read_credentials(stream: Any) -> Tuple[bytes, bytes]:
    """Return the username and the password."""
    read_version(stream, LOGIN_VERSION)
    return read_counted(stream), read_counted(stream)


FAMILIES = {  # by ATYP: the address family, and the number of bytes of an ADDR
    int(AddressType.IPV4): (socket.AF_INET, 4), int(AddressType.IPV6): (socket.AF_INET6, 16)}
UNIX = "unix:"  # begins the host of a client that has connected to a path; its user follows


class Address(NamedTuple):
    """`host`, an IP literal or a name with surrogates for bytes that are not UTF-8, and `port`."""
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
        """Return the address in a sockaddr; mapped IPv4 becomes IPv4, a path 0.0.0.0 port 0."""
        if not isinstance(sockaddr, tuple):
            return UNSPECIFIED
        host, port = sockaddr[:2]
        if ":" in host:
            host = host.partition("%")[0]
            if host.startswith("::ffff:") and "." in host:
                host = host[len("::ffff:"):]
        return cls(host, port)

    def __str__(self) -> str:
        if self.host.startswith(UNIX):
            return self.host
        return ("[%s]:%d" if ":" in self.host else "%s:%d") % self[:2]


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
        """Read a whole frame, before any of it but the version is judged."""
        read_version(stream, VERSION)
        command, _reserved = read_exactly(stream, 2)
        return cls(command, Address.read(stream))

    @property
    def command_name(self) -> str:
        """The name of the command, or its number if it has none."""
        return COMMAND_NAMES.get(self.command) or str(self.command)


# +----+-----+-------+------+----------+----------+
# |VER | REP |  RSV  | ATYP | BND.ADDR | BND.PORT |     section 6
# +----+-----+-------+------+----------+----------+
# | 1  |  1  | X'00' |  1   | Variable |    2     |
# +----+-----+-------+------+----------+----------+
def pack_reply(reply: Reply, bound: Address) -> bytes:
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
        """Return the bytes of the frame."""
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
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LONGEST_LINE = 107     # bytes of a header of version 1
LONGEST_HEADER = 4096  # bytes behind LEN


def read_proxy_line(stream: Any, line: bytes) -> Optional[Address]:
    """Return the address in a header of version 1. Raises ValueError or OSError."""
    while line[:1] == b"P" and not line.endswith(b"\n") and len(line) < LONGEST_LINE:
        line += read_exactly(stream, 1)
    match = PROXY_LINE.fullmatch(line.decode("ascii"))
    if not match or int(match.group(3) or 0) > 65535:
        raise ValueError
    version, host, port = match.groups()
    if not version:
        return None
    family = socket.AF_INET if version == "4" else socket.AF_INET6
    return Address(socket.inet_ntop(family, socket.inet_pton(family, host)), int(port))


def read_proxy_block(stream: Any) -> Optional[Address]:
    """Return the address in a header of version 2. Raises ValueError."""
    signature, command, kind, length = struct.unpack("!11sBBH", read_exactly(stream, 15))
    if signature != SIGNATURE[1:] or command not in (0x20, 0x21) or length > LONGEST_HEADER:
        raise ValueError
    body = read_exactly(stream, length)
    if command == 0x20 or kind not in PROXY_BLOCKS:  # LOCAL, or neither TCP4 nor TCP6
        return None
    family, layout = PROXY_BLOCKS[kind]
    if length < struct.calcsize(layout):
        raise ValueError
    packed, port = struct.unpack_from(layout, body)
    return Address(socket.inet_ntop(family, packed), port)


def read_proxy_header(stream: Any) -> Optional[Address]:
    """Return the address of a balancer's client, None if it has none (a health check).

    Raises ProtocolError if the header is not valid.
    """
    first = read_exactly(stream, 1)
    try:
        if first == SIGNATURE[:1]:
            return read_proxy_block(stream)
        return read_proxy_line(stream, first)
    except (OSError, ValueError):  # an address or a number that is broken
        raise ProtocolError("not-proxy") from None


# ---- rules: who may connect, where they may go, and for how long -------------------------
#
# The first rule that matches a destination decides. Rules apply to each resolved address,
# together with the requested name. An IPv4-mapped IPv6 address counts as the IPv4 address.

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
    """Return the name `host` for the resolver, in lower case. Raises RequestError.

    CPython up to 3.11 cuts a string at its NUL: the resolver would take ``localhost\\0.example``
    for localhost, and a rule would not.
    """
    try:
        name = host.encode("idna").lower()
    except UnicodeError:  # an empty or long label, or bytes that are not text
        name = b""
    if not name or not all(0x21 <= byte <= 0x7E for byte in name):
        raise RequestError(Reply.HOST_UNREACHABLE)
    return name


def parse_network(text: str) -> Any:
    """Return an IP address or a CIDR network as a network of `ipaddress`. Raises ValueError."""
    if not isinstance(text, str):
        raise TypeError("%r: not a string" % (text,))
    network: Any = ipaddress.ip_network(text, strict=False)
    if ipaddress.ip_address(text.partition("/")[0]) != network.network_address:
        raise ValueError("%s: did you mean %s?" % (text, network))
    if network.version == 6 and network.network_address.ipv4_mapped:
        raise ValueError("%s: write IPv4 addresses as IPv4" % text)
    return network


def is_loopback(host: str) -> bool:
    """Return True if only this host can reach `host`: an IP literal, a name, or UNIX."""
    ip = parse_ip(host)
    if ip is None:
        return host == "localhost" or host.startswith(UNIX)
    return bool(ip.is_loopback)


def covers(networks: List[Any], host: str) -> bool:
    """Return True if `host` is an IP literal in one of `networks`."""
    ip = parse_ip(host) if networks else None
    return ip is not None and any(ip in network for network in networks)


def parse_rule_host(host: str) -> Tuple[Any, bytes]:
    """Return the network or the name that a rule is for: see `Rule`. Raises ValueError."""
    if host == "*":
        return None, b""
    last = host.rstrip(".").rpartition(".")[2]
    if set(host) & set(":/") or last.isdigit() or last[:2] in ("0x", "0X"):
        return parse_network(host), b""
    is_suffix = host.startswith("*.")
    try:
        name = encode_name(host[2:] if is_suffix else host).rstrip(b".")
    except RequestError:
        name = b""
    if not name or b"*" in name:
        raise ValueError("%s: not an address, a network, a name or *.name" % host)
    return None, b"." + name if is_suffix else name


RULE = re.compile(
    r"(?P<verb>allow|deny) (?:(?P<user>.+)@)?"
    r"(?:\[(?P<bracketed>[^][@]+)\]|(?P<host>[^][@:]+|[^][@:]*:[^][@]*:[^][@]*))"
    r"(?::(?:\*|(?P<first>\d{1,5})(?:-(?P<last>\d{1,5}))?))?")


class Rule(NamedTuple):
    """Allow or deny `user` ("" is everybody) to go to `ports` of `network` or, if None, of `name`.

    A `name` of b"" is any host, and one that begins with a dot stands for its subdomains, too.
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
        match = RULE.fullmatch(text)
        if not match:
            raise ValueError("%r: a rule is [USER@]HOST[:PORT[-PORT]]" % text)
        first = int(match.group("first") or 0)
        last = int(match.group("last") or match.group("first") or 65535)
        if not first <= last <= 65535:
            raise ValueError("%r: ports are 0 to 65535" % text)
        try:
            network, name = parse_rule_host(match.group("bracketed") or match.group("host"))
        except ValueError as error:
            raise ValueError("%r: %s" % (text, error)) from None
        return cls(text.replace(" ", ":", 1), match.group("verb") == "allow",
                   match.group("user") or "", network, name, range(first, last + 1))

    def matches(self, user: str, name: bytes, ip: Any, port: int) -> bool:
        """Return True if the rule is for `user`, who asked for `name` (b"" for an IP literal).

        If `ip` is None (not resolved yet), a rule for a network matches if it might allow: then
        a look-up is needed.
        """
        if self.user not in ("", user) or port not in self.ports:
            return False
        if self.network is not None:
            return self.allows if ip is None else ip in self.network
        return self.name in (b"", name) or (
            self.name.startswith(b".") and (b"." + name).endswith(self.name))


def built_in(*networks: str) -> List[Rule]:
    """Return rules that deny `networks`, marked as built-in for the log."""
    return [Rule.parse("deny " + network)._replace(text="built-in:" + network)
            for network in networks]


LINK_LOCAL = built_in("169.254.0.0/16", "fe80::/10")  # a cloud's metadata service is there
OWN_HOST = built_in("127.0.0.0/8", "::1", "0.0.0.0", "::")  # the last two are loopback, too
ALLOW_OTHERS = Rule.parse("allow *")._replace(text="default")
DENY_OTHERS = Rule.parse("deny *")._replace(text="default")


def check_credential(what: str, text: str) -> bytes:
    """Return `text` as bytes. Raises ValueError if RFC 1929 cannot carry it; does not quote it."""
    if not isinstance(text, str):
        raise TypeError(what + ": not a string")
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
                raise ValueError("%s, line %d: %s" % (path, number, what)) from None
            users[name] = password
    if not users:
        raise ValueError("%s: there are no users in it" % path)
    return users


def check_number(name: str, value: Any, kinds: Any = (int, float)) -> Any:
    """Return `value`. Raises TypeError, or ValueError if it is not positive."""
    if not isinstance(value, kinds):
        raise TypeError("%s: not a%s number: %r" % (name, " whole" * (kinds is int), value))
    if not value > 0:
        raise ValueError("%s: not positive: %r" % (name, value))
    return value


def check_limit(name: str, value: Any, kinds: Any = int) -> Any:
    """Return `value`, infinity for None. Raises TypeError or ValueError."""
    return NEVER if value is None else check_number(name, value, kinds)


def check_port(name: str, value: int) -> int:
    """Return `value`. Raises TypeError, or ValueError if it is not 0 to 65535."""
    if value != 0 and check_number(name, value, int) > 65535:
        raise ValueError("%s: not a port: %r" % (name, value))
    return value


def check_ip(name: str, value: Optional[str]) -> Optional[str]:
    """Return `value`. Raises ValueError if it is neither None nor an IP address."""
    if value is not None and parse_ip(value) is None:
        raise ValueError("%s: not an IP address: %s" % (name, value))
    return value


def command_number(name: str) -> int:
    """Return the number of a command in COMMANDS. Raises ValueError."""
    if name not in COMMANDS:
        raise ValueError("commands: %r is not one of %s" % (name, ", ".join(COMMANDS)))
    return int(COMMANDS[name])


class Settings:
    """Settings for new sessions. Raises ValueError or TypeError if one is invalid.

    `users`: passwords by name; None for no login. `rules`: where clients may go, each
    ``allow [USER@]HOST[:PORT[-PORT]]`` or ``deny ...``. `clients`: networks whose clients are
    accepted; none for all. `proxy_from`: networks of balancers, whose connections begin with a
    PROXY header. `commands`: the commands to serve. `max_sessions`, `max_per_client`,
    `max_per_user`: how many at a time, of all clients and of each one; None for no limit.

    Seconds: `connect_timeout` to resolve and reach a target, `handshake_timeout` from accepting
    a client to its complete request, `idle_timeout` without data in either direction (None for
    no limit), `linger` without data once one side has closed, `bind_timeout` for BIND to wait
    for a connection, `udp_timeout` without datagrams.

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
        self.connect_timeout = check_number("connect_timeout", connect_timeout)
        self.handshake_timeout = check_number("handshake_timeout", handshake_timeout)
        self.idle_timeout = check_limit("idle_timeout", idle_timeout, (int, float))
        self.linger = check_number("linger", linger)
        self.bind_timeout = check_number("bind_timeout", bind_timeout)
        self.udp_timeout = check_number("udp_timeout", udp_timeout)
        self.max_sessions = check_limit("max_sessions", max_sessions)
        self.max_per_client = check_limit("max_per_client", max_per_client)
        self.max_per_user = check_limit("max_per_user", max_per_user)
        self.users = self.check_users(users)
        self.rules = [Rule.parse(rule) for rule in rules]
        self.clients = [parse_network(client) for client in clients]
        self.proxy_from = [parse_network(balancer) for balancer in proxy_from]
        self.commands = {command_number(command) for command in commands}
        self.udp_ports = [check_port("udp_ports", port) for port in udp_ports]
        self.udp_advertise = check_ip("udp_advertise", udp_advertise)
        self.source = check_ip("source", source)
        others = DENY_OTHERS if any(rule.allows for rule in self.rules) else ALLOW_OTHERS
        self.rules_for_local = self.rules + LINK_LOCAL + [others]
        self.rules_for_remote = self.rules + LINK_LOCAL + OWN_HOST + [others]

    @staticmethod
    def check_users(users: Optional[Mapping[str, str]]) -> Optional[Dict[bytes, bytes]]:
        """Return the users as bytes."""
        if users is None:
            return None
        if not users:
            raise ValueError("users: there are none; None is for no login")
        return {check_credential("users: username", name):
                check_credential("users: password of %s" % ascii(name), password)
                for name, password in users.items()}

    def is_balancer(self, client_address: Any) -> bool:
        """Return True if connections from `client_address` begin with a PROXY header."""
        return bool(self.proxy_from) and covers(self.proxy_from, Address.of(client_address).host)

    def rules_for(self, client: str) -> List[Rule]:
        """Return all rules for a client at this address, the built-in ones included."""
        return self.rules_for_local if is_loopback(client) else self.rules_for_remote


# ---- threads: used again for the next job ------------------------------------------------

IDLE_TIME = 10.0    # seconds for which a thread waits for another job
SHORT_WAIT = 0.001  # seconds, because a timeout of 0 would not wait at all


class NoThreadError(OSError):
    """The system gives no thread."""


def start_thread(function: Callable[..., None], *args: Any) -> threading.Thread:
    """Call `function` in a new thread. Raises NoThreadError."""
    try:
        thread = threading.Thread(target=function, args=args, name="socks5", daemon=True)
        thread.start()
    except (RuntimeError, MemoryError):
        raise NoThreadError(errno.EAGAIN, "no thread available") from None
    return thread


class ThreadCache:
    """Threads that wait a while for another job when they have done one.

    Starting a thread costs more than the rest of a short session. The thread that became idle
    last is used first, so surplus threads time out.
    """

    def __init__(self) -> None:
        self.idle: List[Any] = []  # queues, one for each thread that waits for a job
        self.threads: Set[threading.Thread] = set()
        self.closed = False

    def start(self, function: Callable[..., None], *args: Any) -> Any:
        """Call `function` in a thread; return a lock that is released when it has returned.

        Raises NoThreadError.
        """
        done = threading.Lock()
        done.acquire()
        job = function, args, done
        try:
            self.idle.pop().put(job)
        except IndexError:
            jobs = TaskQueue()
            jobs.put(job)  # not an argument of the thread, which keeps those until it ends
            start_thread(self.work, jobs)
        return done

    def work(self, jobs: Any) -> None:
        """Do the jobs in the queue `jobs` until none comes."""
        with contextlib.suppress(MemoryError):  # the job must be done all the same
            self.threads.add(threading.current_thread())
        job = jobs.get()
        while job:
            function, args, done = job
            try:
                function(*args)
            except Exception as error:
                log_failure("thread failed", error)
            finally:
                done.release()
            del function, args, job  # an idle thread must not keep a session in memory
            job = self.next_job(jobs)
        self.threads.discard(threading.current_thread())

    def next_job(self, jobs: Any) -> Any:
        """Return the next job from the queue `jobs`, None to end the thread."""
        self.idle.append(jobs)
        try:
            return jobs.get(timeout=SHORT_WAIT if self.closed else IDLE_TIME)
        except Exception:  # Empty, or no memory to wait
            pass
        try:
            self.idle.remove(jobs)
            return None
        except ValueError:  # `start` or `close` has taken it at the last moment
            return jobs.get()

    def close(self) -> None:
        """End the idle threads, and the others when they have done their job; wait for them."""
        self.closed = True
        with contextlib.suppress(IndexError):
            while True:
                self.idle.pop().put(None)
        for thread in list(self.threads):
            thread.join()


# ---- dialing: a name to addresses, addresses to one connected socket ---------------------
#
# Trying one address after the other waits two minutes for each dead one. So the next attempt
# starts when the last one has failed or has had a quarter of a second, and the first one to
# connect wins (RFC 8305, "Happy Eyeballs"). One deadline covers all of it. If all attempts
# fail, the error of the first address counts: the resolver ranked it first.

ATTEMPT_DELAY = 0.25  # seconds before the next attempt (RFC 8305 section 5)
MAX_LOOK_UPS = 64     # at the same time, abandoned ones included
LONG_WAIT = 3600.0    # seconds; poll() takes no infinity

Candidate = Tuple[int, Tuple[Any, ...]]  # a family, and a sockaddr: what ``connect`` takes for it
SocketHook = Callable[[Any], None]  # called with a socket


def seconds_until(deadline: float) -> float:
    """Return how long to wait for something until `deadline` (monotonic clock)."""
    return min(LONG_WAIT, max(SHORT_WAIT, deadline - time.monotonic()))


class Resolver:
    """The system's resolver. It knows no deadline, so each look-up has a thread of its own.

    A look-up that takes too long is abandoned, but its thread stays until the system gives up.
    """

    def __init__(self, warn: Callable[..., None]) -> None:
        self.slots = threading.BoundedSemaphore(MAX_LOOK_UPS)
        self.warn = warn

    def look_up(self, name: bytes, port: int, deadline: float) -> List[Candidate]:
        """Return the addresses of `name`, best first, by `deadline` (monotonic clock).

        Raises OSError: ``gaierror`` for an unknown name, ``timeout``, NoThreadError. `ask` frees
        the slot, after the deadline, too.
        """
        answers: Any = queue.Queue()
        self.wait_for_slot(deadline)
        try:
            start_thread(self.ask, name, port, answers)
            answer = answers.get(timeout=seconds_until(deadline))
        except NoThreadError:
            self.slots.release()
            raise
        except queue.Empty:
            raise socket.timeout("the resolver is too slow") from None
        if isinstance(answer, Exception):
            raise answer
        return [(info[0], info[4]) for info in answer]

    def wait_for_slot(self, deadline: float) -> None:
        """Wait until fewer than MAX_LOOK_UPS are under way: a burst must not become failures."""
        if not self.slots.acquire(blocking=False):
            self.warn("waiting for a look-up: %d are under way", MAX_LOOK_UPS)
            if not self.slots.acquire(timeout=seconds_until(deadline)):
                raise socket.timeout("too many look-ups")

    def ask(self, name: bytes, port: int, answers: Any) -> None:
        """Put the resolver's answer, or its exception, into the queue `answers`."""
        try:
            answers.put(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answers.put(error)
        finally:
            self.slots.release()


def interleave(candidates: List[Candidate]) -> List[Candidate]:
    """Return the families in turn, that of the first candidate first (RFC 8305 section 4)."""
    first = [candidate for candidate in candidates if candidate[0] == candidates[0][0]]
    other = [candidate for candidate in candidates if candidate[0] != candidates[0][0]]
    turns = itertools.zip_longest(first, other)
    return [candidate for turn in turns for candidate in turn if candidate]


def start_attempt(candidate: Candidate, seconds: float, prepare: SocketHook,
                  discard: SocketHook) -> socket.socket:
    """Return a socket that has had `seconds` to connect; if 0, it is still connecting."""
    sock = socket.socket(candidate[0], socket.SOCK_STREAM)
    try:
        prepare(sock)
        sock.settimeout(seconds)
        sock.connect(candidate[1])
    except BlockingIOError:
        pass
    except BaseException:
        discard(sock)
        raise
    return sock


def winner(attempts: selectors.BaseSelector, errors: Dict[int, OSError], deadline: float,
           discard: SocketHook) -> Optional[socket.socket]:
    """Return the socket that has connected; None at `deadline`, or if one has failed."""
    for key, _ in attempts.select(seconds_until(deadline)):
        sock: Any = attempts.unregister(key.fileobj).fileobj
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code:
            return sock  # type: ignore[no-any-return]
        errors[key.data] = OSError(code, os.strerror(code))
        discard(sock)
    return None


def dial(candidates: List[Candidate], deadline: float, prepare: SocketHook,
         discard: SocketHook) -> socket.socket:
    """Return a socket connected to one of `candidates` by `deadline` (monotonic clock).

    `prepare` is called with each socket before it connects, `discard` with each but the one that
    is returned, to close it. The returned one has some timeout: set your own. Raises OSError.
    """
    if len(candidates) == 1:  # a selector would cost a tenth of a short session
        return start_attempt(candidates[0], seconds_until(deadline), prepare, discard)
    waiting = collections.deque(enumerate(interleave(candidates)))
    errors: Dict[int, OSError] = {}
    with Selector() as attempts:
        try:
            while (waiting or attempts.get_map()) and time.monotonic() < deadline:
                if waiting:
                    number, candidate = waiting.popleft()
                    try:
                        attempts.register(start_attempt(candidate, 0, prepare, discard),
                                          selectors.EVENT_WRITE, number)
                    except OSError as error:
                        errors[number] = error
                        continue
                next_at = time.monotonic() + ATTEMPT_DELAY if waiting else deadline
                connected = winner(attempts, errors, min(next_at, deadline), discard)
                if connected:
                    return connected
        finally:
            for key in list(attempts.get_map().values()):
                discard(key.fileobj)
    raise errors.get(0) or socket.timeout("no address has answered")


# ---- relaying: two flows, each in a thread, joined when both have ended ------------------
#
# A relay that ends at the first close loses what is on its way in the other direction. So a
# close is passed on as a half-close, and the other flow goes on, until the other side closes too
# or there has been no data for `linger` seconds. A relay is reset by default: whatever breaks
# it, the server's own death included, both sides see a reset, so that a truncated transfer is
# not mistaken for a complete one. Only a flow that has passed on the end of its source earns its
# sink a clean end. Nothing is queued: a flow reads again when its sink has taken everything, so
# a slow reader slows the writer down.

SMALL_BUFFER = 2 * 1024     # bytes, for an idle flow
LARGE_BUFFER = 1024 * 1024  # bytes, for the busiest; in between, each is 8 times the last
BUSY = 32 * 1024            # bytes at a time that keep a flow in the kernel
SPLICE_PIECE = 128 * 1024   # bytes; the kernel sends a piece in two steps, each with SEND_TIMEOUT
SEND_TIMEOUT = 0.25         # seconds for which send() waits before `stopped` is checked
SPLICE_REFUSED = {errno.EINVAL, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
CLEAN = ("client-closed", "target-closed")  # ends of a relay that has lost nothing


def existing(*options: Tuple[int, str, Any]) -> List[Tuple[int, int, Any]]:
    """Return the socket options that this system has: a level, a name and a value each."""
    return [(level, getattr(socket, name), value)
            for level, name, value in options if hasattr(socket, name)]


def seconds_option(name: str, seconds: float) -> List[Tuple[int, int, Any]]:
    """Return a timeout as a socket option; 0 is for none."""
    if sys.platform == "win32":  # a socket is of no use there after a send that timed out
        return []
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    return existing((socket.SOL_SOCKET, name, value))


TCP_OPTIONS = existing(  # small pieces are sent at once, urgent bytes stay in line, and an idle
    # peer that has vanished is noticed after 60 + 4 * 15 seconds
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1), (socket.SOL_SOCKET, "SO_OOBINLINE", 1),
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 60), (socket.IPPROTO_TCP, "TCP_KEEPALIVE", 60),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 15), (socket.IPPROTO_TCP, "TCP_KEEPCNT", 4))
LINGER_FORMAT = "hh" if sys.platform == "win32" else "ii"
RESET_AT_CLOSE = existing((socket.SOL_SOCKET, "SO_LINGER", struct.pack(LINGER_FORMAT, 1, 0)))
CLEAN_CLOSE = existing((socket.SOL_SOCKET, "SO_LINGER", struct.pack(LINGER_FORMAT, 0, 0)))
SEND_TIMES_OUT = seconds_option("SO_SNDTIMEO", SEND_TIMEOUT)
RELAYED = RESET_AT_CLOSE + SEND_TIMES_OUT


def set_options(sock: socket.socket, options: List[Tuple[int, int, Any]]) -> bool:
    """Set `options`; return False if the system refuses one."""
    try:
        for option in options:
            sock.setsockopt(*option)
        return True
    except OSError:
        return False


def wake(sock: socket.socket, how: int) -> None:
    """Wake the thread that waits on `sock` with a shutdown()."""
    with contextlib.suppress(OSError):  # it has no peer any more
        sock.shutdown(how)


def run_on(cpus: Optional[Set[int]]) -> Optional[Set[int]]:
    """Let this thread run on `cpus`; return where it ran before, None if the system refuses."""
    if cpus is not None:
        with contextlib.suppress(OSError):  # it is an optimisation
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, cpus)
            return before
    return None


class Flow:
    """One direction of a relay. `cpus` are the CPUs to splice on, None for any."""

    def __init__(self, source: socket.socket, sink: socket.socket,
                 cpus: Optional[Set[int]]) -> None:
        self.source, self.sink, self.cpus = source, sink, cpus
        self.sends_time_out = set_options(sink, RELAYED) and bool(SEND_TIMES_OUT)
        self.may_splice = hasattr(os, "splice")  # Linux, from Python 3.10
        self.current = source  # if a system call fails, it was for this socket
        self.sent = 0  # bytes
        self.stopped = False

    def copy(self) -> None:
        """Copy until the source ends or the flow is stopped. Raises OSError if a side breaks."""
        buffer = bytearray(SMALL_BUFFER)
        while not self.stopped:
            count = self.source.recv_into(buffer)
            if not count:
                return
            self.send(memoryview(buffer)[:count])
            size = len(buffer)
            if count == size:
                size = min(8 * size, LARGE_BUFFER)
            elif count < size // 8:  # the flow has become quiet
                size = SMALL_BUFFER
            if size == LARGE_BUFFER and self.may_splice:
                size = SMALL_BUFFER
                self.splice()
            if size != len(buffer):
                buffer = bytearray(size)

    def send(self, data: memoryview) -> None:
        """Send all of `data`. Raises OSError."""
        self.current = self.sink
        while data:
            data = data[self.send_some(self.sink.send, data):]
        self.current = self.source

    def send_some(self, send: Callable[..., int], *args: Any) -> int:
        """Return how many bytes `send` sent, 0 if it timed out. Raises OSError if stopped."""
        if self.stopped:
            raise ConnectionAbortedError
        try:
            count = send(*args)
        except BlockingIOError:
            return 0
        self.sent += count
        return count

    def splice(self) -> None:
        """Copy inside the kernel, through a pipe, until the flow is quiet or ends.

        If the system refuses (no descriptor, no room for the pipe), `copy` goes on.
        """
        pipe: List[int] = []
        piped = 0
        cpus_before = run_on(self.cpus)
        try:
            pipe += os.pipe()
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, LARGE_BUFFER)
            count = LARGE_BUFFER
            while count >= BUSY and not self.stopped:
                count = piped = os.splice(self.source.fileno(), pipe[1], LARGE_BUFFER)
                self.current = self.sink
                while piped:
                    piped -= self.send_some(
                        os.splice, pipe[0], self.sink.fileno(), min(piped, SPLICE_PIECE))
                self.current = self.source
        except OSError as error:
            if error.errno not in SPLICE_REFUSED:
                raise
            self.may_splice = False
            self.send(memoryview(os.read(pipe[0], piped) if piped else b""))
        finally:
            run_on(cpus_before)
            for descriptor in pipe:
                os.close(descriptor)


class Relay:
    """Two flows between two sockets, each in a thread.

    If one side closes, its close is passed on as a half-close. The other flow goes on, until its
    source closes too, or until `linger` seconds pass without data. The client's first bytes are
    in `early` or in the buffer of `reader`, never in both.
    """

    def __init__(self, client: socket.socket, target: socket.socket, reader: Any,
                 early: bytes = b"", cpus: Optional[Set[int]] = None) -> None:
        self.reader, self.early = reader, early
        self.up = Flow(client, target, cpus)
        self.down = Flow(target, client, cpus)
        self.ends: List[str] = []  # of ENDS; two threads append to it

    @property
    def end(self) -> str:
        """The first end that is not clean, otherwise the first one, "" while both flows run."""
        for end in self.ends:
            if end not in CLEAN:
                return end
        return self.ends[0] if self.ends else ""

    def run(self, threads: ThreadCache, reply: bytes) -> None:
        """Send `reply` to the client, and relay until both flows have ended.

        Raises NoThreadError, in which case nothing was sent.
        """
        self.down.sent = -len(reply)  # the reply is not the target's
        up_ended = threads.start(self.carry, self.up, lambda: self.early or self.reader.peek())
        try:
            self.carry(self.down, lambda: reply)
        finally:
            up_ended.acquire()

    def carry(self, flow: Flow, first: Callable[[], bytes]) -> None:
        """Send what `first` returns, copy, and pass on the end of the source, or break off."""
        try:
            flow.send(memoryview(first()))
            flow.copy()
            if not self.end or self.end in CLEAN:
                self.pass_on_end(flow)
        except Exception as error:
            self.break_off(flow, error)

    def pass_on_end(self, flow: Flow) -> None:
        """Half-close the sink. Raises OSError if the source was reset.

        The kernel reports a reset only once. If it was reported to the other thread, this one has
        read an end of file although the source was reset; then getpeername() fails. It also fails
        after both sides have closed; so the failure counts only while the other flow still runs.
        """
        try:
            flow.source.getpeername()
        except OSError:
            if self.end not in CLEAN:
                raise
        self.ends.append("client-closed" if flow is self.up else "target-closed")
        flow.current = flow.sink
        flow.sink.shutdown(socket.SHUT_WR)
        set_options(flow.sink, CLEAN_CLOSE)  # the kernel still delivers what the sink has not read

    def break_off(self, flow: Flow, error: Exception) -> None:
        """Note why the relay breaks, and end the other flow, which still delivers what it has."""
        if not isinstance(error, OSError):
            self.ends.append("error")
        elif flow.current is self.up.source:
            self.ends.append("client-lost" if isinstance(error, TimeoutError) else "client-reset")
        else:
            self.ends.append("target-lost" if isinstance(error, TimeoutError) else "target-reset")
        for each in (self.up, self.down):
            wake(each.source, socket.SHUT_RD)
        if not isinstance(error, OSError):
            log_failure("relay failed", error)

    def stop(self, end: str) -> None:
        """End the relay with a reset, for the reason `end`; called from another thread."""
        self.ends.append(end)
        for flow in (self.up, self.down):
            flow.stopped = True
            wake(flow.source, socket.SHUT_RD)
            if not flow.sends_time_out:  # the only other way, though it may look like a clean end
                wake(flow.sink, socket.SHUT_WR)

    def phase(self, settings: Settings) -> Tuple[str, float]:
        """Return the phase, and the seconds that it may last without progress."""
        return ("linger", settings.linger) if self.ends else ("idle", settings.idle_timeout)

    @property
    def counts(self) -> Dict[str, int]:
        """Bytes relayed: `up` from the client, `down` from the target."""
        return {"up": self.up.sent, "down": max(0, self.down.sent)}

    def progress(self) -> Tuple[int, ...]:
        """Return numbers that change when bytes move or a flow ends."""
        return len(self.ends), self.up.sent, self.down.sent


# ---- associations: datagrams, as long as the control connection stays --------------------
#
# A stranger's datagrams change nothing: the client is known by its host and port, and answers
# pass only from hosts to which it has sent something. One thread serves all three sockets. Names
# are looked up in other threads, so that they do not keep other datagrams waiting.

LONGEST_DATAGRAM = 65535  # bytes; UDP carries 65507
LOOKUPS = 8               # names of one association that are looked up at the same time
DESTINATIONS = 4096       # that one association remembers; then it forgets all of them


def open_outside(source: Optional[str]) -> socket.socket:
    """Return a datagram socket at the address `source`; if None, for both families, if possible."""
    try:
        if source and ":" not in source:
            raise OSError
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, source is not None)
    except OSError:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((source or "", 0))
    return sock


class Association:
    """Datagrams between a client, at the socket `inside`, and its targets, at `outside`.

    `client` is the client's address; if its port is 0, the first datagram tells. `find_routes`
    returns the addresses to try for a destination, or raises RequestError or OSError. The rest
    is the interface of `Relay`.
    """

    def __init__(self, control: socket.socket, inside: socket.socket, outside: socket.socket,
                 client: Address, find_routes: Callable[[Address], List[Any]]) -> None:
        self.control, self.inside, self.outside = control, inside, outside
        self.client, self.find_routes = client, find_routes
        self.client_sockaddr: Any = None
        self.lock = threading.Lock()  # to write routes, hosts and counts
        self.routes: Dict[Address, Any] = {}
        self.hosts: Set[str] = set()  # to which the client has sent
        self.counts = {"up": 0, "down": 0, "datagrams_up": 0, "datagrams_down": 0, "dropped": 0}
        self.look_ups: List[Any] = []  # locks that are held until each is done
        self.end = ""

    def run(self, threads: ThreadCache, reply: bytes) -> None:
        """Send `reply` to the client, and relay datagrams until the control connection ends."""
        self.threads = threads
        self.control.sendall(reply)
        receivers = {self.control: self.read_control, self.inside: self.relay_up,
                     self.outside: self.relay_down}
        with Selector() as selector:
            for sock, receive in receivers.items():
                sock.setblocking(False)
                selector.register(sock, selectors.EVENT_READ, receive)
            while not self.end:
                for key, _ in selector.select():
                    self.drop_on_error(key.data)

    def drop_on_error(self, action: Callable[..., None], *args: Any) -> None:
        """Call `action`. A datagram that it cannot relay is dropped; a bug ends the session."""
        try:
            action(*args)
        except (OSError, ProtocolError, RequestError):
            self.count(dropped=1)
        except Exception:
            set_options(self.control, RESET_AT_CLOSE)
            self.stop("error")
            raise

    def count(self, **amounts: int) -> None:
        """Add to the counts."""
        with self.lock:
            for name, amount in amounts.items():
                self.counts[name] += amount

    def read_control(self) -> None:
        """Read the control connection; only EOF or an error matters."""
        try:
            end = "" if self.control.recv(SMALL_BUFFER) else "client-closed"
        except BlockingIOError:
            end = ""
        except OSError as error:
            end = "client-lost" if isinstance(error, TimeoutError) else "client-reset"
        self.end = self.end or end

    def relay_up(self) -> None:
        """Relay a datagram from the client. Raises an error for one that cannot be relayed."""
        data, source = self.inside.recvfrom(LONGEST_DATAGRAM)
        host, port = Address.of(source)
        if host != self.client.host or port != (self.client.port or port):
            return  # a stranger: not relayed, not counted, not logged
        datagram = Datagram.read(io.BytesIO(data))
        if datagram.fragment:
            self.count(dropped=1)
            return
        self.client, self.client_sockaddr = Address(host, port), source
        self.look_ups = [look_up for look_up in self.look_ups if look_up.locked()]
        if datagram.address in self.routes or parse_ip(datagram.address.host) is not None:
            self.send(datagram)
        elif len(self.look_ups) < LOOKUPS:
            self.look_ups.append(self.threads.start(self.drop_on_error, self.send, datagram))
        else:
            self.count(dropped=1)

    def send(self, datagram: Datagram) -> None:
        """Send `datagram` to the first address that takes it, and remember that address."""
        known = self.routes.get(datagram.address)
        for route in [known] if known else self.find_routes(datagram.address):
            with contextlib.suppress(OSError):
                self.outside.sendto(datagram.data, self.remember(datagram.address, route))
                self.count(datagrams_up=1, up=len(datagram.data))
                return
            self.routes.pop(datagram.address, None)
        self.count(dropped=1)

    def remember(self, destination: Address, route: Any) -> Any:
        """Let the host of `route` answer from now on, and return `route` as `outside` takes it."""
        if self.outside.family == socket.AF_INET and ":" in route[0]:
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        if self.outside.family == socket.AF_INET6 and ":" not in route[0]:
            route = "::ffff:" + route[0], route[1]
        with self.lock:
            if len(self.routes) >= DESTINATIONS and destination not in self.routes:
                self.routes.clear()
                self.hosts.clear()
            self.routes[destination] = route
            self.hosts.add(Address.of(route).host)
        return route

    def relay_down(self) -> None:
        """Relay a datagram to the client, if it has sent something to that host."""
        data, source = self.outside.recvfrom(LONGEST_DATAGRAM)
        address = Address.of(source)
        if address.host in self.hosts:
            self.inside.sendto(Datagram(0, address, data).pack(), self.client_sockaddr)
            self.count(datagrams_down=1, down=len(data))

    def stop(self, end: str) -> None:
        """End the association, for the reason `end`; called from another thread."""
        self.end = self.end or end
        wake(self.control, socket.SHUT_RD)

    def phase(self, settings: Settings) -> Tuple[str, float]:
        """Return the phase, and the seconds that it may last without progress."""
        return "udp", settings.udp_timeout

    def progress(self) -> Tuple[int, ...]:
        """Return numbers that change when a datagram is relayed."""
        return self.counts["datagrams_up"], self.counts["datagrams_down"]


# ---- handler: one conversation -----------------------------------------------------------

LOGIN_PAUSE = 1.0      # seconds before a failed login is answered; slows down guessing
REFUSAL_TIMEOUT = 2.0  # seconds for a refused client to read the answer and close
BIND_BACKLOG = 8       # connections that wait for BIND to look at them
EARLY_LIMIT = 65536    # bytes to keep that a client sends while BIND waits
UNIX_FAMILY = getattr(socket, "AF_UNIX", None)
IP_BIND_ADDRESS_NO_PORT = 24  # Linux's number; the module `socket` has no name for it


def escape(value: object) -> str:
    """Return `value` as one word of ASCII for the log, "-" if it is empty."""
    return str(value).encode("unicode_escape").decode("ascii").replace(" ", "\\x20") or "-"


class Phase(NamedTuple):
    """What a session does, since when and until when (on the server's clock)."""
    name: str
    since: float
    deadline: float


class Socks5RequestHandler(socketserver.StreamRequestHandler):
    """One client's session. Override its hooks and pass the class to the server.

    Hooks may read `client_address`; `user`, the name of a checked login, or of the account behind
    a Unix socket if there are no users, otherwise ""; `settings`, as they were when the session
    began; and `server`. They may call `permitted` and `own_socket`. Other methods and attributes
    may change.

    In `authorize`, `connect` and `do_*`, a RequestError is answered with its reply, and an OSError
    by its errno. Any other exception is logged, and ends this session only. For UDP ASSOCIATE,
    `authorize` is called for each new destination of a datagram, perhaps in several threads at
    once, and such an error drops the datagram.
    """

    server: "Socks5Server"
    rbufsize = 1024  # bytes, any size but 0: frames need a buffer, and few have more than 513
    is_health_check = False  # of a balancer

    def setup(self) -> None:
        """Begin a session; from here on the server watches its deadlines."""
        super().setup()
        self.started = time.monotonic()
        self.settings = self.server.settings
        self.client = Address.of(self.client_address)
        self.user = "" if self.settings.users else self.client.host.partition(UNIX)[2]
        self.rules = self.settings.rules_for(self.client.host)
        self.is_proxied = self.settings.is_balancer(self.client_address)
        self.sockets = {self.connection}  # `finish` closes them
        self.relay: Any = None  # a Relay or an Association
        self.last_progress: Any = None
        self.early = b""  # what the client sends while BIND waits
        self.command = self.rule = self.end = ""  # as in the log, like the next ones
        self.destination: Any = ""
        self.reached: Any = ""
        self.reply: Optional[Reply] = None
        self.start_phase("handshake", self.settings.handshake_timeout)
        with self.server.lock:
            self.server.sessions.add(self)

    def handle(self) -> None:
        """Hold the conversation. This is the one place that turns failures into bytes."""
        try:
            if self.is_proxied:
                self.read_balancer_header()
            self.negotiate()
            request = Request.read(self.rfile)
        except ProtocolError as error:
            return self.refuse(error.answer, str(error))
        except RequestError as error:
            return self.fail_request(error, "refused")
        self.command, self.destination = request.command_name, request.destination
        try:
            self.carry_out(request)
        except (RequestError, OSError) as error:
            self.fail_request(error, "refused")
        except Exception as error:
            self.fail_request(error, "error")
            raise

    def finish(self) -> None:
        """Close the sockets, and log the session."""
        self.set_end("error")  # nothing else was set: an exception has ended the session
        with self.server.lock:
            self.server.sessions.discard(self)  # from here on, `hang_up` leaves its sockets alone
            self.server.session_users.pop(self, None)
        try:
            state = {**self.state(), "end": self.end}
            self.server.session_ended(self, state)
        finally:
            super().finish()
            for sock in self.sockets:
                sock.close()
        is_routine = self.is_health_check and not self.command
        self.log_message(logging.DEBUG if is_routine else logging.INFO, "session", state)

    # -- the client, and negotiation

    def read_balancer_header(self) -> None:
        """Learn from a balancer's header who the client is.

        A health check has no client: it is never local, and goes nowhere if clients are limited.
        """
        is_local_balancer = is_loopback(self.client.host)
        client = read_proxy_header(self.rfile)
        if client is None:
            self.is_health_check = True
            self.rules = [DENY_OTHERS] if self.settings.clients else self.settings.rules_for_remote
            return
        self.client_address = tuple(client)
        self.client = Address.of(client)
        self.rules = (  # loopback on another host is not loopback here
            self.settings.rules_for(self.client.host) if is_local_balancer
            else self.settings.rules_for_remote)
        if not self.server.admit_client(self.connection, self.client_address):
            raise ProtocolError("rejected")

    def negotiate(self) -> None:
        """Agree on a method (section 3), and let the client log in if it is that one."""
        method = self.select_method(read_methods(self.rfile))
        if method == Method.NO_ACCEPTABLE_METHODS:
            raise ProtocolError("no-acceptable-method", b"\x05\xff")
        self.send(b"\x05%c" % method)
        if method == Method.USERNAME_PASSWORD:
            self.log_in()

    def select_method(self, offered: bytes) -> int:
        """Return the `Method` to use, given those `offered`, one byte each (section 3)."""
        method = Method.USERNAME_PASSWORD
        if self.settings.users is None:
            method = Method.NO_AUTHENTICATION_REQUIRED
        return method if method in offered else Method.NO_ACCEPTABLE_METHODS

    def log_in(self) -> None:
        """Check a login (RFC 1929). A wrong password costs a pause and the connection."""
        username, password = read_credentials(self.rfile)
        user = username.decode("utf-8", "surrogateescape")
        if not self.authenticate(username, password):
            self.log_message(logging.WARNING, "login failed",
                             {"client": self.client, "user": user})
            self.start_phase("refusal", LOGIN_PAUSE + REFUSAL_TIMEOUT)
            self.server.closing.wait(LOGIN_PAUSE)
            raise ProtocolError("login-failed", b"\x01\x01")
        self.user = user
        self.send(b"\x01\x00")

    def authenticate(self, username: bytes, password: bytes) -> bool:
        """Return True for the credentials of a user; it takes as long for an unknown one."""
        expected = (self.settings.users or {}).get(username)
        matches = hmac.compare_digest(expected or b"", password)
        return matches and expected is not None

    def send(self, answer: bytes) -> None:
        """Send a part of the negotiation."""
        try:
            self.wfile.write(answer)
        except OSError as error:
            raise ProtocolError("client-left") from error

    # -- the request and its reply

    def carry_out(self, request: Request) -> None:
        """Check the command, the limit of the user, and `authorize`; then call ``do_COMMAND``."""
        do_command = getattr(self, "do_" + request.command_name, None)
        if do_command is None or not self.is_served(request.command):
            raise RequestError(Reply.COMMAND_NOT_SUPPORTED)
        if self.user and not self.server.admit_user(self):
            raise RequestError(Reply.NOT_ALLOWED)
        is_udp = request.command == Command.UDP_ASSOCIATE  # each datagram has a destination
        if not is_udp and not self.authorize(request.destination):
            raise RequestError(Reply.NOT_ALLOWED)
        do_command(request.destination)

    def is_served(self, command: int) -> bool:
        """Return True if `command` is enabled, and possible for this client.

        BIND and UDP ASSOCIATE need an IP address at which the client can reach this host. On a
        Unix socket there is none. Behind a balancer, there is only `udp_advertise`, for UDP.
        """
        if command not in self.settings.commands:
            return False
        if command == Command.CONNECT:
            return True
        if self.server.address_family == UNIX_FAMILY:
            return False
        return not self.is_proxied or (
            command == Command.UDP_ASSOCIATE and self.settings.udp_advertise is not None)

    def authorize(self, destination: Address) -> bool:
        """Return True if the client may go to `destination`, as it was requested."""
        return True

    def fail_request(self, error: Exception, end: str) -> None:
        """Answer with the reply for `error`, unless there has been a reply."""
        if self.reply is None:
            self.reply = reply_for(error)
            self.refuse(pack_reply(self.reply, UNSPECIFIED), end)

    def refuse(self, answer: bytes, end: str) -> None:
        """Send `answer`, if there is one, and give the client time to read it.

        A close() with unread bytes of the client would send a reset, which can destroy the answer.
        When the time is up, `hang_up` starts another phase, and wakes recv().
        """
        self.set_end(end)
        if answer:
            self.start_phase("refusal", REFUSAL_TIMEOUT)
            with contextlib.suppress(OSError):
                self.wfile.write(answer)
                self.connection.shutdown(socket.SHUT_WR)
                while self.phase.name == "refusal" and self.connection.recv(SMALL_BUFFER):
                    pass

    # -- commands

    def do_CONNECT(self, destination: Address) -> None:
        """Connect to `destination`, and relay until both sides have closed (section 4)."""
        self.start_phase("connect", NEVER)  # `connect` has a deadline of its own
        target = self.connect(destination)
        if isinstance(target, socket.socket):
            self.own_socket(target)
        if not isinstance(target, socket.socket) or hasattr(target, "unwrap"):
            raise TypeError("connect() returned a %s" % type(target).__name__)
        self.relay_to(target, target.getsockname())

    def connect(self, destination: Address) -> socket.socket:
        """Return a socket that is connected to `destination`; the session closes it.

        The default dials the permitted addresses within `connect_timeout` seconds. Raises
        RequestError or OSError. Not for TLS sockets: two threads cannot share one, and TLS has no
        half-close. Relay through a ``socket.socketpair()`` instead.
        """
        deadline = time.monotonic() + self.settings.connect_timeout
        candidates = self.permitted(destination, deadline)
        return dial(candidates, deadline, self.prepare, self.close_socket)

    def prepare(self, sock: socket.socket) -> None:
        """Own `sock`, which is about to be dialed, and bind it to the source address, if any."""
        self.own_socket(sock)
        if self.end:  # `hang_up` came: it has woken the last attempt, and there must be no other
            raise ConnectionAbortedError
        source = self.settings.source
        if source:
            if (sock.family == socket.AF_INET6) != (":" in source):
                raise OSError(errno.ENETUNREACH, "not of the family of the source address")
            with contextlib.suppress(OSError):  # share ports between targets, where Linux can
                sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))

    def do_BIND(self, destination: Address) -> None:
        """Wait for `destination` to connect, and relay (section 4). There are two replies."""
        self.start_phase("bind", NEVER)  # `accept` has a deadline of its own
        now = time.monotonic()
        hosts, here = None, self.connection.getsockname()  # None: any that the rules allow
        if destination.host not in ("0.0.0.0", "::"):
            peers = self.permitted(destination, now + self.settings.connect_timeout)
            hosts = {Address.of(peer[1]).host for peer in peers}
            here = self.local_address(peers[0])
        listener = self.open_socket(socket.SOCK_STREAM, here, [0])
        listener.listen(BIND_BACKLOG)
        with contextlib.suppress(OSError):  # `accept` notices that the client has left
            self.wfile.write(pack_reply(Reply.SUCCEEDED, Address.of(listener.getsockname())))
        target, peer = self.accept(listener, hosts, now + self.settings.bind_timeout)
        self.close_socket(listener)
        self.own_socket(target)
        self.relay_to(target, peer)

    def local_address(self, peer: Candidate) -> Any:
        """Return the address from which this host reaches `peer`. Raises OSError."""
        with socket.socket(peer[0], socket.SOCK_DGRAM) as sock:
            sock.connect((peer[1][0], 9) + peer[1][2:])  # which sends nothing
            return sock.getsockname()

    def accept(self, listener: socket.socket, hosts: Optional[Set[str]],
               deadline: float) -> Tuple[socket.socket, Any]:
        """Return a connection from one of `hosts` and its address. Raises OSError at `deadline`."""
        listener.setblocking(False)
        with Selector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(self.connection, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                for key, _ in selector.select(seconds_until(deadline)):
                    if key.fileobj is self.connection:
                        self.read_early()
                        if len(self.early) >= EARLY_LIMIT:
                            selector.unregister(self.connection)
                        continue
                    with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                        target, peer = listener.accept()
                        if self.is_expected(peer, hosts):
                            return target, peer
                        target.close()
        raise socket.timeout("nobody has connected")

    def read_early(self) -> None:
        """Keep what the client sends before there is a relay. Raises OSError if it has left."""
        data = b""
        with contextlib.suppress(ConnectionError):  # so many that the buffer of rfile is empty then
            data = self.rfile.read1(max(EARLY_LIMIT, self.rbufsize))
        if not data:
            self.set_end("client-left")
            raise ConnectionResetError
        self.early += data

    def is_expected(self, peer: Any, hosts: Optional[Set[str]]) -> bool:
        """Return True if `peer` is one of `hosts`; if they are None, if the rules allow it."""
        host, port = Address.of(peer)
        if hosts is None:
            return self.deciding_rule(b"", parse_ip(host), port).allows
        return host in hosts

    def do_UDP_ASSOCIATE(self, destination: Address) -> None:
        """Relay datagrams (section 7); the client sends them from the port of `destination`."""
        settings, here = self.settings, self.connection.getsockname()
        if self.is_proxied:  # clients cannot reach the address to which the balancer connected
            here = ("::", 0, 0, 0) if ":" in (settings.udp_advertise or "") else ("0.0.0.0", 0)
        inside = self.open_socket(socket.SOCK_DGRAM, here, settings.udp_ports)
        outside = open_outside(settings.source)
        self.own_socket(outside)
        client = Address(Address.of(self.client_address).host, destination.port)
        host, port = Address.of(inside.getsockname())
        self.run_relay(Association(self.connection, inside, outside, client, self.find_routes),
                       Address(settings.udp_advertise or host, port))

    def open_socket(self, kind: int, here: Any, ports: Iterable[int]) -> socket.socket:
        """Return a socket bound to one of `ports` at the address of `here`. Raises OSError."""
        host = Address.of(here).host
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
        self.own_socket(sock)
        failure = OSError(errno.EADDRINUSE, "no ports")
        for port in ports:
            try:
                sock.bind((here[0], port, *here[2:]) if ":" in host else (host, port))
                return sock
            except OSError as error:
                failure = error
        raise failure

    def relay_to(self, target: socket.socket, sockaddr: Any) -> None:
        """Reply with the address in `sockaddr`, and relay between the client and `target`."""
        target.setblocking(True)
        set_options(target, TCP_OPTIONS)
        with contextlib.suppress(OSError):  # it may be gone already
            self.reached = Address.of(target.getpeername())
        self.run_relay(Relay(self.connection, target, self.rfile, self.early, self.server.cpus),
                       Address.of(sockaddr))

    def run_relay(self, relay: Any, bound: Address) -> None:
        """Reply that the request has succeeded, and relay until the end."""
        self.relay, self.reply = relay, Reply.SUCCEEDED
        if self.end:  # `hang_up` came before there was a relay to stop
            relay.stop(self.end)
        try:
            relay.run(self.server.threads, pack_reply(Reply.SUCCEEDED, bound))
        except NoThreadError:
            self.relay = self.reply = None
            self.set_end("no-thread")
            raise
        except OSError:  # the reply could not be sent
            self.set_end("client-reset")
            raise
        self.set_end(relay.end)

    # -- destinations

    def permitted(self, destination: Address, deadline: float) -> List[Candidate]:
        """Return the addresses of `destination` that the rules allow, best first.

        A name is resolved by `deadline` (monotonic clock). Raises RequestError if no address is
        left, OSError if the name cannot be resolved.
        """
        ip = parse_ip(destination.host)
        name = encode_name(destination.host) if ip is None else b""
        rule = self.deciding_rule(name, ip, destination.port)
        if ip is not None and rule.allows:
            family = socket.AF_INET6 if ":" in destination.host else socket.AF_INET
            return [(family, tuple(destination))]
        allowed = []
        if rule.allows:
            for candidate in self.server.resolver.look_up(name, destination.port, deadline):
                host, port = Address.of(candidate[1])
                rule = self.deciding_rule(name, parse_ip(host), port)
                if rule.allows:
                    allowed.append(candidate)
        if not allowed:
            self.rule = rule.text
            raise RequestError(Reply.NOT_ALLOWED)
        return allowed

    def deciding_rule(self, name: bytes, ip: Any, port: int) -> Rule:
        """Return the first rule that matches; the last one matches every destination.

        `name` is b"" for an IP literal, and `ip` is None before a name is resolved.
        """
        name = name.rstrip(b".")
        return next(rule for rule in self.rules if rule.matches(self.user, name, ip, port))

    def find_routes(self, destination: Address) -> List[Any]:
        """Return the addresses for datagrams to `destination`. Raises RequestError or OSError.

        IPv4 comes first: nothing tells whether somebody answers, and more services listen on it.
        """
        if not self.authorize(destination):
            raise RequestError(Reply.NOT_ALLOWED)
        deadline = time.monotonic() + self.settings.connect_timeout
        routes = [candidate[1] for candidate in self.permitted(destination, deadline)]
        return sorted(routes, key=lambda route: ":" in route[0])

    # -- deadlines and the end

    def own_socket(self, sock: socket.socket) -> None:
        """Make `sock` part of the session: `hang_up` wakes it, `finish` closes it."""
        with self.server.lock:
            self.sockets.add(sock)

    def close_socket(self, sock: socket.socket) -> None:
        """Close a socket of the session. The lock keeps `hang_up` from waking a closed one."""
        with self.server.lock:
            self.sockets.discard(sock)
            sock.close()

    def set_end(self, end: str) -> None:
        """Set the reason for the end of the session, one of ENDS, unless it is already set."""
        self.end = self.end or end

    def start_phase(self, name: str, seconds: float) -> None:
        """Start a phase, or start it anew; it may last `seconds`."""
        now = self.server.clock()
        self.phase = Phase(name, now, now + seconds)

    def check_deadline(self, now: float) -> None:
        """Hang up if the phase has lasted too long. A relay's progress starts it anew."""
        if self.relay and self.phase.name != "closing":
            progress = self.relay.progress()
            if progress != self.last_progress:
                self.last_progress = progress
                self.start_phase(*self.relay.phase(self.settings))
        if now >= self.phase.deadline:
            # of a Relay: idle-timeout, linger-timeout; otherwise: handshake-timeout, udp-timeout
            self.hang_up(self.phase.name + "-timeout")

    def hang_up(self, end: str) -> None:
        """Wake the threads of the session, which then end it; called from another thread.

        BIND, or a `connect` hook, may open another socket afterwards: so repeat it until the
        session has ended.
        """
        self.set_end(end)
        self.start_phase("closing", NEVER)
        if self.relay:
            self.relay.stop(end)
        with self.server.lock:
            if self in self.server.sessions:  # otherwise `finish` closes them
                for sock in self.sockets:
                    wake(sock, socket.SHUT_RD)

    def state(self) -> Dict[str, object]:
        """Return the fields of the session's line in the log."""
        counts = self.relay.counts if self.relay else {"up": 0, "down": 0}
        return {"client": self.client, "user": self.user, "command": self.command,
                "destination": self.destination, "reached": self.reached,
                "reply": "" if self.reply is None else self.reply.name, "rule": self.rule,
                **counts, "seconds": "%.3f" % (time.monotonic() - self.started)}

    def log_message(self, level: int, event: str, fields: Mapping[str, object]) -> None:
        """Log `event` with `fields`, at a level of `logging`.

        Each value becomes one word of ASCII: nothing from the network can forge a line.
        """
        if log.isEnabledFor(level):
            words = ["%s=%s" % (name, escape(value)) for name, value in fields.items()]
            log.log(level, "%s %s", event, " ".join(words))


# ---- server: accepting, limits, deadlines, closing ---------------------------------------

SWEEP_INTERVAL = 0.5     # seconds between two checks of the deadlines
LATE_SWEEP = 2.0         # seconds; a sweep that is later follows a pause of the whole process
CLOSING_INTERVAL = 0.05  # seconds between two attempts to hang up
ACCEPT_TIMEOUT = 0.2     # seconds for which accept() waits before `is_accepting` is checked
EXHAUSTION_PAUSE = 0.1   # seconds before accepting is tried again
WARNING_INTERVAL = 1.0   # seconds between two warnings of a kind
NOTICE = 25              # level of the log for what an operator has asked for
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
SPARE_DESCRIPTORS = 16   # for what is not a session's
IS_LINUX = sys.platform.startswith("linux")
ACCEPT_TIMES_OUT = seconds_option("SO_RCVTIMEO", ACCEPT_TIMEOUT) if IS_LINUX else []
NO_TIMEOUT = seconds_option("SO_RCVTIMEO", 0) if IS_LINUX else []  # an accepted socket inherits it


def session_limit() -> float:
    """Return how many sessions this process has descriptors for: most need two."""
    if sys.platform == "win32":
        return NEVER
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return NEVER if limit == resource.RLIM_INFINITY else max(1, (limit - SPARE_DESCRIPTORS) // 2)


def has_room(names: Mapping[Any, str], name: str, limit: float) -> bool:
    """Return True if `name` is fewer than `limit` times among the values of `names`."""
    return limit == NEVER or list(names.values()).count(name) < limit


def remove_stale_socket(path: str) -> None:
    """Remove the socket at `path` if nobody listens on it any more. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            probe.settimeout(1)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


def peer_name(sock: socket.socket) -> str:
    """Return the login name, or the number, of the process behind a Unix socket; "" if unknown."""
    if not hasattr(socket, "SO_PEERCRED"):
        return ""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    uid = struct.unpack("iII", credentials)[1]
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class Socks5Server(socketserver.ThreadingTCPServer):
    """A SOCKS5 proxy that serves each client in a thread of its own.

    `server_address` is a host and a port, or the path of a Unix socket; ``::`` listens on both
    families. `mode` is for the permissions of the path. `listener` is a socket that listens
    already. The other arguments are those of ``socketserver`` and of `Settings`. Assign other
    Settings to `settings` at any time: they apply to new sessions.

    ``serve_forever`` also checks the deadlines, every `poll_interval` seconds; leave that at one
    second or less. ``server_close``, or the end of a ``with`` block, ends the
    sessions and waits for their threads. A session that waits for the system's resolver cannot
    be woken, and takes up to `connect_timeout`. `running` does all of that for you.

    Besides what ``socketserver`` documents, `drain`, `report` and `running` are there to be
    called. Other methods and attributes may change.

    For thousands of sessions, do first what `main` does and this class leaves to you: raise the
    limit of descriptors, make the stacks of threads small, and set a long
    ``sys.setswitchinterval``, because each thread that waits for the interpreter wakes once in
    this interval.
    """

    allow_reuse_address = os.name == "posix"  # elsewhere it lets others take the port
    request_queue_size = 1024
    is_accepting = True
    paused = 0.0  # seconds for which the whole process stood still

    def __init__(self, server_address: Any,
                 RequestHandlerClass: Callable[..., Any] = Socks5RequestHandler, *,
                 bind_and_activate: bool = True, mode: int = 0o600,
                 listener: Optional[socket.socket] = None, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.lock = threading.Lock()  # while it is held, sessions keep their sockets open
        self.sessions: Set[Socks5RequestHandler] = set()
        self.connections: Dict[Any, str] = {}  # clients' hosts by socket, "" before the checks
        self.session_users: Dict[Socks5RequestHandler, str] = {}  # of sessions with a request
        self.connection_closed = threading.Condition(self.lock)
        self.totals: "collections.Counter[str]" = collections.Counter()
        self.threads = ThreadCache()
        self.resolver = Resolver(self.warn)
        self.session_limit = session_limit()
        self.cpus: Optional[Set[int]] = None  # for flows inside the kernel, if not all
        self.next_sweep = time.monotonic()
        self.warnings: Dict[str, Tuple[float, int]] = {}  # when each may be logged; how many wait
        self.closing = threading.Event()
        self.mode = mode
        self.path_owner: Any = None  # process, inode and device, if it has to be removed
        if isinstance(server_address, str):
            self.address_family = UNIX_FAMILY or socket.AF_INET
        elif ":" in server_address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(server_address, RequestHandlerClass, bind_and_activate and not listener)
        self.is_inherited = listener is not None
        if listener:
            self.socket.close()
            self.socket = listener
            self.set_listener_options()

    # -- accepting

    def server_bind(self) -> None:
        """Bind the socket to an address, or to a path that has the permissions `mode`."""
        if self.server_address[0] == "::":
            with contextlib.suppress(AttributeError, OSError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if isinstance(self.server_address, str):
            self.bind_path(self.server_address)
        else:
            super().server_bind()
        self.set_listener_options()

    def bind_path(self, path: str) -> None:
        """Bind the socket to `path`."""
        remove_stale_socket(path)
        umask = os.umask(0o777 & ~self.mode)
        try:
            self.socket.bind(path)
        finally:
            os.umask(umask)
        self.path_owner = os.getpid(), os.stat(path)[1:3]

    def set_listener_options(self) -> None:
        """Set the options of the listening socket; clients' sockets inherit them."""
        set_options(self.socket, TCP_OPTIONS)
        set_options(self.socket, ACCEPT_TIMES_OUT)

    def accept_forever(self) -> None:
        """Accept clients while `is_accepting`, then the queued ones, and stop listening.

        Several processes accept on one socket. If they wait in accept(), Linux wakes one of them
        for each client; if they wait in a selector, it wakes all of them.
        """
        self.timeout = ACCEPT_TIMEOUT
        accept_one = self._handle_request_noblock if IS_LINUX else self.handle_request
        while self.is_accepting:
            try:
                accept_one()
            except Exception:  # no memory even to handle another error
                time.sleep(EXHAUSTION_PAUSE)
        if not self.is_inherited:  # systemd keeps such a socket, and its queue, for the next server
            self.remove_path()
            self.timeout = 0  # so handle_request() returns if the queue is empty
            for _ in range(self.request_queue_size):
                self.handle_request()
        self.socket.close()

    def remove_path(self) -> None:
        """Remove the path that this process listens on, if it is still the same one."""
        path: Any = self.server_address
        with contextlib.suppress(OSError):
            if self.path_owner and self.path_owner == (os.getpid(), os.stat(path)[1:3]):
                os.unlink(path)

    def _handle_request_noblock(self) -> None:
        """Accept a client and start its session. Unlike that of ``socketserver``, never raise."""
        try:
            request, client_address = self.get_request()
        except Exception:  # nobody has come, or there is no room
            return
        try:
            self.connections[request] = ""
            set_options(request, NO_TIMEOUT)
            if self.address_family == UNIX_FAMILY:
                client_address = UNIX + peer_name(request), 0
            if (self.settings.is_balancer(client_address)  # its client is not known yet
                    or self.admit_client(request, client_address)):
                self.process_request(request, client_address)
            else:
                self.shutdown_request(request)
        except Exception:
            self.shutdown_request(request)
            self.handle_error(request, client_address)

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept a client. Raises OSError if there is none, or no room for it.

        If descriptors are used up, clients wait in the queue. After any error but that nobody has
        come, pause: ``socketserver`` would spin.
        """
        try:
            if len(self.connections) >= self.session_limit:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().get_request()
        except (BlockingIOError, ConnectionAbortedError):  # nobody has come, or has left again
            raise
        except (OSError, MemoryError) as error:
            time.sleep(EXHAUSTION_PAUSE)
            if isinstance(error, MemoryError) or error.errno in EXHAUSTED:
                self.warn("not accepting: %s", getattr(error, "strerror", "MemoryError"))
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return True if a client may connect from this address."""
        networks = self.settings.clients
        if not networks:
            return True
        client = Address.of(client_address)
        if client.host.startswith(UNIX) or covers(networks, client.host):
            return True
        self.warn("client refused client=%s", client)
        return False

    def admit_client(self, request: Any, client_address: Any) -> bool:
        """Return True, and count the client, if it may connect and no limit is reached."""
        if not self.verify_request(request, client_address):
            return False
        client, settings = Address.of(client_address), self.settings
        with self.lock:
            is_full = len(self.connections) > settings.max_sessions
            if not is_full and has_room(self.connections, client.host, settings.max_per_client):
                self.connections[request] = client.host
                return True
        self.warn("too many sessions client=%s" if is_full else
                  "too many sessions of a client client=%s", client)
        return False

    def admit_user(self, session: Socks5RequestHandler) -> bool:
        """Return True, and count `session`, if its user has fewer sessions than `max_per_user`."""
        with self.lock:
            if has_room(self.session_users, session.user, session.settings.max_per_user):
                self.session_users[session] = session.user
                return True
        self.warn("too many sessions of a user client=%s user=%s",
                  session.client, escape(session.user))
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a session in a thread."""
        try:
            self.threads.start(self.process_request_thread, request, client_address)
        except NoThreadError:
            self.warn("no thread for a client client=%s", Address.of(client_address))
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a client's connection, however far the session came."""
        if request.fileno() >= 0:
            super().shutdown_request(request)
        with self.connection_closed:
            self.connections.pop(request, None)
            self.connection_closed.notify_all()

    # -- watching

    def clock(self) -> float:
        """Return the time in seconds by which deadlines are kept: it stops if the process does."""
        return time.monotonic() - self.paused

    def service_actions(self) -> None:
        """Check the deadlines; ``serve_forever`` calls it often. Never raise."""
        try:
            now = time.monotonic()
            late = now - self.next_sweep
            if late < 0:
                return
            if late >= LATE_SWEEP:
                self.paused += late
            self.next_sweep = now + SWEEP_INTERVAL
            self.for_each_session(Socks5RequestHandler.check_deadline, self.clock())
        except Exception as error:
            with contextlib.suppress(Exception):  # no memory even for that
                log_failure("checking deadlines failed", error)

    def for_each_session(self, action: Callable[..., None], *args: Any) -> None:
        """Call `action` with each session. One that fails must not keep it from the others."""
        with self.lock:
            sessions = list(self.sessions)
        for session in sessions:
            try:
                action(session, *args)
            except Exception as error:
                self.warn("watching a session failed error=%s", type(error).__name__)

    def session_ended(self, session: Socks5RequestHandler, state: Mapping[str, Any]) -> None:
        """Add the numbers of `session` to the totals."""
        with self.lock:
            self.totals["sessions"] += 1
            self.totals["up"] += state["up"]
            self.totals["down"] += state["down"]
            self.totals[session.end] += 1

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
        """Log an unexpected exception of a session."""
        error = sys.exc_info()[1] or Exception()
        log_failure("session failed client=%s" % (Address.of(client_address),), error)

    def report(self) -> None:
        """Log each live session, and the totals of the ended ones."""
        with self.lock:
            sessions, totals = list(self.sessions), dict(self.totals)
        for session in sessions:
            phase, idle = session.phase.name, self.clock() - session.phase.since
            session.log_message(NOTICE, "live", dict(
                session.state(), idle="%.3f" % idle, phase=phase))
        log.log(NOTICE, "totals live=%d%s", len(sessions), "".join(
            " %s=%d" % total for total in totals.items()))

    # -- closing

    def drain(self, seconds: float) -> bool:
        """Wait until no connection is left; return False if one is left after `seconds`.

        Call ``shutdown`` before, or new clients keep coming.
        """
        with self.connection_closed:
            return self.connection_closed.wait_for(lambda: not self.connections, seconds)

    def end_sessions(self, seconds: float) -> None:
        """Hang up on all clients, and wait until no session is left, for up to `seconds`."""
        self.closing.set()
        until = time.monotonic() + seconds
        while self.connections and time.monotonic() < until:
            self.for_each_session(Socks5RequestHandler.hang_up, "server-closed")
            self.drain(CLOSING_INTERVAL)

    def server_close(self) -> None:
        """Stop listening, end the sessions, and wait for their threads."""
        self.remove_path()
        super().server_close()
        self.end_sessions(NEVER)
        self.threads.close()

    @contextlib.contextmanager
    def running(self) -> Any:
        """Serve in a thread for the length of a ``with`` block, and then close the server."""
        thread = start_thread(self.serve_forever, CLOSING_INTERVAL)
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


# ---- service: signals and worker processes -----------------------------------------------

SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 3.0  # seconds before a worker is restarted
SETTLED = 5.0      # seconds; a worker that dies sooner makes the next pause twice as long
HANG_UP_TIME = 1.0  # seconds for sessions to end once the drain is over
LAST_RESORT = 2.0  # seconds after the drain at which the process ends, whatever blocks
END_NOW = 0        # what a parent tells its workers at the second signal; no signal has this number
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGHUP, SIGUSR1, SIGUSR2, SIGALRM, SIGCHLD = (getattr(signal, name, None) for name in (
    "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD"))  # Windows has none of them
SIGNALS: Set[Any] = {*STOP_SIGNALS, SIGHUP, SIGUSR1, SIGALRM, SIGCHLD} - {None}
WORKER_SIGNALS: Set[Any] = {*STOP_SIGNALS, SIGALRM}  # the parent passes on the others
IGNORED: Set[Any] = {SIGHUP, SIGUSR1, SIGUSR2, SIGALRM} - {None}  # unless the service catches it
SO_DOMAIN = 39  # Linux's number; the module `socket` has no name for it before 3.15


def usable_cpus() -> List[int]:
    """Return the numbers of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def stay_on_one_cpu(number: int) -> Optional[Set[int]]:
    """Run this thread and its children on one CPU; return all CPUs, None if the system refuses.

    Only one thread at a time has the interpreter. On other CPUs, threads would wake up, find it
    taken, and sleep again. On the same CPU, SCHED_BATCH keeps a thread that a packet wakes from
    preempting the one that has the interpreter. A build without the global lock needs neither.
    """
    if not hasattr(os, "sched_setaffinity") or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    cpus = usable_cpus()
    if run_on({cpus[number % len(cpus)]}) is None:
        return None
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    return set(cpus)


def write_unless_stuck(descriptor: int, text: str) -> None:
    """Write `text`. Raises OSError if that fails, or would block.

    A pipe that poll() reports as ready takes PIPE_BUF bytes; a file takes any number.
    """
    data = text.encode("utf-8", "backslashreplace")
    piece = getattr(select, "PIPE_BUF", len(data))
    while data:
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            if not poll.poll(0):
                raise BlockingIOError
        data = data[os.write(descriptor, data[:piece]):]


def open_without_blocking(descriptor: int) -> int:
    """Return a descriptor for the same pipe or terminal that never blocks, if Linux gives one.

    A terminal that poll() reports as ready may take one byte only, and another process may fill
    a pipe first. Others share the mode of `descriptor` itself.
    """
    with contextlib.suppress(OSError, AttributeError):
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode) or os.isatty(descriptor):
            return os.open("/proc/self/fd/%d" % descriptor,
                           os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return descriptor


def announce(line: str) -> None:
    """Print `line`. Ignore a full disk and a closed or full pipe: serving does not need stdout."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no stdout at all
        write_unless_stuck(sys.stdout.fileno(), line + "\n")


def notify(state: str) -> None:
    """Tell systemd the state of the service, if it wants to know (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


def inherited_socket() -> Optional[socket.socket]:
    """Return the listening socket that systemd has passed, if any (sd_listen_fds(3)).

    Raises OSError or ValueError if it is not a single one.
    """
    count, process = (os.environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_PID"))
    if process != str(os.getpid()):
        return None
    if count != "1":
        raise ValueError("systemd passed %s sockets, and not 1" % (count or "no"))
    try:
        sock = socket.socket(fileno=3)
        family, kind, listens = (sock.getsockopt(socket.SOL_SOCKET, option) for option in (
            SO_DOMAIN, socket.SO_TYPE, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise ValueError("descriptor 3 is not a socket: %s" % error.strerror) from None
    sock = socket.socket(family, fileno=sock.detach())  # CPython 3.6 takes it for IPv4
    sock.setblocking(True)
    if (family not in (socket.AF_INET, socket.AF_INET6, UNIX_FAMILY) or not listens
            or kind != socket.SOCK_STREAM or isinstance(sock.getsockname(), bytes)):
        raise ValueError("descriptor 3 is not a listening stream socket with an IP address or a "
                         "path")
    return sock


def describe(error: BaseException) -> str:
    """Return what `error` says to a user, without the number that OSError has before it."""
    if isinstance(error, OSError) and error.strerror:
        return "%s: %s" % (error.filename, error.strerror) if error.filename else error.strerror
    return str(error)


class LogHandler(logging.Handler):
    """Write the log to a descriptor. Lines that would block are dropped, and counted."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = open_without_blocking(descriptor)
        self.dropped = 0

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for `record`, with a traceback if it has one."""
        moment = time.localtime(record.created)
        return "%s.%03d%s %s %s\n" % (
            time.strftime("%Y-%m-%dT%H:%M:%S", moment), record.msecs, time.strftime("%z", moment),
            record.levelname, super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line for `record`, and before it how many were dropped."""
        try:
            if self.dropped:
                notice = logging.makeLogRecord({
                    "levelname": "WARNING", "msg": "log lines dropped count=%d" % self.dropped})
                write_unless_stuck(self.descriptor, self.format(notice))
                self.dropped = 0
            write_unless_stuck(self.descriptor, self.format(record))
        except Exception:  # a reader that does not read, or a full disk
            self.dropped += 1


class Worker:
    """A worker process, as its parent sees it. `pid` is 0 while there is none."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid = self.status = 0
        self.link: Any = None  # what the parent writes here, the worker reads
        self.started = self.start_at = 0.0
        self.pause = SHORTEST_PAUSE

    def has_died(self) -> bool:
        """Return True if there is no process any more; set `status` to how it ended."""
        if not self.pid:
            return True
        pid, self.status = os.waitpid(self.pid, os.WNOHANG)
        return pid != 0

    def plan_restart(self) -> None:
        """Set when to start the next process. If this one has not SETTLED, double the pause."""
        self.link.close()
        now = time.monotonic()
        if now - self.started > SETTLED:
            self.pause = SHORTEST_PAUSE
        log.warning("worker died pid=%d signal=%d exit=%d restart_in=%g", self.pid,
                    os.WTERMSIG(self.status), os.WEXITSTATUS(self.status), self.pause)
        self.pid, self.start_at = 0, now + self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)


class Service:
    """Runs a server until signals stop it, in this process or in worker processes.

    SIGTERM and SIGINT stop accepting; the process ends when no session is left, or after `drain`
    seconds. At the second one, it ends the sessions at once. SIGHUP reads the settings again: new
    sessions get them, running ones keep theirs; the address, the path's mode, `workers`, `drain`
    and the level of the log stay. If the new settings are invalid, nothing changes. SIGUSR1 logs
    the live sessions and the totals. If a worker dies, its sessions are reset, and another worker
    takes its place after SHORTEST_PAUSE to LONGEST_PAUSE seconds.

    Each process has one loop. It reads the numbers of signals from a socket pair, into which the
    interpreter writes them (``set_wakeup_fd``). Workers read a second pair, into which their
    parent writes what they are to do; its end of file means that the parent has died. A terminal
    or systemd sends each signal to all processes; so a worker obeys only the first signal to
    stop, and its parent decides on the others. The parent keeps the listening socket open: if a
    worker dies, the others serve its queue.
    """

    def __init__(self, server: Socks5Server, workers: int, drain: float,
                 read_settings: Callable[[], Settings]) -> None:
        self.server, self.drain_seconds = server, drain
        self.read_settings = read_settings
        self.workers = [Worker(number) for number in range(workers)] if workers > 1 else []
        self.parent: Optional[socket.socket] = None  # in a worker
        self.acceptor: Optional[threading.Thread] = None  # in a process that serves
        self.end_at = NEVER  # when sessions that are left are ended
        self.has_terminal = os.isatty(0)

    def run(self, greeting: str) -> None:
        """Print `greeting` once signals are obeyed, serve until they end it, and exit.

        Raises NoThreadError.
        """
        self.catch_signals(SIGNALS)
        if not self.workers:
            self.start_serving(os.getpid())
        log.info("%s", greeting)
        announce(greeting)
        notify("READY=1")
        self.run_loop()

    def catch_signals(self, numbers: Set[Any]) -> None:
        """Have the numbers of these signals written into a socket pair of this process."""
        self.signals, ours = socket.socketpair()
        ours.setblocking(False)
        signal.set_wakeup_fd(ours.detach())
        for number in numbers:
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: Any) -> None:
        """Set when the process ends, because the loop may be stuck. `obey` does the rest."""
        if number == SIGALRM and time.monotonic() >= self.end_at + LAST_RESORT:
            self.end_now()
        if number in STOP_SIGNALS and self.end_at == NEVER:
            self.end_within(self.drain_seconds)
        elif number in STOP_SIGNALS and not self.parent:
            self.end_within(0)

    def end_now(self) -> None:
        """Kill the workers that are left, and exit."""
        for worker in self.workers:
            if worker.pid:
                with contextlib.suppress(OSError):  # it has died
                    os.kill(worker.pid, signal.SIGKILL)
        os._exit(0)  # the interpreter's shutdown waits for threads, and a signal may kill it

    def end_within(self, seconds: float) -> None:
        """End the sessions after `seconds`, and the process LAST_RESORT later, whatever blocks."""
        now = time.monotonic()
        self.end_at = min(self.end_at, now + seconds)
        if SIGALRM:
            remaining = self.end_at + LAST_RESORT - now
            signal.setitimer(signal.ITIMER_REAL, min(1e6, max(SHORT_WAIT, remaining)))

    def start_serving(self, number: int) -> None:
        """Accept clients in this process, on a CPU chosen by `number`."""
        self.server.cpus = stay_on_one_cpu(number)
        self.acceptor = start_thread(self.server.accept_forever)

    def run_loop(self) -> None:
        """Obey signals, check deadlines and restart workers until nothing is left; then exit."""
        with Selector() as selector:
            for source in (self.signals, self.parent) if self.parent else (self.signals,):
                selector.register(source, selectors.EVENT_READ)
            while not self.is_done():
                try:
                    self.look_after_workers()
                    self.server.service_actions()
                    for key, _ in selector.select(self.interval()):
                        self.read_numbers(selector, key.fileobj)
                except Exception as error:
                    time.sleep(EXHAUSTION_PAUSE)
                    with contextlib.suppress(Exception):  # no memory even for that
                        self.server.warn("service failed error=%s", type(error).__name__)
        self.server.end_sessions(HANG_UP_TIME)
        self.server.remove_path()
        self.end_now()

    def interval(self) -> float:
        """Return the seconds between two checks of the deadlines and the workers."""
        is_complete = all(worker.pid for worker in self.workers)
        return SWEEP_INTERVAL if self.server.is_accepting and is_complete else CLOSING_INTERVAL

    def read_numbers(self, selector: selectors.BaseSelector, source: Any) -> None:
        """Obey the numbers that can be read. At an end of file, the parent has died: stop."""
        numbers = source.recv(1024)
        for number in numbers or [signal.SIGTERM]:
            self.obey(number)
        if not numbers:
            selector.unregister(source)

    def is_done(self) -> bool:
        """Return True if the service has been stopped and nothing is left to wait for."""
        if self.server.is_accepting or self.workers:
            return False
        if self.acceptor is None or time.monotonic() >= self.end_at:
            return True
        return not self.acceptor.is_alive() and not self.server.connections

    # -- what to obey

    def obey(self, number: int) -> None:
        """Obey a signal, or what the parent tells: the number of a signal, or END_NOW."""
        if number == SIGHUP and os.isatty(0) != self.has_terminal:
            number = signal.SIGTERM  # the terminal is gone, like that of an ssh connection
        if number in STOP_SIGNALS and self.server.is_accepting:
            self.stop()
        elif number == END_NOW or number in STOP_SIGNALS and not self.parent:
            self.end_within(0)
            self.tell_workers(END_NOW)
        elif number == SIGUSR1:
            self.tell_workers(SIGUSR1)
            if not self.workers:
                self.server.report()
        elif number == SIGHUP:
            self.reload()

    def tell_workers(self, word: int) -> None:
        """Send `word`, the number of a signal or END_NOW, to the workers."""
        for worker in self.workers:
            if worker.pid:
                with contextlib.suppress(OSError):  # it has died
                    worker.link.send(bytes([word]))

    def reload(self) -> None:
        """Read the settings again, here and, if they are valid, in the workers."""
        notify("RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic() * 1e6))
        try:
            self.server.settings = self.read_settings()
            log.log(NOTICE, "settings reloaded")
            self.tell_workers(signal.SIGHUP)
        except (OSError, ValueError, TypeError, RecursionError, SystemExit) as error:  # by --help
            log.warning("reload failed, keeping the current settings: %s", describe(error))
        notify("READY=1")

    def stop(self) -> None:
        """Stop accepting, and let the sessions go on for `drain_seconds`."""
        self.end_within(self.drain_seconds)
        self.server.is_accepting = False
        if not self.parent:
            announce("Shutting down.")
            notify("STOPPING=1")
            log.info("shutting down")
        if self.workers:
            self.server.remove_path()
            self.server.socket.close()
        self.tell_workers(signal.SIGTERM)

    # -- workers

    def look_after_workers(self) -> None:
        """Start missing workers. After a stop, forget ended workers."""
        now = time.monotonic()
        if not self.server.is_accepting:
            self.workers = [worker for worker in self.workers if not worker.has_died()]
            return
        for worker in self.workers:
            if worker.pid and worker.has_died():
                worker.plan_restart()
            if not worker.pid and now >= worker.start_at:
                try:
                    self.start_worker(worker)
                except OSError as error:
                    self.server.warn("cannot start a worker: %s", error.strerror)
                    worker.start_at = now + LONGEST_PAUSE

    def start_worker(self, worker: Worker) -> None:
        """Fork a worker process. Raises OSError if the system has no room for it."""
        theirs, worker.link = socket.socketpair()
        worker.link.setblocking(False)  # the worker may be stuck
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a child would write into our pair
        try:
            worker.started = time.monotonic()
            worker.pid = os.fork()
            if not worker.pid:
                self.become_worker(worker.number, theirs)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            theirs.close()

    def become_worker(self, number: int, parent: socket.socket) -> None:
        """Serve in the process that has just been forked, and exit."""
        try:
            for sock in [self.signals] + [each.link for each in self.workers if each.link]:
                sock.close()
            os.environ.pop("NOTIFY_SOCKET", None)  # the parent speaks for the service
            self.workers, self.parent = [], parent
            for ignored in SIGNALS - WORKER_SIGNALS:
                signal.signal(ignored, signal.SIG_IGN)
            self.catch_signals(WORKER_SIGNALS)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self.start_serving(number)
            self.run_loop()
        except Exception as error:
            log_failure("worker failed", error)
        finally:
            os._exit(1)


# ---- command line ------------------------------------------------------------------------

HOST, PORT = "127.0.0.1", 1080
STACK_SIZE = 256 * 1024  # bytes, for each thread
SWITCH_INTERVAL = 1.0    # seconds; each thread that waits for the interpreter wakes that often
DEFAULTS: Dict[str, Any] = dict(Settings.__init__.__kwdefaults__ or {})
COMMENT = re.compile(r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.)|(?:^|\s)#.*""")  # outside quotes


def split_port(text: str) -> Tuple[str, str]:
    """Return the host without brackets, and the port, "" if there is none."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or parse_ip(text) is not None:
        host, port = text, ""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host, port


def parse_port(text: str) -> int:
    """Return the port. Raises ValueError, which quotes an address, but not a stray password."""
    host, port = split_port(text)
    if parse_ip(host) is not None:
        raise ValueError("an address goes before the port: socks5.py -b %s %s" % (
            host, port or PORT))
    if not text.isdecimal() or int(text) > 65535:
        raise ValueError("argument port: not a number from 0 to 65535")
    return int(text)


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError for a usage error, and reads options from files."""

    def error(self, message: str) -> Any:
        """Raise ValueError."""
        raise ValueError(message)

    def parse(self, arguments: List[str]) -> argparse.Namespace:
        """Return the options in `arguments`, with those of each @FILE in its place."""
        options, unknown = self.parse_known_args(self.expand(arguments))
        self.reject_unknown(unknown)
        if options.port is not None:
            options.port = parse_port(options.port)
        return options

    def reject_unknown(self, unknown: List[str]) -> None:
        """Raise ValueError if there are unknown arguments. It quotes no value: see `parse_port`."""
        if unknown:
            option = unknown[0].partition("=")[0]
            option = option if option.startswith("--") else option[:2]
            self.error("unknown option " + option if option[:1] == "-" else "more than one port")

    def expand(self, arguments: List[str]) -> List[str]:
        """Return `arguments` with the content of each @FILE in its place."""
        expanded: List[str] = []
        for argument in arguments:
            expanded += self.read_file(argument[1:]) if argument.startswith("@") else [argument]
        return expanded

    def read_file(self, path: str) -> List[str]:
        """Return the arguments in the file. The error for an unknown option names the line."""
        arguments: List[str] = []
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    words = self.expand(shlex.split(COMMENT.sub(r"\1", line.rstrip("\n"))))
                    self.reject_unknown(self.find_unknown(words))
                except ValueError as error:
                    raise ValueError("%s, line %d: %s" % (path, number, error)) from None
                arguments += words
        return arguments

    def find_unknown(self, words: List[str]) -> List[str]:
        """Return the unknown options among the `words` of a line."""
        with contextlib.suppress(ValueError):  # a known option, with its value in the next line
            return [word for word in self.parse_known_args(words)[1] if word.startswith("-")]
        return []


def number_type(convert: Callable[[str], float], least: float, most: float,
                kind: str = "") -> Callable[[str], Any]:
    """Return a type for argparse. Errors do not quote the value: it may be a stray password."""
    def converted(text: str) -> float:
        """Return the number. Raises ArgumentTypeError."""
        with contextlib.suppress(ValueError):
            if least <= convert(text) <= most:
                return convert(text)
        raise argparse.ArgumentTypeError(
            "not " + (kind or "a number from %g to %g" % (least, most)))
    return converted


count_type = number_type(int, 1, 1e6)
mode_type = number_type(lambda text: int(text, 8), 0, 0o777, "permissions like 0660")
seconds_type = number_type(float, 0.001, 1e9)


def network_type(text: str) -> str:
    """Check an address or a network, for argparse."""
    try:
        parse_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def port_range_type(text: str) -> Iterable[int]:
    """Return the ports of FIRST-LAST or PORT, for argparse."""
    first, _, last = text.partition("-")
    port_type = number_type(int, 1, 65535)
    ports = range(port_type(first), port_type(last or first) + 1)
    if not ports:
        raise argparse.ArgumentTypeError("the first port is behind the last one")
    return ports


def workers_type(text: str) -> int:
    """Return a number of workers, for argparse."""
    return len(usable_cpus()) if text == "auto" else int(count_type(text))


def bind_type(text: str) -> str:
    """Return an address or a path to listen on, for argparse."""
    if "/" in text:
        return text
    host, port = split_port(text)
    if port:
        raise argparse.ArgumentTypeError(
            "%s: the port is an argument of its own: socks5.py -b %s %s" % (text, host, port))
    return host


def no_such_option(text: str) -> int:
    """Reject the option that others have for the port, for argparse."""
    raise argparse.ArgumentTypeError("the port is an argument of its own: socks5.py 1080")


LIMITS = [
    ("--max-sessions", "reject connections above N, in each worker (default: the descriptor "
     "limit; further connections queue)"),
    ("--max-per-client", "reject connections above N from one address, in each worker (default: "
     "no limit)"),
    ("--max-per-user", "refuse requests of a user above N sessions, in each worker (default: no "
     "limit)")]
TIMEOUTS = [
    ("--handshake-timeout", "from accepting a client to its complete request"),
    ("--connect-timeout", "to resolve and reach a destination"),
    ("--idle-timeout", "without data in either direction"),
    ("--linger", "without data, once one side has closed"),
    ("--bind-timeout", "for BIND to wait for a connection"),
    ("--udp-timeout", "without datagrams in either direction")]


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for who may connect, and where to."""
    add = parser.add_argument_group("who may use it").add_argument
    add("--users", metavar="FILE", help="require a login; FILE has a line name:password per user")
    add("--client", metavar="NETWORK", dest="clients", action="append", type=network_type,
        help="accept clients from NETWORK only; repeatable")
    add("--open", action="store_true", help="let everybody use a proxy that others can reach")
    add("--proxy-from", metavar="NETWORK", action="append", type=network_type,
        help="expect a PROXY header from balancers in NETWORK; repeatable")
    for option, meaning in LIMITS:
        add(option, metavar="N", type=count_type, help=meaning)
    add = parser.add_argument_group("where they may go").add_argument
    add("--allow", metavar="RULE", dest="rules", action="append", type="allow {}".format,
        help="allow RULE, [USER@]HOST[:PORT[-PORT]]; the first --allow or --deny that matches "
        "decides, and with any --allow, the rest is denied")
    add("--deny", metavar="RULE", dest="rules", action="append", type="deny {}".format,
        help="deny RULE")
    add("--commands", metavar="LIST", type=lambda text: text.split(","),
        help="SOCKS commands to serve (default: %s)" % ",".join(COMMANDS))
    add("--source", metavar="ADDRESS",
        help="address to dial targets from (default: the system chooses)")


def add_serving_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for where to listen, and how to serve."""
    add: Any = parser.add_argument_group("serving").add_argument
    add("port", nargs="?",
        help="port to listen on; 0 picks a free one (default: %d)" % PORT)
    add("-b", "--bind", metavar="ADDRESS", type=bind_type,
        help="address to listen on; 0.0.0.0 is all IPv4, :: is everything, and PATH with a slash "
        "is a Unix socket (default: %s)" % HOST)
    add("--mode", metavar="MODE", type=mode_type, default=0o600,
        help="permissions of a Unix socket (default: 0600)")
    add("--workers", metavar="N", type=workers_type, default=1,
        help="processes that serve; auto is one per CPU (default: %(default)s)")
    add("--drain", metavar="S", type=number_type(float, 0, 1e9), default=5.0,
        help="seconds for sessions to finish after SIGTERM or Ctrl-C (default: %(default)g)")


def make_parser() -> Parser:
    """Return the parser of the command line. Defaults of settings are those of `Settings`."""
    parser = Parser(
        prog="socks5.py", description="A SOCKS5 proxy server (RFC 1928, RFC 1929).",
        epilog="@FILE stands for the options in FILE, one per line; # starts a comment.",
        allow_abbrev=False)
    parser.set_defaults(**dict(DEFAULTS, rules=[], clients=[], proxy_from=[]))
    add: Any = parser.add_argument
    add("--version", action="version", version="socks5.py " + __version__)
    add("-p", "--port", type=no_such_option, help=argparse.SUPPRESS)
    add_serving_options(parser)
    add_access_options(parser)
    add = parser.add_argument_group("timeouts in seconds").add_argument
    for option, meaning in TIMEOUTS:
        default = DEFAULTS[option[2:].replace("-", "_")]
        add(option, metavar="S", type=seconds_type, help="%s (default: %s)" % (
            meaning, "never" if default is None else "%g" % default))
    add = parser.add_argument_group("datagrams").add_argument
    add("--udp-ports", metavar="FIRST-LAST", type=port_range_type,
        help="ports that clients send datagrams to (default: any free port)")
    add("--udp-advertise", metavar="ADDRESS",
        help="address that clients send datagrams to (default: where they connected)")
    add = parser.add_argument_group("logging").add_mutually_exclusive_group().add_argument
    add("-q", "--quiet", dest="level", action="store_const", const=NOTICE, default=logging.INFO,
        help="do not log sessions")
    add("-v", "--verbose", dest="level", action="store_const", const=logging.DEBUG,
        help="log tracebacks")
    return parser


def is_open(args: argparse.Namespace, address: Any, mode: int) -> bool:
    """Return True if strangers can use a server at `address`, unless it asks for a login."""
    if isinstance(address, str):
        return bool(mode & 0o006)
    return not args.clients and (bool(args.proxy_from) or not is_loopback(address[0]))


def check_rule(rule: Rule, users: Optional[Mapping[str, str]], is_path: bool) -> None:
    """Raise ValueError if nobody checks the user of `rule`, and log what may be a mistake."""
    if users is None and rule.user and is_path:
        if not hasattr(socket, "SO_PEERCRED"):
            raise ValueError("%s: without --users, this system does not tell users of a Unix "
                             "socket" % rule.text)
    elif rule.user and rule.user not in (users or {}):
        if rule.allows:
            raise ValueError("%s: no such user" % rule.text)
        log.warning("%s: no such user", rule.text)
    host = rule.text.partition(":")[2].rpartition("@")[2]
    address, _, port = host.rpartition(":")
    if port.isdecimal() and ":" in address and parse_ip(address) is not None:
        log.warning("%s is for the address %s and all ports; for one port, write [%s]:%s",
                    rule.text, host, address, port)


def read_settings(args: argparse.Namespace, address: Any, mode: int) -> Settings:
    """Return the settings of `args`, and of the files that they name, for a server at `address`.

    `mode` are the permissions of its path, if it is one.

    Raises OSError, or ValueError if they are invalid or leave the server open by mistake.
    """
    users = None if args.users is None else load_users(args.users)
    if users is not None and os.name == "posix" and os.stat(args.users).st_mode & stat.S_IROTH:
        log.warning("%s is world-readable: chmod o-r %s", args.users, args.users)
    if users is None and not args.open and is_open(args, address, mode):
        where = ascii(address)[1:-1] if isinstance(address, str) else address[0]
        raise ValueError("refusing to listen on %s without access control: "
                         "add --users, --client or --open" % where)
    settings = Settings(**dict({name: getattr(args, name) for name in DEFAULTS}, users=users))
    for rule in settings.rules:
        check_rule(rule, users, isinstance(address, str))
    return settings


def prepare_process(level: int) -> None:
    """Set up the log, and what a process with thousands of threads needs."""
    logging.addLevelName(NOTICE, "NOTICE")
    handlers = [LogHandler(sys.stderr.fileno())] if sys.stderr else [logging.NullHandler()]
    logging.basicConfig(level=level, handlers=handlers, format="%(message)s")
    threading.stack_size(STACK_SIZE)
    sys.setswitchinterval(SWITCH_INTERVAL)
    if sys.platform != "win32":
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(OSError, ValueError):  # macOS promises more than it grants
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_server(address: Any, mode: int, listener: Optional[socket.socket]) -> Socks5Server:
    """Return a server that listens. Raises SystemExit if it cannot."""
    try:
        return Socks5Server(address, mode=mode, listener=listener)
    except (OSError, TypeError, ValueError, OverflowError) as error:  # bad addresses, too
        where = address if isinstance(address, str) else "%s port %d" % address[:2]
        print("socks5.py: cannot listen on %s: %s" % (ascii(where)[1:-1], describe(error)),
              file=sys.stderr)
        raise SystemExit(1) from None


def choose_address(args: argparse.Namespace, listener: Optional[socket.socket]) -> Any:
    """Return the address to listen on: a path, or a host and a port. Raises ValueError."""
    if listener:
        if args.bind is not None or args.port is not None:
            raise ValueError("systemd passed a socket: do not give an address or a port")
        return listener.getsockname()
    if "/" in (args.bind or ""):
        if args.port is not None:
            raise ValueError("%s is a path: do not give a port" % args.bind)
        return args.bind
    host = HOST if args.bind is None else args.bind
    return host, PORT if args.port is None else args.port


def greet(server: Socks5Server) -> str:
    """Return the first line of output: where the server listens, and what to paste."""
    if isinstance(server.server_address, str):
        path = os.path.abspath(server.server_address)
        return ("Serving SOCKS5 on %s (curl -x socks5h://localhost%s, ssh -L 1080:%s HOST) ..."
                % (server.server_address, path, path))
    address = Address.of(server.server_address)
    return "Serving SOCKS5 on %s port %d (socks5h://%s) ..." % (*address, address)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; return the exit status if it does not serve.

    It takes the process over: it sets signal handlers, limits and the log, and after serving, it
    ends the process.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    parser, arguments = make_parser(), sys.argv[1:] if argv is None else argv
    try:
        args = parser.parse(arguments)
        prepare_process(args.level)
        listener = inherited_socket()
        address = choose_address(args, listener)
        mode = args.mode
        if listener and isinstance(address, str):
            mode = stat.S_IMODE(os.stat(address).st_mode)
        settings = read_settings(args, address, mode)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        print("socks5.py: error: %s\nsee socks5.py --help" % describe(error), file=sys.stderr)
        return 2
    if args.workers > 1 and not hasattr(os, "fork"):
        log.warning("this system has no fork(): serving with one worker")
        args.workers = 1
    server = open_server(address, args.mode, listener)
    server.settings = settings
    try:
        Service(server, args.workers, args.drain,
                lambda: read_settings(parser.parse(arguments), address, mode)).run(greet(server))
    except NoThreadError as error:
        print("socks5.py: cannot start: %s" % describe(error), file=sys.stderr)
    return 1  # `Service.run` returns only by an exception


if __name__ == "__main__":
    sys.exit(main())
