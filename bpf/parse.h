/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * From a frame to a struct pycopy_segment, in two steps: pycopy_parse_flow()
 * finds the TCP header and reads addresses and ports, which is all that is
 * needed to say whose segment it is; pycopy_parse_tcp() reads the rest.  Knows
 * nothing of services, claims, maps or verdicts.
 *
 * Every step names the reason when it cannot go on, and nothing is read that
 * the IP length does not cover: padding of short frames is not TCP.  A later
 * fragment's ports are not readable at all.
 *
 * Reads go through the load-bytes helpers, because a super-segment at TC may
 * keep only some of its headers in the linear part (data..data_end), and a
 * multi-buffer XDP frame likewise.
 *
 * The wire formats are spelled out here: a kernel header for them would be the only
 * reason to need a header package on a production host.
 */
#ifndef PYCOPY_PARSE_H
#define PYCOPY_PARSE_H

#include "hook.h"
#include "pycopy.h"

#define PYCOPY_ETH_IPV4	  0x0800
#define PYCOPY_ETH_IPV6	  0x86dd
#define PYCOPY_ETH_8021Q  0x8100
#define PYCOPY_ETH_8021AD 0x88a8
#define PYCOPY_VLAN_TAGS  2

/* IPv6 next-header values (RFC 8200 4). */
#define PYCOPY_IP_HOP_BY_HOP  0
#define PYCOPY_IP_ICMP	      1
#define PYCOPY_IP_TCP	      6
#define PYCOPY_IP_ROUTING     43
#define PYCOPY_IP_FRAGMENT    44
#define PYCOPY_IP_ICMPV6      58
#define PYCOPY_IP_DESTINATION 60
#define PYCOPY_IP_EXTENSIONS  8 /* more of them than that is nobody's TCP */

/* The longest datagram whose length its header can state; a longer one (BIG
 * TCP, jumbogram) states 0.
 */
#define PYCOPY_IP_MAX_BYTES 65535

/* Headers further in than that are read by the helper. */
#define PYCOPY_LINEAR_BYTES 256

#define PYCOPY_TCP_FIN 0x01
#define PYCOPY_TCP_SYN 0x02
#define PYCOPY_TCP_RST 0x04
#define PYCOPY_TCP_PSH 0x08
#define PYCOPY_TCP_ACK 0x10

#define PYCOPY_TCP_OPTIONS_BYTES     40
#define PYCOPY_TCP_OPTION_END	     0
#define PYCOPY_TCP_OPTION_NOP	     1
#define PYCOPY_TCP_OPTION_MSS	     2
#define PYCOPY_TCP_OPTION_WSCALE     3
#define PYCOPY_TCP_OPTION_SACK_PERM  4
#define PYCOPY_TCP_OPTION_SACK	     5
#define PYCOPY_TCP_OPTION_TIMESTAMPS 8
/* Two NOPs, then timestamps: the one layout that real stacks use (RFC 7323 A). */
#define PYCOPY_NOP_NOP_TIMESTAMPS htonl(0x0101080a)

struct pycopy_vlan {
	__be16 tci;
	__be16 protocol;
};

struct pycopy_ipv4 {
	__u8 version_ihl;
	__u8 tos;
	__be16 total_bytes;
	__be16 id;
	__be16 fragment; /* 0x2000 more fragments, 0x1fff offset */
	__u8 ttl;
	__u8 protocol;
	__u16 check;
	__be32 src;
	__be32 dst;
};

struct pycopy_ipv6 {
	__be32 version_class_label;
	__be16 payload_bytes;
	__u8 next;
	__u8 hops;
	__be32 src[4];
	__be32 dst[4];
};

/* The first half of every extension header we follow. */
struct pycopy_ipv6_extension {
	__u8 next;
	__u8 units; /* of 8 bytes beyond the first; reserved in a fragment header */
	union {
		__be16 fragment; /* 0xfff8 offset, 1 more fragments */
		struct {
			__u8 type;
			__u8 segments_left;
		} routing;
	};
};

struct pycopy_tcp {
	__be16 src_port;
	__be16 dst_port;
	__be32 seq;
	__be32 ack;
	__u8 data_offset; /* high nibble, in 4 bytes */
	__u8 flags;
	__be16 wnd;
	__u16 check;
	__u16 urgent;
};

