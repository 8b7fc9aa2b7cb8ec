"""Where a client comes from: networks, addresses, X-Forwarded-For, PROXY headers. No sockets.

The module ipaddress, which the relay does not use, is the second opinion on addresses and networks.
"""

from __future__ import annotations

import ipaddress
import random
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import cut, splits

import transit_relay
from transit_relay import (
    LOCAL_PEER,
    Addresses,
    Peer,
    UsageError,
    is_in,
    parse_address,
    parse_network,
)
from ws_frames import ProxyError, ProxyReader

KEY = b"sixteen bytes..."
MAPPED = str(ipaddress.ip_address("::ffff:192.0.2.7"))  # Python 3.13 writes it in another way
CASES = 2000  # of each test with random input


def addresses(*, allow: str = "", trusted: str = "", key: bytes = KEY) -> Addresses:
    """Return Addresses with networks that are written with spaces between them."""
    return Addresses(
        *([parse_network(one) for one in it.split()] for it in (allow, trusted)), key=key
    )


def peer_of(host: str, judging: Addresses | None = None) -> Peer:
    """Judge the peer of a TCP socket."""
    rest: tuple[int, ...] = (40000, 0, 0) if ":" in host else (40000,)
    return (judging or addresses()).judge((host, *rest))


def told(host: str, judging: Addresses | None = None) -> Peer:
    """Judge an address that a proxy told."""
    peer = (judging or addresses()).judge_told(host)
    assert peer is not None
    return peer


def random_ipv4(chance: random.Random) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(chance.getrandbits(32))


def random_ipv6(chance: random.Random) -> ipaddress.IPv6Address:
    """Return an address of which some groups are zero, so that its text is shortened."""
    groups = (chance.getrandbits(16) * chance.randint(0, 1) for _ in range(8))
    return ipaddress.IPv6Address(struct.pack("!8H", *groups))


def random_text(chance: random.Random) -> str:
    """Return the text of an address, valid or with a mistake."""
    address: Any = random_ipv4(chance) if chance.random() < 0.4 else random_ipv6(chance)
    text = chance.choice((str(address), address.exploded, str(address).upper()))
    if chance.random() < 0.1:
        text = f"::ffff:{random_ipv4(chance)}"
    for _ in range(chance.choice((0, 0, 1, 2))):
        place = chance.randrange(len(text) + 1)
        text = text[:place] + chance.choice("0:.1f/g ") + text[place + chance.randint(0, 1) :]
    return text


def plain(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return what ipaddress makes of `text`, with IPv4-mapped addresses as IPv4."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped
    return found


# Addresses.


def test_addresses_are_those_of_ipaddress() -> None:
    chance = random.Random(1)
    valid = 0
    for _ in range(CASES):
        text = random_text(chance)
        expected = plain(text)
        packed = parse_address(text)
        assert (packed and packed[1:]) == (expected and expected.packed), text
        valid += expected is not None
    assert CASES / 4 < valid < CASES * 3 / 4


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "1.2.3",
            "1.2.3.4.5",
            "1.2.3.256",
            "01.2.3.4",
            "1.2.3.4 ",
            " 1.2.3.4",
            "1.2.3.-4",
        ),
        *("0x1.2.3.4", "16909060", "localhost", ":", ":::", "1::2::3", "12345::", "::1.2.3", "::g"),
        *("[::1]", "::1:80:", "1.2.3.4/32", "1.2.3.4\n", "1.2.3.4\0", "\0::1", "١.2.3.4", "::١"),
        *("\udcff", "::\udcff", "1.2.3.4%eth0", "unix:", "unknown", "_hidden", "u", "4abcd"),
    ],
)
def test_text_that_is_no_address(text: str) -> None:
    assert parse_address(text) is None
    assert addresses().judge_told(text) is None


# Networks.


