"""Recurrent models: the scan, the convolution and SSD against Hugging Face's and mambapy's CPU paths, whole-model
decode steps against `generate`, and MambaByte's drafting against plain byte decoding.

Scans are of one shape, 4 rows x 512 tokens x 256 channels x 16 states, with softplus, bias, D and gate on every side,
and take the same tensors: Hugging Face's channels-first as views. Work counts in tokens x channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from archbench import registry
from archbench.architectures.mamba import Mamba, MambaConfig
from archbench.architectures.mamba2 import Mamba2, Mamba2Config
from archbench.bench.families.decoding import VOCAB, generated, share_of_bandwidth, written
from archbench.bench.target import Target
from archbench.bench.trial import Race, Side, Trial
from archbench.codec import train_bpe
from archbench.data.document import Document
from archbench.drafting import N_BYTES, Drafted
from archbench.errors import MissingExtra
from archbench.ops import scan_native
from archbench.ops.conv import causal_conv
from archbench.ops.scan import selective_scan
from archbench.ops.ssd import ssd
from archbench.sampling import GREEDY, PLAIN
from archbench.sizes import solve
from archbench.state import state_bytes

B, L, D, N = 4, 512, 256, 16
MODULES = (
    "only the reading of tokens is lean; what writes them, CALM's head and autoencoder above all, runs as modules on "
    "both sides"
)
CHEAP = "three steps of the drafter and one reading of nine bytes cost as much as nine steps of so small a model"


# ---- scan ----


def scan_inputs(*, grad: bool = False) -> list[Tensor]:
    """x, dt, A, B, C, D, z, dt_bias as a Mamba at its beginning has them."""
    g = Generator().manual_seed(0)
    x, z = torch.randn(B, L, D, generator=g), torch.randn(B, L, D, generator=g)
    dt = 0.5 * torch.randn(B, L, D, generator=g) - 4
    A = -torch.arange(1, N + 1).float().repeat(D, 1)
    b, c = torch.randn(B, L, N, generator=g), torch.randn(B, L, N, generator=g)
    return [t.requires_grad_(grad) for t in (x, dt, A, b, c, torch.ones(D), z, 0.1 * torch.randn(D, generator=g))]


def our_scan(level: str) -> Callable[[list[Tensor]], Tensor]:
    return lambda tensors: selective_scan(*tensors, backend=level)[0]


def their_scan(parallel: bool) -> Callable[[list[Tensor]], Tensor]:
    """Hugging Face's scan in torch: its loop over tokens, or mambapy's parallel scan.

    Raises:
        MissingExtra: transformers or mambapy is not installed.
    """
    try:
        from transformers.models.mamba import modeling_mamba as theirs

        if parallel:
            import mambapy.pscan  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"{error.name} is not installed; pip install 'archbench[dev]'") from None
    scan = getattr(theirs.mamba_selective_scan, "__wrapped__", theirs.mamba_selective_scan)  # never a CUDA kernel

    def call(tensors: list[Tensor]) -> Tensor:
        x, dt, A, b, c, skip, z, bias = tensors
        x, dt, b, c, z = (t.transpose(1, 2) for t in (x, dt, b, c, z))
        options = {"D": skip, "z": z, "delta_bias": bias, "delta_softplus": True, "use_mambapy": parallel}
        return scan(x, dt, A, b, c, **options).transpose(1, 2)

    return call


def forward(scan: Callable[[list[Tensor]], Tensor], times: int = 1) -> Side:
    """`times` scans a sample: one of a few milliseconds alone would be measured with cold caches and fresh memory."""
    tensors = scan_inputs()

    def call() -> None:
        with torch.no_grad():
            for _ in range(times):
                scan(tensors)

    return Side(call=call, work=times * B * L * D)


def forward_backward(scan: Callable[[list[Tensor]], Tensor], times: int = 1) -> Side:
    tensors, gy = scan_inputs(grad=True), torch.ones(B, L, D)

    def call() -> None:
        for _ in range(times):
            torch.autograd.grad(scan(tensors), tensors, gy)

    return Side(call=call, work=times * B * L * D)


QUICK = {"native": 12, "lean": 2}
"""Scans a sample."""


def scan_race(side: Callable[..., Side], ours: str, theirs: str) -> Trial:
    peer = our_scan(theirs) if theirs in QUICK else their_scan(theirs == "mambapy")
    return Race(
        ours=side(our_scan(ours), QUICK[ours]),
        peer=side(peer, QUICK.get(theirs, 1)),
        notes={"shape": f"{B} x {L} x {D} x {N}"},
    )


def scan_bound() -> Trial:
    """Seconds of the arithmetic alone over those of the native scan: its share of the bound, 1 at best."""
    call, channels = scan_native.arithmetic(1 << 16, N)

    def compute() -> None:
        call()

    return Race(ours=forward(our_scan("native"), QUICK["native"]), peer=Side(call=compute, work=channels << 16))


# ---- convolution, SSD ----


def conv_race(level: str) -> Trial:
    """Forward and backward of convolution and silu, against F.conv1d as a model around it calls it."""
    g = Generator().manual_seed(0)
    x = torch.randn(B, L, 2 * D, generator=g).requires_grad_()
    weight, bias = (0.5 * torch.randn(2 * D, 4, generator=g)).requires_grad_(), torch.zeros(2 * D).requires_grad_()
    gy = torch.ones(B, L, 2 * D)

    def theirs() -> Tensor:
        y = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=2 * D)[..., :L]
        return torch.nn.functional.silu(y).transpose(1, 2)

    def graded(y: Callable[[], Tensor]) -> Side:
        def call() -> None:
            for _ in range(4):
                torch.autograd.grad(y(), (x, weight, bias), gy)

        return Side(call=call, work=4 * B * L * 2 * D)

    return Race(ours=graded(lambda: causal_conv(x, weight, bias, None, backend=level)[0]), peer=graded(theirs))


SSD_HEADS, SSD_WIDTH, SSD_STATES = 8, 64, 64


def ssd_inputs() -> tuple[Tensor, ...]:
    g = Generator().manual_seed(0)
    x = torch.randn(B, L, SSD_HEADS, SSD_WIDTH, generator=g)
    step = torch.nn.functional.softplus(torch.randn(B, L, SSD_HEADS, generator=g) - 3)
    shared = [torch.randn(B, L, 1, SSD_STATES, generator=g) for _ in range(2)]
    return x, step, -torch.arange(1, SSD_HEADS + 1).float(), *shared


def ssd_forward(scan: Callable[..., Tensor], tensors: Sequence[Tensor], times: int) -> Side:
    """`times` calls a sample, without gradients."""

    def call() -> None:
        with torch.no_grad():
            for _ in range(times):
                scan(*tensors)

    return Side(call=call, work=times * B * L * SSD_HEADS * SSD_WIDTH)


def ssd_backward(scan: Callable[..., Tensor], tensors: Sequence[Tensor], times: int) -> Side:
    """Forward and backward, to all tensors."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    gy = torch.ones(B, L, SSD_HEADS, SSD_WIDTH)

    def call() -> None:
        for _ in range(times):
            torch.autograd.grad(scan(*tensors), tensors, gy)

    return Side(call=call, work=times * B * L * SSD_HEADS * SSD_WIDTH)


