"""Training steps: ours against Hugging Face's, against the machine's limit, and architectures against each other.

A step is what the trainer does between two batches: forward in its precision, backward, clipping, fused AdamW. Both
sides of a race have the same batch, optimizer, clipping and precision; tokens are random, as no step's time depends
on them. Where both sides are ours, memory stays with the process as in the trainer; beside others', which would gain by
it what they do not have where they are used, it does not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator

from archbench import heap, registry
from archbench.architectures.transformer import TransformerConfig
from archbench.bench.families.recurrent import hf_mamba, hf_mamba2, mamba, mamba2
from archbench.bench.target import Target
from archbench.bench.trial import Race, Reading, Side, Trial
from archbench.cell import Budget, Cell, Training
from archbench.data.examples import Rows
from archbench.errors import MissingExtra
from archbench.levels import BEST, at_level
from archbench.metrics.memory import peak_bytes
from archbench.model import Batch, Loss, parameters_of
from archbench.ops.cross_entropy import cross_entropy
from archbench.plan import make_plan
from archbench.sizes import on_meta, solve
from archbench.suite import load_suite
from archbench.train import autocast, choose_precision, descend, gradients_of, optimizer_of

CPU = torch.device("cpu")
RATE = 1e-3
VOCAB = 256
HEADS = "further heads unembed once more each: by FLOPs alone 4 heads come to 0.95 of the baseline, 8 heads to 0.89"
BESIDE_PRODUCTS = (
    "scan and convolution take a third of a step, beside products that are no cheaper than a Transformer's"
)
SCAN = (
    "two fifths of a step are scan and convolution, computed in fp32; the Transformer's time is in products, which "
    "bf16 makes cheaper"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One training step, and what it does: tokens, FLOPs by our formulas, in which precision."""

    run: Callable[[], object]
    tokens: int
    flops: float
    precision: str


def our_step(architecture: str, config: Any, batch: int, context: int, precision: str) -> Step:
    """The trainer's step of a fresh model in its first phase; "auto" is the precision that its probe chooses."""
    found = registry.architecture(architecture)
    model = found.build(config, Generator().manual_seed(0)).train()
    training = Training(budget=Budget(tokens=1e6), context=context, batch=batch)
    phase = model.phases()[0]
    trained, optimizer = list(parameters_of(phase)), optimizer_of(phase, training)
    assert optimizer is not None
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is other for other in trained))
    tokens = _tokens(config.vocab_size, batch, context + found.traits(config).lookahead)
    precision, _ = choose_precision(precision, model, phase, Rows(tokens))  # type: ignore[arg-type]

    def run() -> None:
        with autocast(precision, CPU):
            loss = phase.loss(Batch(tokens, 0.0, Generator().manual_seed(0)))
        assert bool(torch.isfinite(gradients_of(loss, optimizer, trained, training.clip)))
        descend(optimizer, RATE)
        float(loss.value.detach())

    return Step(run=run, tokens=batch * context, flops=batch * model.flops().training(context), precision=precision)


