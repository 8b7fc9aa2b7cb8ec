"""Second, simple implementations of the relay's parsers, without `re`. They are called readings.

atheris instruments this module too. So an input that reaches another branch of a grammar is kept.
The regular expressions of the relay have no branches that atheris sees.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import socket
import string
import struct
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple, Union

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

WORD_BYTES = frozenset((string.ascii_letters + string.digits + "_").encode())


def number_reading(text: str, highest: int, digits: str = string.digits) -> int | None:
    """Return a number of at most 15 digits and at most `highest`, or None."""
    if not 1 <= len(text) <= 15 or not set(text) <= set(digits):
        return None
    number = 0
    for digit in text:
        number = number * len(digits) + digits.index(digit)
    return number if number <= highest else None


# The handshake line.


def handshake_reading(line: bytes) -> tuple[bytes, bytes | None] | None:
    """Return the token and the side of a line without its newline, or None."""
    words = line.split(b" ")
    if words[:2] != [b"please", b"relay"]:
        return None
    if len(words) == 3:
        token, side = words[2], None
    elif len(words) == 6 and words[3] == b"for" and words[4] == b"side":
        token, side = words[2], words[5]
        if len(side) != 16 or not WORD_BYTES.issuperset(side):
            return None
    else:
        return None
    if len(token) != 64 or not WORD_BYTES.issuperset(token):
        return None
    return token, side


# Endpoints.

FIELDS_OF_KINDS = {
    "tcp": ["port", "interface", "backlog"],
    "tcp6": ["port", "interface", "backlog"],
    "unix": ["address", "mode", "backlog", "lockfile"],
    "systemd": ["domain", "name", "index"],
    "fd": ["fileno"],
}
HIGHEST = {
    "port": 65535,
    "backlog": 2147483647,
    "mode": 511,
    "lockfile": 1,
    "index": 65535,
    "fileno": 2147483647,
}


def fields_reading(text: str) -> list[tuple[str | None, str]]:
    """Return the names and values between the colons, without the backslashes that escape.

    A name is None if there is no `=`.
    """
    # The characters of each field. One that is escaped has its backslash before it here.
    fields_of_text: list[list[str]] = [[]]
    at = 0
    while at < len(text):
        size = 2 if text[at] == "\\" else 1
        character = text[at : at + size]
        at += size
        if character == ":":
            fields_of_text.append([])
        else:
            fields_of_text[-1].append("\\\\" if character == "\\" else character)
    fields: list[tuple[str | None, str]] = []
    for characters in fields_of_text:
        name = None
        if "=" in characters:
            border = characters.index("=")
            name = "".join(one[-1] for one in characters[:border])
            characters = characters[border + 1 :]
        fields.append((name, "".join(one[-1] for one in characters)))
    return fields


def endpoint_reading(text: str) -> dict[str, object] | None:
    """Return the fields of an Endpoint, without its text and role. None: it is invalid."""
    start = "haproxy:"
    is_proxied = text[: len(start)] == start
    if is_proxied:
        text = text[len(start) :]
    if text and set(text) <= set(string.digits):
        text = "tcp:" + text
    (label, kind), *fields = fields_reading(text)
    if label is not None or not fields or kind not in FIELDS_OF_KINDS:
        return None
    unnamed = list(FIELDS_OF_KINDS[kind])
    found: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for name, value in fields:
        if name is None:
            if not unnamed:
                return None
            name = unnamed.pop(0)
        if name not in FIELDS_OF_KINDS[kind] or name in found:
            return None
        found[name] = value
        if name in HIGHEST:
            digits = string.octdigits if name == "mode" else string.digits
            number = number_reading(value, HIGHEST[name], digits)
            if number is None:
                return None
            numbers[name] = number
    if kind in ("tcp", "tcp6"):
        if "port" not in found:
            return None
    elif kind == "unix":
        if not found.get("address"):
            return None
    elif kind == "systemd":
        if found.get("domain") not in (None, "INET", "INET6", "UNIX"):
            return None
        if len({"name", "index"} & set(found)) != 1:
            return None
    return {
        "kind": kind,
        "port": numbers.get("port", 0),
        "interface": found.get("interface") or ("::" if kind == "tcp6" else ""),
        "backlog": max(1024, numbers.get("backlog", 1024)),
        "path": found.get("address", ""),
        "mode": numbers.get("mode", 0o666),
        "name": found.get("name"),
        "position": numbers.get("index"),
        "fileno": numbers.get("fileno", -1),
        "has_proxy_header": is_proxied,
    }


# PROXY headers.

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def proxy_reading(data: bytes) -> tuple[str | None, int] | None:
    """Return the source address in a header, and the header's size. None: there is no header.

    The address is None if the header has none.
    """
    if data[:12] == SIGNATURE:
        return proxy_2_reading(data)
    end = data.find(b"\r\n")
    if end < 0 or end + 2 > 107:
        return None
    line = data[:end].decode("latin-1")
    words = line.split(" ")
    if words[:2] == ["PROXY", "UNKNOWN"]:
        return None, end + 2
    if len(words) != 6 or words[0] != "PROXY" or words[1] not in ("TCP4", "TCP6"):
        return None
    for address in words[2:4]:
        if "%" in address or len(address) > 39:
            return None
        found = address_reading(address, unmap=False)
        if found is None or found.version != int(words[1][3:]):
            return None
    for port in words[4:]:
        number = number_reading(port, 65535)
        if number is None or str(number) != port:
            return None
    return words[2], end + 2


def proxy_2_reading(data: bytes) -> tuple[str | None, int] | None:
    """Return the same for a header of version 2."""
    if len(data) < 16:
        return None
    command, family, length = struct.unpack_from("!BBH", data, 12)
    if length > 4096 - 16 or len(data) < 16 + length or command not in (0x20, 0x21):
        return None
    source = None
    if command == 0x21:
        if family >> 4 > 3 or family & 15 > 2:
            return None
        if family in (0x11, 0x12):
            if length < 12:
                return None
            source = socket.inet_ntop(socket.AF_INET, data[16:20])
        elif family in (0x21, 0x22):
            if length < 36:
                return None
            source = str(ipaddress.IPv6Address(data[16:32]))
    return source, 16 + length


def can_become_proxy_header(start: bytes) -> bool:
    """Return whether `start`, which has no whole header, can be the start of one.

    Of the addresses in version 1, only the characters and the lengths are checked.
    """
    if start[:1] == b"\r":
        return can_become_proxy_2(start)
    line = start[:-1] if start[-1:] == b"\r" else start
    unknown = b"PROXY UNKNOWN"
    if line == start and unknown[: len(line)] == line:
        return True
    if line[: len(unknown)] == unknown:
        is_separated = line[len(unknown) : len(unknown) + 1] in (b"", b" ")
        return is_separated and b"\r\n" not in line and len(line) <= 105
    words = line.decode("latin-1").split(" ")
    texts = ("PROXY", "TCP6" if words[1:2] == ["TCP6"] else "TCP4")
    most = 39 if texts[1] == "TCP6" else 15
    digits = string.hexdigits + ":." if texts[1] == "TCP6" else string.digits + "."
    for number, word in enumerate(words):
        is_last = number == len(words) - 1 and line == start
        if number < 2:
            if word != texts[number] and not (is_last and texts[number].startswith(word)):
                return False
        elif not word and not is_last:
            return False
        elif number < 4:
            if len(word) > most or not set(word) <= set(digits):
                return False
        elif word and str(number_reading(word, 65535)) != word:
            return False
    return len(words) == 6 or (len(words) < 6 and line == start)


def can_become_proxy_2(start: bytes) -> bool:
    """Return whether `start` can be the start of a header of version 2."""
    if SIGNATURE[: len(start)] != start[:12]:
        return False
    if len(start) > 12 and start[12] not in (0x20, 0x21):
        return False
    is_proxied = start[12:13] == b"\x21"
    if is_proxied and len(start) > 13 and (start[13] >> 4 > 3 or start[13] & 15 > 2):
        return False
    if len(start) > 14 and start[14] > 15:
        return False
    if len(start) < 16:
        return True
    size = 16 + int.from_bytes(start[14:16], "big")
    least = {0x11: 28, 0x12: 28, 0x21: 52, 0x22: 52}.get(start[13], 16) if is_proxied else 16
    return least <= size <= 4096 and len(start) < size


# Addresses and networks, by the module ipaddress.


def address_reading(text: str, unmap: bool = True) -> Address | None:
    """Return an address without its scope id. With `unmap`, an IPv4-mapped one is an IPv4 one."""
    try:
        if ":" not in text:
            return ipaddress.IPv4Address(text)
        found = ipaddress.IPv6Address(text.partition("%")[0])
    except ValueError:
        return None
    return found.ipv4_mapped or found if unmap else found


def network_reading(text: str) -> Network | str | None:
    """Return the network that a value of `--allow` names, "unix", or None."""
    if text == "unix":
        return text
    host, slash, length = text.partition("/")
    address = None if "%" in host else address_reading(host)
    if address is None:
        return None
    is_mapped = ":" in host and address.version == 4
    most = 32 if ":" not in host else 128
    bits = number_reading(length, most) if slash else most
    if bits is None:
        return None
    bits -= 96 if is_mapped else 0
    if bits < 0:
        return None
    try:
        return ipaddress.ip_network((address, bits))
    except ValueError:  # host bits are set
        return None


def is_inside(address: Address, networks: Iterable[Network | str]) -> bool:
    """Return whether the address is in one of the networks."""
    return any(not isinstance(one, str) and address in one for one in networks)


def element_reading(text: str) -> Address | None:
    """Return the address in an element of X-Forwarded-For."""
    text = text.strip(" \t")
    if text[:1] == "[":
        inner, bracket, tail = text[1:].partition("]")
        if not bracket or "[" in inner or "]" in tail:
            return None
        if tail and (tail[0] != ":" or not is_port(tail[1:])):
            return None
        return address_reading(inner)
    host, colon, port = text.partition(":")
    if colon and is_port(port) and set(host) <= set(string.digits + "."):
        return address_reading(host)
    return address_reading(text)


def is_port(text: str) -> bool:
    """Return whether the text has one to five digits. The relay accepts 99999 here, too."""
    return len(text) <= 5 and number_reading(text, 99999) is not None


def client_reading(values: list[str], trusted: Iterable[Network | str]) -> Address | None:
    """Return the client's address in the values of X-Forwarded-For."""
    networks = list(trusted)
    for element in ",".join(values).split(",")[::-1]:
        address = element_reading(element)
        if address is None:
            return None
        if not is_inside(address, networks):
            return address
    return None