enum pycopy_parsed {
	PYCOPY_PARSED = 0,
	PYCOPY_NOT_TCP,
	PYCOPY_FRAGMENT,  /* of TCP; packet.ports_known says whether ports could be read */
	PYCOPY_TRUNCATED, /* the frame ends before its headers say */
	PYCOPY_MALFORMED, /* the headers contradict themselves or each other */
};

struct pycopy_packet {
	__u32 frame_bytes;
	__u32 end;    /* offset at which the IP header says the datagram ends */
	__u32 tcp_at; /* offset of the TCP header */
	__u32 payload_at;
	__u32 icmp_at; /* offset of an ICMP or ICMPv6 header where TCP could be, or 0 */
	__be32 src[4]; /* IPv4-mapped for IPv4 */
	__be32 dst[4];
	struct pycopy_tcp tcp;
	__u8 family;   /* 4 or 6 */
	__u8 extended; /* extension headers stand before TCP */
	__u8 ports_known;
	__u8 tcp_known; /* all 20 bytes of tcp, not only the ports */
} __attribute__((aligned(8)));

/* `bytes` at offset `at` into *to; non-zero if the frame ends before that.  Nearly
 * always the bytes are in the linear part, a few times cheaper to read than by a
 * helper.
 */
static __always_inline int pycopy_read(PYCOPY_CTX *ctx, u64 at, void *to, const u64 bytes)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;

	PYCOPY_PIN(at);
	if (at < PYCOPY_LINEAR_BYTES && data + at + bytes <= data_end) {
		__builtin_memcpy(to, data + at, bytes);
		return 0;
	}
	return PYCOPY_LOAD_BYTES(ctx, at, to, bytes);
}

static __always_inline int pycopy_parse_ipv4(PYCOPY_CTX *ctx, u32 at, struct pycopy_packet *packet)
{
	struct pycopy_ipv4 ip;
	u32 header_bytes, total_bytes;

	if (pycopy_read(ctx, at, &ip, sizeof(ip)))
		return PYCOPY_TRUNCATED;
	header_bytes = (ip.version_ihl & 15) * 4;
	if (ip.version_ihl >> 4 != 4 || header_bytes < sizeof(ip))
		return PYCOPY_MALFORMED;
	if (ip.protocol != PYCOPY_IP_TCP) {
		if (ip.protocol == PYCOPY_IP_ICMP && !(ip.fragment & htons(0x3fff)))
			packet->icmp_at = at + header_bytes;
		packet->family = 4;
		return PYCOPY_NOT_TCP;
	}
	total_bytes = ntohs(ip.total_bytes);
	if (!total_bytes) {
		total_bytes = packet->frame_bytes - at;
		if (total_bytes <= PYCOPY_IP_MAX_BYTES)
			return PYCOPY_MALFORMED;
	}
	packet->family = 4;
	packet->end = at + total_bytes;
	packet->tcp_at = at + header_bytes;
	packet->src[2] = packet->dst[2] = htonl(0xffff);
	packet->src[3] = ip.src;
	packet->dst[3] = ip.dst;
	if (ip.fragment & htons(0x1fff))
		return PYCOPY_FRAGMENT;
	/* Of a first fragment the ports are still worth reading. */
	packet->ports_known = 1;
	return ip.fragment & htons(0x2000) ? PYCOPY_FRAGMENT : PYCOPY_PARSED;
}

/* From the first extension header at `at`, of kind `next`, to TCP. */
static __always_inline int pycopy_skip_extensions(PYCOPY_CTX *ctx, u32 at, u8 next,
						  struct pycopy_packet *packet)
{
	struct pycopy_ipv6_extension extension;
	int parsed = PYCOPY_PARSED;

#pragma clang loop unroll(disable)
	for (u64 i = 0; i < PYCOPY_IP_EXTENSIONS; i++) {
		PYCOPY_PIN(i);
		if (next == PYCOPY_IP_TCP)
			break;
		if (next != PYCOPY_IP_HOP_BY_HOP && next != PYCOPY_IP_ROUTING &&
		    next != PYCOPY_IP_FRAGMENT && next != PYCOPY_IP_DESTINATION)
			return PYCOPY_NOT_TCP;
		packet->extended = 1;
		if (at + 8 > packet->end)
			return PYCOPY_MALFORMED;
		if (PYCOPY_LOAD_BYTES(ctx, at, &extension, sizeof(extension)))
			return PYCOPY_TRUNCATED;
		if (next == PYCOPY_IP_FRAGMENT) {
			if (extension.fragment & htons(0xfff8))
				/* What came before TCP, if anything, is in the first one. */
				return extension.next == PYCOPY_IP_TCP ? PYCOPY_FRAGMENT
								       : PYCOPY_NOT_TCP;
			/* Neither offset nor more: an atomic fragment, whole (RFC 6946). */
			if (extension.fragment & htons(1))
				parsed = PYCOPY_FRAGMENT;
			at += 8;
		} else {
			/* On its way through this host to another address. */
			if (next == PYCOPY_IP_ROUTING && extension.routing.segments_left)
				return PYCOPY_NOT_TCP;
			at += (extension.units + 1) * 8;
		}
		next = extension.next;
	}
	if (next != PYCOPY_IP_TCP)
		return PYCOPY_MALFORMED;
	packet->tcp_at = at;
	packet->ports_known = 1;
	return parsed;
}