def llama_step(config: TransformerConfig, batch: int, context: int, precision: str, *, compiled: bool = False) -> Step:
    """The same step of Hugging Face's Llama of this shape, with the attention that it takes by default; `compiled` is
    forward and backward by torch.compile, which happens in the first call.

    Raises:
        MissingExtra: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingExtra(f"transformers is not installed ({error}); pip install 'archbench[dev]'") from None
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=max(2048, context),
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            use_cache=False,
        )
    )

    forward = torch.compile(model) if compiled else model

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return forward(input_ids=inputs, labels=targets, shift_labels=targets).loss

    return _their_step(model, loss_of, config.vocab_size, batch, context, precision)


def _their_step(
    model: torch.nn.Module,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    vocab_size: int,
    batch: int,
    context: int,
    precision: str,
) -> Step:
    """The trainer's step of somebody else's model: same optimizer, groups, clipping and precision."""
    model.train()
    training = Training(budget=Budget(tokens=1e6))
    trained = list(model.parameters())
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": training.weight_decay, "lr_scale": 1.0},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    betas = (training.beta1, training.beta2)
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=betas, eps=1e-8, fused=True)
    tokens = _tokens(vocab_size, batch, context + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    def run() -> None:
        with autocast(precision, CPU):
            loss = Loss(loss_of(inputs, targets))
        assert bool(torch.isfinite(gradients_of(loss, optimizer, trained, training.clip)))
        descend(optimizer, RATE)
        float(loss.value.detach())

    return Step(run=run, tokens=batch * context, flops=0.0, precision=precision)


def _tokens(vocab_size: int, batch: int, n: int) -> torch.Tensor:
    return torch.randint(1, vocab_size, (batch, n), generator=Generator().manual_seed(1))


def _side(step: Step) -> Side:
    return Side(call=step.run, work=step.tokens)


def against_llama(
    d_model: int, n_layers: int, n_heads: int, batch: int, context: int, precision: str, *, compiled: bool = False
) -> Trial:
    """Equal shape, optimizer, clipping and precision; `compiled` is with torch.compile on their side."""
    config = TransformerConfig(vocab_size=VOCAB, d_model=d_model, n_layers=n_layers, n_heads=n_heads)
    ours = our_step("transformer", config, batch, context, precision)
    peer = llama_step(config, batch, context, precision, compiled=compiled)
    notes = {"tokens a step": f"{ours.tokens:,}"}
    if compiled:
        begin = time.perf_counter()
        for _ in range(2):  # the second call may compile again
            peer.run()
        notes["their compilation, not counted"] = f"{time.perf_counter() - begin:.0f} s"
    return Race(ours=_side(ours), peer=_side(peer), notes=notes)


def against_hf_mamba(architecture: str, d_model: int, batch: int, context: int) -> Trial:
    """Equal shape in fp32, against Hugging Face's path for CPUs, whose backward pass is quadratic in the window."""
    config = (mamba(d_model) if architecture == "mamba" else mamba2(d_model)).config
    model = hf_mamba(config) if architecture == "mamba" else hf_mamba2(config)

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    ours = our_step(architecture, config, batch, context, "fp32")
    peer = _their_step(model, loss_of, config.vocab_size, batch, context, "fp32")
    return Race(ours=_side(ours), peer=_side(peer), notes={"tokens a step": f"{ours.tokens:,}"})


def share_of_peak(d_model: int, n_layers: int, n_heads: int, batch: int, context: int) -> Trial:
    """FLOP/s of an fp32 step over FLOP/s of the product of two 1024 x 1024 matrices."""
    config = TransformerConfig(vocab_size=VOCAB, d_model=d_model, n_layers=n_layers, n_heads=n_heads)
    step = our_step("transformer", config, batch, context, "fp32")
    n, times = 1024, 8
    left = torch.ones(n, n)
    right, out = torch.ones_like(left), torch.empty_like(left)

    def product() -> None:
        for _ in range(times):
            torch.mm(left, right, out=out)

    return Race(
        ours=Side(call=step.run, work=step.flops),
        peer=Side(call=product, work=times * 2.0 * n**3),
        notes={"FLOPs": "of the model, causal attention at half its square"},
    )


def equal_size(architecture: str, size: str, batch: int, context: int, precision: str, **options: Any) -> Trial:
    """An architecture against the Transformer of the same named size: ours is the architecture's step."""
    steps = {}
    for name, chosen in ((architecture, options), ("transformer", {})):
        config = solve(registry.architecture(name), VOCAB, size, chosen).config
        steps[name] = our_step(name, config, batch, context, precision)
    ours, peer = _side(steps[architecture]), _side(steps["transformer"])
    return Race(ours=ours, peer=peer, notes={"size": size}, within=heap.kept)


def heads_against_baseline(precision: str, **options: Any) -> Trial:
    """Multi-token prediction against next-token prediction with the same layers in all: d 128, 8 layers, bytes."""
    baseline = TransformerConfig(vocab_size=VOCAB, d_model=128, n_layers=8, n_heads=2)
    config = registry.architecture("mtp").config(vocab_size=VOCAB, d_model=128, n_layers=8, n_heads=2, **options)
    ours = our_step("mtp", config, 4, 256, precision)
    peer = our_step("transformer", baseline, 4, 256, precision)
    return Race(ours=_side(ours), peer=_side(peer), within=heap.kept)


def by_the_ladder(suite: str) -> Trial:
    """A step of each cell of a suite that reads bytes and learns by gradient, as the trainer runs it here (best level,
    the precision that its probe chooses), against the same steps at level `reference` in fp32."""
    plan = make_plan(load_suite(suite))
    cells = [cell for cell in plan.trained_cells if cell.codec == "bytes" and _learns_by_gradient(cell)]

    def steps(level: str, precision: str | None) -> list[Step]:
        with at_level(level):
            return [
                our_step(
                    cell.architecture, cell.config, cell.training.batch, cell.training.context,
                    precision or cell.training.precision,
                )
                for cell in cells
            ]  # fmt: skip

    def side(level: str, taken: list[Step]) -> Side:
        def run() -> None:
            with at_level(level):
                for step in taken:
                    step.run()

        return Side(call=run, work=len(taken))

    best = steps(BEST, None)
    half = sum(step.precision == "bf16-mixed" for step in best)
    notes = {"steps": f"first phases of {len(best)} cells, {half} in bf16-mixed"}
    peer = side("reference", steps("reference", "fp32"))
    return Race(ours=side(BEST, best), peer=peer, notes=notes, within=heap.kept)


