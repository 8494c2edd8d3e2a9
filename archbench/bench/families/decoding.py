"""Decoding: ours at each level against Hugging Face's generate, on equal shapes, weights and tokens; self-speculation
against its own plain path; and the native step against what the memory can deliver.

All is greedy with one row and a prompt of 128 tokens, whose reading is not counted on our side; in `generate` it counts
as one token's step, as it does for any user.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from archbench import registry
from archbench.architectures.transformer import Transformer, TransformerConfig
from archbench.bench.target import Target
from archbench.bench.trial import Race, Side, Trial
from archbench.errors import MissingExtra
from archbench.generation import Writer, continue_from
from archbench.levels import at_level
from archbench.model import SequenceModel, Speculative
from archbench.sampling import GREEDY, Sampling
from archbench.state import copy_state

VOCAB, PROMPT, NEW = 256, 128, 64


def written(model: Writer, level: str, *, sampling: Sampling = GREEDY) -> Side:
    """A continuation of a prompt that was read before, the same in every call. Fresh copies of the state are made
    outside the clock, one a call ahead."""
    with at_level(level), torch.inference_mode():
        read = model.prefill(_prompt(), model.initial_state(1))
    waiting = [copy_state(read)]

    def call() -> None:
        generator = Generator().manual_seed(0)
        with at_level(level), torch.inference_mode():
            continue_from(model, waiting.pop(), 1, NEW, sampling, generator)

    def again() -> None:
        waiting.append(copy_state(read))

    return Side(call=call, work=NEW, prepare=again)


def _prompt() -> Tensor:
    return torch.randint(1, VOCAB, (1, PROMPT), generator=Generator().manual_seed(1))


def llama_of(model: Transformer) -> Any:
    """Hugging Face's LlamaForCausalLM of the same shape and weights. Raises MissingExtra without transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingExtra(f"transformers is not installed ({error}); pip install 'archbench[dev]'") from None
    c = model.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.kv_heads,
            intermediate_size=c.ffn_width,
            rms_norm_eps=c.norm_eps,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            pad_token_id=None,
            eos_token_id=None,
            bos_token_id=None,
        )
    ).eval()
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.unembedding.weight,
    }
    for i, block in enumerate(model.blocks):
        layer = f"model.layers.{i}"
        width, shared = c.n_heads * c.head_dim, c.kv_heads * c.head_dim
        q, k, v = block.attention.qkv.weight.split([width, shared, shared])
        gate, up = block.ffn.gate_up.weight.chunk(2)
        weights |= {
            f"{layer}.self_attn.q_proj.weight": q,
            f"{layer}.self_attn.k_proj.weight": k,
            f"{layer}.self_attn.v_proj.weight": v,
            f"{layer}.self_attn.o_proj.weight": block.attention.out.weight,
            f"{layer}.mlp.gate_proj.weight": gate,
            f"{layer}.mlp.up_proj.weight": up,
            f"{layer}.mlp.down_proj.weight": block.ffn.down.weight,
            f"{layer}.input_layernorm.weight": block.norm_attention.weight,
            f"{layer}.post_attention_layernorm.weight": block.norm_ffn.weight,
        }
    # Assigned, they keep their type; what is no weight stays in fp32, as in a model that was loaded.
    theirs.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()}, assign=True)
    return theirs


