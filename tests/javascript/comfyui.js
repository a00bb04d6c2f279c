// A ComfyUI with our folder in its place: web/ as /extensions/turbodistill/, beside ComfyUI's own scripts.

import { cpSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";

import "./page.js";

const folder = mkdtempSync(join(tmpdir(), "turbodistill-"));
after(() => rmSync(folder, { recursive: true }));
cpSync(fileURLToPath(new URL("../../web", import.meta.url)), join(folder, "extensions", "turbodistill"), {
  recursive: true,
});
mkdirSync(join(folder, "scripts"));
writeFileSync(join(folder, "package.json"), '{ "type": "module" }');
for (const name of ["app", "api"])
  writeFileSync(join(folder, "scripts", `${name}.js`), `export const ${name} = globalThis.comfyui.${name};`);

class Api extends EventTarget {
  asked = []; // every request
  answers = {}; // the bodies by path; what is not there is answered by 404
  fetchApi = async (path, { method = "GET" } = {}) => {
    this.asked.push(`${method} ${path}`);
    const told = await this.answers[path];
    return { ok: told !== undefined, status: told === undefined ? 404 : 200, json: async () => told };
  };
  getWorkflowTemplates = async () => ({ turbodistill: ["08 c", "01 a", "02 b"], others: ["b", "a"] });
  apiURL = (path) => `/api${path}`;
  /** An event of the server. */
  tell(type, detail) {
    this.dispatchEvent(Object.assign(new Event(type), { detail }));
  }
}

export const api = new Api();
export const app = {
  graph: { id: "w", nodes: [] },
  refreshed: 0,
  registerExtension(extension) {
    this.extension = extension;
    extension.init();
  },
  refreshComboInNodes() {
    this.refreshed++;
  },
};
globalThis.comfyui = { api, app };
await import(pathToFileURL(join(folder, "extensions", "turbodistill", "turbodistill.js")));

/** A node of this type, with its panel in `root` and what its `widget` was made with in `options`. */
export function node(id, comfyClass) {
  const made = {
    id,
    comfyClass,
    size: [200, 100],
    addDOMWidget(name, type, root, options) {
      Object.assign(this, { root, options, widget: {} });
      return this.widget;
    },
    computeSize: () => [200, 100],
    setSize(size) {
      this.size = size;
    },
  };
  app.extension.nodeCreated(made);
  return made;
}

/** Until what was asked for is answered. */
export const answered = () => new Promise((resolve) => setTimeout(resolve));
