// What test_browser.py has a real browser do. The query says which scenario, and where the relay
// is; what came of it goes back as a POST.

const query = new URLSearchParams(location.search);
const size = Number(query.get("size"));
const hellos = query.getAll("hello"); // whole handshakes, each with its newline
const highWater = 4 << 20; // bytes that the browser may have queued before we stop sending

// A browser has no event for a queue that got shorter.
const nextTurn = () => new Promise((resolve) => setTimeout(resolve));

// random(65536) is as much as the browser gives at a time.
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
    this.messages = []; // text, of the first few
    this.count = 0;
    this.largest = 0;
    this.binary = true; // so far
    this.data = new Uint8Array(capacity); // what came in the messages behind the first
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
      this.onOpen(); // nobody shall wait for what cannot come any more
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
      if (this.length + bytes.length > this.data.length) throw new Error("more came than was sent");
      this.data.set(bytes, this.length);
      this.length += bytes.length;
      if (this.length === this.data.length) this.onFull();
    } else {
      this.onAnswer();
    }
  }

  // Send text as one binary message.
  say(text) {
    this.socket.send(new TextEncoder().encode(text));
  }

  // Send so many bytes in messages of random sizes, none at all among them.
  async pour(length) {
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
    await Promise.all([this.pour(size), this.full]);
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

// Tell the test something. The last thing told is the scenario's result.
async function tell(what) {
  await fetch("/told", { method: "POST", body: JSON.stringify(what) });
}

async function greeted(hello, capacity) {
  const client = new Client(capacity);
  await client.opened;
  client.say(hello);
  return client;
}

const scenarios = {
  // Two clients in this page. The first leaves, with a code of its own.
  async pair() {
    const clients = await Promise.all(hellos.map((hello) => greeted(hello, size)));
    await Promise.all(clients.map((client) => client.answered));
    await Promise.all(clients.map((client) => client.exchange()));
    clients[0].socket.close(4001, "for a reason");
    await Promise.all(clients.map((client) => client.closed));
    return Promise.all(clients.map((client) => client.report()));
  },

  // One client, and a partner somewhere else, who leaves.
  async stay() {
    const client = await greeted(hellos[0], size);
    await client.answered;
    await client.exchange();
    await client.closed;
    return client.report();
  },

  // The same, but we leave, at once when all is with the browser, if not yet on its way.
  async leave() {
    const client = await greeted(hellos[0], size);
    await client.answered;
    await client.exchange();
    client.socket.close(4001);
    await client.closed;
    return client.report();
  },

  // Clients that do something wrong: what each was told, and how it ended.
  async refusals() {
    const wrongs = {
      "no handshake": (client) => client.say("please relay nothing\n"),
      impatient: (client) => client.say(hellos[0] + "!"),
      text: (client) => client.socket.send(hellos[1]),
      "code of ours": (client) => client.socket.close(4999),
      "no code": (client) => client.socket.close(),
    };
    const results = {};
    for (const [name, wrong] of Object.entries(wrongs)) {
      const client = new Client();
      await client.opened;
      wrong(client);
      await client.closed;
      results[name] = [...client.messages, client.end.code, client.end.reason, client.end.wasClean];
    }
    return results;
  },

  // A handshake in three messages, and a client without a side, are a pair until the relay stops.
  async stop() {
    const clients = [new Client(), new Client()];
    await Promise.all(clients.map((client) => client.opened));
    for (const part of [hellos[0].slice(0, 20), "", hellos[0].slice(20)]) clients[0].say(part);
    clients[1].say(hellos[1]);
    await Promise.all(clients.map((client) => client.answered));
    await tell("a pair");
    await Promise.all(clients.map((client) => client.closed));
    return clients.map((client) => [...client.messages, client.end.code, client.end.wasClean]);
  },
};

window.onerror = (message) => tell({ error: String(message) });
scenarios[query.get("scenario")]()
  .then(tell)
  .catch((error) => tell({ error: `${error}\n${error.stack}` }));
