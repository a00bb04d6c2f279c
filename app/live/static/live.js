// The Live page: every change of its inputs asks for a picture; the newest one wins.

import { Board } from "./board.js";
import { Clip } from "./clip.js";
import { Connection } from "./connection.js";
import { Pace, quantile } from "./pace.js";

/** @import { Frame } from "./connection.js" */
/** @typedef {"text" | "canvas" | "picture" | "video" | "camera"} Source */

/** @template {HTMLElement} T @param {string} id @param {new () => T} kind @returns {T} */
function element(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`no ${id}`);
  return found;
}

const input = (/** @type {string} */ id) => element(id, HTMLInputElement);
const button = (/** @type {string} */ id) => element(id, HTMLButtonElement);
const select = (/** @type {string} */ id) => element(id, HTMLSelectElement);
const [board, film, hint, chooser] = [
  element("board", HTMLElement), element("film", HTMLVideoElement), element("hint", HTMLElement), element("choose", HTMLElement),
];
const [shown, status] = [element("frame", HTMLImageElement), element("status", HTMLElement)];

const about = await (await fetch("/live/about")).json();
const pace = new Pace();
const clip = new Clip();
/** @type {Source} */ let source = "text";
/** @type {MediaStream | null} */ let camera = null;
let turned = 0; // radians of noise travel so far
let since = performance.now();
/** @type {Blob | null} */ let newest = null;

document.documentElement.style.setProperty("--shape", `${about.width} / ${about.height}`);
input("prompt").value = about.example;
select("student").replaceChildren(...Object.keys(about.students).map((name) => new Option(name)));
shown.classList.toggle("small", about.width < 256);

// --- What is sent ---

const scratch = Object.assign(document.createElement("canvas"), { width: about.width, height: about.height });
const pencil = /** @type {CanvasRenderingContext2D} */ (scratch.getContext("2d"));

/** The input's picture as a file, or null where there is none. @returns {Promise<Uint8Array | null>} */
async function picture() {
  const { width, height } = scratch;
  if (source === "text") return null;
  if (source === "canvas" || source === "picture") drawing.drawOn(pencil, width, height);
  else {
    if (film.readyState < film.HAVE_CURRENT_DATA) return null;
    const scale = Math.max(width / film.videoWidth, height / film.videoHeight);
    const [w, h] = [film.videoWidth * scale, film.videoHeight * scale];
    pencil.drawImage(film, (width - w) / 2, (height - h) / 2, w, h);
  }
  const [kind, quality] = width * height <= 2 ** 16 ? ["image/png", 1] : ["image/jpeg", 0.92];
  const file = await new Promise((/** @type {(file: Blob | null) => void} */ done) => scratch.toBlob(done, kind, quality));
  return file && new Uint8Array(await file.arrayBuffer());
}

function settings() {
  const towards = input("towards").value;
  return {
    prompt: input("prompt").value,
    towards,
    mix: towards ? Number(input("mix").value) : 0,
    strength: source === "text" ? 1 : Number(input("strength").value),
    seed: Math.min(Math.max(Math.trunc(Number(input("seed").value)) || 0, 0), 2 ** 53 - 2),
    steps: Number(select("steps").value),
    student: select("student").value,
    angle: turned,
  };
}

