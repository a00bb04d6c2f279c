// ComfyUI's page with our panels in its nodes.

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { answered, api, app, node } from "./comfyui.js";
import { nextFrame } from "./page.js";
import { training } from "./snapshots.js";

const RUN = "/turbodistill/runs/12";
let distill;

beforeEach(() => {
  distill = node(12, "TurboDistillDistill");
  app.graph = { id: "w", nodes: [distill] };
  Object.assign(api, { asked: [], answers: {} });
});

/** The state that a node's panel shows, and how far its run is. */
function shown({ root }) {
  nextFrame();
  return [root.dataset.state, root.find("figures").textContent.split(" · ")[0]];
}

/** Send a run's event; done when all that it sets off is. */
async function tell(run) {
  api.tell("turbodistill.run", run);
  await answered();
}

test("nodes that train or make pairs have a panel, which is not saved; others have none", () => {
  const [pairs, other] = [node(1, "TurboDistillTeacherPairs"), node(2, "KSampler")];
  assert.ok(distill.root && pairs.root && !other.root);
  for (const { options, widget } of [distill, pairs])
    assert.deepEqual([options.serialize, widget.serialize], [false, false]); // in the prompt, in the workflow
});

test("our templates stand in the order of their numbers, others' as the server names them", async () => {
  const expected = { turbodistill: ["01 a", "02 b", "08 c"], others: ["b", "a"] };
  assert.deepEqual(await api.getWorkflowTemplates(), expected);
});

test("events are shown without asking", async () => {
  await tell(training(3));
  await tell(training(5));
  assert.deepEqual([shown(distill), api.asked], [["working", "5 of 100 updates"], []]);
});

test("an event that comes while the server is asked is newer than its answer", async () => {
  let answer;
  api.answers[RUN] = new Promise((resolve) => (answer = resolve));
  api.tell("reconnected");
  await tell(training(9));
  answer(training(7));
  await answered();
  assert.deepEqual([shown(distill), api.asked], [["working", "9 of 100 updates"], [`GET ${RUN}`]]);
});

test("a workflow that is opened shows what its nodes' runs are at", async () => {
  api.answers[RUN] = training(100, { state: "done" });
  app.extension.afterConfigureGraph();
  await answered();
  assert.deepEqual(shown(distill), ["done", "100 of 100 updates"]);
});

test("a run of another workflow is not shown", async () => {
  await tell(training(3, { workflow: "another" }));
  assert.equal(shown(distill)[0], "before");
  api.answers[RUN] = training(3, { workflow: "another" });
  app.extension.afterConfigureGraph();
  await answered();
  assert.equal(shown(distill)[0], "before");
});

test("a run is shown in its own node only, in a subgraph too", async () => {
  const [inside, twin] = [node(12, "TurboDistillDistill"), node(13, "TurboDistillDistill")];
  app.graph.nodes.push({ id: 7, subgraph: { nodes: [inside, twin] } });
  await tell(training(3, { node: "7:12" }));
  assert.deepEqual([distill, inside, twin].map((n) => shown(n)[0]), ["before", "working", "before"]);
});

test("a run that a server does not know any more was cancelled; one that is done stays so", async () => {
  await tell(training(3));
  api.tell("reconnected");
  await answered();
  assert.deepEqual(shown(distill), ["cancelled", "3 of 100 updates"]);
  assert.equal(distill.root.find("status").textContent, "Cancelled");
  assert.equal(distill.root.find("error").textContent, "ComfyUI was started again meanwhile.");
  await tell(training(3, { state: "done" }));
  api.tell("reconnected");
  await answered();
  assert.equal(shown(distill)[0], "done");
});

test("a server that cannot be reached changes nothing", async () => {
  await tell(training(3));
  api.answers[RUN] = Promise.reject(new Error("offline"));
  api.tell("reconnected");
  await answered();
  assert.deepEqual(shown(distill), ["working", "3 of 100 updates"]);
});

test("answers and events without content break nothing", async () => {
  api.answers[RUN] = null;
  await tell({ node: "12" });
  app.extension.afterConfigureGraph();
  await answered();
  assert.deepEqual(shown(distill), ["working", ""]);
});

test("a click asks the server for its own run, and says what hinders it", async () => {
  await tell(training(3));
  const [stop, now, said] = distill.root.find("buttons").children;
  api.answers[`${RUN}/stop`] = {};
  await stop.fire("click");
  await now.fire("click");
  assert.deepEqual(api.asked, [`POST ${RUN}/stop`, `POST ${RUN}/preview`]);
  assert.equal(said.textContent, "No training runs.");
});

test("a picture's address keeps names with spaces and signs whole", async () => {
  const picture = { filename: "a&b=c #1.png", subfolder: "runs/my turbo", type: "temp" };
  await tell(training(3, { pictures: [picture] }));
  shown(distill);
  const { src } = distill.root.find("picture").children[0];
  assert.deepEqual(Object.fromEntries(new URL(src, "http://page").searchParams), picture);
});

test("a student that was saved can be chosen at once", () => {
  app.graph.nodes.push({ id: 4, comfyClass: "TurboDistillSaveStudent" });
  for (const id of [12, 4]) api.tell("executed", { node: id });
  assert.equal(app.refreshed, 1);
});
