// The websocket: sends the newest input, and never has more than two under way.

/** @typedef {{ number?: number, type?: string, same?: boolean, error?: string, dropped?: number, together?: number, stages?: Record<string, number> }} About */
/** @typedef {{ about: About, picture: Blob | null, latency: number | null }} Frame */

const UNDER_WAY = 2; // one is drawn, one waits: then the model never does
const AGAIN = [500, 1000, 2000, 4000]; // milliseconds until the next try

/** @param {object} about @param {Uint8Array | null} picture */
export function packed(about, picture) {
  const text = new TextEncoder().encode(JSON.stringify(about));
  const message = new Uint8Array(4 + text.length + (picture?.length ?? 0));
  new DataView(message.buffer).setUint32(0, text.length);
  message.set(text, 4);
  if (picture) message.set(picture, 4 + text.length);
  return message;
}

/** @param {ArrayBuffer} message @returns {{ about: About, picture: Blob | null }} */
export function unpacked(message) {
  const length = new DataView(message).getUint32(0);
  const about = JSON.parse(new TextDecoder().decode(new Uint8Array(message, 4, length)));
  const rest = message.byteLength - 4 - length;
  return { about, picture: rest ? new Blob([new Uint8Array(message, 4 + length)], { type: about.type }) : null };
}

export class Connection {
  #number = 0;
  #answered = 0;
  /** @type {Map<number, number>} */ #sent = new Map();
  /** @type {(() => Promise<[object, Uint8Array | null]>) | null} */ #waiting = null;
  #reading = false;
  #tries = 0;
  /** @type {WebSocket | null} */ #socket = null;

  /** @param {string} url @param {{ frame: (frame: Frame) => void, state: (words: string) => void }} tell */
  constructor(url, tell) {
    this.url = url;
    this.tell = tell;
    this.#open();
  }

  #open() {
    const socket = new WebSocket(this.url);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.#tries = 0;
      this.#answered = this.#number;
      this.#sent.clear();
      this.tell.state("");
      this.#pump();
    };
    socket.onmessage = ({ data }) => this.#take(unpacked(data));
    socket.onclose = ({ reason }) => {
      this.tell.state(reason || "Connection lost. Trying again…");
      setTimeout(() => this.#open(), AGAIN[Math.min(this.#tries++, AGAIN.length - 1)]);
    };
    this.#socket = socket;
  }

  get open() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  /** An input in place of any that waits; `make` gives its settings and picture when its turn comes. */
  ask(/** @type {() => Promise<[object, Uint8Array | null]>} */ make) {
    this.#waiting = make;
    this.#pump();
  }

  async #pump() {
    if (!this.#waiting || this.#reading || !this.open || this.#number - this.#answered >= UNDER_WAY) return;
    const make = this.#waiting;
    this.#waiting = null;
    this.#reading = true;
    try {
      const began = performance.now();
      const [about, picture] = await make();
      if (!this.open) return;
      this.#sent.set(++this.#number, began);
      this.#socket?.send(packed({ ...about, number: this.#number }, picture));
    } finally {
      this.#reading = false;
    }
    this.#pump();
  }

  /** What answers an input answers those before, which were overtaken. @param {{ about: About, picture: Blob | null }} frame */
  #take({ about, picture }) {
    const number = about.number ?? this.#number;
    const began = this.#sent.get(number);
    for (const key of this.#sent.keys()) if (key <= number) this.#sent.delete(key);
    this.#answered = Math.max(this.#answered, number);
    const latency = began === undefined ? null : performance.now() - began;
    this.tell.frame({ about, picture, latency });
    this.#pump();
  }
}
