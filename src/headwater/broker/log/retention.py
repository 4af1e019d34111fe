"""Which segments a log may forget: by age, then by size, then those before the log start. (UnifiedLog#deleteOldSegments)

    closed segment, everything in it older than retention.ms            -> gone
    the log without its oldest segment is still >= retention.bytes       -> gone

The active segment goes too when all of it is too old: it is rolled first. A segment whose records carry no timestamp
is never too old. Nothing at or above the high watermark goes.
"""

from headwater.broker.log.partition_log import PartitionLog


def new_log_start_offset(log: PartitionLog, now_ms: int, high_watermark: int) -> int:
    """Where the log may begin; its present start when everything is kept. May roll the active segment."""
    config = log.config
    if not config.deletes:
        return log.log_start_offset
    start = log.log_start_offset
    expired = 0
    if config.retention_ms >= 0:
        for segment in log.segments:
            timestamp = segment.max_timestamp
            if timestamp < 0 or now_ms - timestamp <= config.retention_ms:
                break
            expired += 1
    if config.retention_bytes >= 0:
        excess = log.size_bytes - config.retention_bytes - sum(s.size_bytes for s in log.segments[:expired])
        for segment in log.segments[expired:-1]:
            if excess < segment.size_bytes:
                break
            excess -= segment.size_bytes
            expired += 1
    if expired == len(log.segments):
        if log.active.size_bytes == 0 or high_watermark < log.log_end_offset:
            expired -= 1
        else:
            log.roll()
    if expired:
        start = max(start, min(log.segments[expired].base_offset, high_watermark))
    return start
