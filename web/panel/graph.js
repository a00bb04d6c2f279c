// The nodes of a workflow, and whose runs are theirs.

/** @import { Graph, GraphNode, Run } from "./types.d.ts" */

/**
 * Every node below `graph` with its execution id: "12", or "7:12" for node 12 inside subgraph node 7.
 * @param {Graph} graph @returns {Generator<[string, GraphNode]>}
 */
export function* nodesBelow(graph, path = "") {
  for (const node of /** @type {GraphNode[]} */ (graph.nodes)) {
    yield [`${path}${node.id}`, node];
    // Front ends older than 1.24 know no subgraphs.
    const inside = /** @type {{ subgraph?: Graph }} */ (node).subgraph;
    if (inside) yield* nodesBelow(inside, `${path}${node.id}:`);
  }
}

/** Node ids begin anew in every workflow: another's run is not shown. @param {Run} run @param {Graph} graph */
export const isOurs = (run, graph) => !run.workflow || run.workflow === graph.id;

/** Where the server tells of a node's run. @param {string} id */
export const route = (id) => `/turbodistill/runs/${encodeURIComponent(id)}`;
