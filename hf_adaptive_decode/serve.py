"""`transformers serve` for adapters: `python -m hf_adaptive_decode.serve ADAPTER`; knows no route and no request."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """
    Runs transformers' own server, in a process in which adapters can be loaded.

    Args:
        arguments (sequence of `str`): As `transformers serve` takes them.

    Raises:
        `ImportError`: If the server's packages are missing; says how to install them.
    """
    import transformers
    import typer
    from transformers.cli.serve import Serve

    from .modeling import AutoDecoForCausalLM

    # The server looks a model's class up among transformers' own, by the name in the model's config.
    transformers.AutoDecoForCausalLM = AutoDecoForCausalLM
    app = typer.Typer(add_completion=False)
    app.command()(Serve)
    app(arguments, prog_name="python -m hf_adaptive_decode.serve")


if __name__ == "__main__":
    main(sys.argv[1:])
