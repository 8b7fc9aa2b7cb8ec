"""Garbage: a Session survives it, however it is cut; an endpoint is refused in one way only.

RELAY_FUZZ_CASES says how many WebSocket streams are tried (`make fuzz`: 200,000), and with them
how much of all else. Each case has a seed of its own, which is in the message of a failure.
RELAY_FUZZ_FIRST is the number of the first one, for a run of other cases.
"""

from __future__ import annotations

import os
import random
import string
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from helpers import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    FakeTransport,
    close_payload,
    cut,
    cut_at_random,
    frame,
    handshake,
)
from invariants import check_rendezvous
from streams import (
    SWITCHED,
    UPGRADE,
    Found,
    FramedTransport,
    Room,
    plain_reading,
    read,
    read_frames,
)

from transit_relay import (
    ENDPOINT_FIELDS,
    Endpoint,
    Handshake,
    RawFraming,
    Rendezvous,
    Role,
    Session,
    State,
    UsageError,
    UsageRecord,
    answer_visitor,
    parse_endpoint,
    parse_handshake,
)
from ws_frames import AnswerReader, RequestReader, UpgradeFailed, UpgradeRejected

CASES = int(os.environ.get("RELAY_FUZZ_CASES", "5000"))
FIRST = int(os.environ.get("RELAY_FUZZ_FIRST", "0"))
# Four tests try a third each; one case in five has no accident, so about CASES have one.
THIRD, SIXTEENTH = CASES // 3, CASES // 16
ARE_MANY = CASES >= 2000  # enough to ask whether they are mere noise


def seeds(name: str, count: int) -> Iterator[str]:
    """The seeds of so many cases. Says now and then how far they are: see it with `pytest -s`."""
    for number in range(count):
        if number and number % 10_000 == 0:
            print(f"\n{name}: {number:,} of {count:,} cases", end="", flush=True)
        yield f"{name} {FIRST + number}"


def cuts(data: bytes, chance: random.Random) -> Iterator[list[bytes]]:
    """Whole, into bytes, and a few times at random."""
    yield [data]
    yield cut(data, range(1, len(data)))
    for _ in range(4):
        yield cut_at_random(data, chance, chance.randint(1, 8))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """`data` with a few small accidents."""
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(data) + 1)
        end = min(len(data), place + chance.randint(1, 4))
        inserted = chance.choice([b"", b"\n", b"\r\n", b"\0", b" ", b"_", b"\xff", b"ok\n"])
        accident = chance.choice(["replace", "insert", "remove", "repeat"])
        if accident == "replace":
            data = data[:place] + (inserted * 4)[: end - place] + data[end:]
        elif accident == "insert":
            data = data[:place] + inserted + data[place:]
        elif accident == "remove":
            data = data[:place] + data[end:]
        else:
            data = data[:end] + data[place:]
    return data


def garbage(chance: random.Random) -> bytes:
    """What somebody may send: a bad handshake, a good one with something behind it, anything."""
    noise = bytes(chance.choices(range(256), k=chance.choice([0, 1, 20, 1023, 1024, 1025, 3000])))
    if chance.random() < 0.3:
        noise = noise.replace(b"\n", b"")
    good = handshake("token", chance.choice(["left", "right", None]))
    kind = chance.choice(["mutated", "mutated", "followed", "noise"])
    if kind == "mutated":
        return mutated(good, chance) + noise[: chance.choice([0, 10])]
    return good + noise if kind == "followed" else noise


def outcome(pieces: list[bytes], partner_side: str | None, partner: bool) -> tuple[object, ...]:
    """All that comes of a stream that is cut like this, seen from both sides and the records."""
    records: list[UsageRecord] = []
    rendezvous = Rendezvous(records.append, lambda: 100.0)
    waiting = Session(FakeTransport(), rendezvous, 0.0)
    if partner:
        waiting.line_received(handshake("token", partner_side)[:-1])
    session = Session(FakeTransport(), rendezvous, 0.0)
    framing = RawFraming(session, session.transport)
    for piece in pieces:
        buffer = bytearray(piece)
        framing.receive(memoryview(buffer))
        buffer[:] = bytes(len(buffer))  # the next client's bytes come into the same buffer
        check_rendezvous(rendezvous)
    state = session.state
    session.connection_lost()
    waiting.connection_lost()
    assert isinstance(session.transport, FakeTransport) and isinstance(waiting.pipe, FakeTransport)
    return state, session.transport.sent, waiting.pipe.sent, records


