"""Random input: valid, mutated and garbage. It raises no undocumented error.

Every way of cutting a stream has the same outcome. RELAY_FUZZ_CASES is the number of WebSocket
streams (`make fuzz`: 200,000); the other numbers are fractions of it. Each case has its own seed,
which is in the message of a failure. RELAY_FUZZ_FIRST is the number of the first case.
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
    parse_endpoint,
    parse_handshake,
)
from ws_frames import (
    HTTP_TEXT,
    MAX_HEAD_BYTES,
    MAX_HEAD_LINE_BYTES,
    TRANSLATED_BYTES,
    AnswerReader,
    RequestReader,
    UpgradeFailed,
    UpgradeRejected,
)

CASES = int(os.environ.get("RELAY_FUZZ_CASES", "2000"))
FIRST = int(os.environ.get("RELAY_FUZZ_FIRST", "0"))
# Four tests try a third each. One case in five is not mutated, so about CASES are.
THIRD, SIXTEENTH = CASES // 3, CASES // 16
ARE_MANY = CASES >= 2000  # enough to check that they reach every outcome


def seeds(name: str, count: int) -> Iterator[str]:
    """Yield the seeds of `count` cases. Print the progress, which `pytest -s` shows."""
    for number in range(count):
        if number and number % 10_000 == 0:
            print(f"\n{name}: {number:,} of {count:,} cases", end="", flush=True)
        yield f"{name} {FIRST + number}"


def cuts(data: bytes, chance: random.Random) -> Iterator[list[bytes]]:
    """Yield the data whole, cut into bytes, and cut at random a few times."""
    yield [data]
    yield cut(data, range(1, len(data)))
    for _ in range(4):
        yield cut_at_random(data, chance, chance.randint(1, 8))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return `data` with one to three small random changes."""
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.randint(1, 4))
        inserted = chance.choice([b"", b"\n", b"\r\n", b"\0", b" ", b"_", b"\xff", b"ok\n"])
        change = chance.choice(["replace", "insert", "remove", "repeat"])
        if change == "replace":
            data = data[:start] + (inserted * 4)[: end - start] + data[end:]
        elif change == "insert":
            data = data[:start] + inserted + data[start:]
        elif change == "remove":
            data = data[:start] + data[end:]
        else:
            data = data[:end] + data[start:]
    return data


def garbage(chance: random.Random) -> bytes:
    """Return a mutated handshake, a valid one followed by random bytes, or random bytes."""
    noise = bytes(chance.choices(range(256), k=chance.choice([0, 1, 20, 1023, 1024, 1025, 3000])))
    if chance.random() < 0.3:
        noise = noise.replace(b"\n", b"")
    valid = handshake("token", chance.choice(["left", "right", None]))
    kind = chance.choice(["mutated", "mutated", "followed", "noise"])
    if kind == "mutated":
        return mutated(valid, chance) + noise[: chance.choice([0, 10])]
    return valid + noise if kind == "followed" else noise


def outcome(pieces: list[bytes], partner_side: str | None, partner: bool) -> tuple[object, ...]:
    """Feed the pieces to a Session. Return its state, what both sides received, and the records."""
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
        buffer[:] = bytes(len(buffer))  # the relay reuses its buffer for the next client
        check_rendezvous(rendezvous)
    state = session.state
    session.connection_lost()
    waiting.connection_lost()
    assert isinstance(session.transport, FakeTransport) and isinstance(
        waiting.transport, FakeTransport
    )
    return state, session.transport.sent, waiting.transport.sent, records


def test_handshakes() -> None:
    """There is no exception, and every cut of a stream has the same outcome."""
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
    assert not ARE_MANY or len(seen) == 4  # the cases reach every state


def endpoint_text(chance: random.Random) -> str:
    """Return a random value for `--port`."""
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
    """The result is an Endpoint, or a UsageError that quotes the text."""
    valid = 0
    for seed in seeds("endpoint", THIRD):
        text = endpoint_text(random.Random(seed))
        try:
            endpoint = parse_endpoint(text)
        except UsageError as error:
            assert text in str(error) or repr(text) in str(error), f"seed {seed!r}, {text!r}"
        except Exception as error:
            raise AssertionError(f"seed {seed!r}, {text!r}") from error
        else:
            valid += 1
            assert isinstance(endpoint, Endpoint) and endpoint.text == text
            assert endpoint.kind in ENDPOINT_FIELDS and endpoint.backlog >= 1024
            assert 0 <= endpoint.port <= 65535 and 0 <= endpoint.mode <= 0o777
    assert not ARE_MANY or valid > THIRD // 80  # some texts are valid


