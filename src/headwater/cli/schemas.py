"""`headwater schemas`: what a registry has, and whether a schema may follow; for people and for CI jobs."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from headwater.cli.application import Target, loaded
from headwater.cli.output import Json, UserError, console, explained, show_json, show_rows
from headwater.kafka.registry_client import Refused, RegistryClient, RegistryUnreachable
from headwater.runtime.schemas import UnusableSchema, schemas_of
from headwater.schema.schema import SchemaType
from headwater.settings import DEFAULT_REGISTRY_URL as DEFAULT_REGISTRY

app = typer.Typer(no_args_is_help=True, help="Schemas: list, show, check, register.")

TYPES = {".avsc": "AVRO", ".avro": "AVRO", ".json": "JSON", ".proto": "PROTOBUF"}
SUFFIXES = {SchemaType.AVRO: ".avsc", SchemaType.JSON: ".json", SchemaType.PROTOBUF: ".proto"}
UNKNOWN = (40401, 40402)

Registry = Annotated[
    str, typer.Option("--registry", metavar="URL", envvar="HEADWATER_REGISTRY_URL", help="Address of the registry.")
]
Subject = Annotated[str, typer.Argument(help="The subject, as in orders-value.")]
File = Annotated[Path, typer.Argument(help="The schema: .avsc, .json or .proto.")]
Type = Annotated[str | None, typer.Option("--type", help="AVRO, JSON or PROTOBUF, if the file's name doesn't say it.")]


@app.command("list")
def list_subjects(registry: Registry = DEFAULT_REGISTRY, json: Json = False) -> None:
    """All subjects, with their latest version, type and level."""
    with explained("schemas list"), _told():
        client = RegistryClient(registry)
        rows = []
        for subject in client.subjects():
            latest = client.version(subject, "latest")
            kind = latest.get("schemaType", "AVRO")
            rows.append((subject, latest["version"], latest["id"], kind, client.level(subject)))
        columns = ("subject", "version", "id", "type", "level")
        show_rows(columns, rows, json, numbers=("version", "id"), empty="no subjects")


@app.command()
def show(
    subject: Subject,
    version: Annotated[str, typer.Option(help="A number, or latest.")] = "latest",
    registry: Registry = DEFAULT_REGISTRY,
    json: Json = False,
) -> None:
    """A version's schema."""
    with explained("schemas show"), _told():
        found = RegistryClient(registry).version(subject, version)
        show_json(found) if json else print(found["schema"])


@app.command()
def check(
    subject: Subject, file: File, kind: Type = None, registry: Registry = DEFAULT_REGISTRY, json: Json = False
) -> None:
    """Whether the schema may follow what the subject has, by the subject's level. Exit code 1 if not, with what stands
    against it; for a CI job, before anything is deployed."""
    with explained("schemas check"), _told():
        client = RegistryClient(registry)
        text, name = _read(file), _type_of(file, kind)
        messages = client.check(subject, text, name)
        level = client.level(subject)
        versions = _versions(client, subject)
        if json:
            answer = {"subject": subject, "compatible": not messages, "level": level, "messages": messages}
            show_json(answer)
        elif messages:
            messages = [each for each in messages if each.startswith("{errorType") or not each.startswith("{")]
            console.print(f"{file} can't follow version {versions[-1]} of {subject} ({level}):", highlight=False)
            for message in messages:
                console.print(f"  {_words_of(message)}", markup=False, highlight=False, soft_wrap=True)
        elif versions:
            console.print(f"{file} may follow version {versions[-1]} of {subject} ({level})", highlight=False)
        else:
            console.print(f"{subject} is new: {file} may be its first version ({level})", highlight=False)
        if messages:
            raise typer.Exit(1)


@app.command()
def register(
    subject: Subject, file: File, kind: Type = None, registry: Registry = DEFAULT_REGISTRY, json: Json = False
) -> None:
    """Make the schema the subject's next version, unless it has it already."""
    with explained("schemas register"), _told():
        id = RegistryClient(registry).register(subject, _read(file), _type_of(file, kind))
        show_json({"subject": subject, "id": id}) if json else console.print(f"{subject}: id {id}", highlight=False)


@app.command()
def export(
    target: Target,
    folder: Annotated[Path, typer.Argument(help="Where a file for each event goes: SUBJECT.avsc, .json or .proto.")],
    json: Json = False,
) -> None:
    """Write the schemas of an application's events, for `check` and `register`, or to look at."""
    with explained("schemas export"):
        try:
            schemas = schemas_of(loaded(target).topics)
        except UnusableSchema as error:
            raise UserError(str(error)) from None
        if not schemas:
            raise UserError(f"{target} has no topic with a schema: Topic(..., schema='avro').")
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for each in schemas:
            path = folder / f"{each.subject}{SUFFIXES[each.type]}"
            path.write_text(each.text + ("" if each.text.endswith("\n") else "\n"))
            written.append((each.subject, each.type, str(path)))
        show_rows(("subject", "type", "file"), written, json, empty="")


@contextmanager
def _told() -> Iterator[None]:
    """What the registry answers is for people. Raises UserError."""
    try:
        yield
    except (Refused, RegistryUnreachable) as error:
        raise UserError(str(error)) from None


def _versions(client: RegistryClient, subject: str) -> list[int]:
    """None of a subject that isn't known."""
    try:
        return client.versions(subject)
    except Refused as error:
        if error.code not in UNKNOWN:
            raise
        return []


def _words_of(message: str) -> str:
    """The sentence in a registry's message."""
    found = re.fullmatch(r"\{errorType:'(\w+)', description:'(.*)', additionalInfo:'.*'\}", message, re.DOTALL)
    return f"{found[2]}  ({found[1]})" if found else message


def _read(file: Path) -> str:
    """Raises UserError."""
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} can't be read: {error}") from None


def _type_of(file: Path, kind: str | None) -> str:
    """Raises UserError."""
    found = kind.upper() if kind is not None else TYPES.get(file.suffix)
    if found not in TYPES.values():
        raise UserError(f"{kind or file} says no type: give --type AVRO, JSON or PROTOBUF.")
    return str(found)
