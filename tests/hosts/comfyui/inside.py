"""What a script that ComfyUI's own Python runs without its server imports first: ComfyUI on a CPU, and this clone.

    python SCRIPT COMFYUI CLONE ...

`arguments` are those that follow.
"""

import importlib.util
import sys

comfyui, clone, *arguments = sys.argv[1:]
sys.argv = sys.argv[:1]  # ComfyUI reads it
sys.path.insert(0, comfyui)

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

spec = importlib.util.spec_from_file_location(
    "turbodistill", f"{clone}/__init__.py", submodule_search_locations=[clone]
)
sys.modules["turbodistill"] = importlib.util.module_from_spec(spec)
