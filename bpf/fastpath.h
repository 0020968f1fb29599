/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * Sessions that never leave the kernel: what capture.c does with a client segment,
 * and intercept.c with a response, before either becomes a record for user space.
 *
 *	client segment ── log.h: written down ── session.h: now, later, not ours
 *	                                           │ now
 *	response ── session.h: what it sets free ──┴─ emit.h ──▶ target
 *
 * Whatever these functions do not take goes to user space as if they did not exist;
 * if it was a session of the kernel's, the session goes with it.
 */
#ifndef PYCOPY_FASTPATH_H
#define PYCOPY_FASTPATH_H

#include "emit.h"
#include "pool.h"

/* What became of a segment. */
enum pycopy_kept {
	PYCOPY_TO_USER = 0,
	PYCOPY_TO_SESSION, /* the same, of a session that user space has or is about to get */
	PYCOPY_KEPT,	 /* dealt with here */
	PYCOPY_IDLE_ACK, /* an acknowledgement that nobody needs */
	PYCOPY_GONE_OUT, /* the packet has become a frame to the target: redirect it */
};

/* Frames of held segments that one response releases at most; the next one goes on. */
#define PYCOPY_RELEASES 8
/* Ports tried for one connection. */
#define PYCOPY_PORT_TRIES 8

/* Another CPU's packet may have come after `now_ns` was read. */
static __always_inline u64 pycopy_since(u64 then_ns, u64 now_ns)
{
	return now_ns > then_ns ? now_ns - then_ns : 0;
}

static __always_inline int pycopy_is_ours(const struct pycopy_session *s,
					  const struct pycopy_flow *flow)
{
	return s->generation == flow->generation && s->owner == PYCOPY_KERNEL;
}

/* The session is user space's from here on: tell it, and count why. */
static __always_inline void pycopy_hand_over(struct pycopy_session *s,
					     const struct pycopy_flow *flow, u64 *counts)
{
	u32 left = s->left;

	if (left < PYCOPY_LEFT_REASONS)
		counts[PYCOPY_FAST_LEFT + left]++;
	pycopy_watch(flow->slot);
}

/* The session leaves for a reason that lies outside of session.h. */
static __always_inline int pycopy_expel(struct pycopy_session *s, const struct pycopy_flow *flow,
					u64 *counts, u16 why)
{
	int left = 0;

	bpf_spin_lock(&s->lock);
	if (pycopy_is_ours(s, flow) && s->state != PYCOPY_TIME_WAIT)
		left = pycopy_leave(s, why);
	bpf_spin_unlock(&s->lock);
	if (left)
		pycopy_hand_over(s, flow, counts);
	return PYCOPY_TO_SESSION;
}

static __always_inline void pycopy_count_out(u64 *counts, u8 flags, u32 payload, long failed)
{
	if (failed) {
		counts[PYCOPY_FAST_OUT_FAILED]++;
		return;
	}
	counts[PYCOPY_FAST_OUT_SEGMENTS]++;
	if (payload)
		counts[PYCOPY_FAST_OUT_PAYLOAD]++;
	else if (!(flags & (PYCOPY_TCP_SYN | PYCOPY_TCP_FIN)))
		counts[PYCOPY_FAST_OUT_ACK]++;
	if (flags & PYCOPY_TCP_SYN)
		counts[PYCOPY_FAST_OUT_SYN]++;
	if (flags & PYCOPY_TCP_FIN)
		counts[PYCOPY_FAST_OUT_FIN]++;
}

/* Tallies.held_for() */
static __always_inline void pycopy_count_hold(u64 *counts, u64 hold_ns)
{
	u32 bucket = 0;

#define PYCOPY_REACHES(bound_ns) bucket += hold_ns >= (bound_ns);
	PYCOPY_HOLD_BOUNDS_NS(PYCOPY_REACHES)
#undef PYCOPY_REACHES
	if (bucket < PYCOPY_HOLD_BUCKETS)
		counts[PYCOPY_FAST_HOLD_TIME + bucket]++;
}

