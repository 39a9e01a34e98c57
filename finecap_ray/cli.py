"""`finecap`: parses, calls, prints. A FinecapError becomes one clear message and exit code 2.

Nothing heavy is imported before a command runs: `finecap --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from finecap_ray.config import Settings, dump_settings, load_settings
from finecap_ray.console import plain_console
from finecap_ray.errors import ConfigError, FinecapError
from finecap_ray.paths import absolute, make_room
from finecap_ray.unwrap import finecap_error

_OPTIONS = {"no_args_is_help": True, "pretty_exceptions_enable": False, "add_completion": False}
app = typer.Typer(help="Fine-tune image captioners by self-retrieval in bags of look-alikes.", **_OPTIONS)
scorer_app = typer.Typer(help="The image-text scorers: one rewards, the other judges.", **_OPTIONS)
bags_app = typer.Typer(help="Bags of look-alikes.", **_OPTIONS)
train_app = typer.Typer(help="Train the captioner: on captions (mle), then by self-retrieval (rl).", **_OPTIONS)
app.add_typer(scorer_app, name="scorer")
app.add_typer(bags_app, name="bags")
app.add_typer(train_app, name="train")
console = plain_console()

Format = Literal["table", "json", "markdown"]
ScorerFormat = Literal["table", "json"]
ExportDtype = Literal["float32", "bfloat16", "float16"]
_INTERRUPTED = 130  # exit code of Ctrl-C

Config = Annotated[str, typer.Option("--config", "-c", help="A preset or a YAML file.")]
RunConfig = Annotated[
    str | None, typer.Option("--config", "-c", help="A preset or a YAML file; default: the checkpoint's run's own.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, such as rl.learning_rate=1e-4.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the settings and the batch arithmetic, and exit.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run folder that has this stage.")]


@app.command()
def demo(overrides: Overrides = None, config: Config = "demo") -> None:
    """The main job on the embedded data, start to finish. Goes on where it was."""
    _demo(load_settings(config, overrides or []), redo=True)


@app.command()
def doctor() -> None:
    """Checks versions, cores, GPUs, memory, disk, Ray, and the sampler's weights and log-probs. Exit code 1 if something is wrong."""
    from finecap_ray.doctor import diagnose

    checks = diagnose()
    for check in checks:
        console.print(f"{'ok   ' if check.ok else 'WRONG'}  {check.name:<16} {check.detail}")
        if check.remedy:
            console.print(f"{'':<24}-> {check.remedy}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(help="Folder, COCO or Karpathy JSON, parquet, Hugging Face dataset, or WebDataset shards.")
    ],
    out: Annotated[str, typer.Argument(help="New folder for the examples.")],
    overrides: Overrides = None,
    config: Config = "demo",
    images: Annotated[str | None, typer.Option(help="Folder of the images of a COCO file.")] = None,
) -> None:
    """Images and captions from outside -> examples, with a manifest of what was left out. Settings: importing.*"""
    settings = load_settings(config, overrides or [])
    from finecap_ray.cluster import connect
    from finecap_ray.sources.importer import import_examples
    from finecap_ray.sources.urls import Fetching

    importing = settings.importing
    fetching = Fetching(importing.fetch_timeout_s, importing.fetch_max_bytes) if importing.fetch_urls else None
    connect(settings.resources)
    report = import_examples(
        absolute(source),
        absolute(out),
        format=importing.format,
        longest_side=importing.longest_side,
        jpeg_quality=importing.jpeg_quality,
        split=importing.split,
        fetching=fetching,
        max_bad_fraction=settings.data.max_bad_fraction,
        images=images and absolute(images),
    )
    splits = ", ".join(f"{split} {count}" for split, count in report.splits.items())
    console.print(f"{report.examples} examples of {report.found} images, in {out} ({splits})")
    for reason, count in report.left_out.items():
        console.print(f"{count:>8} left out: {reason}")
    for reason, count in report.captions_left_out.items():
        console.print(f"{count:>8} captions left out: {reason}")
    if report.without_captions:
        console.print(f"{report.without_captions:>8} examples without a caption")


