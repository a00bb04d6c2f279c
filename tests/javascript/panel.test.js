// The panel on a page that is only as much of one as it uses.

import assert from "node:assert/strict";
import { test } from "node:test";

import { nextFrame } from "./page.js";
import { preview, training } from "./snapshots.js";

const { Panel } = await import("../../web/panel/panel.js");
const { complete } = await import("../../web/panel/run.js");

/** A panel that shows a run; its parts by class, and what it asked for. */
function shown(run, { kind = "distill", hindered = "" } = {}) {
  const asked = [];
  const panel = new Panel(kind, {
    url: ({ filename }) => `/view?filename=${filename}`,
    ask: async (what) => {
      asked.push(what);
      return hindered;
    },
  });
  const part = (name) => panel.root.find(name);
  const text = (name) => part(name).textContent;
  const slider = () => part("flip").children[0];
  const [stop, now] = kind === "distill" ? part("buttons").children : [];
  const show = (next) => {
    panel.show(next);
    nextFrame();
  };
  const slide = (at) => {
    slider().value = String(at);
    slider().fire("input");
    nextFrame();
  };
  show(run);
  return { panel, asked, part, text, slider, stop, now, show, slide };
}

/** The previews of these updates, in a run. */
const trained = (updates, points = 50, changes) => training(points, { previews: updates.map(preview), ...changes });

test("before a run the panel says what it will show", () => {
  for (const kind of ["distill", "pairs"]) {
    const { panel, text } = shown(null, { kind });
    assert.equal(panel.root.dataset.state, "before");
    assert.match(text("status"), /^Here you will see/);
  }
});

for (const state of ["working", "done", "stopped", "cancelled", "failed"])
  test(`the state of a run is the panel's: ${state}`, () => {
    assert.equal(shown(training(3, { state })).panel.root.dataset.state, state);
  });

test("a run fills the bar, and one without an end lets it move", () => {
  const { part, show } = shown(training(40));
  assert.equal(part("bar").value, 0.4);
  show(training(0, { total: 0, share: null }));
  assert.ok(!("value" in part("bar")));
});

test("words of a run are shown as text, never read as HTML", () => {
  const hostile = '<img src=x onerror="alert(1)">&amp;';
  const run = training(3, { state: "failed", error: hostile, memory: hostile, headline: hostile, figures: hostile });
  run.warnings = [hostile];
  run.previews = [{ ...preview(0), prompts: [hostile] }];
  const { text, part } = shown(run);
  for (const name of ["status", "figures", "error", "memory", "warnings"]) assert.equal(text(name), hostile);
  const caption = part("card").children[1];
  assert.deepEqual([caption.textContent, caption.title], [hostile, `${hostile}\nseed 7`]);
});

test("the last three warnings are shown, all of them in the tip", () => {
  const { part } = shown(training(5, { warnings: ["a", "b", "c", "d"] }));
  assert.deepEqual(part("warnings").children.map((line) => line.textContent), ["b", "c", "d"]);
  assert.equal(part("warnings").title, "a\nb\nc\nd");
});

test("a preview shows the teacher's picture beside the student's", () => {
  const { part } = shown(trained([100]));
  const pictures = part("pair").children.map((picture) => [picture.find("label").textContent, picture.children[0].src]);
  assert.deepEqual(pictures, [
    ["teacher", "/view?filename=teacher-100.png"],
    ["student", "/view?filename=student-100.png"],
  ]);
});

test("a preview may lack teacher, prompt and seed", () => {
  const { part } = shown(training(3, { previews: [{ ...preview(0), teacher: [], prompts: [], seeds: [] }] }));
  const [pair, caption] = part("card").children;
  assert.deepEqual([pair.children.length, caption.textContent, caption.title], [1, "", "\nseed unknown"]);
});

