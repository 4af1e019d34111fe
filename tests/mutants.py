"""`make mutants`: each promise is broken in one line, and the test that proves it must fail.

A mutant that survives means a promise without a proof. Each runs in a copy of the tree.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).parent.parent
SECONDS = 240


class Mutant(NamedTuple):
    promise: str
    path: str
    old: str
    new: str
    test: str


LOG = "src/headwater/broker/log/"
BROKER = "src/headwater/broker/"
RUNTIME = "src/headwater/runtime/"
STORE = "src/headwater/store/"
POWER_CUT = "tests/log/test_power_cut.py::test_nothing_acknowledged_is_missing_after_a_power_cut"

MUTANTS = [
    Mutant("acknowledged means synced", LOG + "flush.py", "        file.sync()", "        pass", POWER_CUT),
    Mutant("the answer waits for the sync", BROKER + "partition.py",
           "return not self.config.syncs_every_batch or self.log.recovery_point >= end_offset", "return True", POWER_CUT),
    Mutant("a rolled segment's name is synced", LOG + "partition_log.py",
           "        self._unsynced_names = True\n\n    def write_snapshot", "\n    def write_snapshot", POWER_CUT),
    Mutant("nobody reads what is not synced", BROKER + "partition.py",
           "        if config.flush_messages == 1:\n            self._flusher.mark_dirty(log)",
           "        if config.flush_messages == 1:\n            self._flusher.mark_dirty(log)\n            self._raise_high_watermark(log.end)",
           POWER_CUT),
    Mutant("a torn tail is cut", LOG + "recovery.py", "            if not is_intact(chunk, at, header):\n                return", "",
           "tests/log/test_recovery.py"),
    Mutant("what a crash left is synced before it counts", BROKER + "node.py",
           "            if config.syncs_every_batch and log.is_dirty:", "            if False:", "tests/log/test_recovery.py"),
    Mutant("the leader epoch rises at an unclean start", LOG + "log_directory.py",
           "log.begin_epoch(log.epochs.latest + 1)", "pass",
           "tests/log/test_power_cut.py::test_the_leader_epoch_rises_at_an_unclean_start"),
    Mutant("a failed sync ends the process", LOG + "flush.py", "            die(error)\n        self._mean", "            pass\n        self._mean",
           "tests/log/test_power_cut.py::test_a_failed_sync_ends_the_process"),
    Mutant("a rebuild is never behind what it replaces", "src/headwater/domain/rebuild.py", "            if behind and not waits_for_us:\n                return behind", "            behind = {}",
           "tests/domain/test_projection.py::test_a_rebuild_beside_the_live_one_is_never_behind_it[embedded-sqlite]"),
    Mutant("tables are had before rows are read for them", "src/headwater/domain/rebuild.py", "            read_model.lock(connection, self._projection.tables)\n            if behind:\n                self._add(behind)\n                self._read_to(connection, reader, rows, behind, saves=False)\n",
           "            if behind:\n                self._add(behind)\n                self._read_to(connection, reader, rows, behind, saves=False)\n            read_model.lock(connection, self._projection.tables)\n",
           "tests/domain/test_projection.py::test_a_reader_that_holds_a_table_holds_up_the_exchange_and_loses_nothing"),
    Mutant("rows are saved with their progress", "src/headwater/domain/rebuild.py", "unsaved >= SAVE_EVENTS or rows.is_ahead", "False",
           "tests/domain/test_projection.py::test_a_rebuild_that_was_stopped_goes_on"),
    Mutant("a projection that was exchanged begins anew", "src/headwater/domain/projector.py", "if progress is None or progress.generation != self._generation:", "if progress is None:",
           "tests/domain/test_projection.py::test_the_old_version_writes_nothing_into_the_new_ones_rows"),
    Mutant("an event that was left out stays out", "src/headwater/domain/rebuild.py", "if (*place, offset) in self._skipped:", "if False:",
           "tests/domain/test_projection.py::test_an_event_that_fails_holds_up_its_partition_alone[embedded-sqlite]"),
    Mutant("an event that was published twice counts once", "src/headwater/domain/projection.py", "        if repeats.has(place_of(record), offset_of(record), envelope):\n            return\n", "",
           "tests/domain/test_projection.py::test_an_event_that_was_published_twice_counts_once[embedded-sqlite]"),
    Mutant("nothing overtakes a row that is refused", RUNTIME + "relay.py", "                    if under_way[-1].failures:\n                        break", "                    if False:\n                        break",
           "tests/store/test_outbox.py::test_nothing_overtakes_a_row_that_is_refused"),
    Mutant("what is under way is given up while the lock is held", RUNTIME + "relay.py", "            self._drop_producer(0.0)  # while nobody else can have the lock\n", "",
           "tests/store/test_outbox.py::test_nothing_overtakes_a_row_that_is_refused"),
    Mutant("rows under way are not read again", STORE + "outbox.py", "        if without:\n", "        if False:\n",
           "tests/store/test_outbox.py::test_rows_that_are_under_way_are_not_read_again"),
    Mutant("a new slot is whole when its rows are published", STORE + "replication.py", "            if self._settled < self._given:\n                return []", "            if False:\n                return []",
           "tests/store/test_outbox_tables.py::test_what_a_new_slot_and_the_table_both_have_is_published_once"),
    Mutant("retention's gap refuses a rebuild", "src/headwater/domain/rebuild.py", "        if not allow_gap:", "        if False:",
           "tests/domain/test_projection.py::test_what_retention_has_taken_is_not_passed_over[embedded-sqlite]"),
    Mutant("an audit goes on where its chain ends", "src/headwater/trust/auditor.py", "            self._read_tail(is_ours)\n", "",
           "tests/trust/test_audit.py::test_an_audit_that_lost_its_commits_reads_its_chain"),
    Mutant("an audit goes on past a gap when told", "src/headwater/trust/auditor.py", "if not position.metadata:", "if False:",
           "tests/trust/test_audit.py::test_what_retention_took_before_it_was_audited_is_passed_over_when_told[embedded]"),
    Mutant("a copy is no digest when its content is gone", "src/headwater/trust/verifier.py", "if is_copy else (key, value, list(own)) != (None, None, [])", "if is_copy and value else False",
           "tests/trust/test_audit.py::test_a_copy_that_was_taken_away_is_found"),
    Mutant("a range ends where it was said to", "src/headwater/kafka/reader.py", "                        if offset < end:\n", "                        if True:\n",
           "tests/client/test_reader.py::test_a_range_is_read_and_then_the_next[embedded]"),
    Mutant("an audit's verifier goes by the hash before", "src/headwater/trust/verifier.py", "if not hashes or hash_ in hashes:", "if sequence == wanted:",
           "tests/trust/test_audit.py::test_every_change_of_a_byte_is_found"),
    Mutant("a registry that was suspended asks who writes", "src/headwater/registry/leader.py",
           "return time.monotonic() - self._turned < UNSURE_SECONDS", "return True",
           "tests/registry/test_registry.py::test_a_registry_that_was_suspended_does_not_write_on_what_it_knew"),
    Mutant("an answer that was lost is no offset", "src/headwater/kafka/admin.py", "if answer.offset == OFFSET_INVALID:", "if False:",
           "tests/faults/test_retry_topic.py::test_an_end_that_is_not_known_is_never_taken_for_one"),
    Mutant("a missing schema is looked up, not given up on", "src/headwater/runtime/delivery.py",
           "            envelope = await self._decode_after(missing, event)\n        set_cause", "            raise Undecodable from missing\n        set_cause",
           "tests/runtime/test_schemas.py::test_events_with_schemas_are_handled"),
    Mutant("a registry that is away is an outage", RUNTIME + "retry.py", "(*self._unavailable, RegistryUnreachable)", "self._unavailable",
           "tests/runtime/test_schemas.py::test_a_registry_that_is_away_holds_up_only_what_it_must"),
    Mutant("a Protobuf field keeps its number", RUNTIME + "schemas.py", "if before.get(field, number) != number:", "if False:",
           "tests/runtime/test_schemas.py::test_a_protobuf_field_that_moves_is_refused_at_the_start"),
    Mutant("what a new slot's snapshot has is published from the table", STORE + "replication.py", "            self._recovery = self._recover(self._take_snapshot())", "            pass",
           "tests/store/test_outbox_tables.py::test_a_slot_that_was_lost_loses_nothing"),
    Mutant("what the snapshot has does not come twice", STORE + "replication.py", "self._snapshot.has(change.xid)", "False",
           "tests/store/test_outbox_tables.py::test_what_a_new_slot_and_the_table_both_have_is_published_once"),
    Mutant("one count of shards at a time", RUNTIME + "relay.py", "        if others:", "        if False:",
           "tests/store/test_outbox_tables.py::test_relays_that_count_shards_differently_do_not_work_at_once"),
    Mutant("a timer that fired is gone", STORE + "schedule.py", "(list(rows), delete(timers)),", "([], delete(timers)),",
           "tests/store/test_schedule.py::test_a_timer_survives_restarts_and_many_processes"),
    Mutant("a late answer is compensated", "src/headwater/domain/saga_decision.py", "    if record.status is Status.FAILED:\n        return _undo(saga, record, state, i, 1)",
           "    return None", "tests/domain/test_saga.py::test_in_the_end_all_is_done_or_nothing_is_left"),
    Mutant("a step without an answer is compensated", "src/headwater/domain/saga_decision.py", "range(record.step + 1)", "range(record.step)",
           "tests/domain/test_saga.py::test_in_the_end_all_is_done_or_nothing_is_left"),
    Mutant("a saga that changed meanwhile is noticed", "src/headwater/domain/saga.py", "columns.version == row.version)", "True)",
           "tests/domain/test_saga.py::test_other_writers_of_a_saga_are_noticed"),
    Mutant("a job waits for what is parked", RUNTIME + "job.py", "if progress is not None and progress.parked:", "if False:",
           "tests/runtime/test_job.py::test_a_job_handles_what_is_there_and_ends"),
    Mutant("what was signalled counts no more", "src/headwater/stream/pattern.py", "if at < since or any(first <= at <= last for first, last in signalled):", "if False:",
           "tests/stream/test_pattern.py::test_so_many_within_a_time"),
    Mutant("a full disk is told, and passes", BROKER + "node.py", "FULL = (errno.ENOSPC, ", "FULL = (",
           "tests/log/test_power_cut.py::test_a_full_disk_refuses_produce_and_loses_nothing"),
    Mutant("a retry is not appended again", LOG + "producer_state.py",
           "            if batch.first_sequence == header.base_sequence and batch.last_sequence == header.last_sequence:",
           "            if False:", "tests/log/test_recovery.py"),
    Mutant("a damaged batch is refused", BROKER + "wire/record_batch.py",
           "    if crc32c(buffer[ATTRIBUTES_START:]) != header.crc:", "    if False:",
           "tests/broker/test_bad_input.py::test_a_bad_batch_gets_kafkas_code_and_the_next_one_is_taken"),
    Mutant("a bad frame closes its connection", BROKER + "connection.py",
           '            logger.warning("connection_closed peer=%s reason=%s", self.peer_host, error)\n            self.close()',
           '            logger.warning("connection_closed peer=%s reason=%s", self.peer_host, error)',
           "tests/broker/test_bad_input.py::test_a_frame_that_breaks_the_protocol_closes_its_connection_only"),
    Mutant("what waits is not overwritten", BROKER + "connection.py", "                    self._reader.put_back(frame)\n", "",
           "tests/broker/test_bad_input.py::test_other_requests_among_waiting_ones_keep_their_place_and_their_bytes"),
    Mutant("records that grow without bound cost a bounded amount", BROKER + "wire/record.py", "= 100 << 20", "= 1 << 30",
           "tests/broker/test_bad_input.py::test_records_that_grow_without_bound_cost_a_bounded_amount"),
    Mutant("clients that don't read bound the memory", BROKER + "connection.py",
           "        self._writing_paused = True\n", "        return\n",
           "tests/broker/test_bad_input.py::test_a_client_that_does_not_read_bounds_the_brokers_memory"),
    Mutant("index entries are Kafka's", LOG + "segment.py",
           "            self.offset_index.add(last_offset - self.base_offset, position)",
           "            self.offset_index.add(header.base_offset - self.base_offset, position)",
           "tests/log/test_dump.py::test_segments_and_indexes_pass_deep_iteration"),
    Mutant("retention removes nothing younger", LOG + "retention.py", "now_ms - timestamp <= config.retention_ms",
           "now_ms - timestamp <= config.retention_ms / 2",
           "tests/conformance/test_admin.py::test_retention_of_seven_days_on_the_embedded_broker"),
    Mutant("groups survive a restart", BROKER + "group/classic.py", "        self.state = STABLE if self.members else EMPTY\n",
           "        self.members.clear()\n        self.state = EMPTY\n",
           "tests/conformance/test_admin.py::test_a_group_survives_a_restart_of_the_broker"),
    Mutant("keys go where every client puts them", "src/headwater/kafka/producer.py", '"murmur2_random"', '"consistent_random"',
           "tests/conformance/test_admin.py::test_a_key_lands_where_every_kafka_client_puts_it[embedded]"),
    Mutant("a key that fails delays no other key", RUNTIME + "async_runner.py",
           "            if self._baton is baton:  # the handler did not wait\n                if failure is not None:\n                    work.spawn(self._lanes.run_lane(lane, event, failure))",
           "            if self._baton is baton:  # the handler did not wait\n                if failure is not None:\n                    await asyncio.sleep(1e6)",
           "tests/runtime/test_app.py::test_a_key_that_fails_delays_no_other_key[embedded]"),
    Mutant("what waits behind a parked event is parked", RUNTIME + "lane.py",
           "        if lane.queue and not lane.parked:\n            return lane.queue.popleft()",
           "        if lane.queue:\n            return lane.queue.popleft()", "tests/runtime/test_model.py::test_no_schedule_breaks_a_promise"),
    Mutant("rule 3: the floor", RUNTIME + "lane.py",
           "return self._replayed_below <= offset <= self._floors.get(key, NO_OFFSET)", "return False", "tests/runtime/test_model.py::test_no_schedule_breaks_a_promise"),
    Mutant("rule 2: what was parked proves that the earlier ones are settled", RUNTIME + "lane.py",
           "self._replayed_below <= offset < parked.largest", "self._replayed_below <= offset < parked.smallest - 1",
           "tests/runtime/test_model.py::test_no_schedule_breaks_a_promise"),
    Mutant("what is queued in a key stays before what comes later", RUNTIME + "strands.py",
           "strand is not None and not strand.lane.queue and len", "strand is not None and len",
           "tests/runtime/test_model.py::test_no_schedule_breaks_a_promise"),
    Mutant("what was committed first is handled in a stop", RUNTIME + "strands.py",
           "        may_begin = not work.is_stopping or work.policy.settles_first", "        may_begin = not work.is_stopping",
           "tests/runtime/test_model.py::test_no_schedule_breaks_a_promise"),
    Mutant("a gap is skipped", "src/headwater/kafka/consumer.py", "            self._consumer.incremental_unassign([place])\n", "",
           "tests/runtime/test_delivery.py::test_a_gap_is_skipped_if_that_is_wanted_and_else_said[embedded-skip]"),
    Mutant("exactly once also in batches", RUNTIME + "delivery.py", "        if bad is not None and self._is_transactional:", "        if False:",
           "tests/runtime/test_delivery.py::test_exactly_once_reads_handles_and_writes_in_one_transaction[batch]"),
    Mutant("parked counts as settled only when acknowledged", RUNTIME + "work.py",
           '        place = await self.insist("the parked record", lambda: self.doors.send_parked(event, attempted))',
           '        self.frontier.settle(event.offset() or 0)\n        place = await self.insist("the parked record", lambda: self.doors.send_parked(event, attempted))',
           "tests/runtime/test_model.py::test_no_schedule_breaks_a_promise"),
    Mutant("a commit never passes an unsettled event", RUNTIME + "frontier.py",
           "            self._unsettled[offset] = None\n", "            pass\n",
           "tests/runtime/test_app.py::test_a_commit_never_passes_an_event_that_is_at_work[embedded-async]"),
    Mutant("what can't be decoded is set aside", RUNTIME + "doors.py",
           "            self._handler.dead_topic, source.key, source.value, headers,", '            self._handler.dead_topic, source.key, b"", headers,',
           "tests/runtime/test_app.py::test_an_undecodable_event_is_set_aside_and_stops_nothing[embedded]"),
    Mutant("correlation is carried", RUNTIME + "delivery.py",
           "        set_cause(Cause(envelope.correlation_id, envelope.event_id, envelope.metadata))\n        if self._is_plain:\n            result = await",
           "        if self._is_plain:\n            result = await", "tests/runtime/test_app.py::test_correlation_is_carried_and_causation_is_the_event_before[embedded]"),
    Mutant("rolled back means not published", STORE + "unit_of_work.py",
           "        if error is not None:\n            await session.rollback()\n            return",
           "        if error is not None and not self._rows:\n            await session.rollback()\n            return",
           "tests/store/test_outbox.py::test_an_event_is_published_if_and_only_if_its_transaction_commits"),
    Mutant("commits that overtake keep their order", STORE + "outbox.py",
           '        query = query.where(text(f"{self.xact_id} < pg_snapshot_xmin(pg_current_snapshot())"))', "        pass",
           "tests/store/test_outbox.py::test_commits_that_overtake_each_other_are_published_in_order"),
    Mutant("one relay at a time", RUNTIME + "relay.py", "            if self._lead(connection):", "            if True:",
           "tests/store/test_outbox.py::test_two_relays_take_turns"),
    Mutant("an assigned partition is always resumed", RUNTIME + "consumer_thread.py",
           "        self._paused.add(number)", "        pass", "tests/runtime/test_rebalance.py"),
    Mutant("without a retry topic the other keys go on", RUNTIME + "lane_runner.py",
           "        work.stuck[key] = Waiting(", "        work._blocked[key] = work.stuck[key] = Waiting(",
           "tests/runtime/test_app.py::test_without_a_retry_topic_a_failing_event_holds_its_key_and_the_frontier[embedded]"),
    Mutant("an effect happens once", STORE + "inbox.py", "    return session.execute(statement).first() is not None",
           "    session.execute(statement)\n    return True",
           "tests/runtime/test_delivery.py::test_an_effect_happens_once_however_often_its_event_is_delivered[embedded-sqlite-async]"),
    Mutant("at most once is committed first", RUNTIME + "consumer_thread.py",
           "        if messages and (not self._commits_first or self._commit_first(messages)):", "        if messages:",
           "tests/runtime/test_delivery.py::test_at_most_once_commits_before_it_handles[embedded]"),
    Mutant("a held key stays held", RUNTIME + "lane_runner.py", "            attempted = attempted._replace(held=dead_offset)",
           "            return True", "tests/runtime/test_delivery.py::test_hold_keeps_the_key_until_somebody_decides[embedded]"),
    Mutant("a replay handles its range only", RUNTIME + "work.py",
           "        return silent or not replay.start <= offset < replay.end", "        return silent",
           "tests/cli/test_failures.py::test_a_replay_handles_exactly_its_range_again"),
    Mutant("a redrive is obeyed once", RUNTIME + "redrive.py",
           "            self._waiting = deque(request for request in self._waiting if request.dead_offset != answered)",
           "            pass",
           "tests/cli/test_failures.py::test_dead_letters_are_listed_filtered_shown_and_redriven[embedded]"),
    Mutant("an incompatible schema is refused", "src/headwater/registry/subject.py",
           "            if messages:\n                raise errors.incompatible(subject, messages)\n", "",
           "tests/registry/test_registry.py::test_an_incompatible_schema_is_refused_with_the_field[embedded]"),
    Mutant("who changes a row last is published last", "src/headwater/store/unit_of_work.py",
           "            session.flush()\n            for", "            for",
           "tests/store/test_outbox.py::test_who_changes_the_row_last_is_published_last"),
    Mutant("schemas are compared behind their references", "src/headwater/schema/json_schema.py",
           "            self.of(new, old, path) for new, old in zip(reader or (), writer or (), strict=True)", "            ()",
           "tests/schema/test_compatibility.py::test_json_schema_takes_what_every_old_document_fits"),
    Mutant("an id is given once", "src/headwater/registry/service.py", "        async with self._turn:\n", "        if True:\n",
           "tests/registry/test_registry.py::test_writers_at_once_get_different_ids[embedded]"),
    Mutant("a version is never given twice", "src/headwater/registry/subject.py",
           "        next_version = max(all_versions, default=0) + 1", "        next_version = len(live) + 1",
           "tests/registry/test_registry.py::test_versions_are_registered_looked_up_and_deleted[embedded]"),
    Mutant("an outage parks nothing", RUNTIME + "breaker.py", "        self._open(error, now_ms, True)\n", "        pass\n",
           "tests/runtime/test_delivery.py::test_an_outage_parks_nothing_and_ends_by_itself[embedded]"),
]  # fmt: skip


def survives(mutant: Mutant) -> bool:
    """Whether the test still passes. Raises ValueError for a mutant that doesn't fit the code any more."""
    source = (ROOT / mutant.path).read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.path} has the line of {mutant.promise!r} {source.count(mutant.old)} times, not once")
    with tempfile.TemporaryDirectory(prefix="headwater-mutant-") as folder:
        copy = Path(folder)
        for name in ("src", "tests", "examples"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / mutant.path).write_text(source.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--timeout", "100", mutant.test]
        environment = {**os.environ, "PYTHONPATH": f"{copy / 'src'}:{copy}", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return False
        if done.returncode in (2, 4, 5):  # interrupted, or no such test
            raise ValueError(f"{mutant.test} could not be run: {done.stdout.decode()[-500:]}")
        return done.returncode == 0


def main() -> None:
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.promise for word in sys.argv[1:])]
    console = Console()
    alive = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("mutants", total=len(chosen))
        for mutant in chosen:
            survived = survives(mutant)
            console.print(
                f"{'[red]survived[/]' if survived else 'killed  '} {mutant.promise}  ({mutant.test})", highlight=False
            )
            if survived:
                alive.append(mutant)
            progress.advance(task)
    console.print(f"{len(chosen) - len(alive)} of {len(chosen)} killed", highlight=False)
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
