"""Every module of this folder holds parts of methods; importing the package makes each selectable by its short name."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    _members = vars(importlib.import_module(f"{__name__}.{_module.name}"))
    globals().update({k: v for k, v in _members.items() if getattr(v, "__module__", "").startswith(__name__)})
