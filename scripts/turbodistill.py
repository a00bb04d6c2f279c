"""The door of AUTOMATIC1111 and Forge: their script loader runs this file.

It loads the clone as the package `turbodistill`, since its folder may bear any name; the sampler,
panel and tab, which register from here, are coming.
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
