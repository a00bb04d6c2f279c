// A board to draw on: layers, colours, undo.

const MOST_LAYERS = 8;
const MOST_UNDO = 40;

/** @typedef {{ canvas: HTMLCanvasElement, shown: boolean, name: string }} Layer */

export class Board {
  /** @type {Layer[]} the lowest first */ layers = [];
  /** @type {Layer | null} */ chosen = null;
  colour = "#d23b3b";
  size = 14;
  erases = false;
  /** @type {{ undo: () => void, redo: () => void }[]} */ #done = [];
  /** @type {{ undo: () => void, redo: () => void }[]} */ #undone = [];
  #made = 0;

  /** @param {HTMLElement} root @param {() => void} changed called whenever what is seen, or the list of layers, is another */
  constructor(root, changed) {
    this.root = root;
    this.changed = changed;
    this.width = this.height = 512;
    root.addEventListener("pointerdown", (event) => this.#draw(event));
  }

  /** Begin anew in this shape, with one layer. @param {number} width @param {number} height */
  reset(width, height) {
    const scale = 512 / Math.max(width, height);
    [this.width, this.height] = [Math.round(width * scale), Math.round(height * scale)];
    this.root.replaceChildren();
    this.layers = [];
    this.#done = [];
    this.#undone = [];
    this.add();
    this.#done = [];
    this.changed();
  }

  get canUndo() {
    return this.#done.length > 0;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  get canAdd() {
    return this.layers.length < MOST_LAYERS;
  }

  /** A new layer on top. */
  add() {
    if (!this.canAdd) return;
    const canvas = Object.assign(document.createElement("canvas"), { width: this.width, height: this.height });
    const layer = { canvas, shown: true, name: `Layer ${++this.#made}` };
    const before = this.chosen;
    this.#do({
      redo: () => this.#place(layer, this.layers.length),
      undo: () => this.#take(layer, before),
    });
  }

  /** @param {Layer} layer */
  remove(layer) {
    if (this.layers.length < 2) return;
    const place = this.layers.indexOf(layer);
    this.#do({
      redo: () => this.#take(layer, this.layers[place ? place - 1 : 1] ?? null),
      undo: () => this.#place(layer, place),
    });
  }

  /** @param {Layer} layer */
  choose(layer) {
    this.chosen = layer;
    this.changed();
  }

  /** @param {Layer} layer */
  toggle(layer) {
    const turn = () => {
      layer.shown = !layer.shown;
      layer.canvas.hidden = !layer.shown;
    };
    this.#do({ redo: turn, undo: turn });
  }

  clear() {
    this.#change((context) => context.clearRect(0, 0, this.width, this.height));
  }

  /** Put a picture on the chosen layer. @param {CanvasImageSource} picture */
  paste(picture) {
    this.#change((context) => context.drawImage(picture, 0, 0, this.width, this.height));
  }

  undo() {
    const last = this.#done.pop();
    if (!last) return;
    last.undo();
    this.#undone.push(last);
    this.changed();
  }

  redo() {
    const next = this.#undone.pop();
    if (!next) return;
    next.redo();
    this.#done.push(next);
    this.changed();
  }

  /** All that is seen, on white. @param {CanvasRenderingContext2D} context @param {number} width @param {number} height */
  drawOn(context, width, height) {
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    for (const { canvas, shown } of this.layers) if (shown) context.drawImage(canvas, 0, 0, width, height);
  }

  /** @param {{ undo: () => void, redo: () => void }} step */
  #do(step) {
    step.redo();
    this.#remember(step);
  }

  /** @param {{ undo: () => void, redo: () => void }} step */
  #remember(step) {
    this.#done.push(step);
    if (this.#done.length > MOST_UNDO) this.#done.shift();
    this.#undone = [];
    this.changed();
  }

  /** @param {Layer} layer @param {number} place */
  #place(layer, place) {
    this.layers.splice(place, 0, layer);
    this.root.insertBefore(layer.canvas, this.root.children[place] ?? null);
    this.chosen = layer;
  }

  /** @param {Layer} layer @param {Layer | null} next */
  #take(layer, next) {
    this.layers.splice(this.layers.indexOf(layer), 1);
    layer.canvas.remove();
    this.chosen = next;
  }

  /** @param {(context: CanvasRenderingContext2D) => void} act */
  #change(act) {
    const layer = this.chosen;
    const context = layer?.canvas.getContext("2d");
    if (!layer || !context) return;
    const before = context.getImageData(0, 0, this.width, this.height);
    act(context);
    this.#keep(context, before);
  }

  /** @param {CanvasRenderingContext2D} context @param {ImageData} before */
  #keep(context, before) {
    const after = context.getImageData(0, 0, this.width, this.height);
    this.#remember({ undo: () => context.putImageData(before, 0, 0), redo: () => context.putImageData(after, 0, 0) });
  }

  /** @param {PointerEvent} event */
  #draw(event) {
    const context = this.chosen?.canvas.getContext("2d", { willReadFrequently: true });
    if (!context || event.button !== 0 || !this.chosen?.shown) return;
    event.preventDefault();
    const before = context.getImageData(0, 0, this.width, this.height);
    this.root.setPointerCapture(event.pointerId);
    const at = (/** @type {PointerEvent} */ { clientX, clientY }) => {
      const { left, top, width, height } = this.root.getBoundingClientRect();
      return { x: ((clientX - left) / width) * this.width, y: ((clientY - top) / height) * this.height };
    };
    let last = at(event);
    const line = (/** @type {PointerEvent} */ event) => {
      const next = at(event);
      const pressure = event.pointerType === "pen" ? event.pressure : 1;
      context.globalCompositeOperation = this.erases ? "destination-out" : "source-over";
      Object.assign(context, { strokeStyle: this.colour, lineWidth: this.size * pressure, lineCap: "round" });
      context.beginPath();
      context.moveTo(last.x, last.y);
      context.lineTo(next.x, next.y);
      context.stroke();
      context.globalCompositeOperation = "source-over";
      last = next;
      this.changed();
    };
    const end = () => {
      this.root.removeEventListener("pointermove", line);
      this.#keep(context, before);
    };
    line(event);
    this.root.addEventListener("pointermove", line);
    this.root.addEventListener("lostpointercapture", end, { once: true });
  }
}
