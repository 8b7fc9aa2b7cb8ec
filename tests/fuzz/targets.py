"""The targets: what each one checks of an input, its seeds, its keywords, and its outcomes.

The seeds are the test vectors of the other tests. A check raises an exception if an invariant does
not hold, and otherwise returns the name of the outcome.

A reader or framing is *carried* if its state moves to a new one before each piece of the input, as
it will when a reload hands the connections over to a new process.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import readings
import test_addresses
import test_endpoints
import test_fuzz
import test_handshake
import test_rates
import test_ws_frames
import test_ws_upgrade
from helpers import BINARY, CLOSE, CONTINUATION, PING, PONG, cut, cut_at_random, frame, handshake
from invariants import check_rendezvous
from streams import SWITCHED, UPGRADE, Found, Room, note, plain_reading, read

import transit_relay
import ws_frames
from transit_relay import (
    Addresses,
    Endpoint,
    Peer,
    RawFraming,
    Role,
    State,
    UsageError,
    parse_address,
    parse_endpoint,
    parse_handshake,
    parse_network,
    parse_rate,
    parse_size,
)

MAX_BYTEWISE = 400  # a longer stream is not cut into bytes, because that is slow
MAX_LINE_ENDS = 100  # a stream is cut around so many
MAX_CARRIED_PIECES = 120  # a reader is not carried between more pieces, because that is slow
NONCE = b"the sample nonce"
KEY = b"sixteen bytes..."
# White space for str.strip, but not for the grammars of these targets.
OTHER_SPACE = (b"\xa0", b"\x85", b"\x0b", b"\x0c")


class Target(NamedTuple):
    """One target. The seeds reach all `outcomes`, and no input may have another one."""

    check: Callable[[bytes], str]
    seeds: Callable[[], Iterable[bytes]]
    keywords: Sequence[bytes]  # the mutations insert them
    outcomes: frozenset[str]
    longest: int  # of an input, in bytes

    def run(self, data: bytes) -> str:
        """Check an input. Return its outcome, which must be one of `outcomes`."""
        outcome = self.check(data)
        assert outcome in self.outcomes, f"an unknown outcome: {outcome}"
        return outcome


def ways(stream: bytes, max_bytewise: int = MAX_BYTEWISE) -> Iterator[list[bytes]]:
    """Yield the pieces of a stream in several ways.

    They are: the whole stream; two random cuts, which depend on the stream alone; cuts before and
    behind each line end; and single bytes, if there are at most `max_bytewise`.
    """
    chance = random.Random(zlib.crc32(stream))
    yield [stream]
    for _ in range(2):
        yield cut_at_random(stream, chance, chance.randint(1, 6))
    ends = [n for n, byte in enumerate(stream) if byte in b"\r\n"][:MAX_LINE_ENDS]
    if ends:
        yield [piece for piece in cut(stream, [m for n in ends for m in (n, n + 1)]) if piece]
    if len(stream) <= max_bytewise:
        yield cut(stream, range(1, len(stream)))


def one_outcome(stream: bytes, outcome: Callable[[list[bytes], bool], object]) -> Any:
    """Return the outcome, which must be the same for all ways of cutting.

    `outcome` takes the pieces, and whether to carry the reader between them.
    """
    results = []
    for pieces in ways(stream):
        results.append(outcome(pieces, False))
        if 1 < len(pieces) <= MAX_CARRIED_PIECES:
            results.append(outcome(pieces, True))
    for result in results:
        assert result == results[0], f"two cuts, two outcomes: {result!r} and {results[0]!r}"
    return results[0]


def resumed(old: Any, new: Any) -> Any:
    """Return the reader `new` with the state of the reader `old`."""
    new.resume(old.place())
    return new


class CarriedReader:
    """Moves the state to a new reader before each piece."""

    def __init__(self, first: Any, new: Callable[[], Any]) -> None:
        self.reader, self._new = first, new

    def receive(self, data: memoryview) -> Any:
        self.reader = resumed(self.reader, self._new())
        return self.reader.receive(data)


def text_of(data: bytes) -> str:
    """Decode an input as Python decodes the command line."""
    return data.decode("utf-8", "surrogateescape")


def bytes_of(texts: Iterable[str]) -> Iterator[bytes]:
    """Encode texts as inputs."""
    return (text.encode("utf-8", "surrogateescape") for text in texts)


def parametrized(test: Any) -> list[Any]:
    """Return the first argument of each case of a parametrized test."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    return [case[0] if isinstance(case, tuple) else case for case in mark.args[1]]


