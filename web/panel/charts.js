// The two live charts, drawn by uPlot.

import uPlot from "../lib/uPlot.esm.js";
import { short } from "./run.js";

/** @import { Run } from "./types.d.ts" */
/**
 * A curve, its `raw` values by those drawn, and whether these are few.
 * @typedef {{ name: string, values: (number | null)[], raw?: (value: number) => number, few?: boolean }} Curve
 */

// Middle tones: they stand out from ComfyUI's dark and light ground alike.
const COLOURS = ["#3d94e0", "#e0803a", "#35a86b", "#b865cc", "#b08d12", "#d6546c"];
const HEALTH = ["accuracy", "saturation", "sharpness", "diversity"];

/** Powers of ten, between which a logarithmic axis needs no lines. @param {number} value */
const decade = (value) => (Math.abs((Math.log10(Math.abs(value) || 1) + 1e-6) % 1) < 1e-5 ? value : null);

/** Mean of the `width` points up to each. @param {(number | null)[]} values @param {number} width */
function smooth(values, width) {
  if (width < 2) return values;
  let [sum, count] = [0, 0];
  return values.map((value, i) => {
    if (value !== null) [sum, count] = [sum + value, count + 1];
    const gone = i < width ? null : (values[i - width] ?? null);
    if (gone !== null) [sum, count] = [sum - gone, count - 1];
    return value === null ? null : sum / count;
  });
}

/** The losses, and the scores of the selections. @param {Run} run @param {number} width @returns {Curve[]} */
export function lossCurves({ history: { update, losses, scores } }, width) {
  const curves = Object.entries(losses).map(([name, values]) => ({ name, values: smooth(values, width) }));
  if (!scores.update.length) return curves;
  /** @type {(number | null)[]} */
  const values = update.map(() => null);
  scores.update.forEach((selected, i) => {
    const at = update.findIndex((point) => point >= selected); // its own point may have been thinned out
    values[at < 0 ? values.length - 1 : at] = scores.score[i] ?? null;
  });
  return [...curves, { name: "held-out score", values, few: true }];
}

/** Each measure by its place in its healthy range, 0 to 1. @param {Run} run @param {number} width @returns {Curve[]} */
export function healthCurves({ history: { health }, ranges }, width) {
  return HEALTH.flatMap((name) => {
    const [values, range] = [health[name], ranges[name]];
    if (!values || !range) return [];
    const [low, span] = [range[0], range[1] - range[0]];
    const places = smooth(values, width).map((value) => (value === null ? null : (value - low) / span));
    return [{ name, values: places, raw: (/** @type {number} */ place) => low + place * span }];
  });
}

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
    const below = curves.some(({ values }) => values.some((value) => value !== null && value <= 0));
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
        y: health
          ? { range: (_, low, high) => [Math.max(Math.min(low, -0.3), -1.5), Math.min(Math.max(high, 1.3), 2.5)] }
          : { distr: bend, asinh: 0.01 },
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
      // Where there is no value, the last before it.
      value: (_, value, __, at) => {
        const curve = this.#curves[i];
        const last = value ?? curve?.values.slice(0, (at ?? -1) + 1).findLast((v) => v !== null);
        return last == null ? "" : short(curve?.raw?.(last) ?? last, 2);
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
