// A client that uses the npm package `ws`. It implements the same steps as steps.py.
"use strict";

const crypto = require("node:crypto");
const fs = require("node:fs");
const WebSocket = require("ws");

class Client {
  constructor(url, subprotocols) {
    this.tcp = "";
    this.messages = [];  // received, and not yet taken; null at the end of the connection
    this.resolve = null;  // of a promise that waits for a message
    this.socket = new WebSocket(url, subprotocols);
    this.opened = new Promise((resolve, reject) => {
      this.socket.on("upgrade", (response) => {
        this.extensions = response.headers["sec-websocket-extensions"];
        // The library does not report how the TCP connection has ended.
        response.socket.on("end", () => { this.tcp = this.tcp || "fin"; });
        response.socket.on("error", (error) => { this.tcp = error.message; });
      });
      this.socket.on("open", () => {
        resolve([this.extensions ?? null, this.socket.protocol || null]);
      });
      this.socket.on("error", reject);
    });
    this.closed = new Promise((resolve) => {
      this.socket.addEventListener("close", (event) => {
        resolve([event.code, event.reason, event.wasClean, this.tcp]);
        this.add(null);
      });
    });
    this.socket.on("message", (data, isBinary) => this.add(isBinary ? data : data.toString()));
  }

  add(message) {
    this.messages.push(message);
    if (this.resolve) this.resolve(this.messages.shift());
    this.resolve = null;
  }

  receive() {
    if (this.messages.length) return Promise.resolve(this.messages.shift());
    return new Promise((resolve) => { this.resolve = resolve; });
  }

  async receiveBinary() {
    const message = await this.receive();
    if (message === null) throw new Error(`the end instead of a message: ${await this.closed}`);
    if (!Buffer.isBuffer(message)) throw new Error(`a text message: ${message}`);
    return message;
  }

  // Resolves when the kernel has the bytes.
  sendFragment(data, options) {
    return new Promise((resolve, reject) => {
      this.socket.send(data, options, (error) => (error ? reject(error) : resolve()));
    });
  }

  async send(fragments) {
    for (const [number, fragment] of fragments.entries()) {
      await this.sendFragment(fragment, { binary: true, fin: number === fragments.length - 1 });
    }
  }

  // Send a Ping, and wait for a Pong with the same payload.
  ping(payload) {
    return new Promise((resolve, reject) => {
      this.socket.once("pong", (data) => {
        if (data.toString() === payload) resolve();
        else reject(new Error(`${data} instead of the Pong`));
      });
      this.closed.then((end) => reject(new Error(`the end instead of the Pong: ${end}`)));
      this.socket.ping(payload);
    });
  }
}

const STEPS = {
  async send(client, ...fragments) {
    await client.send(fragments.map((fragment) => Buffer.from(fragment)));
    return [];
  },

  async send_around_ping(client, first, ping, last) {
    await client.sendFragment(Buffer.from(first), { binary: true, fin: false });
    const pong = client.ping(ping);
    await client.sendFragment(Buffer.from(last), { binary: true, fin: true });
    await pong;
    return [];
  },

  async send_text(client, text) {
    await client.sendFragment(text, {});
    return [];
  },

  async ping(client, payload) {
    await client.ping(payload);
    return [];
  },

  async receive(client) {
    return [(await client.receiveBinary()).toString()];
  },

  async transfer(client, plan, size) {
    const sent = crypto.createHash("sha256");
    const received = crypto.createHash("sha256");
    let [smallest, largest] = [Infinity, 0];

    async function send() {
      for (const message of plan) {
        const fragments = message.map((fragment) => crypto.randomBytes(fragment));
        fragments.forEach((fragment) => sent.update(fragment));
        await client.send(fragments);
      }
    }

    async function receive() {
      for (let left = size; left > 0;) {
        const message = await client.receiveBinary();
        received.update(message);
        smallest = Math.min(smallest, message.length);
        largest = Math.max(largest, message.length);
        left -= message.length;
      }
    }

    await Promise.all([send(), receive()]);
    return [sent.digest("hex"), received.digest("hex"), smallest, largest];
  },

  async close(client, ...codeAndReason) {
    client.socket.close(...codeAndReason);
    return STEPS.closed(client);
  },

  async closed(client) {
    const message = await client.receive();
    if (message !== null) throw new Error(`${message.length} bytes instead of the end`);
    return client.closed;
  },
};

function printResult(...values) {
  console.log(JSON.stringify(values));
}

async function main() {
  const [url, ...subprotocols] = process.argv.slice(2);
  const steps = JSON.parse(fs.readFileSync(0));
  const client = new Client(url, subprotocols);
  printResult("open", ...await client.opened);
  for (const [name, ...given] of steps) {
    printResult(name, ...await STEPS[name](client, ...given));
  }
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