/* --- the client's side --- */

/* Whether the segment's headers are of the kind that emit.h rewrites. */
static __always_inline int pycopy_has_plain_headers(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
						    struct pycopy_segment *segment,
						    const struct pycopy_session *s,
						    u32 tcp_header_bytes)
{
	u32 ip_bytes = packet->family == 4 ? 20 : 40;
	u32 layout;

	if (packet->tcp_at != PYCOPY_L2_BYTES + ip_bytes || packet->family != s->family)
		return 0;
	if (segment->tcp_flags & PYCOPY_TCP_RST)
		return 1; /* it leaves for what it is */
	if (tcp_header_bytes == 20)
		return !(s->options & PYCOPY_OPT_TIMESTAMPS) || s->state == PYCOPY_SYN_SENT;
	if (tcp_header_bytes != 32 || !(segment->options & PYCOPY_OPT_TIMESTAMPS) ||
	    pycopy_read(ctx, packet->tcp_at + 20, &layout, sizeof(layout)))
		return 0;
	return layout == PYCOPY_NOP_NOP_TIMESTAMPS;
}

/* Which of the two families' code to run must be known to the compiler. */
static __always_inline long pycopy_send_clone(PYCOPY_CTX *ctx, struct pycopy_work *work,
					      const struct pycopy_hop *hop,
					      const struct pycopy_fast_config *config,
					      const struct pycopy_key *key, u32 tcp_header_bytes,
					      u32 tcp_bytes)
{
	if (work->reply.family == 4)
		return pycopy_clone_as(ctx, work, key, hop, config, 20, tcp_header_bytes, tcp_bytes);
	return pycopy_clone_as(ctx, work, key, hop, config, 40, tcp_header_bytes, tcp_bytes);
}

/* The session is over and only lingered: nothing of it is left but the slot, which is the
 * caller's to push.  Zero: it is not so any more.
 */
static __always_inline int pycopy_free_lingering(struct pycopy_session *s,
						 const struct pycopy_flow *flow)
{
	int gone = 0;

	bpf_spin_lock(&s->lock);
	if (pycopy_is_ours(s, flow) && s->state == PYCOPY_TIME_WAIT) {
		s->owner = PYCOPY_FREE;
		s->generation++;
		gone = 1;
	}
	bpf_spin_unlock(&s->lock);
	return gone;
}

/* Who had this connection to the target before is over, and only waits for what may come
 * late: it gives way (the client's port is used again, or every port of ours was).  Zero: the
 * connection is `flow`'s.
 */
static __always_inline long pycopy_take_over(struct pycopy_key *key,
					     const struct pycopy_flow *flow)
{
	struct pycopy_flow *taken = pycopy_lookup(PYCOPY_MAP_TARGETS, key);
	struct pycopy_session *s;
	struct pycopy_flow old;

	if (!taken || taken->slot == PYCOPY_NO_SLOT)
		return -1;
	old = *taken;
	s = pycopy_lookup(PYCOPY_MAP_SESSIONS, &old.slot);
	if (!s || !pycopy_free_lingering(s, &old))
		return -1;
	pycopy_map_push(PYCOPY_MAP(PYCOPY_MAP_SLOTS), &old.slot, 0);
	return pycopy_update(PYCOPY_MAP_TARGETS, key, flow, 0);
}

/* A client's SYN: a session of the kernel's, if everything that needs is at hand. */
static __always_inline int pycopy_open(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
				       struct pycopy_segment *segment, struct pycopy_work *work,
				       struct pycopy_fast_config *config, u64 *counts)
{
	u32 service = segment->service, tcp_header_bytes = packet->payload_at - packet->tcp_at;
	struct pycopy_hop *hop = pycopy_lookup(PYCOPY_MAP_HOPS, &service);
	struct pycopy_key *key = &work->key;
	struct pycopy_session *s;
	u64 now_ns = work->now_ns, *next_port;
	u32 slot, mss = segment->mss ? segment->mss : 0xffff;
	long failed = -1;