def _learns_by_gradient(cell: Cell) -> bool:
    return bool(on_meta(registry.architecture(cell.architecture), cell.config).phases()[0].groups)


def head_by_head_memory(vocab_size: int, n_future: int) -> Trial:
    """Peak memory of forward and backward, head by head over all heads at once."""
    found = registry.architecture("mtp")
    tokens = _tokens(vocab_size, 4, 512 + n_future)

    def peak(backward: str) -> int:
        config = found.config(
            vocab_size=vocab_size, d_model=128, n_layers=6, n_heads=2, n_future=n_future, head_type="replicated",
            backward=backward,
        )  # fmt: skip
        model = found.build(config, Generator().manual_seed(0)).train()

        def work() -> None:
            model.zero_grad(set_to_none=True)
            model.phases()[0].loss(Batch(tokens, 0.0, Generator())).value.backward()

        return peak_bytes(lambda: work, CPU)

    return Reading(take=lambda: peak("sequential") / peak("naive"), notes={"tokens a step": "2,048"})


def energy_loss_cost() -> Trial:
    """FLOPs traced in the energy loss and its backward pass over 2 l (N M + N^2), three times for training."""
    from archbench.architectures.calm.energy import energy_loss
    from archbench.flops import trace

    n_positions, n_samples, n_targets, width = 64, 4, 16, 32

    def take() -> float:
        draws = Generator().manual_seed(0)
        samples = torch.randn(n_positions, n_samples, width, generator=draws, requires_grad=True)
        targets = torch.randn(n_positions, n_targets, width, generator=draws)
        counted = trace(lambda: energy_loss(samples, targets).backward()).flops
        return counted / (3 * 2 * width * (n_samples * n_targets + n_samples**2) * n_positions)

    return Reading(take=take, notes={"N, M, l": "4, 16, 32"})