const connection = new Connection(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live/frames`, {
  frame: show,
  state: (words) => {
    status.textContent = words;
    if (!words) ask();
  },
});

function ask() {
  connection.ask(async () => {
    const now = performance.now();
    turned += (Number(input("travel").value) * Math.min(now - since, 200)) / 1000;
    since = now;
    const file = await picture();
    return [settings(), file];
  });
}

// --- What comes back ---

/** @param {Frame} frame */
function show({ about: told, picture: file, latency }) {
  const now = performance.now();
  status.textContent = told.error ?? "";
  if (file) {
    const before = shown.src;
    shown.src = URL.createObjectURL(file);
    if (before) URL.revokeObjectURL(before);
    shown.hidden = false;
    element("empty", HTMLElement).hidden = true;
    newest = file;
    clip.add(now, file);
    pace.add(now, latency);
    const stages = Object.entries(told.stages ?? {}).map(([name, ms]) => `${name} ${ms.toFixed(1)}`);
    const company = (told.together ?? 1) > 1 ? ` · ${told.together} pages drawn together` : "";
    element("stages", HTMLElement).textContent = `ms: ${stages.join(" · ")}${company} · overtaken ${told.dropped ?? 0}`;
  }
  if (moves()) ask();
}

/** Whether there is a next frame without anybody's doing. */
function moves() {
  return Number(input("travel").value) > 0 || ((source === "video" || source === "camera") && !film.paused);
}

function tick() {
  const now = performance.now();
  element("fps", HTMLElement).textContent = pace.rate(now).toFixed(1);
  for (const [id, share] of /** @type {const} */ ([["latency", 0.5], ["late", 0.95]]))
    element(id, HTMLElement).textContent = pace.latencies.length ? quantile(pace.latencies, share).toFixed(0) : "–";
  pace.plot(element("plot", HTMLCanvasElement));
}
setInterval(tick, 500);

// --- Sources ---

const drawing = new Board(board, () => {
  listLayers();
  button("undo").disabled = !drawing.canUndo;
  button("redo").disabled = !drawing.canRedo;
  button("add-layer").disabled = !drawing.canAdd;
  ask();
});

const HINTS = {
  text: "",
  canvas: "Draw: the picture follows. Strength says how much of the drawing is made anew.",
  picture: "Choose a picture, or paste one, and draw on it.",
  video: "Choose a video: each of its frames is made anew.",
  camera: "",
};

/** @param {Source} chosen */
async function choose(chosen) {
  source = chosen;
  for (const tab of document.querySelectorAll("[data-source]"))
    tab.setAttribute("aria-selected", String(tab instanceof HTMLElement && tab.dataset.source === chosen));
  const draws = chosen === "canvas" || chosen === "picture";
  element("stage", HTMLElement).hidden = chosen === "text";
  board.hidden = element("tools", HTMLElement).hidden = !draws;
  film.hidden = draws || chosen === "text";
  chooser.hidden = chosen !== "picture" && chosen !== "video";
  input("file").accept = chosen === "video" ? "video/*" : "image/*";
  hint.textContent = HINTS[chosen];
  camera?.getTracks().forEach((track) => track.stop());
  camera = null;
  film.pause();
  film.srcObject = null;
  if (chosen === "camera") await openCamera();
  ask();
}

async function openCamera() {
  try {
    if (!navigator.mediaDevices) throw new Error("browsers give a camera to this machine's own pages, or over https");
    camera = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480 } });
    film.srcObject = camera;
    await film.play();
    hint.textContent = "";
  } catch (error) {
    hint.textContent = `There is no camera: ${error instanceof Error ? error.message : error}. Allow it in the browser, or choose another source.`;
  }
}

/** @param {Blob} file */
async function open(file) {
  try {
    if (source === "video") {
      if (film.src) URL.revokeObjectURL(film.src);
      film.src = URL.createObjectURL(file);
      await film.play();
    } else {
      drawing.paste(await cropped(file));
    }
    hint.textContent = HINTS[source];
  } catch {
    hint.textContent = "This file cannot be read: choose another one.";
  }
  ask();
}

/** A picture in the model's shape. @param {Blob} file */
async function cropped(file) {
  const image = await createImageBitmap(file);
  const shape = drawing.width / drawing.height;
  const width = Math.min(image.width, image.height * shape);
  const height = width / shape;
  return createImageBitmap(image, (image.width - width) / 2, (image.height - height) / 2, width, height);
}

film.addEventListener("playing", ask);
film.addEventListener("seeked", ask);
film.addEventListener("click", () => (film.paused ? film.play() : film.pause()));

function listLayers() {
  const rows = [...drawing.layers].reverse().map((layer) => {
    const row = document.createElement("li");
    const make = (/** @type {string} */ text, /** @type {() => void} */ act, pressed = false) => {
      const made = Object.assign(document.createElement("button"), { textContent: text, onclick: act });
      if (pressed) made.setAttribute("aria-pressed", "true");
      return made;
    };
    row.append(
      make(layer.shown ? "Hide" : "Show", () => drawing.toggle(layer)),
      make(layer.name, () => drawing.choose(layer), layer === drawing.chosen),
      make("Delete", () => drawing.remove(layer)),
    );
    return row;
  });
  element("layers", HTMLElement).replaceChildren(...rows);
}

// --- Wiring ---

for (const tab of document.querySelectorAll("[data-source]"))
  if (tab instanceof HTMLElement) tab.onclick = () => choose(/** @type {Source} */ (tab.dataset.source));
for (const id of ["prompt", "towards", "mix", "strength", "seed", "travel"]) input(id).addEventListener("input", ask);
for (const id of ["steps", "student"]) select(id).addEventListener("change", ask);
for (const range of document.querySelectorAll('input[type="range"]')) {
  const tell = () => {
    const told = range.parentElement?.querySelector("output");
    if (told && range instanceof HTMLInputElement) told.textContent = range.value;
  };
  range.addEventListener("input", tell);
  tell();
}
input("colour").oninput = () => {
  drawing.colour = input("colour").value;
  pick(false);
};
input("size").oninput = () => (drawing.size = Number(input("size").value));
/** @param {boolean} erases */
function pick(erases) {
  drawing.erases = erases;
  button("brush").setAttribute("aria-pressed", String(!erases));
  button("eraser").setAttribute("aria-pressed", String(erases));
}
button("brush").onclick = () => pick(false);
button("eraser").onclick = () => pick(true);
button("undo").onclick = () => drawing.undo();
button("redo").onclick = () => drawing.redo();
button("clear").onclick = () => drawing.clear();
button("add-layer").onclick = () => drawing.add();
button("dice").onclick = () => {
  input("seed").value = String(Math.floor(Math.random() * 2 ** 31));
  ask();
};
input("file").onchange = () => {
  const file = input("file").files?.[0];
  if (file) open(file);
};
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"));
  if (file && (source === "canvas" || source === "picture")) open(file);
});
addEventListener("keydown", (event) => {
  if (event.target instanceof HTMLInputElement && event.target.type !== "range") return;
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && key === "z") {
    event.preventDefault();
    if (event.shiftKey) drawing.redo();
    else drawing.undo();
  } else if (!event.ctrlKey && !event.metaKey && key === "b") pick(false);
  else if (!event.ctrlKey && !event.metaKey && key === "e") pick(true);
});

/** @param {Blob} file @param {string} name */
function download(file, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(file), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

button("record").onclick = async () => {
  button("record").disabled = true;
  try {
    const format = select("format").value;
    download(await clip.save(Number(select("length").value), format), `live.${format}`);
  } catch (error) {
    status.textContent = error instanceof Error ? error.message : String(error);
  } finally {
    button("record").disabled = false;
  }
};
button("save").onclick = () => {
  if (newest) download(newest, `live.${newest.type.split("/")[1]}`);
  else status.textContent = "There is no picture yet.";
};
button("copy").onclick = async () => {
  const now = settings();
  const quoted = (/** @type {string} */ text) => `'${text.replaceAll("'", "'\\''")}'`;
  const parts = ["turbodistill sample", quoted(now.prompt), about.students[now.student], `--seed ${now.seed}`, `--steps ${now.steps}`];
  if (source !== "text") parts.push("--image picture.png", `--strength ${now.strength}`);
  const command = parts.filter(Boolean).join(" ");
  await navigator.clipboard?.writeText(command).catch(() => {});
  const more = now.mix || now.angle ? " Blend and noise travel are the page's alone." : "";
  element("stages", HTMLElement).textContent = `Copied: ${command}.${more}`;
};

drawing.reset(about.width, about.height);
choose("text");