	/* The copy has the client's header, and a client without options has no room for ours. */
	if (PYCOPY_L2_BYTES != 14 || config->closed || segment->seg_len || !hop || !hop->usable ||
	    hop->family != packet->family ||
	    pycopy_syn_options_bytes(segment->options) > tcp_header_bytes - 20 ||
	    packet->tcp_at != PYCOPY_L2_BYTES + (packet->family == 4 ? 20 : 40))
		return PYCOPY_TO_USER;
	if (pycopy_map_pop(PYCOPY_MAP(PYCOPY_MAP_SLOTS), &slot))
		return PYCOPY_TO_USER;
	s = pycopy_lookup(PYCOPY_MAP_SESSIONS, &slot);
	if (!s)
		return PYCOPY_TO_USER;
	work->flow.slot = slot;
	work->flow.generation = s->generation + 1;
	__builtin_memcpy(key->server_addr, hop->target, sizeof(key->server_addr));
	__builtin_memcpy(key->server_port, &hop->target_port, sizeof(key->server_port));
	if (config->ports) {
		__builtin_memcpy(key->client_addr, hop->source, sizeof(key->client_addr));
		next_port = pycopy_lookup(PYCOPY_MAP_NEXT_PORT, &service);
#pragma unroll
		for (int i = 0; next_port && i < PYCOPY_PORT_TRIES; i++) {
			/* Not atomic: who gets another CPU's number finds it taken, and goes on. */
			u32 number = (*next_port)++ % config->ports;
			u16 *port = pycopy_lookup(PYCOPY_MAP_PORTS, &number);

			if (!port)
				break;
			__builtin_memcpy(key->client_port, port, sizeof(key->client_port));
			failed = pycopy_update(PYCOPY_MAP_TARGETS, key, &work->flow, PYCOPY_NOEXIST);
			if (!failed)
				break;
		}
	} else if (!pycopy_choose_address(key, segment->key.client_addr, packet->family,
					  config)) {
		__builtin_memcpy(key->client_port, segment->key.client_port,
				 sizeof(key->client_port));
		failed = pycopy_update(PYCOPY_MAP_TARGETS, key, &work->flow, PYCOPY_NOEXIST);
	}
	if (failed == PYCOPY_EXISTS)
		failed = pycopy_take_over(key, &work->flow);
	if (failed) {
		pycopy_map_push(PYCOPY_MAP(PYCOPY_MAP_SLOTS), &slot, 0);
		return PYCOPY_TO_USER;
	}
	if (mss < PYCOPY_MIN_MSS)
		mss = PYCOPY_MIN_MSS;
	if (mss > hop->mss)
		mss = hop->mss;
	bpf_spin_lock(&s->lock);
	pycopy_reset(s, segment, key, work->flow.generation, packet->family, mss,
		     config->rto_initial_ns, now_ns);
	pycopy_reply_of(s, segment->seq, PYCOPY_TCP_SYN, &work->reply);
	bpf_spin_unlock(&s->lock);
	pycopy_update(PYCOPY_MAP_FLOWS, &segment->key, &work->flow, 0);
	pycopy_delete(PYCOPY_MAP_ENDED, &segment->key);
	failed = pycopy_send_clone(ctx, work, hop, config, key, tcp_header_bytes, tcp_header_bytes);
	pycopy_watch(slot);
	counts[PYCOPY_FAST_OPENED]++;
	counts[PYCOPY_FAST_CLIENT]++;
	counts[PYCOPY_FAST_SYN]++;
	counts[PYCOPY_FAST_SENT_AT_ONCE]++;
	pycopy_count_out(counts, PYCOPY_TCP_SYN, 0, failed);
	return PYCOPY_KEPT;
}

/* Of a connection without a session: of one that is over, every byte was captured. */
static __always_inline int pycopy_is_repeated(struct pycopy_segment *segment)
{
	u32 *ended, end = segment->seq + segment->seg_len;

	if (!segment->seg_len)
		return 0;
	ended = pycopy_lookup(PYCOPY_MAP_ENDED, &segment->key);
	return ended && (s32)(end - *ended) <= 0;
}

