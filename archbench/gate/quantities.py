"""Which recorded quantities the gate holds against each other, and how.

    exact    counts: equal on every machine
    traced   counts of what ran: equal where torch and the kernels are the same
    near     the first step's numbers: equal up to rounding
    paired   means over documents that both versions read
    items    questions that were answered right or wrong, the same ones by both
    value    a number without samples

What is not named here is not gated: times of separate runs above all, which differ by more than any margin worth having
when nothing has changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from archbench.record import Record

Kind = Literal["exact", "traced", "near", "paired", "items", "value"]


@dataclass(frozen=True)
class Rule:
    """`weights` names the quantity of the same metric whose samples weigh the documents; "" for alike."""

    kind: Kind
    weights: str = ""

    @property
    def tier(self) -> int:
        return 0 if self.kind in ("exact", "traced", "near") else 1


_EXACT, _TRACED, _NEAR = Rule("exact"), Rule("traced"), Rule("near")
_PAIRED, _ITEMS, _VALUE = Rule("paired"), Rule("items"), Rule("value")

_RULES = {
    ("cost", "parameters"): _EXACT,
    ("cost", "training_flops_per_token"): _EXACT,
    ("cost", "training_flops_per_byte"): _EXACT,
    ("cost", "prefill_flops_per_token"): _EXACT,
    ("cost", "decode_flops_per_token"): _TRACED,  # some models write several tokens a step, by what they computed
    ("cost", "state_bytes"): _EXACT,
    ("training", "steps"): _EXACT,
    ("training", "flops"): _EXACT,
    ("training", "loss"): _VALUE,
    ("fingerprint", "operator_calls"): _TRACED,
    ("fingerprint", "operator_bytes"): _TRACED,
    ("fingerprint", "activation_bytes"): _TRACED,
    ("fingerprint", "first_loss"): _NEAR,
    ("fingerprint", "gradient_norm"): _NEAR,
    ("likelihood", "heldout_bytes"): _EXACT,
    ("likelihood", "bits_per_byte"): Rule("paired", weights="heldout_bytes"),
    ("brier_lm", "brier_n"): _PAIRED,
    ("passkey", "exact_match"): _ITEMS,
    ("skill", "exact_match"): _ITEMS,
    ("mbpp", "pass_at_k"): _ITEMS,
    ("mbpp", "solution_bits_per_byte"): _PAIRED,
    ("mbpp_mini", "pass_at_k"): _ITEMS,
    ("mbpp_mini", "solution_bits_per_byte"): _PAIRED,
    ("autoencoder", "token_accuracy"): _PAIRED,
    ("autoencoder", "chunk_accuracy"): _PAIRED,
}


def rule_of(record: Record) -> Rule | None:
    """How a record is gated; None when it is not."""
    rule = _RULES.get((record.metric, record.quantity))
    if rule is None:
        return None
    if record.at.get("count") == "meta":
        return None  # the same operators as traced, without their data
    if record.at.get("count") == "traced":
        return _TRACED
    if record.metric == "brier_lm" and record.at.get("window") != "tokens":
        return None  # of a byte codec the same numbers again, of others dearer ones
    return rule


def gated_metrics(names: list[str]) -> list[str]:
    """Those of these metrics that have a gated quantity."""
    gated = {metric for metric, _ in _RULES}
    return [name for name in names if name in gated]