def test_handshakes() -> None:
    """No exception, and every cut of the same stream comes to the same."""
    seen = set()
    for seed in seeds("handshake", SIXTEENTH):
        chance = random.Random(seed)
        stream = garbage(chance)
        side, partner = chance.choice(["left", "right", None]), chance.random() < 0.7
        whole = None
        for pieces in cuts(stream, chance):
            try:
                result = outcome(pieces, side, partner)
            except Exception as error:
                raise AssertionError(f"seed {seed!r}, {pieces!r}") from error
            whole = whole or result
            assert result == whole, f"seed {seed!r}, {pieces!r}"
        assert whole
        seen.add(whole[0])
    assert not ARE_MANY or len(seen) == 4  # the cases come into every state


def endpoint_text(chance: random.Random) -> str:
    """What somebody may write behind `--port`."""
    if chance.random() < 0.2:
        return "".join(chance.choices(string.printable, k=chance.randint(0, 30)))
    values = [
        *("0", "4001", "65535", "65536", "660", "888", "-1", "+1", "0x10", "1_0", " 1"),
        *("9" * 20, "9" * 5000, "٣", "²", "\0", "\n", "\udcff", "é", "", "=", ":", "\\"),
        *("\\:\\:1", "127.0.0.1", "/run/x.sock", "INET", "INET6", "x", "x\\=y"),
    ]
    kind = chance.choice([*ENDPOINT_FIELDS] * 5 + values)
    fields = []
    for _ in range(chance.randint(0, 3)):
        name = chance.choice([*ENDPOINT_FIELDS.get(kind, ()), "index"])
        value = chance.choice([*values[:5], *values])
        fields.append(value if chance.random() < 0.4 else f"{name}={value}")
    return ":".join([kind, *fields])


def test_endpoints() -> None:
    """An Endpoint or a UsageError, which says what was written."""
    good = 0
    for seed in seeds("endpoint", THIRD):
        text = endpoint_text(random.Random(seed))
        try:
            endpoint = parse_endpoint(text)
        except UsageError as error:
            assert text in str(error) or repr(text) in str(error), f"seed {seed!r}, {text!r}"
        except Exception as error:
            raise AssertionError(f"seed {seed!r}, {text!r}") from error
        else:
            good += 1
            assert isinstance(endpoint, Endpoint) and endpoint.text == text
            assert endpoint.kind in ENDPOINT_FIELDS and endpoint.backlog >= 1024
            assert 0 <= endpoint.port <= 65535 and 0 <= endpoint.mode <= 0o777
    assert not ARE_MANY or good > THIRD // 80  # the cases are not mere noise


# WebSocket: valid streams with small accidents. Three things are asked of each: no exception but
# those that are documented, the same outcome for every cut, and the right one, as `plain_reading`
# and `expected` have it.


def same_for_every_cut(
    seed: str, stream: bytes, chance: random.Random, outcome: Callable[[list[bytes]], object]
) -> object:
    """What comes of the stream: whole, cut at random places, and (it takes long) into bytes."""
    ways = [[stream]]
    for _ in range(2):
        ways.append(cut_at_random(stream, chance, chance.randint(1, 6)))
    if chance.random() < 0.5:
        ways.append(cut(stream, range(1, len(stream))))
    results = []
    for pieces in ways:
        try:
            results.append(outcome(pieces))
        except Exception as error:
            raise AssertionError(f"seed {seed!r}, {pieces!r}") from error
        assert results[-1] == results[0], f"seed {seed!r}, {pieces!r}"
    return results[0]


def payload(chance: random.Random) -> bytes:
    """A few bytes, or none, or so many that their length is spelled in another way."""
    return chance.randbytes(chance.choice([0, 0, 1, 2, 5, 5, 20, 20, 124, 125, 126, 130]))


