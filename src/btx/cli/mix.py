"""The commands that make MoE models from anybody's model folders: mix, extend, drop."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from btx.choices.merges import MergeSettings
from btx.choices.router_inits import ROUTER_INITS, RouterInit
from btx.cli import completing_names
from btx.cli.run_folders import LARGEST_SEED, open_run, work_on
from btx.errors import CheckpointError, UserError
from btx.model_files.hub import local_model
from btx.process import ending_at_once

Output = Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write.")]
Experts = Annotated[list[str] | None, typer.Option(
    "--expert",
    help="NAME=FOLDER of an expert model, or of a LoRA adapter of the seed model; or NAME=hf:ORG/NAME; repeat.",
)]  # fmt: skip
Text = Annotated[list[str] | None, typer.Option(
    "--text", help="NAME=FILE of text of an expert's domain (.jsonl, .txt, .parquet, folder); repeat.")]  # fmt: skip
RouterInitName = Annotated[str, typer.Option(
    help=f"How routers start: {', '.join(ROUTER_INITS)}.", autocompletion=completing_names.router_inits)]  # fmt: skip
RouterStd = Annotated[float, typer.Option(help="random: standard deviation.")]
RouterScale = Annotated[float | None, typer.Option(help="hidden_mean, ridge: factor on the weights; default 1, 10.")]
RouterRidge = Annotated[float, typer.Option(help="ridge: λ as a multiple of XᵀX's mean diagonal.")]
RouterTokens = Annotated[int, typer.Option(help="hidden_mean, ridge: tokens of each text, at most.")]
RngSeed = Annotated[int, typer.Option(
    min=0, max=LARGEST_SEED, help="Random number seed of routers and of merge methods that draw.")]  # fmt: skip


def mix(
    context: typer.Context,
    run_folder: Annotated[Path | None, typer.Argument(
        help="Run folder; or give --seed-model, --expert and -o.")] = None,
    seed_model: Annotated[Path | None, typer.Option(
        help="Folder of the dense model that was branched; hf:ORG/NAME.")] = None,
    expert: Experts = None,
    copies: Annotated[int | None, typer.Option(
        help="Instead of --expert: so many copies of the seed model's FF (sparse upcycling).")] = None,
    output: Output = None,
    top_k: Annotated[int, typer.Option(help="Experts a token uses.")] = 2,
    generalist: Annotated[bool, typer.Option(help="Add the seed model as one more expert.")] = True,
    merge: Annotated[str, typer.Option(
        help="How shared weights are merged; `btx ls merges`.", autocompletion=completing_names.merges)] = "mean",
    merge_weights: Annotated[str | None, typer.Option(help="weighted: NAME=WEIGHT,..., generalist=WEIGHT.")] = None,
    slerp_t: Annotated[float | None, typer.Option(help="slerp: 0 first, 1 second model; default 0.5.")] = None,
    merge_density: Annotated[float | None, typer.Option(
        help="ties, dare: share of task vectors kept; default 0.2, 0.5.")] = None,
    merge_scale: Annotated[float | None, typer.Option(help="ties, dare: factor λ; default 1.")] = None,
    router_init: RouterInitName = "random", router_std: RouterStd = 0.02, router_scale: RouterScale = None,
    router_ridge: RouterRidge = 1e-3, router_tokens: RouterTokens = 50_000, text: Text = None,
    split: Annotated[int, typer.Option(help="Cut every FF into so many chunks, each an expert.")] = 1,
    split_rescale: Annotated[bool, typer.Option(help="With --split: keep the size of the layer's output.")] = True,
    blend: Annotated[bool, typer.Option("--blend", help="Expert n gets the n-th chunk of every FF.")] = False,
    rng_seed: RngSeed = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the seed's.")] = None,
    tokenizer_from: Annotated[str | None, typer.Option(
        help="Expert, `seed` or folder whose tokenizer to take; vocabularies may then differ.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of an output file at most: 5GB, 500MB.")] = "5GB",
) -> None:  # fmt: skip
    """Mix expert models into one MoE model: of a run, or any folders."""
    named_options = _given(context)
    if run_folder is not None:
        _mix_run(run_folder, named_options - {"run_folder"})
        return
    if seed_model is None or output is None or bool(expert) == (copies is not None):
        raise UserError("btx mix needs a run folder, or --seed-model FOLDER, -o FOLDER and either --expert NAME=FOLDER "
                        "for every expert or --copies N")  # fmt: skip
    if copies is not None and generalist and "generalist" in named_options:
        raise UserError("--copies and --generalist exclude each other: all experts are copies of the seed model then")
    _refuse_existing(output)
    folders = named(expert or (), "--expert", "FOLDER")
    _refuse_missing(seed_model, experts=folders.values())
    from btx.mixing.mix import mix as mix_models
    from btx.mixing.settings import MixSettings

    if copies is not None:
        generalist, folders = False, {f"copy{number}": seed_model for number in range(copies)}
    merging = MergeSettings(merge, weights=_weights(merge_weights), t=slerp_t, density=merge_density, scale=merge_scale)
    start = RouterInit(router_init, std=router_std, scale=router_scale, ridge=router_ridge, tokens=router_tokens)
    settings = MixSettings(
        generalist=generalist, top_k=top_k, merge=merging, router_init=start, split=split, split_rescale=split_rescale,
        blend=blend, rng_seed=rng_seed, dtype=dtype, tokenizer_from=tokenizer_from, max_shard_size=max_shard_size,
    )  # fmt: skip
    texts = named(text or (), "--text", "FILE")
    with ending_at_once(f"stopped; nothing was written to {output}"):
        record = mix_models(seed_model, folders, output, settings, texts=texts, log=typer.echo)
    typer.echo(f"{output}: {len(record['experts'])} experts, top-{top_k}, {record['bytes'] / 1e6:.1f} MB")


def _mix_run(run_folder: Path, options: set[str]) -> None:
    """Mix a run's experts, and its soup where it has one; refuses options, which its recipe has already."""
    if options:
        written = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(options))
        raise UserError(f"{written}: a run is mixed as its recipe says, under `mix:`; set it there")
    soup = ["baselines/soup"] if "soup" in open_run(run_folder).recipe.baselines else []
    work_on(run_folder, ["mix", *soup])


