// ComfyUI's page: a panel in each node that trains or makes pairs.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { isOurs, nodesBelow, route } from "./panel/graph.js";
import { Panel } from "./panel/panel.js";
import { complete } from "./panel/run.js";

/** @import { Doors, GraphNode, Run } from "./panel/types.d.ts" */

/** Type of node -> its panel's kind, and the room in a node that it wants: width, least height, height of a new one. */
const KINDS = /** @type {const} */ ({
  TurboDistillDistill: { kind: "distill", width: 580, least: 340, height: 790 },
  TurboDistillTeacherPairs: { kind: "pairs", width: 340, least: 130, height: 290 },
});

/** @type {WeakMap<GraphNode, Panel>} */
const panels = new WeakMap();

/** @returns {Generator<[string, Panel]>} */
function* panelsShown() {
  for (const [id, node] of nodesBelow(app.graph)) {
    const panel = panels.get(node);
    if (panel) yield [id, panel];
  }
}

/** Show a node's run as the server has it, unless it tells of it meanwhile. @param {string} id @param {Panel} panel */
async function restore(id, panel) {
  const before = panel.run;
  const answer = await api.fetchApi(route(id)).catch(() => null); // offline: `reconnected` asks again
  const told = answer?.status === 200 ? await answer.json().catch(() => null) : null;
  if (panel.run !== before) return;
  const run = told && complete(told);
  if (run && isOurs(run, app.graph)) panel.show(run);
  else if ([204, 404].includes(answer?.status ?? 0) && before?.state === "working" && before.node === id)
    panel.show({ ...before, state: "cancelled", headline: "Cancelled", error: "ComfyUI was started again meanwhile." });
}

function restoreAll() {
  for (const [id, panel] of panelsShown()) restore(id, panel);
}

/** @param {CustomEvent<Partial<Run>>} event */
function follow({ detail }) {
  const run = complete(detail);
  if (!isOurs(run, app.graph)) return;
  for (const [id, panel] of panelsShown()) if (id === run.node) panel.show(run);
}

/** A student that was saved can be chosen at once. @param {CustomEvent<{ node: string | number }>} event */
function refreshChoices({ detail }) {
  for (const [id, node] of nodesBelow(app.graph))
    if (id === String(detail.node) && node.comfyClass === "TurboDistillSaveStudent") app.refreshComboInNodes();
}

/** Our templates by their numbers: the server names them in the order of its disk. */
function sortTemplates() {
  const ask = api.getWorkflowTemplates?.bind(api);
  const ours = decodeURIComponent(new URL(".", import.meta.url).pathname).split("/").at(-2) ?? ""; // our folder
  if (!ask) return;
  api.getWorkflowTemplates = async () => {
    const packs = await ask();
    packs[ours]?.sort();
    return packs;
  };
}

/** @param {GraphNode} node @returns {Doors} */
function doors(node) {
  return {
    url: (picture) => api.apiURL(`/view?${new URLSearchParams({ ...picture })}`),
    async ask(what) {
      const id = panels.get(node)?.run?.node ?? "";
      const answer = await api.fetchApi(`${route(id)}/${what}`, { method: "POST" }).catch(() => null);
      if (!answer) return "ComfyUI does not answer.";
      if (answer.ok) return "";
      return [404, 409].includes(answer.status) ? "No training runs." : `ComfyUI answered ${answer.status}.`;
    },
  };
}

/** @param {GraphNode} node */
function equip(node) {
  const about = KINDS[/** @type {keyof typeof KINDS} */ (node.comfyClass)];
  if (!about) return;
  const panel = new Panel(about.kind, doors(node));
  panels.set(node, panel);
  const widget = node.addDOMWidget("panel", "turbodistill", panel.root, {
    serialize: false, // not to the prompt,
    hideOnZoom: false,
    getMinHeight: () => about.least,
  });
  widget.serialize = false; // nor to the workflow
  // A panel that need not scroll leaves the wheel to the canvas, which zooms.
  panel.root.addEventListener("wheel", (event) => {
    if (panel.root.scrollHeight > panel.root.clientHeight) event.stopPropagation();
    else app.canvas.processMouseWheel(event);
  });
  const least = node.computeSize();
  node.setSize([Math.max(node.size[0], about.width), least[1] + about.height - about.least]);
  const removed = node.onRemoved;
  node.onRemoved = function () {
    removed?.call(this);
    panel.destroy();
  };
}

app.registerExtension({
  name: "turbodistill.panel",
  nodeCreated: (node) => equip(/** @type {GraphNode} */ (/** @type {unknown} */ (node))),
  afterConfigureGraph: restoreAll,
  init() {
    sortTemplates();
    const events = /** @type {EventTarget} */ (api); // its own types list ComfyUI's events only
    events.addEventListener("turbodistill.run", (event) => follow(/** @type {CustomEvent} */ (event)));
    events.addEventListener("reconnected", restoreAll);
    events.addEventListener("executed", (event) => refreshChoices(/** @type {CustomEvent} */ (event)));
  },
});