def source_reading(address: Address, key: bytes) -> bytes:
    """Return the source of an address: of IPv6, of its /64."""
    text = b"4" + address.packed if address.version == 4 else b"6" + address.packed[:8]
    return hashlib.blake2b(key + text, digest_size=8).digest()


# Rates and sizes.


PREFIXES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
BYTES_OF_NAMES = {
    "B": Fraction(1),
    "byte": Fraction(1),
    "bytes": Fraction(1),
    "bit": Fraction(1, 8),
}
UNITS = {  # in bytes; the first letter of a prefix may be upper-case
    "": Fraction(1),
    **{
        written + name: factor * size
        for prefix, factor in PREFIXES.items()
        for written in (prefix, prefix.capitalize())
        for name, size in BYTES_OF_NAMES.items()
    },
}


def size_reading(text: str) -> int | None:
    """Return a size in bytes, rounded up, or None."""
    end = 0
    while end < len(text) and text[end] in string.digits + ".":
        end += 1
    whole, dot, fraction = text[:end].partition(".")
    unit = text[end:]
    if unit[:1] == " " and unit[1:]:
        unit = unit[1:]
    if unit not in UNITS or not 1 <= len(whole) <= 15:
        return None
    if dot and (not 1 <= len(fraction) <= 9 or "." in fraction):
        return None
    exact = (int(whole) + Fraction(int(fraction or "0"), 10 ** len(fraction))) * UNITS[unit]
    rounded = int(exact)
    return rounded if rounded == exact else rounded + 1


