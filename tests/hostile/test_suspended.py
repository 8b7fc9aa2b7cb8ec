"""A relay that is suspended (SIGSTOP, a paused container) while clients wait."""

from __future__ import annotations

import threading
import time

from helpers import BINARY, PING, PONG, TIMEOUT, WebSocketClient, frame, handshake, stopped
from processes import patched
from watched import WATCHED, Scene, shorter

SUSPENDED_SECONDS = shorter(120, 30)
# In the short form the relay sends Pings sooner: it has to be suspended longer than it waits.
PING_SECONDS = shorter(25, 2)


class WaitingWebSocket(threading.Thread):
    """A WebSocket client that waits, and answers Pings, until its `ok` comes."""

    def __init__(self, client: WebSocketClient) -> None:
        super().__init__()
        self.client = client
        client.sock.settimeout(SUSPENDED_SECONDS + 20 * TIMEOUT)
        self.received: bytes | None = None
        self.start()

    def run(self) -> None:
        while True:
            found = self.client.next_frame()
            if found is None:
                return
            opcode, payload = found
            if opcode == PING:
                self.client.send_wire(frame(PONG, payload))
            elif opcode == BINARY:
                self.received = payload
                return


def test_the_relay_is_suspended() -> None:
    """No client is ended for a silence that was the relay's. The time is real: SIGSTOP lasts.

    Clients send the rest of their handshakes after the time limit: meanwhile, or afterwards.
    """
    limits = ["--handshake-timeout", str(SUSPENDED_SECONDS // 2)]
    program = patched(PING_SECONDS=PING_SECONDS, **WATCHED)
    with Scene(*limits, program=program) as scene:
        relay, books = scene.relay, scene.books
        tokens = [relay.new_token() for _ in range(20)]
        waiting = []
        for token in tokens:
            client = relay.client("ws")
            client.send(handshake(token, "one"))
            assert isinstance(client, WebSocketClient)
            waiting.append(WaitingWebSocket(client))
        late = [(relay.client(), relay.new_token()) for _ in range(2)]
        for client, token in late:
            client.send(handshake(token, "one")[:50])
        relay.settle(books)
        with stopped(relay):
            time.sleep(SUSPENDED_SECONDS)
            client, token = late[0]
            client.send(handshake(token, "one")[50:])
        client, token = late[1]
        client.send(handshake(token, "one")[50:])
        for token, one in zip(tokens, waiting):
            with relay.client() as other:
                other.send(handshake(token, "other"))
                assert other.receive(3) == b"ok\n"
                one.join()
                assert one.received == b"ok\n"
                one.client.half_close()
                assert other.read_to_end() == one.client.read_to_end() == b""
                one.client.close()
            books.add("happy", 0)
        for client, token in late:
            with relay.client() as other:
                other.send(handshake(token, "other"))
                assert client.receive(3) == other.receive(3) == b"ok\n"
                client.close()
                assert other.read_to_end() == b""
            books.add("happy", 0)
