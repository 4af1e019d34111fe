"""`headwater audit`: whether an audit topic is what was written, and where its chains end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.progress import Progress

from headwater.cli.output import (
    DEFAULT_SERVERS,
    Json,
    Servers,
    UserError,
    admin,
    console,
    explained,
    settings_for,
    show_json,
    show_rows,
)
from headwater.kafka.consumer import ConsumerFailed, Message, headers_of
from headwater.kafka.reader import offset_of, place_of, read_all
from headwater.trust.verifier import Events, Finding, Verifier

app = typer.Typer(no_args_is_help=True, help="Audit topics: verify, head.")

MOST_SHOWN = 100

Topic = Annotated[str, typer.Argument(help="The audit topic.")]


class Head(msgspec.Struct, frozen=True):
    """The end of a chain."""

    partition: int
    sequence: int
    hash: str


@app.command()
def verify(
    topic: Topic,
    of: Annotated[
        list[str] | None,
        typer.Option("--of", help="A topic whose events must all be in it, as they are; several times."),
    ] = None,
    head: Annotated[
        Path | None,
        typer.Option("--head", help="What `audit head --json` printed before: the chains must go through it."),
    ] = None,
    servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Read the chains from their beginning. Exit code 1 when a record was changed, removed, moved or put in."""
    with explained("audit verify"):
        verifiers = _verified(topic, servers, _heads(head), quiet=json)
        findings = [finding for each in verifiers for finding in each.findings]
        events = Events(verifiers)
        for source in of or ():
            _compare(source, events, findings, servers, quiet=json)
        counts = {
            "records": sum(each.records for each in verifiers),
            "spare": sum(each.spare for each in verifiers),
            "events": events.compared,
            "waiting": events.waiting,
            "before": events.before,
            "findings": len(findings),
        }
        if json:
            show_json({**counts, "found": [{**each._asdict(), "fault": each.fault.value} for each in findings]})
        else:
            shown = [(each.partition, each.offset, each.fault.value, each.detail) for each in findings[:MOST_SHOWN]]
            if shown:
                show_rows(("partition", "offset", "fault", "what"), shown, False, numbers=("partition", "offset"))
            if len(findings) > MOST_SHOWN:
                console.print(f"... and {len(findings) - MOST_SHOWN} more")
            for verifier in verifiers:
                if verifier.first > 1:
                    console.print(
                        f"partition {verifier.partition} begins at record {verifier.first}: what was before is gone",
                        highlight=False,
                    )
            console.print(_summary(topic, counts), highlight=False)
        if findings:
            raise typer.Exit(1)


def _summary(topic: str, counts: dict[str, int]) -> str:
    parts = [f"{topic}: {counts['records']} records"]
    if counts["spare"]:
        parts.append(f"{counts['spare']} copies too many, of a writer that was suspended")
    if counts["events"]:
        parts.append(f"{counts['events']} events compared")
    if counts["waiting"]:
        parts.append(f"{counts['waiting']} newer than the audit")
    if counts["before"]:
        parts.append(f"{counts['before']} older than what is left of it")
    return ", ".join([*parts, f"{counts['findings']} findings" if counts["findings"] else "nothing is wrong"])


@app.command("head")
def show_head(topic: Topic, servers: Servers = DEFAULT_SERVERS, json: Json = False) -> None:
    """Where the chains end, once they are verified. Kept elsewhere, it shows later that nothing was cut off."""
    with explained("audit head"):
        verifiers = _verified(topic, servers, [], quiet=json)
        if any(each.findings for each in verifiers):
            raise UserError(f"{topic} is not what was written: `headwater audit verify {topic}` says where.")
        show_rows(
            ("partition", "sequence", "hash"), [(each.partition, each.sequence, each.hash) for each in verifiers], json
        )


def _verified(topic: str, servers: str, heads: list[Head], *, quiet: bool) -> list[Verifier]:
    """Raises UserError, AdminError."""
    client = admin(servers)
    count = client.partition_counts().get(topic)
    if count is None:
        raise UserError(f"there is no topic {topic}.")
    starts = client.start_offsets([(topic, i) for i in range(count)])
    verifiers = [Verifier(topic, i, is_whole=starts[topic, i] == 0) for i in range(count)]
    for each in heads:
        if not 0 <= each.partition < count:
            raise UserError(f"{topic} has no partition {each.partition}, of which the head was kept.")
        if each.sequence:
            verifiers[each.partition].expect(each.sequence, each.hash)
    for record in _records(topic, servers, quiet=quiet):
        verifiers[place_of(record)[1]].feed(offset_of(record), record.key(), record.value(), headers_of(record))
    strange = sum(len(each.findings) for each in verifiers)
    if strange and not heads and not any(each.records for each in verifiers):
        raise UserError(f"{topic} is no audit topic: none of its {strange} records is an audit record.")
    for verifier in verifiers:
        verifier.end()
    return verifiers


def _compare(source: str, events: Events, findings: list[Finding], servers: str, *, quiet: bool) -> None:
    if source not in admin(servers).partition_counts():
        raise UserError(f"there is no topic {source}.")
    (described,) = admin(servers).describe_topics([source])
    for record in _records(source, servers, quiet=quiet):
        place = (source, described.topic_id, place_of(record)[1])
        found = events.judge(place, offset_of(record), record.key(), record.value(), headers_of(record))
        if found is not None:
            findings.append(found)


def _records(topic: str, servers: str, *, quiet: bool) -> Iterator[Message]:
    """All that it has now. Raises UserError, AdminError."""
    with Progress(console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task(topic, total=None)
        try:
            yield from read_all(
                settings_for(servers), admin(servers), [topic],
                lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
        except ConsumerFailed as error:
            raise UserError(str(error)) from None


def _heads(path: Path | None) -> list[Head]:
    """Raises UserError."""
    if path is None:
        return []
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Head])
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(f"{path} is not what `headwater audit head --json` prints: {error}") from None
