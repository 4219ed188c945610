"""Candidates: the numeric recipes a layer may use. Every module in this folder registers its own."""

from __future__ import annotations

import importlib
import pkgutil

from autoplan.candidates.base import Candidate, find_candidate, register_candidate, registered

__all__ = ["Candidate", "find_candidate", "register_candidate", "registered"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
