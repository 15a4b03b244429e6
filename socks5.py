#!/usr/bin/env python3
"""A SOCKS5 proxy server in one file, with nothing but the standard library.

Run it:

    python3 socks5.py                          # 127.0.0.1:1080, for this host only
    python3 socks5.py -b :: --users FILE       # every address, for those in FILE
    python3 socks5.py --allow '*:443'          # to port 443 and nowhere else

Embed it, and override what you want to decide yourself:

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
    octets                               <->  octets

What fails before the request ends the session. What fails then is answered by exactly one
reply. After "succeeded" there are only the target's octets, its end (the other direction
goes on) or its reset (passed on as a reset, so that nothing cut short looks whole).

Hooks of `Socks5RequestHandler`:

    select_method(offered)             the method to use, of those that the client offers
    authenticate(username, password)   whether these octets are a user's
    authorize(destination)             whether the client may go there
    connect(destination)               a connected socket, where the rules allow one; a chain
                                       of proxies begins here
    do_CONNECT(destination)            a command; so are do_BIND and do_UDP_ASSOCIATE
    log_message(level, event, fields)  where the log goes

Who may connect at all is for the server's ``verify_request`` to say, as in any ``socketserver``.

Not here: GSSAPI, SOCKS4, encryption. SOCKS5 is clear text, passwords included: carry it
inside ssh or a VPN wherever others can listen. Sections are RFC 1928's unless one says more.
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
    import resource
    import termios

__all__ = ["Address", "AddressType", "Command", "Method", "ProtocolError", "Reply", "Request",
           "RequestError", "Settings", "Socks5RequestHandler", "Socks5Server", "load_users", "main"]
__version__ = "0.1"

log = logging.getLogger("socks5")
TaskQueue = getattr(queue, "SimpleQueue", queue.Queue)  # 3.7 has the simple one
AttemptSelector = getattr(selectors, "PollSelector", selectors.SelectSelector)  # no descriptor
NEVER = float("inf")  # as a number of seconds, or as a moment


# ---- vocabulary --------------------------------------------------------------------------

VERSION = 5        # of the protocol
LOGIN_VERSION = 1  # of the exchange of username and password (RFC 1929)


class Method(enum.IntEnum):
    """Ways for a client to say who it is (section 3)."""
    NO_AUTHENTICATION_REQUIRED = 0x00
    GSSAPI = 0x01
    USERNAME_PASSWORD = 0x02
    NO_ACCEPTABLE_METHODS = 0xFF


class Command(enum.IntEnum):
    """What a client may ask for (section 4)."""
    CONNECT = 0x01
    BIND = 0x02
    UDP_ASSOCIATE = 0x03


COMMAND_NAMES = {int(command): command.name for command in Command}
COMMANDS = {"connect": Command.CONNECT, "udp": Command.UDP_ASSOCIATE, "bind": Command.BIND}


class AddressType(enum.IntEnum):
    """How an address is written (section 5)."""
    IPV4 = 0x01
    DOMAIN_NAME = 0x03
    IPV6 = 0x04


class Reply(enum.IntEnum):
    """What came of a request (section 6); `phrase` is how the RFC puts it."""
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


# ---- failures: they travel up to the handler, which turns them into octets ---------------

class ProtocolError(Exception):
    """The client cannot be served, for this reason: send it `answer`, if any, and hang up."""

    def __init__(self, reason: str, answer: bytes = b"") -> None:
        super().__init__(reason)
        self.answer = answer


class RequestError(Exception):
    """A request failed in a way that has a reply of its own."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.phrase)
        self.reply = reply


REPLIES = {
    errno.EACCES: Reply.NOT_ALLOWED,  # a packet filter of this host refuses
    errno.EPERM: Reply.NOT_ALLOWED,
    errno.ENETUNREACH: Reply.NETWORK_UNREACHABLE,
    errno.EHOSTUNREACH: Reply.HOST_UNREACHABLE,
    errno.ECONNREFUSED: Reply.CONNECTION_REFUSED,
    errno.ETIMEDOUT: Reply.TTL_EXPIRED,  # the nearest there is; Tor and Dante chose it too
}


def reply_for(error: Exception) -> Reply:
    """The reply that tells a client about `error` (section 6)."""
    if isinstance(error, RequestError):
        return error.reply
    if isinstance(error, socket.gaierror):  # its errno belongs to another series of numbers
        return Reply.HOST_UNREACHABLE
    if isinstance(error, socket.timeout):  # it has no errno
        return Reply.TTL_EXPIRED
    return REPLIES.get(getattr(error, "errno", None) or 0, Reply.GENERAL_FAILURE)


# ---- frames: each is drawn as the RFC draws it -------------------------------------------

def read_exactly(stream: Any, count: int) -> bytes:
    """`count` octets, however they arrive; ProtocolError if the stream ends or breaks before."""
    try:
        octets: bytes = stream.read(count)
    except OSError:
        octets = b""
    if len(octets) < count:
        raise ProtocolError("client-left")
    return octets


def read_counted(stream: Any) -> bytes:
    """The octets that follow an octet with their number."""
    return read_exactly(stream, read_exactly(stream, 1)[0])


def read_version(stream: Any, version: int) -> None:
    """VER, which is read alone: another protocol's client may never send a second octet."""
    if read_exactly(stream, 1)[0] != version:
        raise ProtocolError("not-socks5")


# +----+----------+----------+     +----+--------+
# |VER | NMETHODS | METHODS  |     |VER | METHOD |     section 3
# +----+----------+----------+     +----+--------+
# | 1  |    1     | 1 to 255 |     | 1  |   1    |
# +----+----------+----------+     +----+--------+
def read_methods(stream: Any) -> bytes:
    """The methods that the client offers, an octet each."""
    read_version(stream, VERSION)
    return read_counted(stream)


# +----+------+----------+------+----------+     +----+--------+
# |VER | ULEN |  UNAME   | PLEN |  PASSWD  |     |VER | STATUS |     RFC 1929 section 2
# +----+------+----------+------+----------+     +----+--------+
# | 1  |  1   | 1 to 255 |  1   | 1 to 255 |     | 1  |   1    |
# +----+------+----------+------+----------+     +----+--------+
def read_credentials(stream: Any) -> Tuple[bytes, bytes]:
    """User name and password, as octets."""
    read_version(stream, LOGIN_VERSION)
    return read_counted(stream), read_counted(stream)


class Address(NamedTuple):
    """`host`, an IP literal or a name, and `port`.

    A name is whatever the client sent, octets that are no UTF-8 as surrogates; `resolve`
    judges it.
    """
    host: str
    port: int

    # +------+----------+------+
    # | ATYP |   ADDR   | PORT |     section 5: ADDR is 4 or 16 octets, or one octet of
    # +------+----------+------+     length and a name
    # |  1   | Variable |  2   |
    # +------+----------+------+
    @classmethod
    def read(cls, stream: Any) -> "Address":
        """From a frame; RequestError for an unknown address type, whose length is unknown."""
        kind = read_exactly(stream, 1)[0]
        if kind == AddressType.IPV4:
            host = socket.inet_ntop(socket.AF_INET, read_exactly(stream, 4))
        elif kind == AddressType.IPV6:
            host = socket.inet_ntop(socket.AF_INET6, read_exactly(stream, 16))
        elif kind == AddressType.DOMAIN_NAME:
            host = read_counted(stream).decode("utf-8", "surrogateescape")
        else:
            raise RequestError(Reply.ADDRESS_TYPE_NOT_SUPPORTED)
        return cls(host, int.from_bytes(read_exactly(stream, 2), "big"))

    def pack(self) -> bytes:
        """For a frame; OSError for a name, which nothing that we send contains."""
        if ":" in self.host:
            head = bytes([AddressType.IPV6]) + socket.inet_pton(socket.AF_INET6, self.host)
        else:
            head = bytes([AddressType.IPV4]) + socket.inet_pton(socket.AF_INET, self.host)
        return head + self.port.to_bytes(2, "big")

    @classmethod
    def of(cls, sockaddr: Any) -> "Address":
        """From what ``getsockname`` gives; IPv4 mapped into IPv6 as the IPv4 that it is."""
        if not isinstance(sockaddr, tuple):  # a hook's socket can be of any family
            return UNSPECIFIED
        host, port = sockaddr[:2]
        if ":" in host:
            ip = ipaddress.IPv6Address(host.partition("%")[0])
            host = str(ip.ipv4_mapped or ip)
        return cls(host, port)

    def __str__(self) -> str:
        return ("[%s]:%d" if ":" in self.host else "%s:%d") % self[:2]


UNSPECIFIED = Address("0.0.0.0", 0)


# +----+-----+-------+------+----------+----------+
# |VER | CMD |  RSV  | ATYP | DST.ADDR | DST.PORT |     section 4
# +----+-----+-------+------+----------+----------+
# | 1  |  1  | X'00' |  1   | Variable |    2     |
# +----+-----+-------+------+----------+----------+
class Request(NamedTuple):
    """What the client wants. `command` may be a number that `Command` does not have."""
    command: int
    destination: Address

    @classmethod
    def read(cls, stream: Any) -> "Request":
        """From a frame, all of it before any of it is judged."""
        read_version(stream, VERSION)
        command, _reserved = read_exactly(stream, 2)
        return cls(command, Address.read(stream))

    @property
    def command_name(self) -> str:
        """The command's name, or the number of one that has none."""
        return COMMAND_NAMES.get(self.command) or str(self.command)