static __always_inline int pycopy_parse_ipv6(PYCOPY_CTX *ctx, u32 at, struct pycopy_packet *packet)
{
	struct pycopy_ipv6 ip;
	u32 payload_bytes;

	if (pycopy_read(ctx, at, &ip, sizeof(ip)))
		return PYCOPY_TRUNCATED;
	if ((ntohl(ip.version_class_label) >> 28) != 6)
		return PYCOPY_MALFORMED;
	at += sizeof(ip);
	payload_bytes = ntohs(ip.payload_bytes);
	if (!payload_bytes) {
		payload_bytes = packet->frame_bytes - at;
		if (payload_bytes <= PYCOPY_IP_MAX_BYTES)
			return PYCOPY_MALFORMED;
	}
	packet->family = 6;
	packet->end = at + payload_bytes;
	__builtin_memcpy(packet->src, ip.src, sizeof(ip.src));
	__builtin_memcpy(packet->dst, ip.dst, sizeof(ip.dst));
	if (ip.next == PYCOPY_IP_ICMPV6)
		packet->icmp_at = at;
	return pycopy_skip_extensions(ctx, at, ip.next, packet);
}

/* Everything before TCP's header; ports_known says whether the ports can be read. */
static __always_inline int pycopy_parse_ip(PYCOPY_CTX *ctx, struct pycopy_packet *packet)
{
	u32 at = 0;

#if PYCOPY_L2_BYTES
	struct pycopy_vlan tag;

	/* The EtherType stands where a tag's inner protocol would. */
	at = PYCOPY_L2_BYTES;
	if (pycopy_read(ctx, at - sizeof(tag), &tag, sizeof(tag)))
		return PYCOPY_TRUNCATED;
	for (int i = 0; i < PYCOPY_VLAN_TAGS; i++) {
		if (tag.protocol != htons(PYCOPY_ETH_8021Q) &&
		    tag.protocol != htons(PYCOPY_ETH_8021AD))
			break;
		if (PYCOPY_LOAD_BYTES(ctx, at, &tag, sizeof(tag)))
			return PYCOPY_TRUNCATED;
		at += sizeof(tag);
	}
	if (tag.protocol == htons(PYCOPY_ETH_IPV4))
		return pycopy_parse_ipv4(ctx, at, packet);
	if (tag.protocol == htons(PYCOPY_ETH_IPV6))
		return pycopy_parse_ipv6(ctx, at, packet);
#else
	u8 version;

	if (pycopy_read(ctx, at, &version, sizeof(version)))
		return PYCOPY_TRUNCATED;
	if (version >> 4 == 4)
		return pycopy_parse_ipv4(ctx, at, packet);
	if (version >> 4 == 6)
		return pycopy_parse_ipv6(ctx, at, packet);
#endif
	return PYCOPY_NOT_TCP;
}

/* PYCOPY_PARSED: a TCP segment whose addresses and ports are in *packet, all of it anew.
 * Anything else: the reason why not.
 */
