/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * ICMP "packet too big" (RFC 1191, RFC 8201) about one of our copies: from the
 * message that parse.h found to a PYCOPY_TOO_BIG record.  Knows the copies as
 * parse.h finds them: an IPv4 header without options, an IPv6 header without
 * extensions, TCP right behind it.  Of TCP only the first 8 bytes are sure to be
 * in the message; whether they are worth believing is the session engine's to say.
 */
#ifndef PYCOPY_TOOBIG_H
#define PYCOPY_TOOBIG_H

#include "parse.h"

#define PYCOPY_ICMP_UNREACHABLE 3
#define PYCOPY_ICMP_FRAG_NEEDED 4
#define PYCOPY_ICMPV6_TOO_BIG	2

struct pycopy_icmp {
	__u8 type;
	__u8 code;
	__u16 check;
	union {
		__be32 mtu; /* ICMPv6 */
		__be16 unused_mtu[2];
	};
};

/* What a router sends back of the packet: its IP header, and this much of TCP. */
struct pycopy_tcp_start {
	__be16 src_port;
	__be16 dst_port;
	__be32 seq;
};

struct pycopy_too_big_ipv4 {
	struct pycopy_icmp icmp;
	struct pycopy_ipv4 ip;
	struct pycopy_tcp_start tcp;
};

struct pycopy_too_big_ipv6 {
	struct pycopy_icmp icmp;
	struct pycopy_ipv6 ip;
	struct pycopy_tcp_start tcp;
};

static __always_inline int pycopy_too_big_ipv4(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
					       struct pycopy_segment *segment)
{
	struct pycopy_too_big_ipv4 message = {};

	if (PYCOPY_LOAD_BYTES(ctx, packet->icmp_at, &message, sizeof(message)) ||
	    message.icmp.type != PYCOPY_ICMP_UNREACHABLE ||
	    message.icmp.code != PYCOPY_ICMP_FRAG_NEEDED || message.ip.version_ihl != 0x45 ||
	    message.ip.protocol != PYCOPY_IP_TCP)
		return 0;
	packet->src[0] = packet->src[1] = packet->dst[0] = packet->dst[1] = 0;
	packet->src[2] = packet->dst[2] = htonl(0xffff);
	packet->src[3] = message.ip.src;
	packet->dst[3] = message.ip.dst;
	segment->mss = ntohs(message.icmp.unused_mtu[1]);
	segment->seq = ntohl(message.tcp.seq);
	pycopy_set_key(&segment->key, packet->src, message.tcp.src_port, packet->dst,
		       message.tcp.dst_port);
	return 1;
}

static __always_inline int pycopy_too_big_ipv6(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
					       struct pycopy_segment *segment)
{
	struct pycopy_too_big_ipv6 message = {};
	u32 mtu;

	if (PYCOPY_LOAD_BYTES(ctx, packet->icmp_at, &message, sizeof(message)) ||
	    message.icmp.type != PYCOPY_ICMPV6_TOO_BIG || message.ip.next != PYCOPY_IP_TCP)
		return 0;
	__builtin_memcpy(packet->src, message.ip.src, sizeof(packet->src));
	__builtin_memcpy(packet->dst, message.ip.dst, sizeof(packet->dst));
	mtu = ntohl(message.icmp.mtu);
	segment->mss = mtu < 0xffff ? mtu : 0xffff;
	segment->seq = ntohl(message.tcp.seq);
	pycopy_set_key(&segment->key, packet->src, message.tcp.src_port, packet->dst,
		       message.tcp.dst_port);
	return 1;
}

/* True if the packet, which is not TCP, is such a message: then *segment is its record
 * but for time_ns, and the packet's addresses are those of the copy it is about.
 */
static __always_inline int pycopy_parse_too_big(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
						struct pycopy_segment *segment)
{
	if (!packet->icmp_at)
		return 0;
	__builtin_memset(segment, 0, sizeof(*segment));
	segment->kind = PYCOPY_TOO_BIG;
	segment->family = packet->family;
	return packet->family == 4 ? pycopy_too_big_ipv4(ctx, packet, segment)
				   : pycopy_too_big_ipv6(ctx, packet, segment);
}

#endif