# +----+-----+-------+------+----------+----------+
# |VER | REP |  RSV  | ATYP | BND.ADDR | BND.PORT |     section 6
# +----+-----+-------+------+----------+----------+
# | 1  |  1  | X'00' |  1   | Variable |    2     |
# +----+-----+-------+------+----------+----------+
def pack_reply(reply: Reply, bound: Address) -> bytes:
    """What came of the request, and the server's address towards the target."""
    return bytes([VERSION, reply, 0]) + bound.pack()


# +----+------+------+----------+----------+----------+
# |RSV | FRAG | ATYP | DST.ADDR | DST.PORT |   DATA   |     section 7
# +----+------+------+----------+----------+----------+
# | 2  |  1   |  1   | Variable |    2     | Variable |
# +----+------+------+----------+----------+----------+
class Datagram(NamedTuple):
    """What a client sends to `address`, or what came from there. `fragment` is 0 if it is whole."""
    fragment: int
    address: Address
    data: bytes

    @classmethod
    def read(cls, stream: Any) -> "Datagram":
        """From a frame, which ends with the stream."""
        fragment = read_exactly(stream, 3)[2]
        return cls(fragment, Address.read(stream), stream.read())

    def pack(self) -> bytes:
        """For a frame."""
        return bytes([0, 0, self.fragment]) + self.address.pack() + self.data


# ---- rules: who may come in, where they may go, and for how long -------------------------

def encode_name(host: str) -> bytes:
    """The octets to ask the resolver for; RequestError if `host` cannot be a host's name.

    The check is ours because CPython up to 3.11 cuts a string at its NUL: for the resolver
    ``localhost\\0.example`` was localhost, for a rule about names it is not.
    """
    try:
        name = host.encode("idna")
    except UnicodeError:  # an empty or long label, or octets that are no text
        name = b""
    if not name or not all(0x21 <= octet <= 0x7E for octet in name):
        raise RequestError(Reply.HOST_UNREACHABLE)
    return name


@functools.lru_cache(maxsize=1024)  # some are asked for again and again
def parse_ip(host: str) -> Any:
    """`host` as an IP address; ValueError if it is none."""
    return ipaddress.ip_address(host)


def is_loopback(host: str) -> bool:
    """Whether nobody but this host can reach `host`, an IP literal or a name."""
    try:
        return bool(parse_ip(host).is_loopback)
    except ValueError:
        return host == "localhost"


def plain_name(host: str) -> bytes:
    """The name `host` as rules see it, b"" if it is an IP literal; RequestError if neither."""
    try:
        parse_ip(host)
        return b""
    except ValueError:
        return encode_name(host).lower().rstrip(b".")


def read_network(text: str) -> Any:
    """An address or a network; ValueError if it is neither, or IPv4 in the disguise of IPv6."""
    network = ipaddress.ip_network(text)
    if getattr(network.network_address, "ipv4_mapped", None):
        raise ValueError("%s: IPv4 has to be written as such" % text)
    return network


def read_host(host: str) -> Tuple[Any, bytes]:
    """What a rule has for a host: a network, or None and a name; ValueError if it is neither."""
    if host == "*":
        return None, b""
    last = host.rstrip(".").rpartition(".")[2]
    if set(host) & set(":/") or last.isdigit() or last[:2] in ("0x", "0X"):
        return read_network(host), b""
    try:
        name = plain_name(host[2:] if host.startswith("*.") else host)
    except RequestError:
        name = b""
    if not name or b"*" in name:
        raise ValueError("no address, network, name, or *.name")
    return None, (b"." if host.startswith("*.") else b"") + name


# A destination's rule is the first that matches. Where none does, it is allowed, or denied if
# there is a rule that allows. Judged is what will be dialed: each address that the resolver
# gave, together with the name that it was asked for.

RULE = re.compile(
    r"(?P<verb>allow|deny) (?:(?P<user>.+)@)?"
    r"(?:\[(?P<bracketed>[^][@]+)\]|(?P<host>[^][@:]+|[^][@:]*:[^][@]*:[^][@]*))"
    r"(?::(?P<first>\d{1,5})(?:-(?P<last>\d{1,5}))?)?")


class Rule(NamedTuple):
    """Allow or deny `user`, "" for anybody, to go to `ports` of a network, or of a name.

    `name` is b"" for any, and begins with a dot if it is a suffix.
    """
    text: str  # for the log
    allows: bool
    user: str
    network: Any
    name: bytes
    ports: range

    @classmethod
    def read(cls, text: str) -> "Rule":
        """From ``allow [USER@]HOST[:PORT[-PORT]]``, or ``deny``; ValueError says what is wrong."""
        match = RULE.fullmatch(text)
        if not match:
            raise ValueError("%r is not allow or deny, and [USER@]HOST[:PORT[-PORT]]" % text)
        first = int(match.group("first") or 0)
        last = int(match.group("last") or match.group("first") or 65535)
        if not first <= last <= 65535:
            raise ValueError("%r: no ports of 0 to 65535" % text)
        try:
            network, name = read_host(match.group("bracketed") or match.group("host"))
        except ValueError as error:
            raise ValueError("%r: %s" % (text, error)) from None
        return cls(text.replace(" ", ":", 1), match.group("verb") == "allow",
                   match.group("user") or "", network, name, range(first, last + 1))

    def matches(self, user: str, name: bytes, ip: Any, port: int) -> bool:
        """Whether it is for `user`, who asked for `name` (b"" for a literal), which is at `ip`.

        While that is not known, None, whether it could be.
        """
        if self.user not in ("", user) or port not in self.ports:
            return False
        if self.network is not None:
            return ip is None or ip in self.network
        return self.name in (b"", name) or (
            self.name.startswith(b".") and (b"." + name).endswith(self.name))


def built_in(*networks: str) -> List[Rule]:
    """Rules that deny `networks`, and say that nobody wrote them."""
    return [Rule.read("deny " + network)._replace(text="built-in:" + network)
            for network in networks]


LINK_LOCAL = built_in("169.254.0.0/16", "fe80::/10")  # a cloud's metadata is there
OWN_HOST = built_in("127.0.0.0/8", "::1", "0.0.0.0", "::")  # the last two reach it as well
ALLOW_REST = [Rule.read("allow *")._replace(text="default")]
DENY_REST = [Rule.read("deny *")._replace(text="default")]


def complete(rules: List[Rule], client: str) -> List[Rule]:
    """`rules`, and those that follow them for a client at this address: the last matches all."""
    own_host = [] if is_loopback(client) else OWN_HOST
    rest = DENY_REST if any(rule.allows for rule in rules) else ALLOW_REST
    return rules + LINK_LOCAL + own_host + rest


def load_users(path: str) -> Dict[str, str]:
    """Passwords by name, from a UTF-8 file that has a line ``name:password`` for each user.

    Blank lines and those that begin with ``#`` are skipped. Raises OSError, or ValueError
    that names the file and the line, but never quotes it.
    """
    users: Dict[str, str] = {}
    with open(path, "rb") as lines:
        for number, octets in enumerate(lines, 1):
            where = "%s, line %d: " % (path, number)
            try:
                line = octets.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError:
                raise ValueError(where + "not UTF-8") from None
            if not line.strip() or line.startswith("#"):
                continue
            name, _, password = line.partition(":")
            if not all(1 <= len(text.encode()) <= 255 for text in (name, password)):
                raise ValueError(where + "not name:password, with 1 to 255 octets each")
            if name in users:
                raise ValueError(where + "a name that stands above already")
            users[name] = password
    if not users:
        raise ValueError("%s: no users in it" % path)
    return users


class Settings:
    """What a server takes for its sessions to come; ValueError if it makes no sense.

    `users`: passwords by name; None serves everybody. `rules`: where they may go, each as
    ``allow [USER@]HOST[:PORT[-PORT]]`` or ``deny …``. `clients`: networks to serve; none serves
    all. `commands`: those to serve. `max_sessions`, `max_per_client`: how many at a time.

    In seconds: `connect_timeout` to find and reach a target, `handshake_timeout` for a client
    to say what it wants, `idle_timeout` without progress (None: for ever), `linger`, the same
    once a side has closed, `bind_timeout` for a peer to connect, and `udp_timeout` without
    datagrams. A client's datagrams are to come to one of `udp_ports`, at `udp_advertise` if
    clients know this host by an address that is not its own.
    """

    def __init__(self, *, users: Optional[Mapping[str, str]] = None, rules: Iterable[str] = (),
                 clients: Iterable[str] = (), commands: Iterable[str] = tuple(COMMANDS),
                 max_sessions: Optional[int] = None, max_per_client: Optional[int] = None,
                 connect_timeout: float = 10.0, handshake_timeout: float = 10.0,
                 idle_timeout: Optional[float] = None, linger: float = 60.0,
                 bind_timeout: float = 60.0, udp_timeout: float = 300.0,
                 udp_ports: Iterable[int] = (0,), udp_advertise: Optional[str] = None) -> None:
        self.users = None if users is None else {
            name.encode(): password.encode() for name, password in users.items()}
        self.rules = [Rule.read(rule) for rule in rules]
        self.clients = [read_network(client) for client in clients]
        self.disabled = set(COMMANDS.values())
        for command in commands:
            if command not in COMMANDS:
                raise ValueError("%r is none of %s" % (command, ", ".join(COMMANDS)))
            self.disabled.discard(COMMANDS[command])
        self.max_sessions = sys.maxsize if max_sessions is None else max_sessions
        self.max_per_client = sys.maxsize if max_per_client is None else max_per_client
        self.connect_timeout, self.handshake_timeout = connect_timeout, handshake_timeout
        self.idle_timeout = NEVER if idle_timeout is None else idle_timeout
        self.linger, self.bind_timeout, self.udp_timeout = linger, bind_timeout, udp_timeout
        self.udp_ports = list(udp_ports)
        if "%" in (udp_advertise or ""):
            raise ValueError("%s: a zone means nothing to others" % udp_advertise)
        self.udp_advertise = udp_advertise and str(ipaddress.ip_address(udp_advertise))