def test_networks_are_those_of_ipaddress() -> None:
    """Compare the errors, the borders, and whether addresses lie in a network."""
    chance = random.Random(2)
    kinds = {"valid": 0, "invalid": 0}
    for _ in range(CASES):
        text = random_text(chance)
        if chance.random() < 0.8:
            text = f"{text}/{chance.choice((chance.randint(0, 140), 8, 32, 64, 128))}"
        address = plain(text.partition("/")[0])
        if address is not None and chance.random() < 0.7:
            length = chance.randint(0, address.max_prefixlen)
            text = str(ipaddress.ip_network((address, length), strict=False))
        try:
            expected = ipaddress.ip_network(text)
        except ValueError:
            expected = None
        if address is not None and ":" in text and address.version == 4:
            continue  # ipaddress does not make IPv4 networks of these
        kinds["invalid" if expected is None else "valid"] += 1
        if expected is None:
            with pytest.raises(UsageError):
                parse_network(text)
            continue
        first, last = parse_network(text)
        borders = expected.network_address.packed, expected.broadcast_address.packed
        assert (first[1:], last[1:]) == borders, text
        for border in borders:
            for step in (-1, 0, 1):
                number = int.from_bytes(border, "big") + step
                if 0 <= number < 1 << expected.max_prefixlen:
                    near = (type(expected.network_address))(number)
                    if plain(str(near)) == near:
                        packed = parse_address(str(near))
                        assert packed and is_in([(first, last)], packed) == (near in expected)
    assert min(kinds.values()) > CASES / 10


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("192.0.2.7", "192.0.2.7/32"),
        ("2001:DB8::", "2001:db8::/128"),
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
    ],
)
def test_other_ways_to_write_a_network(text: str, same: str) -> None:
    assert parse_network(text) == parse_network(same)


BAD_NETWORKS = {
    "": "'' is not an IPv4 or IPv6 network, and not unix",
    "localhost": "'localhost' is not an IPv4 or IPv6 network",
    "unix:/run/x.sock": "is not an IPv4 or IPv6 network",
    "Unix": "is not an IPv4 or IPv6 network",
    "10.0.0": "is not an IPv4 or IPv6 network",
    "10.0.0.0 /8": "is not an IPv4 or IPv6 network",
    "10.0.0.0,192.0.2.0": "is not an IPv4 or IPv6 network",
    "[2001:db8::]/32": "is not an IPv4 or IPv6 network",
    "fe80::%eth0/64": "is not an IPv4 or IPv6 network",
    "fe80::/64%eth0": "the prefix length must be a number from 0 to 128",
    "10.0.0.0/33": "the prefix length must be a number from 0 to 32",
    "10.0.0.0/": "the prefix length must be a number from 0 to 32",
    "10.0.0.0/-1": "the prefix length must be a number from 0 to 32",
    "10.0.0.0/255.0.0.0": "the prefix length must be a number from 0 to 32",
    "2001:db8::/129": "the prefix length must be a number from 0 to 128",
    "::ffff:10.0.0.0/8": "the prefix length must be a number from 96 to 128",
    "192.0.2.1/24": "'192.0.2.1/24' has host bits set; the network is 192.0.2.0/24",
    "192.0.2.1/0": "the network is 0.0.0.0/0",
    "2001:DB8::1/32": "the network is 2001:db8::/32",
    "::ffff:192.0.2.1/120": "the network is 192.0.2.0/24",
}