static __always_inline void pycopy_disclaim(struct pycopy_segment *segment)
{
	struct pycopy_flow flow = {PYCOPY_NO_SLOT, 0};

	pycopy_update(PYCOPY_MAP_FLOWS, &segment->key, &flow, PYCOPY_NOEXIST);
}

/* The first half of session.on_client_segment(): is it for the kernel at all?  Zero:
 * `*found` is the session, and `flow` says which of its slot.
 */
static __always_inline int pycopy_find_client(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
					      struct pycopy_segment *segment,
					      struct pycopy_work *work,
					      struct pycopy_fast_config *config, u64 *counts,
					      struct pycopy_session **found, int *kept)
{
	const u8 mask = PYCOPY_TCP_SYN | PYCOPY_TCP_ACK | PYCOPY_TCP_RST | PYCOPY_TCP_FIN;
	struct pycopy_flow *flow = pycopy_lookup(PYCOPY_MAP_FLOWS, &segment->key);
	int is_syn = (segment->tcp_flags & mask) == PYCOPY_TCP_SYN;
	struct pycopy_session *s;

	*kept = PYCOPY_TO_USER;
	if (!flow) {
		if (is_syn) {
			*kept = pycopy_open(ctx, packet, segment, work, config, counts);
			/* User space opens it, if anybody: until it says that it has done with
			 * the connection, the next one from this port is not the kernel's either.
			 */
			if (*kept == PYCOPY_TO_USER && !config->closed)
				pycopy_disclaim(segment);
		} else if (pycopy_is_repeated(segment)) {
			counts[PYCOPY_FAST_CLIENT]++;
			counts[PYCOPY_FAST_DUPLICATE]++;
			counts[PYCOPY_FAST_PAYLOAD]++;
			counts[PYCOPY_FAST_PAYLOAD_BYTES] += segment->seg_len;
			*kept = PYCOPY_KEPT;
		}
		return 1;
	}
	work->flow = *flow;
	if (flow->slot == PYCOPY_NO_SLOT)
		return 1;
	s = pycopy_lookup(PYCOPY_MAP_SESSIONS, &work->flow.slot);
	if (!s || s->generation != work->flow.generation)
		return 1;
	*kept = PYCOPY_TO_SESSION;
	if (!(segment->tcp_flags & (PYCOPY_TCP_SYN | PYCOPY_TCP_FIN | PYCOPY_TCP_RST)) &&
	    !segment->seg_len && s->known & PYCOPY_KNOWN_IRS &&
	    (s32)(segment->ack - s->online_irs) >= 1) {
		*kept = PYCOPY_IDLE_ACK;
		return 1;
	}
	if (s->owner != PYCOPY_KERNEL) {
		/* From now on user space knows, too: the record says it.  One that it has not fetched
		 * yet must come to it as it left, with or without the online server's number.
		 */
		if (s->owner == PYCOPY_USER && segment->tcp_flags & PYCOPY_TCP_ACK)
			s->known |= PYCOPY_KNOWN_IRS;
		return 1;
	}
	if (segment->tcp_flags & PYCOPY_TCP_SYN) {
		if (is_syn && segment->seq == s->iss && !segment->seg_len) {
			counts[PYCOPY_FAST_CLIENT]++;
			counts[PYCOPY_FAST_SYN]++;
			counts[PYCOPY_FAST_DUPLICATE]++;
			*kept = PYCOPY_KEPT;
			return 1;
		}
		pycopy_expel(s, &work->flow, counts, PYCOPY_LEFT_REUSED);
		return 1;
	}
	*found = s;
	return 0;
}

