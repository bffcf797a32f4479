"""Lets timm be imported beside a CPU build of torch.

timm imports torchvision, and PyPI's is built for PyPI's torch: its compiled operators are missing then, and importing
it fails where it registers shapes for them. timm's models need none of them: skip that module.
"""

import sys
import types

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
