// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
/*
 * Reduces the target's responses to copied clients to their headers, gives
 * those to user space or sends them on to their replay (relay.h), and swallows the
 * responses: TC ingress or XDP on an assistant or on the online host itself
 * (PYCOPY_SELF), TC egress on the target.
 *
 * A response that belongs to a replay goes no further, whether or not a record
 * could be made of it: behind the address of a copied client there may be a real
 * one, and a host that got the response would answer with a reset.  Everything
 * else is let through untouched, also a router's word that a copy is too big for
 * its path: user space is told, but nothing that this host does with ICMP is changed.
 *
 * With PYCOPY_SELF it is the zero-route mode's: what is a copy's response, whole
 * connections say.  Without, claims by address do, and the user's filter.
 */
#include "record.h"
#include "scratch.h"
#include "toobig.h"
#if PYCOPY_FASTPATH
#include "keep.h"
#endif
#if !PYCOPY_SELF && !PYCOPY_HOOK_XDP
#define PYCOPY_HAS_RELAYS 1
#include "relay.h"
#endif

/* How the hook makes a packet vanish. */
static __always_inline int vanish(const struct pycopy_settings *settings)
{
#if PYCOPY_HOOK_XDP
	return XDP_DROP;
#else
	return settings->redirect_away ? bpf_redirect(0, 0) : TC_ACT_SHOT;
#endif
}

#if PYCOPY_SELF

/* By the whole connection: this host, or one behind it, may well talk to the
 * target on its own account, from whatever port.
 */
static __always_inline int is_ours(struct pycopy_key *key)
{
#if PYCOPY_FASTPATH
	return pycopy_lookup(PYCOPY_MAP_TARGETS, key) != 0;
#else
	return pycopy_lookup(PYCOPY_MAP_OURS, key) != 0;
#endif
}

/* Whether the packet comes from a target, to a port that our copies may leave from. */
static __always_inline int is_selected(PYCOPY_CTX *ctx, struct pycopy_packet *packet, int parsed,
				       const struct pycopy_settings *settings, u32 *claim)
{
	u16 port = ntohs(packet->tcp.dst_port);
	struct pycopy_endpoint server = {};
	struct pycopy_key key;

	*claim = PYCOPY_PASS;
	/* A later fragment is nothing without the first. */
	if (!packet->ports_known || port < settings->port_lo || port > settings->port_hi)
		return 0;
	pycopy_set_key(&key, packet->dst, packet->tcp.dst_port, packet->src, packet->tcp.src_port);
	if (is_ours(&key)) {
		*claim = PYCOPY_SWALLOW;
		return 1;
	}
	pycopy_set_endpoint(&server, packet->src, packet->tcp.src_port);
	return pycopy_lookup(PYCOPY_MAP_SERVERS, &server) != 0;
}

/* Whether a message is about one of our copies, by the header in it. */
static __always_inline int is_copy(struct pycopy_packet *packet, struct pycopy_key *key)
{
	return is_ours(key);
}

#else

/* The claim that names the address, or 0 (not PYCOPY_PASS: no claim). */
static __always_inline u32 *find_claim(const __be32 *client)
{
	struct pycopy_claim_key key = {.prefix_bits = 128};

	__builtin_memcpy(key.addr, client, sizeof(key.addr));
	return pycopy_lookup(PYCOPY_MAP_CLAIMS, &key);
}

static __always_inline u32 verdict_of(const __be32 *client)
{
	u32 *claim = find_claim(client), zero = 0;

	if (!claim)
		claim = pycopy_lookup(PYCOPY_MAP_CLAIMS_DEFAULT, &zero);
	return claim ? *claim : PYCOPY_PASS;
}

static __always_inline int is_selected(PYCOPY_CTX *ctx, struct pycopy_packet *packet, int parsed,
				       const struct pycopy_settings *settings, u32 *claim)
{
	u32 *named;

	if (pycopy_filter(ctx, packet->frame_bytes)) {
		/* Ours to the replays passes.  The other direction comes to an address of this
		 * host, which the claims pass; its port could be any client's own.
		 */
		if (settings->channel_port && packet->ports_known &&
		    packet->tcp.src_port == htons(settings->channel_port))
			*claim = PYCOPY_PASS;
		else
			*claim = verdict_of(packet->dst);
		return 1;
	}
	*claim = PYCOPY_PASS;
	if (parsed != PYCOPY_FRAGMENT)
		return 0;
	/* An expression with ports cannot select a fragment without them, nor any
	 * IPv6 fragment.  A claim on its very destination can; the default, which
	 * covers the clients of every other service as well, must not.
	 */
	named = find_claim(packet->dst);
	if (named)
		*claim = *named;
	return *claim != PYCOPY_PASS;
}

/* Whether a message may be about a copy, by the header in it: sent from a client's
 * address whose responses are swallowed.  Which copy the replays know.
 */
