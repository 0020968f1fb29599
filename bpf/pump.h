/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * What a session sends of its own accord: held segments that a response, or time, has set free,
 * and acknowledgements.  The packet at hand, a response or the timer's, becomes the last of them.
 */
#ifndef PYCOPY_PUMP_H
#define PYCOPY_PUMP_H

#include "counts.h"
#include "fastpath.h"

/* Frames of held segments that one response releases at most; the next one goes on. */
#define PYCOPY_RELEASES 8

/* Which of the two families' code to run must be known to the compiler. */
static __always_inline long pycopy_turn_into(PYCOPY_CTX *ctx, struct pycopy_work *work,
					     const struct pycopy_hop *hop,
					     const struct pycopy_fast_config *config, void *from,
					     u16 payload_sum)
{
	if (work->reply.family == 4)
		return pycopy_become(ctx, work, &work->key, hop, config, 20, from, payload_sum);
	return pycopy_become(ctx, work, &work->key, hop, config, 40, from, payload_sum);
}

/* Sends a frame of the oldest held segment if it may leave: GONE_OUT if the packet is it,
 * KEPT if a clone was and more may follow, TO_USER if nothing may leave.
 */
static __always_inline int pycopy_release_one(PYCOPY_CTX *ctx, struct pycopy_session *s,
					      struct pycopy_work *work,
					      const struct pycopy_hop *hop,
					      const struct pycopy_fast_config *config, u64 *counts)
{
	const u8 last_only = PYCOPY_TCP_FIN | PYCOPY_TCP_PSH;
	u64 at = s->held_at, offset;
	struct pycopy_log_record *record = pycopy_log_find(at);
	u32 from = 0, bytes = 0, is_last = 0;
	void *payload;
	int verdict = PYCOPY_HOLD, more = 0;
	long failed;

	if (!s->held || !record)
		return PYCOPY_TO_USER;
	work->record = *record;
	bpf_spin_lock(&s->lock);
	if (pycopy_is_ours(s, &work->flow) && s->held && s->held_at == at) {
		verdict = pycopy_release(s, config, &work->record, work->now_ns, &from, &bytes);
		is_last = !s->held_sent;
		more = s->held;
		pycopy_reply_of(s, work->record.seq + from,
				is_last ? work->record.tcp_flags & last_only : 0, &work->reply);
		work->key = s->target;
	}
	bpf_spin_unlock(&s->lock);
	if (verdict == PYCOPY_LEAVE)
		pycopy_hand_over(s, &work->flow, counts);
	if (verdict != PYCOPY_SEND)
		return PYCOPY_TO_USER;
	if (is_last) {
		counts[PYCOPY_FAST_RELEASED]++;
		pycopy_count_hold(counts, pycopy_since(work->record.time_ns, work->now_ns));
		record->time_ns = work->now_ns;
	}
	offset = from;
	PYCOPY_PIN(offset);
	if (offset > PYCOPY_LOG_PAYLOAD)
		return PYCOPY_TO_USER;
	payload = (void *)(record + 1) + offset;
	work->payload_bytes = bytes;
	failed = pycopy_turn_into(ctx, work, hop, config, bytes ? payload : 0,
				  pycopy_sum_payload(work, payload));
	if (!failed && !more) {
		pycopy_count_out(counts, work->reply.flags, bytes, 0);
		return PYCOPY_GONE_OUT;
	}
	if (!failed)
		failed = bpf_clone_redirect(ctx, hop->ifindex, 0);
	pycopy_count_out(counts, work->reply.flags, bytes, failed);
	return PYCOPY_KEPT;
}

/* What the session may send now: held segments, then an acknowledgement if one is due. */
static __always_inline int pycopy_pump(PYCOPY_CTX *ctx, struct pycopy_session *s,
				       struct pycopy_work *work, const struct pycopy_hop *hop,
				       const struct pycopy_fast_config *config, u64 *counts)
{
	int due, kept;

#pragma clang loop unroll(disable)
	for (u64 i = 0; i < PYCOPY_RELEASES; i++) {
		PYCOPY_PIN(i);
		if (!s->held)
			break;
		kept = pycopy_release_one(ctx, s, work, hop, config, counts);
		if (kept == PYCOPY_GONE_OUT)
			return kept;
		if (kept == PYCOPY_TO_USER)
			break;
	}
	bpf_spin_lock(&s->lock);
	due = pycopy_is_ours(s, &work->flow) && pycopy_acknowledge(s, work->now_ns);
	pycopy_reply_of(s, s->snd_nxt, 0, &work->reply);
	work->key = s->target;
	bpf_spin_unlock(&s->lock);
	if (!due)
		return PYCOPY_KEPT;
	if (pycopy_turn_into(ctx, work, hop, config, 0, 0)) {
		pycopy_count_out(counts, 0, 0, -1);
		return PYCOPY_KEPT;
	}
	pycopy_count_out(counts, 0, 0, 0);
	return PYCOPY_GONE_OUT;
}

/* The session is over: the client's next SYN is another's. */
static __always_inline void pycopy_close(struct pycopy_session *s, struct pycopy_work *work,
					 u64 *counts)
{
	struct pycopy_lingering lingering = {
		.slot = work->flow.slot,
		.generation = work->flow.generation,
		.until_ns = s->rto_at,
	};
	u32 end = s->online_snd_nxt;

	work->key = s->online;
	pycopy_delete(PYCOPY_MAP_FLOWS, &work->key);
	pycopy_update(PYCOPY_MAP_ENDED, &work->key, &end, 0);
	/* No room, after many that gave way to others: the sweep over all finds it. */
	pycopy_map_push(PYCOPY_MAP(PYCOPY_MAP_LINGERING), &lingering, 0);
	counts[PYCOPY_FAST_CLOSED]++;
}

#endif
