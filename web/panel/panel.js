// The panel in a node: draws a run, and knows nothing of ComfyUI.

import { Chart } from "./charts.js";
import { buttons, newest, shownPreview } from "./controls.js";
import { healthCurves, lossCurves } from "./curves.js";

/** @import { Doors, Picture, Preview, Run } from "./types.d.ts" */

const BEFORE = {
  distill:
    "Here you will see how far the training is, losses, health, and the student's pictures beside the teacher's.",
  pairs: "Here you will see how many pairs are made, and the newest pictures.",
};
const SMALL = 128; // pixels; smaller pictures are shown in squares, not blurred

/**
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag @param {string} name of its class @param {(Node | string)[]} children
 */
function element(tag, name, ...children) {
  const made = document.createElement(tag);
  made.className = name;
  made.append(...children);
  return made;
}

/** Our style sheets, within the panel: the page's head is everyone's. */
function styles() {
  return ["../lib/uPlot.min.css", "panel.css"].map((file) =>
    Object.assign(document.createElement("link"), { rel: "stylesheet", href: new URL(file, import.meta.url).href }),
  );
}

export class Panel {
  /** @type {Run | null} */ run = null;
  root = element("div", "turbodistill-panel");
  #status = element("div", "status");
  #bar = element("progress", "bar");
  #figures = element("div", "figures");
  #error = element("div", "error");
  #warnings = element("ul", "warnings");
  #memory = element("div", "memory");
  #charts = element("div", "charts");
  #pictures = element("div", "pictures");
  #slider = element("input", "");
  #which = element("span", "which");
  #said = element("span", "said");
  #flip = element("div", "flip");
  #buttons = element("div", "buttons");
  /** @type {HTMLButtonElement} */ #stop;
  /** @type {HTMLButtonElement} */ #preview;
  #losses = new Chart("loss");
  #health = new Chart("health");
  #shown = ""; // which pictures are drawn
  /** What was clicked and has not come yet. @type {"" | "stop" | "preview"} */ #asked = "";
  /** The newest preview's update at the click. @type {number | null} */ #before = null;
  /** The chosen preview's update; null for the newest. @type {number | null} */ #chosen = null;
  #frame = 0;

  /** @param {"distill" | "pairs"} kind @param {Doors} doors */
  constructor(kind, doors) {
    this.kind = kind;
    this.doors = doors;
    this.#stop = this.#button("Stop and keep best", "stop");
    this.#preview = this.#button("Preview now", "preview");
    this.#buttons.append(this.#stop, this.#preview, this.#said);
    this.#flip.append(this.#slider, this.#which);
    Object.assign(this.#slider, { type: "range", min: "0", step: "1", title: "Earlier previews" });
    this.#slider.addEventListener("input", () => {
      const chosen = this.run?.previews[this.#slider.valueAsNumber];
      this.#chosen = this.#slider.value === this.#slider.max ? null : (chosen?.update ?? null);
      this.draw();
    });
    this.root.append(...styles(), this.#status, this.#bar, this.#figures, this.#error, this.#warnings);
    if (kind === "distill") {
      this.#charts.append(this.#losses.root, this.#health.root);
      this.root.append(this.#charts, this.#flip, this.#pictures, this.#memory, this.#buttons);
    } else this.root.append(this.#pictures, this.#memory);
    this.sizes = new ResizeObserver(() => this.draw());
    for (const root of [this.root, this.#losses.root]) this.sizes.observe(root);
    // A theme is a set of variables on the root element.
    this.themes = new MutationObserver(() => [this.#losses, this.#health].forEach((chart) => chart.redraw()));
    this.themes.observe(document.documentElement, { attributeFilter: ["style", "class"] });
    this.show(null);
  }

  /** @param {Run | null} run */
  show(run) {
    if (!run?.previews.length) this.#chosen = null; // another run
    this.run = run;
    this.draw();
  }

  /** Draw at the next frame, once for however many events came: none comes in a hidden tab. */
  draw() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  destroy() {
    cancelAnimationFrame(this.#frame);
    this.sizes.disconnect();
    this.themes.disconnect();
    this.#losses.destroy();
    this.#health.destroy();
  }

  #draw() {
    const run = this.run;
    this.root.dataset.state = run?.state ?? "before";
    this.#status.textContent = run ? run.headline : BEFORE[this.kind];
    if (!run) return this.#pictures.replaceChildren();
    if (run.share !== null) this.#bar.value = run.share;
    else this.#bar.removeAttribute("value"); // moves, for nobody knows how far
    this.#figures.textContent = run.figures;
    this.#error.textContent = run.error;
    this.#memory.textContent = run.memory;
    this.#warnings.replaceChildren(...run.warnings.slice(-3).map((words) => element("li", "", words)));
    this.#warnings.title = run.warnings.join("\n");
    const { update } = run.history;
    this.#charts.title =
      run.mean_of > 1 ? `Means over ${run.mean_of} points; click a name to hide or show its curve` : "";
    this.#charts.hidden = !update.length;
    this.#losses.draw(update, lossCurves(run));
    this.#health.draw(update, healthCurves(run));
    this.#drawPictures(run);
    this.#drawButtons(run);
  }

  /** @param {Run} run */
  #drawPictures(run) {
    const last = run.previews.length - 1;
    this.#flip.hidden = last < 1;
    this.#slider.max = String(last);
    const at = shownPreview(run.previews, this.#chosen);
    this.#slider.value = String(at);
    const preview = run.previews[at];
    this.#which.textContent = preview ? `update ${preview.update} (${at + 1} of ${last + 1})` : "";
    const shown = JSON.stringify(preview ?? run.pictures);
    if (shown === this.#shown) return;
    this.#shown = shown;
    const loose = () => run.pictures.map((picture) => this.#picture(picture));
    this.#pictures.replaceChildren(...(preview ? this.#cards(preview) : loose()));
  }

  /** @param {Preview} preview */
  #cards({ prompts, seeds, teacher, student }) {
    return student.map((picture, i) => {
      const pair = element("div", "pair", this.#picture(picture, "student"));
      const model = teacher[i];
      if (model) pair.prepend(this.#picture(model, "teacher"));
      const caption = element("figcaption", "", prompts[i] ?? "");
      caption.title = `${prompts[i] ?? ""}\nseed ${seeds[i] ?? "unknown"}`;
      return element("figure", "card", pair, caption);
    });
  }

  /** @param {Picture} picture @param {string} [label] */
  #picture(picture, label = "") {
    const image = element("img", "");
    image.alt = label || "teacher's picture";
    image.draggable = false;
    image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < SMALL));
    image.src = this.doors.url(picture);
    return element("div", "picture", image, ...(label ? [element("span", "label", label)] : []));
  }

  /** @param {string} words @param {"stop" | "preview"} what */
  #button(words, what) {
    const button = element("button", "", words);
    button.type = "button";
    button.addEventListener("click", async () => {
      this.#asked = what;
      this.#before = newest(this.run);
      this.#said.textContent = "";
      this.draw();
      const hindered = await this.doors.ask(what);
      if (hindered) [this.#asked, this.#said.textContent] = ["", hindered];
      this.draw();
    });
    return button;
  }

  /** @param {Run} run */
  #drawButtons(run) {
    const { waits, stop, preview } = buttons(run, this.#asked, this.#before);
    this.#asked = waits;
    Object.assign(this.#stop, stop);
    Object.assign(this.#preview, preview);
  }
}
