// What the charts draw of a run: curves as numbers.

import { short } from "./run.js";

/** @import { Run } from "./types.d.ts" */
/**
 * A curve, its `raw` values by those drawn, and whether these are few.
 * @typedef {{ name: string, values: (number | null)[], raw?: (value: number) => number, few?: boolean }} Curve
 */

// Middle tones: they stand out from ComfyUI's dark and light ground alike. One for each loss that a training may have.
export const COLOURS =
  "#3d94e0 #e0803a #35a86b #b865cc #b08d12 #d6546c #22a3a8 #8b79e8 #9a6b4a #8c949e #6fae3f #e56fb0 #5f7fb0".split(" ");

const HEALTH = ["accuracy", "pixel_accuracy", "saturation", "sharpness", "diversity"];

/** The losses, and the scores of the selections. @param {Run} run @returns {Curve[]} */
export function lossCurves({ history: { update, losses, scores } }) {
  const curves = Object.entries(losses).map(([name, values]) => ({ name, values }));
  if (!update.length || !scores.update.length) return curves;
  /** @type {(number | null)[]} */
  const values = update.map(() => null);
  scores.update.forEach((selected, i) => {
    const at = update.findIndex((point) => point >= selected); // its own point may have been thinned out
    values[at < 0 ? values.length - 1 : at] = scores.score[i] ?? null;
  });
  return [...curves, { name: "held-out score", values, few: true }];
}

/** Each measure by its place in its healthy range, 0 to 1. @param {Run} run @returns {Curve[]} */
export function healthCurves({ history: { health }, ranges }) {
  return HEALTH.flatMap((name) => {
    const [values, range] = [health[name], ranges[name]];
    if (!values || !range) return [];
    const [low, span] = [range[0], range[1] - range[0]];
    const places = values.map((value) => (value === null ? null : (value - low) / span));
    return [{ name, values: places, raw: (/** @type {number} */ place) => low + place * span }];
  });
}

/**
 * The health axis: the healthy range and some of what is beside it.
 * @param {number | null} low @param {number | null} high least and greatest place; null without curves
 * @returns {[number, number]}
 */
export function healthAxis(low, high) {
  return [Math.max(Math.min(low ?? 0, -0.3), -1.5), Math.min(Math.max(high ?? 1, 1.3), 2.5)];
}

/** Whether a logarithm does not know some value. @param {Curve[]} curves */
export function reachesZero(curves) {
  return curves.some(({ values }) => values.some((value) => value !== null && value <= 0));
}

/** Powers of ten, between which a logarithmic axis needs no lines. @param {number} value */
export function decade(value) {
  const power = Math.log10(Math.abs(value) || 1);
  return Math.abs(power - Math.round(power)) < 1e-5 ? value : null;
}

/** The value at a place in words; where there is none, the last before it. @param {Curve} curve @param {number} at */
export function valueAt({ values, raw }, at) {
  const last = values.slice(0, at + 1).findLast((value) => value !== null);
  return last == null ? "" : short(raw?.(last) ?? last, 2);
}
