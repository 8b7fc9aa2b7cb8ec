// The page of test_browser.py. The query has the name of the scenario and the URL of the relay. The
// page posts the results to its server.

const query = new URLSearchParams(location.search);
const size = Number(query.get("size"));
const hellos = query.getAll("hello"); // whole handshakes, each with its newline
const highWater = 4 << 20; // stop sending while the browser has more bytes queued

// A browser has no event for "the queue is shorter".
const nextTurn = () => new Promise((resolve) => setTimeout(resolve));

// Return random bytes. The browser returns at most 65536 in one call.
function random(length) {
  const bytes = new Uint8Array(length);
  for (let at = 0; at < length; at += 65536) {
    crypto.getRandomValues(bytes.subarray(at, Math.min(at + 65536, length)));
  }
  return bytes;
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

class Client {
  constructor(capacity = 1024) {
    this.messages = []; // the first few, as text
    this.count = 0;
    this.largest = 0;
    this.binary = true; // whether all messages were binary
    this.data = new Uint8Array(capacity); // of the messages after the first
    this.length = 0;
    this.opened = new Promise((resolve) => (this.onOpen = resolve));
    this.answered = new Promise((resolve) => (this.onAnswer = resolve));
    this.full = new Promise((resolve) => (this.onFull = resolve));
    this.closed = new Promise((resolve) => (this.onClose = resolve));
    this.socket = new WebSocket(query.get("url"));
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = this.onOpen;
    this.socket.onmessage = (event) => this.take(event.data);
    this.socket.onclose = ({ code, reason, wasClean }) => {
      this.end = { code, reason, wasClean };
      this.onOpen(); // after the end no other event comes: resolve all promises
      this.onAnswer();
      this.onFull();
      this.onClose();
    };
  }

  take(data) {
    if (!(data instanceof ArrayBuffer)) {
      this.binary = false;
      data = new TextEncoder().encode(data).buffer;
    }
    const bytes = new Uint8Array(data);
    this.largest = Math.max(this.largest, bytes.length);
    if (this.count < 3) this.messages.push(new TextDecoder("latin1").decode(bytes.subarray(0, 80)));
    if (this.count++) {
      if (this.length + bytes.length > this.data.length) throw new Error("received more than was sent");
      this.data.set(bytes, this.length);
      this.length += bytes.length;
      if (this.length === this.data.length) this.onFull();
    } else {
      this.onAnswer();
    }
  }

  // Send text as one binary message.
  sendText(text) {
    this.socket.send(new TextEncoder().encode(text));
  }

  // Send random bytes in messages of random sizes. Some messages are empty.
  async sendBulk(length) {
    const bytes = random(length);
    for (let at = 0; at < length; ) {
      while (this.socket.bufferedAmount > highWater) {
        if (this.end) throw new Error(`closed with ${this.end.code} while sending`);
        await nextTurn();
      }
      const top = Math.random() < 0.5 ? 1024 : 200000;
      const next = Math.min(length, at + Math.floor(Math.random() * top));
      this.socket.send(bytes.subarray(at, next));
      at = next;
    }
    this.sent = await sha256(bytes);
  }

  async exchange() {
    await Promise.all([this.sendBulk(size), this.full]);
  }

  async report() {
    const { protocol, extensions } = this.socket;
    return {
      answer: this.messages[0],
      bytes: this.length,
      binary: this.binary,
      largest: this.largest,
      declined: protocol === "" && extensions === "",
      sent: this.sent,
      received: await sha256(this.data.subarray(0, this.length)),
      ...this.end,
    };
  }
}

// Post something to the test. The last post is the result of the scenario.
async function post(value) {
  await fetch("/results", { method: "POST", body: JSON.stringify(value) });
}

// Return a client that has sent its handshake.
async function connect(hello, capacity) {
  const client = new Client(capacity);
  await client.opened;
  client.sendText(hello);
  return client;
}

const scenarios = {
  // Two clients in this page. The first closes, with a private code.
  async pair() {
    const clients = await Promise.all(hellos.map((hello) => connect(hello, size)));
    await Promise.all(clients.map((client) => client.answered));
    await Promise.all(clients.map((client) => client.exchange()));
    clients[0].socket.close(4001, "for a reason");
    await Promise.all(clients.map((client) => client.closed));
    return Promise.all(clients.map((client) => client.report()));
  },

  // One client. Its partner is in the test, and closes.
  async stay() {
    const client = await connect(hellos[0], size);
    await client.answered;
    await client.exchange();
    await client.closed;
    return client.report();
  },

  // One client that closes as soon as the browser has all bytes, which may not be sent yet.
  async leave() {
    const client = await connect(hellos[0], size);
    await client.answered;
    await client.exchange();
    client.socket.close(4001);
    await client.closed;
    return client.report();
  },

  // Clients that break a rule. The result has the messages and the Close that each received.
  async refusals() {
    const violations = {
      "no handshake": (client) => client.sendText("please relay nothing\n"),
      impatient: (client) => client.sendText(hellos[0] + "!"),
      text: (client) => client.socket.send(hellos[1]),
      "private code": (client) => client.socket.close(4999),
      "no code": (client) => client.socket.close(),
    };
    const results = {};
    for (const [name, violate] of Object.entries(violations)) {
      const client = new Client();
      await client.opened;
      violate(client);
      await client.closed;
      results[name] = [...client.messages, client.end.code, client.end.reason, client.end.wasClean];
    }
    return results;
  },

  // A pair: a handshake in three messages, and a client without a side. The relay stops.
  async stop() {
    const clients = [new Client(), new Client()];
    await Promise.all(clients.map((client) => client.opened));
    for (const part of [hellos[0].slice(0, 20), "", hellos[0].slice(20)]) clients[0].sendText(part);
    clients[1].sendText(hellos[1]);
    await Promise.all(clients.map((client) => client.answered));
    await post("a pair");
    await Promise.all(clients.map((client) => client.closed));
    return clients.map((client) => [...client.messages, client.end.code, client.end.wasClean]);
  },
};

window.onerror = (message) => post({ error: String(message) });
scenarios[query.get("scenario")]()
  .then(post)
  .catch((error) => post({ error: `${error}\n${error.stack}` }));
