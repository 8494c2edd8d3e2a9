"""Runs untrusted programs and judges them, so that neither the machine nor the verdict is theirs to touch.

    with open_sandbox() as sandbox:
        verdict = sandbox.judge(solution, problem)          # a Verdict: passed, result, seconds, rung

`ladder` says what confines a candidate, `questions` why it cannot forge a verdict.
"""

from __future__ import annotations

from archbench.sandbox.ladder import SandboxWarning
from archbench.sandbox.limits import Limits, Verdict
from archbench.sandbox.sandbox import Sandbox, open_sandbox

__all__ = ["Limits", "Sandbox", "SandboxWarning", "Verdict", "open_sandbox"]
