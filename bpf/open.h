/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * A client's SYN: a session of the kernel's, if everything that needs is at hand, and the
 * connection to the target is nobody's.
 */
#ifndef PYCOPY_OPEN_H
#define PYCOPY_OPEN_H

#include "counts.h"
#include "fastpath.h"
#include "pool.h"

/* Ports tried for one connection. */
#define PYCOPY_PORT_TRIES 8

/* Which of the two families' code to run must be known to the compiler. */
static __always_inline long pycopy_send_clone(PYCOPY_CTX *ctx, struct pycopy_work *work,
					      const struct pycopy_hop *hop,
					      const struct pycopy_fast_config *config,
					      const struct pycopy_key *key, u32 tcp_header_bytes,
					      u32 tcp_bytes)
{
	if (work->reply.family == 4)
		return pycopy_clone_as(ctx, work, key, hop, config, 20, tcp_header_bytes,
				       tcp_bytes);
	return pycopy_clone_as(ctx, work, key, hop, config, 40, tcp_header_bytes, tcp_bytes);
}

/* Who had this connection to the target before is over, and only waits for what may come
 * late: it gives way (the client's port is used again, or every port of ours was).  Zero: the
 * connection is `flow`'s.
 */
static __always_inline long pycopy_take_over(struct pycopy_key *key, const struct pycopy_flow *flow)
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

/* A port of ours towards the target that nobody has: zero, or why there is none. */
static __always_inline long pycopy_claim_own_port(struct pycopy_work *work, u32 service,
						  const struct pycopy_hop *hop,
						  const struct pycopy_fast_config *config)
{
	u64 *next_port = pycopy_lookup(PYCOPY_MAP_NEXT_PORT, &service);
	struct pycopy_key *key = &work->key;
	long failed = -1;

	__builtin_memcpy(key->client_addr, hop->source, sizeof(key->client_addr));
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
	return failed;
}

/* The connection to the target, work->key, becomes work->flow's: zero, or why it does not. */
static __always_inline long pycopy_claim_target(struct pycopy_work *work,
						const struct pycopy_segment *segment, u8 family,
						const struct pycopy_hop *hop,
						const struct pycopy_fast_config *config)
{
	struct pycopy_key *key = &work->key;
	long failed = -1;

	__builtin_memcpy(key->server_addr, hop->target, sizeof(key->server_addr));
	__builtin_memcpy(key->server_port, &hop->target_port, sizeof(key->server_port));
	if (config->ports) {
		failed = pycopy_claim_own_port(work, segment->service, hop, config);
	} else if (!pycopy_choose_address(key, segment->key.client_addr, family, config)) {
		__builtin_memcpy(key->client_port, segment->key.client_port,
				 sizeof(key->client_port));
		failed = pycopy_update(PYCOPY_MAP_TARGETS, key, &work->flow, PYCOPY_NOEXIST);
	}
	return failed == PYCOPY_EXISTS ? pycopy_take_over(key, &work->flow) : failed;
}

/* Whether the copy can have the client's headers: one without options has no room for ours. */
static __always_inline int pycopy_may_open(const struct pycopy_packet *packet,
					   const struct pycopy_segment *segment,
					   const struct pycopy_hop *hop,
					   const struct pycopy_fast_config *config)
{
	u32 room = packet->payload_at - packet->tcp_at - 20;

	return PYCOPY_L2_BYTES == 14 && !config->closed && !segment->seg_len && hop->usable &&
	       hop->family == packet->family &&
	       pycopy_syn_options_bytes(segment->options) <= room &&
	       packet->tcp_at == PYCOPY_L2_BYTES + (packet->family == 4 ? 20 : 40);
}

/* The session that the SYN at hand opens in a free slot, or TO_USER. */
static __always_inline int pycopy_open(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
				       struct pycopy_segment *segment, struct pycopy_work *work,
				       struct pycopy_fast_config *config, u64 *counts)
{
	u32 service = segment->service, tcp_header_bytes = packet->payload_at - packet->tcp_at;
	struct pycopy_hop *hop = pycopy_lookup(PYCOPY_MAP_HOPS, &service);
	u32 slot, mss = segment->mss ? segment->mss : 0xffff;
	struct pycopy_session *s;
	long failed;

	if (!hop || !pycopy_may_open(packet, segment, hop, config) ||
	    pycopy_map_pop(PYCOPY_MAP(PYCOPY_MAP_SLOTS), &slot))
		return PYCOPY_TO_USER;
	s = pycopy_lookup(PYCOPY_MAP_SESSIONS, &slot);
	if (!s)
		return PYCOPY_TO_USER;
	work->flow.slot = slot;
	work->flow.generation = s->generation + 1;
	if (pycopy_claim_target(work, segment, packet->family, hop, config)) {
		pycopy_map_push(PYCOPY_MAP(PYCOPY_MAP_SLOTS), &slot, 0);
		return PYCOPY_TO_USER;
	}
	if (mss < PYCOPY_MIN_MSS)
		mss = PYCOPY_MIN_MSS;
	if (mss > hop->mss)
		mss = hop->mss;
	bpf_spin_lock(&s->lock);
	pycopy_reset(s, segment, &work->key, work->flow.generation, packet->family, mss,
		     config->rto_initial_ns, work->now_ns);
	pycopy_reply_of(s, segment->seq, PYCOPY_TCP_SYN, &work->reply);
	bpf_spin_unlock(&s->lock);
	pycopy_update(PYCOPY_MAP_FLOWS, &segment->key, &work->flow, 0);
	pycopy_delete(PYCOPY_MAP_ENDED, &segment->key);
	failed = pycopy_send_clone(ctx, work, hop, config, &work->key, tcp_header_bytes,
				   tcp_header_bytes);
	pycopy_watch(slot);
	counts[PYCOPY_FAST_OPENED]++;
	pycopy_count_syn(counts, PYCOPY_FAST_SENT_AT_ONCE);
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

/* The connection is user space's, if anybody's.  Until it says that it has done with it, the
 * next one from this port is not the kernel's either.
 */
static __always_inline void pycopy_disclaim(struct pycopy_segment *segment)
{
	struct pycopy_flow flow = {PYCOPY_NO_SLOT, 0};

	pycopy_update(PYCOPY_MAP_FLOWS, &segment->key, &flow, PYCOPY_NOEXIST);
}

/* A segment of a connection without a session. */
static __always_inline int pycopy_begin(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
					struct pycopy_segment *segment, struct pycopy_work *work,
					struct pycopy_fast_config *config, u64 *counts, int is_syn)
{
	int kept;

	if (is_syn) {
		kept = pycopy_open(ctx, packet, segment, work, config, counts);
		if (kept == PYCOPY_TO_USER && !config->closed)
			pycopy_disclaim(segment);
		return kept;
	}
	if (!pycopy_is_repeated(segment))
		return PYCOPY_TO_USER;
	pycopy_count_client(counts, segment->seg_len, PYCOPY_DUPLICATE);
	return PYCOPY_KEPT;
}

#endif
