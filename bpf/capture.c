// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
/*
 * Copies the client segments of the services to user space: TC ingress or XDP,
 * on the online host.
 *
 * Runs before the production host's own TCP sees the packet, so it has one rule
 * above all others: whatever happens to the copy, the packet goes on, unchanged.
 * Every way out of the program returns PYCOPY_CONTINUE.
 *
 * What to copy is in maps: services by port and address, and which of several workers'
 * flows are this program's; each worker has one of its own.
 */
#include "record.h"
#include "scratch.h"
#if PYCOPY_FASTPATH
#include "keep.h"
#endif

/* Half a megabyte, more than any BIG TCP super-segment. */
#define PYCOPY_MAX_PIECES 32

/* Value of the map "handshakes": client flows in their handshake. */
struct pycopy_handshake {
	__u32 iss;
	__u32 syn_len; /* data in the SYN (RFC 7413), which the ACK may cover */
};

/* One record with `bytes` of payload from `at`: the counter that says how it went. */
static __always_inline int emit(PYCOPY_CTX *ctx, struct pycopy_scratch *work, u32 at, u64 bytes)
{
	struct pycopy_segment *segment = &work->segment;

	segment->seg_len = segment->payload_bytes = bytes;
	if (bytes) {
		if (!pycopy_within(&bytes, 1, PYCOPY_PIECE_BYTES) ||
		    PYCOPY_LOAD_BYTES(ctx, at, work->payload, bytes))
			return PYCOPY_CAP_TRUNCATED;
	}
	return pycopy_submit(ctx, segment, sizeof(*segment) + bytes) ? PYCOPY_CAP_RING_FULL
								     : PYCOPY_CAP_CAPTURED;
}

/* A segment as one record or, if it is a super-segment, as several.  XDP cannot
 * read beyond an offset of 64 KB (bpf_xdp_load_bytes): a piece that is there
 * counts as truncated.
 */
static __always_inline void emit_pieces(PYCOPY_CTX *ctx, struct pycopy_scratch *work, u32 at)
{
	const u8 last_only = PYCOPY_TCP_FIN | PYCOPY_TCP_PSH;
	struct pycopy_segment *segment = &work->segment;
	u8 flags = segment->tcp_flags;
	u64 left = segment->seg_len, extra = 0;

	if (left > PYCOPY_PIECE_BYTES)
		segment->tcp_flags &= ~last_only;
#pragma clang loop unroll(disable)
	for (u64 i = 0; i < PYCOPY_MAX_PIECES; i++) {
		u64 bytes = left;

		PYCOPY_PIN(i);
		PYCOPY_PIN(left);
		if (left <= PYCOPY_PIECE_BYTES)
			segment->tcp_flags |= flags & last_only;
		else
			bytes = PYCOPY_PIECE_BYTES;
		pycopy_count(emit(ctx, work, at, bytes), 1);
		if (left <= PYCOPY_PIECE_BYTES)
			break;
		extra++;
		/* A SYN takes a sequence number of its own, before the payload. */
		segment->seq += PYCOPY_PIECE_BYTES + !!(segment->tcp_flags & PYCOPY_TCP_SYN);
		segment->tcp_flags &= ~PYCOPY_TCP_SYN;
		at += PYCOPY_PIECE_BYTES;
		left -= PYCOPY_PIECE_BYTES;
	}
	if (extra)
		pycopy_count(PYCOPY_CAP_EXTRA_PIECES, extra);
}

/* A service without an address is this host's own: what is merely routed through,
 * from containers or as a gateway, is somebody else's.
 */
static __always_inline int is_local(struct pycopy_endpoint *endpoint)
{
	return pycopy_lookup(PYCOPY_MAP_LOCAL_ADDRESSES, endpoint->addr) != 0;
}

/* The index of the service that the packet is addressed to, or -1. */
static __always_inline int find_service(struct pycopy_packet *packet)
{
	u32 port = ntohs(packet->tcp.dst_port), at_port, *found;
	struct pycopy_endpoint endpoint = {};

	found = pycopy_lookup(PYCOPY_MAP_SERVICE_PORTS, &port);
	if (!found || !*found)
		return -1;
	at_port = *found;
	pycopy_set_endpoint(&endpoint, packet->dst, packet->tcp.dst_port);
	if (at_port & PYCOPY_PORT_GIVEN) {
		found = pycopy_lookup(PYCOPY_MAP_SERVICES, &endpoint);
		if (found)
			return *found & PYCOPY_PORT_INDEX;
	}
	if (at_port & PYCOPY_PORT_ANYBODYS || (at_port & PYCOPY_PORT_OWN && is_local(&endpoint)))
		return at_port & PYCOPY_PORT_INDEX;
	return -1;
}

/* Whether the flow is this worker's.  By the client's port alone: copies keep it, so
 * that two workers never want the same address and port towards the target, and a
 * response says whose it is.  Twin: worker_of() in pycopy/session/addresses.py.
 */
