// Runs as the server tells them.

/** A training that has made `points` updates; `changes` are its other values. */
export function training(points = 0, changes = {}) {
  return {
    node: "12",
    workflow: "w",
    kind: "distill",
    name: "my-turbo",
    state: "working",
    what: "training",
    done: points,
    total: 100,
    share: points / 100,
    headline: "Training my-turbo",
    figures: `${points} of 100 updates · 2 s each`,
    memory: "",
    warnings: [],
    error: "",
    previews: [],
    pictures: [],
    ranges: { accuracy: [0.5, 0.9], saturation: [0, 2] },
    mean_of: 1,
    history: history(1, points),
    ...changes,
  };
}

/** The points of the updates `from` to `to`, whose values tell which they are. */
export function history(from, to) {
  const update = Array.from({ length: to - from + 1 }, (_, i) => from + i);
  return {
    update,
    losses: { regression: update.map((u) => 1 / u) },
    health: { accuracy: update.map((u) => u / 100) },
    scores: { update: [], score: [] },
  };
}

/** A preview at an update, of one picture. */
export function preview(update) {
  const picture = (name) => ({ filename: `${name}-${update}.png`, subfolder: "runs/my turbo", type: "temp" });
  const pictures = { teacher: [picture("teacher")], student: [picture("student")] };
  return { update, prompts: [`prompt ${update}`], seeds: [7], ...pictures };
}