# Heads of HTTP.

TOKEN_BYTES = frozenset((string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~").encode())
TARGET_BYTES = frozenset({*range(0x21, 0x7F), *range(0x80, 0x100)})
VALUE_BYTES = TARGET_BYTES | frozenset(b" \t")
KEY_BYTES = frozenset((string.ascii_letters + string.digits + "+/").encode())
LONGEST_LINE, LONGEST_HEAD = 16 * 1024, 32 * 1024


class Head(NamedTuple):
    """The lines of a head without their ends, and its size."""

    lines: list[bytes]
    size: int


def head_reading(data: bytes) -> Head | str:
    """Return the Head at the start of the data, "too long", or "not whole"."""
    lines: list[bytes] = []
    start = 0
    while True:
        most = min(start + LONGEST_LINE, LONGEST_HEAD)
        end = data.find(b"\n", start, most) + 1
        if not end:
            return "too long" if len(data) >= most else "not whole"
        line = without_end(data[start:end])
        if lines and not line:
            return Head(lines, end)
        lines.append(line)
        start = end


def without_end(line: bytes) -> bytes:
    """Return a line without its line feed and a carriage return before it."""
    line = line[:-1] if line[-1:] == b"\n" else line
    return line[:-1] if line[-1:] == b"\r" else line


def is_request_line(line: bytes) -> bool:
    """Return whether the line is a request line of HTTP/1.0 or HTTP/1.1."""
    words = line.split(b" ")
    if len(words) != 3:
        return False
    method, target, version = words
    if not method or not TOKEN_BYTES.issuperset(method):
        return False
    if not target or not TARGET_BYTES.issuperset(target):
        return False
    return version in (b"HTTP/1.0", b"HTTP/1.1")


def can_become_request_line(start: bytes) -> bool:
    """Return whether some bytes behind `start`, which has no line feed, make it a request line.

    One of the ends of a valid line must do so: they begin in the method, in the target, in the
    version, or between them.
    """
    line = b"x x HTTP/1.1"
    ends = [line[n:] for n in range(len(line))]
    is_whole = is_request_line(without_end(start))
    return is_whole or any(is_request_line(start + end) for end in (*ends, b"0"))


def is_junk_at_once(start: bytes) -> bool:
    """Return whether `start`, which has no line feed, is refused before its line ends.

    Its bytes are judged by the word in which they are. The version must be printable only.
    """
    method, *others = start.split(b" ")
    target, version = [*others, b"", b""][:2]
    version = version[:-1] if version[-1:] == b"\r" else version
    return (
        len(others) > 2
        or (start != b"" and not method)
        or not TOKEN_BYTES.issuperset(method)
        or not TARGET_BYTES.issuperset(target)
        or not set(version) <= set(range(0x21, 0x7F))
    )


def fields_of_head(lines: list[bytes]) -> dict[bytes, list[bytes]] | None:
    """Return the values of each field by its name in lower case. None: a field is malformed."""
    found: dict[bytes, list[bytes]] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or not TOKEN_BYTES.issuperset(name):
            return None
        if not VALUE_BYTES.issuperset(value):
            return None
        found.setdefault(name.lower(), []).append(value.strip(b" \t"))
    return found


def elements(fields: dict[bytes, list[bytes]], name: bytes) -> list[bytes]:
    """Return the elements of a list field in lower case."""
    return [
        one.strip(b" \t").lower() for value in fields.get(name, []) for one in value.split(b",")
    ]


def status_of(line: bytes, fields: dict[bytes, list[bytes]]) -> int:
    """Return the status of the answer to a request that is well-formed."""
    method, _, version = line.split(b" ")
    if b"websocket" not in elements(fields, b"upgrade"):
        return 200 if method in (b"GET", b"HEAD", b"OPTIONS") else 405
    versions = fields.get(b"sec-websocket-version", [])
    keys = fields.get(b"sec-websocket-key", [])
    if set(versions) - {b"13"}:
        return 426
    if method != b"GET":
        return 405
    if version == b"HTTP/1.0":
        return 400
    if len(fields.get(b"host", [])) != 1 or len(keys) != 1 or len(versions) != 1:
        return 400
    if b"upgrade" not in elements(fields, b"connection"):
        return 400
    key = keys[0]
    if len(key) != 24 or key[22:] != b"==" or not KEY_BYTES.issuperset(key[:22]):
        return 400
    return 101


def accept_of(key: bytes) -> bytes:
    """Return the Sec-WebSocket-Accept for a key."""
    text = key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    return base64.b64encode(hashlib.sha1(text).digest())


def accepts_upgrade(lines: list[bytes], nonce: bytes) -> bool:
    """Return whether the lines of an answer accept the upgrade that was requested with `nonce`."""
    version, space, rest = lines[0].partition(b" ")
    status, _, text = rest.partition(b" ")
    if version not in (b"HTTP/1.0", b"HTTP/1.1") or not space or status != b"101":
        return False
    fields = fields_of_head(lines[1:])
    if fields is None or not VALUE_BYTES.issuperset(text):
        return False
    if b"upgrade" not in elements(fields, b"connection"):
        return False
    if set(elements(fields, b"upgrade")) != {b"websocket"}:
        return False
    if fields.get(b"sec-websocket-accept") != [accept_of(base64.b64encode(nonce))]:
        return False
    return not {b"sec-websocket-extensions", b"sec-websocket-protocol"} & set(fields)
