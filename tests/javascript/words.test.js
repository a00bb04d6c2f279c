// A run in words: how long, how far, what became of it.

import assert from "node:assert/strict";
import { test } from "node:test";

import { complete, duration, figures, short, status, warnings } from "../../web/panel/run.js";
import { training } from "./snapshots.js";

for (const [seconds, words] of [
  [0, "0 s"],
  [0.4, "0 s"],
  [59.4, "59 s"],
  [59.6, "1 min 0 s"],
  [61, "1 min 1 s"],
  [599.6, "10 min"],
  [601, "10 min"],
  [3599.6, "1 h 00 min"],
  [3660, "1 h 01 min"],
  [90_000, "25 h 00 min"],
])
  test(`${seconds} seconds are ${words}`, () => assert.equal(duration(seconds), words));

for (const [value, digits, words] of [
  [0.012345, 2, "0.012"],
  [1234.5, 3, "1230"],
  [2, 3, "2"],
  [-0.5, 2, "-0.5"],
  [0, 2, "0"],
])
  test(`${value} in ${digits} digits is ${words}`, () => assert.equal(short(value, digits), words));

const best = { update: 40, score: 0.12345 };
const KEPT = "; the best student is that of update 40 (score 0.123)";
for (const [words, changes] of [
  ["Training my-turbo", {}],
  ["Making teacher pairs for my-turbo", { what: "teacher pairs" }],
  ["Preparing my-turbo", { what: "" }],
  ["my-turbo: done", { state: "done" }],
  [`my-turbo: done${KEPT}`, { state: "done", best }],
  [`my-turbo: stopped as asked${KEPT}`, { state: "stopped", best }],
  ["my-turbo: cancelled; Run goes on from there", { state: "cancelled", best }],
  ["my-turbo: failed", { state: "failed", best }],
  // Pairs are named by a key, which is not shown.
  ["Preparing", { kind: "pairs", what: "" }],
  ["Making teacher pairs", { kind: "pairs", what: "teacher pairs" }],
  ["Teacher pairs: done", { kind: "pairs", what: "teacher pairs", state: "done" }],
  ["Teacher pairs: failed", { kind: "pairs", what: "teacher pairs", state: "failed" }],
])
  test(`a status: ${words}`, () => assert.equal(status(training(50, changes)), words));

test("a training tells how far, how fast and how long yet", () => {
  assert.equal(figures(training(40)), "40 of 100 updates · 2 s each · 2 min 0 s left");
});

test("a fast training is counted by the second", () => {
  const words = figures(training(40, { rate: 0.08, time_left: 4.8 }));
  assert.equal(words, "40 of 100 updates · 12.5 updates a second · 5 s left");
});

test("a slow training is told by the update", () => {
  assert.equal(figures(training(99, { rate: 1, time_left: 1 })), "99 of 100 updates · 1 s each · 1 s left");
});

test("before the first update there is neither speed nor time left", () => {
  assert.equal(figures(training(0, { rate: null, time_left: null })), "0 of 100 updates");
});

test("the last moment has a time left too", () => {
  assert.equal(figures(training(100, { rate: null, time_left: 0 })), "100 of 100 updates · 0 s left");
});

for (const state of ["done", "stopped", "cancelled", "failed"])
  test(`a run that is ${state} has no time left`, () => {
    assert.equal(figures(training(40, { state })), "40 of 100 updates");
  });

test("a run that has not begun has no figures", () => {
  assert.equal(figures(training(0, { total: 0, unit: "", rate: null, time_left: null })), "");
});

test("warnings name their updates; those of the settings have none", () => {
  const told = [
    { update: 0, text: "little memory" },
    { update: 200, text: "saturated" },
  ];
  assert.deepEqual(warnings(training(0, { warnings: told })), ["little memory", "Update 200: saturated"]);
});

test("a whole run is taken as it is", () => assert.deepEqual(complete(training(3)), training(3)));

test("of a run that lacks everything something is shown", () => {
  const run = complete({});
  assert.deepEqual([status(run), figures(run), warnings(run), run.memory], ["Preparing ", "", [], ""]);
  assert.deepEqual([run.first, run.points], [0, 0]);
});

test("a run may lack any of its keys", () => {
  const { workflow, ...whole } = training(3);
  for (const key of Object.keys(whole)) {
    const { [key]: _, ...told } = whole;
    const run = complete(told);
    assert.deepEqual(Object.keys(run).sort(), Object.keys(whole).sort());
    assert.doesNotMatch(`${status(run)} ${figures(run)}`, /NaN|null|undefined/, `without ${key}`);
  }
});

test("a history may lack its parts", () => {
  const { history, points } = complete({ history: { update: [1, 2] } });
  assert.deepEqual(history, { update: [1, 2], losses: {}, health: {}, scores: { update: [], score: [] } });
  assert.equal(points, 2);
});
