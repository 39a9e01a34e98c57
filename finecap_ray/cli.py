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
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, such as rl.learning_rate=1e-4.")]


@app.command()
def demo(overrides: Overrides = None, config: Config = "demo") -> None:
    """The main job on the embedded data, start to finish. Goes on where it was."""
    from finecap_ray.demo import run_demo

    run_demo(load_settings(config, overrides or []), console)


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