def extend(
    moe: Annotated[Path, typer.Argument(help="Folder of a finished MoE model; hf:ORG/NAME.")],
    expert: Experts = None,
    output: Output = None,
    shared: Annotated[str, typer.Option(
        help="Shared weights: left, or fold the expert's in with weight 1/(n+1).")] = "left",
    router_init: RouterInitName = "random", router_std: RouterStd = 0.02, router_scale: RouterScale = None,
    router_ridge: RouterRidge = 1e-3, router_tokens: RouterTokens = 50_000, text: Text = None,
    rng_seed: RngSeed = 0,
) -> None:  # fmt: skip
    """Append an expert and its router row to a finished MoE model."""
    new = named(expert or (), "--expert", "FOLDER")
    if len(new) != 1 or output is None:
        raise UserError("btx extend needs one --expert NAME=FOLDER and -o FOLDER; run it once for each expert")
    _refuse_existing(output)
    ((name, folder),) = new.items()
    _refuse_missing(moe, experts=[folder])
    from btx.mixing.extend import extend as extend_model

    init = RouterInit(router_init, std=router_std, scale=router_scale, ridge=router_ridge, tokens=router_tokens)
    with ending_at_once(f"stopped; nothing was written to {output}"):
        record = extend_model(
            moe, name, folder, output, shared=shared, router_init=init, texts=named(text or (), "--text", "FILE"),
            rng_seed=rng_seed, log=typer.echo,
        )  # fmt: skip
    typer.echo(f"{output}: {len(record['experts'])} experts: {', '.join(record['experts'])}")


def drop(
    moe: Annotated[Path, typer.Argument(help="Folder of a finished MoE model; hf:ORG/NAME.")],
    expert: Annotated[str | None, typer.Option(help="Name of the expert to remove.")] = None,
    output: Output = None,
) -> None:
    """Remove an expert and its router row from a finished MoE model."""
    if expert is None or output is None:
        raise UserError("btx drop needs --expert NAME and -o FOLDER")
    _refuse_existing(output)
    _refuse_missing(moe)
    from btx.mixing.drop import drop as drop_expert

    with ending_at_once(f"stopped; nothing was written to {output}"):
        record = drop_expert(moe, expert, output, log=typer.echo)
    typer.echo(f"{output}: {len(record['experts'])} experts: {', '.join(record['experts'])}")


def _given(context: typer.Context) -> set[str]:
    """Names of the arguments and options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def named(pairs: list[str] | tuple[str, ...], option: str, kind: str) -> dict[str, Path]:
    """NAME=PATH pairs of a repeated option.

    Raises:
        UserError: one that is none, or a name given twice.
    """
    paths: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise UserError(f"{option} {pair!r}: write NAME={kind}, for example math=./math")
        if name in paths:
            raise UserError(f"{option} {name}: named twice")
        paths[name] = Path(path) if kind == "FILE" else local_model(Path(path))
    return paths


def _weights(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"--merge-weights {part!r}: write NAME=NUMBER,NAME=NUMBER, ...") from None
    return weights


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise UserError(f"{output}: exists already; choose another folder or remove it")


def _refuse_missing(model: Path, experts: Iterable[Path] = ()) -> None:
    """Refuse what holds no model, or no expert, all in one message, before torch is imported.

    Raises:
        CheckpointError: names every such folder and why.
    """
    from btx.model_files.model_folder import check_expert_folder, check_model_folder

    problems = []
    for check, folder in ((check_model_folder, model), *((check_expert_folder, expert) for expert in experts)):
        try:
            check(folder)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join([*problems, "Nothing was written."]))
