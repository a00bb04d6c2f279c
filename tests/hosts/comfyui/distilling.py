"""Graphs that distil the demo model in a running ComfyUI, and what their runs tell."""

import json
import time

from turbodistill.app import cli
from turbodistill.trainer.config import Config
from turbodistill.trainer.run import history

SMALL = {"pairs": 24, "pair_steps": 2, "pair_sampler": "dpmpp_2m", "guidance": 3.0, "seed": 0, "at_once": 8}
SHORT = {"rank": 4, "updates": 8, "batch_size": 2, "gradient_checkpointing": False}
JUDGED = {"regression_updates": 2, "adversarial_ramp": 1, "save_every": 3, "evaluate_every": 4, "preview_every": 4}
BUILT_IN = "the demo model's student (built in)"
LINES = "a {red|blue|green|black} {fox|owl|fish|cat}, animal, in flat noto style"


class Distilling:
    """`distilling(name, ...)` adds a small distillation to a graph; its nodes by name."""

    def __init__(self, comfyui, graph):
        self.comfyui, self.graph = comfyui, graph
        self.SMALL, self.SHORT, self.BUILT_IN = SMALL, SHORT, BUILT_IN

    def at(self, comfyui):
        """The same in another server."""
        return Distilling(comfyui, self.graph)

    def __call__(self, name, graph=None, model=None, pairs=(), images=None, advanced=(), clip_vision=None, **chosen):
        graph = graph or self.graph
        nodes = {"demo": graph.add("TurboDistillLoadDemoModel", batch_size=2)}
        demo = nodes["demo"]
        parts = {"model": demo if model is None else model(demo), "clip": demo[1], "vae": demo[2]}
        nodes["prompts"] = graph.add("TurboDistillPrompts", source="the text below", text=LINES, file="")
        own = {"prompts": nodes["prompts"], "width": 64, "height": 64} | SMALL | dict(pairs)
        nodes["pairs"] = graph.add("TurboDistillTeacherPairs", **parts, **own)
        more = {"images": images} if images else {}
        more |= {"clip_vision": clip_vision} if clip_vision else {}
        more["settings"] = graph.add("TurboDistillAdvancedSettings", **self.settings(advanced))
        own = {"pairs": nodes["pairs"], "name": name} | SHORT | chosen
        nodes["distill"] = graph.add("TurboDistillDistill", **parts, **own, **more)
        nodes["card"] = graph.add("PreviewAny", source=nodes["distill"][2])
        return nodes

    def with_pairs_alone(self, graph):
        """A graph that only makes the pairs."""
        nodes = self("unused", graph)
        del graph.prompt[nodes["card"].name], graph.prompt[nodes["distill"].name]
        return graph

    def settings(self, changes=()):
        """What the page sends for Advanced Settings: every setting."""
        own = set(SMALL) | set(SHORT)
        return {k: v for k, v in Config().to_dict().items() if k not in own} | JUDGED | dict(changes)

    def on_both(self, name, advanced, updates, folder):
        """The histories of a run here and of the same on the command line, in a `folder`."""
        self(name, advanced=advanced, pairs={"pairs": 32}, updates=updates)
        self.comfyui.run(self.graph)
        lines = folder / "prompts.txt"
        lines.write_text(f"{LINES}\n")
        settings = self.settings(advanced) | SMALL | SHORT | {"pairs": 32, "updates": updates}
        del settings["at_once"]
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if not isinstance(v, bool)]
        assert cli.main(["distill", "--prompts", str(lines), "--out", str(folder / "run"), *flags]) == 0
        return [history.read_rows(run / "history.csv", updates) for run in (self.folder(name), folder / "run")]

    def folder(self, name):
        """Where a run lies."""
        return self.comfyui.base / "output" / "turbodistill" / "runs" / name

    def snapshot(self, node):
        """What the panel of a Distill is told."""
        return json.loads(self.comfyui.get(f"turbodistill/runs/{node.name}") or b"{}")

    def wait_for(self, node, update):
        """Until the node's run has come to an update; the snapshot. What an earlier run left is passed over."""
        seen = False
        for _ in range(1200):
            told = self.snapshot(node)
            seen = seen or told.get("state") == "working"
            if seen and told["state"] != "working":
                raise AssertionError(f"it ended before update {update}: {told['state']} {told['error']}")
            if seen and told["what"] == "training" and told["done"] >= update:
                return told
            time.sleep(0.05)
        raise TimeoutError(f"no update {update}")