# ---- dialing: a name to addresses, addresses to one connected socket ---------------------
#
# Trying one address after the other waits two minutes for each dead one. So the next attempt
# starts when the last one has failed or has had a quarter of a second, and the first to
# connect wins (RFC 8305, "Happy Eyeballs"). One deadline covers all of it. When all fail,
# the first address's error counts: it is the one that the resolver thinks best.

ATTEMPT_DELAY = 0.25  # seconds before the next attempt (RFC 8305 section 5)
SHORT_WAIT = 0.001    # seconds, because a timeout of 0 would be no wait
LONG_WAIT = 3600.0    # seconds, when there is no next attempt; poll() counts in milliseconds

SocketAddress = Tuple[int, Tuple[Any, ...]]  # a family, and what ``connect`` takes for it
Prepare = Callable[[socket.socket], None]


def look_up(name: bytes, port: int, timeout: float) -> List[SocketAddress]:
    """The addresses of `name`, best first; OSError if the resolver fails or is too slow.

    It knows no deadline of ours, so it is asked in a thread that can be left behind.
    """
    answers: List[Any] = []

    def ask() -> None:
        try:
            answers.append(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise OSError(errno.ENOMEM, "no thread for the resolver") from None
    thread.join(min(timeout, threading.TIMEOUT_MAX))
    answer = answers[0] if answers else socket.timeout("the resolver is too slow")
    if isinstance(answer, Exception):
        raise answer
    return [(info[0], info[4]) for info in answer]


def resolve(destination: Address, deadline: float) -> List[SocketAddress]:
    """The addresses of `destination`, best first, by `deadline` (on the monotonic clock)."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):  # it is no literal of this family
            socket.inet_pton(family, destination.host)
            return [(family, tuple(destination))]
    name = encode_name(destination.host)
    return look_up(name, destination.port, max(0, deadline - time.monotonic()))


def interleave(addresses: List[SocketAddress]) -> List[SocketAddress]:
    """The families in turn, the first address's first (RFC 8305 section 4)."""
    first = [address for address in addresses if address[0] == addresses[0][0]]
    other = [address for address in addresses if address[0] != addresses[0][0]]
    turns = itertools.zip_longest(first, other)
    return [address for turn in turns for address in turn if address]


def start_attempt(address: SocketAddress, prepare: Prepare, patience: float) -> socket.socket:
    """A socket on its way to `address` after `patience` seconds; OSError if it fails in them."""
    sock = socket.socket(address[0], socket.SOCK_STREAM)
    try:
        prepare(sock)
        sock.settimeout(patience)
        sock.connect(address[1])
    except BlockingIOError:
        pass
    except OSError:
        sock.close()
        raise
    return sock


def winner(attempts: selectors.BaseSelector, errors: Dict[int, OSError],
           until: float) -> Optional[socket.socket]:
    """The socket that has connected; None at `until`, or when an attempt has failed."""
    for key, _ in attempts.select(until - time.monotonic()):
        sock: Any = attempts.unregister(key.fileobj).fileobj
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code:
            return sock  # type: ignore[no-any-return]
        errors[key.data] = OSError(code, os.strerror(code))
        sock.close()
    return None


def dial(addresses: List[SocketAddress], deadline: float,
         prepare: Prepare = lambda sock: None) -> socket.socket:
    """A socket connected to one of `addresses` by `deadline` (on the monotonic clock).

    `prepare` is called with each socket before it connects. The one that is returned has a
    timeout: set your own. Raises OSError.
    """
    if len(addresses) == 1:  # it needs no selector, which costs a tenth of a short session
        patience = min(LONG_WAIT, max(SHORT_WAIT, deadline - time.monotonic()))
        return start_attempt(addresses[0], prepare, patience)
    waiting = list(enumerate(interleave(addresses)))
    errors: Dict[int, OSError] = {}
    with AttemptSelector() as attempts:
        try:
            while (waiting or attempts.get_map()) and time.monotonic() < deadline:
                if waiting:
                    number, address = waiting.pop(0)
                    try:
                        sock = start_attempt(address, prepare, 0)
                        attempts.register(sock, selectors.EVENT_WRITE, number)
                    except OSError as error:
                        errors[number] = error
                        continue
                patience = ATTEMPT_DELAY if waiting else LONG_WAIT
                connected = winner(attempts, errors, min(deadline, time.monotonic() + patience))
                if connected:
                    return connected
        finally:
            for key in list(attempts.get_map().values()):
                key.fileobj.close()
    raise errors.get(0) or socket.timeout("no address has answered")


# ---- threads: kept for another job -------------------------------------------------------

IDLE_TIME = 10.0  # seconds for which a thread waits for another job

Job = Callable[[], None]


class ThreadCache:
    """Threads that wait a while for another job when they have done one.

    To start a thread costs more than the rest of a short session. The newest idle thread is
    taken first: those that are not needed are left alone, and leave.
    """

    def __init__(self) -> None:
        self.idle: List[Any] = []  # queues, each with a thread that waits for its next job
        self.threads: Set[threading.Thread] = set()
        self.closed = False

    def start(self, name: str, job: Job) -> Callable[[], bool]:
        """Do `job` in a thread called `name`. What is returned waits until it is done."""
        done = threading.Lock()
        done.acquire()
        try:
            self.idle.pop().put((name, job, done))
        except IndexError:
            thread = threading.Thread(target=self.work, args=((name, job, done),), daemon=True)
            self.threads.add(thread)  # first: a signal may come in between
            try:
                thread.start()
            except RuntimeError:
                self.threads.discard(thread)
                raise
        return done.acquire

    def work(self, task: Any) -> None:
        """The life of a thread: `task`, and others until none comes."""
        thread = threading.current_thread()
        tasks: Any = TaskQueue()
        while task is not None:
            thread.name, job, done = task
            try:
                job()
            except Exception as error:
                log.error("thread failed error=%s", type(error).__name__)
            finally:
                done.release()
            del job, done, task  # or what they refer to stays as long as the thread is idle
            thread.name = "socks5 idle"
            task = self.wait(tasks)

    def wait(self, tasks: Any) -> Any:
        """The next task for the thread of `tasks`; None if it is to leave."""
        self.idle.append(tasks)
        with contextlib.suppress(queue.Empty):
            return tasks.get(block=not self.closed, timeout=IDLE_TIME)
        try:
            self.idle.remove(tasks)
            return None
        except ValueError:  # it was taken out at the last moment
            return tasks.get()

    def forget_dead(self) -> None:
        """Forget the threads that have begun and have left."""
        self.threads -= {thread for thread in list(self.threads)
                         if thread.ident is not None and not thread.is_alive()}

    def close(self) -> None:
        """Have the idle threads leave now, and the others when they have done their job."""
        self.closed = True
        while self.idle:
            self.idle.pop().put(None)


# ---- relaying: two flows, each in a thread, joined when both have ended ------------------
#
# A relay that ends at the first close loses what is on its way in the other direction. Here a
# close is passed on as a half-close, and the other flow goes on. A reset is passed on as a
# reset. Nothing is queued: a flow reads only when its sink has taken what was read before, so
# that a slow reader slows the writer down.

SMALL_BUFFER = 2 * 1024     # octets, for an idle flow
LARGE_BUFFER = 1024 * 1024  # octets, for the busiest; in between, each is 8 times the last
BUSY = 32 * 1024            # octets at a time that keep a flow in the kernel
SPLICE_REFUSED = {errno.EINVAL, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
KEEPALIVE = [  # a peer that has vanished is noticed after 60 + 4 * 15 seconds
    ("TCP_KEEPIDLE", 60), ("TCP_KEEPALIVE", 60),  # the same under Linux and macOS
    ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)]
OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
OPTIONS += [(socket.IPPROTO_TCP, getattr(socket, option), value)
            for option, value in KEEPALIVE if hasattr(socket, option)]


def tune(sock: socket.socket) -> None:
    """Send small pieces at once, and notice when the peer has vanished."""
    with contextlib.suppress(OSError):  # what is wrong with it comes out when it is read
        for option in OPTIONS:
            sock.setsockopt(*option)


def reset_on_close(sock: socket.socket) -> None:
    """Have close() send a reset, not an end."""
    linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def wake(sock: socket.socket, how: int) -> None:
    """Wake the thread that waits on `sock` by a shutdown()."""
    with contextlib.suppress(OSError):  # it has no peer any more
        sock.shutdown(how)


class Flow:
    """Octets in one direction. `read` gives the first of them, perhaps out of a buffer."""

    cpus: Optional[Set[int]] = None  # for flows inside the kernel, if others stay on one CPU

    def __init__(self, source: socket.socket, sink: socket.socket,
                 read: Callable[[int], bytes]) -> None:
        self.source, self.sink, self.first_read = source, sink, read
        self.may_splice = hasattr(os, "splice")  # Linux, from Python 3.10
        self.waiting_on = source
        self.octets = 0  # that the sink has taken
        self.running = True
        self.stopped = False

    def copy(self) -> None:
        """Pass octets on until the source ends; OSError if the source or the sink breaks."""
        buffer = bytearray(SMALL_BUFFER)
        octets = memoryview(self.first_read(SMALL_BUFFER))
        while octets and not self.stopped:
            self.pass_on(octets)
            if len(octets) == len(buffer) < LARGE_BUFFER:
                buffer = bytearray(8 * len(buffer))
            elif len(octets) < len(buffer) // 8:  # it has become quiet
                buffer = bytearray(SMALL_BUFFER)
            if len(buffer) == LARGE_BUFFER and self.may_splice:
                buffer = bytearray(SMALL_BUFFER)
                self.splice()
            count = self.source.recv_into(buffer)
            octets = memoryview(buffer)[:count]

    def splice(self) -> None:
        """Pass octets on inside the kernel, through a pipe, until the flow is quiet or ends.

        What the system refuses (a descriptor, room for the pipe) is left to `copy`.
        """
        pipe: List[int] = []
        piped = 0
        home = self.move_to(self.cpus)
        try:
            pipe += os.pipe()
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, LARGE_BUFFER)
            count = LARGE_BUFFER
            while count >= BUSY and not self.stopped:
                count = piped = os.splice(self.source.fileno(), pipe[1], LARGE_BUFFER)
                self.waiting_on = self.sink
                while piped:
                    moved = os.splice(pipe[0], self.sink.fileno(), piped)
                    piped -= moved
                    self.octets += moved
                self.waiting_on = self.source
        except OSError as error:
            if error.errno not in SPLICE_REFUSED:
                raise
            self.may_splice = False
            if piped:
                self.pass_on(memoryview(os.read(pipe[0], piped)))
        finally:
            self.move_to(home)
            for descriptor in pipe:
                os.close(descriptor)

    @staticmethod
    def move_to(cpus: Optional[Set[int]]) -> Optional[Set[int]]:
        """Let this thread run on `cpus`, unless that is None; where it ran before."""
        if cpus is None:
            return None
        home = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        return home

    def pass_on(self, octets: memoryview) -> None:
        """Wait until the sink has taken `octets`."""
        self.waiting_on = self.sink
        self.sink.sendall(octets)
        self.octets += len(octets)
        self.waiting_on = self.source

    def stop(self) -> None:
        """Have the thread leave; called from another one, and again while it does not.

        No peer is to take this for the other's end, so a sink is shut down only when asked
        again: it is stuck then, and the octets in its queue come before the end.
        """
        wake(self.source, socket.SHUT_RD)
        if self.stopped and self.waiting_on is self.sink:
            wake(self.sink, socket.SHUT_WR)
        self.stopped = True

    def backlog(self) -> int:
        """Octets that the sink has been sent and has not acknowledged, where Linux tells.

        A slow reader's progress is seen here only: sendall() waits for all it was given.
        """
        if sys.platform == "linux" and self.waiting_on is self.sink:
            with contextlib.suppress(OSError, ValueError):
                queued = fcntl.ioctl(self.sink, termios.TIOCOUTQ, bytes(4))
                return int.from_bytes(queued, sys.byteorder)
        return 0