static __always_inline int pycopy_parse_flow(PYCOPY_CTX *ctx, struct pycopy_packet *packet)
{
	int parsed, missing;

	__builtin_memset(packet, 0, sizeof(*packet));
	packet->frame_bytes = PYCOPY_FRAME_BYTES(ctx);
	parsed = pycopy_parse_ip(ctx, packet);
	if (!packet->ports_known)
		return parsed;
	packet->ports_known = 0;
	if (packet->tcp_at + 4 > packet->end)
		return parsed ? parsed : PYCOPY_MALFORMED;
	/* The verifier would follow direct reads at every offset that extension
	 * headers can lead to, for a case that hardly occurs.
	 */
	if (packet->extended)
		missing = PYCOPY_LOAD_BYTES(ctx, packet->tcp_at, &packet->tcp, sizeof(packet->tcp));
	else
		missing = pycopy_read(ctx, packet->tcp_at, &packet->tcp, sizeof(packet->tcp));
	packet->tcp_known = !missing;
	if (missing && PYCOPY_LOAD_BYTES(ctx, packet->tcp_at, &packet->tcp, 4))
		return parsed ? parsed : PYCOPY_TRUNCATED;
	packet->ports_known = 1;
	return parsed;
}

static __always_inline u16 pycopy_get16(const u8 *at)
{
	return at[0] << 8 | at[1];
}

static __always_inline u32 pycopy_get32(const u8 *at)
{
	return (u32)pycopy_get16(at) << 16 | pycopy_get16(at + 2);
}

/* Where a packet is taken apart and a record put together: in a per-CPU map, not on the stack.
 * There is no room for it: the stack has 512 bytes, and clang 19 spills more than clang 14.  And
 * the verifier follows every byte of the stack: it would walk the options loop once for each
 * combination of headers and options it might have met so far.
 */
struct pycopy_scratch {
	struct pycopy_segment segment;
	__u8 payload[PYCOPY_PIECE_BYTES]; /* behind the segment: together they are a record */
	__u8 pos;			  /* in options[] */
	/* Long enough for an option of ours that begins in the last byte. */
	__u8 options[64 + 12];
	struct pycopy_packet packet;
};

_Static_assert(sizeof(struct pycopy_scratch) <= PYCOPY_SCRATCH_BYTES,
	       "the map's values are too short");

static __always_inline int pycopy_parse_sack(PYCOPY_CTX *ctx, u32 at, u64 bytes,
					     struct pycopy_segment *segment)
{
	if (bytes % 8 || !pycopy_within(&bytes, 8, sizeof(segment->sack)))
		return PYCOPY_PARSED; /* the kernel ignores such an option, too */
	/* Of several such options the last counts, all of it. */
	__builtin_memset(segment->sack, 0, sizeof(segment->sack));
	if (PYCOPY_LOAD_BYTES(ctx, at, segment->sack, bytes))
		return PYCOPY_TRUNCATED;
	segment->sack_blocks = bytes / 8;
	for (int i = 0; i < 8; i++)
		segment->sack[i] = ntohl(segment->sack[i]);
	return PYCOPY_PARSED;
}

/* One option at `at`, of any kind but END and NOP.  Of a kind we know with a length it cannot
 * have, it is passed over, as the kernel does.
 */
static __always_inline int pycopy_parse_option(PYCOPY_CTX *ctx, u32 at, const u8 *option,
					       u64 length, struct pycopy_segment *segment)
{
	if (option[0] == PYCOPY_TCP_OPTION_TIMESTAMPS && length == 10) {
		segment->options |= PYCOPY_OPT_TIMESTAMPS;
		segment->tsval = pycopy_get32(option + 2);
		segment->tsecr = pycopy_get32(option + 6);
	} else if (option[0] == PYCOPY_TCP_OPTION_SACK) {
		return pycopy_parse_sack(ctx, at + 2, length - 2, segment);
	} else if (!(segment->tcp_flags & PYCOPY_TCP_SYN)) {
		return PYCOPY_PARSED; /* the others have a meaning in a SYN only */
	} else if (option[0] == PYCOPY_TCP_OPTION_MSS && length == 4) {
		segment->options |= PYCOPY_OPT_MSS;
		segment->mss = pycopy_get16(option + 2);
	} else if (option[0] == PYCOPY_TCP_OPTION_WSCALE && length == 3) {
		segment->options |= PYCOPY_OPT_WSCALE;
		segment->wscale = option[2] < PYCOPY_WSCALE_MAX ? option[2] : PYCOPY_WSCALE_MAX;
	} else if (option[0] == PYCOPY_TCP_OPTION_SACK_PERM && length == 2) {
		segment->options |= PYCOPY_OPT_SACK_PERM;
	}
	return PYCOPY_PARSED;
}