def our_ssd_scan(level: str) -> Callable[..., Tensor]:
    return lambda x, step, A, b, c: ssd(x, step, A, b, c, D=torch.ones(SSD_HEADS), backend=level)[0]


def their_ssd_inputs() -> tuple[Tensor, ...]:
    """As `ssd_inputs`, with steps as they are before the softplus."""
    x, step, A, b, c = ssd_inputs()
    return x, step.expm1().log(), A, b, c  # the inverse of the softplus that is part of their operation


def their_ssd_scan() -> Callable[..., Tensor]:
    """Hugging Face's chunked form, at the chunk that suits a CPU. Raises MissingExtra without transformers."""
    try:
        from transformers.models.mamba2 import modeling_mamba2 as theirs
    except ImportError as error:
        raise MissingExtra(f"{error.name} is not installed; pip install 'archbench[dev]'") from None
    scan = getattr(theirs.mamba2_chunk_scan, "__wrapped__", theirs.mamba2_chunk_scan)
    return lambda *tensors: scan(*tensors, chunk_size=64, D=torch.ones(SSD_HEADS), dt_softplus=True)


def our_ssd(level: str) -> Side:
    return ssd_forward(our_ssd_scan(level), ssd_inputs(), QUICK[level])


def their_ssd() -> Side:
    return ssd_forward(their_ssd_scan(), their_ssd_inputs(), 1)


# ---- decoding ----


