// The Live page's connection: the newest input wins, and no more than two are ever under way.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Connection, packed, unpacked } from "../../app/live/static/connection.js";
import { Pace, quantile } from "../../app/live/static/pace.js";

/** A server that answers when it is told to. */
class Socket {
  static OPEN = 1;
  /** @type {Socket[]} */ static all = [];
  readyState = 0;
  sent = [];
  constructor() {
    Socket.all.push(this);
  }
  open() {
    this.readyState = Socket.OPEN;
    this.onopen();
  }
  send(message) {
    this.sent.push(unpacked(message.buffer).about.number);
  }
  answer(number, about = {}) {
    this.onmessage({ data: packed({ number, ...about }, null).buffer });
  }
  close(reason = "") {
    this.readyState = 3;
    this.onclose({ reason });
  }
}

const settled = () => new Promise((done) => setTimeout(done, 5));

function connected() {
  globalThis.WebSocket = /** @type {any} */ (Socket);
  Socket.all = [];
  const told = { frames: [], states: [] };
  const connection = new Connection("ws://here", {
    frame: (frame) => told.frames.push(frame),
    state: (words) => told.states.push(words),
  });
  const [socket] = Socket.all;
  socket.open();
  return { connection, socket, told };
}

test("a message is unpacked as it was packed", async () => {
  const { about, picture } = unpacked(packed({ prompt: "ü🦊", type: "image/png" }, new Uint8Array([1, 2, 3])).buffer);
  assert.equal(about.prompt, "ü🦊");
  assert.equal(picture.type, "image/png");
  assert.deepEqual([...new Uint8Array(await picture.arrayBuffer())], [1, 2, 3]);
  assert.equal(unpacked(packed({}, null).buffer).picture, null);
});

test("of many inputs two are under way, and the newest is next", async () => {
  const { connection, socket, told } = connected();
  const made = [];
  for (let k = 0; k < 50; k++) {
    connection.ask(async () => [{ k: made.push(k) }, null]);
    await settled();
  }
  assert.deepEqual(made, [0, 1]);
  socket.answer(1);
  await settled();
  assert.deepEqual(made, [0, 1, 49]);
  assert.deepEqual(socket.sent, [1, 2, 3]);
  socket.answer(3); // which overtook the second
  connection.ask(async () => [{}, null]);
  connection.ask(async () => [{}, null]);
  await settled();
  assert.deepEqual(socket.sent, [1, 2, 3, 4, 5].slice(0, socket.sent.length));
  assert.ok(told.frames.every(({ latency }) => latency >= 0));
});

test("an answer without a number, to what could not be read, frees the way", async () => {
  const { connection, socket } = connected();
  for (let k = 0; k < 2; k++) {
    connection.ask(async () => [{}, null]);
    await settled();
  }
  socket.onmessage({ data: packed({ error: "no" }, null).buffer });
  connection.ask(async () => [{}, null]);
  await settled();
  assert.deepEqual(socket.sent, [1, 2, 3]);
});

test("a lost connection is told, and what waits is asked of the next one", async (context) => {
  context.mock.timers.enable({ apis: ["setTimeout"] });
  const { connection, socket, told } = connected();
  socket.close();
  assert.match(told.states.at(-1), /Connection lost/);
  connection.ask(async () => [{}, null]);
  context.mock.timers.tick(600);
  const next = Socket.all.at(-1);
  assert.notEqual(next, socket);
  next.open();
  await Promise.resolve();
  await Promise.resolve();
  assert.equal(told.states.at(-1), "");
  assert.deepEqual(next.sent, [1]);
  next.close("16 pages are open already: close one");
  assert.match(told.states.at(-1), /close one/);
});

test("frames are counted over the last seconds, and latencies by their shares", () => {
  const pace = new Pace();
  for (let k = 0; k <= 20; k++) pace.add(k * 100, k);
  assert.equal(Math.round(pace.rate(2000)), 10);
  assert.equal(pace.rate(9000), 0);
  assert.equal(quantile([5, 1, 3], 0.5), 3);
  assert.equal(quantile([...Array(100).keys()], 0.95), 95);
  assert.ok(Number.isNaN(quantile([], 0.5)));
  for (let k = 0; k < 300; k++) pace.add(0, k);
  assert.equal(pace.latencies.length, 120);
});