@scorer_app.command("train")
def scorer_train(overrides: Overrides = None, config: Config = "demo") -> None:
    """Trains the scorer that rewards and the one that judges, on disjoint halves of the training images."""
    pipeline = _pipeline(load_settings(config, overrides or []))
    console.print(f"scorer: {pipeline.scorer.spec}\njudge:  {pipeline.judge.spec}")


@scorer_app.command("evaluate")
def scorer_evaluate(
    overrides: Overrides = None,
    config: Config = "demo",
    ratings: Annotated[str | None, typer.Option(help="Human ratings: parquet with image_id, caption, ratings.")] = None,
    spec: Annotated[
        list[str] | None, typer.Option(help="Scorers to measure; default: the run's, trained if need be.")
    ] = None,
    form: Annotated[ScorerFormat, typer.Option("--format", help="How results are printed.")] = "table",
) -> None:
    """What scorers are worth, on images of the dev splits: R@1 among random distractors, agreement with human ratings,
    binding of attributes, share of truncated captions."""
    settings = load_settings(config, overrides or [])
    from finecap_ray.evaluation.scorer_warrant import describe, measure_scorers

    specs = {name: name for name in spec or ()}
    if not specs:
        pipeline = _pipeline(settings, form)
        specs = {"scorer": pipeline.scorer.spec, "judge": pipeline.judge.spec}
    warrants = measure_scorers(settings, specs, ratings)
    if form == "json":
        typer.echo(json.dumps(warrants, indent=2))
        return
    for name, warrant in warrants.items():
        console.print(f"{name}: {warrant['spec']}")
        for line in describe(warrant):
            console.print(f"    {line}")


@bags_app.command("build")
def bags_build(overrides: Overrides = None, config: Config = "demo") -> None:
    """Mines the bags of the training split and of the evaluation's."""
    pipeline = _pipeline(load_settings(config, overrides or []))
    from finecap_ray.bags.bag_set import read_manifest
    from finecap_ray.bags.describe import describe_bags

    for split in dict.fromkeys(["train", *pipeline.settings.evaluation.groups.values()]):
        console.print(describe_bags(read_manifest(pipeline.bags(split).folder)))


@bags_app.command("show")
def bags_show(
    folder: Annotated[str, typer.Argument(help="A bag set, such as runs/demo/bags/train.")],
    out: Annotated[str | None, typer.Option(help="HTML file; default: bags.html in the folder.")] = None,
    bags: Annotated[int, typer.Option(help="Sample bags of each size.", min=1)] = 6,
) -> None:
    """Writes a page of sample bags of every size, from the most alike to the least, with their similarities."""
    from finecap_ray.report.bag_page import write_bag_page

    make_room(out)
    console.print(f"page: {write_bag_page(folder, out, bags)}")


@bags_app.command("export")
def bags_export(
    folder: Annotated[str, typer.Argument(help="A bag set, such as runs/demo/bags/test_seen.")],
    out: Annotated[str, typer.Argument(help="JSON file.")],
    size: Annotated[list[int] | None, typer.Option(help="Only bags of this size; may be given more than once.")] = None,
) -> None:
    """Writes the image ids of the bags as TrueMatch does: a JSON list of lists."""
    from finecap_ray.bags.truematch import export_bags

    make_room(out)
    console.print(f"{export_bags(folder, out, size)} bags in {out}")


@train_app.command("mle")
def train_mle(
    overrides: Overrides = None, config: Config = "demo", dry_run: DryRun = False, resume: Resume = False
) -> None:
    """Trains the captioner on captions."""
    _train("mle", load_settings(config, overrides or []), dry_run, resume)


@train_app.command("rl")
def train_rl(
    overrides: Overrides = None, config: Config = "demo", dry_run: DryRun = False, resume: Resume = False
) -> None:
    """Trains the captioner by self-retrieval; runs the stages that come before it first."""
    _train("rl", load_settings(config, overrides or []), dry_run, resume)


