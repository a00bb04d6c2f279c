// The last seconds, kept in the page, and saved as a file that the server makes of them.

import { packed } from "./connection.js";

const LONGEST = 20_000; // milliseconds
const MOST_BYTES = 48 * 2 ** 20;

export class Clip {
  /** @type {{ time: number, picture: Blob }[]} */ #frames = [];

  /** @param {number} time @param {Blob} picture */
  add(time, picture) {
    this.#frames.push({ time, picture });
    while (time - (this.#frames[0]?.time ?? time) > LONGEST) this.#frames.shift();
  }

  /** The last seconds as a file; throws an Error that says why not. @param {number} seconds @param {string} format */
  async save(seconds, format) {
    const end = this.#frames.at(-1)?.time ?? 0;
    const frames = this.#frames.filter(({ time }) => end - time <= 1000 * seconds);
    const [first] = frames;
    if (!first || frames.length < 2) throw new Error("There is no clip yet: change something first.");
    const files = await Promise.all(frames.map(async ({ picture }) => new Uint8Array(await picture.arrayBuffer())));
    const bytes = new Uint8Array(files.reduce((sum, { length }) => sum + length, 0));
    if (bytes.length > MOST_BYTES) throw new Error("The clip is too large: choose fewer seconds.");
    let at = 0;
    for (const file of files) {
      bytes.set(file, at);
      at += file.length;
    }
    const about = { format, times: frames.map(({ time }) => time - first.time), lengths: files.map(({ length }) => length) };
    const type = { "Content-Type": "application/octet-stream" };
    const answer = await fetch("/live/clip", { method: "POST", body: packed(about, bytes), headers: type });
    if (!answer.ok) throw new Error((await answer.json()).error);
    return answer.blob();
  }
}
