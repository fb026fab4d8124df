"""The commands that talk: chat in the terminal, serve in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from btx.cli.plan import AsJson
from btx.cli.run_folders import LARGEST_SEED, ModelArgument, is_run, open_run
from btx.cli.terminal import remark, show_json
from btx.errors import UserError


def chat(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option(help="Answer this text and end; default: ask for lines.")] = None,
    show_experts: Annotated[bool, typer.Option(help="Colour each token by the pair of experts it used.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Use this expert alone; repeat for several.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Never use this expert; repeat for several.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens generated at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this probability.")] = 1.0,
    rng_seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Random number seed of the sampling.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Talk to a run's model, or any model folder."""
    from btx.model_files.model_folder import check_model_or_btm
    from btx.run_folder.finished_models import last_model
    from btx.serving.sampling import ExpertChoice, Sampling, check_prompt

    if as_json and prompt is None:
        raise UserError("btx chat --json needs --prompt TEXT")
    sampling = Sampling(max_new_tokens, temperature, top_p, rng_seed)
    path = last_model(open_run(model), remark).folder if is_run(model) else model
    if prompt is not None:
        check_prompt(prompt)
    check_model_or_btm(path)
    from btx.cli.chat import chat as start_chat
    from btx.serving.speaker import completion

    experts = ExpertChoice(tuple(only or ()), tuple(without or ()))
    if as_json and prompt is not None:
        show_json(completion(path, prompt, sampling, experts))
        return
    start_chat(path, prompt=prompt, show_experts=show_experts, sampling=sampling, experts=experts)


def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback opens it to the network.")] = (
        "127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
) -> None:  # fmt: skip
    """A web page to talk to a run's models, and an interface like OpenAI's."""
    paths = _served(model)
    from btx.serving.server import serve as start_server

    start_server(paths, host=host, port=port, log=typer.echo)


def _served(model: Path) -> dict[str, Path]:
    """Name → model folder: of a run all that are finished, the one trained last first.

    Raises:
        UserError: it is neither a run nor a model, or nothing of the run is finished.
    """
    from btx.model_files.hub import shown_name
    from btx.model_files.model_folder import check_model_or_btm
    from btx.run_folder.finished_models import finished_models, tell_stale

    if not is_run(model):
        check_model_or_btm(model)
        return {shown_name(model): model}
    run = open_run(model)
    models = finished_models(run)
    if not models:
        raise UserError(f"{model}: no model of this run is finished yet; `btx run {model}` goes on")
    tell_stale(run, models, remark)
    for each in models:
        check_model_or_btm(each.folder)
    return {each.name: each.folder for each in reversed(models)}
