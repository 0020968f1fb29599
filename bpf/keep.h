/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * A packet comes to a session that the kernel keeps: a client's segment (capture.c), or a response
 * of the target (intercept.c, progress.c).
 */
#ifndef PYCOPY_KEEP_H
#define PYCOPY_KEEP_H

#include "arrival.h"
#include "open.h"
#include "pump.h"
#include "stream.h"

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
		*kept = pycopy_begin(ctx, packet, segment, work, config, counts, is_syn);
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
		/* From now on user space knows, too: the record says it.  One that it has not
		 * fetched yet must come to it as it left, the online server's number known or not.
		 */
		if (s->owner == PYCOPY_USER && segment->tcp_flags & PYCOPY_TCP_ACK)
			s->known |= PYCOPY_KNOWN_IRS;
		return 1;
	}
	if (segment->tcp_flags & PYCOPY_TCP_SYN) {
		if (is_syn && segment->seq == s->iss && !segment->seg_len) {
			pycopy_count_syn(counts, PYCOPY_FAST_DUPLICATE);
			*kept = PYCOPY_KEPT;
			return 1;
		}
		pycopy_expel(s, &work->flow, counts, PYCOPY_LEFT_REUSED);
		return 1;
	}
	*found = s;
	return 0;
}

/* Where the segment is in the log from now on; zero: there is no room. */
static __always_inline u64 pycopy_write_down(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
					     struct pycopy_segment *segment,
					     const struct pycopy_session *s,
					     struct pycopy_work *work, u64 before)
{
	u32 boundary = 0;
	u64 at;

	/* If this is outdated, so is `before`, and the session leaves. */
	if (!(s->known & PYCOPY_KNOWN_NEED) || (s32)(segment->ack - s->online_need) > 0)
		boundary = PYCOPY_LOG_BOUNDARY;
	segment->time_ns = work->now_ns;
	at = pycopy_log_append(ctx, segment, packet->payload_at, &work->flow, before, boundary);
	if (at && s->held)
		pycopy_log_link(before, at, &work->flow, segment->seq);
	return at;
}

/* The session's verdict on a client's segment, and what is to be sent; negative: it is not the
 * kernel's any more.
 */
static __always_inline int pycopy_judge_client(struct pycopy_session *s,
					       const struct pycopy_segment *segment,
					       const struct pycopy_fast_config *config,
					       struct pycopy_work *work, u64 at, u64 before)
{
	const u8 passed_on = PYCOPY_TCP_FIN | PYCOPY_TCP_PSH;
	int verdict;

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
	return verdict;
}

/* A client's segment at TC ingress, before it becomes a record. */
static __always_inline int pycopy_keep_client(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
					      struct pycopy_segment *segment, u64 now_ns)
{
	struct pycopy_fast_config *config = pycopy_config();
	struct pycopy_work *work = pycopy_work_of_cpu();
	u64 *counts = pycopy_fast_counts(), at = 0, before;
	u32 tcp_header_bytes = packet->payload_at - packet->tcp_at, service;
	struct pycopy_session *s = 0;
	struct pycopy_hop *hop;
	int verdict, kept;

	if (!config || !work || !counts)
		return PYCOPY_TO_USER;
	work->now_ns = now_ns;
	if (pycopy_find_client(ctx, packet, segment, work, config, counts, &s, &kept) || !s)
		return kept;
	if (!pycopy_has_plain_headers(ctx, packet, segment, s, tcp_header_bytes))
		return pycopy_expel(s, &work->flow, counts, PYCOPY_LEFT_OPTIONS);
	service = s->service;
	hop = pycopy_lookup(PYCOPY_MAP_HOPS, &service);
	if (PYCOPY_L2_BYTES != 14 || !hop || !hop->usable ||
	    pycopy_is_too_long(ctx, segment, s, hop, tcp_header_bytes))
		return pycopy_expel(s, &work->flow, counts, PYCOPY_LEFT_HOP);
	before = s->log_last;
	if (segment->seg_len || segment->tcp_flags & PYCOPY_TCP_FIN) {
		at = pycopy_write_down(ctx, packet, segment, s, work, before);
		if (!at)
			return pycopy_expel(s, &work->flow, counts, PYCOPY_LEFT_LOG);
	}
	verdict = pycopy_judge_client(s, segment, config, work, at, before);
	if (at && verdict != PYCOPY_SEND && verdict != PYCOPY_HOLD)
		pycopy_log_undo(at);
	if (verdict == PYCOPY_LEAVE)
		pycopy_hand_over(s, &work->flow, counts);
	if (verdict < 0 || verdict == PYCOPY_LEAVE)
		return PYCOPY_TO_SESSION;
	pycopy_count_client(counts, segment->seg_len, verdict);
	if (verdict == PYCOPY_SEND)
		pycopy_count_out(counts, work->reply.flags, segment->seg_len,
				 pycopy_send_clone(ctx, work, hop, config, &work->key,
						   tcp_header_bytes,
						   tcp_header_bytes + segment->seg_len));
	if (verdict == PYCOPY_SEND || verdict == PYCOPY_HOLD)
		pycopy_watch(work->flow.slot);
	return PYCOPY_KEPT;
}

/* --- the target's side --- */

/* The kernel's session that has the connection to the target, or null. */
static __always_inline struct pycopy_session *
pycopy_find_target(const struct pycopy_segment *segment, struct pycopy_work *work)
{
	struct pycopy_flow *flow = pycopy_lookup(PYCOPY_MAP_TARGETS, &segment->key);
	struct pycopy_session *s;

	if (!flow || flow->slot == PYCOPY_NO_SLOT)
		return 0;
	work->flow = *flow;
	s = pycopy_lookup(PYCOPY_MAP_SESSIONS, &work->flow.slot);
	return s && pycopy_is_ours(s, &work->flow) ? s : 0;
}

/* A response of the target, before it becomes a record; GONE_OUT: it is to be redirected
 * to `*ifindex`.
 */
static __always_inline int pycopy_keep_target(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
					      struct pycopy_segment *segment, u64 now_ns,
					      u32 *ifindex)
{
	struct pycopy_fast_config *config = pycopy_config();
	struct pycopy_work *work = pycopy_work_of_cpu();
	int verdict = PYCOPY_LEAVE, was = 0, is = 0;
	u64 *counts = pycopy_fast_counts();
	struct pycopy_session *s;
	struct pycopy_hop *hop;
	u32 service;

	if (!config || !work || !counts)
		return PYCOPY_TO_USER;
	s = pycopy_find_target(segment, work);
	if (!s)
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
	pycopy_count_response(counts, segment, verdict);
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
