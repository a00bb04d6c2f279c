"""What a one-step picture costs in a real ComfyUI, beside the least it could cost.

    python benchmarks/comfyui_speed.py --size 512

Starts a server over a folder of its own with this clone in it, and a Stable Diffusion 1.5 of random
weights in full size (or `--checkpoint`). Prints, from one run of the warm server: our graph over its
own denoiser pass and decoding (which no other work on the machine can tell apart), over a bare pass
and decoding of another moment, over SDTurboScheduler with SamplerCustom, and KSampler's 20 steps at
cfg 7 over ours. COMFYUI_PATH and COMFYUI_PYTHON as for the tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

CLONE = Path(__file__).parents[1]
TESTS = CLONE / "tests" / "hosts" / "comfyui"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", type=Path, help="a checkpoint of your own, with text encoder and VAE")
parser.add_argument("--size", type=int, default=512, help="pixels of a side (default: 512)")
parser.add_argument("--repeats", type=int, default=10, help="pictures of each kind (default: 10)")
parser.add_argument("--steps", type=int, default=20, help="of KSampler (default: 20)")


def module(name: str):
    """One of the tests' own modules, by its path."""
    spec = importlib.util.spec_from_file_location(f"turbodistill_comfyui_{name}", TESTS / f"{name}.py")
    sys.modules[spec.name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def full_size(models: Path) -> str:
    """Stable Diffusion 1.5 in full size, of random weights; the file's name."""
    makers = module("checkpoints")
    layout = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    unet = makers.unet_denoiser(layout, 0, "eps").backbone
    (models / "checkpoints").mkdir(parents=True)
    sd15 = makers.Checkpoint("full.safetensors", 768, 768, "eps", 0.18215, makers.single_file(unet))
    return makers.write_whole(sd15, models)


def seconds(server, graph) -> tuple[float, float]:
    """What the server says that a prompt took, and what of it was spent in one pass and one decoding."""
    run = server.run(graph)
    (sink,) = (told for told in run.outputs.values() if "spent" in told)
    ((_, told),) = json.loads(server.get("history?max_items=1")).items()
    stamps = {name: message["timestamp"] for name, message in told["status"]["messages"]}
    return (stamps["execution_success"] - stamps["execution_start"]) / 1000, sink["spent"][0]


def told(name: str, over: list[float], under: list[float]) -> None:
    """Print the ratio of the medians, of the least, and where half of the ratios of neighbouring runs lie."""
    paired = np.array(over) / np.array(under)
    low, high = np.percentile(paired, [25, 75])
    ratio = np.median(over) / np.median(under)
    # Other work on the machine only ever adds time, so the least of many runs is what it disturbed least.
    print(
        f"{name:<54} {ratio:.3f}, of the least {min(over) / min(under):.3f}, half of the pairs {low:.3f} to {high:.3f}"
    )


def main() -> None:
    args = parser.parse_args()
    client = module("client")
    client.RUN = 3600  # seconds: full size on a CPU takes its time
    comfyui, python = client.installation()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / "turbodistill").symlink_to(CLONE, target_is_directory=True)
        (base / "custom_nodes" / "benchmark.py").symlink_to(Path(__file__).with_name("comfyui_nodes.py"))
        if args.checkpoint:
            (base / "models" / "checkpoints").mkdir(parents=True)
            name = args.checkpoint.name
            (base / "models" / "checkpoints" / name).symlink_to(args.checkpoint.resolve())
        else:
            name = full_size(base / "models")
        with client.serve(comfyui, python, base) as server:
            measure(server, client.Graph, name, args)


def measure(server, new_graph, name: str, args: argparse.Namespace) -> None:
    def graph():
        made = new_graph()
        model = made.add("CheckpointLoaderSimple", ckpt_name=name)
        positive = made.add("CLIPTextEncode", clip=model[1], text="a red fox")
        latent = made.add("EmptyLatentImage", width=args.size, height=args.size, batch_size=1)
        return made, model, positive, latent

    def finished(made, model, samples):
        made.add("BenchmarkSink", images=made.add("VAEDecode", samples=samples, vae=model[2]))
        return made

    def ours(seed):
        made, model, positive, latent = graph()
        return finished(made, model, made.sample(model, positive, latent, seed))

    def turbo(seed):
        made, model, positive, latent = graph()
        sigmas = made.add("SDTurboScheduler", model=model, steps=1, denoise=1.0)
        euler = made.add("KSamplerSelect", sampler_name="euler")
        return finished(made, model, made.custom(model, positive, latent, sigmas, euler, seed))

    def many(seed):
        made, model, positive, latent = graph()
        negative = made.add("CLIPTextEncode", clip=model[1], text="")
        settings = {"sampler_name": "euler", "scheduler": "normal", "steps": args.steps, "cfg": 7.0, "denoise": 1.0}
        inputs = {"model": model, "positive": positive, "negative": negative, "latent_image": latent, "seed": seed}
        return finished(made, model, made.add("KSampler", **inputs, **settings))

    def floor(seed):
        made, model, positive, latent = graph()
        inputs = {"model": model, "positive": positive, "latent": latent, "vae": model[2]}
        node = made.add("BenchmarkFloor", **inputs, seed=seed, repeats=1)
        return server.run(made).outputs[node.name]["seconds"][0]

    for warm in (ours, turbo):
        seconds(server, warm(0))
    floor(0)
    times: dict[str, list[float]] = {kind: [] for kind in ("ours", "floor", "turbo")}
    within: dict[str, list[float]] = {"ours": [], "turbo": []}

    def whole(kind, graph):
        total, spent = seconds(server, graph)
        within[kind].append(spent)
        return total

    kinds = [
        ("ours", lambda seed: whole("ours", ours(seed))),
        ("floor", floor),
        ("turbo", lambda seed: whole("turbo", turbo(seed))),
    ]
    for seed in range(1, args.repeats + 1):
        first = seed % len(kinds)  # who comes first changes, so that no kind always follows another
        for kind, run in kinds[first:] + kinds[:first]:
            times[kind].append(run(seed))
    slow = [seconds(server, many(1))[0]]
    print(f"{args.size} x {args.size}, {args.repeats} pictures of each kind, one after the other in turn")
    for kind, values in times.items():
        print(f"{kind:<10} median {np.median(values):8.3f} s, least {min(values):.3f}, most {max(values):.3f}")
    told("our graph / (its own denoiser pass + VAE decode)", times["ours"], within["ours"])
    told("our graph / (a bare denoiser pass + VAE decode)", times["ours"], times["floor"])
    told("our graph / SDTurboScheduler + SamplerCustom (euler)", times["ours"], times["turbo"])
    for kind in within:
        over = 1000 * (np.array(times[kind]) - np.array(within[kind]))
        print(
            f"{kind:<10} {np.median(over):.0f} ms beside its pass and decoding ({over.min():.0f} to {over.max():.0f})"
        )
    ratio = slow[0] / np.median(times["ours"])
    print(f"KSampler, {args.steps} steps, cfg 7: {slow[0]:.2f} s, {ratio:.1f} x ours; passes {2 * args.steps} to 1")


if __name__ == "__main__":
    main()
