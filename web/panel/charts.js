// The two live charts, drawn by uPlot.

import uPlot from "../lib/uPlot.min.js";
import { COLOURS, decade, healthAxis, reachesZero, valueAt } from "./curves.js";

/** @import { Curve } from "./curves.js" */

const PLOT = 120; // pixels that a curve's plot has at least, with its axes and whatever its legend takes

/** One chart; made anew only when its curves are others. */
export class Chart {
  root = Object.assign(document.createElement("div"), { className: "chart" });
  /** @type {uPlot | null} */ #plot = null;
  /** @type {Curve[]} */ #curves = [];
  #made = "";

  /** @param {"loss" | "health"} kind */
  constructor(kind) {
    this.kind = kind;
  }

  /** @param {number[]} update @param {Curve[]} curves */
  draw(update, curves) {
    if (!update.length || !this.root.clientWidth) return;
    this.#curves = curves;
    // Logarithms know no loss below zero, which some adversarial ones reach: arcsinh bends around it.
    const below = reachesZero(curves);
    const made = [below, ...curves.map(({ name }) => name)].join();
    const data = /** @type {uPlot.AlignedData} */ ([update, ...curves.map(({ values }) => values)]);
    if (made !== this.#made) {
      this.destroy();
      this.#plot = new uPlot(this.#options(below ? 4 : 3), data, this.root);
      this.#made = made;
    } else this.#plot?.setData(data);
    this.#settle();
  }

  /** To its place's size, and the newest values into the legend while no pointer asks for others. */
  #settle() {
    const plot = this.#plot;
    if (!plot) return; // its legend has a height once it is ready
    if ((plot.cursor.left ?? -1) < 0) plot.setLegend({ idx: plot.data[0].length - 1 });
    const legend = plot.root.querySelector(".u-legend")?.clientHeight ?? 0;
    this.root.style.minHeight = `${legend + PLOT}px`;
    const [width, height] = [this.root.clientWidth, this.root.clientHeight - legend];
    if (height > 0 && (plot.width !== width || plot.height !== height)) plot.setSize({ width, height });
  }

  /** In the colours of another theme. */
  redraw() {
    this.#plot?.redraw(false, true);
  }

  destroy() {
    this.#plot?.destroy();
    this.#plot = null;
    this.#made = "";
  }

  #colour(/** @type {string} */ name) {
    return getComputedStyle(this.root).getPropertyValue(name);
  }

  /** @param {3 | 4} bend of the losses' axis @returns {uPlot.Options} */
  #options(bend) {
    const axis = {
      stroke: () => this.#colour("--turbodistill-quiet"),
      grid: { stroke: () => this.#colour("--turbodistill-line"), width: 1 },
      ticks: { show: false },
      font: "11px system-ui, sans-serif",
      labelFont: "11px system-ui, sans-serif",
      labelSize: 14,
      gap: 3,
    };
    const health = this.kind === "health";
    return {
      width: this.root.clientWidth,
      height: 100,
      padding: [6, 12, 0, 0],
      cursor: {
        y: false,
        drag: { x: false, y: false },
        points: { size: 5 },
        // ComfyUI pans and zooms the node unseen by uPlot: where the pointer is, is looked up at each move.
        move: ({ over, cursor: { event } }, left, top) => {
          const box = over.getBoundingClientRect();
          const scale = box.width / over.offsetWidth || 1;
          return event ? [(event.clientX - box.left) / scale, (event.clientY - box.top) / scale] : [left, top];
        },
      },
      scales: {
        x: { time: false },
        y: health ? { range: (_, low, high) => healthAxis(low, high) } : { distr: bend, asinh: 0.01 },
      },
      axes: [
        { ...axis, size: 18, label: "update" },
        health
          ? { ...axis, size: 34, label: "health", splits: [0, 1], values: ["low", "high"] }
          : { ...axis, size: 40, label: "loss", space: 22, grid: { ...axis.grid, filter: (_, at) => at.map(decade) } },
      ],
      series: [{ label: "update" }, ...this.#curves.map((curve, i) => this.#series(curve, i))],
      hooks: { ready: [() => this.#settle()], drawClear: health ? [(plot) => this.#band(plot)] : [] },
    };
  }

  /** @param {Curve} curve @param {number} i @returns {uPlot.Series} */
  #series({ name, few }, i) {
    return {
      label: name,
      stroke: COLOURS[i % COLOURS.length] ?? "",
      width: 1.5,
      spanGaps: true,
      ...(few && { dash: [4, 4], points: { show: true, size: 5 } }),
      value: (_, __, ___, at) => {
        const curve = this.#curves[i];
        return curve ? valueAt(curve, at ?? -1) : "";
      },
    };
  }

  /** A quiet band over the healthy range. @param {uPlot} plot */
  #band({ bbox, ctx, valToPos }) {
    const [top, bottom] = [valToPos(1, "y", true), valToPos(0, "y", true)];
    ctx.fillStyle = this.#colour("--turbodistill-band");
    ctx.fillRect(bbox.left, top, bbox.width, bottom - top);
  }
}
