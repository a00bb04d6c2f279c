// What the charts draw of a run: curves as numbers.

import { short } from "./run.js";

/** @import { Run } from "./types.d.ts" */
/**
 * A curve, its `raw` values by those drawn, and whether these are few.
 * @typedef {{ name: string, values: (number | null)[], raw?: (value: number) => number, few?: boolean }} Curve
 */

const HEALTH = ["accuracy", "saturation", "sharpness", "diversity"];
const PARTS = 25; // of a curve: each point is the mean over one

/** Over how many of `count` points each point of a curve is a mean. @param {number} count */
export const meanWidth = (count) => Math.ceil(count / PARTS);

/** Mean of the `width` points up to each. @param {(number | null)[]} values @param {number} width */
export function smooth(values, width) {
  if (width < 2) return values;
  return values.map((value, i) => {
    if (value === null) return null;
    // Summed anew: a sum that is carried along is left at 1e-17 by a loss that has come to 0.
    let sum = 0;
    let count = 0;
    for (let at = Math.max(i + 1 - width, 0); at <= i; at++) {
      sum += values[at] ?? 0;
      if (values[at] !== null) count++;
    }
    return sum / count;
  });
}

/** The losses, and the scores of the selections. @param {Run} run @param {number} width @returns {Curve[]} */
export function lossCurves({ history: { update, losses, scores } }, width) {
  const curves = Object.entries(losses).map(([name, values]) => ({ name, values: smooth(values, width) }));
  if (!update.length || !scores.update.length) return curves;
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