/* All of them; a length that leads nowhere makes the segment malformed. */
static __always_inline int pycopy_parse_options(PYCOPY_CTX *ctx, u32 at, u64 bytes,
						struct pycopy_scratch *scratch)
{
	struct pycopy_segment *segment = &scratch->segment;
	int parsed;

	if (!pycopy_within(&bytes, 4, PYCOPY_TCP_OPTIONS_BYTES))
		return PYCOPY_PARSED;
	/* What nearly every segment has, and nothing else. */
	if (bytes == PYCOPY_TIMESTAMPS_BYTES) {
		if (pycopy_read(ctx, at, scratch->options, PYCOPY_TIMESTAMPS_BYTES))
			return PYCOPY_TRUNCATED;
		if (pycopy_get32(scratch->options) == ntohl(PYCOPY_NOP_NOP_TIMESTAMPS)) {
			segment->options |= PYCOPY_OPT_TIMESTAMPS;
			segment->tsval = pycopy_get32(scratch->options + 4);
			segment->tsecr = pycopy_get32(scratch->options + 8);
			return PYCOPY_PARSED;
		}
	} else if (PYCOPY_LOAD_BYTES(ctx, at, scratch->options, bytes)) {
		return PYCOPY_TRUNCATED;
	}
	scratch->pos = 0;
#pragma clang loop unroll(disable)
	for (u64 i = 0; i < PYCOPY_TCP_OPTIONS_BYTES; i++) {
		u64 pos = scratch->pos & 63;
		const u8 *option = scratch->options + pos;
		u64 length;

		PYCOPY_PIN(i);
		if (pos >= bytes || option[0] == PYCOPY_TCP_OPTION_END)
			break;
		if (option[0] == PYCOPY_TCP_OPTION_NOP) {
			scratch->pos = pos + 1;
			continue;
		}
		length = option[1];
		if (pos + 2 > bytes || length < 2 || pos + length > bytes)
			return PYCOPY_MALFORMED;
		scratch->pos = pos + length;
		parsed = pycopy_parse_option(ctx, at + pos, option, length, segment);
		if (parsed)
			return parsed;
	}
	return PYCOPY_PARSED;
}

/* The TCP header behind a flow that was parsed, into scratch->segment, all of it
 * anew; kind, service, key, payload_bytes and time_ns are left to the caller.
 */
static __always_inline int pycopy_parse_tcp(PYCOPY_CTX *ctx, struct pycopy_packet *packet,
					    struct pycopy_scratch *scratch)
{
	struct pycopy_segment *segment = &scratch->segment;
	u32 header_bytes;

	if (packet->tcp_at + sizeof(packet->tcp) > packet->end)
		return PYCOPY_MALFORMED;
	if (!packet->tcp_known || packet->end > packet->frame_bytes)
		return PYCOPY_TRUNCATED;
	header_bytes = (packet->tcp.data_offset >> 4) * 4;
	if (header_bytes < sizeof(packet->tcp) || packet->tcp_at + header_bytes > packet->end)
		return PYCOPY_MALFORMED;
	packet->payload_at = packet->tcp_at + header_bytes;
	__builtin_memset(segment, 0, sizeof(*segment));
	segment->family = packet->family;
	segment->tcp_flags = packet->tcp.flags;
	segment->wnd = ntohs(packet->tcp.wnd);
	segment->seq = ntohl(packet->tcp.seq);
	segment->ack = ntohl(packet->tcp.ack);
	segment->seg_len = packet->end - packet->payload_at;
	return pycopy_parse_options(ctx, packet->tcp_at + sizeof(packet->tcp),
				    header_bytes - sizeof(packet->tcp), scratch);
}

static __always_inline void pycopy_set_key(struct pycopy_key *key, const __be32 *client,
					   __be16 client_port, const __be32 *server,
					   __be16 server_port)
{
	__builtin_memcpy(key->client_addr, client, sizeof(key->client_addr));
	__builtin_memcpy(key->server_addr, server, sizeof(key->server_addr));
	__builtin_memcpy(key->client_port, &client_port, sizeof(client_port));
	__builtin_memcpy(key->server_port, &server_port, sizeof(server_port));
}

static __always_inline void pycopy_set_endpoint(struct pycopy_endpoint *endpoint,
						const __be32 *address, __be16 port)
{
	__builtin_memcpy(endpoint->addr, address, sizeof(endpoint->addr));
	__builtin_memcpy(endpoint->port, &port, sizeof(port));
}

#endif