# WebSocket: valid streams with a few random changes. The tests check three things: there are no
# undocumented exceptions; every cut has the same outcome; the outcome is that of `plain_reading`
# and `expected`.


def same_for_every_cut(
    seed: str, stream: bytes, chance: random.Random, outcome: Callable[[list[bytes]], object]
) -> object:
    """Return the outcome of the stream. Check that it is the same whole and cut.

    Only half of the streams are also cut into bytes, because that is slow.
    """
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
    """Return up to 130 random bytes, rarely so many that unmasking takes its other path."""
    if chance.random() < 0.01:
        return chance.randbytes(chance.randint(TRANSLATED_BYTES - 2, TRANSLATED_BYTES + 10))
    return chance.randbytes(chance.choice([0, 0, 1, 2, 5, 5, 20, 20, 124, 125, 126, 130]))


def message(data: bytes, chance: random.Random, encode: Callable[..., bytes]) -> list[bytes]:
    """Return a message in one to four frames, with control frames between them."""
    times = chance.choice([0, 0, 0, 1, 2, 3])
    pieces = cut(data, chance.choices(range(len(data) + 1), k=times))
    frames = []
    for number, piece in enumerate(pieces, 1):
        frames.append(encode(CONTINUATION if frames else BINARY, piece, number == len(pieces)))
        if number < len(pieces) and chance.random() < 0.3:
            frames.append(encode(chance.choice([PING, PONG]), chance.randbytes(3)))
    return frames


def valid_frames(chance: random.Random, masked: bool, first: list[bytes]) -> list[bytes]:
    """Return frames that one side may send: the messages `first`, others, Pings, often a Close."""

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


def mutated_frames(frames: list[bytes], chance: random.Random, masked: bool) -> bytes:
    """Return the frames joined. In four of five cases some are changed, lost, moved or repeated."""
    frames = list(frames)
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        if not frames or chance.random() < 0.25:
            index = chance.choice([chance.randrange(len(frames) + 1), len(frames)])
            frames.insert(index, chance.choice(INVALID_FRAMES[masked]))
            continue
        index = chance.randrange(len(frames))
        changed = bytearray(frames[index])
        change = chance.choice(["head", "head", "bit", "lost", "twice", "later", "cut", "any"])
        if not changed or change == "lost":
            del frames[index]
        elif change == "head":  # a bit of the first two bytes
            changed[chance.randrange(min(2, len(changed)))] ^= 1 << chance.randrange(8)
            frames[index] = bytes(changed)
        elif change == "bit":
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            frames[index] = bytes(changed)
        elif change == "twice":
            frames.insert(index, frames[index])
        elif change == "later":
            frames.insert(chance.randrange(len(frames)), frames.pop(index))
        elif change == "cut":
            frames[index] = bytes(changed[: chance.randrange(len(changed))])
        else:
            frames[index] = mutated(bytes(changed), chance)
    return b"".join(frames)


def invalid_frames(key: bytes | None) -> list[bytes]:
    """Return frames that are invalid in every state."""
    mask = 0x80 if key else 0
    lengths = [(126, b"\0\5"), (127, bytes(5) + b"\1\0\0"), (127, b"\x80" + bytes(7))]
    return [
        *(frame(opcode, b"ab", key=key) for opcode in (TEXT, TEXT, 3, 11)),
        *(frame(CLOSE, close_payload(1000, b"a\xff"), key=key), frame(PING, b"p", False, key)),
        *(frame(CLOSE, close_payload(999), key=key), frame(CLOSE, b"\3", key=key)),
        *(bytes([0x82, mask | short]) + long + (key or b"") for short, long in lengths),
    ]


INVALID_FRAMES = {True: invalid_frames(b"\1\2\3\4"), False: invalid_frames(None)}


