// A run: in words, and put together from what the server sends.

/** @import { Columns, Run } from "./types.d.ts" */

/** @type {Omit<Run, "first" | "points" | "history">} */
const NOTHING = {
  node: "",
  kind: "distill",
  name: "",
  state: "working",
  what: "",
  done: 0,
  total: 0,
  unit: "updates",
  rate: null,
  time_left: null,
  memory: "",
  warnings: [],
  error: "",
  best: null,
  previews: [],
  pictures: [],
  ranges: {},
};

/** A run with all its keys: an open page may be older than the server. @param {Partial<Run>} told @returns {Run} */
export function complete(told) {
  const history = { update: [], losses: {}, health: {}, scores: { update: [], score: [] }, ...told.history };
  return { ...NOTHING, first: 0, points: history.update.length, ...told, history };
}

/** @param {number} seconds */
export function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return minutes < 10 ? `${minutes} min ${whole % 60} s` : `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

/** @param {number} value @param {number} digits */
export const short = (value, digits) => String(Number(value.toPrecision(digits)));

/** What it is at. @param {Run} run */
export function status({ kind, state, what, name, best }) {
  const subject = kind === "pairs" ? "Teacher pairs" : name; // pairs are named by a key that tells nobody anything
  const kept = best ? `; the best student is that of update ${best.update} (score ${short(best.score, 3)})` : "";
  switch (state) {
    case "working":
      if (kind === "pairs") return what ? `Making ${what}` : "Preparing";
      if (what === "training") return `Training ${name}`;
      return what ? `Making ${what} for ${name}` : `Preparing ${name}`;
    case "done":
      return `${subject}: done${kept}`;
    case "stopped":
      return `${subject}: stopped as asked${kept}`;
    case "cancelled":
      return `${subject}: cancelled; Run goes on from there`;
    case "failed":
      return `${subject}: failed`;
  }
}

/** How far, how fast, how long yet. @param {Run} run */
export function figures({ state, unit, done, total, rate, time_left, history }) {
  const timed = unit === "seconds";
  const parts = [];
  if (total) parts.push(timed ? `${duration(done)} of ${duration(total)}` : `${done} of ${total} ${unit}`);
  if (timed && history.update.length) parts.push(`update ${history.update.at(-1)}`);
  if (state !== "working") return parts.join(" · ");
  if (rate && !timed) parts.push(rate < 1 ? `${short(1 / rate, 3)} ${unit} a second` : `${short(rate, 3)} s each`);
  if (time_left !== null) parts.push(`${duration(time_left)} left`);
  return parts.join(" · ");
}

/** Each warning, with its update where it has one. @param {Run} run */
export function warnings(run) {
  return run.warnings.map(({ update, text }) => (update ? `Update ${update}: ${text}` : text));
}

/**
 * The first points of curves with those of an event behind them; either may have names that the other lacks.
 * @param {Columns} columns @param {Columns} news @param {number} before @param {number} added
 */
function extended(columns, news, before, added) {
  const nothing = (/** @type {number} */ n) => Array(n).fill(null);
  const names = Object.keys({ ...columns, ...news });
  return Object.fromEntries(
    names.map((name) => {
      const old = columns[name]?.slice(0, before) ?? nothing(before);
      return [name, [...old, ...(news[name] ?? nothing(added))]];
    }),
  );
}

/**
 * The run of an event, with the history of `known` before its own; null if they do not join.
 * A page that asked in between two events knows some points of the later one already.
 * @param {Run | null} known @param {Run} run
 */
export function join(known, run) {
  const { update, losses, health, scores } = run.history;
  const [before, added] = [run.first, update.length];
  if (run.points !== before + added) return null; // the server has thinned them out
  if (before === 0) return run;
  if (known?.name !== run.name || known.history.update.length < before) return null;
  const history = {
    update: [...known.history.update.slice(0, before), ...update],
    losses: extended(known.history.losses, losses, before, added),
    health: extended(known.history.health, health, before, added),
    scores,
  };
  return { ...run, first: 0, history };
}