def energy_loss_time() -> Trial:
    """The energy loss, forward and backward, against the same with all differences held."""
    from archbench.architectures.calm.energy import energy_loss

    n_positions, n_samples, n_targets, width = 504, 4, 16, 32
    draws = Generator().manual_seed(0)
    samples = torch.randn(n_positions, n_samples, width, generator=draws, requires_grad=True)
    targets = torch.randn(n_positions, n_targets, width, generator=draws)

    def held(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        apart = (x[:, :, None] - y[:, None]).norm(dim=-1).mean()
        between = (x[:, :, None] - x[:, None]).norm(dim=-1).sum(dim=(1, 2)).mean()
        return 2 * apart - between / (n_samples * (n_samples - 1))

    def run(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        samples.grad = None
        loss(samples, targets).backward()

    ours, peer = Side(call=partial(run, energy_loss)), Side(call=partial(run, held))
    return Race(ours=ours, peer=peer, notes={"N, M, l": "4, 16, 32"})


def cross_entropy_time(vocab_size: int) -> Trial:
    """The loss of 1024 rows of logits in bf16 with its gradient, against torch's."""
    draws = Generator().manual_seed(0)
    logits = torch.randn(1024, vocab_size, generator=draws).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab_size, (1024,), generator=draws)

    def theirs(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(rows.float(), targets)

    def run(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        logits.grad = None
        loss(logits, targets).backward()

    ours, peer = Side(call=partial(run, cross_entropy)), Side(call=partial(run, theirs))
    return Race(ours=ours, peer=peer, notes={"rows": "1,024, bf16"}, within=heap.kept)


def _llama(name: str, batch: int) -> Target:
    d_model, n_layers, n_heads, context, precision = 128, 8, 2, 256, "bf16-mixed"
    return Target(
        id=f"training/llama-{name}",
        question=f"How fast is a {precision} step at d {d_model}, {n_layers} layers, {batch} x {context} bytes?",
        ours="transformer",
        peer="HF Llama",
        level="native",
        must=1.15,
        stretch=1.4,
        seconds=15,
        prepare=partial(against_llama, d_model, n_layers, n_heads, batch, context, precision),
    )


def _peak(d_model: int, n_heads: int, must: float, stretch: float) -> Target:
    return Target(
        id=f"training/peak-d{d_model}",
        question=f"Which share of the matrix product's FLOP/s does an fp32 step at d {d_model} have?",
        ours="transformer step",
        peer="1024^3 product",
        level="native",
        unit="of peak",
        must=must,
        stretch=stretch,
        seconds=20,
        prepare=partial(share_of_peak, d_model, 8, n_heads, 4, 256),
    )


def _mamba(context: int, batch: int, precision: str, must: float) -> Target:
    return Target(
        id=f"training/mamba-{context}-{precision.partition('-')[0]}",
        question=f"How fast does Mamba train beside an equal Transformer, windows of {context} bytes, {precision}?",
        ours="mamba",
        peer="transformer",
        level="native",
        must=must,
        turns=7,
        seconds=40,
        why_missed=SCAN if precision != "fp32" else BESIDE_PRODUCTS,
        prepare=partial(equal_size, "mamba", "mini", batch, context, precision),
    )


def _heads(name: str, must: float, stretch: float, **options: Any) -> Target:
    return Target(
        id=f"training/mtp-{name}",
        question="How fast does multi-token prediction train beside next-token prediction, {n_future} heads of type "
        "{head_type}?".format(**options),
        ours="mtp",
        peer="transformer",
        level="native",
        must=must,
        stretch=stretch,
        seconds=15,
        why_missed=HEADS,
        prepare=partial(heads_against_baseline, "bf16-mixed", **options),
    )


TARGETS = [
    _llama("bf16", 4),
    _llama("bf16-2048", 8),
    Target(
        id="training/llama-compiled",
        question="How fast is a bf16-mixed step at d 128, 8 layers, 4 x 256 bytes, against a compiled one?",
        ours="transformer",
        peer="HF Llama, torch.compile",
        level="native",
        must=1.0,
        seconds=120,
        prepare=partial(against_llama, 128, 8, 2, 4, 256, "bf16-mixed", compiled=True),
    ),
    _peak(128, 2, 0.45, 0.55),
    _peak(256, 4, 0.60, 0.70),
    _mamba(512, 4, "fp32", 1.0),
    _mamba(512, 4, "bf16-mixed", 1.0),
    _mamba(4096, 1, "fp32", 2.0),
    _mamba(4096, 1, "bf16-mixed", 2.0),
    Target(
        id="training/quick",
        question="How much less time do the training steps of the suite `quick` take than at level reference?",
        ours="as the suite trains",
        peer="level reference, fp32",
        must=2.0,
        turns=6,
        seconds=120,
        prepare=partial(by_the_ladder, "quick"),
    ),
    *(
        Target(
            id=f"training/{name}-hf",
            question=f"How fast does {label} train beside Hugging Face's on a CPU, 1M parameters, 2 x 128 bytes, fp32?",
            ours=name,
            peer=f"HF {label}",
            level="native",
            must=must,
            turns=6,
            seconds=60,
            prepare=partial(against_hf_mamba, name, 128, 2, 128),
        )
        for name, label, must in (("mamba", "Mamba", 10), ("mamba2", "Mamba-2", 1.2))
    ),
    _heads("layer-4", 0.92, 0.97, n_future=4, head_type="layer"),
    _heads("replicated-4", 0.92, 0.95, n_future=4, head_type="replicated"),
    _heads("replicated-8", 0.90, 0.95, n_future=8, head_type="replicated"),
    Target(
        id="training/mtp-memory",
        question="How much memory does a step need head by head, of what all heads at once need? V 8192, n 4",
        ours="head by head",
        peer="all heads at once",
        unit="of naive",
        must=0.65,
        stretch=0.5,
        better="lower",
        turns=6,
        seconds=20,
        prepare=partial(head_by_head_memory, 8192, 4),
    ),
    Target(
        id="training/energy-flops",
        question="What does CALM's energy loss cost, of its distances by the paper's count? N 4, M 16",
        ours="energy loss",
        peer="2 l (N M + N^2), three times",
        unit="of count",
        must=1.2,
        better="lower",
        turns=1,
        seconds=1,
        prepare=energy_loss_cost,
    ),
    Target(
        id="training/energy-time",
        question="How fast is CALM's energy loss beside one that holds all differences? N 4, M 16",
        ours="energy loss",
        peer="written out",
        level="lean",
        must=1.0,
        seconds=2,
        prepare=energy_loss_time,
    ),
    *(
        Target(
            id=f"training/cross-entropy-{vocab_size}",
            question=f"How fast is the loss with its gradient beside torch's, vocabulary {vocab_size}?",
            ours="cross_entropy",
            peer="torch",
            level="native",
            must=must,
            stretch=stretch,
            seconds=3,
            prepare=partial(cross_entropy_time, vocab_size),
        )
        for vocab_size, must, stretch in ((256, 1.2, 1.5), (8192, 2, 3))
    ),
]