/* Whether a frame of the copy would be longer than its connection or its path takes now. */
static __always_inline int pycopy_is_too_long(PYCOPY_CTX *ctx, struct pycopy_segment *segment,
					      const struct pycopy_session *s,
					      const struct pycopy_hop *hop, u32 tcp_header_bytes)
{
	u32 bytes = ctx->gso_size && ctx->gso_size < segment->seg_len ? ctx->gso_size
								       : segment->seg_len;

	/* The copy's options take what the client's took, in use or not. */
	bytes += tcp_header_bytes - 20;
	return segment->seg_len && (bytes > s->mss || bytes > hop->mss);
}

/* A client's segment at TC ingress, before it becomes a record. */
static __always_inline int pycopy_keep_client(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
					      struct pycopy_segment *segment, u64 now_ns)
{
	const u8 passed_on = PYCOPY_TCP_FIN | PYCOPY_TCP_PSH;
	struct pycopy_fast_config *config = pycopy_config();
	u32 tcp_header_bytes, service, boundary = 0;
	struct pycopy_work *work = pycopy_work_of_cpu();
	u64 *counts = pycopy_fast_counts(), at = 0, before;
	struct pycopy_session *s = 0;
	struct pycopy_hop *hop;
	int verdict, kept;

	if (!config || !work || !counts)
		return PYCOPY_TO_USER;
	work->now_ns = now_ns;
	if (pycopy_find_client(ctx, packet, segment, work, config, counts, &s, &kept) || !s)
		return kept;
	tcp_header_bytes = packet->payload_at - packet->tcp_at;
	if (!pycopy_has_plain_headers(ctx, packet, segment, s, tcp_header_bytes))
		return pycopy_expel(s, &work->flow, counts, PYCOPY_LEFT_OPTIONS);
	service = s->service;
	hop = pycopy_lookup(PYCOPY_MAP_HOPS, &service);
	if (PYCOPY_L2_BYTES != 14 || !hop || !hop->usable ||
	    pycopy_is_too_long(ctx, segment, s, hop, tcp_header_bytes))
		return pycopy_expel(s, &work->flow, counts, PYCOPY_LEFT_HOP);
	before = s->log_last;
	/* If this is outdated, so is `before`, and the session leaves. */
	if (!(s->known & PYCOPY_KNOWN_NEED) || (s32)(segment->ack - s->online_need) > 0)
		boundary = PYCOPY_LOG_BOUNDARY;
	if (segment->seg_len || segment->tcp_flags & PYCOPY_TCP_FIN) {
		segment->time_ns = work->now_ns;
		at = pycopy_log_append(ctx, segment, packet->payload_at, &work->flow, before,
				       boundary);
		if (!at)
			return pycopy_expel(s, &work->flow, counts, PYCOPY_LEFT_LOG);
		if (s->held)
			pycopy_log_link(before, at, &work->flow, segment->seq);
	}
	bpf_spin_lock(&s->lock);
	if (!pycopy_is_ours(s, &work->flow)) {
		verdict = -1;
	} else if (s->log_last != before) {
		verdict = pycopy_leave(s, PYCOPY_LEFT_ORDER); /* two CPUs at once */
	} else {
		verdict = pycopy_client_arrives(s, config, segment, at, work->now_ns);
		pycopy_reply_of(s, segment->seq, segment->tcp_flags & passed_on, &work->reply);
		work->key = s->target;
	}
	bpf_spin_unlock(&s->lock);
	if (at && verdict != PYCOPY_SEND && verdict != PYCOPY_HOLD)
		pycopy_log_undo(at);
	if (verdict == PYCOPY_LEAVE)
		pycopy_hand_over(s, &work->flow, counts);
	if (verdict < 0 || verdict == PYCOPY_LEAVE)
		return PYCOPY_TO_SESSION;