static __always_inline int is_mine(struct pycopy_packet *packet,
				   const struct pycopy_settings *settings)
{
	u32 hash = ntohs(packet->tcp.src_port);

	if (settings->workers <= 1)
		return 1;
#define PYCOPY_MIX(factor, shift) hash = (u32)(hash * (factor)), hash ^= hash >> (shift);
	PYCOPY_WORKER_MIX(PYCOPY_MIX)
#undef PYCOPY_MIX
	return (u64)hash * settings->workers >> 32 == settings->worker;
}

/* Follows the flow's handshake.  Zero: a pure ACK that tells the session engine
 * nothing.  The one that completes a handshake does: its ack is the online
 * server's irs.
 */
static __always_inline int follow_handshake(struct pycopy_segment *segment)
{
	struct pycopy_handshake *handshake;

	if ((segment->tcp_flags & (PYCOPY_TCP_SYN | PYCOPY_TCP_ACK)) == PYCOPY_TCP_SYN) {
		struct pycopy_handshake begun = {segment->seq, segment->seg_len};

		pycopy_update(PYCOPY_MAP_HANDSHAKES, &segment->key, &begun, 0);
		return 1;
	}
	handshake = pycopy_lookup(PYCOPY_MAP_HANDSHAKES, &segment->key);
	if (!segment->seg_len &&
	    !(segment->tcp_flags & (PYCOPY_TCP_SYN | PYCOPY_TCP_FIN | PYCOPY_TCP_RST)) &&
	    (!handshake || !(segment->tcp_flags & PYCOPY_TCP_ACK) ||
	     segment->seq - handshake->iss - 1 > handshake->syn_len))
		return 0;
	if (handshake)
		pycopy_delete(PYCOPY_MAP_HANDSHAKES, &segment->key);
	return 1;
}

/* A client's segment of service number `service`. */
static __always_inline void copy(PYCOPY_CTX *ctx, struct pycopy_scratch *work, int service)
{
	struct pycopy_segment *segment = &work->segment;
	struct pycopy_packet *packet = &work->packet;
	u64 now_ns = pycopy_now();
	int parsed, kept = 0;

	pycopy_count(PYCOPY_CAP_SELECTED, 1);
	if (pycopy_has_lapsed(now_ns, PYCOPY_LAPSE_NS)) {
		pycopy_count(PYCOPY_CAP_LAPSED, 1);
		return;
	}
	if (!pycopy_filter(ctx, packet->frame_bytes)) {
		pycopy_count(PYCOPY_CAP_FILTERED, 1);
		return;
	}
	parsed = pycopy_parse_tcp(ctx, packet, work);
	if (parsed) {
		pycopy_count(parsed == PYCOPY_TRUNCATED ? PYCOPY_CAP_TRUNCATED
							: PYCOPY_CAP_MALFORMED,
			     1);
		return;
	}
	segment->kind = PYCOPY_CLIENT;
	segment->service = service;
	pycopy_set_key(&segment->key, packet->src, packet->tcp.src_port, packet->dst,
		       packet->tcp.dst_port);
#if PYCOPY_FASTPATH
	kept = pycopy_keep_client(ctx, packet, segment, now_ns);
	if (kept == PYCOPY_KEPT || kept == PYCOPY_IDLE_ACK) {
		pycopy_count(kept == PYCOPY_KEPT ? PYCOPY_CAP_KEPT : PYCOPY_CAP_PURE_ACK, 1);
		return;
	}
#endif
	if (!kept && !follow_handshake(segment)) {
		pycopy_count(PYCOPY_CAP_PURE_ACK, 1);
		return;
	}
	segment->time_ns = bpf_ktime_get_ns();
	emit_pieces(ctx, work, packet->payload_at);
}

static __always_inline void capture(PYCOPY_CTX *ctx)
{
	struct pycopy_settings *settings = pycopy_settings();
	struct pycopy_scratch *work = pycopy_scratch();
	int parsed, service;

	if (!settings || !work) /* never: the verifier asks */
		return;
	parsed = pycopy_parse_flow(ctx, &work->packet);
	if (parsed == PYCOPY_FRAGMENT) {
		/* Its port may be unreadable: the first worker's, all of them. */
		if (settings->worker)
			return;
		pycopy_count(PYCOPY_CAP_SELECTED, 1);
		pycopy_count(PYCOPY_CAP_FRAGMENT, 1);
		return;
	}
	/* Without ports it is nobody's: no TCP would accept it either. */
	if (parsed)
		return;
	service = find_service(&work->packet);
	if (service >= 0 && is_mine(&work->packet, settings))
		copy(ctx, work, service);
}

int pycopy_capture(PYCOPY_CTX *ctx)
{
	capture(ctx);
	return PYCOPY_CONTINUE;
}
