// Which preview is shown, and what the buttons say.

import assert from "node:assert/strict";
import { test } from "node:test";

import { buttons, newest, shownPreview } from "../../web/panel/controls.js";
import { preview, training } from "./snapshots.js";

const previews = [0, 100, 200].map(preview);
const trains = (changes = {}) => training(50, { previews, ...changes });
const words = ({ stop, preview }) => [stop.textContent, stop.disabled, preview.textContent, preview.disabled];

for (const [what, chosen, at] of [
  ["the newest, where none is chosen", null, 2],
  ["the chosen one", 100, 1],
  ["the first of all, which is of update 0", 0, 0],
  ["the one after it, where the chosen one is gone", 50, 1],
  ["the newest, where all after it are gone", 300, 2],
])
  test(`the preview shown is ${what}`, () => assert.equal(shownPreview(previews, chosen), at));

test("a chosen preview stays when the oldest ones go", () => {
  assert.equal(shownPreview([...previews.slice(1), preview(300)], 100), 0);
});

test("without previews none is shown", () => {
  assert.deepEqual([shownPreview([], null), shownPreview([], 100)], [-1, -1]);
  assert.deepEqual([newest(null), newest(training()), newest(trains())], [null, null, 200]);
});

test("a training can be stopped and asked for a preview", () => {
  assert.deepEqual(words(buttons(trains(), "", null)), ["Stop and keep best", false, "Preview now", false]);
});

for (const changes of [
  { state: "done" },
  { state: "stopped" },
  { state: "cancelled" },
  { state: "failed" },
  { what: "teacher pairs" },
  { what: "" },
])
  test(`with ${JSON.stringify(changes)} there is nothing to click and to wait for`, () => {
    for (const asked of ["", "stop", "preview"]) {
      const shown = buttons(trains(changes), asked, 200);
      assert.deepEqual(words(shown), ["Stop and keep best", true, "Preview now", true]);
      assert.equal(shown.waits, "");
    }
  });

test("a training that is to stop takes no more wishes", () => {
  const shown = buttons(trains(), "stop", 200);
  assert.deepEqual(words(shown), ["Stopping…", true, "Preview now", true]);
  assert.equal(shown.waits, "stop");
});

test("a training that is to show a preview can still be stopped", () => {
  const shown = buttons(trains(), "preview", 200);
  assert.deepEqual(words(shown), ["Stop and keep best", false, "Preview asked for…", true]);
  assert.equal(shown.waits, "preview");
});

test("a preview has come, though the server keeps as many as before", () => {
  const next = trains({ previews: [...previews.slice(1), preview(250)] });
  assert.deepEqual(words(buttons(next, "preview", 200)), ["Stop and keep best", false, "Preview now", false]);
});

test("the first preview of a run has come, that of update 0 too", () => {
  assert.equal(buttons(trains({ previews: [] }), "preview", null).waits, "preview");
  assert.equal(buttons(trains({ previews: [preview(0)] }), "preview", null).waits, "");
});

test("a stop is waited for, whatever previews come meanwhile", () => {
  assert.equal(buttons(trains(), "stop", 100).waits, "stop");
});