# The handshake line. The first byte of an input is the side of the client that waits.

WAITING = (None, b"left".ljust(16, b"0"), b"right".ljust(16, b"0"))
TOKEN = handshake("token").split()[2]


def check_handshake(data: bytes) -> str:
    side, stream = WAITING[data[0] % 3] if data else None, data[1:]

    def outcome(pieces: list[bytes], is_carried: bool) -> tuple[object, ...]:
        room = Room()
        partner, client = room.client(), room.client()
        partner.session.line_received(handshake("token", side and side[:-1].decode())[:-1])
        client.framing = RawFraming(client.session, client)
        for piece in pieces:
            if is_carried and isinstance(client.framing, RawFraming):
                old, client.framing = client.framing, RawFraming(client.session, client)
                client.framing._line, client.framing._past_line = old._line, old._past_line
            client.feed(piece)
            if isinstance(client.framing, RawFraming):
                assert len(client.framing._line) < 1024, "too much of the line is kept"
                is_kept = client.framing._past_line and client.framing._line
                assert not is_kept, "the line is kept behind its end"
        check_rendezvous(room.rendezvous)
        state = client.session.state
        client.session.connection_lost()
        partner.session.connection_lost()
        check_rendezvous(room.rendezvous)
        records = sorted((record.mood, record.total_bytes) for record in room.records)
        return str(state), client.sent, partner.sent, records

    result = one_outcome(stream, outcome)
    end = stream.find(b"\n", 0, 1024)
    is_whole = end >= 0 or len(stream) >= 1024
    line, rest = (stream[:end], stream[end + 1 :]) if end >= 0 else (stream[:1024], b"")
    expected = readings.handshake_reading(line) if is_whole else None
    parsed = parse_handshake(line)
    assert (parsed and tuple(parsed)) == readings.handshake_reading(line)
    if parsed is not None:
        text = b"please relay " + parsed.token
        text += b"" if parsed.side is None else b" for side " + parsed.side
        assert text == line
    waiting_side = side and side[:-1].ljust(16, b"0")
    kind, sent, partner_sent, records = "unfinished", b"", b"", [("empty", 0), ("lonely", 0)]
    if expected and expected[0] == TOKEN and (not expected[1] or expected[1] != waiting_side):
        kind, sent, partner_sent = "paired", b"ok\n", b"ok\n" + rest
        records = [("happy", len(rest))]
    elif expected and rest:
        kind, sent, records = "impatient", b"impatient\n", [("impatient", 0), ("lonely", 0)]
    elif expected:
        kind, records = "waiting", [("lonely", 0), ("lonely", 0)]
    elif is_whole:
        kind, sent, records = "bad", b"bad handshake\n", [("errory", 0), ("lonely", 0)]
    assert result[1:] == (sent, partner_sent, records), f"{result!r}, expected {kind}"
    return kind


def handshake_seeds() -> Iterator[bytes]:
    lines = [line for line, _, _ in test_handshake.GOOD.values()]
    lines += test_handshake.BAD.values()
    for line in lines:
        yield b"\0" + line + b"\n"
    for first, side in itertools.product(b"\0\1\2", (None, "left", "right")):
        yield bytes([first]) + handshake("token", side) + b"early"
        yield bytes([first]) + handshake("other", side)
    yield b"\0please relay "
    for size in (1022, 1023, 1024, 1025):
        yield b"\1" + b"x" * size + b"\n"


# Endpoints.


def written(endpoint: Endpoint) -> str:
    """Return a text of the endpoint."""

    def escaped(value: str) -> str:
        return re.sub(r"([\\:=])", r"\\\1", value)

    if endpoint.kind in ("tcp", "tcp6"):
        fields = f"{endpoint.port}:interface={escaped(endpoint.interface)}"
        fields += f":backlog={endpoint.backlog}"
    elif endpoint.kind == "unix":
        fields = f"{escaped(endpoint.path)}:mode={endpoint.mode:o}:backlog={endpoint.backlog}"
    elif endpoint.kind == "fd":
        fields = str(endpoint.fileno)
    elif endpoint.name is not None:
        fields = f"name={escaped(endpoint.name)}"
    else:
        fields = f"index={endpoint.position}"
    return f"{'haproxy:' * endpoint.has_proxy_header}{endpoint.kind}:{fields}"


