/** What the panel and the server say to each other, and the parts of ComfyUI's front end that its types leave out. */

export interface Picture {
  filename: string;
  subfolder: string;
  type: string;
}

export interface Preview {
  update: number;
  prompts: string[];
  /** Of the noise: a sampler's seed that makes the same picture. */
  seeds: number[];
  teacher: Picture[];
  student: Picture[];
}

/** Curves by name; null where an update has no such value. */
export type Columns = Record<string, (number | null)[]>;

export interface History {
  update: number[];
  losses: Columns;
  health: Columns;
  scores: { update: number[]; score: number[] };
}

/** A run as the server tells it. */
export interface Run {
  node: string;
  /** The id of the workflow that it was started from. */
  workflow?: string;
  kind: "distill" | "pairs";
  name: string;
  state: "working" | "done" | "stopped" | "cancelled" | "failed";
  what: string;
  done: number;
  total: number;
  /** How much is done, 0 to 1; null before that is known. */
  share: number | null;
  /** What it is at, and how far. */
  headline: string;
  figures: string;
  memory: string;
  warnings: string[];
  error: string;
  previews: Preview[];
  pictures: Picture[];
  ranges: Record<string, [number, number]>;
  /** Of how many points each of a curve is the mean. */
  mean_of: number;
  history: History;
}

/** What a panel asks of whoever made it. */
export interface Doors {
  /** Where the page finds a picture. */
  url(picture: Picture): string;
  /** Ask the training for something; what hindered it, in words, or "". */
  ask(what: "stop" | "preview"): Promise<string>;
}

export type App = import("@comfyorg/comfyui-frontend-types").ComfyApp;
export type Graph = App["graph"];
// addDOMWidget is added to every node at run time, which the published types do not carry.
export type GraphNode = Graph["nodes"][number] & {
  addDOMWidget(
    name: string,
    type: string,
    element: HTMLElement,
    options: Partial<import("@comfyorg/comfyui-frontend-types").DOMWidgetOptions<string>> & { serialize: boolean },
  ): { serialize?: boolean };
};
