// Which run belongs to which node.

import assert from "node:assert/strict";
import { test } from "node:test";

import { isOurs, nodesBelow, route } from "../../web/panel/graph.js";
import { training } from "./snapshots.js";

test("nodes are found in subgraphs too, by their execution ids", () => {
  const inner = { nodes: [{ id: 5 }] };
  const graph = { nodes: [{ id: 1 }, { id: 7, subgraph: { nodes: [{ id: 12 }, { id: 3, subgraph: inner }] } }] };
  const ids = [...nodesBelow(graph)].map(([id, node]) => [id, node.id]);
  assert.deepEqual(ids, [["1", 1], ["7", 7], ["7:12", 12], ["7:3", 3], ["7:3:5", 5]]);
});

test("an empty workflow has no nodes", () => assert.deepEqual([...nodesBelow({ nodes: [] })], []));

test("a run of another workflow is not ours, one without a workflow is", () => {
  const ours = (workflow) => isOurs(training(0, { workflow }), { id: "w" });
  assert.deepEqual([ours("w"), ours("another"), ours(""), ours(undefined)], [true, false, true, true]);
});

test("an id stays one part of the path", () => {
  const hostile = "7:12/../x?y#z%";
  const parts = route(hostile).split("/");
  assert.deepEqual(parts.slice(0, -1), ["", "turbodistill", "runs"]);
  assert.match(parts.at(-1), /^[^/?#:]+$/);
  assert.equal(decodeURIComponent(parts.at(-1)), hostile);
});
