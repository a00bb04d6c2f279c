// The curves of the charts, and their axes.

import assert from "node:assert/strict";
import { test } from "node:test";

import * as curves from "../../web/panel/curves.js";
import { complete } from "../../web/panel/run.js";
import { training } from "./snapshots.js";

const near = (a, b) => a.forEach((value, i) => assert.ok(Math.abs(value - b[i]) < 1e-12, `${a} is not ${b}`));

/** A run whose points are at `update` with the scores of these updates. */
function scored(update, at, score) {
  return complete({ history: { update, losses: { regression: update }, health: {}, scores: { update: at, score } } });
}
const scores = (run) => curves.lossCurves(run).find(({ name }) => name === "held-out score")?.values;

test("a score stands at its own update", () => {
  assert.deepEqual(scores(scored([1, 2, 3, 4], [2, 4], [0.5, 0.4])), [null, 0.5, null, 0.4]);
});

test("a score whose point was thinned out stands at the next", () => {
  assert.deepEqual(scores(scored([2, 4, 6], [3], [0.5])), [null, 0.5, null]);
});

test("a score after the last point stands at that one", () => {
  assert.deepEqual(scores(scored([2, 4], [5], [0.5])), [null, 0.5]);
});

test("every loss that a training may have, and the score, has a colour of its own", () => {
  const student = ["regression", "distillation", "features", "adversarial"];
  const others = ["discriminator", "mismatch", "r1", "fake_score"];
  assert.ok(new Set(curves.COLOURS).size >= student.length + others.length + 1);
});

test("scores stand beside the losses, as few points", () => {
  const [regression, score] = curves.lossCurves(scored([1, 2, 3], [1, 3], [0.5, 0.1]));
  assert.deepEqual([regression.values, score.values], [[1, 2, 3], [0.5, null, 0.1]]);
  assert.ok(score.few && !regression.few);
});

test("without selections there is no curve of scores", () => assert.equal(scores(scored([1, 2], [], [])), undefined));

test("a score before the first point waits for it", () => assert.equal(scores(scored([], [5], [0.5])), undefined));

test("a score that is missing is a gap", () => {
  assert.deepEqual(scores(scored([1, 2], [1, 2], [null])), [null, null]);
});

test("a healthy measure is drawn between 0 and 1, whatever its range", () => {
  const run = training(0, { ranges: { accuracy: [0.5, 0.9], saturation: [0, 2] } });
  run.history.health = { saturation: [0, 1, 2, 4], accuracy: [0.5, 0.7, 0.9, 0.3] };
  const [accuracy, saturation] = curves.healthCurves(run);
  assert.deepEqual([accuracy.name, saturation.name], ["accuracy", "saturation"]);
  near(accuracy.values, [0, 0.5, 1, -0.5]);
  near(saturation.values, [0, 0.5, 1, 2]);
});

test("the measure's own value is found again", () => {
  const [accuracy] = curves.healthCurves(training(60));
  near(accuracy.values.map(accuracy.raw), training(60).history.health.accuracy);
});

test("a measure without values or without a range is not drawn", () => {
  const run = training(3, { ranges: { saturation: [0, 2] } });
  assert.deepEqual(curves.healthCurves(run), []);
});

test("a gap in a measure stays a gap", () => {
  const run = training(2);
  run.history.health.accuracy = [null, 0.5];
  assert.deepEqual(curves.healthCurves(run)[0].values, [null, 0]);
});

test("an empty run has no curves", () => {
  assert.deepEqual([...curves.lossCurves(complete({})), ...curves.healthCurves(complete({}))], []);
});

for (const [low, high, shown] of [
  [0.2, 0.8, [-0.3, 1.3]],
  [-1, 2, [-1, 2]],
  [-50, 90, [-1.5, 2.5]],
  [null, null, [-0.3, 1.3]],
])
  test(`health from ${low} to ${high}: the axis shows the band and not too much beside it`, () => {
    assert.deepEqual(curves.healthAxis(low, high), shown);
  });

test("a logarithmic axis knows no 0 and nothing below", () => {
  const reaches = (...values) => curves.reachesZero([{ name: "a", values: [1] }, { name: "b", values }]);
  assert.deepEqual([reaches(0.1, null), reaches(0), reaches(-2, null), reaches()], [false, true, true, false]);
});

test("a logarithmic axis has lines at powers of ten, above 1 and below, and at 0", () => {
  const at = [1e-6, 0.001, 0.02, 0.1, 0.5, 1, 9, 10, 99, 100, 1e6, 0, -0.01, -0.3, -10];
  assert.deepEqual(
    at.filter((value) => curves.decade(value) !== null),
    [1e-6, 0.001, 0.1, 1, 10, 100, 1e6, 0, -0.01, -10],
  );
});

test("the legend tells the value, or the last before a gap", () => {
  const curve = { name: "a", values: [null, 0.12345, null, 7] };
  assert.deepEqual([-1, 0, 1, 2, 3].map((at) => curves.valueAt(curve, at)), ["", "", "0.12", "0.12", "7"]);
});

test("the legend tells a measure's own value, not its place", () => {
  assert.equal(curves.valueAt({ name: "a", values: [0.5], raw: (place) => 0.5 + place * 0.4 }, 0), "0.7");
});