def generated(theirs: Any) -> Side:
    """What `generate` writes. The mask is given, since a prompt's token may be taken for padding otherwise."""
    prompt = _prompt()

    def call() -> None:
        mask = torch.ones_like(prompt)
        theirs.generate(prompt, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

    return Side(call=call, work=NEW)


def _transformer(d_model: int, n_layers: int, n_heads: int) -> Transformer:
    config = TransformerConfig(vocab_size=VOCAB, d_model=d_model, n_layers=n_layers, n_heads=n_heads)
    return Transformer(config, Generator().manual_seed(0)).eval()


def against_generate(shape: tuple[int, int, int], level: str, dtype: torch.dtype = torch.float32) -> Trial:
    """Both sides with weights and caches of this type."""
    model = _transformer(*shape).to(dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    theirs = generated(llama_of(model))
    return Race(ours=written(model, level), peer=theirs, notes={"parameters": f"{parameters:,}"})


def native_against_lean(shape: tuple[int, int, int]) -> Trial:
    model = _transformer(*shape)
    return Race(ours=written(model, "native"), peer=written(model, "lean"))


def bandwidth(shape: tuple[int, int, int]) -> Trial:
    """Time that moving the weights and the cache once would take at the measured copy bandwidth, over the time of a
    native step."""
    model = _transformer(*shape)
    c = model.config
    weights = 4 * sum(p.numel() for name, p in model.named_parameters() if name != "embedding.weight")
    cache = 4 * 2 * c.n_layers * c.kv_heads * c.head_dim * (PROMPT + NEW // 2)
    return share_of_bandwidth(model, weights + cache)


def share_of_bandwidth(model: Writer, n_bytes: int) -> Race:
    """The same for any model that moves so many bytes a token."""
    n_floats = n_bytes // 8  # a copy reads and writes
    source, target = torch.ones(n_floats), torch.empty(n_floats)

    def move() -> None:
        for _ in range(NEW):
            target.copy_(source)

    race = Race(ours=written(model, "native"), peer=Side(call=move, work=NEW), notes={"bytes a token": f"{n_bytes:,}"})

    def rates(_share: float) -> dict[str, str]:
        seconds = {side: statistics.median(times["cpu"]) for side, times in race.times().items()}
        gigabytes = {side: f"{n_bytes / value / 1e9:.0f} GB/s" for side, value in seconds.items()}
        return {"reached": gigabytes["ours"], "a copy of so many bytes in all": gigabytes["peer"]}

    race.explain = rates
    return race


def forced_speculation(
    shape: tuple[int, int, int], n_future: int, level: str, tau: float, dtype: torch.dtype = torch.float32
) -> Trial:
    """Steps of untrained weights, plain and drafting, as if a drafting step wrote `tau` tokens: S = tau C_1 / C_n."""
    d_model, n_layers, n_heads = shape
    found = registry.architecture("mtp")
    config = found.config(
        vocab_size=VOCAB, d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_future=n_future, head_type="replicated"
    )
    model = found.build(config, Generator().manual_seed(0)).eval().to(dtype)
    assert isinstance(model, Speculative)
    steps = NEW
    return Race(
        ours=_stepping(model, level, steps, tau * steps),
        peer=_stepping(model.plain(), level, steps, steps),
        notes={"tokens a step": f"{tau:g}, forced"},
        explain=lambda figure: {
            "a drafting step costs": f"{tau / figure:.2f} plain ones; it pays if a step writes more tokens than that"
        },
    )


def _stepping(model: SequenceModel, level: str, steps: int, work: float) -> Side:
    with at_level(level), torch.inference_mode():
        read = model.decode_step(model.prefill(_prompt(), model.initial_state(1)), GREEDY, None).state
    waiting = [copy_state(read)]

    def call() -> None:
        with at_level(level), torch.inference_mode():
            state = waiting.pop()
            for _ in range(steps):
                state = model.decode_step(state, GREEDY, None).state

    return Side(call=call, work=work, prepare=lambda: waiting.append(copy_state(read)))


THEIRS_VARIES = "the time of `generate` varies by a factor of two from hour to hour on the same machine, ours by less"
MOVED = "a native step moves its weights nearly as fast as they can be copied (decoding/bandwidth)"
SMALL = "weights that stay in the cache cost nothing to read again: reading once for several tokens saves little"
SEVERAL_ROWS = (
    "torch's products of four and eight rows take 2.4 and 3.4 times those of one row at this width; a prototype gained "
    "1.2x beside a plain step of 770 µs, most of it Python's"
)
FLOOR = "some twenty calls of torch a layer take one to five microseconds each, however small the model"
NATIVE = {"d64": (60, 100), "d128": (30, 60), "d256": (6, 12)}
SHAPES = {"d64": (64, 4, 1), "d128": (128, 8, 2), "d256": (256, 8, 4)}


def _target(
    name: str, question: str, must: float, stretch: float | None, prepare: Callable[[], Trial], **more: Any
) -> Target:
    given = {"ours": "ours", "peer": "HF generate", "seconds": 20.0, "turns": 9}
    return Target(
        id=f"decoding/{name}", question=question, must=must, stretch=stretch, prepare=prepare, **{**given, **more}
    )


TARGETS = [
    *(
        _target(
            f"{level}{'-bf16' if dtype is torch.bfloat16 else ''}-{name}",
            f"How fast does the Transformer decode at level {level}, {name}, one row, both in {str(dtype)[6:]}?",
            must,
            stretch,
            partial(against_generate, SHAPES[name], level, dtype),
            level=level,
            why_missed=f"{MOVED}; {THEIRS_VARIES}" if level == "native" else FLOOR,
        )
        for level, dtype, bounds in (
            ("lean", torch.float32, {"d64": (6, 9), "d128": (4, 6), "d256": (2, 4)}),
            ("native", torch.float32, NATIVE),
            ("native", torch.bfloat16, NATIVE),
        )
        for name, (must, stretch) in bounds.items()
    ),
    *(
        _target(
            f"native-lean-{name}",
            f"How fast is the native step beside the lean one, {name}?",
            6,
            10,
            partial(native_against_lean, SHAPES[name]),
            level="native",
            peer="lean",
            why_missed=f"{MOVED}, and the lean step is 1.7 times as fast as the prototype's",
            seconds=5.0,
        )
        for name in ("d64", "d128")
    ),
    *(
        _target(
            f"bandwidth-{name}",
            f"Which share of the memory's speed does a native step reach, {name}?",
            0.3,
            0.6,
            partial(bandwidth, SHAPES[name]),
            level="native",
            peer="moving weights and cache once",
            unit="of bandwidth",
            seconds=5.0,
        )
        for name in SHAPES
    ),
    *(
        _target(
            f"speculation-{level}{'-bf16' if dtype == torch.bfloat16 else ''}-n{n}",
            f"Does drafting {n} bytes pay at level {level} if a step writes {tau:g}? d128, {str(dtype)[6:]}",
            must,
            stretch,
            partial(forced_speculation, SHAPES["d128"], n, level, tau, dtype),
            level=level,
            ours="drafting",
            peer="plain",
            seconds=8.0,
            why_missed=SEVERAL_ROWS,
        )
        for level, dtype, n, tau, must, stretch in (
            ("lean", torch.float32, 4, 2.0, 1.2, 1.8),
            ("lean", torch.float32, 8, 2.2, 1.2, 1.8),
            ("lean", torch.bfloat16, 4, 2.0, 1.5, 2.5),
            ("lean", torch.bfloat16, 8, 2.2, 1.5, 2.5),
        )
    ),
    *(
        _target(
            f"speculation-native-{size}",
            f"Does drafting 4 bytes pay natively at {size.upper()} parameters if a step writes 2?",
            must,
            stretch,
            partial(forced_speculation, shape, 4, "native", 2.0),
            level="native",
            ours="drafting",
            peer="plain",
            turns=7,
            seconds=20.0,
            why_missed=SMALL,
        )
        for size, shape, must, stretch in (
            ("1.6m", SHAPES["d128"], 1.0, None),
            ("6.3m", SHAPES["d256"], 1.0, None),
            ("25m", (512, 8, 8), 1.5, 1.75),
        )
    ),
]