static __always_inline int is_copy(struct pycopy_packet *packet, struct pycopy_key *key)
{
	return verdict_of(packet->src) != PYCOPY_PASS;
}

#endif

/* Not TCP: it may be about a copy all the same. */
static __always_inline void look_for_too_big(PYCOPY_CTX *ctx, struct pycopy_scratch *work)
{
	if (!pycopy_parse_too_big(ctx, &work->packet, &work->segment) ||
	    !is_copy(&work->packet, &work->segment.key))
		return;
	pycopy_count(PYCOPY_INT_MATCHED, 1);
	pycopy_record_response(ctx, &work->segment, PYCOPY_INT_TOO_BIG);
}

#if PYCOPY_HAS_RELAYS

/* Makes the packet a datagram to the claim's replay: the device it leaves by, or 0. */
static __always_inline u32 relay(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
				 struct pycopy_segment *segment, u32 claim)
{
	u32 number = claim - PYCOPY_RELAY, zero = 0;
	struct pycopy_relay *way = pycopy_lookup(PYCOPY_MAP_RELAYS, &number);
	struct pycopy_relay_work *work = pycopy_lookup(PYCOPY_MAP_RELAY_WORK, &zero);

	if (!way || !work || pycopy_relay(ctx, packet, way, segment, work))
		return 0;
	return way->ifindex;
}

#endif

/* A response that is to be swallowed: the verdict, and one counter that says how it went. */
static __always_inline int swallow(PYCOPY_CTX *ctx, struct pycopy_scratch *work, u32 claim,
				   const struct pycopy_settings *settings)
{
	struct pycopy_segment *segment = &work->segment;
	struct pycopy_packet *packet = &work->packet;
	u64 now_ns = pycopy_now();
	u32 way_out = 0;
	int parsed;

	if (pycopy_has_lapsed(now_ns, PYCOPY_GRACE_NS)) {
		pycopy_count(PYCOPY_INT_LAPSED, 1);
		return PYCOPY_CONTINUE;
	}
	parsed = pycopy_parse_tcp(ctx, packet, work);
	if (parsed) {
		pycopy_count(parsed == PYCOPY_TRUNCATED ? PYCOPY_INT_TRUNCATED
							: PYCOPY_INT_MALFORMED,
			     1);
		return vanish(settings);
	}
	segment->kind = PYCOPY_TARGET;
	pycopy_set_key(&segment->key, packet->dst, packet->tcp.dst_port, packet->src,
		       packet->tcp.src_port);
#if PYCOPY_FASTPATH
	int kept = pycopy_keep_target(ctx, packet, segment, now_ns, &way_out);

	if (kept == PYCOPY_KEPT || kept == PYCOPY_GONE_OUT) {
		pycopy_count(PYCOPY_INT_KEPT, 1);
		return kept == PYCOPY_KEPT ? vanish(settings) : bpf_redirect(way_out, 0);
	}
#endif
#if PYCOPY_HAS_RELAYS
	if (claim >= PYCOPY_RELAY)
		way_out = relay(ctx, packet, segment, claim);
	if (way_out) {
		pycopy_count(PYCOPY_INT_RELAYED, 1);
		return bpf_redirect(way_out, 0);
	}
#endif
	pycopy_record_response(ctx, segment, PYCOPY_INT_CAPTURED);
	return vanish(settings);
}

/* A fragment: swallowed where its address says whose it is, never recorded. */
static __always_inline int take_fragment(u32 claim, const struct pycopy_settings *settings)
{
	int lapsed = claim != PYCOPY_PASS && pycopy_has_lapsed(pycopy_now(), PYCOPY_GRACE_NS);

	pycopy_count(lapsed ? PYCOPY_INT_LAPSED : PYCOPY_INT_FRAGMENT, 1);
	return claim == PYCOPY_PASS || lapsed ? PYCOPY_CONTINUE : vanish(settings);
}

int pycopy_intercept(PYCOPY_CTX *ctx)
{
	struct pycopy_settings *settings = pycopy_settings();
	struct pycopy_scratch *work = pycopy_scratch();
	int parsed;
	u32 claim;

	if (!settings || !work) /* never: the verifier asks */
		return PYCOPY_CONTINUE;
	parsed = pycopy_parse_flow(ctx, &work->packet);
	if (parsed == PYCOPY_NOT_TCP)
		look_for_too_big(ctx, work);
	if ((parsed && parsed != PYCOPY_FRAGMENT) ||
	    !is_selected(ctx, &work->packet, parsed, settings, &claim))
		return PYCOPY_CONTINUE;
	pycopy_count(PYCOPY_INT_MATCHED, 1);
	if (parsed == PYCOPY_FRAGMENT)
		return take_fragment(claim, settings);
	if (claim != PYCOPY_PASS)
		return swallow(ctx, work, claim, settings);
	pycopy_count(PYCOPY_INT_PASSED, 1);
	return PYCOPY_CONTINUE;
}
