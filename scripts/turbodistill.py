"""The door of AUTOMATIC1111 and Forge: their script loader runs this file, at the start and at each Reload UI.

It loads the clone as the package `turbodistill`, since its folder may bear any name. The host takes
every Script in this file's names for one to show: there is one, `Panel`.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if "turbodistill" not in sys.modules:
    specification = importlib.util.spec_from_file_location(
        "turbodistill", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    package = importlib.util.module_from_spec(specification)
    sys.modules["turbodistill"] = package
    specification.loader.exec_module(package)

from turbodistill.webui_extension.host_kind import refusal  # noqa: E402 - there was no such package before

if sentence := refusal():
    print(sentence)
else:
    from turbodistill.webui_extension.host_panel import Panel  # noqa: F401
    from turbodistill.webui_extension.host_start import start

    start()