@app.command()
def evaluate(
    overrides: Overrides = None,
    config: RunConfig = None,
    captions: Annotated[
        str | None,
        typer.Option(help="Captions by image id: JSON, COCO's results, or parquet; the README has the forms."),
    ] = None,
    references: Annotated[
        str | None, typer.Option(help="Human captions by image id: caption metrics of --captions, without images.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="A captioner folder, such as runs/demo/rl/captioner.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="bags:FILE, random:SIZE, all or imagecode:FILE; may be repeated.")
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="Splits of the examples; may be repeated.")] = None,
    judge: Annotated[str | None, typer.Option(help="Scorer that judges; default: the run's judge.")] = None,
    reward_scorer: Annotated[str | None, typer.Option(help="Scorer that rewarded; default: the run's.")] = None,
    form: Annotated[Format, typer.Option("--format", help="How results are printed.")] = "table",
    out: Annotated[str | None, typer.Option(help="Also write the results here, as JSON.")] = None,
    captions_out: Annotated[
        str | None, typer.Option(help="Also write the checkpoint's captions here, as JSON that --captions takes.")
    ] = None,
) -> None:
    """Captions or a checkpoint against bags, random distractors or all images. With neither of the two: the captioner
    of a run before and after RL on held-out bags, by the judge; runs the stages that are missing."""
    make_room(out)
    if captions_out is not None and checkpoint is None:
        raise ConfigError("--captions-out is for the captions of a --checkpoint: name one")
    make_room(captions_out)
    changes = [*(overrides or []), *([f"evaluation.against={json.dumps(against)}"] if against else [])]
    if captions is None and checkpoint is None and references is None:
        if judge or reward_scorer or split or against:
            raise ConfigError(
                "--judge, --reward-scorer, --split and --against are for --captions or a --checkpoint: of a run the settings "
                "judge.spec, scorer.spec, evaluation.groups and evaluation.bag_size say that"
            )
        results = _demo(load_settings(config or "demo", changes), redo=False, form=form)
        if out is not None:
            from finecap_ray.evaluation.present import as_json

            Path(out).write_text(as_json(results), encoding="utf-8")
        return
    from finecap_ray.captioning import find_captioner, run_settings

    found = None if checkpoint is None else find_captioner(checkpoint)
    settings = load_settings(config or "demo", changes) if found is None else run_settings(found, config, changes)
    from finecap_ray.evaluation.evaluate import Request, default_scorers, evaluate_texts
    from finecap_ray.evaluation.evaluate import evaluate as evaluate_request
    from finecap_ray.evaluation.present import as_json, print_results

    if references is not None:
        if captions is None or checkpoint or against or split or judge or reward_scorer:
            raise ConfigError(
                "--references is for caption metrics of --captions without images: give neither a checkpoint nor "
                "--against, --split, --judge or --reward-scorer with it"
            )
        results = evaluate_texts(settings, captions, references)
    else:
        default_judge, default_scorer = default_scorers(settings, found)
        splits = tuple(split) if split else None
        request = Request(
            captions, found, splits, judge or default_judge, reward_scorer or default_scorer, captions_out
        )
        results = evaluate_request(settings, request)
    print_results(results, form, console)
    if out is not None:
        Path(out).write_text(as_json(results), encoding="utf-8")


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs that were evaluated.")],
    out: Annotated[
        str | None, typer.Option(help="File; default: report.html of the run, compare.html of the first.")
    ] = None,
) -> None:
    """Writes the report of a run again, or one that compares several runs."""
    make_room(out)
    from finecap_ray.report.assemble import rebuild_report

    console.print(f"report: {rebuild_report(runs, out)}")


