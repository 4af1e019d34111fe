"""What three clients rely on, on both engines: produce, fetch, offsets, groups."""

import pytest

from tests.conftest import Engine
from tests.kit.clients import CLIENTS, Client, Sent

ALL = [pytest.param(client, id=client.name) for client in CLIENTS]
CODECS = [pytest.param(client, codec, id=f"{client.name}-{codec}") for client in CLIENTS for codec in client.codecs]


@pytest.mark.parametrize(("client", "codec"), CODECS)
def test_what_was_produced_is_consumed_unchanged(engine: Engine, unique: str, client: Client, codec: str) -> None:
    """Keys, values, headers, nulls and their order survive, with every compression that the client has."""
    records = [Sent(f"k{i % 3}".encode(), b"v%d" % i * 50, (("h", b"%d" % i), ("empty", b""))) for i in range(200)]
    records.append(Sent(b"tombstone", None))
    records.append(Sent(None, b"no key"))
    places = client.produce(engine.bootstrap_servers, unique, records, codec=codec)

    found = client.consume(engine.bootstrap_servers, unique, len(records))

    by_place = {(received.partition, received.offset): received for received in found}
    assert len(by_place) == len(records)
    for record, place in zip(records, places, strict=True):
        assert by_place[place][2:] == tuple(record)


@pytest.mark.parametrize("client", ALL)
def test_offsets_are_dense_and_ascend_in_the_order_of_sending(engine: Engine, unique: str, client: Client) -> None:
    """One producer's records get the offsets 0, 1, 2, ... of their partition."""
    places = client.produce(engine.bootstrap_servers, unique, [Sent(b"k", b"%d" % i) for i in range(500)])

    assert [offset for _, offset in places] == list(range(500))


@pytest.mark.parametrize("producing", ALL)
@pytest.mark.parametrize("consuming", ALL)
def test_each_client_reads_what_each_other_wrote(
    engine: Engine, unique: str, producing: Client, consuming: Client
) -> None:
    """The log is one for all clients."""
    records = [Sent(b"k", b"%d" % i) for i in range(20)]
    producing.produce(engine.bootstrap_servers, unique, records)

    found = consuming.consume(engine.bootstrap_servers, unique, 20)

    assert [received.value for received in found] == [record.value for record in records]


@pytest.mark.parametrize("client", ALL)
def test_a_group_goes_on_where_it_committed(engine: Engine, unique: str, client: Client) -> None:
    """S004.1: a group's committed offset is where its next member begins. (both engines)"""
    servers = engine.bootstrap_servers
    client.produce(servers, unique, [Sent(b"k", b"%d" % i) for i in range(10)])
    first = client.consume(servers, unique, 10, group=unique)
    client.produce(servers, unique, [Sent(b"k", b"%d" % i) for i in range(10, 15)])

    second = client.consume(servers, unique, 5, group=unique)

    assert [received.offset for received in first] == list(range(10))
    assert [received.value for received in second] == [b"%d" % i for i in range(10, 15)]


@pytest.mark.parametrize("client", ALL)
def test_groups_are_independent(engine: Engine, unique: str, client: Client) -> None:
    """S002.10: each group reads everything, whatever another one has read. (both engines)"""
    servers = engine.bootstrap_servers
    client.produce(servers, unique, [Sent(b"k", b"%d" % i) for i in range(10)])

    one = client.consume(servers, unique, 10, group=f"{unique}-1")
    other = client.consume(servers, unique, 10, group=f"{unique}-2")

    assert one == other
