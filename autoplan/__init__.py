"""autoplan: every Linear of a model on the fastest quantized kernel that keeps the output inside a stated budget."""

from __future__ import annotations

from autoplan.apply import apply_plan, plan_of
from autoplan.cache.store import PlanCache
from autoplan.candidates import Candidate, register_candidate
from autoplan.errors import AutoplanError
from autoplan.plan import Plan
from autoplan.planner import autoplan, make_plan
from autoplan.recorder import record
from autoplan.revalidate import revalidate as _revalidate  # noqa: F401 (Plan.revalidate calls it)
from autoplan.selection import Budget

__version__ = "0.1.0"

__all__ = [
    "AutoplanError",
    "Budget",
    "Candidate",
    "Plan",
    "PlanCache",
    "apply_plan",
    "autoplan",
    "make_plan",
    "plan_of",
    "record",
    "register_candidate",
]