class Relay:
    """Two flows between `client` and `target`. `end` tells who closed first, or who broke it."""

    def __init__(self, client: socket.socket, target: socket.socket,
                 read: Callable[[int], bytes]) -> None:
        self.names = {client: "client", target: "target"}
        self.up = Flow(client, target, read)
        self.down = Flow(target, client, target.recv)
        self.end = ""
        self.broken = False
        self.complete = False  # both ends have been passed on

    def run(self, threads: ThreadCache) -> None:
        """Relay until both flows have ended: one in this thread, one in a second."""
        name = threading.current_thread().name + ", down"
        wait = threads.start(name, lambda: self.carry(self.down, self.up))
        self.carry(self.up, self.down)
        wait()
        self.complete = not self.broken

    def carry(self, flow: Flow, other: Flow) -> None:
        """A thread's life: copy, and pass on the end, or break off."""
        try:
            flow.copy()
            self.pass_on_end(flow, other)
        except Exception as error:  # OSError; MemoryError, where there is none for a buffer
            self.break_off(flow, error)
        finally:
            flow.running = False

    def pass_on_end(self, flow: Flow, other: Flow) -> None:
        """Half-close the sink; OSError if the end was a reset."""
        if self.broken:
            return
        self.end = self.end or self.names[flow.source] + "-closed"
        if other.running:  # or else the sockets are closed next, and need no shutdown()
            # A reset is reported once. If the other thread heard of it while it was sending,
            # this one has read an end. The socket has no peer any more, then; after a real
            # end it has one, as long as the other flow has not ended.
            flow.source.getpeername()
            flow.waiting_on = flow.sink
            flow.running = False  # before the shutdown(), for the sake of the check above
            flow.sink.shutdown(socket.SHUT_WR)

    def break_off(self, flow: Flow, error: Exception) -> None:
        """Wake the other thread, which still delivers what it has."""
        if not self.broken:
            what = "lost" if isinstance(error, TimeoutError) else "reset"
            self.end = "%s-%s" % (self.names[flow.waiting_on], what)
        self.broken = True
        for sock in self.names:
            wake(sock, socket.SHUT_RD)

    def stop(self) -> None:
        """Have both threads leave, from another one."""
        self.broken = True
        self.up.stop()
        self.down.stop()

    @property
    def counts(self) -> Dict[str, int]:
        """Octets that have been taken."""
        return {"up": self.up.octets, "down": self.down.octets}

    @property
    def half_closed(self) -> bool:
        """Whether a flow has ended."""
        return not (self.up.running and self.down.running)

    def progress(self) -> Tuple[int, ...]:
        """Numbers that change when an octet moves or a flow ends."""
        return (self.half_closed, self.up.octets, self.up.backlog(),
                self.down.octets, self.down.backlog())


# ---- associations: datagrams in both directions, as long as the control connection stays --
#
# A stranger's datagrams change nothing: the client is known by its host and its port, and
# answers come from hosts only to which it has sent. Each thread watches the control connection
# beside its socket, and so both end with it.

LONGEST_DATAGRAM = 65535  # octets; UDP carries 65507
LOOKUPS = 8               # names of an association that are looked up at the same time
DESTINATIONS = 4096       # that an association remembers


def open_outside() -> socket.socket:
    """A socket for datagrams to and from both families, or IPv4 where there is no other."""
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    except OSError:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("", 0))
    return sock


class Association:
    """Datagrams between a client, at `inside`, and those to whom it sends, at `outside`.

    `client` is the client's address, its port 0 if the first datagram is to tell. `route` gives
    the address to send to for a destination, or raises RequestError or OSError.
    """

    half_closed = False  # as a Relay can be

    def __init__(self, control: socket.socket, inside: socket.socket, outside: socket.socket,
                 client: Address, route: Callable[[Address], Any]) -> None:
        self.control, self.inside, self.outside = control, inside, outside
        self.client, self.route = client, route
        self.home: Any = None  # where the client's datagrams come from
        self.routes: Dict[Address, Any] = {}
        self.hosts: Set[str] = set()  # to which the client has sent
        self.lookups = threading.BoundedSemaphore(LOOKUPS)
        self.counts: Dict[str, int] = dict.fromkeys(
            ["up", "down", "datagrams_up", "datagrams_down", "dropped"], 0)
        self.end = ""
        self.complete = False

    def run(self, threads: ThreadCache) -> None:
        """Relay until the control connection ends: up in this thread, down in a second."""
        for sock in (self.control, self.inside, self.outside):
            sock.setblocking(False)
        self.threads = threads
        name = threading.current_thread().name + ", down"
        wait = threads.start(name, lambda: self.carry(self.outside, self.take_down))
        try:
            self.carry(self.inside, self.take_up)
        finally:
            wait()
        self.complete = self.end != "error"

    def carry(self, sock: socket.socket, take: Callable[[], None]) -> None:
        """A thread's life: `take` each datagram of `sock`."""
        with AttemptSelector() as selector:
            selector.register(sock, selectors.EVENT_READ, take)
            selector.register(self.control, selectors.EVENT_READ, self.hear)
            try:
                while not self.end:
                    for key, _ in selector.select():
                        self.attempt(key.data)
            finally:
                wake(self.control, socket.SHUT_RD)

    def attempt(self, take: Callable[[], None]) -> None:
        """`take` a datagram, and count it if it cannot be passed on; a bug ends all threads."""
        try:
            take()
        except (OSError, ProtocolError, RequestError):
            self.counts["dropped"] += 1
        except Exception:
            self.end = self.end or "error"
            wake(self.control, socket.SHUT_RD)
            raise

    def hear(self) -> None:
        """Notice the end of the control connection, which has nothing else to say."""
        try:
            if not self.control.recv(SMALL_BUFFER):
                self.control.getpeername()  # fails if the other thread was told of a reset
                self.end = self.end or "client-closed"
        except BlockingIOError:  # the other thread has read it
            pass
        except OSError as error:
            lost = isinstance(error, TimeoutError)
            self.end = self.end or ("client-lost" if lost else "client-reset")

    def take_up(self) -> None:
        """Pass on a datagram of the client. Names must not keep the next ones waiting."""
        octets, source = self.inside.recvfrom(LONGEST_DATAGRAM)
        host, port = Address.of(source)
        if host != self.client.host or port != (self.client.port or port):
            return
        datagram = Datagram.read(io.BytesIO(octets))
        if datagram.fragment:
            raise ProtocolError("fragment")
        self.home, self.client = source, Address(host, port)
        target = self.routes.get(datagram.address)
        if target or not plain_name(datagram.address.host):
            self.send(datagram, target)
        elif self.lookups.acquire(blocking=False):
            try:
                self.threads.start("socks5 look-up", lambda: self.send_to_name(datagram))
            except RuntimeError:
                self.lookups.release()
                raise ProtocolError("no thread") from None
        else:
            raise ProtocolError("too many look-ups")

    def send_to_name(self, datagram: Datagram) -> None:
        """Send `datagram` in a thread that may wait for the resolver."""
        try:
            self.attempt(lambda: self.send(datagram, None))
        finally:
            self.lookups.release()

    def send(self, datagram: Datagram, target: Any) -> None:
        """Send `datagram` to `target`; if that is None, to where it may go."""
        if not target:
            target = self.route(datagram.address)
            if self.outside.family == socket.AF_INET and ":" in target[0]:
                raise RequestError(Reply.NETWORK_UNREACHABLE)
            if self.outside.family == socket.AF_INET6 and ":" not in target[0]:
                target = "::ffff:" + target[0], target[1]
            if len(self.routes) >= DESTINATIONS:
                self.routes.clear()
                self.hosts.clear()
            self.routes[datagram.address] = target
        self.hosts.add(Address.of(target).host)  # first: the answer may be quick
        self.outside.sendto(datagram.data, target)
        self.counts["datagrams_up"] += 1
        self.counts["up"] += len(datagram.data)

    def take_down(self) -> None:
        """Pass on what comes from a host to which the client has sent."""
        octets, source = self.outside.recvfrom(LONGEST_DATAGRAM)
        address = Address.of(source)
        if address.host in self.hosts:
            self.inside.sendto(Datagram(0, address, octets).pack(), self.home)
            self.counts["datagrams_down"] += 1
            self.counts["down"] += len(octets)

    def stop(self) -> None:
        """Have both threads leave: the handler's hang_up() wakes them."""
        self.end = self.end or "stopped"

    def progress(self) -> Tuple[int, ...]:
        """Numbers that change when a datagram is passed on."""
        return self.counts["datagrams_up"], self.counts["datagrams_down"]


