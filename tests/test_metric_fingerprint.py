"""The fingerprint of a model against counts and norms found in other ways."""

import dataclasses

import pytest
import torch
from tiny_subject import built

from archbench import registry
from archbench.errors import ConfigError
from archbench.metrics.fingerprint import METRIC, FingerprintSettings, watch
from archbench.model import Batch
from archbench.prompts import Prompts, heldout_stream


def fingerprint(subject, **settings):
    found = list(METRIC.measure(subject, FingerprintSettings(**settings)))
    return {(m.quantity, m.at.get("work") or m.at.get("phase")): m for m in found}


def test_watching_counts_calls_and_bytes():
    left, right = torch.ones(3, 4), torch.ones(4, 5)
    seen = watch(lambda: (left @ right).t() + 1)
    assert dict(seen.calls) == {"mm": 1, "t": 1, "add": 1}
    assert seen.n_bytes == 4 * (12 + 20 + 15) + 4 * (15 + 15)  # the view reads and writes nothing


@pytest.mark.parametrize("architecture", ["transformer", "mamba"])
def test_the_same_every_time(architecture):
    subject = built(architecture)
    first, second = fingerprint(subject), fingerprint(subject)
    assert first == second
    assert all(m.value is not None for m in first.values())


def test_the_first_loss_and_its_gradients_are_autograd_s():
    subject = built("transformer", d_model=16, n_layers=1, n_heads=1, d_ffn=24)
    found = fingerprint(subject)
    width = subject.context + subject.traits.lookahead
    rows = Prompts(heldout_stream(subject.corpus, subject.codec, width), subject.seed).take(subject.batch, width)
    model = registry.architecture("transformer").build(subject.config, torch.Generator().manual_seed(subject.seed))
    (phase,) = model.phases()
    loss = phase.loss(Batch(rows, 0.0, torch.Generator().manual_seed(0))).value
    loss.backward()
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters()}
    assert found["first_loss", phase.name].value == pytest.approx(loss.item())
    gradient = found["gradient_norm", phase.name]
    assert dict(zip(gradient.protocol.removeprefix("of ").split(", "), gradient.samples, strict=True)) == pytest.approx(
        norms
    )
    assert gradient.value == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5)


def test_the_trained_weights_do_not_matter():
    subject = built("transformer")
    before = fingerprint(subject)
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.add_(1.0)
    assert fingerprint(subject) == before


def test_phases_without_gradients_have_no_gradient():
    found = fingerprint(built("ngram", order=1))
    assert not [name for name in found if name[0] in ("gradient_norm", "activation_bytes")]
    assert ("operator_calls", "training") in found


def test_longer_windows_keep_more_for_the_backward_pass():
    subject = built("transformer")
    longer = dataclasses.replace(subject, context=2 * subject.context)
    few, many = (fingerprint(s)["activation_bytes", "next_token"].value for s in (subject, longer))
    assert 1.5 * few < many < 3 * few


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"fingerprint\.decode_steps: 0"):
        FingerprintSettings(decode_steps=0)