def message(data: bytes, chance: random.Random, encode: Callable[..., bytes]) -> list[bytes]:
    """A message in a few frames, with other frames between them."""
    times = chance.choice([0, 0, 0, 1, 2, 3])
    pieces = cut(data, chance.choices(range(len(data) + 1), k=times))
    frames = []
    for number, piece in enumerate(pieces, 1):
        frames.append(encode(CONTINUATION if frames else BINARY, piece, number == len(pieces)))
        if number < len(pieces) and chance.random() < 0.3:
            frames.append(encode(chance.choice([PING, PONG]), chance.randbytes(3)))
    return frames


def valid_frames(chance: random.Random, masked: bool, first: list[bytes]) -> list[bytes]:
    """What one side may say: these messages, others, Pings, and perhaps a Close at the end."""

    def encode(opcode: int, data: bytes = b"", is_final: bool = True) -> bytes:
        key = chance.choice([chance.randbytes(4), bytes(4)]) if masked else None
        return frame(opcode, data, is_final, key)

    frames = [one for data in first for one in message(data, chance, encode)]
    for _ in range(chance.randint(0, 3)):
        if chance.random() < 0.3:
            frames.append(encode(chance.choice([PING, PONG]), payload(chance)[:125]))
        else:
            frames += message(payload(chance), chance, encode)
    if chance.random() < 0.6:
        code = chance.choice([None, 1000, 1001, 3000, 4999])
        reason = chance.choice([b"", b"", b"bye", "\xe9\u20ac\U0001f600".encode() * 3])
        frames.append(encode(CLOSE, close_payload(code, reason if code else b"")))
    return frames


def with_accidents(frames: list[bytes], chance: random.Random, masked: bool) -> bytes:
    """The frames, of which some are mangled, lost or said twice. One time in five none is."""
    frames = list(frames)
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        if not frames or chance.random() < 0.25:
            place = chance.choice([chance.randrange(len(frames) + 1), len(frames)])
            frames.insert(place, chance.choice(SCRAPS[masked]))
            continue
        place = chance.randrange(len(frames))
        one = bytearray(frames[place])
        accident = chance.choice(["head", "head", "bit", "lost", "twice", "later", "cut", "any"])
        if not one or accident == "lost":
            del frames[place]
        elif accident == "head":  # one bit of what says most
            one[chance.randrange(min(2, len(one)))] ^= 1 << chance.randrange(8)
            frames[place] = bytes(one)
        elif accident == "bit":
            one[chance.randrange(len(one))] ^= 1 << chance.randrange(8)
            frames[place] = bytes(one)
        elif accident == "twice":
            frames.insert(place, frames[place])
        elif accident == "later":
            frames.insert(chance.randrange(len(frames)), frames.pop(place))
        elif accident == "cut":
            frames[place] = bytes(one[: chance.randrange(len(one))])
        else:
            frames[place] = mutated(bytes(one), chance)
    return b"".join(frames)


def scraps(key: bytes | None) -> list[bytes]:
    """Frames that are wrong in themselves."""
    mask = 0x80 if key else 0
    lengths = [(126, b"\0\5"), (127, bytes(5) + b"\1\0\0"), (127, b"\x80" + bytes(7))]
    return [
        *(frame(opcode, b"ab", key=key) for opcode in (TEXT, TEXT, 3, 11)),
        *(frame(CLOSE, close_payload(1000, b"a\xff"), key=key), frame(PING, b"p", False, key)),
        *(frame(CLOSE, close_payload(999), key=key), frame(CLOSE, b"\3", key=key)),
        *(bytes([0x82, mask | short]) + long + (key or b"") for short, long in lengths),
    ]


SCRAPS = {True: scraps(b"\1\2\3\4"), False: scraps(None)}


