"""Lag for Prometheus, under the names that dashboards and alarms know.

`kafka_consumergroup_*` and `kafka_partition_*` are kafka-lag-exporter's, `burrow_*` are Burrow's, `kafka_topic_partition_*` are
kafka_exporter's; names and labels are theirs.
"""

import math
from collections.abc import Iterable, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from headwater.kafka.admin import TopicDescription
from headwater.operations.lag import GroupLag, PartitionLag

CLUSTER = ["cluster_name"]
PARTITION = [*CLUSTER, "topic", "partition"]
GROUP = [*CLUSTER, "group"]
GROUP_TOPIC = [*GROUP, "topic"]
GROUP_PARTITION = [*GROUP_TOPIC, "partition", "member_host", "consumer_id", "client_id"]
BURROW_GROUP = ["cluster", "consumer_group"]
BURROW_PARTITION = [*BURROW_GROUP, "topic", "partition"]
TOPIC_PARTITION = ["topic", "partition"]


class LagCollector(Collector):
    """What the last look found; nothing after one that failed: stale figures look like good ones."""

    def __init__(self, cluster: str) -> None:
        """cluster: how it is called in the labels."""
        self._cluster = cluster
        self._groups: Sequence[GroupLag] = ()
        self._topics: Sequence[TopicDescription] = ()
        self._poll_ms = math.nan

    def found(self, groups: Sequence[GroupLag], topics: Sequence[TopicDescription], poll_ms: float) -> None:
        self._groups, self._topics, self._poll_ms = groups, topics, poll_ms

    def failed(self) -> None:
        self.found((), (), math.nan)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        yield from self._of_lag_exporter()
        yield from self._of_burrow()
        yield from self._of_topics()

    def _of_lag_exporter(self) -> Iterable[GaugeMetricFamily]:
        latest = GaugeMetricFamily("kafka_partition_latest_offset", "Latest offset of a partition", labels=PARTITION)
        earliest = GaugeMetricFamily("kafka_partition_earliest_offset", "Its first offset", labels=PARTITION)
        for (topic, partition), row in self._places().items():
            latest.add_metric([self._cluster, topic, str(partition)], row.end)
            earliest.add_metric([self._cluster, topic, str(partition)], row.start)
        yield from (latest, earliest)
        offset = GaugeMetricFamily("kafka_consumergroup_group_offset", "Committed offset", labels=GROUP_PARTITION)
        lag = GaugeMetricFamily("kafka_consumergroup_group_lag", "Lag in records", labels=GROUP_PARTITION)
        seconds = GaugeMetricFamily("kafka_consumergroup_group_lag_seconds", "Lag in seconds", labels=GROUP_PARTITION)
        most = GaugeMetricFamily("kafka_consumergroup_group_max_lag", "Most lag of a partition", labels=GROUP)
        longest = GaugeMetricFamily("kafka_consumergroup_group_max_lag_seconds", "The same, in seconds", labels=GROUP)
        total = GaugeMetricFamily("kafka_consumergroup_group_sum_lag", "Lag of all partitions", labels=GROUP)
        by_topic = GaugeMetricFamily("kafka_consumergroup_group_topic_sum_lag", "Lag by topic", labels=GROUP_TOPIC)
        for group in self._groups:
            name = [self._cluster, group.group]
            topics: dict[str, int] = {}
            for row in group.partitions:
                labels = [*name, row.topic, str(row.partition), row.host, row.member_id, row.client_id]
                if row.committed is not None:
                    offset.add_metric(labels, row.committed)
                lag.add_metric(labels, row.lag)
                seconds.add_metric(labels, math.nan if row.seconds is None else row.seconds)
                topics[row.topic] = topics.get(row.topic, 0) + row.lag
            most.add_metric(name, max((row.lag for row in group.partitions), default=0))
            longest.add_metric(name, math.nan if group.seconds is None else group.seconds)
            total.add_metric(name, group.lag)
            for topic, sum_ in topics.items():
                by_topic.add_metric([*name, topic], sum_)
        yield from (offset, lag, seconds, most, longest, total, by_topic)
        took = GaugeMetricFamily("kafka_consumergroup_poll_time_ms", "How long the last look took", labels=CLUSTER)
        took.add_metric([self._cluster], self._poll_ms)
        yield took

    def _of_burrow(self) -> Iterable[GaugeMetricFamily]:
        status = GaugeMetricFamily(
            "burrow_kafka_consumer_status", "Of a group: 1 OK, 2 WARN, 3 ERR", labels=BURROW_GROUP
        )
        total = GaugeMetricFamily("burrow_kafka_consumer_lag_total", "Lag of all partitions", labels=BURROW_GROUP)
        offset = GaugeMetricFamily("burrow_kafka_consumer_current_offset", "Committed offset", labels=BURROW_PARTITION)
        lag = GaugeMetricFamily("burrow_kafka_consumer_partition_lag", "Lag in records", labels=BURROW_PARTITION)
        partition_status = GaugeMetricFamily(
            "burrow_kafka_topic_partition_status", "1 OK, 2 WARN, 4 STOP, 5 STALL, 6 REWIND", labels=BURROW_PARTITION
        )
        for group in self._groups:
            name = [self._cluster, group.group]
            total.add_metric(name, group.lag)
            if group.verdict is not None:
                status.add_metric(name, group.verdict.code)
            for row in group.partitions:
                labels = [*name, row.topic, str(row.partition)]
                if row.committed is not None:
                    offset.add_metric(labels, row.committed)
                lag.add_metric(labels, row.lag)
                if row.verdict is not None:
                    partition_status.add_metric(labels, row.verdict.code)
        yield from (status, total, offset, lag, partition_status)
        ends = GaugeMetricFamily(
            "burrow_kafka_topic_partition_offset", "Latest offset", labels=["cluster", "topic", "partition"]
        )
        for (topic, partition), row in self._places().items():
            ends.add_metric([self._cluster, topic, str(partition)], row.end)
        yield ends

    def _of_topics(self) -> Iterable[GaugeMetricFamily]:
        replicas = GaugeMetricFamily("kafka_topic_partition_replicas", "Replicas", labels=TOPIC_PARTITION)
        in_sync = GaugeMetricFamily("kafka_topic_partition_in_sync_replica", "Those in sync", labels=TOPIC_PARTITION)
        under = GaugeMetricFamily(
            "kafka_topic_partition_under_replicated_partition", "1 if some are not", labels=TOPIC_PARTITION
        )
        for topic in self._topics:
            for each in topic.partitions:
                labels = [topic.name, str(each.partition)]
                replicas.add_metric(labels, len(each.replicas))
                in_sync.add_metric(labels, len(each.in_sync_replicas))
                under.add_metric(labels, int(len(each.in_sync_replicas) < len(each.replicas)))
        yield from (replicas, in_sync, under)

    def _places(self) -> dict[tuple[str, int], PartitionLag]:
        return {(row.topic, row.partition): row for group in self._groups for row in group.partitions}
