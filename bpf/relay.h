/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * A response becomes a datagram to its replay: TC only, in place of a record.  Only its
 * headers are wanted (struct pycopy_segment), so a super-segment of 64 KB leaves as one
 * short frame, and no byte of it passes through user space.
 *
 * The packet may be the one that the target's TCP keeps for retransmission.
 * bpf_skb_change_tail() gives it data of its own before anything is written, and takes
 * segmentation off it.  What may stay is a checksum that the device is to complete, at
 * its old place: see struct pycopy_datagram.
 */
#ifndef PYCOPY_RELAY_H
#define PYCOPY_RELAY_H

#include "frame.h"

#define PYCOPY_RELAY_HEADERS_BYTES (PYCOPY_L2_BYTES + 40 + PYCOPY_UDP_BYTES)

/* Headers, put together beside the stack, as in struct pycopy_scratch. */
struct pycopy_relay_work {
	__u8 headers[PYCOPY_RELAY_HEADERS_BYTES];
	__u8 pad[2]; /* the datagram is aligned where the headers are IPv6's */
	struct pycopy_datagram datagram;
};

_Static_assert(sizeof(struct pycopy_relay_work) <= PYCOPY_RELAY_WORK_BYTES,
	       "the map's values are too short");

static __always_inline long pycopy_relay_as(PYCOPY_CTX *ctx, const struct pycopy_relay *relay,
					    const struct pycopy_segment *segment,
					    struct pycopy_relay_work *work, const u32 ip_bytes)
{
	const u32 udp_at = PYCOPY_L2_BYTES + ip_bytes, payload_at = udp_at + PYCOPY_UDP_BYTES;
	const u32 udp_bytes = PYCOPY_UDP_BYTES + sizeof(work->datagram);
	u8 *udp = work->headers + udp_at;

	pycopy_put_ip(work->headers, relay->l2, relay->source, relay->destination, ip_bytes,
		      PYCOPY_IP_UDP, udp_bytes, 0);
	__builtin_memcpy(udp, &relay->source_port, 2);
	__builtin_memcpy(udp + 2, &relay->destination_port, 2);
	pycopy_put16(udp + 4, htons(udp_bytes));
	pycopy_put16(udp + 6, 0); /* none: the cookie says more than a checksum would */
	work->datagram.cookie = relay->cookie;
	work->datagram.junk = 0;
	work->datagram.kind = PYCOPY_RELAYED_SEGMENT;
	work->datagram.reserved = 0;
	work->datagram.segment = *segment;
	/* A tag says where the response was going. */
	if (ctx->vlan_present && bpf_skb_vlan_pop(ctx))
		return -1;
	if (bpf_skb_change_tail(ctx, payload_at + sizeof(work->datagram), 0))
		return -1;
	if (bpf_skb_store_bytes(ctx, 0, work->headers, payload_at, 0))
		return -1;
	return bpf_skb_store_bytes(ctx, payload_at, &work->datagram, sizeof(work->datagram), 0);
}

/* Zero: the packet is the datagram, to be redirected to relay->ifindex.  Else it is still
 * to be swallowed, but the response has no record yet.
 */
static __always_inline long pycopy_relay(PYCOPY_CTX *ctx, const struct pycopy_packet *packet,
					 const struct pycopy_relay *relay,
					 const struct pycopy_segment *segment,
					 struct pycopy_relay_work *work)
{
	/* The checksum must be where the datagram expects it: plain headers only. */
	if (PYCOPY_L2_BYTES != 14 || !relay->ifindex || relay->family != packet->family)
		return -1;
	if (packet->family == 4 && packet->tcp_at == PYCOPY_L2_BYTES + 20)
		return pycopy_relay_as(ctx, relay, segment, work, 20);
	if (packet->family == 6 && packet->tcp_at == PYCOPY_L2_BYTES + 40)
		return pycopy_relay_as(ctx, relay, segment, work, 40);
	return -1;
}

#endif