	counts[PYCOPY_FAST_CLIENT]++;
	if (segment->seg_len) {
		counts[PYCOPY_FAST_PAYLOAD]++;
		counts[PYCOPY_FAST_PAYLOAD_BYTES] += segment->seg_len;
	}
	if (verdict == PYCOPY_SEND) {
		counts[PYCOPY_FAST_SENT_AT_ONCE]++;
		counts[PYCOPY_FAST_HOLD_TIME]++;
		pycopy_count_out(counts, work->reply.flags, segment->seg_len,
				 pycopy_send_clone(ctx, work, hop, config, &work->key,
						   tcp_header_bytes,
						   tcp_header_bytes + segment->seg_len));
		pycopy_watch(work->flow.slot);
	} else if (verdict == PYCOPY_HOLD) {
		counts[PYCOPY_FAST_HELD]++;
		pycopy_watch(work->flow.slot);
	} else if (verdict == PYCOPY_STEERED) {
		counts[PYCOPY_FAST_STEERED]++;
	} else {
		counts[PYCOPY_FAST_DUPLICATE]++;
	}
	return PYCOPY_KEPT;
}

/* --- the target's side --- */

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

/* A response of the target, before it becomes a record; GONE_OUT: it is to be redirected
 * to `*ifindex`.
 */
static __always_inline int pycopy_keep_target(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
					      struct pycopy_segment *segment, u64 now_ns,
					      u32 *ifindex)
{
	struct pycopy_fast_config *config = pycopy_config();
	u32 service;
	struct pycopy_work *work = pycopy_work_of_cpu();
	u64 *counts = pycopy_fast_counts();
	struct pycopy_flow *flow;
	struct pycopy_session *s;
	struct pycopy_hop *hop;
	int verdict = PYCOPY_LEAVE, was = 0, is = 0;

	if (!config || !work || !counts)
		return PYCOPY_TO_USER;
	flow = pycopy_lookup(PYCOPY_MAP_TARGETS, &segment->key);
	if (!flow || flow->slot == PYCOPY_NO_SLOT)
		return PYCOPY_TO_USER;
	work->flow = *flow;
	s = pycopy_lookup(PYCOPY_MAP_SESSIONS, &work->flow.slot);
	if (!s || !pycopy_is_ours(s, &work->flow))
		return PYCOPY_TO_USER;
	service = s->service;
	hop = pycopy_lookup(PYCOPY_MAP_HOPS, &service);
	if (PYCOPY_L2_BYTES != 14 || !hop || !hop->usable)
		return pycopy_expel(s, &work->flow, counts, PYCOPY_LEFT_HOP);
	/* Where the packet's checksum is partial, it says where the TCP header of ours is to be. */
	if (packet->tcp_at != PYCOPY_L2_BYTES + (packet->family == 4 ? 20 : 40))
		return pycopy_expel(s, &work->flow, counts, PYCOPY_LEFT_OPTIONS);
	work->now_ns = now_ns;
	bpf_spin_lock(&s->lock);
	if (pycopy_is_ours(s, &work->flow)) {
		was = s->state;
		verdict = pycopy_target_arrives(s, config, segment, work->now_ns);
		is = s->state;
	}
	bpf_spin_unlock(&s->lock);
	if (verdict == PYCOPY_LEAVE) {
		if (was)
			pycopy_hand_over(s, &work->flow, counts);
		return PYCOPY_TO_USER;
	}
	counts[PYCOPY_FAST_RESPONSES]++;
	counts[verdict == PYCOPY_STEERED ? PYCOPY_FAST_RESPONSES_STEERED
					 : PYCOPY_FAST_RESPONSES_DUPLICATE]++;
	if (segment->seg_len)
		counts[PYCOPY_FAST_RESPONSE_PAYLOAD]++;
	if (segment->tcp_flags & PYCOPY_TCP_FIN)
		counts[PYCOPY_FAST_RESPONSE_FIN]++;
	if (was == PYCOPY_SYN_SENT)
		counts[PYCOPY_FAST_ESTABLISHED]++;
	if (is == PYCOPY_TIME_WAIT && was != PYCOPY_TIME_WAIT)
		pycopy_close(s, work, counts);
	if (s->held || s->ack_at || s->snd_nxt != s->snd_una)
		pycopy_watch(work->flow.slot);
	*ifindex = hop->ifindex;
	return pycopy_pump(ctx, s, work, hop, config, counts);
}

#endif