@pytest.mark.parametrize("masked", [True, False], ids=["from a client", "from a server"])
def test_frames(masked: bool) -> None:
    seen: Counter[object] = Counter()
    for seed in seeds(f"frames {masked}", THIRD):
        chance = random.Random(seed)
        stream = mutated_frames(valid_frames(chance, masked, [b"first"]), chance, masked)
        result = same_for_every_cut(seed, stream, chance, lambda pieces: read(pieces, masked))
        found, code = plain_reading(stream, masked)
        assert result == (found, code), f"seed {seed!r}"
        seen.update({opcode for opcode, _, _ in found} | {f"error {code}", len(found) > 3})
    shares: dict[object, int] = {BINARY: 2, True: 8, **dict.fromkeys((PING, PONG, CLOSE), 8)}
    shares |= {"error None": 4, "error 1002": 4, "error 1003": 120, "error 1007": 120}
    assert not ARE_MANY or not missing(seen, THIRD, shares), seen


def missing(seen: Counter[object], count: int, shares: dict[object, int]) -> list[object]:
    """Return the kinds that occurred in fewer than one of `shares[kind]` cases."""
    return [kind for kind, share in shares.items() if seen[kind] < count // share]


def head(chance: random.Random) -> bytes:
    """Return a request, usually a valid upgrade."""
    fields = [
        *("Host: h", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"),
        chance.choice(["Upgrade: websocket", "upgrade:WebSocket", "UPGRADE: h2c, websocket"]),
        chance.choice(["Connection: Upgrade", "connection: keep-alive, upgrade"]),
        *chance.sample(["Origin: null", "X:", "Cookie: \xe9"], chance.randint(0, 2)),
    ]
    chance.shuffle(fields)
    kind = chance.random()
    if kind < 0.2:  # one field is repeated, lost, changed or malformed
        index = chance.randrange(len(fields))
        fields[index] = chance.choice([fields[index - 1], "X: y", "Sec-WebSocket-Version: 8", ": "])
    elif kind < 0.22:
        size = chance.choice([MAX_HEAD_LINE_BYTES, MAX_HEAD_BYTES // 4])
        fields += ["X: " + "x" * size] * (MAX_HEAD_BYTES // size)
    method = chance.choice(["GET"] * 12 + ["HEAD", "POST", "OPTIONS"])
    version = chance.choice(["1"] * 12 + ["0", "2"])
    end = chance.choice(["\r\n"] * 3 + ["\n"])
    return end.join([f"{method} / HTTP/1.{version}", *fields, "", ""]).encode("latin-1")


def read_behind(
    pieces: list[bytes], reader: RequestReader | AnswerReader, masked: bool
) -> tuple[object, ...]:
    """Return the result for the head, the bytes that follow it, and the frames in these bytes."""
    result: tuple[object, ...] = (None,)
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
                    return 200, request.answer(HTTP_TEXT)
                result = 101, request.accept()
            elif got is not None:
                result = (101,)
        except UpgradeRejected as refusal:
            return refusal.status, refusal.answer()
        except UpgradeFailed as failure:
            return (str(failure),)
        if got is not None:
            rest = [bytes(got)]
    return result if rest is None else (*result, b"".join(rest), read(rest, masked))


def check_heads(name: str, count: int, is_server: bool) -> Counter[object]:
    """Try heads with frames behind them. Return how often each result occurred."""
    seen: Counter[object] = Counter()
    for seed in seeds(name, count):
        chance = random.Random(seed)
        valid = head(chance) if is_server else SWITCHED
        start = mutated(valid, chance) if chance.random() < 0.5 else valid
        frames = mutated_frames(valid_frames(chance, is_server, [b"first"]), chance, is_server)

        def outcome(pieces: list[bytes]) -> tuple[object, ...]:
            reader = RequestReader() if is_server else AnswerReader(b"the sample nonce")
            return read_behind(pieces, reader, is_server)

        result = same_for_every_cut(seed, start + frames, chance, outcome)
        assert isinstance(result, tuple)
        seen[result[0]] += 1
        if result[0] == 101:
            assert result[-1] == plain_reading(result[-2], is_server), f"seed {seed!r}"
            assert start is not valid or result[-2] == frames, f"seed {seed!r}"
        elif not is_server:
            assert start is not valid, f"seed {seed!r}"
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


# Whole clients: the framings, Session and Rendezvous together.


class Story(NamedTuple):
    """The visible outcome for a client and for another client that waits."""

    state: str
    head: bytes  # sent to the client before any frame
    payload: bytes  # sent to the client in binary messages
    close: bytes | None  # the payload of the Close that was sent to the client
    partner_payload: bytes
    records: list[tuple[str, int]]  # moods and bytes, sorted


class Case(NamedTuple):
    """A stream, the kind of listener that receives it, and the client that waits."""

    stream: bytes
    role: Role
    partner: bytes  # the handshake of the client that waits
    partner_kind: str


def joined(frames: list[tuple[int, bytes]]) -> tuple[bytes, list[bytes], bytes | None]:
    """Return the payload of the binary messages, the Pongs, and the Close."""
    close = frames.pop()[1] if frames and frames[-1][0] == CLOSE else None
    assert {opcode for opcode, _ in frames} <= {BINARY, PONG}, frames
    data = b"".join(payload for opcode, payload in frames if opcode == BINARY)
    return data, [payload for opcode, payload in frames if opcode == PONG], close


def story(pieces: list[bytes], case: Case) -> tuple[Story, list[bytes]]:
    """Run the case until both clients have left. Return the Story and the Pongs."""
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
    start, data, pongs, close = wire.sent, b"", [], None
    if start.startswith(b"HTTP/1.1 101 "):
        size = start.index(b"\r\n\r\n") + 4
        data, pongs, close = joined(read_frames(start[size:]))
        start = start[:size]
    partner_data = partner.sent
    if case.partner_kind == "websocket":
        partner_data, none, its_close = joined(read_frames(partner.sent))
        assert not none and its_close == close_payload(1000)
    records = sorted((record.mood, record.total_bytes) for record in room.records)
    return Story(state, start, data, close, partner_data, records), pongs


def expected(
    found: Found, code: int | None, waiting: Handshake
) -> tuple[str, bytes, bytes, bytes, list[tuple[str, int]]]:
    """Return the Story of the frames behind an upgrade, without its head."""
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
    """Return a random client. Most have a valid stream, often with a few random changes."""
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
        stream = start + mutated_frames(frames, chance, masked=True)
    partner = handshake(chance.choice(["token"] * 3 + ["other"]), chance.choice(["left", None]))
    return Case(
        stream,
        chance.choice([Role.PORT, Role.WEBSOCKET]),
        partner,
        chance.choice(["tcp", "websocket"]),
    )


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
            result, answers = story(pieces, case)
            pongs.append(answers)
            return result

        result = same_for_every_cut(seed, case.stream, chance, outcome)
        assert isinstance(result, Story)
        seen.update(
            {result.state, *(mood for mood, _ in result.records), result.head[9:12], result.close}
        )
        if not result.head.startswith(b"HTTP/1.1 101 "):
            continue
        got = RequestReader().receive(case.stream)
        assert got is not None
        found, code = plain_reading(got[1], masked=True)
        waiting = parse_handshake(case.partner[:-1])
        assert waiting is not None
        wanted = expected(found, code, waiting)
        assert (result.state, *result[2:]) == wanted, f"seed {seed!r}"
        # Each Ping is answered, in order. Pings behind a refusal may stay unanswered.
        pings = [payload for opcode, payload, _ in found if opcode == PING]
        for answers in pongs:
            assert answers == pings[: len(answers)], f"seed {seed!r}"
            is_refused = result.payload not in (b"", b"ok\n")
            assert is_refused or len(answers) == len(pings), f"seed {seed!r}"
        seen["Ping"] += bool(pings)
    states = State.DONE, State.RELAYING, State.WAIT_HANDSHAKE, State.WAIT_PARTNER
    moods = "happy", "lonely", "errory", "impatient", "empty"
    codes = {1000: 6, 1001: 80, 1002: 10, 1003: 160, 1007: 160}
    shares: dict[object, int] = {b"101": 3, b"400": 40, b"405": 80, b"426": 200, b"200": 200}
    shares |= {"Ping": 8, b"": 40} | dict.fromkeys(states, 150) | dict.fromkeys(moods, 20)
    shares |= {close_payload(code): share for code, share in codes.items()}
    assert not ARE_MANY or not missing(seen, THIRD, shares), seen
