"""Puts a checkpoint folder on the Hub: `medsight push`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from medsight.cli.console import Json, results
from medsight.text import Table


def command(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder, or one that holds an adapter.")],
    repo_id: Annotated[str, typer.Option(metavar="NAMESPACE/NAME", help="Repository; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch  [default: main].")] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Message of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, without the network.")] = False,
    only_card: Annotated[
        bool, typer.Option("--write-card", help="Write the card into the folder; upload nothing.")
    ] = False,
    license: Annotated[str | None, typer.Option(metavar="ID", help="For the card: the weights' licence.")] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="NAMESPACE/NAME", help="For the card: what the model was made from.")
    ] = None,
    metrics: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="For the card: outputs of medsight evaluate; repeatable.")
    ] = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="For the card: the training run's folder.")] = None,
    limits: Annotated[str | None, typer.Option(metavar="TEXT", help="For the card: further known limits.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="For the card: its example's request.")] = None,
    contact_sheets: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Publish these sheets of medsight codes, which show the data, too."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a checkpoint folder, or an adapter, on the Hub: model, code, region codes and card, in one commit.

    A README.md in the folder is published as it is; otherwise a card is made from what the folder, its evaluations
    and its training run say. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from medsight.hub import CardFacts, push, write_card

    if only_card and (dry_run or private or revision or message or contact_sheets):
        raise ValueError(
            "--write-card uploads nothing: leave out --dry-run, --private, --revision, --message and --contact-sheets"
        )
    facts = CardFacts(license, base_model, tuple(metrics or ()), run, limits, prompt)
    with results(as_json) as out:
        if only_card:
            card = write_card(Path(folder), repo_id, facts)
            out.show({"card": str(card)}, f"Written to {card}: read and edit it; medsight push publishes it as it is")
            return
        done = push(
            folder,
            repo_id,
            private=private,
            revision=revision,
            message=message,
            dry_run=dry_run,
            facts=facts,
            contact_sheets=contact_sheets,
        )
        uploaded: Table = [("file", "bytes"), *((name, f"{size:,}") for name, size in done.files.items())]
        left = "".join(f"\nleft out: {name} ({reason})" for name, reason in done.left_out.items())
        deleted = "".join(f"\ndeleted: {name}" for name in done.deleted)
        total = f"{len(done.files)} files, {sum(done.files.values()):,} bytes"
        where = f"would go to {done.repo_id} ({done.revision})" if dry_run else f"are at {done.url}"
        out.show(asdict(done), uploaded, f"{left}{deleted}\n{total} {where}")
