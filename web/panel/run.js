// A run as the server tells it: in words, curves and pictures.

/** @import { Run } from "./types.d.ts" */

/** @type {Run} */
const NOTHING = {
  node: "",
  kind: "distill",
  name: "",
  state: "working",
  done: 0,
  total: 0,
  share: null,
  what: "",
  headline: "",
  figures: "",
  memory: "",
  warnings: [],
  error: "",
  previews: [],
  pictures: [],
  ranges: {},
  mean_of: 1,
  history: { update: [], losses: {}, health: {}, scores: { update: [], score: [] } },
};

/** A run with all its keys: an open page may be older than the server. @param {Partial<Run>} told @returns {Run} */
export function complete(told) {
  return { ...NOTHING, ...told, history: { ...NOTHING.history, ...told.history } };
}

/** @param {number} value @param {number} digits */
export const short = (value, digits) => String(Number(value.toPrecision(digits)));