@pytest.mark.parametrize(("text", "why"), BAD_NETWORKS.items(), ids=BAD_NETWORKS)
def test_a_wrong_network(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_network(text)
    assert why in str(caught.value) and repr(text) in str(caught.value)
    if "the network is " in why:
        parse_network(str(caught.value).rpartition(" ")[2])


# Sources.


def test_a_source_is_a_keyed_hash() -> None:
    one = peer_of("192.0.2.7").source
    assert one is not None and len(one) == 8
    assert one == peer_of("192.0.2.7").source == told("192.0.2.7").source
    assert one != peer_of("192.0.2.7", addresses(key=b"another key.....")).source
    assert Addresses().judge(("192.0.2.7", 1)) != Addresses().judge(("192.0.2.7", 1))


SAME_SOURCES = [
    ("192.0.2.7", "::ffff:192.0.2.7"),
    ("2001:db8:1:2::", "2001:db8:1:2:ffff:ffff:ffff:ffff"),
    ("2001:db8::1", "2001:DB8:0:0::2"),
    ("fe80::1", "fe80::1%eth0"),
    ("fe80::1%eth0", "fe80::2%eth1"),
]
OTHER_SOURCES = [
    ("192.0.2.7", "192.0.2.8"),
    ("192.0.2.7", "::192.0.2.7"),
    ("2001:db8:1:2::", "2001:db8:1:3::"),
    ("2001:db8:1:2::", "2001:db8:1:1:ffff:ffff:ffff:ffff"),
    ("::ffff:192.0.2.7", "::ffff:192.0.2.8"),
]


@pytest.mark.parametrize("judge", [peer_of, told])
def test_sources_are_ipv4_addresses_and_ipv6_networks(judge: Any) -> None:
    for one, other in SAME_SOURCES:
        assert judge(one).source == judge(other).source, (one, other)
    for one, other in OTHER_SOURCES:
        assert judge(one).source != judge(other).source, (one, other)


def test_random_sources_are_equal_within_a_network_of_64_bits() -> None:
    chance = random.Random(3)
    judging = addresses()
    for _ in range(CASES):
        one = ipaddress.IPv6Address(0x20 << 120 | chance.getrandbits(120))
        other = ipaddress.IPv6Address(int(one) ^ 1 << chance.randrange(120))
        same_network = one.packed[:8] == other.packed[:8]
        sources = {peer_of(str(address), judging).source for address in (one, other)}
        assert (len(sources) == 1) == same_network


UNIX_ADDRESSES = ["", "/run/client.sock", b"", b"\0abstract", "192.0.2.7"]
OTHER_FAMILIES = [(3, 1024)]  # AF_VSOCK: a listener that is passed as fd:N
LOOPBACK = ["127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1"]


@pytest.mark.parametrize("address", [*UNIX_ADDRESSES, *OTHER_FAMILIES])
def test_unix_sockets_are_exempt(address: object) -> None:
    assert addresses().judge(address) is LOCAL_PEER


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_is_exempt_unless_a_proxy_tells_it(host: str) -> None:
    assert peer_of(host) is LOCAL_PEER
    assert told(host).source is not None
    forwarded = addresses(trusted="unix").judge_forwarded([host])
    assert forwarded == told(host)


@pytest.mark.parametrize("host", ["126.255.255.255", "128.0.0.1", "::", "::2", "::127.0.0.1"])
def test_neighbours_of_loopback_are_not_exempt(host: str) -> None:
    assert peer_of(host).source is not None


# --allow and --trust-forwarded-for.


@pytest.mark.parametrize(
    ("networks", "inside", "outside"),
    [
        ("192.0.2.0/24", ["192.0.2.0", "192.0.2.255", "::ffff:192.0.2.1"], ["192.0.3.0", "::1"]),
        ("0.0.0.0/0", ["0.0.0.0", "255.255.255.255", "127.0.0.1"], ["::", "2001:db8::1"]),
        ("::/0", ["::", "2001:db8::1", "::1"], ["192.0.2.1", "::ffff:192.0.2.1"]),
        ("2001:db8::/32 10.0.0.0/8", ["2001:db8:ffff::1", "10.9.9.9"], ["2001:db9::", "11.0.0.0"]),
        ("::1", ["::1"], ["127.0.0.1", "::2"]),
        ("fe80::/10", ["fe80::1%eth0", "febf::1"], ["fec0::1"]),
        ("unix", [], ["127.0.0.1", "::1", "192.0.2.1"]),
    ],
)
def test_networks_of_the_options(networks: str, inside: list[str], outside: list[str]) -> None:
    """Loopback is not exempt from --allow."""
    judging = addresses(allow=networks, trusted=networks)
    for judge in (peer_of, told):
        for host, is_inside in [*((h, True) for h in inside), *((h, False) for h in outside)]:
            peer = judge(host, judging)
            assert (peer.is_allowed, peer.is_trusted) == (is_inside, is_inside), host
            assert peer.source == judge(host).source
    unix = judging.judge("")
    assert unix == Peer(None, *[networks == "unix"] * 2)


def test_without_options_all_are_allowed_and_none_is_trusted() -> None:
    for peer in (peer_of("192.0.2.7"), peer_of("2001:db8::1"), addresses().judge("")):
        assert (peer.is_allowed, peer.is_trusted) == (True, False)


def test_ordinary_local_peers_share_one_object() -> None:
    judging = addresses(allow="127.0.0.0/8 unix", trusted="::1")
    assert peer_of("127.0.0.1", judging) is judging.judge("") is LOCAL_PEER
    assert peer_of("::1", judging) == Peer(None, is_allowed=False, is_trusted=True)


@pytest.mark.parametrize("host", ["192.0.2.77", "2001:db8::77", "127.0.0.77"])
def test_no_address_is_kept(host: str) -> None:
    """Search all attributes for the text, the packed address and its number."""
    judging = addresses(allow="0.0.0.0/0 ::/0", trusted="10.0.0.0/8")
    peers = [peer_of(host, judging), told(host, judging), judging.judge_forwarded([host])]
    packed = ipaddress.ip_address(host).packed
    kept = repr(vars(judging)) + repr(peers)
    for secret in (host, repr(packed)[2:-1], str(int.from_bytes(packed, "big")), packed.hex()):
        assert secret not in kept


# X-Forwarded-For.

TRUSTED = "10.0.0.0/8 2001:db8:ffff::/48 unix"
FORWARDED: dict[str, tuple[list[str], str | None]] = {
    "one": (["192.0.2.7"], "192.0.2.7"),
    "ipv6": (["2001:db8::7"], "2001:db8::7"),
    "mapped": (["::ffff:192.0.2.7"], "192.0.2.7"),
    "forged on the left": (["203.0.113.9, 192.0.2.7"], "192.0.2.7"),
    "junk on the left": (['<script>, "unknown", , 192.0.2.7'], "192.0.2.7"),
    "one proxy": (["192.0.2.7, 10.0.0.1"], "192.0.2.7"),
    "two proxies": (["192.0.2.7, 2001:db8:ffff::1,10.255.255.255"], "192.0.2.7"),
    "forged behind proxies": (["203.0.113.9, 192.0.2.7, 10.0.0.1, 10.0.0.2"], "192.0.2.7"),
    "a proxy's address forged": (["10.0.0.1, 192.0.2.7"], "192.0.2.7"),
    "two headers": (["203.0.113.9", "192.0.2.7"], "192.0.2.7"),
    "two headers, the last of a proxy": (["203.0.113.9, 192.0.2.7", "10.0.0.1"], "192.0.2.7"),
    "white space": (["\t 192.0.2.7 \t,  10.0.0.1\t"], "192.0.2.7"),
    "a port": (["192.0.2.7:40000"], "192.0.2.7"),
    "a proxy's port": (["192.0.2.7:1, 10.0.0.1:65535"], "192.0.2.7"),
    "brackets": (["[2001:db8::7]"], "2001:db8::7"),
    "brackets and a port": (["[2001:db8::7]:40000"], "2001:db8::7"),
    "a proxy's brackets": (["192.0.2.7, [2001:db8:ffff::1]:443"], "192.0.2.7"),
    "loopback": (["127.0.0.1"], "127.0.0.1"),
    "a scope": (["fe80::1%eth0"], "fe80::1"),
    "no header": ([], None),
    "empty": ([""], None),
    "commas": ([",,,"], None),
    "an empty element": (["192.0.2.7, "], None),
    "an empty element behind a header": (["192.0.2.7", ""], None),
    "an empty element before a proxy": (["192.0.2.7, , 10.0.0.1"], None),
    "all trusted": (["10.0.0.1, 10.0.0.2", "2001:db8:ffff::1"], None),
    "unknown": (["192.0.2.7, unknown"], None),
    "unknown before a proxy": (["192.0.2.7, unknown, 10.0.0.1"], None),
    "a name": (["192.0.2.7, client.example"], None),
    "a unix socket of nginx": (["192.0.2.7, unix:"], None),
    "the option's value": (["192.0.2.7, unix"], None),
    "the syntax of Forwarded": (["for=192.0.2.7"], None),
    "quotes": (['"192.0.2.7"'], None),
    "quotes and brackets": (['"[2001:db8::7]:1"'], None),
    "a port that is none": (["192.0.2.7:http"], None),
    "an empty port": (["192.0.2.7:"], None),
    "a port of six digits": (["192.0.2.7:123456"], None),
    "two ports": (["192.0.2.7:1:2"], None),
    "half a bracket": (["[2001:db8::7"], None),
    "the other half": (["2001:db8::7]"], None),
    "two brackets": (["[[2001:db8::7]]"], None),
    "empty brackets": (["[]:80"], None),
    "spaces inside": (["192.0.2.7 10.0.0.1"], None),
    "a network": (["192.0.2.0/24"], None),
    "a NUL": (["192.0.2.7\0"], None),
    "bytes that are not ASCII": (["192.0.2.7\xa0"], None),
    "superscript digits": (["192.0.2.\xb2"], None),
    "a newline": (["192.0.2.7:1\n"], None),
}


@pytest.mark.parametrize(("values", "client"), FORWARDED.values(), ids=FORWARDED)
def test_forwarded_for(values: list[str], client: str | None) -> None:
    judging = addresses(trusted=TRUSTED)
    assert judging.judge_forwarded(values) == (None if client is None else told(client))


def test_a_forwarded_client_is_judged_by_allow() -> None:
    judging = addresses(allow="192.0.2.0/24", trusted=TRUSTED)
    assert judging.judge_forwarded(["192.0.2.7"]) == Peer(told("192.0.2.7").source, True, False)
    assert judging.judge_forwarded(["192.0.3.7"]) == Peer(told("192.0.3.7").source, False, False)


def test_elements_left_of_the_client_are_never_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = parse_address

    def parse(text: str) -> bytes | None:
        seen.append(text)
        return real(text)

    judging = addresses(trusted=TRUSTED)
    monkeypatch.setattr(transit_relay, "parse_address", parse)
    judging.judge_forwarded(["198.51.100.1, 192.0.2.7, 10.0.0.1", "10.0.0.2:80"])
    assert seen == ["10.0.0.2", "10.0.0.1", "192.0.2.7"]


def element(chance: random.Random) -> tuple[str, str | None]:
    """Return an element of X-Forwarded-For, and the address in it if it is one."""
    kind = chance.randrange(6)
    if kind == 0:
        return chance.choice(("", "unknown", "1.2.3", "[::1", ":80", "1.2.3.4:", "::1:::")), None
    if kind == 1:
        address = f"10.{chance.randrange(256)}.0.1"
    elif kind == 2:
        address = f"2001:db8:ffff::{chance.getrandbits(16):x}"
    else:
        address = str(random_ipv4(chance) if kind == 3 else random_ipv6(chance))
    port = chance.choice(("", f":{chance.randrange(65536)}"))
    if ":" in address:
        return (f"[{address}]{port}" if port or chance.random() < 0.5 else address), address
    return address + port, address


def test_random_forwarded_for() -> None:
    """Compare with the rule, which is written with ipaddress."""
    chance = random.Random(4)
    judging = addresses(trusted=TRUSTED)
    networks = [ipaddress.ip_network(text) for text in TRUSTED.split()[:2]]
    results = {True: 0, False: 0}
    for _ in range(CASES):
        elements = [element(chance) for _ in range(chance.randint(1, 5))]
        expected = None
        for _, address in reversed(elements):
            found = plain(address or "")
            if found is None or not any(found in network for network in networks):
                expected = found and told(str(found))
                break
        text = "".join(f"{one}{chance.choice((',', ' ,', ', '))}" for one, _ in elements)
        values = text.rstrip(" ")[:-1].split(",", chance.randint(0, 2))
        assert judging.judge_forwarded(values) == expected, values
        results[expected is None] += 1
    assert min(results.values()) > CASES / 10


# PROXY headers.

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL, PROXY = 0x20, 0x21


def v1(text: str) -> bytes:
    """Return a line of version 1."""
    return f"PROXY {text}\r\n".encode("latin-1")


def v2(command: int, family: int, block: bytes = b"", length: int | None = None) -> bytes:
    """Return a header of version 2. `length` is that of `block`, unless it is given."""
    fixed = struct.pack("!BBH", command, family, len(block) if length is None else length)
    return SIGNATURE + fixed + block


def block(source: str, tail: bytes = b"") -> bytes:
    """Return addresses and ports, as the header of version 2 has them, and TLVs."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    return socket.inet_pton(family, source) * 2 + b"\x30\x39\x01\xbb" + tail


TLVS = b"\x04\x00\x03abc" + b"\x20\x00\x05\x01\0\0\0\0"
LONGEST_TLV = b"\x04\x0f\xe1" + bytes(4096 - 16 - 12 - 3)
HEADERS: dict[str, tuple[bytes, str | None]] = {
    # The example of the specification, 2.1.
    "TCP4": (v1("TCP4 192.168.0.1 192.168.0.11 56324 443"), "192.168.0.1"),
    "the longest TCP4": (v1("TCP4 255.255.255.255 255.255.255.255 65535 65535"), "255.255.255.255"),
    "the shortest TCP4": (v1("TCP4 0.0.0.0 0.0.0.0 0 0"), "0.0.0.0"),
    "ports": (v1("TCP4 1.2.3.4 1.2.3.4 9999 60000"), "1.2.3.4"),
    "TCP6": (v1("TCP6 2001:db8::1 2001:DB8::2 4000 443"), "2001:db8::1"),
    "the longest TCP6": (
        v1(f"TCP6 {'ffff:' * 7}ffff {'ffff:' * 7}ffff 65535 65535"),
        "ffff:" * 7 + "ffff",
    ),
    "any IPv6 address": (v1("TCP6 :: :: 1 2"), "::"),
    "mapped": (v1("TCP6 ::ffff:192.0.2.7 ::ffff:192.0.2.8 4000 443"), "::ffff:192.0.2.7"),
    "UNKNOWN": (v1("UNKNOWN"), None),
    "UNKNOWN with a space": (v1("UNKNOWN "), None),
    "UNKNOWN with addresses": (v1("UNKNOWN 192.0.2.7 192.0.2.8 1 2"), None),
    "the longest UNKNOWN": (v1(f"UNKNOWN {'ffff:' * 7}ffff {'ffff:' * 7}ffff 65535 65535"), None),
    "UNKNOWN with anything": (v1("UNKNOWN \r \n \xff\0 PROXY TCP4"), None),
    "TCP over IPv4": (v2(PROXY, 0x11, block("192.0.2.7")), "192.0.2.7"),
    "UDP over IPv4": (v2(PROXY, 0x12, block("192.0.2.7")), "192.0.2.7"),
    "TCP over IPv6": (v2(PROXY, 0x21, block("2001:db8::7")), "2001:db8::7"),
    "UDP over IPv6": (v2(PROXY, 0x22, block("2001:db8::7")), "2001:db8::7"),
    "mapped in version 2": (v2(PROXY, 0x21, block("::ffff:192.0.2.7")), MAPPED),
    "TLVs behind IPv4": (v2(PROXY, 0x11, block("192.0.2.7", TLVS)), "192.0.2.7"),
    "TLVs behind IPv6": (v2(PROXY, 0x21, block("2001:db8::7", TLVS)), "2001:db8::7"),
    "LOCAL": (v2(LOCAL, 0x00), None),
    "LOCAL with an address": (v2(LOCAL, 0x11, block("192.0.2.7")), None),
    "LOCAL with an unknown family": (v2(LOCAL, 0xFF, b"x"), None),
    "LOCAL with a short block": (v2(LOCAL, 0x21, b"x"), None),
    "UNSPEC": (v2(PROXY, 0x00), None),
    "UNSPEC with TLVs": (v2(PROXY, 0x00, TLVS), None),
    "IPv4 over an unspecified protocol": (v2(PROXY, 0x10, block("192.0.2.7")), None),
    "an unspecified family over TCP": (v2(PROXY, 0x01, block("192.0.2.7")), None),
    "a unix stream": (v2(PROXY, 0x31, b"/run/x.sock".ljust(216, b"\0")), None),
    "unix datagrams": (v2(PROXY, 0x32, bytes(216) + TLVS), None),
}
LONG_HEADERS = {
    "4 KiB": (v2(PROXY, 0x11, block("192.0.2.7", LONGEST_TLV)), "192.0.2.7"),
    "4 KiB of LOCAL": (v2(LOCAL, 0, bytes(4080)), None),
}
BEHIND = b"please relay \r\n"


def read(pieces: list[bytes], reader: ProxyReader | None = None) -> tuple[str | None, bytes]:
    """Return the told address of a whole header, and all bytes behind the header."""
    reader = reader or ProxyReader()
    for n, piece in enumerate(pieces, 1):
        found = reader.receive(memoryview(piece))
        if found is not None:
            address, rest = found
            assert reader._header == b""
            return address, b"".join([bytes(rest), *pieces[n:]])
    raise AssertionError("the header is not whole")


@pytest.mark.parametrize(("header", "address"), HEADERS.values(), ids=HEADERS)
def test_proxy_header(header: bytes, address: str | None) -> None:
    for pieces in splits(header):
        assert read(pieces) == (address, b"")
    for pieces in splits(header + BEHIND):
        assert read(pieces) == (address, BEHIND)
    for behind in (header, b"\0" * 5000):
        assert read([header + behind]) == (address, behind)


@pytest.mark.parametrize(("header", "address"), LONG_HEADERS.values(), ids=LONG_HEADERS)
def test_long_proxy_header(header: bytes, address: str | None) -> None:
    assert len(header) == 4096
    chance = random.Random(5)
    places = [*range(20), 4095, *chance.choices(range(4096), k=20)]
    for place in places:
        assert read(cut(header + BEHIND, [place])) == (address, BEHIND)
    assert read(cut(header + BEHIND, places)) == (address, BEHIND)


@pytest.mark.parametrize("name", HEADERS)
def test_a_reader_is_carried_between_any_two_bytes(name: str) -> None:
    header, address = HEADERS[name]
    assert set(ProxyReader.CARRIED) == set(ProxyReader.__slots__)
    for place in range(1, len(header)):
        first, second = ProxyReader(), ProxyReader()
        assert first.receive(header[:place]) is None
        for field in ProxyReader.CARRIED:
            setattr(second, field, getattr(first, field))
        assert read([header[place:]], second) == (address, b"")


# The last byte of each of these is the first one that no header has there.
WRONG_V1 = [
    *("X", "p", "\n", "PX", "PROXY\t", "PROXY  ", "PROXY\r", "PROXY t", "PROXY X", "PROXY TCP5"),
    *("PROXY TCP ", "PROXY TCP4\r", "PROXY TCP4  ", "PROXY TCP4 :", "PROXY TCP4 a", "PROXY TCP6 g"),
    *("PROXY TCP4 1.2.3.4\t", "PROXY TCP4 1.2.3.4  ", "PROXY TCP4 1.2.3.4\r", "PROXY TCP4 \r"),
    *("PROXY TCP4 1234567890123456", f"PROXY TCP6 {'f' * 40}", "PROXY TCP6 ::1%", "PROXY TCP6 ["),
    *("PROXY TCP4 1.2.3.4 1.2.3.4  ", "PROXY TCP4 1.2.3.4 1.2.3.4 \r", "PROXY TCP4 1.2.3.4 :"),
    *(
        "PROXY TCP4 1.2.3.4 1.2.3.4 00",
        "PROXY TCP4 1.2.3.4 1.2.3.4 01",
        "PROXY TCP4 1.2.3.4 1.2.3.4 +",
    ),
    *("PROXY TCP4 1.2.3.4 1.2.3.4 65536", "PROXY TCP4 1.2.3.4 1.2.3.4 1 70000"),
    *("PROXY TCP4 1.2.3.4 1.2.3.4 1 66000", "PROXY TCP4 1.2.3.4 1.2.3.4 100000"),
    *("PROXY TCP4 1.2.3.4 1.2.3.4 1\r", "PROXY TCP4 1.2.3.4 1.2.3.4 1 \r"),
    *("PROXY TCP4 1.2.3.4 1.2.3.4 1 2 ", "PROXY TCP4 1.2.3.4 1.2.3.4 1 2\n"),
    *("PROXY TCP4 1.2.3.4 1.2.3.4 1 2\rx", "PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\r"),
    *("PROXY UNKNOWN\n", "PROXY UNKNOWNX", "PROXY UNKNOWN\rx", "PROXY UNKNOWN " + "x" * 92),
    *("PROXY UNKNOWN " + "x" * 91 + "\rx", "PROXY UNKNOWN " + "x" * 90 + "\rx"),
]
WRONG_V2 = [
    *(SIGNATURE[:n] + b"\xff" for n in range(13)),
    *(
        SIGNATURE + bytes((command,))
        for command in (0x00, 0x01, 0x10, 0x11, 0x22, 0x2F, 0x30, 0x31)
    ),
    *(SIGNATURE + bytes((PROXY, family)) for family in (0x03, 0x0F, 0x13, 0x23, 0x33, 0x40, 0xF1)),
    *(v2(command, 0x00, length=0x1000)[:-1] for command in (LOCAL, PROXY)),
    *(v2(command, family, length=4081) for command in (LOCAL, PROXY) for family in (0x00, 0x11)),
    *(v2(PROXY, family, length=length) for family in (0x11, 0x12) for length in (0, 1, 11)),
    *(v2(PROXY, family, length=length) for family in (0x21, 0x22) for length in (0, 12, 35)),
]
# The addresses of version 1 are checked at the end of the line: 2.1.
WRONG_ADDRESSES = [
    *("TCP4 1.2.3 1.2.3.4 1 2", "TCP4 1.2.3.4 1.2.3 1 2", "TCP4 1.2.3.256 1.2.3.4 1 2"),
    *("TCP4 01.2.3.4 1.2.3.4 1 2", "TCP4 1.2.3.4 1.2.3.04 1 2", "TCP4 1..2.3 1.2.3.4 1 2"),
    *("TCP6 1.2.3.4 1.2.3.4 1 2", "TCP6 ::1 1.2.3.4 1 2", "TCP6 1.2.3.4 ::1 1 2"),
    *("TCP6 ::: ::1 1 2", "TCP6 1:2:3 ::1 1 2", "TCP6 ::1 1::2::3 1 2", "TCP6 12345:: ::1 1 2"),
    *("TCP6 ::ffff:1.2.3 ::1 1 2", "TCP6 beef ::1 1 2"),
]
WRONG = [*(text.encode() for text in WRONG_V1), *WRONG_V2, *map(v1, WRONG_ADDRESSES)]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_is_no_header_is_refused_at_the_first_byte_that_decides(wrong: bytes) -> None:
    for pieces in splits(wrong):
        reader = ProxyReader()
        for piece in pieces[:-1]:
            assert reader.receive(piece) is None
        with pytest.raises(ProxyError) as caught:
            reader.receive(pieces[-1])
        assert str(caught.value) == ""
    with pytest.raises(ProxyError):
        ProxyReader().receive(wrong + BEHIND + v1("UNKNOWN"))


def test_a_line_that_is_a_byte_too_long() -> None:
    """The limit is 107 bytes with the line end: 2.1."""
    assert read([v1("UNKNOWN " + "x" * 91)]) == (None, b"")
    for line in (v1("UNKNOWN " + "x" * 92), v1("UNKNOWN " + "x" * 5000)):
        assert len(line) > 107
        with pytest.raises(ProxyError):
            ProxyReader().receive(line)


def test_a_header_that_is_a_byte_too_long() -> None:
    with pytest.raises(ProxyError):
        ProxyReader().receive(v2(PROXY, 0x11, block("192.0.2.7", LONGEST_TLV + b"x")))


def test_no_byte_is_no_error() -> None:
    assert ProxyReader().receive(b"") is None


def test_random_headers() -> None:
    """Make both versions for random addresses, and change a byte of some."""
    chance = random.Random(6)
    for _ in range(CASES):
        is_ipv4 = chance.random() < 0.5
        address: Any = random_ipv4(chance) if is_ipv4 else random_ipv6(chance)
        ports = [chance.randrange(65536) for _ in range(2)]
        if chance.random() < 0.5:
            text = chance.choice((str(address), address.exploded, str(address).upper()))
            header = v1(f"TCP{4 if is_ipv4 else 6} {text} {text} {ports[0]} {ports[1]}")
        else:
            family = (0x10 if is_ipv4 else 0x20) + chance.randint(1, 2)
            header = v2(PROXY, family, block(str(address), chance.randbytes(chance.randrange(30))))
        found, rest = read([header + BEHIND])
        assert found is not None and plain(found) == plain(str(address)) and rest == BEHIND
        place = chance.randrange(11)
        changed = bytearray(header)
        changed[place] ^= 1 << chance.randrange(8)
        with pytest.raises(ProxyError):
            ProxyReader().receive(changed)


def outcomes_of(pieces: Iterator[list[bytes]]) -> set[object]:
    """Return the outcomes of reading the same bytes in all these pieces."""
    outcomes: set[object] = set()
    for cuts in pieces:
        try:
            outcomes.add(read(cuts))
        except (ProxyError, AssertionError) as error:
            outcomes.add(type(error))
    return outcomes


def test_the_outcome_does_not_depend_on_the_pieces() -> None:
    """Change a byte anywhere: the result may be another header, none, or a longer one."""
    chance = random.Random(7)
    kinds = set()
    for header, _ in chance.choices(list(HEADERS.values()), k=150):
        changed = bytearray(header)
        changed[chance.randrange(min(len(header), 60))] = chance.choice(b"0:. \r\n\0\x11\x21\xff")
        (outcome,) = outcomes_of(splits(bytes(changed), seed=len(header)))
        kinds.add(outcome if isinstance(outcome, type) else None)
    assert kinds == {None, ProxyError, AssertionError}
