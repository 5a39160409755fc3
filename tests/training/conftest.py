"""Makes the tiny copies of the public data sets importable: `import fake_datasets`."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("fake_datasets", Path(__file__).with_name("_fake_datasets.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
sys.modules["fake_datasets"] = _module