def hf_mamba(c: MambaConfig) -> Any:
    """Hugging Face's Mamba of the same shape, without mambapy (which only reads prompts)."""
    try:
        from transformers import MambaConfig as Config
        from transformers import MambaForCausalLM
    except ImportError as error:
        raise MissingExtra(f"{error.name} is not installed; pip install 'archbench[dev]'") from None
    config = Config(
        vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.n_layers, state_size=c.d_state,
        conv_kernel=c.d_conv, expand=c.expand, time_step_rank=c.step_rank, tie_word_embeddings=True,
        use_mambapy=False, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return MambaForCausalLM(config).eval()


def hf_mamba2(c: Mamba2Config) -> Any:
    try:
        from transformers import Mamba2Config as Config
        from transformers import Mamba2ForCausalLM
    except ImportError as error:
        raise MissingExtra(f"{error.name} is not installed; pip install 'archbench[dev]'") from None
    config = Config(
        vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.n_layers, state_size=c.d_state,
        conv_kernel=c.d_conv, expand=c.expand, num_heads=c.n_heads, head_dim=c.head_dim, n_groups=c.n_groups,
        chunk_size=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Mamba2ForCausalLM(config).eval()


def mamba(d_model: int) -> Mamba:
    return Mamba(MambaConfig(vocab_size=VOCAB, d_model=d_model, n_layers=8), Generator().manual_seed(0)).eval()


def mamba2(d_model: int) -> Mamba2:
    config = Mamba2Config(vocab_size=VOCAB, d_model=d_model, n_layers=8, d_state=64, head_dim=64)
    return Mamba2(config, Generator().manual_seed(0)).eval()


def decode_race(make: Callable[[int], Any], hf: Callable[[Any], Any], d_model: int, level: str) -> Trial:
    model = make(d_model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Race(ours=written(model, level), peer=generated(hf(model.config)), notes={"parameters": f"{parameters:,}"})


def bandwidth(make: Callable[[int], Any], d_model: int) -> Trial:
    """Time that moving the weights once and the state twice would take, over that of a native step."""
    model = make(d_model)
    # The table of embeddings is tied: the unembedding reads it whole.
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    return share_of_bandwidth(model, weights + 2 * state_bytes(model.initial_state(1)))


def lean_race(name: str, size: str) -> Trial:
    """A lean step of a model against its own modules, one after the other."""
    architecture = registry.architecture(name)
    config = solve(architecture, VOCAB, size).config
    model = architecture.build(config, Generator().manual_seed(0)).eval()
    sampling = GREEDY if architecture.traits(config).likelihood else PLAIN
    ours, peer = (written(model, level, sampling=sampling) for level in ("lean", "reference"))
    return Race(ours=ours, peer=peer)


def forced_drafting(d_model: int, level: str) -> Trial:
    """Untrained weights, every drafted byte taken as right, and subwords of three bytes, which is what those of trained
    codecs have on average: what drafting three subwords could gain at most."""
    codec = train_bpe([Document("bench", Path(__file__).read_bytes())], 512)
    drafter = Mamba(MambaConfig(vocab_size=codec.vocab_size, d_model=64, n_layers=4), Generator().manual_seed(1)).eval()
    lengths = torch.from_numpy(codec.token_bytes())
    with torch.no_grad():
        drafter.embedding.weight[lengths == 3] *= 20  # tied to the unembedding: the most likely is one of these
    verifier = mamba(d_model)
    drafting = Drafted(verifier, drafter, codec, rank=N_BYTES)
    parameters = [sum(parameter.numel() for parameter in model.parameters()) for model in (verifier, drafter)]
    return Race(
        ours=written(drafting, level),
        peer=written(verifier, level),
        notes={
            "parameters": "{:,}, drafter {:,}".format(*parameters),
            "a round drafts": "3 subwords of 3 bytes, all taken as right",
        },
    )


def _target(name: str, question: str, must: float, prepare: Callable[[], Trial], **more: Any) -> Target:
    given = {"ours": "ours", "seconds": 5.0, "level": "native"}
    return Target(id=f"recurrent/{name}", question=question, must=must, prepare=prepare, **{**given, **more})


TARGETS = [
    _target("scan", "Selective scan, forward?", 30, partial(scan_race, forward, "native", "hf"), peer="HF"),
    _target(
        "scan-backward", "Selective scan, forward and backward, 512 tokens?", 1000,
        partial(scan_race, forward_backward, "native", "hf"), peer="HF", turns=6, seconds=100.0,
    ),
    _target("scan-mambapy", "Selective scan?", 25, partial(scan_race, forward, "native", "mambapy"), peer="mambapy"),
    _target(
        "scan-backward-mambapy", "Selective scan, forward and backward?", 25,
        partial(scan_race, forward_backward, "native", "mambapy"), peer="mambapy", seconds=10.0,
    ),
    _target(
        "scan-lean", "Selective scan in torch?", 4, partial(scan_race, forward, "lean", "mambapy"), peer="mambapy",
        level="lean",
    ),
    _target(
        "scan-lean-backward", "Selective scan in torch, forward and backward?", 4,
        partial(scan_race, forward_backward, "lean", "mambapy"), peer="mambapy", level="lean", seconds=10.0,
    ),
    _target(
        "scan-native-lean", "Selective scan, forward and backward, C beside torch?", 8,
        partial(scan_race, forward_backward, "native", "lean"), peer="lean",
    ),
    _target(
        "scan-bound", "How near is the scan to its arithmetic alone?", 1 / 1.5, scan_bound,
        peer="arithmetic on registers", unit="of the bound",
    ),
    _target("conv", "Convolution and silu, forward and backward?", 3, partial(conv_race, "native"), peer="F.conv1d"),
    _target(
        "ssd-lean", "SSD with 64 states, C beside torch?", 3,
        lambda: Race(ours=our_ssd("native"), peer=our_ssd("lean")), peer="lean",
    ),
    _target(
        "ssd-torch", "SSD with 64 states in torch?", 1.5,
        lambda: Race(ours=our_ssd("lean"), peer=their_ssd()), peer="HF", level="lean",
    ),
    _target("ssd", "SSD with 64 states?", 3, lambda: Race(ours=our_ssd("native"), peer=their_ssd()), peer="HF"),
    _target(
        "ssd-backward", "SSD with 64 states, forward and backward?", 3,
        lambda: Race(
            ours=ssd_backward(our_ssd_scan("native"), ssd_inputs(), 4),
            peer=ssd_backward(their_ssd_scan(), their_ssd_inputs(), 1),
        ),
        peer="HF", seconds=10.0,
    ),
    _target(
        "ssd-scan", "SSD with 64 states a channel beside Mamba's scan with 16?", 1 / 1.2,
        lambda: Race(ours=our_ssd("native"), peer=forward(our_scan("native"), QUICK["native"])), peer="our scan",
    ),
    *(
        _target(
            f"{name}-{size}", f"Decoding {label}, {size}, one row?", must,
            partial(decode_race, make, hf, d_model, "native"), peer="HF generate", seconds=20.0, turns=9,
        )
        for name, label, make, hf, rows in (
            ("decode", "Mamba", mamba, hf_mamba, (("1M", 128, 40), ("3.6M", 256, 10))),
            ("decode2", "Mamba-2", mamba2, hf_mamba2, (("1M", 128, 40), ("3.6M", 256, 10))),
        )
        for size, d_model, must in rows
    ),
    *(
        _target(
            f"bandwidth-{name}", f"Which share of the memory's speed does a native step of {label}, 3.6M, reach?", 0.3,
            partial(bandwidth, make, 256), peer="moving weights and state once", unit="of bandwidth", stretch=0.6,
        )
        for name, label, make in (("mamba", "Mamba", mamba), ("mamba2", "Mamba-2", mamba2))
    ),
    *(
        _target(
            f"drafting-{level}-{size}", f"What can drafting subwords gain MambaByte at most, {size}, {level}?", 1.2,
            partial(forced_drafting, d_model, level), ours="drafting", peer="plain", level=level, seconds=10.0,
            why_missed=CHEAP,
        )
        for level, size, d_model in (("lean", "3.6M", 256), ("native", "3.6M", 256), ("native", "14M", 512))
    ),
    *(
        _target(
            f"lean-{name}-{size}", f"A lean step of {name}, {size}?", 1.2, partial(lean_race, name, size),
            peer="its modules", level="lean", why_missed=MODULES,
        )
        for name in ("infini_attention", "transformer_xl", "memorizing_transformer", "local", "calm", "mamba", "mamba2")
        for size in ("micro", "mini")
    ),
]  # fmt: skip