# ---- handler: one conversation -----------------------------------------------------------

LOGIN_PAUSE = 1.0      # seconds before a failed login is answered
BACKLOG = 8            # connections that wait for BIND to look at them
EARLY_LIMIT = 65536    # octets of a client to keep while BIND waits
REFUSAL_TIMEOUT = 2.0  # seconds for a client to read why, and leave


class Socks5RequestHandler(socketserver.StreamRequestHandler):
    """One client's conversation. Override its hooks (see above) and pass it to the server."""

    server: "Socks5Server"
    rbufsize = 1024  # octets; no frame has more than 513

    def setup(self) -> None:
        """Begin a session."""
        super().setup()
        self.started = time.monotonic()
        self.sockets = {self.connection}
        self.settings = self.server.settings
        self.relay: Any = None  # a Relay or an Association
        self.early = b""
        self.idle_timeout = self.settings.idle_timeout
        self.progress: Tuple[int, ...] = ()
        self.reply: Optional[Reply] = None
        self.hung_up = False
        self.end = ""
        self.fields: Dict[str, object] = dict.fromkeys(  # of the line in the log
            ["client", "user", "command", "destination", "reached", "reply", "rule"], "")
        client = Address.of(self.client_address)
        self.fields["client"] = client
        self.rules = complete(self.settings.rules, client.host)
        self.enter("handshake", self.settings.handshake_timeout)

    def handle(self) -> None:
        """The conversation, and the one place where failures become octets."""
        with self.server.lock:
            self.server.sessions.add(self)  # from here on, it keeps the deadline
        try:
            self.negotiate()
            request = Request.read(self.rfile)
        except ProtocolError as error:
            self.refuse(error.answer, str(error))
        except RequestError as error:
            self.fail_request(error)
        else:
            self.serve_request(request)

    def finish(self) -> None:
        """End the session: close its sockets, before ``socketserver`` ends them, and log it."""
        self.conclude("error")
        state = self.state()
        self.server.forget(self, state)
        super().finish()
        for sock in self.sockets:
            if self.relay and not self.relay.complete:
                reset_on_close(sock)
            sock.close()
        self.log_message(logging.INFO, "session", dict(state, end=self.end))

    def state(self) -> Dict[str, object]:
        """What there is to say of the session."""
        return dict(
            self.fields,
            reply=self.reply.name if self.reply is not None else "",
            **(self.relay.counts if self.relay else {"up": 0, "down": 0}),
            seconds="%.3f" % (time.monotonic() - self.started))

    def negotiate(self) -> None:
        """Agree on a method (section 3), and have the client log in if it is that one."""
        method = self.select_method(read_methods(self.rfile))
        if method == Method.NO_ACCEPTABLE_METHODS:
            raise ProtocolError("no-acceptable-method", bytes([VERSION, method]))
        self.send(bytes([VERSION, method]))
        if method == Method.USERNAME_PASSWORD:
            self.log_in()

    def select_method(self, offered: bytes) -> int:
        """The method to use. Where there are users, a client must be one."""
        method = (Method.NO_AUTHENTICATION_REQUIRED if self.settings.users is None
                  else Method.USERNAME_PASSWORD)
        return method if method in offered else Method.NO_ACCEPTABLE_METHODS

    def log_in(self) -> None:
        """The exchange of RFC 1929."""
        username, password = read_credentials(self.rfile)
        user = username.decode("utf-8", "surrogateescape")
        if not self.authenticate(username, password):
            self.log_message(logging.WARNING, "login failed",
                             {"client": self.fields["client"], "user": user})
            self.enter("refusal", LOGIN_PAUSE + REFUSAL_TIMEOUT)
            self.server.closing.wait(LOGIN_PAUSE)  # so that guessing takes its time
            raise ProtocolError("login-failed", bytes([LOGIN_VERSION, 1]))
        self.fields["user"] = user
        self.send(bytes([LOGIN_VERSION, 0]))

    def authenticate(self, username: bytes, password: bytes) -> bool:
        """Whether these are a user's. An unknown user takes as long as a wrong password."""
        expected = (self.settings.users or {}).get(username)
        matches = hmac.compare_digest(expected or b"", password)
        return matches and expected is not None

    def serve_request(self, request: Request) -> None:
        """Carry the request out. Exactly one reply comes of it (section 6)."""
        self.fields.update(command=request.command_name, destination=request.destination)
        try:
            self.perform(request)
        except Exception as error:
            self.fail_request(error)

    def perform(self, request: Request) -> None:
        """Find the method for the command, ask `authorize`, and call it."""
        command = getattr(self, "do_" + request.command_name, None)
        if command is None or request.command in self.settings.disabled:
            raise RequestError(Reply.COMMAND_NOT_SUPPORTED)
        if request.command != Command.UDP_ASSOCIATE:  # whose datagrams have destinations, not it
            self.check(request.destination)
        command(request.destination)

    def check(self, destination: Address) -> None:
        """Ask `authorize`; RequestError if it says no."""
        if not self.authorize(destination):
            raise RequestError(Reply.NOT_ALLOWED)

    def fail_request(self, error: Exception) -> None:
        """Turn `error` into the reply. After a reply there is nothing left to say."""
        foreseen = isinstance(error, (RequestError, OSError))
        if self.reply is None:
            self.reply = reply_for(error)
            self.refuse(pack_reply(self.reply, UNSPECIFIED), "refused" if foreseen else "error")
        elif foreseen:
            self.conclude("client-reset")
        if not foreseen:
            raise error

    def authorize(self, destination: Address) -> bool:
        """Whether the client may go to `destination`, as it asked for it."""
        return True

    def do_CONNECT(self, destination: Address) -> None:
        """Connect to `destination` and relay until both sides have closed (section 4)."""
        self.enter("connect", NEVER)  # connect() has a deadline of its own
        target = self.connect(destination)
        self.adopt(target)
        self.exchange(target, Address.of(target.getsockname()))

    def do_BIND(self, destination: Address) -> None:
        """Wait for `destination` to connect, and relay (section 4). There are two replies."""
        self.enter("bind", NEVER)  # as above
        now = time.monotonic()
        hosts = None  # any that the rules allow
        if destination.host not in ("0.0.0.0", "::"):
            addresses = self.permitted(destination, now + self.settings.connect_timeout)
            hosts = {Address.of(address[1]).host for address in addresses}
        listener = self.open_here(socket.SOCK_STREAM, [0])
        listener.listen(BACKLOG)
        listener.setblocking(False)
        with contextlib.suppress(OSError):  # accept() notices that the client has left
            self.wfile.write(pack_reply(Reply.SUCCEEDED, Address.of(listener.getsockname())))
        target, peer = self.accept(listener, hosts, now + self.settings.bind_timeout)
        with self.server.lock:
            listener.close()
        self.exchange(target, Address.of(peer))

    def do_UDP_ASSOCIATE(self, destination: Address) -> None:
        """Relay datagrams (section 7); `destination` is where the client sends them from."""
        inside, outside = self.open_here(socket.SOCK_DGRAM, self.settings.udp_ports), open_outside()
        self.adopt(outside)
        client = Address(Address.of(self.client_address).host, destination.port)
        bound = Address.of(inside.getsockname())
        self.idle_timeout = self.settings.udp_timeout
        self.run_relay(Association(self.connection, inside, outside, client, self.route),
                       Address(self.settings.udp_advertise or bound.host, bound.port))

    def exchange(self, target: socket.socket, bound: Address) -> None:
        """Answer with `bound`, and relay between the client and `target`."""
        target.setblocking(True)
        tune(target)
        with contextlib.suppress(OSError):  # it may be gone already
            self.fields["reached"] = Address.of(target.getpeername())
        self.run_relay(Relay(self.connection, target,
                             lambda size: self.early or self.rfile.read1(size)), bound)

    def run_relay(self, relay: Any, bound: Address) -> None:
        """Answer that the request has succeeded, and relay until the end."""
        answer = pack_reply(Reply.SUCCEEDED, bound)
        self.relay = relay
        self.reply = Reply.SUCCEEDED
        self.wfile.write(answer)
        relay.run(self.server.cache)
        self.conclude(relay.end)

    def connect(self, destination: Address) -> socket.socket:
        """A connected socket, within ``settings.connect_timeout`` seconds; the caller closes it.

        Raises RequestError, or OSError: `reply_for` turns its ``errno`` into a reply.
        """
        deadline = time.monotonic() + self.settings.connect_timeout
        return dial(self.permitted(destination, deadline), deadline, self.adopt)

    def permitted(self, destination: Address, deadline: float) -> List[SocketAddress]:
        """The addresses of `destination` that the rules allow; RequestError if none is left."""
        name = plain_name(destination.host)
        denied = self.foresee(name, destination.port) if name else None
        passed = []
        if not denied:
            for address in resolve(destination, deadline):
                rule = self.rule_for(name, address)
                if rule.allows:
                    passed.append(address)
                else:
                    denied = rule
        if denied and not passed:
            self.fields["rule"] = denied.text
            raise RequestError(Reply.NOT_ALLOWED)
        return passed

    def foresee(self, name: bytes, port: int) -> Optional[Rule]:
        """The rule that denies `name` whatever its addresses are: nobody need look it up."""
        user = str(self.fields["user"])
        for rule in self.rules:
            if rule.matches(user, name, None, port):
                if rule.allows:
                    return None
                if rule.network is None:
                    return rule
        return None

    def route(self, destination: Address) -> Tuple[Any, ...]:
        """Where datagrams for `destination` go; RequestError or OSError if nowhere."""
        self.check(destination)
        deadline = time.monotonic() + self.settings.connect_timeout
        return self.permitted(destination, deadline)[0][1]

    def open_here(self, kind: int, ports: Iterable[int]) -> socket.socket:
        """A socket bound where the client has reached us, to one of `ports`."""
        here = self.connection.getsockname()
        host = Address.of(here).host
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
        self.adopt(sock)
        for port in ports:
            with contextlib.suppress(OSError):
                sock.bind((here[0], port, *here[2:]) if ":" in host else (host, port))
                return sock
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    def accept(self, listener: socket.socket, hosts: Optional[Set[str]],
               deadline: float) -> Tuple[socket.socket, Any]:
        """A connection from one of `hosts`, or from any that the rules allow, and from where.

        Raises OSError at `deadline`, and when the client leaves.
        """
        with AttemptSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(self.connection, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                for key, _ in selector.select(min(LONG_WAIT, deadline - time.monotonic())):
                    if key.fileobj is listener:
                        accepted = self.accept_one(listener, hosts)
                        if accepted:
                            return accepted
                    elif len(self.early) < EARLY_LIMIT:
                        self.read_early()
                    else:
                        selector.unregister(self.connection)
        raise socket.timeout("nobody has connected")

    def accept_one(self, listener: socket.socket,
                   hosts: Optional[Set[str]]) -> Optional[Tuple[socket.socket, Any]]:
        """The connection that waits, and from where; None if it is gone or not wanted."""
        try:
            target, peer = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        wanted = (Address.of(peer).host in hosts if hosts is not None
                  else self.rule_for(b"", (socket.AF_UNSPEC, peer)).allows)
        if not wanted:
            target.close()
            return None
        self.adopt(target)
        return target, peer

    def read_early(self) -> None:
        """Keep for the relay what the client says before there is one; OSError if it has left."""
        octets = b""
        with contextlib.suppress(ConnectionError):
            octets = self.rfile.read1(SMALL_BUFFER)
        if not octets:
            self.conclude("client-left")
            raise ConnectionResetError
        self.early += octets

    def rule_for(self, name: bytes, address: SocketAddress) -> Rule:
        """The rule that decides on `name`, which is at `address`."""
        user, (host, port) = str(self.fields["user"]), Address.of(address[1])
        ip = parse_ip(host)
        return next(rule for rule in self.rules if rule.matches(user, name, ip, port))

    def send(self, octets: bytes) -> None:
        """Send a part of the negotiation."""
        try:
            self.wfile.write(octets)
        except OSError as error:
            raise ProtocolError("client-left") from error

    def refuse(self, answer: bytes, end: str) -> None:
        """Send `answer`, if there is one, and give the client time to read it and leave.

        To close while octets of the client lie unread would send a reset, which can destroy
        the answer on its way.
        """
        self.conclude(end)
        if not answer:
            return
        self.enter("refusal", REFUSAL_TIMEOUT)
        with contextlib.suppress(OSError):
            self.wfile.write(answer)
            self.connection.shutdown(socket.SHUT_WR)
            while not self.hung_up and self.connection.recv(SMALL_BUFFER):
                pass

    def adopt(self, sock: socket.socket) -> None:
        """Make `sock` part of the session, to be woken by `hang_up` and closed at the end."""
        with self.server.lock:
            self.sockets.add(sock)

    def conclude(self, end: str) -> None:
        """Say why the session ends; what is said first stays."""
        self.end = self.end or end

    def enter(self, phase: str, seconds: float) -> None:
        """Begin a phase of the session, or begin it anew; it may last `seconds`."""
        self.entered = time.monotonic()
        self.deadline = self.entered + seconds  # first: the old one may have passed
        self.phase = phase

    def check_deadline(self, now: float) -> None:
        """Hang up if the phase has lasted too long; a relay's progress begins it anew."""
        if self.relay and not self.hung_up and self.relay.progress() != self.progress:
            self.progress = self.relay.progress()
            if self.relay.half_closed:
                self.enter("linger", self.settings.linger)
            else:
                self.enter("idle", self.idle_timeout)
        if now >= self.deadline:
            self.hang_up(self.phase + "-timeout")

    def hang_up(self, end: str) -> None:
        """Have the session's threads leave; called from another one, which holds the lock.

        Called again while they do not: it may have come just before they began to wait.
        """
        self.conclude(end)
        self.hung_up = True
        if self.relay:  # first, or it would take the shutdown() for an end to pass on
            self.relay.stop()
        for sock in self.sockets:
            wake(sock, socket.SHUT_RD)

    def log_message(self, level: int, event: str, fields: Mapping[str, object]) -> None:
        """Log `event` and what is known of it, at a level of `logging`.

        Each value becomes one word of ASCII: nothing from the network can forge a line.
        """
        line = event
        for name, value in fields.items():
            word = str(value).encode("unicode_escape").decode("ascii").replace(" ", "\\x20")
            line += " %s=%s" % (name, word or "-")
        log.log(level, "%s", line)


# ---- server: who is here, and until when -------------------------------------------------

SWEEP_INTERVAL = 0.5     # seconds between two looks at the deadlines
CLOSING_INTERVAL = 0.05  # seconds between two calls to leave
EXHAUSTION_PAUSE = 0.1   # seconds to wait for room for another client
WARNING_INTERVAL = 1.0   # seconds between two warnings of a kind
NOTICE = 25              # a level of logging: nothing is wrong, but somebody has asked
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
SPARE_DESCRIPTORS = 16   # for what is not a session's


def session_limit() -> int:
    """How many sessions this process has descriptors for: each needs two."""
    if sys.platform == "win32":
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, (limit - SPARE_DESCRIPTORS) // 2)


class Socks5Server(socketserver.ThreadingTCPServer):
    """A SOCKS5 proxy that serves each client in a thread of its own.

    `server_address` is a host and a port; ``::`` serves both families. What else it takes are
    `Settings`. Give its `settings` others at any time: sessions that are open keep theirs.

    ``serve_forever`` keeps the deadlines. ``server_close``, or the end of a ``with`` block,
    ends the sessions and waits for their threads; one that waits for the system's resolver
    cannot be woken, and takes up to `connect_timeout`.

    For thousands of sessions, do what `main` does, and this class leaves to you: raise the
    limit on descriptors, make the threads' stacks small, and have ``sys.setswitchinterval``
    set a long interval. A thread that waits for the interpreter wakes as often, in vain.
    """

    allow_reuse_address = os.name == "posix"  # elsewhere it lets another take our port
    request_queue_size = 1024

    def __init__(self, server_address: Tuple[str, int],
                 RequestHandlerClass: Callable[..., Any] = Socks5RequestHandler, *,
                 bind_and_activate: bool = True, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.lock = threading.Lock()  # while it is held, sessions keep their sockets open
        self.sessions: Set[Socks5RequestHandler] = set()
        self.guests: Dict[Any, str] = {}  # hosts by socket: clients, from accepted to closed
        self.guest_left = threading.Condition(self.lock)
        self.totals: Dict[str, int] = collections.Counter()
        self.cache = ThreadCache()
        self.room = session_limit()
        self.next_sweep = 0.0
        self.next_warning: Dict[str, float] = {}  # by what they say
        self.closed = False  # to clients
        self.closing = threading.Event()
        if ":" in server_address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(server_address, RequestHandlerClass, bind_and_activate)

    def server_bind(self) -> None:
        """Bind, to both families if the address is ``::``."""
        if self.server_address[0] == "::":
            with contextlib.suppress(AttributeError, OSError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()
        tune(self.socket)  # the clients' sockets inherit it

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept a client. If there is no room for it, wait: ``socketserver`` would not."""
        try:
            if len(self.guests) >= self.room:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().get_request()
        except OSError as error:
            if error.errno in EXHAUSTED:
                self.warn("clients have to wait: %s", error.strerror)
                time.sleep(EXHAUSTION_PAUSE)
            self.closed = self.closed or error.errno == errno.EINVAL  # by `stop_accepting`
            raise

    def warn(self, message: str, *args: object) -> None:
        """Log a warning, unless one of this kind was logged just before."""
        if time.monotonic() >= self.next_warning.get(message, 0):
            self.next_warning[message] = time.monotonic() + WARNING_INTERVAL
            log.warning(message, *args)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether to serve a client: who it is, and how many there are; if not, say why."""
        client, settings = Address.of(client_address), self.settings
        ip = parse_ip(client.host)
        if settings.clients and not any(ip in network for network in settings.clients):
            log.warning("client refused client=%s", client)
        elif len(self.guests) >= settings.max_sessions:
            self.warn("too many sessions client=%s", client)
        elif (settings.max_per_client < sys.maxsize
                and list(self.guests.values()).count(client.host) >= settings.max_per_client):
            self.warn("too many sessions of a client client=%s", client)
        else:
            return True
        return False

    def shutdown_request(self, request: Any) -> None:
        """Close a client's connection, whatever came of it."""
        super().shutdown_request(request)
        with self.guest_left:
            self.guests.pop(request, None)
            self.guest_left.notify_all()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a session in a thread of its own."""
        self.guests[request] = Address.of(client_address).host
        self.cache.start("socks5 client %s:%d" % client_address[:2],
                         lambda: self.process_request_thread(request, client_address))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what nobody foresaw: its type only, its text may hold anything."""
        kind = sys.exc_info()[0] or Exception
        log.error("session failed client=%s error=%s", Address.of(client_address),
                  kind.__name__, exc_info=log.isEnabledFor(logging.DEBUG))

    def service_actions(self) -> None:
        """Hang up on the sessions past their deadline. ``serve_forever`` calls it often."""
        now = time.monotonic()
        if now < self.next_sweep:
            return
        self.next_sweep = now + SWEEP_INTERVAL
        self.cache.forget_dead()
        with self.lock:
            for session in self.sessions:
                session.check_deadline(now)

    def forget(self, session: Socks5RequestHandler, state: Mapping[str, Any]) -> None:
        """Leave `session` alone from here on, and keep its numbers."""
        with self.lock:
            self.sessions.discard(session)
            for name, number in [("sessions", 1), ("up", state["up"]), ("down", state["down"]),
                                 (session.end, 1)]:
                self.totals[name] += number

    def report(self) -> None:
        """Log the live sessions, and the totals of those that have ended."""
        with self.lock:
            sessions, totals = list(self.sessions), dict(self.totals)
        for session in sessions:
            idle = "%.3f" % (time.monotonic() - session.entered)
            session.log_message(NOTICE, "live", dict(
                session.state(), idle=idle, phase=session.phase))
        log.log(NOTICE, "totals live=%d%s", len(sessions), "".join(
            " %s=%d" % total for total in totals.items()))

    def stop_accepting(self) -> None:
        """Stop listening, in all processes, and wake those that wait in accept()."""
        self.closed = True
        wake(self.socket, socket.SHUT_RD)

    def drain(self, seconds: float) -> None:
        """Wait until the sessions have ended, `seconds` at most. Call `shutdown` before."""
        with self.guest_left:
            self.guest_left.wait_for(lambda: not self.guests, seconds)

    def server_close(self) -> None:
        """Stop listening, end the sessions, and wait until their threads have left."""
        self.closed = True
        self.closing.set()
        super().server_close()
        self.cache.close()
        while any(thread.is_alive() for thread in list(self.cache.threads)):
            with self.lock:
                for session in self.sessions:
                    session.hang_up("server-closed")
            for thread in list(self.cache.threads):
                if thread.is_alive():
                    thread.join(CLOSING_INTERVAL)


# ---- service: what signals say to a server, and to workers that share its socket ---------

SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 3.0  # seconds before a worker is replaced
WAITING_SIGNALS = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2")
                   if hasattr(signal, name)]
SETTLED = 5.0  # seconds; a worker that dies sooner makes the next pause twice as long


def usable_cpus() -> List[int]:
    """The CPUs that this process may run on, by number."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def stay_on_one_cpu(number: int) -> None:
    """Run this thread, and those that it starts, on one CPU: they take turns in any case.

    On several CPUs, each system call of a thread is an occasion for all others to be woken
    there and to ask for the interpreter, in vain. Flows that are busy inside the kernel ask
    for nothing, and spread. A build without the global lock has no such turns.
    """
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    if has_lock and hasattr(os, "sched_setaffinity"):
        cpus = usable_cpus()
        Flow.cpus = set(cpus)
        os.sched_setaffinity(0, {cpus[number % len(cpus)]})


def accept_forever(server: Socks5Server) -> None:
    """Accept clients on a socket that other processes accept on too.

    Of all who wait in accept() for a client, the kernel wakes one, in turn; of all who wait
    in a selector, it would wake each.
    """
    while not server.closed:
        server._handle_request_noblock()  # type: ignore[attr-defined] # public but for its name


def sweep_until_orphaned(server: Socks5Server, parent: int) -> None:
    """Keep the deadlines of `server`. When the pipe `parent` has no writer any more, stop it."""
    with AttemptSelector() as selector:
        selector.register(parent, selectors.EVENT_READ)
        while not selector.select(SWEEP_INTERVAL):
            server.service_actions()
    server.stop_accepting()
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        server.service_actions()
        time.sleep(SWEEP_INTERVAL)


def announce(line: str) -> None:
    """Print `line`. A full disk or a closed pipe is no reason not to serve."""
    try:
        print(line, flush=True)
    except OSError:  # nor to fail at exit, when what was not written would be tried again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Service:
    """A server that obeys signals, in this process, or in workers that this one keeps up.

    The parent of workers keeps the socket open and leaves it to them: a client that is in its
    queue when a worker dies is served by another one. Signals are blocked and waited for: one
    that came just before a system call would be overslept, and handlers could not take locks.
    SIGINT and SIGTERM stop accepting, and let sessions go on for `drain` seconds; the second
    one ends them. SIGHUP takes what `read_settings` gives now. SIGUSR1 reports. SIGUSR2 is how
    a process tells itself or its workers to end, SIGALRM how it reminds itself to try again.
    """

    def __init__(self, server: Socks5Server, workers: int, drain: float,
                 read_settings: Callable[[], Settings]) -> None:
        self.server, self.wanted, self.drain = server, workers, drain
        self.read_settings = read_settings
        self.workers: Dict[int, Tuple[int, float]] = {}  # by process: number, and when started
        self.pause = 0.0
        self.pipe = os.pipe()
        self.owner, self.thread = os.getpid(), threading.get_ident()
        self.stopping = False
        self.has_terminal = os.isatty(0)
        self.signals = {signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM, *WAITING_SIGNALS}
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self.signals.add(signal.SIGINT)

    def run(self, greeting: str) -> None:
        """Announce `greeting` as soon as signals are obeyed, and serve until they end it."""
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # or it would be dropped
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        announce(greeting)
        if self.wanted == 1:
            self.work(os.getpid())
        else:
            self.start_missing()
            self.obey()

    def work(self, number: int) -> None:
        """Serve in this process, after `pause` seconds, on a CPU by `number`."""
        self.wanted = 0
        stay_on_one_cpu(number)
        for thread in (threading.Timer(self.pause, accept_forever, (self.server,)),
                       threading.Thread(target=sweep_until_orphaned,
                                        args=(self.server, self.pipe[0]))):
            thread.daemon = True
            thread.start()
        self.obey()
        self.server.server_close()

    def obey(self) -> None:
        """Carry out what signals say, until there is nothing left to serve."""
        while True:
            number = signal.sigwait(self.signals)
            if number in (signal.SIGCHLD, signal.SIGALRM):
                self.replace_dead()
            elif number == signal.SIGUSR1:
                self.pass_on(number) if self.workers else self.server.report()
            elif number == signal.SIGHUP and os.isatty(0) == self.has_terminal:
                self.reload()
            elif number == signal.SIGUSR2:
                return
            elif not self.stopping:
                self.stop()
            elif os.getppid() != self.owner:  # or else it is the parent who decides
                self.end()

    def reload(self) -> None:
        """Take new settings, here and in the workers, if they are right."""
        try:
            self.server.settings = self.read_settings()
        except (OSError, ValueError, RecursionError, SystemExit) as error:  # the last by --help
            log.warning("settings are as before: %s", error)
        else:
            log.log(NOTICE, "settings have been read again")
            self.pass_on(signal.SIGHUP)

    def stop(self) -> None:
        """Stop accepting, and end when the sessions have, or the workers."""
        self.stopping = self.server.closed = True
        if os.getpid() == self.owner:  # a worker that is to end alone leaves the socket to others
            self.server.stop_accepting()
            announce("Interrupted, ending.")
        self.pass_on(signal.SIGTERM)
        if not self.workers:
            threading.Thread(target=self.end_when_drained, daemon=True).start()

    def end_when_drained(self) -> None:
        """End this process when no session is left, or no time."""
        self.server.drain(self.drain)
        self.end()

    def end(self) -> None:
        """End at once: the workers, and this process after them."""
        self.pass_on(signal.SIGUSR2)
        if not self.workers:
            signal.pthread_kill(self.thread, signal.SIGUSR2)

    def pass_on(self, number: int) -> None:
        """Send the signal to the workers."""
        for process in self.workers:
            os.kill(process, number)

    def replace_dead(self) -> None:
        """Start a worker for each that has died; if one has not lived long, after a pause."""
        dead = [process for process in self.workers if os.waitpid(process, os.WNOHANG)[0]]
        started = [self.workers.pop(process)[1] for process in dead]
        if self.stopping:
            if dead and not self.workers:
                self.end()
            return
        if dead:
            settled = time.monotonic() - max(started) > SETTLED
            self.pause = SHORTEST_PAUSE if settled else min(
                max(2 * self.pause, SHORTEST_PAUSE), LONGEST_PAUSE)
            log.warning("worker %s has died: starting another in %g s",
                        ", ".join(map(str, dead)), self.pause)
        self.start_missing()

    def start_missing(self) -> None:
        """Start the workers that there should be, and try later if the system has no room."""
        running = {number for number, _ in self.workers.values()}
        for number in sorted({*range(self.wanted)} - running):
            try:
                self.start_worker(number)
            except OSError as error:
                log.warning("no worker can be started: %s", error.strerror)
                signal.alarm(int(LONGEST_PAUSE))

    def start_worker(self, number: int) -> None:
        """Start a worker; OSError if there is no room for another process."""
        process = os.fork()
        if process:
            self.workers[process] = number, time.monotonic()
            return
        try:
            os.close(self.pipe[1])
            self.workers.clear()
            self.work(self.owner + number)
        except Exception as error:
            log.error("worker failed error=%s", type(error).__name__,
                      exc_info=log.isEnabledFor(logging.DEBUG))
        finally:
            os._exit(0)


# ---- command line ------------------------------------------------------------------------

SETTINGS = list(Settings.__init__.__kwdefaults__ or ())  # the options are named alike
STACK_SIZE = 256 * 1024  # octets, for each thread
SWITCH_INTERVAL = 1.0    # seconds; each thread that waits for the interpreter wakes as often


class Parser(argparse.ArgumentParser):
    """Options, from @FILE too, as a shell would read them; ValueError for what makes no sense."""

    def convert_arg_line_to_args(self, arg_line: str) -> List[str]:
        return shlex.split(re.sub(r"(^|\s)#.*", "", arg_line))

    def error(self, message: str) -> Any:
        raise ValueError(message)


def number(convert: Callable[[str], float], least: float, most: float) -> Callable[[str], Any]:
    """`convert`, for argparse. What is no number is not quoted: it might be a password."""
    def converted(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= convert(text) <= most:
                return convert(text)
        raise argparse.ArgumentTypeError("not a number in %g to %g" % (least, most))
    return converted


amount = number(int, 1, 1e6)
seconds = number(float, 0.001, 1e9)


def port_range(text: str) -> Iterable[int]:
    """FIRST-LAST, for argparse."""
    first, last = map(number(int, 1, 65535), text.split("-"))
    if first > last:
        raise argparse.ArgumentTypeError("%s has no ports" % text)
    return range(first, last + 1)


def worker_count(text: str) -> int:
    """A number of workers, for argparse."""
    return len(usable_cpus()) if text == "auto" else int(amount(text))


def add_permissions(add: Callable[..., Any]) -> None:
    """Who may come, where they may go, and how many."""
    add("--users", metavar="FILE",
        help="serve the users in FILE only, which has a line name:password for each")
    add("--client", metavar="NETWORK", dest="clients", action="append", default=[],
        help="serve the clients in NETWORK only, and in those of further --client")
    add("--open", action="store_true", help="serve everybody who can reach ADDRESS")
    add("--allow", metavar="RULE", dest="rules", action="append", type="allow {}".format,
        default=[], help="let clients go to RULE, which is [USER@]HOST[:PORT[-PORT]]; of --allow "
        "and --deny, the first that matches decides, and with any --allow the rest is denied")
    add("--deny", metavar="RULE", dest="rules", action="append", type="deny {}".format,
        help="do not let clients go to RULE")
    add("--max-sessions", metavar="N", type=amount,
        help="sessions at a time, in each worker; who comes then is closed at once "
        "(default: what there are descriptors for, and who comes then waits)")
    add("--max-per-client", metavar="N", type=amount,
        help="the same, for each client's address (default: any number)")


def add_times(add: Callable[..., Any]) -> None:
    """How long things may take."""
    add("--connect-timeout", metavar="S", type=seconds, default=10.0,
        help="seconds to find and reach a target (default: %(default)g)")
    add("--handshake-timeout", metavar="S", type=seconds, default=10.0,
        help="seconds for a client to say what it wants (default: %(default)g)")
    add("--idle-timeout", metavar="S", type=seconds,
        help="seconds without progress that end a session (default: never)")
    add("--linger", metavar="S", type=seconds, default=60.0,
        help="the same once a side has closed (default: %(default)g)")
    add("--bind-timeout", metavar="S", type=seconds, default=60.0,
        help="seconds for BIND to wait for a connection (default: %(default)g)")
    add("--udp-timeout", metavar="S", type=seconds, default=300.0,
        help="seconds without datagrams that end an association (default: %(default)g)")
    add("--drain", metavar="S", type=number(float, 0, 1e9), default=5.0,
        help="seconds for which sessions may go on after a signal to stop (default: %(default)g)")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="socks5.py", description="A SOCKS5 proxy server (RFC 1928, RFC 1929).",
        epilog="@FILE stands for the options in FILE, one a line; # begins a comment.",
        fromfile_prefix_chars="@", allow_abbrev=False)
    add = parser.add_argument
    add("port", nargs="?", type=number(int, 0, 65535), default=1080,
        help="port to serve on, 0 for any that is free (default: %(default)s)")
    add("--version", action="version", version="socks5.py " + __version__)
    add("-b", "--bind", metavar="ADDRESS", default="127.0.0.1",
        help="address to serve on, 0.0.0.0 for all of IPv4, :: for all (default: %(default)s)")
    add_permissions(add)
    add_times(add)
    add("--udp-ports", metavar="FIRST-LAST", type=port_range, default=(0,),
        help="ports for the clients' datagrams (default: any that is free)")
    add("--udp-advertise", metavar="ADDRESS",
        help="address to which clients are to send datagrams (default: where they connected)")
    add("--commands", metavar="LIST", default=",".join(COMMANDS),
        help="commands to serve (default: %(default)s)")
    add("--workers", metavar="N", type=worker_count, default=1,
        help="processes to serve with, auto for one on each CPU (default: %(default)s)")
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", dest="level", action="store_const", default=logging.INFO,
                        const=NOTICE, help="log what is wrong, but not each session")
    volume.add_argument("-v", "--verbose", dest="level", action="store_const",
                        const=logging.DEBUG, help="log tracebacks too")
    return parser


def raise_descriptor_limit() -> None:
    """Take all the descriptors that we may have: a session needs two."""
    if sys.platform != "win32":
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(OSError, ValueError):  # macOS promises more than it grants
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def read_settings(args: argparse.Namespace) -> Settings:
    """The settings of `args`, and of the files that they name.

    Raises OSError, or ValueError if they make no sense, or would serve everybody unasked.
    """
    users = None
    if args.users is not None:
        users = load_users(args.users)
        if os.name == "posix" and os.stat(args.users).st_mode & stat.S_IROTH:
            log.warning("others can read %s: chmod o-r it", args.users)
    if users is None and not args.clients and not args.open and not is_loopback(args.bind):
        raise ValueError(
            "on %s everybody could use this proxy: name your users with --users FILE, or your "
            "clients with --client NETWORK, or say --open if that is what you want" % args.bind)
    named_alike = {name: getattr(args, name) for name in SETTINGS}
    settings = Settings(**dict(named_alike, users=users, commands=args.commands.split(",")))
    for rule in settings.rules:
        if rule.user and rule.user not in (users or {}):
            raise ValueError("%r: there is no such user" % rule.text)
    return settings


def serve(args: argparse.Namespace, settings: Settings,
          read_again: Callable[[], Settings]) -> int:
    """Serve until a signal comes; the exit status."""
    try:
        server = Socks5Server((args.bind, args.port))
    except (OSError, TypeError, ValueError) as error:  # the last two for what is no address
        print("socks5.py: cannot serve on %s port %d: %s" % (
            ascii(args.bind)[1:-1], args.port, getattr(error, "strerror", None) or error),
            file=sys.stderr)
        return 1
    server.settings = settings
    address = Address.of(server.server_address)
    greeting = "Serving SOCKS5 on %s port %d (socks5h://%s) ..." % (*address, address)
    with server:
        if hasattr(signal, "pthread_sigmask"):
            Service(server, args.workers, args.drain, read_again).run(greeting)
            return 0
        announce(greeting)
        if args.workers > 1:
            log.warning("this system has no fork(): serving with one worker")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.socket.close()
            server.drain(args.drain)
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command, in a process of its own; its exit status."""
    parser = make_parser()
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, WAITING_SIGNALS)  # until there is a server
    try:
        args = parser.parse_args(argv)
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=args.level)
        logging.addLevelName(NOTICE, "NOTICE")
        logging.raiseExceptions = False  # a log that cannot be written stops nobody
        settings = read_settings(args)
    except (OSError, ValueError, RecursionError) as error:
        argparse.ArgumentParser.error(parser, str(error))
    raise_descriptor_limit()
    threading.stack_size(STACK_SIZE)
    sys.setswitchinterval(SWITCH_INTERVAL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    fixed = {"bind": args.bind, "port": args.port}  # where it serves, whatever a file says later
    with contextlib.suppress(KeyboardInterrupt):
        return serve(args, settings, lambda: read_settings(argparse.Namespace(
            **dict(vars(parser.parse_args(argv)), **fixed))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
