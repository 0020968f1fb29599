/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * The log: what the kernel's sessions have sent and what they hold, kept until
 * the target has acknowledged it.  A held segment is sent from here; one that got
 * lost on the way is read from here by user space, which repeats it.
 *
 * One ring of records for each CPU, since a program is not interrupted by another
 * of its kind on its CPU: no lock.  Records are given up in order, and only when
 * nobody can need them any more: a record that is still needed stops the ring, and
 * what finds no room leaves the kernel.  Nothing that may have to be repeated is
 * ever overwritten.  User space maps the whole.
 */
#ifndef PYCOPY_LOG_H
#define PYCOPY_LOG_H

#include "maps.h"
#include "session.h"

/* Old records looked at for each new one: more than one, so that room grows. */
#define PYCOPY_LOG_RECLAIM 8

static __always_inline struct pycopy_log_record *pycopy_log_at(struct pycopy_log_head *log,
							       u64 offset)
{
	offset &= PYCOPY_CONSTANT(LOG_MASK);
	PYCOPY_PIN(offset);
	return (void *)(log + 1) + offset;
}

static __always_inline struct pycopy_log_record *pycopy_log_find(u64 at)
{
	u32 cpu = at >> PYCOPY_LOG_CPU_SHIFT;
	struct pycopy_log_head *log = pycopy_lookup(PYCOPY_MAP_LOG, &cpu);

	return log ? pycopy_log_at(log, at) : 0;
}

/* Whether nobody can need the record any more.  What user space has taken, it has
 * copied.
 */
static __always_inline int pycopy_log_is_done(struct pycopy_log_record *record)
{
	u32 slot = record->slot;
	struct pycopy_session *session = pycopy_lookup(PYCOPY_MAP_SESSIONS, &slot);

	if (!session || session->generation != record->generation)
		return 1;
	if (session->owner != PYCOPY_KERNEL && session->owner != PYCOPY_LEAVING)
		return 1;
	return (s32)(record->end - session->snd_una) <= 0;
}

/* Where the segment is now, or 0: no room, or not readable. */
static __always_inline u64 pycopy_log_append(PYCOPY_CTX *ctx, struct pycopy_segment *segment,
					     u32 payload_at, struct pycopy_flow *flow, u64 before,
					     u32 boundary)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct pycopy_log_head *log = pycopy_lookup(PYCOPY_MAP_LOG, &cpu);
	u64 bytes, payload = segment->seg_len, log_bytes = PYCOPY_CONSTANT(LOG_MASK) + 1;
	struct pycopy_log_record *record;

	if (!log || payload > PYCOPY_LOG_PAYLOAD)
		return 0;
	if (!log->head)
		log->head = log->tail = 8; /* position 0 is nowhere */
	/* Behind the payload there is room for a word of zeros, for the checksum. */
	bytes = (sizeof(*record) + payload + 4 + 7) & ~7ULL;
	for (int i = 0; i < PYCOPY_LOG_RECLAIM; i++) {
		/* Nearly all of it is free: no hurry to look what else might be. */
		if (log->head - log->tail < log_bytes / 4)
			break;
		record = pycopy_log_at(log, log->tail);
		if (!pycopy_log_is_done(record))
			break;
		log->tail += record->bytes;
	}
	if (log->head + bytes - log->tail > log_bytes)
		return 0;
	record = pycopy_log_at(log, log->head);
	if (payload) {
		if (!pycopy_within(&payload, 1, PYCOPY_LOG_PAYLOAD) ||
		    bpf_skb_load_bytes(ctx, payload_at, record + 1, payload))
			return 0;
		*(u32 *)((void *)(record + 1) + payload) = 0;
	}
	record->bytes = bytes;
	record->slot = flow->slot;
	record->generation = flow->generation;
	record->seq = segment->seq;
	record->ack = segment->ack;
	record->seg_len = segment->seg_len;
	record->tcp_flags = segment->tcp_flags | boundary;
	record->end = segment->seq + segment->seg_len + !!(segment->tcp_flags & PYCOPY_TCP_FIN);
	record->time_ns = segment->time_ns;
	record->before = before;
	record->next = 0;
	log->head += bytes;
	return (u64)cpu << PYCOPY_LOG_CPU_SHIFT | (log->head - bytes);
}

/* What stands at `at` will be released behind the session's record before, which is held. */
static __always_inline void pycopy_log_link(u64 before, u64 at, const struct pycopy_flow *flow,
					    u32 seq)
{
	struct pycopy_log_record *record = pycopy_log_find(before);

	if (record && record->slot == flow->slot && record->generation == flow->generation &&
	    record->end == seq)
		record->next = at;
}

/* The session did not take it after all. */
static __always_inline void pycopy_log_undo(u64 at)
{
	struct pycopy_log_record *record = pycopy_log_find(at);

	if (record)
		record->slot = PYCOPY_NO_SLOT;
}

#endif
