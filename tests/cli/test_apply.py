"""`headwater apply`: topics as code. On both engines."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headwater import Event, Topic
from headwater.event.topic import InvalidTopic
from headwater.kafka.admin import KafkaAdmin
from headwater.operations.apply import (
    Declaration,
    DeclaredTopic,
    FoundTopic,
    InvalidDeclaration,
    joined,
    plan,
    read_declaration,
)
from headwater.settings import Settings
from tests.conftest import Engine
from tests.kit.commands import commands


class Booked(Event):
    practitioner_id: str


APP = """
from headwater import App, Event, Topic

class Booked(Event):
    practitioner_id: str

topic = Topic("{name}.events.bookings", key="practitioner_id", events=[Booked], partitions=6, retention="7d")
app = App("booking")

@app.handler(topic, group="{name}-search")
async def index(event: Booked) -> None: ...
"""


def apply(engine: Engine, *arguments: str) -> tuple[int, Any]:
    result = CliRunner().invoke(
        commands, ["apply", *arguments, "--json", "--bootstrap-servers", engine.bootstrap_servers]
    )
    return result.exit_code, json.loads(result.output) if result.output.startswith("{") else result.output


def test_topics_become_what_is_declared(
    engine: Engine, unique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S000.7: the plan, then the topics; afterwards nothing is to do; what is not declared is left alone. (both engines)"""
    module = f"app_{unique}"
    (tmp_path / f"{module}.py").write_text(APP.format(name=unique))
    (tmp_path / "topics.toml").write_text(
        f'delete = ["{unique}-old"]\n'
        f'[topics."{unique}-events"]\npartitions = 3\nclass = "events"\n'
        f'[topics."{unique}-events".configs]\n"max.message.bytes" = 2000000\n'
    )
    monkeypatch.chdir(tmp_path)
    admin = KafkaAdmin(Settings(engine.bootstrap_servers))
    admin.create_topic(f"{unique}-old", 1)
    admin.create_topic(f"{unique}-kept", 1)
    admin.create_topic(f"{unique}-events", 2, configs={"retention.ms": "1000", "segment.ms": "60000"})
    arguments = (f"{module}:app", "--file", "topics.toml")

    code, planned = apply(engine, *arguments, "--check")
    assert code == 1
    assert {(step["action"], step["topic"]) for step in planned["steps"]} == {
        ("create", f"{unique}.events.bookings"),
        ("create", f"{unique}.events.bookings.{unique}-search.retry"),
        ("create", f"{unique}.events.bookings.{unique}-search.dead"),
        ("grow", f"{unique}-events"),
        ("configure", f"{unique}-events"),
        ("delete", f"{unique}-old"),
    }
    assert f"{unique}.events.bookings" not in admin.topic_names(), "a check changes nothing"

    code, done = apply(engine, *arguments, "--yes")
    assert (code, done["done"]) == (0, 6)
    counts = admin.partition_counts()
    assert (counts[f"{unique}.events.bookings"], counts[f"{unique}-events"]) == (6, 3)
    configs = admin.topic_configs(f"{unique}-events")
    assert {name: configs[name].value for name in ("retention.ms", "max.message.bytes", "segment.ms")} == {
        "retention.ms": str(7 * 86_400_000), "max.message.bytes": "2000000", "segment.ms": "60000",
    }  # fmt: skip
    assert f"{unique}-old" not in admin.topic_names()
    assert f"{unique}-kept" in admin.topic_names()
    code, after = apply(engine, *arguments, "--check")
    assert (code, after["steps"], after["violations"]) == (0, [], [])


def test_without_a_yes_nothing_is_done(embedded: Engine, unique: str, tmp_path: Path) -> None:
    """The plan is shown, and asked about."""
    path = tmp_path / "t.toml"
    path.write_text(f'[topics."{unique}"]\npartitions = 1\n')
    command = ["apply", "--file", str(path), "--bootstrap-servers", embedded.bootstrap_servers]
    refused = CliRunner().invoke(commands, command, input="n\n")
    assert refused.exit_code == 1
    assert "create" in refused.output
    assert unique not in KafkaAdmin(Settings(embedded.bootstrap_servers)).topic_names()
    assert CliRunner().invoke(commands, command, input="y\n").exit_code == 0
    assert unique in KafkaAdmin(Settings(embedded.bootstrap_servers)).topic_names()