@app.command()
def caption(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    checkpoint: Annotated[str, typer.Option(help="A captioner folder, such as runs/demo/rl/captioner.")],
    n: Annotated[int, typer.Option("--n", "-n", help="Captions per image.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="Default: 0 (greedy), or 1 for several captions.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Default: what the captioner was trained with.")] = None,
    best: Annotated[int | None, typer.Option(help="Sample so many, and keep the best.", min=2)] = None,
    beam: Annotated[int | None, typer.Option(help="Width of a beam search (image-text models).", min=2)] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Ranks captions by their image; default: the captioner's log-prob does.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="File for many images: NAME.parquet or NAME.jsonl.")] = None,
    config: RunConfig = None,
) -> None:
    """Captions of images: greedy, sampled, by beam search, or the best of several by a scorer. One per line: path, tab,
    caption; with --out a row per image."""
    make_room(out)
    from finecap_ray.caption_images import (
        CaptionRequest,
        caption_files,
        check_images,
        check_out,
        image_files,
        write_captions,
    )
    from finecap_ray.captioning import find_captioner, run_settings

    request = CaptionRequest(n, temperature, max_tokens, best, beam, scorer)
    request.check()
    captioner, paths = find_captioner(checkpoint), image_files(images)
    settings = run_settings(captioner, config)
    if out is None:
        check_images(paths)
    else:
        check_out(out)
    rows = caption_files(paths, captioner, settings, request)
    if out is not None:
        console.print(f"{write_captions(rows, out)} of {len(paths)} images in {out}")
        return
    for row in rows:
        for text in row["captions"]:
            typer.echo(f"{row['image']}\t{' '.join(text.split())}")


@app.command("export")
def export_(
    source: Annotated[str, typer.Argument(help="A run folder (its last captioner), or a captioner folder.")],
    out: Annotated[str, typer.Argument(help="New folder.")],
    dtype: Annotated[ExportDtype | None, typer.Option(help="Of the weights; default: as they are.")] = None,
) -> None:
    """Writes a captioner for others: weights (LoRA merged), processor, settings and a model card."""
    from finecap_ray.export import export_captioner

    console.print(f"captioner: {export_captioner(source, out, dtype)}")


@app.command("serve")
def serve_(
    checkpoint: Annotated[str, typer.Argument(help="A captioner folder, such as runs/demo/rl/captioner.")],
    overrides: Overrides = None,
    config: RunConfig = None,
    swap: Annotated[bool, typer.Option("--swap", help="Give the service that runs already this captioner.")] = False,
) -> None:
    """Answers POST /v1/captions, with a page to try it, until Ctrl-C."""
    from finecap_ray.captioning import find_captioner, run_settings
    from serve.start import start_service, swap_captioner

    captioner = find_captioner(checkpoint)
    (swap_captioner if swap else start_service)(run_settings(captioner, config, overrides or []), captioner)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; `arguments` are those of the terminal unless given (by a job)."""
    try:
        app(args=arguments)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            plain_console(stderr=True).print("stopped; the stages that are finished are kept", style="bold")
        raise
    except Exception as error:
        found = finecap_error(error)
        if found is None:
            raise
        _fail(found)


# These take settings, so that a mistake in them is told at once and not after the seconds that the imports take.


def _demo(settings: Settings, redo: bool, form: Format = "table") -> dict[str, Any]:
    """The summary, which is also printed."""
    from finecap_ray.demo import run_demo

    if form == "table":
        return run_demo(settings, console, redo)
    from finecap_ray.evaluation.present import as_json, summary_markdown

    summary = run_demo(settings, plain_console(stderr=True), redo)  # standard output holds nothing but the results
    typer.echo(as_json(summary) if form == "json" else summary_markdown(summary))
    return summary


def _pipeline(settings: Settings, form: Format = "table"):
    from finecap_ray.pipeline import Pipeline

    return Pipeline.narrated(settings, console if form == "table" else plain_console(stderr=True))


def _train(stage: Literal["mle", "rl"], settings: Settings, dry_run: bool, resume: bool) -> None:
    from finecap_ray.preflight import check, describe_training, refuse_existing

    arithmetic = describe_training(settings, stage)
    if dry_run:
        check(settings)
        typer.echo(f"{dump_settings(settings)}\n{arithmetic}")
        return
    if not resume:
        refuse_existing(settings, stage)
    console.print(arithmetic)
    result = getattr(_pipeline(settings), stage)
    console.print(f"captioner: {result.folder if stage == 'mle' else result.folder / 'captioner'}")


def _fail(error: FinecapError) -> None:
    stderr = plain_console(stderr=True)
    stderr.print("error: ", style="bold red", end="")
    stderr.print(str(error))
    sys.exit(2)
