"""`headwater apply`: topics as code, with the plan first."""

from pathlib import Path
from typing import Annotated

import typer

from headwater.cli.application import loaded
from headwater.cli.output import (
    DEFAULT_SERVERS,
    Json,
    Servers,
    UserError,
    admin,
    console,
    explained,
    show_json,
    show_table,
)
from headwater.operations.apply import (
    Action,
    InvalidDeclaration,
    Plan,
    carry_out,
    declared_by,
    find,
    joined,
    plan,
    read_declaration,
)


def apply(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODULE:APP]...", help="Applications, whose topics are declared by them."),
    ] = None,
    file: Annotated[list[Path] | None, typer.Option("--file", "-f", help="A TOML file of topics; repeatable.")] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="The plan only; exit code 1 when there is something to do, or a name is wrong."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Make the cluster's topics what applications and files declare. Nothing is deleted that isn't named for it."""
    with explained("apply"):
        if not targets and not file:
            raise UserError("name applications (shop.orders:app), or a file with --file topics.toml.")
        try:
            declarations = [declared_by(loaded(target), target) for target in targets or []]
            declared = joined([*declarations, *(read_declaration(path) for path in file or [])])
        except InvalidDeclaration as error:
            raise UserError(str(error)) from None
        client = admin(bootstrap_servers)
        found = plan(declared, find(client))
        if not json:
            _show(found)
        is_asked_for = bool(found.steps) and not check and not json
        if is_asked_for and not yes and not typer.confirm("Do this?"):
            raise typer.Exit(1)
        done = 0
        if not check and (yes or is_asked_for):
            for step in found.steps:
                carry_out(client, step)
                done += 1
                if not json:
                    console.print(f"{step.action} {step.topic}: done", highlight=False)
        if json:
            steps = [{"action": step.action, "topic": step.topic, "detail": step.detail} for step in found.steps]
            show_json({"steps": steps, "warnings": found.warnings, "violations": found.violations, "done": done})
        if check and (found.steps or found.violations):
            raise typer.Exit(1)


def _show(found: Plan) -> None:
    rows = [(step.action, step.topic, step.detail) for step in found.steps]
    if rows:
        show_table(("action", "topic", "detail"), rows)
    else:
        console.print("nothing to do: the topics are as declared", highlight=False)
    for warning in found.warnings:
        console.print(f"[yellow]warning[/] {warning}", highlight=False, soft_wrap=True)
    for violation in found.violations:
        console.print(f"[red]name[/] {violation}", highlight=False, soft_wrap=True)
    if any(step.action is Action.DELETE for step in found.steps):
        console.print("[red]topics are deleted with all their records[/]", highlight=False)