test("pairs show their pictures", () => {
  const pictures = preview(0).teacher;
  const { part } = shown(training(3, { kind: "pairs", what: "teacher pairs", pictures }), { kind: "pairs" });
  const addresses = part("pictures").children.map((picture) => picture.children[0].src);
  assert.deepEqual(addresses, ["/view?filename=teacher-0.png"]);
});

test("the slider is there for two previews or more", () => {
  const { part, show } = shown(trained([0]));
  assert.equal(part("flip").hidden, true);
  show(trained([0, 100]));
  assert.equal(part("flip").hidden, false);
});

test("the newest preview is shown, until an earlier one is chosen", () => {
  const { text, slide, show, slider } = shown(trained([0, 100]));
  assert.equal(text("which"), "update 100 (2 of 2)");
  show(trained([0, 100, 200]));
  assert.equal(text("which"), "update 200 (3 of 3)");
  slide(1);
  show(trained([0, 100, 200, 300]));
  assert.equal(text("which"), "update 100 (2 of 4)");
  slide(3);
  show(trained([0, 100, 200, 300, 400]));
  assert.equal(text("which"), "update 400 (5 of 5)");
  assert.equal(slider().value, slider().max);
});

test("pictures are made anew only when others are to be shown", () => {
  const { part, slide, show } = shown(trained([0, 100]));
  const card = part("card");
  show(trained([0, 100], 51));
  assert.equal(part("card"), card);
  slide(0);
  assert.equal(part("card").children[1].textContent, "prompt 0");
});

test("a chosen preview stays while its run goes on", () => {
  const { text, slide, show, slider } = shown(trained([0, 100, 200], 1999));
  slide(1);
  const thinned = trained([0, 100, 200], 1000);
  thinned.history.update = thinned.history.update.map((update) => 2 * update);
  show(thinned);
  assert.equal(text("which"), "update 100 (2 of 3)");
  show(trained([100, 200, 300])); // the server has let the oldest go
  assert.deepEqual([text("which"), slider().value], ["update 100 (1 of 3)", "0"]);
});

test("another run shows its newest preview again", () => {
  const { text, slide, show } = shown(trained([0, 100, 200]));
  slide(0);
  show(training(0));
  assert.equal(text("which"), "");
  show(trained([0, 100]));
  assert.equal(text("which"), "update 100 (2 of 2)");
});

test("a click asks once, and the button waits for what it asked", async () => {
  const { now, stop, asked, show } = shown(trained([0]));
  await now.fire("click");
  nextFrame();
  assert.deepEqual([asked, now.disabled, now.textContent], [["preview"], true, "Preview asked for…"]);
  show(trained([0, 51]));
  assert.deepEqual([now.disabled, now.textContent], [false, "Preview now"]);
  await stop.fire("click");
  nextFrame();
  assert.deepEqual([asked, stop.disabled, stop.textContent], [["preview", "stop"], true, "Stopping…"]);
  show(trained([0, 51], 52, { state: "stopped" }));
  assert.deepEqual([stop.disabled, stop.textContent], [true, "Stop and keep best"]);
  show(trained([0, 51], 53)); // it goes on
  assert.equal(stop.disabled, false);
});

test("what hinders a wish is said, and the button can be clicked again", async () => {
  const { now, text } = shown(trained([0]), { hindered: "ComfyUI does not answer." });
  await now.fire("click");
  nextFrame();
  assert.deepEqual([now.disabled, text("said")], [false, "ComfyUI does not answer."]);
});

test("many events are drawn once", () => {
  const { panel } = shown(training(1));
  for (let points = 2; points < 9; points++) panel.show(training(points));
  assert.equal(nextFrame(), 1);
  assert.equal(nextFrame(), 0);
});

test("an empty run is drawn", () => {
  for (const kind of ["distill", "pairs"]) {
    const { text, part } = shown(complete({ kind }), { kind });
    assert.equal(text("status"), "");
    assert.deepEqual(part("pictures").children, []);
  }
});
