"""`finecap`: parses, calls, prints. A FinecapError becomes one clear message and exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from finecap_ray.config import load_settings
from finecap_ray.errors import FinecapError

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.split(":")[0], add_completion=False
)
console = Console(soft_wrap=True)

Config = Annotated[str, typer.Option("--config", "-c", help="A preset or a YAML file.")]
RunConfig = Annotated[
    str | None, typer.Option("--config", "-c", help="A preset or a YAML file; default: the checkpoint's run's own.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, such as rl.learning_rate=1e-4.")]


@app.command()
def demo(overrides: Overrides = None, config: Config = "demo") -> None:
    """The main job on the embedded data, start to finish. Goes on where it was."""
    from finecap_ray.demo import run_demo

    run_demo(load_settings(config, overrides or []), console)


@app.command()
def caption(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")],
    checkpoint: Annotated[str, typer.Option(help="A captioner folder, such as runs/demo/rl/captioner.")],
    n: Annotated[int, typer.Option("--n", "-n", help="Captions per image.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="Default: 0 (greedy), or 1 for several captions.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Default: the captioner's longest.")] = None,
    config: RunConfig = None,
) -> None:
    """Captions of image files, one per line: path, tab, caption."""
    from finecap_ray.captioning import caption_files, find_captioner, run_settings

    captioner = find_captioner(checkpoint)
    settings = run_settings(captioner, config)
    for one in caption_files(images, captioner, settings, n, temperature, max_tokens):
        typer.echo(f"{one.image}\t{' '.join(one.text.split())}")


@app.command("serve")
def serve_(
    checkpoint: Annotated[str, typer.Argument(help="A captioner folder, such as runs/demo/rl/captioner.")],
    overrides: Overrides = None,
    config: RunConfig = None,
) -> None:
    """Answers POST /v1/captions, with a page to try it, until Ctrl-C."""
    from finecap_ray.captioning import find_captioner, run_settings
    from serve.start import start_service

    captioner = find_captioner(checkpoint)
    start_service(run_settings(captioner, config, overrides or []), captioner)


def main() -> None:
    try:
        app()
    except FinecapError as error:
        _fail(error)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on from here", style="bold")
        sys.exit(130)
    except Exception as error:
        cause = getattr(error, "cause", None)  # of Ray's RayTaskError
        if not isinstance(cause, FinecapError):
            raise
        _fail(cause)


def _fail(error: FinecapError) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/bold red] {error}", highlight=False)
    sys.exit(2)


@app.callback()
def _root() -> None:
    """Fine-tune image captioners by self-retrieval in bags of look-alikes."""
