"""`headwater lag`: how far all groups are behind, whether they keep up; watched, with alarms and for Prometheus."""

import json as json_library
import logging
import signal
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headwater.cli.output import (
    DEFAULT_SERVERS,
    Json,
    Servers,
    UserError,
    admin,
    console,
    errors,
    explained,
    is_terminal,
    settings_for,
    show_json,
)
from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.operations.lag import WINDOW, GroupLag, LagWatch, PartitionLag
from headwater.operations.verdict import Verdict
from headwater.runtime.alert import Alerts
from headwater.settings import Settings, duration_seconds

if TYPE_CHECKING:
    from headwater.operations.lag_metrics import LagCollector

ALERT = "lag"
LEAST_SECONDS = 0.1  # between looks, however long one takes
COLOURS = {Verdict.OK: "green", Verdict.WARN: "yellow"}
COLUMNS = ("group", "state", "members", "partitions", "lag", "behind", "verdict")


def lag(
    group: Annotated[list[str] | None, typer.Option(help="Only this group; repeatable.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help=f"Look again and again; verdicts come after {WINDOW} looks.")
    ] = False,
    every: Annotated[str, typer.Option(help="Between looks, as in 10s.")] = "10s",
    allowed: Annotated[int, typer.Option(min=0, help="Records behind that are always OK.")] = 0,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve Prometheus here, while watching; port 0 takes a free one."),
    ] = None,
    cluster: Annotated[str, typer.Option(help="How the cluster is called in the metrics.")] = "default",
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """How far groups are behind, in records and in seconds. Watched: whether they keep up, by Burrow's rules."""
    with explained("lag"):
        seconds = duration_seconds(every)
        client = admin(bootstrap_servers)
        missing = set(group or ()) - set(client.group_states())
        is_watch = watch or metrics is not None
        if missing and not is_watch:
            raise UserError(f"there is no group {min(missing)}. `headwater groups list` shows those that are.")
        settings = settings_for(bootstrap_servers)
        looks = LagWatch(settings, groups=group or (), allowed_lag=allowed)
        try:
            if is_watch:
                _watch(looks, client, settings, seconds, metrics, cluster, json=json)
                return
            found = looks.look()
        finally:
            looks.close()
        if json:
            show_json([_as_json(each) for each in found])
        else:
            console.print(_table(found))


def _watch(
    looks: LagWatch,
    client: KafkaAdmin,
    settings: Settings,
    seconds: float,
    metrics: str | None,
    cluster: str,
    *,
    json: bool,
) -> None:
    """Until SIGTERM or Ctrl-C. Raises UserError."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    alerts = Alerts(settings.alert_webhook, "headwater lag")
    collector = _serve(metrics, cluster) if metrics is not None else None
    live = Live(console=console, auto_refresh=False) if is_terminal() and not json else None
    told: dict[str, Verdict | None] = {}
    trouble = ""
    logging.getLogger("headwater").setLevel(logging.ERROR)  # what alarms is shown anyway
    try:
        if live is not None:
            live.start()
        while not stopped.is_set():
            began = time.monotonic()
            try:
                found = looks.look()
                if collector is not None:
                    topics = client.describe_topics(client.topic_names())
                    collector.found(found, topics, (time.monotonic() - began) * 1000)
            except AdminError as error:
                if str(error) != trouble:  # once, and not at each look
                    trouble = str(error)
                    errors.print(f"headwater lag: {error}", markup=False, highlight=False, soft_wrap=True)
                if collector is not None:
                    collector.failed()
            else:
                trouble = ""
                _tell(alerts, found)
                if json:
                    print(json_library.dumps([_as_json(each) for each in found]), flush=True)
                elif live is not None:
                    live.update(_table(found), refresh=True)
                else:
                    _say_changes(found, told)
            stopped.wait(max(LEAST_SECONDS, seconds - (time.monotonic() - began)))
    finally:
        if live is not None:
            live.stop()
        alerts.close()


def _serve(address: str, cluster: str) -> "LagCollector":
    """Raises UserError."""
    try:
        from prometheus_client import CollectorRegistry, start_http_server

        from headwater.operations.lag_metrics import LagCollector
    except ImportError:
        raise UserError("--metrics needs prometheus-client: pip install 'headwater[metrics]'.") from None
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"--metrics takes HOST:PORT, not {address!r}.")
    collector = LagCollector(cluster)
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, _ = start_http_server(int(port), host, registry)
    except OSError as error:
        raise UserError(f"{address} can't be listened on: {error.strerror}.") from None
    errors.print(f"metrics http://{host}:{server.server_port}/metrics", highlight=False)
    return collector


def _tell(alerts: Alerts, found: Sequence[GroupLag]) -> None:
    """The webhook, of groups that don't keep up, and of those that do again."""
    for group in found:
        if group.verdict is Verdict.ERR:
            worst = [row for row in group.partitions if row.verdict is not None and row.verdict.code > Verdict.ERR.code]
            alerts.raised(ALERT, group.group, worst[0].topic, "; ".join(map(_partition_text, worst[:3])))
        elif group.verdict is Verdict.OK:
            alerts.recovered(ALERT, group.group, group.partitions[0].topic if group.partitions else "")


def _say_changes(found: Sequence[GroupLag], told: dict[str, Verdict | None]) -> None:
    """For a log: a line when a group's verdict is another one than before."""
    for group in found:
        if group.verdict is not told.get(group.group):
            told[group.group] = group.verdict
            bad = [row for row in group.partitions if row.verdict not in (None, Verdict.OK)]
            detail = "; ".join(map(_partition_text, bad[:3])) or f"lag {group.lag}"
            console.print(f"{group.group} {group.verdict}: {detail}", markup=False, highlight=False, soft_wrap=True)


def _partition_text(row: PartitionLag) -> str:
    behind = "" if row.seconds is None else f", {row.seconds:.0f} s"
    waiting = f", waits {row.waiting}" if row.waiting else ""
    return f"{row.topic}-{row.partition} {row.verdict}: {row.lag} behind{behind}{waiting}"


def _table(found: Sequence[GroupLag]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in COLUMNS[2:6] else "left", overflow="fold")
    for group in found:
        free = f" ({group.without_member} free)" if group.members and group.without_member else ""
        behind = "-" if group.seconds is None else f"{group.seconds:.0f} s"
        verdict = Text("-") if group.verdict is None else Text(group.verdict, COLOURS.get(group.verdict, "red"))
        table.add_row(
            group.group,
            group.state,
            str(group.members),
            f"{len(group.partitions)}{free}",
            str(group.lag),
            behind,
            verdict,
        )
        for row in group.partitions:
            if row.verdict not in (None, Verdict.OK) or row.waiting:
                table.add_row(f"  {row.topic}-{row.partition}", row.waiting or "", "", "", str(row.lag),
                              "-" if row.seconds is None else f"{row.seconds:.0f} s", str(row.verdict or ""))  # fmt: skip
    if not found:
        table.add_row("no groups")
    return table


def _as_json(group: GroupLag) -> dict[str, object]:
    return {**msgspec.to_builtins(group), "lag": group.lag, "seconds": group.seconds}