def check_endpoint(data: bytes) -> str:
    text = text_of(data)
    expected = readings.endpoint_reading(text)
    try:
        endpoint = parse_endpoint(text, Role.WEBSOCKET)
    except UsageError as error:
        assert expected is None, f"refused, expected {expected}"
        return check_endpoint_error(text, str(error))
    assert endpoint.text == text and endpoint.role is Role.WEBSOCKET
    fields = endpoint._asdict()
    del fields["text"], fields["role"]
    assert fields == expected
    again = parse_endpoint(written(endpoint), Role.WEBSOCKET)
    assert again._replace(text=text) == endpoint, written(endpoint)
    return endpoint.kind


def check_endpoint_error(text: str, said: str) -> str:
    """Check that a message quotes the text. If it suggests another one, that is an endpoint."""
    start = f"{text!r}: not an endpoint"
    if not said.startswith(start):
        assert said.startswith(f"{text}: "), said
        return "a wrong field"
    advice = said[len(start) :]
    assert "\n" not in said
    before, suggests, guess = advice.partition("; did you mean ")
    if before or not suggests:
        return "no suggestion"
    suggested = ast.literal_eval(guess[:-1])
    assert guess[-1] == "?" and readings.endpoint_reading(suggested) is not None, suggested
    assert suggested.startswith("haproxy:") or not text.startswith("haproxy:"), suggested
    return "suggestion"


def endpoint_seeds() -> Iterator[bytes]:
    vectors = (test_endpoints.GOOD, test_endpoints.BAD, test_endpoints.SUGGESTIONS)
    yield from bytes_of(itertools.chain(*vectors))
    starts = {"tcp": "tcp:1", "tcp6": "tcp6:1", "unix": "unix:x"}
    for kind, names in readings.FIELDS_OF_KINDS.items():
        for name, more in itertools.product(set(names) & set(readings.HIGHEST), (0, 1)):
            start = kind if name in ("port", "index", "fileno") else starts[kind]
            number = format(readings.HIGHEST[name] + more, "o" if name == "mode" else "d")
            yield f"{start}:{name}={number}".encode()
    chance = random.Random(1)
    yield from bytes_of(test_fuzz.endpoint_text(chance)[:200] for _ in range(200))


# PROXY headers.


def check_proxy_header(stream: bytes) -> str:
    def outcome(pieces: list[bytes], is_carried: bool) -> object:
        reader: Any = ws_frames.ProxyReader()
        for number, piece in enumerate(pieces, 1):
            if is_carried:
                reader = resumed(reader, ws_frames.ProxyReader())
            buffer = bytearray(piece)
            try:
                found = reader.receive(memoryview(buffer))
            except ws_frames.ProxyError:
                return "error"
            assert len(reader._header) <= 4096, "too much is kept"
            if found is not None:
                told, rest = found
                behind = b"".join([bytes(rest), *pieces[number:]])
                return told, behind
            buffer[:] = bytes(len(buffer))
        return "unfinished"

    result = one_outcome(stream, outcome)
    expected = readings.proxy_reading(stream)
    if isinstance(result, str):
        assert expected is None, f"{result}, expected {expected}"
        is_possible = readings.can_become_proxy_header(stream)
        assert is_possible == (result == "unfinished"), result
        return result
    assert expected is not None, result
    assert result == (expected[0], stream[expected[1] :]), expected
    if result[0] is None:
        return "nothing told"
    told = parse_address(result[0])
    address = readings.address_reading(result[0])
    assert told is not None and address is not None and told[1:] == address.packed
    return f"version {1 if stream[:1] == b'P' else 2}, IPv{address.version}"


