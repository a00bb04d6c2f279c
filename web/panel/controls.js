// The slider and the buttons of a panel: what they show of a run.

/** @import { Preview, Run } from "./types.d.ts" */

/**
 * The place of the preview to show, -1 if there is none. The oldest ones go when new ones come: a chosen one is known
 * by its update, and the next stands in for one that is gone.
 * @param {Preview[]} previews @param {number | null} chosen its update; null for the newest
 */
export function shownPreview(previews, chosen) {
  const at = chosen === null ? -1 : previews.findIndex(({ update }) => update >= chosen);
  return at < 0 ? previews.length - 1 : at;
}

/** The update of the newest preview. @param {Run | null} run */
export const newest = (run) => run?.previews.at(-1)?.update ?? null;

/**
 * What the buttons show, and which of them still `waits`.
 * @param {Run} run @param {"" | "stop" | "preview"} asked by a click
 * @param {number | null} before the newest preview's update at the click
 */
export function buttons(run, asked, before) {
  const trains = run.state === "working" && run.what === "training";
  const came = asked === "preview" && newest(run) !== before;
  const waits = trains && !came ? asked : "";
  return {
    waits,
    stop: {
      disabled: !trains || waits === "stop",
      textContent: waits === "stop" ? "Stopping…" : "Stop and keep best",
    },
    preview: {
      disabled: !trains || waits !== "",
      textContent: waits === "preview" ? "Preview asked for…" : "Preview now",
    },
  };
}
