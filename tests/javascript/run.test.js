// What a page takes of the server's words on a run.

import assert from "node:assert/strict";
import { test } from "node:test";

import { complete, short } from "../../web/panel/run.js";
import { training } from "./snapshots.js";

for (const [value, digits, words] of [
  [0.012345, 2, "0.012"],
  [1234.5, 3, "1230"],
  [2, 3, "2"],
  [-0.5, 2, "-0.5"],
  [0, 2, "0"],
])
  test(`${value} in ${digits} digits is ${words}`, () => assert.equal(short(value, digits), words));

test("a whole run is taken as it is", () => assert.deepEqual(complete(training(3)), training(3)));

test("a run may lack any of its keys", () => {
  const { workflow, ...whole } = training(3);
  for (const key of Object.keys(whole)) {
    const { [key]: _, ...told } = whole;
    const run = complete(told);
    assert.deepEqual(Object.keys(run).sort(), Object.keys(whole).sort());
    assert.notEqual(run[key], undefined, `without ${key}`);
  }
});

test("a history may lack its parts", () => {
  const { history } = complete({ history: { update: [1, 2] } });
  assert.deepEqual(history, { update: [1, 2], losses: {}, health: {}, scores: { update: [], score: [] } });
});