def proxy_seeds() -> Iterator[bytes]:
    for header, _ in test_addresses.HEADERS.values():
        yield header + test_addresses.BEHIND
        yield header[: len(header) // 2]
    yield from test_addresses.WRONG
    for header, _ in test_addresses.LONG_HEADERS.values():
        yield header + b"x"


# Networks, and X-Forwarded-For. The first two lines of an input are the networks of
# --trust-forwarded-for and --allow. Each other line is the value of a field.


def check_networks(texts: Sequence[str]) -> tuple[list[transit_relay.Network], list[Any]]:
    """Return the valid networks, as the relay and as ipaddress represent them."""
    parsed, expected_networks = [], []
    for text in texts:
        expected = readings.network_reading(text)
        try:
            found = parse_network(text)
        except UsageError as error:
            assert expected is None, f"{text!r} is refused, expected {expected!r}"
            assert repr(text) in str(error)
            if " the network is " in str(error):
                parse_network(str(error).rpartition(" ")[2])
            continue
        if isinstance(expected, str):
            assert found == (b"u", b"u")
        else:
            assert expected is not None, text
            borders = expected.network_address.packed, expected.broadcast_address.packed
            family = str(expected.version).encode()
            assert found == (family + borders[0], family + borders[1]), text
            assert parse_network(str(expected)) == found
        parsed.append(found)
        expected_networks.append(expected)
    return parsed, expected_networks


def expected_peer(address: Any, allowed: list[Any], trusted: list[Any]) -> Peer:
    """Return the Peer for an address that a proxy has sent."""
    is_allowed = not allowed or readings.is_inside(address, allowed)
    is_trusted = readings.is_inside(address, trusted)
    return Peer(readings.source_reading(address, KEY), is_allowed, is_trusted)


def check_forwarded(data: bytes) -> str:
    first, _, rest = data.partition(b"\n")
    second, _, behind = rest.partition(b"\n")
    trusted, their_trusted = check_networks(text_of(first).split(" "))
    allowed, their_allowed = check_networks(text_of(second).split(" "))
    values = [value.decode("latin-1") for value in behind.split(b"\n")]
    judging = Addresses(allowed, trusted, key=KEY)
    result = judging.judge_forwarded(values)
    address = readings.client_reading(values, their_trusted)
    if address is None:
        assert result is None, result
    else:
        assert result == expected_peer(address, their_allowed, their_trusted), address
        for forged in ("198.51.100.9", "x", ",", "[", "10.0.0.1"):
            assert judging.judge_forwarded([forged, *values]) == result, "a forged element counts"
    assert judging.judge_forwarded([",".join(values)]) == result, "joined fields differ"
    for value in values:  # each value as the address that a PROXY header tells
        single = readings.address_reading(value)
        told = judging.judge_told(value)
        if single is None:
            assert told is None, value
        else:
            assert told == expected_peer(single, their_allowed, their_trusted), value
    if result is None:
        return "none"
    return "allowed" if result.is_allowed else "refused"


def forwarded_seeds() -> Iterator[bytes]:
    trusted = test_addresses.TRUSTED.encode()
    for values, _ in test_addresses.FORWARDED.values():
        fields = "\n".join(values).encode("latin-1")
        yield trusted + b"\n\n" + fields
        yield trusted + b"\n192.0.2.0/24 ::/0\n" + fields
        yield trusted + b"\n198.51.100.0/24\n" + fields
    for text in test_addresses.BAD_NETWORKS:
        yield text.encode() + b"\n" + text.encode() + b"\n192.0.2.7"
    for text in ("::ffff:192.0.2.0/120", "::ffff:0:0/96", "0.0.0.0/0", "::/0", "fe80::/10"):
        yield text.encode() + b"\n" + text.encode() + b"\n192.0.2.7, fe80::1%eth0"
    chance = random.Random(2)
    for _ in range(50):
        values = [test_addresses.element(chance)[0] for _ in range(chance.randint(1, 4))]
        yield trusted + b"\n\n" + ",".join(values).encode()


# HTTP. The first byte of an input selects a request or an answer. It also selects whether two
# bytes of the input are replaced by long texts, so that short inputs reach the limits: with one \0
# a line is almost as long as its limit, and with four \1 a head is longer than its limit.

IS_ANSWER, HAS_FILLERS = 1, 2
OTHER_STATES = (State.WAIT_UPGRADE, State.FORWARDED)  # before the upgrade, and of a gateway
FILLERS = {b"\0": b"x" * (ws_frames.MAX_HEAD_LINE_BYTES - 40), b"\1": b"x" * 8900}


def check_head(data: bytes) -> str:
    options, stream = (data[0], data[1:]) if data else (0, b"")
    if options & HAS_FILLERS:
        for short, long in FILLERS.items():
            stream = stream.replace(short, long, 4)
    is_server = not options & IS_ANSWER

    def new() -> Any:
        if is_server:
            return ws_frames.RequestReader()
        return ws_frames.AnswerReader(b"")  # another nonce: resume must set this field too

    def outcome(pieces: list[bytes], is_carried: bool) -> tuple[object, ...]:
        first = ws_frames.RequestReader() if is_server else ws_frames.AnswerReader(NONCE)
        reader: Any = CarriedReader(first, new) if is_carried else first
        result = test_fuzz.read_behind(pieces, reader, is_server)
        last = reader.reader if is_carried else first
        assert len(last._head) <= ws_frames.MAX_HEAD_BYTES, "too much is kept"
        return result

    result = one_outcome(stream, outcome)
    head = readings.head_reading(stream)
    if isinstance(head, readings.Head) and result[0] == 101:
        rest = stream[head.size :]
        assert result[-2:] == (rest, plain_reading(rest, is_server))
    if is_server:
        check_request(stream, head, result)
        return str(result[0])
    if isinstance(head, str):
        is_whole = head == "too long"
        assert (result[0] is not None) == is_whole and result[0] != 101, result
    else:
        assert (result[0] == 101) == readings.accepts_upgrade(head.lines, NONCE), result
    return "switched" if result[0] == 101 else "unfinished" if result[0] is None else "failed"


def check_request(stream: bytes, head: Any, result: tuple[Any, ...]) -> None:
    """Compare the result for a request with what the readings expect."""
    status, line_end = result[0], stream.find(b"\n", 0, readings.LONGEST_LINE) + 1
    line_start = stream[: ws_frames.CHECKED_START_BYTES]
    line = readings.without_end(stream[:line_end])
    fields = None if isinstance(head, str) else readings.fields_of_head(head.lines[1:])
    if not line_end and status == 400:
        assert not readings.can_become_request_line(line_start), "refused too early"
    elif line_end and not readings.is_request_line(line):
        assert status == 400, result
    elif isinstance(head, str):
        assert status == (431 if head == "too long" else None), (head, result)
    elif fields is None:
        assert status == 400, result
    else:
        assert status == readings.status_of(line, fields), (fields, result)
    if status is None:
        assert line_end or not readings.is_junk_at_once(line_start), "refused too late"
        return
    answer_head, blank, body = result[1].partition(b"\r\n\r\n")
    lines = answer_head.split(b"\r\n")
    assert blank and lines[0].startswith(b"HTTP/1.1 %d " % status), result
    answered = readings.fields_of_head(lines[1:])
    assert answered is not None
    if status == 101:
        assert fields is not None and not body
        (key,) = fields[b"sec-websocket-key"]
        assert answered == {
            b"upgrade": [b"websocket"],
            b"connection": [b"Upgrade"],
            b"sec-websocket-accept": [readings.accept_of(key)],
        }
        return
    (size,) = answered[b"content-length"]
    assert answered[b"connection"] == [b"close"]
    has_body = not stream.startswith(b"HEAD ")
    assert int(size) > 0 and len(body) == (int(size) if has_body else 0), result


def head_seeds() -> Iterator[bytes]:
    requests = [*test_ws_upgrade.ACCEPTED.values(), *test_ws_upgrade.JUNK.values(), UPGRADE]
    requests += [head for head, _ in test_ws_upgrade.REJECTED.values()]
    answers = [*test_ws_upgrade.GOOD_ANSWERS.values(), *test_ws_upgrade.BAD_ANSWERS.values()]
    for options, heads in ((0, requests), (IS_ANSWER, [*answers, SWITCHED])):
        for head in heads:
            if len(head) > 1000:  # longer than an input may be: shorten it by the fillers
                for short, long in FILLERS.items():
                    head = head.replace(long, short)
                yield bytes([options | HAS_FILLERS]) + head
            else:
                yield bytes([options]) + head + frame(BINARY, b"behind")
                yield bytes([options]) + head[: len(head) * 2 // 3]
                yield bytes([options | HAS_FILLERS]) + head[:-2] + b"X: \0\r\n\r\n"
                yield bytes([options | HAS_FILLERS]) + head[:-2] + b"X:\0\r\n" * 3 + b"\r\n"
    for space in OTHER_SPACE:
        for value in (b"websocket", b"Upgrade", b"13"):
            for one in (space + value, value + space):
                yield b"\0" + UPGRADE.replace(b": " + value, b": " + one)
    yield bytes([HAS_FILLERS]) + b"GET /\0\0 HTTP/1.1\r\n\r\n"


# Frames. The first byte of an input selects whether the frames are masked, and whether the word
# "filler" is replaced by a payload of more than TRANSLATED_BYTES, which is unmasked by translation.

IS_MASKED, HAS_PAYLOAD = 1, 2
CODES = (1000, 1004, 1006, 1014, 3000, 4999)  # at these, the codes that may be sent begin or end
FILLER = b"\x00\xf0\x0d\x1b" * (ws_frames.TRANSLATED_BYTES // 4 + 8)


def read_carried(pieces: list[bytes], masked: bool) -> tuple[Found, int | None]:
    """Return what streams.read returns. The parser is carried."""
    reader = CarriedReader(
        ws_frames.FrameParser(must_be_masked=masked),
        lambda: ws_frames.FrameParser(not masked),  # the other role: resume must set this field too
    )
    found: Found = []
    for piece in pieces:
        try:
            for event in reader.receive(memoryview(bytearray(piece))):
                note(found, event.opcode, bytes(event.payload), event.is_last)
                if event.opcode == CLOSE:
                    return found, None
        except ws_frames.ProtocolError as error:
            return found, error.code
        parser = reader.reader
        assert len(parser._header) <= 13 and len(parser._control) <= 125, "too much is kept"
    return found, None


def check_frames(data: bytes) -> str:
    options, stream = (data[0], data[1:]) if data else (0, b"")
    masked = bool(options & IS_MASKED)
    if options & HAS_PAYLOAD:
        stream = stream.replace(b"filler", FILLER, 2)

    def outcome(pieces: list[bytes], is_carried: bool) -> object:
        return (read_carried if is_carried else read)(pieces, masked)

    found, code = one_outcome(stream, outcome)
    assert (found, code) == plain_reading(stream, masked)
    key = zlib.crc32(stream).to_bytes(4, "big") if masked else b""
    check_encoding(found, masked, key)
    if code is not None:
        return str(code)
    return "Close" if found and found[-1][0] == CLOSE else "no error"


def check_encoding(found: Found, masked: bool, key: bytes) -> None:
    """Encode what was found, and read it again."""
    encoded, in_message = b"", False
    for opcode, payload, is_last in found:
        is_later = opcode == BINARY and in_message
        code = CONTINUATION if is_later else opcode
        built = ws_frames.build_frame(code, payload, is_last, key)
        assert built == frame(code, payload, is_last, key or None)
        encoded += built
        in_message = in_message if opcode != BINARY else not is_last
    assert plain_reading(encoded, masked) == (found, None)


def frame_seeds() -> Iterator[bytes]:
    for masked, key in ((0, None), (IS_MASKED, test_ws_frames.KEY)):
        first = bytes([masked])
        for encode, _ in test_ws_frames.VALID.values():
            yield first + encode(key)[:600]
        for before, invalid, _, _ in test_ws_frames.INVALID.values():
            yield first + before(key) + invalid(key)[:600]
        yield from (first + one for one in test_fuzz.INVALID_FRAMES[bool(masked)])
        chance = random.Random(3)
        for _ in range(60):
            frames = test_fuzz.valid_frames(chance, bool(masked), [b"first"])
            yield first + test_fuzz.mutated_frames(frames, chance, bool(masked))[:600]
        long = frame(BINARY, FILLER, key=key)
        head = long[: -len(FILLER)]
        yield bytes([masked | HAS_PAYLOAD]) + head + b"filler" + frame(PING, b"p", key=key)
        yield bytes([masked | HAS_PAYLOAD]) + frame(BINARY, bytes(70_000), key=key)[:14] + b"filler"


# Whole clients: the framings, Session and Rendezvous. The first byte of an input selects the role
# of the listener, and the token, the side and the encoding of the client that waits.


def check_client(data: bytes) -> str:
    options, stream = (data[0], data[1:]) if data else (0, b"")
    case = test_fuzz.Case(
        stream,
        list(Role)[options & 1],
        handshake("other" if options & 2 else "token", "left" if options & 4 else None),
        "websocket" if options & 8 else "tcp",
    )
    # A quarter of the streams of more than 50 bytes are cut into bytes, because that is slow.
    max_bytewise = MAX_BYTEWISE if zlib.crc32(stream) % 4 == 0 else 50
    stories = [test_fuzz.story(one, case) for one in ways(stream, max_bytewise)]
    result = stories[0][0]
    for story, _ in stories:
        assert story == result, f"{story!r} and {result!r}"
    start = result.head
    if not start.startswith(b"HTTP/1.1 101 "):
        check_other_client(stream, case, result)
        return "HTTP" if start.startswith(b"HTTP") else start.decode().strip() or result.state.value
    head = readings.head_reading(stream)
    assert isinstance(head, readings.Head)
    found, code = plain_reading(stream[head.size :], masked=True)
    waiting = parse_handshake(case.partner[:-1])
    assert waiting is not None
    assert (result.state, *result[2:]) == test_fuzz.expected(found, code, waiting)
    pings = [payload for opcode, payload, _ in found if opcode == PING]
    for _, answers in stories:
        assert answers == pings[: len(answers)]
        is_refused = result.payload not in (b"", b"ok\n")
        assert is_refused or len(answers) == len(pings)
    return f"WebSocket, {result.state.value}"


def check_other_client(stream: bytes, case: test_fuzz.Case, result: test_fuzz.Story) -> None:
    """Check what holds for every client that is not upgraded."""
    assert result.payload == b"" and result.close is None
    if result.head == b"ok\n":
        behind = stream.partition(b"\n")[2]
        assert result.partner_payload == b"ok\n" + behind
        assert result.records == [("happy", len(behind))]
    else:
        assert result.partner_payload == b"" and ("lonely", 0) in result.records
        assert all(size == 0 for _, size in result.records)
    if case.role is Role.WEBSOCKET and not stream.startswith(b"please relay "):
        assert result.head[:4] in (b"", b"HTTP"), "an answer that is not HTTP"


def client_seeds() -> Iterator[bytes]:
    chance = random.Random(4)
    for _ in range(300):
        case = test_fuzz.client_case(chance)
        options = list(Role).index(case.role) + 2 * (b"other" in case.partner)
        options += 4 * (b"left" in case.partner) + 8 * (case.partner_kind == "websocket")
        if len(case.stream) < 1500:
            yield bytes([options]) + case.stream


# Rates and sizes.


def check_size(data: bytes) -> str:
    text = text_of(data)
    expected = readings.size_reading(text)
    try:
        size = parse_size(text)
    except UsageError as error:
        assert expected is None, f"refused, expected {expected}"
        assert str(error).startswith(repr(text)) and "\n" not in str(error)
    else:
        assert size == expected and type(size) is int and size >= 0
        if size < 10**15:  # a number may have 15 digits
            assert parse_size(str(size)) == parse_size(f"{size}B") == size
            assert size >= 10**15 // 8 or parse_size(f"{size * 8}bit") == size
    of_rate = readings.size_reading(text[:-2] if text.endswith("/s") else text)
    try:
        rate = parse_rate(text)
    except UsageError as error:
        assert "\n" not in str(error)
        assert of_rate is None or 0 < of_rate < 1000, of_rate
        return "no rate" if of_rate is None else "too small"
    assert rate == of_rate and (rate == 0 or rate >= 1000)
    return "rate" if rate else "none"


def size_seeds() -> Iterator[bytes]:
    texts = parametrized(test_rates.test_sizes) + parametrized(test_rates.test_rates)
    yield from bytes_of([*texts, *test_rates.NO_SIZES, "999B/s", "7kbit"])


TARGETS = {
    "handshake": Target(
        check_handshake,
        handshake_seeds,
        [b"please relay ", b" for side ", TOKEN, b"left000000000000", b"\n", b"0" * 16],
        frozenset(["unfinished", "paired", "impatient", "waiting", "bad"]),
        1200,
    ),
    "endpoint": Target(
        check_endpoint,
        endpoint_seeds,
        [
            *(kind.encode() + b":" for kind in readings.FIELDS_OF_KINDS),
            *(
                name.encode() + b"="
                for names in readings.FIELDS_OF_KINDS.values()
                for name in names
            ),
            *(b"haproxy:", b"\\:", b"\\", b"INET6", b"777", b"1000", b"/run/x"),
            *(b"%d" % (most + n) for most in {*readings.HIGHEST.values()} for n in (0, 1)),
        ],
        frozenset(
            [*readings.FIELDS_OF_KINDS, "a wrong field", "suggestion", "no suggestion"],
        ),
        120,
    ),
    "proxy": Target(
        check_proxy_header,
        proxy_seeds,
        [
            *(b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN", b"\r\n", readings.SIGNATURE),
            *(b"\x21\x11\0\x0c", b"\x21\x21\0\x24", b"\x20\0\0\0", b"65535", b" 0", b"::ffff:"),
            *(b"255.255.255.255", b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
        ],
        frozenset(
            ["error", "unfinished", "nothing told"]
            + [f"version {n}, IPv{ip}" for n in (1, 2) for ip in (4, 6)]
        ),
        4200,
    ),
    "forwarded": Target(
        check_forwarded,
        forwarded_seeds,
        [
            *(b"unix", b"/0", b"/24", b"/96", b"/128", b"::ffff:", b"::/0", b"0.0.0.0/0", b"10."),
            *(b"127.0.0.1", b"::1", b"[", b"]:80", b":80", b", ", b"%eth0", b"\n", b"2001:db8::"),
            *OTHER_SPACE,
        ],
        frozenset(["none", "allowed", "refused"]),
        300,
    ),
    "http": Target(
        check_head,
        head_seeds,
        [
            *(b"GET ", b"HEAD ", b"OPTIONS ", b"POST ", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n"),
            *(b"\r\n\r\n", b"\n\n", b"\r\n", b"Host: h\r\n", b"Upgrade: websocket\r\n"),
            *(b"\0", b"\1", *OTHER_SPACE),
            *(b"Connection: Upgrade\r\n", b"Sec-WebSocket-Version: 13\r\n", b"HTTP/1.1 101 "),
            *(b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", b"Sec-WebSocket-Protocol: x\r\n"),
        ],
        frozenset(
            ["None", "101", "200", "400", "405", "426", "431", "switched", "unfinished", "failed"]
        ),
        800,
    ),
    "frames": Target(
        check_frames,
        frame_seeds,
        [
            *(bytes([bits | code]) for bits in (0, 128) for code in (BINARY, CLOSE, PING, PONG)),
            *(b"\xfe\0\x7e", b"\xff\0\0\0\0\0\1\0\0", b"\x88\x82\0\0\0\0\3\xe8", b"filler"),
            *(
                code.to_bytes(2, "big")
                for border in CODES
                for code in range(border - 1, border + 2)
            ),
            *(b"\x82\x85\0\0\0\0first", b"\x88\x02\3\xe8", b"\x80\x80\0\0\0\0"),
        ],
        frozenset(["1002", "1003", "1007", "Close", "no error"]),
        600,
    ),
    "client": Target(
        check_client,
        client_seeds,
        [
            UPGRADE,
            frame(BINARY, handshake("token", "right"), key=b"\0\0\0\1"),
            frame(PING, b"p", key=b"\0\0\0\1"),
            frame(CLOSE, b"\3\xe8", key=b"\0\0\0\1"),
            handshake("token", "right"),
            *(b"GET ", b"please relay ", b"\r\n\r\n", b"\n", b"\x82\x80\0\0\0\0"),
        ],
        frozenset(
            ["HTTP", "ok", "impatient", "bad handshake"]
            + ["wait_upgrade", "wait_handshake", "wait_partner"]
            + [f"WebSocket, {state.value}" for state in State if state not in OTHER_STATES]
        ),
        1500,
    ),
    "size": Target(
        check_size,
        size_seeds,
        [*(unit.encode() for unit in readings.UNITS if unit), b"/s", b".", b"999999999", b" "],
        frozenset(["rate", "none", "no rate", "too small"]),
        60,
    ),
}