def test_names_off_the_pattern_fail_the_check(embedded: Engine, unique: str, tmp_path: Path) -> None:
    """S003-1.12: each of them named; Kafka's own topics, ours and the exempt ones are none."""
    admin = KafkaAdmin(Settings(embedded.bootstrap_servers))
    for name in (f"{unique}BAD", f"{unique}-inventory-events", f"{unique}.events.x.g.retry", f"{unique}.commands.go"):
        admin.create_topic(name, 1)
    path = tmp_path / "t.toml"
    path.write_text(f"pattern = '[a-z0-9]+\\.(events|commands)\\.[a-z-]+'\nexempt = [\"{unique}-inventory-events\"]\n")
    code, found = apply(embedded, "--file", str(path), "--check")
    assert code == 1
    assert [each.split()[0] for each in found["violations"] if each.startswith(unique)] == [f"{unique}BAD"]


def test_replication_is_warned_about() -> None:
    """S002.18: one replica goes with its broker, more than three cost and gain little; two and three are fine."""
    for replication, words in ((1, "goes with its broker"), (2, None), (3, None), (4, "little is gained")):
        found = plan(Declaration((DeclaredTopic("t", 1, replication),)), {}).warnings
        assert len(found) == (words is not None)
        assert words is None or words in found[0]


def test_what_can_not_be_changed_is_said() -> None:
    declared = Declaration((DeclaredTopic("t", 3, 3),))
    found = plan(declared, {"t": FoundTopic(6, 2, {})})
    assert found.steps == []
    assert ["can't have fewer" in found.warnings[0], "kafka-reassign-partitions" in found.warnings[1]] == [True, True]


def test_a_class_keeps_what_it_must(tmp_path: Path) -> None:
    """S002.19: events 7 days, raw 30, audit 90 at least, in code and in files."""
    for class_, least in (("events", 7), ("raw", 30), ("audit", 90)):
        topic = Topic("t", key="practitioner_id", events=[Booked], class_=class_)
        assert topic.configs["retention.ms"] == str(least * 86_400_000)
    Topic("t", key="practitioner_id", events=[Booked], class_="audit", retention="7y")
    with pytest.raises(InvalidTopic, match="kept for 30d, and its class audit for at least 90d"):
        Topic("t", key="practitioner_id", events=[Booked], class_="audit", retention="30d")
    with pytest.raises(InvalidTopic, match="events, raw, audit"):
        Topic("t", key="practitioner_id", events=[Booked], class_="gold")
    path = tmp_path / "t.toml"
    path.write_text('[topics.t]\nclass = "audit"\nretention = "30d"\n')
    with pytest.raises(InvalidDeclaration, match="at least 90d"):
        read_declaration(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("topics = 1", "Expected `object`, got `int` - at `$.topics`"),
        ('[topics.t]\npartition = 3', "unknown field `partition`"),
        ("[topics.t", "no TOML"),
        ("pattern = '('", "missing )"),
        ('[topics.t]\nretention = "soon"', "'soon' is no duration"),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """With the place."""
    path = tmp_path / "t.toml"
    path.write_text(text)
    with pytest.raises(InvalidDeclaration, match=re.escape(said)):
        read_declaration(path)


def test_declarations_that_disagree_are_refused() -> None:
    one, other = DeclaredTopic("t", 3, source="a:app"), DeclaredTopic("t", 4, source="b:app")
    with pytest.raises(InvalidDeclaration, match="differently by a:app and by b:app"):
        joined([Declaration((one,)), Declaration((other,))])
    with pytest.raises(InvalidDeclaration, match="declared, and to be deleted"):
        joined([Declaration((one,), delete=("t",))])
    with pytest.raises(InvalidDeclaration, match="two patterns: a and b"):
        joined([Declaration((), pattern="a"), Declaration((), pattern="b"), Declaration((), pattern="a")])


def test_what_a_topic_says_counts_more_than_the_defaults(tmp_path: Path) -> None:
    """Whichever way it says it: a file's defaults must not shorten what a topic keeps."""
    path = tmp_path / "t.toml"
    path.write_text(
        """
        [defaults]
        retention = "7d"
        compacted = true
        [topics.plain]
        [topics.ledger.configs]
        "retention.ms" = "-1"
        "cleanup.policy" = "compact,delete"
        [topics.log]
        compacted = false
        retention = "1y"
        """
    )
    found = {topic.name: dict(topic.configs) for topic in read_declaration(path).topics}
    assert found == {
        "plain": {"retention.ms": "604800000", "cleanup.policy": "compact"},
        "ledger": {"retention.ms": "-1", "cleanup.policy": "compact,delete"},
        "log": {"retention.ms": "31536000000", "cleanup.policy": "delete"},
    }
    for twice in ('retention = "1d"\n[topics.t.configs]\n"retention.ms" = 5',
                  'compacted = true\n[topics.t.configs]\n"cleanup.policy" = "delete"'):  # fmt: skip
        path.write_text(f"[topics.t]\n{twice}\n")
        with pytest.raises(InvalidDeclaration, match="t says twice"):
            read_declaration(path)
