// Events are put behind what a page knows of a run.

import assert from "node:assert/strict";
import { test } from "node:test";

import { join } from "../../web/panel/run.js";
import { event, training } from "./snapshots.js";

test("later points come behind the known ones", () => {
  assert.deepEqual(join(training(3), event(3, 5)), training(5));
});

test("all events of a run one after the other are the run", () => {
  let run = null;
  for (let points = 0; points <= 30; points += 3) run = join(run, event(Math.max(points - 3, 0), points));
  assert.deepEqual(run, training(30));
});

test("points that are known already are not shown twice", () => {
  assert.deepEqual(join(training(5), event(3, 6)), training(6));
});

test("an event without points still tells the rest", () => {
  assert.equal(join(training(3), event(3, 3, { state: "failed", error: "out of memory" })).error, "out of memory");
});

test("the known run stays as it was", () => {
  const known = training(3);
  join(known, event(3, 5));
  assert.deepEqual(known, training(3));
});

test("a run from its first point on needs nothing known", () => {
  assert.deepEqual(join(null, event(0, 4)), training(4));
  assert.deepEqual(join(training(9, { name: "another" }), event(0, 4)), training(4));
});

test("an event does not join what misses points before it", () => {
  assert.equal(join(null, event(3, 5)), null);
  assert.equal(join(training(2), event(3, 5)), null);
});

test("an event does not join a run of another name", () => {
  assert.equal(join(training(3, { name: "another" }), event(3, 5)), null);
});

test("an event does not join once the server has thinned out its points", () => {
  assert.equal(join(training(1999), event(1999, 1999, { points: 1000 })), null);
});

test("a curve that begins late has nulls before, one that ends has nulls behind", () => {
  const news = event(2, 4);
  news.history.losses = { adversarial: [0.5, null] };
  news.history.health = {};
  const { losses, health, update } = join(training(2), news).history;
  assert.deepEqual(losses, { regression: [1, 0.5, null, null], adversarial: [null, null, 0.5, null] });
  assert.deepEqual(health, { accuracy: [0.01, 0.02, null, null] });
  assert.deepEqual(update, [1, 2, 3, 4]);
});

test("scores come whole with each event", () => {
  const known = training(3);
  known.history.scores = { update: [2], score: [0.4] };
  const news = event(3, 4);
  news.history.scores = { update: [2, 4], score: [0.4, 0.3] };
  assert.deepEqual(join(known, news).history.scores, { update: [2, 4], score: [0.4, 0.3] });
});
