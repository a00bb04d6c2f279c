// As much of a browser's page as the panel uses. Text stays text: nothing here reads HTML.

class Element {
  className = "";
  dataset = {};
  listeners = {};
  children = []; // elements and strings
  classList = { toggle() {} };

  constructor(tag) {
    this.tag = tag;
  }
  set innerHTML(_) {
    throw new Error("HTML is made of text");
  }
  set outerHTML(_) {
    throw new Error("HTML is made of text");
  }
  insertAdjacentHTML() {
    throw new Error("HTML is made of text");
  }
  get textContent() {
    return this.children.map((child) => child.textContent ?? child).join("");
  }
  set textContent(text) {
    this.children = text ? [text] : [];
  }
  append(...children) {
    this.children.push(...children);
  }
  prepend(...children) {
    this.children.unshift(...children);
  }
  replaceChildren(...children) {
    this.children = children;
  }
  removeAttribute(name) {
    delete this[name];
  }
  /** A slider's place. */
  get valueAsNumber() {
    return Number(this.value);
  }
  addEventListener(type, listener) {
    this.listeners[type] = listener;
  }
  /** Calls the listener of an event, and returns what that returns. */
  fire(type) {
    return this.listeners[type]({});
  }
  /** Every element below, with the class. */
  all(name) {
    return this.children
      .filter((child) => child instanceof Element)
      .flatMap((child) => [...(child.className === name ? [child] : []), ...child.all(name)]);
  }
  find(name) {
    return this.all(name)[0];
  }
}

const frames = [];
class Observer {
  observe() {}
  disconnect() {}
}

Object.assign(globalThis, {
  document: { createElement: (tag) => new Element(tag), documentElement: new Element("html") },
  requestAnimationFrame: (draw) => frames.push(draw),
  cancelAnimationFrame() {},
  ResizeObserver: Observer,
  MutationObserver: Observer,
});

/** Draws what waits for the next frame; how much that was. */
export function nextFrame() {
  const due = frames.splice(0);
  for (const draw of due) draw();
  return due.length;
}