@pytest.mark.parametrize("masked", [True, False], ids=["from a client", "from a server"])
def test_frames(masked: bool) -> None:
    seen: Counter[object] = Counter()
    for seed in seeds(f"frames {masked}", THIRD):
        chance = random.Random(seed)
        stream = with_accidents(valid_frames(chance, masked, [b"first"]), chance, masked)
        result = same_for_every_cut(seed, stream, chance, lambda pieces: read(pieces, masked))
        found, code = plain_reading(stream, masked)
        assert result == (found, code), f"seed {seed!r}"
        seen.update({opcode for opcode, _, _ in found} | {f"error {code}", len(found) > 3})
    shares: dict[object, int] = {BINARY: 2, True: 8, **dict.fromkeys((PING, PONG, CLOSE), 8)}
    shares |= {"error None": 4, "error 1002": 4, "error 1003": 120, "error 1007": 120}
    assert not ARE_MANY or not missing(seen, THIRD, shares), seen


def missing(seen: Counter[object], count: int, shares: dict[object, int]) -> list[object]:
    """What came less often than one time in so many: then the cases are mere noise."""
    return [kind for kind, share in shares.items() if seen[kind] < count // share]


def head(chance: random.Random) -> bytes:
    """A request: for an upgrade, mostly."""
    fields = [
        *("Host: h", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"),
        chance.choice(["Upgrade: websocket", "upgrade:WebSocket", "UPGRADE: h2c, websocket"]),
        chance.choice(["Connection: Upgrade", "connection: keep-alive, upgrade"]),
        *chance.sample(["Origin: null", "X:", "Cookie: \xe9"], chance.randint(0, 2)),
    ]
    chance.shuffle(fields)
    kind = chance.random()
    if kind < 0.2:  # as a whole an accident of some kind
        place = chance.randrange(len(fields))
        fields[place] = chance.choice([fields[place - 1], "X: y", "Sec-WebSocket-Version: 8", ": "])
    elif kind < 0.22:
        fields.append("X: " + "x" * 8192)
    method = chance.choice(["GET"] * 12 + ["HEAD", "POST", "OPTIONS"])
    version = chance.choice(["1"] * 12 + ["0", "2"])
    end = chance.choice(["\r\n"] * 3 + ["\n"])
    return end.join([f"{method} / HTTP/1.{version}", *fields, "", ""]).encode("latin-1")


def read_behind(
    pieces: list[bytes], reader: RequestReader | AnswerReader, masked: bool
) -> tuple[object, ...]:
    """What a reader says to a head; and behind it, the bytes that are frames, and what they say."""
    said: tuple[object, ...] = (None,)
    rest: list[bytes] | None = None
    for piece in pieces:
        if rest is not None:
            rest.append(piece)
            continue
        try:
            got = reader.receive(memoryview(bytearray(piece)))
            if isinstance(got, tuple):
                request, got = got
                if not request.wants_websocket:
                    return 200, answer_visitor(request)
                said = 101, request.accept()
            elif got is not None:
                said = (101,)
        except UpgradeRejected as refusal:
            return refusal.status, refusal.answer
        except UpgradeFailed as failure:
            return (str(failure),)
        if got is not None:
            rest = [bytes(got)]
    return said if rest is None else (*said, b"".join(rest), read(rest, masked))


def check_heads(name: str, count: int, is_server: bool) -> Counter[object]:
    """Try heads, and frames behind them. Give how often each thing was said to a head."""
    seen: Counter[object] = Counter()
    for seed in seeds(name, count):
        chance = random.Random(seed)
        good = head(chance) if is_server else SWITCHED
        start = mutated(good, chance) if chance.random() < 0.5 else good
        frames = with_accidents(valid_frames(chance, is_server, [b"first"]), chance, is_server)

        def outcome(pieces: list[bytes]) -> tuple[object, ...]:
            reader = RequestReader() if is_server else AnswerReader(b"the sample nonce")
            return read_behind(pieces, reader, is_server)

        result = same_for_every_cut(seed, start + frames, chance, outcome)
        assert isinstance(result, tuple)
        seen[result[0]] += 1
        if result[0] == 101:
            assert result[-1] == plain_reading(result[-2], is_server), f"seed {seed!r}"
            assert start is not good or result[-2] == frames, f"seed {seed!r}"
        elif not is_server:
            assert start is not good, f"seed {seed!r}"
    return seen


def test_requests() -> None:
    count = THIRD * 3 // 4
    seen = check_heads("request", count, is_server=True)
    shares: dict[object, int] = {101: 6, 200: 50, 400: 6, 405: 40, 426: 80, 431: 200, None: 200}
    assert set(seen) <= set(shares) and not (ARE_MANY and missing(seen, count, shares)), seen


def test_answers() -> None:
    count = THIRD // 4
    seen = check_heads("answer", count, is_server=False)
    shares: dict[object, int] = {
        101: 4,
        "the answer is not HTTP/1.1": 8,
        "the answer upgrades to something else": 30,
        "the answer is not to our request": 20,
        None: 100,
    }
    assert not ARE_MANY or not missing(seen, count, shares), seen


# The whole of it: what a client sends to a relay, and what comes of that for all.


class Story(NamedTuple):
    """What one can see of a client and of somebody who may be its partner."""

    state: str
    head: bytes  # what the client was sent before any frame
    said: bytes  # ... in binary messages
    close: bytes | None  # ... in the Close
    partner_said: bytes
    records: list[tuple[str, int]]  # moods and bytes, sorted


class Case(NamedTuple):
    """What somebody sends to which kind of listener, and who is there."""

    stream: bytes
    role: Role
    partner: bytes  # the line of somebody who waits
    partner_kind: str


def joined(frames: list[tuple[int, bytes]]) -> tuple[bytes, list[bytes], bytes | None]:
    """What was said in binary messages; the Pongs; and the Close."""
    close = frames.pop()[1] if frames and frames[-1][0] == CLOSE else None
    assert {opcode for opcode, _ in frames} <= {BINARY, PONG}, frames
    said = b"".join(payload for opcode, payload in frames if opcode == BINARY)
    return said, [payload for opcode, payload in frames if opcode == PONG], close


def story(pieces: list[bytes], case: Case) -> tuple[Story, list[bytes]]:
    """Let it happen, and then let both be gone. Also gives the Pongs."""
    room = Room()
    partner = room.socket() if case.partner_kind == "websocket" else room.client()
    partner.feed(frame(BINARY, case.partner) if case.partner_kind == "websocket" else case.partner)
    wire: FramedTransport = room.client(case.role)
    for piece in pieces:
        wire.feed(piece)
        check_rendezvous(room.rendezvous)
    state = wire.session.state
    wire.session.connection_lost()
    partner.session.connection_lost()
    check_rendezvous(room.rendezvous)
    start, said, pongs, close = wire.sent, b"", [], None
    if start.startswith(b"HTTP/1.1 101 "):
        size = start.index(b"\r\n\r\n") + 4
        said, pongs, close = joined(read_frames(start[size:]))
        start = start[:size]
    partner_said = partner.sent
    if case.partner_kind == "websocket":
        partner_said, none, its_close = joined(read_frames(partner.sent))
        assert not none and its_close == close_payload(1000)
    records = sorted((record.mood, record.total_bytes) for record in room.records)
    return Story(state, start, said, close, partner_said, records), pongs


def expected(
    found: Found, code: int | None, waiting: Handshake
) -> tuple[str, bytes, bytes, bytes, list[tuple[str, int]]]:
    """What a Story says of the frames behind an upgrade, without its head: PROTOCOL.md, 1 and 2."""
    line, data = b"", b""
    ours: Handshake | None = None
    state = State.WAIT_HANDSHAKE
    for opcode, payload, is_last in found:
        if opcode != BINARY:
            continue
        if state == State.WAIT_HANDSHAKE:
            line += payload
            end = line.find(b"\n", 0, 1024)
            if end < 0 and len(line) < 1024 and not (is_last and parse_handshake(line)):
                continue
            line, payload = (line[:end], line[end + 1 :]) if end >= 0 else (line[:1024], b"")
            ours = parse_handshake(line)
            if ours is None:
                records = sorted([("errory", 0), ("lonely", 0)])
                return State.DONE, b"bad handshake\n", close_payload(1000), b"", records
            state = (
                State.RELAYING
                if ours.token == waiting.token and ours.matches(waiting)
                else State.WAIT_PARTNER
            )
        if state == State.WAIT_PARTNER and payload:
            records = sorted([("impatient", 0), ("lonely", 0)])
            return State.DONE, b"impatient\n", close_payload(1000), b"", records
        data += payload
    close = close_payload(code or 1000)
    if found and found[-1][0] == CLOSE:
        close = found[-1][1][:2]
    is_over = code is not None or (found and found[-1][0] == CLOSE)
    end_state = State.DONE if is_over else state
    if state == State.RELAYING:
        return end_state, b"ok\n", close, b"ok\n" + data, [("happy", len(data))]
    mood = "empty" if state == State.WAIT_HANDSHAKE else "lonely"
    return end_state, b"", close, b"", sorted([(mood, 0), ("lonely", 0)])


def client_case(chance: random.Random) -> Case:
    """A client of some kind; mostly one that would get on well, but for an accident."""
    line = handshake("token", chance.choice(["left", "right", "right", None]))
    kind = chance.random()
    if kind < 0.1:
        stream = garbage(chance)[:1100]
    else:
        start = head(chance) if kind < 0.3 else UPGRADE
        if kind < 0.15:
            start = mutated(start, chance)
        if chance.random() < 0.15:
            line = mutated(line, chance)
        elif chance.random() < 0.05:
            line = line[:-1] + b"x" * 1000
        cut = chance.choice([0, 0, 0, 9, 80, len(line) - 1, len(line)])
        first = [line[:cut], line[cut:]] if cut else [line]
        if chance.random() < 0.3:
            first[-1] = first[-1][:-1]
        elif chance.random() < 0.3:
            first[-1] += b"early"
        frames = valid_frames(chance, True, [b""] * (chance.random() < 0.1) + first)
        stream = start + with_accidents(frames, chance, masked=True)
    partner = handshake(chance.choice(["token"] * 3 + ["other"]), chance.choice(["left", None]))
    return Case(stream, chance.choice(list(Role)), partner, chance.choice(["tcp", "websocket"]))


def test_clients() -> None:
    """DetectFraming, HttpFraming, WebSocketFraming, Session and Rendezvous, all together."""
    seen: Counter[object] = Counter()
    for seed in seeds("client", THIRD):
        chance = random.Random(seed)
        case = client_case(chance)
        pongs: list[list[bytes]] = []

        def outcome(
            pieces: list[bytes], case: Case = case, pongs: list[list[bytes]] = pongs
        ) -> Story:
            told, answers = story(pieces, case)
            pongs.append(answers)
            return told

        told = same_for_every_cut(seed, case.stream, chance, outcome)
        assert isinstance(told, Story)
        seen.update({told.state, *(mood for mood, _ in told.records), told.head[9:12], told.close})
        if not told.head.startswith(b"HTTP/1.1 101 "):
            continue
        got = RequestReader().receive(case.stream)
        assert got is not None
        found, code = plain_reading(got[1], masked=True)
        waiting = parse_handshake(case.partner[:-1])
        assert waiting is not None
        right = expected(found, code, waiting)
        assert (told.state, *told[2:]) == right, f"seed {seed!r}"
        # Each Ping is answered, in order; whether those behind a refusal are, depends on the cut.
        pings = [payload for opcode, payload, _ in found if opcode == PING]
        for answers in pongs:
            assert answers == pings[: len(answers)], f"seed {seed!r}"
            is_refused = told.said not in (b"", b"ok\n")
            assert is_refused or len(answers) == len(pings), f"seed {seed!r}"
        seen["Ping"] += bool(pings)
    states = State.DONE, State.RELAYING, State.WAIT_HANDSHAKE, State.WAIT_PARTNER
    moods = "happy", "lonely", "errory", "impatient", "empty"
    codes = {1000: 6, 1001: 80, 1002: 10, 1003: 160, 1007: 160}
    shares: dict[object, int] = {b"101": 3, b"400": 40, b"405": 80, b"426": 200, b"200": 200}
    shares |= {"Ping": 8, b"": 40} | dict.fromkeys(states, 150) | dict.fromkeys(moods, 20)
    shares |= {close_payload(code): share for code, share in codes.items()}
    assert not ARE_MANY or not missing(seen, THIRD, shares), seen
