"""WebSocket clients that break the rules or stretch them: the answers, and the costs.

Each attack has a relay process of its own, whose memory is measured. A pair beside it must go on
undisturbed.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import (
    BINARY,
    BOUND_BYTES,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    TIMEOUT,
    WEB,
    Client,
    Loop,
    RelayProcess,
    WebSocketClient,
    close_payload,
    digest,
    frame,
    handshake,
    parse_head,
    stopped,
)

from transit_relay import READ_BYTES

FOUR_GIB = 1 << 32
KEY = b"\1\2\3\4"
PINGS = 10_000

# Frames that no client may send. Of some only the head is sent.

BAD_FRAMES: dict[str, tuple[bytes, int]] = {
    "text": (frame(TEXT, b"hello"), 1003),
    "empty text": (frame(TEXT), 1003),
    "the head of a long text": (frame(TEXT, bytes(70_000))[:14], 1003),
    "a fragment of a text": (frame(TEXT, b"hello", fin=False), 1003),
    "not masked": (frame(BINARY, b"hello", key=None), 1002),
    "a Ping that is not masked": (frame(PING, b"hello", key=None), 1002),
    **{f"reserved bit {bit:#x}": (frame(BINARY | bit, b"x"), 1002) for bit in (0x40, 0x20, 0x10)},
    "a Ping with a reserved bit": (frame(PING | 0x40), 1002),
    **{f"opcode {opcode}": (frame(opcode), 1002) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "a stray continuation": (frame(CONTINUATION, b"x"), 1002),
    "a stray continuation that is not the last": (frame(CONTINUATION, b"x", fin=False), 1002),
    "a message in another": (frame(BINARY, fin=False) + frame(BINARY, b"x"), 1002),
    "a text in another": (frame(BINARY, fin=False) + frame(TEXT, b"x"), 1002),
    "a Ping in fragments": (frame(PING, fin=False), 1002),
    "a Close in fragments": (frame(CLOSE, fin=False), 1002),
    "a Ping with 126 bytes": (frame(PING, bytes(126)), 1002),
    "a Pong with 126 bytes": (frame(PONG, bytes(126)), 1002),
    "a Close with 126 bytes": (frame(CLOSE, close_payload(1000, b"x" * 124)), 1002),
    "a Close with half a code": (frame(CLOSE, b"\3"), 1002),
    "two bytes for a length below 126": (b"\x82\xfe\0\x7d" + KEY + bytes(125), 1002),
    "eight bytes for a length below 65,536": (struct.pack("!BBQ", 0x82, 0xFF, 65_535), 1002),
    "a length of 2^63": (struct.pack("!BBQ", 0x82, 0xFF, 1 << 63), 1002),
    "a length of 2^64 - 1": (struct.pack("!BBQ", 0x82, 0xFF, (1 << 64) - 1), 1002),
    "a reason that is not UTF-8": (frame(CLOSE, close_payload(1000, b"\xff")), 1007),
    "a reason that ends in a character": (frame(CLOSE, close_payload(1000, b"\xc3")), 1007),
    **{
        f"a Close with code {code}": (frame(CLOSE, close_payload(code)), 1002)
        for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535)
    },
}
BAD = pytest.mark.parametrize(("wire", "code"), BAD_FRAMES.values(), ids=BAD_FRAMES)


@BAD
@pytest.mark.parametrize("second", ["tcp", "ws"])
def test_a_bad_frame_in_a_pair(loop: Loop, wire: bytes, code: int, second: str) -> None:
    """The bytes before it, in the same segment, are delivered, and the pair ends in order."""
    one, other = loop.meet("ws", second)
    one.send_wire(frame(BINARY, b"be") + frame(BINARY, b"fore") + wire + frame(BINARY, b"after"))
    assert other.read_to_end(1000) == b"before"
    assert one.read_to_end(code) == b""
    (record,) = loop.recorder.records
    assert (record.mood, record.total_bytes) == ("happy", 6)


@BAD
def test_a_bad_frame_byte_by_byte(loop: Loop, wire: bytes, code: int) -> None:
    """It is refused at its first wrong byte. The bytes after that are discarded."""
    one, other = loop.meet("ws", "tcp")
    for byte in frame(BINARY, b"before") + wire + frame(PING) + frame(CLOSE):
        one.send_wire(bytes([byte]))
        loop.pump()
    assert other.read_to_end() == b"before"
    assert one.read_to_end(code) == b""


@BAD
@pytest.mark.parametrize(
    ("before", "mood"),
    [(b"", "empty"), (frame(BINARY, handshake()), "lonely")],
    ids=["", "waiting"],
)
def test_a_bad_frame_without_a_partner(
    loop: Loop, wire: bytes, code: int, before: bytes, mood: str
) -> None:
    client = loop.client("ws")
    client.send_wire(before + wire)
    assert client.read_to_end(code) == b""
    assert loop.recorder.moods() == [mood]


def test_a_close_in_the_middle_of_a_message(loop: Loop) -> None:
    """Control frames are allowed between fragments."""
    one, other = loop.meet("ws", "ws")
    one.send_wire(frame(BINARY, b"half", fin=False) + frame(CLOSE, close_payload(1001)))
    one.send_wire(frame(CONTINUATION, b"the rest"))
    assert other.read_to_end(1000) == b"half"
    assert one.read_to_end(1001) == b""


# Attacks.


class Neighbours(threading.Thread):
    """A pair beside the attack: sends random blocks both ways and checks them, in a thread."""

    def __init__(self, relay: RelayProcess) -> None:
        super().__init__()
        self.relay = relay
        self.chance = random.Random(1)
        self.rounds = 0
        self.progress = threading.Condition()
        self.stopping = False
        self.error: BaseException | None = None
        self.pair = relay.meet("tcp", "ws", "neighbours")
        self.exchange()  # the memory of a first pair is not measured
        relay.forget_peak()
        self.before = relay.peak_bytes()

    def __enter__(self) -> Neighbours:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping = True
        self.join()
        for client in self.pair:
            client.close()
        if self.error is not None:
            raise self.error

    def exchange(self) -> None:
        """Send a block each way."""
        for sender, receiver in (self.pair, self.pair[::-1]):
            block = self.chance.randbytes(50_000)
            sender.send(block)
            assert digest(receiver.receive(len(block))) == digest(block)

    def run(self) -> None:
        try:
            while not self.stopping:
                self.exchange()
                with self.progress:
                    self.rounds += 1
                    self.progress.notify()
        except BaseException as error:
            self.error = error

    def check(self) -> None:
        """Check that a whole round from now on succeeds, and that the relay has not grown."""
        with self.progress:
            goal = self.rounds + 2  # the current round began earlier
            assert self.progress.wait_for(lambda: self.rounds >= goal, TIMEOUT), self.error
        grown = self.relay.peak_bytes() - self.before
        print(f"the relay grew by {grown} bytes")
        assert grown < BOUND_BYTES


@pytest.fixture
def running(relay: Callable[..., RelayProcess]) -> RelayProcess:
    """Return a relay that accepts WebSocket clients."""
    return relay(*WEB)


@pytest.fixture
def neighbours(running: RelayProcess) -> Iterator[Neighbours]:
    """Return a pair at work. The test fails if it is disturbed until the end."""
    with Neighbours(running) as pair:
        yield pair
        pair.check()


def pour(sender: Client, wire: bytes, receiver: Client, data: bytes) -> None:
    """Send more than fits into the buffers, and check that it arrives as `data`."""
    thread = threading.Thread(target=sender.send_wire, args=(wire,))
    thread.start()
    received = receiver.receive(len(data))
    thread.join()
    assert digest(received) == digest(data)


def inside(data: bytes, offset: int) -> bytes:
    """Return payload of a long frame as it is on the wire, from `offset` on."""
    return frame(BINARY, data, key=KEY[offset % 4 :] + KEY[: offset % 4])[-len(data) :]


@pytest.mark.parametrize("second", ["tcp", "ws"])
def test_a_frame_of_four_gib_that_trickles(
    running: RelayProcess, neighbours: Neighbours, second: str
) -> None:
    """One frame has the handshake and all that follows. No byte waits for its end."""
    one, other = running.client("ws"), running.client(second)
    with one, other:
        line = handshake("long", "one")
        one.send_wire(struct.pack("!BBQ", 0x82, 0xFF, FOUR_GIB) + KEY + inside(line, 0))
        other.send(handshake("long", "other"))
        assert one.receive(3) == other.receive(3) == b"ok\n"
        sent = len(line)
        for number in range(2_000):
            byte = bytes([number % 251])
            one.send_wire(inside(byte, sent))
            sent += 1
            assert other.receive(1) == byte
        neighbours.check()
        block = random.Random(2).randbytes(1 << 20)
        for _ in range(16):
            pour(one, inside(block, sent), other, block)
            sent += len(block)
        neighbours.check()
        one.reset()
        assert other.read_to_end() == b""


@pytest.mark.parametrize("second", ["tcp", "ws"])
def test_frames_of_one_byte_at_full_speed(
    running: RelayProcess, neighbours: Neighbours, second: str
) -> None:
    one, other = running.meet("ws", second, "bytes")
    with one, other:
        part = bytes(range(256)) * 100
        wire = b"".join(frame(BINARY, part[n : n + 1]) for n in range(len(part)))
        sender = threading.Thread(target=one.send_wire, args=(wire * 10,))
        sender.start()
        neighbours.check()
        received = other.receive(10 * len(part))
        sender.join()
        assert digest(received) == digest(10 * part)
        one.half_close()
        assert other.read_to_end() == one.read_to_end() == b""


@pytest.mark.parametrize("second", ["unix", "ws-unix"])
def test_frames_of_one_byte_to_a_client_that_does_not_read(loop: Loop, second: str) -> None:
    """Their backlog is no larger than that of the same bytes in one frame."""
    one, other = loop.meet("ws-unix", second)
    assert other.conn is not None
    size = len(frame(BINARY, b"x"))
    wire = b"".join(frame(BINARY, bytes([n % 251])) for n in range(251 * 40))
    one.sock.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += one.sock.send(wire[sent % len(wire) :])
            loop.pump()
    assert other.conn.backlog is not None
    assert len(other.conn.backlog) <= READ_BYTES
    expected = (bytes(range(251)) * (sent // 251))[: sent // size]
    assert digest(other.receive(sent // size)) == digest(expected)


@pytest.mark.parametrize("family", ["tcp", "unix"])
@pytest.mark.parametrize("opcode", [BINARY, PING], ids=["bytes", "Pings"])
def test_as_many_small_frames_behind_the_head_as_a_kernel_holds(
    relay: Callable[..., RelayProcess], tmp_path: Path, opcode: int, family: str
) -> None:
    """All of them are in the kernel when the relay reads the head."""
    running = relay(*WEB, "--websocket", f"unix:{tmp_path}/s")
    with Neighbours(running) as neighbours, running.client("ws") as other:
        other.send(handshake("first", "other"))
        neighbours.check()  # the client waits by now
        address = ("127.0.0.1", running.web_port) if family == "tcp" else f"{tmp_path}/s"
        sock = socket.socket(socket.AF_INET if family == "tcp" else socket.AF_UNIX)
        with WebSocketClient(sock, upgrade=False) as one:
            wire = one.request + frame(BINARY, handshake("first", "one"))
            wire += frame(opcode, b"x") * 100_000
            with stopped(running), contextlib.suppress(BlockingIOError):
                sock.connect(address)
                sock.setblocking(False)
                sent = 0
                while sent < len(wire):
                    sent += sock.send(wire[sent:])
            assert other.receive(3) == b"ok\n"
            if opcode == BINARY:
                assert other.receive(10_000) == b"x" * 10_000
            neighbours.check()


def test_a_client_that_does_not_read_its_pongs(
    running: RelayProcess, neighbours: Neighbours
) -> None:
    """Some Pongs are left out, but not the newest. The client is served when it reads again."""
    with running.client("ws") as one:
        assert isinstance(one, WebSocketClient)
        one.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        one.send(handshake("pongs", "one"))
        pings = [struct.pack("!I121x", n) for n in range(100_000)]
        one.send_wire(b"".join(frame(PING, ping) for ping in pings))
        neighbours.check()
        one.sock.settimeout(TIMEOUT)
        while one.pongs[-1:] != pings[-1:]:
            assert one.next_frame() is not None
        assert len(one.pongs) < len(pings)
        assert one.pongs == sorted(set(one.pongs))  # each once, in their order
        assert set(one.pongs) <= set(pings)
        with running.client("tcp") as other:
            other.send(handshake("pongs", "other"))
            assert one.receive(3) == other.receive(3) == b"ok\n"


def test_ten_thousand_pings_in_one_segment(running: RelayProcess, neighbours: Neighbours) -> None:
    """Their Pongs are fewer bytes than a client may leave unread, so each Ping is answered."""
    with running.client("ws") as one:
        assert isinstance(one, WebSocketClient)
        one.send_wire(b"".join(frame(PING, bytes([n % 256])) for n in range(PINGS)))
        neighbours.check()
        while len(one.pongs) < PINGS:
            assert one.next_frame() is not None
        assert b"".join(one.pongs) == bytes(n % 256 for n in range(PINGS))


@pytest.mark.parametrize("kind", ["tcp", "ws"])
@pytest.mark.parametrize("end_of_line", [b"", b"\r\n"], ids=["one line", "many lines"])
def test_a_head_that_never_ends(
    running: RelayProcess, neighbours: Neighbours, kind: str, end_of_line: bytes
) -> None:
    """It is refused. What it sends after that is read and discarded, so that it gets the answer."""
    port = running.web_port if kind == "ws" else running.port
    with Client(socket.create_connection(("127.0.0.1", port))) as one:
        one.send(b"GET / HTTP/1.1\r\n")
        for _ in range(300):
            one.send((b"X-Padding: " + b"x" * 989 + end_of_line) * 50)
        neighbours.check()
        answer = one.read_to_end()
        assert parse_head(answer.partition(b"\r\n\r\n")[0])[0] == "431"
        one.send(bytes(1_000_000))


@pytest.mark.parametrize("second", ["tcp", "ws"])
def test_a_close_in_the_middle_of_a_message_of_many_fragments(
    running: RelayProcess, neighbours: Neighbours, second: str
) -> None:
    """No fragment waits for the last one."""
    one, other = running.meet("ws", second, "fragments")
    with one, other:
        block = random.Random(3).randbytes(1_000)
        one.send_wire(frame(BINARY, block, fin=False))
        wire = frame(CONTINUATION, block, fin=False) * 1_000
        for _ in range(10):
            pour(one, wire, other, block * 1_000)
        neighbours.check()
        one.send_wire(frame(CLOSE, close_payload(1001, b"leaving")) + wire)
        assert other.read_to_end(1000) == block
        assert one.read_to_end(1001) == b""
