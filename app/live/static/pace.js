// How fast frames come, and how late: numbers and a small plot.

const SHOWN = 120; // frames in the plot
const WINDOW = 3000; // milliseconds over which frames are counted

/** The value below which a share of the values lies. @param {number[]} values @param {number} share */
export function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? NaN;
}

export class Pace {
  /** @type {number[]} */ latencies = [];
  /** @type {number[]} */ #times = [];

  /** @param {number} now @param {number | null} latency milliseconds */
  add(now, latency) {
    this.#times.push(now);
    if (latency !== null) this.latencies.push(latency);
    if (this.latencies.length > SHOWN) this.latencies.shift();
  }

  /** Frames a second, of the last seconds. @param {number} now */
  rate(now) {
    while (this.#times.length && now - /** @type {number} */ (this.#times[0]) > WINDOW) this.#times.shift();
    const first = this.#times[0];
    return first === undefined || this.#times.length < 2 ? 0 : (1000 * (this.#times.length - 1)) / Math.max(now - first, 1);
  }

  /** @param {HTMLCanvasElement} canvas */
  plot(canvas) {
    const scale = devicePixelRatio || 1;
    const [width, height] = [Math.round(canvas.clientWidth * scale), Math.round(canvas.clientHeight * scale)];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    if (!context) return;
    const style = getComputedStyle(canvas);
    context.clearRect(0, 0, width, height);
    const most = Math.max(50, quantile(this.latencies, 0.98) * 1.15 || 0);
    const step = width / SHOWN;
    context.fillStyle = style.getPropertyValue("--accent");
    this.latencies.forEach((latency, i) => {
      const tall = Math.min(1, latency / most) * (height - 14 * scale);
      context.fillRect(i * step, height - tall, Math.max(step - scale, 1), tall);
    });
    context.fillStyle = style.getPropertyValue("--quiet");
    context.font = `${11 * scale}px system-ui, sans-serif`;
    context.fillText(`${Math.round(most)} ms`, 4 * scale, 11 * scale);
  }
}
